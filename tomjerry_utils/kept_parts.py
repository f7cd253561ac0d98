"""Parts of a study that outlive its run: results small enough for the repository.

A study of three training seeds takes longer than some machines are lent for, and its run folder,
gigabytes of weights and pictures, often goes with the machine. So each part (one method with one
training seed under one budget, one row of the ablation) leaves what the tables need in two small
files, which the next sitting reads instead of doing the part again.
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
        make: gives the record and the arrays; its record should say the seconds it took.

    Returns:
        The record, without what is stored of facts and environment, and the arrays.
    """
    note, arrays = path.with_name(path.name + ".json"), path.with_name(path.name + ".npz")
    key, facts = hash_obj(facts), json.loads(json.dumps(facts))  # as they will be read back
    if note.is_file() and arrays.is_file():
        stored = read_json(note)
        if stored["key"] == key:
            with np.load(arrays, allow_pickle=False) as found:
                return stored["record"], {name: found[name] for name in found.files}
        changed = [name for name in facts if stored["facts"].get(name) != facts[name]]
        log(f"{note}: made with other {', '.join(changed) or 'facts'}; making it anew")
    record, values = make()
    small = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in values.items()
    }
    note.unlink(missing_ok=True)  # without it the arrays are not read, so it goes first
    with atomic_path(arrays) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **small)  # type: ignore[arg-type]
    write_json(note, {"key": key, "facts": facts, "record": record, **environment()})
    return record, small
