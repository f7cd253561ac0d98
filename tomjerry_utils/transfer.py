"""Stage 05: the source-conditioned translator, regularised by BLIP-encoder similarity.

With a cartoon x and a photograph y drawn independently, as the poster writes, the best denoiser
ignores x: nothing ties the two. So the translator learns on natural pictures alone, each
conditioned on its *own* domain-invariant view (caption, parts, background tones), and is given the
cartoon's view when it translates.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tomjerry_utils import adapters, blip, collect, finishing, ldm, painting, posture, structure
from tomjerry_utils.autoencoder import decode
from tomjerry_utils.denoiser import (
    Batch,
    Conditioner,
    denoising_loss,
    drop,
    save_denoiser,
    widen,
    with_attention,
)
from tomjerry_utils.latents import wardrobe
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    atomic_dir,
    atomic_path,
    model_source,
    open_stage,
    read_json,
    read_jsonl,
    write_json,
)
from tomjerry_utils.training import TrainResult, apply_ema, pick_device, train
from tomjerry_utils.translator import (
    WARDROBE,
    Conditions,
    Translator,
    load_translator,
)

STAGE = "05_transfer"
VERSION = 7
TRAINED = "training/denoiser"  # in the stage's folder: the denoiser before it is finished
# The rows of the ablation: name → (source attention, structure path, natural bodies in the source's
# poses or the shapes it is drawn in, BLIP weight on or off, whose view and caption it learns with:
# its own, another picture's view and no caption, or neither).
ABLATION: dict[str, tuple[str | None, bool, bool, bool, str]] = {
    "no source": (None, False, False, False, "none"),
    "independent source": ("ldm", False, False, False, "other"),
    "poster attention": ("poster", False, False, False, "own"),
    "ldm attention": ("ldm", False, False, False, "own"),
    "+ structure": ("ldm", True, False, False, "own"),
    "+ posture": ("ldm", True, True, False, "own"),
    "+ BLIP term": ("ldm", True, True, True, "own"),
}


@dataclass(eq=False)
class TransferRun:
    """What stage 05 leaves: the translator, its training and the ablation."""

    folder: Path
    translator: Translator
    history: list[dict[str, Any]]
    ablation: list[dict[str, Any]]
    key: str


def ensure(profile: Profile) -> TransferRun:
    """Stage 05 at this profile: read it if it is finished, else make it, upstream included."""
    before = ldm.ensure(profile)
    settings = {
        **profile.transfer.named(),
        "finishing": profile.finishing.model_dump(),
        "precision": profile.precision,
    }
    stage = open_stage(
        profile,
        STAGE,
        settings,
        {"ldm": before.key, "posture": ldm.fingerprint(profile.transfer.posture)},
        VERSION,
    )
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, before)
    return TransferRun(
        folder=stage.folder,
        translator=load_translator(stage.folder, profile),
        history=read_jsonl(stage.folder / "training" / "history.jsonl"),
        ablation=read_json(stage.folder / "ablation.json"),
        key=stage.key,
    )


def _make(stage: Stage, profile: Profile, before: ldm.LdmRun) -> None:
    """Train the translator, then the ablation rows; finished parts are not redone."""
    folder, options = stage.folder, profile.transfer
    described = blip.ensure(profile)
    before.unet.cpu()  # each training copies it; a GPU need not hold both
    if not (folder / "translator.json").is_file():
        unet, conditioner, _ = train_row(
            before,
            described.blip,
            profile,
            folder=folder / "training",
            steps=options.steps,
            attention=options.attention,
            use_view=True,
            use_posture=True,
            blip_weight=options.blip_weight,
        )
        _write_translator(folder, unet, conditioner, before, profile)
        del unet, conditioner  # nor this one beside the ablation's
    if not (folder / "ablation.json").is_file():
        write_json(
            folder / "ablation.json",
            ablate(profile, before, folder / "ablation", seed=profile.seed),
        )
    stage.finish()


def _write_translator(
    folder: Path,
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    before: ldm.LdmRun,
    profile: Profile,
) -> None:
    """Everything that `translate` needs, in one folder that stands alone."""
    with atomic_dir(folder / TRAINED) as target:  # what the training alone makes, to compare with
        save_denoiser(unet, conditioner, target)
    photographs = painting.photographs(profile)
    grain = finishing.lost_grain(photographs, before.vae)
    unet, vae = _finish(unet, conditioner, before, profile, grain, folder)
    with atomic_dir(folder / "denoiser") as target:
        save_denoiser(unet, conditioner, target)
        before.scheduler.save_pretrained(target / "scheduler")
    with atomic_dir(folder / "autoencoder") as target:
        vae.save_pretrained(target)
    with atomic_dir(folder / "structure") as target:
        for file in Path(model_source(profile.transfer.structure)).iterdir():
            if file.suffix in (".json", ".safetensors") and file.name != "provenance.json":
                shutil.copy(file, target / file.name)
    with atomic_dir(folder / "posture") as target:
        fit_posture(before, profile).save(target)
    with atomic_dir(folder / "blip") as target:
        blip.save(blip.ensure(profile).blip, target)
    with atomic_path(folder / WARDROBE) as temporary:
        save_file(wardrobe(before.natural), temporary)
    options = profile.transfer
    write_json(
        folder / "translator.json",
        {
            "profile": profile.name,
            "size": profile.image_size,
            "sample_steps": options.sample_steps,
            "finished": options.sample_steps if profile.finishing.steps else None,
            "guidance_scale": options.guidance_scale,
            "blip_guidance": options.blip_guidance,
            "blip_variant": options.blip_variant,
            "prediction_type": profile.ldm.prediction_type,
            "reference": _reference(before, profile),
            "colour": _colour(photographs),
            "grain": finishing.lost_grain(photographs, vae),
        },
    )


def _finish(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    before: ldm.LdmRun,
    profile: Profile,
    grain: float,
    folder: Path,
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """The translator's denoiser and stage 04's decoder, finished on what they draw."""
    data, options = before.natural, profile.transfer
    if not profile.finishing.steps:
        return unet, before.vae
    conditions = painting.with_posed(data, before.posed)
    parts = (unet, conditioner, before.vae, before.scheduler, conditions)
    how: dict[str, Any] = {
        "steps": options.sample_steps,
        "guidance_scale": options.guidance_scale,
    }
    drawn = finishing.draw(
        *parts,
        profile,
        **how,
        among=len(data),
        path=folder / "drawn.safetensors",
        describe="05 drawing",
    )
    return finishing.finish(
        *parts,
        torch.from_numpy(painting.pictures_of(data, profile))[drawn["index"]],
        drawn,
        profile,
        **how,
        lora_rank=options.lora_rank,
        grain=grain,
        folder=folder / "finishing",
        describe="05 finishing",
    )


def train_row(
    before: ldm.LdmRun,
    describer: blip.Blip,
    profile: Profile,
    *,
    folder: Path,
    steps: int,
    attention: str | None,
    use_view: bool,
    use_posture: bool,
    blip_weight: float,
    source: str = "own",
    seed: int | None = None,
) -> tuple[UNet2DConditionModel, Conditioner, TrainResult]:
    """Train one translator, from stage 04's weights, on natural pictures and their own views.

    Args:
        attention: "poster", "ldm" or None for no attention to the source.
        use_view: the structure path, i.e. the view beside the noisy latents.
        use_posture: half of the views show the body that the posture nets draw in the picture's own
            pose, as they do when it translates; the others are exact. Without it, views are
            exaggerated as a cartoonist would, so that the shapes of a cartoon's view pass.
        blip_weight: λ of the poster's regularisation.
        source: "own" learns each picture with its own view and caption; "other" with the view of
            another, drawn independently as on the poster, and no caption; "none" with neither.
    """
    import copy

    options, device = profile.transfer, pick_device(profile.device)
    seed = profile.seed if seed is None else seed
    unet = copy.deepcopy(before.unet).to(device)
    widen(unet, before.vae.config.latent_channels + structure.VIEW_CHANNELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = with_attention(before.conditioner, attention, structure.VIEW_CHANNELS)
    conditioner = conditioner.to(device)
    adapters.prepare(
        unet,
        lora_rank=options.lora_rank,
        gradient_checkpointing=profile.ldm.gradient_checkpointing,
        seed=seed,
    )
    conditioner.requires_grad_(True)
    for module in (before.vae, *describer.parts().values()):
        module.requires_grad_(False)
    data = before.natural
    larger = structure.head_ratio(before.cartoon.views, before.natural.views)
    posed = before.posed if use_posture else None

    def batches(step: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(data), (options.batch_size,), generator=generator)
        batch = data.batch(index)
        if posed is not None:
            chosen = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
            batch.view = torch.where(chosen, posed[index].float(), batch.view)
        else:
            batch.view = structure.exaggerate(batch.view, generator, head=max(larger, 1.0))
        shake = options.structure_noise * torch.rand(len(index), 1, 1, 1, generator=generator)
        batch.view = batch.view + shake * torch.randn(batch.view.shape, generator=generator)
        batch.captions = [data.texts[int(r)] for r in data.row[index]]
        silent = 0.1 if source == "own" else 1.1
        batch = drop(batch, labels=0.1, captions=silent, view=0.0, generator=generator)
        if source == "other":
            batch.view = batch.view.roll(1, 0)
        if not use_view:
            # The attention still reads the view; only the path beside the latents is cut.
            batch.source, batch.view = batch.view, torch.zeros_like(batch.view)
        return batch

    def loss(
        batch: Batch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return regularised_loss(
            unet,
            conditioner,
            batch,
            before.scheduler,
            generator,
            vae=before.vae,
            describer=describer,
            gamma=profile.ldm.min_snr_gamma,
            blip_weight=blip_weight,
            blip_batch_size=options.blip_batch_size,
            blip_variant=options.blip_variant,
        )

    result = train(
        {"unet": unet, "conditioner": conditioner},
        loss,
        batches,
        steps=steps,
        learning_rate=options.learning_rate,
        warmup_steps=min(20, steps),
        accumulation=options.accumulation,
        folder=folder,
        seed=seed,
        ema_decay=profile.ldm.ema_decay,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        log_every=max(1, steps // 40),
        checkpoint_every_s=profile.checkpoint_every_s,
        describe=f"05 {folder.name}",
        keep_checkpoint=True,
    )
    apply_ema({"unet": unet, "conditioner": conditioner}, result)
    adapters.finish(unet)
    return unet.eval(), conditioner.eval(), result


def regularised_loss(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    batch: Batch,
    scheduler: Any,
    generator: torch.Generator,
    *,
    vae: AutoencoderKL,
    describer: blip.Blip,
    gamma: float,
    blip_weight: float,
    blip_batch_size: int,
    blip_variant: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The denoising loss, and λ (1 − BLIP similarity) of the batch's first few, decoded."""
    value, x0, _ = denoising_loss(unet, conditioner, batch, scheduler, generator, gamma=gamma)
    numbers = {"denoising": value.detach()}
    if blip_weight:
        few = slice(0, blip_batch_size)
        drawn = decode(vae, x0[few])
        with torch.no_grad():
            own = decode(vae, batch.latents[few])
        alike = blip.similarity(
            describer, drawn, own, blip_variant, (batch.captions or [])[few]
        ).mean()
        value = value + blip_weight * (1 - alike)
        numbers["similarity"] = alike.detach()
    return value, numbers


