"""Run folders: writes are all or nothing, keys name the work, finished work is found again."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tomjerry_utils import UserError, runs
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import Stage, open_stage

SMOKE = load_profile("smoke")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writes ------------------------------------------------------------------------------------


def test_atomic_path_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with runs.atomic_path(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), runs.atomic_path(target) as temporary:
        temporary.write_text("two")
        raise ZeroDivisionError
    assert target.read_text() == "one"
    assert _names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = runs.write_json(tmp_path / "a.json", {"old": 1})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        runs.write_json(target, {"new": 2})
    monkeypatch.undo()
    assert runs.read_json(target) == {"old": 1}
    assert _names(tmp_path) == ["a.json"]


def test_atomic_dir(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with runs.atomic_dir(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "w").write_text("1")
    with runs.atomic_dir(target) as folder:
        (folder / "w2").write_text("2")
    assert _names(target) == ["w2"]
    with pytest.raises(ZeroDivisionError), runs.atomic_dir(target) as folder:
        (folder / "w3").write_text("3")
        raise ZeroDivisionError
    assert _names(target) == ["w2"]
    assert _names(tmp_path) == ["model"]


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), runs.atomic_path(tmp_path / "file" / "a.txt"):
        pytest.fail("must not be reached")


def test_json_of_all_we_write(tmp_path: Path) -> None:
    value = {
        "path": tmp_path,
        "number": np.float32(0.5),
        "array": np.arange(3),
        "settings": SMOKE.compare,
        "set": {2, 1},
        "text": "λ",
    }
    read = runs.read_json(runs.write_json(tmp_path / "a.json", value))
    assert read["number"] == 0.5
    assert read["array"] == [0, 1, 2]
    assert read["settings"]["candidates"] == SMOKE.compare.candidates
    assert read["set"] == [1, 2]
    assert "λ" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "b.json", {"bad": object()})
    assert _names(tmp_path) == ["a.json"]


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": "ü"}]
    path = runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert runs.read_jsonl(path) == rows
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="line 2"):
        runs.read_jsonl(path)
    with pytest.raises(UserError, match=r"no file .*none\.json"):
        runs.read_json(tmp_path / "none.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert runs.hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    assert runs.hash_obj({"a": 1, "b": 2}) == runs.hash_obj({"b": 2, "a": 1})
    assert runs.hash_obj({"a": 1}) != runs.hash_obj({"a": 2})
    assert len(runs.hash_obj(SMOKE)) == 16


# ---- places ------------------------------------------------------------------------------------


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).resolve().parent.parent
    assert runs.project_root() == here
    monkeypatch.chdir(tmp_path)
    assert runs.project_root() == here
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "pyproject.toml").write_text('[project]\nname = "tomjerry-utils"\n')
    monkeypatch.chdir(clone / "notebooks")
    assert runs.project_root() == clone
    monkeypatch.setenv("TOMJERRY_ROOT", str(here))
    assert runs.project_root() == here
    assert runs.foundation_root() == here / "data" / "foundation"
    monkeypatch.delenv("TOMJERRY_RUNS")
    assert runs.run_root(SMOKE) == here / "runs" / "smoke"
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "else"))
    assert runs.run_root(SMOKE) == tmp_path / "else" / "smoke"


def test_another_project_around_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    monkeypatch.chdir(tmp_path)
    assert runs.project_root() == Path(__file__).resolve().parent.parent


def test_model_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    (tmp_path / "data" / "foundation" / "blip").mkdir(parents=True)
    found = runs.model_source("data/foundation/blip")
    assert found == str(tmp_path / "data" / "foundation" / "blip")
    assert runs.model_source("Salesforce/blip") == "Salesforce/blip"
    with pytest.raises(UserError, match="no model folder"):
        runs.model_source("data/foundation/none")


# ---- stages ------------------------------------------------------------------------------------


def _open(**changes: Any) -> Stage:
    settings = {"steps": 3, **changes.pop("settings", {})}
    options = {"inputs": {"up": "1"}, "version": 1, **changes}
    return open_stage(options.pop("profile", SMOKE), "04_test", settings, **options)


def test_finished_work_is_found_again(fresh_runs: Path) -> None:
    stage = _open()
    assert stage.folder == fresh_runs / "smoke" / "04_test"
    assert not stage.finished
    (stage.folder / "weights").write_text("w")
    record = stage.finish(score=0.5)
    again = _open()
    assert again.finished
    assert again.key == stage.key
    assert (again.folder / "weights").read_text() == "w"
    assert runs.read_provenance(stage.folder) == json.loads(json.dumps(record))
    assert record["extra"] == {"score": 0.5}
    assert record["inputs"] == {"up": "1"}
    assert {"python", "numpy", "torch"} <= set(record["versions"])
    assert {"stage", "seed", "settings", "device", "started", "seconds", "profile"} <= set(record)
    assert not (stage.folder / "progress.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"steps": 4}},
        {"inputs": {"up": "2"}},
        {"version": 2},
        {"profile": SMOKE.model_copy(update={"seed": 1})},
        {"profile": SMOKE.model_copy(update={"image_size": 64})},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_work_is_removed(fresh_runs: Path, change: dict[str, Any], finished: bool) -> None:
    stage = _open()
    (stage.folder / "weights").write_text("w")
    if finished:
        stage.finish()
    other = _open(**change)
    assert other.key != stage.key
    assert not other.finished
    assert _names(other.folder) == ["progress.json"]


def test_unfinished_work_is_kept(fresh_runs: Path) -> None:
    stage = _open()
    (stage.folder / "checkpoint").write_text("half")
    began = runs.read_json(stage.folder / "progress.json")["started"]
    again = _open()
    assert not again.finished
    assert (again.folder / "checkpoint").read_text() == "half"
    assert again.finish()["started"] == began


def test_broken_records_count_as_unfinished(fresh_runs: Path) -> None:
    stage = _open()
    stage.finish()
    (stage.folder / "provenance.json").write_text('{"key": ')
    again = _open()
    assert not again.finished
    assert _names(again.folder) == ["progress.json"]


def test_settings_may_be_a_model(fresh_runs: Path) -> None:
    one = open_stage(SMOKE, "06_test", SMOKE.compare, {})
    two = open_stage(SMOKE, "06_test", SMOKE.compare.model_dump(), {})
    assert one.key == two.key


def test_no_training(fresh_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _open()
    (stage.folder / "checkpoint").write_text("half")
    monkeypatch.setenv(runs.NO_TRAINING, "1")
    with pytest.raises(UserError, match="nothing is to be trained"):
        _open()
    assert (stage.folder / "checkpoint").exists()
    stage.finish()
    assert _open().finished


def test_read_provenance_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished artefact"):
        runs.read_provenance(tmp_path)
    (tmp_path / "provenance.json").write_text("[]")
    with pytest.raises(UserError, match="not a provenance record"):
        runs.read_provenance(tmp_path)


def _hold(folder: str, ready: Any, done: Any) -> None:
    with runs.locked(folder):
        ready.set()
        done.wait(30)


def test_two_processes_do_not_work_on_one_stage(fresh_runs: Path) -> None:
    stage = _open()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(stage.folder), ready, done))
    other.start()
    try:
        assert ready.wait(30)
        refused = pytest.raises(UserError, match="another process is working on")
        with refused, runs.locked(stage.folder, wait=0.1):
            pytest.fail("must not be reached")
    finally:
        done.set()
        other.join(30)
    with stage.lock():
        (stage.folder / "a").write_text("")
    assert _names(stage.folder) == ["a", "progress.json"]
