"""What captions of a folder would cost, counted from its pictures before anything is sent."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.caption_answers import (
    LONGEST_SIDE,
    PROMPTS,
    output_tokens,
    request_tokens,
    settled,
)
from tomjerry_utils.caption_files import STORE
from tomjerry_utils.caption_store import Store
from tomjerry_utils.captioner import BATCH_SHARE, key_of
from tomjerry_utils.images import MAX_PIXELS, list_images
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import hash_file
from tomjerry_utils.spending import PRICES_OF, Detail, Price, price_of


@dataclass(frozen=True)
class Estimate:
    """What is left to ask about a folder of pictures, and what it comes to.

    "At worst" every answer is as long as it may be. A picture that has to be asked about again
    costs again; the budget of a run holds for those requests as well.

    Attributes:
        pictures: files in the folder.
        unique: different contents among those that can be read.
        unreadable: files that are no picture.
        answered: contents that have their answer in the folder's store.
        asked: contents that are left to ask about.
        input_tokens: of all those requests: no fewer than they can have.
        output_tokens, worst_output_tokens: of all answers, as expected and at most.
        usd, worst_usd: the price of all that, asked for directly.
    """

    model: str
    price: Price
    price_is_given: bool
    pictures: int
    unique: int
    unreadable: int
    answered: int
    asked: int
    input_tokens: int
    output_tokens: int
    worst_output_tokens: int

    @property
    def usd(self) -> float:
        """Dollars as expected."""
        return self.price.usd(self.input_tokens, self.output_tokens)

    @property
    def worst_usd(self) -> float:
        """Dollars when every answer is as long as it may be."""
        return self.price.usd(self.input_tokens, self.worst_output_tokens)

    @property
    def counted(self) -> str:
        """How the model counts a picture, in words."""
        if self.price.tile is not None:
            base, each = self.price.tile
            return f"tiles of 512 px: {base} tokens and {each} a tile"
        return f"patches of 32 px: {self.price.patch:g} tokens each, at most 1536 patches"

    def report(self) -> str:
        """Lines to print."""
        source = "as given" if self.price_is_given else f"table of {PRICES_OF}"
        unreadable = f", {self.unreadable} unreadable" if self.unreadable else ""
        same = self.pictures - self.unreadable - self.unique
        batch = (self.usd * BATCH_SHARE, self.worst_usd * BATCH_SHARE)
        return "\n".join(
            [
                f"pictures     {self.pictures}: {self.asked} to ask about, {self.answered} "
                f"answered before, {same} with the same content as another{unreadable}",
                f"model        {self.model}: {self.price.input:g} USD a million tokens in, "
                f"{self.price.output:g} out ({source})",
                f"a picture is counted in {self.counted}",
                f"tokens in    {self.input_tokens:,}",
                f"tokens out   {self.output_tokens:,} expected, {self.worst_output_tokens:,} "
                "at worst",
                f"direct       {self.usd:.4f} USD expected, {self.worst_usd:.4f} at worst",
                f"as a batch   {batch[0]:.4f} USD expected, {batch[1]:.4f} at worst",
            ]
        )


def estimate(
    images: Path,
    model: str,
    *,
    detail: Detail = "auto",
    longest_side: int = LONGEST_SIDE,
    prompt_version: str = "v1",
    price: tuple[float, float] | None = None,
    base_url: str = "https://api.openai.com/v1",
    out: Path | None = None,
) -> Estimate:
    """`tomjerry caption estimate`: count what captions of a folder would cost. Nothing is sent.

    Args:
        longest_side: pixels; larger pictures are sent reduced.
        price: (input, output) dollars per million tokens; overrides the table.
        out: a folder that captions were written to: what it has answers to is not counted.

    Raises:
        UserError: no pictures, no such prompt, or a model whose price is not known.
    """
    if prompt_version not in PROMPTS:
        raise UserError(f"no prompt '{prompt_version}': {', '.join(PROMPTS)}")
    known = price_of(model, base_url, price)
    paths = list_images(images)
    sizes: dict[str, tuple[int, int]] = {}
    unreadable = 0
    for path in progress(paths, "estimate", unit="picture"):
        size = _size(path)
        if size is None:
            unreadable += 1
        else:
            sizes[hash_file(path)] = size
    keys = {
        sha256: key_of(
            sha256,
            model=model,
            prompt_version=prompt_version,
            detail=detail,
            longest_side=longest_side,
        )
        for sha256 in sizes
    }
    answered = _settled_in(out / STORE, keys) if out is not None else set()
    tokens_of = {
        size: request_tokens(
            *size,
            prompt_version=prompt_version,
            price=known,
            detail=detail,
            longest_side=longest_side,
        )
        for size in set(sizes.values())
    }
    left = Counter(size for sha256, size in sizes.items() if sha256 not in answered)
    expected, most = output_tokens(known)
    return Estimate(
        model,
        known,
        price is not None,
        pictures=len(paths),
        unique=len(sizes),
        unreadable=unreadable,
        answered=len(answered),
        asked=left.total(),
        input_tokens=sum(times * tokens_of[size] for size, times in left.items()),
        output_tokens=left.total() * expected,
        worst_output_tokens=left.total() * most,
    )


# ---- helpers -------------------------------------------------------------------------------------


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height by a picture's header alone; None for what would not be sent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return (width, height) if width * height <= MAX_PIXELS else None


def _settled_in(store: Path, keys: dict[str, str]) -> set[str]:
    if not store.is_file():
        return set()
    with contextlib.closing(Store(store)) as book:
        return {sha256 for sha256, key in keys.items() if settled(book.answers.get(key, []))}
