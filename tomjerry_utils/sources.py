"""Where pictures come from: one function per kind of source, all with one signature.

A source takes a place (`where`: a folder, a file, a Kaggle slug) and `Options`, and yields `Batch`
after `Batch`. A batch names its pictures before it reads them, so that `collect` reads only those
that an earlier, interrupted run has not finished.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tomjerry_utils import UserError, films, scenes
from tomjerry_utils.runs import hash_file, hash_obj, log

Row = dict[str, Any]
Loaded = np.ndarray | UserError

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif", ".svg"),
)
SAME_SCENE = 64  # numbered files this close together count as one group
BATCH = 32  # frames of a film
FILES = 256  # of a folder; worker processes wait for the last of each batch

# What folder names and label columns call the classes: name → (class, domain it tells of, if any).
CLASS_NAMES = {
    "tom": ("tom", "cartoon"),
    "jerry": ("jerry", "cartoon"),
    "tom_jerry": ("both", "cartoon"),
    "tom_jerry_1": ("both", "cartoon"),
    "both": ("both", ""),
    "cat": ("tom", ""),
    "cats": ("tom", ""),
    "mouse": ("jerry", ""),
    "mice": ("jerry", ""),
    "cat_mouse": ("both", ""),
}
DOMAIN_NAMES = {
    "cartoon": "cartoon",
    "cartoons": "cartoon",
    "natural": "natural",
    "photo": "natural",
    "photos": "natural",
    "real": "natural",
}


@dataclass(frozen=True)
class Options:
    """What a source may want to know.

    Attributes:
        work: a scratch folder that outlives an interrupted run.
        domain: "cartoon", "natural", or "" to tell by folder names.
        role: "training", or "out_of_domain" for pictures kept beside the training set.
        every_s: seconds of film between two kept frames of a shot.
        size: edge of generated scenes, pixels.
        per_class: generated scenes per class and domain.
        neither: "drop" or "background": what becomes of frames with neither character.
        rights: what the data sheet says of these pictures' licence.
        fetched: where what was fetched lies, so that a collection that goes through its sources
            twice sees the same both times.
    """

    work: Path
    domain: str = ""
    role: str = "training"
    every_s: float = 1.0
    size: int = 64
    per_class: int = 0
    neither: str = "drop"
    rights: str = "not stated by the source: find out before sharing"
    fetched: dict[str, Path] = field(default_factory=dict, compare=False)


@dataclass
class Batch:
    """Some pictures of a source, named but not yet read.

    Attributes:
        rows: manifest rows; `_key` changes when the picture behind a row does. A row that already
            has a `reason` is never read.
        load: indices into `rows` → their pictures in that order, (H, W, 3) uint8, or the error.
        shots: (video, first_frame, time_s) of the film these come from, with its first batch.
        paths: the files, one a row, where the pictures are files that anyone may read: they are
            then read in other processes and `load` is not called.
        sure: nothing need be decided on these pictures, of which all is known: they are neither
            screened nor read twice.
    """

    rows: list[Row]
    load: Callable[[Sequence[int]], Iterable[Loaded]]
    shots: list[tuple[str, int, float]] = field(default_factory=list)
    paths: Sequence[Path] | None = None
    sure: bool = False


def make_row(source: str, name: str, key: str, **known: Any) -> Row:
    """A manifest row: all columns, in order, with what is known now."""
    row: Row = {
        "file_name": name,
        "source": source,
        "frame": None,
        "time_s": None,
        "shot": None,
        "group": name,
        "split": "",
        "class": "",
        "sha256": "",
        "kept": False,
        "reason": "",
        "domain": "",
        "label": "",
        "role": "training",
        "seed": None,
        "text": "",
        "action": "",
        "facing": "",
        "place": "",
        "origin": "",
        "rights": "",
        "read_as": "",
        "mask": "",
        "width": None,
        "height": None,
        "blur": None,
        "photo": None,
        "letters": None,
        "mark": None,
        "labelled_by": "",
        "confidence": None,
        "cluster": "",
        "duplicate_of": "",
        "decided": "",
        "screened": "",
        "class_found": "",
        "_key": key,
    }
    unknown = known.keys() - row.keys()
    if unknown:
        raise KeyError(f"no manifest column {', '.join(sorted(unknown))}")
    row.update(known)
    for column, value in row.items():
        if isinstance(value, str):
            row[column] = printable(value)
    if row["class"] and row["domain"] and not row["label"]:
        row["label"] = scenes.label_of(row["class"], row["domain"])
    return row


# ---- generated scenes ----------------------------------------------------------------------------


def scene_source(where: str, options: Options) -> Iterator[Batch]:
    """Generated scenes of both domains: of each class the first `per_class` seeds of its range.

    Args:
        where: unused; the scenes are made here.
    """
    del where
    for domain in scenes.STYLES:
        yield from _scenes_of(domain, options)


def _scenes_of(domain: str, options: Options) -> Iterator[Batch]:
    wanted = dict.fromkeys(scenes.CLASSES, options.per_class)
    chosen = []
    for seed in range(*scenes.RANGES[domain]):
        scene = scenes.describe(seed)
        if wanted[scene.cls]:
            wanted[scene.cls] -= 1
            chosen.append(scene)
        if not any(wanted.values()):
            break
    # Large enough to keep the worker processes busy, small enough for 512 px pictures.
    step = max(32, min(512, 2**22 // options.size**2))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    for start in range(0, len(chosen), step):
        part = chosen[start : start + step]
        seeds = [scene.seed for scene in part]
        rows = [
            make_row(
                "scenes",
                f"{scene.seed}",
                f"{options.size}",
                domain=domain,
                role=options.role,
                group=f"scenes/{scene.seed}",
                seed=scene.seed,
                text=scenes.caption(scene, domain),
                action=scene.action,
                facing=scene.facing,
                place=scene.place,
                origin=f"tomjerry_utils.scenes, seed {scene.seed}",
                rights="generated by this project, under its own licence",
                **{"class": scene.cls},
            )
            for scene in part
        ]

        def load(indices: Sequence[int], seeds: list[int] = seeds) -> Iterable[Loaded]:
            todo = [seeds[i] for i in indices]
            return list(scenes.render_many(todo, domain, options.size, workers=workers)["image"])

        yield Batch(rows, load, sure=True)


# ---- the starter pictures and the film clip ------------------------------------------------------


def starter_source(where: str, options: Options) -> Iterator[Batch]:
    """The starter pictures, with their licences and character groups, all out of domain.

    Args:
        where: the folder that holds `attribution.csv`.
    """
    folder = Path(where)
    table = folder / "attribution.csv"
    if not table.is_file():
        raise UserError(f"no starter pictures: {table} is missing: clone the project again")
    with table.open(newline="", encoding="utf-8") as file:
        records = [r for r in csv.DictReader(file) if r["file"].endswith(IMAGE_SUFFIXES)]

    def row_of(record: Mapping[str, str]) -> Row:
        return make_row(
            "starter",
            f"starter-{Path(record['file']).stem}",
            record["sha256"],
            domain=DOMAIN_NAMES[record["domain"]],
            role="out_of_domain",
            group=f"starter/{record['character_group']}",
            origin=record["file"],
            rights=f"{record['licence']}, {record['author']}",
            **{"class": CLASS_NAMES.get(record["class"], ("", ""))[0]},
        )

    by_path = {folder / record["file"]: record for record in records}
    yield from file_batches(list(by_path), lambda path: row_of(by_path[path]))


def clip_source(where: str, options: Options) -> Iterator[Batch]:
    """The starter film clip: frames of every shot, out of domain."""
    rights = "CC-BY-3.0, (c) 2008 Blender Foundation, www.bigbuckbunny.org"
    yield from video_source(
        where, replace(options, domain="cartoon", role="out_of_domain", rights=rights), name="clip"
    )


# ---- films ---------------------------------------------------------------------------------------


def video_source(where: str, options: Options, *, name: str = "video") -> Iterator[Batch]:
    """Frames of a film, or of all films of a folder: `every_s` apart in each shot; group = shot.

    Where a shot has no frame worth keeping, a dropped row says why. A film that cannot be read
    becomes one dropped row with the reason, and the others go on.
    """
    path = Path(where)
    if not path.exists():
        raise UserError(f"no film {path}: check the path")
    paths = [path] if path.is_file() else list_files(path, films.VIDEO_SUFFIXES)
    if not paths:
        raise UserError(f"{path}: holds no films ({', '.join(films.VIDEO_SUFFIXES)})")
    for film in paths:
        yield from _frames_of(film, options, name)


def _frames_of(path: Path, options: Options, name: str) -> Iterator[Batch]:
    domain = options.domain or "cartoon"
    try:
        sha = hash_file(path)[:8]
        film = _scanned(path, options.work / f"shots-{sha}.npz")
        chosen = film.choose(options.every_s)
    except (UserError, OSError) as error:
        stem = f"{plain_name(path.stem)}-{digest(path.name)}"
        row = make_row(name, stem, "", domain=domain, origin=path.name, reason=one_line(error))
        yield Batch([row], lambda indices: [])
        return
    # The borders are part of what a picture is: where they are found anew, it is made anew.
    key = f"{sha} {' '.join(map(str, film.borders))}"
    rows = [
        make_row(
            name,
            f"{plain_name(path.stem)}-{sha}-f{frame:06d}",
            key,
            frame=frame,
            time_s=film.times[frame],
            shot=film.shot_of(frame),
            group=f"{path.name}-{sha}/shot-{film.shot_of(frame):04d}",
            domain=domain,
            role=options.role,
            origin=path.name,
            rights=options.rights,
            reason=reason,
        )
        for frame, reason in chosen
    ]

    def load(part: Sequence[tuple[int, str]], indices: Sequence[int]) -> Iterator[Loaded]:
        wanted = [part[i][0] for i in indices]
        for number, picture in zip(wanted, film.pictures(wanted), strict=True):
            damaged = UserError(f"{path}: frame {number} cannot be read")
            yield damaged if picture is None else picture

    shots = [(path.name, first, film.times[first]) for first in film.cuts]
    for start in range(0, len(rows), BATCH):
        span = slice(start, start + BATCH)
        yield Batch(rows[span], partial(load, chosen[span]), shots)
        shots = []


def _scanned(path: Path, saved: Path) -> films.Film:
    """What `open_film` finds; that is the slow half, so an interrupted run keeps it."""
    if saved.is_file():
        try:
            return films.Film.load(saved, path)
        except (OSError, ValueError, KeyError):
            log(f"collect: {saved.name} is torn, looking anew")
    log(f"collect: looking for the shots of {path.name}")
    film = films.open_film(path)
    film.save(saved)
    return film


# ---- folders -------------------------------------------------------------------------------------


def folder_source(where: str, options: Options, *, name: str = "folder") -> Iterator[Batch]:
    """All pictures under a folder.

    The class and the domain are read from folder names (`tom`, `cat`, `natural`, ...) and from a
    `metadata.jsonl` beside the pictures where there is one (columns as in our manifest), rights
    and groups also from an `attribution.csv` (`file`, `licence`, `character_group`). Without a
    group told, numbered files share one in runs of `SAME_SCENE`; others are one each.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    folder = Path(where)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    from tomjerry_utils.animal_masks import is_mask

    paths = [path for path in list_files(folder, IMAGE_SUFFIXES) if not is_mask(path)]
    if not paths:
        raise UserError(f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    notes = _metadata(folder)
    yield from file_batches(paths, lambda path: _row_of(path, folder, notes, options, name))


def _row_of(path: Path, folder: Path, notes: Mapping[str, Row], options: Options, name: str) -> Row:
    relative = path.relative_to(folder).as_posix()
    note = notes.get(relative, {})
    cls, domain = _told_by_folders([folder.name, *PurePosixPath(relative).parts[:-1]])
    cls = note.get("class") or cls
    domain = note.get("domain") or options.domain or domain
    return make_row(
        name,
        f"{plain_name(path.stem)}-{digest(relative)}",
        stamp(path),
        domain=domain if domain in scenes.STYLES else "",
        role=options.role,
        group=f"{folder.name}/{note.get('group') or group_of(relative)}",
        origin=relative,
        rights=note.get("rights") or options.rights,
        **{
            "class": cls if cls in scenes.CLASSES else "",
            **{k: note.get(k) or "" for k in ("text", "action", "facing", "place")},
        },
    )


def group_of(relative: str) -> str:
    """The group that a file's name tells of: frames numbered close together are one group."""
    path = PurePosixPath(relative)
    found = re.fullmatch(r"(.*?)(\d+)", path.stem)
    if not found:
        return relative
    return (path.parent / f"{found[1]}#{int(found[2]) // SAME_SCENE}").as_posix()


def _told_by_folders(names: Sequence[str]) -> tuple[str, str]:
    """Class and domain as the folders' names tell them; the innermost that tells wins."""
    cls = domain = hint = ""
    for name in names:
        key = re.sub(r"[\s-]+", "_", name.lower())
        domain = DOMAIN_NAMES.get(key, domain)
        cls, hint = CLASS_NAMES.get(key, (cls, hint))
    return cls, domain or hint


def _metadata(folder: Path) -> dict[str, Row]:
    notes: dict[str, Row] = {}
    for table in sorted(folder.rglob("metadata.jsonl")):
        at = table.parent.relative_to(folder)
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                note = json.loads(line)
                notes[(at / note["file_name"]).as_posix()] = note
            except (ValueError, KeyError, TypeError):
                log(f"collect: {table}, line {number}: not a metadata row, left out")
    credits = folder / "attribution.csv"
    if credits.is_file():
        # A set that says which pictures share a character: those must not cross the split.
        with credits.open(newline="", encoding="utf-8-sig") as file:
            for record in csv.DictReader(file):
                note = notes.setdefault(record.get("file") or "", {})
                note.setdefault("group", record.get("character_group"))
                note.setdefault("rights", record.get("licence"))
    return notes


# ---- what all sources share ----------------------------------------------------------------------


def file_batches(paths: Sequence[Path], row_of: Callable[[Path], Row]) -> Iterator[Batch]:
    """Batches of pictures that are files; of a million of them only the names are held at once."""
    for start in range(0, len(paths), FILES):
        part = paths[start : start + FILES]
        yield Batch([row_of(path) for path in part], lambda indices: [], paths=part)


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with these suffixes under a folder, sorted; hidden ones are left out."""
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(at, n) for n in names if n.lower().endswith(tuple(suffixes)) and n[0] != "."]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def stamp(path: Path) -> str:
    """Changes when the file does, without reading it."""
    try:
        state = path.stat()
    except OSError:
        return "unreadable"
    return hash_obj([state.st_size, state.st_mtime_ns])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def plain_name(stem: str) -> str:
    """A file name that every system can hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._")[:80] or "picture"


def printable(text: str) -> str:
    """A file name may hold bytes that are no text: show those as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return printable(" ".join(str(error).split())) or type(error).__name__
