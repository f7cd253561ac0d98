"""Intervals over training seeds: of means over scenes, of sets' measures, of one more run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def two_level(values: np.ndarray, samples: int, *, seed: int = 0) -> np.ndarray:
    """Means of (seeds, scenes) with both drawn anew, (samples,); NaN values are left out.

    NaN where a draw holds no other.
    """
    rng = np.random.default_rng(seed)
    runs, count = values.shape
    by_run = rng.multinomial(runs, np.full(runs, 1 / runs), size=samples)
    by_scene = rng.multinomial(count, np.full(count, 1 / count), size=samples)
    there = ~np.isnan(values)
    total = ((by_run @ np.where(there, values, 0.0)) * by_scene).sum(1)
    count_there = ((by_run @ there.astype(float)) * by_scene).sum(1)
    return np.divide(total, count_there, out=np.full(samples, np.nan), where=count_there > 0)


def over_seeds(draws: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Draws of a set's measure (seeds, samples), the seeds drawn anew as well: (samples,)."""
    runs, samples = draws.shape
    rng = np.random.default_rng(seed)
    by_run = rng.multinomial(runs, np.full(runs, 1 / runs), size=samples)
    return (by_run * draws.T).sum(1) / runs


def one_run(values: Sequence[float]) -> list[float] | None:
    """Where one more run would fall, 19 times of 20, from the values of a few (t-distribution)."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return None
    reach = float(t.ppf(0.975, count - 1)) * np.std(values, ddof=1) * math.sqrt(1 + 1 / count)
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]


def pooled_row(
    found: Sequence[Mapping[str, Any]], drawn: np.ndarray, *, key: str = "value"
) -> dict[str, Any]:
    """A metric's row over training seeds.

    Args:
        found: its row in each seed's run, with `key` and n.
        drawn: draws of the mean over seeds, from :func:`two_level` or :func:`over_seeds`.
    """
    values = [float(row[key]) for row in found]
    return {
        key: float(np.mean(values)),
        "ci95": np.nanpercentile(drawn, [2.5, 97.5]).tolist(),
        "one_run95": one_run(values),
        "by_seed": values,
        "n": found[0]["n"],
    }
