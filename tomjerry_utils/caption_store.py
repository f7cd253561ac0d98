"""The book of all caption requests: what was sent, what came back, what it cost.

An append-only file that a budget holds against, whatever number of processes spends from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Settled = Callable[[Sequence[dict[str, Any]]], bool]


@dataclass(frozen=True)
class Sent:
    """A request that has been sent and has not ended.

    Attributes:
        key: names the picture and all that shapes its answer.
        usd: its price at worst.
        run: the process run that sent it; of a batch, the batch's intent.
        names: file names of the picture, known for batches only.
    """

    id: str
    key: str
    sha256: str
    usd: float
    run: str
    time: str
    names: tuple[str, ...] = ()


@dataclass
class Batch:
    """A batch that was intended: what it holds, and what has become of it.

    Attributes:
        server_id: its name at the server, once that is known.
    """

    id: str
    requests: list[Sent]
    server_id: str = ""
    status: str = "intended"
    reason: str = ""

    @property
    def ended(self) -> bool:
        """True when nothing more will come of it."""
        return self.status not in ("intended", "created")


class NoBudget(Exception):
    """The budget does not hold the worst price of another request."""


class Taken(Exception):
    """The picture has its answer, or another process or a batch is asking about it."""


class Store:
    """All requests ever sent and all answers, one JSON object a line, only ever appended to.

    Lines: `sent` (before a request, with its worst price), `answer` (what came back, with its
    price), `failed` (nothing usable came back; the worst price if it may have been billed), `batch`
    (before one is created, with all its requests), `batch_created` and `batch_ended`. A `sent`
    without an end belongs to a request under way, or to one that a kill cut off; either counts at
    its worst price.

    Processes share a store. Each append, and each look at the budget, happens under a short lock
    and after reading what others have appended; each run of a process holds a lock of its own
    beside the store while it lives, which tells requests under way from those cut off.

    What `write` has taken outlives the process, so that a kill loses no answer; against a power cut
    the file is synchronised about once a second and with every line about a batch, since a batch
    forgotten costs more than a second's answers.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        self.run = _new_name()
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.batches: dict[str, Batch] = {}
        self._open: dict[str, Sent] = {}
        self._open_of: dict[str, dict[str, Sent]] = {}  # key → its open requests
        self._spent: dict[str, float] = {}  # key → dollars, open requests at their worst
        self._booked = 0.0
        self._dearest: dict[tuple[str, bool], float] = {}
        self._unsure: list[dict[str, Any]] = []
        self._batch_failures: dict[str, int] = {}
        self._path = path
        self._alive = FileLock(self._lock_of(self.run), thread_local=False)
        self._dead: set[str] = set()
        self._seen_alive: dict[str, float] = {}
        self._threads = threading.RLock()
        self._processes = FileLock(path.with_suffix(".lock"), thread_local=False)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._read_to = 0
        self._synced = time.monotonic()
        with self._locked():
            self._alive.acquire(timeout=5)
            for lock in path.parent.glob(f".{path.name}-*.lock"):
                self._lives(lock.stem.removeprefix(f".{path.name}-"))  # sweeps up after the dead

    def close(self) -> None:
        """Let go of the file and of this run's lock."""
        os.fsync(self._file)
        os.close(self._file)
        self._alive.release()
        self._lock_of(self.run).unlink(missing_ok=True)

    def refresh(self) -> None:
        """Read what other processes have appended."""
        with self._locked():
            pass

    # -- what it knows

    @property
    def booked(self) -> float:
        """Dollars spent for certain or perhaps, requests under way at their worst price."""
        return max(0.0, self._booked)

    @property
    def in_batches(self) -> int:
        """Requests of batches that have not ended."""
        with self._threads:
            return sum(sent.run in self.batches for sent in self._open.values())

    def spent_on(self, key: str) -> float:
        """The part of `booked` that went into one picture."""
        with self._threads:
            return max(0.0, self._spent.get(key, 0.0))

    def dearest(self, model: str, *, batch: bool = False) -> float:
        """What the dearest answer of a model has cost, in a batch or asked for directly."""
        return self._dearest.get((model, batch), 0.0)

    def batch_failures(self, key: str) -> int:
        """How often a picture's request came to nothing in a batch."""
        return self._batch_failures.get(key, 0)

    def busy(self) -> bool:
        """True while a living process, this one or another, has a request under way."""
        with self._threads:
            runs = {sent.run for sent in self._open.values()} - self.batches.keys()
            return any(self._lives(run) for run in runs)

    def held(self, key: str) -> str:
        """Who is asking about a picture: "batch", "process", or "" for nobody."""
        with self._threads:
            for sent in self._open_of.get(key, {}).values():
                if sent.run in self.batches:
                    return "batch"
                if self._lives(sent.run):
                    return "process"
        return ""

    def is_open(self, name: str) -> bool:
        """True for a request, by its id, that has not ended."""
        return name in self._open

    def possibly_paid(self) -> list[dict[str, Any]]:
        """Requests without an answer that may have been billed, booked at their worst price.

        Each with `key`, `sha256` (of the picture), `usd`, `time` (sent, ISO 8601) and `reason`:
        "killed" (its process ended), "timeout", "cut" (the connection), "unreadable" (an answer
        that is none) or "missing" (a batch ended without it).
        """
        with self._threads:
            runs = {sent.run for sent in self._open.values()}
            lost = {run for run in runs if run not in self.batches and not self._lives(run)}
            killed = [_unsure(s, "killed") for s in self._open.values() if s.run in lost]
            return sorted([*self._unsure, *killed], key=lambda row: str(row["time"]))

    # -- requests

    def begin(
        self, key: str, worst: float, budget: float, *, sha256: str, settled: Settled = bool
    ) -> str:
        """Book a request before it is sent; its id.

        Args:
            settled: whether a picture's answers make another request about it pointless.

        Raises:
            NoBudget: the budget does not hold its worst price.
            Taken: the picture is settled, or someone else is asking about it.
        """
        with self._locked():
            if settled(self.answers.get(key, [])) or self.held(key):
                raise Taken
            if self._booked + worst > budget:
                raise NoBudget
            name = _new_name()
            record = {"event": "sent", "id": name, "key": key, "usd": worst}
            self._append({**record, "run": self.run, "sha256": sha256})
            return name

    def end(self, name: str, event: str, **record: Any) -> None:
        """Note what became of a request: an "answer" or "failed"."""
        with self._locked():
            self._append({"event": event, "id": name, **record})

    # -- batches

    def begin_batch(
        self, wanted: Sequence[Sent], budget: float, *, settled: Settled = bool
    ) -> Batch | None:
        """Book a batch before anything of it exists at the server; None where all is taken.

        It holds, in their order, those of the requests that nobody else is asking about and that
        the budget holds.

        Raises:
            NoBudget: the budget does not hold the first of them.
        """
        with self._locked():
            chosen, total, full = [], self._booked, False
            for sent in wanted:
                if settled(self.answers.get(sent.key, [])) or self.held(sent.key):
                    continue
                full = total + sent.usd > budget
                if full:
                    break
                total += sent.usd
                chosen.append(sent)
            if not chosen and full:
                raise NoBudget
            if not chosen:
                return None
            name = _new_name()
            requests = [[f"{name}-{n}", *_row(sent)] for n, sent in enumerate(chosen)]
            self._append({"event": "batch", "id": name, "run": self.run, "requests": requests})
            self._synchronise()
            return self.batches[name]

    def note_batch(self, batch: Batch, event: str, /, **record: Any) -> None:
        """Note what became of a batch: "batch_created" or "batch_ended".

        Requests of an ended batch that have no end of their own were not worked on, nor billed.
        """
        with self._locked():
            self._append({"event": event, "id": batch.id, **record})
            self._synchronise()

    # -- the file

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._threads:
            self._processes.acquire(poll_interval=0.002)
            try:
                self._read()
                yield
            finally:
                self._processes.release()

    def _read(self) -> None:
        """Take the lines that have come since; nobody writes meanwhile."""
        size = os.fstat(self._file).st_size
        if size <= self._read_to:
            return
        with open(self._path, "rb") as file:
            file.seek(self._read_to)
            text = file.read()
        self._read_to += len(text)
        if not text.endswith(b"\n"):
            # A kill tore this line; what follows it begins on one of its own.
            self._write(b"\n")
        for line in text.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def _append(self, record: dict[str, Any]) -> None:
        record["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(record, ensure_ascii=False) + "\n"
        self._write(text.encode("utf-8", "backslashreplace"))
        self._take(record)
        if time.monotonic() - self._synced > 1.0:
            self._synchronise()

    def _write(self, left: bytes) -> None:
        while left:
            written = os.write(self._file, left)
            self._read_to += written
            left = left[written:]

    def _synchronise(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _take(self, record: dict[str, Any]) -> None:
        event, name = record["event"], record["id"]
        when = str(record.get("time", ""))
        if event == "sent":
            key, usd = record["key"], float(record["usd"])
            sha256, run = record.get("sha256", ""), record.get("run", "")
            self._book(Sent(name, key, sha256, usd, run, when))
        elif event == "batch":
            requests = [
                Sent(row[0], row[1], row[2], float(row[3]), name, when, tuple(row[4]))
                for row in record["requests"]
            ]
            self.batches[name] = Batch(name, requests)
            for sent in requests:
                self._book(sent)
        elif event == "batch_created":
            batch = self.batches[name]
            batch.server_id, batch.status = record["batch"], "created"
        elif event == "batch_ended":
            batch = self.batches[name]
            batch.status, batch.reason = record["status"], record.get("reason", "")
            for sent in batch.requests:
                if self._release(sent.id) and batch.status in ("completed", "expired"):
                    self._count_failure(sent)
        else:
            self._take_end(record)

    def _take_end(self, record: dict[str, Any]) -> None:
        key, usd = record["key"], float(record["usd"])
        sent = self._release(record["id"])
        self._spend(key, usd)
        if record["event"] == "answer":
            self.answers.setdefault(key, []).append(record)
            kind = (record.get("model", ""), sent is not None and sent.run in self.batches)
            self._dearest[kind] = max(self._dearest.get(kind, 0.0), usd)
        elif sent is not None:
            if usd > 0:
                self._unsure.append(_unsure(sent, record.get("why", "cut"), usd))
            if sent.run in self.batches:
                self._count_failure(sent)

    def _count_failure(self, sent: Sent) -> None:
        self._batch_failures[sent.key] = self._batch_failures.get(sent.key, 0) + 1

    def _book(self, sent: Sent) -> None:
        self._open[sent.id] = sent
        self._open_of.setdefault(sent.key, {})[sent.id] = sent
        self._spend(sent.key, sent.usd)

    def _release(self, name: str) -> Sent | None:
        sent = self._open.pop(name, None)
        if sent is not None:
            del self._open_of[sent.key][name]
            self._spend(sent.key, -sent.usd)
        return sent

    def _spend(self, key: str, usd: float) -> None:
        self._booked += usd
        self._spent[key] = self._spent.get(key, 0.0) + usd

    def _lives(self, run: str) -> bool:
        """True while the process of a run holds its lock."""
        from filelock import FileLock, Timeout

        if run == self.run:
            return True
        path = self._lock_of(run)
        if run in self._dead or not path.is_file():
            self._dead.add(run)
            return False
        # Asked for each of a hundred open requests, once in a while will do.
        if time.monotonic() - self._seen_alive.get(run, -1.0) < 0.25:
            return True
        try:
            with FileLock(path, timeout=0):
                self._dead.add(run)
        except Timeout:
            self._seen_alive[run] = time.monotonic()
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def _lock_of(self, run: str) -> Path:
        return self._path.with_name(f".{self._path.name}-{run}.lock")


def possibly_paid(path: Path) -> list[dict[str, Any]]:
    """`Store.possibly_paid` of a store that need not be there."""
    if not path.is_file():
        return []
    with contextlib.closing(Store(path)) as store:
        return store.possibly_paid()


def _unsure(sent: Sent, reason: str, usd: float | None = None) -> dict[str, Any]:
    worst = sent.usd if usd is None else usd
    known = {"key": sent.key, "sha256": sent.sha256}
    return {**known, "usd": worst, "time": sent.time, "reason": reason}


def _row(sent: Sent) -> list[Any]:
    return [sent.key, sent.sha256, sent.usd, list(sent.names)]


def _new_name() -> str:
    return f"{time.time_ns():x}-{random.getrandbits(32):08x}"
