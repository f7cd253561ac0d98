"""The dial from realistic to faithful: its mapping, its end points, what it does to pictures."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from tomjerry_utils import UserError, features, panorama, sampling, structure
from tomjerry_utils.autoencoder import encode_all
from tomjerry_utils.cli import main
from tomjerry_utils.denoiser import make_scheduler
from tomjerry_utils.faithfulness import NATURAL, Dial
from tomjerry_utils.images import load_image, save_image
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import foundation_root, read_jsonl
from tomjerry_utils.scenes import RANGES
from tomjerry_utils.structure import COATS, MAPS
from tomjerry_utils.translate import translate_files
from tomjerry_utils.translator import Translator, load_translator, noise_for

MINI, SMOKE = load_profile("mini"), load_profile("smoke")
GRID = (4 * 2, 4 * 2)  # latents of tiny pictures


@pytest.fixture(scope="module")
def translator() -> Translator:
    return tiny.tiny_translator()


@pytest.fixture(scope="module")
def weights(translator: Translator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_translator(translator, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def cartoons() -> np.ndarray:
    return np.ascontiguousarray(tiny.pictures("cartoon", 4))


@pytest.fixture(scope="module")
def shipped() -> Translator:
    return load_translator(foundation_root() / "translator", MINI)


# ---- the mapping -------------------------------------------------------------------------------


def test_nothing_falls_back_as_the_dial_is_turned() -> None:
    dials = [Dial.at(i / 200) for i in range(201)]
    assert dials[0] == Dial.at(None) == NATURAL == Dial(0, 0, 0, 1)
    for before, after in pairwise(dials):
        assert before.keypoints <= after.keypoints
        assert before.shapes <= after.shapes
        assert before.colours <= after.colours
        assert before.strength >= after.strength
        assert before != after  # no part of the way is idle
    last = dials[-1]
    assert last.keypoints == last.shapes == last.colours == 1
    assert 0 < last.strength < 0.5


@pytest.mark.parametrize("finished", [None, 8])
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_it_begins_from_ever_less_noise(steps: int, finished: int | None) -> None:
    scheduler, batch = make_scheduler("sample"), tiny.random_batch(1)
    assert Dial.at(0).begin(steps) == (steps, 1.0)
    seen: list[int] = []

    def watched(unet: object, writer: object, noisy: Tensor, times: Tensor, *_: object) -> Tensor:
        seen.append(int(times[0]))
        return noisy

    levels = []
    for f in np.linspace(0.02, 1, 25):
        dial = Dial.at(f)
        length, strength = dial.begin(steps)
        with mock.patch.object(sampling, "predict", watched):
            sampling.sample(
                None, None, batch, scheduler, steps=length, guidance_scale=1.0, strength=strength,
                start=batch.latents, generator=torch.Generator(), finished=finished,
            )  # type: ignore[arg-type]  # fmt: skip
        levels.append((seen[0] + 1) / 1000)
        assert abs(levels[-1] - dial.strength) <= 0.07  # half a step of eight
        seen.clear()
    assert all(before >= after for before, after in pairwise(levels))
    assert levels[0] >= 0.98 and levels[-1] < 0.2


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan, math.inf])
def test_what_is_no_share_is_refused(translator: Translator, wrong: float) -> None:
    with pytest.raises(UserError, match=r"faithfulness .*: give a number from 0 \(realistic\) to"):
        translator.translate(tiny.pictures("cartoon", 1), faithfulness=wrong)


# ---- what the denoiser is told -----------------------------------------------------------------


def as_before(model: Translator, images: np.ndarray) -> Tensor:
    """The view as it was made before there was a dial."""
    pictures, config = torch.from_numpy(images), model.conditioner.config
    views, maps = structure.look(model.net, pictures, GRID)
    views = structure.standardise(views, config.tone_mean["cartoon"], config.tone_std["cartoon"])
    told = model.conditions(images, None)
    assert model.wardrobe is not None and model.posture is not None
    seeds = [1_000_003 + number for number in range(len(images))]
    views = structure.wear(views, [model.wardrobe[name] for name in told.classes], seeds)
    actions: list[str | None] = [None] * len(images)
    return structure.reshape(views, model.posture.pose(pictures, maps, told.classes, actions))


def test_left_alone_and_at_0_it_changes_nothing(
    translator: Translator, cartoons: np.ndarray
) -> None:
    expected = as_before(translator, cartoons)
    for dial in (NATURAL, Dial.at(0)):
        view = translator.conditions(cartoons, None, dial=dial).batch.view
        assert torch.equal(view, expected)
    plain, zero, little = (
        translator.translate(cartoons, seed=3, faithfulness=f).images for f in (None, 0.0, 0.05)
    )
    assert np.array_equal(plain, zero) and not np.array_equal(plain, little)


def test_at_1_the_denoiser_is_told_the_drawing_as_it_is(
    translator: Translator, cartoons: np.ndarray
) -> None:
    own, _ = structure.look(translator.net, torch.from_numpy(cartoons), GRID)
    config = translator.conditioner.config
    own = structure.standardise(own, config.tone_mean["natural"], config.tone_std["natural"])
    first = translator.conditions(cartoons, None, seed=0, dial=Dial.at(1)).batch.view
    assert torch.equal(first, own)
    # Without a wardrobe's draw, nothing of the view is left to the seed.
    other = translator.conditions(cartoons, None, seed=1, dial=Dial.at(1)).batch.view
    assert torch.equal(first, other)
    views = [translator.conditions(cartoons, None, dial=Dial.at(f)).batch.view for f in (0, 0.5)]
    for part in (slice(MAPS), slice(MAPS, MAPS + COATS), slice(-3, None)):
        far, half = (float((v[:, part] - own[:, part]).abs().mean()) for v in views)
        assert 0 < half < far or (far == half == 0)


def test_keypoints_go_back_to_where_they_are_drawn(
    shipped: Translator, validation: np.ndarray
) -> None:
    posture, pictures = shipped.posture, torch.from_numpy(validation)
    assert posture is not None
    told = shipped.conditions(validation, None)
    maps = structure.look(shipped.net, pictures, (16, 16))[1]
    drawn = posture.pose(pictures, maps, told.classes)  # not aligned at all
    gaps = []
    for back in (0.0, 0.5, 1.0):
        posed = posture.pose(pictures, maps, told.classes, [None] * len(maps), drawn=back)
        gaps.append(float((posed - drawn).abs().mean()))
    assert gaps[0] > 1.3 * gaps[1] > 0 and gaps[2] < 1e-5


# ---- what it does to pictures ------------------------------------------------------------------


@pytest.fixture(scope="module")
def validation() -> np.ndarray:
    first = RANGES["validation"][0]
    return np.ascontiguousarray(tiny.pictures("cartoon", 5, size=64, first=first))


def test_the_distance_to_the_source_falls(shipped: Translator, validation: np.ndarray) -> None:
    away = [
        features.perceptual_distance(
            shipped.translate(validation, steps=4, faithfulness=f).images, validation
        ).mean()
        for f in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(after < 0.97 * before for before, after in pairwise(away)), away
    assert away[-1] < 0.6 * away[0]


def test_it_falls_in_a_wide_picture_too(shipped: Translator, validation: np.ndarray) -> None:
    wide = np.concatenate([validation[0], validation[1][:, :32]], 1)
    layout = panorama.lay_out(shipped, wide)
    made = [
        panorama.translate(shipped, wide, layout, layout.cls, steps=4, faithfulness=f)
        for f in (None, 0.0, 0.5, 1.0)
    ]
    assert np.array_equal(made[0], made[1])
    away = [float(features.perceptual_distance(x[None], wide[None])[0]) for x in made[1:]]
    assert all(after < 0.95 * before for before, after in pairwise(away)), away


def test_a_wide_picture_begins_from_its_own_noised_latents(
    translator: Translator, cartoons: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = np.concatenate([cartoons[0], cartoons[1][:, :16]], 1)
    layout = panorama.lay_out(translator, wide)
    seen: list[dict[str, Tensor]] = []
    real = panorama.sample

    def watched(*given: object, **options: Tensor) -> Tensor:
        seen.append(options)
        return real(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(panorama, "sample", watched)
    for f in (None, 1.0):
        panorama.translate(translator, wide, layout, "tom", number=7, faithfulness=f)
    assert seen[0]["start"] is None
    own = encode_all(translator.vae, torch.from_numpy(wide)[None])
    assert torch.equal(seen[1]["start"], layout.cut(own[0]))
    # Squares share one field of noise, so what they begin from agrees where they overlap.
    field = noise_for(own.shape[1:], 0, [7])[0]
    assert torch.equal(seen[1]["noise"], layout.cut(field))


# ---- the command line --------------------------------------------------------------------------


def test_it_goes_with_samples_and_any_size(
    weights: Path, cartoons: np.ndarray, tmp_path: Path
) -> None:
    for name, picture in (
        ("square", cartoons[0]),
        ("wide", np.concatenate(list(cartoons[1:3]), 1)),
        ("tall", np.concatenate([cartoons[3], cartoons[3][:9]], 0)),
    ):
        save_image(tmp_path / "in" / f"{name}.png", picture.repeat(2, 0).repeat(2, 1))
    given = ["translate", str(tmp_path / "in"), "--weights", str(weights), "--profile", "smoke"]
    given += ["--samples", "2", "--size", "keep"]
    for out, more in (
        ("plain", []),
        ("zero", ["--faithfulness", "0"]),
        ("half", ["--faithfulness", "0.5"]),
    ):
        assert main([*given, "--out", str(tmp_path / out), *more]) == 0
    names = sorted(path.name for path in (tmp_path / "plain").glob("*.png"))
    assert names == sorted(f"{n}{k}.png" for n in ("square", "tall", "wide") for k in ("", "_2"))
    for name in names:
        plain, zero, half = (
            (tmp_path / out / name).read_bytes() for out in ("plain", "zero", "half")
        )
        assert plain == zero != half
    shapes = [load_image(tmp_path / "half" / f"{n}.png").shape for n in ("square", "tall", "wide")]
    assert shapes == [(64, 64, 3), (82, 64, 3), (64, 128, 3)]
    for name in ("square", "tall", "wide"):
        first, second = ((tmp_path / "half" / f"{name}{k}.png").read_bytes() for k in ("", "_2"))
        assert first != second
    rows = {out: read_jsonl(tmp_path / out / "report.jsonl") for out in ("plain", "half")}
    assert [row["faithfulness"] for row in rows["half"]] == [0.5] * 6
    assert not any("faithfulness" in row for row in rows["plain"])


def test_a_faithful_picture_comes_out_alike_alone_and_among_others(
    weights: Path, cartoons: np.ndarray, tmp_path: Path
) -> None:
    for i, picture in enumerate(cartoons[:2]):
        save_image(tmp_path / "in" / f"{i}.png", picture)
    options = {"profile": SMOKE, "weights": weights, "faithfulness": 0.8}
    translate_files([tmp_path / "in"], tmp_path / "all", **options)
    translate_files([tmp_path / "in" / "1.png"], tmp_path / "one", **options)
    both = [load_image(tmp_path / name / "1.png").astype(int) for name in ("all", "one")]
    assert np.abs(both[0] - both[1]).max() <= 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["1.01"], "--faithfulness: '1.01': give a number from 0 to 1"),
        (["nan"], "--faithfulness: 'nan': give a number from 0 to 1"),
        (["much"], "--faithfulness: 'much': give a number from 0 to 1"),
        (["0.5", "--method", "sdedit"], "--faithfulness turns our own method alone"),
        (["0", "--method", "identity"], "leave it or --method identity out"),
    ],
)
def test_mistakes_are_told_before_any_work(
    given: list[str], told: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    start = ["translate", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    rest = ["--weights", str(weights), "--profile", "smoke"]
    assert main([*start, *rest, "--faithfulness", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tomjerry: error: ") and told in line
    assert not (tmp_path / "out").exists()
