"""Bradley–Terry: the greatest likelihood, finite where it has none, intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from tomjerry_utils import UserError, bradley_terry

STRENGTHS = np.array([1.0, 0.3, -0.4, -0.9])
PAIRS = np.array([(i, j) for i in range(4) for j in range(i + 1, 4)])


def logistic(wins: np.ndarray, prior: float) -> np.ndarray:
    """The same strengths as a logistic regression on differences, by another algorithm."""
    table = wins + prior * (1 - np.eye(len(wins)))

    def loss(free: np.ndarray) -> float:
        theta = np.append(free, 0.0)
        return float((table * np.logaddexp(0, theta[None, :] - theta[:, None])).sum())

    found = minimize(loss, np.zeros(len(wins) - 1), method="BFGS", options={"gtol": 1e-9}).x
    theta = np.append(found, 0.0)
    return theta - theta.mean()


@pytest.mark.parametrize("prior", [0.0, 0.1, 2.0])
def test_strengths_are_those_of_logistic_regression(prior: float) -> None:
    rng = np.random.default_rng(1)
    wins = rng.integers(1, 30, (3, 5, 5)) * (1 - np.eye(5, dtype=int))
    found = bradley_terry.fit(wins, prior=prior)
    assert found.shape == (3, 5)
    assert np.abs(found.mean(1)).max() < 1e-12
    for one, table in zip(found, wins, strict=True):
        assert one == pytest.approx(logistic(table, prior), abs=1e-5)


def test_two_methods_by_hand() -> None:
    found = bradley_terry.fit(np.array([[0, 30], [10, 0]]), prior=0)
    assert found == pytest.approx([np.log(3) / 2, -np.log(3) / 2])
    assert bradley_terry.chosen(found) == pytest.approx([0.75, 0.25])


def test_separable_data_end_with_a_prior_and_are_refused_without() -> None:
    always = np.triu(np.full((4, 4), 20), 1)  # the first beats all, the second all but it, …
    found = bradley_terry.fit(always)
    assert np.isfinite(found).all()
    assert (np.diff(found) < -1).all()
    assert found == pytest.approx(logistic(always, bradley_terry.PRIOR), abs=1e-3)
    with pytest.raises(UserError, match="prior > 0"):
        bradley_terry.fit(always, prior=0)
    # One win the other way from last to first makes a circle, which has a greatest likelihood.
    always[3, 0] = 1
    assert np.isfinite(bradley_terry.fit(always, prior=0)).all()


def test_a_method_that_met_no_one_is_average() -> None:
    wins = np.zeros((3, 3))
    wins[0, 1] = wins[1, 0] = 5
    assert bradley_terry.fit(wins) == pytest.approx([0, 0, 0], abs=1e-6)


def test_wins_are_counted_with_their_weights() -> None:
    winners, losers = np.array([0, 0, 2]), np.array([1, 2, 1])
    once = bradley_terry.count_wins(winners, losers, 3)
    assert once.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0]]
    weights = np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    twice = bradley_terry.count_wins(winners, losers, 3, weights)
    assert twice[0].tolist() == [[0, 2, 0], [0, 0, 0], [0, 1, 0]]
    assert not twice[1].any()


def test_clusters_are_drawn_whole() -> None:
    raters, scenes = np.repeat([0, 1, 2], 4), np.tile([0, 1, 2, 3], 3)
    weights = bradley_terry.cluster_weights([raters, scenes], samples=4000, seed=0)
    by = weights.reshape(-1, 3, 4)
    assert weights.mean(0) == pytest.approx(np.ones(12), abs=0.1)
    # A product of a rater's and a scene's count has rank one.
    assert np.allclose(by[:, 0, 0] * by[:, 1, 1], by[:, 0, 1] * by[:, 1, 0])
    alone = bradley_terry.cluster_weights([np.zeros(12, int)], samples=5, seed=0)
    assert (alone == 1).all()


# ---- coverage ----------------------------------------------------------------------------------


def simulate(
    rng: np.random.Generator, *, raters: int, scenes: int, taste: float
) -> tuple[np.ndarray, ...]:
    """Raters who judge every pair on every scene: (rater, scene, winner, loser).

    `taste` is the deviation of what a scene adds to each method's strength, for all raters alike.
    """
    offset = rng.normal(0, taste, (scenes, 4))
    rater, scene, pair = (a.ravel() for a in np.mgrid[:raters, :scenes, : len(PAIRS)])
    first, second = PAIRS[pair].T
    gap = (STRENGTHS + offset[scene])[np.arange(len(scene)), first]
    gap = gap - (STRENGTHS + offset[scene])[np.arange(len(scene)), second]
    won = rng.random(len(gap)) < 1 / (1 + np.exp(-gap))
    return rater, scene, np.where(won, first, second), np.where(won, second, first)


def covered(clusters: str, *, taste: float, truth: np.ndarray) -> float:
    """The share of 60 studies' 95 % intervals that hold the true strength."""
    rng = np.random.default_rng(7)
    held = []
    for study in range(60):
        rater, scene, winner, loser = simulate(rng, raters=4, scenes=14, taste=taste)
        groups = [rater, scene] if clusters == "crossed" else [np.arange(len(rater))]
        weights = bradley_terry.cluster_weights(groups, samples=200, seed=study)
        drawn = bradley_terry.fit(bradley_terry.count_wins(winner, loser, 4, weights))
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        held.append((low <= truth) & (truth <= high))
    return float(np.mean(held))


def test_intervals_hold_the_true_strengths() -> None:
    assert covered("crossed", taste=0.0, truth=STRENGTHS) >= 0.9


def test_intervals_hold_where_scenes_differ_and_those_of_lone_answers_do_not() -> None:
    # What many scenes would say: the mean over scenes of each pair's odds, fitted.
    rng = np.random.default_rng(0)
    worth = STRENGTHS + rng.normal(0, 1.5, (100_000, 4))
    wins = np.zeros((4, 4))
    for i, j in PAIRS:
        wins[i, j] = (1 / (1 + np.exp(worth[:, j] - worth[:, i]))).mean()
        wins[j, i] = 1 - wins[i, j]
    truth = bradley_terry.fit(wins, prior=0)
    crossed = covered("crossed", taste=1.5, truth=truth)
    lone = covered("lone", taste=1.5, truth=truth)
    assert crossed >= 0.9
    assert lone < 0.8
