"""Stage 05: the source-conditioned translator, regularised by BLIP-encoder similarity.

With a cartoon x and a photograph y drawn independently, as the poster writes, the best denoiser
ignores x: nothing ties the two. So the translator learns on natural pictures alone, each
conditioned on its *own* domain-invariant view (caption, parts, background tones), and is given the
cartoon's view when it translates.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tomjerry_utils import UserError, blip, collect, ldm, structure
from tomjerry_utils.autoencoder import decode, factor_of, load_autoencoder
from tomjerry_utils.denoiser import (
    Batch,
    Conditioner,
    denoising_loss,
    drop,
    load_denoiser,
    make_scheduler,
    sample,
    save_denoiser,
    widen,
    with_attention,
)
from tomjerry_utils.images import to_uint8
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    atomic_dir,
    foundation_root,
    log,
    model_source,
    open_stage,
    read_json,
    read_jsonl,
    run_root,
    write_json,
    write_jsonl,
)
from tomjerry_utils.scenes import CLASSES, LABELS
from tomjerry_utils.training import TrainResult, apply_ema, pick_device, progress, train

STAGE = "05_transfer"
SUBJECTS = {"tom": "a cat is", "jerry": "a mouse is", "both": "a cat and a mouse are"}
# The rows of the ablation: name → (source attention, structure path, BLIP weight on or off).
ABLATION: dict[str, tuple[str | None, bool, bool]] = {
    "no source": (None, False, False),
    "poster attention": ("poster", False, False),
    "ldm attention": ("ldm", False, False),
    "+ structure": ("ldm", True, False),
    "+ BLIP term": ("ldm", True, True),
}


@dataclass(eq=False)
class Translator:
    """Everything that turns a cartoon into a photograph."""

    unet: UNet2DConditionModel
    conditioner: Conditioner
    scheduler: DDIMScheduler
    vae: AutoencoderKL
    net: structure.StructureNet
    describer: blip.Blip
    size: int
    steps: int
    guidance_scale: float
    blip_guidance: float = 0.0
    blip_variant: str = "contrastive"
    colour: dict[str, Any] | None = None

    def translate(
        self,
        images: np.ndarray,
        classes: Sequence[str | None] | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        blip_guidance: float | None = None,
        batch_size: int = 50,
        start: str = "noise",
        strength: float = 1.0,
        numbers: Sequence[int] | None = None,
    ) -> Translation:
        """Translate cartoons.

        Args:
            images: (N, S, S, 3) uint8 at the translator's size.
            classes: tom, jerry, both, or None to read the class off the picture.
            seed: a picture's noise depends on this and on its number alone.
            numbers: the pictures' numbers; None counts them from 0.
            steps: DDIM steps; None for the profile's.
            start, strength: "source" begins from the noised source latents (SDEdit).
        """
        out, captions, names = [], [], []
        places = range(len(images)) if numbers is None else numbers
        for begin in range(0, len(images), batch_size):
            part = images[begin : begin + batch_size]
            wanted = None if classes is None else classes[begin : begin + batch_size]
            conditions = self.conditions(part, wanted)
            captions += conditions.captions
            names += conditions.classes
            latents = self._sample(
                conditions,
                part,
                seed=seed,
                numbers=places[begin : begin + batch_size],
                steps=steps or self.steps,
                blip_guidance=self.blip_guidance if blip_guidance is None else blip_guidance,
                start=start,
                strength=strength,
            )
            with torch.no_grad():
                out.append(to_uint8(decode(self.vae, latents)))
        return Translation(np.concatenate(out), names, captions)

    def conditions(self, images: np.ndarray, classes: Sequence[str | None] | None) -> Conditions:
        """View, caption and class of source pictures, read by our own models alone."""
        device = self.unet.device
        pictures = torch.from_numpy(images)
        grid = (images.shape[1] // factor_of(self.vae), images.shape[2] // factor_of(self.vae))
        views, maps = structure.look(self.net, pictures, grid)
        tone = (
            self.conditioner.config.tone_mean["cartoon"],
            self.conditioner.config.tone_std["cartoon"],
        )
        views = structure.standardise(views, *tone)
        read = structure.classify(maps)
        names = [
            r if c in (None, "auto") else c
            for r, c in zip(read, classes or [None] * len(images), strict=True)
        ]
        captions = [
            with_subject(blip.to_natural(text), name)
            for text, name in zip(self.describer.generate(images), names, strict=True)
        ]
        with torch.no_grad():
            text, mask = self.describer.text_tokens(captions, length=ldm.TEXT_LENGTH)
        labels = torch.tensor([LABELS.index("cat") + CLASSES.index(n) for n in names])
        channels = self.vae.config.latent_channels
        batch = Batch(
            latents=torch.zeros(len(images), channels, *grid),
            labels=labels,
            text=text.cpu().float(),
            mask=mask.cpu(),
            view=views,
        )
        return Conditions(batch.to(device), names, captions)

    def _sample(
        self,
        conditions: Conditions,
        images: np.ndarray,
        *,
        seed: int,
        numbers: Sequence[int],
        steps: int,
        blip_guidance: float,
        start: str,
        strength: float,
    ) -> Tensor:
        batch = conditions.batch
        source = None
        if start == "source":
            from tomjerry_utils.autoencoder import encode_all

            source = encode_all(self.vae, torch.from_numpy(images)).to(batch.latents)
        guide = None
        if blip_guidance:
            guide = self._guide(images, conditions.captions, blip_guidance)
        noise = _noise(batch.latents.shape[1:], seed, numbers)
        return sample(
            self.unet,
            self.conditioner,
            batch,
            self.scheduler,
            steps=steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            noise=noise,
            start=source,
            strength=strength,
            guide=guide,
        )

    def _guide(
        self, images: np.ndarray, captions: list[str], scale: float
    ) -> Callable[[Tensor, float], Tensor]:
        """Push each prediction ẑ up the BLIP similarity, by `scale` times 2 % of its own length.

        Steps of 10 % overshoot: the similarity falls again (notebook 05, section 5).
        """
        source = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

        def guide(x0: Tensor, done: float) -> Tensor:
            with torch.enable_grad():
                z = x0.detach().requires_grad_(True)
                value = blip.similarity(
                    self.describer,
                    decode(self.vae, z).clamp(-1, 1),
                    source.to(z),
                    self.blip_variant,
                    captions,
                )
                (gradient,) = torch.autograd.grad(value.sum(), z)
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None, None]
            size = x0.flatten(1).norm(dim=1)[:, None, None, None]
            return x0 + scale * 0.02 * size * gradient / norm

        return guide


@dataclass(eq=False)
class Conditions:
    """What the denoiser is told of source pictures."""

    batch: Batch
    classes: list[str]
    captions: list[str]


@dataclass(eq=False)
class Translation:
    """Pictures (N, S, S, 3) uint8 with the classes and captions they were drawn for."""

    images: np.ndarray
    classes: list[str]
    captions: list[str]


def _noise(shape: Sequence[int], seed: int, numbers: Sequence[int]) -> Tensor:
    """Noise for pictures of these numbers, whatever else is in their batch."""
    rows = []
    for number in numbers:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + int(number))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def with_subject(caption: str, cls: str) -> str:
    """A caption with its subject replaced by a class's: "a cat is …"."""
    words = caption.split()
    for i, word in enumerate(words):
        if word in ("is", "are"):
            return " ".join([SUBJECTS[cls], *words[i + 1 :]])
    return SUBJECTS[cls]


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
    settings = {**profile.transfer.model_dump(mode="json"), "precision": profile.precision}
    stage = open_stage(profile, STAGE, settings, {"ldm": before.key})
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


