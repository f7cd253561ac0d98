"""Measures on arrays: right by hand-computed values and by brute force, unbiased, monotone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tomjerry_utils import measures

# ---- intervals ---------------------------------------------------------------------------------


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = measures.bootstrap_ci(values, samples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert measures.bootstrap_ci(np.ones(50)) == [1.0, 1.0]
    assert measures.bootstrap_ci(values) == measures.bootstrap_ci(values)
    assert measures.bootstrap_ci(values) != measures.bootstrap_ci(values, seed=1)


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 5, 200)  # how hard a scene is, the same for both methods
    a, b = hard + 1 + 0.1 * rng.normal(size=200), hard + 0.1 * rng.normal(size=200)
    result = measures.paired_bootstrap(a, b)
    assert result["difference"] == pytest.approx((a - b).mean())
    assert 0.9 < result["ci95"][0] < result["difference"] < result["ci95"][1] < 1.1
    # Unpaired, the same means could not be told apart.
    assert measures.bootstrap_ci(a)[0] < measures.bootstrap_ci(b)[1]
    assert measures.paired_bootstrap(b, b)["ci95"] == [0.0, 0.0]
    a[:10] = np.nan
    assert measures.paired_bootstrap(a, b)["n"] == 190


# ---- KID ---------------------------------------------------------------------------------------


def kid_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, pair by pair (Bińkowski et al. 2018, eq. 4)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    total = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    total += sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return total - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kid_is_its_definition() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(13, 7)), rng.normal(0.4, 1.2, size=(17, 7))
    assert measures.kid(a, b) == pytest.approx(kid_by_loops(a, b), rel=1e-10)
    assert measures.kid(a, b) == pytest.approx(measures.kid(b, a))
    # By hand: one dimension, a = {0, 1}, b = {1, 2}: k(0,1)=1, k(1,2)=27; across 1, 1, 8, 27.
    small = measures.kid(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    assert small == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kid_of_subsets_estimates_the_same() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(60, 8)), rng.normal(0.5, 1, size=(80, 8))
    whole = measures.kid(a, b)
    parts = measures.kid(a, b, subsets=400, subset_size=20)
    assert parts == pytest.approx(whole, rel=0.05)
    assert measures.kid(a, b, subsets=1, subset_size=60) != whole  # 60 of b's 80
    assert measures.kid(a, b) == measures.kid(a, b, subset_size=None)  # no more than a subset


def test_kid_of_a_subset_is_that_of_its_pictures() -> None:
    """Each subset holds as many different pictures of either set, all of one that is smaller."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(5, 3)), rng.normal(0.5, 1, size=(6, 3))
    possible = [kid_by_loops(a, np.delete(b, out, axis=0)) for out in range(6)]
    found = {measures.kid(a, b, subsets=1, subset_size=5, seed=seed) for seed in range(40)}
    assert np.allclose(sorted(set(np.round(list(found), 9))), np.round(sorted(possible), 9))
    assert measures.kid(a, b, subsets=2000, subset_size=5) == pytest.approx(
        np.mean(possible), abs=4 * np.std(possible) / np.sqrt(2000)
    )


def test_kid_is_unbiased() -> None:
    """Over many pairs of samples from one distribution the mean is 0 at any size."""
    rng = np.random.default_rng(4)
    for size in (10, 40):
        values = [
            measures.kid(rng.normal(size=(size, 6)), rng.normal(size=(size, 6))) for _ in range(300)
        ]
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
        assert np.min(values) < 0
    values = [  # of subsets, too
        measures.kid(rng.normal(size=(30, 6)), rng.normal(size=(50, 6)), subset_size=10)
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_kid_interval() -> None:
    rng = np.random.default_rng(5)
    true, inside = 0.0, 0
    for _ in range(60):
        a, b = rng.normal(size=(50, 6)), rng.normal(0.6, 1, size=(60, 6))
        low, high = measures.kid_interval(a, b, samples=300)
        assert low < measures.kid(a, b) < high
        # E k(x, y) for these Gaussians, once, from a large sample.
        true = true or measures.kid(rng.normal(size=(3000, 6)), rng.normal(0.6, 1, size=(3000, 6)))
        inside += low <= true <= high
    assert inside >= 50  # 95 % nominal, of 60
    assert np.isfinite(measures.kid_interval(a[:2], b[:3])).all()  # with draws that hold no pair
    far = measures.kid_interval(rng.normal(size=(50, 6)), rng.normal(2, 1, size=(60, 6)))
    assert far[0] > 0


@pytest.mark.parametrize("apart", [0.0, 0.2, 0.6])
def test_kid_interval_covers_the_mean_over_subsets(apart: float) -> None:
    """Value and interval are one estimate, though only the value is taken over subsets."""
    rng = np.random.default_rng(11)
    for _ in range(5):
        a, b = rng.normal(size=(150, 6)), rng.normal(apart, 1, size=(250, 6))
        low, high = measures.kid_interval(a, b, samples=300)
        value = measures.kid(a, b)
        assert low < value < high and value != measures.kid(a, b, subset_size=None)
        assert abs(value - measures.kid(a, b, subset_size=None)) < (high - low) / 4


def test_kid_keeps_what_it_knows_of_a_reference_by_value() -> None:
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=(30, 6))
    first = measures.kid_draws(a, b, samples=50)
    assert np.array_equal(measures.kid_draws(a, b.copy(), samples=50), first)
    b += 1  # the same array, another reference
    assert not np.allclose(measures.kid_draws(a, b, samples=50), first)
    assert measures.kid(a, b) == pytest.approx(kid_by_loops(a, b), rel=1e-9)


