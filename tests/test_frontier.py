"""Whole sweeps: the rule by hand, draws that are paired, a figure that shows every point."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from tomjerry_utils import budgets, compare, frontier, measures, scenes
from tomjerry_utils.judge_nets import LabelNet, PixelNet
from tomjerry_utils.judges import Judges
from tomjerry_utils.profiles import load_profile

OURS = [(0.5, 0.30), (0.7, 0.10), (0.9, 0.12)]
REAL = np.random.default_rng(1).standard_normal((60, 12))


# ---- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rival", "holds"),
    [
        ([(0.5, 0.31), (0.8, 0.11)], True),
        ([(0.6, 0.30)], False),  # as real as ours at that distance is not worse
        ([(0.6, 0.31), (0.69, 0.2)], False),  # nearer than our 0.7, and more real than our 0.5
        ([(0.6, 0.31), (0.70, 0.2)], True),
        ([(0.95, 0.11)], True),  # our best is at 0.7; that 0.9 is less real takes nothing away
        ([(0.49, 9.0)], False),  # ours does not come so near
        ([(0.49, 9.0), (2.0, 9.0)], False),
    ],
)
def test_the_rule_by_hand(rival: list[tuple[float, float]], holds: bool) -> None:
    assert frontier.dominates(OURS, rival) is holds
    assert frontier.dominates(OURS[::-1], rival[::-1]) is holds


def test_the_lowest_kid_within_reach() -> None:
    distances, kids = np.array(OURS).T
    found = [float(frontier.lowest_within(distances, kids, reach)) for reach in (0.4, 0.5, 0.8, 9)]
    assert found == [np.inf, 0.30, 0.10, 0.10]


@pytest.mark.parametrize(
    ("share", "said"),
    [(1.0, "dominated"), (0.95, "dominated"), (0.5, "undecided"), (0.05, "not dominated")],
)
def test_a_verdict_needs_nearly_all_draws(share: float, said: str) -> None:
    assert frontier.verdict(share) == said


# ---- points ------------------------------------------------------------------------------------


def point(method: str, name: str, far: float, away: float, **more: Any) -> frontier.Point:
    """A point of 40 scenes, `far` from the twins, its features shifted by `away`."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.05, 40)  # the same scenes are hard for all
    vectors, real = rng.standard_normal((40, 12)) + away, REAL
    draws = measures.kid_draws(vectors, real, samples=300)
    return frontier.Point(
        method, name, {"n": name}, far + noise, measures.kid(vectors, real), draws, **more
    )


def test_rows_and_verdicts() -> None:
    points = [
        point("ours", "0", 0.5, 0.5, best=True),
        point("ours", "1", 0.7, 0.2),
        point("behind", "0", 0.55, 0.9),
        point("behind", "1", 0.9, 0.6),
        point("nearer", "0", 0.4, 2.0),
        point("nearer", "1", 0.9, 2.0),
        point("better", "0", 0.6, 0.0),
        point("twin", "0", 0.7, 0.2),
        point("behind", "0", 0.9, 0.0, budget="total"),
    ]
    rows, dominance = frontier.measure(points)
    said = {(row["budget"], row["method"]): row for row in dominance}
    assert {key: row["verdict"] for key, row in said.items()} == {
        ("course", "behind"): "dominated",
        ("course", "nearer"): "not dominated",
        ("course", "better"): "not dominated",
        ("course", "twin"): "not dominated",  # equal in every draw is not lower in any
        ("total", "behind"): "not dominated",
    }
    assert said["course", "behind"]["holds"] and said["course", "behind"]["share"] == 1.0
    values = [(row["perceptual"]["value"], row["kid"]["value"]) for row in rows]
    for key, row in said.items():
        mine = [v for v, r in zip(values, rows, strict=True) if (r["budget"], r["method"]) == key]
        assert row["holds"] == frontier.dominates(values[:2], mine)
    for row, one in zip(rows, points, strict=True):
        assert row["kid"]["value"] == one.kid
        for cell in (row["kid"], row["perceptual"]):
            assert cell["ci95"][0] < cell["value"] < cell["ci95"][1]
    near, other = rows[4], rows[5]
    assert near["ours_kid"] is near["difference"] is None
    assert near["difference_ci95"] == [None, None]
    assert other["difference"] == pytest.approx(values[1][1] - values[5][1])
    assert other["difference_ci95"][0] < other["difference"] < other["difference_ci95"][1] < 0


def test_pairing_tells_apart_what_intervals_do_not() -> None:
    """Both methods' distances overlap widely; on the same scenes ours is nearer in every draw."""
    points = [point("ours", "0", 0.500, 0.3), point("rival", "0", 0.501, 0.5)]
    rows, dominance = frontier.measure(points)
    assert rows[0]["perceptual"]["ci95"][1] > rows[1]["perceptual"]["ci95"][0]
    assert dominance[0]["share"] == 1.0
    shuffled = replace(points[1], perceptual=points[1].perceptual[::-1])
    _, unpaired = frontier.measure([points[0], shuffled])
    assert unpaired[0]["share"] < 0.9


