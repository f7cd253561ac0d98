"""Figures: one calm style, a few helpers, and `save_figure`, through which every figure goes.

Figures are plain `matplotlib.figure.Figure` objects without pyplot behind them: nothing global
changes, nothing piles up in memory, and a notebook shows each one once, from `save_figure`.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from tomjerry_utils import UserError
from tomjerry_utils.canvas import (
    BLUE,
    COLORS,
    DPI,
    FAINT,
    INK,
    MUTED,
    blank,
    place,
    style,
    text_width,
    wrap,
)
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    PROVENANCE,
    atomic_path,
    environment,
    hash_obj,
    project_root,
    read_provenance,
    run_root,
    write_json,
)
from tomjerry_utils.workflow import WORKFLOW_ALT, workflow_diagram

__all__ = [
    "COLORS",
    "WORKFLOW_ALT",
    "contact_sheet",
    "curve",
    "image_row",
    "intervals",
    "save_figure",
    "style",
    "workflow_diagram",
]

PREVIEW_PIXELS = 1000  # width of what a notebook shows; the saved files are larger
PREVIEW_BYTES = 100_000  # of a PNG that a notebook holds; larger ones become JPEG


def save_figure(
    fig: Figure,
    name: str,
    *,
    alt: str,
    run: Path | Profile,
    notebook: str | None = None,
    extra: Mapping[str, Any] | None = None,
    show: bool | None = None,
) -> Path:
    """Write `<run>/figures/<name>.pdf`, `.png` (300 dpi) and `.json`; in a notebook, show it too.

    The JSON says where the figure comes from: notebook, run, hash of the settings, seed, the keys
    of the run's finished stages, versions, alt text. It is written last. The same figure gives the
    same bytes: no dates are stored.

    Args:
        fig: from a helper here, or any matplotlib figure; one that pyplot holds is closed.
        name: file name without suffix: letters, digits, `_` and `-`.
        alt: what the figure shows, in a sentence or two, for those who cannot see it.
        run: the profile, or the folder of its run.
        extra: numbers or sources worth keeping with the figure.
        show: None shows it where a notebook is running.

    Returns:
        The path of the PNG.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"figure name '{name}': use letters, digits, _ and -")
    if len(alt.split()) < 4:
        raise ValueError(f"figure '{name}': alt text must say what the figure shows, got '{alt}'")
    folder = run_root(run) if isinstance(run, Profile) else Path(run)
    target = folder / "figures" / name
    options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.1}
    with mpl.rc_context(style()):
        with atomic_path(target.with_suffix(".png")) as temporary:
            fig.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None}, **options)
        # A PDF carries the pictures' own pixels: sharper, and a tenth of the size.
        images = fig.findobj(AxesImage)
        before = [image.get_interpolation() for image in images]
        for image in images:
            image.set_interpolation("none")
        dateless = {"CreationDate": None, "Producer": None, "Creator": None, "Title": name}
        with atomic_path(target.with_suffix(".pdf")) as temporary:
            fig.savefig(temporary, format="pdf", metadata=dateless, **options)
        for image, kind in zip(images, before, strict=True):
            image.set_interpolation(kind)
    write_json(target.with_suffix(".json"), _provenance(name, alt, run, folder, notebook, extra))
    if show or (show is None and _in_notebook()):
        show_figure(fig, alt)
    _close(fig)
    return target.with_suffix(".png")


def image_row(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str] | None = None,
    *,
    cell: float = 1.7,
    **options: Any,
) -> Figure:
    """Pictures side by side, each with a title above; options as in `contact_sheet`."""
    return contact_sheet(
        images, columns=max(1, len(images)), column_titles=titles, cell=cell, **options
    )


