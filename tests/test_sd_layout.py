"""Stages 04 and 05 from a folder laid out as Stable Diffusion 1.5: whole, by LoRA, in parts."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tomjerry_utils import UserError, adapters, blip, collect, ldm, structure, transfer
from tomjerry_utils import denoiser as dn
from tomjerry_utils.autoencoder import decode, encode, factor_of, load_autoencoder
from tomjerry_utils.profiles import FOLDER, Profile, load_profile
from tomjerry_utils.training import apply_ema, train

WIDE = 48  # of the cross-attention; 768 in Stable Diffusion 1.5
INPUTS = 4 + structure.VIEW_CHANNELS

# The configuration files as they come with stable-diffusion-v1-5; only numbers that make a model
# large are small here, and what they leave to diffusers' defaults is left to them.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,  # the number of heads, whatever its name says
    "block_out_channels": [32, 64, 64, 64],
    "center_input_sample": False,
    "cross_attention_dim": WIDE,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion 1.5 of few parameters and random weights, in its own layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "unet": (UNet2DConditionModel.from_config(UNET), UNET),
            "vae": (AutoencoderKL.from_config(VAE), VAE),
        }
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64, hidden_size=WIDE, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, projection_dim=WIDE,
                bos_token_id=0,
                eos_token_id=1,
            )
        )  # fmt: skip
    for name, (model, config) in parts.items():
        model.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    text.save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("hub") / "stable-diffusion")


def loaded(sd: Path, *, text_dim: int = tiny.TEXT_DIM) -> tuple[Any, dn.Conditioner]:
    """The UNet with inputs for the view and a conditioner of BLIP's width, as stage 04 has them."""
    unet, conditioner = dn.load_denoiser(sd, "unet", text_dim=text_dim)
    dn.widen(unet, INPUTS)
    return unet, conditioner


def sd_batch(count: int = 2, size: int = 8) -> dn.Batch:
    return tiny.random_batch(count, view_channels=structure.VIEW_CHANNELS, size=size)


# ---- what comes out of the folder --------------------------------------------------------------


def test_the_autoencoder_shrinks_eightfold_and_scales_as_it_says(sd: Path) -> None:
    vae = load_autoencoder(sd, "vae")
    plain = AutoencoderKL.from_pretrained(sd / "vae").eval()
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, images)
        wanted = plain.encode(images).latent_dist.mode() * 0.18215
        assert factor_of(vae) == 8
        assert latents.shape == (2, 4, 4, 6)
        assert torch.allclose(latents, wanted, atol=1e-6)
        back = plain.decode(latents / 0.18215).sample
        assert torch.allclose(decode(vae, latents), back, atol=1e-5)
    assert next(vae.parameters()).dtype == torch.float32


def test_the_denoiser_keeps_what_it_knows_and_is_told_ours(sd: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(sd / "unet").eval()
    unet, conditioner = loaded(sd)
    assert plain.config.in_channels == 4
    assert unet.config.in_channels == INPUTS
    assert conditioner.config.dim == WIDE
    assert conditioner.config.text_dim == tiny.TEXT_DIM != WIDE
    batch = sd_batch()
    with torch.no_grad():
        tokens, mask = conditioner(batch.labels, batch.text, batch.mask)
        assert tokens.shape == (2, 7, WIDE)
        steps = torch.tensor([10, 500])
        got = dn.predict(unet.eval(), conditioner, batch.latents, steps, batch)
        wanted = plain(
            batch.latents, steps, tokens, encoder_attention_mask=mask.bool()
        ).sample  # the view's inputs start at zero
        assert torch.allclose(got, wanted, atol=1e-6)
        # The class and the caption get through to it.
        for change in ("labels", "text"):
            other = copy.copy(batch)
            setattr(other, change, getattr(batch, change).roll(1, 0))
            told = dn.predict(unet, conditioner, batch.latents, steps, other)
            assert not torch.allclose(told, got, atol=1e-6), change


def test_a_new_conditioner_is_a_function_of_its_seed(sd: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dn.load_denoiser(sd, "unet", text_dim=8)[1].state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = dn.load_denoiser(sd, "unet", text_dim=8)[1].state_dict()
    other = dn.load_denoiser(sd, "unet", text_dim=8, seed=1)[1].state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["text.weight"], other["text.weight"])


def test_only_the_part_that_is_read_names_a_stage(sd: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(sd, tmp_path / "sd")
    unet, whole = (ldm.fingerprint(str(copied), part) for part in ("unet", ""))
    text = copied / "text_encoder" / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(text).items()}, text)
    assert ldm.fingerprint(str(copied), "unet") == unet
    assert ldm.fingerprint(str(copied)) != whole
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    assert ldm.fingerprint(str(copied), "unet") != unet
    assert ldm.fingerprint("someone/some-model", "unet") == "someone/some-model"