def test_kid_draws_take_the_same_scenes_and_references_whatever_the_features() -> None:
    """So those of two methods are paired, whenever each was made."""
    rng = np.random.default_rng(2)
    one, other = rng.standard_normal((2, 40, 12))
    fewer = measures._weights(40, 300, (0, 0)), measures._weights(60, 300, (0, 1))
    for vectors in (one, other):
        draws = measures.kid_draws(vectors, REAL, samples=300)
        measures._reference_draws.cache_clear()
        assert np.array_equal(draws, measures.kid_draws(vectors, REAL, samples=300))
        for number in (0, 299):  # by hand: every pair of different pictures, as often as drawn
            scenes_drawn, references = (weights[number] for weights in fewer)
            a = np.repeat(np.arange(40), scenes_drawn.astype(int))
            b = np.repeat(np.arange(60), references.astype(int))
            inside_a, inside_b = (
                measures._kernel(x, x)[np.not_equal.outer(i, i)].mean()
                for x, i in ((vectors[a], a), (REAL[b], b))
            )
            across = measures._kernel(vectors[a], REAL[b]).mean()
            assert draws[number] == pytest.approx(inside_a + inside_b - 2 * across)


def test_mean_draws_take_the_scenes_that_kid_draws_takes() -> None:
    values = np.arange(5.0)
    draws = measures.mean_draws(values, samples=400)
    assert draws.shape == (400,) and draws.min() >= 0 and draws.max() <= 4
    assert draws.mean() == pytest.approx(2.0, abs=0.15)
    weights = measures._weights(5, 400, (0, 0))
    assert np.allclose(draws, weights @ values / 5)


# ---- the course's sweep ------------------------------------------------------------------------


def test_the_sweep_is_a_part_of_the_studys(fresh_runs: Any) -> None:
    profile = load_profile("mini")
    swept = {method: frontier.settings(method, profile) for method in frontier.METHODS}
    scale = profile.transfer.guidance_scale
    scales = [s["guidance_scale"] for s in swept["ours"]]
    assert len(scales) == 3 and min(scales) == scale
    assert {s.get("guidance_scale") for m in ("sdedit", "ddib", "ilvr") for s in swept[m]} == {
        profile.ldm.guidance_scale
    }
    assert all(swept.values())
    assert [s["strength"] for s in swept["sdedit"]] == [0.25, 0.55, 0.85]
    assert [s["strength"] for s in swept["colour"]] == [0.5, 0.7, 0.9]
    assert [s["strength"] for s in swept["ddib"]] == [0.6, 1.0]
    assert swept["identity"] == [{}]
    for method, rows in swept.items():
        grid = [{**row, "steps": 0} for row in budgets.grid(method, profile)]
        for row in rows:
            assert {**row, "steps": 0} in grid
            assert row.get("steps", profile.transfer.sample_steps) == 8


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The course's sweep by a translator of random weights, on six scenes."""
    profile = load_profile("smoke")
    options = profile.transfer
    translator = replace(
        tiny_models.tiny_translator(),
        grain=0.05,
        steps=options.sample_steps,
        guidance_scale=options.guidance_scale,
    )
    torch.manual_seed(5)
    judges = Judges(LabelNet().eval(), PixelNet().eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(frontier, "REFERENCES", 40)
        patch.setattr(frontier, "load_judges", lambda: judges)
        upstream = SimpleNamespace(translator=translator, key="made")
        patch.setattr(frontier.transfer, "ensure", lambda profile: upstream)
        patch.setattr(frontier.ldm, "ensure", lambda profile: translator)
        patch.setattr(frontier.ldm, "lend", lambda model: model)
        made = frontier.ensure(profile)
        patch.setattr(frontier, "load_judges", None)  # a second call only reads
        assert frontier.ensure(profile) == made
    return made


def test_the_sweep_has_every_setting_and_a_verdict_on_each_rival(table: dict[str, Any]) -> None:
    profile = load_profile("smoke")
    rows = table["frontier"]
    for method in frontier.METHODS:
        mine = [row["setting"] for row in rows if row["method"] == method]
        grains = (1.0, 0.0) if method not in ("identity", "colour") else (None,)
        assert mine == [
            {**setting, **({} if grain is None else {"grain": grain})}
            for setting in frontier.settings(method, profile)
            for grain in grains
        ]
    assert [row["method"] for row in table["dominance"]] == list(frontier.METHODS[1:])
    (best,) = [row for row in rows if row["best"]]
    assert best["method"] == "ours" and best["setting"] == {
        "steps": profile.transfer.sample_steps,
        "guidance_scale": profile.transfer.guidance_scale,
        "grain": 1.0,
    }
    places = {(row["perceptual"]["value"], row["kid"]["value"]) for row in rows}
    assert len(places) > len(rows) - 3  # settings are points of their own
    assert table["n"] == profile.compare.sweep_scenes


def test_sweep_scenes_are_validation_scenes_of_all_classes() -> None:
    seeds = compare.balanced_seeds(24, frontier.FIRST)
    low, high = scenes.RANGES["validation"]
    assert low + 100_000 < seeds[0] and seeds[-1] < high - 300_000
    assert sorted(scenes.describe(s).cls for s in seeds) == sorted(list(scenes.CLASSES) * 8)


def test_the_figure_has_a_line_for_every_sweep(table: dict[str, Any]) -> None:
    (axes,) = frontier.frontier_figure(table).axes
    lines = {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}
    assert len(lines) - 1 == len(frontier.METHODS)  # those without grain share no label
    drawn = sum(len(bars.lines[0].get_xydata()) for bars in axes.containers)
    assert drawn == len(table["frontier"])
    mine = sorted(
        (row["perceptual"]["value"], row["kid"]["value"])
        for row in table["frontier"]
        if row["method"] == "ours" and row["setting"]["grain"] == 1
    )
    assert np.allclose(lines["ours"], mine)
    said = {row["method"]: row["verdict"] for row in table["dominance"]}
    assert f"SDEdit: {said['sdedit']}" in lines
