"""Figures of `failures`: a gallery of the worst with their causes, and a count of the causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from tomjerry_utils.canvas import BLUE, INK, MUTED, SKY, VERMILLION, blank, place, style, wrap
from tomjerry_utils.images import load_image
from tomjerry_utils.twins import twins_of

if TYPE_CHECKING:
    from tomjerry_utils.failures import FailureRun


def gallery_figure(found: FailureRun, count: int = 6, *, cell: float = 1.45) -> Figure:
    """The worst translations, each a column: cartoon, ours, told the truth, hidden twin, cause."""
    rows = [row for row in found.table["rows"] if row["cause"]][:count]
    where = {row["seed"]: i for i, row in enumerate(found.run.scenes)}
    twins = twins_of(tuple(row["seed"] for row in rows)).images
    lines = {
        "cartoon": [found.run.pictures["identity"][where[row["seed"]]] for row in rows],
        "ours": [found.run.pictures["ours"][where[row["seed"]]] for row in rows],
        "told the\ntwin's shapes": _drawn(found, rows, "shapes"),
        "told the\ntwin's view": _drawn(found, rows, "view"),
        "hidden twin": list(twins),
    }
    gap, side, head, size = 0.07, 1.15, 0.55, 8.5
    step = cell + gap
    width = side + len(rows) * step - gap
    remedies = {"shapes": "its shapes mend it", "view": "its view mends it"}
    causes = [
        wrap(
            f"{found.table['causes'][row['cause']]['meaning']}\n"
            f"({remedies.get(row['mended_by'], 'nothing told mends it')})",
            cell, size,
        )
        for row in rows
    ]  # fmt: skip
    below = 0.2 + (1 + max(text.count("\n") + 1 for text in causes)) * 1.35 * size / 72
    note = wrap(found.table["rule"], width, size)
    foot = 0.25 + (note.count("\n") + 1) * 1.35 * size / 72
    height = head + len(lines) * step + below + foot
    fig, canvas = blank(width, height)
    for column, row in enumerate(rows):
        x = side + column * step
        title = f"{row['class']}, {row['action']}\ndistance {row['perceptual']:.2f}"
        middle = x + cell / 2
        canvas.text(middle, height - head + 0.1, title, fontsize=size, ha="center", color=INK)
        y = foot + below - 0.08
        canvas.text(
            middle, y, row["cause"], fontsize=10, ha="center", va="top", weight="bold",
            color=VERMILLION,
        )  # fmt: skip
        canvas.text(
            middle, y - 0.22, causes[column], fontsize=size, ha="center", va="top", color=MUTED
        )
        for line, images in enumerate(lines.values()):
            frame = VERMILLION if line == 1 else None
            place(canvas, images[column], x, height - head - (line + 1) * step + gap, cell, frame)
            if again := {2: row["told"]["shapes"], 3: row["told"]["view"]}.get(line):
                canvas.text(
                    x + 0.05, height - head - (line + 1) * step + gap + 0.05,
                    f"{again['perceptual']:.2f}", fontsize=8, color="white", zorder=4,
                    bbox={"facecolor": "#00000099", "edgecolor": "none", "pad": 1.5},
                )  # fmt: skip
    for line, name in enumerate(lines):
        y = height - head - (line + 0.5) * step
        canvas.text(side - 0.12, y, name, fontsize=10, ha="right", va="center", color=INK)
    canvas.text(0, 0.02, note, fontsize=size, color=MUTED, linespacing=1.3)
    return fig


def _drawn(found: FailureRun, rows: Sequence[Mapping[str, Any]], told: str) -> list[np.ndarray]:
    return [load_image(found.folder / told / f"{row['seed']}.png") for row in rows]


def causes_figure(table: Mapping[str, Any]) -> Figure:
    """How many failures each cause has, and what mends them; how often the others are off as far.

    Args:
        table: of a :class:`failures.FailureRun`.
    """
    causes = table["causes"]
    kinds = {
        "shapes": ("mended by the twin's shapes", BLUE),
        "view": ("mended by the twin's whole view", SKY),
        "": ("mended by neither", VERMILLION),
    }
    with mpl.rc_context(style()):
        fig = Figure(figsize=(8.6, 1.5 + 0.5 * len(causes)), layout="constrained")
        axes = fig.subplots()
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xticks([])
        most = max(row["failures"] for row in causes.values()) or 1
        begun = np.zeros(len(causes))
        for kind, (said, color) in kinds.items():
            counts = np.array(
                [
                    row["mended_by"].get(kind, row["failures"] - sum(row["mended_by"].values()))
                    for row in causes.values()
                ]
            )
            axes.barh(range(len(causes)), counts, left=begun, color=color, height=0.62, label=said)
            begun += counts
        for line, row in enumerate(causes.values()):
            at = row["failures"] + 0.02 * most
            axes.text(at, line, f"{row['failures']}", va="center", weight="bold")
            usual = "–" if row["others"] is None else f"{100 * row['others']:.0f} %"
            axes.text(1.28 * most, line, usual, va="center", ha="right", color=MUTED)
        head = "others as far off"
        axes.text(1.28 * most, -0.8, head, ha="right", va="center", color=MUTED, size=9)
        labels = [f"{name}: {row['meaning']}" for name, row in causes.items()]
        axes.set_yticks(range(len(causes)), [wrap(label, 3.4, 9.5) for label in labels])
        for label in axes.get_yticklabels():
            label.set_color(INK)
            label.set_fontsize(9.5)
        axes.set_xlim(0, 1.3 * most)
        axes.set_ylim(len(causes) - 0.4, -1.2)
        fig.suptitle(
            f"{table['failed']} failures of {table['n']} translations, by the first stage that "
            "went wrong", x=0.01, ha="left", weight="bold", fontsize=13,
        )  # fmt: skip
        fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    return fig
