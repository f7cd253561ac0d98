"""Stage 04: the autoencoder and the class-conditional latent diffusion model.

The poster's loss is E‖ẑ_θ(z_t, t, c) − z‖² on latents z = E(x) of both domains, with the class c
telling Tom from cat and Jerry from mouse. Classes, captions and views are dropped at random, so
that one model draws with any of them and can be guided by each. A copy is finished
(:mod:`finishing`) and draws this stage's samples, in two steps: :mod:`staging` draws what there is
to be seen, the model paints it. The unfinished one is what stage 05 trains on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor

from tomjerry_utils import (
    UserError,
    adapters,
    blip,
    collect,
    processes,
    structure,
)
from tomjerry_utils.autoencoder import (
    TEXTURE_WEIGHT,
    autoencoder_loss,
    decode,
    decoder_alone,
    factor_of,
    load_autoencoder,
)
from tomjerry_utils.blip_training import mirrored_text
from tomjerry_utils.denoiser import (
    Batch,
    Conditioner,
    denoising_loss,
    drop,
    load_denoiser,
    make_scheduler,
    save_denoiser,
    tiny_denoiser,
    widen,
)
from tomjerry_utils.images import save_image, to_uint8
from tomjerry_utils.latents import TEXT_LENGTH, LatentSet, join, latent_set
from tomjerry_utils.painting import FINISHED, POSED, finish, painter
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    atomic_dir,
    atomic_path,
    foundation_root,
    hash_file,
    hash_obj,
    model_source,
    open_stage,
    read_json,
    read_jsonl,
    write_json,
)
from tomjerry_utils.sampling import sample
from tomjerry_utils.scenes import LABELS, PARTS
from tomjerry_utils.training import TrainResult, apply_ema, pick_device, train

__all__ = [
    "STAGE",
    "TEXT_LENGTH",
    "LatentSet",
    "LdmRun",
    "ensure",
    "fingerprint",
    "join",
    "latent_set",
    "load",
    "sample_classes",
    "train_denoiser",
    "train_foundation",
    "tune_autoencoder",
]

STAGE = "04_ldm"
VERSION = 3
TONES = "tones.json"  # domain → [mean, deviation] that standardise its views' tones


@dataclass(eq=False)
class LdmRun:
    """What stage 04 leaves.

    Attributes:
        vae, unet, conditioner: as training leaves them; :func:`painter` has the finished ones.
        cartoon, natural: both domains as latents.
        samples: label → (n, S, S, 3) uint8, staged and painted; free: told the class alone.
        posed: (N, VIEW_CHANNELS, h, w) float16, the natural views with the posture nets' bodies.
    """

    folder: Path
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    conditioner: Conditioner
    scheduler: DDIMScheduler
    cartoon: LatentSet
    natural: LatentSet
    autoencoder_history: list[dict[str, Any]]
    history: list[dict[str, Any]]
    samples: dict[str, np.ndarray]
    free: dict[str, np.ndarray]
    posed: Tensor
    key: str


def ensure(profile: Profile) -> LdmRun:
    """Stage 04 at this profile: read it if it is finished, else make it, upstream included.

    Under `accelerate launch` its trainings are shared between the processes; the stages before it
    must be finished then.
    """
    with processes.only_finished():
        pictures = collect.ensure(profile)
        described = blip.ensure(profile)
    inputs = {
        "captions": hash_file(described.folder / "all_captions.jsonl"),
        "manifest": hash_file(pictures.folder / "manifest.jsonl"),
        "structure": fingerprint(profile.transfer.structure),
        "posture": fingerprint(profile.transfer.posture),
        "perceptual": fingerprint(str(foundation_root() / "perceptual")),
        "autoencoder": fingerprint(profile.ldm.autoencoder, profile.ldm.autoencoder_subfolder),
        "denoiser": fingerprint(profile.ldm.denoiser, profile.ldm.denoiser_subfolder),
    }
    with processes.main_first(profile.device):
        stage = open_stage(profile, STAGE, _settings(profile), inputs, VERSION)
    if not stage.finished:
        with processes.held(stage, profile.device):
            if not stage.finished:
                _make(stage, profile, pictures, described)
    return load(stage.folder, profile)


def fingerprint(source: str, subfolder: str = "") -> str:
    """What names the weights a stage starts from: their hashes in a local folder, or a hub id.

    Args:
        subfolder: the part of the folder that is read; the rest may change.
    """
    folder = Path(model_source(source))
    if not folder.is_dir():
        return source
    folder = folder / subfolder
    files = {str(p.relative_to(folder)): hash_file(p) for p in folder.rglob("*.safetensors")}
    return hash_obj(files)


def load(folder: Path, profile: Profile) -> LdmRun:
    """Read a finished stage 04."""
    device = pick_device(profile.device)
    vae = load_autoencoder(folder / "autoencoder").to(device)
    unet, conditioner = load_denoiser(folder / "denoiser")
    kinds = {}
    for name in ("samples", "free"):
        with np.load(folder / f"{name}.npz") as stored:
            kinds[name] = {label: stored[label] for label in LABELS}
    return LdmRun(
        folder=folder,
        vae=vae,
        unet=unet.to(device).eval(),
        conditioner=conditioner.to(device).eval(),
        scheduler=make_scheduler(profile.ldm.prediction_type),
        cartoon=LatentSet.load(folder / "cartoon.safetensors"),
        natural=LatentSet.load(folder / "natural.safetensors"),
        autoencoder_history=read_jsonl(folder / "autoencoder_training" / "history.jsonl")
        if (folder / "autoencoder_training" / "history.jsonl").is_file()
        else [],
        history=read_jsonl(folder / "denoiser_training" / "history.jsonl"),
        **kinds,
        posed=load_file(folder / POSED)["views"],
        key=read_json(folder / "provenance.json")["key"],
    )


def lend(run: LdmRun) -> LdmRun:
    """Stage 04 as rivals draw with it: its trained denoiser and its finished decoder."""
    vae = load_autoencoder(run.folder / FINISHED / "autoencoder").to(run.vae.device)
    return replace(run, vae=vae)


def _settings(profile: Profile) -> dict[str, Any]:
    return {
        **profile.ldm.named(),
        "finishing": profile.finishing.model_dump(),
        "view_guidance_scale": profile.transfer.guidance_scale,
        "precision": profile.precision,
    }


def _make(
    stage: Stage, profile: Profile, pictures: collect.Collection, described: blip.BlipRun
) -> None:
    """Autoencoder, latents, denoiser, its finishing, samples; finished parts are not redone."""
    folder, device, options = stage.folder, pick_device(profile.device), profile.ldm
    train_rows = {
        domain: pictures.select(
            domain=domain,
            split="train",
            source="scenes" if "scenes" in profile.collect.sources else None,
        )
        for domain in ("cartoon", "natural")
    }
    if not (folder / "autoencoder" / "config.json").is_file():
        vae = load_autoencoder(
            model_source(options.autoencoder), options.autoencoder_subfolder or None
        )
        if options.autoencoder_steps:
            images = np.concatenate(
                [pictures.images(train_rows[d], profile.image_size) for d in train_rows]
            )
            tune_autoencoder(vae, images, profile, folder / "autoencoder_training")
        if processes.is_main():
            with atomic_dir(folder / "autoencoder") as target:
                vae.save_pretrained(target)
    processes.wait_for_all(profile.device)
    vae = load_autoencoder(folder / "autoencoder").to(device)

    if processes.is_main() and not (folder / TONES).is_file():
        _encode(folder, vae, profile, pictures, described, train_rows)
    processes.wait_for_all(profile.device)
    tones = read_json(folder / TONES)
    both = join([LatentSet.load(folder / f"{domain}.safetensors") for domain in train_rows])

    unet, conditioner = load_denoiser(
        model_source(options.denoiser),
        options.denoiser_subfolder,
        text_dim=both.table.shape[-1],
        latent_channels=vae.config.latent_channels,
        factor=factor_of(vae),
        seed=profile.seed,
    )
    if unet.config.out_channels != vae.config.latent_channels:
        raise UserError(
            f"ldm.denoiser {options.denoiser} draws {unet.config.out_channels} latent channels, "
            f"ldm.autoencoder {options.autoencoder} has {vae.config.latent_channels}: "
            "name two models that were made for each other in the profile"
        )
    widen(unet, vae.config.latent_channels + structure.VIEW_CHANNELS)
    conditioner.register_to_config(
        tone_mean={d: mean for d, (mean, _) in tones.items()},
        tone_std={d: std for d, (_, std) in tones.items()},
    )
    adapters.prepare(
        unet,
        lora_rank=options.lora_rank,
        gradient_checkpointing=options.gradient_checkpointing,
        seed=profile.seed,
    )
    scheduler = make_scheduler(options.prediction_type)
    result = train_denoiser(
        unet.to(device),
        conditioner.to(device),
        both,
        scheduler,
        profile,
        folder=folder / "denoiser_training",
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    apply_ema({"unet": unet, "conditioner": conditioner}, result)
    adapters.finish(unet)
    if processes.is_main():
        with atomic_dir(folder / "denoiser") as target:
            save_denoiser(unet, conditioner, target)
            scheduler.save_pretrained(target / "scheduler")
    finish(folder, unet, conditioner, vae, scheduler, profile)
    if not processes.is_main():
        return
    kinds = {
        "samples": painter(folder, profile).draw_all(options.samples_per_class),
        "free": sample_classes(unet, conditioner, vae, both, scheduler, profile),
    }
    for name, samples in kinds.items():
        with atomic_path(folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **samples)  # type: ignore[arg-type]
        for label, drawn in samples.items():
            save_image(folder / name / f"{label}.png", np.concatenate(list(drawn), 1))
    stage.finish(loss=result.history[-1]["loss"], denoiser_seconds=result.seconds)


def _encode(
    folder: Path,
    vae: AutoencoderKL,
    profile: Profile,
    pictures: collect.Collection,
    described: blip.BlipRun,
    train_rows: dict[str, list[dict[str, Any]]],
) -> None:
    """Write both domains as the denoiser sees them, and last their tones."""
    net = structure.load_structure(model_source(profile.transfer.structure)).to(vae.device)
    texts = {row["file_name"]: row["natural"] for row in described.captions}
    tones = {}
    for domain, rows in train_rows.items():
        data, tones[domain] = latent_set(
            pictures.images(rows, profile.image_size),
            [r["label"] for r in rows],
            [texts[r["file_name"]] for r in rows],
            vae=vae,
            net=net,
            describer=described.blip,
            tone=None,
            files=[r["file_name"] for r in rows],
        )
        data.save(folder / f"{domain}.safetensors")
    write_json(folder / TONES, tones)


def tune_autoencoder(
    vae: AutoencoderKL, images: np.ndarray, profile: Profile, folder: Path
) -> None:
    """Fine-tune the decoder on the collected pictures.

    The encoder and the latents' statistics stay as they came: the denoiser that this stage starts
    from learnt on those latents, and would have to learn anew on others.
    """
    options = profile.ldm
    pictures = torch.from_numpy(images)
    decoder = decoder_alone(vae.to(pick_device(profile.device)))

    def batches(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (options.autoencoder_batch_size,), generator=generator)
        return pictures[index].permute(0, 3, 1, 2).float() / 127.5 - 1

    def loss(batch: Tensor, step: int, generator: torch.Generator) -> Any:
        return autoencoder_loss(
            vae, batch, batch, generator, kl_weight=0.0, texture_weight=TEXTURE_WEIGHT
        )

    result = train(
        {"decoder": decoder},
        loss,
        batches,
        steps=options.autoencoder_steps,
        learning_rate=options.autoencoder_learning_rate,
        warmup_steps=min(options.warmup_steps, options.autoencoder_steps),
        accumulation=options.autoencoder_accumulation,
        folder=folder,
        seed=profile.seed,
        ema_decay=0.99,
        weight_decay=0.0,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        log_every=max(1, options.autoencoder_steps // 20),
        checkpoint_every_s=profile.checkpoint_every_s,
        describe="04 decoder",
        keep_checkpoint=True,
    )
    apply_ema({"decoder": decoder}, result)


def train_denoiser(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    data: LatentSet,
    scheduler: DDIMScheduler,
    profile: Profile,
    *,
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> TrainResult:
    """Train on latents with classes, captions and views dropped at the profile's rates."""
    options = profile.ldm

    def batches(step: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        return drop(
            data.batch(index),
            labels=options.class_dropout,
            captions=options.caption_dropout,
            view=options.structure_dropout,
            generator=generator,
        )

    def loss(
        batch: Batch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, _, _ = denoising_loss(
            unet, conditioner, batch, scheduler, generator, gamma=options.min_snr_gamma
        )
        return value, {}

    return train(
        {"unet": unet, "conditioner": conditioner},
        loss,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=min(options.warmup_steps, steps),
        accumulation=options.accumulation,
        folder=folder,
        seed=profile.seed,
        ema_decay=options.ema_decay,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        log_every=max(1, steps // 40),
        checkpoint_every_s=profile.checkpoint_every_s,
        describe="04 denoiser",
        keep_checkpoint=True,
    )


def sample_classes(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    vae: AutoencoderKL,
    data: LatentSet,
    scheduler: DDIMScheduler,
    profile: Profile,
) -> dict[str, np.ndarray]:
    """Free samples of each label, with neither view nor caption: uint8 (n, S, S, 3) each."""
    options, out = profile.ldm, {}
    count = options.samples_per_class
    for i, label in enumerate(LABELS):
        batch = data.batch(torch.zeros(count, dtype=torch.long))
        batch.labels = torch.full((count,), i)
        batch = drop(batch, labels=0.0, captions=1.1, view=1.1, generator=torch.Generator())
        latents = sample(
            unet,
            conditioner,
            batch.to(unet.device),
            scheduler,
            steps=options.sample_steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(profile.seed * 1000 + i),
        )
        with torch.no_grad():
            out[label] = to_uint8(decode(vae, latents))
    return out


def train_foundation(
    work: Path, data: dict[str, np.ndarray], options: dict[str, Any]
) -> tuple[Any, TrainResult, dict[str, Any]]:
    """The foundation's denoiser: zoo latents, mirrored copies, views and captions, no classes.

    Returns:
        A bundle with `half()` and `save_pretrained(folder)`, the training's result and facts.
    """
    from tomjerry_utils.scenes import caption, describe

    root = foundation_root()
    vae = load_autoencoder(root / "autoencoder")
    cache = work / "latents.safetensors"
    if not cache.with_suffix(".json").is_file():
        texts = [caption(describe(int(s), zoo=True), "natural") for s in data["seed"]]
        noise = np.random.default_rng(0).normal(0, 2.55, data["image"].shape)
        images = np.clip(data["image"] + noise.astype(np.float32), 0, 255).astype(np.uint8)
        images = np.concatenate([images, images[:, :, ::-1]])
        texts += [mirrored_text(t) for t in texts]
        made, _ = latent_set(
            images,
            [None] * len(images),
            texts,
            vae=vae,
            net=structure.load_structure(root / "structure"),
            describer=blip.load(root / "blip"),
            tone=None,
        )
        made.save(cache)
    latents = LatentSet.load(cache)
    torch.manual_seed(3)
    text_dim = latents.table.shape[-1]
    unet = tiny_denoiser(vae.config.latent_channels, structure.VIEW_CHANNELS)
    # torch's fused attention is very slow in bf16 on a CPU; plain products are not.
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)  # an eighth faster in bf16 on a CPU
    conditioner = Conditioner(
        text_dim=text_dim,
        dim=unet.config.cross_attention_dim,
        latent_channels=vae.config.latent_channels,
        factor=factor_of(vae),
    )
    scheduler = make_scheduler("sample")

    def batches(step: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(latents), (options["batch_size"],), generator=generator)
        batch = latents.batch(index)
        # A view read from a drawing is never as clean as one of a photograph.
        shake = torch.rand(len(index), 1, 1, 1, generator=generator) * 0.25
        batch.view = batch.view + shake * torch.randn(batch.view.shape, generator=generator)
        return drop(batch, labels=0.0, captions=0.15, view=0.15, generator=generator)

    def loss(
        batch: Batch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return denoising_loss(unet, conditioner, batch, scheduler, generator, gamma=5.0)[0], {}

    def watch(step: int, modules: dict[str, Any]) -> None:
        if step % 500 and step != options["steps"]:
            return
        pick = latents.batch(torch.arange(0, 12) * 97 % len(latents))
        drawn = sample(
            unet,
            conditioner,
            pick,
            scheduler,
            steps=6,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        free = drop(pick, labels=1.1, captions=0.0, view=1.1, generator=torch.Generator())
        loose = sample(
            unet,
            conditioner,
            free,
            scheduler,
            steps=12,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        rows = [
            np.concatenate(list(to_uint8(decode(vae, z))), 1) for z in (pick.latents, drawn, loose)
        ]
        save_image(work / "samples" / f"{step:06d}.png", np.concatenate(rows, 0))

    result = train(
        {"unet": unet, "conditioner": conditioner},
        loss,
        batches,
        steps=options["steps"],
        learning_rate=options["learning_rate"],
        warmup_steps=200,
        folder=work,
        seed=3,
        ema_decay=options["ema_decay"],
        betas=(0.9, 0.99),
        grad_clip=0.5,
        precision="bf16",
        log_every=50,
        on_log=watch,
        threads=2,
        describe="denoiser",
        schedule="cosine",
    )
    apply_ema({"unet": unet, "conditioner": conditioner}, result)
    return _Bundle(unet, conditioner), result, {"pictures": len(latents), "parts": list(PARTS)}


@dataclass(eq=False)
class _Bundle:
    unet: UNet2DConditionModel
    conditioner: Conditioner

    def half(self) -> _Bundle:
        self.unet.half()
        self.conditioner.half()
        return self

    def save_pretrained(self, folder: Path) -> None:
        save_denoiser(self.unet, self.conditioner, folder)
