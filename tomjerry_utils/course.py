"""Run the notebooks in order, skip what is up to date, and keep sources and copies in step.

`notebooks/src/NN_name.py` (jupytext percent) is what people edit. A run executes it into
`runs/<profile>/notebooks/NN_name.ipynb`. The committed `notebooks/NN_name.ipynb` is a cleaned copy
of a run at the default profile, made by `sync` and never by hand.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.profiles import DEFAULT, Profile
from tomjerry_utils.runs import (
    NO_TRAINING,
    PROVENANCE,
    atomic_path,
    data_root,
    hash_file,
    hash_obj,
    locked,
    log,
    project_root,
    read_json,
    run_root,
    write_json,
)

MAX_BYTES = 1_000_000  # of a committed notebook
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


@dataclass
class CourseResult:
    """What a course run did: names of notebooks executed and skipped, figures, seconds."""

    folder: Path
    executed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    published: list[Path] = field(default_factory=list)
    seconds: float = 0.0


# ---- running -----------------------------------------------------------------------------------


def run_course(
    profile: Profile,
    only: Sequence[str] | None = None,
    *,
    given: str | None = None,
    fresh: bool = False,
) -> CourseResult:
    """Execute the notebooks in order; those that are up to date are skipped.

    A notebook is up to date when its own source, those before it, the package, the shipped data
    and the profile are what they were when it last finished, and what it made is still there. A
    course killed at any moment goes on from the first notebook that is not.

    Args:
        profile: whose run.
        only: numbers or names of notebooks, such as `["03"]`; None for all.
        given: what to pass to the notebooks as `profile`, where that is a file rather than a name.
        fresh: execute even what is up to date.

    Raises:
        UserError: no such notebook, another course at work, or a notebook that stopped.
    """
    began = time.monotonic()
    keys = _keys(profile)
    chosen = _choose(keys, only)
    result = CourseResult(run_root(profile) / "notebooks")
    with locked(result.folder):
        result.folder.mkdir(parents=True, exist_ok=True)
        for old in result.folder.glob(".tmp-*"):
            old.unlink()
        for number, source in enumerate(chosen, start=1):
            label = f"[{number}/{len(chosen)}] {source.stem}"
            if not fresh and _is_current(profile, source.stem, keys[source]):
                log(f"{label}: up to date")
                result.skipped.append(source.stem)
                continue
            log(f"{label}: running")
            seconds = _run_notebook(profile, source, keys[source], given or profile.name)
            log(f"{label}: done in {_minutes(seconds)}")
            result.executed.append(source.stem)
    result.figures = sorted((run_root(profile) / "figures").glob("*.pdf"))
    # The default profile's figures are the ones that the repository carries.
    if profile.name == DEFAULT and len(chosen) == len(keys):
        result.published = publish_figures(profile)
    result.seconds = time.monotonic() - began
    return result


def sources(root: Path | None = None) -> list[Path]:
    """The notebooks' sources in course order."""
    folder = (root or project_root()) / "notebooks" / "src"
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not found:
        raise UserError(f"no notebooks in {folder}: run this inside a clone of the project")
    return found


def execute(source: Path, output: Path, *, parameters: dict[str, Any]) -> float:
    """Execute one notebook source with papermill and return the seconds it took.

    The output appears only when every cell has run; a notebook that stops leaves
    `<name>.failed.ipynb` beside it, with the error in it.
    """
    import jupytext
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    book = jupytext.read(source)
    book.metadata["kernelspec"] = dict(KERNEL)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    temporary = output.with_name(f".tmp-{output.name}")
    began = time.monotonic()
    try:
        papermill.execute_notebook(
            book,
            temporary,
            parameters=parameters,
            kernel_name=KERNEL["name"],
            cwd=source.parent.parent,
            progress_bar=False,
            start_timeout=600,  # a kernel on a busy machine or a slow shared disk
            # The kernel's log lines, so that a long cell is not silent.
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=50"],
        )
    except PapermillExecutionError as error:
        temporary.replace(failed)
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        message = " ".join(str(error.evalue).split())
        reason = message if error.ename == "UserError" else f"{error.ename}: {message}"
        raise UserError(
            f"{source.stem} stopped at cell {error.exec_count}: {reason} (see {failed})"
        ) from None
    except DeadKernelError:
        raise UserError(
            f"{source.stem}: its Python process died, most often for want of memory: "
            "close other programs or choose a smaller profile, then run the same command again"
        ) from None
    else:
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return time.monotonic() - began


