"""Reading what the sources name: each picture once, in worker processes, into a journal on disk.

What curation needs of a picture is small: its measures, hashes, features and a thumbnail. These go
into one SQLite file, so that memory does not grow with the collection, a killed run goes on where
it was, and a later call reads only what is new. The pictures themselves are written at the end,
those that are kept and no others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.images import load_image
from tomjerry_utils.runs import hash_file
from tomjerry_utils.sources import Batch, Row, one_line

JOURNAL = ".journal.sqlite"
THUMB = 128  # px, the short side of a thumbnail
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    name TEXT PRIMARY KEY, key TEXT, error TEXT, sha256 TEXT, measures TEXT,
    hashes BLOB, features BLOB, thumb BLOB, there INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (place INTEGER PRIMARY KEY, name TEXT, known TEXT, verdict TEXT);
"""
_FEW = 24  # pictures that are not worth starting processes for
_PART = 8  # files a worker is given at a time


@dataclass(frozen=True)
class Seen:
    """What is kept of a picture that was read.

    Attributes:
        error: why it could not be read, or "".
        sha256: of the picture's file, which is written once it is known to be kept.
        measures: of `screens.measure` and `screens.score`; none where nothing is screened.
        hashes: perceptual, (K,) uint64.
        features: (1280,) float16 of EfficientNet-Lite0, or none for pictures not screened.
        thumb: a JPEG, its short side `THUMB`; none where the picture itself is written at once.
        there: whether a file of that name was written, of this picture or one before it.
    """

    error: str = ""
    sha256: str = ""
    measures: dict[str, Any] | None = None
    hashes: bytes = b""
    features: bytes = b""
    thumb: bytes = b""
    there: bool = False


# ---- the journal ---------------------------------------------------------------------------------


class Journal:
    """The pictures seen so far, and the rows of the present call in order.

    What is committed survives the end of the process, whatever ends it. Pictures of earlier calls
    stay, so that a source that comes back costs nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(
                f"{path}: cannot be used ({one_line(error)}): remove it to read all anew"
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All or nothing of what is written inside."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def begin(self) -> None:
        """Forget the rows of the call before."""
        self._db.execute("DELETE FROM rows")

    def seen(self, name: str, key: str) -> Seen | None:
        """What is known of a picture, if its source has not changed; without the large parts."""
        found = self._db.execute(
            "SELECT error, sha256 FROM pictures WHERE name = ? AND key = ?", (name, key)
        ).fetchone()
        return None if found is None else Seen(*found)

    def add(self, name: str, key: str, seen: Seen) -> None:
        values = asdict(seen) | {"measures": json.dumps(seen.measures or {})}
        self._db.execute(
            "INSERT OR REPLACE INTO pictures VALUES (:name, :key, :error, :sha256, :measures, "
            ":hashes, :features, :thumb, "
            ":there OR COALESCE((SELECT there FROM pictures WHERE name = :name), 0))",
            values | {"name": name, "key": key},
        )

    def add_rows(self, first: int, rows: Iterable[Row]) -> None:
        """Rows of the present call, from place `first` on."""
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, '')",
            (
                (first + i, row["file_name"], json.dumps(row, ensure_ascii=False))
                for i, row in enumerate(rows)
            ),
        )

    def written(self, name: str, sha256: str) -> bool:
        """A picture's file is there; False, and not noted, where it is another picture."""
        return bool(
            self._db.execute(
                "UPDATE pictures SET there = 1 WHERE name = ? AND sha256 = ?", (name, sha256)
            ).rowcount
        )

    def files(self, kept: np.ndarray) -> Iterator[tuple[int, str, str]]:
        """(place, name, SHA-256) of the rows that are kept.

        Args:
            kept: (N,) bool.
        """
        for place, name, sha256 in self._db.cursor().execute(
            "SELECT place, name, sha256 FROM rows JOIN pictures USING (name) ORDER BY place"
        ):
            if kept[place]:
                yield place, name, sha256

    def decide(self, place: int, verdict: Row) -> None:
        """What the manifest says of a row beyond what its source knew."""
        self._db.execute(
            "UPDATE rows SET verdict = ? WHERE place = ?",
            (json.dumps(verdict, ensure_ascii=False), place),
        )

    def count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    def rows(self) -> Iterator[Row]:
        """The rows in order, with what was decided of them."""
        for known, verdict in self._db.cursor().execute(
            "SELECT known, verdict FROM rows ORDER BY place"
        ):
            yield json.loads(known) | (json.loads(verdict) if verdict else {})

    def pictures(self) -> Iterator[tuple[Row, Seen]]:
        """The rows in order as their sources gave them, and what was seen of their pictures."""
        for known, error, sha256, measures, hashes in self._db.cursor().execute(
            "SELECT known, error, sha256, measures, hashes FROM rows "
            "LEFT JOIN pictures USING (name) ORDER BY place"
        ):
            told = json.loads(measures) if measures else {}
            yield json.loads(known), Seen(error or "", sha256 or "", told, hashes or b"")

    def notes(self, first: int, count: int) -> list[Seen]:
        """What was seen of some rows, from place `first` on, without the large parts."""
        return [
            Seen(error or "", sha256 or "", json.loads(measures) if measures else {})
            for error, sha256, measures in self._db.execute(
                "SELECT error, sha256, measures FROM rows LEFT JOIN pictures USING (name) "
                "WHERE place >= ? AND place < ? ORDER BY place",
                (first, first + count),
            )
        ]

    def features(self, names: Sequence[str]) -> np.ndarray:
        """(N, 1280) float32 of some pictures; zeros where one has none."""
        from tomjerry_utils.features import WIDTH

        out = np.zeros((len(names), WIDTH), np.float32)
        for i, name in enumerate(names):
            blob = self._blob("features", name)
            if blob:
                out[i] = np.frombuffer(blob, np.float16)
        return out

    def thumb(self, name: str) -> np.ndarray | None:
        """The thumbnail of a picture, (h, w, 3) uint8; None where the picture itself is written,
        and where it could not be read."""
        blob = self._blob("thumb", name)
        return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) if blob else None

    def _blob(self, column: str, name: str) -> bytes:
        found = self._db.execute(
            f"SELECT {column} FROM pictures WHERE name = ?", (name,)
        ).fetchone()
        return bytes(found[0] or b"") if found else b""

    def strangers(self) -> Iterator[str]:
        """Files that an earlier call wrote and this one does not keep."""
        for name, verdict in self._db.cursor().execute(
            "SELECT pictures.name, verdict FROM pictures LEFT JOIN rows USING (name) WHERE there"
        ):
            if not verdict or not json.loads(verdict)["kept"]:
                yield name

    def forget(self, names: Iterable[str]) -> None:
        """The files of these are gone."""
        self._db.executemany(
            "UPDATE pictures SET there = 0 WHERE name = ?", ((name,) for name in names)
        )


