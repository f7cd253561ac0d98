"""From an actor and an action to bodies in space: proportions, poses, keypoints.

Everything is built in the animal's own frame (X forward, Y up, Z to its near side) in units of a
cat's shoulder height, then turned, mirrored and fitted into the actor's box. The two styles share
poses and joints and differ in :class:`Build` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .describe import Actor, Scene, rng_of
from .surface import Array, Body

KEYPOINTS = ("nose", "ear_near", "ear_far", "chest", "hip", "fore_paw", "hind_paw", "tail_tip")
PART_LAYERS = ("tail", "far_hind", "far_fore", "body", "near_hind", "near_fore", "head", "face")


@dataclass(frozen=True)
class Build:
    """Proportions in units of a cat's shoulder height."""

    length: float  # hip to chest
    chest: float  # radius
    hip: float
    belly: float
    leg: float  # joint to ground when standing
    leg_radius: float
    paw: float
    neck: float
    head: float
    muzzle: float  # how far the snout stands out, in head radii
    ear: float  # in head radii
    ear_round: float  # 0 pointed … 1 a disc
    eye: float  # in head radii
    tail: float
    tail_radius: float
    taper: float  # tip of the tail against its root


BUILDS = {
    ("cat", "natural"): Build(
        0.74,
        0.27,
        0.27,
        0.265,
        0.60,
        0.088,
        0.090,
        0.20,
        0.285,
        0.28,
        0.78,
        0.0,
        0.23,
        0.95,
        0.062,
        0.75,
    ),
    ("cat", "cartoon"): Build(
        0.68,
        0.245,
        0.25,
        0.235,
        0.58,
        0.082,
        0.125,
        0.20,
        0.38,
        0.34,
        0.72,
        0.0,
        0.36,
        1.0,
        0.060,
        0.9,
    ),
    ("mouse", "natural"): Build(
        0.58,
        0.27,
        0.36,
        0.34,
        0.34,
        0.066,
        0.085,
        0.12,
        0.26,
        0.75,
        0.82,
        1.0,
        0.20,
        1.10,
        0.034,
        0.30,
    ),
    ("mouse", "cartoon"): Build(
        0.52,
        0.25,
        0.31,
        0.29,
        0.38,
        0.064,
        0.115,
        0.12,
        0.35,
        0.50,
        0.98,
        1.0,
        0.36,
        1.10,
        0.034,
        0.5,
    ),
}


def build_of(actor: Actor, style: str, zoo: bool) -> Build:
    """An actor's proportions: its kind's, give or take a few per cent; in the zoo far more."""
    rng = rng_of(actor.seed, 21)
    cat, mouse = BUILDS["cat", style], BUILDS["mouse", style]
    spread = 0.16 if zoo else 0.045
    values = {}
    for name in Build.__dataclass_fields__:
        m = actor.morph
        if zoo:
            m = float(np.clip(m + rng.uniform(-0.35, 0.35), -0.1, 1.1))
        value = (1 - m) * getattr(cat, name) + m * getattr(mouse, name)
        values[name] = value * (1 + spread * float(rng.uniform(-1, 1)))
    values["ear_round"] = float(np.clip(values["ear_round"], 0, 1))
    if zoo:
        values["ear_round"] = float(rng.random() < np.clip(actor.morph, 0.15, 0.85))
    return Build(**values)


def _polar(angle: float, radius: float) -> Array:
    return np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0.0]) * radius


def _rotation(yaw: float, pitch: float) -> Array:
    """Columns forward, up, near side of a head that is pitched and then turned to the viewer."""
    cy, sy = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    cp, sp = np.cos(np.radians(pitch)), np.sin(np.radians(pitch))
    turn = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    lift = np.array([[cp, -sp, 0], [sp, cp, 0], [0, 0, 1]])
    return turn @ lift


@dataclass
class Pose:
    """Joints of one action in the animal's frame; angles in degrees."""

    hip: Array
    chest: Array
    fore: tuple[Array, ...]  # near and far fore paw
    hind: tuple[Array, ...]
    neck_angle: float
    gaze: float  # pitch of the head
    tail: tuple[float, float]  # first angle, bend per segment
    sag: float = 0.0
    folded: bool = False  # the hind leg is folded under the body


