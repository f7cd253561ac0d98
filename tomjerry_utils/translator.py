"""The translator: all that turns a cartoon into a photograph, as one object and one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils import UserError, blip, ldm, posture, scenes, silhouette, structure
from tomjerry_utils.autoencoder import decode, encode_all, factor_of, load_autoencoder
from tomjerry_utils.denoiser import Batch, Conditioner, load_denoiser, make_scheduler
from tomjerry_utils.faithfulness import NATURAL, Dial
from tomjerry_utils.images import add_grain, to_uint8
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import foundation_root, log, read_json, write_json
from tomjerry_utils.sampling import sample
from tomjerry_utils.scenes import CLASSES, LABELS
from tomjerry_utils.training import pick_device

WARDROBE = "wardrobe.safetensors"
SUBJECTS = {name: " ".join(scenes.SUBJECTS[name, "natural"]) for name in CLASSES}  # "a cat is"


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
    grain: float = 0.0  # deviation, as a share of the range; see `images.measure_grain`
    wardrobe: dict[str, Tensor] | None = None  # see :func:`wardrobe`
    posture: posture.Posture | None = None  # None leaves the animals the shapes they are drawn in
    finished: int | None = None  # the steps that its last ones were finished for

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
        faithfulness: float | None = None,
        outlines: Sequence[np.ndarray | None] | None = None,
    ) -> Translation:
        """Translate cartoons.

        Args:
            images: (N, S, S, 3) uint8 at the translator's size.
            classes: tom, jerry, both, or None to read the class off the picture.
            seed: a picture's noise, coats and grain depend on this and on its number alone.
            numbers: the pictures' numbers; None counts them from 0.
            steps: DDIM steps, see `sampling.timetable`; None for the profile's.
            start, strength: "source" begins from the noised source latents (SDEdit).
            faithfulness: from 0, as real as can be, to 1, as drawn as can be; sets start and
                strength. None for 0.
            outlines: of the animals, as of :meth:`conditions`.

        Raises:
            UserError: a faithfulness outside 0 … 1.
        """
        dial, steps = Dial.at(faithfulness), steps or self.steps
        if faithfulness is not None:
            steps, strength = dial.begin(steps)
            start = "source" if strength < 1 else "noise"
        out, captions, names = [], [], []
        places = range(len(images)) if numbers is None else numbers
        for begin in range(0, len(images), batch_size):
            part = images[begin : begin + batch_size]
            wanted = None if classes is None else classes[begin : begin + batch_size]
            here = places[begin : begin + batch_size]
            conditions = self.conditions(
                part,
                wanted,
                seed=seed,
                numbers=here,
                dial=dial,
                outlines=outlines and outlines[begin : begin + batch_size],
            )
            captions += conditions.captions
            names += conditions.classes
            out.append(
                self.draw(
                    conditions,
                    part,
                    seed=seed,
                    numbers=here,
                    steps=steps,
                    blip_guidance=blip_guidance,
                    start=start,
                    strength=strength,
                )
            )
        return Translation(np.concatenate(out), names, captions)

    def draw(
        self,
        conditions: Conditions,
        images: np.ndarray,
        *,
        seed: int,
        numbers: Sequence[int],
        steps: int | None = None,
        blip_guidance: float | None = None,
        start: str = "noise",
        strength: float = 1.0,
    ) -> np.ndarray:
        """Pictures (N, S, S, 3) uint8 from what the denoiser is told, whoever read it.

        Args:
            conditions: from :meth:`conditions`, or the same with other views or texts.
            images: the sources; the others as of :meth:`translate`.
        """
        latents = self._sample(
            conditions,
            images,
            seed=seed,
            numbers=numbers,
            steps=steps or self.steps,
            blip_guidance=self.blip_guidance if blip_guidance is None else blip_guidance,
            start=start,
            strength=strength,
        )
        with torch.no_grad():
            drawn = to_uint8(decode(self.vae, latents))
        return add_grain(drawn, self.grain, seed=seed, numbers=numbers)

    def conditions(
        self,
        images: np.ndarray,
        classes: Sequence[str | None] | None,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        dial: Dial = NATURAL,
        outlines: Sequence[np.ndarray | None] | None = None,
    ) -> Conditions:
        """View, caption and class of source pictures.

        The coats in the view are drawn from the wardrobe by (seed, number); without a wardrobe
        they are the source's own.

        Args:
            outlines: for each picture (S, S) in [0, 1] that its animals are to fill, whatever
                posture is read off it, or None: then our own models alone read it.
        """
        device = self.unet.device
        pictures = torch.from_numpy(images)
        grid = (images.shape[1] // factor_of(self.vae), images.shape[2] // factor_of(self.vae))
        seen, maps = silhouette.look(self.net, pictures, grid, outlines)
        views = self.standardise(seen, "cartoon")
        read = structure.classify(maps)
        names = [
            r if c in (None, "auto") else c
            for r, c in zip(read, classes or [None] * len(images), strict=True)
        ]
        if self.wardrobe is not None:
            seeds = [_number(seed, n) for n in (range(len(images)) if numbers is None else numbers)]
            views = structure.wear(views, [self.wardrobe[name] for name in names], seeds)
        captions = [
            with_subject(blip.to_natural(text), name)
            for text, name in zip(self.describer.generate(images), names, strict=True)
        ]
        if self.posture is not None:
            actions = [blip.caption_slots(text)["action"] for text in captions]
            posed = self.posture.pose(
                pictures, maps, names, actions, seen=read, drawn=dial.keypoints
            )
            for i, given in enumerate(outlines or []):
                if given is not None:
                    posed[i] = maps[i]
            views = structure.reshape(views, posed)
        views = dial.turn(views, self.standardise(seen, "natural"))
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

    def standardise(self, views: Tensor, style: str) -> Tensor:
        """Views with coats and tones standardised as those of a domain's training pictures."""
        config = self.conditioner.config
        return structure.standardise(views, config.tone_mean[style], config.tone_std[style])

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
            source = encode_all(self.vae, torch.from_numpy(images)).to(batch.latents)
        guide = None
        if blip_guidance:
            guide = self._guide(images, conditions.captions, blip_guidance)
        noise = noise_for(batch.latents.shape[1:], seed, numbers)
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
            finished=self.finished,
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


