"""The notebooks: their form, their pairs, and that a second run prints what the first one did."""

from __future__ import annotations

import ast
import copy
import hashlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jupytext
import nbformat
import pytest

from tomjerry_utils import course
from tomjerry_utils.profiles import NAMES
from tomjerry_utils.runs import project_root

FOLDER = project_root() / "notebooks"
STEMS = (
    "00_start_here",
    "01_data_collection",
    "02_gpt4_captioning",
    "03_blip_finetuning",
    "04_ldm_training",
    "05_regularized_transfer",
    "06_result_comparison",
)
REPOSITORY = "tomjerry-real-life/tomjerry-real-life/blob/main/notebooks"
MARK = "# NBVAL_CHECK_OUTPUT"
LONGEST_CELL = 25  # lines
TRACKED = ("figures", "notebooks", "data/foundation", "data/starter", "results")
DRAWING = {"Figure", "contact_sheet", "image_row", "curve", "intervals", "workflow_diagram"}

every_notebook = pytest.mark.parametrize("stem", STEMS)


def cells_of(stem: str) -> list[Any]:
    return list(jupytext.read(FOLDER / "src" / f"{stem}.py").cells)


def code_of(stem: str) -> list[str]:
    return [cell.source for cell in cells_of(stem) if cell.cell_type == "code"]


def text_of(stem: str) -> str:
    return "\n\n".join(cell.source for cell in cells_of(stem) if cell.cell_type == "markdown")


def is_marked(source: str) -> bool:
    return any(line.strip() == MARK for line in source.splitlines())


def calls_in(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = node.func
            yield getattr(function, "attr", getattr(function, "id", "")), node


# ---- form --------------------------------------------------------------------------------------


def test_the_notebooks_are_those_of_the_course() -> None:
    assert tuple(path.stem for path in course.sources())[: len(STEMS)] == STEMS


@every_notebook
def test_it_opens_with_title_badges_and_promise(stem: str) -> None:
    head = cells_of(stem)[0].source
    assert re.match(rf"# {stem[:2]} · \S", head)
    assert f"colab.research.google.com/github/{REPOSITORY}/{stem}.ipynb" in head
    assert f"(https://github.com/{REPOSITORY}/{stem}.ipynb)" in head
    assert re.search(r"^\*\*[^*]{30,}\*\*$", head, re.MULTILINE), "no promise in bold"


@every_notebook
def test_it_says_what_is_learnt_needed_and_on_the_poster(stem: str) -> None:
    text = cells_of(stem)[1].source
    parts = re.split(r"\*\*(What you will learn|You need|On the poster)\*\*", text)
    assert parts[1::2] == ["What you will learn", "You need", "On the poster"]
    learnt, needed, poster = parts[2::2]
    assert 2 <= len(re.findall(r"^- ", learnt, re.MULTILINE)) <= 5
    for column in ("time", "memory", "disk", "cost"):
        assert column in needed
    assert all(f"`{name}`" in needed for name in NAMES)
    assert len(poster.split()) >= 5


@every_notebook
def test_set_up_does_nothing_off_colab_and_installs_on_it(
    stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = code_of(stem)[0]
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(source, {})
    assert commands == []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {})
    assert [command[0] for command in commands] == ["git", sys.executable]
    # Colab keeps what it has: nothing is pinned, upgraded or reinstalled.
    assert not any("==" in word or word.startswith(("-U", "--up", "-c")) for word in commands[1])


@every_notebook
def test_imports_stand_in_one_cell_and_parameters_in_another(stem: str) -> None:
    code = code_of(stem)
    assert all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(code[1]).body)
    for source in code[2:]:
        late = [s for s in ast.parse(source).body if isinstance(s, (ast.Import, ast.ImportFrom))]
        assert not late, f"an import outside the cell of imports: {ast.unparse(late[0])}"
    tagged = [c for c in cells_of(stem) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].source == code[2]
    statements = ast.parse(code[2]).body
    assert {ast.unparse(s.target) for s in statements if isinstance(s, ast.AnnAssign)} >= {
        "profile",
        "seed",
    }
    for statement in statements:
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None
        ast.literal_eval(statement.value)
    assert all(" # " in line or "  # " in line for line in code[2].splitlines())


