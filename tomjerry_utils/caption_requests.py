"""Direct caption requests: who is asked when, how often, and when to stop."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_answers import APIS, Api, judge, lacks, output_tokens, settled
from tomjerry_utils.caption_store import NoBudget, Taken
from tomjerry_utils.captioner import Caption, Session, encode
from tomjerry_utils.pacing import Pacer, retry_after
from tomjerry_utils.runs import hash_file, log

ATTEMPTS = 8  # at one picture while the server fails
LONGEST_WAIT = 60.0  # seconds between attempts at most, unless the server asks for more
LONGEST_HOLD = 600.0  # seconds that a server may ask to wait before a run gives up


class _Stop(Exception):
    """No further request makes sense; the message is for the user."""


class Run:
    """One pass over some pictures: who is asked when."""

    def __init__(self, session: Session) -> None:
        self._session, self._source, self._store = session, session.source, session.store
        self._stop = threading.Event()
        self._pacer = Pacer(self._stop)
        self._api: Api = APIS[0] if self._source.api == "auto" else self._source.api
        self._lock = threading.Lock()
        self._answered: set[Api] = set()
        self._succeeded = False

    def captions(self, rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        todo: dict[str, list[str]] = {}
        billed: set[str] = set()
        for row in rows:
            name = row["file_name"]
            try:
                sha256 = hash_file(images / name)
            except OSError as error:
                reason = error.strerror or "cannot be read"
                yield Caption(name, "", status="unreadable", reason=reason)
                continue
            key = self._source.key_of(sha256)
            answers = self._store.answers.get(key, [])
            if settled(answers):
                yield self._session.caption(name, sha256, answers[-1], billed)
            elif self._store.held(key) == "batch":
                reason = "under way in a batch: collect it with 'tomjerry caption batch'"
                yield Caption(name, sha256, status="pending", reason=reason)
            else:
                # Pictures with the same content are asked about, and billed, once.
                todo.setdefault(sha256, []).append(name)
        self._session.announce(len(rows), len(todo))
        for sha256, record in self._ask_all(todo, images):
            for name in todo[sha256]:
                yield self._session.caption(name, sha256, record, billed)

    # -- who is asked when

    def _ask_all(
        self, same: dict[str, list[str]], images: Path
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting, elsewhere = deque(same), list[str]()
        running: dict[Future[dict[str, Any] | None], str] = {}
        end: _Stop | None = None
        pool = ThreadPoolExecutor(self._source.concurrency, thread_name_prefix="caption")
        try:
            while True:
                # The first goes alone: it shows a wrong key, a wrong price or the server's limits
                # before many do.
                width = self._source.concurrency if self._succeeded else 1
                while waiting and end is None and len(running) < width:
                    sha256 = waiting.popleft()
                    future = pool.submit(self._ask, sha256, images / same[sha256][0])
                    running[future] = sha256
                if not running:
                    if end is not None or not elsewhere:
                        break
                    # All that is left is with another process, which may answer, fail or die.
                    self._stop.wait(0.2)
                    self._store.refresh()
                    waiting.extend(elsewhere)
                    elsewhere.clear()
                    continue
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    sha256 = running.pop(future)
                    try:
                        record = future.result()
                    except _Stop as stop:
                        # Those who only heard of the stop have nothing to say about it.
                        end = stop if end is None or not str(end) else end
                        continue
                    if record is None:
                        elsewhere.append(sha256)
                    else:
                        yield sha256, record
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if end is not None:
            raise UserError(str(end))

    def _ask(self, sha256: str, path: Path) -> dict[str, Any] | None:
        """Ask about one picture until there is an answer, or no point in asking.

        None where another process is asking about it.
        """
        key, failures, held = self._source.key_of(sha256), 0, 0.0
        if self._store.held(key):
            return self._settled(key)
        try:
            picture, size = encode(path, self._source.longest_side)
        except UserError as error:
            return {"status": "unreadable", "reason": str(error)}
        tokens = self._session.input_tokens(size) + output_tokens(self._session.price)[1]
        while True:
            ticket = self._pacer.start(tokens)
            if ticket is None:
                raise _Stop("")
            worst = self._session.worst(size)
            try:
                name = self._store.begin(
                    key, worst, self._source.budget, sha256=sha256, settled=settled
                )
            except Taken:
                self._pacer.cancel(ticket)
                return self._settled(key)
            except NoBudget:
                self._pacer.cancel(ticket)
                if not self._store.busy():
                    self._stop.set()
                    raise _Stop(str(self._session.no_budget())) from None
                # Requests under way are booked at their worst; their true price may leave room.
                self._stop.wait(random.uniform(0.02, 0.08))
                continue
            api = self._api
            outcome, headers = self._request(picture, api)
            self._pacer.finish(ticket, headers)
            usd = worst if outcome["usd"] is None else outcome["usd"]
            if outcome.pop("answered"):
                self._session.note_answer(name, key, usd, outcome)
                answer = self._settled(key)
                if answer is not None:
                    self._succeeded |= answer["status"] == "ok"
                    return answer
                continue
            fatal, pause, why = (outcome.pop(part) for part in ("fatal", "pause", "why"))
            self._store.end(name, "failed", key=key, usd=usd, reason=outcome["reason"], why=why)
            if why == "lacks":
                self._step_down(api, outcome["reason"])
                continue
            if pause is not None and held < LONGEST_HOLD:
                held += max(pause, 5.0)  # told when to come back, it is no failure to do so
            else:
                failures += 1
            # A server that never answered is not worth the patience of one that did.
            patience = ATTEMPTS if self._succeeded else 4
            if fatal or (failures >= patience and not self._succeeded):
                self._stop.set()
                raise _Stop(f"{self._source.base_url}: {outcome['reason']}")
            if failures >= ATTEMPTS:
                return {**outcome, "status": "failed"}
            self._back_off(failures, pause)

    def _settled(self, key: str) -> dict[str, Any] | None:
        answers = self._store.answers.get(key, [])
        return answers[-1] if settled(answers) else None

    def _step_down(self, api: Api, reason: str) -> None:
        with self._lock:
            if self._api == api:
                self._api = APIS[APIS.index(api) + 1]
                log(f"captions: the server does not know '{api}' ({reason}): now '{self._api}'")

    def _back_off(self, failures: int, pause: float | None) -> None:
        if pause is None:
            self._stop.wait(min(LONGEST_WAIT, random.uniform(0.5, 1.0) * 0.5 * 2**failures))
        elif pause > LONGEST_HOLD:
            self._stop.set()
            raise _Stop(
                f"{self._source.base_url}: asks to be left alone for {pause / 60:.0f} minutes: run "
                "again then, nothing is asked twice"
            )
        else:
            self._pacer.hold(pause)

    # -- one request

    def _request(self, picture: str, api: Api) -> tuple[dict[str, Any], Any]:
        """Send one request; its outcome and the answer's headers, None where there are none.

        `usd` is None where it may have been billed without our knowing.
        """
        import openai

        failed = {"answered": False, "fatal": False, "pause": None, "usd": 0.0, "why": ""}
        client, headers = self._session.client, None
        ask = client.responses if api == "responses" else client.chat.completions
        try:
            response = ask.with_raw_response.create(**self._session.body(picture, api))
            headers = response.headers
            body = json.loads(self._session.without_key(response.http_response.content))
            judged = judge(body, api=api, price=self._session.price, clean=self._session.clean)
            if "x-request-id" in headers:
                judged["request_id"] = headers["x-request-id"]
            self._answered.add(api)
            return {"answered": True, **judged}, headers
        except openai.APIStatusError as error:
            return self._refusal(error, api, failed), error.response.headers
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            # Without a connection there was no request; a cut or timed-out one may be billed.
            never = cause in ("ConnectError", "ConnectTimeout", "PoolTimeout")
            why = "timeout" if isinstance(error, openai.APITimeoutError) else "cut"
            reason = self._session.clean(f"{error.message} ({cause})")
            return {**failed, "reason": reason, "usd": 0.0 if never else None, "why": why}, None
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"an answer that is no response: {type(error).__name__} {error}"
            reason = self._session.clean(reason)[:300]
            return {**failed, "reason": reason, "usd": None, "why": "unreadable"}, headers

    def _refusal(self, error: Any, api: Api, failed: dict[str, Any]) -> dict[str, Any]:
        """What to make of an HTTP status that is an error."""
        status, code = error.status_code, str(error.code or "")
        reason = self._session.clean(f"HTTP {status}: {told(error)}")
        if api not in self._answered and lacks(api, status, error.message, code):
            return {**failed, "reason": reason, "why": "lacks"}
        gone = code in ("insufficient_quota", "billing_hard_limit_reached")
        # Before any success a request that is not understood is wrong in itself, unless the server
        # says that it is about the picture.
        about = re.search("image|content|policy", f"{code} {error.type}") is not None
        wrong = status in (400, 422) and not self._succeeded and not about
        fatal = gone or wrong or status in (401, 403, 404, 405)
        if status in (400, 413, 422) and not fatal:
            # This picture is not taken, others are: that is an answer, at no cost.
            answer = {"status": "refused", "reason": reason, "usd": 0.0, "final": True}
            return {"answered": True, **answer}
        pause = retry_after(error.response.headers)
        return {**failed, "reason": reason, "fatal": fatal, "pause": pause}


def told(error: Any) -> str:
    """What a server says about a status that is an error, without the client's own words."""
    said = str(error.message).removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")
    return said or "no reason given"
