"""The study "rivals": ours and every rival on equal terms, on scenes that nobody trained on.

`rivals` trains and tunes; here every point of every method translates the test scenes, is scored,
and is set against ours scene by scene. Test scenes are seen here for the first time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import budgets, compare, features, rivals, scenes, scoring, transfer, tuning
from tomjerry_utils.frontier import RULE, Point, measure
from tomjerry_utils.images import load_image, resize, save_image
from tomjerry_utils.judges import Judges, load_judges
from tomjerry_utils.measures import kid_draws
from tomjerry_utils.picking import noise_seed
from tomjerry_utils.pooling import over_seeds, pooled_row, two_level
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.rivals import Rival, RivalRun
from tomjerry_utils.runs import (
    atomic_path,
    foundation_root,
    hash_file,
    hash_obj,
    log,
    read_json,
    write_json,
)
from tomjerry_utils.twins import REFERENCES, SIZE, reference, twins_of

SEEDS = {"course": 3, "total": 1}  # training seeds of a rival at most
FRONTIER = ("class_accuracy", "action_accuracy", "mask_iou")  # of each point, beside its place


def run(variants: Sequence[Profile], *, references: int = REFERENCES) -> dict[str, Any]:
    """Train, tune, translate and score; what a killed study had finished is not redone.

    Args:
        variants: the training seeds' profiles; the first is tuned.
        references: held-out natural scenes for KID.

    Returns:
        n, features, trials, criterion; `budgets` with their seconds; `supervision` with a row for
        each method; `methods` and `differences` (ours − rival) by budget, values and intervals over
        scenes and training seeds; `frontier` with a row for each point of each sweep, `dominance`
        with the verdict on each rival, `rule` in words.
    """
    first = variants[0]
    judges = load_judges()  # first of all: without them the rest would be in vain
    seeds = compare.held_out_seeds(first.compare.test_scenes)
    known = ["course"]
    if budgets.foundation_seconds(first) is None:
        log("rivals: the foundation does not say how long it was trained: no total budget")
    else:
        known.append("total")
    found: dict[str, dict[str, list[_Scored]]] = {}
    for budget in known:
        found[budget] = {}
        for method in budgets.METHODS[budget]:
            scored: list[_Scored] = []
            for variant in variants[: SEEDS[budget]]:
                setting = scored[0].run.setting if scored else None
                made = rivals.ensure(variant, budget, method, setting=setting)
                scored.append(_score(made, variant, seeds, judges, references))
            found[budget][method] = scored
    ours = found["course"]["ours"]
    samples, real = first.compare.bootstrap, reference(references)[0]
    return {
        "n": len(seeds),
        "features": features.NAME,
        "trials": budgets.TRIALS,
        "criterion": tuning.RULE,
        "budgets": {budget: _terms(variants[: SEEDS[budget]], budget) for budget in known},
        "supervision": _supervision(first, found),
        "methods": {
            budget: {name: _method(scored, samples, real) for name, scored in table.items()}
            for budget, table in found.items()
        },
        "differences": {
            budget: {
                name: _differences(ours, scored, samples, real)
                for name, scored in table.items()
                if name != "ours"
            }
            for budget, table in found.items()
        },
        **_frontier(found, samples, real),
    }


# ---- translating -------------------------------------------------------------------------------


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


# ---- scoring -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Scored:
    """A method's points, scored: name → metrics; of the best, the scores of each scene.

    `points` has each point's perceptual distances and its features.
    """

    run: RivalRun
    metrics: dict[str, dict[str, Any]]
    each: dict[str, np.ndarray]
    features: np.ndarray
    seconds_per_picture: float
    points: dict[str, tuple[np.ndarray, np.ndarray]]


def _score(
    made: RivalRun, profile: Profile, seeds: Sequence[int], judges: Judges, references: int
) -> _Scored:
    """Translate and score a run's points, or read what is kept of that beside its weights."""
    weights = sorted((foundation_root() / "judges").rglob("*.safetensors"))
    facts = {
        "seeds": list(seeds),
        "references": references,
        "bootstrap": profile.compare.bootstrap,
        "judges": [hash_file(w) for w in weights],
        "version": 2,  # of what is kept: every point's distances and features
    }
    kept = made.folder / "test" / f"scores_{hash_obj(facts)}"
    if not _whole(kept):
        opened = made.open(transfer.ensure(profile).translator)
        sets = {
            name: np.stack(
                [resize(image, SIZE) for image in translate(made, name, rival, profile, seeds)]
            )
            for name, rival in opened.items()
        }
        log(f"rivals: scoring {made.method} under the budget '{made.budget}'")
        scored = scoring.measure(
            sets,
            twins_of(tuple(seeds)),
            judges,
            references=references,
            bootstrap=profile.compare.bootstrap,
            show=False,
        )
        arrays = {f"each {name}": row for name, row in scored[made.best]["each"].items()}
        for name, found in scored.items():
            arrays[f"perceptual {name}"] = found["each"]["perceptual"]
            arrays[f"features {name}"] = found["features"]
        with atomic_path(kept.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        write_json(kept.with_suffix(".json"), {name: s["metrics"] for name, s in scored.items()})
    with np.load(kept.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files}
    seconds = read_json(made.folder / "test" / f"{made.best}.json")
    return _Scored(
        made,
        read_json(kept.with_suffix(".json")),
        {
            name.removeprefix("each "): values
            for name, values in arrays.items()
            if name.startswith("each ")
        },
        arrays[f"features {made.best}"],
        seconds["seconds"] / seconds["n"],
        {name: (arrays[f"perceptual {name}"], arrays[f"features {name}"]) for name in made.points},
    )


def _whole(kept: Path) -> bool:
    return all(kept.with_suffix(suffix).is_file() for suffix in (".npz", ".json"))


def _method(scored: Sequence[_Scored], samples: int, real: np.ndarray) -> dict[str, Any]:
    """What one method reached at its best setting, and how it came to it."""
    first = scored[0]
    drawn = {
        name: two_level(np.stack([s.each[name] for s in scored]), samples) for name in first.each
    }
    drawn["kid"] = over_seeds(
        np.stack([kid_draws(s.features, real, samples=samples) for s in scored])
    )
    return {
        "setting": first.run.setting,
        "trials": first.run.trials,
        "metrics": {
            name: pooled_row([s.metrics[s.run.best][name] for s in scored], values)
            for name, values in drawn.items()
        },
        "seeds": [s.run.profile.seed for s in scored],
        "seconds": [s.run.seconds for s in scored],
        "seconds_per_picture": [round(s.seconds_per_picture, 4) for s in scored],
    }


def _differences(
    ours: Sequence[_Scored], rival: Sequence[_Scored], samples: int, real: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Ours − rival: the same scenes and the same training seeds, both drawn anew."""
    pairs = list(zip(ours, rival, strict=False))  # ours may have more seeds
    names = list(ours[0].each)
    drawn = {
        name: two_level(np.stack([a.each[name] - b.each[name] for a, b in pairs]), samples)
        for name in names
    }
    drawn["kid"] = over_seeds(
        np.stack(
            [
                kid_draws(a.features, real, samples=samples)
                - kid_draws(b.features, real, samples=samples)
                for a, b in pairs
            ]
        )
    )
    out = {}
    for name, values in drawn.items():
        rows = [(a.metrics[a.run.best][name], b.metrics[b.run.best][name]) for a, b in pairs]
        gaps = [{"difference": a["value"] - b["value"], "n": a["n"]} for a, b in rows]
        row = pooled_row(gaps, values, key="difference")
        out[name] = row | {"verdict": compare.verdict(name, row["ci95"])}
    return out


# ---- tables ------------------------------------------------------------------------------------


def _terms(variants: Sequence[Profile], budget: str) -> dict[str, Any]:
    """A budget's seconds for each training seed, and what they are the sum of."""
    return {
        "seconds": {str(v.seed): round(budgets.budget_seconds(v, budget), 1) for v in variants},
        "course": {str(v.seed): budgets.course_seconds(v) for v in variants},
        "foundation": budgets.foundation_seconds(variants[0]) if budget == "total" else None,
        "share": variants[0].rivals.budget_share,
        "trial_share": budgets.TRIAL_SHARE[budget],
        "methods": list(budgets.METHODS[budget]),
    }


def _supervision(
    profile: Profile, found: Mapping[str, Mapping[str, Sequence[_Scored]]]
) -> dict[str, dict[str, Any]]:
    """What each method starts from and is told, with the seconds that it took."""
    before = budgets.foundation_seconds(profile) or {}
    own = budgets.course_seconds(profile)
    out: dict[str, dict[str, Any]] = {}
    for method, row in budgets.SUPERVISION.items():
        seconds: dict[str, float] = {}
        for budget, table in found.items():
            if method in table:
                taken = table[method][0].run.seconds
                seconds |= {budget: taken["trained"], f"{budget}, tuning": taken["tuning"]}
        if method == "ours":
            seconds["captioner"] = own["03 blip"]
        named = [name for name in row["starts_from"] if name in before]
        seconds["pretraining"] = sum(before[name] for name in named)
        out[method] = {
            **row,
            "starts_from": list(row["starts_from"]),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }
    return out


def _frontier(
    found: Mapping[str, Mapping[str, Sequence[_Scored]]], samples: int, real: np.ndarray
) -> dict[str, Any]:
    """Every point of the tuned seed's sweeps, and whom ours dominates: see `frontier.measure`."""
    points, metrics = [], []
    for budget, table in found.items():
        # Ours cannot be said to dominate itself.
        for method, scored in ((m, s) for m, s in table.items() if m not in budgets.VARIANTS):
            first = scored[0]
            for name, setting in first.run.points.items():
                best = name == first.run.best
                points.append(Point(method, name, setting, *first.points[name], best, budget))
                metrics.append(first.metrics[name])
    rows, dominance = measure(points, real, samples=samples)
    for row, known in zip(rows, metrics, strict=True):
        row |= {m: {k: known[m][k] for k in ("value", "ci95")} for m in FRONTIER}
    return {"rule": RULE, "frontier": rows, "dominance": dominance}
