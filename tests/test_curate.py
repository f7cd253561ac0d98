"""Curation: decisions, groups, resume after a kill at any moment, bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import (
    UserError,
    collect,
    curate,
    intake,
    judging,
    picture_review,
    scenes,
    workers,
)
from tomjerry_utils.journal import JOURNAL
from tomjerry_utils.runs import hash_file, read_jsonl

STYLES = {"cat": "natural", "mouse": "natural", "tom": "cartoon", "jerry": "cartoon"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = 96


def drawn(seed: int, folder: str = "cat", size: int = SIZE) -> np.ndarray:
    return scenes.render(scenes.describe(9_300_000 + seed), STYLES[folder], size).image


def save(path: Path, image: np.ndarray, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes in folders, with copies of several kinds, a damaged file and a tiny one."""
    home = tmp_path_factory.mktemp("mixed") / "in"
    for at, name in enumerate(STYLES):
        for i in range(8):
            save(home / STYLES[name] / name / f"{name}{LETTERS[i]}.png", drawn(100 * at + i, name))
    first = drawn(0)
    save(home / "natural" / "other" / "exact.png", first)
    save(home / "natural" / "other" / "recoded.jpg", first, quality=60)
    save(
        home / "natural" / "mouse" / "z brighter.png",
        np.clip(drawn(101, "mouse") * 1.12, 0, 255).astype("u1"),
    )
    save(home / "natural" / "mouse" / "tiny.png", drawn(77, size=32))
    (home / "natural" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return home


@pytest.fixture(scope="module")
def made(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> collect.Collection:
    return collect.collect_command(
        tmp_path_factory.mktemp("made") / "out", folders=[str(mixed)], precision=2.0
    )


def by_origin(made: collect.Collection) -> dict[str, dict[str, object]]:
    return {row["origin"]: row for row in made.rows}


def test_every_decision_has_its_reason(made: collect.Collection) -> None:
    rows = by_origin(made)
    assert len(rows) == 37
    told = {
        origin: str(row["reason"]).split(":")[0] for origin, row in rows.items() if row["reason"]
    }
    # Of two that show the same the better one stays, and the brighter may look sharper.
    pair = {"natural/mouse/z brighter.png", "natural/mouse/mouseb.png"}
    (worse,) = pair & told.keys()
    (better,) = pair - told.keys()
    first = rows["natural/cat/cata.png"]["file_name"]
    assert told == {
        "natural/other/exact.png": f"duplicate of {first}",
        "natural/other/recoded.jpg": f"near duplicate of {first}",
        worse: f"near duplicate of {rows[better]['file_name']}",
        "natural/mouse/tiny.png": "too small",
        "natural/cat/torn.jpg": "cannot be read",
    }
    for row in made.rows:
        assert row["kept"] != bool(row["reason"])
        assert bool(row["sha256"]) == (row["origin"] != "natural/cat/torn.jpg")
        assert made.path(row).is_file() == row["kept"]
        if row["kept"]:
            assert hash_file(made.path(row)) == row["sha256"]
            assert (row["width"], row["height"]) == (SIZE, SIZE)


def test_datasets_reads_the_result(made: collect.Collection) -> None:
    lines = read_jsonl(made.folder / "metadata.jsonl")
    assert [line["file_name"] for line in lines] == [r["file_name"] for r in made.rows if r["kept"]]
    assert set(lines[0]) == set(curate.COLUMNS)
    assert all((made.folder / line["file_name"]).is_file() for line in lines)
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(made.folder), split="train", cache_dir=made.folder.parent / "c"
    )
    assert found.num_rows == len(lines)
    assert found[0]["image"].size == (SIZE, SIZE)
    assert sorted(found["label"]) == sorted(line["label"] for line in lines)


def test_planted_leaks_do_not_cross_the_split(tmp_path: Path) -> None:
    """Copies of one picture in many groups pull all of them to one side."""
    for i in range(24):
        save(tmp_path / "in" / "cat" / f"{LETTERS[i]}.png", drawn(400 + i))
    # One picture of each of 12 is planted in another folder, re-encoded: groups by name differ.
    for i in range(0, 24, 2):
        save(tmp_path / "in" / "cats" / f"plant {LETTERS[i]}.jpg", drawn(400 + i))
    for fraction in (0.3, 0.5):
        made = collect.collect_command(
            tmp_path / "out",
            folders=[str(tmp_path / "in")],
            domain="natural",
            validation_fraction=fraction,
        )
        rows = by_origin(made)
        for i in range(0, 24, 2):
            letter = LETTERS[i]
            pair = rows[f"cat/{letter}.png"], rows[f"cats/plant {letter}.jpg"]
            assert pair[0]["group"] == pair[1]["group"]
            assert pair[0]["split"] == pair[1]["split"]
            assert pair[0]["cluster"] == pair[1]["cluster"] != ""
            assert [row["kept"] for row in pair].count(True) == 1
        alone = [rows[f"cat/{LETTERS[i]}.png"] for i in range(1, 24, 2)]
        assert {row["cluster"] for row in alone} == {""}
        assert {row["split"] for row in made.rows} == {"train", "validation"}
        sides: dict[str, set[str]] = {}
        for row in made.rows:
            sides.setdefault(str(row["group"]), set()).add(str(row["split"]))
        assert all(len(found) == 1 for found in sides.values())


def test_groups_join_and_keep_the_first_name() -> None:
    groups = judging.Groups()
    assert groups.of("b") == "b"
    for a, b in (("d", "c"), ("b", "a"), ("c", "b")):
        groups.join(a, b)
    assert {groups.of(name) for name in "abcd"} == {"a"}
    assert groups.of("e") == "e"


def test_decisions_by_hand_are_replayed(
    made: collect.Collection, mixed: Path, tmp_path: Path
) -> None:
    rows = by_origin(made)
    told = [
        picture_review.Decision(
            rows["natural/cat/catb.png"]["sha256"], "x.png", "drop", note="a dog"
        ),
        picture_review.Decision(rows["natural/mouse/tiny.png"]["sha256"], "x.png", "keep"),
        picture_review.Decision(rows["natural/cat/catc.png"]["sha256"], "x.png", "class", "both"),
    ]
    picture_review.write_decisions(tmp_path / "decisions.jsonl", told)
    for _ in range(2):
        again = by_origin(
            collect.collect_command(
                tmp_path / "out",
                folders=[str(mixed)],
                precision=2.0,
                decisions=str(tmp_path / "decisions.jsonl"),
            )
        )
        assert again["natural/cat/catb.png"]["reason"] == "dropped by hand: a dog"
        assert again["natural/mouse/tiny.png"]["kept"]
        assert again["natural/cat/catc.png"]["label"] == "cat_mouse"
        assert sum(row["decided"] == "by hand" for row in again.values()) == 3
        same = set(rows) - {
            "natural/cat/catb.png",
            "natural/mouse/tiny.png",
            "natural/cat/catc.png",
        }
        assert all(again[origin] == rows[origin] for origin in same)


def test_balance_spreads_over_groups(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "in" / "cat" / f"long{i:02d}.png", drawn(500 + i))
    for i in range(4):
        save(tmp_path / "in" / "cat" / f"{LETTERS[i]}.png", drawn(540 + i))
    made = collect.collect_command(
        tmp_path / "out", folders=[str(tmp_path / "in")], domain="natural", per_class=6
    )
    kept = [row for row in made.rows if row["kept"]]
    assert len(kept) == 6
    # Five groups: the four pictures that are one each, and the numbered run, which gives two.
    assert sum("long" in row["origin"] for row in kept) == 2
    reasons = {row["reason"] for row in made.rows if not row["kept"]}
    assert reasons == {"over the 6 asked for of this class and domain"}


def test_composites_fill_up_what_shows_both(tmp_path: Path) -> None:
    """Photographs of one animal each, with mask files, give pictures of two, kept on their side."""
    home = tmp_path / "in"
    for at, name in enumerate(("cat", "mouse")):
        for i in range(10):
            scene = next(
                found
                for seed in range(9_400_000 + 1000 * at + 50 * i, 9_500_000)
                if (found := scenes.describe(seed)).cls == ("tom", "jerry")[at]
                and found.action in ("sit", "stand")
            )
            made = scenes.render(scene, "natural", 160, truth=True)
            save(home / name / f"{name} {LETTERS[i]}.png", made.image)
            mask = np.where(made.mask > 0, 255, 0).astype(np.uint8)
            save(home / name / "masks" / f"{name} {LETTERS[i]}.png", mask)
    arguments = {"folders": [str(home)], "domain": "natural", "composites": 6, "screen": False}
    out = tmp_path / "out"
    made = collect.collect_command(out, validation_fraction=0.4, **arguments)
    assert len([row for row in made.rows if row["source"] == "folder"]) == 20
    both = made.select(cls="both")
    assert 0 < len(both) <= 6
    sides = {row["file_name"]: row["split"] for row in made.rows}
    for row in both:
        parents = [name for name in sides if name in row["origin"]]
        assert len(parents) == 2
        assert {sides[name] for name in parents} == {row["split"]}
        assert hash_file(made.path(row)) == row["sha256"]
        assert row["labelled_by"] == row["source"] == "composites"
    assert "composites" in (out / "DATASHEET.md").read_text()
    before = {row["file_name"]: made.path(row).stat().st_mtime_ns for row in both}
    manifest = (out / "manifest.jsonl").read_bytes()
    again = collect.collect_command(out, validation_fraction=0.4, **arguments)
    assert (out / "manifest.jsonl").read_bytes() == manifest
    assert {r["file_name"]: again.path(r).stat().st_mtime_ns for r in both} == before
    without = collect.collect_command(out, validation_fraction=0.4, **arguments | {"composites": 0})
    assert not without.select(cls="both")
    assert not list((out / "images").rglob("composite-*"))


def test_a_probe_labels_what_nobody_labelled(tmp_path: Path) -> None:
    for at, name in enumerate(("cat", "mouse")):
        for i in range(16):
            where = name if i < 12 else "unsorted"
            save(
                tmp_path / "in" / where / f"{name} {LETTERS[i]}.png",
                drawn(600 + 100 * at + i, name),
            )
    arguments = {"folders": [str(tmp_path / "in")], "domain": "natural"}
    off = collect.collect_command(tmp_path / "off", precision=2.0, **arguments)
    assert {r["role"] for r in off.rows if "unsorted" in r["origin"]} == {"unlabelled"}
    made = collect.collect_command(tmp_path / "on", precision=0.5, **arguments)
    guessed = [row for row in made.rows if "unsorted" in row["origin"]]
    assert {row["labelled_by"] for row in guessed} == {"probe"}
    assert all(0 < row["confidence"] <= 1 for row in guessed)
    assert {row["labelled_by"] for row in made.rows if row not in guessed} == {"source"}


# ---- resume --------------------------------------------------------------------------------------


_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tomjerry_utils import class_probe, collect, features, near_duplicates, screens

whole, broken, source = sys.argv[1:]


def start(out):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        collect.collect_command(Path(out), folders=[source], precision=2.0)
        os._exit(0)
    return child


began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
longest = time.monotonic() - began
draws, kills = random.Random(0), 0
while kills < 20:
    child = start(broken)
    time.sleep(longest * draws.uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if (Path(broken) / "manifest.jsonl").exists():
        # It got through: what was written goes, a part of it, so that the next has work again.
        for file in [*Path(broken).rglob("*.png"), Path(broken) / "manifest.jsonl"]:
            if draws.random() < 0.5:
                file.unlink()
        if draws.random() < 0.5:
            (Path(broken) / ".journal.sqlite").unlink()
assert os.waitpid(start(broken), 0)[1] == 0
"""


def test_killed_at_twenty_moments_ends_the_same(mixed: Path, tmp_path: Path) -> None:
    """A collection is killed twenty times, wherever it happens to be, and goes on each time."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call = [sys.executable, "-c", _KILLER, str(whole), str(broken), str(mixed)]
    subprocess.run(call, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name in ("manifest.jsonl", "metadata.jsonl", "DATASHEET.md"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    files = [
        {p.relative_to(out): p.read_bytes() for p in (out / "images").rglob("*") if p.is_file()}
        for out in (whole, broken)
    ]
    assert files[0] == files[1]


def test_a_journal_of_an_earlier_version_is_gone_on_with(
    mixed: Path, made: collect.Collection, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made.folder, out)
    with contextlib.closing(sqlite3.connect(out / JOURNAL)) as journal:
        journal.execute("ALTER TABLE pictures DROP COLUMN read_as")
        journal.execute("UPDATE pictures SET key = '1' || substr(key, 2), measures = '{}'")
        journal.commit()
    collect.collect_command(out, folders=[str(mixed)], precision=2.0)
    assert (out / "manifest.jsonl").read_bytes() == (made.folder / "manifest.jsonl").read_bytes()


def test_processes_give_what_one_gives(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_FEW", 0)
    monkeypatch.setattr(intake, "_PART", 3)
    made = {}
    for count in (0, 2):
        monkeypatch.setattr(workers.Workers, "__init__", started(count))
        out = tmp_path / str(count)
        collect.collect_command(out, folders=[str(mixed)], precision=2.0)
        made[count] = (out / "manifest.jsonl").read_bytes()
    assert made[0] == made[2]


def started(count: int) -> object:
    plain = workers.Workers.__init__
    return lambda self, given=None: plain(self, count)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    call = (
        "import os, signal, time\n"
        "from tomjerry_utils import workers\n"
        "workers._FEW = 0\n"
        "with workers.Workers(2) as pool:\n"
        "    jobs = [(i, ()) for i in range(4)]\n"
        "    print(*(pid for _, pid in pool.each(os.getpid, jobs)), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    for pid in set(done.stdout.split()):
        for _ in range(600):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"process {pid} lives on")


def test_no_room_is_one_line_and_a_second_run_goes_on(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    plain, left = intake.write, [5]

    def short(path: Path, content: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, content)

    arguments = {"folders": [str(mixed)], "precision": 2.0}
    with monkeypatch.context() as patch:
        patch.setattr(intake, "write", short)
        with pytest.raises(UserError, match="no space left"):
            collect.collect_command(tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 5
    again = collect.collect_command(tmp_path / "out", **arguments)
    assert sum(row["kept"] for row in again.rows) == 32


def test_a_source_that_changes_meanwhile_is_told(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "in"
    save(home / "cat" / "a.png", drawn(1))
    plain = curate.judge

    def later(*arguments: object) -> np.ndarray:
        save(home / "cat" / "a.png", drawn(2))
        return plain(*arguments)

    monkeypatch.setattr(curate, "judge", later)
    with pytest.raises(UserError, match="changed while"):
        collect.collect_command(tmp_path / "out", folders=[str(home)], domain="natural")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
