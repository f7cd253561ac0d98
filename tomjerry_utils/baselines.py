"""The rivals: what a user would pick instead of the translator.

- identity: the cartoon as it is;
- colour: Reinhard's statistics transfer, the cartoon in the colours of the natural training set;
- sdedit: the source's latents, noised half-way and denoised by stage 04's class-conditional model,
  which is told the class and nothing else of the source;
- ddib, cyclediffusion, ilvr, egsde: the same model by the samplers of :mod:`editing`.

The first three are the course's table (:data:`METHODS`); all are a user's choice (:data:`RIVALS`).
What they are on equal terms with ours, trained and tuned alike, is `rivals`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tomjerry_utils import UserError, editing, structure
from tomjerry_utils.autoencoder import decode, encode_all, factor_of
from tomjerry_utils.denoiser import Conditioner, with_attention
from tomjerry_utils.images import add_grain, to_uint8
from tomjerry_utils.sampling import sample
from tomjerry_utils.scenes import LABELS, STYLES, label_of
from tomjerry_utils.translator import noise_for

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from tomjerry_utils.realism import DomainExpert
    from tomjerry_utils.translator import Translator

METHODS = ("identity", "colour", "sdedit")
RIVALS = (*METHODS, "ddib", "cyclediffusion", "ilvr", "egsde")
TITLES = {
    "identity": "identity",
    "colour": "colour transfer",
    "sdedit": "SDEdit",
    "ddib": "DDIB",
    "cyclediffusion": "CycleDiffusion",
    "ilvr": "ILVR",
    "egsde": "EGSDE",
}
# How often a rival evaluates the denoiser for each of its `steps`: once for each direction.
DIRECTIONS = {
    "identity": 0,
    "colour": 0,
    "sdedit": 1,
    "ddib": 2,
    "cyclediffusion": 2,
    "ilvr": 1,
    "egsde": 1,
}
STRENGTH = 0.6  # share of the noise that SDEdit adds where no profile says otherwise
LARGEST_GAIN = 4.0  # of a contrast: a flat picture has none to stretch

# CIELAB under D65 (CIE 15:2004), from linear sRGB (IEC 61966-2-1).
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)
_KNEE = 6 / 29


class Model(Protocol):
    """A latent diffusion model: stage 04's run, or a translator."""

    unet: UNet2DConditionModel
    conditioner: Conditioner
    vae: AutoencoderKL
    scheduler: DDIMScheduler


