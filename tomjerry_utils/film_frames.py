"""Frames of a film through PyAV: numbered, looked at cheaply, read again where they are wanted.

A film is read twice. The first time its frames only have to be recognised: the loop filter is left
out, and none is converted; a few pixels of its planes are enough. Frames that no other is predicted
from are left out, and where the packets' sizes say that no shot ends, all that are predicted from a
later one. The second time only the wanted frames are decoded, from the nearest key frame before
each, and in full quality.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from tomjerry_utils import UserError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# A picture that the frames before it do not foretell costs its encoder many bytes. A packet is loud
# if it has more than `_LOUDER` times the largest of the `_SPAN` frames before it, key frames aside,
# or more than `_SHARE` of its key frame. A plain picture costs few bytes even then: also loud is a
# packet if those after it have less than 1 / `_HUSHED` of those before.
_LOUDER, _SHARE, _HUSHED, _SPAN = 1.5, 0.25, 4, 12
_NEAR = 3  # frames on either side of a loud one that are looked at closely
_BLIND = 12  # frames without a look that are too many
_PLANAR = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


@dataclass
class Index:
    """When each frame of a film is shown, and which can be decoded by themselves.

    Attributes:
        stamps: time stamps, ascending, in units of `unit` seconds; empty where the film has none
            that can be trusted: then frames are counted as they are decoded.
        keys: numbers of the key frames.
        unit: seconds.
        stretch: width of a stored pixel, its height being 1.
        skip: what the decoder may leave out: "NONREF", frames that no other is predicted from, or
            "DEFAULT", nothing.
        sizes: bytes of each frame's packet; empty where they are not to be used.
    """

    stamps: array[int]
    keys: array[int]
    unit: float
    stretch: float = 1.0
    skip: Literal["DEFAULT", "NONREF"] = "DEFAULT"
    sizes: array[int] = field(default_factory=lambda: array("q"), repr=False)

    def number(self, stamp: int | None) -> int:
        """The number of the frame with this time stamp; -1 where there is none."""
        if stamp is None:
            return -1
        at = int(np.searchsorted(np.frombuffer(self.stamps, np.int64), stamp))
        return at if at < len(self.stamps) and self.stamps[at] == stamp else -1


def open_container(path: Path) -> InputContainer:
    """Open a film.

    Raises:
        UserError: no such file, not a film, or without a picture track.
    """
    import av

    try:
        container = av.open(str(path), metadata_errors="replace")
    except FileNotFoundError:
        raise UserError(f"no film {path}: check the path") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path}: not a film that can be read ({told}): it may be cut off or still being "
            "written; copy it again, or convert it to mp4"
        ) from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path}: holds no picture track: give a film")
    return container


def read_frames(path: Path) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of a film, numbered from 0; a damaged stretch is skipped.

    Raises:
        UserError: no such file, or not a film.
    """
    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from enumerate(_decode(container, stream))


def _decode(
    container: InputContainer, stream: Any, skip: Callable[[int | None], str] | None = None
) -> Iterator[av.VideoFrame]:
    """Frames as they come.

    Args:
        skip: what the decoder may leave out at a packet with this time stamp.
    """
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            if skip is not None and packet.size:
                stream.codec_context.skip_frame = skip(packet.pts)
            yield from packet.decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:
            continue


def read_index(path: Path) -> Index:
    """The frames' time stamps from the packets, without decoding any.

    Raises:
        UserError: as `open_container`.
    """
    import av

    stamps: array[int] = array("q")
    keys: array[int] = array("q")
    sizes: array[int] = array("q")
    with open_container(path) as container:
        stream = container.streams.video[0]
        unit = float(stream.time_base or 0)
        stretch = float(stream.sample_aspect_ratio or 1)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                break
            except av.FFmpegError:
                continue
            if not packet.size:
                continue
            if packet.pts is None or packet.is_discard or not unit:
                return Index(array("q"), array("q"), 0.0, stretch=stretch)
            stamps.append(packet.pts)
            sizes.append(packet.size)
            if packet.is_keyframe:
                keys.append(packet.pts)
    order = np.argsort(np.frombuffer(stamps, np.int64)) if stamps else np.zeros(0, np.int64)
    times = np.frombuffer(stamps, np.int64)[order] if stamps else np.zeros(0, np.int64)
    if not len(times) or not len(keys) or (np.diff(times) <= 0).any():
        return Index(array("q"), array("q"), 0.0, stretch=stretch)
    numbers = np.searchsorted(times, np.sort(np.frombuffer(keys, np.int64)))
    ordered = np.frombuffer(sizes, np.int64)[order]
    return Index(
        array("q", times.tobytes()),
        array("q", numbers.tobytes()),
        unit,
        stretch,
        "NONREF",
        array("q", ordered.tobytes()),
    )


