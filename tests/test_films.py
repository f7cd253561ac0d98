"""Films: shots, dissolves, borders, frames not worth keeping, and files that are not in order."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import film_clips
import numpy as np
import pytest
from film_clips import CLIP, boxed, clip_shots, edit, score, write
from PIL import Image

from tomjerry_utils import UserError, collect, film_frames, films
from tomjerry_utils.film_checks import (
    BLACK,
    BLURRED,
    CARD,
    COMBED,
    Borders,
    combing,
    is_card,
    sharpness,
)
from tomjerry_utils.runs import read_jsonl

SIZE = (160, 90)


def shot(number: int, frames: int, first: int = 0) -> list[np.ndarray]:
    return clip_shots(*SIZE)[number][first : first + frames]


def pasted(frames: int, height: int = 90, width: int = 160) -> list[np.ndarray]:
    """Three shots of noise-free patterns that cost nothing, of any size."""
    out = []
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 255, (6, 10, 3), np.uint8)
        big = np.asarray(Image.fromarray(coarse).resize((width + 40, height), 0))
        out += [np.ascontiguousarray(big[:, k : k + width]) for k in range(frames)]
    return out


@pytest.mark.parametrize("kind", ["graded", "flashes", "pans"])
def test_cuts_of_edited_films(tmp_path: Path, kind: str) -> None:
    made = edit(kind, 5, shots=7)
    found = films.open_film(write(tmp_path / "film.mp4", made.frames))
    hits, false, missed = score(found.hard, made.cuts)
    assert hits + missed == 6
    assert missed + false <= 1
    assert not found.transitions
    assert found.cuts == [0, *found.hard]


def test_no_frame_is_taken_from_a_dissolve_or_a_fade(tmp_path: Path) -> None:
    made = film_clips.Edit()
    made.cut_to(shot(1, 40))
    made.dissolve_to(shot(3, 40), 12)
    made.cut_to(shot(6, 30))
    made.fade_to(shot(4, 40), 10, 4)
    path = write(tmp_path / "film.mkv", made.frames)
    found = films.open_film(path)
    assert [t.kind for t in found.transitions] == ["dissolve", "fade out", "fade in"]
    assert score(found.hard, made.cuts) == (1, 0, 0)
    assert len(found.cuts) == 4
    chosen = found.sample(0.2)
    assert len(chosen) >= 12
    for first, end in made.dissolves + made.fades:
        assert not [c for c in chosen if first <= c < end]
    assert {found.shot_of(c) for c in chosen} == {0, 1, 2, 3}
    # Without the spans found, the same settings do take such frames.
    found.transitions = []
    assert [c for c in found.sample(0.2) for a, b in made.dissolves if a <= c < b]


def test_film_in_a_slow_movement_is_one_shot() -> None:
    wide = np.asarray(Image.fromarray(shot(0, 1)[0]).resize((256, 144)))
    still = [
        np.asarray(Image.fromarray(wide[20:110, 2 * k : 2 * k + 120]).resize(films.THUMB))
        for k in range(60)
    ]
    finder = films.ShotFinder()
    for number, thumb in enumerate(still):
        finder.push(number, thumb)
    found = finder.finish()
    assert not found.cuts
    assert not found.transitions


@pytest.mark.parametrize("box", [(12, 12, 0, 0), (0, 0, 20, 20), (0, 0, 0, 0), (5, 5, 6, 6)])
def test_borders_are_cut_off(tmp_path: Path, box: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = box
    colour = (60, 20, 20) if box == (5, 5, 6, 6) else (0, 0, 0)
    frames = [*shot(0, 18), *shot(1, 30), *shot(3, 30), *shot(4, 30)]
    for i, frame in enumerate(frames):
        out = np.empty_like(frame)
        out[:] = colour
        inner = Image.fromarray(frame).resize((160 - left - right, 90 - top - bottom))
        out[top : 90 - bottom, left : 160 - right] = np.asarray(inner)
        frames[i] = out
    found = films.open_film(write(tmp_path / "film.mp4", frames))
    for cut, true in zip(found.borders, box, strict=True):
        assert (cut == 0) if true == 0 else (true <= cut <= true + 4)
    picture = next(found.pictures(found.sample(10.0)[:1]))
    assert picture is not None
    assert picture.shape[0] == 90 - sum(found.borders[:2])
    assert picture.shape[1] == 160 - sum(found.borders[2:])


def test_dark_scenes_are_not_cropped() -> None:
    night = Borders()
    rng = np.random.default_rng(0)
    for k in range(30):
        frame = np.full((90, 160), 17, np.uint8)  # a lamp moves in the dark
        y, x = 45 + int(20 * np.sin(k / 3)), 20 + 4 * k
        frame[y - 12 : y + 12, max(x - 14, 0) : x + 14] = rng.integers(60, 200, dtype=np.uint8)
        night.add(frame)
    assert night.find() == (0, 0, 0, 0)
    # One bright shot in a film of dark ones shows where the picture ends.
    for k in range(4):
        night.add(np.roll(shot(1, 1)[0][..., 1], 9 * k, axis=1))
    assert night.find() == (0, 0, 0, 0)
    boxes = Borders()
    for k, frame in enumerate([*shot(0, 18), *shot(1, 30)]):
        boxes.add(boxed(frame // (1 + 3 * (k < 18)), 0.1)[..., 1])
    assert boxes.find()[0] in range(9, 13)


def writing(lines: int = 5) -> np.ndarray:
    from PIL import ImageDraw, ImageFont

    image = Image.new("RGB", (320, 180), (8, 8, 12))
    draw = ImageDraw.Draw(image)
    for k in range(lines):
        text = "directed by somebody with long names"
        draw.text((50, 30 + 24 * k), text, (235, 230, 220), font=ImageFont.load_default(14))
    return np.asarray(image)


def combed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = a.copy()
    out[1::2] = b[1::2]
    return out


def test_unusable_frames_are_told_from_good_ones() -> None:
    large = clip_shots(320, 180)
    luma = [frame[..., 1] for part in large for frame in part[::6]]
    assert max(combing(a) for a in luma) < 0.002
    assert combing(combed(large[4][0], np.roll(large[4][0], 6, axis=1))[..., 1]) > 0.01
    assert not any(is_card(a) for a in luma)
    assert is_card(writing()[..., 1])
    soft = [np.asarray(Image.fromarray(a).resize((32, 18)).resize((320, 180))) for a in luma]
    assert max(map(sharpness, soft)) < 0.5 * float(np.median([sharpness(a) for a in luma]))


def test_dropped_frames_are_rows_with_reasons(tmp_path: Path) -> None:
    large = clip_shots(320, 180)
    bad = {
        BLACK: [np.zeros((180, 320, 3), np.uint8)] * 30,
        CARD: [writing()] * 30,
        COMBED: [combed(f, np.roll(f, 10, axis=1)) for f in large[4][:30]],
        BLURRED: [
            np.asarray(Image.fromarray(f).resize((16, 9)).resize((320, 180))) for f in large[6][:25]
        ],
    }
    frames = list(large[1][:30])
    for part, good in zip(bad.values(), (large[3], large[0], large[2], large[5]), strict=True):
        frames += [*part, *good[:30]]
    path = write(tmp_path / "film.mkv", frames, options={"crf": "14"})
    out = collect.collect_command(tmp_path / "out", videos=[str(path)], every_s=5.0)
    dropped = {row["reason"] for row in out.rows if not row["kept"]}
    assert dropped == set(bad)
    assert len(out.select(role=None)) >= 5
    # A second run writes the same bytes, from what the first one found or anew.
    again = collect.collect_command(tmp_path / "again", videos=[str(path)], every_s=5.0)
    first, second = (c.folder / "manifest.jsonl" for c in (out, again))
    assert first.read_bytes() == second.read_bytes()
    assert read_jsonl(first)


def test_what_was_found_is_written_down_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", [*shot(0, 18), *shot(1, 30), *shot(3, 30)])
    found = films.open_film(path)
    found.save(tmp_path / "saved.npz")
    loaded = films.Film.load(tmp_path / "saved.npz", path)
    assert loaded == found
    assert loaded.choose(0.3) == found.choose(0.3)
    wanted = found.sample(0.3)
    frames = dict(films.read_frames(path))
    for number, picture in zip(wanted, loaded.pictures(wanted), strict=True):
        assert np.array_equal(picture, frames[number].to_ndarray(format="rgb24"))


def test_packets_tell_where_a_shot_may_begin() -> None:
    sizes = [9000, *[100, 300] * 10, 900, *[100, 300] * 10, *[20] * 20, 8000, *[100] * 5]
    keys = [0, len(sizes) - 6]
    index = film_frames.Index(array("q", range(len(sizes))), array("q", keys), 0.04)
    index.sizes = array("q", sizes)
    found = film_frames.loud(index)
    assert found[[0, 21, 42, len(sizes) - 6]].all()  # keys, a costly frame, the first plain one
    assert not found[5:21].any() and not found[22:41].any() and not found[56:-6].any()


def test_a_film_whose_sizes_say_too_little_is_looked_at_frame_by_frame(tmp_path: Path) -> None:
    """Sixteen frames in a row that only later ones foretell."""
    rigid = {"x264-params": "bframes=16:b-adapt=0:b-pyramid=none:scenecut=0:keyint=200"}
    frames = [*shot(1, 25), *shot(2, 25), *shot(3, 25)]
    path = write(tmp_path / "film.mp4", frames, options=rigid)
    index = film_frames.read_index(path)
    with pytest.raises(LookupError):
        list(film_frames.look_through(path, index))
    index.sizes = array("q")
    with pytest.raises(LookupError):
        list(film_frames.look_through(path, index))
    assert score(films.open_film(path).hard, [25, 50]) == (2, 0, 0)


def test_the_only_frame_of_a_shot_is_one_that_is_cheap_to_read(tmp_path: Path) -> None:
    frames = [*shot(1, 48), *shot(2, 48)]
    path = write(tmp_path / "film.mp4", frames, gop=30, options={"sc_threshold": "0"})
    found = films.open_film(path)
    assert found.index is not None
    keys = found.index.keys
    for number in found.sample(60.0):
        assert min(number - key for key in keys if key <= number) <= 6
    # Where there are several, they are evenly spread instead.
    several = found.sample(0.5)
    assert [round(number / 12 - 0.5) for number in several] == list(range(8))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("a.mp4", "libx264", "yuv420p", (160, 90)),
        ("odd.mkv", "ffv1", "yuv420p", (161, 91)),
        ("deep.mkv", "ffv1", "yuv422p10le", (160, 90)),
        ("old.avi", "mpeg4", "yuv420p", (160, 90)),
        ("old.mpg", "mpeg2video", "yuv420p", (160, 96)),
        ("old.ts", "mpeg2video", "yuv420p", (160, 96)),
        ("web.webm", "libvpx-vp9", "yuv420p", (160, 90)),
        ("small.mkv", "ffv1", "yuv420p", (40, 30)),
        ("grey.mkv", "ffv1", "gray", (160, 90)),
    ],
)
def test_formats(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, size: tuple[int, int]
) -> None:
    options = {"cpu-used": "8", "deadline": "realtime"} if "vp9" in codec else {}
    frames = pasted(14, size[1], size[0])
    path = write(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt, options=options)
    found = films.open_film(path)
    assert len(found.times) == 42
    assert score(found.cuts[1:], [14, 28]) == (2, 0, 0)
    chosen = found.sample(1.0)
    assert [found.shot_of(c) for c in chosen] == [0, 1, 2]
    for picture, number in zip(found.pictures(chosen), chosen, strict=True):
        assert picture is not None
        assert picture.shape == (size[1], size[0], 3)
        if pix_fmt != "gray":
            assert np.abs(picture.astype(int) - frames[number]).mean() < 25


def test_variable_rate_and_turned_films(tmp_path: Path) -> None:
    times = np.cumsum([0] + [200 if 14 <= k < 28 else 40 for k in range(41)]).tolist()
    found = films.open_film(write(tmp_path / "vfr.mkv", pasted(14), times=times))
    assert np.allclose(found.times, np.array(times) / 1000, atol=0.002)
    assert score(found.cuts[1:], [14, 28]) == (2, 0, 0)
    counts = np.bincount([found.shot_of(c) for c in found.sample(0.5)])
    assert counts.tolist() == [1, 5, 1]
    # Each against its own stored frame: two runs of an encoder need not give the same bytes.
    for rotation in (0, 90):
        path = write(tmp_path / f"{rotation}.mp4", pasted(14), rotation=rotation)
        stored = dict(films.read_frames(path))[7].to_ndarray(format="rgb24")
        picture = next(films.open_film(path).pictures([7]))
        assert picture is not None
        assert np.array_equal(picture, np.rot90(stored, rotation // 90))


def test_damaged_films_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mkv", pasted(30))
    content = whole.read_bytes()
    for name, data in {
        "cut.mkv": content[: int(0.8 * len(content))],
        "holes.mkv": content[:-3000] + os.urandom(600) + content[-2400:],
    }.items():
        (tmp_path / name).write_bytes(data)
        found = films.open_film(tmp_path / name)
        assert 20 < len(found.times) <= 90
        assert len(list(found.pictures(found.sample(1.0)))) >= 1
    folder = tmp_path / "films"
    folder.mkdir()
    mp4 = write(tmp_path / "whole.mp4", pasted(14)).read_bytes()
    (folder / "b no index.mp4").write_bytes(mp4[: len(mp4) // 2])
    (folder / "c empty.mkv").touch()
    (folder / "d text.avi").write_text("no film")
    (folder / "e.mp4").write_bytes(mp4)
    out = collect.collect_command(tmp_path / "out", videos=[str(folder)])
    reasons = [row["reason"] for row in out.rows if row["reason"]]
    assert len(reasons) == 3
    assert all("not a film that can be read" in reason for reason in reasons)
    assert "\n" not in "".join(reasons)
    assert len(out.select(role=None)) == 3


def test_memory_is_a_few_bytes_a_frame() -> None:
    finder, thumb = films.ShotFinder(), np.zeros((36, 64, 3), np.uint8)
    for number in range(400):
        finder.push(number, thumb + np.uint8(number % 7))
    assert len(finder._looks) <= 40
    marks = films.Marks()
    marks.add(0, thumb[..., 0], thumb, None)
    assert sum(values.itemsize for values in vars(marks).values()) <= 16


def test_clip_file_is_named_by_its_shots() -> None:
    found = films.open_film(CLIP)
    assert score(found.hard, film_clips.true_cuts()) == (8, 0, 0)
    assert found.borders == (0, 0, 0, 0)
    assert not found.transitions
    assert not [reason for _, reason in found.choose(0.5) if reason]
    with pytest.raises(UserError, match="check the path"):
        films.open_film(Path("nowhere.mp4"))


def test_bars_over_a_pale_sky_are_cut_off(tmp_path: Path) -> None:
    frames = [boxed(f, 0.12) for f in [*shot(4, 30), *shot(3, 30), *shot(1, 30), *shot(0, 18)]]
    top, bottom, left, right = films.open_film(write(tmp_path / "film.mp4", frames)).borders
    assert 11 <= top <= 14
    assert 11 <= bottom <= 14
    assert (left, right) == (0, 0)
