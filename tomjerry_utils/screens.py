"""Screens for collected pictures: too small, blurred, text or watermark, photograph or drawing.

Pictures from archives and folders are not chosen by hand, so stage 01 passes each through here. Two
kinds of numbers decide: `measure` reads pixels (size, edges, flatness), `score` asks two linear
probes on EfficientNet-Lite0's features whether a picture is a photograph and where text lies on it.
`judge` holds both against `Limits` and gives every reason in words.

The probes ship in `data/foundation/screens/`; `tomjerry foundation screens` makes them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy import ndimage

from tomjerry_utils import UserError
from tomjerry_utils.runs import foundation_root

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "screens.safetensors"
SIZE = 256  # px that a picture is brought to for the probes, and short side for the edges
DOMAINS = ("cartoon", "natural")
_LINE = (2, 10)  # rows and columns of the text probe's places, 8 px each, that a mark covers
_BAND = 4  # rows of places at the top and at the bottom that marks are looked for in
_BLOCK = 16  # px; one edge is read per block
_FINE, _COARSE = 1.0, 2.0  # px, deviations of the two smoothings that edges are compared at
_GRAIN = 0.051  # power of the fine slopes of white grain of deviation 1
_NARROWEST = 8  # px; below, there is no room for an edge


@dataclass(frozen=True)
class Measures:
    """What the pixels of one picture say.

    Attributes:
        width, height: px.
        aspect: long side over short side, 1 or more.
        border: share of the area that is bars of one colour along the sides, 0 … 1.
        contrast: deviation of the grey levels, 0 … 127.5.
        entropy: of the grey levels, bits, 0 … 8.
        flat: share of places without any slope, 0 … 1; high in drawings.
        edges: blocks of 16 × 16 px, at a short side of 256 px, that hold an edge.
        blur: deviation in px, at a short side of 256 px, of the blur on the sharper edges; 0 where
            there are none to read.
    """

    width: int
    height: int
    aspect: float
    border: float
    contrast: float
    entropy: float
    flat: float
    edges: int
    blur: float


@dataclass(frozen=True)
class Scores:
    """What the probes say of one picture.

    Attributes:
        photo: probability that it is a photograph and no drawing.
        text: share of its area that letters lie on, 0 … 1.
        mark: how surely a line of letters lies along the top or bottom, as subtitles do and the
            marks that owners set in a corner, too small to count by their area; 0 … 1.
    """

    photo: float
    text: float
    mark: float


@dataclass(frozen=True)
class Limits:
    """Where `judge` refuses.

    Chosen on one half of the pictures that no probe saw and checked on the other: 39 photographs,
    214 drawings, generated scenes (`benchmarks/screens.py`, `results/screens.json`). Blur: none of
    the photographs and one of the drawings is refused as it is; blurred by 3 px, 97 % of the
    photographs and 71 % of the drawings. Text: five of the photographs, some with lettering, and
    3 % of the drawings are refused as they are; of all that was written on, 99 % with subtitles,
    85 % with a small mark in a corner, 69 % with words across. Photograph or drawing: two of the
    photographs are refused, and 2 % of the drawings pass for one.
    """

    short_side: int = 64
    aspect: float = 4.0
    contrast: float = 4.0
    blur: float = 1.75
    edges: int = 4  # fewer say nothing of blur
    text: float = 0.07
    mark: float = 0.6
    photo_at_least: float = 0.3  # for domain natural
    photo_at_most: float = 0.7  # for domain cartoon


def measure(image: np.ndarray) -> Measures:
    """Read the pixels of one picture; about 10 ms at 512 px.

    Blur is the spread of edges: an edge that is already soft changes little when it is blurred
    again, and the ratio of both slopes gives its width (Zhuo & Sim 2011, Pattern Recognit. 44(9),
    eq. 6). So drawings with few but crisp edges are sharp, and so is a sharp animal before a soft
    background. Larger pictures are first reduced to a short side of 256 px: what is blurred is so
    at any size. Smaller ones are read as they are.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"need (H, W, 3) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    grey = _reduced(image)
    inner = _without_bars(grey)
    border = 1 - inner.size / grey.size
    levels = np.bincount(inner.astype(np.uint8).ravel(), minlength=256) / inner.size
    share = levels[levels > 0]
    blur, edges, flat = _edges(inner)
    return Measures(
        width=width,
        height=height,
        aspect=max(width, height) / max(1, min(width, height)),
        border=float(border),
        contrast=float(grey.std()),
        entropy=float(-(share * np.log2(share)).sum()),
        flat=flat,
        edges=edges,
        blur=blur,
    )


