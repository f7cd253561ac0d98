"""Published sets of pictures by the layouts that they come in.

- frames: Tom and Jerry frames with `ground_truth.csv` (`filename,tom,jerry`), as in Kaggle's
  balabaskar/tom-and-jerry-image-classification;
- pets: the Oxford-IIIT Pet set (Parkhi et al. 2012): `images/<Breed>_<number>.jpg` and
  `annotations/trimaps/<Breed>_<number>.png`; cats alone are taken, with their masks;
- mice: the Black Mice Dataset (Andresen et al. 2020): subsets KXN, IN and C;
- classes: folders named after a class (`PetImages/Cat`, `cats`, `mouse`, …).
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from tomjerry_utils import UserError
from tomjerry_utils.runs import log
from tomjerry_utils.sources import (
    CLASS_NAMES,
    IMAGE_SUFFIXES,
    SAME_SCENE,
    Batch,
    Options,
    Row,
    digest,
    file_batches,
    folder_source,
    group_of,
    list_files,
    make_row,
    plain_name,
    stamp,
)

# layout → what it looks like, for messages
LAYOUTS = {
    "frames": "ground_truth.csv (filename,tom,jerry) beside folders of frames",
    "pets": "images/<Breed>_<number>.jpg and annotations/trimaps/<Breed>_<number>.png",
    "mice": "folders KXN, IN and C of photographs",
    "classes": f"folders named after a class ({', '.join(CLASS_NAMES)})",
}
CAT_BREEDS = (
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau"),
    *("Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
)
MOUSE_SUBSETS = ("KXN", "IN", "C")  # ketamine/xylazine, isoflurane, castration
PETS_RIGHTS = "Oxford-IIIT Pet set, Parkhi et al. 2012, CC BY-SA 4.0; the photographers' own"
MICE_RIGHTS = "Andresen et al. 2020, doi 10.1371/journal.pone.0228059: to be cited"
MASKS = "masks"  # folder of a collection: trimaps of 1 = animal, 2 = ground, 3 = outline
SAME_SITTING = 4 * SAME_SCENE  # photographs of mice that follow one another are one group


def layout_of(folder: Path) -> str:
    """Which of `LAYOUTS` a folder has; empty for none of them."""
    if any(_columns(table) >= {"filename", "tom", "jerry"} for table in _tables(folder)):
        return "frames"
    folders = [path for path in _folders(folder) if not path.name.startswith(".")]
    names = {path.name for path in folders}
    if any(_breed(path.name) for path in _pet_images(folder)):
        return "pets"
    if len(names & set(MOUSE_SUBSETS)) >= 2:
        return "mice"
    return "classes" if any(name.lower() in CLASS_NAMES for name in names) else ""


def found_in(folder: Path) -> str:
    """What a folder holds, in a few words, for messages."""
    for table in _tables(folder):
        return f"{table.name} ({','.join(sorted(_columns(table))) or 'no columns'})"
    suffixes = Counter(path.suffix.lower() for path in list_files(folder, IMAGE_SUFFIXES))
    names = sorted(path.relative_to(folder).as_posix() for path in _folders(folder))
    here = names or sorted(path.name for path in folder.iterdir())
    shown = ", ".join([*here[:6], *(["…"] if len(here) > 6 else [])]) or "nothing"
    return shown + "".join(f"; {count} {suffix}" for suffix, count in suffixes.most_common(2))


def batches(folder: Path, layout: str, options: Options, *, name: str) -> Iterator[Batch]:
    """The pictures of a folder in one of the `LAYOUTS`; any other is read as a plain folder.

    Args:
        name: what the manifest's column `source` says.
    """
    if layout == "frames":
        return _frames(folder, options, name)
    if layout == "pets":
        return _pets(folder, options, name)
    if layout == "mice":
        return _mice(folder, options, name)
    if layout == "classes":
        return _classes(folder, options, name)
    return folder_source(str(folder), options, name=name)


# ---- frames of the show --------------------------------------------------------------------------


def _frames(folder: Path, options: Options, name: str) -> Iterator[Batch]:
    """Frames with per-frame labels; of those with neither character `options.neither` decides."""
    table = next(t for t in _tables(folder) if _columns(t) >= {"filename", "tom", "jerry"})
    with table.open(newline="", encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    truth = {r["filename"]: (_flag(r["tom"]), _flag(r["jerry"])) for r in records}
    classes = {(True, False): "tom", (False, True): "jerry", (True, True): "both"}
    paths = list_files(folder, IMAGE_SUFFIXES)
    missing = truth.keys() - {p.name for p in paths}
    if missing:
        log(f"collect: {table.name} names {len(missing)} files that are not there")

    def row_of(path: Path) -> Row:
        relative = path.relative_to(folder).as_posix()
        flags = truth.get(path.name)
        reason, role = "" if flags else f"no label in {table.name}", options.role
        if flags == (False, False) and options.neither == "background":
            role = "background"
        elif flags == (False, False):
            reason = "shows neither character"
        return make_row(
            name,
            f"{plain_name(path.stem)}-{digest(relative)}",
            stamp(path),
            domain=options.domain or "cartoon",
            role=role,
            # Frames of one show lie in several class folders: number them across folders.
            group=f"{table.parent.name}/{group_of(path.name)}",
            origin=relative,
            rights=options.rights,
            reason=reason,
            **{"class": classes.get(flags, "") if flags else ""},
        )

    yield from file_batches(paths, row_of)


def _flag(text: str | None) -> bool:
    return (text or "").strip().lower() in ("1", "1.0", "true", "yes")


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.rglob("ground_truth.csv"))


def _columns(table: Path) -> set[str]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return set(csv.DictReader(file).fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()


# ---- folders named after a class -----------------------------------------------------------------


def _classes(folder: Path, options: Options, name: str) -> Iterator[Batch]:
    known = [path for path in _folders(folder) if path.name.lower() in CLASS_NAMES]
    # Folders of other classes (dogs, say) stay out; so does a class folder inside another.
    for place in known:
        if not any(other in place.parents for other in known):
            options_here = replace(options, domain=options.domain or "natural")
            yield from folder_source(str(place), options_here, name=name)


def _folders(folder: Path) -> list[Path]:
    """All folders below one, hidden ones left out, sorted."""
    found = []
    for at, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith((".", "__MACOSX")))
        found += [Path(at, name) for name in names]
    return sorted(found)


# ---- cats with masks -----------------------------------------------------------------------------


def _pets(folder: Path, options: Options, name: str) -> Iterator[Batch]:
    """The cats of the Oxford-IIIT Pet set; each row names its trimap in the column `mask`."""
    trimaps = {
        path.stem: path for path in list_files(folder, (".png",)) if path.parent.name == "trimaps"
    }
    paths = [path for path in _pet_images(folder) if _breed(path.name)]
    # The scratch folder lies in the collection's.
    home = options.work.parent
    without = sum(path.stem not in trimaps for path in paths)
    if without:
        log(f"collect: {without} of {len(paths)} cats have no mask in {folder.name}")

    def row_of(path: Path) -> Row:
        relative = path.relative_to(folder).as_posix()
        row_name = f"{plain_name(path.stem)}-{digest(relative)}"
        row = make_row(
            name,
            row_name,
            stamp(path),
            domain=options.domain or "natural",
            role=options.role,
            group=f"pets/{group_of(path.name)}",
            origin=relative,
            rights=_rights(options, PETS_RIGHTS),
            **{"class": "tom"},
        )
        if path.stem in trimaps:
            row["mask"] = f"{MASKS}/{row_name}.png"
            _copy(trimaps[path.stem], home / row["mask"])
        return row

    yield from file_batches(paths, row_of)


def _pet_images(folder: Path) -> list[Path]:
    paths = list_files(folder, (".jpg", ".jpeg", ".png"))
    return [path for path in paths if path.parent.name == "images"]


def _breed(name: str) -> str:
    """The cat breed that a file of the set is named after, empty for dogs and other files."""
    found = re.fullmatch(r"(\w+)_\d+\.\w+", name)
    return found[1] if found and found[1] in CAT_BREEDS else ""


def _copy(source: Path, target: Path) -> None:
    """Copy a small file, unless an interrupted run has."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


