"""Whatever lies in a folder: each picture arrives with the right colours, or is refused in one line
that names it; the run goes on, and nothing else on the disk changes."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, features

from tomjerry_utils import UserError, collect, picture_files
from tomjerry_utils.images import load_image
from tomjerry_utils.picture_files import GROUND, read_picture
from tomjerry_utils.runs import hash_file

PACKAGE = Path(picture_files.__file__).resolve().parents[1]
HEIC_STUB = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def colours(seed: int = 0) -> np.ndarray:
    """(40, 64, 3): smooth, so that lossy formats change little; no symmetry; each seed its own."""
    y, x = np.mgrid[0:40, 0:64] / 64
    return (
        (np.stack([x * (1 - seed / 150), y * 1.5, 1 - x * y], -1) * 200 + 30)
        .clip(0, 255)
        .astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(kind: str, seed: int = 0, **options: Any) -> bytes:
    return encoded(Image.fromarray(colours(seed)), kind, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG from raw rows, without filters; for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    line = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * line : (i + 1) * line] for i in range(height))
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(filtered, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def wide_png(seed: int, channels: int) -> bytes:
    """16 bits a channel: grey (1), grey and alpha (2), RGB (3), RGBA (4)."""
    values = colours(seed).astype(np.uint32) * 257
    if channels < 3:
        values = values[..., :1]
    if channels in (2, 4):
        values = np.concatenate([values, np.full_like(values[..., :1], 65535)], -1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(64, 40, 16, kind, values.astype(">u2").tobytes())


def wide_tiff(seed: int, photometric: int = 2) -> bytes:
    """16 bits a channel: RGB, or grey where 1 means that black is zero and 0 that white is."""
    values = colours(seed).astype(np.uint16) * 257
    values = values if photometric == 2 else values[..., :1]
    data = (values if photometric else 65535 - values).astype("<u2").tobytes()
    count = values.shape[2]
    tags = [
        *((256, 4, 1, 64), (257, 4, 1, 40), (259, 3, 1, 1), (262, 3, 1, photometric)),
        *((277, 3, 1, count), (278, 4, 1, 40), (279, 4, 1, len(data))),
    ]
    tags.append((258, 3, count, 16 if count == 1 else 150))
    tags.append((273, 4, 1, 160))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(150, b"\0") + struct.pack("<HHH", 16, 16, 16).ljust(10, b"\0") + data


def ycck(seed: int) -> bytes:
    """As Photoshop writes CMYK: inverted, then stored as brightness and colour differences."""
    rgb = 255 - colours(seed)
    y, cb, cr = Image.fromarray(rgb).convert("YCbCr").split()
    key = Image.new("L", y.size, 0)
    # Pillow inverts what it writes; what the file holds is then Y, Cb, Cr and 255.
    stored = [Image.eval(each, lambda v: 255 - v) for each in (y, cb, cr)]
    content = encoded(Image.merge("CMYK", [*stored, key]), "JPEG", quality=95, subsampling=0)
    at = content.index(b"Adobe") + 11
    assert content[at] == 0
    return content[:at] + b"\2" + content[at + 1 :]


def cmyk(seed: int) -> Image.Image:
    inks = [*Image.fromarray(255 - colours(seed)).split(), Image.new("L", (64, 40), 0)]
    return Image.merge("CMYK", inks)


# ---- colour profiles -----------------------------------------------------------------------------

# Display P3 and sRGB, as columns of XYZ under the profiles' white.
P3 = np.array(
    [[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]
)


def profile(primaries: np.ndarray | None, name: bytes = b"Wide") -> bytes:
    """An ICC profile of RGB with a gamma of 2.2; None makes one of grey."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0"}
    tags[b"wtpt"] = xyz(np.array([0.9642, 1.0, 0.8249]))
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", primaries, strict=True):
            tags[bytes([letter]) + b"XYZ"] = xyz(column)
            tags[bytes([letter]) + b"TRC"] = curve
    table, data, at = b"", b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        value += bytes(-len(value) % 4)
        table += key + struct.pack(">II", at + len(data), len(value))
        data += value
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", at + len(data), bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def in_srgb(values: np.ndarray, primaries: np.ndarray) -> np.ndarray:
    """What the profile's colours are in sRGB, by its definition."""
    linear = ((values / 255) ** 2.2) @ primaries @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# ---- what can be read ----------------------------------------------------------------------------