@every_notebook
def test_no_cell_is_long(stem: str) -> None:
    for source in code_of(stem):
        assert len(source.splitlines()) <= LONGEST_CELL, source


@every_notebook
def test_every_figure_goes_through_save_figure_with_alt_text(stem: str) -> None:
    saved, drawn = [], 0
    for source in code_of(stem):
        assert not re.search(r"\bsavefig\b|\bplt\.|pyplot", source), source
        for name, call in calls_in(source):
            drawn += name in DRAWING
            if name == "save_figure":
                saved.append({word.arg: word.value for word in call.keywords})
                saved[-1]["name"] = call.args[1]
    assert saved and drawn <= len(saved)
    for words in saved:
        assert words.keys() >= {"alt", "run", "notebook"}
        assert ast.literal_eval(words["notebook"]) == stem
        alt = words["alt"]
        if isinstance(alt, ast.Constant):
            assert len(str(alt.value).split()) >= 8, alt.value


def test_no_two_figures_share_a_name() -> None:
    names = [
        ast.literal_eval(call.args[1])
        for stem in STEMS
        for source in code_of(stem)
        for name, call in calls_in(source)
        if name == "save_figure" and isinstance(call.args[1], ast.Constant)
    ]
    assert len(names) == len(set(names))
    assert {"data_samples", "workflow", "captions_before_after"} <= set(names)


@every_notebook
def test_exercises_have_check_hint_and_answer(stem: str) -> None:
    found = exercises(cells_of(stem))
    assert 2 <= len(found) <= 3
    text = text_of(stem)
    assert text.index("## Check yourself") < text.index("### Exercise 1 ·")
    assert [int(n) for n in re.findall(r"^### Exercise (\d) · \S", text, re.MULTILINE)] == list(
        range(1, len(found) + 1)
    )
    for exercise in found:
        last = ast.parse(exercise.source).body[-1]
        assert isinstance(last, ast.Expr) and isinstance(last.value, ast.Call)
        assert ast.unparse(last.value.func) == "check"
        assert "# ← yours" in exercise.source and "None" in exercise.source
        assert exercise.hint and exercise.answer


@every_notebook
def test_it_closes_with_takeaways_and_expected_beside_got(stem: str) -> None:
    cells = cells_of(stem)
    start = next(i for i, c in enumerate(cells) if c.source.startswith("## Takeaways"))
    assert len(re.findall(r"^- ", cells[start].source, re.MULTILINE)) >= 3
    tables = [c.source for c in cells[start:] if c.cell_type == "code"]
    assert any(is_marked(s) and "compare" in dict(calls_in(s)) for s in tables)
    number = STEMS.index(stem)
    if number + 1 < len(STEMS):
        assert re.search(rf"\*\*Next:\*\* \[.+\]\({STEMS[number + 1]}\.ipynb\)", cells[-1].source)


@every_notebook
def test_marked_cells_are_enough_and_compare_text_alone(stem: str) -> None:
    marked = [source for source in code_of(stem) if is_marked(source)]
    assert len(marked) >= 3
    for source in marked:
        names = {name for name, _ in calls_in(source)}
        assert names & {"print", "compare"}, f"nothing to compare:\n{source}"
        assert not names & {"save_figure", "ensure", "display"}, source


@every_notebook
def test_links_between_notebooks_hold(stem: str) -> None:
    for target in re.findall(r"(?:\]\(|\]: )(\w+)\.ipynb", text_of(stem)):
        assert target in STEMS


# ---- pairs -------------------------------------------------------------------------------------


def test_committed_notebooks_are_in_step_with_their_sources() -> None:
    assert course.check_pairs() == []


@every_notebook
def test_every_marked_cell_that_is_committed_has_an_output(stem: str) -> None:
    # nbval passes over a marked cell that was never run: it has nothing to compare with.
    check_outputs(nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4))


