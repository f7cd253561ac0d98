"""Picture files of every kind as RGB, or one line that says why not.

What a folder of downloads holds is not to be trusted: a file's suffix may lie, its header may
promise more pixels than fit into memory, its end may be missing. Decisions, each tested in
`tests/test_bad_input.py`:

- The content decides, not the suffix, and only formats of pixels are tried: none of Pillow's
  readers that start another program (PostScript) is ever asked.
- Size is checked by the header, before a pixel is decoded.
- A picture whose end is missing is refused: its lower half would be grey, and grey is learnt.
- Of an animation or of several pages, the first; transparency shows :data:`GROUND`.
- 16-bit and float pictures are scaled, never clipped; an embedded colour profile is followed to
  sRGB; the EXIF orientation is applied. Broken EXIF or a broken profile costs only itself.
- HEIC, as phones write it, needs the extra `heic`; AVIF needs Pillow 11.3 or later.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from tomjerry_utils import UserError

GROUND = (244, 240, 232)  # what shows through a transparent picture: warm paper
MAX_PIXELS = 100_000_000  # larger files are most likely a mistake, or made to exhaust memory

_FORMATS = (
    *("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PNG", "PPM", "QOI", "TIFF", "WEBP"),
)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_ORIENTATION = 0x0112
_COLUMNS, _ROWS, _PHOTOMETRIC, _WHITE_IS_ZERO = 256, 257, 262, 0
_AT_ONCE = 1 << 20  # pixels
_SAME_COLOUR = 2  # levels: a profile that moves no colour further than this is sRGB

# What Pillow logs of damaged files, the refusal says; without a handler it would reach the screen.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class PictureFile:
    """A picture and what was decided while it was read.

    Attributes:
        array: (H, W, 3) uint8 RGB.
        notes: such as "the first of several frames"; empty for an ordinary picture.
    """

    array: np.ndarray
    notes: tuple[str, ...] = ()


def read_picture(path: str | os.PathLike[str]) -> PictureFile:
    """Read a picture file, whatever its kind.

    Raises:
        UserError: no such file, no picture, one that cannot be read or is broken, or one of more
            than `MAX_PIXELS`; one line that begins with the path as it can be printed.
    """
    where = Path(path)
    name = _shown(where)
    try:
        if not stat.S_ISREG(mode := where.stat().st_mode):
            # Opening a pipe would wait for somebody to write to it.
            kind = "a folder" if stat.S_ISDIR(mode) else "no file but a pipe or a device"
            raise UserError(f"{name} is {kind}: give a picture file")
        with where.open("rb") as file, _strictly():
            return _read(file, name)
    except FileNotFoundError:
        if where.is_symlink():
            raise UserError(f"{name}: a link to a file that is not there: mend it") from None
        raise UserError(f"no picture {name}: check the path") from None
    except PermissionError:
        raise UserError(f"{name}: no permission to read it: change its permissions") from None
    except MemoryError:
        raise UserError(f"{name}: does not fit into memory: make the picture smaller") from None
    except OSError as error:
        if error.errno is None:  # raised by a decoder, not by the system
            raise UserError(_broken(name, error)) from None
        reason = (error.strerror or type(error).__name__).lower()
        raise UserError(f"{name}: cannot be read ({reason}): check the path and disk") from None
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise errors of every type
        raise UserError(_broken(name, error)) from None


# ---- opening -----------------------------------------------------------------------------------


def _read(file: BinaryIO, name: str) -> PictureFile:
    head = file.read(512)
    file.seek(0)
    if not head:
        raise UserError(f"{name}: 0 bytes, not a picture that can be read: fetch it again")
    _prepare(head, name)
    try:
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        raise UserError(f"{name}: {_what_it_is(head)}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: far too many pixels: make the picture smaller first") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{name}: {width}×{height} pixels are more than {MAX_PIXELS // 10**6} million: "
                "make the picture smaller first"
            )
        if image.format == "TIFF" and _lacks_strips(image):
            raise ValueError("a part of its rows is missing")
        image.load()
        if image.format in ("JPEG", "MPO") and _lost_its_end(file):
            raise ValueError("its end is missing, only zeros follow")
        notes = ["the first of several frames or pages"] if _has_more(image) else []
        turn, readable = _orientation(image)
        if not readable:
            notes.append("its EXIF notes are broken and were left aside")
        array = _wide(image) if image.mode.startswith(("I", "F")) else _colours(image, notes)
    return PictureFile(np.ascontiguousarray(_turned(array, turn)), tuple(notes))


@contextmanager
def _strictly() -> Iterator[None]:
    """No warnings, since every decision is made here, and no truncated pictures, whoever else in
    this process has asked Pillow to let them pass."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _prepare(head: bytes, name: str) -> None:
    """Make sure that the reader of this kind of file is there."""
    Image.init()
    if head[4:8] != b"ftyp":
        return
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, length, 4))}
    if brands & _AVIF_BRANDS:
        if not features.check("avif"):
            raise UserError(
                f"{name}: this Pillow reads no AVIF: `pip install 'pillow>=11.3'`, or convert it "
                "to PNG"
            )
    elif brands & _HEIC_BRANDS and "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise UserError(
                f"{name}: HEIC, as phones write it: `pip install 'tomjerry-utils[heic]'`, or "
                "convert it to JPEG"
            ) from None
        register_heif_opener()


