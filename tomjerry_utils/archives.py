"""Sources that arrive packed: zip and tar files, from a disk or from the web."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tomjerry_utils import UserError, downloads, photo_sets
from tomjerry_utils.runs import data_root, log, read_json, write_json
from tomjerry_utils.sources import (
    IMAGE_SUFFIXES,
    Batch,
    Options,
    Row,
    digest,
    list_files,
    make_row,
    plain_name,
    stamp,
)
from tomjerry_utils.unpacking import archive_stem, is_archive, unpack

# Layouts that are told by more than a folder's name, so that any archive may be taken for one.
_TOLD = ("frames", "pets", "mice")


def archive_source(where: str, options: Options, *, layout: str = "") -> Iterator[Batch]:
    """The pictures of a zip or tar file, read as the folder it would unpack to.

    Published sets (`photo_sets`) are known by their layout. What is refused when unpacking becomes
    a dropped row each.

    Args:
        where: a file; an address, which is fetched to `data/raw/`; a folder of archives; or a
            folder of pictures, for an archive that is already unpacked.
        layout: one of `photo_sets.LAYOUTS`, for what must be read as such.

    Raises:
        UserError: no such file, not an archive, a damaged one, or no pictures in it.
    """
    folder, refused = unpacked(where, options)
    if refused:
        yield Batch(refused, lambda indices: [])
        if not list_files(folder, IMAGE_SUFFIXES):
            log(f"collect: {where}: all {len(refused)} files are refused; see the manifest")
            return
    found = photo_sets.layout_of(folder)
    if not layout and found in _TOLD:
        layout = found
        log(f"collect: {where}: read as {layout}, {photo_sets.LAYOUTS[layout]}")
    elif layout and layout != found:
        log(
            f"collect: {where}: expected {photo_sets.LAYOUTS[layout]}, "
            f"found {photo_sets.found_in(folder)}; read as {layout} all the same"
        )
    yield from photo_sets.batches(folder, layout, options, name="archive")


def unpacked(where: str, options: Options) -> tuple[Path, list[Row]]:
    """The folder that a source unpacks to, in the scratch folder, and dropped rows.

    An unpacking that was interrupted is begun anew; a finished one is used again.

    Raises:
        UserError: as `archive_source`.
    """
    path = downloads.local(where, data_root() / "raw")
    if path.is_dir():
        packs = sorted(p for p in path.iterdir() if is_archive(p) and not p.name.startswith("."))
        if not packs or list_files(path, IMAGE_SUFFIXES):
            return path, []
        stem = path.resolve().name
    elif path.is_file():
        packs, stem = [path], archive_stem(path.name)
    else:
        raise UserError(f"no archive {path}: check the path, or download it first")
    home = options.work / f"unpacked-{digest(' '.join(f'{p.name} {stamp(p)}' for p in packs))}"
    # A folder named like the archive, so that group and class names do not depend on `home`.
    inside, done = home / stem, home / "refused.json"
    if not done.is_file():
        shutil.rmtree(home, ignore_errors=True)
        inside.mkdir(parents=True)
        refused: list[tuple[str, str]] = []
        for pack in packs:
            log(f"collect: unpacking {pack.name}")
            refused += unpack(pack, inside).refused
        # Written last: a folder without it was left by an interrupted run.
        write_json(done, refused)
    rows = [
        make_row(
            "archive",
            f"{plain_name(PurePosixPath(member).stem)}-{digest(member)}",
            "",
            origin=member,
            reason=reason,
        )
        for member, reason in read_json(done)
    ]
    return inside, rows
