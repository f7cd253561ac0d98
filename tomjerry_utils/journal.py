"""The journal of a collection: what was seen of each picture, and the rows of the present call.

One SQLite file beside the pictures, so that memory does not grow with the collection, a killed run
goes on where it was, and a later call reads only what is new.
"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.sources import Row, one_line

JOURNAL = ".journal.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    name TEXT PRIMARY KEY, key TEXT, error TEXT, sha256 TEXT, measures TEXT,
    hashes BLOB, features BLOB, thumb BLOB, there INTEGER, read_as TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (place INTEGER PRIMARY KEY, name TEXT, known TEXT, verdict TEXT);
"""


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
        read_as: what was decided while the file was read, see `picture_files`; "" for most.
    """

    error: str = ""
    sha256: str = ""
    measures: dict[str, Any] | None = None
    hashes: bytes = b""
    features: bytes = b""
    thumb: bytes = b""
    there: bool = False
    read_as: str = ""


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
            columns = {column[1] for column in self._db.execute("PRAGMA table_info(pictures)")}
            if "read_as" not in columns:  # of a journal that an earlier version began
                self._db.execute("ALTER TABLE pictures ADD COLUMN read_as TEXT")
        except sqlite3.OperationalError:
            self._db.close()
            raise
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
            ":there OR COALESCE((SELECT there FROM pictures WHERE name = :name), 0), :read_as)",
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
            Seen(
                error or "",
                sha256 or "",
                json.loads(measures) if measures else {},
                read_as=read_as or "",
            )
            for error, sha256, measures, read_as in self._db.execute(
                "SELECT error, sha256, measures, read_as FROM rows "
                "LEFT JOIN pictures USING (name) WHERE place >= ? AND place < ? ORDER BY place",
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
