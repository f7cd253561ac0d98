"""Where translations fail, and which stage went wrong first: computed, not looked at.

A translation is made in stages, each of which reads off the cartoon what the next one needs. Here
every reading of a failed one is held against the scene's truth, in the order in which they are
made; then the denoiser is told the twin's own shapes, and at last the twin's whole view, with the
noise left as it was. What mends the picture was what had gone wrong. This asks judges and hidden
twins, so it comes after everything else and nothing may learn from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomjerry_utils import blip, compare, ldm, scenes, scoring, structure, transfer
from tomjerry_utils.autoencoder import decode, encode_all, factor_of
from tomjerry_utils.images import add_grain, resize, save_image, to_uint8
from tomjerry_utils.judges import Judges, load_judges
from tomjerry_utils.picking import noise_seed, silhouette_overlap
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import Stage, log, open_stage, read_json, write_json
from tomjerry_utils.translator import Conditions, Translator
from tomjerry_utils.twins import REFERENCES, SIZE, Truth, twins_of

STAGE = "06_failures"
SHARE = 0.1  # of the translations, the furthest from their twins, count as failed
OTHERS = 2  # so many that did not fail are examined for each one that did
USUAL = 95  # percent of those others stay within a limit
CAUSES = {
    # in the order in which they are asked for: the first that holds is the cause
    "structure": "the structure net misreads the class or the parts",
    "caption": "the caption names another class or action",
    "posture": "the posture nets put the keypoints elsewhere",
    "shapes": "small errors of shape: the true parts mend it",
    "coat": "another coat or light than the twin's, which the cartoon does not show",
    "autoencoder": "the autoencoder cannot hold the twin itself",
    "denoiser": "the denoiser draws it wrongly though told all",
}
TOLD = ("shapes", "view")


def rule() -> str:
    """What counts as failed, what as its cause, in words."""
    return (
        "A translation fails where the class judge sees another class than the scene's, the action "
        f"judge another action, or where it is among the {100 * SHARE:.0f} % furthest from their "
        "hidden twins by perceptual distance. Worst first: wrong class, wrong action, then by "
        "distance. The cause is the first that holds: class misread, or the cartoon's parts read "
        "worse than "
        f"in {USUAL} % of translations that did not fail; caption with another class or action; "
        "keypoints further from the twin's than in those; mended when the denoiser is told the "
        "twin's true parts, class and caption; mended when it is told the twin's whole view, coat "
        "and light included; twin reconstructed worse than in those; else the denoiser itself."
    )


@dataclass(eq=False)
class FailureRun:
    """What the stage leaves.

    Attributes:
        table: rule, limits, n, failed; causes: name → meaning, failures, how many of them each
            truth told mends, and the share of the others beyond the same limit; mean: perceptual
            distances of the failed as translated, told the truth, and of the reconstructed twins;
            rows: of each examined scene its scores, readings and `cause`, None where it did not
            fail; the failed ones first, worst first.
        folder: holds `shapes/<seed>.png` and `view/<seed>.png` of the failed ones.
    """

    folder: Path
    table: dict[str, Any]
    run: compare.CompareRun
    key: str


def ensure(profile: Profile) -> FailureRun:
    """Examine stage 06's own translations at this profile, or read what was found."""
    run = compare.ensure(profile)
    stage = open_stage(profile, STAGE, {"share": SHARE, "others": OTHERS}, {"compare": run.key})
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, run, transfer.ensure(profile).translator, load_judges())
    return FailureRun(stage.folder, read_json(stage.folder / "failures.json"), run, stage.key)


# ---- what failed, and why ----------------------------------------------------------------------


def failing(rows: Sequence[Mapping[str, Any]], share: float = SHARE) -> list[int]:
    """Which translations failed, worst first.

    Args:
        rows: of `class_accuracy` and `action_accuracy`, 1 or 0, and `perceptual` distance.
        share: of all of them, the furthest; the others fail by class or action alone.
    """
    far = furthest([row["perceptual"] for row in rows], share)
    found = [i for i, row in enumerate(rows) if row["perceptual"] >= far or not _right(row)]
    return sorted(
        found,
        key=lambda i: (
            rows[i]["class_accuracy"],
            rows[i]["action_accuracy"],
            -rows[i]["perceptual"],
        ),
    )