def pose_of(action: str, build: Build, phase: float, rng: np.random.Generator) -> Pose:
    """The pose of an action. ``phase`` runs through one cycle of its motion."""
    b, j = build, rng.uniform(-1, 1, 12)
    swing = np.sin(2 * np.pi * phase)
    low = 0.94 * b.leg + 0.12 * b.hip
    if action == "stand":
        hip, chest = (
            np.array([-b.length / 2, low + 0.06, 0]),
            np.array([b.length / 2, low + 0.08, 0]),
        )
        chest[1] += 0.01 * swing
        step = 0.07 * b.leg
        fore = tuple(np.array([chest[0] + 0.03 + s * step * (1 + j[0]), 0, 0]) for s in (1, -1))
        hind = tuple(np.array([hip[0] - 0.05 + s * step * (1 + j[1]), 0, 0]) for s in (-1, 1))
        return Pose(
            hip, chest, fore, hind, 58 + 5 * j[2], 3 * swing, (118 + 10 * j[3], -9 + 2 * swing)
        )
    if action == "run":
        # Stills fall near full extension or near the gathered phase, the two a gallop is known by.
        reach = 0.80 + 0.20 * np.cos(2 * np.pi * phase)
        hip = np.array([-0.54 * b.length, low + 0.13 + 0.04 * swing, 0])
        chest = np.array([0.54 * b.length, low + 0.15 - 0.04 * swing, 0])
        span = (b.leg + 0.30) * reach
        fore = (
            chest + np.array([0.98 * span, -0.58 * b.leg + 0.05 * swing, 0]),
            chest + np.array([0.62 * span, -0.80 * b.leg - 0.04 * swing, 0]),
        )
        hind = (
            hip + np.array([-1.00 * span, -0.62 * b.leg - 0.05 * swing, 0]),
            hip + np.array([-0.62 * span, -0.82 * b.leg + 0.05 * swing, 0]),
        )
        return Pose(
            hip, chest, fore, hind, 30 + 4 * j[2], -2, (168 + 5 * j[3], -3 + 3 * swing), -0.02
        )
    if action == "jump":
        pitch = 34 + 5 * j[0] - 10 * (phase - 0.5)
        centre = np.array([0, low + 0.52 + 0.10 * np.sin(np.pi * phase), 0])
        hip, chest = centre - _polar(pitch, b.length / 2), centre + _polar(pitch, b.length / 2)
        fore = (
            chest + _polar(pitch - 26 + 6 * j[1], b.leg * 1.08 + 0.16),
            chest + _polar(pitch - 54, b.leg * 1.00 + 0.14),
        )
        hind = (
            hip + _polar(pitch + 190 + 6 * j[2], b.leg * 1.10 + 0.24),
            hip + _polar(pitch + 218, b.leg * 1.00 + 0.18),
        )
        return Pose(hip, chest, fore, hind, pitch + 14, 0.55 * pitch, (pitch + 172, 5 + 2 * j[3]))
    if action == "sit":
        hip = np.array([-0.24 * b.length, 0.86 * b.hip, 0])
        pitch = 62 + 4 * j[0]
        chest = hip + _polar(pitch, 0.92 * b.length)
        chest[1] = max(chest[1], 0.9 * b.leg)
        fore = tuple(np.array([chest[0] + 0.06 + s * 0.05, 0, 0]) for s in (1, -1))
        hind = tuple(np.array([hip[0] + 0.30 + 0.02 * j[1], 0, 0]) for _ in range(2))
        return Pose(
            hip,
            chest,
            fore,
            hind,
            76 + 5 * j[2],
            3 * swing,
            (188, -13 + 4 * j[3] + 3 * swing),
            folded=True,
        )
    if action == "lie":
        hip = np.array([-b.length / 2, 0.82 * b.hip, 0])
        chest = np.array([b.length / 2, 0.80 * b.chest + 0.008 * swing, 0])
        ahead = 0.55 * b.leg + 0.20
        fore = tuple(np.array([chest[0] + ahead + s * 0.05, 0.01, 0]) for s in (1, -1))
        hind = tuple(np.array([hip[0] + 0.34, 0.0, 0]) for _ in range(2))
        return Pose(hip, chest, fore, hind, 14 + 5 * j[2], -8, (186, 3 * j[3]), 0.02, folded=True)
    if action == "reach":
        hip = np.array([-0.1, 0.94 * b.leg + 0.04, 0])
        pitch = 76 + 3 * j[0]
        chest = hip + _polar(pitch, b.length)
        fore = (
            chest + _polar(56 + 5 * j[1] + 8 * swing, 1.10 * b.leg + 0.06),
            chest + _polar(28 + 5 * j[2] - 8 * swing, 1.02 * b.leg + 0.06),
        )
        hind = tuple(np.array([hip[0] + 0.04 + s * 0.07, 0, 0]) for s in (1, -1))
        return Pose(hip, chest, fore, hind, 86, 26 + 4 * swing, (206 + 6 * j[3], -14))
    raise ValueError(f"no pose for action {action!r}")


