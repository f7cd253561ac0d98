"""Stage 03: every picture is captioned, what was gained is measured, and a killed stage goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from tiny_models import tiny_blip

from tomjerry_utils import UserError, blip, collect
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import read_json

SLOTS = {"subject", "action", "direction", "place"}


@pytest.fixture
def small_profile(fresh_runs: Path, tmp_path: Path) -> Profile:
    """Smoke with 24 scenes and a BLIP of 64 hidden units, so that the test needs no weights."""
    blip.save(tiny_blip(), tmp_path / "pretrained")
    smoke = load_profile("smoke")
    return smoke.model_copy(
        update={
            "collect": smoke.collect.model_copy(
                update={"sources": ("scenes",), "per_class": 6, "validation_fraction": 0.3}
            ),
            "captions": smoke.captions.model_copy(update={"count": 20}),
            "blip": smoke.blip.model_copy(
                update={"pretrained": str(tmp_path / "pretrained"), "caption_batch_size": 10}
            ),
        }
    )


def test_the_stage_captions_every_picture_and_is_done_once(
    small_profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = blip.ensure(small_profile)
    pictures = collect.ensure(small_profile)
    assert [row["file_name"] for row in run.captions] == [
        row["file_name"] for row in pictures.select()
    ]
    for row in run.captions:
        assert row["natural"] == blip.to_natural(row["caption"])
    held = {row["file_name"] for row in pictures.select(split="validation")}
    assert 0 < len(run.before_after) == len(held)
    assert {row["file_name"] for row in run.before_after} == held
    assert set(run.scores) == {
        "n", "before", "after", "difference", "truth", "shuffled", "pictures",
    }  # fmt: skip
    for part in ("before", "after"):
        assert set(run.scores[part]["slots"]) == SLOTS
        assert set(run.scores[part]["by_domain"]) == {"cartoon", "natural"}
        assert run.scores[part]["cider_d"]["n"] == len(held)
    assert set(run.scores["difference"]) == SLOTS | {"cider_d"}
    counts = run.scores["pictures"]
    assert counts["held_out"] == run.scores["n"] == len(held)
    assert counts["learnt"] > counts["stopping"] > 0
    assert [row["step"] for row in run.evaluations] == [row["step"] for row in run.history]
    assert run.evaluations[-1]["held_out"] < run.evaluations[0]["held_out"]
    assert read_json(run.folder / "provenance.json")
    assert run.history[-1]["step"] == small_profile.blip.steps
    left = {path.name for path in run.folder.iterdir()}
    assert left == {
        "captioner",
        "retrieval",
        "history.jsonl",
        "evaluations.jsonl",
        "before_after.jsonl",
        "scores.json",
        "all_captions.jsonl",
        "provenance.json",
    }

    monkeypatch.setattr(blip, "fine_tune", lambda *a, **k: pytest.fail("trained again"))
    assert blip.ensure(small_profile).captions == run.captions


def test_a_killed_stage_goes_on_where_it_stopped(
    small_profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = blip.ensure(small_profile)
    expected = [whole.captions, whole.before_after, whole.scores, _losses(whole)]
    looks = whole.evaluations
    shutil.rmtree(whole.folder)

    # Killed twice: in training, then after the first batch of captions.
    real_tune, real_generate = blip.fine_tune, blip.Blip.generate
    with monkeypatch.context() as patch:
        patch.setattr(
            blip, "fine_tune", lambda *a, **k: real_tune(*a, **k, max_seconds=1e-6) and _die()
        )
        with pytest.raises(KeyboardInterrupt):
            blip.ensure(small_profile)
    calls: list[int] = []

    def short(self: blip.Blip, images: np.ndarray, **options: Any) -> list[str]:
        calls.append(len(images))
        return _die() if len(calls) == 4 else real_generate(self, images, **options)

    with monkeypatch.context() as patch:
        patch.setattr(blip.Blip, "generate", short)
        with pytest.raises(KeyboardInterrupt):
            blip.ensure(small_profile)
    # A kill may also cut a line short.
    with (whole.folder / "all_captions.partial.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "images/')

    monkeypatch.setattr(blip, "fine_tune", lambda *a, **k: pytest.fail("trained again"))
    calls.clear()
    monkeypatch.setattr(
        blip.Blip,
        "generate",
        lambda self, images, **o: calls.append(len(images)) or real_generate(self, images, **o),
    )
    again = blip.ensure(small_profile)
    assert sum(calls) == len(again.captions) - 10
    assert [again.captions, again.before_after, again.scores, _losses(again)] == expected
    assert again.evaluations == looks


def _die() -> NoReturn:
    raise KeyboardInterrupt


def _losses(run: blip.BlipRun) -> list[float]:
    return [row["loss"] for row in run.history]


class Pictures:
    """40 pictures, four to a shot; the first `known` are of the validation split, with captions."""

    def __init__(self, known: int = 0) -> None:
        self.rows = [
            {
                "file_name": f"{i}.png",
                "group": f"shot {i // 4}",
                "split": "validation" if i < known else "train",
                "text": f"true {i}" if i < known else None,
                "label": (None, "mouse", "tom_jerry")[i % 3],
            }
            for i in range(40)
        ]

    def select(self, *, split: str | None = None, kept: bool | None = None) -> list[dict[str, Any]]:
        return [row for row in self.rows if split in (None, row["split"])]

    def written(self, first: int) -> list[dict[str, str]]:
        return [{"file_name": row["file_name"], "caption": "a cat"} for row in self.rows[first:]]


def split(pictures: Pictures, first: int, fraction: float, stopping: float) -> list[list[Any]]:
    """Pictures to learn captions from, to stop by and to score; without those for labels alone."""
    learn, _, *others = blip._split(pictures, pictures.written(first), fraction, stopping)  # type: ignore[arg-type]
    return [learn, *others]


def groups(rows: list[dict[str, Any]]) -> set[str]:
    return {row["group"] for row in rows}


def test_without_validation_captions_groups_are_held_out() -> None:
    """Real pictures have no known caption: a share of the captioned groups is kept apart."""
    pictures = Pictures()
    learn, stop, held = split(pictures, 2, 0.2, 0.2)
    assert {row["text"] for row in [*learn, *stop, *held]} == {"a cat"}
    assert not groups(learn) & groups(held)
    assert not groups(learn) & groups(stop)
    assert not groups(stop) & groups(held)
    assert len(learn) + len(stop) + len(held) == 38
    assert 2 <= len(held) <= 8
    assert 2 <= len(stop) <= 8
    assert split(pictures, 2, 0.2, 0.2) == [learn, stop, held]
    # One group cannot be on three sides, and two cannot either.
    for first in (39, 34):
        with pytest.raises(UserError, match="no captioned picture is left to learn from") as caught:
            split(pictures, first, 0.2, 0.2)
        assert "\n" not in str(caught.value)
    assert [len(groups(part)) for part in split(pictures, 30, 0.2, 0.2)] == [1, 1, 1]


def test_scored_are_the_validation_pictures_where_their_captions_are_known() -> None:
    pictures = Pictures(known=8)
    learn, stop, held = split(pictures, 0, 0.2, 0.1)
    # Someone captioned them, too; what is learnt and what stops knows nothing of that.
    assert {row["file_name"] for row in held} == {f"{i}.png" for i in range(8)}
    assert {row["text"] for row in held} == {f"true {i}" for i in range(8)}
    assert not (groups(learn) | groups(stop)) & groups(held)
    assert not groups(learn) & groups(stop)
    assert len(learn) + len(stop) == 32
    assert len(groups(stop)) == 1
    wider = split(pictures, 0, 0.2, 0.5)
    assert groups(stop) < groups(wider[1])
    assert [row["file_name"] for row in held] != [f"{i}.png" for i in range(8)]  # mixed


def test_no_more_than_a_fixed_number_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blip, "SCORED", 3)
    learn, stop, held = split(Pictures(known=8), 0, 0.2, 0.1)
    assert len(held) == 3
    assert len(learn) + len(stop) == 32
    assert not (groups(learn) | groups(stop)) & {"shot 0", "shot 1"}


def test_labels_are_learnt_from_training_pictures_without_a_caption() -> None:
    pictures = Pictures(known=8)
    learn, labelled, stop, _ = blip._split(pictures, pictures.written(22), 0.2, 0.2)  # type: ignore[arg-type]
    assert {row["text"] for row in labelled} == {"a mouse", "tom and jerry"}
    for row in labelled:
        assert row["text"] == {"mouse": "a mouse", "tom_jerry": "tom and jerry"}[row["label"]]
        assert row["split"] == "train"
    # From the ninth, the first after the validation split, to the last without a caption.
    named = [i for i in range(8, 22) if i % 3]
    at_stop = [row["file_name"] for row in pictures.rows if row["group"] in groups(stop)]
    assert [row["file_name"] for row in labelled] == [
        f"{i}.png" for i in named if f"{i}.png" not in at_stop
    ]
    assert not groups(labelled) & groups(stop)
    assert not {row["file_name"] for row in labelled} & {row["file_name"] for row in learn}
