"""Curation: read what the sources name, decide, write pictures, manifest, splits and data sheet.

A run that was killed goes on where it was; what it has written is not made again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tomjerry_utils import scenes
from tomjerry_utils.runs import atomic_path, hash_file, log, write_jsonl
from tomjerry_utils.sources import Batch, Row

MANIFEST = "manifest.jsonl"
SHOTS = "shots.csv"
DATASHEET = "DATASHEET.md"
WORK = ".work"
_JOURNAL = ".journal.jsonl"
_SALT = "tomjerry split 1"


def collect(
    batches: Iterable[Batch],
    out: Path,
    *,
    short_side: int,
    validation_fraction: float,
) -> list[Row]:
    """Read, check and write the pictures of some sources, and say everything in a manifest.

    A run that was killed goes on: its journal names the pictures it has written, and those still
    there with the right hash are not made again. The manifest is the same, byte for byte.

    Args:
        batches: from the functions in `sources`.
        out: gets `images/`, `manifest.jsonl`, `shots.csv` where there are films, `DATASHEET.md`.
        short_side: larger pictures are reduced to this; none is enlarged.
        validation_fraction: share of the groups.

    Returns:
        the manifest's rows.
    """
    from tomjerry_utils.progress import progress

    (out / WORK).mkdir(parents=True, exist_ok=True)
    journal = _Journal(out / _JOURNAL)
    rows: list[Row] = []
    shots: list[tuple[str, int, float]] = []
    owner: dict[str, str] = {}  # hash of a picture → the file that holds it
    taken: set[str] = set()
    # A list tells how much there is to do; sources that are read as they go cannot.
    total = sum(len(b.rows) for b in batches) if isinstance(batches, list) else iter(())
    with journal, progress(total, "collect", unit="picture") as bar:
        for batch in batches:
            for row in batch.rows:
                _place(row, taken, validation_fraction, short_side)
            _finish_batch(batch, out, owner, journal, short_side)
            rows += batch.rows
            shots += batch.shots
            bar.update(len(batch.rows))
    for row in rows:
        row.pop("_key")
    _remove_strangers(out, {row["file_name"] for row in rows if row["kept"]})
    write_jsonl(out / MANIFEST, rows)
    _write_shots(out / SHOTS, shots)
    with atomic_path(out / DATASHEET) as temporary:
        temporary.write_text(datasheet(rows), encoding="utf-8")
    shutil.rmtree(out / WORK, ignore_errors=True)
    dropped = Counter(kind_of(row["reason"]) for row in rows if not row["kept"])
    why = "".join(f", {count} dropped: {reason}" for reason, count in dropped.most_common(4))
    log(f"collect: {sum(row['kept'] for row in rows)} pictures kept{why}")
    return rows


def split_of(group: str, validation_fraction: float) -> str:
    """The side of a group, "train" or "validation": a pure function of its name."""
    digest = hashlib.sha256(f"{_SALT}:{group}".encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def datasheet(rows: Sequence[Row]) -> str:
    """What was collected, from where, with which rights, and what is missing, as Markdown."""
    kept = [row for row in rows if row["kept"]]
    groups = Counter((row["split"], row["group"]) for row in kept)
    parts = [
        "# Data sheet",
        "",
        f"{len(rows)} pictures met, {len(kept)} kept, in {len(groups)} groups. Written by "
        "`tomjerry_utils.collect`; every row of these tables counts rows of `manifest.jsonl`.",
        "",
        "## What was kept",
        "",
        *_table(
            ("source", "role", "domain", "class", "train", "validation"),
            Counter(
                (
                    row["source"],
                    row["role"],
                    row["domain"] or "unknown",
                    row["class"] or "none",
                    row["split"],
                )
                for row in kept
            ),
        ),
        "",
        "Groups (a shot, a character, a scene, a run of numbered frames) never cross the split. "
        'Only the role "training" is trained on; there is no test split here, test scenes are '
        "drawn by the evaluation alone.",
        "",
        "## What was dropped",
        "",
    ]
    dropped = Counter(kind_of(row["reason"]) for row in rows if not row["kept"])
    if dropped:
        parts += ["| reason | pictures |", "|---|---|"]
        parts += [f"| {reason} | {count} |" for reason, count in sorted(dropped.items())]
    else:
        parts.append("Nothing.")
    parts += ["", "## Rights", "", "| source | rights | pictures |", "|---|---|---|"]
    rights = Counter((row["source"], row["rights"] or "not stated") for row in kept)
    parts += [
        f"| {name} | {text.replace('|', '/')} | {count} |"
        for (name, text), count in sorted(rights.items())
    ]
    parts += ["", "## Known gaps", "", *(f"- {gap}" for gap in _gaps(kept)), ""]
    return "\n".join(parts)


def kind_of(reason: str) -> str:
    """A reason without the names in it, for counting."""
    return reason.split(":")[0].split(" of images/")[0]


# ---- one batch -----------------------------------------------------------------------------------


def _place(row: Row, taken: set[str], validation_fraction: float, short_side: int) -> None:
    """Give a row its final file name, split and role."""
    domain = row["domain"] or "unknown"
    name, number = f"images/{domain}/{row['file_name']}.png", 1
    while name.lower() in taken:
        number += 1
        name = f"images/{domain}/{row['file_name']}-{number}.png"
    taken.add(name.lower())
    row["file_name"] = name
    row["split"] = split_of(row["group"], validation_fraction)
    row["_key"] = f"{row['source']} {row['_key']} {short_side}"
    if row["role"] == "training" and not (row["class"] and row["domain"]):
        row["role"] = "unlabelled"


def _finish_batch(
    batch: Batch, out: Path, owner: dict[str, str], journal: _Journal, short_side: int
) -> None:
    """Make what is not yet made, then decide on every row in order."""
    known = set(owner)
    todo = []
    for i, row in enumerate(batch.rows):
        if row["reason"]:
            continue
        digest = journal.find(row)
        if digest and (digest in known or _holds(out / row["file_name"], digest)):
            row["sha256"] = digest
            known.add(digest)
        else:
            todo.append(i)
    made: dict[int, bytes] = {}
    for i, picture in zip(todo, batch.load(todo) if todo else (), strict=True):
        row = batch.rows[i]
        if isinstance(picture, np.ndarray) and picture.std() >= 2.0:
            made[i] = _encode(picture, short_side)
            row["sha256"] = hashlib.sha256(made[i]).hexdigest()
        elif isinstance(picture, np.ndarray):
            row["reason"] = "empty: one flat colour"
        else:
            row["reason"] = f"cannot be read: {picture}"
    for i, row in enumerate(batch.rows):
        if not row["reason"]:
            first = owner.setdefault(row["sha256"], row["file_name"])
            row["kept"] = first == row["file_name"]
            if not row["kept"]:
                row["reason"] = f"duplicate of {first}"
            elif i in made:
                _write(out / row["file_name"], made[i])
    journal.add(batch.rows[i] for i in made)


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and hash_file(path) == digest


def _encode(picture: np.ndarray, short_side: int) -> bytes:
    image = Image.fromarray(picture)
    if min(image.size) > short_side:
        scale = short_side / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    # Renamed but not synced to disk: the hash in the journal finds a torn file after a power cut.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Journal:
    """What an interrupted run has done: one line a picture, appended after its file is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, str]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["file_name"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill tore

    def __enter__(self) -> _Journal:
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def find(self, row: Row) -> str:
        """The hash of a picture written before; empty where it is new or its source changed."""
        entry = self._known.get(row["file_name"], {})
        return entry.get("sha256", "") if entry.get("key") == row["_key"] else ""

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            entry = {"file_name": row["file_name"], "key": row["_key"], "sha256": row["sha256"]}
            self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def _remove_strangers(out: Path, kept: set[str]) -> None:
    """Remove pictures that an earlier call wrote here and this one does not know."""
    known = set(_names_in(out / _JOURNAL))
    for name in sorted(known - kept):
        (out / name).unlink(missing_ok=True)
    for torn in (out / "images").rglob(".tmp-*"):
        torn.unlink()


def _names_in(journal: Path) -> Iterator[str]:
    for name in _Journal(journal)._known:
        # The journal is a file that anyone may edit: only names under images/ are ours to remove.
        if name.startswith("images/") and ".." not in Path(name).parts:
            yield name


# ---- tables --------------------------------------------------------------------------------------


def _write_shots(path: Path, shots: Sequence[tuple[str, int, float]]) -> None:
    if not shots:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video", "first_frame", "time_s"))
        writer.writerows((video, frame, f"{time_s:.6f}") for video, frame, time_s in shots)


def _table(columns: Sequence[str], counts: Counter[tuple[str, ...]]) -> list[str]:
    """A Markdown table; the last part of each counted key is the split."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key in sorted({key[:-1] for key in counts}):
        numbers = (counts[(*key, "train")], counts[(*key, "validation")])
        lines.append(f"| {' | '.join([*key, *map(str, numbers)])} |")
    return lines


def _gaps(kept: Sequence[Row]) -> list[str]:
    found = {row["source"] for row in kept}
    training = Counter(row["label"] for row in kept if row["role"] == "training")
    gaps = [f"No training pictures of `{label}`." for label in scenes.LABELS if not training[label]]
    present = [count for count in training.values() if count]
    if present and max(present) > 2 * min(present):
        gaps.append("The classes differ more than twofold in number; see the table.")
    if "scenes" in found:
        gaps.append(
            "Generated scenes: one cat and one mouse design with varied coats, six actions, five "
            "places, a fixed camera. They are no photographs, and nothing here says how the "
            "translator does on any."
        )
    if "starter" in found:
        gaps.append(
            "Starter pictures: mostly emoji on an empty ground, four photographs, all of cats; no "
            "photograph of a mouse. Too few to train or to score on."
        )
    if "clip" in found:
        gaps.append("Film clip: rodents and a rabbit, no cat; its frames carry no class.")
    if found & {"kaggle", "archive"}:
        gaps.append(
            "Laboratory mice and house cats are photographed from other angles and in other "
            "places than cartoon animals are drawn in."
        )
    if any(row["role"] == "unlabelled" for row in kept):
        gaps.append("Unlabelled pictures have no class and are not trained on.")
    gaps.append(
        "Only exact duplicates are dropped; near-duplicates (re-encoded, cropped) can remain, "
        "within a group and across groups."
    )
    return gaps
