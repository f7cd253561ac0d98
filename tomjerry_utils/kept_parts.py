"""Parts of a study that outlive its run: results small enough for the repository.

A study of three training seeds takes longer than some machines are lent for, and its run folder,
gigabytes of weights and pictures, often goes with the machine. So each part (one method with one
training seed under one budget) leaves what the tables need in two small files, which the next
sitting reads instead of doing the part again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils.profiles import DEFAULT, Profile
from tomjerry_utils.runs import (
    atomic_path,
    environment,
    hash_file,
    hash_obj,
    log,
    project_root,
    read_json,
    run_root,
    write_json,
)

Part = tuple[dict[str, Any], dict[str, np.ndarray]]  # a record and its arrays


def results_folder(profile: Profile) -> Path:
    """Where a profile's studies write: the default's is `results/`, which the repository carries;
    another's is in its own run."""
    own = profile.name == DEFAULT
    return project_root() / "results" if own else run_root(profile) / "results"


def kept(path: Path, facts: Mapping[str, Any], make: Callable[[], Part]) -> Part:
    """A part as its files have it, or made and written.

    Args:
        path: of the files, without suffix: `<path>.json` has the record, `<path>.npz` its arrays,
            floats in single precision.
        facts: everything that the part depends on and that is the same on every machine: settings,
            seeds, hashes of weights, never seconds. Other facts than the files' make it anew.
        make: gives the record, which JSON can hold, and the arrays.

    Returns:
        The record, without what is stored of facts and environment, and the arrays.
    """
    found = read_part(path, facts)
    if found is not None:
        return found
    note, arrays = _files(path)
    plain = json.loads(json.dumps(facts))  # as they will be read back
    if note.is_file():
        old = read_json(note)["facts"]
        changed = [name for name in {**old, **plain} if old.get(name) != plain.get(name)]
        log(f"{note}: made with other {', '.join(changed) or 'arrays'}; making it anew")
    record, values = make()
    small = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in values.items()
    }
    with atomic_path(arrays) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **small)  # type: ignore[arg-type]
    # The record names its arrays, so that a kill before this line, or files of two machines mixed
    # up, leave nothing that is read.
    stored = {"key": hash_obj(plain), "facts": plain, "arrays": hash_file(arrays)}
    write_json(note, {**stored, "record": record, **environment()})
    return _read(path)


def read_part(path: Path, facts: Mapping[str, Any]) -> Part | None:
    """A part as its files have it; None where they are missing or made with other facts.

    Args:
        path, facts: as of :func:`kept`.
    """
    note, arrays = _files(path)
    if not (note.is_file() and arrays.is_file()):
        return None
    stored = read_json(note)
    if (stored["key"], stored["arrays"]) != (hash_obj(facts), hash_file(arrays)):
        return None
    return _read(path)


def _read(path: Path) -> Part:
    note, arrays = _files(path)
    with np.load(arrays, allow_pickle=False) as found:
        return read_json(note)["record"], {name: found[name] for name in found.files}


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".npz")