def transparent(mode: str, seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture whose left quarter is transparent and whose next quarter is half so."""
    alpha = np.full((40, 64), 255, np.uint8)
    alpha[:, :16], alpha[:, 16:32] = 0, 128
    base = colours(seed) if mode == "RGBA" else colours(seed)[..., :1].repeat(3, -1)
    image = Image.fromarray(base if mode == "RGBA" else base[..., 0])
    image.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    return image, base * share + np.array(GROUND) * (1 - share)


def frames(seed: int) -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.fromarray(colours(seed)[::-1])]}


def exif(orientation: int) -> bytes:
    notes = Image.Exif()
    notes[0x0112] = orientation
    return notes.tobytes()


# What a camera stores so that a viewer who follows the note shows `colours`.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


def stored(orientation: int, seed: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](colours(seed))))


@cache
def good() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name → content, the picture that it shows, and by how much levels may differ on average."""
    found: dict[str, tuple[bytes, np.ndarray, float]] = {}

    def add(name: str, content: bytes, seed: int, off: float = 0, grey: bool = False) -> None:
        shown = colours(seed)
        found[name] = content, shown[..., :1].repeat(3, -1) if grey else shown, off

    plain: list[tuple[str, str, float, dict[str, Any]]] = [
        ("plain.png", "PNG", 0, {}),
        ("plain.jpg", "JPEG", 2, {"quality": 95}),
        ("progressive.jpeg", "JPEG", 2, {"quality": 95, "progressive": True}),
        ("lossless.webp", "WEBP", 0, {"lossless": True}),
        ("lossy.webp", "WEBP", 3, {"quality": 95}),
        ("plain.bmp", "BMP", 0, {}),
        ("plain.gif", "GIF", 12, {}),
        ("plain.tif", "TIFF", 0, {}),
        ("packed.tiff", "TIFF", 0, {"compression": "tiff_lzw"}),
        ("plain.ppm", "PPM", 0, {}),
        ("a JPEG.png", "JPEG", 2, {"quality": 95}),
        ("a PNG.jpg", "PNG", 0, {}),
        ("a TIFF.gif", "TIFF", 0, {}),
        ("moving.png", "PNG", 0, {"save_all": True}),
        ("moving.gif", "GIF", 12, {"save_all": True}),
        ("moving.webp", "WEBP", 0, {"save_all": True, "lossless": True}),
        ("pages.tif", "TIFF", 0, {"save_all": True}),
        (
            "broken notes.jpg",
            "JPEG",
            2,
            {"quality": 95, "exif": b"Exif\0\0II*\0" + b"\xff" * 40},
        ),
        ("broken notes.png", "PNG", 0, {"exif": b"these are no notes"}),
        ("broken profile.png", "PNG", 0, {"icc_profile": b"no profile" * 30}),
        ("grey profile.png", "PNG", 0, {"icc_profile": profile(None)}),
        ("ünïcödé 猫.png", "PNG", 0, {}),
        ("line\nbreak.png", "PNG", 0, {}),
        ("-dash.png", "PNG", 0, {}),
        ("n" * 230 + ".png", "PNG", 0, {}),
        ("case.png", "PNG", 0, {}),
        ("CASE.png", "PNG", 0, {}),
    ]
    for seed, (name, kind, off, options) in enumerate(plain, start=1):
        if options.get("save_all"):
            options = {**options, **frames(seed)}
        add(name, picture(kind, seed, **options), seed, off)
    for turn in STORED:
        add(
            f"turned-{turn}.jpg",
            encoded(stored(turn, 40 + turn), "JPEG", quality=95, exif=exif(turn)),
            40 + turn,
            2,
        )
        add(
            f"turned-{turn}.tif",
            encoded(stored(turn, 50 + turn), "TIFF", exif=exif(turn)),
            50 + turn,
        )
    add("turned-6.png", encoded(stored(6, 60), "PNG", exif=exif(6)), 60)
    add("turned-6.webp", encoded(stored(6, 61), "WEBP", lossless=True, exif=exif(6)), 61)
    for channels in (1, 2, 3, 4):
        add(
            f"wide-{channels}.png",
            wide_png(62 + channels, channels),
            62 + channels,
            0,
            channels < 3,
        )
    add("wide.tif", wide_tiff(70), 70)
    add("wide grey.tif", wide_tiff(71, 1), 71, 0, True)
    add("white is zero.tif", wide_tiff(72, 0), 72, 0, True)
    add("inks.tif", encoded(cmyk(73), "TIFF"), 73, 1)
    add("inks.jpg", encoded(cmyk(74), "JPEG", quality=95, subsampling=0), 74, 2)
    add("ycck.jpg", ycck(75), 75, 4)
    add("padded.jpg", picture("JPEG", 76, quality=95) + bytes(500), 76, 2)
    add("grey.jpg", encoded(Image.fromarray(colours(77)[..., 0]), "JPEG", quality=95), 77, 2, True)
    bits = colours(78)[..., :1] > 120
    content = encoded(Image.fromarray(bits[..., 0]), "PNG")
    found["one bit.png"] = content, bits.repeat(3, -1) * np.uint8(255), 0
    for mode, seed in (("RGBA", 79), ("LA", 80)):
        image, shown = transparent(mode, seed)
        found[f"{mode}.png"] = encoded(image, "PNG"), shown, 0.6
    indexed = Image.fromarray(colours(81)).quantize(64)
    shown = np.array(indexed.convert("RGB"))
    shown[np.asarray(indexed) == 7] = GROUND
    found["palette.png"] = encoded(indexed, "PNG", transparency=7), shown, 0
    wide = in_srgb(colours(82), P3)
    found["wide gamut.png"] = picture("PNG", 82, icc_profile=profile(P3)), wide, 1
    wide = in_srgb(colours(83), P3)
    found["wide gamut.jpg"] = picture("JPEG", 83, quality=95, icc_profile=profile(P3)), wide, 3
    long = np.tile(colours(84)[20:22], (1, 500, 1))
    found["very wide.png"] = encoded(Image.fromarray(long), "PNG"), long, 0
    if features.check("avif"):
        add("plain.avif", picture("AVIF", 85, quality=95), 85, 4)
        add("an AVIF.jpg", picture("AVIF", 86, quality=95), 86, 4)
    return found


# ---- what cannot ---------------------------------------------------------------------------------


def bomb(side: int = 11_000) -> bytes:
    """A whole PNG of one grey whose pixels would fill 121 MB."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def with_size(content: bytes, at: int, form: str, *size: Any) -> bytes:
    """The same file with another size in its header."""
    return content[:at] + struct.pack(form, *size) + content[at + struct.calcsize(form) :]


def noise(kind: str, **options: Any) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(values), kind, **options)


@cache
def bad() -> dict[str, tuple[bytes, str]]:
    """Name → content, and what the line must say."""
    jpeg, size = picture("JPEG"), "pixels"
    start = jpeg.index(b"\xff\xc0") + 5
    tiff = picture("TIFF")
    lost = noise("JPEG")
    return {
        "torn.jpg": (lost[: len(lost) * 3 // 4], "broken picture"),
        "torn progressive.jpg": (noise("JPEG", progressive=True)[:2000], "broken picture"),
        "never finished.jpg": (lost[: len(lost) // 2].ljust(len(lost), b"\0"), "end is missing"),
        "torn.png": (noise("PNG")[:5000], "broken picture"),
        "torn.gif": (noise("GIF")[:2000], "broken picture"),
        "torn.webp": (noise("WEBP")[:2000], "broken picture|not a picture"),
        "torn.tif": (noise("TIFF", compression="tiff_lzw")[:5000], "broken picture|not a picture"),
        "fewer rows.tif": (
            wide_tiff(0).replace(
                struct.pack("<HHII", 257, 4, 1, 40), struct.pack("<HHII", 257, 4, 1, 90)
            ),
            "rows is missing",
        ),
        "torn.bmp": (noise("BMP")[:5000], "broken picture"),
        "bomb.png": (bomb(), size),
        "bomb.jpg": (with_size(jpeg, start, ">HH", 65_000, 65_000), size),
        "bomb.bmp": (with_size(picture("BMP"), 18, "<ii", 60_000, 60_000), size),
        "bomb.gif": (with_size(picture("GIF"), 6, "<HH", 65_535, 65_535), size),
        "bomb.ppm": (b"P6 60000 60000 255\n" + bytes(300), size),
        "bomb.tif": (
            tiff.replace(
                struct.pack("<HHII", 256, 4, 1, 64), struct.pack("<HHII", 256, 4, 1, 90_000)
            )
            .replace(struct.pack("<HHII", 257, 4, 1, 40), struct.pack("<HHII", 257, 4, 1, 90_000))
            .replace(struct.pack("<HHII", 256, 3, 1, 64), struct.pack("<HHII", 256, 4, 1, 90_000))
            .replace(struct.pack("<HHII", 257, 3, 1, 40), struct.pack("<HHII", 257, 4, 1, 90_000)),
            size,
        ),
        "bomb.webp": (
            with_size(good()["moving.webp"][0], 24, "6s", (b"\xfe\x3f\0" * 2)),
            size,
        ),
        "nothing.png": (b"", "0 bytes"),
        "text.jpg": (b"Dear reader, this is no picture.\n", "not a picture"),
        "drawing.png": (
            b"<?xml version='1.0'?>\n<svg width='9' height='9'></svg>",
            "an SVG drawing",
        ),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        "program.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
            "PostScript",
        ),
        "signature.png": (b"\x89PNG\r\n\x1a\n", "not a picture|broken picture"),
        "random.webp": (np.random.default_rng(1).bytes(4000), "not a picture"),
    }


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_image(path)
    line = str(error.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize("name", good())
def test_it_is_read_as_it_looks(name: str, tmp_path: Path) -> None:
    content, shown, off = good()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that Pillow says reaches the user either
        got = load_image(path)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert got.shape == shown.shape
    assert np.abs(got - shown.astype(float)).mean() <= off
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", bad())
def test_it_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = bad()[name]
    path = tmp_path / name
    path.write_bytes(content)
    if name.startswith("bomb"):
        for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile):
            monkeypatch.setattr(kind, "load", lambda *_: pytest.fail("a bomb was decoded"))
    assert any(part in refusal(path) for part in message.split("|"))


@pytest.mark.parametrize("name", [n for n in good() if n.split(".")[0] in ("plain", "progressive")])
def test_no_part_of_a_picture_passes_for_the_whole(name: str, tmp_path: Path) -> None:
    content = good()[name][0]
    (tmp_path / "whole").write_bytes(content)
    whole, path = load_image(tmp_path / "whole"), tmp_path / f"torn-{name}"
    refused = 0
    for share in np.linspace(0.02, 0.999, 25):
        path.write_bytes(content[: int(share * len(content))])
        try:
            got = load_image(path)
        except UserError:
            refused += 1
        else:
            assert np.array_equal(got, whole)
    assert refused > 15


def test_damage_anywhere_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    contents = [content for content, *_ in good().values() if len(content) < 20_000]
    refused = 0
    for i in range(300):
        data = bytearray(contents[i % len(contents)])
        for at in rng.integers(0, min(len(data), 400), 3):
            data[at] = rng.integers(256)
        path = tmp_path / "damaged.bin"
        path.write_bytes(data)
        try:
            assert load_image(path).dtype == np.uint8
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
    assert 100 < refused < 290


def test_a_picture_that_lost_its_end_is_refused_whatever_others_ask_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "torn.jpg"
    path.write_bytes(bad()["torn.jpg"][0])
    with Image.open(path) as image:
        assert np.asarray(image)[-8:].std() == 0  # so it would be learnt: grey below
    assert "truncated" in refusal(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


NOTES = {
    "plain.png": "",
    "moving.png": "first of several",
    "moving.gif": "first of several",
    "moving.webp": "first of several",
    "pages.tif": "first of several",
    "RGBA.png": "transparent",
    "wide gamut.png": "to sRGB from Wide",
    "broken profile.png": "profile is broken",
    "grey profile.png": "of another kind",
    "inks.jpg": "approximate",
    "broken notes.png": "EXIF notes are broken",
}


@pytest.mark.parametrize(("name", "note"), NOTES.items())
def test_what_was_decided_is_noted(name: str, note: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(good()[name][0])
    notes = read_picture(tmp_path / name).notes
    assert len(notes) == bool(note)
    assert note in "".join(notes)


def test_a_profile_that_is_srgb_changes_nothing(tmp_path: Path) -> None:
    from PIL import ImageCms

    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "a.png").write_bytes(picture("PNG", icc_profile=same))
    assert np.array_equal(load_image(tmp_path / "a.png"), colours())
    # The control: with a wide profile the same numbers mean other colours.
    (tmp_path / "b.png").write_bytes(picture("PNG", icc_profile=profile(P3)))
    assert np.abs(load_image(tmp_path / "b.png").astype(int) - colours()).mean() > 3


def test_heic_names_its_extra_or_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "phone.HEIC"
    path.write_bytes(HEIC_STUB)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
        patch.delitem(Image.OPEN, "HEIF", raising=False)
        assert "tomjerry-utils[heic]" in refusal(path)
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(colours())).save(path, quality=95)
    assert np.abs(load_image(path).astype(int) - colours()).mean() < 3
    path.write_bytes(path.read_bytes()[:-200])
    assert "broken picture" in refusal(path)


def test_avif_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files.features, "check", lambda name: name != "avif")
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(40))
    assert "pillow>=11.3" in refusal(tmp_path / "a.avif")


def test_a_vast_width_costs_what_it_holds(tmp_path: Path) -> None:
    values = np.tile(colours()[:2], (1, 1000, 1))
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(values), "PNG"))
    assert (tmp_path / "a.png").stat().st_size < 10_000
    assert load_image(tmp_path / "a.png").shape == (2, 64_000, 3)
    assert load_image(tmp_path / "a.png", 32).shape == (32, 32, 3)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.png")
    (tmp_path / "file.png").write_bytes(picture("PNG"))
    assert "not a directory" in refusal(tmp_path / "file.png" / "x.png")
    assert "no picture" in refusal(tmp_path / "none.png")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300 + ".png"))
    for name, message in links(tmp_path).items():
        assert message in refusal(tmp_path / name)


def links(folder: Path) -> dict[str, str]:
    """Make what is no picture file: name → what the line must say."""
    made = {}
    try:
        (folder / "dangling.png").symlink_to("nowhere.png")
        (folder / "circle.png").symlink_to("circle.png")
    except OSError:
        return {}
    made = {"dangling.png": "a file that is not there", "circle.png": "cannot be read"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
        made["pipe.png"] = "a pipe or a device"
    return made


def test_an_unreadable_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG"))

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fails)
    assert "cannot be read (input/output error)" in refusal(tmp_path / "a.png")


# ---- all in one folder, by the public command ----------------------------------------------------


def tomjerry(*arguments: str, cwd: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; `limit` is the largest file it may write, in bytes."""

    def confine() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # Coverage writes a file of its own at the end, which the limit would stop with a traceback.
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "COVERAGE_"))}
    found_by = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "tomjerry_utils", *arguments],
        cwd=cwd,
        env={**ours, "PYTHONPATH": found_by, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,  # what blocks, such as a pipe, must not block the tests
        preexec_fn=confine if limit else None,
        check=False,
    )


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """All that lies in a folder: hash of what it holds and time of change."""
    found = {}
    for path in folder.rglob("*"):
        kept = hash_file(path) if path.is_file() else ""
        found[os.fsencode(path).hex()] = kept, path.lstat().st_mtime_ns
    return found