# ---- LoRA and gradient checkpointing -----------------------------------------------------------


def tuned(
    sd: Path, folder: Path, *, rank: int, checkpointing: bool = False, steps: int = 3
) -> tuple[Any, dn.Conditioner, dn.Batch]:
    """A few steps on one batch; the trained weights, adapters still beside them."""
    unet, conditioner = loaded(sd)
    adapters.prepare(unet, lora_rank=rank, gradient_checkpointing=checkpointing, seed=0)
    batch, scheduler = sd_batch(), dn.make_scheduler("epsilon")
    modules = {"unet": unet, "conditioner": conditioner}
    result = train(
        modules,
        lambda batch, step, generator: (
            dn.denoising_loss(unet, conditioner, batch, scheduler, generator, gamma=5.0)[0], {}
        ),
        lambda step, generator: batch,
        steps=steps, learning_rate=3e-3, folder=folder, seed=0, ema_decay=0.5,
        keep_checkpoint=True, device="cpu",
    )  # fmt: skip
    apply_ema(modules, result)
    return unet, conditioner, batch


def drawn(unet: Any, conditioner: dn.Conditioner, batch: dn.Batch) -> torch.Tensor:
    with torch.no_grad():
        return dn.predict(unet.eval(), conditioner, batch.latents, torch.tensor([300, 700]), batch)


def exactly(unet: Any, conditioner: dn.Conditioner, batch: dn.Batch) -> torch.Tensor:
    """The same in double precision: a random UNet makes much of the last digit of fp32."""
    wide = {
        name: v.double() for name, v in vars(batch).items() if name in ("latents", "text", "view")
    }
    return drawn(
        copy.deepcopy(unet).double(),
        copy.deepcopy(conditioner).double(),
        dn.Batch(**{**vars(batch), **wide}),
    )


def test_lora_trains_attention_and_what_is_new_and_merges_into_a_plain_unet(
    sd: Path, tmp_path: Path
) -> None:
    unet, conditioner, batch = tuned(sd, tmp_path / "run", rank=2)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("conv_in.") for name in trained)
    pairs = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    blocks = [n for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(pairs) == 8 * len(blocks) > 0  # four projections of two attentions
    # Optimiser, average and checkpoint hold those and the conditioner alone.
    (checkpoint,) = (tmp_path / "run" / "checkpoint").iterdir()
    ours = {f"unet/{name}" for name in trained} | {
        f"conditioner/{name}" for name, _ in conditioner.named_parameters()
    }
    for file in ("weights", "ema"):
        with safe_open(checkpoint / f"{file}.safetensors", "pt") as stored:
            assert set(stored.keys()) == ours, file
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {key.rsplit("::", 1)[0] for key in moments} == ours
    adapted = exactly(unet, conditioner, batch)
    assert not torch.allclose(adapted, exactly(*loaded(sd), batch), atol=1e-2)

    adapters.finish(unet)
    assert all(p.requires_grad for p in unet.parameters())
    assert torch.allclose(exactly(unet, conditioner, batch), adapted, atol=1e-5)
    dn.save_denoiser(unet, conditioner, tmp_path / "made")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "made" / "unet")
    assert torch.equal(exactly(plain, conditioner, batch), exactly(unet, conditioner, batch))
    before, after = loaded(sd)[0].state_dict(), plain.state_dict()
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    wanted = {f"{name}.weight" for name in pairs} | {"conv_in.weight", "conv_in.bias"}
    # The middle block sees one place here, which attends to itself whatever it asks: what moves its
    # queries and keys is rounding, or nothing.
    ends = ("attn1.to_q.weight", "attn1.to_k.weight")
    idle = {name for name in wanted if name.startswith("mid_block") and name.endswith(ends)}
    assert changed <= wanted and wanted - changed <= idle


