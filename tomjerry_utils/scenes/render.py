"""The two renderers and the truth they share."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .describe import STYLES, Scene, describe, rng_of
from .places import PROP, backdrop, rgb, waves
from .skeleton import KEYPOINTS, Figure, figure_of
from .surface import Array, Blend, Body, blend, coverage

PARTS = ("wall", "floor", "prop", "torso", "head", "ear", "eye", "nose", "leg", "tail")
_FUR = ("body", "near_hind", "near_fore", "head")
_INK = rgb("1f1a22")


@dataclass
class Picture:
    """A rendered scene of S × S pixels.

    image: (S, S, 3) uint8. With truth: mask (S, S) uint8, 0 background, 1 cat or Tom, 2 mouse or
    Jerry; parts (S, S) uint8 into :data:`PARTS`; keypoints (A, K, 3): x, y in pixels (origin at the
    upper left corner) and 1 where the point lies in the frame; depth (S, S), picture units toward
    the viewer, −9 in the background; body (S, S) int32, which body of which figure is seen.
    """

    image: Array
    mask: Array | None = None
    parts: Array | None = None
    keypoints: Array | None = None
    depth: Array | None = None
    body: Array | None = None


@dataclass
class _Canvas:
    x: Array
    y: Array
    rgb: Array
    depth: Array
    parts: Array
    mask: Array
    body: Array

    @property
    def pixel(self) -> float:
        return 1.0 / self.x.shape[1]

    def over(self, alpha: Array, colour: Array) -> None:
        self.rgb += alpha * (colour - self.rgb)

    def stamp(self, dist: Array, seen: Blend, bodies: list[Body], ids: list[int], who: int) -> None:
        """Record what is visible now; pixels count by their centre."""
        inside = (dist < 0) & (seen.index >= 0)
        table = np.array([PARTS.index(b.part) for b in bodies] + [0], np.uint8)
        self.parts[inside] = table[seen.index[inside]]
        numbers = np.array([1000 * who + i for i in ids] + [0], np.int32)
        self.body[inside] = numbers[seen.index[inside]]
        self.mask[inside] = who
        self.depth[inside] = seen.depth[inside]


def _layer(figure: Figure, names: tuple[str, ...]) -> tuple[list[Body], list[int]]:
    chosen = [(b, i) for i, b in enumerate(figure.bodies) if b.layer in names]
    return [b for b, _ in chosen], [i for _, i in chosen]


# --- cartoon ---------------------------------------------------------------------------------


def _cartoon_colours(figure: Figure, zoo: bool) -> dict[str, Array]:
    rng = rng_of(figure.actor.seed, 41)
    vary = (1 + 0.06 * rng.uniform(-1, 1, 3)).astype(np.float32)[:, None, None]
    if zoo:
        base = rng.uniform(0.25, 0.9, 3).astype(np.float32)[:, None, None]
        light = np.clip(base * 0.4 + 0.6, 0, 1)
        return {
            "coat": base,
            "light": light,
            "inner": rgb("efa8a4"),
            "tail": base,
            "tip": light if rng.random() < 0.5 else base,
            "nose": rgb("3a2a2e"),
            "iris": rgb("b8d24a"),
        }
    if figure.actor.kind == "cat":
        return {
            "coat": rgb("7f8ea6") * vary,
            "light": rgb("f1f1ee"),
            "inner": rgb("f0a7b0"),
            "tail": rgb("7f8ea6") * vary,
            "tip": rgb("f1f1ee"),
            "nose": rgb("2a2328"),
            "iris": rgb("c9dd4e"),
        }
    return {
        "coat": rgb("b0733c") * vary,
        "light": rgb("f3d9ac"),
        "inner": rgb("f2b59a"),
        "tail": rgb("d59a6a"),
        "tip": rgb("d59a6a"),
        "nose": rgb("33241f"),
        "iris": rgb("ffffff"),
    }


def _draw_cartoon(canvas: _Canvas, scene: Scene, figure: Figure, who: int) -> None:
    colours = _cartoon_colours(figure, scene.zoo)
    s, px = figure.scale, canvas.pixel
    ink = (
        max(0.016 * (0.6 + 0.6 * s), 0.9 * px)
        if figure.actor.kind == "cat"
        else max(0.013, 0.85 * px)
    )
    smooth = 0.022 * s
    shadow = _ground_shadow(canvas, scene, figure, 0.8)
    canvas.rgb *= 1 - 0.30 * np.clip(shadow * 2.2 - 0.5, 0, 1)
    below: Array | None = None
    seen: dict[str, Blend] = {}
    order = (
        "tail",
        "far_hind",
        "far_fore",
        "ear_far",
        "ear_far_in",
        "body",
        "near_hind",
        "near_fore",
        "head",
        "ear_near_in",
        "head_in",
    )
    for layer in order:
        bodies, ids = _layer(figure, (layer,))
        if not bodies:
            continue
        part = blend(bodies, canvas.x, canvas.y, smooth, ink)
        seen[layer] = part
        inner = layer.endswith("_in")
        if not inner:
            alpha = coverage(np.abs(part.dist) - 0.5 * ink, px)
            if below is not None and layer.startswith("near"):
                # Where a limb grows out of the body the line fades: ink only near its outer edge.
                alpha = alpha * np.clip(1.0 + (below + 0.035 * s) / (0.03 * s), 0, 1)
            canvas.over(alpha, _INK)
        fill = _cartoon_fill(figure, part, bodies, colours, layer)
        if layer.startswith("far"):
            fill = fill * 0.90
        canvas.over(coverage(part.dist + (0.5 * ink if not inner else 0.0), px), fill)
        if layer.startswith("near") and below is not None:
            root = coverage(part.dist, px) * np.clip(-(below + 0.02 * s) / (0.03 * s), 0, 1)
            canvas.over(root, fill)
        canvas.stamp(part.dist, part, bodies, ids, who)
        if layer == "body":
            below = part.dist
    _cartoon_face(canvas, figure, colours, ink, who)


def _cartoon_fill(
    figure: Figure, part: Blend, bodies: list[Body], colours: dict[str, Array], layer: str
) -> Array:
    tints = np.array(
        [{"muzzle": 1, "paw": 2, "tip": 3, "inner": 4, "tail": 5}.get(b.tint, 0) for b in bodies]
        + [0]
    )[part.index]
    gloves = figure.actor.kind == "cat"
    fill = np.broadcast_to(colours["coat"], (3, *part.dist.shape)).copy()
    if layer == "body":  # the belly: the lower, nearer side of the trunk
        belly = part.coat[1] < -0.10
        fill = np.where(belly & (part.normal[2] > 0.2), colours["light"], fill)
    fill = np.where(tints == 1, colours["light"], fill)
    if gloves:
        fill = np.where(tints == 2, colours["light"], fill)
    fill = np.where(tints == 3, colours["tip"], fill)
    fill = np.where(tints == 4, colours["inner"], fill)
    fill = np.where(tints == 5, colours["tail"], fill)
    return fill


def _cartoon_face(
    canvas: _Canvas, figure: Figure, colours: dict[str, Array], ink: float, who: int
) -> None:
    px, h = canvas.pixel, figure.head_radius
    thin = max(0.55 * ink, 0.7 * px)
    for layer in ("eye_far", "eye_near"):
        bodies, ids = _layer(figure, (layer,))
        for body, number in zip(bodies, ids, strict=True):
            part = blend([body], canvas.x, canvas.y, 0.02 * h, ink)
            if body.tint == "sclera":
                canvas.over(coverage(part.dist - 0.7 * thin, px), _INK)
                colour = rgb("fffdf2") if figure.actor.kind == "mouse" else rgb("f6f2b4")
                canvas.over(coverage(part.dist + 0.2 * thin, px), colour)
                canvas.stamp(part.dist, part, [body], [number], who)
            elif body.tint == "iris":
                if figure.actor.kind == "cat":
                    canvas.over(coverage(part.dist, px), colours["iris"])
            elif body.tint == "pupil":
                canvas.over(coverage(part.dist, px), _INK)
            else:
                canvas.over(coverage(part.dist, px), rgb("ffffff"))
    for start, end in figure.brows if figure.actor.kind == "cat" else []:
        _stroke(canvas, start, end, 1.3 * thin, _INK)
    for start, end in zip(figure.mouth[:-1], figure.mouth[1:], strict=True):
        _stroke(canvas, start, end, thin, _INK)
    for start, end in figure.whiskers:
        _stroke(canvas, start, end, 0.5 * thin, _INK, 0.8)
    bodies, ids = _layer(figure, ("nose",))
    nose = blend(bodies, canvas.x, canvas.y, 0.02 * h, ink)
    canvas.over(coverage(nose.dist, px), colours["nose"])
    canvas.stamp(nose.dist, nose, bodies, ids, who)


def _stroke(
    canvas: _Canvas, start: Array, end: Array, width: float, colour: Array, opacity: float = 1.0
) -> None:
    """A straight line; thinner than a pixel it fades instead of vanishing."""
    wide = max(width, canvas.pixel)
    line = Body("head", "line", start, b=end, ra=wide / 2, rb=wide / 2)
    pad = wide + 2 * canvas.pixel
    x0, x1, y0, y1 = line.bounds()
    n = canvas.x.shape[0]
    c = slice(max(int((x0 - pad) * n), 0), max(int((x1 + pad) * n) + 1, 0))
    r = slice(max(int((1 - y1 - pad) * n), 0), max(int((1 - y0 + pad) * n) + 1, 0))
    if canvas.x[r, c].size == 0:
        return
    dist = line.evaluate(canvas.x[r, c], canvas.y[r, c])[0]
    alpha = coverage(dist, canvas.pixel) * opacity * width / wide
    canvas.rgb[:, r, c] += alpha * (colour - canvas.rgb[:, r, c])


# --- natural ---------------------------------------------------------------------------------

_COATS = {
    "cat": (
        ("brown tabby", "9c7d58", "3d2c1e", "d9c4a2"),
        ("grey tabby", "8f8f8c", "3a3a3c", "d6d4cf"),
        ("ginger", "cf8a47", "9a5522", "f0d9b4"),
        ("black", "3a3638", "2a2729", "4a4648"),
        ("white", "e6e1d8", "d8d2c8", "f4f1ea"),
        ("tuxedo", "37343a", "29272c", "f0eee9"),
        ("calico", "e9e2d6", "c37a3b", "f4efe6"),
        ("siamese", "d9c7a9", "4a3a33", "e9ddc8"),
        ("blue", "7d8590", "646b76", "a6acb4"),
    ),
    "mouse": (
        ("agouti", "8a7156", "64503c", "cdbb9f"),
        ("house", "8b8780", "6a665f", "c4bfb5"),
        ("fawn", "b98f5f", "936c42", "e6d3b4"),
        ("dark", "5a5148", "413a34", "8d8377"),
        ("lab", "e4ded6", "d5cdc4", "f2eee8"),
    ),
}


def _ground_shadow(canvas: _Canvas, scene: Scene, figure: Figure, strength: float) -> Array:
    """Soft shadow on the floor: every body dropped along the light as a flattened Gaussian."""
    lean = -np.tan(scene.light_angle) * 0.35
    total = np.zeros_like(canvas.x)
    for body in figure.bodies:
        if body.part not in ("torso", "head", "leg"):
            continue
        x0, x1, y0, y1 = body.bounds()
        height = max(0.5 * (y0 + y1) - figure.ground, 0.0)
        cx = 0.5 * (x0 + x1) + lean * height
        wide = 0.55 * (x1 - x0) + 0.25 * height + 0.012
        cy = figure.ground - 0.010 + 0.10 * height
        tall = 0.025 + 0.10 * height
        weight = 1.0 / (1.0 + 6.0 * max(y0 - figure.ground, 0) / max(figure.scale, 1e-3))
        q = ((canvas.x - cx) / wide) ** 2 + ((canvas.y - cy) / tall) ** 2
        total += weight * np.exp(-1.5 * q) * (0.55 if body.part == "leg" else 0.85)
    return (1 - np.exp(-total)) * strength


def _coat(figure: Figure, zoo: bool) -> tuple[str, Array, Array, Array, Array, Array]:
    rng = rng_of(figure.actor.seed, 42)
    kind = figure.actor.kind
    if zoo:
        kind = "cat" if rng.random() < 0.55 else "mouse"
    name, base, dark, light = _COATS[kind][int(rng.integers(len(_COATS[kind])))]
    vary = (1 + 0.07 * rng.uniform(-1, 1) + 0.03 * rng.uniform(-1, 1, 3)).astype(np.float32)
    skin = rgb("c98f86") if kind == "mouse" else rgb("c9968c")
    eye = rgb(("8fae4a", "c8a03c", "79a87c", "b8762e")[int(rng.integers(4))])
    if kind == "mouse":
        eye = rgb("1c1716")
    elif name == "siamese":
        eye = rgb("6fa3cc")
    v = vary[:, None, None]
    return name, rgb(base) * v, rgb(dark) * v, rgb(light) * v, skin, eye


def _markings(
    name: str,
    seen: Blend,
    bodies: list[Body],
    base: Array,
    dark: Array,
    light: Array,
    rng: np.random.Generator,
) -> Array:
    """The coat's colour at each pixel from its position on the animal."""
    u, v, w = seen.coat
    phase = rng.uniform(0, 6.28, 6).astype(np.float32)
    wobble = np.sin(4.1 * u + 5.3 * v + phase[0]) + np.sin(6.7 * v - 3.9 * w + phase[1])
    colour = np.broadcast_to(base, (3, *u.shape)).copy()

    def mix(amount: Array, other: Array) -> None:
        nonlocal colour
        colour += np.clip(amount, 0, 1) * (other - colour)

    tints = np.array([b.tint for b in bodies] + ["coat"])[seen.index]
    parts = np.array([b.part for b in bodies] + ["torso"])[seen.index]
    belly = np.clip((-v - 0.10 + 0.03 * wobble) * 6, 0, 1) * (parts == "torso")
    if name in ("brown tabby", "grey tabby", "ginger"):
        freq = np.where(parts == "torso", 17.0, 24.0)
        along = np.where(parts == "leg", v, u) + 0.25 * v * (parts == "torso")
        stripe = np.sin(freq * along + 0.9 * wobble + phase[2])
        mix((stripe - 0.05) * 1.3 * (0.85 - 0.8 * belly), dark)
        mix(0.8 * belly, light)
        mix((tints == "muzzle") * 0.8, light)
    elif name == "tuxedo":
        mix(
            np.clip((-v - 0.02 + 0.25 * np.clip(u - 0.3, 0, 1) + 0.05 * wobble) * 9, 0, 1)
            * (parts == "torso"),
            light,
        )
        mix(((tints == "muzzle") | (tints == "paw")) * 1.0, light)
    elif name == "calico":
        patch = np.sin(5.0 * u + phase[3]) + np.sin(6.0 * v + 4.0 * w + phase[4]) + 0.35 * wobble
        mix((patch - 0.5) * 5, dark)
        mix((-patch - 0.7) * 5, rgb("3a3230"))
    elif name == "siamese":
        point = (
            (parts == "ear")
            | (tints == "paw")
            | (tints == "muzzle")
            | (parts == "tail")
            | (tints == "tip")
        )
        mix(point * 0.9 + (parts == "leg") * np.clip(-v - 0.6, 0, 1) * 1.2, dark)
        mix((parts == "head") * np.clip((seen.coat[0] - 1.38) * 5, 0, 0.8), dark)
    else:
        mix(0.75 * belly, light)
        mix((tints == "muzzle") * 0.6, light)
        mix(np.clip((v - 0.15) * 3, 0, 0.5) * (parts == "torso"), dark)
    return colour