def furthest(distances: Sequence[float], share: float = SHARE) -> float:
    """The distance from which on a translation is among the furthest share, rounded up."""
    return sorted(distances, reverse=True)[math.ceil(share * len(distances)) - 1]


def limits(others: Sequence[Mapping[str, Any]], far: float) -> dict[str, float]:
    """How far a reading may be off: as far as in 19 of 20 translations that did not fail.

    Args:
        others: rows of translations that did not fail.
        far: the perceptual distance from which on a translation counts as failed.
    """

    def percentile(name: str, at: float) -> float:
        return float(np.percentile([row[name] for row in others], at))

    return {
        "perceptual": far,
        "parts": percentile("parts", 100 - USUAL),
        "keypoints": percentile("keypoints", USUAL),
        "autoencoder": percentile("autoencoder", USUAL),
    }


def beyond(row: Mapping[str, Any], allowed: Mapping[str, float]) -> dict[str, bool]:
    """Which readings of a translation are wrong, or further off than they may be."""
    return {
        "structure": row["read"] != row["class"] or row["parts"] < allowed["parts"],
        "caption": not (row["caption_class"] and row["caption_action"]),
        "posture": row["keypoints"] > allowed["keypoints"],
        "autoencoder": row["autoencoder"] > allowed["autoencoder"],
    }


def cause(row: Mapping[str, Any], allowed: Mapping[str, float]) -> str:
    """The first of :data:`CAUSES` that holds for a failed translation."""
    remedy = mended_by(row, allowed)
    told = {"shapes": remedy == "shapes", "coat": remedy == "view", "denoiser": True}
    found = {**beyond(row, allowed), **told}
    return next(name for name in CAUSES if found[name])


def mended_by(row: Mapping[str, Any], allowed: Mapping[str, float]) -> str | None:
    """The least of :data:`TOLD` with which a scene fails no more, None where nothing helps.

    What went wrong first need not be what harmed: a picture whose keypoints were off, and which
    the true shapes do not mend, would have failed with other keypoints too.
    """
    for told in TOLD:
        again = row["told"][told]
        if _right(again) and again["perceptual"] < allowed["perceptual"]:
            return told
    return None


def _right(row: Mapping[str, Any]) -> bool:
    return bool(row["class_accuracy"] and row["action_accuracy"])


# ---- the examination ---------------------------------------------------------------------------


def _make(
    stage: Stage, profile: Profile, run: compare.CompareRun, translator: Translator, judges: Judges
) -> None:
    scored = {row["seed"]: row for row in run.rows if row["method"] == "ours"}
    rows = [{**scored[row["seed"]], **row} for row in run.scenes]
    failed = failing(rows)
    rest = sorted(set(range(len(rows))) - set(failed))
    spread = np.linspace(0, len(rest) - 1, min(len(rest), OTHERS * len(failed)))
    others = [rest[i] for i in sorted({round(place) for place in spread})]
    log(f"06 failures: {len(failed)} of {len(rows)} failed, examined beside {len(others)} others")
    examined = read(translator, rows, [*failed, *others], profile, judges)
    found, usual = examined[: len(failed)], examined[len(failed) :]
    again = retold(translator, rows, failed, profile, judges, stage.folder)
    allowed = limits(usual, far=furthest([row["perceptual"] for row in rows]))
    for row, told in zip(found, again, strict=True):
        row["told"] = told
        row["cause"], row["mended_by"] = cause(row, allowed), mended_by(row, allowed)
    off = [beyond(row, allowed) for row in usual]
    table = {
        "rule": rule(),
        "n": len(rows),
        "failed": len(found),
        "examined": len(examined),
        "limits": allowed,
        "causes": {
            name: {
                "meaning": meaning,
                "failures": sum(row["cause"] == name for row in found),
                "mended_by": {
                    told: sum((row["cause"], row["mended_by"]) == (name, told) for row in found)
                    for told in TOLD
                },
                "others": float(np.mean([row[name] for row in off])) if name in off[0] else None,
            }
            for name, meaning in CAUSES.items()
        },
        "mean": {
            "translated": float(np.mean([row["perceptual"] for row in found])),
            **{t: float(np.mean([row["told"][t]["perceptual"] for row in found])) for t in TOLD},
            "autoencoder": float(np.mean([row["autoencoder"] for row in found])),
        },
        "rows": found + [{**row, "told": None, "cause": None} for row in usual],
    }
    write_json(stage.folder / "failures.json", table)
    stage.finish(causes=table["causes"])