def run(
    method: str,
    translator: Translator,
    images: np.ndarray,
    classes: Sequence[str | None],
    *,
    seed: int,
    steps: int | None = None,
    strength: float | None = None,
    guidance_scale: float | None = None,
    knobs: editing.Knobs | None = None,
    model: Model | None = None,
    expert: DomainExpert | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Translate cartoons by a rival method.

    Args:
        method: of :data:`RIVALS`.
        translator: lends what is not the rival's own: colour statistics, autoencoder, the reading
            of classes.
        images: (N, S, S, 3) uint8 at the translator's size.
        classes: tom, jerry, both, or None to read the class off the picture.
        seed: of the rival's noise; a picture's depends on this and its number alone.
        steps: evaluations of the denoiser in each of the rival's :data:`DIRECTIONS`; None for as
            many as the translator takes.
        strength: share of the noise up to which a diffusion rival takes the source, 0 … 1; None
            for the method's own.
        guidance_scale: of the denoiser; None for the translator's.
        knobs: what else the samplers of :mod:`editing` are tuned by; None for the method's own.
            Colour transfer and SDEdit read its strength alone; of the former it is the share of
            the way to the training set's colours.
        model: whose denoiser the rival uses, stage 04's where it is at hand; None for the
            translator's own, its view left out. DDIB and CycleDiffusion want one that has learnt
            the cartoons' labels, as stage 04's has and a translator's may have forgotten.
        expert: EGSDE's realism expert, from :func:`realism.train_expert`; None does without.
        numbers: the pictures' numbers; None counts them from 0.

    Returns:
        (N, S, S, 3) uint8 and the N classes.

    Raises:
        UserError: an unknown method, a knob outside its range, or a translator without colour
            statistics.
    """
    if method not in RIVALS:
        raise UserError(f"no rival method '{method}': choose from {', '.join(RIVALS)}")
    names = read_classes(translator, images, classes)
    numbers = range(len(images)) if numbers is None else numbers
    if method == "identity":
        return images.copy(), names
    if method == "colour":
        if not translator.colour:
            raise UserError(
                "this translator holds no colour statistics for --method colour: "
                "make it anew with `tomjerry course --only 05`"
            )
        return transfer_colour(images, translator.colour, knobs.strength if knobs else 1.0), names
    options: dict[str, Any] = {
        "seed": seed,
        "steps": steps or translator.steps,
        "guidance_scale": translator.guidance_scale if guidance_scale is None else guidance_scale,
        "numbers": numbers,
    }
    if method == "sdedit":
        share = knobs.strength if knobs else STRENGTH
        share = share if strength is None else strength
        made = sdedit(model or translator, images, names, strength=share, **options)
    else:
        chosen = knobs or editing.KNOBS[method]
        if strength is not None:
            chosen = replace(chosen, strength=strength)
        made = edit(
            method, model or translator, images, names, knobs=chosen, expert=expert, **options
        )
    # The same camera as the translator's, so that neither gains by its grain.
    return add_grain(made, translator.grain, seed=seed, numbers=numbers), names


def read_classes(
    translator: Translator, images: np.ndarray, classes: Sequence[str | None]
) -> list[str]:
    """The classes as given, those that are None or "auto" read off the picture's parts."""
    known = [None if c == "auto" else c for c in classes]
    unknown = [i for i, c in enumerate(known) if c is None]
    if unknown:
        factor = factor_of(translator.vae)
        grid = (images.shape[1] // factor, images.shape[2] // factor)
        _, maps = structure.look(translator.net, torch.from_numpy(images[unknown]), grid)
        for i, name in zip(unknown, structure.classify(maps), strict=True):
            known[i] = name
    return [str(c) for c in known]


# ---- colour transfer ---------------------------------------------------------------------------


def measure_colour(images: np.ndarray) -> dict[str, Any]:
    """Colour statistics of a training set, for :func:`transfer_colour`.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        space, n, and per channel of L*, a*, b* the mean of the pictures' means and of their
        deviations: the look of a typical picture, not of all pictures poured together.
    """
    means, deviations = np.empty((len(images), 3)), np.empty((len(images), 3))
    for i, image in enumerate(images):
        lab = to_lab(image)
        means[i], deviations[i] = lab.mean((0, 1)), lab.std((0, 1))
    return {
        "space": "CIELAB D65",
        "mean": [round(float(v), 4) for v in means.mean(0)],
        "std": [round(float(v), 4) for v in deviations.mean(0)],
        "n": len(images),
    }


def transfer_colour(images: np.ndarray, colour: dict[str, Any], share: float = 1.0) -> np.ndarray:
    """Give each picture the mean and deviation of a training set (Reinhard et al. 2001).

    Args:
        images: (N, H, W, 3) uint8.
        colour: from :func:`measure_colour`.
        share: of the way there, 0 … 1, in CIELAB.
    """
    mean, std = np.asarray(colour["mean"]), np.asarray(colour["std"])
    out = np.empty_like(images)
    for i, image in enumerate(images):
        lab = to_lab(image)
        own = np.maximum(lab.std((0, 1)), 1e-6)
        gain = np.minimum(std / own, LARGEST_GAIN)
        there = (lab - lab.mean((0, 1))) * gain + mean
        out[i] = from_lab((1 - share) * lab + share * there)
    return out


def to_lab(images: np.ndarray) -> np.ndarray:
    """sRGB uint8 (…, 3) → CIELAB float64: L* in [0, 100], a* and b* about [−110, 110]."""
    rgb = np.asarray(images) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > _KNEE**3, np.cbrt(xyz), xyz / (3 * _KNEE**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """CIELAB (…, 3) → sRGB uint8; colours that no screen shows are clipped."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = np.where(f > _KNEE, f**3, 3 * _KNEE**2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_TO_XYZ).T, 0, 1)
    rgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.clip(rgb * 255 + 0.5, 0, 255).astype(np.uint8)


# ---- SDEdit ------------------------------------------------------------------------------------


def sdedit(
    model: Model,
    images: np.ndarray,
    classes: Sequence[str],
    *,
    seed: int,
    steps: int,
    strength: float,
    guidance_scale: float,
    numbers: Sequence[int] | None = None,
    batch_size: int = 50,
) -> np.ndarray:
    """Noise the source's latents to `strength` and denoise them as the class's natural label.

    Meng et al. 2021 (arXiv 2108.01073), in latent space. The denoiser sees the class alone: no
    view, no caption, no attention to the source.

    Args:
        model: stage 04's run, or a translator.
        images: (N, S, S, 3) uint8; classes: N of tom, jerry, both.
        steps: evaluations of the denoiser, whatever the strength, so that rivals are given the
            translator's own budget.
        strength: 0 gives the autoencoder's reconstruction, 1 a free sample of the class.

    Raises:
        UserError: a strength outside 0 … 1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"SDEdit's strength {strength} is not a share of the noise: 0 to 1")
    unet, scheduler = model.unet, model.scheduler
    conditioner = _class_conditioner(model)

    def denoised(source: Tensor, part: range) -> Tensor:
        if strength == 0:
            return source
        labels = _labels(classes, part, "natural").to(source.device)
        return sample(
            unet,
            conditioner,
            editing.class_conditions(unet, conditioner, source, labels),
            scheduler,
            steps=_schedule_length(scheduler, steps, strength),
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            noise=noise_for(source.shape[1:], seed, _of(numbers, part)).to(source),
            start=source,
            strength=strength,
        )

    return _redrawn(model, images, denoised, batch_size=batch_size)


def _schedule_length(scheduler: DDIMScheduler, steps: int, strength: float) -> int:
    """How many steps the whole schedule must have for `steps` of them to lie below `strength`."""
    return min(math.ceil(steps / strength), scheduler.config.num_train_timesteps)


# ---- the samplers of `editing` -----------------------------------------------------------------


def edit(
    method: str,
    model: Model,
    images: np.ndarray,
    classes: Sequence[str],
    *,
    knobs: editing.Knobs,
    seed: int,
    steps: int,
    guidance_scale: float,
    numbers: Sequence[int] | None = None,
    expert: DomainExpert | None = None,
    batch_size: int = 50,
) -> np.ndarray:
    """Pictures by DDIB, CycleDiffusion, ILVR or EGSDE, from the cartoon's label to the natural.

    Guidance is the target's; what reads the source's label does so without.

    Args:
        method: ddib, cyclediffusion, ilvr or egsde.
        images: (N, S, S, 3) uint8; classes: N of tom, jerry, both.
        steps: evaluations of the denoiser in each of the method's :data:`DIRECTIONS`, whatever
            the strength.

    Raises:
        UserError: a knob outside its range, or a DDIB of one step.
    """
    levels = editing.ladder(model.scheduler, steps, knobs.strength)
    denoiser = editing.ClassDenoiser(model.unet, _class_conditioner(model), model.scheduler)
    if expert is not None:
        expert = expert.to(model.unet.device).eval()

    def edited(latents: Tensor, part: range) -> Tensor:
        source, target = (_labels(classes, part, style).to(latents.device) for style in STYLES)
        shape = (editing.noises(levels), *latents.shape[1:])
        noise = noise_for(shape, seed, _of(numbers, part)).to(latents)
        return editing.edit(
            method,
            denoiser,
            latents,
            source,
            target,
            levels=levels,
            noise=noise,
            guidance_scale=guidance_scale,
            knobs=knobs,
            expert=expert,
        )

    return _redrawn(model, images, edited, batch_size=batch_size)


def _redrawn(
    model: Model,
    images: np.ndarray,
    edited: Callable[[Tensor, range], Tensor],
    *,
    batch_size: int,
) -> np.ndarray:
    """Pictures whose latents went through `edited`, which is also told which of them they are."""
    out = np.empty_like(images)
    for begin in range(0, len(images), batch_size):
        part = range(begin, min(begin + batch_size, len(images)))
        source = encode_all(model.vae, torch.from_numpy(images[begin : part.stop]))
        latents = edited(source.to(model.unet.device), part)
        with torch.no_grad():
            out[begin : part.stop] = to_uint8(decode(model.vae, latents))
    return out


def _class_conditioner(model: Model) -> Conditioner:
    """The model's conditioner without a translator's attention to the source; stage 04 has none."""
    return with_attention(model.conditioner, None, 0).to(model.unet.device).eval()


def _labels(classes: Sequence[str], part: range, style: str) -> Tensor:
    return torch.tensor([LABELS.index(label_of(classes[i], style)) for i in part])


def _of(numbers: Sequence[int] | None, part: range) -> Sequence[int]:
    return part if numbers is None else [numbers[i] for i in part]