def contact_sheet(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str | Sequence[str]] | None = None,
    *,
    columns: int = 8,
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    frames: Sequence[str | None] | None = None,
    cell: float = 1.15,
    gap: float = 0.07,
    font_size: float = 8.5,
) -> Figure:
    """Pictures in rows and columns, with captions under them or headings along the edges.

    Args:
        images: (H, W, 3) uint8 each; sizes may differ, each is shown whole in its square cell.
        titles: a caption under each picture, wrapped to its width; of several, such as before and
            after, the last stands out.
        columns: pictures a row.
        column_titles: headings above the columns.
        row_titles: headings left of the rows.
        title: heading of the whole figure.
        frames: a colour around each picture, or None for none.
        cell: side of a picture in inches.
        gap: space between pictures in inches.
    """
    count = len(images)
    if count == 0:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    for what, given, wanted in (
        ("titles", titles, count),
        ("frames", frames, count),
        ("column_titles", column_titles, columns),
        ("row_titles", row_titles, rows),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{what}: need {wanted}, got {len(given)}")

    captions = [
        [wrap(part, cell, font_size) for part in ([text] if isinstance(text, str) else text)]
        for text in titles or []
    ]
    line = font_size * 1.3 / 72
    high = [_height(parts, line) for parts in captions]
    # Every row is as high as its own longest caption needs.
    below = [max(high[r * columns : (r + 1) * columns] or [0.0]) for r in range(rows)]
    step = [cell + (needed + 0.12 if needed else 0) + gap for needed in below]
    heads = [wrap(text, cell + gap, 10) for text in column_titles or []]
    head = max([text.count("\n") + 1 for text in heads] or [0]) * 10 * 1.3 / 72
    head += 0.1 if heads else 0
    sides = [wrap(text, 1.25, 10) for text in row_titles or []]
    side = max([text_width(text, 10) for text in sides] or [0]) + (0.14 if sides else 0)
    top = 0.38 if title else 0.0
    width = side + columns * (cell + gap) - gap
    height = top + head + sum(step) - gap

    fig, canvas = blank(width, height)
    if title:
        canvas.text(0, height - 0.04, title, fontsize=13, weight="bold", va="top", color=INK)
    for column, text in enumerate(heads):
        x = side + column * (cell + gap) + cell / 2
        canvas.text(x, height - top - head + 0.08, text, fontsize=10, ha="center", color=INK)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x = side + column * (cell + gap)
        y = height - top - head - sum(step[:row]) - cell
        if column == 0 and sides:
            canvas.text(
                x - 0.14, y + cell / 2, sides[row], fontsize=10, ha="right", va="center", color=INK
            )
        place(canvas, image, x, y, cell, frames[index] if frames else None)
        y -= 0.06
        for number, text in enumerate(captions[index] if captions else []):
            last = number == len(captions[index]) - 1
            color = INK if last and number > 0 else MUTED
            canvas.text(
                x + cell / 2,
                y,
                text,
                fontsize=font_size,
                ha="center",
                va="top",
                color=color,
                linespacing=1.2,
            )
            y -= _height([text], line) + 0.05
    return fig


def curve(
    series: Mapping[str, Sequence[Mapping[str, Any]] | tuple[Sequence[float], Sequence[float]]],
    *,
    y: str = "loss",
    x: str = "step",
    title: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    log: bool = False,
    smooth: int | None = None,
    size: tuple[float, float] = (7.0, 3.6),
) -> Figure:
    """Training curves: a quiet line for the numbers, a clear one for their moving average.

    Args:
        series: name → rows of a history (`training.TrainResult.history`), or (x, y) numbers.
        y: the key to draw from rows, against `x`.
        log: logarithmic axis for y.
        smooth: points in the moving average; None chooses by their number, 1 draws only the line.
    """
    with mpl.rc_context(style()):
        fig = Figure(figsize=size, layout="constrained")
        axes = fig.subplots()
        ends = []
        for index, (name, values) in enumerate(series.items()):
            color = COLORS[index % len(COLORS)]
            xs, ys = _points(values, x, y)
            if len(xs) == 0:
                raise ValueError(f"nothing to draw for '{name}': no row has '{x}' and '{y}'")
            window = max(1, len(ys) // 15) if smooth is None else smooth
            if window > 1:
                axes.plot(xs, ys, color=color, alpha=0.22, linewidth=1.0)
                ys = _moving_average(ys, window)
            axes.plot(xs, ys, color=color, marker="o" if len(xs) == 1 else None)
            ends.append((name, float(ys[-1]), color))
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            # Within one decade the powers of ten alone would leave the axis without a number.
            steps = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel(x if x_label is None else x_label)
        axes.set_ylabel(y if y_label is None else y_label)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_thousands))
        axes.margins(x=0.01)
        if title:
            axes.set_title(title)
        if len(ends) > 1:
            _label_ends(axes, ends)
    return fig