def _what_it_is(head: bytes) -> str:
    """What a file that is no picture is instead, and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "an SVG drawing, not a picture of pixels: export it as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture: the download went wrong, fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the picture itself: run `git lfs pull`"
    if text.startswith((b"%!ps", b"%pdf")):
        return "a PostScript or PDF document, not a picture of pixels: export it as PNG"
    return "not a picture that can be read: convert it to PNG"


def _lost_its_end(file: BinaryIO) -> bool:
    """Whether a JPEG ends in zeros where data should be: a download that was never finished.

    The decoder takes the zeros for data. Zeros after the end mark are harmless padding.
    """
    file.seek(0)
    content = file.read()
    scan = content.find(b"\xff\xda")
    # The mark of a thumbnail inside the notes comes before; so the last scan is what counts.
    while (later := content.find(b"\xff\xda", scan + 2)) >= 0:
        scan = later
    return content.endswith(bytes(64)) and b"\xff\xd9" not in content[scan:]


def _lacks_strips(image: Image.Image) -> bool:
    """Whether a TIFF holds fewer strips or tiles than its size asks for; Pillow leaves what is
    missing black."""
    extents = [tile[1] for tile in getattr(image, "tile", [])]
    right, bottom = (max((each[i] for each in extents if each), default=0) for i in (2, 3))
    tags = getattr(image, "tag_v2", {})
    # Not `image.size`, which is that of the picture turned upright.
    return right < tags.get(_COLUMNS, 0) or bottom < tags.get(_ROWS, 0)


def _has_more(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what comes after the first frame is broken, and not wanted
        return True


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation, 1 to 8, and whether the EXIF notes could be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's reader of damaged notes raises errors of every type
        return 1, False
    return (value if isinstance(value, int) and 1 <= value <= 8 else 1), True


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """A picture upright; Pillow's own `exif_transpose` would also rewrite the EXIF notes, and
    fails where those are damaged."""
    if orientation >= 5:  # the sensor's rows are columns
        array = array.swapaxes(0, 1)
    across = orientation in (2, 3, 6, 7)
    down = orientation in (3, 4, 7, 8)
    return array[:: -1 if down else 1, :: -1 if across else 1]


# ---- colours -----------------------------------------------------------------------------------


def _colours(image: Image.Image, notes: list[str]) -> np.ndarray:
    """8 bits a channel, with or without transparency, in any colour space, as RGB."""
    alpha: Image.Image | None = None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        plain = rgba.convert("L" if grey else "RGB")
    elif image.mode in ("CMYK", "LAB"):
        plain = image
    else:
        plain = image.convert("L" if grey else "RGB")
    colours = _managed(plain, image.info.get("icc_profile"), notes).convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return np.array(colours)
    notes.append("transparent, laid on warm paper")
    canvas = Image.new("RGB", colours.size, GROUND)
    canvas.paste(colours, mask=alpha)
    return np.array(canvas)


def _managed(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """The picture in sRGB by its profile, or as it is where that says nothing else."""
    if image.mode == "CMYK" and not profile:
        notes.append("CMYK without a colour profile: its colours are approximate")
    if not (profile or image.mode == "LAB") or not features.check("littlecms2"):
        return image
    from PIL import ImageCms

    try:
        transform, name = _transform(profile or b"", image.mode)
        if transform is None:
            return image
        changed = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("its colour profile is broken or of another kind and was left aside")
        return image
    notes.append(f"colours taken to sRGB from {name}")
    return changed if changed is not None else image


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[Any, str]:
    """How to come from a profile to sRGB, None where it is sRGB itself; and the profile's name."""
    from PIL import ImageCms

    # Files of Lab colours need no profile: Lab says itself what it means.
    source = ImageCms.ImageCmsProfile(
        io.BytesIO(profile) if mode != "LAB" else ImageCms.createProfile("LAB")
    )
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # Without the cache one transform serves several threads.
        ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
    )
    name = " ".join(ImageCms.getProfileDescription(source).split())[:60] or "a nameless profile"
    if mode in ("RGB", "L"):
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, 81, 3)
        probe = Image.fromarray(cube) if mode == "RGB" else Image.fromarray(levels[None])
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        # Rounding alone would change the pixels of every picture that says it is sRGB.
        if np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= _SAME_COLOUR:
            return None, name
    return transform, name


def _wide(image: Image.Image) -> np.ndarray:
    """16-bit, 32-bit and float grey: Pillow's own conversion would clip them to white."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("holds numbers that are not finite")
    top = float(values.max(initial=0))
    # Only I;16 says what white is; elsewhere the smallest usual white that holds every value.
    usual = {"I;16": (65535.0,), "F": (1.0, 255.0, 65535.0)}.get(image.mode[:4], (255.0, 65535.0))
    white = next((value for value in usual if top <= value), top)
    grey = np.empty(values.shape, np.uint8)
    step = max(1, _AT_ONCE // values.shape[1])
    for top in range(0, len(values), step):  # in parts: no float copy of the whole
        share = (values[top : top + step] / white).clip(0.0, 1.0)
        grey[top : top + step] = (share * 255).round()
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=-1)


# ---- words -------------------------------------------------------------------------------------


def _broken(name: str, error: BaseException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{name}: broken picture ({reason}): replace or remove it"


def _shown(path: Path) -> str:
    """A path as it can be printed in one line; names may hold line breaks and bytes of no text."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
