"""Sources that arrive packed or from afar: zip and tar files, Kaggle datasets.

What an archive says is not trusted: nothing is written outside the scratch folder.
"""

from __future__ import annotations

import csv
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from tomjerry_utils import UserError
from tomjerry_utils.runs import log, read_json, write_json
from tomjerry_utils.sources import (
    CLASS_NAMES,
    IMAGE_SUFFIXES,
    Batch,
    Options,
    digest,
    file_batches,
    folder_source,
    group_of,
    list_files,
    make_row,
    one_line,
    plain_name,
    stamp,
)

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LARGEST = 512 * 2**20  # bytes that a picture in an archive may unpack to


def archive_source(where: str, options: Options) -> Iterator[Batch]:
    """The pictures of a zip or tar file, read as the folder it would unpack to.

    Members whose path leaves the archive, links and devices are refused, each with a dropped row;
    a folder may be given as well, for an archive that is already unpacked.

    Raises:
        UserError: no such file, not an archive, a damaged one, or no pictures in it.
    """
    path = Path(where)
    if path.is_dir():
        yield from folder_source(where, options, name="archive")
        return
    if not path.is_file():
        raise UserError(f"no archive {path}: download it first and give the path of the file")
    home = options.work / f"unpacked-{digest(f'{path.name} {stamp(path)}')}"
    # A folder named like the archive, so that group and class names do not depend on `home`.
    inside = home / _archive_stem(path.name)
    refusals = home / "refused.json"
    if not refusals.is_file():
        shutil.rmtree(home, ignore_errors=True)
        inside.mkdir(parents=True)
        log(f"collect: unpacking {path.name}")
        write_json(refusals, _unpack(path, inside))
    refused = [
        make_row(
            "archive",
            f"{plain_name(PurePosixPath(member).stem)}-{digest(member)}",
            "",
            origin=member,
            reason=reason,
        )
        for member, reason in read_json(refusals)
    ]
    if refused:
        yield Batch(refused, lambda indices: [])
    yield from folder_source(str(inside), options, name="archive")


def _unpack(path: Path, into: Path) -> list[tuple[str, str]]:
    """Write an archive's pictures and metadata under `into`; what is refused and why."""
    refused = []
    try:
        for member, reason, stream in _members(path):
            parts = PurePosixPath(member.replace("\\", "/")).parts
            if not reason and (".." in parts or re.match(r"[/\\\\]|[A-Za-z]:", member)):
                reason = "refused: the path leads out of the archive"
            wanted = member.lower().endswith((*IMAGE_SUFFIXES, "metadata.jsonl"))
            if reason:
                refused.append((member, reason))
            elif wanted and stream is not None:
                target = into.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    shutil.copyfileobj(stream, file)
    except FileExistsError as error:
        raise UserError(f"{path}: holds {error.filename} twice: pack it again") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged or locked archive ({one_line(error)})") from None
    return refused


def _members(path: Path) -> Iterator[tuple[str, str, IO[bytes] | None]]:
    """(name, why it is refused or "", its bytes) of each file of a zip or tar."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if (info.external_attr >> 16) & 0o170000 == 0o120000:
                    yield info.filename, "refused: a link", None
                elif info.file_size > LARGEST:
                    yield info.filename, "refused: too large for a picture", None
                else:
                    with archive.open(info) as stream:
                        yield info.filename, "", stream
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isdir():
                    continue
                reason = ""
                if member.issym() or member.islnk():
                    reason = "refused: a link"
                elif not member.isfile():
                    reason = "refused: not a plain file"
                elif member.size > LARGEST:
                    reason = "refused: too large for a picture"
                yield member.name, reason, None if reason else archive.extractfile(member)
    else:
        raise UserError(f"{path}: neither a zip nor a tar file: give one of those, or a folder")


def _archive_stem(name: str) -> str:
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] or "archive"
    return Path(name).stem


# ---- Kaggle --------------------------------------------------------------------------------------


def kaggle_source(where: str, options: Options) -> Iterator[Batch]:
    """A Kaggle dataset by its slug `owner/name`, or a folder that it was unpacked to.

    Two layouts are known: Tom and Jerry frames with `ground_truth.csv` (`filename,tom,jerry`), and
    photographs in folders named after their class (`Cat`, `cats`, `mouse`, ...).

    Raises:
        UserError: cannot be downloaded, or another layout than these.
    """
    folder = Path(where) if Path(where).is_dir() else _download(where)
    tables = sorted(folder.rglob("ground_truth.csv"))
    if tables:
        yield from _labelled_frames(folder, tables[0], options)
        return
    known = [p for p in sorted(folder.rglob("*")) if p.is_dir() and p.name.lower() in CLASS_NAMES]
    if not known:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{where}: expected ground_truth.csv (filename,tom,jerry) or folders named after a "
            f"class ({', '.join(CLASS_NAMES)}), found {found}: "
            "give a folder in one of these layouts"
        )
    # Folders of other classes (dogs, say) stay out; so does a class folder inside another.
    for place in known:
        if not any(other in place.parents for other in known):
            options_here = replace(options, domain=options.domain or "natural")
            yield from folder_source(str(place), options_here, name="kaggle")


def _download(slug: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/versions/\d+)?", slug):
        raise UserError(f"'{slug}' is neither a folder nor a Kaggle slug like owner/name")
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            f"{slug}: Kaggle needs the package kagglehub: 'pip install kagglehub', "
            "or download the dataset by hand and give its folder"
        ) from None
    try:
        return Path(kagglehub.dataset_download(slug))
    except Exception as error:
        # kagglehub raises many kinds, of its own and of its HTTP client: all mean no data.
        raise UserError(
            f"{slug}: cannot be downloaded ({one_line(error)}): check the slug, the network and "
            "kagglehub's token (~/.kaggle/kaggle.json), or give a downloaded folder"
        ) from None


def _labelled_frames(folder: Path, table: Path, options: Options) -> Iterator[Batch]:
    """Frames with per-frame labels; those with neither character are dropped with that reason."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or [])
        records = list(reader)
    if not {"filename", "tom", "jerry"} <= columns:
        raise UserError(
            f"{table}: expected the columns filename, tom, jerry, "
            f"found {', '.join(sorted(columns))}"
        )
    truth = {r["filename"]: (_flag(r["tom"]), _flag(r["jerry"])) for r in records}
    classes = {(True, False): "tom", (False, True): "jerry", (True, True): "both"}
    paths = list_files(folder, IMAGE_SUFFIXES)
    missing = truth.keys() - {p.name for p in paths}
    if missing:
        log(f"collect: {table.name} names {len(missing)} files that are not there")
    rows = []
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        flags = truth.get(path.name)
        reason = "" if flags else f"no label in {table.name}"
        if flags == (False, False):
            reason = "shows neither character"
        rows.append(
            make_row(
                "kaggle",
                f"{plain_name(path.stem)}-{digest(relative)}",
                stamp(path),
                domain=options.domain or "cartoon",
                role=options.role,
                # Frames of one show lie in several class folders: number them across folders.
                group=f"{table.parent.name}/{group_of(path.name)}",
                origin=relative,
                rights=options.rights,
                reason=reason,
                **{"class": classes.get(flags, "") if flags else ""},
            )
        )
    yield from file_batches(rows, paths)


def _flag(text: str) -> bool:
    return text.strip().lower() in ("1", "1.0", "true", "yes")
