"""What a scene is: who does what, where, in which light — drawn from one seed.

A :class:`Scene` is a description only. Both renderers read the same one, which is why every
cartoon scene has an exact natural twin that nobody ever trains on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

STYLES = ("cartoon", "natural")
CLASSES = ("tom", "jerry", "both")
LABELS = ("tom", "jerry", "tom_jerry", "cat", "mouse", "cat_mouse")
ACTIONS = ("sit", "run", "jump", "lie", "reach", "stand")
FACINGS = ("left", "right")
PLACES = ("kitchen", "living room", "garden", "street", "beach")
LIGHTS = ("day", "evening", "night")

# Half-open ranges of seeds; all are drawn from one distribution and never overlap.
RANGES = {
    "zoo": (0, 1_000_000),
    "cartoon": (1_000_000, 2_000_000),
    "natural": (2_000_000, 3_000_000),
    "judges": (3_000_000, 4_000_000),
    "validation": (4_000_000, 5_000_000),
    "test": (5_000_000, 6_000_000),
}

_VERBS = {
    "sit": "sitting",
    "run": "running",
    "jump": "jumping",
    "lie": "lying",
    "reach": "reaching up",
    "stand": "standing",
}
_WHERE = {
    "kitchen": "in the kitchen",
    "living room": "in the living room",
    "garden": "in the garden",
    "street": "on the street",
    "beach": "on the beach",
}
SUBJECTS = {
    ("tom", "cartoon"): ("tom", "is"),
    ("jerry", "cartoon"): ("jerry", "is"),
    ("both", "cartoon"): ("tom and jerry", "are"),
    ("tom", "natural"): ("a cat", "is"),
    ("jerry", "natural"): ("a mouse", "is"),
    ("both", "natural"): ("a cat and a mouse", "are"),
}


@dataclass(frozen=True)
class Actor:
    """One animal of a scene.

    kind: "cat" or "mouse" for the course; in the zoo a mixture, see ``morph``.
    morph: 0 = a cat's proportions, 1 = a mouse's; in the zoo anything between and a bit beyond.
    seed: everything else about its looks and its exact pose.
    box: (x centre, ground y, width, height) of the frame it is fitted into, picture units, y up.
    """

    kind: str
    morph: float
    seed: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A complete description; a pure function of ``seed`` (and ``zoo``)."""

    seed: int
    cls: str
    action: str
    facing: str
    place: str
    light: str
    horizon: float
    light_angle: float
    actors: tuple[Actor, ...]
    zoo: bool = False
    phase: float = 0.0
    shift: float = 0.0
    layout_seed: int = field(default=0)


def rng_of(*keys: int) -> np.random.Generator:
    """A generator that depends on nothing but the given whole numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(k) for k in keys])))


def label_of(cls: str, style: str) -> str:
    """The LDM's label of a class in a style, e.g. ("both", "natural") → "cat_mouse"."""
    return LABELS[CLASSES.index(cls) + 3 * STYLES.index(style)]


def describe(seed: int, cls: str | None = None, zoo: bool = False) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: any whole number ≥ 0.
        cls: force a class; by default the seed decides.
        zoo: natural animals of random proportions instead of cats and mice.

    Raises:
        ValueError: a negative seed or an unknown class.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; seeds start at 0")
    if cls is not None and cls not in CLASSES:
        raise ValueError(f"class {cls!r} is none of {', '.join(CLASSES)}")
    rng = rng_of(seed, 11)
    drawn = CLASSES[int(rng.integers(3))]
    cls = cls or drawn
    action = ACTIONS[int(rng.integers(6))]
    facing = FACINGS[int(rng.integers(2))]
    place = PLACES[int(rng.integers(len(PLACES)))]
    light = LIGHTS[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
    horizon = float(rng.uniform(0.34, 0.46))
    light_angle = float(rng.uniform(0.6, 1.1) * (1 if rng.random() < 0.5 else -1))
    phase = float(rng.uniform(0, 1))
    jitter = rng.uniform(-1, 1, 8)
    actor_seeds = [int(s) for s in rng.integers(0, 2**31, 2)]
    layout_seed = int(rng.integers(0, 2**31))
    morphs = rng.uniform(-0.1, 1.1, 2)

    def morph(kind: str, i: int) -> float:
        return float(morphs[i]) if zoo else float(kind == "mouse")

    sign = 1.0 if facing == "right" else -1.0
    actors: tuple[Actor, ...]
    if cls == "both":
        cat_box = (
            0.5 - sign * (0.16 + 0.02 * jitter[0]),
            0.17 + 0.02 * jitter[1],
            0.70,
            0.70 + 0.05 * jitter[2],
        )
        mouse_box = (
            0.5 + sign * (0.29 + 0.02 * jitter[3]),
            0.09 + 0.02 * jitter[4],
            0.40,
            0.38 + 0.02 * jitter[5],
        )
        actors = (
            Actor("cat", morph("cat", 0), actor_seeds[0], cat_box),
            Actor("mouse", morph("mouse", 1), actor_seeds[1], mouse_box),
        )
    else:
        kind = "cat" if cls == "tom" else "mouse"
        grow = 0.90 + 0.10 * jitter[2]
        if kind == "cat" or zoo:
            width, height = 0.94 * grow, 0.80 * grow
        else:
            width, height = 0.86 * grow, 0.64 * grow
        box = (0.5 + 0.04 * jitter[0], 0.13 + 0.035 * jitter[1], width, height)
        actors = (Actor(kind, morph(kind, 0), actor_seeds[0], box),)
    return Scene(
        seed=seed,
        cls=cls,
        action=action,
        facing=facing,
        place=place,
        light=light,
        horizon=horizon,
        light_angle=light_angle,
        actors=actors,
        zoo=zoo,
        phase=phase,
        layout_seed=layout_seed,
    )


def caption(scene: Scene, style: str) -> str:
    """The true caption, e.g. ``a cat is running in the garden, facing left``.

    One grammar in both styles; only the words for the animals differ.
    """
    if scene.zoo:
        subject, verb = ("an animal", "is") if len(scene.actors) == 1 else ("two animals", "are")
    else:
        subject, verb = SUBJECTS[scene.cls, style]
    return f"{subject} {verb} {_VERBS[scene.action]} {_WHERE[scene.place]}, facing {scene.facing}"


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted; the comma counts as one."""
    words = {",", "facing", "animal", "animals", "an", "two", *FACINGS}
    for text in [*_VERBS.values(), *_WHERE.values(), *(f"{s} {v}" for s, v in SUBJECTS.values())]:
        words.update(text.split())
    return tuple(sorted(words))


def animate(scene: Scene, frames: int) -> list[Scene]:
    """The scene in motion: one cycle of its action over ``frames`` frames, the camera still.

    Runners and jumpers move on in the direction they face; the others breathe and sway.
    """
    travel = {"run": 0.30, "jump": 0.24}.get(scene.action, 0.0)
    sign = 1.0 if scene.facing == "right" else -1.0
    times = [i / max(frames - 1, 1) for i in range(frames)]
    return [
        replace(scene, phase=(scene.phase + t) % 1.0, shift=sign * travel * (t - 0.5))
        for t in times
    ]
