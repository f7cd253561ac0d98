"""Films: where their shots, dissolves and borders are, and which frames are worth keeping.

One fast pass over a film finds all of this (`open_film`); a second one reads only the frames that
`Film.sample` chose (`Film.pictures`).
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tomjerry_utils import UserError
from tomjerry_utils.film_checks import MIXED, Borders, Marks, is_card
from tomjerry_utils.film_frames import (
    Glance,
    Index,
    look_through,
    read_frames,
    read_index,
    read_pictures,
)
from tomjerry_utils.runs import atomic_path
from tomjerry_utils.shots import THUMB, ShotFinder, Transition, find_cuts

__all__ = [
    "THUMB",
    "VIDEO_SUFFIXES",
    "Film",
    "Marks",
    "ShotFinder",
    "find_cuts",
    "open_film",
    "read_frames",
]

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".mpg", ".mpeg", ".ogv", ".wmv"),
    *(".ts", ".flv"),
)
_PROBES_S = 0.5  # seconds between two frames that borders and writing are looked for on
_MARKS_S = 0.2  # seconds between two frames that may be kept
_CHEAP = 6  # frames after a key frame that are as cheap to read as any
_AWAY = 2  # frames at each end of a shot that are kept only if there is nothing else


@dataclass
class Film:
    """What one pass over a film tells.

    Attributes:
        path: the file.
        times: seconds of each frame from the film's first.
        cuts: the first frame of every shot; the first of them is 0.
        hard: the first frame after each hard cut; the other shots begin in a dissolve or fade.
        transitions: dissolves and fades; no frame in them is kept.
        borders: rows or columns at the top, bottom, left and right that are no picture.
        marks: what was seen of the frames that were looked at.
        index: how to find a frame in the file.
    """

    path: Path
    times: Sequence[float] = field(repr=False)
    cuts: list[int]
    hard: list[int] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    borders: tuple[int, int, int, int] = (0, 0, 0, 0)
    marks: Marks | None = field(default=None, repr=False)
    index: Index | None = field(default=None, repr=False)
    _why: list[str] | None = field(default=None, repr=False)

    def shot_of(self, frame: int) -> int:
        """The shot, from 0, that a frame is in."""
        return bisect.bisect_right(self.cuts, frame) - 1

    def sample(self, every_s: float) -> list[int]:
        """Frames to keep: one for each `every_s` of a shot, at least one, away from its ends.

        Black, blurred and combed frames, writing and dissolves are passed over, as long as there is
        anything else nearby.
        """
        return [frame for frame, reason in self.choose(every_s) if not reason]

    def choose(self, every_s: float) -> list[tuple[int, str]]:
        """As `sample`, and with a reason the frames of the places where none is worth keeping."""
        chosen: list[tuple[int, str]] = []
        ends = [*self.cuts[1:], len(self.times)]
        for first, end in zip(self.cuts, ends, strict=True):
            seconds = self.times[end - 1] - self.times[first]
            count = min(max(1, round(seconds / every_s)), end - first)
            edges = [self._at(self.times[first] + seconds * k / count) for k in range(count)]
            edges = [max(a, first) for a in edges] + [end]
            for begin, stop in itertools.pairwise(edges):
                found = self._best(begin, stop, first, end, count == 1) if stop > begin else None
                if found and (not chosen or found[0] > chosen[-1][0]):
                    chosen.append(found)
        return chosen

    def pictures(self, wanted: Sequence[int]) -> Iterator[np.ndarray | None]:
        """Frames in full quality, upright, without borders: (H, W, 3) uint8, or None if damaged.

        Args:
            wanted: ascending numbers of frames.

        Raises:
            UserError: the film is gone.
        """
        index = self.index or read_index(self.path)
        if not self.marks or not set(self.marks.number).issuperset(wanted):
            index = replace(index, skip="DEFAULT")
        return read_pictures(self.path, index, wanted, self.borders)

    def save(self, path: Path) -> None:
        """Write down what was found, as one npz file."""
        index, marks = self.index or Index(array("q"), array("q"), 0.0), self.marks or Marks()
        spans = [(t.first, t.end, _KINDS.index(t.kind)) for t in self.transitions]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                times=np.asarray(self.times),
                cuts=np.asarray(self.cuts),
                hard=np.asarray(self.hard, np.int64),
                borders=np.asarray(self.borders),
                transitions=np.asarray(spans, np.int64).reshape(-1, 3),
                stamps=np.asarray(index.stamps, np.int64),
                keys=np.asarray(index.keys, np.int64),
                unit=np.asarray(index.unit),
                stretch=np.asarray(index.stretch),
                skip=np.asarray(index.skip),
                **{f"mark_{name}": np.asarray(values) for name, values in vars(marks).items()},
            )

    @staticmethod
    def load(saved: Path, path: Path) -> Film:
        """The film at `path`, as `save` wrote it down."""
        with np.load(saved, allow_pickle=False) as found:
            top, bottom, left, right = found["borders"].tolist()
            marks = Marks()
            for name, values in vars(marks).items():
                values.frombytes(found[f"mark_{name}"].astype(values.typecode).tobytes())
            return Film(
                path,
                array("d", found["times"].tobytes()),
                found["cuts"].tolist(),
                found["hard"].tolist(),
                [Transition(a, b, _KINDS[k]) for a, b, k in found["transitions"].tolist()],
                (top, bottom, left, right),
                marks,
                Index(
                    array("q", found["stamps"].tobytes()),
                    array("q", found["keys"].tobytes()),
                    float(found["unit"]),
                    float(found["stretch"]),
                    "NONREF" if str(found["skip"]) == "NONREF" else "DEFAULT",
                ),
            )

    def _at(self, time: float) -> int:
        return bisect.bisect_left(self.times, time - 1e-9)

    def _best(
        self, begin: int, stop: int, first: int, end: int, only: bool
    ) -> tuple[int, str] | None:
        """The frame of a stretch that is kept, or one of it with the reason why none is.

        Of those that may be kept, the nearest to the middle. One that is the only one of its shot
        need not lie there: it is the one that costs least to decode, since all from a key frame on
        must be; the first few after a key frame count as equal.
        """
        middle = begin + (stop - begin) // 2
        if self.marks is None or not self.marks.number:
            return middle, ""
        if self._why is None:
            self._why = self.marks.reasons(self.cuts)
        number = self.marks.number
        span = range(bisect.bisect_left(number, begin), bisect.bisect_left(number, stop))
        if not span:
            # A shot so short that none of its frames was judged.
            return (middle, MIXED if self._mixed(middle) else "") if begin == first else None
        keys = self.index.keys if self.index else ()

        def worth(i: int) -> tuple[int, int, int]:
            frame = number[i]
            place = bisect.bisect_right(keys, frame) - 1
            after = frame - keys[place] if only and place >= 0 else 0
            return max(after - _CHEAP, 0), abs(frame - middle), frame

        near = sorted(span, key=worth)
        inner = [i for i in near if first + _AWAY <= number[i] < end - _AWAY] or near
        free = [i for i in inner if not self._mixed(number[i])]
        if not free:
            return number[near[0]], MIXED
        good = next((i for i in free if not self._why[i]), None)
        return (number[free[0]], self._why[free[0]]) if good is None else (number[good], "")

    def _mixed(self, frame: int) -> bool:
        at = bisect.bisect_right(self.transitions, frame, key=lambda t: t.first) - 1
        return at >= 0 and frame < self.transitions[at].end


_KINDS = ("dissolve", "fade out", "fade in")


def open_film(path: Path) -> Film:
    """Read a film once, fast, and find its shots, dissolves, borders and unusable frames.

    Raises:
        UserError: no such file, not a film, or no frame in it can be read.
    """
    index = read_index(path)
    each = replace(index, sizes=array("q"))
    whole = replace(each, skip="DEFAULT")
    for attempt in (index, each, whole, Index(array("q"), array("q"), 0.0, index.stretch)):
        try:
            return _scan(path, attempt)
        except LookupError:
            continue  # its time stamps do not fit its frames: count them
    raise UserError(f"{path}: its frames have no order: convert it to mp4")


def _scan(path: Path, index: Index) -> Film:
    times = _times(index)
    finder, glance, marks, borders = ShotFinder(), Glance(), Marks(), Borders()
    probed = marked = -1.0
    for number, frame, gap in look_through(path, index):
        if not index.stamps:
            start = times[-1] + 0.04 if times else 0.0
            told = float(frame.time) if frame.time is not None else start
            times.append(told if not times or told > times[-1] else start)
        luma, thumb = glance.look(frame)
        finder.push(number, thumb, gap)
        probe = times[number] - probed >= _PROBES_S or probed < 0
        if probe:
            probed = times[number]
        if probe or times[number] - marked >= _MARKS_S:
            marked = times[number]
            marks.add(number, luma, thumb, is_card(luma) if probe else None)
        if probe and marks.spread[-1] >= 8:
            borders.add(luma)
    if not marks.number:
        raise UserError(f"{path}: no picture in this film can be read: give a film that plays")
    zero = times[0]
    times = array("d", (round(t - zero, 6) for t in times))
    shots = finder.finish()
    shots.cuts = [cut - gap // 2 for cut, gap in zip(shots.cuts, shots.gaps, strict=True)]
    index = replace(index, sizes=array("q"))  # of no use any more
    return Film(
        path, times, shots.starts(), shots.cuts, shots.transitions, borders.find(), marks, index
    )


def _times(index: Index) -> array[float]:
    return array("d", (stamp * index.unit for stamp in index.stamps))
