"""Strengths from choices between two: the Bradley–Terry model, and choices drawn anew by cluster.

Bradley and Terry 1952 (Biometrika 39): i is chosen over j with probability π_i / (π_i + π_j).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components

from tomjerry_utils import UserError

PRIOR = 0.1  # wins added to both sides of every pair: next to nothing beside a study's dozens
_TOLERANCE, _MOST = 1e-8, 100_000  # of a step in log π; steps


def fit(wins: np.ndarray, *, prior: float = PRIOR) -> np.ndarray:
    """Log strengths log π of the greatest likelihood, with mean 0.

    By the MM algorithm (Hunter 2004, Ann. Statist. 32(1), section 3), which climbs at every step.

    Args:
        wins: (..., M, M), how often the row's method was chosen over the column's; many tables are
            fitted at once.
        prior: wins added to both sides of every pair. They hold the strength of a method that
            always or never wins finite, which has no greatest likelihood otherwise; 0 for none.

    Returns:
        (..., M) float.

    Raises:
        UserError: without a prior, where the methods fall into two groups of which one never lost
            to the other (Ford 1957).
    """
    wins = np.asarray(wins, float)
    count = wins.shape[-1]
    table = (wins + prior).reshape(-1, count, count)
    table[:, range(count), range(count)] = 0.0
    if prior == 0 and any(_falls_apart(one) for one in table):
        raise UserError("some methods won, or lost, against all others each time: give a prior > 0")
    won, met = table.sum(2), table + table.transpose(0, 2, 1)
    log_strength = np.zeros_like(won)
    left = np.arange(len(table))  # tables that still move
    for _ in range(_MOST):
        strength = np.exp(log_strength[left])
        pairs = met[left] / (strength[:, :, None] + strength[:, None, :])
        new = np.log(won[left] / pairs.sum(2))
        new -= new.mean(1, keepdims=True)
        moved = np.abs(new - log_strength[left]).max(1) > _TOLERANCE
        log_strength[left] = new
        left = left[moved]
        if not len(left):
            break
    return log_strength.reshape(wins.shape[:-1])


def chosen(log_strength: np.ndarray) -> np.ndarray:
    """Mean probability (..., M) of each method to be chosen over one of the others."""
    gaps = log_strength[..., :, None] - log_strength[..., None, :]
    sure = 1 / (1 + np.exp(-gaps))
    return (sure.sum(-1) - 0.5) / (log_strength.shape[-1] - 1)


def count_wins(
    winners: np.ndarray, losers: np.ndarray, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Wins (..., M, M) of `count` methods.

    Args:
        winners, losers: (N,) int, methods of each choice.
        weights: (..., N), how often each choice counts; None counts each once.
    """
    cells = np.zeros((len(winners), count * count))
    cells[np.arange(len(winners)), np.asarray(winners) * count + np.asarray(losers)] = 1
    once = np.ones(len(winners)) if weights is None else weights
    return (once @ cells).reshape(*once.shape[:-1], count, count)


def cluster_weights(clusters: Sequence[np.ndarray], *, samples: int, seed: int) -> np.ndarray:
    """How often each of N choices counts in each sample of a bootstrap over crossed clusters.

    Every grouping, such as raters and scenes, is drawn anew with replacement by itself, and a
    choice counts as often as its rater times as often as its scene was drawn: the pigeonhole
    bootstrap (Owen 2007, Ann. Appl. Stat. 1(2)). It errs to the safe side: where neither raters
    nor scenes differ, intervals are up to √3 times as wide as they need be. A grouping with one
    member stays as it is.

    Args:
        clusters: for each grouping, (N,) int, the member that each choice belongs to, from 0.

    Returns:
        (samples, N) float.
    """
    generator = np.random.default_rng(seed)
    weights = np.ones((samples, len(clusters[0])))
    for members in clusters:
        count = int(members.max()) + 1
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=samples)
        weights *= drawn[:, members]
    return weights


def _falls_apart(wins: np.ndarray) -> bool:
    return bool(connected_components(wins > 0, directed=True, connection="strong")[0] > 1)
