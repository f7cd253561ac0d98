"""Measures on arrays alone: no picture is drawn or judged here.

Intervals; KID, precision and recall of sets; structure distance, mask IoU, PCK of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

BOOTSTRAP = 1000  # samples of an interval
SUBSETS, SUBSET_SIZE = 100, 100  # of KID
NEIGHBOURS = 3  # that a manifold's balls reach (Kynkäänniemi et al. 2019, section 3)


# ---- sets of pictures --------------------------------------------------------------------------


def bootstrap_ci(values: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0) -> list[float]:
    """The 95 % percentile interval of a mean: `samples` times as many values drawn anew."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    return np.percentile(values[draws].mean(1), [2.5, 97.5]).tolist()


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0
) -> dict[str, Any]:
    """Mean of a − b over the same scenes, with its interval; scenes that either lacks are left out.

    Returns:
        difference, ci95, n; the two differ at the 5 % level where ci95 excludes 0.
    """
    gaps = np.asarray(a, float) - np.asarray(b, float)
    gaps = gaps[~np.isnan(gaps)]
    interval = bootstrap_ci(gaps, samples=samples, seed=seed)
    return {"difference": float(gaps.mean()), "ci95": interval, "n": len(gaps)}


@dataclass(frozen=True, eq=False)
class _Points:
    """Features as a cache's key, equal by value: many sets are compared with one reference."""

    values: np.ndarray

    def __hash__(self) -> int:
        return hash(self.values.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Points) and np.array_equal(self.values, other.values)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018, section 4)."""
    return (a.astype(float) @ b.astype(float).T / a.shape[1] + 1) ** 3


@lru_cache(maxsize=4)  # a reference and its classes
def _kernel_within(points: _Points) -> np.ndarray:
    return _kernel(points.values, points.values)


def kid(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int | None = SUBSET_SIZE,
    seed: int = 0,
) -> float:
    """Kernel Inception Distance: the unbiased squared MMD of two sets of features.

    Args:
        features_a: (N, D); features_b: (M, D), the reference, of which more is kept for next time.
        subsets: how many random subsets to average over, as the paper does.
        subset_size: pictures of each set in a subset, all of a set that is smaller. None takes all
            of both at once, which is what the average over subsets estimates.

    Returns:
        The estimate; around 0 for two sets from one distribution, and then negative at times.
    """
    inside_a, inside_b = _kernel(features_a, features_a), _kernel_within(_Points(features_b))
    across = _kernel(features_a, features_b)
    if subset_size is None or max(across.shape) <= subset_size:
        return _mmd(inside_a, inside_b, across)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        i, j = (rng.choice(n, min(n, subset_size), replace=False) for n in across.shape)
        values.append(_mmd(inside_a[np.ix_(i, i)], inside_b[np.ix_(j, j)], across[np.ix_(i, j)]))
    return float(np.mean(values))


def _mmd(inside_a: np.ndarray, inside_b: np.ndarray, across: np.ndarray) -> float:
    n, m = across.shape
    first = (inside_a.sum() - np.trace(inside_a)) / (n * (n - 1))
    second = (inside_b.sum() - np.trace(inside_b)) / (m * (m - 1))
    return float(first + second - 2 * across.mean())


def kid_interval(
    features_a: np.ndarray, features_b: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0
) -> list[float]:
    """The 95 % bootstrap interval of :func:`kid` over the pictures of both sets.

    A picture drawn twice is no pair with itself: it weighs double. Counting it as a pair would
    break the estimator's unbiasedness, and the interval could then miss the value.
    """
    values = kid_draws(features_a, features_b, samples=samples, seed=seed)
    return np.nanpercentile(values, [2.5, 97.5]).tolist()


def kid_draws(
    features_a: np.ndarray, features_b: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0
) -> np.ndarray:
    """:func:`kid` of sets drawn anew from both, (samples,); each draw takes all pairs at once.

    One seed draws the same pictures whatever the features, so that two methods on the same scenes
    can be compared draw by draw.
    """
    weights_a = _weights(len(features_a), samples, (seed, 0))
    inside_a = _weighted(weights_a, _kernel(features_a, features_a))
    weights_b, inside_b = _reference_draws(_Points(features_b), samples, seed)
    across = ((weights_a @ _kernel(features_a, features_b)) * weights_b).sum(1)
    return inside_a + inside_b - 2 * across / (len(features_a) * len(features_b))


def mean_draws(values: np.ndarray, *, samples: int = BOOTSTRAP, seed: int = 0) -> np.ndarray:
    """Means over pictures drawn anew, (samples,), of the same ones as :func:`kid_draws` takes."""
    return _weights(len(values), samples, (seed, 0)) @ np.asarray(values, float) / len(values)


def _weights(count: int, samples: int, seed: tuple[int, int]) -> np.ndarray:
    """How often each of `count` pictures is drawn, (samples, count)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=samples).astype(float)


