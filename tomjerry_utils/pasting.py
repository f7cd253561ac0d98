"""Setting an animal of one photograph into another: cut out, lit, pasted with its shadow.

All in amounts of light, not in sRGB levels, whose mixtures have dark rims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

LIGHT = 0.35  # how much of the way the mouse's light follows the scene's,
BRIGHTER, TINT = 1.3, 1.06  # and how far at most
BRIGHTEST = 0.92  # of what a picture can show: fur has no burnt-out spots
_LEVELS = np.arange(256) / 255
# sRGB levels as amounts of light.
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(
    np.float32
)


@dataclass(frozen=True)
class Cutout:
    """An animal without its ground: linear colours (h, w, 3) and how opaque it is (h, w)."""

    colours: np.ndarray
    alpha: np.ndarray


def light(
    animal: np.ndarray, share: np.ndarray, scene: np.ndarray, scene_share: np.ndarray
) -> np.ndarray:
    """What to multiply an animal's colours by: (3,) float32.

    The light of a photograph is judged by what is around its animal, since a dark mouse is no sign
    of a dark room. It is followed only part of the way, and in colour hardly at all, since what is
    around may itself be dark or coloured.
    """

    def mean(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
        step = max(1, min(image.shape[:2]) // 64)
        around = _LINEAR[image[::step, ::step]][inside[::step, ::step] < 0.1]
        return (around.mean(0) if len(around) else np.full(3, 0.2)) + 0.01

    ratio = mean(scene, scene_share) / mean(animal, share)
    brighter = float(np.clip(ratio.mean() ** LIGHT, 1 / BRIGHTER, BRIGHTER))
    if brighter > 1:
        brightest = float(np.quantile(_LINEAR[animal[share > 0.9]], 0.99)) if share.any() else 0.0
        brighter = max(1.0, min(brighter, BRIGHTEST / max(brightest, 0.01)))
    tint = np.clip((ratio / ratio.mean()) ** LIGHT, 1 / TINT, TINT)
    return (brighter * tint).astype(np.float32)


def cut(
    image: np.ndarray, share: np.ndarray, scale: float, *, flip: bool = False, whole: bool = True
) -> Cutout:
    """An animal of a given scale, its rim feathered and free of its old ground's colours.

    Args:
        image: (H, W, 3) uint8; share: (H, W) in [0, 1], how much of a pixel is the animal.
        whole: it ends at the picture's borders; else it goes on behind them.
    """
    height = max(1, round(image.shape[0] * scale))
    width = max(1, round(image.shape[1] * scale))
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    mask = Image.fromarray((share * 255).round().astype(np.uint8))
    alpha = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    # A ramp two pixels wide that begins inside the mask, where there is only fur.
    soft = ndimage.gaussian_filter(alpha, 0.7, mode="constant" if whole else "nearest")
    alpha = ((soft - 0.3) / 0.6).clip(0, 1)
    alpha = alpha * alpha * (3 - 2 * alpha)
    # Colours of the rim come from the nearest inner pixel; the ridge of a thin tail is inner too.
    inner = (alpha > 0.97) | ((alpha > 0.4) & (alpha >= ndimage.maximum_filter(alpha, 3)))
    if inner.any():
        nearest = ndimage.distance_transform_edt(
            ~inner, return_distances=False, return_indices=True
        )
        small = small[tuple(nearest)]
    if flip:
        small, alpha = small[:, ::-1], alpha[:, ::-1]
    return Cutout(_LINEAR[small], np.ascontiguousarray(alpha))


def paste(scene: np.ndarray, cutout: Cutout, at: tuple[int, int], gain: np.ndarray) -> np.ndarray:
    """The scene with an animal on it, and the shadow that it casts where it stands."""
    h, w = cutout.alpha.shape
    reach = h // 3 + 2
    y, x = at[0] - reach, at[1] - reach
    top, left = max(0, y), max(0, x)
    bottom, right = min(scene.shape[0], at[0] + h + reach), min(scene.shape[1], at[1] + w + reach)
    window = slice(top, bottom), slice(left, right)
    part = slice(top - y, bottom - y), slice(left - x, right - x)
    shadow = _shadow(np.pad(cutout.alpha, reach), at[0] + h - y, h)[part][..., None]
    alpha = np.pad(cutout.alpha, reach)[part][..., None]
    colours = np.pad(cutout.colours, ((reach, reach), (reach, reach), (0, 0)))[part]
    lit = _LINEAR[scene[window]] * (1 - shadow)
    lit = lit * (1 - alpha) + (colours * gain) * alpha
    out = scene.copy()
    touched = (alpha > 0) | (shadow > 0.004)
    out[window] = np.where(touched, _levels(lit), scene[window])
    return out


def _shadow(alpha: np.ndarray, ground: int, height: int) -> np.ndarray:
    """How much light is kept away, in [0, 1]: much where the animal touches the ground row, a
    little under all of it."""
    inside = alpha > 0.5
    any_here = inside.any(0)
    lowest = len(alpha) - inside[::-1].argmax(0)
    off = np.where(any_here, ground - lowest, 1e6) / height
    rows = np.arange(len(alpha), dtype=np.float32)

    def patch(fall: float, across: float, down: float, middle: float) -> np.ndarray:
        columns = ndimage.gaussian_filter1d(np.exp(-((off / fall) ** 2)), across * height)
        line = np.exp(-0.5 * ((rows - ground - middle * height) / (down * height)) ** 2)
        return line[:, None] * columns[None]

    touching, under = patch(0.07, 0.05, 0.035, -0.01), patch(0.4, 0.1, 0.09, 0.0)
    return 1 - (1 - 0.6 * touching.clip(0, 1)) * (1 - 0.35 * under.clip(0, 1))


def _levels(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (curve * 255 + 0.5).astype(np.uint8)
