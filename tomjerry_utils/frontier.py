"""Realism against faithfulness: every method's whole sweep, and who dominates whom.

A method with a knob can have more realism for less faithfulness, so one point of it says little.
Here each setting is a point: its perceptual distance to the hidden twins, and its KID, lower being
better in both. Ours dominates a rival if at every distance which that rival reaches, our KID is
lower: a setting of ours that is no further from the twins looks more real.

One measure for two sweeps: the course's, of what needs no training beyond it, on a few validation
scenes; and the study's, of all rivals trained and tuned, on the test scenes (`contest`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import budgets, compare, features, ldm, scenes, scoring, transfer
from tomjerry_utils.images import add_grain, resize
from tomjerry_utils.judges import load_judges
from tomjerry_utils.measures import kid_draws, mean_draws
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.rivals import Rival
from tomjerry_utils.runs import Stage, open_stage, read_json, write_json
from tomjerry_utils.twins import REFERENCES, SIZE, reference, twins_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGE = "06_frontier"
FIRST = 4_600_000  # of the validation range; settings are tuned far from here
METHODS = ("ours", "identity", "colour", "sdedit", "ddib", "ilvr")  # the course's
SURE = 0.95  # share of the draws in which the rule must hold, or fail, to be decided
RULE = (
    "Ours dominates a rival if at every perceptual distance which the rival reaches our KID is "
    "lower: for each of its settings there is one of ours, no further from the hidden twins, with "
    f"a lower KID. Dominated: so in {100 * SURE:.0f} % of redraws of the scenes and references, or "
    f"more; not dominated: in {100 - 100 * SURE:.0f} % or less; else undecided."
)


@dataclass(frozen=True, eq=False)
class Point:
    """A method at one setting, scored on scenes that are the same for all points.

    Attributes:
        perceptual: (N,) distances to the hidden twins.
        kid: of all scenes; kid_draws: (samples,) of scenes drawn anew, from `measures.kid_draws`.
        best: the setting that competes.
        budget: of `budgets.BUDGETS`.
    """

    method: str
    name: str
    setting: Mapping[str, Any]
    perceptual: np.ndarray
    kid: float
    kid_draws: np.ndarray = field(repr=False)
    best: bool = False
    budget: str = "course"


# ---- the rule ----------------------------------------------------------------------------------


def lowest_within(distances: np.ndarray, kids: np.ndarray, reach: Any) -> np.ndarray:
    """The lowest KID among points that are no further than `reach`, infinite where there is none.

    Args:
        distances, kids: (P, …) of P points; reach: (…), as many as each point has.
    """
    return np.where(distances <= reach, kids, np.inf).min(0)


def dominates(ours: Iterable[tuple[float, float]], rival: Iterable[tuple[float, float]]) -> bool:
    """Whether at every distance that a rival reaches, our KID is lower.

    Between two of a rival's settings nothing of it gets better, and ours can only do so: it is
    enough to ask at its settings.

    Args:
        ours, rival: (perceptual distance, KID) of each setting.
    """
    own = np.array(list(ours), float)
    return all(bool(lowest_within(own[:, 0], own[:, 1], far) < near) for far, near in rival)


def verdict(share: float) -> str:
    """What the share of the draws in which the rule holds says of a rival."""
    if share >= SURE:
        return "dominated"
    return "not dominated" if share <= 1 - SURE else "undecided"


def measure(points: Sequence[Point]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all points, and whether ours dominates each rival.

    Draw by draw all points have the same scenes and references, so that each draw compares the
    methods on the same pictures.

    Args:
        points: ours among them, at least one; all with as many scenes and draws.

    Returns:
        rows: budget, method, point, best, setting; perceptual and kid, each with value and ci95; a
        rival's also `ours_kid`, the lowest of ours at no larger distance (None where ours does not
        come so near), and `difference`, ours_kid − kid, with `difference_ci95` (None for an end at
        which ours does not come so near).
        dominance: for each rival and budget whether the rule holds for the values, in which share
        of the draws, and the verdict.
    """
    far = np.array([point.perceptual.mean() for point in points])
    near = np.array([point.kid for point in points])
    near_draws = np.stack([point.kid_draws for point in points])
    samples = near_draws.shape[1]
    far_draws = np.stack([mean_draws(point.perceptual, samples=samples) for point in points])
    own = np.array([point.method == "ours" for point in points])
    rows: list[dict[str, Any]] = []
    lower: dict[tuple[str, str], list[np.ndarray]] = {}
    for i, point in enumerate(points):
        row: dict[str, Any] = {
            "budget": point.budget,
            "method": point.method,
            "point": point.name,
            "best": point.best,
            "setting": dict(point.setting),
            "perceptual": _cell(far[i], far_draws[i]),
            "kid": _cell(near[i], near_draws[i]),
        }
        if not own[i]:
            ours = float(lowest_within(far[own], near[own], far[i]))
            gaps = lowest_within(far_draws[own], near_draws[own], far_draws[i]) - near_draws[i]
            ends = (
                np.percentile(gaps, 2.5, method="lower"),
                np.percentile(gaps, 97.5, method="higher"),
            )
            row["ours_kid"] = _finite(ours)
            row["difference"] = _finite(ours - near[i])
            row["difference_ci95"] = [_finite(end) for end in ends]
            lower.setdefault((point.budget, point.method), []).append(
                np.append(gaps < 0, ours < near[i])
            )
        rows.append(row)
    dominance = []
    for (budget, method), held in lower.items():
        everywhere = np.logical_and.reduce(held)
        share = float(everywhere[:-1].mean())
        dominance.append(
            {
                "budget": budget,
                "method": method,
                "points": len(held),
                "holds": bool(everywhere[-1]),
                "share": share,
                "verdict": verdict(share),
            }
        )
    return rows, dominance


