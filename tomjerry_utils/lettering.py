"""Letters on pictures, for the text probe of :mod:`screens`: it knows where it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

KINDS = ("subtitle", "corner", "tiled", "across", "card", "page")
TRAIN_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "cmss10.ttf",
               "DejaVuSans-Oblique.ttf", "cmb10.ttf", "")  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSerif.ttf", "DejaVuSerif-BoldItalic.ttf", "STIXGeneral.ttf")


def overlay(
    image: np.ndarray,
    kind: str,
    rng: np.random.Generator,
    fonts: Sequence[str] = TRAIN_FONTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Write on a picture.

    Args:
        image: (H, W, 3) uint8.
        kind: of `KINDS`: a subtitle, a mark in a corner, a watermark many times, one across, a
            title card, a page of text.

    Returns:
        the picture, and (H, W) float in 0 … 1, how far each place lies within a line of text.
    """
    height, width = image.shape[:2]
    canvas = Image.new("L", (2 * width, 2 * height))  # large enough to be turned
    boxes = Image.new("L", canvas.size)
    pen, box = ImageDraw.Draw(canvas), ImageDraw.Draw(boxes)
    name = str(rng.choice(list(fonts)))

    def line(text: str, size: float, x: float, y: float) -> None:
        # x and y: centre, as shares of the picture.
        font = _font(name, max(7, round(size * height)))
        at = (width / 2 + x * width, height / 2 + y * height)
        pen.text(at, text, fill=255, font=font, anchor="mm")
        box.rectangle(pen.textbbox(at, text, font=font, anchor="mm"), fill=255)

    strength, angle, outlined = 1.0, 0.0, False
    match kind:
        case "subtitle":
            size, count = rng.uniform(0.045, 0.09), int(rng.integers(1, 3))
            for i in range(count):
                line(_words(rng, rng.uniform(0.4, 0.9) / size), size, 0.5,
                     rng.uniform(0.9, 0.94) - 1.3 * size * (count - 1 - i))  # fmt: skip
            outlined = rng.random() < 0.7
        case "corner":
            size = rng.uniform(0.03, 0.07)
            x, y = rng.choice([0.25, 0.75]), rng.choice([0.06, 0.94])
            line(_words(rng, rng.uniform(0.2, 0.45) / size), size, x, y)
            strength = rng.uniform(0.5, 1.0)
        case "tiled":
            size, text = rng.uniform(0.03, 0.08), _words(rng, rng.uniform(5, 12))
            step = size * (len(text) * 0.65 + 3)
            for i in range(-8, 9):
                for j in range(-8, 9):
                    line(text, size, 0.5 + (i + 0.5 * (j % 2)) * step, 0.5 + j * size * 3.5)
            strength, angle = rng.uniform(0.2, 0.6), rng.uniform(-45, 45)
        case "across":
            size = rng.uniform(0.08, 0.18)
            line(_words(rng, rng.uniform(0.6, 1.1) / size), size, 0.5, rng.uniform(0.35, 0.65))
            strength, angle = rng.uniform(0.25, 0.8), rng.choice([0.0, rng.uniform(-40, 40)])
        case "card":
            size = rng.uniform(0.08, 0.2)
            for i in range(int(rng.integers(1, 4))):
                line(_words(rng, rng.uniform(0.4, 1.0) / size), size, 0.5, 0.25 + 1.3 * size * i)
            outlined = rng.random() < 0.5
        case "page":
            size = rng.uniform(0.035, 0.07)
            for i in range(int(0.85 / (1.4 * size))):
                line(_words(rng, 0.95 / size), size, 0.5, 0.08 + 1.4 * size * i)
        case _:
            raise ValueError(f"no kind of text {kind!r}: {', '.join(KINDS)}")

    def placed(layer: Image.Image) -> np.ndarray:
        turned = layer.rotate(angle, Image.Resampling.BILINEAR)
        left, top = width // 2, height // 2
        return np.asarray(turned.crop((left, top, left + width, top + height)), np.float32) / 255

    ink = placed(canvas)
    colour = _colour(rng, image, ink)
    below = image.astype(np.float64)
    if kind == "page" and rng.random() < 0.7:
        paper = 255.0 if colour.mean() < 128 else 0.0
        below += rng.uniform(0.5, 1.0) * (paper - below)
    if outlined:
        wide = np.asarray(
            Image.fromarray((255 * ink).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
        )
        below = below * (1 - wide[..., None] / 255)
        colour = np.array([255.0, 255.0, rng.choice([255.0, 80.0])])
    drawn = below + strength * ink[..., None] * (colour - below)
    return drawn.clip(0, 255).round().astype(np.uint8), placed(boxes)


# ---- helpers -------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    if not name:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _words(rng: np.random.Generator, room: float) -> str:
    """Letters in the shape of words, about as many as fit in `room` font heights."""
    count, text = max(3, int(room * 1.7)), ""
    alphabet = "etaoinshrdlucmfwypvbgkjqxz"
    weights = np.linspace(3, 0.3, len(alphabet))
    style = rng.integers(0, 4)
    while len(text) < count:
        letters = rng.choice(list(alphabet), int(rng.integers(2, 9)), p=weights / weights.sum())
        word = "".join(letters)
        if rng.random() < 0.1:
            word = str(rng.integers(1, 10_000))
        text += (" " if text else "") + word
    text = text[: count + 4]
    if style == 0:
        return text.upper()
    if style == 1:
        return text.title()
    if style == 2 and rng.random() < 0.4:
        return f"© {text}" if rng.random() < 0.5 else f"www.{text.replace(' ', '')}.com"
    return text.capitalize()


def _colour(rng: np.random.Generator, image: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """White, black or any colour that can be read on what lies below."""
    below = image[ink > 0.5].mean() if (ink > 0.5).any() else 128.0
    pick = rng.random()
    if pick < 0.6:
        return np.full(3, 255.0 if below < 150 else 0.0)
    colour = rng.uniform(0, 255, 3)
    return colour if abs(colour.mean() - below) > 70 else np.full(3, 255.0 if below < 128 else 0.0)