def score(
    pictures: Sequence[np.ndarray] | np.ndarray, *, batch_size: int = 16, device: str = "cpu"
) -> tuple[list[Scores], np.ndarray]:
    """Ask the probes, and give the features too, so that nothing need look a second time.

    Args:
        pictures: (H, W, 3) uint8 each; sizes may differ. Each is brought to 256 × 256 px.
        batch_size: pictures at a time.
        device: where to compute.

    Returns:
        one `Scores` a picture, and (N, 1280) float32, the means of the network's last map.

    Raises:
        UserError: the probes' weights are not there.
    """
    import torch

    probes = load_probes()
    found: list[Scores] = []
    features: list[np.ndarray] = []
    for start in range(0, len(pictures), batch_size):
        batch = np.stack([to_size(p) for p in pictures[start : start + batch_size]])
        with torch.no_grad():
            seen = describe(batch, device)
            photo = torch.sigmoid(seen.summary @ probes["photo.weight"] + probes["photo.bias"])
            letters = text_map(seen.places, probes)
        told = (photo, text_share(letters), mark_of(letters))
        found += [Scores(*each) for each in zip(*(t.tolist() for t in told), strict=True)]
        features.append(seen.features.numpy())
    width = 1280
    return found, np.concatenate(features) if features else np.zeros((0, width), np.float32)


def judge(
    measures: Measures, scores: Scores | None, domain: str, limits: Limits | None = None
) -> list[tuple[str, float, float]]:
    """Every reason against a picture, the plainest first; none for one that may stay.

    Args:
        measures: from `measure`.
        scores: from `score`; None leaves the probes out.
        domain: "natural" wants a photograph, "cartoon" a drawing; anything else, either.
        limits: by default `Limits()`.

    Returns:
        (reason in words, value found, limit), the words made for the column `reason` of a manifest:
        what stands before the colon is the kind.
    """
    m, at = measures, limits or Limits()
    size = f"{m.width}x{m.height} px"
    short = min(m.width, m.height)
    found: list[tuple[str, float, float]] = []

    def refuse(when: bool, reason: str, value: float, limit: float) -> None:
        if when:
            found.append((reason, float(value), float(limit)))

    refuse(
        short < at.short_side,
        f"too small: {size}, at least {at.short_side} on the short side",
        short,
        at.short_side,
    )
    refuse(
        m.aspect > at.aspect,
        f"too narrow: {size}, at most {at.aspect:g} times as long as wide",
        m.aspect,
        at.aspect,
    )
    refuse(
        m.contrast < at.contrast,
        f"empty: grey levels deviate by {m.contrast:.1f}, at least {at.contrast:g}",
        m.contrast,
        at.contrast,
    )
    refuse(
        m.edges >= at.edges and m.blur > at.blur,
        f"blurred: by {m.blur:.1f} px at a short side of {SIZE}, at most {at.blur:g}",
        m.blur,
        at.blur,
    )
    if scores is None:
        return found
    refuse(
        scores.text > at.text,
        f"text or watermark: on {scores.text:.0%} of the picture, at most {at.text:.0%}",
        scores.text,
        at.text,
    )
    refuse(
        scores.mark > at.mark and scores.text <= at.text,
        f"text or watermark: a line of it along the top or bottom, sure to {scores.mark:.2f}, at "
        f"most {at.mark:g}",
        scores.mark,
        at.mark,
    )
    refuse(
        domain == "natural" and scores.photo < at.photo_at_least,
        f"not a photograph: {scores.photo:.2f}, at least {at.photo_at_least:g}",
        scores.photo,
        at.photo_at_least,
    )
    refuse(
        domain == "cartoon" and scores.photo > at.photo_at_most,
        f"not a cartoon: a photograph by {scores.photo:.2f}, at most {at.photo_at_most:g}",
        scores.photo,
        at.photo_at_most,
    )
    return found


