"""Where artefacts live: folders, atomic writes, hashes, provenance and locks.

A stage asks `open_stage` for its folder. The folder is finished when it holds a `provenance.json`
whose key matches; that file is written last, so a run killed at any moment leaves either a
finished stage or one that its next call resumes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, __version__
from tomjerry_utils.profiles import Profile

PROVENANCE = "provenance.json"
PROGRESS = "progress.json"
NO_TRAINING = "TOMJERRY_NO_TRAINING"  # set: open_stage gives finished work only
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def log(message: str) -> None:
    """Write one line of progress to stderr, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


# ---- places ------------------------------------------------------------------------------------


def project_root() -> Path:
    """The folder of this project: `TOMJERRY_ROOT`, else the checkout around the working
    directory, else the one around the installed package."""
    if named := os.environ.get("TOMJERRY_ROOT"):
        return Path(named).expanduser().resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _is_checkout(folder / "pyproject.toml"):
            return folder
    return Path(__file__).resolve().parent.parent


@functools.cache
def _is_checkout(path: Path) -> bool:
    try:
        return 'name = "tomjerry-utils"' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def data_root() -> Path:
    """The folder `data/` of the project."""
    return project_root() / "data"


def foundation_root() -> Path:
    """The folder of the tiny foundation models that ship with the kit."""
    return data_root() / "foundation"


def run_root(profile: Profile) -> Path:
    """The folder of one profile's run: `TOMJERRY_RUNS` or `runs/`, then the profile's name."""
    base = os.environ.get("TOMJERRY_RUNS")
    folder = Path(base).expanduser().resolve() if base else project_root() / "runs"
    return folder / profile.name


def model_source(name: str) -> str:
    """A profile's model setting as what `from_pretrained` takes: a local folder or a hub id.

    A name that is a folder, under the project root or as it stands, is that folder; one that
    starts with `data/`, `.` or `/` must be one; anything else is a hub id.
    """
    for path in (project_root() / name, Path(name).expanduser()):
        if path.is_dir():
            return str(path.resolve())
    if name.startswith(("data/", ".", "/", "~")):
        raise UserError(
            f"no model folder {project_root() / name}: clone the project again, "
            "or make the tiny models with 'tomjerry foundation'"
        )
    return name


# ---- atomic writes -----------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes `path`'s place on success.

    The temporary name starts with a dot and keeps the suffix. On any error it is removed and
    what stood at `path` before is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of the folder `path`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            # A folder cannot replace a full one in one step: move the old one away first.
            old = _temporary(target)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{target.name}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a value as indented JSON, atomically, and return the path."""
    return _write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, atomically, and return the path; rows are held one by one."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n")
    return Path(path)


def _write_text(path: str | os.PathLike[str], text: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or broken one is a `UserError` that names it."""
    return _parse(_read_text(path), f"{path}")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a missing or broken one is a `UserError`."""
    lines = enumerate(_read_text(path).splitlines(), start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path, or run what makes it first") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file: remove it and run again") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}): remove it and run again") from None


def _plain(value: Any) -> Any:
    """What json cannot write by itself: paths, settings, and numpy or torch numbers and arrays."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("model_dump", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


# ---- hashes ------------------------------------------------------------------------------------


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_obj(value: Any) -> str:
    """16 hex digits that name a JSON-like value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- stages ------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One stage's folder in a run, with the key that says which work it belongs to."""

    name: str
    folder: Path
    key: str
    seed: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    profile: str = ""
    opened: float = field(default_factory=time.monotonic, repr=False)

    @property
    def finished(self) -> bool:
        """True when the folder holds this very work, complete."""
        return _key_in(self.folder / PROVENANCE) == self.key

    def finish(self, **extra: Any) -> dict[str, Any]:
        """Write `provenance.json`, the last file of a stage, and return what it says.

        Args:
            extra: what else is worth knowing about this work, such as scores.
        """
        begun = _read_or_empty(self.folder / PROGRESS).get("started", _now())
        record = {
            "stage": self.name,
            "key": self.key,
            "profile": self.profile,
            "seed": self.seed,
            "settings": self.settings,
            "inputs": self.inputs,
            **environment(),
            "started": begun,
            "seconds": round(time.monotonic() - self.opened, 1),
            "extra": extra,
        }
        write_json(self.folder / PROVENANCE, record)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return record

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this stage for one process; a second one gets a `UserError`."""
        with locked(self.folder):
            yield


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], *, wait: float = 5.0) -> Iterator[None]:
    """Hold a folder for one process, by a lock file beside it.

    Args:
        folder: need not exist; the lock outlives its removal.
        wait: seconds; a little, since the kernel of a killed notebook lives on for a second.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path = Path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock", timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is working on {path}: wait until it is done, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_stage(
    profile: Profile,
    name: str,
    settings: Any,
    inputs: dict[str, str],
    version: int = 1,
) -> Stage:
    """Open a stage's folder in the run of `profile`, ready for its work.

    The key is a hash of the name, settings, inputs, seed, picture size and version. Work with
    another key, finished or not, is derived data and is removed; unfinished work with this key is
    kept so that the stage can resume it.

    Args:
        profile: whose run, seed and picture size.
        name: folder name such as `04_ldm`.
        settings: a pydantic model or a dict; everything that changes the result.
        inputs: names of what the stage reads → their hashes or upstream keys.
        version: raise it when the stage's code changes what it writes.

    Raises:
        UserError: the work is not finished and `TOMJERRY_NO_TRAINING` is set.
    """
    plain = settings.model_dump(mode="json") if hasattr(settings, "model_dump") else dict(settings)
    plain = json.loads(json.dumps(plain, default=_plain))
    key = hash_obj(
        {
            "name": name,
            "settings": plain,
            "inputs": inputs,
            "seed": profile.seed,
            "image_size": profile.image_size,
            "version": version,
        }
    )
    folder = run_root(profile) / name
    stage = Stage(name, folder, key, profile.seed, plain, dict(inputs), profile.name)
    if stage.finished:
        return stage
    if os.environ.get(NO_TRAINING):
        raise UserError(
            f"{folder}: not finished with these settings, and nothing is to be trained now: "
            f"run 'tomjerry course --profile {profile.name}' first"
        )
    if _key_in(folder / PROVENANCE) or _key_in(folder / PROGRESS) != key:
        if folder.is_dir() and any(folder.iterdir()):
            with locked(folder):
                log(f"{name}: settings or inputs changed, removing the old {folder}")
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PROGRESS, {"stage": name, "key": key, "started": _now()})
    return stage


def read_provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a finished artefact says of itself; a `UserError` where it is missing or broken."""
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        raise UserError(f"{folder}: no finished artefact (no {PROVENANCE}): run its stage first")
    record = read_json(path)
    if not isinstance(record, dict) or "key" not in record:
        raise UserError(f"{path}: not a provenance record: remove {folder} and run its stage again")
    return record


def environment() -> dict[str, Any]:
    """Versions, device and commit, for a provenance record."""
    versions = {"python": platform.python_version(), "tomjerry_utils": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record: dict[str, Any] = {"versions": versions, "device": _device()}
    if commit := _commit(project_root()):
        record["commit"] = commit
    return record


def _device() -> str:
    # Only a process that already uses torch can have computed on a GPU: never import it here.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


@functools.cache
def _commit(root: Path) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_or_empty(path: Path) -> dict[str, Any]:
    """A record of our own; a missing or broken one counts as no record."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _key_in(path: Path) -> str | None:
    return _read_or_empty(path).get("key")
