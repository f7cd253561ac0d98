"""Films: read frames through PyAV, find the cuts between shots.

A cut is where two things change at once, and only there: the colours and the edges. Flashes change
the colours and come back; a fast pan changes the edges for many frames. The threshold adapts to the
frames around.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import UserError

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".mpg", ".mpeg", ".ogv", ".wmv")
THUMB = (64, 36)  # width and height that cuts are looked for at
_BINS = 8  # of each colour's histogram
_LAGS = 8  # frames that a flash may last
_WINDOW = 6  # frames on either side that say how restless the film is here


@dataclass
class Film:
    """What one pass over a film tells.

    Attributes:
        path: the file.
        times: seconds of each frame from the film's first.
        cuts: the first frame of every shot; the first of them is 0.
    """

    path: Path
    times: list[float] = field(repr=False)
    cuts: list[int]

    def shot_of(self, frame: int) -> int:
        """The shot, from 0, that a frame is in."""
        return bisect.bisect_right(self.cuts, frame) - 1

    def sample(self, every_s: float) -> list[int]:
        """Frames to keep: one for each `every_s` of a shot, at least one, away from its ends."""
        chosen: list[int] = []
        for first, end in zip(self.cuts, [*self.cuts[1:], len(self.times)], strict=True):
            seconds = self.times[end - 1] - self.times[first]
            count = min(max(1, round(seconds / every_s)), end - first)
            chosen += [first + int((k + 0.5) * (end - first) / count) for k in range(count)]
        return chosen


def open_film(path: Path) -> Film:
    """Read a film once, at thumbnail size, and find its shots.

    Raises:
        UserError: no such file, not a film, or no frame in it can be read.
    """
    times: list[float] = []

    def thumbs() -> Iterator[np.ndarray]:
        for _, frame in read_frames(path):
            start = times[-1] + 0.04 if times else 0.0
            times.append(float(frame.time) if frame.time is not None else start)
            small = frame.reformat(width=THUMB[0], height=THUMB[1], format="rgb24")
            yield small.to_ndarray()

    cuts = find_cuts(thumbs())
    if not times:
        raise UserError(f"{path}: no picture in this film can be read: give a film that plays")
    return Film(path, [round(t - times[0], 6) for t in times], [0, *cuts])


def read_frames(path: Path) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of a film, numbered from 0; a damaged stretch is skipped.

    Raises:
        UserError: no such file, or not a film.
    """
    import av

    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise UserError(f"no film {path}: check the path") from None
    except av.FFmpegError as error:
        raise UserError(f"{path}: not a film that can be read ({error.strerror})") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: holds no picture track: give a film")
        stream = container.streams.video[0]
        number = 0
        packets = container.demux(stream)
        while True:
            frames: list[Any] = []
            try:
                frames = list(next(packets).decode())
            except StopIteration:
                return
            except av.EOFError:
                return
            except av.FFmpegError:
                continue
            for frame in frames:
                yield number, frame
                number += 1


def find_cuts(
    thumbs: Iterable[np.ndarray], *, least: float = 0.08, ratio: float = 2.4
) -> list[int]:
    """The first frames of new shots.

    The score of a frame is (change of the colour histogram) × (1 − correlation of the edges), both
    against the frame before. A cut is a peak of at least `least` and `ratio` times as high as the
    film's restlessness on either side; if the picture from before is back within `_LAGS` frames it
    was a flash.

    Args:
        thumbs: (h, w, 3) uint8, one a frame, all of one size.
        least: score from 0 to 1 below which nothing is a cut.
        ratio: how far a cut stands out from the frames around it.
    """
    recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_LAGS + 1)
    rows: list[np.ndarray] = []
    for thumb in thumbs:
        recent.append(_signature(thumb))
        # rows[i][k] is the distance from frame i - k - 1 to frame i.
        row = np.ones(_LAGS, np.float32)
        for lag in range(1, len(recent)):
            row[lag - 1] = _distance(recent[-1 - lag], recent[-1])
        rows.append(row)
    if len(rows) < 2:
        return []
    table = np.stack(rows)
    score = table[:, 0].copy()
    score[0] = 0.0
    return [i for i in range(1, len(score)) if _is_cut(i, score, table, least, ratio)]


def _is_cut(i: int, score: np.ndarray, table: np.ndarray, least: float, ratio: float) -> bool:
    if score[i] < least or score[i] < score[max(i - 3, 1) : i + 4].max():
        return False
    sides = (score[max(i - _WINDOW, 1) : i], score[i + 1 : i + 1 + _WINDOW])
    restless = max((float(np.median(side)) for side in sides if len(side)), default=0.0)
    if score[i] < ratio * (restless + 0.02):
        return False
    after = [table[i + k, k] for k in range(1, _LAGS) if i + k < len(table)]
    before = [table[i, k] for k in range(1, min(_LAGS, i))]
    return min([*after, *before], default=1.0) > 0.3 * score[i]


def _signature(thumb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour histogram (3 × bins, sums to 1) and the unit vector of edge strengths."""
    levels = thumb.astype(np.int64) * _BINS // 256 + np.arange(3) * _BINS
    colours = np.bincount(levels.ravel(), minlength=3 * _BINS) / levels.size
    grey = thumb.astype(np.float32).mean(2)
    edges = np.hypot(np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]).ravel()
    edges -= edges.mean()
    return colours, edges / (np.linalg.norm(edges) + 1e-6)


def _distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    colours = 0.5 * float(np.abs(a[0] - b[0]).sum())
    return colours * (1.0 - float(a[1] @ b[1]))