# ---- what the probes look at ---------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """The network's view of a batch.

    Attributes:
        features: (B, 1280), means of the last map.
        summary: (B, F), those with means and deviations of the finer maps: texture.
        places: (B, h, w, G), every eighth pixel's features, from fine to coarse.
    """

    features: Tensor
    summary: Tensor
    places: Tensor


def describe(images: np.ndarray, device: str = "cpu") -> Seen:
    """Look at pictures (B, 256, 256, 3) uint8 with EfficientNet-Lite0, once for both probes."""
    import torch
    import torch.nn.functional as F

    from tomjerry_utils.features import feature_maps, network
    from tomjerry_utils.images import to_tensor

    net = network(device)
    with torch.no_grad():
        maps = feature_maps(to_tensor(images).to(device), size=SIZE)
        last = net._swish(net._bn1(net._conv_head(maps[-1])))
        features = last.mean((2, 3))
        texture = [part for m in maps[:4] for part in (m.mean((2, 3)), m.std((2, 3)))]
        grid = maps[2].shape[-2:]
        mean = F.avg_pool2d(maps[1], 2)
        spread = (F.avg_pool2d(maps[1].square(), 2) - mean.square()).clamp(min=0).sqrt()
        around = F.avg_pool2d(maps[2], 3, 1, 1, count_include_pad=False)
        coarse = [F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps[3:]]
        places = torch.cat([mean, spread, maps[2], around, *coarse], 1).permute(0, 2, 3, 1)
    return Seen(features.cpu(), torch.cat([features, *texture], 1).cpu(), places.cpu())


def text_share(letters: Tensor) -> Tensor:
    """Share of each picture that letters lie on, (B,), by its :func:`text_map`."""
    return (letters > 0.5).float().mean((1, 2))


def mark_of(letters: Tensor) -> Tensor:
    """How surely a line of letters lies along the top or bottom, (B,), by a :func:`text_map`.

    The mean over the places that a short line covers, where in those two bands it is highest.
    """
    import torch
    import torch.nn.functional as F

    bands = torch.stack([letters[:, :_BAND], letters[:, -_BAND:]], 1)
    return F.avg_pool2d(bands, _LINE, 1).amax((1, 2, 3))


def text_map(places: Tensor, probes: dict[str, Tensor]) -> Tensor:
    """Probability of letters at every eighth pixel, (B, h, w), smoothed over 3 × 3 places."""
    import torch
    import torch.nn.functional as F

    hidden = torch.relu(places @ probes["text.in.weight"] + probes["text.in.bias"])
    chance = torch.sigmoid(hidden @ probes["text.out.weight"] + probes["text.out.bias"])
    return F.avg_pool2d(chance[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def to_size(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 at 256 × 256 px: the whole of it, stretched."""
    if picture.shape[:2] == (SIZE, SIZE):
        return picture
    image = Image.fromarray(picture)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0))


@lru_cache(maxsize=1)
def load_probes() -> dict[str, Any]:
    """The shipped probes: `photo.weight` (F,), `text.in.weight` (G, K) and so on, float32."""
    return read_probes(foundation_root() / "screens" / WEIGHTS)