def fit_posture(before: ldm.LdmRun, profile: Profile) -> posture.Posture:
    """The posture nets, aligned between the keypoints they find in each domain's training set."""
    nets = posture.load_posture(model_source(profile.transfer.posture))
    found = {}
    for domain, data in (("drawn", before.cartoon), ("natural", before.natural)):
        names = data.classes()
        known = [i for i, name in enumerate(names) if name is not None]
        written = [data.texts[int(data.row[i])] for i in known]
        found[domain] = posture.statistics(
            nets.find(torch.from_numpy(painting.pictures_of(data, profile))[known]),
            [str(names[i]) for i in known],
            [blip.caption_slots(text)["action"] for text in written],
        )
    nets.alignment = posture.Alignment(**found)
    return nets


def ablate(
    profile: Profile, before: ldm.LdmRun, folder: Path, *, seed: int
) -> list[dict[str, Any]]:
    """Train each row of the ablation for as long and probe what it keeps of its source.

    The probes are our own models on validation cartoons, never a judge: does BLIP name the
    source's action in the output, and how well do the segmenter's silhouettes overlap?
    """
    described = blip.ensure(profile)
    pictures = collect.ensure(profile)
    rows = pictures.select(domain="cartoon", split="validation", source="scenes")[:48]
    images = pictures.images(rows, profile.image_size)
    out = []
    fitted = fit_posture(before, profile)
    for name in ABLATION:
        target = row_folder(folder, name)
        if not (target / "row.json").is_file():
            translator, result = ablation_row(
                name,
                profile,
                before,
                described.blip,
                fitted,
                folder=target,
                steps=profile.transfer.ablation_steps,
                seed=seed,
            )
            made = translator.translate(images, seed=seed).images
            np.savez(target / "pictures.npz", source=images[:6], made=made[:6])
            write_json(
                target / "row.json",
                {
                    "row": name,
                    "steps": result.steps,
                    "loss": result.history[-1]["loss"],
                    "seconds": round(result.seconds, 1),
                    "n": len(images),
                    "seed": seed,
                    **probe(made, images, rows, described.blip, translator.net),
                },
            )
            del translator
        out.append(read_json(target / "row.json"))
    return out