def _run_notebook(profile: Profile, source: Path, key: str, given: str) -> float:
    folder = run_root(profile) / "notebooks"
    record = folder / f"{source.stem}.json"
    record.unlink(missing_ok=True)
    began = time.time()
    parameters = {"profile": given, "seed": profile.seed}
    seconds = execute(source, folder / f"{source.stem}.ipynb", parameters=parameters)
    figures = (run_root(profile) / "figures").glob("*")
    write_json(
        record,
        {
            "notebook": source.stem,
            "key": key,
            "profile": profile.name,
            "seconds": round(seconds, 1),
            "figures": sorted(p.name for p in figures if p.stat().st_mtime >= began),
            "stages": _stages(profile),
        },
    )
    return seconds


def _is_current(profile: Profile, name: str, key: str) -> bool:
    """True when the notebook finished with this key and what it made and read is still there."""
    folder = run_root(profile) / "notebooks"
    path = folder / f"{name}.json"
    if not (path.is_file() and (folder / f"{name}.ipynb").is_file()):
        return False
    record = read_json(path)
    there = _stages(profile)
    return (
        record["key"] == key
        and all((run_root(profile) / "figures" / figure).is_file() for figure in record["figures"])
        and all(there.get(stage) == its_key for stage, its_key in record["stages"].items())
    )


def _stages(profile: Profile) -> dict[str, str]:
    """The finished stages of a run and their keys."""
    found = sorted(run_root(profile).glob(f"[0-9][0-9]_*/{PROVENANCE}"))
    return {path.parent.name: read_json(path)["key"] for path in found}


def _keys(profile: Profile) -> dict[Path, str]:
    """Each source's key, which holds those of all sources before it."""
    root = project_root()
    shipped = [p for kind in ("foundation", "starter") for p in (data_root() / kind).rglob("*")]
    key = hash_obj(
        {
            "profile": profile,
            "package": _package(),
            "data": _hashes(shipped, data_root()),
            "results": _hashes((root / "results").glob("*.json"), root),
        }
    )
    keys = {}
    for source in sources(root):
        key = hash_obj([key, source.name, hash_file(source)])
        keys[source] = key
    return keys


def _package() -> dict[str, str]:
    folder = Path(__file__).parent
    return _hashes([*folder.rglob("*.py"), *folder.rglob("*.yaml")], folder)


def _hashes(paths: Iterable[Path], base: Path) -> dict[str, str]:
    return {str(p.relative_to(base)): hash_file(p) for p in sorted(paths) if p.is_file()}


def _choose(keys: Iterable[Path], only: Sequence[str] | None) -> list[Path]:
    every = list(keys)
    if not only:
        return every
    chosen = []
    for wanted in only:
        found = [s for s in every if wanted in (s.stem, s.stem[:2], s.stem[:2].lstrip("0") or "0")]
        if not found:
            raise UserError(
                f"no notebook '{wanted}': choose from {', '.join(s.stem for s in every)}"
            )
        chosen += found
    return [source for source in every if source in chosen]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


# ---- figures -----------------------------------------------------------------------------------


def publish_figures(profile: Profile) -> list[Path]:
    """Copy a run's figures into the repository's `figures/`; return those that changed."""
    target = project_root() / "figures"
    changed = []
    for path in sorted((run_root(profile) / "figures").glob("*.*")):
        copy = target / path.name
        if path.name.startswith("."):
            continue
        if not (copy.is_file() and hash_file(copy) == hash_file(path)):
            with atomic_path(copy) as temporary:
                shutil.copyfile(path, temporary)
            changed.append(copy)
    return changed


def redraw(profile: Profile) -> tuple[Path, list[Path]]:
    """Draw the figures again without training anything.

    From the profile's run where every notebook has finished: they are executed once more, and no
    stage may train. Else from the committed `results/`. The studies' figures come from there, at
    the default profile in either case.

    Returns:
        what they were drawn from, and the figures (PDF).

    Raises:
        UserError: there is neither, or the run was made with other settings.
    """
    from tomjerry_utils import study

    folder, results = run_root(profile) / "notebooks", project_root() / "results"
    if all((folder / f"{source.stem}.json").is_file() for source in sources()):
        log(f"figures: redrawing from the run {run_root(profile)}, nothing is trained")
        with _no_training():
            result = run_course(profile, fresh=True)
        studies = study.draw_studies(results) if profile.name == DEFAULT else []
        return run_root(profile), [*result.figures, *studies]
    if not any(results.rglob("*.json")):
        raise UserError(
            f"nothing to draw from: no finished run in {run_root(profile)} and no {results}: "
            f"run 'tomjerry course --profile {profile.name}' first"
        )
    log(f"figures: redrawing from the committed {results}, nothing is trained")
    return results, study.draw_results(results)


@contextmanager
def _no_training() -> Iterator[None]:
    before = os.environ.get(NO_TRAINING)
    os.environ[NO_TRAINING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_TRAINING]
        else:
            os.environ[NO_TRAINING] = before


# ---- sources and committed copies --------------------------------------------------------------


