"""The course on one page: what each stage reads, trains and hands on."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from tomjerry_utils import scenes
from tomjerry_utils.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    blank,
    place,
)

WORKFLOW_ALT = (
    "Workflow in six boxes. 01 collects cartoon and natural pictures without pairs. Above, 02 has "
    "a random sample captioned and 03 fine-tunes BLIP on the captions. Below, 04 trains the latent "
    "diffusion model. Both lead to 05, the source-conditioned translator regularised by BLIP, "
    "whose translations 06 compares with those of its rivals."
)

# Scenes for the two small pictures of box 01, from the two training ranges: they are no pair.
_CARTOON_SEED, _NATURAL_SEED = 1_000_005, 2_000_005

_WIDTH, _HEIGHT = 16.55, 5.6


def workflow_diagram(
    *,
    images: int = 5000,
    captions: int = 1200,
    result: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw the workflow: "pre-train conditional diffusion, finetune BLIP for captioning, and
    enforce regularization for transfer" (poster, Methods).

    Args:
        images: pictures per domain; the poster's number by default.
        captions: pictures captioned; the poster's number by default.
        result: a source and its translation, (H, W, 3) uint8, shown in box 06.
    """
    fig, axes = blank(_WIDTH, _HEIGHT)
    middle = _HEIGHT / 2
    low, high = middle - 1.95, 3.05  # lower edges: the tall boxes, the lane of language
    scene = scenes.describe(_CARTOON_SEED, cls="tom")
    other = scenes.describe(_NATURAL_SEED, cls="tom")

    _box(axes, 0.1, low, 2.85, 3.9, BLUE, "01", "Collect")
    for picture, x, name in (
        (scenes.render(scene, "cartoon", 320).image, 0.29, "cartoon $x$"),
        (scenes.render(other, "natural", 320).image, 1.57, "natural $y$"),
    ):
        place(axes, picture, x, low + 1.86, 1.19, None)
        axes.text(x + 0.6, low + 1.77, name, ha="center", va="top", fontsize=12, color=INK)
    domains = f"{images} pictures a domain,\nno pairs among them"
    _text(axes, 0.32, low + 1.28, domains, r"tom $\to$ cat, jerry $\to$ mouse")

    _box(axes, 3.7, high, 2.5, 2.25, SKY, "02", "Caption")
    words = textwrap.fill(scenes.caption(scene, "cartoon"), 22)
    _text(axes, 3.92, high + 1.47, f"GPT-4 describes {captions}\nrandom pictures", f"“{words}”")

    _box(axes, 6.8, high, 2.7, 2.25, GREEN, "03", "Fine-tune BLIP")
    learns = "$\\varphi$ learns to tell who\ndoes what, and where"
    _text(axes, 7.02, high + 1.47, learns, "then captions every\npicture")

    _box(axes, 3.7, 0.3, 5.8, 2.25, VERMILLION, "04", "Train the latent diffusion model")
    parts = (
        "autoencoder $\\mathcal{E},\\mathcal{D}$ and class-conditional denoiser $\\hat z_\\theta$"
    )
    _text(axes, 3.92, 1.77, parts)
    _formula(axes, 6.6, 1.22, r"$z=\mathcal{E}(x)\qquad z_t=\alpha_t\,z+\sigma_t\,\eta$")
    objective = r"$\min_\theta\;\mathbb{E}\;\Vert\,\hat z_\theta(z_t,t,c)-z\,\Vert^2$"
    _formula(axes, 6.6, 0.72, objective)

    _box(axes, 10.35, low, 2.85, 3.9, PURPLE, "05", "Translate")
    _text(axes, 10.57, low + 3.12, "conditioned on caption\nand parts of the source")
    _formula(axes, 11.77, low + 2.2, r"$\mathrm{softmax}\left(\dfrac{QK^\top}{\sqrt{d}}\right)V$")
    _text(axes, 10.57, low + 1.62, "regularised by BLIP:\noutput and source agree")
    agreement = r"$+\,\lambda\left(1-\mathrm{sim}(\varphi(\hat y),\varphi(x))\right)$"
    _formula(axes, 11.77, low + 0.72, agreement)

    _box(axes, 13.9, low, 2.55, 3.9, ORANGE, "06", "Compare")
    rivals = "beside identity, colour\ntransfer and SDEdit"
    if result is None:
        measures = "KID, class, action,\nmask overlap, each\nwith its confidence\ninterval"
        _text(axes, 14.12, low + 3.12, rivals, measures)
    else:
        for picture, x in zip(result, (14.06, 15.21), strict=True):
            place(axes, picture, x, low + 2.05, 1.08, None)
        _text(axes, 14.12, low + 1.83, rivals)
    _text(axes, 14.12, low + 1.0, "the two best outcomes\nof each class")

    _arrow(axes, (2.95, middle + 0.9), (3.65, high + 1.1))
    _arrow(axes, (2.95, middle - 0.9), (3.65, 1.4))
    _arrow(axes, (6.2, high + 1.1), (6.75, high + 1.1))
    _arrow(axes, (9.5, high + 1.1), (10.3, middle + 0.9), r"$\varphi$", above=True)
    _arrow(axes, (9.5, 1.4), (10.3, middle - 0.9), r"$\hat z_\theta$", above=False)
    _arrow(axes, (13.2, middle), (13.85, middle))
    return fig


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    number: str,
    title: str,
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.16",
            facecolor=_tint(color, 0.10),
            edgecolor=_tint(color, 0.75),
            linewidth=1.6,
            zorder=1,
        )
    )
    axes.add_patch(Circle((x + 0.38, y + height - 0.38), 0.22, facecolor=color, zorder=2))
    line = y + height - 0.385
    chip: dict[str, Any] = {"color": "white", "fontsize": 11.5, "weight": "bold", "ha": "center"}
    axes.text(x + 0.38, line, number, va="center_baseline", **chip)
    head: dict[str, Any] = {"color": INK, "fontsize": 15, "weight": "bold"}
    axes.text(x + 0.72, line, title, va="center_baseline", **head)


def _text(axes: Axes, x: float, y: float, *paragraphs: str) -> None:
    """Paragraphs below each other from the height y, the first in ink, the others muted."""
    for index, text in enumerate(paragraphs):
        color = INK if index == 0 else MUTED
        axes.text(x, y, text, fontsize=12.5, va="top", color=color, linespacing=1.25)
        y -= 0.235 * (text.count("\n") + 1) + 0.1


def _formula(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=15, color=INK)


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str = "",
    *,
    above: bool = True,
) -> None:
    """An arrow that leaves and arrives level, with a label beside its middle."""
    (x0, y0), (x1, y1) = start, end
    bend = (x0 + x1) / 2
    path = Path(
        [(x0, y0), (bend, y0), (bend, y1), (x1, y1)],
        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
    )
    axes.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle="-|>,head_length=7,head_width=4",
            color=MUTED,
            linewidth=1.8,
            capstyle="round",
            joinstyle="round",
            shrinkA=0,
            shrinkB=0,
            zorder=1,
        )
    )
    if label:
        y = (y0 + y1) / 2 + (0.2 if above else -0.2)
        axes.text(bend + 0.2, y, label, fontsize=14, ha="center", va="center", color=INK)


def _tint(color: str, strength: float) -> tuple[float, float, float]:
    """A colour mixed with white."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    mix = [1 - strength * (1 - value) for value in (red, green, blue)]
    return mix[0], mix[1], mix[2]