def test_one_folder_of_everything(tmp_path: Path) -> None:
    data, here, out = (tmp_path / name for name in ("data", "here", "out"))
    for folder in (data / "folder.png", here):
        folder.mkdir(parents=True)
    lines = {}
    for name, (content, *_) in good().items():
        if not (data / name).exists():  # on a disk that ignores case, one of the two
            (data / name).write_bytes(content)
            lines[name] = ""
    for name, (content, message) in bad().items():
        (data / name).write_bytes(content)
        lines[name] = message
    (data / "phone.heic").write_bytes(HEIC_STUB)
    lines["phone.heic"] = "broken picture|heic"
    (data / "folder.png" / "inside.png").write_bytes(picture("PNG", 90))
    lines["folder.png/inside.png"] = ""
    lines |= links(data)
    try:
        Path(os.fsdecode(os.fsencode(data) + b"/\xff\xfe.png")).write_bytes(picture("PNG", 91))
        lines["\\udcff\\udcfe.png"] = ""
    except OSError:
        pass  # macOS takes no such names
    (data / "notes.txt").write_text("left alone")
    before = state(data)
    result = tomjerry("collect", "--no-screens", "--folder", str(data), "--out", str(out), cwd=here)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert state(data) == before
    assert not list(here.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "here", "out"]
    manifest = (out / "manifest.jsonl").read_bytes()
    rows = {row["origin"]: row for row in map(json.loads, manifest.splitlines())}
    assert rows.keys() == lines.keys()
    for name, message in lines.items():
        row = rows[name]
        # Many of them show the same.
        read = row["kept"] or "duplicate of" in row["reason"]
        assert read == (not message), (name, row["reason"])
        assert "\n" not in row["reason"]
        if message:
            assert any(part in row["reason"] for part in message.split("|"))
            assert name in row["reason"]
        elif row["kept"]:
            assert hash_file(out / row["file_name"]) == row["sha256"]
    for name in {name for name in good() if name in lines and rows[name]["kept"]}:
        assert np.array_equal(load_image(out / rows[name]["file_name"]), load_image(data / name))
    for name, note in NOTES.items():
        assert note in rows[name]["read_as"]
        assert bool(note) == bool(rows[name]["read_as"])
    told = (out / "DATASHEET.md").read_text(encoding="utf-8")
    kept_notes = Counter(row["read_as"] for row in rows.values() if row["kept"] and row["read_as"])
    assert kept_notes
    assert all(f"| folder | {note} | {n} |" in told for note, n in kept_notes.items())
    # Again, in this process: nothing is made anew, and the manifest is the same.
    again = collect.collect_command(out, folders=[str(data)], screen=False)
    assert (out / "manifest.jsonl").read_bytes() == manifest
    assert len(again.rows) == len(lines)
    assert state(data) == before


