"""Stage 06: fair sources, resumable translations, scores as `evaluate` gives them, honest picks."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from tomjerry_utils import compare, metrics, picking, scenes, structure
from tomjerry_utils.images import load_image
from tomjerry_utils.judge_nets import LabelNet, PixelNet
from tomjerry_utils.judges import Judges
from tomjerry_utils.profiles import Profile, load_profile

SCENES = 51
REFERENCES = 40
EVERY = {*compare.METRICS, *compare.MORE}


def small_profile(**changes: Any) -> Profile:
    smoke = load_profile("smoke")
    settings = {"test_scenes": 7, "batch_size": 3, "candidates": 2, "bootstrap": 50, **changes}
    return smoke.model_copy(update={"compare": smoke.compare.model_copy(update=settings)})


def cartoons(seeds: list[int]) -> np.ndarray:
    return scenes.render_many(seeds, "cartoon", tiny_models.SIZE, workers=1)["image"]


@pytest.fixture(scope="module")
def translator() -> Any:
    return tiny_models.tiny_translator()


@pytest.fixture(scope="module")
def judges() -> Judges:
    torch.manual_seed(5)
    return Judges(LabelNet().eval(), PixelNet().eval())


@pytest.fixture(scope="module")
def run(
    translator: Any, judges: Judges, tmp_path_factory: pytest.TempPathFactory
) -> compare.CompareRun:
    """A whole stage 06 on a translator of random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_RUNS", str(tmp_path_factory.mktemp("runs")))
        upstream = SimpleNamespace(translator=translator, key="made")
        patch.setattr(compare.transfer, "ensure", lambda profile: upstream)
        patch.setattr(compare.ldm, "ensure", lambda profile: translator)
        patch.setattr(compare.ldm, "lend", lambda model: model)
        patch.setattr(compare, "load_judges", lambda: judges)
        patch.setattr(compare, "_class_samples", lambda *_: {"staged": "of stage 04"})
        patch.setitem(compare.score_all.__kwdefaults__, "references", REFERENCES)
        profile = small_profile(test_scenes=SCENES, batch_size=20)
        made = compare.ensure(profile)
        # The second call only reads: there is nobody left to translate or to judge.
        patch.setattr(compare, "load_judges", None)
        assert compare.ensure(profile).results == made.results
        return made


# ---- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 24, 300])
def test_scenes_are_held_out_and_balanced(count: int) -> None:
    seeds = compare.held_out_seeds(count)
    first, end = scenes.RANGES["test"]
    assert len(seeds) == count and seeds == sorted(set(seeds))
    assert first <= seeds[0] and seeds[-1] < end
    by_class = Counter(scenes.describe(seed).cls for seed in seeds)
    assert max(by_class.values()) - min(by_class[cls] for cls in scenes.CLASSES) <= 1


# ---- translating -------------------------------------------------------------------------------


