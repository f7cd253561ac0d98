"""Shots from thumbnails: hard cuts, dissolves and fades, found in one pass over a film.

A hard cut is where the colours and the edges change at once, and only there: a flash changes the
colours and comes back, a fast pan changes the edges for many frames. In a dissolve or a fade every
frame is the straight mixture of frames before and after it; a moving picture is not, and where a
slow movement looks alike, moving the blocks of one frame explains the other.

Only the last `_KEEP` thumbnails are held, however long the film is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

THUMB = (64, 36)  # width and height that shots are looked for at
_BINS = 8  # of each channel's histogram
_CHANNELS = (np.arange(3) * _BINS).astype(np.uint8)
_FLASH = 8  # frames that a flash may last
_SIDE = 6  # looks on either side that say how restless the film is here
_MIX = 4  # frames to either side that a frame of a dissolve is the mixture of
_LONGEST = 72  # frames of a dissolve or fade: what is straight for longer is a slow movement
_KEEP = 40
_REACH = (4, 6)  # rows and columns of a thumbnail that a block may have moved


@dataclass(frozen=True)
class Transition:
    """A dissolve or a fade: frames `first` to `end` - 1 show no single picture.

    Attributes:
        kind: "dissolve", "fade out" (to one colour) or "fade in".
    """

    first: int
    end: int
    kind: str


@dataclass
class Look:
    """What is kept of a frame while its neighbours are looked at."""

    number: int
    grey: np.ndarray
    colours: np.ndarray
    edges: np.ndarray
    score: float = 0.0
    step: float = 0.0
    new: float = -1.0
    mixed: bool = False
    gap: int | None = 0


@dataclass
class Shots:
    """What `ShotFinder` found.

    Attributes:
        cuts: the first frame after each hard cut.
        gaps: how many frames each cut may lie earlier, for frames that were not looked at.
        transitions: dissolves and fades, in order.
    """

    cuts: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)

    def starts(self) -> list[int]:
        """The first frame of every shot, from 0; a dissolve changes the shot in its middle."""
        changes = set(self.cuts)
        for i, now in enumerate(self.transitions):
            after = self.transitions[i + 1] if i + 1 < len(self.transitions) else None
            if now.kind == "dissolve":
                changes.add((now.first + now.end) // 2)
            elif now.kind == "fade in":
                changes.add(now.first)
            # Out of one shot and into the next is one change, not a shot of black in between.
            elif not (after and after.kind == "fade in" and after.first - now.end <= _LONGEST):
                changes.add(now.end)
        return [0, *sorted(changes - {0})]


class ShotFinder:
    """Takes the frames of a film one by one and tells its shots at the end.

    Args:
        least: score from 0 to 1 below which nothing is a cut.
        ratio: how far a cut stands out from the frames around it.
    """

    def __init__(self, *, least: float = 0.05, ratio: float = 2.4) -> None:
        self._least, self._ratio = least, ratio
        self._looks: deque[Look] = deque(maxlen=_KEEP)
        self._judged = -1  # number of the last look that cuts were decided up to
        self._mixed = -1
        self._run: list[Look] = []  # first, middle and last look of the mixture under way
        self._before: Look | None = None  # what was seen before it
        self._found = Shots()

    def push(self, number: int, thumb: np.ndarray, gap: int | None = 0) -> None:
        """Look at a frame.

        Args:
            number: of the frame; not every frame need be looked at.
            thumb: (h, w, 3) uint8, luma first, then colour differences; all of one size.
            gap: frames not looked at before it that are of its shot too, perhaps, if one begins
                here; None where it is known that none does.
        """
        look = _look(number, thumb)
        look.gap = gap
        if self._looks:
            look.score = distance(self._looks[-1], look)
            look.step = _size(look.grey - self._looks[-1].grey)
        self._looks.append(look)
        self._decide(number - _FLASH - 1)

    def finish(self) -> Shots:
        """All frames have been seen."""
        if self._looks:
            self._decide(self._looks[-1].number)
            self._end_run(self._looks[-1])
        spans, found = self._found.transitions, self._found
        # A span reaches a little past its dissolve: a cut there is one; at a fade, its very end.
        rims = [4 * (t.kind == "dissolve") for t in spans]
        kept = [
            (cut, gap)
            for cut, gap in zip(found.cuts, found.gaps, strict=True)
            if not any(t.first + r <= cut < t.end - r for t, r in zip(spans, rims, strict=True))
        ]
        return Shots([cut for cut, _ in kept], [gap for _, gap in kept], spans)

    def _decide(self, until: int) -> None:
        looks = list(self._looks)
        for i, look in enumerate(looks):
            if self._judged < look.number <= until:
                self._judged = look.number
                if self._is_cut(looks, i):
                    self._add_cut(looks, i)
                self._mixture(looks, i)

    # ---- hard cuts -------------------------------------------------------------------------------

    def _is_cut(self, looks: list[Look], i: int) -> bool:
        here = looks[i]
        if i == 0 or here.gap is None or here.step < 2.0:
            return False
        sides = [s for s in (looks[max(i - _SIDE, 1) : i], looks[i + 1 : i + 1 + _SIDE]) if s]
        busy = max((median([k.step for k in s]) for s in sides), default=0.0)
        restless = max((median([k.score for k in s]) for s in sides), default=0.0)
        # Either the picture changes far more than around it, or colours and edges both do.
        gap = here.gap + 1
        jumps = here.step >= (1.5 + 0.5 * gap) * busy + 1.0
        turns = here.score >= max(self._least, self._ratio * (restless + 0.02))
        if not jumps and not turns:
            return False
        new = self._new(looks, i)
        near = [
            k
            for k in range(max(i - 3, 1), min(i + 4, len(looks)))
            if 0 < abs(looks[k].number - here.number) <= 3
        ]
        rivals = [k for k in near if looks[k].step > here.step]
        if new < 0.3 + 0.1 * min(gap, 4) or any(self._new(looks, k) >= new for k in rivals):
            return False
        around = [
            self._new(looks, k) for k in range(max(i - 3, 1), min(i + 4, len(looks))) if k != i
        ]
        if not turns and new < median(around or [0.0]) + 0.25:
            return False
        # The picture from before is back soon, or this one was here just before: a flash.
        back = [k for k in looks[i + 1 :] if k.number - here.number < _FLASH]
        gone = [k for k in looks[: i - 1] if here.number - k.number <= _FLASH]
        pairs = [(looks[i - 1], k) for k in back] + [(k, here) for k in gone]
        alike = [(a, b) for a, b in pairs if np.abs(a.grey - b.grey).mean() < 0.8 * here.step]
        return all(changed(a.grey, b.grey) > 0.5 * new for a, b in alike)

    def _add_cut(self, looks: list[Look], i: int) -> None:
        """Of cuts that only restless frames lie between, one is real: the strongest."""
        here, found = looks[i], self._found
        last = next((k for k, look in enumerate(looks) if found.cuts[-1:] == [look.number]), i)
        if last < i and here.number - looks[last].number <= _FLASH:
            between = [self._new(looks, k) for k in range(last + 1, i)]
            if not between or median(between) > 0.3:
                if looks[last].score >= here.score:
                    return
                found.cuts.pop()
                found.gaps.pop()
        found.cuts.append(here.number)
        found.gaps.append(here.gap or 0)

    def _new(self, looks: list[Look], i: int) -> float:
        if looks[i].new < 0:
            looks[i].new = changed(looks[i - 1].grey, looks[i].grey)
        return looks[i].new

    # ---- dissolves and fades ---------------------------------------------------------------------

    def _mixture(self, looks: list[Look], i: int) -> None:
        here = looks[i]
        before = next((k for k in reversed(looks[:i]) if here.number - k.number >= _MIX), None)
        after = next((k for k in looks[i + 1 :] if k.number - here.number >= _MIX), None)
        if before is None or after is None:
            return
        way = after.grey - before.grey
        whole = _size(way)
        if whole >= 4.0:
            way *= (here.number - before.number) / (after.number - before.number)
            here.mixed = _size(here.grey - before.grey - way) <= 0.36 * whole
        if here.mixed and not self._run:
            self._before = before
            self._run = [here, here, here]
        elif here.mixed:
            self._run[2] = here
            if here.number - self._run[0].number <= 2 * (self._run[1].number - self._run[0].number):
                return
            self._run[1] = here
        elif self._run and here.number - self._run[2].number > 2:
            self._end_run(here)

    def _end_run(self, after: Look) -> None:
        if not self._run:
            return
        first, middle, last = self._run
        before, self._run, self._before = self._before, [], None
        assert before is not None
        if not 2 <= last.number - first.number <= _LONGEST:
            return
        flat = [float(k.grey.std()) < 5.0 for k in (before, after)]
        if flat[0] and flat[1]:
            return
        kind = "fade in" if flat[0] else "fade out" if flat[1] else "dissolve"
        if kind == "dissolve":
            if changed(before.grey, after.grey) < 0.45:
                return
            ends = float((before.grey.var() + after.grey.var()) / 2)
            if float(middle.grey.var()) > 0.9 * ends:
                return
        begin = max(first.number - 4, 0)
        self._found.transitions.append(Transition(begin, last.number + 6, kind))


def find_cuts(
    thumbs: Iterable[np.ndarray], *, least: float = 0.05, ratio: float = 2.4
) -> list[int]:
    """The first frames of new shots after hard cuts.

    Args:
        thumbs: (h, w, 3) uint8 RGB, one a frame, all of one size.
        least: score from 0 to 1 below which nothing is a cut.
        ratio: how far a cut stands out from the frames around it.
    """
    finder = ShotFinder(least=least, ratio=ratio)
    for number, thumb in enumerate(thumbs):
        finder.push(number, _to_yuv(thumb))
    return finder.finish().cuts


def distance(a: Look, b: Look) -> float:
    """(change of the colour histogram) × (1 − correlation of the edges), 0 to 2."""
    colours = 0.5 * float(np.abs(a.colours - b.colours).sum())
    return colours * (1.0 - float(a.edges @ b.edges))


def changed(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the contrast in two pictures that moved blocks of the other do not explain.

    Args:
        a, b: (h, w) float grey levels from 0 to 255; sides multiples of 4.
    """
    return max(_unexplained(a, b), _unexplained(b, a))


