"""What every figure is drawn on: colours, style, a canvas measured in inches, pictures, text."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's palette, told apart with every common kind of colour vision.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY, YELLOW = "#E69F00", "#CC79A7", "#56B4E9", "#F0E442"
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
INK, MUTED, FAINT = "#1F2933", "#5F6B76", "#DDE2E7"
DPI = 300

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
    "font.size": 11,
    "text.color": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#B6BEC6",
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E9EDF0",
    "grid.linewidth": 0.9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "tomjerry",
}


def style() -> dict[Any, Any]:
    """The style of all figures, as matplotlib settings: `with mpl.rc_context(style()): …`."""
    return {**_STYLE, "axes.prop_cycle": cycler(color=COLORS)}


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, and axes over all of it whose unit is an inch, from the lower left."""
    with mpl.rc_context(style()):
        fig = Figure(figsize=(width, height))
        axes = fig.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return fig, axes


def place(
    canvas: Axes, image: np.ndarray, x: float, y: float, cell: float, frame: str | None
) -> None:
    """A picture in the square cell at (x, y), whole, with slightly rounded corners."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    w, h = width * scale, height * scale
    x, y = x + (cell - w) / 2, y + (cell - h) / 2
    corner = 0.035 * cell
    shape = FancyBboxPatch(
        (x, y), w, h, boxstyle=f"round,pad=0,rounding_size={corner}", facecolor="none",
        edgecolor=frame or "none", linewidth=2.4 if frame else 0, zorder=3,
        clip_on=False,
    )  # fmt: skip
    canvas.add_patch(shape)
    limits = canvas.get_xlim(), canvas.get_ylim()
    smooth = "lanczos" if max(height, width) < cell * DPI else "antialiased"
    shown = canvas.imshow(
        image, extent=(x, x + w, y, y + h), interpolation=smooth, aspect="auto", zorder=2
    )
    shown.set_clip_path(shape)
    canvas.set_xlim(*limits[0])
    canvas.set_ylim(*limits[1])


def text_width(text: str, font_size: float) -> float:
    """Width of the longest line in inches; DejaVu Sans takes 0.56 em a letter on average."""
    return max(len(line) for line in text.split("\n")) * 0.56 * font_size / 72


def wrap(text: str, width: float, font_size: float) -> str:
    """Text broken into lines of about equal length that fit a width in inches.

    Its own line breaks are kept.
    """
    most = max(6, int(width * 72 / (0.56 * font_size)))
    parts = []
    for line in str(text).split("\n"):
        broken = textwrap.wrap(line, most) or [""]
        # The narrowest setting with as few lines leaves no lonely last word.
        for letters in range(most - 1, 5, -1):
            narrower = textwrap.wrap(line, letters, break_long_words=False) or [""]
            if len(narrower) > len(broken) or max(map(len, narrower)) > most:
                break
            broken = narrower
        parts += broken
    return "\n".join(parts)
