"""Figures of a collection: what became of every picture, its duplicates, how far apart domains are.

Each function draws and returns a figure, which `figures.save_figure` writes; what is measured on
the way comes back beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from tomjerry_utils import canvas
from tomjerry_utils.images import resize
from tomjerry_utils.judging import kind_of
from tomjerry_utils.sources import Row

# The steps that a picture goes through, each with the reasons by which it ends there.
STEPS: dict[str, tuple[str, ...]] = {
    "met": (),
    "readable": ("cannot be read", "refused", "empty"),
    "passed the screens": (
        *("too small", "blurred", "text or watermark", "not a photograph", "not a cartoon"),
        *("black", "title card", "credits", "interlaced", "dissolve", "shows neither character"),
    ),
    "not a duplicate": ("duplicate", "near duplicate"),
    "kept": (),
}


def funnel(rows: Sequence[Row]) -> tuple[Figure, dict[str, dict[str, int]]]:
    """How many pictures of each source are left after each step, and why the others are not.

    Args:
        rows: of a manifest.

    Returns:
        The figure, and source → step → pictures left.
    """
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    met = Counter(row["source"] for row in rows)
    for row in rows:
        if not row["kept"]:
            dropped[row["source"]][kind_of(row["reason"])] += 1
    left: dict[str, dict[str, int]] = {}
    for source, count in met.items():
        left[source] = {}
        for step, kinds in STEPS.items():
            count -= sum(dropped[source][kind] for kind in kinds)
            left[source][step] = count
        left[source]["kept"] = met[source] - dropped[source].total()
    with mpl.rc_context(canvas.style()):
        figure = Figure(figsize=(9.5, 0.9 + 0.62 * len(met)), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_steps(axes[0], left)
        _draw_reasons(axes[1], dropped, list(left))
    return figure, left


def _draw_steps(axes: mpl.axes.Axes, left: Mapping[str, Mapping[str, int]]) -> None:
    tones = np.linspace(0.25, 1.0, len(STEPS))
    for at, (_, steps) in enumerate(left.items()):
        whole = max(steps["met"], 1)
        for k, (step, tone) in enumerate(zip(STEPS, tones, strict=True)):
            y = at + 0.36 - 0.18 * k
            axes.barh(
                y,
                steps[step] / whole,
                0.16,
                color=canvas.BLUE,
                alpha=tone,
                label=step if not at else None,
            )
            axes.text(steps[step] / whole + 0.01, y, f"{steps[step]}", va="center", fontsize=7)
    axes.set_yticks(range(len(left)), list(left))
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.5, 1], ["0", "half", "all"])
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_title("pictures left, by step")
    axes.legend(fontsize=7, loc="lower right", frameon=True)


def _draw_reasons(
    axes: mpl.axes.Axes, dropped: Mapping[str, Counter[str]], sources: Sequence[str]
) -> None:
    kinds = Counter[str]()
    for counts in dropped.values():
        kinds.update(counts)
    names = [kind for kind, _ in kinds.most_common()]
    start = np.zeros(len(names))
    colors = (canvas.BLUE, canvas.ORANGE, canvas.GREEN, canvas.VERMILLION, canvas.MUTED)
    for at, source in enumerate(sources):
        values = np.array([dropped[source][kind] for kind in names], float)
        if values.any():
            axes.barh(names, values, 0.6, left=start, color=colors[at % len(colors)], label=source)
            start += values
    for y, total in enumerate(start):
        axes.text(total, y, f" {total:.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_title("dropped, by reason")
    if names:
        axes.set_xlim(0, 1.12 * start.max())
        axes.legend(fontsize=7, loc="lower right")
    else:
        axes.text(0.5, 0.5, "nothing was dropped", ha="center", transform=axes.transAxes)


def domain_gap(
    features: Mapping[str, np.ndarray], pictures: Mapping[str, Sequence[np.ndarray]]
) -> tuple[Figure, dict[str, float]]:
    """Where groups of pictures lie in feature space, and how well a line tells two of them apart.

    The plane is that of the first two principal components of all features together; what is
    measured uses all components.

    Args:
        features: name → (N, D).
        pictures: name → as many pictures, (S, S, 3) uint8; some are shown.

    Returns:
        The figure, and "a | b" → share of variance that lies between the two means.
    """
    names = list(features)
    together = np.concatenate([features[name] for name in names])
    mean = together.mean(0)
    _, values, axes_of = np.linalg.svd(together - mean, full_matrices=False)
    shares = values**2 / (values**2).sum()
    flat = {name: (features[name] - mean) @ axes_of[:2].T for name in names}
    colors = (canvas.BLUE, canvas.ORANGE, canvas.GREEN, canvas.VERMILLION, canvas.MUTED)
    with mpl.rc_context(canvas.style()):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        for name, color in zip(names, colors, strict=False):
            axes.scatter(
                flat[name][:, 0],
                flat[name][:, 1],
                s=9,
                color=color,
                alpha=0.45,
                linewidths=0,
                label=name,
            )
            for i in _spread_out(flat[name], 5):
                image = OffsetImage(resize(pictures[name][i], 48), zoom=0.55)
                axes.add_artist(
                    AnnotationBbox(
                        image, tuple(flat[name][i]), pad=0.12, bboxprops={"edgecolor": color}
                    )
                )
        axes.set_xlabel(f"first component, {shares[0]:.0%} of the variance")
        axes.set_ylabel(f"second component, {shares[1]:.0%}")
        axes.legend(loc="best", markerscale=2)
        axes.grid(False)
    gaps = {
        f"{a} | {b}": _between(features[a], features[b])
        for at, a in enumerate(names)
        for b in names[at + 1 :]
    }
    return figure, gaps


def _between(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the variance that lies between the two means, groups weighted alike."""
    gap = float(np.square(a.mean(0) - b.mean(0)).sum()) / 4
    within = float(a.var(0).sum() + b.var(0).sum()) / 2
    return gap / (gap + within)


def _spread_out(points: np.ndarray, count: int) -> list[int]:
    """Points far from each other, the first in the middle: farthest-point sampling."""
    chosen = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    nearest = np.square(points - points[chosen[0]]).sum(1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(1))
    return chosen
