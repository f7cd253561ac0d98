"""Where a scene plays: five places whose layout both styles share.

A place is a wall (or sky) above the horizon, a floor below it and one or two things that stand
there. Edges are signed distances, so that the natural camera can put the far ones out of focus by
widening them: no filter is run over the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .describe import Scene, rng_of
from .surface import Array

WALL, FLOOR, PROP = 0, 1, 2


@dataclass
class Backdrop:
    """rgb: (3, H, W) in [0, 1]; region: (H, W) of WALL, FLOOR, PROP."""

    rgb: Array
    region: Array


def rgb(code: str) -> Array:
    """A colour from "rrggbb" as (3, 1, 1) floats."""
    return (np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255)[
        :, None, None
    ]


def waves(x: Array, y: Array, scale: float, rng: np.random.Generator, count: int = 6) -> Array:
    """Smooth band-limited noise of about unit deviation: a few random plane waves."""
    total = np.zeros_like(x)
    for angle, phase, k in zip(
        rng.uniform(0, np.pi, count),
        rng.uniform(0, 6.28, count),
        rng.uniform(0.6, 1.6, count),
        strict=True,
    ):
        total += np.sin((np.cos(angle) * x + np.sin(angle) * y) * (6.28 * k / scale) + phase)
    return (total * np.sqrt(2 / count)).astype(np.float32)


def _box(x: Array, y: Array, cx: float, cy: float, w: float, h: float, r: float = 0.0) -> Array:
    """Signed distance to a rounded box."""
    qx, qy = np.abs(x - cx) - w / 2 + r, np.abs(y - cy) - h / 2 + r
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - r


def _disc(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)


def _line(t: Array, period: float, width: float) -> Array:
    """Signed distance to the nearest of evenly spaced lines."""
    return np.abs((t / period + 0.5) % 1.0 - 0.5) * period - width / 2


class _Painter:
    """Lays shapes over a picture, keeping the region map in step."""

    def __init__(self, x: Array, y: Array, style: str) -> None:
        self.x, self.y, self.style = x, y, style
        self.pixel = 1.0 / x.shape[1]
        self.rgb = np.zeros((3, *x.shape), np.float32)
        self.region = np.zeros(x.shape, np.uint8)

    def lay(
        self,
        dist: Array,
        colour: Array,
        *,
        blur: float = 0.0,
        region: int | None = None,
        line: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Cover where ``dist`` < 0; ``blur`` is the natural lens's, ``line`` the cartoon's ink."""
        soft = blur if self.style == "natural" else 0.0
        alpha = np.clip(0.5 - dist / (self.pixel + soft), 0, 1) * opacity
        self.rgb += alpha * (colour - self.rgb)
        if region is not None:
            self.region[dist < 0] = region
        if line and self.style == "cartoon":
            ink = np.clip(0.5 - (np.abs(dist) - line / 2) / self.pixel, 0, 1) * 0.85
            self.rgb += ink * (rgb("2b2430") - self.rgb)


