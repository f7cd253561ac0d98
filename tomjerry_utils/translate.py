"""`tomjerry translate`: files in, files out, and a report of how far each was from training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError, baselines, transfer
from tomjerry_utils.images import list_images, load_image, save_image
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    foundation_root,
    log,
    read_json,
    read_jsonl,
    run_root,
    write_jsonl,
)
from tomjerry_utils.translator import load_translator


def find_weights(profile: Profile, weights: Path | None) -> tuple[Path, str]:
    """The translator that `tomjerry translate` uses, and a line that says which.

    Raises:
        UserError: there is none; the line names the command that makes one.
    """
    if weights is not None:
        if not (weights / "translator.json").is_file():
            raise UserError(f"--weights {weights}: no translator there (no translator.json)")
        return weights, f"weights: {weights}"
    made = run_root(profile) / transfer.STAGE
    if (made / "provenance.json").is_file() and (made / "translator.json").is_file():
        return made, f"weights: {made} (your own run)"
    shipped = foundation_root() / "translator"
    if profile.name == "mini" and (shipped / "translator.json").is_file():
        return shipped, f"weights: {shipped} (shipped with the kit)"
    raise UserError(
        f"no translator for profile {profile.name}: run `make course PROFILE={profile.name}`, "
        "or name one with --weights"
    )


def distance(images: np.ndarray, reference: dict[str, Any]) -> np.ndarray:
    """How far pictures are from the training cartoons, (N,): 1 = as far as 95 % of those are.

    Cosine distance of their features from the centre of the training set's, in units of that
    set's own 95 % quantile.
    """
    from tomjerry_utils import features

    found = features.extract(images)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    centre = np.asarray(reference["centre"])
    return (1 - found @ centre / np.linalg.norm(centre)) / reference["p95"]


def translate_files(
    inputs: Sequence[Path],
    out: Path,
    *,
    profile: Profile,
    cls: str = "auto",
    method: str = "ours",
    steps: int | None = None,
    seed: int = 0,
    weights: Path | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Translate pictures and folders for `tomjerry translate`.

    Writes `<stem>.png` (folders mirrored) and `report.jsonl` with file, class, distance, seconds.
    Every input is read before the first is translated. A translation depends on its picture and
    the seed, not on what else is translated with it.

    Args:
        overwrite: make outputs anew that are there; without it they are kept.

    Raises:
        UserError: a missing or unreadable input, two inputs with one output, no weights, an
            unknown method.
    """
    path, line = find_weights(profile, weights)
    log(line)
    if method not in ("ours", *baselines.METHODS):
        raise UserError(f"--method {method}: choose from ours, {', '.join(baselines.METHODS)}")
    pairs: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_dir():
            # An output folder inside the input folder is no input.
            files = [p for p in list_images(given) if out.resolve() not in p.resolve().parents]
            pairs += [(p, out / p.relative_to(given).with_suffix(".png")) for p in files]
        elif given.is_file():
            pairs.append((given, out / f"{given.stem}.png"))
        else:
            raise UserError(f"{given}: no such file or folder; check the path")
    seen: dict[Path, Path] = {}
    for source, target in pairs:
        if target in seen:
            raise UserError(f"{source} and {seen[target]} would both become {target}: rename one")
        seen[target] = source
    own = {source.resolve() for source, _ in pairs}
    if drowned := [target for target in seen if target.resolve() in own]:
        raise UserError(f"{drowned[0]} is an input and would be overwritten: choose another --out")
    there = [t for t in seen if t.exists()]
    if there and not overwrite:
        log(f"{len(there)} outputs exist and are kept; --overwrite makes them anew")
        pairs = [(s, t) for s, t in pairs if t not in set(there)]
    translator = load_translator(path, profile)
    longest = translator.scheduler.config.num_train_timesteps
    if steps is not None and steps > longest:
        raise UserError(f"--steps {steps}: the noise schedule has {longest}; give no more")
    for source, _ in pairs:
        load_image(source, translator.size)
    reference = read_json(path / "translator.json")["reference"]
    out.mkdir(parents=True, exist_ok=True)
    report: list[dict[str, Any]] = []
    written = out / "report.jsonl"
    anew = {str(source) for source, _ in pairs}
    before = read_jsonl(written) if written.is_file() else []
    write_jsonl(written, [row for row in before if row.get("file") not in anew])
    with written.open("a", encoding="utf-8") as file:
        chunk = 25
        for begin in progress(range(0, len(pairs), chunk), "translate"):
            some = pairs[begin : begin + chunk]
            started = time.monotonic()
            images = np.stack([load_image(s, translator.size) for s, _ in some])
            classes = [None if cls == "auto" else cls] * len(some)
            numbers = [int.from_bytes(sha256(x.tobytes()).digest()[:4]) for x in images]
            if method == "ours":
                made = translator.translate(
                    images, classes, seed=seed, steps=steps, numbers=numbers
                )
                pictures, names = made.images, made.classes
            else:
                pictures, names = baselines.run(
                    method, translator, images, classes, seed=seed, steps=steps, numbers=numbers
                )
            far = distance(images, reference)
            each = (time.monotonic() - started) / len(some)
            for (source, target), picture, name, d in zip(some, pictures, names, far, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                save_image(target, picture)
                row = {
                    "file": str(source),
                    "class": name,
                    "distance": round(float(d), 3),
                    "seconds": round(each, 4),
                }
                report.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    return report
