"""Captions from a model behind OpenAI's Responses API: what is asked, what it costs, what is kept.

Money rules. Every request is noted in an append-only store with its worst price before it is sent,
and again with its true price when its answer is here. Whatever happens, the sum of true prices,
plus worst prices of requests that were cut off, stays within the budget; and a picture that has an
answer is never asked about again.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import io
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tomjerry_utils import UserError
from tomjerry_utils.images import load_image
from tomjerry_utils.runs import hash_file, hash_obj, log
from tomjerry_utils.spending import PRICES_OF, Detail, Price, Store, image_tokens, is_own, price_of

SUBJECTS = ("tom", "jerry", "cat", "mouse", "other")
LONGEST_SIDE = 512  # pixels; larger pictures are sent reduced
ATTEMPTS = 8  # at one picture while the server fails
ANSWERS = 3  # bad answers to one picture before it is set aside
LONGEST_WAIT = 60.0  # seconds between attempts at most

# The words that a captioner is given, by `prompt_version`. Never edit one: captions are kept and
# paid for under its name. Add the next.
PROMPTS = {
    "v1": (
        "Describe who does what and where in this picture, in one plain English sentence of at "
        "most 20 words, in the present tense, ending with the direction the subject faces: "
        "'facing left' or 'facing right'. Call the grey cat of the cartoon 'tom' and the brown "
        "mouse 'jerry', without article; call other cats 'a cat' and other mice 'a mouse'. Say "
        "nothing about the style or quality of the picture: never 'cartoon', 'drawing', "
        "'animated', 'photo' or 'image'. 'action' is one verb in its base form, such as sit, run, "
        "jump, lie, reach or stand. 'place' is one or two words. If none of these animals is "
        "there, 'subjects' is ['other']."
    ),
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "subjects": {"type": "array", "items": {"type": "string", "enum": list(SUBJECTS)}},
        "action": {"type": "string"},
        "place": {"type": "string"},
        "caption": {"type": "string"},
    },
    "required": ["subjects", "action", "place", "caption"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Caption:
    """One picture's caption and where it comes from, or why there is none.

    Attributes:
        status: "ok", or "unreadable", "refused", "invalid", "failed".
        usd: what it cost, failed attempts included.
        reason: for a status other than "ok".
    """

    file_name: str
    sha256: str
    caption: str = ""
    subjects: tuple[str, ...] = ()
    action: str = ""
    place: str = ""
    model: str = ""
    prompt_version: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    request_id: str = ""
    status: str = "ok"
    reason: str = ""


class CaptionSource(Protocol):
    """Anything that captions pictures: a recorded truth, a model on the network."""

    def __call__(self, rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        """Caption pictures, in any order.

        Args:
            rows: each with `file_name`, and whatever else is known (manifest columns).
            images: the folder that file names are relative to.
        """


# ---- the source ----------------------------------------------------------------------------------


class _Answer(BaseModel):
    # The shape is insisted on; the words are not, since servers differ in how strict they are.
    model_config = ConfigDict(extra="ignore", strict=True)

    subjects: list[str]
    action: str = Field(min_length=1, max_length=60)
    place: str = Field(max_length=60)
    caption: str = Field(min_length=3, max_length=400)


@dataclass(frozen=True)
class OpenAISource:
    """Captions from any server that speaks the Responses API with structured output.

    Attributes:
        store: file that requests and answers are kept in.
        base_url: such as `https://api.openai.com/v1`.
        budget: US dollars that all requests in the store may cost together.
        concurrency: requests under way at once.
        price: (input, output) dollars per million tokens, for models the table does not know.
        detail: how closely the model looks at a picture.
        timeout: seconds for one request.
    """

    store: Path
    model: str
    base_url: str
    budget: float
    concurrency: int = 8
    prompt_version: str = "v1"
    price: tuple[float, float] | None = None
    detail: Detail = "auto"
    timeout: float = 60.0

    def __call__(self, rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        """Caption pictures; those with an answer in the store cost nothing.

        Raises:
            UserError: no key, a wrong key, a model or server that is not there, or the budget is
                spent; all answers that arrived before are yielded and kept.
        """
        from filelock import FileLock, Timeout

        if self.prompt_version not in PROMPTS:
            raise UserError(f"no prompt '{self.prompt_version}': {', '.join(PROMPTS)}")
        if self.budget <= 0 or self.concurrency < 1 or self.timeout <= 0:
            raise UserError("budget, concurrency and timeout must be above 0")
        price = price_of(self.model, self.base_url, self.price)
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key and not is_own(self.base_url):
            raise UserError("no key: put it into the environment variable OPENAI_API_KEY")
        self.store.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                FileLock(self.store.with_suffix(".lock"), timeout=0),
                contextlib.closing(Store(self.store)) as store,
            ):
                yield from _Run(self, store, price, key or "none").captions(rows, images)
        except Timeout:
            raise UserError(
                f"another process is paying from {self.store}: wait, or end it"
            ) from None


class _Stop(Exception):
    """No further request makes sense; the message is for the user."""


class _Run:
    """One pass over some pictures: who is asked when, and what counts as an answer."""

    def __init__(self, source: OpenAISource, store: Store, price: Price, key: str) -> None:
        from openai import OpenAI

        self._source, self._store, self._price, self._key = source, store, price, key
        self._client = OpenAI(
            api_key=key, base_url=source.base_url, timeout=source.timeout, max_retries=0
        )
        self._stop = threading.Event()
        self._not_before = 0.0  # a server that asked to wait is left alone by all
        self._dearest = 0.0
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
            answers = self._store.answers.get(self._name(sha256), [])
            if _settled(answers):
                yield self._caption(name, sha256, answers[-1], billed)
            else:
                # Pictures with the same content are asked about, and billed, once.
                todo.setdefault(sha256, []).append(name)
        self._announce(len(rows), len(todo))
        try:
            for sha256, record in self._ask_all(todo, images):
                for name in todo[sha256]:
                    yield self._caption(name, sha256, record, billed)
        finally:
            self._client.close()

    def _announce(self, total: int, left: int) -> None:
        each = self._price.usd(self._input_tokens(LONGEST_SIDE, LONGEST_SIDE), 100)
        model, budget = self._source.model, self._source.budget
        log(
            f"captions: {total} pictures, {left} to ask {model} about for roughly "
            f"${left * each:.2f} (prices of {PRICES_OF}); ${self._store.booked:.4f} of "
            f"${budget:.2f} are booked already"
        )
        if self._store.possibly_paid:
            worst = sum(self._store.possibly_paid.values())
            log(
                f"captions: {len(self._store.possibly_paid)} requests were cut off before; they "
                f"may have been paid for and count as ${worst:.4f}"
            )

    # -- who is asked when

    def _ask_all(
        self, same: dict[str, list[str]], images: Path
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting = iter(same.items())
        running: dict[Future[dict[str, Any]], str] = {}
        end: _Stop | None = None
        pool = ThreadPoolExecutor(self._source.concurrency, thread_name_prefix="caption")
        try:
            while True:
                # The first goes alone: it shows a wrong key or a wrong price before many do.
                width = self._source.concurrency if self._succeeded else 1
                while end is None and len(running) < width:
                    item = next(waiting, None)
                    if item is None:
                        break
                    future = pool.submit(self._ask, item[0], images / item[1][0])
                    running[future] = item[0]
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    sha256 = running.pop(future)
                    try:
                        yield sha256, future.result()
                    except _Stop as stop:
                        # Those who only heard of the stop have nothing to say about it.
                        end = stop if end is None or not str(end) else end
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if end is not None:
            raise UserError(str(end))

    def _ask(self, sha256: str, path: Path) -> dict[str, Any]:
        """Ask about one picture until there is an answer, or no point in asking."""
        try:
            picture, size = _encode(path)
        except UserError as error:
            return {"status": "unreadable", "reason": str(error)}
        key, failures = self._name(sha256), 0
        answers = list(self._store.answers.get(key, ()))
        while True:
            self._wait()
            worst = max(self._price.usd(self._input_tokens(*size), self._longest), self._dearest)
            name = self._store.begin(key, worst, self._source.budget)
            if name is None and self._store.under_way:
                # Requests under way are booked at their worst; their true price may leave room.
                self._stop.wait(0.02)
                continue
            if name is None:
                self._stop.set()
                raise _Stop(
                    f"the budget of ${self._source.budget:.2f} does not hold another request: "
                    f"${self._store.booked:.4f} are booked; run again with a larger --budget to "
                    "go on, nothing is asked twice"
                )
            outcome = self._request(picture)
            usd = outcome["usd"] = worst if outcome["usd"] is None else outcome["usd"]
            if outcome.pop("answered"):
                self._dearest = max(self._dearest, usd)
                self._store.end(name, "answer", key=key, **outcome)
                answers.append(outcome)
                if _settled(answers):
                    self._succeeded |= outcome["status"] == "ok"
                    return outcome
                continue
            fatal, pause = outcome.pop("fatal"), outcome.pop("pause")
            self._store.end(name, "failed", key=key, usd=usd, reason=outcome["reason"])
            failures += 1
            # A server that never answered is not worth the patience of one that did.
            patience = ATTEMPTS if self._succeeded else 4
            if fatal or (failures >= patience and not self._succeeded):
                self._stop.set()
                raise _Stop(f"{self._source.base_url}: {outcome['reason']}")
            if failures >= ATTEMPTS:
                return {**outcome, "status": "failed"}
            self._back_off(failures, pause)

    def _wait(self) -> None:
        """Until the server wants requests again."""
        while (left := self._not_before - time.monotonic()) > 0:
            self._stop.wait(left)
            if self._stop.is_set():
                break
        if self._stop.is_set():
            raise _Stop("")

    def _back_off(self, failures: int, pause: float | None) -> None:
        if pause is not None:
            # Jitter keeps the workers from coming back all at once.
            self._not_before = max(self._not_before, time.monotonic() + pause)
            self._stop.wait(pause + random.uniform(0, 0.25 * pause + 0.05))
        else:
            self._stop.wait(min(LONGEST_WAIT, random.uniform(0.5, 1.0) * 0.5 * 2**failures))

    # -- one request

    def _request(self, picture: str) -> dict[str, Any]:
        """Send one request. `usd` is None where it may have been billed without our knowing."""
        import openai

        extra: dict[str, Any] = {"reasoning": {"effort": "low"}} if self._thinks else {}
        failed: dict[str, Any] = {"answered": False, "fatal": False, "pause": None, "usd": 0.0}
        try:
            response = self._client.responses.create(
                model=self._source.model,
                instructions=PROMPTS[self._source.prompt_version],
                input=[
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "input_image",
                                "image_url": picture,
                                "detail": self._source.detail,
                            }
                        ],
                    }
                ],
                text={
                    "format": {
                        "type": "json_schema",
                        "name": "caption",
                        "schema": SCHEMA,
                        "strict": True,
                    }
                },
                max_output_tokens=self._longest,
                store=False,
                **extra,
            )
            return {"answered": True, **self._judge(response)}
        except openai.APIStatusError as error:
            reason = self._clean(f"HTTP {error.status_code}: {error.message}")
            gone = error.code in ("insufficient_quota", "billing_hard_limit_reached")
            # Before any success a request that is not understood is wrong in itself, unless the
            # server says that it is about the picture.
            about = re.search("image|content|policy", f"{error.code} {error.type}") is not None
            wrong = error.status_code in (400, 422) and not self._succeeded and not about
            fatal = gone or wrong or error.status_code in (401, 403, 404, 405)
            if error.status_code in (400, 413, 422) and not fatal:
                # This picture is not taken, others are: that is an answer, at no cost.
                answer = {"status": "refused", "reason": reason, "usd": 0.0, "final": True}
                return {"answered": True, **answer}
            pause = _retry_after(error.response.headers)
            return {**failed, "reason": reason, "fatal": fatal, "pause": pause}
        except openai.APIConnectionError as error:
            # A refused connection was never a request; a cut or timed-out one may be billed.
            never = "refused" in str(error.__cause__).lower()
            reason = self._clean(f"{error.message} ({type(error.__cause__).__name__})")
            return {**failed, "reason": reason, "usd": 0.0 if never else None}
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, KeyError) as error:
            reason = self._clean(f"an answer that is no response: {type(error).__name__} {error}")
            return {**failed, "reason": reason[:300], "usd": None}

    def _judge(self, response: Any) -> dict[str, Any]:
        """What a response holds: a caption, or why it is none."""
        usage = response.usage
        counted = usage is not None and usage.input_tokens is not None
        tokens = (int(usage.input_tokens), int(usage.output_tokens)) if counted else (0, 0)
        record: dict[str, Any] = {
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "usd": self._price.usd(*tokens) if counted else None,
            "request_id": response._request_id or response.id or "",
            "status": "invalid",
            "reason": "",
        }
        refusals = [
            part.refusal
            for item in response.output
            if item.type == "message"
            for part in item.content
            if part.type == "refusal"
        ]
        text = response.output_text
        if refusals:
            return {**record, "status": "refused", "reason": self._clean(f"refused: {refusals[0]}")}
        if response.status == "incomplete":
            why = response.incomplete_details and response.incomplete_details.reason
            return {**record, "reason": f"truncated answer ({why or 'no reason given'})"}
        if response.status not in (None, "completed"):
            return {**record, "reason": f"answer with status '{response.status}'"}
        if not text.strip():
            return {**record, "reason": "empty answer"}
        try:
            answer = _Answer.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "text"
            return {**record, "reason": f"invalid JSON answer ({where}: {first['msg']})"}
        return {
            **record,
            "status": "ok",
            "caption": " ".join(answer.caption.split()),
            "subjects": list(dict.fromkeys(subject.strip() for subject in answer.subjects)),
            "action": answer.action.strip(),
            "place": answer.place.strip(),
        }

    # -- helpers

    @property
    def _thinks(self) -> bool:
        return self._price.thinks and self._source.model.startswith("gpt-5")

    @property
    def _longest(self) -> int:
        return 1500 if self._price.thinks else 300

    def _input_tokens(self, width: int, height: int) -> int:
        """No fewer than a request can have: three characters a token is low for English."""
        text = len(PROMPTS[self._source.prompt_version]) + len(json.dumps(SCHEMA))
        detail: Detail = "low" if self._source.detail == "low" else "high"
        return text // 3 + 64 + image_tokens(width, height, self._price, detail)

    def _name(self, sha256: str) -> str:
        """The store's key of a picture: its content and all that shapes its answer."""
        source = self._source
        return hash_obj([sha256, source.prompt_version, source.model, source.detail, LONGEST_SIDE])

    def _caption(
        self, file_name: str, sha256: str, record: dict[str, Any], billed: set[str]
    ) -> Caption:
        usd = 0.0 if sha256 in billed else self._store.spent_on(self._name(sha256))
        billed.add(sha256)
        return Caption(
            file_name,
            sha256,
            caption=record.get("caption", ""),
            subjects=tuple(record.get("subjects", ())),
            action=record.get("action", ""),
            place=record.get("place", ""),
            model=self._source.model,
            prompt_version=self._source.prompt_version,
            input_tokens=record.get("input_tokens", 0),
            output_tokens=record.get("output_tokens", 0),
            usd=round(usd, 8),
            request_id=record.get("request_id", ""),
            status=record["status"],
            reason=record.get("reason", ""),
        )

    def _clean(self, text: str) -> str:
        """One line without the key, should a server repeat it."""
        return " ".join(text.replace(self._key, "***").split())[:400]


def _settled(answers: Sequence[dict[str, Any]]) -> bool:
    """True where another request about the picture makes no sense."""
    if not answers:
        return False
    last = answers[-1]
    if last["status"] == "ok" or last.get("final"):
        return True
    refused = sum(answer["status"] == "refused" for answer in answers)
    return len(answers) >= ANSWERS or refused >= 2


def _encode(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URL, reduced to `LONGEST_SIDE`, and its width and height."""
    from PIL import Image

    image = Image.fromarray(load_image(path))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small drawings suffer from JPEG; large pictures cost bandwidth as PNG.
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(buffer, kind, quality=92)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{text}", image.size


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number or a date."""
    text = headers.get("retry-after-ms")
    if text and re.fullmatch(r"[\d.]+", text):
        return min(float(text) / 1000, LONGEST_WAIT)
    text = headers.get("retry-after")
    if not text:
        return None
    if re.fullmatch(r"[\d.]+", text):
        return min(float(text), LONGEST_WAIT)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)