def ablation_row(
    name: str,
    profile: Profile,
    before: ldm.LdmRun,
    describer: blip.Blip,
    nets: posture.Posture,
    *,
    folder: Path,
    steps: int,
    seed: int,
) -> tuple[Translator, TrainResult]:
    """Train one row of :data:`ABLATION`; BLIP weight and variant are the profile's.

    Args:
        nets: from :func:`fit_posture`, for the rows that have them.
        folder: of the training; one that is finished there is read.

    Returns:
        A translator that is told what the row learnt with, and no more; unfinished, without grain.
    """
    attention, use_view, use_posture, with_blip, source = ABLATION[name]
    unet, conditioner, result = train_row(
        before,
        describer,
        profile,
        folder=folder,
        steps=steps,
        attention=attention,
        use_view=use_view,
        use_posture=use_posture,
        blip_weight=profile.transfer.blip_weight if with_blip else 0.0,
        source=source,
        seed=seed,
    )
    posed = nets if use_posture else None
    translator = assemble(profile, before, describer, unet, conditioner, posed)
    if not use_view:
        translator = _Blind(**vars(translator), told=source == "own")
    return translator, result


def assemble(
    profile: Profile,
    before: ldm.LdmRun,
    describer: blip.Blip,
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    nets: posture.Posture | None,
) -> Translator:
    """A translator of these models, with stage 04's autoencoder as it is."""
    options = profile.transfer
    return Translator(
        unet,
        conditioner,
        before.scheduler,
        before.vae,
        structure.load_structure(model_source(options.structure)).to(unet.device),
        describer,
        profile.image_size,
        options.sample_steps,
        options.guidance_scale,
        blip_variant=options.blip_variant,
        wardrobe=wardrobe(before.natural),
        posture=nets and nets.to(unet.device),
    )