def read_probes(path: Path) -> dict[str, Any]:
    """Probes from a file.

    Raises:
        UserError: it is not there.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"no probes in {path}: clone again, or `tomjerry foundation screens`")
    return {name: value.float() for name, value in load_file(path).items()}


# ---- pixels --------------------------------------------------------------------------------------


def _reduced(image: np.ndarray) -> np.ndarray:
    """Grey levels, float32, at most 256 px on the short side."""
    grey = Image.fromarray(image).convert("L")
    short = min(grey.size)
    if short > SIZE:
        size = (round(grey.width * SIZE / short), round(grey.height * SIZE / short))
        # A strip would stay as long as it is; nothing is to be read from its far end.
        size = (min(size[0], 4 * SIZE), min(size[1], 4 * SIZE))
        grey = grey.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(grey, np.float32)


def _without_bars(grey: np.ndarray) -> np.ndarray:
    """The picture without bars of one grey along its sides; the whole where nothing else is."""
    for _ in range(2):
        plain = np.ptp(grey, axis=1) <= 6
        kept = np.flatnonzero(~plain | (np.abs(grey[:, 0] - grey[0, 0]) > 6))
        ends = np.flatnonzero(~plain | (np.abs(grey[:, 0] - grey[-1, 0]) > 6))
        if not len(kept) or not len(ends) or kept[0] > ends[-1]:
            return grey.T if _ else grey
        grey = grey[kept[0] : ends[-1] + 1].T
    return grey


def _edges(grey: np.ndarray) -> tuple[float, int, float]:
    """Blur of the sharper edges in px, blocks that hold an edge, and share of flat places."""
    rows, columns = grey.shape[0] // _BLOCK, grey.shape[1] // _BLOCK
    if min(grey.shape) < _NARROWEST:
        return 0.0, 0, 0.0
    fine, coarse = (_slope(grey, sigma) for sigma in (_FINE, _COARSE))
    flat = float((fine < 0.5).mean())
    if not rows or not columns:
        return 0.0, 0, flat

    def blocks(a: np.ndarray) -> np.ndarray:
        cut = a[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)
        return cut.transpose(0, 2, 1, 3).reshape(rows * columns, -1)

    fine, coarse = blocks(fine), blocks(coarse)
    # Grain raises fine slopes everywhere; it is read where the picture is calmest.
    grain = _GRAIN * float(np.quantile(blocks(_residual(grey)).mean(1), 0.05))
    top = coarse.argmax(1)[:, None]
    strong = np.take_along_axis(coarse, top, 1)[:, 0]
    sharp = np.take_along_axis(fine, top, 1)[:, 0]
    holds = strong > max(1.0, 3 * np.sqrt(grain))
    if not holds.any():
        return 0.0, 0, flat
    ratio = np.maximum(sharp[holds] ** 2 - grain, 1e-6) / strong[holds] ** 2
    spread = (_COARSE**2 - ratio * _FINE**2) / np.maximum(ratio - 1, 1e-2)
    blur = np.sqrt(np.clip(spread, 0, 15.0**2))
    return float(np.quantile(blur, 0.2)), int(holds.sum()), flat


def _residual(grey: np.ndarray) -> np.ndarray:
    """Power of what is neither level nor slope (Immerkær 1996): grain, where texture is least."""
    across = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
    power = np.zeros_like(grey)
    power[1:-1, 1:-1] = ((across[:-2] - 2 * across[1:-1] + across[2:]) / 6) ** 2
    return power


def _slope(grey: np.ndarray, sigma: float) -> np.ndarray:
    smooth = ndimage.gaussian_filter(grey, sigma, mode="nearest", truncate=3)
    across = np.zeros_like(smooth)
    down = np.zeros_like(smooth)
    across[:, 1:-1] = (smooth[:, 2:] - smooth[:, :-2]) / 2
    down[1:-1] = (smooth[2:] - smooth[:-2]) / 2
    return np.hypot(across, down)
