"""Stage 01: from sources to images, a manifest, splits and a data sheet.

Every picture met has a row in the manifest, kept or not, with the reason. Three columns say what a
picture is for:

- `role`: "training" for what the models learn from; "unlabelled" where class or domain is not
  known; "background" for frames without either character, where those are wanted;
  "out_of_domain" for the starter pictures and the film clip, which look like nothing in the
  training set and serve as honest tests of the translator.
- `split`: "train" or "validation", a hash of the row's `group`. Pictures of one group (a shot, a
  character, a scene, and all that holds near duplicates of theirs) never lie on both sides. Test
  scenes are never collected: their hidden twins belong to the metrics.
- `kept`: False for what is damaged, a duplicate, or not wanted; `reason` says which.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError, scenes, screens
from tomjerry_utils import archives as packed
from tomjerry_utils import kaggle as kaggle_sets
from tomjerry_utils import sources as src
from tomjerry_utils.curate import MANIFEST, WORK, collect
from tomjerry_utils.downloads import is_url
from tomjerry_utils.images import load_image
from tomjerry_utils.journal import JOURNAL, Journal
from tomjerry_utils.judging import SALT, Curation
from tomjerry_utils.picture_review import Decision, read_decisions
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    data_root,
    hash_file,
    hash_obj,
    log,
    open_stage,
    read_jsonl,
)
from tomjerry_utils.sources import Batch, Options, Row

NAME = "01_collect"
VERSION = 3


@dataclass(frozen=True)
class Collection:
    """Collected pictures and what is known of them.

    Attributes:
        folder: holds `manifest.jsonl` and `images/<domain>/`.
        size: edge of the pictures that `images` gives by default.
        key: names this very collection.
    """

    folder: Path
    size: int
    key: str = ""

    @cached_property
    def rows(self) -> list[Row]:
        """All manifest rows, kept and dropped, read when first asked for."""
        return read_jsonl(self.folder / MANIFEST)

    def select(
        self,
        *,
        domain: str | None = None,
        split: str | None = None,
        cls: str | None = None,
        source: str | None = None,
        role: str | None = "training",
        kept: bool | None = True,
    ) -> list[Row]:
        """The rows that fit; None means any.

        A `source` named directly overrides the role, so that `select(source="starter")` works.
        """
        if source is not None and role == "training":
            role = None
        wanted = {
            "domain": domain,
            "split": split,
            "class": cls,
            "source": source,
            "role": role,
            "kept": kept,
        }
        wanted = {name: value for name, value in wanted.items() if value is not None}
        return [row for row in self.rows if all(row[n] == v for n, v in wanted.items())]

    def images(self, rows: Sequence[Row], size: int | None = None) -> np.ndarray:
        """The pictures of some rows: (N, S, S, 3) uint8, S being `size` or the collection's."""
        edge = size or self.size
        out = np.empty((len(rows), edge, edge, 3), np.uint8)
        for i, row in enumerate(rows):
            out[i] = load_image(self.folder / row["file_name"], edge)
        return out

    def thumb(self, row: Mapping[str, Any]) -> np.ndarray:
        """A small picture of any row that could be read, dropped or not: (h, w, 3) uint8."""
        if row["kept"]:
            return load_image(self.path(row))
        with Journal(self.folder / JOURNAL) as journal:
            small = journal.thumb(row["file_name"])
        if small is None:
            raise KeyError(f"no picture of {row['origin']} was kept: {row['reason']}")
        return small

    def path(self, row: Mapping[str, Any]) -> Path:
        """Where the picture of a row lies."""
        return self.folder / str(row["file_name"])


def ensure(profile: Profile) -> Collection:
    """Collect what the profile names, or return at once when it is there.

    Raises:
        UserError: a source is missing, or another process is collecting.
    """
    settings = profile.collect
    # The data are the same for every seed: runs that differ in it compare trainings, not pictures.
    stage = open_stage(
        profile.model_copy(update={"seed": 0}), NAME, settings, _inputs(profile), VERSION
    )
    with stage.lock():
        if not stage.finished:
            log(f"{NAME}: collecting {', '.join(settings.sources)} into {stage.folder}")
            options = Options(
                stage.folder / WORK,
                every_s=settings.clip_every_s,
                size=profile.image_size,
                per_class=settings.per_class,
                neither=settings.neither,
            )
            found = collect(
                lambda: _profile_batches(profile, options),
                stage.folder,
                _curation(profile),
            )
            stage.finish(**_summary(found))
    return Collection(stage.folder, profile.image_size, stage.key)


