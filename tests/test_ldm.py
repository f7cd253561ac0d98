"""Stage 04: latents with their conditions, training that resumes, samples, the finished stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from tomjerry_utils import (
    UserError,
    blip,
    finishing,
    ldm,
    processes,
    scenes,
    structure,
    training,
)
from tomjerry_utils.autoencoder import load_autoencoder
from tomjerry_utils.denoiser import NO_CLASS, Conditioner, make_scheduler
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import model_source, read_json, read_jsonl, read_provenance
from tomjerry_utils.scenes import LABELS

SMOKE = load_profile("smoke")
TEXTS = ["a cat is sitting on the beach, facing left"] * 3 + ["a mouse is running", "", "a cat"]


@pytest.fixture(scope="module")
def made() -> ldm.LatentSet:
    """Six cartoons as a denoiser sees them, by models of random weights."""
    images = tiny.pictures("cartoon", 6)
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16)).eval()
    describer = blip.create_tiny(scenes.vocabulary(), image_size=32, hidden_size=tiny.TEXT_DIM)
    data, _ = ldm.latent_set(
        images, ["tom", "jerry", None, "tom_jerry", "cat", "cat_mouse"], TEXTS,
        vae=tiny.tiny_vae(images), net=net, describer=describer, tone=None,
        files=[f"{i}.png" for i in range(6)],
    )  # fmt: skip
    return data


def models(seed: int = 0) -> tuple[UNet2DConditionModel, Conditioner]:
    torch.manual_seed(seed)
    unet = tiny.tiny_unet(4 + structure.VIEW_CHANNELS, 4)
    return unet, Conditioner(text_dim=tiny.TEXT_DIM, dim=32)


def test_a_latent_set_holds_everything_a_denoiser_is_told(made: ldm.LatentSet) -> None:
    assert len(made) == 6
    assert made.latents.shape == (6, 4, 8, 8)
    assert made.views.shape == (6, structure.VIEW_CHANNELS, 8, 8)
    assert made.labels.tolist() == [0, 1, NO_CLASS, 2, 3, 5]
    # Coats and tones are standardised over the set itself.
    assert made.views[:, structure.MAPS :].float().mean((0, 2, 3)).abs().max() < 1e-2
    # Four different captions, kept once each, in their pictures' order.
    assert made.table.shape == (4, ldm.TEXT_LENGTH, tiny.TEXT_DIM)
    assert [made.texts[i] for i in made.row] == TEXTS
    batch = made.batch(torch.tensor([4, 0]))
    assert torch.equal(batch.latents, made.latents[[4, 0]])
    assert torch.equal(batch.text[1], made.table[made.row[0]])
    assert batch.view.dtype == torch.float32


def test_a_latent_set_survives_the_disk_and_joins(made: ldm.LatentSet, tmp_path: Path) -> None:
    made.save(tmp_path / "set.safetensors")
    back = ldm.LatentSet.load(tmp_path / "set.safetensors")
    assert back.files == made.files
    assert torch.equal(back.latents, made.latents)
    assert torch.equal(back.views, made.views)
    both = ldm.join([made, back])
    assert len(both) == 12
    assert [both.texts[i] for i in both.row] == TEXTS * 2
    first, second = both.batch(torch.tensor([3])), both.batch(torch.tensor([9]))
    assert torch.equal(first.text, second.text)
    assert torch.equal(first.latents, second.latents)


def test_given_tones_are_used_instead_of_measured() -> None:
    images = tiny.pictures("cartoon", 3)
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16)).eval()
    describer = blip.create_tiny(scenes.vocabulary(), image_size=32, hidden_size=32)
    parts = {"vae": tiny.tiny_vae(images), "net": net, "describer": describer}
    colours = structure.COATS + 3
    tone = ([0.5] * colours, [0.1] * colours)
    given, used = ldm.latent_set(images, [None] * 3, [""] * 3, tone=tone, **parts)
    own, measured = ldm.latent_set(images, [None] * 3, [""] * 3, tone=None, **parts)
    assert used == tone != measured
    assert not torch.allclose(given.views, own.views)


def test_mirrored_text_swaps_sides() -> None:
    text = "a cat is running on the street, facing left"
    assert ldm.mirrored_text(text) == "a cat is running on the street, facing right"
    assert ldm.mirrored_text(ldm.mirrored_text(text)) == text


def train(
    made: ldm.LatentSet, folder: Path, profile: Profile = SMOKE
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    unet, conditioner = models()
    result = ldm.train_denoiser(
        unet, conditioner, made, make_scheduler("sample"), profile,
        folder=folder, steps=6, batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    return unet.state_dict(), result.history


def test_a_killed_training_ends_as_an_uninterrupted_one(
    made: ldm.LatentSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, history = train(made, tmp_path / "whole")
    assert history[-1]["step"] == 6
    real, calls = ldm.denoising_loss, []

    def killed(*given: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **options)  # type: ignore[arg-type]

    often = SMOKE.model_copy(update={"checkpoint_every_s": 1e-6})
    monkeypatch.setattr(ldm, "denoising_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(made, tmp_path / "killed", often)
    monkeypatch.setattr(ldm, "denoising_loss", real)
    resumed, again = train(made, tmp_path / "killed", often)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    # Finished, it returns at once.
    monkeypatch.setattr(ldm, "denoising_loss", None)
    kept, _ = train(made, tmp_path / "whole")
    assert all(torch.equal(whole[name], kept[name]) for name in whole)


def test_another_seed_trains_another_model(made: ldm.LatentSet, tmp_path: Path) -> None:
    one, _ = train(made, tmp_path / "a")
    two, _ = train(made, tmp_path / "b", load_profile("smoke", seed=1))
    assert not torch.allclose(one["conv_in.weight"], two["conv_in.weight"])


def test_samples_are_told_their_class_and_nothing_else(made: ldm.LatentSet) -> None:
    unet, conditioner = models()
    vae = tiny.tiny_vae(tiny.pictures("cartoon", 6))

    def draw(seed: int = 0) -> dict[str, np.ndarray]:
        profile = load_profile("smoke", seed=seed)
        return ldm.sample_classes(
            unet.eval(), conditioner.eval(), vae, made, make_scheduler("sample"), profile
        )

    drawn = draw()
    assert tuple(drawn) == LABELS
    assert all(v.shape == (2, 32, 32, 3) and v.dtype == np.uint8 for v in drawn.values())
    again = draw()
    assert all(np.array_equal(drawn[label], again[label]) for label in LABELS)
    assert not np.array_equal(drawn["cat"], draw(1)["cat"])
    # What the first picture's own caption and view are does not matter.
    other = ldm.LatentSet(**{**vars(made), "table": made.table + 1, "views": made.views + 1})
    told = ldm.sample_classes(
        unet, conditioner, vae, other, make_scheduler("sample"), load_profile("smoke", seed=0)
    )
    assert all(np.array_equal(drawn[label], told[label]) for label in LABELS)


# ---- the stage, at smoke, from the shipped foundation models -----------------------------------


@pytest.fixture(scope="module")
def run() -> ldm.LdmRun:
    return ldm.ensure(SMOKE)


def test_the_stage_leaves_what_the_next_ones_read(run: ldm.LdmRun) -> None:
    expected = {
        "autoencoder",
        "denoiser",
        "finished",
        "samples",
        "free",
        "cartoon.safetensors",
        "provenance.json",
    }
    assert expected <= {path.name for path in run.folder.iterdir()}
    assert set(run.samples) == set(run.free) == set(LABELS)
    assert run.posed.shape == run.natural.views.shape
    assert {LABELS[i] for i in run.cartoon.labels.tolist()} == {"tom", "jerry", "tom_jerry"}
    assert {LABELS[i] for i in run.natural.labels.tolist()} == {"cat", "mouse", "cat_mouse"}
    # Captions are mapped to natural words, so that both domains share them.
    assert not any("tom" in text.split() for text in run.cartoon.texts)
    assert [row["step"] for row in run.history][-1] == SMOKE.ldm.steps
    assert [row["step"] for row in run.autoencoder_history][-1] == SMOKE.ldm.autoencoder_steps
    tone = run.conditioner.config.tone_mean
    assert set(tone) == {"cartoon", "natural"}
    record = read_provenance(run.folder)
    assert record["key"] == run.key
    assert record["extra"]["loss"] == run.history[-1]["loss"]


def test_only_the_decoder_is_tuned(run: ldm.LdmRun) -> None:
    came = load_autoencoder(model_source(SMOKE.ldm.autoencoder))
    before, after = came.state_dict(), run.vae.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert run.vae.config.latents_std == came.config.latents_std
    # So natural latents are still what the denoiser knows.
    assert run.natural.latents.mean((0, 2, 3)).abs().max() < 0.5
    assert run.natural.latents.std((0, 2, 3)).max() < 2


def test_its_models_are_plain_diffusers_models(run: ldm.LdmRun) -> None:
    unet = UNet2DConditionModel.from_pretrained(run.folder / "denoiser" / "unet")
    vae = AutoencoderKL.from_pretrained(run.folder / "autoencoder")
    assert unet.config.in_channels == run.unet.config.in_channels
    assert vae.config.latents_mean == run.vae.config.latents_mean
    scheduler = read_json(run.folder / "denoiser" / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == "sample"


def test_a_finished_stage_is_only_read(run: ldm.LdmRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm, "train", None)
    again = ldm.ensure(SMOKE)
    assert again.key == run.key
    assert torch.equal(again.natural.latents, run.natural.latents)
    assert np.array_equal(again.samples["cat"], run.samples["cat"])


def test_what_it_was_made_from_is_in_its_key(run: ldm.LdmRun) -> None:
    inputs = read_provenance(run.folder)["inputs"]
    nets = {"structure", "posture", "perceptual", "autoencoder", "denoiser"}
    assert {"captions", "manifest", *nets} <= set(inputs)


# ---- several processes -------------------------------------------------------------------------


def upstream(run: ldm.LdmRun, runs: Path) -> Path:
    """A run root with the stages before this one, as the session made them."""
    for stage in run.folder.parent.glob("0[123]_*"):
        if stage.is_dir():
            shutil.copytree(stage, runs / SMOKE.name / stage.name)
    return runs


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": value
        for path in folder.rglob("diffusion_pytorch_model.safetensors")
        for name, value in load_file(path).items()
    }


def contents(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_make_the_stage_of_one_with_batches_twice_as_large(
    run: ldm.LdmRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parent.parent
    launched = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         "--main_process_port", tiny.free_port(), str(root / "scripts" / "stage.py"), "04",
         "--profile", SMOKE.name],
        env={**os.environ, "TOMJERRY_RUNS": str(upstream(run, tmp_path / "two")),
             "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    monkeypatch.setenv("TOMJERRY_RUNS", str(upstream(run, tmp_path / "one")))

    def averaging_two(*args: Any, **options: Any) -> training.TrainResult:
        return training.train(*args, **{**options, "accumulation": 2})

    for module in (ldm, finishing):
        monkeypatch.setattr(module, "train", averaging_two)
    one = ldm.ensure(SMOKE)
    _, errors = launched.communicate(timeout=900)
    assert launched.returncode == 0, errors

    two = tmp_path / "two" / SMOKE.name / ldm.STAGE
    assert read_provenance(two)["key"] == one.key == run.key
    # The main process alone wrote, and wrote the same files.
    assert contents(two) - {"provenance.json"} == contents(one.folder) - {"provenance.json"}
    assert len(read_json(two / "tones.json")) == 2
    history = read_jsonl(two / "denoiser_training" / "history.jsonl")
    # The loss that is logged is the main process's own; the steps are everyone's.
    assert [row["step"] for row in history] == [row["step"] for row in one.history]
    made, doubled, single = weights(two), weights(one.folder), weights(run.folder)
    assert set(made) == set(doubled) == set(single)
    gaps = {name: float((made[name] - doubled[name]).abs().max()) for name in made}
    assert max(gaps.values()) < 1e-5
    # Control: one process with one batch a step goes elsewhere.
    assert max(float((made[name] - single[name]).abs().max()) for name in made) > 1e-4
    with np.load(two / "samples.npz") as stored:
        for label in LABELS:
            away = np.abs(stored[label].astype(int) - one.samples[label])
            assert away.max() <= 2, label


def test_several_processes_need_the_stages_before(
    fresh_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="tomjerry course"):
        ldm.ensure(SMOKE)
    assert "TOMJERRY_NO_TRAINING" not in os.environ
    assert not any(fresh_runs.rglob("*.png"))


def test_alone_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert processes.count() == 1 and processes.is_main()
    processes.wait_for_all("cpu")
    with processes.main_first("cpu"), processes.only_finished():
        assert "TOMJERRY_NO_TRAINING" not in os.environ
