"""Films with known cuts, dissolves and fades, edited out of the starter clip and generated scenes.

Used by the tests of films and by benchmarks/film_frames.py.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tomjerry_utils import films, scenes
from tomjerry_utils.runs import data_root

CLIP = data_root() / "starter" / "clip" / "big_buck_bunny_20s.mp4"
KINDS = (
    *("plain", "graded", "dark", "grey", "flashes", "pans", "dissolves", "fades", "scenes"),
    *("letterbox", "grain", "short", "mixed"),
)
Frames = list[np.ndarray]


@dataclass
class Edit:
    """An edited film: frames (H, W, 3) uint8 and what is known of them.

    Attributes:
        cuts: first frames after hard cuts.
        dissolves: first frame and the end of each span in which two shots show at once.
        fades: first frame and the end of each span in which a shot goes to or from one colour.
    """

    frames: Frames = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    dissolves: list[tuple[int, int]] = field(default_factory=list)
    fades: list[tuple[int, int]] = field(default_factory=list)

    def cut_to(self, shot: Frames) -> None:
        if self.frames:
            self.cuts.append(len(self.frames))
        self.frames += shot

    def dissolve_to(self, shot: Frames, length: int) -> None:
        """The last frames of what is there are mixed with the first of the shot."""
        first = len(self.frames) - length
        for k in range(length):
            share = (k + 1) / (length + 1)
            self.frames[first + k] = _mix(self.frames[first + k], shot[k], share)
        self.dissolves.append((first, first + length))
        self.frames += shot[length:]

    def fade_to(self, shot: Frames, length: int, black: int, level: int = 0) -> None:
        """Out to one level, a while of it, and in again."""
        first = len(self.frames) - length
        flat = np.full_like(shot[0], level)
        for k in range(length):
            share = (k + 1) / (length + 1)
            self.frames[first + k] = _mix(self.frames[first + k], flat, share)
        self.frames += [flat] * black
        shot = [
            _mix(flat, frame, (k + 1) / (length + 1)) if k < length else frame
            for k, frame in enumerate(shot)
        ]
        self.frames += shot
        self.fades.append((first, first + 2 * length + black))


@cache
def true_cuts() -> tuple[int, ...]:
    with (CLIP.parent / "cuts.csv").open(newline="") as file:
        return tuple(int(row["first_frame_of_new_shot"]) for row in csv.DictReader(file))


@cache
def clip_shots(width: int, height: int) -> tuple[Frames, ...]:
    """The nine shots of the starter clip, at this size."""
    frames = [
        frame.reformat(
            width=width, height=height, format="rgb24", interpolation="AREA"
        ).to_ndarray()
        for _, frame in films.read_frames(CLIP)
    ]
    edges = [0, *true_cuts(), len(frames)]
    return tuple(frames[a:b] for a, b in itertools.pairwise(edges))


def edit(kind: str, seed: int, *, shots: int = 13, size: tuple[int, int] = (160, 90)) -> Edit:
    """A film of one kind: the same for the same arguments.

    Args:
        kind: one of `KINDS`.
        shots: how many.
        size: width and height.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    made, last = Edit(), -1
    for n in range(shots):
        length = int(rng.integers(5, 10) if kind == "short" else rng.integers(22, 40))
        if kind == "scenes" or (kind == "mixed" and n % 3 == 1):
            shot = _drawn(rng, length, size)
        elif kind == "pans" or (kind == "mixed" and n % 3 == 2):
            last, shot = _taken(rng, last, 1, size, 3)
            shot = _pan(rng, shot[0], length, size)
        else:
            last, shot = _taken(rng, last, length, size, 1)
        shot = [_GRADES.get(kind, _same)(rng.spawn(1)[0], shot)][0]
        joint = kind if kind != "mixed" else ("", "dissolves", "", "fades", "")[n % 5]
        if made.frames and joint == "dissolves" and n % 2:
            made.dissolve_to(shot, int(rng.integers(8, 25)) if len(shot) > 26 else 8)
        elif made.frames and joint == "fades" and n % 2:
            made.fade_to(shot, int(rng.integers(6, 13)), int(rng.integers(0, 9)))
        else:
            made.cut_to(shot)
    if kind == "flashes":
        _flash(rng, made)
    if kind == "letterbox":
        made.frames = [boxed(frame, 0.12) for frame in made.frames]
    return made


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    rate: int = 24,
    times: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 0,
    options: dict[str, str] | None = None,
    rotation: int = 0,
) -> Path:
    """Encode frames; `times` in 1/1000 s makes the rate variable."""
    import av

    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        if gop:
            stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = times[i] if times is not None else i
            frame.time_base = Fraction(1, 1000) if times is not None else Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def boxed(frame: np.ndarray, share: float) -> np.ndarray:
    """A frame with black bars at the top and bottom."""
    out = np.zeros_like(frame)
    bar = round(share * len(frame))
    inner = Image.fromarray(frame).resize((frame.shape[1], len(frame) - 2 * bar))
    out[bar : len(frame) - bar] = np.asarray(inner)
    return out