def check_outputs(book: Any) -> None:
    marked = [c for c in book.cells if c.cell_type == "code" and is_marked(c.source)]
    assert len(marked) >= 3
    for cell in marked:
        assert cell.execution_count and cell.outputs, cell.source
        assert all(out.output_type == "stream" and out.name == "stdout" for out in cell.outputs)


def test_an_unrun_marked_cell_would_be_found() -> None:
    book = jupytext.read(FOLDER / "src" / f"{STEMS[0]}.py")
    with pytest.raises(AssertionError):
        check_outputs(book)


# ---- exercises ---------------------------------------------------------------------------------


@dataclass
class Exercise:
    """One exercise: the index of its code cell, that cell, the hint and the code of the answer."""

    index: int
    source: str
    hint: str
    answer: str


def exercises(cells: list[Any]) -> list[Exercise]:
    found = []
    for index, cell in enumerate(cells):
        before = cells[index - 1].source if index else ""
        if cell.cell_type != "code" or not re.search(r"^### Exercise", before, re.MULTILINE):
            continue
        after = cells[index + 1].source.split("### Exercise")[0]
        folded = r"<details><summary>{}</summary>\n(.*?)</details>"
        hint = re.search(folded.format("Hint"), after, re.DOTALL)
        answer = re.search(folded.format("Answer"), after, re.DOTALL)
        code = answer and re.search(r"```python\n(.*?)```", answer[1], re.DOTALL)
        found.append(
            Exercise(index, cell.source, hint[1].strip() if hint else "", code[1] if code else "")
        )
    return found


def defined_in(source: str) -> set[str]:
    """The names that a piece of code defines at its top."""
    names: set[str] = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def with_answers(book: Any) -> Any:
    """A notebook in which each exercise is followed by its answer, which must be right."""
    book = copy.deepcopy(book)
    for exercise in reversed(exercises(book.cells)):
        answered = defined_in(exercise.answer)
        asked = [
            ast.unparse(statement)
            for statement in ast.parse(exercise.source).body
            if not defined_in(ast.unparse(statement)) & answered
        ]
        cell = nbformat.v4.new_code_cell("\n".join([MARK, exercise.answer, *asked]))
        cell["execution_count"] = 1
        cell["outputs"] = [nbformat.v4.new_output("stream", name="stdout", text="right\n")]
        book.cells.insert(exercise.index + 1, cell)
    return book


# ---- reproducibility ---------------------------------------------------------------------------


@dataclass
class Verdict:
    """What nbval found: exit code, output, and the sources of the cells that failed."""

    code: int
    output: str
    failed: list[str]


def nbval(book: Any, path: Path, runs: Path) -> Verdict:
    """Run a notebook again in a run root and compare its marked cells with their outputs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    # As an option on the command line nbval would take it for text.
    path.with_name("conftest.py").write_text(
        "def pytest_configure(config):\n    config.option.nbval_kernel_startup_timeout = 600\n"
    )
    report = path.with_suffix(".xml")
    environment = {**os.environ, "TOMJERRY_RUNS": str(runs), "TOMJERRY_ROOT": str(project_root())}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull),
            *("--nbval-lax", "--nbval-current-env", "--color=no", f"--junitxml={report}"),
            *(f"--rootdir={path.parent}", f"--nbval-sanitize-with={FOLDER / 'sanitize.cfg'}"),
            path,
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    failed = []
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(code[int(str(case.get("name")).split()[-1])])
    return Verdict(done.returncode, done.stdout[-6000:] + done.stderr[-2000:], failed)


@dataclass
class Runs:
    """Every notebook executed at smoke, and what nbval said of each in an empty run root."""

    executed: dict[str, Any]
    verdicts: dict[str, Future[Verdict]]
    folder: Path
    before: dict[Path, bytes]


def tracked() -> dict[Path, bytes]:
    """What the repository carries of pictures, notebooks, data and results: path → digest."""
    folders = (project_root() / name for name in TRACKED)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if ".ipynb_checkpoints" not in path.parts]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in kept}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Execute the course once; while one notebook is executed, nbval re-runs the one before."""
    folder = tmp_path_factory.mktemp("notebooks")
    runs = Runs({}, {}, folder, tracked())
    before = os.environ.get("TOMJERRY_RUNS")
    os.environ["TOMJERRY_RUNS"] = str(folder / "first")
    try:
        with ThreadPoolExecutor(1) as second:
            for source in course.sources():
                output = folder / "executed" / f"{source.stem}.ipynb"
                course.execute(source, output, parameters={"profile": "smoke"})
                book = nbformat.read(output, as_version=4)
                runs.executed[source.stem] = book
                runs.verdicts[source.stem] = second.submit(
                    nbval,
                    with_answers(book),
                    folder / "again" / f"{source.stem}.ipynb",
                    folder / "second",
                )
    finally:
        if before is None:
            os.environ.pop("TOMJERRY_RUNS", None)
        else:
            os.environ["TOMJERRY_RUNS"] = before
    yield runs


