"""The class probe: it learns what generalises, says how far, and refuses the rest."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from tomjerry_utils import UserError, class_probe, features, scenes
from tomjerry_utils.class_probe import REFUSED, Probe, fit
from tomjerry_utils.images import load_image

STARTER = Path(__file__).resolve().parents[1] / "data" / "starter"


def clouds(
    groups: int, each: int, width: int, *, told: float, seed: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Features of two classes: each group a cloud of its own, its class told by one number."""
    rng = np.random.default_rng(seed)
    cls = np.arange(groups) % 2
    centre = rng.normal(size=(groups, width))
    centre[:, 0] += told * (2 * cls - 1)
    group = np.repeat(np.arange(groups), each)
    x = centre[group] + 0.05 * rng.normal(size=(groups * each, width))
    return x, [("cat", "mouse")[c] for c in cls[group]], [f"shot {g}" for g in group]


def test_features_that_tell_only_the_group_give_chance() -> None:
    x, labels, groups = clouds(60, 6, 64, told=0.0, seed=1)
    honest = fit(x, labels, groups)
    assert 0.3 < honest.accuracy < 0.7  # 60 groups: deviation 0.065 about 0.5
    assert honest.coverage(0.95) < 0.15
    # Control: split picture by picture, the same features look perfect.
    assert fit(x, labels, [str(i) for i in range(len(x))]).accuracy > 0.98


def test_features_that_tell_the_class_are_learnt_and_confidence_is_calibrated() -> None:
    x, labels, groups = clouds(120, 4, 16, told=1.0, seed=2)
    probe = fit(x, labels, groups)
    new, names, _ = clouds(400, 1, 16, told=1.0, seed=3)
    found, confidence = probe.predict(new)
    right = found == np.array(names)
    assert right.mean() == pytest.approx(probe.accuracy, abs=0.08)
    assert class_probe.calibration_error(confidence, right) < 0.08
    assert confidence.min() >= 0.5 and probe.calibration_error < 0.12


def test_below_the_confidence_asked_for_it_refuses() -> None:
    x, labels, groups = clouds(120, 4, 16, told=1.0, seed=2)
    probe = fit(x, labels, groups)
    at = probe.threshold(0.95)
    new, names, _ = clouds(1000, 1, 16, told=1.0, seed=4)
    found, confidence = probe.predict(new, at_least=at)
    answered = found != REFUSED
    assert (answered == (confidence >= at)).all() and 0.1 < answered.mean() < 1
    assert (found == np.array(names))[answered].mean() > 0.9
    assert probe.predict(new[:0])[0].shape == (0,)


def test_no_confidence_is_enough_where_nothing_is_told() -> None:
    probe = Probe(
        ("a", "b"), np.zeros((3, 2)), np.zeros(2), np.zeros(3), np.ones(3), 1.0, 1.0, 0.5, 0.5, 0.0,
        np.full(10, 0.5), np.arange(10) % 2 == 0,
    )  # fmt: skip
    assert probe.threshold(0.95) > 1 and probe.coverage(0.95) == 0
    assert set(probe.predict(np.ones((4, 3)), at_least=probe.threshold())[0]) == {REFUSED}


def test_the_same_input_gives_the_same_probe() -> None:
    x, labels, groups = clouds(20, 4, 8, told=1.0, seed=5)
    first, second = fit(x, labels, groups), fit(x, labels, groups)
    assert (first.weight == second.weight).all() and first.temperature == second.temperature
    assert (first.held_confidence == second.held_confidence).all()


def test_folds_keep_groups_whole_and_spread_every_class() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([f"g{i}" for i in rng.integers(0, 30, 300)])
    per_group = dict(zip(sorted(set(groups)), rng.integers(0, 3, 30), strict=False))
    classes = np.array([per_group[g] for g in groups])
    fold = class_probe.folds(classes, groups)
    assert set(fold) == set(range(5))
    for g in set(groups):
        assert len(set(fold[groups == g])) == 1
    for k in range(5):
        assert set(classes[fold != k]) == {0, 1, 2}  # every class is left to learn from
        assert 40 <= (fold == k).sum() <= 80


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (["cat"] * 20, list("abcdefghij") * 2, "one class only"),
        (["cat"] * 16 + ["mouse"] * 4, list("abcdefghij") * 2, "4 pictures of 'mouse'"),
        (["cat"] * 10 + ["mouse"] * 10, list("ab") * 5 + ["c"] * 10, r"'mouse' in 1 group"),
        ([], [], "one class only"),
    ],
)
def test_too_little_to_learn_from_is_a_users_mistake(
    labels: list[str], groups: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(np.zeros((len(labels), 4)), labels, groups)


def test_broken_features_are_not_fitted() -> None:
    x, labels, groups = clouds(20, 4, 8, told=1.0, seed=5)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fit(x, labels, groups)


def test_cats_and_mice_of_other_designers_are_told_apart() -> None:
    """Real drawings, all of one vendor in one fold."""
    torch.set_num_threads(1)
    with (STARTER / "attribution.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["domain"] == "cartoon"]
    rows = [r for r in rows if r["class"] in ("cat", "mouse")]
    images = np.stack([load_image(STARTER / r["file"], 128) for r in rows])
    vendors = [r["style_set"].split("-")[0] for r in rows]
    probe = fit(features.extract(images), [r["class"] for r in rows], vendors)
    assert probe.classes == ("cat", "mouse")
    assert probe.balanced_accuracy > 0.85  # 103 cats, 27 mice
    assert probe.coverage(0.95) > 0.7


def test_scenes_of_tom_and_jerry_are_told_apart() -> None:
    torch.set_num_threads(1)
    seeds = range(1_950_000, 1_950_150)
    images = scenes.render_many(seeds, "cartoon", 64, workers=1)["image"]
    labels = [scenes.describe(seed).cls for seed in seeds]
    probe = fit(features.extract(images), labels, [str(seed) for seed in seeds])
    assert probe.classes == ("both", "jerry", "tom")
    assert probe.accuracy > 0.8