def test_a_killed_translation_goes_on_and_ends_the_same(
    translator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = small_profile()
    seeds = compare.held_out_seeds(7)
    sources = cartoons(seeds)
    given = (sources, seeds, profile, translator, translator)
    whole = compare.translate_all("ours", tmp_path / "whole", *given)

    calls: list[int] = []
    translate = type(translator).translate

    def stops(self: Any, images: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return translate(self, images, *args, **kwargs)

    monkeypatch.setattr(type(translator), "translate", stops)
    with pytest.raises(KeyboardInterrupt):
        compare.translate_all("ours", tmp_path / "killed", *given)
    resumed = compare.translate_all("ours", tmp_path / "killed", *given)
    assert calls == [3, 3, 3, 1], "the first batch was done and is not done again"
    assert (resumed.classes, resumed.captions) == (whole.classes, whole.captions)
    for seed in seeds:
        one, two = (load_image(tmp_path / k / "ours" / f"{seed}.png") for k in ("whole", "killed"))
        assert np.array_equal(one, two)


def test_noise_differs_between_batches_seeds_and_attempts() -> None:
    profile = small_profile()
    other = profile.model_copy(update={"seed": 1})
    seeds = {picking.noise_seed(p, a, n) for p in (profile, other) for a in (0, 1) for n in (0, 3)}
    assert len(seeds) == 8


# ---- the whole stage ---------------------------------------------------------------------------


def test_the_stage_holds_what_it_promises(run: compare.CompareRun) -> None:
    assert len(run.scenes) == SCENES
    assert set(run.results["methods"]) == set(compare.METHODS) == set(run.pictures)
    assert len(run.rows) == SCENES * len(compare.METHODS)
    assert set(run.results["rows"]) == set(metrics.ROWS)
    for method in compare.METHODS:
        assert set(run.results["methods"][method]["metrics"]) == EVERY
        assert run.pictures[method].shape == (SCENES, tiny_models.SIZE, tiny_models.SIZE, 3)
    seeds = [row["seed"] for row in run.scenes]
    assert np.array_equal(run.pictures["identity"], cartoons(seeds))
    assert not (run.folder / "work").exists()
    with pytest.raises(KeyError):
        run.pictures["magic"]


def test_evaluate_gives_the_same_numbers(
    run: compare.CompareRun, judges: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.judging, "load_judges", lambda folder=None: judges)
    monkeypatch.setenv("TOMJERRY_RUNS", str(run.folder.parents[1]))
    found = metrics.evaluate_folder(run.folder / "ours", references=REFERENCES, bootstrap=50)
    assert found["metrics"] == run.results["methods"]["ours"]["metrics"]
    assert found["by_class"] == run.results["methods"]["ours"]["by_class"]
    assert found["rows"] == run.results["rows"]


def test_differences_are_paired_and_say_what_they_mean(run: compare.CompareRun) -> None:
    methods = run.results["methods"]
    for rival, table in run.results["differences"].items():
        assert set(table) == EVERY
        for name, row in table.items():
            gap = (
                methods["ours"]["metrics"][name]["value"] - methods[rival]["metrics"][name]["value"]
            )
            assert row["difference"] == pytest.approx(gap, abs=1e-9)
            assert row["ci95"][0] <= row["ci95"][1]
            assert row["verdict"] == compare.verdict(name, row["ci95"])


@pytest.mark.parametrize(
    ("metric", "ci95", "said"),
    [
        ("class_accuracy", (0.1, 0.2), "better"),
        ("class_accuracy", (-0.2, -0.1), "worse"),
        ("kid", (-0.2, -0.1), "better"),
        ("perceptual", (0.1, 0.2), "worse"),
        ("pck", (-0.1, 0.2), "undecided"),
        ("pck", (0.0, 0.0), "undecided"),
        ("cartoon_share", (-0.2, -0.1), "better"),
        ("structure", (0.1, 0.2), "worse"),
        ("recall", (0.1, 0.2), "better"),
    ],
)
def test_verdicts(metric: str, ci95: tuple[float, float], said: str) -> None:
    assert compare.verdict(metric, ci95) == said


def test_kid_differences_are_drawn_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method against itself differs by exactly 0 in every draw."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((30, 16))
    monkeypatch.setattr(metrics, "reference", lambda count: (rng.standard_normal((40, 16)), None))
    scored = {"features": features, "each": {"pck": rng.random(30)}}
    table = compare._differences(scored, scored, 40, 50)
    assert table["kid"]["difference"] == 0 and table["kid"]["ci95"] == [0, 0]
    other = {**scored, "features": features + 1.0}
    assert compare._differences(scored, other, 40, 50)["kid"]["verdict"] == "better"


# ---- picking -----------------------------------------------------------------------------------


def test_picks_of_each_kind_and_class(run: compare.CompareRun) -> None:
    by_scene = {row["seed"]: row["class"] for row in run.scenes}
    count = Counter((row["class"], row["kind"]) for row in run.picks)
    assert count == {(c, k): picking.PICKS for c in scenes.CLASSES for k in picking.KINDS}
    for cls in scenes.CLASSES:
        rows = {
            k: [r for r in run.picks if (r["class"], r["kind"]) == (cls, k)] for k in picking.KINDS
        }
        for kind in picking.KINDS:
            assert len({row["seed"] for row in rows[kind]}) == picking.PICKS
            assert all(by_scene[row["seed"]] == cls for row in rows[kind])
        assert min(r["score"] for r in rows["best"]) > max(r["score"] for r in rows["worst"])
        assert all(row["attempt"] == 0 for kind in ("random", "worst") for row in rows[kind])
    for row in run.picks:
        assert run.picked(row).shape == (tiny_models.SIZE, tiny_models.SIZE, 3)


def test_better_translations_rank_higher() -> None:
    """The further an output's animal lies from where the source has it, the lower its rank."""
    maps = tiny_models.truth("natural", 6)["maps"]
    overlaps = []
    for away in (0, 2, 5, 10):
        moved = maps.roll(away, dims=3)
        overlaps.append(picking.silhouette_overlap(maps, moved))
    for one, two in pairwise(overlaps):
        assert (one > two).all()
    assert torch.allclose(overlaps[0], torch.ones(6))


def test_the_wrong_animal_is_no_overlap() -> None:
    maps = tiny_models.truth("natural", 3, cls="tom")["maps"]
    swapped = maps.clone()
    swapped[:, structure.MOUSE] = maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum(1)
    assert (picking.silhouette_overlap(maps, swapped) < 0.01).all()


def test_the_best_try_of_a_scene_stands_for_it() -> None:
    scores = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (2, 0): 0.5, (2, 1): 0.1}
    assert picking.best_attempts(scores, 2) == [(0, 1), (1, 0)]
    assert picking.best_attempts(scores, 9) == [(0, 1), (1, 0), (2, 0)]
    # A better outcome never falls in rank, whichever it is.
    for which in scores:
        raised = {**scores, which: scores[which] + 10.0}
        assert picking.best_attempts(raised, 1) == [which]


def test_agreement_falls_with_damage(translator: Any) -> None:
    """Shuffled outputs agree less with what was asked for than outputs equal to it."""
    plain = replace(translator, posture=None)  # asks for the drawing's own shapes
    seeds = compare.held_out_seeds(12)
    sources = cartoons(seeds)
    told = plain.conditions(sources, None)
    asked = picking.asked_views(plain, sources, told.classes, batch_size=5)
    same = picking.agreement(plain, asked, sources, told.captions)
    mixed = picking.agreement(plain, asked, np.roll(sources, 1, axis=0), told.captions)
    assert same.shape == (12, 2)
    assert np.allclose(same[:, 1], 1, atol=1e-5)
    assert (mixed[:, 1] < same[:, 1]).all()
    whole = picking.agreement(plain, asked, sources, told.captions, batch_size=5)
    assert np.allclose(whole, same, atol=1e-4)


def test_outputs_are_held_to_the_posed_body_not_to_the_drawing(
    translator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The translator asks for natural bodies: one that gave the drawing's would agree less."""
    natural, drawn = (tiny_models.truth(style, 4) for style in ("natural", "cartoon"))
    views = [structure.view(d["maps"], d["images"], (8, 8)) for d in (natural, drawn)]
    monkeypatch.setattr(type(translator.posture), "pose", lambda *_, **__: natural["maps"])
    sources = cartoons(compare.held_out_seeds(4))
    asked = picking.asked_views(translator, sources, ["both"] * 4)
    wanted = structure.drawn_maps(asked)
    assert torch.allclose(wanted, structure.drawn_maps(views[0]), atol=1e-5)
    overlaps = []
    for seen in views:
        monkeypatch.setattr(structure, "look", lambda *_, seen=seen: (seen, None))
        overlaps.append(picking.agreement(translator, asked, sources, ["a cat is sitting"] * 4))
    assert np.allclose(overlaps[0][:, 1], 1, atol=1e-5)
    assert (overlaps[1][:, 1] < 0.9).all()


def test_picking_asks_no_judge_and_no_reported_feature() -> None:
    tree = ast.parse(Path(picking.__file__).read_text(encoding="utf-8"))
    names = {
        part
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        for part in [*alias.name.split("."), *(getattr(node, "module", "") or "").split(".")]
    }
    assert not names & {"judges", "judge_nets", "metrics", "measures", "features"}


# ---- figures -----------------------------------------------------------------------------------


def test_promising_scenes_are_of_different_actions_while_there_are_any() -> None:
    actions = ["lie", "lie", "sit", "lie", "run", None, "sit"]
    order = [3, 1, 6, 0, 4, 2, 5]  # best first
    assert picking.varied(order, actions, 3) == [3, 6, 4]
    assert picking.varied(order, actions, 4) == [3, 6, 4, 5]
    assert picking.varied(order, actions, 6) == [3, 6, 4, 5, 1, 0]  # then by score again
    assert picking.varied(order[:2], actions, 4) == [3, 1]


def test_the_comparison_shows_every_pick(run: compare.CompareRun) -> None:
    fig = compare.comparison_figure(run)
    shown = [image for axes in fig.axes for image in axes.images]
    assert len(shown) == len(scenes.CLASSES) * picking.PICKS * (4 + 2 + 2)
    texts = {text.get_text() for axes in fig.axes for text in axes.texts}
    assert {"cartoon", "SDEdit", "colour transfer", "ours", "two worst"} <= texts
    width, height = fig.get_size_inches()
    for axes in fig.axes:
        for text in axes.texts:
            x, y = text.get_position()
            assert 0 <= x <= width and 0 <= y <= height, text.get_text()


def test_the_table_shows_every_number(run: compare.CompareRun) -> None:
    texts = [t.get_text() for axes in compare.metrics_table_figure(run).axes for t in axes.texts]
    for method in compare.METHODS:
        assert compare.TITLES[method] in texts
        value = run.results["methods"][method]["metrics"]["mask_iou"]["value"]
        assert f"{value:.3f}" in texts
    # A table read from a file is drawn alike.
    again = compare.metrics_table_figure(run.results)
    assert [t.get_text() for axes in again.axes for t in axes.texts] == texts
