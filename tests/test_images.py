"""Pictures in and out: whatever a file holds, what arrives is (H, W, 3) uint8 or one clear line."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tomjerry_utils import UserError, scenes
from tomjerry_utils.images import (
    GROUND,
    add_grain,
    grid,
    list_images,
    load_image,
    measure_grain,
    resize,
    resize_short,
    save_image,
    to_tensor,
    to_uint8,
)

STARTER = Path(__file__).resolve().parents[1] / "data" / "starter"


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth colours, so that JPEG and Lanczos change little; no symmetry."""
    y, x = np.mgrid[0:40, 0:60] / 60
    return (np.stack([x, y, 1 - x * y], -1) * 220 + 20).astype(np.uint8)


@pytest.mark.parametrize("turned", [False, True])
def test_the_shorter_side_is_given_and_the_aspect_stays(picture: np.ndarray, turned: bool) -> None:
    given = picture.transpose(1, 0, 2) if turned else picture  # 40 × 60
    for size, longer in ((20, 30), (33, 50), (80, 120)):
        got = resize_short(given, size)
        assert got.shape == ((longer, size, 3) if turned else (size, longer, 3))
        # Nothing is cut off: the corners keep their colours.
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert np.abs(got[corner].astype(int) - given[corner]).max() < 12
    square = given[:40, :40]
    assert np.array_equal(resize_short(square, 24), resize(square, 24))


def test_png_round_trip_is_exact_and_deterministic(tmp_path: Path, picture: np.ndarray) -> None:
    first = save_image(tmp_path / "a.png", picture)
    second = save_image(tmp_path / "deep/b.png", picture)
    assert np.array_equal(load_image(first), picture)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "deep"]


def test_jpeg_round_trip_is_close(tmp_path: Path, picture: np.ndarray) -> None:
    got = load_image(save_image(tmp_path / "a.JPG", picture))
    assert np.abs(got.astype(int) - picture).mean() < 2