def _unexplained(a: np.ndarray, b: np.ndarray) -> float:
    down, across = _REACH
    height, width = a.shape
    # Whole levels in 16 bits hold all that is summed here, at twice the speed of floats.
    padded = np.pad(b.astype(np.int16), ((down, down), (across, across)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width))
    off = windows[::2, ::2] - a.astype(np.int16)
    np.abs(off, out=off)
    # Sums over 4 × 4 by slices: many times faster than a mean over two short axes.
    off = off[:, :, ::4] + off[:, :, 1::4] + off[:, :, 2::4] + off[:, :, 3::4]
    off = off[..., ::4] + off[..., 1::4] + off[..., 2::4] + off[..., 3::4]
    best = off.min((0, 1)) / 16
    tiles = a.reshape(height // 4, 4, width // 4, 4)
    contrast = np.abs(tiles - tiles.mean((1, 3), keepdims=True)).mean((1, 3))
    # A flat block has no contrast of its own: its level must be found again. Dark pictures differ
    # by fewer levels than bright ones.
    least = min(max(0.12 * float(a.std()), 1.5), 6.0)
    missed = best > np.maximum(0.6 * contrast, least)
    # What is flat in both, as bars are, says nothing.
    weight = np.sqrt(np.maximum(contrast, best)) + 0.1
    return float((weight * missed).sum() / weight.sum())


def _look(number: int, thumb: np.ndarray) -> Look:
    levels = (thumb[::2, 1::2] >> 5) + _CHANNELS
    colours = np.bincount(levels.ravel(), minlength=3 * _BINS) / levels.size
    grey = thumb[..., 0].astype(np.float32)
    corner = grey[:-1, :-1]
    edges = np.hypot(grey[:-1, 1:] - corner, grey[1:, :-1] - corner).ravel()
    edges -= edges.sum() / len(edges)
    edges /= math.sqrt(float(edges @ edges)) + 1e-6
    return Look(number, grey, colours, edges)


def _size(difference: np.ndarray) -> float:
    return float(np.abs(difference).sum()) / difference.size


def _to_yuv(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = (rgb[..., c].astype(np.float32) for c in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = (luma, 128 + 0.564 * (blue - luma), 128 + 0.713 * (red - luma))
    return np.stack(planes, -1).round().clip(0, 255).astype(np.uint8)
