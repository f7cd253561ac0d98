"""The course runner, on a tiny project of its own: order, skipping, resuming, pairs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from tomjerry_utils import UserError, course, runs
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import run_root

SMOKE = load_profile("smoke")
FIRST = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · First

# %% tags=["parameters"]
profile: str = "mini"
seed: int = 0

# %%
import os
import sys
from pathlib import Path

figures = Path(os.environ["TOMJERRY_RUNS"]) / profile / "figures"
figures.mkdir(parents=True, exist_ok=True)
for kind in ("pdf", "png", "json"):
    (figures / f"first.{kind}").write_text("drawn")
print("a log line", file=sys.stderr)
print(profile, Path.cwd() / "x", seed)

# %%
1 + 1
"""
SECOND = """# %% [markdown]
# # 01 · Second

# %% tags=["parameters"]
profile: str = "mini"
seed: int = 0

# %%
import os
import time
from pathlib import Path

Path(os.environ["TOMJERRY_RUNS"], "begun").touch()
time.sleep(float(os.environ.get("TEST_SLEEP", "0")))
print("done")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_runs: Path) -> Path:
    """A project of two notebooks that import nothing heavy."""
    root = tmp_path / "project"
    (root / "notebooks" / "src").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "tomjerry-utils"\n')
    (root / "notebooks" / "src" / "00_first.py").write_text(FIRST)
    (root / "notebooks" / "src" / "01_second.py").write_text(SECOND)
    monkeypatch.setenv("TOMJERRY_ROOT", str(root))
    # The package is a part of every key; here it stays the same even while someone edits it.
    monkeypatch.setattr(course, "_package", dict)
    return root


def _edit(project: Path, name: str, old: str, new: str) -> None:
    path = project / "notebooks" / "src" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_runs_in_order_then_skips(
    project: Path, fresh_runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = course.run_course(SMOKE)
    assert result.executed == ["00_first", "01_second"]
    assert [figure.name for figure in result.figures] == ["first.pdf"]
    book = nbformat.read(fresh_runs / "smoke" / "notebooks" / "00_first.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in book.cells]
    assert tags.index(["injected-parameters"]) == tags.index(["parameters"]) + 1
    printed = [
        o.text for c in book.cells for o in c.get("outputs", []) if o.get("name") == "stdout"
    ]
    assert printed[0].startswith(f"smoke {project}")
    assert printed[0].split()[-1] == "0"
    told = capfd.readouterr().err
    assert re.search(r"\[1/2\] 00_first: done in \d+\.\d min", told)
    assert "a log line" in told
    # Only the default profile's figures are the repository's.
    assert not (project / "figures").exists()

    again = course.run_course(SMOKE)
    assert again.skipped == ["00_first", "01_second"]
    assert again.executed == []

    # What a notebook made and was then lost is made again, and nothing else is.
    (fresh_runs / "smoke" / "figures" / "first.png").unlink()
    assert course.run_course(SMOKE).executed == ["00_first"]

    # A notebook's source is a part of its own key and of all that follow.
    _edit(project, "01_second.py", "done", "Done")
    assert course.run_course(SMOKE).executed == ["01_second"]
    assert course.run_course(SMOKE, ["0"], fresh=True).executed == ["00_first"]


def test_what_makes_a_notebook_stale(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(course._keys(SMOKE).values())
    assert list(course._keys(SMOKE).values()) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "_package", lambda: {"ldm.py": "edited"})
        assert all(a != b for a, b in zip(before, course._keys(SMOKE).values(), strict=True))
    other = SMOKE.model_copy(update={"seed": 1})
    assert all(a != b for a, b in zip(before, course._keys(other).values(), strict=True))
    (project / "data" / "foundation" / "blip").mkdir(parents=True)
    (project / "data" / "foundation" / "blip" / "model.safetensors").write_bytes(b"1")
    assert all(a != b for a, b in zip(before, course._keys(SMOKE).values(), strict=True))
    before = list(course._keys(SMOKE).values())
    _edit(project, "00_first.py", "1 + 1", "1 + 2")
    assert all(a != b for a, b in zip(before, course._keys(SMOKE).values(), strict=True))


def test_the_package_is_hashed_file_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {"course.py", "scenes/render.py", "profiles/mini.yaml"} <= set(course._package())


def test_a_lost_stage_makes_its_notebooks_stale(project: Path, fresh_runs: Path) -> None:
    stage = runs.open_stage(SMOKE, "01_collect", {}, {})
    stage.finish()
    course.run_course(SMOKE, ["01"])
    assert course.run_course(SMOKE, ["01"]).skipped == ["01_second"]
    (stage.folder / "provenance.json").unlink()
    assert course.run_course(SMOKE, ["01"]).executed == ["01_second"]


def test_a_notebook_that_stops(project: Path, fresh_runs: Path) -> None:
    _edit(project, "01_second.py", 'print("done")', "1 / 0")
    with pytest.raises(UserError, match=r"01_second stopped at cell 3: ZeroDivisionError") as told:
        course.run_course(SMOKE)
    folder = fresh_runs / "smoke" / "notebooks"
    assert (folder / "01_second.failed.ipynb").is_file()
    assert str(folder / "01_second.failed.ipynb") in str(told.value)
    assert not (folder / "01_second.ipynb").exists()
    assert not list(folder.glob(".tmp-*"))
    # A user's mistake is told in its own words; what is mended runs, and the trace goes.
    _edit(
        project,
        "01_second.py",
        "1 / 0",
        "from tomjerry_utils import UserError\n\nraise UserError('no such picture')",
    )
    with pytest.raises(UserError, match="01_second stopped at cell 3: no such picture"):
        course.run_course(SMOKE)
    _edit(project, "01_second.py", "raise UserError", "print")
    result = course.run_course(SMOKE)
    assert (result.skipped, result.executed) == (["00_first"], ["01_second"])
    assert not (folder / "01_second.failed.ipynb").exists()


def _start(project: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tomjerry_utils", "course", "--profile", "smoke"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(project: Path, fresh_runs: Path, how: signal.Signals) -> None:
    process = _start(project, TEST_SLEEP="600")
    _wait_for(fresh_runs / "begun", process)
    os.killpg(process.pid, how)
    _, told = process.communicate(timeout=600)
    folder = fresh_runs / "smoke" / "notebooks"
    assert not (folder / "01_second.ipynb").exists()
    assert not (folder / "01_second.json").exists()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in told
        assert told.splitlines()[-1].startswith("tomjerry: stopped")
        assert not list(folder.glob(".tmp-*"))
    process = _start(project)
    out, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert "00_first: up to date" in told
    assert "01_second: done" in told
    assert "1 notebooks executed, 1 up to date" in out
    assert not list(folder.glob(".tmp-*"))


def test_only_the_default_profile_refreshes_figures(project: Path, fresh_runs: Path) -> None:
    mini = load_profile("mini")
    made = fresh_runs / "mini" / "figures"
    made.mkdir(parents=True)
    (made / "a.pdf").write_text("new")
    (made / ".tmp-b.pdf").write_text("half")
    (project / "figures").mkdir()
    (project / "figures" / "kept.pdf").write_text("old")
    assert [path.name for path in course.publish_figures(mini)] == ["a.pdf"]
    assert course.publish_figures(mini) == []
    assert sorted(p.name for p in (project / "figures").iterdir()) == ["a.pdf", "kept.pdf"]


def test_unknown_notebook(project: Path) -> None:
    with pytest.raises(UserError, match="no notebook '07'"):
        course.run_course(SMOKE, ["07"])
    for source in (project / "notebooks" / "src").iterdir():
        source.unlink()
    with pytest.raises(UserError, match="no notebooks in"):
        course.run_course(SMOKE)


# ---- sources and committed copies --------------------------------------------------------------


def test_the_profiles_seed_reaches_the_notebooks(project: Path, fresh_runs: Path) -> None:
    profile = load_profile("smoke", seed=7)
    course.run_course(profile, ["00"])
    book = nbformat.read(run_root(profile) / "notebooks" / "00_first.ipynb", as_version=4)
    printed = [o.text for c in book.cells for o in c.get("outputs", []) if "text" in o]
    assert any(text.split()[-1:] == ["7"] for text in printed)


def test_sync_and_check(project: Path, fresh_runs: Path) -> None:
    assert len(course.check_pairs()) == 2
    with pytest.raises(UserError, match="no executed copy"):
        course.sync(SMOKE)
    course.run_course(SMOKE)
    assert [path.name for path in course.sync(SMOKE)] == ["00_first.ipynb", "01_second.ipynb"]
    assert course.check_pairs() == []
    path = project / "notebooks" / "00_first.ipynb"
    text = path.read_text()
    # Nothing in it depends on the machine, the day or the run.
    assert str(project) not in text
    assert '"name": "stderr"' not in text
    for word in ("papermill", "injected", "widgets"):
        assert word not in text
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert [c.execution_count for c in book.cells if c.cell_type == "code"] == [1, 2, 3]
    assert book.cells[-1].outputs[0].data["text/plain"] == "2"
    course.run_course(SMOKE, fresh=True)
    assert course.sync(SMOKE) == []

    # An edited source is out of step, and cannot be synchronised before it has run.
    _edit(project, "00_first.py", "1 + 1", "1 + 2")
    assert "00_first.ipynb differs from its source" in course.check_pairs()[0]
    with pytest.raises(UserError, match="changed since it was executed"):
        course.sync(SMOKE)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda book: book.cells[-1].update(source="1 + 3"), "differs from its source"),
        (lambda book: book.cells.pop(), "differs from its source"),
        (lambda book: book.cells[-1].update(execution_count=None), "not executed"),
        (lambda book: book.metadata.update(widgets={}), "metadata.widgets"),
        (lambda book: book.cells[-1].outputs[0].data.update(x="1" * 1_000_001), "larger than 1"),
        (
            lambda book: book.cells[-1].outputs.append(
                nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
            ),
            "shows an error",
        ),
    ],
)
def test_check_bites(project: Path, spoil: object, told: str) -> None:
    _write_pair(project)
    assert course.check_pairs() == []
    path = project / "notebooks" / "00_first.ipynb"
    book = nbformat.read(path, as_version=4)
    spoil(book)  # type: ignore[operator]
    path.write_text(json.dumps(book))
    assert any(told in problem for problem in course.check_pairs())


def test_a_notebook_without_a_source(project: Path) -> None:
    _write_pair(project)
    (project / "notebooks" / "09_stray.ipynb").write_text("{}")
    assert ["has no source" in problem for problem in course.check_pairs()] == [True]


def _write_pair(project: Path) -> None:
    """Committed copies without running anything."""
    for source in course.sources():
        book = course._read_source(source)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.execution_count = 1
                cell.outputs = [
                    nbformat.v4.new_output(
                        "execute_result", data={"text/plain": "2"}, execution_count=1
                    )
                ]
        nbformat.write(course._clean(book, source), project / "notebooks" / f"{source.stem}.ipynb")


def test_a_committed_picture_keeps_its_words(project: Path) -> None:
    """Those who cannot see a picture are told what it shows; nothing else of its metadata stays."""
    shown = nbformat.v4.new_output(
        "display_data",
        data={"image/png": "…"},
        metadata={"image/png": {"alt": "a cat that sits", "width": 3}, "day": "Monday"},
    )
    assert course._clean_output(shown).metadata == {"image/png": {"alt": "a cat that sits"}}


def test_too_large_a_copy_is_refused(
    project: Path, fresh_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.run_course(SMOKE)
    monkeypatch.setattr(course, "MAX_BYTES", 500)
    with pytest.raises(UserError, match="00_first would be"):
        course.sync(SMOKE)
    assert not (project / "notebooks" / "00_first.ipynb").exists()


def test_the_committed_notebooks_are_in_step() -> None:
    assert course.check_pairs() == []


# ---- redrawing ---------------------------------------------------------------------------------


def test_redraw_from_a_run_trains_nothing(
    project: Path, fresh_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit(
        project,
        "01_second.py",
        'print("done")',
        "from tomjerry_utils import runs\n"
        "from tomjerry_utils.profiles import load_profile\n\n"
        "steps = int(os.environ.get('TEST_STEPS', '3'))\n"
        "stage = runs.open_stage(load_profile(profile), '04_ldm', {'steps': steps}, {})\n"
        "stage.finished or stage.finish()",
    )
    with pytest.raises(UserError, match="nothing to draw from"):
        course.redraw(SMOKE)
    course.run_course(SMOKE)
    trained = (fresh_runs / "smoke" / "04_ldm" / "provenance.json").read_bytes()
    picture = fresh_runs / "smoke" / "figures" / "first.pdf"
    before = picture.stat().st_mtime_ns
    source, drawn = course.redraw(SMOKE)
    assert source == fresh_runs / "smoke"
    assert drawn == [picture]
    assert picture.stat().st_mtime_ns > before
    # With other settings it would have to train: it says so and leaves the run as it is.
    monkeypatch.setenv("TEST_STEPS", "4")
    with pytest.raises(UserError, match="nothing is to be trained now"):
        course.redraw(SMOKE)
    assert (fresh_runs / "smoke" / "04_ldm" / "provenance.json").read_bytes() == trained
    assert runs.NO_TRAINING not in os.environ


def test_redraw_of_the_default_run_draws_the_studies_too(
    project: Path, fresh_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tomjerry_utils import study

    drawn = Path("drawn.pdf")
    monkeypatch.setattr(study, "draw_studies", lambda folder: [folder / "study.pdf"])
    monkeypatch.setattr(course, "run_course", lambda *_, **__: SimpleNamespace(figures=[drawn]))
    for name, studies in (("smoke", []), ("mini", [project / "results" / "study.pdf"])):
        for source in course.sources():
            runs.write_json(fresh_runs / name / "notebooks" / f"{source.stem}.json", {})
        profile = SMOKE.model_copy(update={"name": name})
        assert course.redraw(profile) == (fresh_runs / name, [drawn, *studies])


def test_redraw_from_results(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tomjerry_utils import study

    (project / "results").mkdir()
    (project / "results" / "compare.json").write_text("{}")
    monkeypatch.setattr(study, "draw_results", lambda folder: [folder / "drawn.pdf"])
    source, drawn = course.redraw(SMOKE)
    assert source == project / "results"
    assert drawn == [project / "results" / "drawn.pdf"]
