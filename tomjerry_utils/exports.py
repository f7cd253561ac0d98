"""`tomjerry export`: the training pictures in the layouts that other translators train on.

- cyclegan: `trainA`, `testA` (cartoon) and `trainB`, `testB` (natural), as CycleGAN, CUT and their
  kin read. Their "test" is our validation split: test scenes are never handed out.
- imagefolder: `train/` and `validation/`, each with `metadata.jsonl`, as
  `datasets.load_dataset("imagefolder", data_dir=...)` reads.
- webdataset: tar files for a cluster, `train-000000.tar` … and `validation-000000.tar` …, as the
  package webdataset and `datasets.load_dataset("webdataset", data_dir=...)` read, and an index
  `shards.json`. A sample is `<key>.png` (the picture), `<key>.txt` (its caption, may be empty),
  `<key>.cls` (the number of its label in `scenes.LABELS`) and `<key>.json` (of the manifest).

An export is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomjerry_utils import UserError, scenes
from tomjerry_utils.runs import atomic_dir, hash_file, write_json, write_jsonl
from tomjerry_utils.sources import Row

if TYPE_CHECKING:
    from tomjerry_utils.collect import Collection

LAYOUTS = ("cyclegan", "imagefolder", "webdataset")
SHARD_MB = 256.0  # of a tar file; what a cluster's storage reads well in one go
INDEX = "shards.json"
_NOTES = ("text", "domain", "class", "label", "action", "facing", "place")
# Only text: a reader that looks at a few samples must see the columns' kinds.
_DETAILS = ("file_name", *_NOTES, "source", "group", "sha256", "origin", "rights")
_RECORD = tarfile.RECORDSIZE


def export(
    collection: Collection,
    out: Path,
    *,
    layout: str,
    shard_mb: float = SHARD_MB,
    seed: int = 0,
) -> dict[str, int]:
    """Write the kept training pictures of a collection in one of `LAYOUTS`.

    Equal collections give equal bytes.

    Args:
        out: a new or empty folder.
        shard_mb: size of a webdataset's tar files in MB (10⁶ bytes); none is larger but for one
            that holds a single larger sample.
        seed: of the order of the samples in a webdataset, which its readers keep.

    Returns:
        folder, or split of a webdataset → number of pictures.

    Raises:
        UserError: unknown layout, `out` holds something, or there is nothing to export.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no layout '{layout}': {', '.join(LAYOUTS)}")
    if shard_mb <= 0:
        raise UserError(f"a tar file of {shard_mb} MB holds nothing: give a size above 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something: give a new folder, or empty it first")
    rows = collection.select()
    if not rows:
        raise UserError(f"{collection.folder}: no training pictures to export")
    with atomic_dir(out) as temporary:
        if layout == "webdataset":
            return _webdataset(collection, rows, temporary, round(shard_mb * 1e6), seed)
        return _folders(collection, rows, temporary, layout)


def _folders(collection: Collection, rows: Sequence[Row], out: Path, layout: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    notes: dict[str, list[Row]] = {}
    for row in rows:
        path = collection.path(row)
        if layout == "cyclegan":
            side = "A" if row["domain"] == "cartoon" else "B"
            folder = f"{'train' if row['split'] == 'train' else 'test'}{side}"
            target = out / folder / path.name
        else:
            folder = row["split"]
            name = f"{row['domain']}/{path.name}"
            target = out / folder / name
            note = {"file_name": name, **{column: row[column] for column in _NOTES}}
            notes.setdefault(folder, []).append(note)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        counts[folder] += 1
    for folder, lines in notes.items():
        write_jsonl(out / folder / "metadata.jsonl", lines)
    return dict(sorted(counts.items()))


# ---- webdataset ----------------------------------------------------------------------------------


def _webdataset(
    collection: Collection, rows: Sequence[Row], out: Path, shard_bytes: int, seed: int
) -> dict[str, int]:
    from tomjerry_utils.progress import progress

    splits: dict[str, Any] = {}
    with progress(len(rows), "export", unit="picture") as bar:
        for split in ("train", "validation"):
            here = [row for row in rows if row["split"] == split]
            # Shuffled once for all, so that every tar holds every class: readers go straight on.
            here.sort(key=lambda row: _rank(row, seed))
            shards = [
                {"file": path.name, "samples": count, "bytes": path.stat().st_size}
                | {"sha256": hash_file(path)}
                for path, count in _shards(collection, here, out, split, shard_bytes, bar)
            ]
            if shards:
                splits[split] = {"samples": len(here), "shards": shards}
    index = {
        "schema": 1,
        "layout": "webdataset",
        "collection": collection.key,
        "order": f"by SHA-256 of '{seed}:<file_name>'",
        "fields": {
            "png": "the picture as collected, RGB",
            "txt": "its caption, UTF-8, empty where there is none",
            "cls": "number of its label in 'labels'",
            "json": f"of the manifest: {', '.join(_DETAILS)}",
        },
        "labels": list(scenes.LABELS),
        "splits": splits,
    }
    write_json(out / INDEX, index)
    return {split: found["samples"] for split, found in splits.items()}


def _rank(row: Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{row['file_name']}".encode()).hexdigest()


def _shards(
    collection: Collection,
    rows: Sequence[Row],
    out: Path,
    split: str,
    shard_bytes: int,
    bar: Any,
) -> Iterator[tuple[Path, int]]:
    """Write the samples of a split; each finished tar and how many it holds."""
    archive: tarfile.TarFile | None = None
    path, number, count = out, 0, 0
    for i, row in enumerate(rows):
        # One sample in memory at a time.
        files = _sample(collection, row)
        room = sum(tarfile.BLOCKSIZE + _blocks(len(content)) for _, content in files)
        if archive is not None and _closed(archive.offset + room) > shard_bytes:
            archive.close()
            yield path, count
            archive, number, count = None, number + 1, 0
        if archive is None:
            path = out / f"{split}-{number:06d}.tar"
            archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for suffix, content in files:
            # No owner, no time of day: TarInfo's defaults. A key must hold no dot.
            member = tarfile.TarInfo(f"{split}-{i:08d}{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archive.members.clear()  # type: ignore[attr-defined]  # it keeps all it has written
        count += 1
        bar.update()
    if archive is not None:
        archive.close()
        yield path, count


def _sample(collection: Collection, row: Row) -> list[tuple[str, bytes]]:
    """(suffix, content) of the files of one sample, in the order of their suffixes."""
    path = collection.path(row)
    note = {column: row[column] or "" for column in _DETAILS}
    return [
        (".cls", str(scenes.LABELS.index(row["label"])).encode()),
        (".json", json.dumps(note, ensure_ascii=False, sort_keys=True).encode()),
        (path.suffix.lower(), path.read_bytes()),
        (".txt", str(row["text"] or "").encode()),
    ]


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _closed(size: int) -> int:
    """Bytes of a tar that holds `size`, with the zeros that end it."""
    return -(-(size + 2 * tarfile.BLOCKSIZE) // _RECORD) * _RECORD
