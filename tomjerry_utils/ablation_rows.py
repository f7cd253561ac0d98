"""The trainings of the study "ablation", each as long as the translator's own, and their probes.

The course's rows, the other variants of the BLIP term and other weights of it are trained; guidance
is turned on in the finished whole. Every picture is a validation cartoon, every probe one of our
own models: what is trained here is never shown a judge or a hidden twin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tomjerry_utils import blip, collect, ldm, posture, scenes, transfer, tuning
from tomjerry_utils.kept_parts import Part
from tomjerry_utils.profiles import Profile
from tomjerry_utils.rival_training import training_pictures
from tomjerry_utils.rivals import NATURAL
from tomjerry_utils.runs import hash_obj, log, run_root

WHOLE = "+ BLIP term"  # the method, and what guidance is turned on in
WITHOUT = "+ posture"  # the same with a BLIP weight of 0
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0)  # of the BLIP term
SCALES = (1.0, 1.5, 2.0, 3.0)  # of classifier-free guidance, 1 = none
STRENGTHS = (0.0, 1.0, 5.0)  # of BLIP guidance: none, 2 % of a guess's length, 10 %
PROBES = ("action", "facing", "silhouette_iou")  # see `transfer.probe`
SCORES = ("realism", "faithfulness", "score")  # see :mod:`tuning`
VERSION = 1  # raised when the code changes what a row is

Point = Mapping[str, Any]  # guidance_scale and blip_guidance of a translation


@dataclass(frozen=True)
class Row:
    """A training: a row of `transfer.ABLATION`, what it changes of the profile's stage 05, and the
    guidance that it translates with, its own first."""

    base: str
    points: tuple[Point, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def rows(profile: Profile) -> dict[str, Row]:
    """All trainings of one seed, the course's first."""
    options, own = profile.transfer, (own_point(profile),)
    found = {name: Row(name, own) for name in transfer.ABLATION}
    found[WHOLE] = Row(WHOLE, tuple(guided(profile)))
    for variant in blip.VARIANTS:
        if variant != options.blip_variant:
            found[f"{WHOLE}, {variant}"] = Row(WHOLE, own, {"blip_variant": variant})
    for weight, name in weighted(profile).items():
        if name not in found:
            found[name] = Row(WHOLE, own, {"blip_weight": weight})
    return found


def weighted(profile: Profile) -> dict[float, str]:
    """BLIP weight → the row that has it, in rising order."""
    own = {0.0: WITHOUT, profile.transfer.blip_weight: WHOLE}
    return {
        weight: own.get(weight, f"{WHOLE}, weight {weight:g}")
        for weight in sorted({*WEIGHTS, *own})
    }


def own_point(profile: Profile) -> Point:
    """The guidance of a row that has none of BLIP."""
    return {"guidance_scale": profile.transfer.guidance_scale, "blip_guidance": 0.0}


def guided(profile: Profile) -> list[Point]:
    """Every guidance of the whole method, its own first."""
    own = own_point(profile)
    swept: list[Point] = [own]
    for name, values in (("guidance_scale", SCALES), ("blip_guidance", STRENGTHS)):
        swept += [point for v in values if (point := {**own, name: v}) not in swept]
    return swept


def cartoon_seeds(profile: Profile) -> range:
    """The validation cartoons that are translated, the same for every training seed, as many as
    stage 06 has test scenes: where probes are near 1, fewer tell no rows apart."""
    start = scenes.RANGES["validation"][0]
    return range(start, start + profile.compare.test_scenes)


def origin(profile: Profile) -> dict[str, Any]:
    """What all rows of a training seed come from, as every machine would have it, run or no run."""
    model = profile.ldm
    return {
        "seed": profile.seed,
        "image_size": profile.image_size,
        "precision": profile.precision,
        "cartoons": [cartoon_seeds(profile).start, cartoon_seeds(profile).stop],
        "collect": collect.training_facts(profile),
        "captions": profile.captions.model_dump(mode="json", exclude={"concurrency"}),
        "blip": profile.blip.model_dump(mode="json", exclude={"caption_batch_size"}),
        "ldm": model.named(),
        "transfer": {
            name: value
            for name, value in profile.transfer.named().items()
            if name != "ablation_steps"  # the course's own rows, not these
        },
        "weights": {
            "blip": ldm.fingerprint(profile.blip.pretrained),
            "autoencoder": ldm.fingerprint(model.autoencoder, model.autoencoder_subfolder),
            "denoiser": ldm.fingerprint(model.denoiser, model.denoiser_subfolder),
            "structure": ldm.fingerprint(profile.transfer.structure),
            "posture": ldm.fingerprint(profile.transfer.posture),
        },
        "version": VERSION,
    }