def _leg(
    out: list[Body], joint: Array, foot: Array, layer: str, b: Build, bend: float, hind: bool
) -> None:
    """A leg of two bones, bent forward (+) or back (−), with a paw."""
    side = np.array([0, 0, joint[2]])
    ankle = foot + np.array([-0.02, 0.7 * b.paw, 0]) + side
    d = ankle - joint
    straight = float(np.hypot(d[0], d[1])) + 1e-6
    full = max(1.06 * straight, 0.98 * b.leg)
    lift = np.sqrt(max((full / 2) ** 2 - (straight / 2) ** 2, 0.0))
    across = np.array([-d[1], d[0], 0]) / straight
    knee = joint + 0.5 * d + bend * min(lift, 0.20 * b.leg + 0.05) * across
    r = b.leg_radius
    part, rest = "leg", np.array([-0.5 if hind else 0.5, -0.05, joint[2]])
    top = r * (1.75 if hind else 1.45)
    size = np.array([0.1, 0.35, 0.1])
    out.append(Body(part, layer, joint, b=knee, ra=top, rb=1.08 * r, rest=rest, rest_size=size))
    low = rest + np.array([0, -0.35, 0])
    out.append(Body(part, layer, knee, b=ankle, ra=1.05 * r, rb=0.86 * r, rest=low, rest_size=size))
    paw = np.diag([1.45 * b.paw, 0.72 * b.paw, 0.9 * b.paw])
    out.append(
        Body(
            part,
            layer,
            ankle + np.array([0.45 * b.paw, -0.02, 0]),
            L=paw,
            rest=low + np.array([0, -0.4, 0]),
            rest_size=np.full(3, 0.1),
            tint="paw",
        )
    )


def _tail(out: list[Body], root: Array, b: Build, first: float, bend: float, floor: bool) -> Array:
    """A chain of capsules; on the floor it does not sink in. Returns the tip."""
    pieces = 7
    at, angle, step = root, first, b.tail / pieces
    for i in range(pieces):
        share = i / (pieces - 1)
        r0 = b.tail_radius * (1 + (b.taper - 1) * max(i - 0.5, 0) / pieces)
        r1 = b.tail_radius * (1 + (b.taper - 1) * (i + 1) / pieces)
        to = at + _polar(angle, step)
        if floor:
            to[1] = max(to[1], 1.1 * r1)
        rest = np.array([-1.0 - share, 0.3, 0])
        tint = "tip" if i >= pieces - 2 else "tail"
        out.append(
            Body(
                "tail",
                "tail",
                at,
                b=to,
                ra=r0,
                rb=r1,
                rest=rest,
                rest_size=np.array([0.05, 0.2, 0.05]),
                tint=tint,
            )
        )
        at, angle = to, angle + bend
    return at


