"""Captions from a model behind an OpenAI-compatible server: what is set, what it may cost.

Money rules. Every request is noted in an append-only store with its worst price before it is sent,
and again with its true price when its answer is here. Whatever happens, the sum of true prices,
plus worst prices of requests that were cut off, stays within the budget; and a picture that has an
answer is never asked about again. All of it holds for several processes on one store.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tomjerry_utils import UserError
from tomjerry_utils.caption_answers import (
    APIS,
    LONGEST_SIDE,
    PROMPTS,
    Api,
    output_tokens,
    request_body,
    request_tokens,
)
from tomjerry_utils.caption_answers import SCHEMA as SCHEMA
from tomjerry_utils.caption_store import Store
from tomjerry_utils.images import load_image
from tomjerry_utils.runs import hash_obj, log
from tomjerry_utils.spending import PRICES_OF, Detail, Price, is_own, price_of

BATCH_SHARE = 0.5  # of the direct price, as published by OpenAI


@dataclass(frozen=True)
class Caption:
    """One picture's caption and where it comes from, or why there is none.

    Attributes:
        status: "ok", or "unreadable", "refused", "invalid", "failed", "pending" (in a batch).
        usd: what it cost, failed attempts included.
        reason: for a status other than "ok".
        time: when the answer came, ISO 8601 in UTC.
        api: the form of request that was answered, of `caption_answers.APIS`.
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
    time: str = ""
    api: str = ""