def load_translator(folder: Path, profile: Profile) -> Translator:
    """The translator of a finished stage 05 or of `data/foundation/translator`.

    Raises:
        UserError: not such a folder, or one that another profile made.
    """
    if not (folder / "translator.json").is_file():
        raise UserError(f"{folder} holds no translator; `tomjerry course --only 05` makes one")
    facts = read_json(folder / "translator.json")
    if facts["size"] != profile.image_size:
        raise UserError(
            f"{folder} translates {facts['size']} px pictures, profile {profile.name} "
            f"{profile.image_size}: use --profile {facts['profile']}"
        )
    device = pick_device(profile.device)
    vae = load_autoencoder(folder / "autoencoder").to(device)
    unet, conditioner = load_denoiser(folder / "denoiser")
    return Translator(
        unet=unet.to(device).eval(),
        conditioner=conditioner.to(device).eval(),
        scheduler=make_scheduler(facts["prediction_type"]),
        vae=vae,
        net=structure.load_structure(folder / "structure").to(device),
        describer=blip.load(folder / "blip", device),
        size=facts["size"],
        steps=facts["sample_steps"],
        guidance_scale=facts["guidance_scale"],
        blip_guidance=facts["blip_guidance"],
        blip_variant=facts["blip_variant"],
        colour=facts.get("colour"),
    )


