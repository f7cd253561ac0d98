"""Best of n: exact expectations, gains that are paired, a rule that is put to the test."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from tomjerry_utils import best_of_n, picking
from tomjerry_utils.judge_nets import LabelNet, PixelNet
from tomjerry_utils.judges import Judges
from tomjerry_utils.profiles import load_profile


def test_the_best_of_n_by_counting_every_draw() -> None:
    rng = np.random.default_rng(0)
    scores, quality = rng.random((3, 5)), rng.random((3, 5))
    found = best_of_n.expected_best(scores, quality)
    for scene in range(3):
        for n in range(1, 6):
            picked = [
                quality[scene, max(some, key=lambda i: scores[scene, i])]
                for some in combinations(range(5), n)
            ]
            assert found[scene, n - 1] == pytest.approx(np.mean(picked))


def test_a_score_that_knows_gains_and_one_that_does_not_gains_nothing() -> None:
    rng = np.random.default_rng(1)
    quality = rng.normal(0, 1, (400, 8)) + rng.normal(0, 5, (400, 1))
    knows = best_of_n.curve(quality, quality, samples=300)
    guesses = best_of_n.curve(rng.random((400, 8)), quality, samples=300)
    gains = [row["gain"] for row in knows]
    assert gains == sorted(gains) and gains[0] == 0
    assert gains[-1] == pytest.approx(1.42, abs=0.1)  # the largest of eight normal draws
    assert guesses[-1]["gain_ci95"][0] < 0 < guesses[-1]["gain_ci95"][1]
    # Scenes differ far more than tries do; the gain's interval does not mind.
    assert np.ptp(knows[-1]["gain_ci95"]) < 0.3 * np.ptp(knows[-1]["ci95"])


def test_ranks_within_scenes() -> None:
    scores = np.array([[1, 2, 3, 4.0], [4, 3, 2, 1.0], [1, 2, 3, 4.0]])
    quality = np.array([[10, 20, 30, 40.0], [1, 2, 3, 4.0], [7, 7, 7, 7.0]])
    found = best_of_n.rank_correlation(scores, quality, samples=50)
    assert found is not None and (found["value"], found["n"]) == (0.0, 2)
    assert best_of_n.rank_correlation(scores[:1], quality[:1] + 5, samples=50) == {
        "value": 1.0, "ci95": [1.0, 1.0], "n": 1,
    }  # fmt: skip
    assert best_of_n.rank_correlation(scores[2:], quality[2:], samples=50) is None


@pytest.fixture(scope="module")
def translator() -> Any:
    return tiny_models.tiny_translator()


def test_the_rule_is_pickings_within_each_class(translator: Any) -> None:
    sources = tiny_models.pictures("cartoon", 4)
    tries = [
        tiny_models.pictures("natural", 4),
        tiny_models.pictures("cartoon", 4, first=1_000_500),
    ]
    read = translator.conditions(sources, None)
    kinds = np.array(["tom", "tom", "jerry", "jerry"])
    found = best_of_n.scored(translator, sources, tries, read, kinds)
    asked = picking.asked_views(translator, sources, read.classes)
    first = picking.agreement(translator, asked, tries[0], read.captions)
    assert np.allclose(found["blip"][:, 0], first[:, 0])
    assert np.allclose(found["asked"][:, 0], first[:, 1])
    for kind in ("tom", "jerry"):
        parts = np.stack([found["blip"], found["asked"]], -1)[kinds == kind]
        wanted = (parts - parts.mean((0, 1))) / parts.std((0, 1))
        assert np.allclose(found["rule"][kinds == kind], wanted.sum(-1), atol=1e-4)
    again = best_of_n.scored(translator, sources, [sources], read, kinds)
    assert np.allclose(again["source"], 1, atol=1e-5)  # the drawing overlaps with itself


@pytest.fixture(scope="module")
def table(translator: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The stage by a translator of random weights, on six scenes."""
    torch.manual_seed(5)
    judges = Judges(LabelNet().eval(), PixelNet().eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(best_of_n, "REFERENCES", 40)
        patch.setattr(best_of_n, "TRIES", 3)
        patch.setattr(best_of_n, "load_judges", lambda: judges)
        upstream = SimpleNamespace(translator=translator, key="made")
        patch.setattr(best_of_n.transfer, "ensure", lambda profile: upstream)
        made = best_of_n.ensure(load_profile("smoke"))
        patch.setattr(best_of_n, "load_judges", None)  # a second call only reads
        assert best_of_n.ensure(load_profile("smoke")) == made
    return made


def test_the_table_has_every_curve_and_rank(table: dict[str, Any]) -> None:
    assert (table["n"], table["tries"]) == (6, 3)
    for curves in table["curves"].values():
        assert [row["n"] for row in curves["rule"]] == [1, 2, 3]
        assert curves["rule"][0]["value"] == pytest.approx(curves["twin"][0]["value"])
        assert curves["rule"][0]["gain"] == 0
    best = [row["value"] for row in table["curves"]["perceptual"]["twin"]]
    assert best == sorted(best, reverse=True)  # who sees the twin always gains
    assert set(table["ranks"]) == set(best_of_n.SCORES)
    for ranks in table["ranks"].values():
        assert set(ranks) == set(best_of_n.QUALITIES)
        assert -1 <= ranks["perceptual"]["value"] <= 1


def test_the_figure_draws_the_gains(table: dict[str, Any]) -> None:
    panels = best_of_n.gain_figure(table).axes
    assert len(panels) == len(best_of_n.QUALITIES)
    for panel, name in zip(panels, best_of_n.QUALITIES, strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        gains = [row["gain"] for row in table["curves"][name]["rule"]]
        assert drawn["picked by the rule"] == gains
        assert np.ptp(panel.get_ylim()) >= 2 * best_of_n.LEAST