# ---- a full disk ---------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    folder.mkdir()
    for i in range(20):
        (folder / f"p{i:02}.png").write_bytes(picture("PNG", i))
    values = np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8)
    Image.fromarray(values).save(folder / "p10-large.png")


def finished_names(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no limit of file sizes")
@pytest.mark.parametrize("limit", [30_000, 7_000])
def test_a_full_disk_is_one_line_and_the_next_run_finishes(limit: int, tmp_path: Path) -> None:
    """The first limit stops a picture of 40 kB, the second the manifest too."""
    data, out, calm = (tmp_path / name for name in ("data", "out", "calm"))
    fill(data)
    if limit < 30_000:
        (data / "p10-large.png").unlink()
    before = state(data)
    whole = collect.collect_command(calm, folders=[str(data)], screen=False)
    stopped = tomjerry(
        "collect",
        "--no-screens",
        "--folder",
        str(data),
        "--out",
        str(out),
        cwd=tmp_path,
        limit=limit,
    )
    assert stopped.returncode == 2, stopped.stderr
    said = stopped.stderr.strip().splitlines()[-1]
    assert said.startswith("tomjerry: error: ")
    assert str(out) in said
    assert "free some space" in said
    assert "Traceback" not in stopped.stderr
    assert not (out / "manifest.jsonl").exists()
    assert not list(out.rglob(".tmp-*"))
    for path in finished_names(out):
        assert path.read_bytes() == (calm / path.relative_to(out)).read_bytes()
    collect.collect_command(out, folders=[str(data)], screen=False)
    assert (out / "manifest.jsonl").read_bytes() == (calm / "manifest.jsonl").read_bytes()
    names = {p.relative_to(calm) for p in finished_names(calm)}
    assert {p.relative_to(out) for p in finished_names(out)} == names
    assert len(whole.rows) == 20 + (limit >= 30_000)
    assert state(data) == before
