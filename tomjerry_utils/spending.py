"""What captions cost: a price table with its date, and how models count a picture as tokens."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from tomjerry_utils import UserError
from tomjerry_utils.runs import log

Detail = Literal["low", "high", "auto"]


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
