"""Stage 01: sources, shots, curation, splits, resume, export."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, collect, films, judging, scenes, sources
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import data_root, hash_file

command = partial(collect.collect_command, smallest=8)  # as the pictures here are
STARTER = data_root() / "starter"
CLIP = STARTER / "clip" / "big_buck_bunny_20s.mp4"


def picture(seed: int, size: int = 40, style: str = "cartoon") -> np.ndarray:
    return scenes.render(scenes.describe(9_100_000 + seed), style, size).image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def film(path: Path, frames: Sequence[np.ndarray]) -> Path:
    import av

    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def thumb(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(films.THUMB, Image.Resampling.BILINEAR))


def shot(seed: int, frames: int) -> list[np.ndarray]:
    scene = scenes.describe(9_200_000 + seed)
    return [scenes.render(s, "cartoon", 96).image for s in scenes.animate(scene, frames)]


def slide(seed: int, frames: int) -> list[np.ndarray]:
    """A shot that costs one rendering: a camera that moves slowly over a scene."""
    wide = picture(seed, 128)
    return [np.ascontiguousarray(wide[16:112, k // 2 : k // 2 + 96]) for k in range(frames)]


def pattern(seed: int) -> np.ndarray:
    """A picture that costs nothing."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


@pytest.fixture(scope="module")
def smoke(session_runs: Path) -> collect.Collection:
    return collect.ensure(load_profile("smoke"))


# ---- shots ---------------------------------------------------------------------------------------


def test_clip_cuts_are_found_and_nothing_else() -> None:
    with (CLIP.parent / "cuts.csv").open(newline="") as file:
        truth = [int(row["first_frame_of_new_shot"]) for row in csv.DictReader(file)]
    found = films.open_film(CLIP)
    assert len(found.times) == 492
    assert found.cuts[0] == 0
    hits = [t for t in truth if any(abs(t - c) <= 1 for c in found.cuts[1:])]
    assert hits == truth
    assert len(found.cuts) - 1 - len(hits) <= 1


def test_cuts_between_moving_scenes_but_not_flashes_or_pans() -> None:
    shots = [shot(seed, 14 + seed) for seed in range(4)]
    frames = [frame for part in shots for frame in part]
    truth = list(np.cumsum([len(part) for part in shots])[:-1])
    assert films.find_cuts(map(thumb, frames)) == truth
    flashed = list(frames)
    for i in (7, 22, 23, 38):
        flashed[i] = np.full_like(frames[i], 255)
    assert films.find_cuts(map(thumb, flashed)) == truth
    wide = picture(1, 256)
    pan = [np.ascontiguousarray(wide[60:150, 3 * k : 3 * k + 160]) for k in range(30)]
    assert films.find_cuts(map(thumb, pan)) == []
    assert films.find_cuts([]) == films.find_cuts([thumb(wide)]) == []


def test_frames_of_a_film_stay_inside_their_shots() -> None:
    found = films.Film(Path("x"), [i / 10 for i in range(100)], [0, 3, 50])
    assert [found.shot_of(i) for i in (0, 2, 3, 49, 50, 99)] == [0, 0, 1, 1, 2, 2]
    chosen = found.sample(1.0)
    assert chosen == sorted(set(chosen))
    assert [sum(found.shot_of(c) == s for c in chosen) for s in range(3)] == [1, 5, 5]
    assert not {0, 2, 3, 49, 50, 99} & set(chosen)


def test_what_is_no_film_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(CLIP.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"broken\.mp4"):
        films.open_film(broken)
    with pytest.raises(UserError, match="check the path"):
        films.open_film(tmp_path / "none.mp4")
    out = command(tmp_path / "out", videos=[str(broken), str(CLIP)], every_s=5.0)
    bad = [row for row in out.rows if row["origin"] == "broken.mp4"]
    assert len(bad) == 1
    assert not bad[0]["kept"]
    assert "broken.mp4" in bad[0]["reason"]
    assert len(out.select(role=None)) >= 9


# ---- the stage -----------------------------------------------------------------------------------