@pytest.mark.slow
@every_notebook
def test_it_runs_at_smoke_and_every_marked_cell_says_something(smoke: Runs, stem: str) -> None:
    book = smoke.executed[stem]
    check_outputs(book)
    assert (smoke.folder / "executed" / f"{stem}.ipynb").stat().st_size < course.MAX_BYTES
    names = {
        ast.literal_eval(call.args[1])
        for source in code_of(stem)
        for name, call in calls_in(source)
        if name == "save_figure" and isinstance(call.args[1], ast.Constant)
    }
    figures = smoke.folder / "first" / "smoke" / "figures"
    for name in names:
        assert all((figures / f"{name}.{kind}").stat().st_size for kind in ("pdf", "png", "json"))


@pytest.mark.slow
@every_notebook
def test_an_empty_run_root_gives_the_same_results_and_answers_are_right(
    smoke: Runs, stem: str
) -> None:
    verdict = smoke.verdicts[stem].result()
    assert verdict.code == 0 and not verdict.failed, verdict.output


@pytest.mark.slow
def test_a_smoke_course_touches_no_tracked_file(smoke: Runs) -> None:
    for verdict in smoke.verdicts.values():
        verdict.result()
    after = tracked()
    assert [path for path in after if smoke.before.get(path) != after[path]] == []
    assert after.keys() == smoke.before.keys()


@pytest.mark.slow
def test_another_seed_is_noticed(smoke: Runs) -> None:
    stem = "03_blip_finetuning"
    book = copy.deepcopy(smoke.executed[stem])
    (given,) = [c for c in book.cells if "injected-parameters" in c.metadata.get("tags", [])]
    given.source += "\nseed = 1"
    verdict = nbval(book, smoke.folder / "seed" / f"{stem}.ipynb", smoke.folder / "third")
    assert verdict.code == 1, verdict.output
    assert verdict.failed and all(is_marked(source) for source in verdict.failed), verdict.output
    # A trained metric is among what differs, not only a name of a file.
    assert any("loss" in source or "scores" in source for source in verdict.failed)


def test_a_wrong_answer_would_be_found(tmp_path: Path) -> None:
    source = "def twice(x):\n    return None  # ← yours\n\n\ncheck(twice(2), 4)"
    told = "### Exercise 1 · Twice"
    for answer, code in (("2 * x", 0), ("3 * x", 1)):
        folded = (
            "<details><summary>Hint</summary>\n\nDouble it.\n</details>\n\n<details><summary>Answer"
            f"</summary>\n\n```python\ndef twice(x):\n    return {answer}\n```\n</details>"
        )
        book = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell("from tomjerry_utils.lessons import check"),
                nbformat.v4.new_markdown_cell(told),
                nbformat.v4.new_code_cell(source),
                nbformat.v4.new_markdown_cell(folded),
            ]
        )
        verdict = nbval(with_answers(book), tmp_path / f"{code}.ipynb", tmp_path / "runs")
        assert verdict.code == code, verdict.output
