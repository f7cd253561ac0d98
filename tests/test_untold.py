"""Ours, told nothing: views from pixels alone, alike in both domains, and a model of its own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import tomjerry_utils
from tomjerry_utils import scenes, untold
from tomjerry_utils.autoencoder import encode_all
from tomjerry_utils.profiles import load_profile

GRID = (16, 16)
SETS = {"cartoon": 40, "natural": 40}


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    return {style: tiny.pictures(style, count, size=64) for style, count in SETS.items()}


@pytest.fixture(scope="module")
def views(pictures: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {style: untold.look(images, GRID) for style, images in pictures.items()}


def fit(folder: Path, count: int, *, seconds: float) -> tuple[untold.Untold, np.ndarray]:
    """A model trained on a few pictures, and the natural ones."""
    cartoon, natural = (tiny.pictures(style, count) for style in ("cartoon", "natural"))
    vae, profile = tiny.tiny_vae(natural), load_profile("smoke")
    made, _ = untold.fit(cartoon, natural, vae, profile, folder=folder, seconds=seconds)
    return made, natural


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> untold.Untold:
    """As it is before its first step: its knobs turn all the same."""
    return fit(tmp_path_factory.mktemp("untold"), 6, seconds=0.0)[0]


def maps_of(views: Tensor) -> Tensor:
    return F.pixel_shuffle(views[:, : untold.MAPS], 2)


# ---- told nothing ------------------------------------------------------------------------------


def test_no_net_that_was_told_something_is_named() -> None:
    path = Path(tomjerry_utils.__file__).parent / "untold.py"
    named = {
        part
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        for part in name.split(".")
    }
    told = {"structure", "posture", "blip", "captions", "Conditioner", "judges", "scenes", "ldm"}
    assert "sampling" in named and not named & told


# ---- the view ----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", scenes.STYLES)
def test_the_figure_is_where_an_animal_is(style: str) -> None:
    data = tiny.truth(style, 12)
    images = ((data["images"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    seen = maps_of(untold.look(images, GRID))[:, 0]
    animal = 1 - F.avg_pool2d(data["maps"][:, : scenes.PARTS.index("torso")].sum(1), 2)
    inside, outside = (float((seen * w).sum() / w.sum()) for w in (animal, 1 - animal))
    assert inside > 2 * outside


def test_maps_are_the_same_in_any_colours_and_contrast(pictures: dict[str, np.ndarray]) -> None:
    images = pictures["cartoon"][:6]
    plain = maps_of(untold.look(images, GRID))
    swapped = maps_of(untold.look(np.ascontiguousarray(images[..., ::-1]), GRID))
    assert torch.allclose(plain, swapped, atol=1e-5)
    faint = maps_of(untold.look((images.astype(float) * 0.5 + 40).astype(np.uint8), GRID))
    assert float((plain - faint).abs().mean()) < 0.05
    other = maps_of(untold.look(images[::-1].copy(), GRID))
    assert float((plain - other).abs().mean()) > 0.2


def test_a_cartoons_maps_get_natural_levels(views: dict[str, Tensor]) -> None:
    statistics = untold.Statistics.measure(views["cartoon"], views["natural"])
    ready = {style: statistics.standardise(seen, style) for style, seen in views.items()}
    left = statistics.standardise(views["cartoon"], "natural")  # as they came
    shares = torch.linspace(0.05, 0.95, 19)

    def apart(cartoon: Tensor) -> Tensor:
        a, b = (maps_of(v).transpose(0, 1).flatten(1)[:, ::7] for v in (cartoon, ready["natural"]))
        return (a.quantile(shares, dim=1) - b.quantile(shares, dim=1)).abs().mean(0)

    assert bool((apart(ready["cartoon"]) < 0.03).all())
    assert bool((apart(left) > 2 * apart(ready["cartoon"])).any())
    for seen in ready.values():
        coats_and_tones = seen[:, untold.MAPS :]
        assert torch.allclose(coats_and_tones.mean((0, 2, 3)), torch.zeros(9), atol=1e-3)
        assert torch.allclose(coats_and_tones.std((0, 2, 3)), torch.ones(9), atol=1e-3)


def test_statistics_survive_a_file(views: dict[str, Tensor]) -> None:
    statistics = untold.Statistics.measure(views["cartoon"], views["natural"])
    again = untold.Statistics.from_tensors(statistics.tensors())
    for style, seen in views.items():
        assert torch.equal(again.standardise(seen, style), statistics.standardise(seen, style))


def test_each_picture_is_blurred_by_its_own_deviation() -> None:
    maps = torch.zeros(3, 2, 21, 21)
    maps[:, :, 10, 10] = 1
    deviations = torch.tensor([0.0, 0.7, 2.0])
    found = untold.blur(maps, deviations)
    assert torch.allclose(found[0], maps[0], atol=1e-6)
    places = torch.arange(21.0) - 10
    for one, deviation in zip(found[1:], deviations[1:], strict=True):
        assert torch.allclose(one.sum((1, 2)), torch.ones(2), atol=1e-4)
        spread = (one.sum(1) * places.square()).sum(1).sqrt()
        assert torch.allclose(spread, deviation.expand(2), rtol=0.1)
    alone = untold.blur(maps[2:], 2.0)
    assert torch.allclose(found[2:], alone, atol=1e-6)


def test_a_coat_is_one_of_the_nearest_in_tone() -> None:
    generator = torch.Generator().manual_seed(0)
    wardrobe = torch.randn(200, untold.COAT + 3, generator=generator)
    views = torch.randn(2, untold.VIEW_CHANNELS, 4, 4, generator=generator)
    worn = untold.wear(views, wardrobe, [3, 4])
    coat = slice(untold.MAPS, untold.MAPS + untold.COAT)
    for view, old in zip(worn, views, strict=True):
        away = (wardrobe[:, untold.COAT :] - old[-3:].mean((1, 2))).square().sum(1)
        which = (wardrobe[:, : untold.COAT] == view[coat, 0, 0]).all(1).nonzero().item()
        assert which in away.argsort()[: untold.NEIGHBOURS].tolist()
        assert torch.equal(view[coat], view[coat, :1, :1].expand(-1, 4, 4))
        assert torch.equal(view[: untold.MAPS], old[: untold.MAPS])
    assert torch.equal(worn[:, coat], untold.wear(views, wardrobe, [3, 4])[:, coat])


# ---- the model ---------------------------------------------------------------------------------


def own_to_other(made: untold.Untold, natural: np.ndarray) -> float:
    """The error of drawing pictures from pure noise by their own views, over that by others'."""
    seen = made.statistics.standardise(untold.look(natural, (8, 8)), "natural")
    wanted = encode_all(made.vae, torch.from_numpy(natural))
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, other = (
            float((made.unet(torch.cat([noise, v], 1), 999).sample - wanted).square().mean())
            for v in (seen, seen.roll(1, 0))
        )
    return own / other