def _cell(value: float, draws: np.ndarray) -> dict[str, Any]:
    return {"value": float(value), "ci95": np.nanpercentile(draws, [2.5, 97.5]).tolist()}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---- the course's sweep ------------------------------------------------------------------------


def ensure(profile: Profile) -> dict[str, Any]:
    """The course's sweep at this profile: measure it, or read what was measured.

    Returns:
        n, features, rule, settings, `frontier` and `dominance` as of :func:`measure`, seconds.
    """
    before = transfer.ensure(profile)
    options = {
        "scenes": profile.compare.sweep_scenes,
        "bootstrap": profile.compare.bootstrap,
        "settings": {method: settings(method, profile) for method in METHODS},
    }
    stage = open_stage(profile, STAGE, options, {"transfer": before.key}, version=2)
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, before.translator, ldm.lend(ldm.ensure(profile)))
    return read_json(stage.folder / "frontier.json")


def settings(method: str, profile: Profile) -> list[dict[str, Any]]:
    """What the course sweeps of a method: a part of the study's grid, in the course's steps.

    Of ours all guidance scales; of a rival every second setting at stage 04's guidance. Each
    that draws anew is measured with the camera's grain and without.
    """
    steps, scale = profile.transfer.sample_steps, profile.ldm.guidance_scale
    grid = budgets.grid(method, profile)
    if method == "ours":
        return [setting for setting in grid if setting["steps"] == steps]
    plain = [s for s in grid if s.get("guidance_scale", scale) == scale]
    return [{**s, "steps": steps} if "steps" in s else s for s in plain[::2]]


