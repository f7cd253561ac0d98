"""Reading what the sources name: each picture once, in worker processes, into the journal.

What curation needs of a picture is small: its measures, hashes, features and a thumbnail. The
pictures themselves are written at the end, those that are kept and no others.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.journal import Journal, Seen
from tomjerry_utils.picture_files import PictureFile, read_picture
from tomjerry_utils.runs import hash_file
from tomjerry_utils.sources import Batch, Row, one_line
from tomjerry_utils.workers import Workers

VERSION = 2  # of what is noted of a picture
THUMB = 256  # px, the short side of a thumbnail; below, two drawings of one animal look the same
_PART = 8  # files a worker is given at a time


def take_in(
    batches: Iterable[Batch],
    journal: Journal,
    out: Path,
    *,
    short_side: int,
    place: Callable[[Row], None],
    note: Callable[[Batch], None],
) -> None:
    """Read every picture that the journal does not know yet.

    Args:
        batches: from the functions in `sources`.
        out: where the pictures of batches that are `sure` are written at once.
        short_side: larger pictures are reduced to this; none is enlarged.
        place: gives a row its file name.
        note: told each batch, in order.
    """
    from tomjerry_utils.progress import progress

    first = 0
    journal.begin()
    with Workers() as pool, progress(iter(()), "collect", unit="picture") as bar:
        for batch in batches:
            for row in batch.rows:
                place(row)
            note(batch)
            todo = [
                i
                for i, row in enumerate(batch.rows)
                if not row["reason"] and not _known(journal, out, row, batch.sure, short_side)
            ]
            work = jobs(batch, todo, out, short_side, writing=False)
            for indices, seen in pool.each(look, work):
                with journal.writing():
                    for i, one in zip(indices, seen, strict=True):
                        row = batch.rows[i]
                        journal.add(row["file_name"], key_of(row, short_side), one)
            with journal.writing():
                journal.add_rows(first, batch.rows)
            first += len(batch.rows)
            bar.update(len(batch.rows))


def key_of(row: Row, short_side: int) -> str:
    """Changes when the picture behind a row does, or what is made of it."""
    return f"{VERSION} {row['source']} {row['_key']} {short_side}"


def _known(journal: Journal, out: Path, row: Row, sure: bool, short_side: int) -> bool:
    seen = journal.seen(row["file_name"], key_of(row, short_side))
    if seen is None:
        return False
    return not sure or bool(seen.error) or holds(out / row["file_name"], seen.sha256)


def holds(path: Path, sha256: str) -> bool:
    """Whether a file is there with these bytes."""
    return bool(sha256) and path.is_file() and hash_file(path) == sha256


Job = tuple[list[int], tuple[Any, ...]]


def jobs(
    batch: Batch, todo: Sequence[int], out: Path, short_side: int, *, writing: bool
) -> Iterator[Job]:
    """(indices, arguments of `look` or `write_all`): files by the handful, other pictures singly.

    Args:
        todo: indices of the batch's rows.
        writing: all pictures go to their files, not only those that are `sure`.
    """
    put = writing or batch.sure
    targets = [str(out / row["file_name"]) if put else "" for row in batch.rows]
    if batch.paths is not None:
        for start in range(0, len(todo), _PART):
            part = list(todo[start : start + _PART])
            paths = [batch.paths[i] for i in part]
            yield part, (paths, [targets[i] for i in part], short_side)
    elif todo:
        for i, picture in zip(todo, batch.load(todo), strict=True):
            yield [i], ([picture], [targets[i]], short_side)


def look(
    pictures: Sequence[np.ndarray | UserError | Path], targets: Sequence[str], short_side: int
) -> list[Seen]:
    """What is kept of some pictures; each is looked at by itself, so that batches do not matter.

    Args:
        pictures: (H, W, 3) uint8, or the file, or why it could not be read.
        targets: where each is written at once; "" for those that must be curated first.
    """
    return [_look(p, target, short_side) for p, target in zip(pictures, targets, strict=True)]


def _look(source: np.ndarray | UserError | Path, target: str, short_side: int) -> Seen:
    from tomjerry_utils import near_duplicates, screens

    found = _read(source)
    if isinstance(found, UserError):
        return Seen(error=one_line(found))
    picture, read_as = found.array, "; ".join(found.notes)
    image = reduced(picture, short_side)
    content, shown = encode(image), np.asarray(image)
    sha256 = hashlib.sha256(content).hexdigest()
    hashes = near_duplicates.perceptual_hashes(shown).tobytes()
    if target:
        write(Path(target), content)
        return Seen("", sha256, None, hashes, there=True, read_as=read_as)
    # A strip that is longer than a JPEG may be is shown as another shape.
    width, height = (min(side, 4 * THUMB) for side in _short(image.size, THUMB))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    # One picture at a time: in a batch of others the last digits could differ.
    scores, features = screens.score([picture])
    measures = asdict(screens.measure(picture)) | asdict(scores[0])
    kept = features[0].astype(np.float16).tobytes()
    return Seen("", sha256, measures, hashes, kept, buffer.getvalue(), read_as=read_as)


def write_all(
    pictures: Sequence[np.ndarray | UserError | Path], targets: Sequence[str], short_side: int
) -> list[str]:
    """Write some pictures; the SHA-256 of each file, "" for one that cannot be read."""
    found = []
    for source, target in zip(pictures, targets, strict=True):
        picture = _read(source)
        if isinstance(picture, UserError):
            found.append("")
            continue
        content = encode(reduced(picture.array, short_side))
        write(Path(target), content)
        found.append(hashlib.sha256(content).hexdigest())
    return found


def _read(source: np.ndarray | UserError | Path) -> PictureFile | UserError:
    if isinstance(source, UserError):
        return source
    try:
        return read_picture(source) if isinstance(source, Path) else PictureFile(source)
    except (UserError, OSError) as error:
        return UserError(one_line(error))


def reduced(picture: np.ndarray, short_side: int) -> Image.Image:
    """The picture as it is written: its short side at most `short_side`."""
    image = Image.fromarray(picture)
    if min(image.size) <= short_side:
        return image
    return image.resize(_short(image.size, short_side), Image.Resampling.LANCZOS)


def _short(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(size))  # none is enlarged
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(image: Image.Image) -> bytes:
    """A PNG; weakly compressed, which takes a quarter of the time for a tenth more bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    # Renamed but not synced to disk: the hash in the journal finds a torn file after a power cut.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
