"""The study "rivals": ours and every rival on equal terms, on scenes that nobody trained on.

`rivals` trains and tunes, `contest_parts` translates the test scenes and scores, one part after
the other; here they are put in order and every method is set against ours scene by scene. Parts
that are kept need no run, so the study can be done in several sittings on several machines, and
its tables stand as soon as all methods have one training seed under the course's budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import budgets, compare, contest_parts, features, tuning
from tomjerry_utils.contest_parts import Entry, Task
from tomjerry_utils.frontier import RULE, Point, measure
from tomjerry_utils.judges import load_judges
from tomjerry_utils.kept_parts import kept, read_part
from tomjerry_utils.pooling import over_seeds, pooled_row, two_level
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import log
from tomjerry_utils.twins import REFERENCES

SEEDS = {"course": 3, "total": 1}  # training seeds of a rival at most
FRONTIER = ("class_accuracy", "action_accuracy", "mask_iou")  # of each point, beside its place

Found = Mapping[str, Mapping[str, Sequence[Entry]]]  # budget → method → training seeds


def run(
    variants: Sequence[Profile],
    folder: Path,
    *,
    references: int = REFERENCES,
    write: Callable[[dict[str, Any]], Any] = lambda table: None,
) -> dict[str, Any]:
    """Make the parts that are not kept, in order of their worth, and put all in tables.

    The course's budget comes first, seed by seed, then the total. A study that is killed loses
    nothing but the part under way, of which what is finished stays in its run.

    Args:
        variants: the training seeds' profiles; the first is tuned.
        folder: of the kept parts.
        references: held-out natural scenes for KID.
        write: called with the tables after each part, once the first seed has all methods.

    Returns:
        The tables: see :func:`tables`.
    """
    tasks = _tasks(variants)
    seeds = compare.held_out_seeds(variants[0].compare.test_scenes)
    shared = contest_parts.shared_facts(variants[0], seeds, references)
    by_seed = {variant.seed: variant for variant in variants}
    known = _known(tasks, folder, by_seed, shared)
    log(_state(tasks, known, folder))
    for task in tasks:
        if task in known:
            continue
        profile, setting = by_seed[task.seed], _setting(task, tasks, known)
        make = partial(
            contest_parts.make,
            task,
            profile,
            setting=setting,
            seeds=seeds,
            judges=load_judges(),  # first of all: without them the rest would be in vain
            references=references,
        )
        own = contest_parts.own_facts(task, profile, setting)
        kept(task.path(folder), {**shared, **own}, make)
        known = _known(tasks, folder, by_seed, shared)
        log(_state(tasks, known, folder))
        if all(t in known for t in tasks if t[:2] == tasks[0][:2]):
            write(tables(variants, tasks, known))
    return tables(variants, tasks, known)


def tables(
    variants: Sequence[Profile], tasks: Sequence[Task], known: Mapping[Task, Entry]
) -> dict[str, Any]:
    """What the parts say, of the training seeds of which a budget has all methods.

    Args:
        tasks: all of the study; known: those that are kept, all of the first seed's among them.

    Returns:
        n, features, trials, criterion; seeds; `covers` with the training seeds of each budget and
        `missing` with the parts that are not yet made; `budgets` with their seconds; `supervision`
        with a row for each method; `methods` and `differences` (ours − rival) by budget, values
        and intervals over scenes and training seeds; `frontier` with a row for each point of each
        sweep, `dominance` with the verdict on each rival, `rule` in words.
    """
    found = _complete(tasks, known)
    ours = found["course"]["ours"]
    samples = variants[0].compare.bootstrap
    covers = {
        budget: [entry.task.seed for entry in next(iter(table.values()))]
        for budget, table in found.items()
    }
    return {
        "n": len(ours[0].each["perceptual"]),
        "features": features.NAME,
        "trials": budgets.TRIALS,
        "criterion": tuning.RULE,
        "seeds": covers["course"],
        "covers": covers,
        "missing": [task.name for task in tasks if task not in known],
        "budgets": {budget: _terms(table, variants[0], budget) for budget, table in found.items()},
        "supervision": _supervision(found),
        "methods": {
            budget: {name: _method(entries, samples) for name, entries in table.items()}
            for budget, table in found.items()
        },
        "differences": {
            budget: {
                name: _differences(ours, entries, samples)
                for name, entries in table.items()
                if name != "ours"
            }
            for budget, table in found.items()
        },
        **_frontier(found),
    }


# ---- the parts in order ------------------------------------------------------------------------


def _tasks(variants: Sequence[Profile]) -> list[Task]:
    known = ["course"]
    if budgets.foundation_seconds(variants[0]) is None:
        log("rivals: the foundation does not say how long it was trained: no total budget")
    else:
        known.append("total")
    return [
        Task(budget, variant.seed, method)
        for budget in known
        for variant in variants[: SEEDS[budget]]
        for method in budgets.METHODS[budget]
    ]


def _setting(
    task: Task, tasks: Sequence[Task], known: Mapping[Task, Entry]
) -> dict[str, Any] | None:
    """The setting that a part takes over; None for the one whose trials find it."""
    tuned = _tuned(task, tasks)
    return None if task == tuned else dict(known[tuned].record["setting"])


def _tuned(task: Task, tasks: Sequence[Task]) -> Task:
    return Task(budgets.TUNED, tasks[0].seed, task.method)


def _known(
    tasks: Sequence[Task],
    folder: Path,
    by_seed: Mapping[int, Profile],
    shared: Mapping[str, Any],
) -> dict[Task, Entry]:
    """The parts that are kept and fit, in order: which of a later seed do, its first decides."""
    known: dict[Task, Entry] = {}
    for task in tasks:
        tuned = _tuned(task, tasks)
        if task != tuned and tuned not in known:
            continue
        setting = _setting(task, tasks, known)
        own = contest_parts.own_facts(task, by_seed[task.seed], setting)
        part = read_part(task.path(folder), {**shared, **own})
        if part is not None:
            known[task] = contest_parts.entry(task, part)
    return known


def _state(tasks: Sequence[Task], known: Mapping[Task, Entry], folder: Path) -> str:
    left: dict[str, list[str]] = {}
    for task in tasks:
        if task not in known:
            left.setdefault(f"{task.budget} seed {task.seed}", []).append(task.method)
    rest = "; ".join(f"{name}: {', '.join(methods)}" for name, methods in left.items())
    return f"rivals: {len(known)} of {len(tasks)} parts kept in {folder}; left: {rest or 'none'}"


def _complete(
    tasks: Sequence[Task], known: Mapping[Task, Entry]
) -> dict[str, dict[str, list[Entry]]]:
    """budget → method → entries, of the seeds of which the budget has all methods."""
    found: dict[str, dict[str, list[Entry]]] = {}
    for budget, seed in dict.fromkeys(task[:2] for task in tasks):
        entries = [known.get(Task(budget, seed, method)) for method in budgets.METHODS[budget]]
        for entry in entries:
            if entry is not None and None not in entries:
                found.setdefault(budget, {}).setdefault(entry.task.method, []).append(entry)
    return found


# ---- tables ------------------------------------------------------------------------------------


def _method(entries: Sequence[Entry], samples: int) -> dict[str, Any]:
    """What one method reached at its best setting, and how it came to it."""
    first = entries[0].record
    drawn = {
        name: two_level(np.stack([e.each[name] for e in entries]), samples)
        for name in entries[0].each
    }
    drawn["kid"] = over_seeds(np.stack([e.kid[e.best] for e in entries]))
    return {
        "setting": first["setting"],
        "trials": first["trials"],
        "curve": first["curve"],
        "metrics": {
            name: pooled_row([e.record["metrics"][e.best][name] for e in entries], values)
            for name, values in drawn.items()
        },
        "seeds": [e.task.seed for e in entries],
        "seconds": [e.record["seconds"] for e in entries],
        "seconds_per_picture": [e.record["seconds_per_picture"] for e in entries],
        "devices": [e.record["device"] for e in entries],
    }


def _differences(
    ours: Sequence[Entry], rival: Sequence[Entry], samples: int
) -> dict[str, dict[str, Any]]:
    """Ours − rival: the same scenes and the same training seeds, both drawn anew."""
    by_seed = {entry.task.seed: entry for entry in ours}
    pairs = [(by_seed[entry.task.seed], entry) for entry in rival if entry.task.seed in by_seed]
    drawn = {
        name: two_level(np.stack([a.each[name] - b.each[name] for a, b in pairs]), samples)
        for name in ours[0].each
    }
    drawn["kid"] = over_seeds(np.stack([a.kid[a.best] - b.kid[b.best] for a, b in pairs]))
    out = {}
    for name, values in drawn.items():
        rows = [(a.record["metrics"][a.best][name], b.record["metrics"][b.best][name])
                for a, b in pairs]  # fmt: skip
        gaps = [{"difference": a["value"] - b["value"], "n": a["n"]} for a, b in rows]
        row = pooled_row(gaps, values, key="difference")
        out[name] = row | {"verdict": compare.verdict(name, row["ci95"])}
    return out


def _terms(table: Mapping[str, Sequence[Entry]], profile: Profile, budget: str) -> dict[str, Any]:
    """A budget's seconds for each training seed, and what they are the sum of.

    As the seed's first part has them: one that was made on another machine, whose course took
    another time there, has its own in its method's row.
    """
    first = {str(entry.task.seed): entry.record for entry in next(iter(table.values()))}
    foundation = next(iter(first.values()))["foundation_seconds"]
    return {
        "seconds": {seed: record["seconds"]["budget"] for seed, record in first.items()},
        "course": {seed: record["course_seconds"] for seed, record in first.items()},
        "foundation": foundation if budget == "total" else None,
        "share": profile.rivals.budget_share,
        "tuned_under": budgets.TUNED,
        "trial_share": budgets.TRIAL_SHARE if budget == budgets.TUNED else None,
        "methods": list(table),
    }


def _supervision(found: Found) -> dict[str, dict[str, Any]]:
    """What each method starts from and is told, with the seconds that it took."""
    ours = found["course"]["ours"][0].record
    before, own = ours["foundation_seconds"] or {}, ours["course_seconds"]
    out: dict[str, dict[str, Any]] = {}
    for method, row in budgets.SUPERVISION.items():
        seconds: dict[str, float] = {}
        for budget, table in found.items():
            if method in table:
                taken = table[method][0].record["seconds"]
                seconds[budget] = taken["trained"]
                if budget == budgets.TUNED:
                    seconds[f"{budget}, tuning"] = taken["tuning"]
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


def _frontier(found: Found) -> dict[str, Any]:
    """Every point of the tuned seed's sweeps, and whom ours dominates: see `frontier.measure`."""
    points, metrics = [], []
    for budget, table in found.items():
        # Ours cannot be said to dominate itself.
        for method, entries in ((m, e) for m, e in table.items() if m not in budgets.VARIANTS):
            first = entries[0]
            for name, setting in first.record["points"].items():
                scores = first.record["metrics"][name]
                points.append(
                    Point(
                        method,
                        name,
                        setting,
                        first.perceptual[name],
                        scores["kid"]["value"],
                        first.kid[name],
                        best=name == first.best,
                        budget=budget,
                    )
                )
                metrics.append(scores)
    rows, dominance = measure(points)
    for row, known in zip(rows, metrics, strict=True):
        row |= {m: {k: known[m][k] for k in ("value", "ci95")} for m in FRONTIER}
    return {"rule": RULE, "frontier": rows, "dominance": dominance}
