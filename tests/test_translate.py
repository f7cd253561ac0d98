"""`tomjerry translate`: pictures of any shape, several samples each, a report that stays true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tomjerry_utils import UserError, panorama, structure, translate
from tomjerry_utils.cli import main
from tomjerry_utils.images import load_image, resize_short, save_image
from tomjerry_utils.panorama import Layout
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import read_jsonl
from tomjerry_utils.structure import COATS, MAPS
from tomjerry_utils.translate import translate_files
from tomjerry_utils.translator import Translator, load_translator

SMOKE = load_profile("smoke")
SIZE, STEP = tiny.SIZE, 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_translator(tiny.tiny_translator(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def translator(weights: Path) -> Translator:
    return load_translator(weights, SMOKE)


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    return tiny.pictures("cartoon", 6)


@pytest.fixture
def inputs(tmp_path: Path, scenes: np.ndarray) -> Path:
    """Two square pictures, a wide one and a tall one."""
    folder = tmp_path / "in"
    for name, picture in {
        "a": scenes[0],
        "b": scenes[1],
        "tall": np.concatenate([scenes[4], scenes[5]], 0),
        "wide": np.concatenate([scenes[2], scenes[3]], 1),
    }.items():
        save_image(folder / f"{name}.png", picture)
    return folder


def run(inputs: list[Path], out: Path, weights: Path, **options: Any) -> list[dict[str, Any]]:
    return translate_files(inputs, out, profile=SMOKE, weights=weights, **options)


def made(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))


# ---- where squares lie -------------------------------------------------------------------------


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("length", [36, 48, 64, 100, 128])
def test_squares_cover_a_picture_and_join_to_it(length: int, tall: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for leading in ([0], [STEP * ((length - SIZE) // 2 // STEP)], [length - SIZE]):
        starts = panorama._cover(leading, length, SIZE, STEP, overlap=SIZE // 4)
        layout = Layout(SIZE, length, tall, starts)
        assert starts[0] == leading[0] and len(set(starts)) == len(starts)
        assert all(start % STEP == 0 and 0 <= start <= length - SIZE for start in starts)
        for scale in (1, STEP):
            edges = (length // scale, SIZE // scale) if tall else (SIZE // scale, length // scale)
            wide = torch.rand(3, *edges, generator=generator)
            squares = layout.cut(wide)
            assert squares.shape == (len(starts), 3, SIZE // scale, SIZE // scale)
            assert torch.allclose(layout.join(squares), wide, atol=1e-5)
            # The negative control: squares in another order are another picture.
            if len(starts) > 1:
                assert not torch.allclose(layout.join(squares.flip(0)), wide, atol=1e-2)
        # The first square shows wherever it is not fading into another.
        alone = torch.zeros(len(starts), 1, SIZE, SIZE)
        alone[0] = 1
        core = layout.cut(layout.join(alone))[0, 0]
        core = core if tall else core.T
        assert torch.allclose(core[SIZE // 8 : -SIZE // 8], torch.ones(1))


def bump(length: int, *places: tuple[int, int]) -> np.ndarray:
    mass = np.full(length, 0.01)
    for first, last in places:
        mass[first:last] = 0.4
    return mass


def test_a_square_has_the_animal_inside_it_and_near_its_middle() -> None:
    for first in (0, 13, 40, 77, 108):
        (start,) = panorama._on_animals(bump(128, (first, first + 20)), SIZE, STEP)
        assert start <= first and first + 20 <= start + SIZE
        if 8 < first < 100:
            assert abs(start + SIZE / 2 - (first + 10)) <= STEP


def test_every_animal_has_a_square_but_a_tail_and_a_shadow_have_none() -> None:
    apart = panorama._on_animals(bump(128, (4, 24), (96, 120)), SIZE, STEP)
    assert len(apart) == 2 and apart[0] > 80 and apart[1] == 0  # the larger animal first
    assert len(panorama._on_animals(bump(128, (4, 12), (16, 28)), SIZE, STEP)) == 1
    # Wider than a square: what is cut off is no animal of its own.
    assert len(panorama._on_animals(bump(128, (40, 76)), SIZE, STEP)) == 1
    assert len(panorama._on_animals(bump(128, (4, 24), (100, 102)), SIZE, STEP)) == 1
    nothing = panorama._on_animals(np.zeros(128), SIZE, STEP)
    assert nothing == [(128 - SIZE) // 2]


# ---- what squares are told ---------------------------------------------------------------------


def test_squares_beside_an_animal_are_told_its_caption_and_their_own_shapes(
    translator: Translator, scenes: np.ndarray
) -> None:
    wide = np.concatenate(list(scenes[:3]), 1)
    layout = Layout(SIZE, 96, False, [32, 0, 64, 16, 48], own=["tom"])
    squares = layout.squares(wide)
    assert np.array_equal(squares[0], scenes[1])
    told, captions = panorama._conditions(translator, squares, layout, "tom", seed=1, number=7)
    alone = translator.conditions(scenes[1:2], ["tom"], seed=1, numbers=[7])
    assert captions == alone.captions * 5
    assert told.labels.tolist() == alone.batch.labels.tolist() * 5
    coats = told.view[:, MAPS : MAPS + COATS]
    assert torch.allclose(coats, alone.batch.view[:, MAPS : MAPS + COATS].expand_as(coats))
    # Inside, the animal's square is what it is alone; neighbours see one and the same picture.
    assert torch.allclose(told.view[0, ..., 2:-2], alone.batch.view[0, ..., 2:-2], atol=1e-4)
    shapes = told.view[:, :MAPS]
    assert torch.allclose(layout.cut(layout.join(shapes)), shapes, atol=1e-4)
    # Far from the animal nothing has been given a posture.
    plain = structure.look(translator.net, torch.from_numpy(scenes[:1]), (8, 8))[0]
    assert torch.allclose(shapes[1, ..., :4], plain[0, :MAPS, :, :4], atol=1e-4)
    posed = translator.conditions(scenes[:1], ["tom"], seed=1, numbers=[7]).batch.view
    assert not torch.allclose(shapes[1, ..., :4], posed[0, :MAPS, :, :4], atol=1e-2)


def test_tom_here_and_jerry_there_are_both_and_each_is_told_of_itself(
    translator: Translator, scenes: np.ndarray
) -> None:
    wide = np.concatenate(list(scenes[:3]), 1)
    layout = Layout(SIZE, 96, False, [0, 64, 28], leading=2, own=["tom", "jerry"])
    assert layout.cls == "both"
    squares = layout.squares(wide)
    labels = panorama._conditions(translator, squares, layout, "both", seed=0, number=0)[0].labels
    tom, jerry, both = (
        int(translator.conditions(scenes[:1], [c]).batch.labels) for c in ("tom", "jerry", "both")
    )
    assert labels.tolist() == [tom, jerry, tom]
    # What the user says goes for all of the picture.
    labels = panorama._conditions(translator, squares, layout, "jerry", seed=0, number=0)[0].labels
    assert labels.tolist() == [jerry] * 3
    whole = Layout(SIZE, 96, False, [0, 64, 28], own=["both"])
    labels = panorama._conditions(translator, squares, whole, "both", seed=0, number=0)[0].labels
    assert labels.tolist() == [both] * 3


@pytest.mark.parametrize("tall", [False, True])
def test_a_wide_picture_is_drawn_as_one(
    translator: Translator, scenes: np.ndarray, tall: bool
) -> None:
    wide = np.concatenate([*scenes[:2], scenes[2][:, :12]], 1)
    wide = wide.transpose(1, 0, 2).copy() if tall else wide
    layout = panorama.lay_out(translator, wide)
    first, again, other, more = (
        panorama.translate(translator, wide, layout, "tom", number=number, seed=seed)
        for number, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first.shape == wide.shape
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, more)
    squared = Translator(**{**vars(translator), "blip_guidance": 1.0})
    assert not np.array_equal(panorama.translate(squared, wide, layout, "tom", number=1), first)


# ---- shapes and formats ------------------------------------------------------------------------


def test_square_pictures_are_translated_as_they_were(
    inputs: Path, tmp_path: Path, weights: Path, translator: Translator, scenes: np.ndarray
) -> None:
    (row,) = run([inputs / "a.png"], tmp_path / "out", weights, seed=3)
    number = translate._number(scenes[0], 1)
    # Laid out in memory as a file's pixels are: in the renderer's order sums round otherwise.
    picture = np.ascontiguousarray(scenes[:1])
    alone = translator.translate(picture, [None], seed=3, numbers=[number])
    assert np.array_equal(load_image(tmp_path / "out" / "a.png"), alone.images[0])
    assert (row["class"], row["sample"]) == (alone.classes[0], 1)


def test_the_aspect_is_kept(inputs: Path, tmp_path: Path, weights: Path) -> None:
    shapes = {"a": (60, 60), "b": (61, 64), "tall": (300, 91), "wide": (40, 67)}
    for name, (height, width) in shapes.items():
        with Image.open(inputs / f"{name}.png") as image:
            image.resize((width, height)).save(inputs / f"{name}.png")
    report = run([inputs], tmp_path / "model", weights)
    assert [Path(row["file"]).stem for row in report] == sorted(shapes)
    found = {name: load_image(tmp_path / "model" / f"{name}.png").shape[:2] for name in shapes}
    assert found == {"a": (32, 32), "b": (32, 34), "tall": (105, 32), "wide": (32, 54)}
    run([inputs], tmp_path / "keep", weights, size="keep")
    found = {name: load_image(tmp_path / "keep" / f"{name}.png").shape[:2] for name in shapes}
    assert found == shapes
    with pytest.raises(UserError, match="--size huge: choose from model, keep"):
        run([inputs], tmp_path / "huge", weights, size="huge")


def test_a_wide_picture_is_translated_alike_alone_and_among_others(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    run([inputs], tmp_path / "all", weights)
    run([inputs / "wide.png"], tmp_path / "one", weights)
    both = [(tmp_path / name / "wide.png").read_bytes() for name in ("all", "one")]
    assert both[0] == both[1]


def _rotated(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def _animated(image: Image.Image, path: Path) -> None:
    others = [Image.new("RGB", image.size, colour) for colour in ("red", "blue")]
    image.quantize(8).save(path, save_all=True, append_images=others, duration=100)


def _deep(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


FORMATS: dict[str, Callable[[Image.Image, Path], None]] = {
    "rotated.jpg": _rotated,
    "clear.png": lambda image, path: image.convert("RGBA").save(path),
    "ink.jpg": lambda image, path: image.convert("CMYK").save(path),
    "deep.png": _deep,
    "moving.gif": _animated,
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_comes_out_upright_and_whole(name: str, tmp_path: Path, weights: Path) -> None:
    y, x = np.mgrid[0:40, 0:70] / 70
    picture = (np.stack([x, y, 1 - x], -1) * 220 + 20).astype(np.uint8)
    FORMATS[name](Image.fromarray(picture), tmp_path / name)
    run([tmp_path / name], tmp_path / "out", weights, method="identity")
    got = load_image((tmp_path / "out" / name).with_suffix(".png"))
    expected = resize_short(picture, SIZE).astype(int)
    if name == "rotated.jpg":
        expected = np.rot90(expected, k=-1)
    if name == "deep.png":
        grey = np.asarray(Image.fromarray(expected.astype(np.uint8)).convert("L"))
        expected = np.repeat(grey[..., None], 3, -1).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < (25 if name == "moving.gif" else 6)


def test_squares_of_a_rival_are_joined_without_loss(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    run([inputs], tmp_path / "same", weights, method="identity")
    for name in ("wide", "tall", "a"):
        same = load_image(tmp_path / "same" / f"{name}.png")
        assert np.array_equal(same, load_image(inputs / f"{name}.png"))
    run([inputs], tmp_path / "redrawn", weights, method="sdedit")
    assert load_image(tmp_path / "redrawn" / "wide.png").shape == (32, 64, 3)


def test_too_long_a_picture_is_named_before_any_work(
    inputs: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "film.png", np.zeros((20, 80, 3), np.uint8))
    run([tmp_path / "film.png"], tmp_path / "out", weights, method="identity")
    save_image(inputs / "strip.png", np.zeros((81, 20, 3), np.uint8))
    capsys.readouterr()
    given = ["translate", str(inputs), "--out", str(tmp_path / "none"), "--profile", "smoke"]
    assert main([*given, "--weights", str(weights)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "strip.png: 20×81 pixels, longer than 4 times the shorter side: cut it" in line
    assert not (tmp_path / "none").exists()


# ---- several samples ---------------------------------------------------------------------------


def test_samples_differ_and_the_first_is_the_one_there_is_without_others(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    run([inputs], tmp_path / "one", weights, seed=2)
    report = run([inputs], tmp_path / "three", weights, seed=2, samples=3)
    names = ("a", "b", "tall", "wide")
    expected = [f"{n}{k}.png" for n in names for k in ("", "_2", "_3")]
    assert made(tmp_path / "three") == sorted(expected)
    rows = read_jsonl(tmp_path / "three" / "report.jsonl")
    assert rows == report
    kinds = [(Path(row["file"]).stem, row["sample"]) for row in rows]
    assert kinds == [(n, 1) for n in names] + [(n, k) for n in names for k in (2, 3)]
    for name in names:
        first = (tmp_path / "three" / f"{name}.png").read_bytes()
        assert first == (tmp_path / "one" / f"{name}.png").read_bytes()
        others = {(tmp_path / "three" / f"{name}_{k}.png").read_bytes() for k in (2, 3)}
        assert len(others | {first}) == 3


def test_more_samples_are_added_to_those_there(
    inputs: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = [inputs / "a.png", inputs / "wide.png"], tmp_path / "out"
    run(given, out, weights)
    before = {name: (out / name).read_bytes() for name in made(out)}
    report = run(given, out, weights, samples=2)
    assert "2 outputs exist and are kept" in capsys.readouterr().err
    assert [row["sample"] for row in report] == [2, 2]
    assert all((out / name).read_bytes() == data for name, data in before.items())
    assert len(read_jsonl(out / "report.jsonl")) == 4


def test_a_sample_never_takes_the_place_of_another_picture(
    inputs: Path, tmp_path: Path, weights: Path, scenes: np.ndarray
) -> None:
    save_image(inputs / "a_2.png", scenes[3])
    given = [inputs / "a.png", inputs / "a_2.png"]
    with pytest.raises(UserError, match=r"sample 2 of .*a\.png and .*a_2\.png would both become"):
        run(given, tmp_path / "out", weights, samples=2)
    assert not (tmp_path / "out").exists()
    run(given, tmp_path / "out", weights, samples=1)
    assert made(tmp_path / "out") == ["a.png", "a_2.png"]
    save_image(tmp_path / "other" / "b_2.jpg", scenes[1])
    with pytest.raises(UserError, match="would both become"):
        run([inputs / "b.png", tmp_path / "other" / "b_2.jpg"], tmp_path / "no", weights, samples=2)


# ---- killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "overwrite"), [(1, False), (3, False), (3, True)])
def test_what_was_killed_goes_on_and_every_picture_has_its_row(
    inputs: Path,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    overwrite: bool,
) -> None:
    given, options = [inputs / "a.png", inputs / "b.png"], {"samples": 3, "seed": 1}
    run(given, tmp_path / "whole", weights, **options)
    out = tmp_path / "killed"
    if overwrite:
        run(given, out, weights, samples=3, seed=9)
    monkeypatch.setattr(translate, "CHUNK", 2)
    left = after

    def stops(path: Path, picture: np.ndarray) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return save_image(path, picture)

    def rows() -> list[str]:
        names = []
        for row in read_jsonl(out / "report.jsonl"):
            number = "" if row["sample"] == 1 else f"_{row['sample']}"
            names.append(f"{Path(row['file']).stem}{number}.png")
        assert len(set(names)) == len(names)
        return sorted(names)

    monkeypatch.setattr(translate, "save_image", stops)
    with pytest.raises(KeyboardInterrupt):
        run(given, out, weights, overwrite=overwrite, **options)
    assert len(made(out)) == (6 if overwrite else after)
    assert set(made(out)) <= set(rows())
    monkeypatch.setattr(translate, "save_image", save_image)
    report = run(given, out, weights, overwrite=overwrite, **options)
    assert len(report) == (6 if overwrite else 6 - after)
    assert rows() == made(out) == made(tmp_path / "whole")
    for name in made(out):
        both = [load_image(folder / name).astype(int) for folder in (out, tmp_path / "whole")]
        assert np.abs(both[0] - both[1]).max() <= 1


# ---- rivals ------------------------------------------------------------------------------------


def test_a_rival_is_found_once_and_translates_squares_and_wide_pictures(
    inputs: Path,
    tmp_path: Path,
    weights: Path,
    fresh_runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run([inputs], tmp_path / "out", weights, method="ilvr", seed=2)
    said = [line for line in capsys.readouterr().err.splitlines() if "ILVR" in line]
    assert len(said) == 1 and "the translator's own denoiser" in said[0]
    assert load_image(tmp_path / "out" / "tall.png").shape == (64, 32, 3)
    # A square comes out as it does alone, but for where a batch of another size sums in another
    # order and a value lies on the edge between two levels.
    run([inputs / "a.png"], tmp_path / "one", weights, method="ilvr", seed=2)
    both = [load_image(tmp_path / name / "a.png").astype(int) for name in ("out", "one")]
    apart = np.abs(both[0] - both[1])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.002
    run([inputs / "a.png"], tmp_path / "ours", weights, seed=2)
    ours = load_image(tmp_path / "ours" / "a.png").astype(int)
    assert (np.abs(ours - both[0]) > 1).mean() > 0.5


def test_an_unknown_rival_is_told_all_names(inputs: Path, tmp_path: Path, weights: Path) -> None:
    with pytest.raises(UserError, match=r"choose from ours, identity, .*, egsde, cut, cyclegan"):
        run([inputs], tmp_path / "out", weights, method="magic")
    assert not (tmp_path / "out").exists()
