"""Profiles: all load, nothing defaulted, every value commented, mistakes named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tomjerry_utils import UserError
from tomjerry_utils.profiles import FOLDER, NAMES, Profile, load_profile


def _write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _mini(folder: Path, old: str = "", new: str = "") -> Path:
    """A copy of the mini profile in which the first match of a pattern is replaced."""
    text = (FOLDER / "mini.yaml").read_text(encoding="utf-8").replace("name: mini", "name: mine")
    changed, count = re.subn(old, new, text, count=1)
    assert count == 1
    return _write(folder, changed)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    # What the denoiser that it starts from predicts; the loss is the poster's in either case.
    published = profile.ldm.denoiser.startswith("stable-diffusion")
    assert profile.ldm.prediction_type == ("epsilon" if published else "sample")


def test_poster_numbers() -> None:
    paper = load_profile("paper")
    assert paper.captions.count == 1200
    assert 5000 <= 3 * paper.collect.per_class < 5010
    text = (FOLDER / "paper.yaml").read_text(encoding="utf-8")
    for number in ("5000", "1200", "20 h", "15 h", "8 h", "A40", "two visually optimal"):
        assert re.search(rf"poster[^\n]*{number}|{number}[^\n]*poster", text), number


def test_no_hidden_defaults() -> None:
    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.is_required(), f"{model.__name__}.{name} has a default"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(Profile)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_commented(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        if re.match(r"\s*\w+:", line):
            assert "# " in line or lines[index - 1].lstrip().startswith("# "), line


def test_same_keys_in_same_order() -> None:
    def shape(value: object) -> object:
        return [(k, shape(v)) for k, v in value.items()] if isinstance(value, dict) else None

    shapes = [
        shape(yaml.safe_load((FOLDER / f"{n}.yaml").read_text(encoding="utf-8"))) for n in NAMES
    ]
    assert all(other == shapes[0] for other in shapes)


def test_selection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_profile().name == "mini"
    monkeypatch.setenv("TOMJERRY_PROFILE", "smoke")
    assert load_profile().name == "smoke"
    assert load_profile("colab").name == "colab"
    assert load_profile(_mini(tmp_path)).name == "mine"
    assert load_profile(str(_mini(tmp_path))).name == "mine"


def test_seed_override() -> None:
    assert load_profile("smoke", seed=7).seed == 7
    with pytest.raises(UserError, match="seed"):
        load_profile("smoke", seed=-1)


def test_frozen() -> None:
    profile = load_profile("smoke")
    with pytest.raises(ValidationError):
        profile.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        profile.ldm.steps = 3  # type: ignore[misc]


def test_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    profile = load_profile(_mini(tmp_path, r"( learning_rate): \S+", r"\1: 5e-4"))
    assert profile.blip.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            r"(blip:[^&]*?) batch_size:",
            r"\1 batchsize:",
            ["unknown key 'blip.batchsize'", "batch_size"],
        ),
        ("detail: auto", "detail: close", ["captions.detail", "'close'"]),
        (r"longest_side: \S+", "longest_side: 9", ["captions.longest_side", "9"]),
        (r"concurrency: \S+", "concurrency: 0", ["captions.concurrency", "0"]),
        ("seed: 0", "sed: 0", ["unknown key 'sed'", "'seed'"]),
        ("\nldm:", "\nlmd:", ["unknown key 'lmd'", "'ldm'"]),
        ("seed: 0", "", ["'seed' is missing"]),
        ("seed: 0", "seed: zero", ["'seed'", "'zero'"]),
        ("seed: 0", "seed: true", ["'seed'", "True"]),
        ("prediction_type: sample", "prediction_type: x0", ["ldm.prediction_type", "'x0'"]),
        (r"class_dropout: \S+", "class_dropout: 1.5", ["ldm.class_dropout", "1.5"]),
        ("seed: 0", "seed: 0\nseed: 1", ["'seed' is given twice", "line"]),
        ("seed: 0", "seed: [0", ["not valid YAML", "line"]),
        ("name: mine", "name: other", ["'name' says 'other'", "name: mine"]),
        (r"sources: \[.*\]", "sources: [scenery]", ["collect.sources", "scenery"]),
        (r"sources: \[.*\]", "sources: []", ["collect.sources"]),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = _mini(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        load_profile("smok")
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no 'key: value' lines"):
        load_profile(_write(tmp_path, "just words"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not a YAML text file"):
        load_profile(tmp_path / "binary.yaml")
