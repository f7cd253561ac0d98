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
    reasons = Counter[str]()
    for counts in dropped.values():
        reasons.update(counts)
    names = [kind for kind, _ in reasons.most_common()]
    with mpl.rc_context(canvas.style()):
        height = 1.0 + 0.3 * max(len(STEPS), len(names))
        figure = Figure(figsize=(9.5, height + 0.3 * (len(met) > 1)), layout="constrained")
        steps, why = figure.subplots(1, 2)
        _stack(steps, list(STEPS), {name: [by[s] for s in STEPS] for name, by in left.items()})
        steps.set_title("pictures left")
        _stack(why, names, {name: [dropped[name][kind] for kind in names] for name in left})
        why.set_title("dropped, by reason")
        if not names:
            why.text(0.5, 0.5, "nothing was dropped", ha="center", transform=why.transAxes)
            why.set_axis_off()
        if len(met) > 1:
            figure.legend(*steps.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure, left


def _stack(
    axes: mpl.axes.Axes, names: Sequence[str], by_source: Mapping[str, Sequence[int]]
) -> None:
    """A bar for each name, of parts for each source, with its sum."""
    start = np.zeros(len(names))
    for at, (source, counts) in enumerate(by_source.items()):
        color = canvas.COLORS[at % len(canvas.COLORS)]
        axes.barh(names, counts, 0.66, left=start, color=color, label=source)
        start += counts
    for y, total in enumerate(start):
        axes.text(total, y, f" {total:.0f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * max(start.max(initial=0.0), 1.0))
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(axis="y", length=0)


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