def opened(folder: Path) -> Collection:
    """What `tomjerry collect` wrote to a folder.

    Raises:
        UserError: nothing was, or not to the end.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"no {folder / MANIFEST}: `tomjerry collect --out {folder}` makes it")
    return Collection(folder, 512, hash_file(folder / MANIFEST)[:16])


def training_facts(profile: Profile) -> dict[str, Any]:
    """What a profile's training pictures follow from, told without making them.

    Of generated scenes it is the renderers, their number and the split; how other pictures are
    curated beside them changes none of these. Of all else it is this stage and its settings.
    """
    settings = profile.collect
    if "scenes" not in settings.sources:
        return {"version": VERSION, **settings.named()}
    return {
        "scenes": _renderers(),
        "per_class": settings.per_class,
        "validation": [SALT, settings.validation_fraction],
    }


def collect_command(
    out: Path,
    *,
    videos: Sequence[str] = (),
    folders: Sequence[str] = (),
    archives: Sequence[str] = (),
    kaggle: Sequence[str] = (),
    domain: str = "",
    every_s: float = 1.0,
    short_side: int = 512,
    validation_fraction: float = 0.1,
    screen: bool = True,
    smallest: int = 64,
    per_class: int = 0,
    neither: str = "drop",
    precision: float = 0.95,
    composites: int = 0,
    decisions: str = "",
) -> Collection:
    """`tomjerry collect`: the same curation over sources named on the command line.

    The manifest describes the sources of this call; pictures that an earlier call into the same
    folder left are used again if they fit and removed if they do not.

    Args:
        out: folder to write to.
        videos: films, or folders of films.
        folders: folders of pictures.
        archives: zip or tar files, or their addresses.
        kaggle: slugs `owner/name`, or unpacked folders.
        domain: "cartoon" or "natural" for all of them; "" tells by folder names.
        every_s: seconds between two frames of a shot.
        short_side: larger pictures are reduced to this.
        screen: whether pictures must pass the screens, or were chosen with care before.
        smallest: px, the short side below which the screens drop a picture.
        per_class: pictures of a class and domain at most; 0 for all.
        neither: "drop" or keep as "background" the frames that show neither character.
        precision: of the classes that a probe tells, on pictures held out; above 1, none are told.
        composites: photographs of cat and mouse that there should be, the missing ones composed.
        decisions: a file of decisions by hand, "" for none.

    Raises:
        UserError: no source, a missing one, or `out` and a source inside each other.
    """
    from filelock import FileLock, Timeout

    places = [*videos, *folders, *archives, *kaggle]
    if not places:
        raise UserError("nothing to collect: name a --video, --folder, --archive or --kaggle")
    if domain not in ("", *scenes.STYLES):
        raise UserError(f"no domain '{domain}': {' or '.join(scenes.STYLES)}")
    if every_s <= 0 or short_side < 8:
        raise UserError("the seconds between frames must be above 0, the short side at least 8")
    for place in places:
        _apart(out, Path(place))
    for place in (*videos, *folders, *archives):
        if not Path(place).exists() and not (place in archives and is_url(place)):
            raise UserError(f"no file or folder {place}: check the path")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to write to")
    how = Curation(
        short_side=short_side,
        validation_fraction=validation_fraction,
        per_class=per_class,
        limits=screens.Limits(short_side=smallest) if screen else None,
        precision=precision,
        composites=composites,
        originals=tuple(map(Path, folders)),
        decisions=_decisions(decisions),
    )
    out.mkdir(parents=True, exist_ok=True)
    options = Options(out / WORK, domain=domain, every_s=every_s, neither=neither)

    def batches() -> Iterator[Batch]:
        for place in folders:
            yield from src.folder_source(place, options)
        for place in kaggle:
            yield from kaggle_sets.kaggle_source(place, options)
        for place in archives:
            yield from packed.archive_source(place, options)
        for place in videos:
            yield from src.video_source(place, options)

    try:
        with FileLock(out / ".lock", timeout=0):
            collect(batches, out, how)
    except Timeout:
        raise UserError(f"another process is collecting into {out}: wait, or end it") from None
    return Collection(out, short_side, hash_file(out / MANIFEST)[:16])


def gallery(collection: Collection, per_row: int, *, seed: int = 0) -> list[tuple[str, list[Row]]]:
    """Titled rows of random kept pictures: one for each domain and class, then one a source.

    Args:
        per_row: pictures in each at most.
        seed: which ones.
    """
    kept = [row for row in collection.rows if row["kept"]]
    titled: dict[str, list[Row]] = {}
    for domain in scenes.STYLES:
        for cls in scenes.CLASSES:
            label = scenes.label_of(cls, domain)
            titled[f"{domain}: {label.replace('_', ' and ')}"] = [
                row for row in kept if row["label"] == label and row["role"] == "training"
            ]
    for row in kept:
        if row["role"] != "training":
            titled.setdefault(f"{row['source']}: {row['role'].replace('_', ' ')}", []).append(row)
    rng = random.Random(seed)
    return [
        (title, rng.sample(rows, min(per_row, len(rows)))) for title, rows in titled.items() if rows
    ]


# ---- what a profile names ------------------------------------------------------------------------


def _profile_batches(profile: Profile, options: Options) -> Iterator[Batch]:
    settings = profile.collect
    raw = data_root() / "raw"
    for name in settings.sources:
        if name == "scenes":
            yield from src.scene_source("", options)
        elif name == "starter":
            yield from src.starter_source(str(data_root() / "starter"), options)
        elif name == "clip":
            yield from src.clip_source(str(data_root() / "starter" / "clip"), options)
        elif name == "kaggle":
            yield from kaggle_sets.kaggle_source(settings.kaggle_cartoon, options)
            yield from kaggle_sets.kaggle_source(settings.kaggle_cat, options)
            if settings.mouse_archive:
                # An archive in which every picture shows one mouse.
                yield from packed.archive_source(
                    _found(settings.mouse_archive, raw), options, layout="mice"
                )
        elif name == "folder":
            for domain in scenes.STYLES:
                if _there(raw / domain):
                    yield from src.folder_source(str(raw / domain), replace(options, domain=domain))
        elif name == "video" and _there(raw / "video"):
            yield from src.video_source(str(raw / "video"), options)


def _found(name: str, raw: Path) -> str:
    if is_url(name):
        return name
    for path in (Path(name).expanduser(), raw / name):
        if path.exists():
            return str(path)
    raise UserError(
        f"no archive {raw / name}: save it there (its source is in the profile), or leave "
        "'mouse_archive' empty to do without"
    )


def _there(folder: Path) -> bool:
    if not folder.is_dir():
        log(f"{NAME}: no {folder}, left out; put your own there to have them collected")
    return folder.is_dir()


def _curation(profile: Profile) -> Curation:
    settings = profile.collect
    return Curation(
        short_side=max(profile.image_size, 256),
        validation_fraction=settings.validation_fraction,
        per_class=settings.per_class,
        limits=screens.Limits(short_side=settings.smallest),
        precision=settings.label_precision,
        classes=tuple(c for c in scenes.CLASSES if c != "both" or settings.both != "none"),
        composites=settings.per_class if settings.both == "composites" else 0,
        originals=tuple(data_root() / "raw" / style for style in scenes.STYLES),
        decisions=_decisions(settings.decisions),
    )


def _decisions(name: str) -> list[Decision]:
    if not name:
        return []
    return list(read_decisions(Path(name).expanduser()).values())


def _inputs(profile: Profile) -> dict[str, str]:
    """Hashes of what the sources read, so that a change in them makes the stage anew."""
    sources = profile.collect.sources
    starter, raw = data_root() / "starter", data_root() / "raw"
    inputs = {}
    if "scenes" in sources:
        inputs["scenes"] = _renderers()
    for name, path in (
        ("starter", starter / "attribution.csv"),
        ("clip", starter / "clip" / "big_buck_bunny_20s.mp4"),
    ):
        if name in sources:
            if not path.is_file():
                raise UserError(f"{path} is missing: clone the project again")
            inputs[name] = hash_file(path)[:16]
    if "folder" in sources or "video" in sources:
        # What they read: downloads that lie there as well come while the stage runs.
        places = [raw / name for name in (*scenes.STYLES, "video")]
        files = sorted(p for place in places for p in place.rglob("*") if p.is_file())
        inputs["raw"] = hash_obj([(str(p.relative_to(raw)), p.stat().st_size) for p in files])
    return inputs


def _renderers() -> str:
    """The renderers' own fingerprint: one small picture of each style."""
    scene = scenes.describe(scenes.RANGES["cartoon"][0])
    drawn = [scenes.render(scene, style, 32).image.tobytes() for style in scenes.STYLES]
    return hashlib.sha256(b"".join(drawn)).hexdigest()[:16]


def _apart(out: Path, place: Path) -> None:
    """Refuse to write into a source, or to read what is being written."""
    if not place.is_dir():
        return
    ours, theirs = out.resolve(), place.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise UserError(f"{out} and {place} lie inside each other: write to another folder")


def _summary(found: Counter[str]) -> dict[str, Any]:
    return {
        "met": found.total(),
        "kept": found[""],
        "dropped": {kind: n for kind, n in sorted(found.items()) if kind},
    }