def _make(stage: Stage, profile: Profile, before: ldm.LdmRun) -> None:
    """Train the translator, then the ablation rows; finished parts are not redone."""
    folder, options = stage.folder, profile.transfer
    described = blip.ensure(profile)
    if not (folder / "translator.json").is_file():
        unet, conditioner, _ = train_row(
            before,
            described.blip,
            profile,
            folder=folder / "training",
            steps=options.steps,
            attention=options.attention,
            use_view=True,
            blip_weight=options.blip_weight,
        )
        _write_translator(folder, unet, conditioner, before, profile)
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
    with atomic_dir(folder / "denoiser") as target:
        save_denoiser(unet, conditioner, target)
        before.scheduler.save_pretrained(target / "scheduler")
    for name, source in (
        ("autoencoder", before.folder / "autoencoder"),
        ("structure", Path(model_source(profile.transfer.structure))),
    ):
        with atomic_dir(folder / name) as target:
            for file in source.iterdir():
                if file.suffix in (".json", ".safetensors") and file.name != "provenance.json":
                    shutil.copy(file, target / file.name)
    with atomic_dir(folder / "blip") as target:
        blip.save(blip.ensure(profile).blip, target)
    options = profile.transfer
    write_json(
        folder / "translator.json",
        {
            "profile": profile.name,
            "size": profile.image_size,
            "sample_steps": options.sample_steps,
            "guidance_scale": options.guidance_scale,
            "blip_guidance": options.blip_guidance,
            "blip_variant": options.blip_variant,
            "prediction_type": profile.ldm.prediction_type,
            "reference": _reference(before, profile),
            "colour": _colour(profile),
        },
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
    blip_weight: float,
    seed: int | None = None,
) -> tuple[UNet2DConditionModel, Conditioner, TrainResult]:
    """Train one translator, from stage 04's weights, on natural pictures and their own views.

    Args:
        attention: "poster", "ldm" or None for no attention to the source.
        use_view: the structure path, i.e. the view beside the noisy latents.
        blip_weight: λ of the poster's regularisation.
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
    for module in (unet, conditioner):
        module.requires_grad_(True)
    for module in (before.vae, *describer.parts().values()):
        module.requires_grad_(False)
    data = before.natural
    larger = structure.head_ratio(before.cartoon.views, before.natural.views)

    def batches(step: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(data), (options.batch_size,), generator=generator)
        batch = data.batch(index)
        batch.view = structure.exaggerate(batch.view, generator, head=max(larger, 1.0))
        shake = options.structure_noise * torch.rand(len(index), 1, 1, 1, generator=generator)
        batch.view = batch.view + shake * torch.randn(batch.view.shape, generator=generator)
        batch.captions = [data.texts[int(r)] for r in data.row[index]]
        batch = drop(batch, labels=0.1, captions=0.1, view=0.0, generator=generator)
        if not use_view:
            # The attention still reads the view; only the path beside the latents is cut.
            batch.source, batch.view = batch.view, torch.zeros_like(batch.view)
        return batch

    def loss(
        batch: Batch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, x0, _ = denoising_loss(
            unet, conditioner, batch, before.scheduler, generator, gamma=profile.ldm.min_snr_gamma
        )
        numbers = {"denoising": value.detach()}
        if blip_weight:
            few = slice(0, options.blip_batch_size)
            drawn = decode(before.vae, x0[few])
            with torch.no_grad():
                own = decode(before.vae, batch.latents[few])
            alike = blip.similarity(
                describer, drawn, own, options.blip_variant, (batch.captions or [])[few]
            ).mean()
            value = value + blip_weight * (1 - alike)
            numbers["similarity"] = alike.detach()
        return value, numbers

    result = train(
        {"unet": unet, "conditioner": conditioner},
        loss,
        batches,
        steps=steps,
        learning_rate=options.learning_rate,
        warmup_steps=min(20, steps),
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
    return unet.eval(), conditioner.eval(), result


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
    for name, (attention, use_view, with_blip) in ABLATION.items():
        target = row_folder(folder, name)
        if not (target / "row.json").is_file():
            unet, conditioner, result = train_row(
                before,
                described.blip,
                profile,
                folder=target,
                steps=profile.transfer.ablation_steps,
                attention=attention,
                use_view=use_view,
                blip_weight=profile.transfer.blip_weight if with_blip else 0.0,
                seed=seed,
            )
            net = structure.load_structure(model_source(profile.transfer.structure)).to(unet.device)
            options = profile.transfer
            translator = Translator(
                unet,
                conditioner,
                before.scheduler,
                before.vae,
                net,
                described.blip,
                profile.image_size,
                options.sample_steps,
                options.guidance_scale,
                blip_variant=options.blip_variant,
            )
            if not use_view:
                translator = _Blind(**vars(translator))
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
                    **probe(made, images, rows, described.blip, net),
                },
            )
        out.append(read_json(target / "row.json"))
    return out


def row_folder(folder: Path, name: str) -> Path:
    """Where an ablation in `folder` keeps a row: its `row.json` and `pictures.npz`."""
    return folder / name.replace(" ", "_").replace("+", "with")


class _Blind(Translator):
    """A translator without the structure path: the view reaches only the attention."""

    def conditions(self, images: np.ndarray, classes: Sequence[str | None] | None) -> Conditions:
        found = super().conditions(images, classes)
        batch = found.batch
        batch.source, batch.view = batch.view, torch.zeros_like(batch.view)
        # "no source" gets no caption either: nothing but the class is left of the cartoon.
        if self.conditioner.attend is None:
            batch = drop(batch, labels=0.0, captions=1.1, view=0.0, generator=torch.Generator())
        return Conditions(batch, found.classes, found.captions)


def probe(
    made: np.ndarray,
    sources: np.ndarray,
    rows: Sequence[dict[str, Any]],
    describer: blip.Blip,
    net: structure.StructureNet,
) -> dict[str, float]:
    """What an output keeps of its source, by our own models: action, facing, silhouette."""
    written = [blip.caption_slots(text) for text in describer.generate(made)]
    grid = (sources.shape[1] // 4, sources.shape[2] // 4)
    masks = []
    for images in (sources, made):
        _, maps = structure.look(net, torch.from_numpy(images), grid)
        masks.append(maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum(1) > 0.5)
    overlap = (masks[0] & masks[1]).sum((1, 2)) / (masks[0] | masks[1]).sum((1, 2)).clamp(min=1)
    facing = np.mean([w["direction"] == r["facing"] for w, r in zip(written, rows, strict=True)])
    action = np.mean([_same_action(w["action"], r) for w, r in zip(written, rows, strict=True)])
    return {
        "action": float(action),
        "facing": float(facing),
        "silhouette_iou": float(overlap.mean()),
    }


def _same_action(written: str | None, row: dict[str, Any]) -> bool:
    return written is not None and written == blip.caption_slots(row["text"])["action"]


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


def _colour(profile: Profile) -> dict[str, Any]:
    """The natural training pictures' colours, for the rival that only changes those."""
    from tomjerry_utils import baselines

    pictures = collect.ensure(profile)
    only = "scenes" if "scenes" in profile.collect.sources else None
    rows = pictures.select(domain="natural", split="train", source=only)
    some = rows[:: max(1, len(rows) // 1000)]
    return baselines.measure_colour(pictures.images(some, profile.image_size))


def distance(images: np.ndarray, reference: dict[str, Any]) -> np.ndarray:
    """How far pictures are from the training cartoons, (N,): 1 = as far as 95 % of those are.

    Cosine distance of their features from the centre of the training set's, in units of that
    set's own 95 % quantile.
    """
    from tomjerry_utils import features

    found = features.extract(images)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    centre = np.asarray(reference["centre"])
    return (1 - found @ centre / np.linalg.norm(centre)) / reference["p95"]


def find_weights(profile: Profile, weights: Path | None) -> tuple[Path, str]:
    """The translator that `tomjerry translate` uses, and a line that says which.

    Raises:
        UserError: there is none; the line names the command that makes one.
    """
    if weights is not None:
        if not (weights / "translator.json").is_file():
            raise UserError(f"--weights {weights}: no translator there (no translator.json)")
        return weights, f"weights: {weights}"
    made = run_root(profile) / STAGE
    if (made / "provenance.json").is_file() and (made / "translator.json").is_file():
        return made, f"weights: {made} (your own run)"
    shipped = foundation_root() / "translator"
    if profile.name == "mini" and (shipped / "translator.json").is_file():
        return shipped, f"weights: {shipped} (shipped with the kit)"
    raise UserError(
        f"no translator for profile {profile.name}: run `make course PROFILE={profile.name}`, "
        "or name one with --weights"
    )


def ship(made: Path, folder: Path) -> None:
    """Copy a finished stage 05 as half-precision weights that stand alone."""
    from safetensors.torch import load_file, save_file

    for name in ("denoiser", "autoencoder", "structure", "blip"):
        shutil.copytree(made / name, folder / name)
    shutil.copy(made / "translator.json", folder / "translator.json")
    for path in folder.rglob("config.json"):
        # Where the weights lay on the machine that made them is nobody's business.
        config = read_json(path)
        config.pop("_name_or_path", None)
        write_json(path, config)
    for path in folder.rglob("*.safetensors"):
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
    log(f"translator copied from {made}")


def translate_files(
    inputs: Sequence[Path],
    out: Path,
    *,
    profile: Profile,
    cls: str = "auto",
    method: str = "ours",
    steps: int | None = None,
    seed: int = 0,
    weights: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Translate pictures and folders for `tomjerry translate`.

    Writes `<stem>.png` (folders mirrored) and `report.jsonl` with file, class, distance, seconds.
    Every input is read before the first is translated. A translation depends on its picture and
    the seed, not on what else is translated with it.

    Args:
        overwrite: make outputs anew that are there; without it they are kept.

    Raises:
        UserError: a missing or unreadable input, two inputs with one output, no weights, an
            unknown method.
    """
    import json
    import time
    from hashlib import sha256

    from tomjerry_utils import baselines
    from tomjerry_utils.images import list_images, load_image, save_image

    path, line = find_weights(profile, weights)
    log(line)
    if method not in ("ours", *baselines.METHODS):
        raise UserError(f"--method {method}: choose from ours, {', '.join(baselines.METHODS)}")
    pairs: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_dir():
            # An output folder inside the input folder is no input.
            files = [p for p in list_images(given) if out.resolve() not in p.resolve().parents]
            pairs += [(p, out / p.relative_to(given).with_suffix(".png")) for p in files]
        elif given.is_file():
            pairs.append((given, out / f"{given.stem}.png"))
        else:
            raise UserError(f"{given}: no such file or folder; check the path")
    seen: dict[Path, Path] = {}
    for source, target in pairs:
        if target in seen:
            raise UserError(f"{source} and {seen[target]} would both become {target}: rename one")
        seen[target] = source
    there = [t for t in seen if t.exists()]
    if there and not overwrite:
        log(f"{len(there)} outputs exist and are kept; --overwrite makes them anew")
        pairs = [(s, t) for s, t in pairs if t not in set(there)]
    translator = load_translator(path, profile)
    for source, _ in pairs:
        load_image(source, translator.size)
    reference = read_json(path / "translator.json")["reference"]
    out.mkdir(parents=True, exist_ok=True)
    report: list[dict[str, Any]] = []
    written = out / "report.jsonl"
    anew = {str(source) for source, _ in pairs}
    before = read_jsonl(written) if written.is_file() else []
    write_jsonl(written, [row for row in before if row.get("file") not in anew])
    with written.open("a", encoding="utf-8") as file:
        chunk = 25
        for begin in progress(range(0, len(pairs), chunk), "translate"):
            some = pairs[begin : begin + chunk]
            started = time.monotonic()
            images = np.stack([load_image(s, translator.size) for s, _ in some])
            classes = [None if cls == "auto" else cls] * len(some)
            if method == "ours":
                numbers = [int.from_bytes(sha256(x.tobytes()).digest()[:4]) for x in images]
                made = translator.translate(
                    images, classes, seed=seed, steps=steps, numbers=numbers
                )
                pictures, names = made.images, made.classes
            else:
                pictures, names = baselines.run(
                    method, translator, images, classes, seed=seed, steps=steps
                )
            far = distance(images, reference)
            each = (time.monotonic() - started) / len(some)
            for (source, target), picture, name, d in zip(some, pictures, names, far, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                save_image(target, picture)
                row = {
                    "file": str(source),
                    "class": name,
                    "distance": round(float(d), 3),
                    "seconds": round(each, 4),
                }
                report.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
    return report