def sync(profile: Profile) -> list[Path]:
    """Rewrite the committed notebooks from the executed ones of a run, and keep its numbers.

    Returns:
        the notebooks that changed, and `results/<profile>/course.json`.

    Raises:
        UserError: a notebook was not executed since its source last changed, or its copy would be
            larger than `MAX_BYTES`.
    """
    import nbformat

    from tomjerry_utils import study

    changed = []
    for source in sources():
        executed = run_root(profile) / "notebooks" / f"{source.stem}.ipynb"
        if not executed.is_file():
            raise UserError(
                f"{source.stem} has no executed copy in {executed.parent}: "
                f"run 'tomjerry course --profile {profile.name}' first"
            )
        book = _clean(nbformat.read(executed, as_version=4), source)
        if _contents(book) != _contents(_read_source(source)):
            raise UserError(
                f"{source} changed since it was executed: "
                f"run 'tomjerry course --profile {profile.name}' first"
            )
        text = nbformat.writes(book) + "\n"
        if len(text.encode()) > MAX_BYTES:
            raise UserError(
                f"{source.stem} would be {len(text.encode()) / 1e6:.1f} MB with its outputs, more "
                f"than {MAX_BYTES / 1e6:.0f}: show smaller or fewer pictures"
            )
        target = source.parent.parent / f"{source.stem}.ipynb"
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            with atomic_path(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
            changed.append(target)
    if kept := study.keep_results(profile):
        changed.append(kept)
    return changed


def check_pairs(root: Path | None = None) -> list[str]:
    """What is wrong between `notebooks/src/*.py` and `notebooks/*.ipynb`, one line each."""
    import nbformat

    folder = (root or project_root()) / "notebooks"
    made = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    written = {path.stem: path for path in sorted((folder / "src").glob("*.py"))}
    problems = [f"{made[n]} has no source in {folder / 'src'}" for n in made if n not in written]
    for name, source in written.items():
        if name not in made:
            problems.append(f"{source} has no notebook: run 'make notebooks'")
            continue
        book = nbformat.read(made[name], as_version=4)
        if _contents(book) != _contents(_read_source(source)):
            problems.append(f"{made[name]} differs from its source: run 'make notebooks'")
        if made[name].stat().st_size > MAX_BYTES:
            problems.append(f"{made[name]} is larger than {MAX_BYTES / 1e6:.0f} MB")
        if "widgets" in book.metadata:
            problems.append(f"{made[name]} holds metadata.widgets, which GitHub cannot show")
        code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
        if any(cell.execution_count is None for cell in code):
            problems.append(f"{made[name]} has cells that were not executed: run 'make notebooks'")
        if any(out.output_type == "error" for cell in code for out in cell.outputs):
            problems.append(f"{made[name]} shows an error: mend it and run 'make notebooks'")
    return problems


def _read_source(source: Path) -> Any:
    import jupytext

    return jupytext.read(source)


def _contents(book: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    """What a notebook and its source must share: kind, text and tags of each cell."""
    return [
        (cell.cell_type, cell.source.strip(), tuple(cell.metadata.get("tags", [])))
        for cell in book.cells
    ]


def _clean(book: Any, source: Path) -> Any:
    """An executed notebook as it is committed: what depends on the machine or the day is left out.

    Injected parameters, timings, widgets, stderr and absolute paths go; execution counts and
    cell ids are numbered anew, so that two runs differ only where their results do.
    """
    cells = [c for c in book.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    originals = _read_source(source).cells
    for index, cell in enumerate(cells):
        cell["id"] = f"{source.stem[:2]}-{index:03d}"
        cell["metadata"] = dict(originals[index].metadata) if index < len(originals) else {}
    counts: Iterator[int] = iter(range(1, len(cells) + 1))
    for cell in cells:
        if cell.cell_type != "code":
            continue
        cell["execution_count"] = next(counts) if cell.source.strip() else None
        cell["outputs"] = [out for out in map(_clean_output, cell.outputs) if out is not None]
        for output in cell["outputs"]:
            if output.output_type == "execute_result":
                output["execution_count"] = cell["execution_count"]
    book["cells"] = cells
    book["metadata"] = {
        "kernelspec": dict(KERNEL),
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    }
    return book


def _clean_output(output: Any) -> Any:
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output["text"] = _without_root(output.text)
        return output
    data = output.get("data")
    if data is None:
        return output
    if WIDGET in data:
        # A live widget cannot be stored; its static picture, if any, is an output of its own.
        return None
    # Of the metadata, a picture's words for those who cannot see it.
    said = {
        kind: {"alt": about["alt"]} for kind, about in output.metadata.items() if "alt" in about
    }
    output["metadata"] = said
    for kind, value in data.items():
        if isinstance(value, str) and kind.startswith("text/"):
            data[kind] = _without_root(value)
    return output


def _without_root(text: str) -> str:
    return text.replace(f"{project_root()}/", "")