def read(
    translator: Translator,
    rows: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    profile: Profile,
    judges: Judges,
) -> list[dict[str, Any]]:
    """Each reading of the chosen scenes' cartoons against the truth, as rows.

    Args:
        rows: stage 06's scenes in its order, with their scores.

    Returns:
        What the rows say, and `read`, the class; `parts`, the overlap of the animals as read with
        the cartoon's own; `caption_class` and `caption_action`, whether they are the scene's;
        `keypoints`, their mean distance from the twin's in pixels of 64; `autoencoder`, the
        perceptual distance of the twin's reconstruction.
    """
    truth = twins_of(tuple(rows[i]["seed"] for i in chosen))
    size = profile.image_size
    drawn = scenes.render_many(list(truth.seeds), "cartoon", size, truth=True)
    pictures = torch.from_numpy(drawn["image"])
    grid = (size // factor_of(translator.vae),) * 2
    _, maps = structure.look(translator.net, pictures, grid)
    classes = structure.classify(maps)
    own = structure.one_hot(
        torch.from_numpy(drawn["parts"]).long(), torch.from_numpy(drawn["mask"] == 2)
    )
    own = torch.nn.functional.interpolate(own, size=maps.shape[-2:], mode="area")
    parts = silhouette_overlap(maps, own)
    said = [blip.to_natural(text) for text in translator.describer.generate(drawn["image"])]
    wanted = [scenes.caption(scenes.describe(seed), "natural") for seed in truth.seeds]
    slots = [[blip.caption_slots(text) for text in texts] for texts in (said, wanted)]
    actions = [slot["action"] for slot in slots[0]]
    away = np.zeros(len(chosen))
    if translator.posture is not None:
        points = translator.posture.points(pictures, classes, actions).cpu().numpy() * SIZE
        away = points_away(points, truth.points)
    images = _at_size(truth.images, size)
    with torch.no_grad():
        latents = encode_all(translator.vae, torch.from_numpy(images))
        back = [
            to_uint8(decode(translator.vae, some.to(translator.unet.device)))
            for some in progress(latents.split(8), "06 failures: twins", unit="x8")
        ]
    again = add_grain(
        np.concatenate(back), translator.grain, seed=profile.seed, numbers=list(chosen)
    )
    lost = _measure({"again": again}, truth, judges)["again"]["perceptual"]
    return [
        {
            **{name: rows[row][name] for name in _KEPT},
            "read": classes[i],
            "parts": round(float(parts[i]), 6),
            "caption": said[i],
            "caption_class": slots[0][i]["subject"] == slots[1][i]["subject"],
            "caption_action": slots[0][i]["action"] == slots[1][i]["action"],
            "keypoints": round(float(away[i]), 6),
            "autoencoder": round(float(lost[i]), 6),
        }
        for i, row in enumerate(chosen)
    ]


_KEPT = ("seed", "class", "action", "class_accuracy", "action_accuracy", "perceptual", "answer")


def retold(
    translator: Translator,
    rows: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    profile: Profile,
    judges: Judges,
    folder: Path,
) -> list[dict[str, dict[str, Any]]]:
    """The chosen scenes drawn again with the truth told, from the noise they were drawn from.

    Writes `<folder>/<told>/<seed>.png`.

    Returns:
        For each scene `shapes` and `view`, each with class_accuracy, action_accuracy, perceptual.
    """
    truth = twins_of(tuple(rows[i]["seed"] for i in chosen))
    sources = scenes.render_many(list(truth.seeds), "cartoon", profile.image_size)["image"]
    made: dict[str, np.ndarray] = {told: np.empty_like(sources) for told in TOLD}
    batch = profile.compare.batch_size  # stage 06's, within which its noise is numbered
    starts = sorted({i - i % batch for i in chosen})
    for start in progress(starts, "06 failures: told the truth"):
        here = [n for n, i in enumerate(chosen) if i - i % batch == start]
        numbers = [chosen[n] - start for n in here]
        options: dict[str, Any] = {"seed": noise_seed(profile, 0, start), "numbers": numbers}
        names = [rows[chosen[n]]["class"] for n in here]
        as_read = translator.conditions(sources[here], names, **options)
        for told in TOLD:
            conditions = truly(translator, as_read, truth, here, coats=told == "view")
            made[told][here] = translator.draw(conditions, sources[here], **options)
    for told, images in made.items():
        for seed, image in zip(truth.seeds, images, strict=True):
            save_image(folder / told / f"{seed}.png", image)
    scored = _measure(made, truth, judges)
    names = ["class_accuracy", "action_accuracy", "perceptual"]
    return [
        {told: {name: round(float(scored[told][name][n]), 6) for name in names} for told in TOLD}
        for n in range(len(chosen))
    ]


def truly(
    translator: Translator,
    as_read: Conditions,
    truth: Truth,
    chosen: Sequence[int],
    *,
    coats: bool,
) -> Conditions:
    """What was read off sources, its errors put right by their hidden twins.

    Args:
        as_read: with the true classes given; its coats and its background's tones are kept.
        chosen: which of the truth's scenes these are.
        coats: take the twin's own coats and tones as well.
    """
    places = list(chosen)
    maps = structure.one_hot(
        torch.from_numpy(truth.parts[places]).long(), torch.from_numpy(truth.masks[places] == 2)
    )
    views: Tensor = as_read.batch.view.cpu()
    if coats:
        images = torch.from_numpy(truth.images[places]).permute(0, 3, 1, 2).float() / 127.5 - 1
        config = translator.conditioner.config
        views = structure.standardise(
            structure.view(maps, images, (views.shape[-2], views.shape[-1])),
            config.tone_mean["natural"],
            config.tone_std["natural"],
        )
    else:
        views = structure.reshape(views, maps)
    described = [scenes.describe(truth.seeds[i]) for i in places]
    captions = [scenes.caption(scene, "natural") for scene in described]
    with torch.no_grad():
        text, mask = translator.describer.text_tokens(captions, length=ldm.TEXT_LENGTH)
    batch = replace(as_read.batch, view=views, text=text.cpu().float(), mask=mask.cpu())
    return Conditions(batch.to(translator.unet.device), as_read.classes, captions)


def points_away(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean distance in pixels of the keypoints that can be seen, (N,).

    Args:
        found: (N, 2, K, 2); true: (N, 2, K, 3) with visibility last.
    """
    seen = true[..., 2] > 0
    far = np.hypot(*np.moveaxis(found - true[..., :2], -1, 0)) * seen
    return far.sum((1, 2)) / np.maximum(seen.sum((1, 2)), 1)


def _at_size(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1] == size:
        return images
    return np.stack([resize(image, size) for image in images])


def _measure(
    sets: Mapping[str, np.ndarray], truth: Truth, judges: Judges
) -> dict[str, dict[str, np.ndarray]]:
    """Scores of each scene; the sets' own measures are not asked for."""
    sized = {name: _at_size(images, SIZE) for name, images in sets.items()}
    options: dict[str, Any] = {"references": REFERENCES, "bootstrap": 2, "show": False}
    found = scoring.measure(sized, truth, judges, **options)
    return {name: scored["each"] for name, scored in found.items()}
