"""Near-duplicates: pictures that are re-encoded, resized, cropped, brightened or marked copies.

Three steps, each cheap enough for the number of things it sees. Hashes of every picture *propose*
pairs (`hash_search.propose`); features of the pictures in these pairs *confirm* them; confirmed
pairs make *clusters*. Clusters are what must not cross a split; `keep_best` says which pictures of
a cluster can go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from tomjerry_utils.hash_search import RADIUS, propose

__all__ = ["RADIUS", "clusters", "confirm", "keep_best", "perceptual_hashes", "propose"]

WINDOWS = ((0.0, 0.0, 1.0), *((y, x, 0.95) for y in (0.0, 0.05) for x in (0.0, 0.05)))
THRESHOLD = 0.27  # distance up to which two pictures are near-duplicates
_HELD = 192  # pixels a side, at most, of pictures held for comparing
_GREY = 96  # pixels a side, at most, of the grey levels that are laid on each other
_SIZE = 128  # pixels a side that two pictures are compared at
_MARK = 0.2  # share of the side that a mark in a corner may take
_MISFIT = 0.45  # share of the contrast above which two pictures are not compared further
_BATCH = 16  # pairs whose features are computed together
# Where a search for the common window begins: the whole, and a crop of 5 % at each corner, of
# either picture.
_STARTS = (
    (0.0, 0.0, 1.0),
    *((y, x, 0.95) for y in (0.0, 0.05) for x in (0.0, 0.05)),
    *((-y, -x, 1 / 0.95) for y in (0.0, 0.05 / 0.95) for x in (0.0, 0.05 / 0.95)),
)
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
    # A wave of a quarter of a grey level is about 64: a flat picture's hash is 0, not its noise.
    size = np.sqrt((waves**2).mean(1, keepdims=True)) + 64.0
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


def confirm(
    pairs: np.ndarray,
    pictures: Callable[[Sequence[int]], Sequence[np.ndarray]],
    *,
    memory: int = 256 * 2**20,
) -> np.ndarray:
    """How different the two pictures of each pair look, once one is laid on the other.

    First the window and the brightness are sought at which the two agree best. What agrees badly
    even then is far. Else fine feature maps (`features.feature_maps`, at a quarter of 128 px) are
    compared place by place: the distance is that of the 3 % most different places, since drawings
    of one family differ in an eye or a mouth only. One corner is left out, whichever serves best:
    a mark may be there.

    Args:
        pairs: (P, 2) indices.
        pictures: gives the pictures of some indices, (H, W, 3) uint8 each. Each picture is asked
            for once, unless a group of linked pairs has more pictures than fit in memory.
        memory: bytes of reduced pictures that are held.

    Returns:
        (P,) float32: 0 for equal pictures, `THRESHOLD` and less for near-duplicates, infinite for
        what cannot be laid on each other.
    """
    shelf = _Shelf(pictures, memory)
    out = np.full(len(pairs), np.inf, np.float32)
    waiting: list[int] = []
    fitted: list[_Laid] = []
    for at in _by_group(pairs):
        i, j = pairs[at].tolist()
        a, b = shelf.get(i, j)
        laid = _lay(a, b)
        if laid is not None:
            waiting.append(int(at))
            fitted.append(laid)
        if len(fitted) == _BATCH:
            out[waiting] = _distances(fitted)
            waiting, fitted = [], []
    if fitted:
        out[waiting] = _distances(fitted)
    return out


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """The groups that confirmed pairs link, directly or by way of others: what no split may cut.

    Args:
        count: number of pictures.
        pairs: (P, 2) indices of confirmed pairs.

    Returns:
        (count,) int64: of each picture the lowest index in its group; its own where it is alone.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.asarray(pairs, np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    _, label = connected_components(links, directed=False)
    _, lowest, inverse = np.unique(label, return_index=True, return_inverse=True)
    return lowest[inverse].astype(np.int64)


def keep_best(pairs: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which picture stands for each: the best of those it was confirmed with, or itself.

    A cluster can be a chain whose ends are not alike. So nothing is dropped because of its cluster:
    from the best picture down, each is kept unless it was confirmed with one that is kept already.

    Args:
        pairs: (P, 2) indices of confirmed pairs.
        quality: (N,) numbers, such as pixels; of equals the lower index is kept.

    Returns:
        (N,) int64: the kept picture that stands for each; its own index where it is kept.
    """
    count = len(quality)
    both = np.concatenate([pairs, pairs[:, ::-1]]).astype(np.int64).reshape(-1, 2)
    both = both[np.argsort(both[:, 0], kind="stable")]
    starts = np.searchsorted(both[:, 0], np.arange(count + 1))
    kept = np.full(count, -1, np.int64)
    for i in np.argsort(-np.asarray(quality), kind="stable").tolist():
        if kept[i] < 0:
            near = both[starts[i] : starts[i + 1], 1]
            kept[near[kept[near] < 0]] = i
            kept[i] = i
    return kept


# ---- laying one picture on the other -------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A picture as it is held for comparing: reduced, in colour and in grey levels (mode F)."""

    colour: Image.Image
    grey: Image.Image
    mean: float
    side: int  # the shorter one, before it was reduced
    bytes: int


def _reduced(picture: np.ndarray) -> _Held:
    image = Image.fromarray(picture)
    colour = _at_most(image, _HELD)
    grey = _at_most(image.convert("L"), _GREY).convert("F")
    used = 3 * colour.width * colour.height + 4 * grey.width * grey.height
    return _Held(colour, grey, float(np.asarray(grey).mean()), min(image.size), used)


def _at_most(image: Image.Image, side: int) -> Image.Image:
    # Each side by itself: pictures are compared as squares anyway, as they are hashed.
    size = (min(image.width, side), min(image.height, side))
    return image if size == image.size else image.resize(size, Image.Resampling.BOX)


class _Shelf:
    """Reduced pictures, the latest used, up to some bytes."""

    def __init__(
        self, pictures: Callable[[Sequence[int]], Sequence[np.ndarray]], memory: int
    ) -> None:
        self._pictures, self._memory, self._used = pictures, memory, 0
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def get(self, *indices: int) -> list[_Held]:
        missing = [i for i in indices if i not in self._held]
        for i, picture in zip(missing, self._pictures(missing) if missing else (), strict=True):
            self._held[i] = _reduced(picture)
            self._used += self._held[i].bytes
        for i in indices:
            self._held.move_to_end(i)
        found = [self._held[i] for i in indices]
        while self._used > self._memory and len(self._held) > len(indices):
            self._used -= self._held.popitem(last=False)[1].bytes
        return found


def _by_group(pairs: np.ndarray) -> np.ndarray:
    """An order of the pairs in which those that share pictures follow each other."""
    if not len(pairs):
        return np.zeros(0, np.int64)
    _, local = np.unique(pairs, return_inverse=True)
    local = local.reshape(-1, 2)
    group = clusters(int(local.max()) + 1, local)[local[:, 0]]
    return np.lexsort((pairs[:, 1], pairs[:, 0], group))


@dataclass(frozen=True)
class _Laid:
    """The part that both pictures show, (128, 128, 3) uint8 each, at one brightness and detail.

    `allowance` is what the smaller picture loses more to compression than one of 256 px would.
    """

    first: np.ndarray
    second: np.ndarray
    allowance: float


def _lay(a: _Held, b: _Held) -> _Laid | None:
    """One picture laid on the other; None where they do not agree."""
    if a.mean > b.mean:
        a, b = b, a  # a brighter copy may be clipped at white, so the darker one is brightened
    best = min((_Fit(start) for start in _STARTS), key=lambda fit: fit.misfit(a.grey, b.grey, 24))
    for size in (24, 48):
        for _ in range(3):
            best = best.improved(a.grey, b.grey, size)
        if not best.plausible() or best.misfit(a.grey, b.grey, size) > _MISFIT:
            return None
    # Compression spoils what is finer than half the larger's pixels; the smaller has no more than
    # its own. Below 32 px there is too little to tell pictures apart by.
    larger, smaller = max(a.side, b.side), min(a.side, b.side)
    detail = min(max(larger // 2, 32), smaller, _SIZE)
    box_a, box_b = best.boxes()
    return _Laid(
        _enlarged(best.brightened(_cut(a.colour, box_a, detail))),
        _enlarged(_cut(b.colour, box_b, detail)),
        min(max(1.0, (256 / smaller) ** 0.5), 2.0),
    )


def _enlarged(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture.round().astype(np.uint8))
    return np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR))


class _Fit:
    """Where in `a` the places of `b` lie, and how much brighter `b` is.

    The place t of b, 0 … 1 along each side, is at start + share · t in a.
    """

    def __init__(
        self, window: tuple[float, float, float], gain: float = 1.0, lift: float = 0.0
    ) -> None:
        y, x, share = window
        self.start, self.share = np.array([y, x]), np.array([share, share])
        self.gain, self.lift = gain, lift

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """What both show, (top, left, bottom, right) in each as shares of its sides."""
        low = np.maximum(0.0, -self.start / self.share)
        high = np.minimum(1.0, (1.0 - self.start) / self.share)
        b = np.concatenate([low, high])
        a = np.concatenate([self.start + self.share * low, self.start + self.share * high])
        return a.clip(0, 1), b.clip(0, 1)

    def plausible(self) -> bool:
        """Whether this is no more than a slight crop and a slight change of brightness."""
        return bool(
            (np.abs(np.log(self.share)) < 0.1).all()
            and (np.abs(self.start + (self.share - 1) / 2) < 0.05).all()
            and 0.7 < self.gain < 1.5
            and abs(self.lift) < 60
        )

    def misfit(self, a: Image.Image, b: Image.Image, size: int) -> float:
        """Share of the contrast that is left between the two, 0 where they agree."""
        box_a, box_b = self.boxes()
        one, two = _cut(a, box_a, size), _cut(b, box_b, size)
        weights = _fade(size)
        level = (weights * two).sum() / weights.sum()
        rest = (weights * (two - self.brightened(one)) ** 2).sum()
        return float(np.sqrt(rest / ((weights * (two - level) ** 2).sum() + weights.sum())))

    def improved(self, a: Image.Image, b: Image.Image, size: int) -> _Fit:
        """One step of Gauss and Newton, as Lucas and Kanade 1981 lay pictures on each other."""
        if not self.plausible():
            return self
        box_a, box_b = self.boxes()
        one, two = _cut(a, box_a, size), _cut(b, box_b, size)
        laid = self.brightened(one)
        open_ = (laid > 0) & (laid < 255)
        slopes = np.gradient((laid + two) / 2)
        columns = []
        for axis in (0, 1):
            extent = box_a[axis + 2] - box_a[axis]
            slope = slopes[axis] * size / extent
            place = box_b[axis] + (np.arange(size) + 0.5) / size * (box_b[axis + 2] - box_b[axis])
            columns += [slope, slope * (place[:, None] if axis == 0 else place)]
        columns += [one * open_, 255.0 * open_]
        weights = np.sqrt(_fade(size)).ravel()
        table = np.stack([c.ravel() for c in columns], axis=1) * weights[:, None]
        # A little of each diagonal: flat pictures leave some of the six undetermined.
        square = table.T @ table
        square += np.diag(1e-3 * np.diag(square) + 1e-3 * size**2)
        step = np.linalg.solve(square, table.T @ ((two - laid).ravel() * weights))
        new = _Fit((0.0, 0.0, 1.0), self.gain + step[4], self.lift + 255 * step[5])
        new.start = self.start + step[[0, 2]].clip(-0.05, 0.05)
        new.share = self.share + step[[1, 3]].clip(-0.05, 0.05)
        return new

    def brightened(self, a: np.ndarray) -> np.ndarray:
        return np.clip(self.gain * a + self.lift, 0, 255)


def _cut(image: Image.Image, box: np.ndarray, size: int) -> np.ndarray:
    """A part of a picture, brought to size × size, as float32."""
    top, left, bottom, right = (box * np.tile((image.height, image.width), 2)).tolist()
    small = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(small, np.float32)


@lru_cache(maxsize=4)
def _fade(size: int) -> np.ndarray:
    side = np.sin(np.pi * (np.arange(size) + 0.5) / size)
    return np.outer(side, side)


# ---- comparing what was laid on each other -------------------------------------------------------


def _distances(laid: Sequence[_Laid]) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    from tomjerry_utils.features import feature_maps

    with torch.no_grad():
        both = np.stack([pair.first for pair in laid] + [pair.second for pair in laid])
        maps = feature_maps(both, size=_SIZE, depths=2)[1]
        # One scale a picture, not one a place: where a picture is flat there is little to differ.
        maps = maps / maps.square().sum(1).mean((1, 2)).sqrt()[:, None, None, None]
        first, second = maps.chunk(2)
        gap = (first - second).square().sum(1, keepdim=True)
        gap = F.avg_pool2d(gap, 3, stride=1, padding=1, count_include_pad=False)[:, 0]
        edge = gap.shape[-1]
        mark = round(_MARK * edge)
        found = []
        for y in (slice(0, mark), slice(edge - mark, edge)):
            for x in (slice(0, mark), slice(edge - mark, edge)):
                unmarked = torch.ones(edge, edge, dtype=torch.bool)
                unmarked[y, x] = False
                found.append(gap[:, unmarked].quantile(0.97, dim=1))
        allowance = np.array([pair.allowance for pair in laid], np.float32)
        return torch.stack(found).amin(0).numpy() / allowance