def test_failed_write_leaves_what_was_there(tmp_path: Path, picture: np.ndarray) -> None:
    path = save_image(tmp_path / "a.png", picture)
    with pytest.raises(ValueError, match="uint8"):
        save_image(path, picture.astype(float))
    with pytest.raises(UserError, match=r"cannot write '\.xyz'"):
        save_image(tmp_path / "a.xyz", picture)
    assert np.array_equal(load_image(path), picture)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_transparency_shows_the_soft_ground(tmp_path: Path) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 10, 10, 255)
    rgba[:, 4] = (200, 10, 10, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = load_image(tmp_path / "a.png")
    assert (got[:, :3] == (200, 10, 10)).all()
    assert (got[:, 5] == GROUND).all()
    assert np.abs(got[0, 4] - (np.array([200, 10, 10]) + GROUND) / 2).max() < 2


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.gif", transparency=0)
    got = load_image(tmp_path / "a.gif")
    assert tuple(got[0, 0]) == GROUND
    assert tuple(got[1, 1]) == (10, 200, 30)


def test_exif_rotation_is_followed(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(picture, k=-1))


def test_cmyk_grey_and_16_bit(tmp_path: Path) -> None:
    Image.new("CMYK", (3, 3), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert tuple(load_image(tmp_path / "cmyk.tif")[0, 0]) == (255, 0, 0)
    Image.new("L", (3, 3), 77).save(tmp_path / "grey.png")
    assert (load_image(tmp_path / "grey.png") == 77).all()
    Image.new("1", (3, 3), 1).save(tmp_path / "bit.png")
    assert (load_image(tmp_path / "bit.png") == 255).all()
    wide = np.array([[0, 65535], [32768, 257]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    got = load_image(tmp_path / "wide.png")
    assert got.shape == (2, 2, 3)
    assert got[..., 0].tolist() == [[0, 255], [128, 1]]
    Image.fromarray(wide // 256).save(tmp_path / "dark.png")
    assert load_image(tmp_path / "dark.png").max() == 1  # a dark 16-bit picture stays dark
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tif")
    assert load_image(tmp_path / "float.tif")[0, :, 0].tolist() == [0, 128, 255]


def test_numbers_that_are_no_brightness_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(UserError, match=r"nan\.tif.*not finite"):
        load_image(tmp_path / "nan.tif")


def _huge_png(side: int) -> bytes:
    """A PNG whose header promises `side`² pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no picture"),
        ("text.png", b"not a picture", "not a picture that can be read"),
        ("empty.png", b"", "not a picture that can be read"),
        ("large.png", _huge_png(11_000), "121 million|more than 100 million"),
        ("bomb.png", _huge_png(50_000), "pixels"),
    ],
)
def test_bad_files_give_one_line_with_the_path(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_files(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = save_image(tmp_path / f"a.{suffix}", noisy)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match="broken picture"):
        load_image(path)


def test_folder_and_unreadable_file(tmp_path: Path, picture: np.ndarray) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_image(tmp_path)
    path = save_image(tmp_path / "a.png", picture)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(UserError, match="no permission"):
        load_image(path)


def test_resize_crops_evenly(picture: np.ndarray) -> None:
    assert np.array_equal(resize(picture, (40, 60)), picture)
    square = resize(picture, 40)
    assert square.shape == (40, 40, 3)
    assert np.array_equal(square, picture[:, 10:50])
    small = resize(picture, 20)
    coarse = picture[:, 10:50].reshape(20, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(small - coarse).max() < 3
    assert resize(picture[..., 0], 16).shape == (16, 16)
    assert resize(picture, (10, 100)).shape == (10, 100, 3)


def test_resize_pads_with_the_ground_and_stretches(picture: np.ndarray) -> None:
    padded = resize(picture, 60, fit="pad")
    assert (padded[:10] == GROUND).all()
    assert (padded[-10:] == GROUND).all()
    assert np.array_equal(padded[10:50], picture)
    stretched = resize(picture, 30, fit="stretch")
    assert np.abs(stretched[15, 0].astype(int) - picture[20, 0]).max() < 5
    assert np.abs(stretched[15, -1].astype(int) - picture[20, -1]).max() < 5
    with pytest.raises(ValueError, match="no fit"):
        resize(picture, 8, fit="bend")
    with pytest.raises(ValueError, match="no picture of"):
        resize(picture, 0)


def test_load_makes_square(tmp_path: Path, picture: np.ndarray) -> None:
    path = save_image(tmp_path / "a.png", picture)
    assert load_image(path, 24).shape == (24, 24, 3)


def test_tensors_and_back_are_exact() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    tensor = to_tensor(levels)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), levels)
    assert np.array_equal(to_uint8(tensor.bfloat16())[..., 0].max(), 255)
    assert to_tensor(levels[0]).shape == (1, 3, 16, 16)
    assert to_uint8(torch.full((3, 2, 2), 9.0)).max() == 255
    tensor.zero_()  # what it holds is its own
    assert levels.max() == 255
    with pytest.raises(ValueError, match="uint8"):
        to_tensor(levels.astype(np.float32))


@pytest.mark.parametrize("amount", [0.005, 0.01, 0.03])
def test_the_grain_of_photographs_is_measured(amount: float) -> None:
    """Added noise is found again, whatever is in the picture; slopes and texture are not noise."""
    clean = scenes.render_many(range(2_000_000, 2_000_040), "natural", 64, workers=1, noise=False)
    assert measure_grain(clean["image"]) < 0.003
    taken = add_grain(clean["image"], amount, seed=0, numbers=range(40))
    assert measure_grain(taken) == pytest.approx(amount, abs=0.001 + 0.1 * amount)


def test_grain_of_flat_and_of_clipped_pictures() -> None:
    flat = np.full((6, 64, 64, 3), 120, np.uint8)
    assert measure_grain(flat) == 0
    noisy = add_grain(flat, 0.01, seed=3, numbers=range(6))
    assert measure_grain(noisy) == pytest.approx(0.01, rel=0.05)
    assert measure_grain(np.full((2, 64, 64, 3), 255, np.uint8)) == 0


def test_grain_belongs_to_the_picture_not_to_the_batch() -> None:
    flat = np.full((4, 16, 16, 3), 120, np.uint8)
    whole = add_grain(flat, 0.02, seed=1, numbers=range(4))
    assert np.array_equal(add_grain(flat[:2], 0.02, seed=1, numbers=[2, 3]), whole[2:])
    assert not np.array_equal(add_grain(flat, 0.02, seed=2, numbers=range(4)), whole)
    assert not np.array_equal(whole[0], whole[1])
    assert abs(float(whole.mean()) - 120) < 0.3
    assert np.array_equal(add_grain(flat, 0.0, seed=1, numbers=range(4)), flat)


def test_grid_places_pictures() -> None:
    images = [np.full((4, 5, 3), 10 * i, np.uint8) for i in range(1, 6)]
    sheet = grid(images, columns=3, pad=2)
    assert sheet.shape == (10, 19, 3)
    assert (sheet[:4, 7:12] == 20).all()
    assert (sheet[6:, :5] == 40).all()
    assert (sheet[6:, 14:] == 255).all()
    assert grid(images[:2], columns=5, pad=0).shape == (4, 10, 3)
    with pytest.raises(ValueError, match="picture 1 is"):
        grid([images[0], images[0][:2]], columns=2)
    with pytest.raises(ValueError, match="at least one"):
        grid([], columns=2)


def test_list_images(tmp_path: Path, picture: np.ndarray) -> None:
    for name in ("b.png", "a.JPEG", "deep/c.jpg", ".hidden/d.png", ".e.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no")
    names = [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)]
    assert names == ["a.JPEG", "b.png", "deep/c.jpg"]
    assert len(list_images(tmp_path, recursive=False)) == 2
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no pictures in"):
        list_images(tmp_path / "bare")


def test_every_starter_picture_loads() -> None:
    paths = list_images(STARTER)
    assert len(paths) > 20
    for path in paths:
        image = load_image(path, 64)
        assert image.shape == (64, 64, 3)
        assert image.std() > 5, f"{path} looks empty"