def _head(out: list[Body], centre: Array, turn: Array, b: Build, style: str) -> dict[str, Array]:
    """Skull, snout, ears and face on a head frame; returns its keypoints."""
    h, f, u, s = b.head, turn[:, 0], turn[:, 1], turn[:, 2]
    rest = np.array([1.3, 0.3, 0])

    def ball(
        part: str, layer: str, at: Array, radii: tuple[float, ...], tint: str = "coat"
    ) -> Body:
        return Body(
            part,
            layer,
            at,
            L=turn @ np.diag(radii),
            rest=rest + (at - centre),
            rest_size=np.asarray(radii),
            tint=tint,
        )

    out.append(ball("head", "head", centre, (1.0 * h, 0.90 * h, 1.0 * h)))
    long = b.muzzle
    nose = centre + f * h * (0.92 + 0.62 * long) - u * h * 0.20
    if long > 0.45:  # a pointed snout: a cone from the skull to the nose
        out.append(
            Body(
                "head",
                "head",
                centre + f * 0.35 * h - u * 0.08 * h,
                b=nose - f * 0.08 * h,
                ra=0.72 * h,
                rb=0.20 * h,
                rest=rest + np.array([0.2, 0, 0]),
                rest_size=np.full(3, 0.2),
            )
        )
        out.append(
            ball("head", "head", nose - f * 0.16 * h - u * 0.10 * h, (0.2 * h,) * 3, "muzzle")
        )
    for side in (-1, 1):
        cheek = centre + f * h * 0.42 - u * h * 0.36 + side * s * h * 0.42
        out.append(ball("head", "head", cheek, (0.50 * h, 0.42 * h, 0.46 * h)))
        puff = centre + f * h * (0.72 + 0.45 * min(long, 0.45)) - u * h * 0.34 + side * s * h * 0.17
        if long <= 0.45:
            out.append(ball("head", "head", puff, (0.30 * h, 0.25 * h, 0.28 * h), "muzzle"))
    ears: dict[str, Array] = {}
    for side, name in ((-1, "ear_far"), (1, "ear_near")):
        layer = "ear_far" if side < 0 else "head"
        e = b.ear * h
        if b.ear_round > 0.5:
            root = centre + u * h * 0.72 + side * s * h * 0.62 - f * h * 0.10
            mid = root + u * e * 0.62 + side * s * e * 0.42
            face = 0.72 * f + 0.69 * side * s  # the shell opens forward and outward
            up = u + 0.5 * side * s
            up = up / np.linalg.norm(up)
            across = np.cross(up, face)
            axes = np.stack([across * e * 0.78, up * e * 0.84, face * e * 0.18], 1)
            out.append(
                Body("ear", layer, mid, L=axes, rest=rest, rest_size=np.full(3, 0.05), tint="ear")
            )
            out.append(
                Body(
                    "ear",
                    layer + "_in",
                    mid + face * e * 0.10,
                    L=axes * 0.72,
                    rest=rest,
                    tint="inner",
                )
            )
            tip = mid + up * e * 0.84
        else:
            root = centre + u * h * 0.62 + side * s * h * 0.52 - f * h * 0.05
            tip = root + u * e * 1.02 + side * s * e * 0.30 + f * e * 0.05
            out.append(
                Body(
                    "ear",
                    layer,
                    root,
                    b=tip,
                    ra=0.44 * e,
                    rb=0.07 * e,
                    rest=rest,
                    rest_size=np.full(3, 0.05),
                    tint="ear",
                )
            )
            lift = f * 0.30 * e + np.array([0, 0, 0.2 * e])
            out.append(
                Body(
                    "ear",
                    layer + "_in",
                    root + lift + u * 0.22 * e,
                    b=root + 0.78 * (tip - root) + lift,
                    ra=0.25 * e,
                    rb=0.04 * e,
                    rest=rest,
                    tint="inner",
                )
            )
        ears[name] = tip
    # The eyes lie on the skull: flat discs whose axes are the skull's tangents.
    tall = 1.45 if style == "cartoon" else 1.0
    for side in (-1, 1):
        out_dir = 0.86 * f + (0.33 if style == "cartoon" else 0.42) * side * s + 0.25 * u
        out_dir = out_dir / np.linalg.norm(out_dir)
        across = np.cross(u, out_dir)
        across /= np.linalg.norm(across)
        up = np.cross(out_dir, across)
        at = centre + out_dir * h * 0.93
        e = b.eye * h
        layer = "eye_near" if side > 0 else "eye_far"
        for tint, size, push, drop in (
            ("sclera", 1.0, 0.0, 0.0),
            ("iris", 0.60 if style == "cartoon" else 0.92, 0.04, 0.0),
            ("pupil", 0.36 if style == "cartoon" else 0.55, 0.08, 0.0),
            ("glint", 0.20, 0.12, 0.30),
        ):
            shift = out_dir * h * push + (up * drop + f * 0.22 * (tint not in ("sclera",))) * e
            if style == "natural":
                shift = out_dir * h * push + up * drop * e * 1.1
            stretch = tall if tint in ("sclera", "iris") else 1.0 + 0.5 * (tall - 1)
            axes = np.stack([across * e * size, up * e * size * stretch, out_dir * e * 0.25], 1)
            out.append(Body("eye", layer, at + shift, L=axes, rest=rest, tint=tint))
    n = 0.15 * h if long <= 0.45 else 0.17 * h
    out.append(ball("nose", "nose", nose, (0.8 * n, 0.75 * n, n), "nose"))
    return {"nose": nose, **ears}