def loud(index: Index) -> np.ndarray:
    """(N,) bool: where the size of a frame's packet says that a shot may begin."""
    sizes = np.frombuffer(index.sizes, np.int64)
    keys = np.frombuffer(index.keys, np.int64)
    count = len(sizes)
    group = np.searchsorted(keys, np.arange(count), side="right") - 1
    own = sizes[keys[np.maximum(group, 0)]]
    others = sizes.copy()
    others[keys] = 0
    around = np.concatenate([np.zeros(_SPAN, np.int64), others, np.zeros(_SPAN, np.int64)])
    largest = np.lib.stride_tricks.sliding_window_view(around, _SPAN).max(1)
    before, after = largest[:count], largest[_SPAN + 1 :]
    found = (sizes > _LOUDER * before) | (sizes > _SHARE * own) | (_HUSHED * after < before)
    found[keys] = True
    return found


def look_through(path: Path, index: Index) -> Iterator[tuple[int, av.VideoFrame, int | None]]:
    """The frames of a film that recognising shots needs, decoded fast and less than perfectly.

    Yields:
        The number of a frame, the frame, and how many frames not looked at before it may be of its
        shot, if one begins here; None where none can.

    Raises:
        UserError: as `open_container`.
        LookupError: the index does not fit what the decoder gives, or that is too little.
    """
    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"skip_loop_filter": "all"}
        if not index.stamps:
            for number, frame in enumerate(_decode(container, stream)):
                yield number, frame, 0
            return
        stream.codec_context.skip_frame = index.skip
        if not index.sizes:
            last = -1
            for frame in _decode(container, stream):
                number = index.number(frame.pts)
                gap = number - last - 1
                if number <= last or (index.skip != "DEFAULT" and gap > _BLIND):
                    raise LookupError(path)
                yield number, frame, gap
                last = number
            return
        yield from _look_closely(path, index, container, stream)


def _look_closely(
    path: Path, index: Index, container: InputContainer, stream: Any
) -> Iterator[tuple[int, av.VideoFrame, int | None]]:
    """As :func:`look_through`, by the packets' sizes."""
    found = loud(index)
    changes = np.concatenate([[0], np.cumsum(found)])
    close = np.convolve(found, np.ones(2 * _NEAR + 1), "same") > 0.5

    def skip(stamp: int | None) -> str:
        return index.skip if close[index.number(stamp)] else "BIDIR"

    last = -1
    for frame in _decode(container, stream, skip):
        number = index.number(frame.pts)
        gap = number - last - 1
        if number <= last or gap > _BLIND:
            raise LookupError(path)
        yield number, frame, gap if changes[number + 1] > changes[last + 1] else None
        last = number


def read_pictures(
    path: Path, index: Index, wanted: Sequence[int], borders: Sequence[int] = (0, 0, 0, 0)
) -> Iterator[np.ndarray | None]:
    """Frames of a film in full quality, upright, with square pixels and without borders.

    Args:
        wanted: ascending numbers of frames.
        borders: rows or columns to leave out at the top, bottom, left and right, as stored.

    Yields:
        (H, W, 3) uint8 RGB for each wanted frame in order; None where it cannot be decoded.

    Raises:
        UserError: as `open_container`.
    """
    if not index.stamps:
        yield from _counted(path, index, wanted, borders)
        return
    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.skip_frame = index.skip
        keys = np.frombuffer(index.keys, np.int64)
        frames = _decode(container, stream)
        at, last = -1, None  # the number of the frame last decoded, and that frame
        for number in wanted:
            place = max(int(np.searchsorted(keys, number, side="right")) - 1, 0)
            # What lies before the next key frame is not worth decoding. Not every format can seek
            # exactly: where that leads too far, earlier key frames are tried.
            back = 0
            while at > number or (back == 0 and keys[place] > at + 1):
                stamp = index.stamps[int(keys[max(place - back, 0)])]
                if not _seek(container, stream, stamp) or back > 4 * len(keys):
                    break
                frames = _decode(container, stream)
                last = next(frames, None)
                at = index.number(last.pts) if last is not None else number + 1
                back = max(1, 2 * back)
            while last is None or at < number:
                last = next(frames, None)
                if last is None:
                    break
                at = index.number(last.pts)
            found = last is not None and at == number
            yield picture_of(last, borders, index.stretch) if found and last is not None else None


