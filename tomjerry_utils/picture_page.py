"""The gallery of stage 01 without a notebook: one page that needs no server and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, picture_script
from tomjerry_utils.curate import kind_of
from tomjerry_utils.picture_review import Decision, apply, settled
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import atomic_path, hash_obj
from tomjerry_utils.static_page import Loader, data_uri, document, thumbnail

PAGE = "pictures.html"
THUMBNAIL = 96  # pixels of the longer side
QUALITY = 62  # of a thumbnail's JPEG: 200 pictures of pure noise make a page of under 1.5 MB


def write_page(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions: Mapping[str, Decision],
    *,
    score: str = "score",
) -> Path:
    """Write the page: pictures by the pageful, to keep, drop or give another class.

    What is decided stays in the browser until its button saves a `decisions.jsonl`.

    Args:
        rows: of a manifest, reviewed before or not. Those that nothing can be decided about
            (unreadable, exact duplicates) are left out and counted.
        images: the folder that file names are relative to, or what gives a row's picture as
            (H, W, 3) uint8.
        decisions: SHA-256 → decision made before; the page starts from them, and those about
            other pictures are in the file that it saves.
        score: the column of a number to show with the reason, where rows have it.

    Raises:
        UserError: no row can be decided about.
    """
    shown, left_out = reviewable(rows)
    if not shown:
        raise UserError(f"nothing to review for {path}: no picture of these can be decided about")
    pictures = [
        _record(row, thumb(row, images), score)
        for row in progress(shown, "picture page", unit="picture")
    ]
    here = {row["sha256"] for row in shown}
    known = {sha: decision.row() for sha, decision in decisions.items()}
    data = {
        "pictures": pictures,
        "decisions": {sha: row for sha, row in known.items() if sha in here},
        "others": [row for sha, row in sorted(known.items()) if sha not in here],
    }
    key = hash_obj([[row["sha256"] for row in shown], known])
    # A script element ends at its end tag, whatever stands around it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    left = f"{left_out} more cannot be decided about. " if left_out else ""
    body = picture_script.BODY.replace("<!--left-->", left).replace("<!--data-->", text)
    style, script = picture_script.STYLE, picture_script.LOGIC + picture_script.VIEW
    page = document("Review of pictures", body, key=key, style=style, script=script)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def reviewable(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The rows that something can be decided about, as the screens left them, and how many not."""
    found: dict[str, dict[str, Any]] = {}
    for row in apply(rows, {}):
        if not settled(row):
            found.setdefault(row["sha256"], row)
    return list(found.values()), len(rows) - len(found)


def thumb(row: Mapping[str, Any], images: Path | Loader) -> tuple[str, bytes]:
    """A row's picture for galleries: JPEG of at most `THUMBNAIL` pixels."""
    return thumbnail(row, images, THUMBNAIL, lossless=0, quality=QUALITY)


def told_score(row: Mapping[str, Any], score: str) -> str:
    """A row's score in three digits, "" where it has none."""
    value = row.get(score)
    return f"{value:.3g}" if isinstance(value, (int, float)) else ""


# ---- helpers -------------------------------------------------------------------------------------


def _record(row: Mapping[str, Any], small: tuple[str, bytes], score: str) -> dict[str, Any]:
    return {
        "sha256": row["sha256"],
        "file_name": row["file_name"],
        "source": row["source"],
        "domain": row["domain"],
        "class": row["class"],
        "kept": row["kept"],
        "reason": row["reason"],
        "kind": kind_of(row["reason"]),
        "score": told_score(row, score),
        "picture": data_uri(*small) if small[0] else "",
    }
