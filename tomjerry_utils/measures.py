"""Measures on arrays alone: intervals, KID, mask IoU, PCK. No picture is drawn or judged here."""

from __future__ import annotations

from typing import Any

import numpy as np

BOOTSTRAP = 1000  # samples of an interval


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


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018, section 4)."""
    return (a.astype(float) @ b.astype(float).T / a.shape[1] + 1) ** 3


def kid(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> float:
    """Kernel Inception Distance: the unbiased squared MMD of two sets of features.

    Args:
        features_a: (N, D); features_b: (M, D).
        subsets: how many random subsets to average over, where `subset_size` is given.
        subset_size: pictures of each set in a subset, as the paper does for tens of thousands of
            them. None takes all at once, which is what the average over subsets estimates.

    Returns:
        The estimate; around 0 for two sets from one distribution, and then negative at times.
    """
    inside_a, inside_b = _kernel(features_a, features_a), _kernel(features_b, features_b)
    across = _kernel(features_a, features_b)
    if subset_size is None:
        return _mmd(inside_a, inside_b, across)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        i = rng.choice(len(features_a), subset_size, replace=False)
        j = rng.choice(len(features_b), subset_size, replace=False)
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
    """:func:`kid` of sets drawn anew from both, (samples,).

    One seed draws the same pictures whatever the features, so that two methods on the same scenes
    can be compared draw by draw.
    """
    rng = np.random.default_rng(seed)
    n, m = len(features_a), len(features_b)
    weights_a = rng.multinomial(n, np.full(n, 1 / n), size=samples).astype(float)
    weights_b = rng.multinomial(m, np.full(m, 1 / m), size=samples).astype(float)

    def inside(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        kernel = _kernel(points, points)
        np.fill_diagonal(kernel, 0)
        pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
        total = ((weights @ kernel) * weights).sum(1)
        # Of two or three pictures, a draw may hold one alone: it has no pair and says nothing.
        return np.divide(total, pairs, out=np.full(samples, np.nan), where=pairs > 0)

    across = ((weights_a @ _kernel(features_a, features_b)) * weights_b).sum(1) / (n * m)
    return inside(features_a, weights_a) + inside(features_b, weights_b) - 2 * across


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