def noise_for(shape: Sequence[int], seed: int, numbers: Sequence[int]) -> Tensor:
    """Noise for pictures of these numbers, whatever else is in their batch."""
    rows = []
    for number in numbers:
        generator = torch.Generator().manual_seed(_number(seed, number))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def _number(seed: int, number: int) -> int:
    return 1_000_003 * (seed + 1) + int(number)


def with_subject(caption: str, cls: str) -> str:
    """A caption with its subject replaced by a class's: "a cat is …"."""
    words = caption.split()
    for i, word in enumerate(words):
        if word in ("is", "are"):
            return " ".join([SUBJECTS[cls], *words[i + 1 :]])
    return SUBJECTS[cls]


def load_translator(folder: Path, profile: Profile) -> Translator:
    """The translator of a finished stage 05 or of `data/foundation/translator`.

    Raises:
        UserError: not such a folder, or one that another profile made.
    """
    if not (folder / "translator.json").is_file():
        raise UserError(f"{folder} holds no translator; `tomjerry course --only 05` makes one")
    try:
        return _load(folder, profile)
    except torch.OutOfMemoryError:
        raise  # the weights are whole; the command line says what to do
    except (KeyError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the translator in {folder} cannot be read ({first}): copy or make it anew"
        ) from None


def _load(folder: Path, profile: Profile) -> Translator:
    facts = read_json(folder / "translator.json")
    if (facts["profile"], facts["size"]) != (profile.name, profile.image_size):
        raise UserError(
            f"{folder} was made by profile {facts['profile']} for {facts['size']} px pictures, "
            f"profile {profile.name} has {profile.image_size} px: use --profile {facts['profile']}"
        )
    device = pick_device(profile.device)
    vae = load_autoencoder(folder / "autoencoder").to(device)
    unet, conditioner = load_denoiser(folder / "denoiser")
    return Translator(
        unet=unet.to(device).eval(),
        conditioner=conditioner.to(device).eval(),
        scheduler=make_scheduler(facts["prediction_type"]),
        vae=vae,
        net=structure.load_structure(_place(folder, "structure")).to(device),
        describer=blip.load(folder / "blip", device),
        size=facts["size"],
        steps=facts["sample_steps"],
        guidance_scale=facts["guidance_scale"],
        blip_guidance=facts["blip_guidance"],
        blip_variant=facts["blip_variant"],
        colour=facts.get("colour"),
        grain=facts.get("grain", 0.0),
        finished=facts.get("finished"),
        wardrobe=load_file(folder / WARDROBE),
        posture=posture.load_posture(
            _place(folder, "posture/pose").parent, folder / "posture" / posture.ALIGNMENT
        ).to(device),
    )


def _place(folder: Path, name: str) -> Path:
    """A part in the translator's folder; the shipped one leaves out what lies beside it."""
    return folder / name if (folder / name).is_dir() else foundation_root() / name


def ship(made: Path, folder: Path) -> None:
    """Copy a finished stage 05 as half-precision weights.

    Without the structure and posture nets, which no stage tunes: they ship once, beside it.
    """
    for name in ("denoiser", "autoencoder", "blip"):
        shutil.copytree(made / name, folder / name)
    (folder / "posture").mkdir(parents=True)
    for name in (WARDROBE, "translator.json", f"posture/{posture.ALIGNMENT}"):
        shutil.copy(made / name, folder / name)
    for path in folder.rglob("config.json"):
        # Where the weights lay on the machine that made them is nobody's business.
        config = read_json(path)
        config.pop("_name_or_path", None)
        write_json(path, config)
    for path in folder.rglob("*.safetensors"):
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
    log(f"translator copied from {made}")
