"""A contact sheet of pictures with what became of them: for pages that run no script."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tomjerry_utils import UserError
from tomjerry_utils.curate import kind_of
from tomjerry_utils.picture_page import THUMBNAIL, reviewable, thumb, told_score
from tomjerry_utils.picture_review import Decision, Row, apply
from tomjerry_utils.static_page import Loader

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's: kept, dropped


def contact_sheet(
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions: Mapping[str, Decision],
    *,
    limit: int = 24,
    columns: int = 6,
    score: str = "score",
) -> np.ndarray:
    """Pictures with what became of them and why, drawn for pages that run no script.

    Each reason has its turn, so that a rare one is seen as well.

    Args:
        rows: of a manifest, reviewed before or not.
        images: the folder that file names are relative to, or what gives a row's picture.
        decisions: SHA-256 → decision.
        limit: pictures at most.
        columns: of them in a row.
        score: the column of a number to show with the reason, where rows have it.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: no rows to show.
    """
    screened, left_out = reviewable(rows)
    now = apply(screened, decisions)
    chosen = _in_turns(now, limit)
    if not chosen:
        raise UserError("nothing to show: no picture of these can be decided about")
    columns = min(columns, len(chosen))
    tile_w, tile_h, head = THUMBNAIL + 28, THUMBNAIL + 74, 22
    shape = (columns * tile_w, head + -(-len(chosen) // columns) * tile_h)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    kept = sum(row["kept"] for row in now)
    title = f"{kept} kept, {len(now) - kept} dropped, {left_out} not open to decisions"
    draw.text((6, 4), _cut(title, shape[0] - 12, font, 1)[0], "black", font)
    for number, row in enumerate(chosen):
        left, top = number % columns * tile_w, head + number // columns * tile_h
        frame = (left + 3, top + 1, left + tile_w - 4, top + tile_h - 4)
        draw.rectangle(frame, outline=BLUE if row["kept"] else ORANGE, width=2)
        _, data = thumb(row, images)
        if data:
            with Image.open(io.BytesIO(data)) as small:
                sheet.paste(small, (left + (tile_w - small.width) // 2, top + 6))
        else:
            draw.text((left + 30, top + 45), "no picture", "black", font)
        state, why = told(row, score)
        lines = _cut(f"{state} · {row['class'] or 'no class'}", tile_w - 16, font, 2)
        lines += _cut(why, tile_w - 16, font, 4 - len(lines) + 1) if why else []
        for line, text in enumerate(lines):
            draw.text((left + 8, top + THUMBNAIL + 9 + 12 * line), text, "black", font)
    return np.asarray(sheet)


def told(row: Mapping[str, Any], score: str = "score") -> tuple[str, str]:
    """What became of a row of `picture_review.apply`, and why: ("kept by hand", "was blurred")."""
    state, why = "kept" if row["kept"] else "dropped", []
    changed = bool(row["decided"]) and row["class"] != row["class_found"]
    overruled = row["reason"] != row["screened"]
    # Of a picture with a new class, kept as it was, the class alone counts as decided.
    if row["decided"] and (overruled or not changed):
        state += " by hand"
    why.append(row["reason"].removeprefix(state).lstrip(": "))
    if changed:
        why.append(f"class by hand, was {row['class_found'] or 'none'}")
    if row["decided"] and overruled and row["screened"]:
        why.append(f"screened: {row['screened']}")
    if value := told_score(row, score):
        why.append(f"score {value}")
    return state, "; ".join(text for text in why if text)


# ---- helpers -------------------------------------------------------------------------------------


def _in_turns(rows: Sequence[Row], limit: int) -> list[Row]:
    """One row of each outcome after another until there are enough, grouped by outcome."""
    groups: dict[tuple[bool, str, str], list[Row]] = {}
    for row in rows:
        key = (row["kept"], row["decided"], kind_of(row["reason"]))
        groups.setdefault(key, []).append(row)
    turns = [(turn, key, row) for key in groups for turn, row in enumerate(groups[key])]
    first = sorted(turns, key=lambda found: found[:2])[:limit]
    return [row for _, _, row in sorted(first, key=lambda found: (found[1], found[0]))]


def _cut(text: str, width: float, font: Any, most: int) -> list[str]:
    """Text in lines of at most `width` pixels; what is too long ends in dots."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-2] + "…"
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > most:
        lines = lines[:most]
        while font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return lines