def _draw_natural(canvas: _Canvas, scene: Scene, figure: Figure, who: int) -> None:
    name, base, dark, light, skin, eye = _coat(figure, scene.zoo)
    s, px = figure.scale, canvas.pixel
    key = np.array([np.sin(scene.light_angle) * 0.75, 0.62, 0.55], np.float32)
    key /= np.linalg.norm(key)
    canvas.rgb *= 1 - _ground_shadow(canvas, scene, figure, 0.62)
    bare = figure.actor.morph > 0.5  # mouse-like: bare tail, feet and ears
    fuzz = waves(canvas.x, canvas.y, 0.05 * s + 0.016, rng_of(figure.actor.seed, 43), 6)
    strands = rng_of(figure.actor.seed, 44).uniform(0, 6.28, 4).astype(np.float32)
    # Single hairs are drawn only where pixels are small enough to show them.
    fine = float(np.clip((1 / 96 - px) * 192, 0, 1))

    def draw(
        layers: tuple[str, ...], *, smooth: float, shade: float = 1.0, fur: bool = True
    ) -> None:
        bodies, ids = _layer(figure, layers)
        if not bodies:
            return
        seen = blend(bodies, canvas.x, canvas.y, smooth, 0.02)
        dist = seen.dist + (0.0035 * s * fuzz if fur else 0.0)
        if fur and fine:
            u, v, w = seen.coat
            hairs = rng_of(figure.actor.seed, 46)
            streak = waves(0.22 * u + 0.1 * w, v + 0.15 * u, 0.045, hairs, 9)
            streak = streak + 0.7 * waves(0.3 * u, v - 0.2 * w, 0.022, hairs, 9)
            dist = dist + fine * 0.0045 * s * waves(canvas.x, canvas.y, 0.02 * s, hairs, 8)
        colour = _markings(name, seen, bodies, base, dark, light, rng_of(figure.actor.seed, 45))
        tints = np.array([b.tint for b in bodies] + ["coat"])[seen.index]
        if bare:
            colour = np.where((tints == "paw") | (tints == "tail") | (tints == "tip"), skin, colour)
            colour = np.where(tints == "ear", 0.45 * colour + 0.55 * skin, colour)
        colour = np.where(tints == "inner", skin * (1.0 if bare else 0.85), colour)
        lambert = (seen.normal * key[:, None, None]).sum(0)
        direct = np.clip(0.62 * lambert + 0.38, 0, 1) ** 1.25
        sky = 0.5 + 0.5 * seen.normal[1]
        bounce = np.clip(-seen.normal[1], 0, 1)
        rim = (1 - np.clip(seen.normal[2], 0, 1)) ** 3
        lit = 0.24 + 0.20 * sky + 0.10 * bounce + 0.78 * direct
        lit = lit * (1 - 0.38 * rim * (1 - direct))
        if fur:
            u, v, w = seen.coat
            clump = np.sin(9 * u + 7 * v + strands[2]) + np.sin(8 * v - 11 * w + strands[3])
            hair = np.sin(27 * v + 5 * u + 1.1 * clump + 0.7 * fuzz + strands[0])
            if fine:
                lit = lit * (1 + 0.075 * fine * np.clip(streak, -2, 2))
            lit = lit * (1 + 0.055 * hair + 0.035 * clump + 0.02 * fuzz)
        # Near the ground less of the sky is seen.
        low = np.clip((canvas.y - figure.ground) / (0.35 * s), 0, 1)
        lit = lit * shade * (0.78 + 0.22 * low)
        out = colour * lit + 0.10 * rim * direct * (0.5 + 0.5 * colour)
        canvas.over(coverage(dist, px, 0.008 * s if fur else 0.0), out)
        canvas.stamp(seen.dist, seen, bodies, ids, who)

    draw(("tail",), smooth=0.02 * s, fur=not bare)
    draw(("far_hind", "far_fore"), smooth=0.04 * s, shade=0.66)
    draw(("ear_far",), smooth=0.02 * s, shade=0.9)
    draw(("ear_far_in",), smooth=0.02 * s, fur=False)
    draw(_FUR, smooth=0.05 * s)
    draw(("head_in",), smooth=0.02 * s, fur=False)
    _natural_face(canvas, figure, eye, skin, key, who, bare)