def test_rank_zero_trains_everything(sd: Path, tmp_path: Path) -> None:
    unet, conditioner, batch = tuned(sd, tmp_path, rank=0, steps=1)
    before, trained = loaded(sd)[0].state_dict(), drawn(unet, conditioner, batch)
    same = [name for name, value in unet.state_dict().items() if torch.equal(value, before[name])]
    # Keys need no bias: a softmax does not see it. Diffusers' attention has none to begin with.
    assert same == []
    adapters.finish(unet)
    assert torch.equal(drawn(unet, conditioner, batch), trained)


def test_adapters_start_as_nothing_and_by_their_seed(sd: Path) -> None:
    def adapted(seed: int) -> Any:
        unet = loaded(sd)[0]
        state = torch.get_rng_state()
        adapters.prepare(unet, lora_rank=2, gradient_checkpointing=False, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return unet

    conditioner, batch = loaded(sd)[1], sd_batch()
    fresh = drawn(loaded(sd)[0], conditioner, batch)
    first, again, other = adapted(0), adapted(0), adapted(1)
    assert torch.allclose(drawn(first, conditioner, batch), fresh, atol=1e-6)
    halves = [
        {n: p for n, p in u.named_parameters() if "lora_A" in n} for u in (first, again, other)
    ]
    assert all(torch.equal(halves[0][n], halves[1][n]) for n in halves[0])
    assert not any(torch.equal(halves[0][n], halves[2][n]) for n in halves[0])


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_gives_the_same_gradients_for_fewer_bytes(sd: Path, rank: int) -> None:
    def once(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        unet, conditioner = loaded(sd)
        adapters.prepare(unet, lora_rank=rank, gradient_checkpointing=checkpointing, seed=0)
        own = {p.untyped_storage().data_ptr() for m in (unet, conditioner) for p in m.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _, _ = dn.denoising_loss(
                unet.train(), conditioner, sd_batch(4), dn.make_scheduler("epsilon"),
                torch.Generator().manual_seed(0), gamma=5.0,
            )  # fmt: skip
        size = sum(kept.values())
        loss.backward()
        found = {
            f"{i}/{name}": p.grad
            for i, module in enumerate((unet, conditioner))
            for name, p in module.named_parameters()
            if p.grad is not None
        }
        adapters.finish(unet)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in unet.modules())
        return found, size

    (plain, much), (again, little) = once(False), once(True)
    assert set(plain) == set(again)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-7, msg=name)
    assert little < 0.6 * much


# ---- the stages whole --------------------------------------------------------------------------


def sd_profile(sd: Path, folder: Path) -> Profile:
    """A profile file of one's own, as for a small GPU: smoke's pictures, Stable Diffusion, LoRA."""
    values = yaml.safe_load((FOLDER / "smoke.yaml").read_text(encoding="utf-8"))
    values["name"] = "sd"
    values["ldm"] |= {
        "autoencoder": str(sd), "autoencoder_subfolder": "vae", "denoiser": str(sd),
        "denoiser_subfolder": "unet", "autoencoder_steps": 2, "steps": 3, "batch_size": 4,
        "lora_rank": 2, "gradient_checkpointing": True, "prediction_type": "epsilon",
        "sample_steps": 2, "samples_per_class": 1,
    }  # fmt: skip
    values["transfer"] |= {
        "lora_rank": 2, "steps": 2, "batch_size": 4, "ablation_steps": 1, "sample_steps": 2,
        "guidance_scale": 1.0,
    }  # fmt: skip
    path = folder / "sd.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_profile(path)


@pytest.fixture(scope="module")
def profile(sd: Path, session_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The profile, with the first three stages as smoke has them: they are the same work."""
    described = blip.ensure(load_profile("smoke"))
    made = sd_profile(sd, tmp_path_factory.mktemp("profile"))
    for stage in sorted(described.folder.parent.glob("0[123]_*")):
        if stage.is_dir():
            shutil.copytree(stage, session_runs / "sd" / stage.name)
    return made


@pytest.fixture(scope="module")
def run(profile: Profile) -> ldm.LdmRun:
    return ldm.ensure(profile)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder).state_dict()


def test_stage_04_from_stable_diffusion(sd: Path, profile: Profile, run: ldm.LdmRun) -> None:
    vae = AutoencoderKL.from_pretrained(sd / "vae").eval()
    rows = {row["file_name"]: row for row in collect.ensure(profile).rows}
    files = run.natural.files[:3]
    images = collect.ensure(profile).images([rows[f] for f in files], profile.image_size)
    seen = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(seen).latent_dist.mode() * 0.18215
    assert torch.allclose(run.natural.latents[:3], wanted, atol=1e-5)
    assert run.natural.views.shape[1:] == (structure.VIEW_CHANNELS, 4, 4)
    # The decoder alone was tuned, the adapters merged, the view's inputs trained.
    assert {row["step"] for row in run.autoencoder_history} == {1, 2}
    before, after = weights_of(sd / "unet"), weights_of(run.folder / "denoiser" / "unet")
    assert set(after) == set(before)
    assert after["conv_in.weight"].shape[1] == INPUTS
    assert after["conv_in.weight"][:, 4:].abs().max() > 0
    changed = {n for n in after if n[:7] != "conv_in" and not torch.equal(before[n], after[n])}
    assert changed
    assert all(".attn1.to_" in name or ".attn2.to_" in name for name in changed)
    for name, value in run.unet.state_dict().items():
        assert torch.equal(value, after[name]), name
    # BLIP's text features and the classes are written as tokens of the UNet's width.
    words = blip.ensure(profile).blip.text_tokens(["a cat"], length=4)[0].shape[-1]
    assert (run.conditioner.config.text_dim, run.conditioner.config.dim) == (words, WIDE)
    fresh = dn.load_denoiser(sd, "unet", text_dim=words, seed=profile.seed)[1]
    assert not torch.equal(run.conditioner.classes.weight, fresh.classes.weight)
    assert not torch.equal(run.conditioner.text.weight, fresh.text.weight)
    assert all(made.shape == (1, 32, 32, 3) for made in run.samples.values())


def test_stage_05_from_stable_diffusion(profile: Profile, run: ldm.LdmRun) -> None:
    made = transfer.ensure(profile)
    assert [row["row"] for row in made.ablation] == list(transfer.ABLATION)
    before = weights_of(run.folder / "denoiser" / "unet")
    after = weights_of(made.folder / "denoiser" / "unet")
    assert set(after) == set(before)
    changed = {n for n in after if n[:7] != "conv_in" and not torch.equal(before[n], after[n])}
    assert changed and all(".to_" in name for name in changed)
    attend = made.translator.conditioner.attend
    assert attend is not None
    assert attend.out.weight.shape[0] == WIDE
    assert attend.out.weight.abs().max() > 0  # it started at zero
    cartoons = tiny.pictures("cartoon", 3)
    drawn = made.translator.translate(cartoons, seed=0)
    assert drawn.images.shape == cartoons.shape
    other = made.translator.translate(255 - cartoons, ["tom"] * 3, seed=0)
    assert not np.array_equal(other.images, drawn.images)


def test_models_that_do_not_fit_are_told_apart(profile: Profile) -> None:
    """The tiny autoencoder has 16 latent channels; a Stable Diffusion draws four."""
    mixed = profile.ldm.model_copy(
        update={
            "autoencoder": "data/foundation/autoencoder",
            "autoencoder_subfolder": "",
            "autoencoder_steps": 0,
        }
    )
    kept = ldm.ensure(profile).folder
    aside = kept.with_name("aside")
    shutil.move(kept, aside)
    try:
        with pytest.raises(UserError, match=r"draws 4 latent channels.*has 16"):
            ldm.ensure(profile.model_copy(update={"ldm": mixed}))
    finally:
        shutil.rmtree(kept)
        shutil.move(aside, kept)