def backdrop(scene: Scene, style: str, x: Array, y: Array) -> Backdrop:
    """Paint a scene's place; ``x``, ``y`` are (H, W) picture coordinates, y up."""
    rng = rng_of(scene.layout_seed, 31)
    p = _Painter(x, y, style)
    natural = style == "natural"
    hz, side = scene.horizon, 1.0 if rng.random() < 0.5 else -1.0
    a, c, d, e = rng.uniform(0, 1, 4)
    hue = int(rng.integers(3))
    texture = rng_of(scene.layout_seed, 32)
    deep = np.clip((hz - y) / hz, 0, 1)  # 0 at the horizon, 1 at the lower edge
    depth = 1.0 / (0.25 + deep)  # perspective of the floor: far things are small
    fx = (x - 0.5) * depth
    floor = y - hz
    far, mid = 0.030, 0.022

    if scene.place == "kitchen":
        wall = rgb(("cfe3dc", "e9e2c6", "d3dfea")[hue])
        p.lay(np.full_like(x, -1.0), wall)
        tile = 0.125
        p.lay(
            np.minimum(_line(x + a, tile, 0.008), _line(y - hz, tile, 0.008)), wall * 0.86, blur=mid
        )
        cx = 0.5 + side * (0.24 + 0.1 * c)
        if d < 0.55:
            p.lay(
                _box(x, y, cx, 0.76, 0.34, 0.30), rgb("f6f3ea"), blur=far, region=PROP, line=0.012
            )
            p.lay(_box(x, y, cx, 0.76, 0.27, 0.23), rgb("9ed0ee"), blur=far)
            p.lay(_box(x, y, cx, 0.76, 0.02, 0.26), rgb("f6f3ea"), blur=far)
        else:
            p.lay(
                _box(x, y, cx, hz + 0.22, 0.30, 0.52, 0.03),
                rgb("eef0f2"),
                blur=far,
                region=PROP,
                line=0.012,
            )
            p.lay(_box(x, y, cx, hz + 0.30, 0.30, 0.012), rgb("a9b2b8"), blur=far)
            p.lay(
                _box(x, y, cx - side * 0.11, hz + 0.40, 0.02, 0.10, 0.01), rgb("8d979e"), blur=far
            )
        p.lay(floor, rgb("e8dcc0"), region=FLOOR, line=0.010, blur=0.008)
        sx, sy = np.floor(fx * 2.6 + e), np.floor(depth * 1.8 + c)
        dark = ((sx + sy) % 2 == 0) & (floor < 0)
        p.rgb += dark * (rgb(("b5785a", "7d99a8", "93a06c")[hue]) - p.rgb) * 0.75
    elif scene.place == "living room":
        wall = rgb(("d8b48c", "b9c4a0", "c9a3a0")[hue])
        p.lay(np.full_like(x, -1.0), wall)
        p.lay(_line(x + a, 0.14, 0.06), wall * 0.92, blur=mid)
        cx = 0.5 + side * (0.20 + 0.14 * c)
        if d < 0.5:
            sofa = rgb(("8a3b3f", "3f6b73", "6a4f86")[(hue + 1) % 3])
            p.lay(
                _box(x, y, cx, hz + 0.16, 0.62, 0.34, 0.08), sofa, blur=far, region=PROP, line=0.012
            )
            p.lay(_box(x, y, cx, hz + 0.05, 0.54, 0.13, 0.04), sofa * 1.18, blur=far, line=0.008)
        else:
            p.lay(
                _box(x, y, cx, 0.74, 0.34, 0.26), rgb("7a5230"), blur=far, region=PROP, line=0.012
            )
            p.lay(_box(x, y, cx, 0.74, 0.27, 0.19), rgb("a9c7b0"), blur=far)
            p.lay(_disc(x, y, cx - 0.05, 0.70, 0.10, 0.06), rgb("5f8a5e"), blur=far)
        p.lay(np.abs(y - hz - 0.015) - 0.018, rgb("f0e6d2"), blur=0.01, line=0.006)
        wood = rgb(("a8713f", "8c5a34", "b98a58")[(hue + 2) % 3])
        p.lay(floor, wood, region=FLOOR, line=0.010, blur=0.008)
        p.lay(np.maximum(_line(fx + e, 0.42, 0.018), floor), wood * 0.68)
    elif scene.place == "garden":
        p.lay(np.full_like(x, -1.0), rgb("8fc7ee"))
        p.rgb += np.clip((0.95 - y) / (0.95 - hz), 0, 1) * (rgb("dff0f7") - p.rgb)
        for k in range(2):
            cx, cy = (a + 0.55 * k) % 1.0, 0.84 + 0.08 * c - 0.1 * k
            cloud = np.minimum(
                _disc(x, y, cx, cy, 0.13, 0.045), _disc(x, y, cx + 0.06, cy + 0.03, 0.07, 0.045)
            )
            p.lay(cloud, rgb("ffffff"), blur=0.05)
        hedge = rgb(("4f8a45", "3f7a50", "6b9440")[hue])
        bumps = hz + 0.14 + 0.03 * np.sin(x * 19 + 6 * a) + 0.02 * np.sin(x * 41 + 6 * c)
        p.lay(y - bumps, hedge, blur=far, region=PROP, line=0.012)
        tx = 0.5 + side * (0.30 + 0.12 * d)
        p.lay(
            _box(x, y, tx, hz + 0.2, 0.07, 0.42), rgb("7b5a3c"), blur=far, region=PROP, line=0.010
        )
        crown = np.minimum(
            _disc(x, y, tx, 0.82, 0.22, 0.17), _disc(x, y, tx - side * 0.12, 0.74, 0.14, 0.11)
        )
        p.lay(crown, hedge * 1.12, blur=far, region=PROP, line=0.012)
        grass = rgb(("79b04c", "6aa352", "8cb550")[(hue + 1) % 3])
        p.lay(floor, grass, region=FLOOR, line=0.008, blur=0.012)
        p.rgb += (floor < 0) * (0.10 * np.sin(depth * 9 + 6 * e)) * grass
    elif scene.place == "street":
        brick = rgb(("b3654d", "a5785f", "9a5a52")[hue])
        p.lay(np.full_like(x, -1.0), brick)
        row = np.floor((y - hz) / 0.085)
        joint = np.minimum(
            _line(y - hz, 0.085, 0.012), _line(x + 0.11 * (row % 2) + a, 0.22, 0.012)
        )
        p.lay(joint, rgb("d0b7a6"), blur=0.012, opacity=0.8)
        cx = 0.5 + side * (0.26 + 0.1 * c)
        if d < 0.5:
            p.lay(
                _box(x, y, cx, hz + 0.26, 0.28, 0.56, 0.02),
                rgb(("2f5d62", "3d4f7d", "5b4636")[hue]),
                blur=far,
                region=PROP,
                line=0.012,
            )
            p.lay(_box(x, y, cx, hz + 0.36, 0.16, 0.20), rgb("ddc58a"), blur=far)
        else:
            p.lay(
                _box(x, y, cx, hz + 0.30, 0.035, 0.70),
                rgb("3b3f45"),
                blur=far,
                region=PROP,
                line=0.010,
            )
            p.lay(
                _disc(x, y, cx, hz + 0.50, 0.075, 0.085),
                rgb("fbe6a2"),
                blur=far,
                region=PROP,
                line=0.012,
            )
        slab = rgb("b9b7b2")
        p.lay(floor, slab, region=FLOOR, line=0.010, blur=0.008)
        p.lay(
            np.maximum(np.minimum(_line(fx + e, 0.62, 0.02), _line(depth + c, 0.75, 0.03)), floor),
            slab * 0.78,
        )
    else:  # beach
        p.lay(np.full_like(x, -1.0), rgb("8fd0ee"))
        p.rgb += np.clip((1.0 - y) / (1.0 - hz), 0, 1) * (rgb("fdeccb") - p.rgb) * 0.7
        p.lay(_disc(x, y, 0.5 + side * 0.3, 0.84, 0.07, 0.07), rgb("fff3b0"), blur=0.05)
        sea = rgb(("3d93b8", "4aa6b0", "3a83b5")[hue])
        p.lay(y - hz - 0.17, sea, blur=0.012, line=0.006)
        p.lay(
            np.maximum(_line(y + 0.006 * np.sin(30 * x), 0.05, 0.010), y - hz - 0.13),
            sea * 1.25,
            blur=0.01,
            opacity=0.7,
        )
        ux = 0.5 - side * (0.28 + 0.1 * c)
        if d < 0.6:
            p.lay(
                _box(x, y, ux, hz + 0.22, 0.02, 0.5),
                rgb("f2ead8"),
                blur=far,
                region=PROP,
                line=0.006,
            )
            shade = np.maximum(_disc(x, y, ux, hz + 0.36, 0.24, 0.17), hz + 0.36 - y)
            p.lay(
                shade,
                rgb(("d8484a", "e0a034", "4a70c4")[(hue + 1) % 3]),
                blur=far,
                region=PROP,
                line=0.012,
            )
            p.lay(np.maximum(shade, np.abs(x - ux) - 0.05), rgb("f7f1e3"), blur=far)
        sand = rgb(("ecd6a0", "e4c890", "f0dcb0")[(hue + 2) % 3])
        p.lay(floor + 0.012 * np.sin(9 * x + 6 * a), sand, region=FLOOR, line=0.008, blur=0.012)

    if natural:
        # Lens and light: the wall falls off to the side of the lamp, textures are fine and soft.
        wall_grain = waves(x, y, 0.16, texture, 5) * 0.012
        floor_grain = waves(fx, depth * 0.6, 0.22, texture, 7) * 0.035
        p.rgb *= 1 + np.where(floor < 0, floor_grain, wall_grain)
        grey = p.rgb.mean(0, keepdims=True)
        p.rgb = 0.72 * p.rgb + 0.28 * grey
        lamp = np.sign(scene.light_angle)
        p.rgb *= 0.86 + 0.10 * lamp * (x - 0.5) + 0.10 * (y - 0.3)
        p.rgb *= 1 - 0.22 * np.exp(-np.abs(floor) / 0.03)  # the corner where wall meets floor
    else:
        # Gouache: broad strokes, a little lighter toward the middle.
        p.rgb *= 1 + 0.020 * np.sign(waves(x, y * 1.6, 0.35, texture, 4))
        p.rgb *= 1.03 - 0.10 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    return Backdrop(np.clip(p.rgb, 0, 1), p.region)