@pytest.mark.parametrize("kind", ["shift", "spread", "collapse"])
def test_kid_grows_with_the_difference(kind: str) -> None:
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(200, 10)), rng.normal(size=(200, 10))
    made = {
        "shift": lambda t: fake + t,
        "spread": lambda t: fake * (1 + t),
        "collapse": lambda t: np.where(rng.random((200, 1)) < t / 2, fake[:1], fake),
    }[kind]
    values = [measures.kid(made(t), real) for t in (0.0, 0.4, 0.8, 1.6)]
    assert all(a < b for a, b in pairwise(values)), values


# ---- precision and recall ----------------------------------------------------------------------


def on_manifold_by_loops(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> list[bool]:
    """The definition, ball by ball (Kynkäänniemi et al. 2019, eq. 1)."""
    found = []
    for point in points:
        inside = False
        for i, centre in enumerate(manifold):
            fellows = [np.linalg.norm(centre - q) for j, q in enumerate(manifold) if j != i]
            inside |= bool(np.linalg.norm(point - centre) <= sorted(fellows)[neighbours - 1])
        found.append(inside)
    return found


def test_manifolds_by_hand() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])  # balls one wide: everything from -1 to 4
    fakes = np.array([[2.5], [3.4], [9.0], [-0.8]])
    # The nearest fellows of the fakes are .9, .9, 5.6 and 3.3 away.
    assert measures.on_manifold(fakes, real, neighbours=1).tolist() == [True, True, False, True]
    assert measures.on_manifold(real, fakes, neighbours=1).all()
    pair = fakes[:2]
    assert measures.on_manifold(real, pair, neighbours=1).tolist() == [False, False, True, True]
    assert measures.on_manifold(fakes, real, neighbours=3).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="2 pictures have no 3 neighbours"):
        measures.on_manifold(real, pair)


def test_manifolds_are_their_definition() -> None:
    rng = np.random.default_rng(13)
    shares = []
    for neighbours in (1, 3, 5):
        a, b = rng.normal(size=(40, 5)), rng.normal(0.8, 1.3, size=(50, 5))
        for first, second in ((a, b), (b, a)):
            found = measures.on_manifold(first, second, neighbours=neighbours)
            assert found.tolist() == on_manifold_by_loops(first, second, neighbours)
            shares.append(found.mean())
    assert min(shares) < 0.5 < 0.8 < max(shares)  # neither everything nor nothing


def test_precision_is_realism_and_recall_is_variety() -> None:
    rng = np.random.default_rng(14)
    real, fake = rng.normal(size=(2, 300, 8))

    def both(made: np.ndarray) -> tuple[float, float]:
        precision = measures.on_manifold(made, real).mean()
        return float(precision), float(measures.on_manifold(real, made).mean())

    same = both(fake)
    assert min(same) > 0.8
    # More and more of the set is one picture, a little changed: no less real, less varied.
    collapsed = [
        both(np.where(np.arange(300)[:, None] < share * 300, 0.05 * fake, fake))
        for share in (0.0, 0.5, 0.9, 1.0)
    ]
    assert all(a[1] > b[1] for a, b in pairwise(collapsed)), collapsed
    assert collapsed[-1][0] == 1 and collapsed[-1][1] < 0.05
    # Noise in all directions: less and less real.
    noisy = [both(fake * (1 + t)) for t in (0.0, 0.3, 0.8, 2.0)]
    assert all(a[0] > b[0] for a, b in pairwise(noisy)), noisy
    assert both(fake + 20) == (0, 0)
    assert both(np.zeros((300, 8)))[1] == 0  # the mean, whatever is asked
    # One mode of two: as real as before, half as varied.
    halves = np.concatenate([real[:150] - 15, real[150:] + 15])
    assert measures.on_manifold(fake - 15, halves).mean() > 0.8
    assert 0.4 < measures.on_manifold(halves, fake - 15).mean() < 0.5


