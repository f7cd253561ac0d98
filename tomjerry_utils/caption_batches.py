"""Captions through the Batch API: half the price, an answer within a day.

Pictures are put into shards, one request a line. A shard's intent, with its requests and their
worst price, is in the store before anything of it exists at the server, and its name travels in the
batch's metadata: whenever a process ends, the next one finds the batch again, or knows that there
is none. Results and requests lie in `batches/` of the run's folder, which is all that another
machine needs to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.batch_server import BatchServer, Refused
from tomjerry_utils.caption_answers import judge, settled
from tomjerry_utils.caption_requests import ATTEMPTS
from tomjerry_utils.caption_store import Batch, NoBudget, Sent
from tomjerry_utils.captioner import (
    BATCH_SHARE,
    Caption,
    OpenAISource,
    Session,
    encode,
    open_session,
)
from tomjerry_utils.progress import Progress, progress
from tomjerry_utils.runs import atomic_path, hash_file, log

FOLDER = "batches"
SHARD_BYTES = 180_000_000  # the API takes 200 MB
SHARD_REQUESTS = 50_000  # as the API takes
LONGEST_POLL = 300.0  # seconds between looks at a batch


def run_batches(
    source: OpenAISource,
    rows: Sequence[dict[str, Any]],
    images: Path,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_requests: int = SHARD_REQUESTS,
    poll: float = 10.0,
    wait: bool = True,
) -> Iterator[Caption]:
    """Caption pictures in batches; those with an answer in the store cost nothing.

    Args:
        rows: each with `file_name`; none for all pictures that batches of this store were about.
        images: need not be there to collect results, nor for requests to be sent again.
        folder: of the run; `batches/` in it holds what goes up and what comes down.
        shard_bytes: largest file of requests; `shard_requests` is its most lines.
        poll: seconds before the first look at a batch; the pauses grow from there.
        wait: until all is done; otherwise submit, collect what is ready, and return.

    Raises:
        UserError: as for direct requests; the server has no Batch API, refuses a batch, or a batch
            was cancelled there. All answers that arrived are yielded first, and kept.
    """
    from filelock import FileLock, Timeout

    if shard_bytes < 1 or shard_requests < 1 or not poll > 0:
        raise UserError("the shards' size and the pause between polls must be above 0")
    source.store.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(source.store.with_suffix(".batches.lock"), timeout=0)
        with lock, open_session(source) as session:
            run = _Run(session, images, folder / FOLDER, shard_bytes, shard_requests)
            yield from run.captions(rows, poll, wait)
    except Timeout:
        raise UserError(
            f"another process is at the batches of {source.store}: wait, or end it"
        ) from None


class _Run:
    """One pass: what is to be asked, the shards, and what comes back."""

    def __init__(
        self, session: Session, images: Path, folder: Path, shard_bytes: int, shard_requests: int
    ) -> None:
        self._session, self._source, self._store = session, session.source, session.store
        self._images, self._folder = images, folder
        self._shard_bytes, self._shard_requests = shard_bytes, shard_requests
        self._server = BatchServer(session)
        self._names: dict[str, list[str]] = {}  # sha256 → file names, of all to be answered
        self._unreadable: dict[str, str] = {}  # sha256 → why
        self._trouble = ""
        self._crowded: list[Batch] = []  # batches that the server's queue had no room for
        self._in_turn = False  # one batch at a time, as the server's queue holds no more

    def captions(
        self, rows: Sequence[dict[str, Any]], poll: float, wait: bool
    ) -> Iterator[Caption]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".part-*"):
            left.unlink()
        yield from self._look_up(rows)
        billed: set[str] = set()
        total, pause = sum(map(len, self._names.values())), poll
        yield from self._done(billed)
        self._session.announce(total, sum(map(len, self._names.values())), batch=True)
        with progress(total, "batches", unit="picture") as bar:
            bar.update(total - sum(map(len, self._names.values())))
            while self._names:
                self._store.refresh()
                for batch in self._under_way():
                    if not batch.server_id:
                        self._create(batch, fresh=False)
                free = not self._trouble and not (self._in_turn and self._under_way())
                spent = free and self._submit()
                together = self._under_way()
                ended = [self._collect(batch, bar) for batch in together]
                self._make_room(together)
                for caption in self._done(billed):
                    bar.update()
                    yield caption
                if self._trouble:
                    raise UserError(self._trouble)
                if any(ended):
                    pause = poll  # what came back unanswered goes up again at once
                    continue
                if spent and not self._under_way() and not self._store.busy():
                    raise self._session.no_budget()
                if not wait:
                    break
                if self._names:
                    time.sleep(pause * random.uniform(0.8, 1.0))
                    pause = min(pause * 1.5, max(LONGEST_POLL, poll))
        if under_way := self._under_way():
            log(
                f"captions: {self._store.in_batches} requests are under way in {len(under_way)} "
                "batches: run the same command again to collect them"
            )

    # -- what is to be asked

    def _look_up(self, rows: Sequence[dict[str, Any]]) -> Iterator[Caption]:
        """Find the pictures' contents; yields those that are not there."""
        known = {name: sent.sha256 for sent in self._sent() for name in sent.names}
        there = self._images.is_dir()
        for name in [row["file_name"] for row in rows] or known:
            try:
                sha256 = hash_file(self._images / name)
            except OSError as error:
                # On another machine only the store knows what was under a name.
                if there or name not in known:
                    reason = error.strerror or "cannot be read"
                    yield Caption(name, "", status="unreadable", reason=reason)
                    continue
                sha256 = known[name]
            self._names.setdefault(sha256, []).append(name)

    def _sent(self) -> Iterator[Sent]:
        """All requests of this source's batches."""
        for batch in self._batches():
            yield from batch.requests

    def _batches(self) -> Iterator[Batch]:
        """Batches of the store with this source's model, prompt and pictures' size."""
        for batch in self._store.batches.values():
            first = batch.requests[0]
            if first.key == self._source.key_of(first.sha256):
                yield batch

    def _under_way(self) -> list[Batch]:
        return [batch for batch in self._batches() if not batch.ended]

    def _done(self, billed: set[str]) -> Iterator[Caption]:
        """Captions of pictures that need no further request, which are then forgotten."""
        for sha256 in list(self._names):
            key = self._source.key_of(sha256)
            answers = self._store.answers.get(key, [])
            if settled(answers):
                record = answers[-1]
            elif sha256 in self._unreadable:
                record = {"status": "unreadable", "reason": self._unreadable[sha256]}
            elif self._store.batch_failures(key) >= ATTEMPTS and not self._store.held(key):
                record = {"status": "failed", "reason": f"came to nothing in {ATTEMPTS} batches"}
            else:
                continue
            for name in self._names.pop(sha256):
                yield self._session.caption(name, sha256, record, billed)

    # -- shards

    def _submit(self) -> bool:
        """Send up all that nobody is asking about; True where the budget ends before that."""
        free = [
            sha256
            for sha256 in self._names
            if not self._store.held(self._source.key_of(sha256))
            and self._store.batch_failures(self._source.key_of(sha256)) < ATTEMPTS
        ]
        lines = self._lines(free)
        ahead = next(lines, None)
        while ahead is not None:
            part = self._folder / f".part-{random.getrandbits(32):08x}"
            wanted: list[Sent] = []
            with part.open("wb") as file:
                room = self._source.budget - self._store.booked
                while ahead is not None:
                    sent, line = ahead
                    size = file.tell() + len(line)
                    full = size > self._shard_bytes or len(wanted) == self._shard_requests
                    # What certainly does not fit the budget need not be encoded either.
                    if wanted and (full or room < 0):
                        break
                    file.write(line)
                    wanted.append(sent)
                    room -= sent.usd
                    ahead = next(lines, None)
            try:
                batch = self._store.begin_batch(wanted, self._source.budget, settled=settled)
            except NoBudget:
                part.unlink()
                return True
            if batch is not None:
                _keep(part, self._shard(batch), {sent.key for sent in batch.requests})
                self._create(batch, fresh=True)
            part.unlink(missing_ok=True)
            if self._trouble or self._in_turn:
                break
        return False

    def _lines(self, wanted: Sequence[str]) -> Iterator[tuple[Sent, bytes]]:
        """Requests about pictures, from the pictures or from the shards they were in before."""
        earlier: dict[str, bytes] | None = None
        price = {sent.sha256: sent.usd for sent in self._sent()}
        for sha256 in wanted:
            key, names = self._source.key_of(sha256), tuple(self._names[sha256])
            try:
                picture, size = encode(self._images / names[0], self._source.longest_side)
            except UserError as error:
                if earlier is None:
                    missing = {self._source.key_of(s) for s in wanted}
                    earlier = self._earlier(missing)
                if key not in earlier:
                    self._unreadable[sha256] = str(error)
                    continue
                line = earlier[key]
                usd = max(price[sha256], self._store.dearest(self._source.model, batch=True))
            else:
                usd = self._session.worst(size, batch=True)
                request = {"custom_id": key, "method": "POST", "url": "/v1/responses"}
                body = self._session.body(picture, "responses")
                line = json.dumps({**request, "body": body}).encode() + b"\n"
            yield Sent("", key, sha256, usd, "", "", names), line

    def _earlier(self, keys: set[str]) -> dict[str, bytes]:
        """Lines of earlier shards, by key."""
        found = {}
        for batch in self._batches():
            if keys & {sent.key for sent in batch.requests} and self._shard(batch).is_file():
                for key, line in _keyed(self._shard(batch)):
                    if key in keys:
                        found[key] = line
        return found

    def _shard(self, batch: Batch) -> Path:
        return self._folder / f"{batch.id}.jsonl"

    # -- at the server

    def _create(self, batch: Batch, *, fresh: bool) -> None:
        """Make sure that an intended batch exists at the server, once."""
        try:
            name = self._server.create(self._shard(batch), batch.id, fresh=fresh)
        except Refused as refusal:
            reason = str(refusal)
            self._store.note_batch(batch, "batch_ended", status="refused", reason=reason)
            self._trouble = f"{self._source.base_url}: refuses a batch: {reason}"
            return
        if name:
            self._store.note_batch(batch, "batch_created", batch=name)
            log(f"captions: batch {name} created with {len(batch.requests)} requests")
        else:
            self._store.note_batch(batch, "batch_ended", status="never created")

    def _collect(self, batch: Batch, bar: Progress) -> bool:
        """Look at a batch, and take what it has brought when it has ended; True then."""
        name = batch.server_id
        if not name:
            return False
        found = self._server.look(name)
        bar.update(0)
        if found.status not in ("completed", "failed", "expired", "cancelled"):
            return False
        records = [
            record
            for kind, file in (("output", found.output_file_id), ("errors", found.error_file_id))
            if file
            for record in self._download(batch, kind, file)
        ]
        self._take(batch, records, found.status)
        reason = self._failure(batch, found) if found.status == "failed" else ""
        left = sum(self._store.is_open(sent.id) for sent in batch.requests)
        if found.status == "cancelled":
            self._trouble = (
                f"batch {name} was cancelled at the server: its {left} unanswered pictures are "
                "free again, run once more to ask about them"
            )
        self._store.note_batch(batch, "batch_ended", status=found.status, reason=reason)
        total = len(batch.requests)
        log(f"captions: batch {name} {found.status}, {len(records)} of {total} lines came back")
        return True

    def _failure(self, batch: Batch, found: Any) -> str:
        """Why a batch failed before it began, and what that means for the rest."""
        errors = (found.errors and found.errors.data) or []
        said = [f"{f'line {e.line}: ' if e.line else ''}{e.message or e.code}" for e in errors]
        reason = self._session.clean("; ".join(said[:3]) or "no reason given")
        if {e.code for e in errors} == {"token_limit_exceeded"}:
            self._crowded.append(batch)
        else:
            self._trouble = (
                f"batch {batch.server_id} failed at the server: {reason}: mend it and run again"
            )
        return reason

    def _make_room(self, together: Sequence[Batch]) -> None:
        """A model's queue holds so many tokens: come one by one, and by oneself with less."""
        if not self._crowded:
            return
        self._in_turn = True
        (batch, *_), self._crowded = self._crowded, []
        if len(together) > 1:
            return
        self._shard_requests = len(batch.requests) // 2
        if self._shard_requests == 0:
            self._trouble = f"batch {batch.server_id} failed at the server: {batch.reason}"

    def _download(self, batch: Batch, kind: str, file: str) -> list[dict[str, Any]]:
        path = self._folder / f"{batch.id}.{kind}.jsonl"
        content = self._session.without_key(self._server.content(file))
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return [record for _, line in _keyed(path) if isinstance(record := json.loads(line), dict)]

    def _take(self, batch: Batch, records: Sequence[dict[str, Any]], status: str) -> None:
        """Judge all lines that came back, as direct answers are judged."""
        by_key = {sent.key: sent for sent in batch.requests}
        wrong: list[str] = []
        good = 0
        for record in records:
            sent = by_key.get(record["custom_id"])
            # Where a kill interrupted this before, some lines are in the store already.
            if sent is None or not self._store.is_open(sent.id):
                continue
            response = record.get("response") or {}
            code = response.get("status_code")
            if code == 200:
                good += self._answer(batch, sent, response)
                continue
            body = response.get("body")
            inner = body.get("error") if isinstance(body, dict) else {"message": body}
            error = record.get("error") or inner
            error = error if isinstance(error, dict) else {"message": error}
            said = f"{error.get('code') or code}: {error.get('message') or 'no reason given'}"
            reason = self._session.clean(said)
            about = f"{error.get('code')} {error.get('type')}"
            if code in (400, 413, 422) and any(w in about for w in ("image", "content", "policy")):
                # This picture is not taken, others are: that is an answer, at no cost.
                final = {"status": "refused", "reason": reason, "final": True, "api": "responses"}
                self._session.note_answer(sent.id, sent.key, 0.0, final)
                continue
            if code in (400, 401, 403, 404, 413, 422):
                wrong.append(reason)
            self._store.end(sent.id, "failed", key=sent.key, usd=0.0, reason=reason)
        if wrong and not good:
            self._trouble = f"{self._source.base_url}: refuses the requests of a batch: {wrong[0]}"
        if status != "completed":
            return
        for sent in batch.requests:
            if self._store.is_open(sent.id):
                lost = {"usd": sent.usd, "reason": "no line came back", "why": "missing"}
                self._store.end(sent.id, "failed", key=sent.key, **lost)

    def _answer(self, batch: Batch, sent: Sent, response: dict[str, Any]) -> bool:
        """Keep one answer; True where it is a caption."""
        session = self._session
        try:
            judged = judge(
                response["body"], api="responses", price=session.price, clean=session.clean
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            reason = session.clean(f"an answer that is no response: {error}")
            lost = {"usd": sent.usd, "reason": reason, "why": "unreadable"}
            self._store.end(sent.id, "failed", key=sent.key, **lost)
            return False
        usd = sent.usd if judged["usd"] is None else judged["usd"] * BATCH_SHARE
        judged["request_id"] = response.get("request_id") or judged["request_id"]
        judged["batch"] = batch.server_id
        session.note_answer(sent.id, sent.key, usd, judged)
        return bool(judged["status"] == "ok")


def _keyed(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a file of requests or results, each with its picture's key."""
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                yield json.loads(line)["custom_id"], line


def _keep(part: Path, shard: Path, keys: set[str]) -> None:
    """Turn a part into a shard: without the requests that were taken meanwhile."""
    with atomic_path(shard) as temporary, temporary.open("wb") as file:
        for key, line in _keyed(part):
            if key in keys:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