class CaptionSource(Protocol):
    """Anything that captions pictures: a recorded truth, a model on the network."""

    def __call__(self, rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        """Caption pictures, in any order.

        Args:
            rows: each with `file_name`, and whatever else is known (manifest columns).
            images: the folder that file names are relative to.
        """


# ---- the source ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenAISource:
    """Captions from any server that speaks OpenAI's language.

    Attributes:
        store: file that requests and answers are kept in; processes may share it.
        base_url: such as `https://api.openai.com/v1`.
        budget: US dollars that all requests in the store may cost together.
        concurrency: requests under way at once.
        price: (input, output) dollars per million tokens, for models the table does not know.
        detail: how closely the model looks at a picture.
        timeout: seconds for one request.
        longest_side: pixels; larger pictures are sent reduced.
        api: form of request to begin with; "auto" is the first, and further ones as needed.
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
    longest_side: int = LONGEST_SIDE
    api: Literal["auto"] | Api = "auto"

    def __call__(self, rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        """Caption pictures; those with an answer in the store cost nothing.

        Pictures that another process is asking about are waited for, and yielded with its answer.

        Raises:
            UserError: no key, a wrong key, a model or server that is not there, or the budget is
                spent; all answers that arrived before are yielded and kept.
        """
        from tomjerry_utils.caption_requests import Run

        with open_session(self) as session:
            yield from Run(session).captions(rows, images)

    def key_of(self, sha256: str) -> str:
        """The store's key of a picture: its content and all that shapes its answer."""
        return key_of(
            sha256,
            prompt_version=self.prompt_version,
            model=self.model,
            detail=self.detail,
            longest_side=self.longest_side,
        )


def key_of(
    sha256: str, *, prompt_version: str, model: str, detail: Detail, longest_side: int
) -> str:
    """A picture's key in a store: its content and all that shapes its answer."""
    return hash_obj([sha256, prompt_version, model, detail, longest_side])


@contextlib.contextmanager
def open_session(source: OpenAISource) -> Iterator[Session]:
    """Check a source's settings, and open its store and its client.

    Raises:
        UserError: a setting that cannot be, an unknown price, or no key.
    """
    from openai import OpenAI

    if source.prompt_version not in PROMPTS:
        raise UserError(f"no prompt '{source.prompt_version}': {', '.join(PROMPTS)}")
    if not source.budget > 0 or source.concurrency < 1 or not source.timeout > 0:
        raise UserError("budget, concurrency and timeout must be above 0")
    if source.longest_side < 16:
        raise UserError("longest_side must be at least 16 pixels")
    if source.api not in ("auto", *APIS):
        raise UserError(f"no api '{source.api}': auto, {', '.join(APIS)}")
    price = price_of(source.model, source.base_url, source.price)
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key and not is_own(source.base_url):
        raise UserError("no key: put it into the environment variable OPENAI_API_KEY")
    with contextlib.closing(Store(source.store)) as store:
        client = OpenAI(
            api_key=key or "none",
            base_url=source.base_url,
            timeout=source.timeout,
            max_retries=0,
        )
        with contextlib.closing(client):
            yield Session(source, store, price, key, client)


@dataclass(frozen=True)
class Session:
    """A source with its store and client open: what direct requests and batches share."""

    source: OpenAISource
    store: Store
    price: Price
    secret: str
    client: Any

    def worst(self, size: tuple[int, int], *, batch: bool = False) -> float:
        """Dollars that a request about a picture of (width, height) may cost at most.

        An answer that was dearer than that shows that the model counts otherwise.
        """
        usd = self.price.usd(self.input_tokens(size), output_tokens(self.price)[1])
        model = self.source.model
        seen = max(self.store.dearest(model), self.store.dearest(model, batch=True) / BATCH_SHARE)
        return max(usd, seen) * (BATCH_SHARE if batch else 1.0)

    def input_tokens(self, size: tuple[int, int]) -> int:
        """Input tokens of a request about a picture of (width, height)."""
        return request_tokens(
            *size,
            prompt_version=self.source.prompt_version,
            price=self.price,
            detail=self.source.detail,
            longest_side=self.source.longest_side,
        )

    def body(self, picture: str, api: Api) -> dict[str, Any]:
        """A request about a picture, given as a data URL."""
        source = self.source
        return request_body(
            picture,
            api=api,
            model=source.model,
            prompt_version=source.prompt_version,
            price=self.price,
            detail=source.detail,
        )

    def note_answer(self, name: str, key: str, usd: float, judged: dict[str, Any]) -> None:
        """Keep an answer in the store, with all that a caption is to carry."""
        known = {"model": self.source.model, "prompt_version": self.source.prompt_version}
        self.store.end(name, "answer", key=key, **{**judged, **known, "usd": usd})

    def caption(
        self, file_name: str, sha256: str, record: dict[str, Any], billed: set[str]
    ) -> Caption:
        """A picture's caption from its record; what the picture cost is told once.

        Args:
            billed: pictures whose cost was told before; this one is added.
        """
        usd = 0.0 if sha256 in billed else self.store.spent_on(self.source.key_of(sha256))
        billed.add(sha256)
        return Caption(
            file_name,
            sha256,
            caption=record.get("caption", ""),
            subjects=tuple(record.get("subjects", ())),
            action=record.get("action", ""),
            place=record.get("place", ""),
            model=self.source.model,
            prompt_version=self.source.prompt_version,
            input_tokens=record.get("input_tokens", 0),
            output_tokens=record.get("output_tokens", 0),
            usd=round(usd, 8),
            request_id=record.get("request_id", ""),
            status=record["status"],
            reason=record.get("reason", ""),
            time=str(record.get("time", "")),
            api=record.get("api", ""),
        )

    def clean(self, text: str) -> str:
        """One line without the key, should a server repeat it."""
        text = text.replace(self.secret, "***") if self.secret else text
        return " ".join(text.split())[:400]

    def without_key(self, content: bytes) -> bytes:
        """What a server has sent without the key, for anything that is kept of it."""
        return content.replace(self.secret.encode(), b"***") if self.secret else content

    def announce(self, total: int, left: int, *, batch: bool = False) -> None:
        """Say what is to be done and what it will cost, before anything is sent."""
        side = self.source.longest_side
        each = self.price.usd(self.input_tokens((side, side)), output_tokens(self.price)[0])
        each *= BATCH_SHARE if batch else 1.0
        log(
            f"captions: {total} pictures, {left} to ask {self.source.model} about for roughly "
            f"{_dollars(left * each)} (prices of {PRICES_OF}); ${self.store.booked:.4f} of "
            f"{_dollars(self.source.budget)} are booked already"
        )
        if lost := self.store.possibly_paid():
            worst = sum(row["usd"] for row in lost)
            log(
                f"captions: {len(lost)} requests were cut off before; they may have been paid for "
                f"and count as ${worst:.4f}"
            )

    def no_budget(self) -> UserError:
        """The budget is spent: what to do about it."""
        waiting = self.store.in_batches
        inside = f" ({waiting} requests in batches at their worst price)" if waiting else ""
        return UserError(
            f"the budget of {_dollars(self.source.budget)} does not hold another request: "
            f"${self.store.booked:.4f} are booked{inside}; run again with a larger --budget to go "
            "on, nothing is asked twice"
        )


def encode(path: Path, longest_side: int) -> tuple[str, tuple[int, int]]:
    """A picture as a data URL, reduced to `longest_side`, and its width and height then.

    Raises:
        UserError: not a picture.
    """
    from PIL import Image

    image = Image.fromarray(load_image(path))
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small drawings suffer from JPEG; large pictures cost bandwidth as PNG.
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(buffer, kind, quality=92)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{text}", image.size


def _dollars(amount: float) -> str:
    """$2.00, but $0.0062: two digits would make small budgets look spent, or unspent."""
    return f"${amount:.2f}" if amount >= 1 else f"${amount:.4f}"
