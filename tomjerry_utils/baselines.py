"""The rivals: what a user would pick instead of the translator.

- identity: the cartoon as it is;
- colour: Reinhard's statistics transfer, the cartoon in the colours of the natural training set;
- sdedit: the source's latents, noised half-way and denoised by stage 04's class-conditional model,
  which is told the class and nothing else of the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tomjerry_utils import UserError, structure
from tomjerry_utils.autoencoder import decode, encode_all, factor_of
from tomjerry_utils.denoiser import Batch, Conditioner, sample, with_attention
from tomjerry_utils.images import add_grain, to_uint8
from tomjerry_utils.scenes import LABELS, label_of
from tomjerry_utils.translator import noise_for

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from tomjerry_utils.translator import Translator

METHODS = ("identity", "colour", "sdedit")
TITLES = {"identity": "identity", "colour": "colour transfer", "sdedit": "SDEdit"}
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
    strength: float = STRENGTH,
    model: Model | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Translate cartoons by a rival method.

    Args:
        method: of :data:`METHODS`.
        translator: lends what is not the rival's own: colour statistics, autoencoder, the reading
            of classes.
        images: (N, S, S, 3) uint8 at the translator's size.
        classes: tom, jerry, both, or None to read the class off the picture.
        seed: of SDEdit's noise; a picture's depends on this and its number alone.
        numbers: the pictures' numbers; None counts them from 0.
        steps: SDEdit's evaluations of the denoiser; None for as many as the translator takes.
        strength: share of the noise that SDEdit adds, 0 … 1.
        model: whose denoiser SDEdit uses, stage 04's where it is at hand; None for the
            translator's own, its view left out.

    Returns:
        (N, S, S, 3) uint8 and the N classes.

    Raises:
        UserError: an unknown method, or a translator without colour statistics.
    """
    if method not in METHODS:
        raise UserError(f"no rival method '{method}': choose from {', '.join(METHODS)}")
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
        return transfer_colour(images, translator.colour), names
    made = sdedit(
        model or translator,
        images,
        names,
        seed=seed,
        steps=steps or translator.steps,
        strength=strength,
        guidance_scale=translator.guidance_scale,
        numbers=numbers,
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


def transfer_colour(images: np.ndarray, colour: dict[str, Any]) -> np.ndarray:
    """Give each picture the mean and deviation of a training set (Reinhard et al. 2001).

    Args:
        images: (N, H, W, 3) uint8.
        colour: from :func:`measure_colour`.
    """
    mean, std = np.asarray(colour["mean"]), np.asarray(colour["std"])
    out = np.empty_like(images)
    for i, image in enumerate(images):
        lab = to_lab(image)
        own = np.maximum(lab.std((0, 1)), 1e-6)
        gain = np.minimum(std / own, LARGEST_GAIN)
        out[i] = from_lab((lab - lab.mean((0, 1))) * gain + mean)
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
    device = model.unet.device
    # A translator's attention to the source is left out; stage 04 has none.
    conditioner = with_attention(model.conditioner, None, 0).to(device).eval()
    out = np.empty_like(images)
    places = range(len(images)) if numbers is None else numbers
    for begin in range(0, len(images), batch_size):
        part = images[begin : begin + batch_size]
        source = encode_all(model.vae, torch.from_numpy(part)).to(device)
        latents = source
        if strength > 0:
            batch = _classes_only(model.unet, conditioner, source, classes[begin:][: len(part)])
            latents = sample(
                model.unet,
                conditioner,
                batch,
                model.scheduler,
                steps=_schedule_length(model.scheduler, steps, strength),
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                noise=noise_for(source.shape[1:], seed, places[begin:][: len(part)]).to(source),
                start=source,
                strength=strength,
            )
        with torch.no_grad():
            out[begin : begin + len(part)] = to_uint8(decode(model.vae, latents))
    return out


def _classes_only(
    unet: UNet2DConditionModel, conditioner: Conditioner, latents: Tensor, classes: Sequence[str]
) -> Batch:
    """Conditions that hold a class and nothing else, as they are dropped in training."""
    count, channels, *grid = latents.shape
    here = latents.device
    labels = [LABELS.index(label_of(name, "natural")) for name in classes]
    return Batch(
        latents=latents,
        labels=torch.tensor(labels, device=here),
        text=torch.zeros(count, 1, conditioner.config.text_dim, device=here),
        mask=torch.zeros(count, 1, dtype=torch.long, device=here),
        view=torch.zeros(count, unet.config.in_channels - channels, *grid, device=here),
    )


def _schedule_length(scheduler: DDIMScheduler, steps: int, strength: float) -> int:
    """How many steps the whole schedule must have for `steps` of them to lie below `strength`."""
    return min(math.ceil(steps / strength), scheduler.config.num_train_timesteps)