def _natural_face(
    canvas: _Canvas, figure: Figure, eye: Array, skin: Array, key: Array, who: int, bare: bool
) -> None:
    px, h = canvas.pixel, figure.head_radius
    for layer in ("eye_far", "eye_near"):
        bodies, ids = _layer(figure, (layer,))
        for body, number in zip(bodies, ids, strict=True):
            part = blend([body], canvas.x, canvas.y, 0.02 * h, 0.02)
            if body.tint == "sclera":  # the dark rim of the lids
                canvas.over(coverage(part.dist - 0.03 * h, px), rgb("211b1a"))
                canvas.stamp(part.dist, part, [body], [number], who)
            elif body.tint == "iris":
                canvas.over(coverage(part.dist, px), eye * (0.85 + 0.4 * part.normal[1]))
            elif body.tint == "pupil":
                canvas.over(coverage(part.dist, px), rgb("0c0a0a"))
            else:
                canvas.over(coverage(part.dist - 0.01 * h, px), rgb("fdfdfd"))
    bodies, ids = _layer(figure, ("nose",))
    nose = blend(bodies, canvas.x, canvas.y, 0.02 * h, 0.02)
    shade = 0.7 + 0.4 * (nose.normal * key[:, None, None]).sum(0)
    canvas.over(coverage(nose.dist, px), skin * (0.95 if bare else 0.8) * shade)
    canvas.stamp(nose.dist, nose, bodies, ids, who)
    for start, end in zip(figure.mouth[1:-2], figure.mouth[2:-1], strict=True):
        _stroke(canvas, start, end, 0.045 * h, rgb("3a2b28"), 0.7)
    for start, end in figure.whiskers:
        _stroke(canvas, start, end, 0.016 * h, rgb("f4f1ea"), 0.75)