def score(found: Sequence[int], truth: Sequence[int], tolerance: int = 1) -> tuple[int, int, int]:
    """Hits, false ones and missed ones; each true cut is found once at most."""
    left = sorted(found)
    hits = 0
    for cut in truth:
        near = [f for f in left if abs(f - cut) <= tolerance]
        if near:
            left.remove(min(near, key=lambda f: abs(f - cut)))
            hits += 1
    return hits, len(left), len(truth) - hits


def _mix(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    return ((1 - share) * a.astype(np.float32) + share * b + 0.5).astype(np.uint8)


def _taken(
    rng: np.random.Generator, last: int, length: int, size: tuple[int, int], scale: int
) -> tuple[int, Frames]:
    """A piece of one of the clip's shots other than the last, mirrored half of the time."""
    parts = clip_shots(size[0] * scale, size[1] * scale) if scale == 1 else clip_shots(480, 270)
    able = [i for i, part in enumerate(parts) if i != last and len(part) > length + 2]
    at = int(rng.choice(able))
    first = int(rng.integers(0, len(parts[at]) - length))
    piece = parts[at][first : first + length]
    if rng.random() < 0.5:
        piece = [frame[:, ::-1] for frame in piece]
    return at, [np.ascontiguousarray(frame) for frame in piece]


def _drawn(rng: np.random.Generator, length: int, size: tuple[int, int]) -> Frames:
    scene = scenes.describe(9_300_000 + int(rng.integers(0, 4000)))
    few = list(scenes.animate(scene, max(4, length // 4)))
    shown = [
        np.asarray(Image.fromarray(scenes.render(s, "cartoon", 64).image).resize(size)) for s in few
    ]
    return [shown[min(k * len(shown) // length, len(shown) - 1)] for k in range(length)]


def _pan(rng: np.random.Generator, wide: np.ndarray, length: int, size: tuple[int, int]) -> Frames:
    """A crop that moves over a still picture, 2 to 9 % of its width a frame, to and fro."""
    image = Image.fromarray(wide)
    width = 0.5 * image.width
    height = width * size[1] / size[0]
    step = float(rng.uniform(0.02, 0.09)) * width
    top = float(rng.uniform(0, image.height - height))
    room = image.width - width
    out = []
    for k in range(length):
        along = (k * step) % (2 * room)
        left = along if along <= room else 2 * room - along
        box = (left, top, left + width, top + height)
        out.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box)))
    return out


def _flash(rng: np.random.Generator, made: Edit) -> None:
    edges = [0, *made.cuts, len(made.frames)]
    for first, end in itertools.pairwise(edges):
        at, length = int(rng.integers(first + 4, end - 8)), int(rng.integers(1, 4))
        for k in range(at, at + length):
            made.frames[k] = _mix(made.frames[k], np.full_like(made.frames[k], 255), 0.9)


def _same(rng: np.random.Generator, shot: Frames) -> Frames:
    return shot


def _graded(rng: np.random.Generator, shot: Frames) -> Frames:
    gain, gamma = rng.uniform(0.6, 1.3, 3), float(rng.uniform(0.7, 1.5))
    table = np.arange(256)[:, None] / 255
    curve = (255 * (gain * table**gamma).clip(0, 1) + 0.5).astype(np.uint8)
    return [np.stack([curve[frame[..., c], c] for c in range(3)], -1) for frame in shot]


def _dark(rng: np.random.Generator, shot: Frames) -> Frames:
    curve = (255 * float(rng.uniform(0.2, 0.4)) * (np.arange(256) / 255) ** 1.4).astype(np.uint8)
    return [curve[frame] for frame in shot]


def _grey(rng: np.random.Generator, shot: Frames) -> Frames:
    return [frame.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8) for frame in shot]


def _grain(rng: np.random.Generator, shot: Frames) -> Frames:
    return [(frame + rng.normal(0, 9, frame.shape)).clip(0, 255).astype(np.uint8) for frame in shot]


_GRADES: dict[str, Callable[[np.random.Generator, Frames], Frames]] = {
    "graded": _graded,
    "dark": _dark,
    "grey": _grey,
    "grain": _grain,
}
