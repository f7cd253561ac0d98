"""Near-duplicates: pictures that are re-encoded, resized, cropped, brightened or marked copies.

Three steps, each cheap enough for the number of things it sees. Hashes of every picture *propose*
pairs (`hash_search.propose`); features of the pictures in these pairs *confirm* them; confirmed
pairs make *clusters*. Clusters are what must not cross a split; `keep_best` says which pictures of
a cluster can go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tomjerry_utils.hash_search import propose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["clusters", "confirm", "keep_best", "perceptual_hashes", "propose"]

WINDOWS = ((0.0, 0.0, 1.0), *((y, x, 0.95) for y in (0.0, 0.05) for x in (0.0, 0.05)))
_GRID = 64  # pixels a side that a picture is hashed at
_WAVES = 12  # cosines along each side, of whose products the 64 slowest are used


def perceptual_hashes(image: np.ndarray) -> np.ndarray:
    """Hashes that small changes of a picture leave almost as they are.

    As pHash (Zauner 2010), the signs of the slowest waves of a discrete cosine transform of the
    luma, but for three things, each measured. The waves fade towards the edges, where crops and
    marks in a corner change a picture. A wave must rise above a share of the others' size: in a
    symmetric drawing half of them are zero but for noise. And there is one hash of the whole and
    one of each corner's window of 95 %, so that a crop finds what it was cut from.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (5,) uint64, in the order of `WINDOWS`.
    """
    luma = Image.fromarray(image).convert("L")
    method = Image.Resampling.BOX if min(luma.size) > _GRID else Image.Resampling.BILINEAR
    grid = np.asarray(luma.resize((_GRID, _GRID), method), np.float32)
    across, down, chosen = _waves()
    weights = down[:, 0]  # of the rows, in each window; the slowest wave is the fading alone
    means = np.einsum("ky,yx,kx->k", weights, grid, across[:, 0])
    means /= weights.sum(1) * across[:, 0].sum(1)
    centred = grid - means[:, None, None]
    waves = (down @ centred @ across.transpose(0, 2, 1)).reshape(len(WINDOWS), -1)[:, chosen]
    # The floor makes a flat picture's hash 0 instead of its rounding errors' signs.
    size = np.sqrt((waves**2).mean(1, keepdims=True)) + 1.0
    bits = waves > 0.15 * size
    packed = np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little"))
    return packed.view("<u8")[:, 0].astype(np.uint64)


@lru_cache(maxsize=1)
def _waves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fading cosines (5, 12, 64) along the rows and down the columns, and which products count."""
    place = (np.arange(_GRID) + 0.5) / _GRID

    def along(start: float, share: float) -> np.ndarray:
        inside = (place - start) / share
        fade = np.where((inside > 0) & (inside < 1), np.sin(np.pi * inside), 0.0)
        return np.cos(np.pi * np.arange(_WAVES)[:, None] * inside) * fade

    across = np.stack([along(x, share) for _, x, share in WINDOWS])
    down = np.stack([along(y, share) for y, _, share in WINDOWS])
    speed = np.add.outer(np.arange(_WAVES) ** 2, np.arange(_WAVES) ** 2).ravel()
    slowest = np.argsort(speed, kind="stable")[1:65]
    # Strewn, so that every band of neighbouring bits holds slow waves and fast ones.
    return across.astype(np.float32), down.astype(np.float32), slowest[np.arange(64) * 29 % 64]
