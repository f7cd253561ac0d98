"""Pairs of near 64-bit hashes among millions, without comparing all with all.

Multi-index hashing (Norouzi, Punjani and Fleet 2012): cut the 64 bits into more bands than bits may
differ, and some bands of two near hashes are equal. Sorted by those bands, near hashes stand side
by side; each is compared with the few that follow it.

Real hashes crowd: black frames and plain grounds give thousands of equal or almost equal ones,
whose pairs would grow with the square of their number. Equal hashes are therefore searched as one,
a hash looks no further than `window` places along a row, and keeps its `most` nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

RADIUS = 6
WINDOW = 32  # places that a hash looks along a row of hashes that share its bands
MOST = 32  # neighbours kept for each hash
_LARGEST_RADIUS = 12
_ALL = 64  # pairs up to which all pictures of two near hashes are paired with each other
_PENDING = 4_000_000  # pairs found before they are merged: 32 MB
_INDEX_BITS = 29  # two indices and a distance fit in 64 bits


def propose(
    hashes: np.ndarray, *, radius: int = RADIUS, window: int = WINDOW, most: int = MOST
) -> np.ndarray:
    """Pairs of pictures of which some hash of one and some hash of the other are near.

    Complete where hashes lie apart: a pair within the radius is missed only where more than
    `window` hashes share its bands, or `most` nearer ones are kept instead. Where more than `most`
    pictures have one and the same hash, each is paired with the first of them and with the `most`
    that follow.

    Args:
        hashes: (N, K) uint64, as of `near_duplicates.perceptual_hashes`.
        radius: bits that may differ, 0 … 12.
        window: see above; the time grows with it.
        most: see above; memory grows with it.

    Returns:
        (P, 2) int64, i < j in each, sorted, without repetition. P is at most about 2·N·K·`most`.

    Raises:
        ValueError: another shape or type, or a radius outside its range.
    """
    if hashes.ndim != 2 or hashes.dtype != np.uint64:
        raise ValueError(f"need (N, K) uint64 hashes, got {hashes.shape} {hashes.dtype}")
    if not 0 <= radius <= _LARGEST_RADIUS:
        raise ValueError(f"no search within {radius} bits: 0 to {_LARGEST_RADIUS}")
    if hashes.size >= 1 << _INDEX_BITS:
        raise ValueError(f"{hashes.size} hashes are too many: below {1 << _INDEX_BITS} at a time")
    count = len(hashes)
    if not hashes.size:
        return np.zeros((0, 2), np.int64)
    values, inverse = np.unique(hashes, return_inverse=True)
    # The pictures that have each value, one value after the other, each picture once.
    members = _merge([(inverse.reshape(hashes.shape) * count + np.arange(count)[:, None]).ravel()])
    del inverse
    owners = members % count
    starts = np.searchsorted(members, np.arange(len(values) + 1) * count)
    del members
    codes = _merge([_code(a, b, count) for a, b in _within(owners, starts, most)])
    near = _near_values(values, radius, window, most)
    for first in range(0, len(near), _PENDING):
        some = near[first : first + _PENDING]
        codes = _merge([codes, *(_code(a, b, count) for a, b in _across(some, owners, starts))])
    return np.stack(np.divmod(codes, count), axis=1)


# ---- hashes that differ --------------------------------------------------------------------------


def _near_values(values: np.ndarray, radius: int, window: int, most: int) -> np.ndarray:
    """Pairs (Q, 2) of indices of distinct values within the radius, nearest first."""
    bands, taken = _bands(len(values), radius)
    edges = np.linspace(0, 64, bands + 1).astype(int)
    found, pending, waiting, limit = np.zeros(0, np.uint64), [], 0, _PENDING
    for chosen in combinations(range(bands), taken):
        for codes in _row_neighbours(values, edges, chosen, radius, window):
            pending.append(codes)
            waiting += len(codes)
            if waiting > _PENDING:
                found = _merge([found, *pending])
                pending, waiting = [], 0
                if len(found) > limit:
                    found = _nearest(found, most)
                    limit = max(_PENDING, 2 * len(found))
    return _unpack(_nearest(_merge([found, *pending]), most))


def _bands(count: int, radius: int) -> tuple[int, int]:
    """Into how many bands to cut, and how many of them two near hashes surely share.

    Of radius + k bands k are untouched by the bits that differ. More shared bits leave fewer
    strangers in a row, at the price of more orders to sort by: as few as set `count` hashes apart.
    """
    taken = 1
    while taken < 4 and 2 ** (64 * taken // (radius + taken)) < count // 4:
        taken += 1
    return radius + taken, taken


def _row_neighbours(
    values: np.ndarray, edges: np.ndarray, chosen: tuple[int, ...], radius: int, window: int
) -> Iterator[np.ndarray]:
    """Near pairs, packed, among values that share the chosen bands."""
    bands = len(edges) - 1
    key = np.zeros_like(values)
    shared = 0
    # Bits in another order keep their distances: the sorted key serves for comparing, too.
    for band in (*chosen, *(b for b in range(bands) if b not in chosen)):
        width = int(edges[band + 1] - edges[band])
        mask = np.uint64((1 << width) - 1)
        key = (key << np.uint64(width)) | ((values >> np.uint64(edges[band])) & mask)
        shared += width if band in chosen else 0
    order = np.argsort(key)
    key = key[order]
    head = key >> np.uint64(64 - shared)
    active = np.arange(len(key))
    for step in range(1, window + 1):
        active = active[: np.searchsorted(active, len(key) - step)]
        active = active[head[active] == head[active + step]]
        if not len(active):
            return
        distance = np.bitwise_count(key[active] ^ key[active + step])
        near = distance <= radius
        hit = active[near]
        if len(hit):
            yield _pack(order[hit], order[hit + step], distance[near])


def _pack(a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """One number a pair, by which the nearest sort first."""
    low, high = np.minimum(a, b).astype(np.uint64), np.maximum(a, b).astype(np.uint64)
    index = np.uint64(_INDEX_BITS)
    return (distance.astype(np.uint64) << (index + index)) | (low << index) | high


def _unpack(codes: np.ndarray) -> np.ndarray:
    index, mask = np.uint64(_INDEX_BITS), np.uint64((1 << _INDEX_BITS) - 1)
    return np.stack([codes >> index & mask, codes & mask], axis=1).astype(np.int64)


def _nearest(codes: np.ndarray, most: int) -> np.ndarray:
    """Of sorted codes, those that are among the `most` first of either index."""
    ends = _unpack(codes).astype(np.int32).ravel()
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    firsts = np.flatnonzero(np.diff(ends, prepend=-1))
    rank = np.arange(len(ends)) - np.repeat(firsts, np.diff(firsts, append=len(ends)))
    kept = np.zeros(len(ends), bool)
    kept[order] = rank < most
    return codes[kept.reshape(-1, 2).any(1)]


# ---- from hashes to pictures ---------------------------------------------------------------------


def _within(
    owners: np.ndarray, starts: np.ndarray, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures with one and the same hash: all pairs of a few, else the first and the next ones."""
    sizes = np.diff(starts)
    first = np.repeat(starts[:-1], sizes)  # of each place, where its value begins
    yield owners[first], owners
    active = np.arange(len(owners))
    for step in range(1, most + 1):
        active = active[: np.searchsorted(active, len(owners) - step)]
        active = active[first[active] == first[active + step]]
        if not len(active):
            return
        yield owners[active], owners[active + step]


def _across(
    near: np.ndarray, owners: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures of two near hashes: all pairs of a few, else each with the other side's first."""
    a, b = near.T
    sizes = np.diff(starts)
    few = sizes[a] * sizes[b] <= _ALL
    for one, two, ones, twos in (
        (a[few], b[few], sizes[a[few]], sizes[b[few]]),
        (a[~few], b[~few], sizes[a[~few]], np.ones((~few).sum(), np.int64)),
        (a[~few], b[~few], np.ones((~few).sum(), np.int64), sizes[b[~few]]),
    ):
        total = ones * twos
        place = np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
        row, column = np.divmod(place, np.repeat(twos, total))
        yield (
            owners[np.repeat(starts[one], total) + row],
            owners[np.repeat(starts[two], total) + column],
        )


def _code(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """One number a pair, smaller index first; what pairs a picture with itself is left out."""
    low, high = np.minimum(a, b), np.maximum(a, b)
    return (low * count + high)[low != high]


def _merge(parts: list[np.ndarray]) -> np.ndarray:
    """All of some numbers, sorted, each once: by sorting, ten times as fast as `np.unique`."""
    every = np.concatenate(parts)
    every.sort()
    return every[np.concatenate([[True], every[1:] != every[:-1]])[: len(every)]]