# ---- reading -------------------------------------------------------------------------------------


def take_in(
    batches: Iterable[Batch],
    journal: Journal,
    out: Path,
    *,
    short_side: int,
    place: Callable[[Row], None],
    note: Callable[[Batch], None] = lambda batch: None,
    workers: int | None = None,
) -> None:
    """Read every picture that the journal does not know yet.

    Args:
        batches: from the functions in `sources`.
        out: where the pictures of batches that are `sure` are written at once.
        short_side: larger pictures are reduced to this; none is enlarged.
        place: gives a row its file name.
        note: told each batch, in order.
        workers: processes; None for one a core, 0 for none.
    """
    from tomjerry_utils.progress import progress

    first = 0
    journal.begin()
    with Workers(workers) as pool, progress(iter(()), "collect", unit="picture") as bar:
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
    return f"{row['source']} {row['_key']} {short_side}"


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

    picture = _read(source)
    if isinstance(picture, UserError):
        return Seen(error=one_line(picture))
    image = reduced(picture, short_side)
    content, shown = encode(image), np.asarray(image)
    sha256 = hashlib.sha256(content).hexdigest()
    hashes = near_duplicates.perceptual_hashes(shown).tobytes()
    if target:
        write(Path(target), content)
        return Seen("", sha256, None, hashes, there=True)
    small = image.resize(_short(image.size, THUMB), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    # One picture at a time: in a batch of others the last digits could differ.
    scores, features = screens.score([picture])
    measures = asdict(screens.measure(picture)) | asdict(scores[0])
    kept = features[0].astype(np.float16).tobytes()
    return Seen("", sha256, measures, hashes, kept, buffer.getvalue())


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
        content = encode(reduced(picture, short_side))
        write(Path(target), content)
        found.append(hashlib.sha256(content).hexdigest())
    return found


def _read(source: np.ndarray | UserError | Path) -> np.ndarray | UserError:
    try:
        return load_image(source) if isinstance(source, Path) else source
    except (UserError, OSError) as error:
        return UserError(one_line(error))


def reduced(picture: np.ndarray, short_side: int) -> Image.Image:
    """The picture as it is written: its short side at most `short_side`."""
    image = Image.fromarray(picture)
    if min(image.size) <= short_side:
        return image
    return image.resize(_short(image.size, short_side), Image.Resampling.LANCZOS)


def _short(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
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


# ---- worker processes ----------------------------------------------------------------------------


class Workers:
    """Processes that work through jobs, few at a time, so that memory is bounded.

    They are started with the first `_FEW` jobs gone by, since a handful of pictures is read sooner
    than a process starts; and they end by themselves when the process that started them is killed.
    """

    def __init__(self, count: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        self._count = min(cores, 16) if count is None else count
        self._pool: ProcessPoolExecutor | None = None
        self._done = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(
        self, work: Callable[..., Any], jobs: Iterable[tuple[Any, tuple[Any, ...]]]
    ) -> Iterator[tuple[Any, Any]]:
        """(tag, result) of each (tag, arguments), in order."""
        running: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for tag, arguments in jobs:
                if self._count < 1 or (self._pool is None and self._done < _FEW):
                    self._done += 1
                    yield tag, _alone(work, arguments)
                    continue
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(
                        self._count,
                        mp_context=get_context("spawn"),
                        initializer=_start,
                        initargs=(os.getpid(),),
                    )
                running.append((tag, self._pool.submit(work, *arguments)))
                if len(running) >= 3 * self._count:
                    done, future = running.popleft()
                    yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that reads pictures was ended from outside, perhaps for want of memory: "
                "free some and run the same command again, it goes on"
            ) from None


def _start(parent: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """As a worker would: with one thread, since more can round differently."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*arguments)
    finally:
        torch.set_num_threads(threads)