def _make(stage: Stage, profile: Profile, translator: Any, model: Any) -> None:
    began = time.monotonic()
    seeds = compare.balanced_seeds(profile.compare.sweep_scenes, FIRST)
    sources = scenes.render_many(seeds, "cartoon", profile.image_size)["image"]
    swept = [(m, s) for m in METHODS for s in settings(m, profile)]
    smooth = replace(translator, grain=0.0)
    sets: dict[str, np.ndarray] = {}
    facts: list[tuple[str, dict[str, Any]]] = []
    for method, setting in progress(swept, "06 sweep", unit="setting"):
        rival = Rival(method, smooth, setting, model=None if method == "ours" else model)
        plain, _ = rival.translate(sources, seed=profile.seed)
        # What draws anew is a point with the camera's grain, as ever, and one without.
        for share in (1.0, 0.0) if "steps" in setting and translator.grain else (None,):
            grain = translator.grain * (share or 0.0)
            made = add_grain(plain, grain, seed=profile.seed, numbers=range(len(plain)))
            sets[str(len(facts))] = np.stack([resize(image, SIZE) for image in made])
            facts.append((method, setting if share is None else {**setting, "grain": share}))
    scored = scoring.measure(
        sets, twins_of(tuple(seeds)), load_judges(), references=REFERENCES, bootstrap=2, show=True
    )
    own = {
        "steps": translator.steps, "guidance_scale": translator.guidance_scale, "grain": 1.0,
    }  # fmt: skip
    real, samples = reference(REFERENCES)[0], profile.compare.bootstrap
    points = [
        Point(
            method,
            name,
            setting,
            scored[name]["each"]["perceptual"],
            scored[name]["metrics"]["kid"]["value"],
            kid_draws(scored[name]["features"], real, samples=samples),
            best=method == "ours" and {"grain": 1.0, **setting} == own,
        )
        for name, (method, setting) in zip(sets, facts, strict=True)
    ]
    rows, dominance = measure(points)
    table = {
        "n": len(seeds),
        "on": "validation scenes",
        "features": features.NAME,
        "rule": RULE,
        "frontier": rows,
        "dominance": dominance,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(stage.folder / "frontier.json", table)
    stage.finish(dominance=dominance)


# ---- the figure --------------------------------------------------------------------------------


def frontier_figure(table: Mapping[str, Any]) -> Figure:
    """Every method's sweep as a line, ours marked, and shaded what ours dominates.

    Args:
        table: from :func:`ensure`, or the study's `study.results("rivals")`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from tomjerry_utils.canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILLION
    from tomjerry_utils.canvas import style as plain

    marks, colors = "sD^vPXph<>", (VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK, MUTED)
    said = {(row["budget"], row["method"]): row["verdict"] for row in table["dominance"]}
    with mpl.rc_context(plain()):
        fig = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = fig.subplots()
        axes.grid(axis="x")
        names = list(dict.fromkeys(row["method"] for row in table["frontier"]))
        rivals, open_marks = [name for name in names if name != "ours"], False
        for key in [*said, ("course", "ours")]:
            which = rivals.index(key[1]) if key[1] in rivals else 0
            ours = key[1] == "ours"
            color = BLUE if ours else colors[which % len(colors)]
            again = "-" if which < len(colors) else "-."  # where a colour comes a second time
            title = budgets.TITLES[key[1]]
            title += ", total budget" if key[0] == "total" else ""
            mine = [r for r in table["frontier"] if (r["budget"], r["method"]) == key]
            for smooth in (False, True):
                rows = [r for r in mine if (r["setting"].get("grain") == 0) == smooth]
                rows.sort(key=lambda row: row["perceptual"]["value"])
                if not rows:
                    continue
                x, y = (np.array([r[m]["value"] for r in rows]) for m in ("perceptual", "kid"))
                ends = [np.array([r[m]["ci95"] for r in rows]).T for m in ("perceptual", "kid")]
                label = title if ours else f"{title}: {said[key]}"
                axes.errorbar(
                    x, y, xerr=np.abs(ends[0] - x), yerr=np.abs(ends[1] - y), color=color,
                    marker="o" if ours else marks[which % len(marks)], markersize=9 if ours else 6,
                    linewidth=2.8 if ours else 1.6, elinewidth=0.9, alpha=1.0 if ours else 0.85,
                    linestyle="--" if key[0] == "total" else ":" if smooth else again,
                    markerfacecolor="white" if smooth else color, zorder=4 if ours else 3,
                    label="_nolegend_" if smooth else label,
                )  # fmt: skip
                open_marks = open_marks or smooth
                for i in (n for n, row in enumerate(rows) if row["best"]):
                    axes.plot(x[i], y[i], "o", color="none", markeredgecolor=color, markersize=15)
            if ours:
                reached = sorted((r["perceptual"]["value"], r["kid"]["value"]) for r in mine)
                xs, ys = np.array(reached).T
                _shade(axes, xs, ys, color)
        if open_marks:
            axes.plot([], [], "o", color="white", markeredgecolor=MUTED, label="without grain")
        axes.set_xlabel("perceptual distance to the hidden twin: nearer is more faithful ←")
        axes.set_ylabel("KID: lower is more real ↓")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)
        axes.set_title(f"Realism and faithfulness, {table['n']} {table.get('on', 'test scenes')}")
    return fig


def _shade(axes: Any, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """The region further and less real than one of these points, up to the axes' ends."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    lowest = np.minimum.accumulate(y)
    steps = np.append(x, right)
    axes.fill_between(
        steps, np.append(lowest, lowest[-1]), top, step="post", color=color, alpha=0.08, linewidth=0
    )
    axes.set_xlim(right=right)
    axes.set_ylim(top=top)