def test_stage_collects_scenes_starter_and_clip(smoke: collect.Collection) -> None:
    profile = load_profile("smoke")
    for domain, style_labels in (("cartoon", scenes.LABELS[:3]), ("natural", scenes.LABELS[3:])):
        rows = smoke.select(domain=domain)
        assert {row["source"] for row in rows} == {"scenes"}
        labels = [row["label"] for row in rows]
        assert {name: labels.count(name) for name in style_labels} == dict.fromkeys(
            style_labels, profile.collect.per_class
        )
        first, end = scenes.RANGES[domain]
        assert all(first <= row["seed"] < end for row in rows)
        assert all(
            row["text"] == scenes.caption(scenes.describe(row["seed"]), domain) for row in rows
        )
    starter = smoke.select(source="starter")
    assert {row["role"] for row in starter} == {"out_of_domain"}
    dropped = [row for row in smoke.rows if row["source"] == "starter" and not row["kept"]]
    assert len(starter) + len(dropped) == 152
    # Some vendors drew the same emoji twice.
    assert 0 < len(dropped) < 10
    kinds = {judging.kind_of(row["reason"]) for row in dropped}
    assert kinds <= {"near duplicate", "text or watermark"}
    assert {row["class"] for row in starter} == {"tom", "jerry", ""}
    assert all(row["rights"] for row in starter)
    clip = smoke.select(source="clip")
    assert {row["shot"] for row in clip} == set(range(9))
    with (smoke.folder / "shots.csv").open(newline="") as file:
        assert [int(r["first_frame"]) for r in csv.DictReader(file)][1:3] == [18, 84]
    for row in smoke.rows:
        assert row["kept"] != bool(row["reason"])
        if row["kept"]:
            assert hash_file(smoke.path(row)) == row["sha256"]
    record = json.loads((smoke.folder / "provenance.json").read_text())
    assert record["extra"]["kept"] == sum(row["kept"] for row in smoke.rows)


def test_pictures_are_the_scenes_themselves(smoke: collect.Collection) -> None:
    rows = smoke.select(domain="natural")[:3]
    images = smoke.images(rows)
    assert images.shape == (3, 32, 32, 3)
    for row, image in zip(rows, images, strict=True):
        drawn = scenes.render(scenes.describe(row["seed"]), "natural", 32).image
        assert np.array_equal(image, drawn)
    mixed = smoke.images([smoke.select(source="starter")[0], smoke.select(source="clip")[0]], 48)
    assert mixed.shape == (2, 48, 48, 3)


def test_second_call_is_the_first(
    smoke: collect.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "collect", lambda *a, **k: pytest.fail("collected again"))
    # The pictures do not depend on the training seed.
    for seed in (None, 7):
        again = collect.ensure(load_profile("smoke", seed=seed))
        assert again.rows == smoke.rows
        assert again.key == smoke.key


def test_no_group_crosses_the_split(smoke: collect.Collection) -> None:
    sides: dict[str, set[str]] = {}
    for row in smoke.rows:
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    splits = [judging.split_of(f"g{i}", 0.2) for i in range(4000)]
    assert 0.17 < splits.count("validation") / 4000 < 0.23
    # Raising the share only moves groups one way: nothing trained on becomes validation by chance.
    more = [judging.split_of(f"g{i}", 0.3) for i in range(4000)]
    assert all(b == "validation" for a, b in zip(splits, more, strict=True) if a == "validation")


def test_data_sheet_and_gallery(smoke: collect.Collection) -> None:
    text = (smoke.folder / "DATASHEET.md").read_text()
    assert "| scenes | training | cartoon | both |" in text
    assert "CC-BY" in text
    assert "No training pictures of" not in text
    rows = collect.gallery(smoke, 4, seed=1)
    assert [title for title, _ in rows[:2]] == ["cartoon: tom", "cartoon: jerry"]
    assert all(0 < len(part) <= 4 for _, part in rows)
    assert collect.gallery(smoke, 4, seed=1) == rows
    assert collect.gallery(smoke, 4, seed=2) != rows


# ---- folders -------------------------------------------------------------------------------------


def test_folder_classes_duplicates_and_damaged_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = save(data / "natural" / "cat" / "a.png", picture(1, style="natural"))
    (data / "natural" / "cat" / "copy of a.png").write_bytes(first.read_bytes())
    save(data / "natural" / "mouse" / "ü.jpg", picture(2, style="natural"))
    save(data / "Tom" / "t.png", picture(3, 700))
    save(data / "elsewhere" / "a.png", picture(4))
    save(data / "elsewhere" / "flat.png", np.full((30, 30, 3), 7, np.uint8))
    (data / "elsewhere" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (data / "elsewhere" / "zero.png").touch()
    (data / "elsewhere" / "notes.txt").write_text("not a picture")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    out = command(tmp_path / "out", folders=[str(data)], short_side=64)
    by_origin = {row["origin"]: row for row in out.rows}
    assert len(by_origin) == 8
    assert by_origin["natural/cat/a.png"]["label"] == "cat"
    assert by_origin["natural/cat/copy of a.png"]["reason"].startswith("duplicate of images/")
    assert by_origin["natural/mouse/ü.jpg"]["class"] == "jerry"
    assert by_origin["Tom/t.png"]["domain"] == "cartoon"
    assert out.images([by_origin["Tom/t.png"]]).shape[1] == 64
    assert by_origin["elsewhere/a.png"]["role"] == "unlabelled"
    assert "empty" in by_origin["elsewhere/flat.png"]["reason"]
    for name in ("torn.jpg", "zero.png"):
        assert f"elsewhere/{name}" in by_origin[f"elsewhere/{name}"]["reason"]
    assert len(out.select()) == 3
    assert len(out.select(role=None)) == 4
    assert {path: path.read_bytes() for path in before} == before


def test_metadata_beside_pictures_is_read(tmp_path: Path) -> None:
    save(tmp_path / "in" / "1.png", picture(1))
    notes = {"file_name": "1.png", "class": "both", "domain": "cartoon", "text": "t", "group": "g"}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(notes) + "\nbroken\n")
    row = command(tmp_path / "out", folders=[str(tmp_path / "in")]).rows[0]
    assert (row["label"], row["text"], row["group"]) == ("tom_jerry", "t", "in/g")