def test_recall_draws() -> None:
    rng = np.random.default_rng(15)
    real = rng.normal(size=(400, 6))
    recalls = [measures.on_manifold(real, rng.normal(0.7, 0.8, (80, 6))).mean() for _ in range(80)]
    true, inside = np.mean(recalls), 0
    for _ in range(40):
        fakes = rng.normal(0.7, 0.8, size=(80, 6))
        draws = measures.recall_draws(fakes, real, samples=200)
        low, high = np.percentile(draws, [2.5, 97.5])
        assert low < measures.on_manifold(real, fakes).mean() < high
        inside += low <= true <= high
    assert inside >= 34, inside  # 95 % nominal, of 40
    again = measures.recall_draws(fakes, real, samples=200)
    assert np.array_equal(again, draws)
    assert not np.array_equal(measures.recall_draws(fakes, real, samples=200, seed=1), draws)
    few = measures.recall_draws(fakes[:5], real, samples=200)  # draws of three or fewer say nothing
    assert 0 < np.isnan(few).mean() < 1 and 0 <= np.nanmin(few) <= np.nanmax(few) <= 1


# ---- structure distance ------------------------------------------------------------------------


def test_structure_distance_by_hand() -> None:
    # Two cells of two channels: alike in one picture, at right angles in the other.
    alike = np.array([[1.0, 3.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    apart = np.array([[1.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 1, 2)
    opposed = np.array([[1.0, -5.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    assert measures.structure_distance(alike, apart) == pytest.approx([np.sqrt(2 / 4)])
    assert measures.structure_distance(alike, opposed) == pytest.approx([np.sqrt(2 * 4 / 4)])
    assert measures.structure_distance(alike, alike) == [0.0]
    pair = np.concatenate([alike, apart]), np.concatenate([apart, apart])
    assert measures.structure_distance(*pair) == pytest.approx([np.sqrt(1 / 2), 0.0])
    assert np.isfinite(measures.structure_distance(alike, np.zeros_like(alike))).all()


def test_structure_is_layout_and_not_appearance() -> None:
    rng = np.random.default_rng(16)
    maps = rng.normal(size=(3, 12, 4, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    repainted = 2.5 * np.einsum("dc,nchw->ndhw", turn, maps)  # other features at the same places
    assert np.allclose(measures.structure_distance(maps, repainted), 0, atol=1e-7)
    moved = [np.roll(maps, cells, axis=3) for cells in (0, 1)]
    partly = moved[0].copy()
    partly[..., :2, :] = moved[1][..., :2, :]
    values = [measures.structure_distance(maps, m) for m in (maps, partly, moved[1])]
    assert all((a < b).all() for a, b in pairwise(values))


# ---- masks and keypoints -----------------------------------------------------------------------


def test_iou_by_hand() -> None:
    true = np.zeros((4, 8, 8), np.uint8)
    true[0, :4] = 1  # cat in the upper half, mouse in a corner
    true[0, 6:, 6:] = 2
    true[1, :, :4] = 2  # a mouse alone
    true[2, :4] = 1
    found = np.zeros_like(true)
    found[0, :2] = 1  # half of the cat: 1/2; the mouse and as much again: 1/2
    found[0, 6:, 4:] = 2
    found[1, :, 2:6] = 2  # half on, half off: 1/3
    found[2] = true[2] * 2  # right place, wrong animal
    assert np.allclose(measures.iou(found, true)[:3], [0.5, 1 / 3, 0.0])
    assert np.isnan(measures.iou(found, true)[3])  # nobody there
    assert np.allclose(measures.iou(true, true)[:3], 1)


def test_pck_by_hand() -> None:
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 10:40, 5:45] = 1  # box 30 × 40, diagonal 50: within 5 pixels
    masks[1, 10:16, 20:28] = 2  # box 6 × 8, diagonal 10: within 1 pixel
    true = np.zeros((2, 2, 4, 3))
    true[0, 0] = [[10, 10, 1], [20, 20, 1], [30, 30, 1], [70, 30, 0]]
    true[1, 1] = [[20, 12, 1], [24, 12, 1], [26, 12, 1], [28, 12, 1]]
    found = true.copy()
    found[0, 0, :, 0] += [4.9, 5.1, 0, 40]  # near, too far, exact, out of the picture
    found[1, 1, :, 1] += [0.9, 1.1, 2, 3]
    found[0, 1, :, 0] += 99  # no mouse there: does not count
    assert np.allclose(measures.pck(found, true, masks), [2 / 3, 1 / 4])
    assert np.allclose(measures.pck(found, true, masks, share=0.5), 1)
    assert np.isnan(measures.pck(found, true, np.zeros_like(masks))).all()
    assert np.array_equal(
        np.isnan(measures.hits(found, true, masks)[0, 0]), [False, False, False, True]
    )