_GRADES = {  # (multiplier, lift) of each light on the finished picture
    "day": ((1.04, 1.02, 0.98), (0.00, 0.00, 0.01)),
    "evening": ((1.10, 0.90, 0.72), (0.02, 0.00, 0.00)),
    "night": ((0.60, 0.66, 0.80), (0.00, 0.01, 0.03)),
}


def render(scene: Scene, style: str, size: int, noise: bool = True, truth: bool = False) -> Picture:
    """Draw a scene.

    Args:
        scene: from :func:`describe` or :func:`animate`.
        style: "cartoon" or "natural".
        size: edge of the square picture, pixels.
        noise: the natural camera's sensor noise.
        truth: also return mask, parts, keypoints, depth and body numbers.

    Raises:
        ValueError: an unknown style or a size below 8.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
    if size < 8:
        raise ValueError(f"size {size} is below 8 pixels")
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(ticks, 1 - ticks)
    ground = backdrop(scene, style, x, y)
    canvas = _Canvas(
        x,
        y,
        ground.rgb.astype(np.float32),
        np.full((size, size), -9.0, np.float32),
        np.minimum(ground.region, PROP).copy(),
        np.zeros((size, size), np.uint8),
        np.zeros((size, size), np.int32),
    )
    figures = [figure_of(scene, i, style) for i in range(len(scene.actors))]
    draw = _draw_cartoon if style == "cartoon" else _draw_natural
    for figure in figures:
        draw(canvas, scene, figure, 1 if figure.actor.kind == "cat" else 2)
    gain, lift = (np.array(v, np.float32)[:, None, None] for v in _GRADES[scene.light])
    if style == "cartoon":  # painted light is milder
        gain, lift = 0.45 + 0.55 * gain, 0.5 * lift
    out = canvas.rgb * gain + lift
    if style == "natural":
        out = out - 0.05 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) * 4 * out
        out = np.clip(out, 0, None)
        out = out * (1.12 - 0.14 * np.minimum(out, 1.2))  # a film's shoulder
        if noise:
            grain = rng_of(scene.seed, 51, size).standard_normal(out.shape, np.float32)
            out = out + 0.010 * grain
    image = (np.clip(out, 0, 1).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)
    if not truth:
        return Picture(image)
    points = np.zeros((len(figures), len(KEYPOINTS), 3), np.float32)
    for i, figure in enumerate(figures):
        points[i, :, 0] = figure.keypoints[:, 0] * size
        points[i, :, 1] = (1 - figure.keypoints[:, 1]) * size
        inside = (points[i, :, :2] >= 0).all(1) & (points[i, :, :2] < size).all(1)
        points[i, :, 2] = inside
    return Picture(image, canvas.mask, canvas.parts, points, canvas.depth, canvas.body)


def flow(a: Scene, b: Scene, style: str, size: int) -> tuple[Array, Array]:
    """Exact optical flow from ``a`` to ``b``, two frames of one animation.

    Returns:
        (S, S, 2) displacement in pixels (x right, y down) of what is seen in ``a``, and (S, S)
        bool, true where that point is also seen in ``b``.
    """
    first, second = render(a, style, size, truth=True), render(b, style, size, truth=True)
    assert first.mask is not None and first.body is not None and first.depth is not None
    assert second.mask is not None and second.body is not None and second.depth is not None
    moved = np.zeros((size, size, 2), np.float32)
    depth_b = np.full((size, size), -9.0, np.float32)
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(ticks, 1 - ticks)
    for i in range(len(a.actors)):
        fa, fb = figure_of(a, i, style), figure_of(b, i, style)
        who = 1 if fa.actor.kind == "cat" else 2
        for number in np.unique(first.body[first.mask == who]):
            k = int(number) - 1000 * who
            here = (first.body == number) & (first.mask == who)
            p = np.stack([x[here], y[here], first.depth[here]])
            q = _carry(fa.bodies[k], fb.bodies[k], p)
            moved[here, 0] = (q[0] - p[0]) * size
            moved[here, 1] = -(q[1] - p[1]) * size
            depth_b[here] = q[2]
    cols = np.floor(x * size + moved[..., 0]).astype(int)
    rows = np.floor((1 - y) * size + moved[..., 1]).astype(int)
    valid = (cols >= 0) & (cols < size) & (rows >= 0) & (rows < size)
    r, c = np.clip(rows, 0, size - 1), np.clip(cols, 0, size - 1)
    still = first.mask == 0
    valid &= np.where(still, second.mask[r, c] == 0, second.body[r, c] == first.body)
    tolerance = 3.0 / size + 0.02
    valid &= still | (np.abs(second.depth[r, c] - depth_b) < tolerance)
    return moved, valid


def _carry(body: Body, later: Body, points: Array) -> Array:
    """Where points (3, N) on a body are once it has moved (and perhaps stretched)."""
    if body.L is not None:
        return later.L @ (np.linalg.inv(body.L) @ (points - body.a[:, None])) + later.a[:, None]

    def frame(capsule: Body) -> tuple[Array, float]:
        axis = capsule.b - capsule.a
        length = float(np.linalg.norm(axis)) + 1e-9
        axis = axis / length
        side = np.array([-axis[1], axis[0], 0.0])
        side /= np.linalg.norm(side) + 1e-9
        return np.stack([axis, side, np.cross(axis, side)], 1), length

    (m0, l0), (m1, l1) = frame(body), frame(later)
    local = m0.T @ (points - body.a[:, None])
    local[0] *= l1 / l0
    local[1:] *= later.ra / max(body.ra, 1e-9)
    return m1 @ local + later.a[:, None]


def _one(seed: int, style: str, size: int, zoo: bool, truth: bool, noise: bool) -> Picture:
    return render(describe(seed, zoo=zoo), style, size, noise=noise, truth=truth)


def render_many(
    seeds: list[int] | range,
    style: str,
    size: int,
    zoo: bool = False,
    truth: bool = False,
    noise: bool = True,
    workers: int = 2,
) -> dict[str, Any]:
    """Draw many seeds in worker processes.

    Returns:
        ``image`` (N, S, S, 3) uint8 and, with truth, ``mask``, ``parts`` (N, S, S) uint8 and
        ``keypoints`` (N, 2, K, 3), the second animal's visibility 0 where there is none.
    """
    job = partial(_one, style=style, size=size, zoo=zoo, truth=truth, noise=noise)
    seeds = list(seeds)
    if workers > 1 and len(seeds) >= 32:
        with ProcessPoolExecutor(workers) as pool:
            pictures = list(pool.map(job, seeds, chunksize=16))
    else:
        pictures = [job(s) for s in seeds]
    out: dict[str, Any] = {"image": np.stack([p.image for p in pictures])}
    if truth:
        out["mask"] = np.stack([p.mask for p in pictures if p.mask is not None])
        out["parts"] = np.stack([p.parts for p in pictures if p.parts is not None])
        points = np.zeros((len(pictures), 2, len(KEYPOINTS), 3), np.float32)
        for i, p in enumerate(pictures):
            assert p.keypoints is not None
            points[i, : len(p.keypoints)] = p.keypoints
        out["keypoints"] = points
    return out