def test_attribution_keeps_characters_together(tmp_path: Path) -> None:
    out = command(tmp_path / "out", folders=[str(STARTER)], short_side=32)
    with (STARTER / "attribution.csv").open(newline="", encoding="utf-8") as file:
        told = {
            r["file"]: r["character_group"]
            for r in csv.DictReader(file)
            if not r["file"].endswith(".mp4")
        }
    assert {row["group"].removeprefix("starter/") for row in out.rows} == set(told.values())
    sides: dict[str, set[str]] = {}
    for row in out.rows:
        sides.setdefault(told[row["origin"]], set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert set().union(*sides.values()) == {"train", "validation"}


def test_numbered_frames_share_a_group() -> None:
    assert sources.group_of("ep1/frame0003.jpg") == sources.group_of("ep1/frame0060.jpg")
    assert sources.group_of("ep1/frame0003.jpg") != sources.group_of("ep1/frame0064.jpg")
    assert sources.group_of("ep1/frame0003.jpg") != sources.group_of("ep2/frame0003.jpg")
    assert sources.group_of("cat.jpg") == "cat.jpg"


# ---- the command ---------------------------------------------------------------------------------


def test_command_reads_a_film(tmp_path: Path) -> None:
    path = film(tmp_path / "my film.mp4", [f for s in range(3) for f in slide(s, 24)])
    out = command(tmp_path / "out", videos=[str(path)], every_s=0.5)
    assert [row["shot"] for row in out.rows] == [0, 0, 1, 1, 2, 2]
    assert all(row["kept"] and row["domain"] == "cartoon" for row in out.rows)
    assert [row["time_s"] for row in out.rows] == pytest.approx(
        [row["frame"] / 24 for row in out.rows], abs=1e-5
    )
    with (tmp_path / "out" / "shots.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(r["video"], int(r["first_frame"])) for r in found] == [
        ("my film.mp4", frame) for frame in (0, 24, 48)
    ]
    shown = out.images([out.rows[0]], 96)[0].astype(float)
    assert np.abs(shown - slide(0, 24)[out.rows[0]["frame"]]).mean() < 12


def test_command_mistakes_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture(1))
    for arguments, told in (
        ({}, "nothing to collect"),
        ({"folders": [str(tmp_path / "none")]}, "check the path"),
        ({"archives": [str(tmp_path / "none.zip")]}, "check the path"),
        ({"folders": [str(tmp_path / "in")], "domain": "drawn"}, "no domain 'drawn'"),
        ({"folders": [str(tmp_path)]}, "inside each other"),
        ({"folders": [str(tmp_path / "in")], "every_s": 0.0}, "above 0"),
    ):
        with pytest.raises(UserError, match=told):
            command(tmp_path / "out", **arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        command(tmp_path / "out", folders=[str(tmp_path / "empty")])


def test_second_call_redoes_only_what_changed(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "in" / "cat" / f"{i}.png", picture(i))
    arguments = {"folders": [str(tmp_path / "in")], "domain": "natural", "screen": False}
    first = command(tmp_path / "out", **arguments)
    written = {row["file_name"]: first.path(row).stat().st_mtime_ns for row in first.rows}
    manifest = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    again = command(tmp_path / "out", **arguments)
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == manifest
    assert {r["file_name"]: again.path(r).stat().st_mtime_ns for r in again.rows} == written
    # One damaged in the output, one changed at its source, one gone.
    again.path(again.rows[0]).write_bytes(b"torn")
    save(tmp_path / "in" / "cat" / "1.png", picture(11))
    (tmp_path / "in" / "cat" / "2.png").unlink()
    third = command(tmp_path / "out", **arguments)
    assert hash_file(third.path(third.rows[0])) == first.rows[0]["sha256"]
    assert third.rows[1]["sha256"] != first.rows[1]["sha256"]
    assert third.path(third.rows[2]).stat().st_mtime_ns == written[first.rows[3]["file_name"]]
    files = {f"images/natural/{p.name}" for p in (tmp_path / "out/images/natural").iterdir()}
    assert files == {row["file_name"] for row in third.rows}