def _counted(
    path: Path, index: Index, wanted: Sequence[int], borders: Sequence[int]
) -> Iterator[np.ndarray | None]:
    frames = read_frames(path)
    for number in wanted:
        frame = next((frame for at, frame in frames if at == number), None)
        yield None if frame is None else picture_of(frame, borders, index.stretch)


def _seek(container: InputContainer, stream: Any, stamp: int) -> bool:
    import av

    try:
        container.seek(stamp, stream=stream, backward=True)
    except av.FFmpegError:
        return False
    return True


def picture_of(
    frame: av.VideoFrame, borders: Sequence[int] = (0, 0, 0, 0), stretch: float = 1.0
) -> np.ndarray:
    """A frame as (H, W, 3) uint8 RGB: borders cut off, square pixels, turned upright.

    Args:
        borders: rows or columns to leave out at the top, bottom, left and right, as stored.
        stretch: width of a stored pixel, its height being 1.
    """
    top, bottom, left, right = borders
    image = frame.to_ndarray(format="rgb24")
    height, width = image.shape[:2]
    if top + bottom < height and left + right < width:
        image = image[top : height - bottom, left : width - right]
    if 0.4 < stretch < 2.5 and abs(stretch - 1) > 0.01:
        height, width = image.shape[:2]
        # The longer side is kept, so that nothing is blown up that can be reduced instead.
        size = (round(width * stretch), height) if stretch < 1 else (width, round(height / stretch))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4))


# ---- what is seen of a frame ---------------------------------------------------------------------


class Glance:
    """Cheap looks at frames as they come from the decoder."""

    def __init__(self, size: tuple[int, int] = (64, 36)) -> None:
        self._size = size
        self._known: dict[tuple[int, int, int, int], np.ndarray] = {}

    def look(self, frame: av.VideoFrame) -> tuple[np.ndarray, np.ndarray]:
        """Luma (H, W) uint8, a view, and a thumbnail (h, w, 3) uint8 of luma and colours.

        Of luma a cell of the thumbnail has the mean of four pixels, of colours one.
        """
        if frame.format.name not in _PLANAR:
            frame = frame.reformat(format="yuv420p")
        thumb = np.empty((self._size[1], self._size[0], 3), np.uint8)
        luma: Any = frame.planes[0]
        memory = np.frombuffer(luma, np.uint8)
        fine = self._points(luma, memory, 2).astype(np.uint16)
        pairs = fine[::2] + fine[1::2]
        thumb[..., 0] = (pairs[:, ::2] + pairs[:, 1::2] + 2) >> 2
        for channel in (1, 2):
            plane: Any = frame.planes[channel]
            thumb[..., channel] = self._points(plane, np.frombuffer(plane, np.uint8), 1)
        return memory.reshape(-1, luma.line_size)[: luma.height, : luma.width], thumb

    def _points(self, plane: Any, memory: np.ndarray, each: int) -> np.ndarray:
        """(each × h, each × w) pixels of a plane, evenly spread.

        Gathered by their places in memory: several times faster than by rows, then columns.
        """
        width, height = (each * edge for edge in self._size)
        key = (plane.height, plane.width, plane.line_size, each)
        if key not in self._known:
            rows, columns = (
                ((np.arange(n) + 0.5) * edge / n).astype(np.intp)
                for n, edge in ((height, plane.height), (width, plane.width))
            )
            self._known[key] = (plane.line_size * rows[:, None] + columns).ravel()
        return memory.take(self._known[key]).reshape(height, width)
