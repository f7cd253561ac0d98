"""Stage 04: the autoencoder and the class-conditional latent diffusion model.

The poster's loss is E‖ẑ_θ(z_t, t, c) − z‖² on latents z = E(x) of both domains, with the class c
telling Tom from cat and Jerry from mouse. Classes, captions and views are dropped at random, so
that one model draws with any of them and can be guided by each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils import blip, collect, structure
from tomjerry_utils.autoencoder import (
    TEXTURE_WEIGHT,
    autoencoder_loss,
    decode,
    decoder_alone,
    encode_all,
    factor_of,
    load_autoencoder,
)
from tomjerry_utils.blip_training import mirrored_text
from tomjerry_utils.denoiser import (
    NO_CLASS,
    Batch,
    Conditioner,
    denoising_loss,
    drop,
    load_denoiser,
    make_scheduler,
    repeat_texts,
    sample,
    save_denoiser,
    tiny_denoiser,
)
from tomjerry_utils.images import save_image, to_uint8
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
from tomjerry_utils.scenes import LABELS, PARTS
from tomjerry_utils.training import TrainResult, apply_ema, pick_device, train

STAGE = "04_ldm"
TEXT_LENGTH = 20  # tokens of a caption that the denoisers attend to


@dataclass(eq=False)
class LatentSet:
    """Pictures as the denoisers see them.

    latents (N, C, h, w) float32; views (N, S, h, w) float16, tones standardised; labels (N,);
    text table (U, L, D) with masks (U, L) and row (N,) of each picture's caption; texts: the U
    captions; files: (N,) names in the collection.
    """

    latents: Tensor
    views: Tensor
    labels: Tensor
    table: Tensor
    masks: Tensor
    row: Tensor
    texts: list[str]
    files: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor) -> Batch:
        """The batch of some pictures, (B,) indices."""
        rows = self.row[index]
        return Batch(
            latents=self.latents[index],
            labels=self.labels[index],
            text=self.table[rows],
            mask=self.masks[rows],
            view=self.views[index].float(),
        )

    def save(self, path: Path) -> None:
        """Write the set as safetensors, atomically; the file names go into a JSON beside it."""
        with atomic_path(path) as temporary:
            save_file({k: getattr(self, k).contiguous() for k in _TENSORS}, temporary)
        write_json(path.with_suffix(".json"), {"texts": self.texts, "files": self.files})

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        """Read what :meth:`save` wrote."""
        stored: dict[str, Any] = {**load_file(path), **read_json(path.with_suffix(".json"))}
        return cls(**stored)


_TENSORS = ("latents", "views", "labels", "table", "masks", "row")


def latent_set(
    images: np.ndarray,
    labels: Sequence[str | None],
    texts: Sequence[str],
    *,
    vae: AutoencoderKL,
    net: structure.StructureNet,
    describer: blip.Blip,
    tone: tuple[list[float], list[float]] | None,
    files: Sequence[str] = (),
) -> tuple[LatentSet, tuple[list[float], list[float]]]:
    """Encode pictures of one domain with everything the denoisers are conditioned on.

    Args:
        images: (N, H, W, 3) uint8. labels: of `scenes.LABELS`, None for no class.
        texts: captions, species mapped to the natural domain.
        tone: statistics that standardise the views' tones; None measures them here.

    Returns:
        The set and the tone statistics used.
    """
    pictures = torch.from_numpy(images)
    latents = encode_all(vae, pictures)
    views, _ = structure.look(net, pictures, (latents.shape[-2], latents.shape[-1]))
    tone = tone or structure.tone_statistics(views)
    views = structure.standardise(views, *tone)
    table, masks, row = repeat_texts(texts, describer, TEXT_LENGTH)
    numbers = torch.tensor([NO_CLASS if v is None else LABELS.index(v) for v in labels])
    return LatentSet(
        latents, views.half(), numbers, table, masks, row, sorted(set(texts)), list(files)
    ), tone


def join(sets: Sequence[LatentSet]) -> LatentSet:
    """Several sets as one."""
    offset, rows = 0, []
    for part in sets:
        rows.append(part.row + offset)
        offset += len(part.table)
    return LatentSet(
        latents=torch.cat([s.latents for s in sets]),
        views=torch.cat([s.views for s in sets]),
        labels=torch.cat([s.labels for s in sets]),
        table=torch.cat([s.table for s in sets]),
        masks=torch.cat([s.masks for s in sets]),
        row=torch.cat(rows),
        texts=[t for s in sets for t in s.texts],
        files=[f for s in sets for f in s.files],
    )


@dataclass(eq=False)
class LdmRun:
    """What stage 04 leaves: autoencoder, denoiser, both domains as latents, samples per class."""

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
    key: str


def ensure(profile: Profile) -> LdmRun:
    """Stage 04 at this profile: read it if it is finished, else make it, upstream included."""
    pictures = collect.ensure(profile)
    described = blip.ensure(profile)
    inputs = {
        "captions": hash_file(described.folder / "all_captions.jsonl"),
        "manifest": hash_file(pictures.folder / "manifest.jsonl"),
        **{
            name: fingerprint(source)
            for name, source in (
                ("structure", profile.transfer.structure),
                ("autoencoder", profile.ldm.autoencoder),
                ("denoiser", profile.ldm.denoiser),
            )
        },
    }
    stage = open_stage(profile, STAGE, _settings(profile), inputs, version=2)
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, pictures, described)
    return load(stage.folder, profile)


def fingerprint(source: str) -> str:
    """What names the weights a stage starts from: their hashes in a local folder, or a hub id."""
    folder = Path(model_source(source))
    if not folder.is_dir():
        return source
    files = {str(p.relative_to(folder)): hash_file(p) for p in folder.rglob("*.safetensors")}
    return hash_obj(files)


def load(folder: Path, profile: Profile) -> LdmRun:
    """Read a finished stage 04."""
    device = pick_device(profile.device)
    vae = load_autoencoder(folder / "autoencoder").to(device)
    unet, conditioner = load_denoiser(folder / "denoiser")
    samples = {}
    for label in LABELS:
        with np.load(folder / "samples.npz") as stored:
            samples[label] = stored[label]
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
        samples=samples,
        key=read_json(folder / "provenance.json")["key"],
    )


def _settings(profile: Profile) -> dict[str, Any]:
    return {**profile.ldm.model_dump(mode="json"), "precision": profile.precision}


def _make(
    stage: Stage, profile: Profile, pictures: collect.Collection, described: blip.BlipRun
) -> None:
    """Autoencoder, then latents, then denoiser, then samples; finished parts are not redone."""
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
        images = np.concatenate(
            [pictures.images(train_rows[d], profile.image_size) for d in train_rows]
        )
        tune_autoencoder(vae, images, profile, folder / "autoencoder_training")
        with atomic_dir(folder / "autoencoder") as target:
            vae.save_pretrained(target)
    vae = load_autoencoder(folder / "autoencoder").to(device)
    net = structure.load_structure(model_source(profile.transfer.structure)).to(device)

    texts = {row["file_name"]: row["natural"] for row in described.captions}
    sets: dict[str, LatentSet] = {}
    tones: dict[str, tuple[list[float], list[float]]] = {}
    for domain, rows in train_rows.items():
        images = pictures.images(rows, profile.image_size)
        sets[domain], tones[domain] = latent_set(
            images,
            [r["label"] for r in rows],
            [texts[r["file_name"]] for r in rows],
            vae=vae,
            net=net,
            describer=described.blip,
            tone=None,
            files=[r["file_name"] for r in rows],
        )
        if not (folder / f"{domain}.json").is_file():
            sets[domain].save(folder / f"{domain}.safetensors")
    both = join([sets["cartoon"], sets["natural"]])

    text_dim = both.table.shape[-1]
    unet, conditioner = load_denoiser(
        model_source(options.denoiser),
        options.denoiser_subfolder,
        text_dim=text_dim,
        latent_channels=vae.config.latent_channels,
        factor=factor_of(vae),
    )
    conditioner.register_to_config(
        tone_mean={d: t[0] for d, t in tones.items()}, tone_std={d: t[1] for d, t in tones.items()}
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
    with atomic_dir(folder / "denoiser") as target:
        save_denoiser(unet, conditioner, target)
        scheduler.save_pretrained(target / "scheduler")
    samples = sample_classes(unet, conditioner, vae, both, scheduler, profile)
    with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **samples)  # type: ignore[arg-type]
    for label, drawn in samples.items():
        save_image(folder / "samples" / f"{label}.png", np.concatenate(list(drawn), 1))
    stage.finish(loss=result.history[-1]["loss"], denoiser_seconds=result.seconds)


def tune_autoencoder(
    vae: AutoencoderKL, images: np.ndarray, profile: Profile, folder: Path
) -> None:
    """Fine-tune the decoder on the collected pictures.

    The encoder and the latents' statistics stay as they came: the denoiser that this stage starts
    from learnt on those latents, and would have to learn anew on others.
    """
    options = profile.ldm
    if not options.autoencoder_steps:
        return
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