def row_folder(folder: Path, name: str) -> Path:
    """Where an ablation in `folder` keeps a row: its `row.json` and `pictures.npz`."""
    return folder / name.replace(" ", "_").replace("+", "with")


@dataclass(eq=False)
class _Blind(Translator):
    """A translator without the structure path: the view reaches only the attention."""

    told: bool = True  # whether it gets the caption

    def conditions(
        self, images: np.ndarray, classes: Sequence[str | None] | None, **draw: Any
    ) -> Conditions:
        found = super().conditions(images, classes, **draw)
        batch = found.batch
        batch.source, batch.view = batch.view, torch.zeros_like(batch.view)
        # A row that learnt without captions gets none: of "no source" but the class is left.
        if not self.told:
            batch = drop(batch, labels=0.0, captions=1.1, view=0.0, generator=torch.Generator())
        return Conditions(batch, found.classes, found.captions)


def probe(
    made: np.ndarray,
    sources: np.ndarray,
    rows: Sequence[dict[str, Any]],
    describer: blip.Blip,
    net: structure.StructureNet,
) -> dict[str, float]:
    """What an output keeps of its source, by our own models: action, facing, silhouette.

    Args:
        made, sources: (N, S, S, 3) uint8.
        rows: `text` and `facing` of each source.
    """
    pairs = probe_pairs(made, sources, rows, describer, net)
    return {name: float(table.diagonal().mean()) for name, table in pairs.items()}


def probe_pairs(
    made: np.ndarray,
    sources: np.ndarray,
    rows: Sequence[dict[str, Any]],
    describer: blip.Blip,
    net: structure.StructureNet,
) -> dict[str, np.ndarray]:
    """What each output has in common with each source, as of :func:`probe`: name → (N, N).

    Output i and source j: 1 where the action is named, 1 where the direction is named, and the
    overlap of the silhouettes. Off the diagonal is what has nothing to do with each other.
    """
    grid = (sources.shape[1] // 4, sources.shape[2] // 4)
    masks = []
    for images in (made, sources):
        _, maps = structure.look(net, torch.from_numpy(images), grid)
        animal = maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum(1) > 0.5
        masks.append(animal.flatten(1).float())
    common = masks[0] @ masks[1].T
    either = masks[0].sum(1)[:, None] + masks[1].sum(1) - common
    written = [blip.caption_slots(text) for text in describer.generate(made)]
    named = {
        "action": [blip.caption_slots(row["text"])["action"] for row in rows],
        "facing": [row["facing"] for row in rows],
    }
    said = {"action": [w["action"] for w in written], "facing": [w["direction"] for w in written]}
    tables = {
        probe: np.array([[w is not None and w == t for t in named[probe]] for w in words], float)
        for probe, words in said.items()
    }
    return {**tables, "silhouette_iou": (common / either.clamp(min=1)).double().numpy()}


def _reference(before: ldm.LdmRun, profile: Profile) -> dict[str, Any]:
    """Training pictures' features, summarised, against which an input's distance is measured."""
    from tomjerry_utils import features

    pictures = collect.ensure(profile)
    rows = pictures.select(domain="cartoon", split="train", source="scenes")[:400]
    found = features.extract(pictures.images(rows, profile.image_size))
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    centre = found.mean(0)
    inside = 1 - found @ centre / np.linalg.norm(centre)
    return {
        "features": features.NAME,
        "centre": [round(float(v), 5) for v in centre],
        "median": float(np.median(inside)),
        "p95": float(np.quantile(inside, 0.95)),
        "n": len(rows),
    }


def _colour(photographs: np.ndarray) -> dict[str, Any]:
    """The photographs' colours, for the rival that only changes those."""
    from tomjerry_utils import baselines

    return baselines.measure_colour(photographs)
