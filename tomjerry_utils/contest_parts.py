"""The parts of the study "rivals": a method with one training seed under one budget, scored.

A part holds all that the study's tables need of it, in the small files of :mod:`kept_parts`: no
run folder is needed to read it. Instead of the features of its pictures it has the draws of KID
that come from them; `measures.kid_draws` draws the same scenes for every method, so those of two
parts are paired whenever and wherever they were made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tomjerry_utils import (
    budgets,
    captions,
    collect,
    features,
    ldm,
    rival_training,
    rivals,
    scenes,
    scoring,
    transfer,
    tuning,
)
from tomjerry_utils.images import load_image, resize, save_image
from tomjerry_utils.judges import Judges
from tomjerry_utils.kept_parts import Part
from tomjerry_utils.measures import kid_draws
from tomjerry_utils.picking import noise_seed
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.rivals import Rival, RivalRun
from tomjerry_utils.runs import environment, foundation_root, hash_obj, log, read_json, write_json
from tomjerry_utils.twins import SIZE, reference, twins_of

VERSION = 1  # of what a part holds, and of how it comes about beyond the stages' own versions


class Task(NamedTuple):
    """What a part is of."""

    budget: str
    seed: int  # of the training
    method: str

    @property
    def name(self) -> str:
        """As in the names of its files."""
        return f"{self.budget}/{self.method}-seed{self.seed}"

    def path(self, folder: Path) -> Path:
        return folder / self.budget / f"{self.method}-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class Entry:
    """A part as the tables read it.

    Attributes:
        record: setting, points (name → setting), best, trials, curve, seconds (budget, trained,
            tuning), steps, seconds_per_picture, course_seconds and foundation_seconds of its run,
            metrics of each point, device.
        each: metric → (N,) of the test scenes, at the point that competes; NaN where it does not
            apply.
        perceptual: point → (N,) distances to the twins.
        kid: point → (samples,) draws.
    """

    task: Task
    record: dict[str, Any] = field(repr=False)
    each: dict[str, np.ndarray] = field(repr=False)
    perceptual: dict[str, np.ndarray] = field(repr=False)
    kid: dict[str, np.ndarray] = field(repr=False)

    @property
    def best(self) -> str:
        """The point that competes."""
        return str(self.record["best"])


def entry(task: Task, part: Part) -> Entry:
    record, arrays = part
    found: dict[str, dict[str, np.ndarray]] = {"each": {}, "perceptual": {}, "kid": {}}
    for name, values in arrays.items():
        kind, _, rest = name.partition(" ")
        found[kind][rest] = values.astype(float)
    return Entry(task, record, **found)


# ---- what a part depends on --------------------------------------------------------------------


def shared_facts(profile: Profile, seeds: Sequence[int], references: int) -> dict[str, Any]:
    """What all parts of a study depend on, the same on every machine.

    Args:
        seeds: of the test scenes; references: natural scenes for KID.
    """
    models = {
        "autoencoder": (profile.ldm.autoencoder, profile.ldm.autoencoder_subfolder),
        "denoiser": (profile.ldm.denoiser, profile.ldm.denoiser_subfolder),
        "structure": (profile.transfer.structure, ""),
        "posture": (profile.transfer.posture, ""),
        "blip": (profile.blip.pretrained, ""),
        "judges": (str(foundation_root() / "judges"), ""),
        "perceptual": (str(foundation_root() / "perceptual"), ""),
    }
    return {
        "version": VERSION,
        "stages": {module.__name__: module.VERSION for module in (captions, ldm, transfer)},
        "image_size": profile.image_size,
        "precision": profile.precision,
        "collect": collect.training_facts(profile),
        "captions": profile.captions.model_dump(mode="json", exclude={"concurrency"}),
        "blip": profile.blip.named(),
        "ldm": profile.ldm.named(),
        "transfer": profile.transfer.named(),
        "finishing": profile.finishing.named(),
        "rivals": profile.rivals.named(),
        "tuning": {
            "criterion": tuning.RULE,
            "trial_share": budgets.TRIAL_SHARE,
            "expert_share": budgets.EXPERT_SHARE,
            "looks": rival_training.LOOKS,
        },
        "test": {
            "scenes": hash_obj(list(seeds)),
            "n": len(seeds),
            "references": references,
            "bootstrap": profile.compare.bootstrap,
            "batch_size": profile.compare.batch_size,
            "features": features.NAME,
        },
        "weights": {name: ldm.fingerprint(*source) for name, source in models.items()},
    }


def own_facts(task: Task, profile: Profile, setting: Mapping[str, Any] | None) -> dict[str, Any]:
    """What one part depends on beyond the shared facts.

    Args:
        setting: that it takes over; None where its trials find one.
    """
    return {
        "budget": task.budget,
        "method": task.method,
        "seed": task.seed,
        "grid": budgets.grid(task.method, profile),
        "setting": setting,
    }


# ---- making one --------------------------------------------------------------------------------


def make(
    task: Task,
    profile: Profile,
    *,
    setting: Mapping[str, Any] | None,
    seeds: Sequence[int],
    judges: Judges,
    references: int,
) -> Part:
    """Train, tune, translate and score; what a killed call had finished is not redone.

    Args:
        profile: with the task's training seed; setting: as of :func:`own_facts`.
        seeds, references: as of :func:`shared_facts`.
    """
    made = rivals.ensure(profile, task.budget, task.method, setting=setting)
    opened = made.open(transfer.ensure(profile).translator)
    sets = {
        name: np.stack(
            [resize(image, SIZE) for image in translate(made, name, rival, profile, seeds)]
        )
        for name, rival in opened.items()
    }
    log(f"rivals: scoring {task.name}")
    samples, truth = profile.compare.bootstrap, twins_of(tuple(seeds))
    scored = scoring.measure(
        sets, truth, judges, references=references, bootstrap=samples, show=False
    )
    real, _ = reference(references)
    arrays = {f"each {metric}": row for metric, row in scored[made.best]["each"].items()}
    for name, found in scored.items():
        arrays[f"perceptual {name}"] = found["each"]["perceptual"]
        arrays[f"kid {name}"] = kid_draws(found["features"], real, samples=samples)
    note = read_json(made.folder / "test" / f"{made.best}.json")
    record = {
        "setting": made.setting,
        "points": made.points,
        "best": made.best,
        "trials": made.trials,
        "curve": made.curve,
        "seconds": made.seconds,
        "steps": made.steps,
        "seconds_per_picture": round(note["seconds"] / note["n"], 4),
        "course_seconds": budgets.course_seconds(profile),
        "foundation_seconds": budgets.foundation_seconds(profile),
        "metrics": {name: found["metrics"] for name, found in scored.items()},
        "device": environment()["device"],
    }
    return record, arrays


def translate(
    made: RivalRun, name: str, rival: Rival, profile: Profile, seeds: Sequence[int]
) -> np.ndarray:
    """A point's translations of test scenes, (N, S, S, 3), kept as `<folder>/test/<name>`.

    Batches and noise are those of stage 06.
    """
    folder, size = made.folder / "test" / name, profile.compare.batch_size
    note = folder.with_name(f"{name}.json")
    if not note.is_file():
        title, seconds = f"{made.method} {made.budget} {name}", 0.0
        sources = _cartoons(tuple(seeds), profile.image_size)
        for start in progress(range(0, len(seeds), size), title):
            part = list(seeds[start : start + size])
            began = time.monotonic()
            images, _ = rival.translate(
                sources[start : start + size], seed=noise_seed(profile, 0, start)
            )
            seconds += time.monotonic() - began
            for seed, image in zip(part, images, strict=True):
                save_image(folder / f"{seed}.png", image)
        write_json(note, {"seconds": seconds, "n": len(seeds)})
    return np.stack([load_image(folder / f"{seed}.png") for seed in seeds])


@lru_cache(maxsize=1)
def _cartoons(seeds: tuple[int, ...], size: int) -> np.ndarray:
    return scenes.render_many(list(seeds), "cartoon", size)["image"]