def facts(profile: Profile, name: str) -> dict[str, Any]:
    """What one row depends on, see `kept_parts.kept`."""
    row = rows(profile)[name]
    return {
        **origin(profile),
        "row": list(transfer.ABLATION[row.base]),
        "changes": dict(row.changes),
        "points": [dict(point) for point in row.points],
    }


@dataclass(frozen=True, eq=False)
class Start:
    """What the rows of a training seed start from, opened when the first of them asks for it."""

    profile: Profile

    @cached_property
    def describer(self) -> blip.Blip:
        return blip.ensure(self.profile).blip

    @cached_property
    def before(self) -> ldm.LdmRun:
        return ldm.ensure(self.profile)

    @cached_property
    def nets(self) -> posture.Posture:
        return transfer.fit_posture(self.before, self.profile)

    @cached_property
    def cartoons(self) -> np.ndarray:
        seeds = cartoon_seeds(self.profile)
        return scenes.render_many(seeds, "cartoon", self.profile.image_size)["image"]

    @cached_property
    def criterion(self) -> tuning.Criterion:
        before = self.before
        lender = transfer.assemble(
            self.profile, before, self.describer, before.unet, before.conditioner, self.nets
        )
        natural = training_pictures(self.profile, "natural")
        return tuning.Criterion(lender, self.cartoons, natural[:: max(1, len(natural) // NATURAL)])


def make(start: Start, name: str) -> Part:
    """Train a row, translate with each of its guidances, and probe.

    Returns:
        The record: steps, loss, seconds of the training, and `scores` of each point; and arrays
        `value` and `chance`, (points, probes, pictures), see :func:`read`.
    """
    row, seed = rows(start.profile)[name], start.profile.seed
    options = start.profile.transfer.model_copy(update=dict(row.changes))
    profile = start.profile.model_copy(update={"transfer": options})
    key = hash_obj([facts(start.profile, name), start.before.key])
    log(f"ablation: {name}, training seed {seed}")
    translator, result = transfer.ablation_row(
        row.base,
        profile,
        start.before,
        start.describer,
        start.nets,
        folder=run_root(profile) / "study" / "ablation" / f"{slug(name)}_{key}",
        steps=options.steps,
        seed=seed,
    )
    found, scores = [], []
    for point in row.points:
        made = replace(translator, **point).translate(start.cartoons, seed=seed).images
        found.append(read(start, made))
        scores.append(start.criterion.score(made))
    record = {
        "steps": result.steps,
        "loss": result.history[-1]["loss"],
        "seconds": round(result.seconds, 1),
        "scores": scores,
    }
    return record, {part: np.stack([each[part] for each in found]) for part in ("value", "chance")}


def read(start: Start, made: np.ndarray) -> dict[str, np.ndarray]:
    """What the probes read off translations of the cartoons, each (probes, pictures).

    Returns:
        `value`: of each translation, set against its own cartoon; `chance`: set against a cartoon
        drawn from those of the same class, as every row is told the class.
    """
    described = [scenes.describe(seed) for seed in cartoon_seeds(start.profile)]
    told = [{"text": scenes.caption(s, "cartoon"), "facing": s.facing} for s in described]
    net = start.criterion.translator.net
    pairs = transfer.probe_pairs(made, start.cartoons, told, start.describer, net)
    return against([scene.cls for scene in described], [pairs[probe] for probe in PROBES])


def against(classes: Sequence[str], pairs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Value and chance, as of :func:`read`, from (N, N) tables of output by source."""
    same = np.array(classes)[:, None] == np.array(classes)
    return {
        "value": np.stack([table.diagonal() for table in pairs]),
        "chance": np.stack([(table * same).sum(1) / same.sum(1) for table in pairs]),
    }


def slug(name: str) -> str:
    """A row's name as a file's."""
    return re.sub(r"[^\w.]+", "_", name.replace("+", "with"))