def intervals(
    rows: Mapping[str, tuple[float, float, float]],
    *,
    label: str,
    title: str | None = None,
    highlight: Sequence[str] = (),
    bands: Mapping[str, float] | None = None,
    digits: int = 2,
    width: float = 7.0,
) -> Figure:
    """A value with its confidence interval for each method, one under the other.

    Args:
        rows: name → (value, low, high), drawn from top to bottom.
        label: what is measured, and which way is better, such as `KID, lower is better`.
        highlight: names drawn in colour; the others stay grey.
        bands: name → value of reference lines, such as the floor and the ceiling.
        digits: after the point, of the numbers written beside the dots.
    """
    if not rows:
        raise ValueError("nothing to draw: no rows")
    with mpl.rc_context(style()):
        fig = Figure(figsize=(width, 0.95 + 0.36 * len(rows)), layout="constrained")
        axes = fig.subplots()
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        for name, value in (bands or {}).items():
            axes.axvline(value, color=FAINT, linewidth=1.6, zorder=0)
            axes.annotate(
                name, (value, 1.0), xycoords=axes.get_xaxis_transform(), fontsize=8.5,
                color=MUTED, ha="center", va="bottom", xytext=(0, 3), textcoords="offset points",
            )  # fmt: skip
        for line, (name, (value, low, high)) in enumerate(rows.items()):
            color = BLUE if name in highlight else "#8A949E"
            axes.plot([low, high], [line, line], color=color, linewidth=5, alpha=0.35)
            axes.plot(value, line, "o", color=color, markersize=8, zorder=3)
            axes.annotate(
                f"{value:.{digits}f}", (max(value, high), line), xytext=(9, 0), va="center",
                textcoords="offset points", fontsize=10, color=color if highlight else INK,
                weight="bold" if name in highlight else "normal",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        for text, name in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_color(INK)
            text.set_fontweight("bold" if name in highlight else "normal")
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        if title:
            axes.set_title(title, pad=22 if bands else 12)
    return fig


# ---- helpers -----------------------------------------------------------------------------------


def _height(parts: Sequence[str], line: float) -> float:
    """Height in inches of paragraphs below each other."""
    return sum((part.count("\n") + 1) * line for part in parts) + 0.05 * (len(parts) - 1)


def _points(values: Any, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(values, tuple):
        return np.asarray(values[0], float), np.asarray(values[1], float)
    rows = [row for row in values if row.get(x) is not None and row.get(y) is not None]
    return np.array([row[x] for row in rows], float), np.array([row[y] for row in rows], float)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` points around each, of fewer at both ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    first = np.maximum(0, here - window // 2)
    last = np.minimum(len(values), here + window // 2 + 1)
    return (sums[last] - sums[first]) / (last - first)


def _thousands(value: float, _: Any) -> str:
    if abs(value) >= 1000 and value % 100 == 0:
        return f"{value / 1000:g} k"
    return f"{value:g}"


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the lines' right ends, moved apart where they would touch."""
    fig = axes.get_figure(root=True)
    assert fig is not None
    fig.draw_without_rendering()
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    order = sorted(((to_axes.transform((x, y))[1], name, color) for name, y, color in ends))
    gap = 14 / (axes.get_window_extent().height * 72 / fig.dpi)
    places: list[float] = []
    for height, _, _ in order:
        places.append(max(height, places[-1] + gap) if places else height)
    shift = max(0.0, places[-1] - 1.0)
    for height, (_, name, color) in zip(places, order, strict=True):
        axes.text(
            1.015, height - shift, name, transform=axes.transAxes, color=color, va="center",
            fontsize=11, weight="bold",
        )  # fmt: skip


def _provenance(
    name: str,
    alt: str,
    run: Path | Profile,
    folder: Path,
    notebook: str | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    stages, seeds = {}, set()
    for path in sorted(folder.glob(f"*/{PROVENANCE}")):
        with suppress(UserError):
            record = read_provenance(path.parent)
            stages[path.parent.name] = record["key"]
            seeds.add(record.get("seed"))
    try:
        shown = folder.resolve().relative_to(project_root().resolve()).as_posix()
    except ValueError:
        shown = folder.name
    record = {"figure": name, "alt": alt, "notebook": notebook, "run": shown}
    if isinstance(run, Profile):
        settings = run.model_dump(mode="json")
        record |= {"profile": run.name, "config": hash_obj(settings), "seed": run.seed}
    else:
        record |= {"config": hash_obj(stages), "seed": seeds.pop() if len(seeds) == 1 else None}
    return {**record, "stages": stages, **environment(), "extra": dict(extra or {})}


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def show_figure(fig: Figure, alt: str) -> None:
    """Show a figure in a running notebook, and write no file."""
    from IPython.display import Image, display

    buffer = io.BytesIO()
    dpi = min(DPI / 2, PREVIEW_PIXELS / fig.get_figwidth())
    with mpl.rc_context(style()):
        fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    data, kind = _light(buffer, pictures=bool(fig.findobj(AxesImage)))
    display(Image(data=data, format=kind, alt=alt))


def _light(png: io.BytesIO, *, pictures: bool) -> tuple[bytes, str]:
    """A drawing as a PNG of 256 colours; of pictures the PNG where it is small, else a JPEG."""
    from PIL import Image

    small = io.BytesIO()
    if not pictures:
        flat = Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        flat.save(small, "PNG", optimize=True)
        return small.getvalue(), "png"
    if png.tell() <= PREVIEW_BYTES:
        return png.getvalue(), "png"
    Image.open(png).convert("RGB").save(small, "JPEG", quality=76, optimize=True)
    return small.getvalue(), "jpeg"


def _close(fig: Figure) -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(fig)