def test_it_learns_to_draw_by_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_to_other(*fit(tmp_path / "before", 4, seconds=0.0)) > 0.95
    monkeypatch.setattr(untold, "_NO_END", untold.WARMUP_STEPS + 20)
    assert own_to_other(*fit(tmp_path / "after", 4, seconds=1e9)) < 0.8


def test_a_picture_does_not_depend_on_its_company(model: untold.Untold) -> None:
    cartoons = tiny.pictures("cartoon", 5)
    options: dict[str, Any] = {
        "seed": 1,
        "steps": 2,
        "blur": 0.5,
        "guidance_scale": 2.0,
        "grain": 0.01,
    }
    whole = model.translate(cartoons, **options)
    assert whole.shape == cartoons.shape and whole.dtype == np.uint8
    alone = model.translate(cartoons[3:4], numbers=[3], **options)
    assert np.abs(alone[0].astype(int) - whole[3]).max() <= 2
    other = model.translate(cartoons[3:4], numbers=[4], **options)
    assert np.abs(other[0].astype(int) - whole[3]).max() > 2


@pytest.mark.parametrize("change", [{"blur": 1.0}, {"guidance_scale": 3.0}, {"steps": 3}])
def test_each_knob_turns(model: untold.Untold, change: dict[str, float]) -> None:
    cartoons = tiny.pictures("cartoon", 2)
    options: dict[str, Any] = {"seed": 0, "steps": 2}
    plain = model.translate(cartoons, **options)
    assert not np.array_equal(plain, model.translate(cartoons, **{**options, **change}))


def test_what_is_saved_draws_the_same(model: untold.Untold, tmp_path: Path) -> None:
    model.save(tmp_path / "made")
    again = untold.load(tmp_path / "made", model.vae, model.scheduler.config.prediction_type)
    cartoons = tiny.pictures("cartoon", 3)
    options: dict[str, Any] = {"seed": 0, "steps": 2}
    assert np.array_equal(
        model.translate(cartoons, **options), again.translate(cartoons, **options)
    )
