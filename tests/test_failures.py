"""What failed and why: the rule on hand-made scores, the truth told to a tiny translator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from tomjerry_utils import compare, failure_figures, failures, scenes, structure, twins
from tomjerry_utils.images import load_image
from tomjerry_utils.judge_nets import LabelNet, PixelNet
from tomjerry_utils.judges import Judges
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import read_json

ALLOWED = {"perceptual": 1.0, "parts": 0.8, "keypoints": 3.0, "autoencoder": 0.3}
BAD = {"class_accuracy": 1.0, "action_accuracy": 1.0, "perceptual": 1.2}
GOOD = {**BAD, "perceptual": 0.9}
# A failure for which every reading was right and nothing helps.
HOPELESS: dict[str, Any] = {
    **BAD, "class": "tom", "read": "tom", "parts": 0.9, "caption_class": True,
    "caption_action": True, "keypoints": 1.0, "autoencoder": 0.2,
    "told": {"shapes": BAD, "view": BAD},
}  # fmt: skip


# ---- the rules ---------------------------------------------------------------------------------


def test_the_worst_come_first_and_a_wrong_answer_always_fails() -> None:
    scores = [(1, 1, 0.5), (1, 0, 0.1), (1, 1, 0.9), (0, 1, 0.2), (1, 1, 0.8), (1, 1, 0.7)]
    names = ("class_accuracy", "action_accuracy", "perceptual")
    rows = [dict(zip(names, row, strict=True)) for row in scores]
    assert failures.failing(rows, 0.3) == [3, 1, 2, 4]  # two by distance, two by an answer
    assert failures.failing(rows, 0.01) == [3, 1, 2]
    assert failures.furthest([row["perceptual"] for row in rows], 0.3) == 0.8


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "denoiser"),
        ({"read": "both"}, "structure"),
        ({"parts": 0.79}, "structure"),
        ({"caption_action": False}, "caption"),
        ({"caption_class": False, "keypoints": 9.0}, "caption"),
        ({"keypoints": 3.1}, "posture"),
        ({"keypoints": 3.1, "parts": 0.1}, "structure"),
        ({"told": {"shapes": GOOD, "view": GOOD}}, "shapes"),
        ({"told": {"shapes": BAD, "view": GOOD}, "autoencoder": 0.4}, "coat"),
        ({"autoencoder": 0.4}, "autoencoder"),
        # Near the twin, but still another class: nothing is mended.
        ({"told": {"shapes": {**GOOD, "class_accuracy": 0.0}, "view": BAD}}, "denoiser"),
    ],
)
def test_the_first_stage_that_went_wrong_is_the_cause(changes: dict[str, Any], found: str) -> None:
    assert failures.cause({**HOPELESS, **changes}, ALLOWED) == found


@pytest.mark.parametrize(
    ("shapes", "view", "remedy"),
    [(GOOD, GOOD, "shapes"), (BAD, GOOD, "view"), (BAD, BAD, None), (GOOD, BAD, "shapes")],
)
def test_what_went_wrong_first_need_not_be_what_harmed(
    shapes: dict[str, float], view: dict[str, float], remedy: str | None
) -> None:
    row = {**HOPELESS, "keypoints": 9.0, "told": {"shapes": shapes, "view": view}}
    assert failures.cause(row, ALLOWED) == "posture"
    assert failures.mended_by(row, ALLOWED) == remedy


def test_limits_are_what_nineteen_of_twenty_others_keep() -> None:
    others = [{"parts": i / 100, "keypoints": i, "autoencoder": 2.0 * i} for i in range(101)]
    assert failures.limits(others, far=0.7) == {
        "perceptual": 0.7, "parts": 0.05, "keypoints": 95.0, "autoencoder": 190.0,
    }  # fmt: skip


def test_keypoints_that_cannot_be_seen_do_not_count() -> None:
    true = np.zeros((2, 2, 3, 3))
    true[0, 0, :2, 2] = 1  # two of the cat's can be seen, nothing of the second picture
    found = np.zeros((2, 2, 3, 2))
    found[0, 0, 0] = (3, 4)
    found[0, 1] = 50
    assert failures.points_away(found, true).tolist() == [2.5, 0.0]


# ---- the truth told ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator() -> Any:
    return tiny_models.tiny_translator()


def test_drawing_what_was_read_is_translating(translator: Any) -> None:
    images = tiny_models.pictures("cartoon", 4)
    whole = translator.translate(images, None, seed=3)
    told = translator.conditions(images[1:3], None, seed=3, numbers=[1, 2])
    again = translator.draw(told, images[1:3], seed=3, numbers=[1, 2])
    assert np.abs(again.astype(int) - whole.images[1:3]).max() <= 1


def test_the_truth_is_the_twins(translator: Any) -> None:
    seeds = (4_300_000, 4_300_001, 4_300_002)
    truth = twins.twins_of(seeds)
    images = scenes.render_many(list(seeds[1:]), "cartoon", 32, workers=1)["image"]
    names = [scenes.describe(seed).cls for seed in seeds[1:]]
    as_read = translator.conditions(images, names)
    true = structure.one_hot(
        torch.from_numpy(truth.parts[1:]).long(), torch.from_numpy(truth.masks[1:] == 2)
    )
    wanted = torch.nn.functional.avg_pool2d(true, 4)  # twice a grid of 8
    tones = slice(structure.MAPS, None)
    views = {}
    for coats in (False, True):
        told = failures.truly(translator, as_read, truth, [1, 2], coats=coats)
        views[coats] = told.batch.view
        assert torch.allclose(structure.drawn_maps(told.batch.view), wanted, atol=1e-5)
        assert told.captions == [scenes.caption(scenes.describe(s), "natural") for s in seeds[1:]]
        assert torch.equal(told.batch.labels, as_read.batch.labels)
        assert not torch.equal(told.batch.text, as_read.batch.text)
    assert torch.equal(views[False][:, tones], as_read.batch.view[:, tones])
    assert not torch.allclose(views[True][:, tones], views[False][:, tones])


@pytest.fixture(scope="module")
def found(translator: Any, tmp_path_factory: pytest.TempPathFactory) -> failures.FailureRun:
    """The stage on twenty test scenes by a translator of random weights."""
    smoke = load_profile("smoke")
    few = smoke.compare.model_copy(update={"test_scenes": 20, "batch_size": 8})
    profile = smoke.model_copy(update={"compare": few})
    torch.manual_seed(5)
    judges = Judges(LabelNet().eval(), PixelNet().eval())
    seeds = compare.held_out_seeds(20)
    sources = scenes.render_many(seeds, "cartoon", 32, workers=1)["image"]
    known = [compare._describe(seed) for seed in seeds]
    rows = [
        {"method": "ours", "seed": seed, "answer": "tom", "class_accuracy": float(i != 7),
         "action_accuracy": 1.0, "perceptual": i / 20}
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    run: Any = SimpleNamespace(
        rows=rows, scenes=known, key="made", pictures={"identity": sources, "ours": sources}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(compare, "ensure", lambda profile: run)
        patch.setattr(failures, "load_judges", lambda: judges)
        patch.setattr(failures, "REFERENCES", 40)
        upstream = SimpleNamespace(translator=translator, key="made")
        patch.setattr(failures.transfer, "ensure", lambda profile: upstream)
        made = failures.ensure(profile)
        patch.setattr(failures, "load_judges", None)  # a second call only reads
        assert failures.ensure(profile).table == made.table
    return made


def test_every_failure_has_one_cause_and_pictures(found: failures.FailureRun) -> None:
    table = found.table
    failed = [row for row in table["rows"] if row["cause"]]
    assert [row["perceptual"] for row in failed] == [7 / 20, 19 / 20, 18 / 20]
    assert table["failed"] == 3 and table["examined"] == len(table["rows"]) == 9
    assert sum(row["failures"] for row in table["causes"].values()) == 3
    assert list(table["causes"]) == list(failures.CAUSES)
    assert table["limits"]["perceptual"] == 18 / 20
    for row in failed:
        assert row["cause"] == failures.cause(row, table["limits"])
        pictures = [load_image(found.folder / t / f"{row['seed']}.png") for t in failures.TOLD]
        assert not np.array_equal(*pictures)
    assert read_json(found.folder / "failures.json") == table


def test_the_gallery_shows_each_failure_with_its_cause_and_the_rule(
    found: failures.FailureRun,
) -> None:
    fig = failure_figures.gallery_figure(found, 2)
    assert sum(len(axes.images) for axes in fig.axes) == 5 * 2
    texts = [text.get_text() for axes in fig.axes for text in axes.texts]
    assert " ".join(texts[-1].split()) == " ".join(failures.rule().split())
    assert {row["cause"] for row in found.table["rows"][:2]} <= set(texts)
    width, height = fig.get_size_inches()
    for axes in fig.axes:
        for text in axes.texts:
            x, y = text.get_position()
            assert 0 <= x <= width and 0 <= y <= height, text.get_text()


def test_the_count_of_causes_is_drawn_from_the_table() -> None:
    causes = {
        name: {"meaning": f"why {name}", "failures": i, "others": 0.05 if i else None,
               "mended_by": {"shapes": i // 2, "view": 0}}
        for i, name in enumerate(failures.CAUSES)
    }  # fmt: skip
    (axes,) = failure_figures.causes_figure({"causes": causes, "failed": 21, "n": 99}).axes
    widths = np.reshape([bar.get_width() for bar in axes.patches], (3, -1))
    counts = np.arange(len(causes))
    assert widths.tolist() == [(counts // 2).tolist(), [0] * 7, (counts - counts // 2).tolist()]
