"""Which frames of a film are worth keeping, and where its picture ends.

Of every frame looked at five bytes are kept, so that hours of film fit into memory. All measures
are ratios or counts within one frame; what is blurred is told against the rest of its shot.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_LINES = 24  # rows and columns of a frame that sharpness and combing are measured on
_STATIC = 14  # levels that a pixel of a border may vary over a whole film, by its compression
_DEEPEST = 0.4  # share of a frame's height or width that a border may take on one side
_CARD = (90, 160)  # rows and columns at which writing is looked for

BLACK = "black: nothing is shown"
FLAT = "empty: one flat colour"
CARD = "title card or credits: writing on a plain ground"
COMBED = "combed: two fields of an interlaced film in one frame"
BLURRED = "blurred: far softer than its shot or film"
MIXED = "dissolve or fade: the whole shot lies in it"


@dataclass
class Marks:
    """What is remembered of the frames looked at, a few bytes for each.

    Attributes:
        number: of the frame.
        light: median luma.
        spread: luma between the 2nd and 98th percentile, in the middle of the frame.
        sharp: how steep edges are: 255 for steps from one pixel to the next.
        comb: share of pixels in a comb, in 1/1000, at most 255.
        card: 2 where there is writing on a plain ground, 1 where not, 0 where nobody looked.
    """

    number: array[int] = field(default_factory=lambda: array("L"))
    light: array[int] = field(default_factory=lambda: array("B"))
    spread: array[int] = field(default_factory=lambda: array("B"))
    sharp: array[int] = field(default_factory=lambda: array("B"))
    comb: array[int] = field(default_factory=lambda: array("B"))
    card: array[int] = field(default_factory=lambda: array("B"))

    def add(self, number: int, luma: np.ndarray, thumb: np.ndarray, card: bool | None) -> None:
        """Remember a frame.

        Args:
            luma: (H, W) uint8.
            thumb: (h, w, 3) uint8, luma first.
            card: what `is_card` says; None if it was not asked.
        """
        h, w = thumb.shape[:2]
        inner = np.sort(thumb[h // 4 : h - h // 4, w // 4 : w - w // 4, 0], axis=None)
        few = len(inner) // 50
        self.number.append(number)
        self.light.append(int(inner[len(inner) // 2]))
        self.spread.append(int(inner[-1 - few]) - int(inner[few]))
        self.sharp.append(round(255 * sharpness(luma)))
        self.comb.append(min(255, round(1000 * combing(luma))))
        self.card.append(0 if card is None else 1 + card)

    def reasons(self, starts: Sequence[int]) -> list[str]:
        """Why each frame is not worth keeping; "" where it is.

        Args:
            starts: first frames of the shots, ascending, from 0.
        """
        number, light, spread, sharp, comb, card = (
            np.asarray(getattr(self, name))
            for name in ("number", "light", "spread", "sharp", "comb", "card")
        )
        flat = spread < 8
        shot = np.searchsorted(starts, number, side="right")
        soft, written = np.zeros(len(number), bool), np.zeros(len(number), bool)
        for first, end in _runs(shot):
            asked = np.flatnonzero(card[first:end])
            if len(asked):  # what was seen last holds until the next look
                last = np.searchsorted(asked, np.arange(end - first), side="right") - 1
                written[first:end] = card[first:end][asked[np.maximum(last, 0)]] == 2
        lively = sharp[~flat]
        if len(lively):
            soft = sharp < 0.4 * float(np.quantile(lively, 0.5))
            for first, end in _runs(shot):
                part = slice(first, end)
                shown = sharp[part][~flat[part]]
                if len(shown):
                    soft[part] |= sharp[part] < 0.5 * float(np.quantile(shown, 0.75))
        told = [(soft, BLURRED), (comb > 6, COMBED), (written, CARD), (flat, FLAT)]
        told.append((flat & (light < 40), BLACK))
        out = [""] * len(number)
        for where, reason in told:
            for i in np.flatnonzero(where):
                out[i] = reason
        return out


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True))


def sharpness(luma: np.ndarray) -> float:
    """How steep the edges are along the softer direction, 0 to 1.

    From the energy of differences over one pixel against those over four: 1 where all edges are
    steps, 0 where all are ramps of four pixels or more, or where nothing changes.
    """
    rows = luma[_spaced(luma.shape[0])].astype(np.float32)
    columns = luma.T[_spaced(luma.shape[1])].astype(np.float32)
    found = []
    for a in (rows, columns):
        near, far = a[:, 1:] - a[:, :-1], a[:, 4:] - a[:, :-4]
        whole = _energy(far)
        if whole > 4.0:
            found.append(4 * _energy(near) / whole)
    # A ramp changes four times as much over four pixels as over one: 4 / 16.
    return min(max((min(found) - 0.25) / 0.75, 0.0), 1.0) if found else 0.0


def _energy(steps: np.ndarray) -> float:
    flat = steps.ravel()
    return float(flat @ flat) / len(flat) if len(flat) else 0.0


def combing(luma: np.ndarray) -> float:
    """The share of pixels whose rows go up and down by turns, as where two fields differ."""
    a = luma.T[_spaced(luma.shape[1])].astype(np.int16)
    step = a[:, 1:] - a[:, :-1]
    up, down = step > 10, step < -10
    turn = (up[:, 1:] & down[:, :-1]) | (down[:, 1:] & up[:, :-1])
    # One field by itself is smooth there: rows two apart are alike.
    turn &= np.abs(a[:, 2:] - a[:, :-2]) < 8
    return float((turn[:, :-2] & turn[:, 1:-1] & turn[:, 2:]).mean()) if turn.shape[1] > 2 else 0.0


def is_card(luma: np.ndarray) -> bool:
    """Whether a frame shows lines of writing on a plain ground.

    Thin strokes that stand out, many to a row, on a ground of one level that fills most of the
    frame. Painted title cards are not told from pictures.
    """
    rows, columns = (
        ((np.arange(n) + 0.5) * edge / n).astype(np.intp)
        for n, edge in zip(_CARD, luma.shape, strict=True)
    )
    small = luma[rows][:, columns].astype(np.int16)
    ground = int(np.bincount(small.ravel(), minlength=256).argmax())
    off = np.abs(small - ground)
    if (off <= 10).mean() < 0.65:
        return False
    ink = off > 50
    if not 0.004 < ink.mean() < 0.25:
        return False
    # Writing has no areas: nothing is left of it where 5 × 5 pixels must all be ink.
    area = np.lib.stride_tricks.sliding_window_view(ink, (5, 5)).all((2, 3)).sum()
    if area > 0.02 * ink.sum():
        return False
    strokes = (np.diff(ink.astype(np.int8), axis=1) > 0).sum(1)
    written = strokes[strokes > 0]
    return len(written) >= 4 and float(np.median(written)) >= 5


def _spaced(edge: int, count: int = _LINES) -> np.ndarray:
    return ((np.arange(count) + 0.5) * edge / count).astype(np.intp)


class Borders:
    """Finds bars and burnt-in frames: what at the edges never changes while the film does.

    A dark scene is no border: something brightens there in some other shot, and what stays dark
    has no straight edge.
    """

    def __init__(self) -> None:
        self._low = self._high = np.zeros((0, 0), np.uint8)
        self.seen = 0

    def add(self, luma: np.ndarray) -> None:
        """See a frame, (H, W) uint8; a frame of another size begins anew."""
        if luma.shape != self._low.shape:
            self._low, self._high, self.seen = luma.copy(), luma.copy(), 0
        np.minimum(self._low, luma, out=self._low)
        np.maximum(self._high, luma, out=self._high)
        self.seen += 1

    def find(self) -> tuple[int, int, int, int]:
        """Rows or columns to cut off at the top, bottom, left and right."""
        if not self._low.size:
            return 0, 0, 0, 0
        moved = self._high.astype(np.int16) - self._low > _STATIC
        if moved.mean() < 0.2:
            return 0, 0, 0, 0  # too little happens to tell a border from a still background
        seen = np.stack([moved, self._low, self._high])
        top, bottom = _border(seen), _border(seen[:, ::-1])
        inner = seen[:, top : len(moved) - bottom].transpose(0, 2, 1)
        return top, bottom, _border(inner), _border(inner[:, ::-1])


def _border(seen: np.ndarray) -> int:
    """Rows of border before the first row of picture.

    Args:
        seen: (3, H, W): whether each pixel moved, its lowest and its highest level.
    """
    moved, low, high = seen
    share = moved.mean(1)
    still = share <= 0.02
    depth = int(np.argmin(still)) if not still.all() else 0
    if not 1 <= depth <= _DEEPEST * len(moved):
        return 0
    # The picture begins at once, along a straight line: else it was only dark there. All of the
    # line moves, or all of it is brighter than the border at any time. Compression smears into the
    # border: the picture begins at the largest step.
    level = high[depth - 1 : depth + 5].mean(1, dtype=np.float32)
    row = depth + int(np.argmax(np.abs(np.diff(level)))) if len(level) > 1 else depth
    brighter = low[row] - high[max(depth - 2, 0)] > 16
    if share[row] < 0.6 and brighter.mean() < 0.9:
        return 0
    return row + 1  # the first row of the picture is mixed with the border
