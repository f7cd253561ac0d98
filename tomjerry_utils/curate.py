"""Curation: from what the sources name to a set of pictures that can be trusted.

Three passes, so that no more than a few numbers a picture are ever in memory:

1. :mod:`intake` reads each picture once and notes its measures, hashes, features and a thumbnail;
2. here every picture is decided on, by the notes alone: what is damaged, screened out, a duplicate,
   without a class, or more than was asked for;
3. those that are kept are read again and written, with the manifest that says it all.

A run that was killed goes on where it was, and ends with the same manifest, byte for byte.
"""

from __future__ import annotations

import csv
import errno
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tomjerry_utils import UserError, animal_masks, composites, intake
from tomjerry_utils.datasheet import datasheet
from tomjerry_utils.journal import JOURNAL, Journal, Seen
from tomjerry_utils.judging import Curation, judge, kind_of
from tomjerry_utils.runs import atomic_path, log, write_jsonl
from tomjerry_utils.sources import Batch, Row, digest
from tomjerry_utils.workers import Workers

MANIFEST = "manifest.jsonl"
METADATA = "metadata.jsonl"
SHOTS = "shots.csv"
DATASHEET = "DATASHEET.md"
WORK = ".work"
# What `metadata.jsonl` says of a picture, the file that `datasets` reads.
COLUMNS = (
    *("file_name", "text", "domain", "class", "label", "action", "facing", "place"),
    *("split", "role", "source", "sha256"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def collect(batches: Callable[[], Iterable[Batch]], out: Path, how: Curation) -> Counter[str]:
    """Read, judge and write the pictures of some sources, and say everything in a manifest.

    Args:
        batches: from the functions in `sources`; called twice, and must name the same rows.
        out: gets `images/`, `metadata.jsonl` of those kept, so that
            `datasets.load_dataset("imagefolder", data_dir=out)` reads them, `manifest.jsonl` of all
            that were met, `shots.csv` where there are films, and `DATASHEET.md`.

    Returns:
        How many rows were kept (""), and how many dropped for each kind of reason.

    Raises:
        UserError: a source cannot be read, or changes meanwhile; the disk is full.
    """
    try:
        found = _collect(batches, out, how)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _no_room(out) from None
    except sqlite3.OperationalError as error:
        if not any(word in str(error) for word in ("full", "disk I/O")):
            raise
        raise _no_room(out) from None
    why = "".join(f", {n} dropped: {kind}" for kind, n in found.most_common(6) if kind)
    log(f"collect: {found['']} pictures kept{why}")
    return found


def _collect(batches: Callable[[], Iterable[Batch]], out: Path, how: Curation) -> Counter[str]:
    (out / WORK).mkdir(parents=True, exist_ok=True)
    shots: list[tuple[str, int, float]] = []
    names = _Names()
    with Journal(out / JOURNAL) as journal:
        intake.take_in(
            batches(),
            journal,
            out,
            short_side=how.short_side,
            place=names.give,
            note=lambda batch: shots.extend(batch.shots),
        )
        kept = judge(journal, out, how)
        _write_kept(batches, journal, out, kept, how.short_side)
        if how.composites:
            _add_composites(journal, out, how)
        _remove_strangers(journal, out)
        found: Counter[str] = Counter()

        def manifest() -> Iterator[Row]:
            for row in journal.rows():
                found[kind_of(row["reason"])] += 1
                yield {column: value for column, value in row.items() if column != "_key"}

        write_jsonl(out / MANIFEST, manifest())
        kept_rows = (row for row in journal.rows() if row["kept"])
        write_jsonl(out / METADATA, ({name: row[name] for name in COLUMNS} for row in kept_rows))
        _write_shots(out / SHOTS, shots)
        with atomic_path(out / DATASHEET) as temporary:
            temporary.write_text(datasheet(journal.rows()), encoding="utf-8")
    # What a source unpacked goes; what took it minutes to find out stays for the next call.
    for folder in (out / WORK).iterdir():
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
    if not any((out / WORK).iterdir()):
        (out / WORK).rmdir()
    return found


def _no_room(out: Path) -> UserError:
    return UserError(
        f"{out}: no space left to write: free some space and run the same command again"
    )


class _Names:
    """Gives every row a file name of its own, whatever the letters' case."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def give(self, row: Row) -> None:
        stem = f"images/{row['domain'] or 'unknown'}/{row['file_name']}"
        name, number = f"{stem}.png", 1
        while digest(name.lower()) in self._taken:
            number += 1
            name = f"{stem}-{number}.png"
        self._taken.add(digest(name.lower()))
        row["file_name"] = name


# ---- writing -------------------------------------------------------------------------------------


def _write_kept(
    batches: Callable[[], Iterable[Batch]],
    journal: Journal,
    out: Path,
    kept: np.ndarray,
    short_side: int,
) -> None:
    """Read those pictures again that are kept and not yet written, and write them.

    Args:
        kept: (N,) bool, one for each row.

    Raises:
        UserError: a source no longer gives what it gave.
    """
    from tomjerry_utils.progress import progress

    missing = [
        place for place, name, sha256 in journal.files(kept) if not intake.holds(out / name, sha256)
    ]
    if not missing:
        return
    left, names, first = set(missing), _Names(), 0
    with Workers() as pool, progress(len(missing), "write", unit="picture") as bar:
        for batch in batches():
            for row in batch.rows:
                names.give(row)
            todo = [i for i in range(len(batch.rows)) if first + i in left]
            jobs = intake.jobs(batch, todo, out, short_side, writing=True)
            for indices, written in pool.each(intake.write_all, jobs):
                with journal.writing():
                    for i, sha256 in zip(indices, written, strict=True):
                        row = batch.rows[i]
                        if not journal.written(row["file_name"], sha256):
                            raise UserError(
                                f"{row['origin']} of {row['source']} changed while it was being "
                                "collected: run the same command again"
                            )
                bar.update(len(indices))
            left.difference_update(first + i for i in todo)
            first += len(batch.rows)
    if left:
        raise UserError(f"{len(left)} pictures of the sources are gone: run the same command again")


def _add_composites(journal: Journal, out: Path, how: Curation) -> None:
    """Rows of photographs that show both, made of those that show one, until there are enough."""
    single = [
        row
        for row in journal.rows()
        if row["kept"] and row["domain"] == "natural" and row["role"] == "training"
    ]
    wanted = how.composites - sum(row["class"] == "both" for row in single)
    if wanted <= 0:
        return
    rows = composites.make_composites(
        out,
        single,
        wanted,
        seed=0,
        mask_of=animal_masks.finder(out, how.originals),
        short_side=how.short_side,
        notes=out / WORK / "composites.jsonl",
    )
    first = journal.count()
    with journal.writing():
        journal.add_rows(first, rows)
        for place, row in enumerate(rows, start=first):
            journal.decide(place, {"kept": row["kept"], "labelled_by": composites.SOURCE})
            if row["kept"]:
                journal.add(
                    row["file_name"], composites.SOURCE, Seen("", row["sha256"], there=True)
                )


def _remove_strangers(journal: Journal, out: Path) -> None:
    """Remove pictures that an earlier call wrote here and this one does not keep."""
    gone = list(journal.strangers())
    for name in gone:
        # The journal is a file that anyone may edit: only names under images/ are ours to remove.
        if name.startswith("images/") and ".." not in Path(name).parts:
            (out / name).unlink(missing_ok=True)
            (out / "masks" / Path(name).relative_to("images")).unlink(missing_ok=True)
    with journal.writing():
        journal.forget(gone)
    for torn in (out / "images").rglob(".tmp-*"):
        torn.unlink()


def _write_shots(path: Path, shots: Sequence[tuple[str, int, float]]) -> None:
    if not shots:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video", "first_frame", "time_s"))
        writer.writerows((video, frame, f"{time_s:.6f}") for video, frame, time_s in shots)