# ---- laboratory mice -----------------------------------------------------------------------------

_ANIMAL = re.compile(r"(?:mouse|maus|animal|tier|subject)[ _-]*0*(\d+)", re.IGNORECASE)


def _mice(folder: Path, options: Options, name: str) -> Iterator[Batch]:
    """Photographs of laboratory mice, each of one mouse."""
    paths = list_files(folder, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: expected photographs of mice, found {found_in(folder)}")
    groups = mouse_groups([path.relative_to(folder) for path in paths])
    group_of_path = dict(zip(paths, groups, strict=True))

    def row_of(path: Path) -> Row:
        relative = path.relative_to(folder).as_posix()
        return make_row(
            name,
            f"{plain_name(path.stem)}-{digest(relative)}",
            stamp(path),
            domain=options.domain or "natural",
            role=options.role,
            group=f"mice/{group_of_path[path]}",
            origin=relative,
            rights=_rights(options, MICE_RIGHTS),
            **{"class": "jerry"},
        )

    untold = sum("/animal " not in group for group in groups)
    if untold:
        log(
            f"collect: {untold} of {len(paths)} mice tell no animal by their names: grouped by "
            f"runs of {SAME_SITTING} files in a subset; an animal may be in training and validation"
        )
    yield from file_batches(paths, row_of)


def mouse_groups(paths: Sequence[PurePath]) -> list[str]:
    """The groups of photographs by their paths in the set.

    An animal of a subset is a group where folders or files tell it (`mouse12/…`, `mouse12_004`),
    so that it is on one side of the split alone. How the published files are named is not known to
    this project: what tells no animal is grouped by runs of `SAME_SITTING` files of a subset, in
    the order of their names, numbers as numbers. Such a group holds neighbours in time if the
    names count or date them; one animal may then be in several groups.
    """
    groups = [""] * len(paths)
    rest: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        subset = next((part for part in path.parts[:-1] if part in MOUSE_SUBSETS), "")
        if not subset:
            start = re.match(r"(KXN|IN|C)(?=[ _-])", path.name)
            subset = start[1] if start else "all"
        animal = next(filter(None, map(_ANIMAL.search, path.parts[:-1])), None)
        # In a file's own name the last number counts pictures.
        in_name = _ANIMAL.search(path.stem)
        if in_name and re.search(r"\d", path.stem[in_name.end() :]):
            animal = animal or in_name
        if animal:
            groups[i] = f"{subset}/animal {animal[1]}"
        else:
            rest.setdefault(subset, []).append(i)
    for subset, indices in rest.items():
        indices.sort(key=lambda i: _natural(paths[i].as_posix()))
        for rank, i in enumerate(indices):
            groups[i] = f"{subset}/run {rank // SAME_SITTING}"
    return groups


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]


def _rights(options: Options, known: str) -> str:
    """What is known of a set's licence, unless the caller knows better."""
    unknown = options.rights == Options(options.work).rights
    return known if unknown else options.rights