@dataclass
class Figure:
    """An actor ready to draw: bodies by layer, keypoints (K, 3) and helpers for the renderers."""

    actor: Actor
    build: Build
    bodies: list[Body]
    keypoints: Array
    scale: float  # picture units per shoulder height
    ground: float
    head: Array  # centre of the skull
    head_radius: float
    whiskers: list[tuple[Array, Array]]
    mouth: list[Array]
    brows: list[tuple[Array, Array]]


def figure_of(scene: Scene, which: int, style: str) -> Figure:
    """Pose an actor of a scene, in a style's proportions, and fit it into its box."""
    actor = scene.actors[which]
    build = build_of(actor, style, scene.zoo)
    rng = rng_of(actor.seed, 22)
    pose = pose_of(scene.action, build, scene.phase, rng)
    yaw = float(rng.uniform(14, 38))
    face_yaw = float(rng.uniform(34, 54))
    b = build
    bodies: list[Body] = []
    half = 0.52 * b.hip
    z_near, z_far = np.array([0, 0, half]), np.array([0, 0, -half])
    tail_root = pose.hip + np.array([-0.72 * b.hip, 0.35 * b.hip, 0])
    if scene.action in ("sit", "lie"):
        tail_root = np.array([pose.hip[0] - 0.80 * b.hip, 1.5 * b.tail_radius, -0.3 * half])
    if scene.action == "reach":
        tail_root = pose.hip + np.array([-0.75 * b.hip, -0.25 * b.hip, 0])
    tip = _tail(bodies, tail_root, b, *pose.tail, floor=scene.action != "jump")
    spine = pose.chest - pose.hip
    length = float(np.linalg.norm(spine))
    axis = spine / length
    frame = np.stack([axis, np.array([-axis[1], axis[0], 0]), np.array([0, 0, 1.0])], 1)
    for off, layer_h, layer_f, k in (
        (z_far, "far_hind", "far_fore", 1),
        (z_near, "near_hind", "near_fore", 0),
    ):
        _leg(
            bodies,
            pose.hip + off - 0.25 * b.hip * frame[:, 1],
            pose.hind[k],
            layer_h,
            b,
            0.0 if scene.action in ("run", "jump") else 1.0,
            True,
        )
        _leg(
            bodies,
            pose.chest + 0.8 * off - 0.25 * b.chest * frame[:, 1],
            pose.fore[k],
            layer_f,
            b,
            -0.6 if scene.action in ("stand", "sit") else 0.0,
            False,
        )
        if pose.folded:
            haunch = pose.hip + off * 1.05 + np.array([0.10, -0.10 * b.hip, 0])
            size = np.diag([0.82, 0.80, 0.42]) * b.hip
            bodies.append(
                Body(
                    "torso",
                    layer_h,
                    haunch,
                    L=size,
                    rest=np.array([-0.6, -0.2, off[2]]),
                    rest_size=np.full(3, 0.25),
                )
            )
    middle = 0.5 * (pose.hip + pose.chest) + frame[:, 1] * (pose.sag - 0.03)
    torso = (
        (pose.hip, (1.12, 1.0, 0.86), b.hip, -0.5),
        (middle, (0.62 * length / b.belly, 0.94, 0.86), b.belly, 0.0),
        (pose.chest, (1.08, 1.0, 0.84), b.chest, 0.5),
    )
    for at, ratio, radius, u in torso:
        radii = np.asarray(ratio) * radius
        bodies.append(
            Body(
                "torso",
                "body",
                at,
                L=frame @ np.diag(radii),
                rest=np.array([u, 0, 0]),
                rest_size=np.array([0.45, 0.3, 0.3]),
            )
        )
    head_at = pose.chest + _polar(pose.neck_angle, b.neck + 0.62 * b.chest + 0.42 * b.head)
    bodies.append(
        Body(
            "torso",
            "body",
            pose.chest + 0.15 * (head_at - pose.chest),
            b=head_at,
            ra=0.78 * b.chest,
            rb=0.62 * b.head,
            rest=np.array([0.75, 0.1, 0]),
            rest_size=np.array([0.2, -0.3, 0.2]),
        )
    )
    head_at = head_at + np.array([0, 0, 0.02])
    turn = _rotation(face_yaw, pose.gaze)
    marks = _head(bodies, head_at, turn, b, style)
    f, up, side = turn.T
    h = b.head
    snout = marks["nose"] - f * 0.10 * h
    whiskers, brows = [], []
    for s in (-1, 1):
        root = snout - up * 0.14 * h + s * side * 0.22 * h
        for k in (-1, 0, 1):
            whiskers.append((root, root + s * side * 0.85 * h + up * (0.22 * k) * h - f * 0.30 * h))
        eye = head_at + h * (0.88 * f + 0.34 * s * side + 0.62 * up)
        brows.append((eye - 0.20 * h * s * side, eye + 0.22 * h * s * side + 0.10 * h * up))
    low = snout - up * 0.34 * h
    mouth = [
        low - side * 0.30 * h + up * 0.10 * h - f * 0.14 * h,
        low - side * 0.12 * h - up * 0.04 * h,
        marks["nose"] - up * 0.18 * h,
        low + side * 0.12 * h - up * 0.04 * h,
        low + side * 0.30 * h + up * 0.10 * h - f * 0.14 * h,
    ]

    joints = {
        "chest": pose.chest,
        "hip": pose.hip,
        "tail_tip": tip,
        "fore_paw": pose.fore[0] + 0.8 * z_near + [0.3 * b.paw, 0.4 * b.paw, 0],
        "hind_paw": pose.hind[0] + z_near + [0.3 * b.paw, 0.4 * b.paw, 0],
        **marks,
    }
    points = np.stack([np.asarray(joints[k], float) for k in KEYPOINTS])

    cy, sy = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    matrix = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    if scene.facing == "left":
        matrix = np.diag([-1.0, 1.0, 1.0]) @ matrix
    turned = [body.transformed(matrix, 1.0, np.zeros(3)) for body in bodies]
    x_c, y_c, width, height = actor.box
    # The tail may leave the frame a little; everything else decides the fit.
    boxes = np.array([t.bounds() for t in turned if t.part != "tail"])
    x0, x1, y1 = boxes[:, 0].min(), boxes[:, 1].max(), boxes[:, 3].max()
    tails = np.array([t.bounds() for t in turned if t.part == "tail"])
    x0t, x1t = (
        0.15 * min(tails[:, 0].min() - x0, 0) + x0,
        0.15 * max(tails[:, 1].max() - x1, 0) + x1,
    )
    y1t = 0.15 * max(tails[:, 3].max() - y1, 0) + y1
    scale = float(min(width / (x1t - x0t), height / y1t))
    offset = np.array([x_c + scene.shift - scale * 0.5 * (x0t + x1t), y_c, 0.5 if which else 0.0])

    def place(p: Array) -> Array:
        return scale * (matrix @ np.asarray(p, float)) + offset

    return Figure(
        actor=actor,
        build=build,
        bodies=[body.transformed(matrix, scale, offset) for body in bodies],
        keypoints=np.stack([place(p) for p in points]),
        scale=scale,
        ground=y_c,
        head=place(head_at),
        head_radius=h * scale,
        whiskers=[(place(p), place(q)) for p, q in whiskers],
        mouth=[place(p) for p in mouth],
        brows=[(place(p), place(q)) for p, q in brows],
    )
