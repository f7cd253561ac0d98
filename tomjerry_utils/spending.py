"""What captions cost, and the book that is kept of it.

A price table with its date, the two ways in which models count a picture as tokens, and an
append-only store of every request and answer that a budget holds against.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tomjerry_utils import UserError
from tomjerry_utils.runs import log

Detail = Literal["low", "high", "auto"]


# ---- prices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and how a picture is counted in tokens.

    Attributes:
        tile: (base, per 512 px tile) for models that count tiles.
        patch: tokens per 32 px patch, for models that count patches.
        thinks: its hidden reasoning is billed as output.
    """

    input: float
    output: float
    tile: tuple[int, int] | None = None
    patch: float = 0.0
    thinks: bool = False

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        """The price of a request; cached input is billed below this."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


PRICES_OF = "2026-05-04"  # the day the prices below were read, as published by OpenAI
PRICES = {
    "gpt-4o": Price(2.5, 10.0, tile=(85, 170)),
    "gpt-4o-mini": Price(0.15, 0.6, tile=(2833, 5667)),
    "gpt-4.1": Price(2.0, 8.0, tile=(85, 170)),
    "gpt-4.1-mini": Price(0.4, 1.6, patch=1.62),
    "gpt-4.1-nano": Price(0.1, 0.4, patch=2.46),
    "gpt-5": Price(1.25, 10.0, tile=(70, 140), thinks=True),
    "gpt-5-mini": Price(0.25, 2.0, patch=1.62, thinks=True),
    "gpt-5-nano": Price(0.05, 0.4, patch=2.46, thinks=True),
    "gpt-5.1": Price(1.25, 10.0, tile=(70, 140), thinks=True),
    "gpt-5.2": Price(1.75, 14.0, patch=1.62, thinks=True),
    "gpt-5.4": Price(2.5, 15.0, patch=1.62, thinks=True),
    "gpt-5.4-mini": Price(0.75, 4.5, patch=1.62, thinks=True),
    "gpt-5.4-nano": Price(0.2, 1.25, patch=2.46, thinks=True),
    "gpt-5.5": Price(5.0, 30.0, patch=1.62, thinks=True),
}


def price_of(model: str, base_url: str, given: tuple[float, float] | None = None) -> Price:
    """The price of a model: as given, from the table, or a stand-in for one's own server.

    Args:
        given: (input, output) US dollars per million tokens; overrides the table.

    Raises:
        UserError: a model that the table does not hold, on a server of someone else.
    """
    # A dated snapshot costs what its family does: gpt-4o-2024-08-06.
    known = PRICES.get(re.sub(r"-(\d{4}-\d{2}-\d{2}|latest)$", "", model))
    if given is not None:
        if min(given) < 0:
            raise UserError("a price cannot be below 0: give dollars per million tokens, IN,OUT")
        # Of an unknown model the dearer way of counting a picture is assumed.
        return replace(
            known or Price(0, 0, patch=2.46, thinks=True), input=given[0], output=given[1]
        )
    if known is not None:
        return known
    if is_own(base_url):
        log(
            f"no price known for '{model}': booked against the budget like gpt-4o; "
            "set your own with --price IN,OUT (dollars per million tokens; 0,0 for free)"
        )
        return replace(PRICES["gpt-4o"], tile=None, patch=2.46, thinks=True)
    raise UserError(
        f"no price known for the model '{model}' (table of {PRICES_OF}): give --price IN,OUT in "
        f"dollars per million tokens, or a model of {', '.join(PRICES)}"
    )


def image_tokens(width: int, height: int, price: Price, detail: Detail = "high") -> int:
    """What a picture counts as, in input tokens, for a model with this price."""
    if price.tile is not None:
        base, per_tile = price.tile
        if detail == "low":
            return base
        scale = min(1.0, 2048 / max(width, height))
        scale *= min(1.0, 768 / (min(width, height) * scale))
        return base + per_tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    patches = math.ceil(width / 32) * math.ceil(height / 32)
    return math.ceil(min(patches, 1536) * price.patch)


def is_own(base_url: str) -> bool:
    """True for a server on this machine or network, which needs no key and bills nobody."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost" or host.endswith((".local", ".internal")):
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


# ---- the store -----------------------------------------------------------------------------------


class Store:
    """All requests ever sent and all answers, one JSON object a line, only ever appended to.

    Lines: `sent` (before a request, with its worst price), `answer` (what came back, with its
    price), `failed` (nothing usable came back; the worst price if it may have been billed). A
    `sent` without one of the others was cut off by a kill and counts at its worst price.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, float]] = {}  # request → (key, worst price)
        self._closed: dict[str, float] = {}  # key → dollars
        self.answers: dict[str, list[dict[str, Any]]] = {}
        text = path.read_bytes() if path.is_file() else b""
        for line in text.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill tore
        self.possibly_paid = {name: worst for name, (_, worst) in self._open.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if text and not text.endswith(b"\n"):
            os.write(self._file, b"\n")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    @property
    def under_way(self) -> int:
        """Requests of this process that have not ended."""
        with self._lock:
            return len(self._open) - len(self.possibly_paid)

    @property
    def booked(self) -> float:
        """Dollars spent for certain or perhaps, requests under way at their worst price."""
        with self._lock:
            return self._total()

    def spent_on(self, key: str) -> float:
        """The part of `booked` that went into one picture."""
        with self._lock:
            return self._closed.get(key, 0.0) + sum(w for k, w in self._open.values() if k == key)

    def begin(self, key: str, worst: float, budget: float) -> str | None:
        """Book a request; its id, or None where the budget does not hold its worst price."""
        with self._lock:
            if self._total() + worst > budget:
                return None
            name = f"{time.time_ns():x}-{random.getrandbits(32):08x}"
            self._append({"event": "sent", "id": name, "key": key, "usd": worst})
            return name

    def end(self, name: str, event: str, **record: Any) -> None:
        """Note what became of a request: an "answer" or "failed"."""
        with self._lock:
            self._append({"event": event, "id": name, **record})

    def _total(self) -> float:
        return sum(self._closed.values()) + sum(worst for _, worst in self._open.values())

    def _append(self, record: dict[str, Any]) -> None:
        record["time"] = round(time.time(), 3)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        left = line.encode("utf-8", "backslashreplace")
        while left:
            left = left[os.write(self._file, left) :]
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        key, usd = record["key"], float(record["usd"])
        if record["event"] == "sent":
            self._open[record["id"]] = (key, usd)
            return
        self._open.pop(record["id"], None)
        self._closed[key] = self._closed.get(key, 0.0) + usd
        if record["event"] == "answer":
            self.answers.setdefault(key, []).append(record)