def _weighted(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The mean over pairs of different pictures in each draw, (samples,)."""
    squares = weights**2
    pairs = weights.sum(1) ** 2 - squares.sum(1)
    total = ((weights @ kernel) * weights).sum(1) - squares @ np.diag(kernel)
    # Of two or three pictures, a draw may hold one alone: it has no pair and says nothing.
    return np.divide(total, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


@lru_cache(maxsize=4)
def _reference_draws(points: _Points, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    weights = _weights(len(points.values), samples, (seed, 1))
    return weights, _weighted(weights, _kernel_within(points))


# ---- precision and recall ----------------------------------------------------------------------


def on_manifold(
    points: np.ndarray, manifold: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Which points lie on another set's manifold (Kynkäänniemi et al. 2019, eq. 1), (N,) bool.

    The manifold is the union of balls around the set's members, each as wide as the distance to
    its k-th nearest fellow. The share of outputs on the reference's manifold is their precision,
    the share of the reference on theirs their recall.

    Args:
        points: (N, D); manifold: (M, D).

    Raises:
        ValueError: M ≤ k, so that some radius is not defined.
    """
    radii = _radii(_Points(manifold), neighbours)
    return np.asarray((_distances(points, manifold) <= radii).any(1))


def recall_draws(
    fakes: np.ndarray,
    real: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    samples: int = BOOTSTRAP,
    seed: int = 0,
) -> np.ndarray:
    """The recall of `fakes` drawn anew, (samples,); NaN where a draw holds too few different ones.

    The balls of a draw are those of its different pictures. There are fewer than in the whole set,
    which moves the recall of all draws alike; so they are laid around the recall of the whole.
    One seed draws the same pictures whatever the features.
    """
    within, across = _distances(fakes, fakes), _distances(fakes, real)
    values = np.full(samples, np.nan)
    for number, drawn in enumerate(_weights(len(fakes), samples, (seed, 0)) > 0):
        if drawn.sum() > neighbours:
            near = np.partition(within[np.ix_(drawn, drawn)], neighbours, axis=1)[:, neighbours]
            values[number] = (across[drawn] <= near[:, None]).any(0).mean()
    whole = on_manifold(real, fakes, neighbours=neighbours).mean()
    return (values + whole - np.nanmedian(values)).clip(0, 1)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, (N, M)."""
    first, second = a.astype(float), b.astype(float)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(squares.clip(0))


@lru_cache(maxsize=8)
def _radii(points: _Points, neighbours: int) -> np.ndarray:
    if len(points.values) <= neighbours:
        raise ValueError(f"{len(points.values)} pictures have no {neighbours} neighbours each")
    within = _distances(points.values, points.values)
    np.fill_diagonal(within, 0)  # nobody is nearer to a picture than itself, rounding or not
    return np.partition(within, neighbours, axis=1)[:, neighbours]


# ---- one picture against its source ------------------------------------------------------------


def structure_distance(maps_a: np.ndarray, maps_b: np.ndarray) -> np.ndarray:
    """How differently two pictures are laid out, pair by pair, whatever they look like: (N,).

    Which cells of a feature map resemble each other says where things are and not what they are
    made of (Tumanyan et al. 2022, eq. 3, on other features): the root mean square difference of
    the two maps' matrices of cosines between cells. 0 for equal maps, at most 2.

    Args:
        maps_a, maps_b: (N, C, h, w).
    """
    gap = _self_similarity(maps_a) - _self_similarity(maps_b)
    return np.sqrt((gap.astype(float) ** 2).mean((1, 2)))


def _self_similarity(maps: np.ndarray) -> np.ndarray:
    """(N, C, h, w) → cosines (N, h·w, h·w)."""
    cells = maps.reshape(len(maps), maps.shape[1], -1)
    cells = cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)
    return cells.transpose(0, 2, 1) @ cells


# ---- one picture against its twin --------------------------------------------------------------


def animal_iou(found: np.ndarray, true: np.ndarray, which: int) -> np.ndarray:
    """Intersection over union of one animal's masks, picture by picture.

    Args:
        found: (N, H, W) masks as the judge sees them; true: (N, H, W) as they are.
        which: 1 for the cat, 2 for the mouse.

    Returns:
        (N,) in [0, 1], NaN where that animal is not in the true mask.
    """
    first, second = found == which, true == which
    both = (first & second).sum((1, 2)).astype(float)
    either = (first | second).sum((1, 2))
    return np.where(second.any((1, 2)), both / np.maximum(either, 1), np.nan)


def hits(
    found: np.ndarray, true: np.ndarray, masks: np.ndarray, *, share: float = 0.1
) -> np.ndarray:
    """Whether keypoints were found where they are: within `share` of the animal's box diagonal.

    Args:
        found: (N, 2, K, ≥ 2) x and y in pixels; true: (N, 2, K, 3) with visibility last.
        masks: (N, H, W) true masks, whose boxes give the scale.

    Returns:
        (N, 2, K): 1 or 0, NaN where the point or its animal cannot be seen.
    """
    out = np.full(true.shape[:3], np.nan)
    for which in range(2):
        there = masks == which + 1
        rows, cols = there.any(2), there.any(1)
        height = rows.shape[1] - rows.argmax(1) - rows[:, ::-1].argmax(1)
        width = cols.shape[1] - cols.argmax(1) - cols[:, ::-1].argmax(1)
        reach = share * np.hypot(height, width)
        away = np.hypot(*np.moveaxis(found[:, which, :, :2] - true[:, which, :, :2], -1, 0))
        counts = (true[:, which, :, 2] > 0) & rows.any(1)[:, None]
        out[:, which] = np.where(counts, away <= reach[:, None], np.nan)
    return out


def iou(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mask IoU of each picture, (N,): the mean over the animals that its true mask holds.

    Args:
        found, true: (N, H, W), 0 background, 1 cat, 2 mouse.
    """
    return _mean(np.stack([animal_iou(found, true, which) for which in (1, 2)], 1))


def pck(
    found: np.ndarray, true: np.ndarray, masks: np.ndarray, *, share: float = 0.1
) -> np.ndarray:
    """Percentage of correct keypoints of each picture, (N,): the mean over its visible ones.

    A keypoint is correct within `share` of the diagonal of its animal's box in the true mask.

    Args:
        found: (N, 2, K, ≥ 2) in pixels; true: (N, 2, K, 3) with visibility; masks: (N, H, W).
    """
    return _mean(hits(found, true, masks, share=share).reshape(len(true), -1))


def _mean(values: np.ndarray) -> np.ndarray:
    """Row means over what is not NaN; NaN for a row that holds nothing else."""
    count = (~np.isnan(values)).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
