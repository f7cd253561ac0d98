"""What `tomjerry evaluate` measures: translated test scenes against their hidden natural twins.

Unpaired translation is usually judged without a truth. Here every cartoon scene has an exact
natural twin, drawn by `twins` alone and only to score; no stage ever sees one. Each measure has a
95 % bootstrap interval over pictures. Against the twin:

- class and action accuracy: does the class (action) judge see what the scene is about?
- mask IoU and PCK: are the animals, and their keypoints, where the twin has them?
- perceptual: distance to the twin in EfficientNet-Lite0's feature maps.

Against held-out natural scenes that are nobody's twin, the *set* of pictures:

- KID: how far apart are the two distributions?
- precision and recall: how much of the set lies among real pictures, and how much of the real ones
  does it cover?

Against the source:

- cartoon share: for how many does the class judge still say "cartoon"?
- structure: is it laid out as the cartoon is, whatever it looks like?

Six rows say what the numbers mean. `floor` is the best that can be reached: the twins themselves
with the camera's noise, so what is missing to 1 is the judges' own error. `autoencoder` is the
twins through encoder and decoder, with that noise again: the best that a latent diffusion model on
it can reach; its set measures are those of other natural scenes so treated, since a method's
pictures are no reconstructions of real ones. `real` are these other scenes untouched, each against
its own truth: its KID is real against real, around 0, its precision and recall what a perfect set
of that size gets. `ceiling` is a translator that paints perfectly and ignores its source: the twin
of the next scene, a random natural picture. `mean` answers with the mean of all twins whatever it
is asked, which safe guesses tend to. `identity` is the cartoon untranslated, which is
also the worst KID of interest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomjerry_utils import UserError, features, measures, scenes, scoring
from tomjerry_utils import judges as judging
from tomjerry_utils.images import IMAGE_SUFFIXES, load_image, to_tensor, to_uint8
from tomjerry_utils.measures import (
    BOOTSTRAP,
    bootstrap_ci,
    iou,
    kid,
    kid_interval,
    paired_bootstrap,
    pck,
)  # fmt: skip
from tomjerry_utils.runs import foundation_root, hash_file, log, read_json, write_json
from tomjerry_utils.scoring import KEYS, diversity, measure, score
from tomjerry_utils.twins import (
    BATCH,
    OTHERS,
    REFERENCES,
    SIZE,
    find_twins,
    kept,
    other_scenes,
    reference,
    twins_of,
    with_noise,
)

__all__ = [
    "KEYS", "REFERENCES", "ROWS", "bootstrap_ci", "diversity", "evaluate_command",
    "evaluate_folder", "find_twins", "iou", "kid", "kid_interval", "paired_bootstrap", "pck",
    "reference", "rows", "score", "table", "translated",
]  # fmt: skip

FEWEST = 50  # pictures: with fewer, the intervals say nothing
FIRST_SEED = scenes.RANGES["test"][0]  # nothing from here on is ever trained or tuned on
ROWS = ("floor", "autoencoder", "real", "ceiling", "mean", "identity")
SET_KEYS = ("kid", "precision", "recall")  # that ask how real a set is, not whose twin a picture
_SUFFIXES = (".png", ".jpg", ".jpeg")


# ---- rows to compare with ----------------------------------------------------------------------


def rows(
    seeds: Sequence[int],
    *,
    judges: judging.Judges | None = None,
    autoencoder: str | Path | None = None,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, dict[str, Any]]:
    """The rows to read a score by, name → metrics.

    Kept under `runs/metrics`, since only the scenes, the judges and the autoencoder decide them.

    Args:
        seeds: as for :func:`score`.
        autoencoder: folder of an autoencoder; by default the one that ships.
        references: as for :func:`score`; the other natural scenes are no more than these, and 300.

    Raises:
        UserError: no judges or no autoencoder there.
    """
    from tomjerry_utils.autoencoder import load_autoencoder

    judges = judges or judging.load_judges()
    place = Path(autoencoder) if autoencoder else foundation_root() / "autoencoder"
    vae = load_autoencoder(place)
    options: dict[str, Any] = {"references": references, "bootstrap": bootstrap}
    facts = {
        "judges": _weights_key(judges),
        "autoencoder": [hash_file(path) for path in sorted(place.glob("*.safetensors"))],
        **options,
    }
    wanted = [int(seed) for seed in seeds]
    path = _kept_rows("rows", {**facts, "seeds": wanted})
    if path.is_file():
        return read_json(path)
    aside = _set_rows(vae, judges, facts, options)
    log(f"evaluate: the rows to compare with: {', '.join(ROWS)}")
    truth = twins_of(tuple(wanted))
    floor = with_noise(truth.images, 0)
    mean = (truth.images.mean(0) + 0.5).astype(np.uint8)
    sets = {
        "floor": floor,
        "autoencoder": with_noise(_through(vae, floor), 1),
        "ceiling": np.roll(floor, 1, axis=0),
        "mean": np.repeat(mean[None], len(floor), 0),
        "identity": truth.sources,
    }
    scored = measure(sets, truth, judges, show=True, **options)
    found = {name: made["metrics"] for name, made in scored.items()}
    found["real"] = aside["real"]
    found["autoencoder"] |= {name: aside["autoencoder"][name] for name in SET_KEYS}
    found = {name: found[name] for name in ROWS}
    _keep(path, found)
    return found


def _set_rows(
    vae: Any, judges: judging.Judges, facts: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Other natural scenes, `real` and through the `autoencoder`: no evaluated scene is in them."""
    count = min(OTHERS, options["references"])
    path = _kept_rows("others", {**facts, "count": count})
    if path.is_file():
        return read_json(path)
    log(f"evaluate: the rows of {count} other natural scenes, once")
    others = other_scenes(count)
    seen = with_noise(others.images, 2)
    sets = {"real": seen, "autoencoder": with_noise(_through(vae, seen), 3)}
    scored = measure(sets, others, judges, show=True, **options)
    found = {name: made["metrics"] for name, made in scored.items()}
    _keep(path, found)
    return found


def _through(vae: Any, images: np.ndarray) -> np.ndarray:
    """Pictures through encoder and decoder, uint8."""
    from tomjerry_utils.autoencoder import decode, encode

    with torch.inference_mode():
        parts = [
            to_uint8(decode(vae, encode(vae, to_tensor(images[start : start + BATCH]))))
            for start in range(0, len(images), BATCH)
        ]
    return np.concatenate(parts)


def _kept_rows(name: str, facts: Mapping[str, Any]) -> Path:
    rooms = (features, judging, measures, scoring)
    return kept(name, facts, ".json", code=[__file__, *(str(room.__file__) for room in rooms)])


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    try:
        write_json(path, found)
    except OSError as error:
        log(f"evaluate: not kept for next time ({error.strerror}: {path.parent})")


def _weights_key(judges: judging.Judges) -> str:
    digest = hashlib.sha256()
    for net in (judges.labels, judges.pixels):
        for tensor in net.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# ---- tomjerry evaluate -------------------------------------------------------------------------


def translated(folder: str | Path) -> dict[int, Path]:
    """The translated scenes of a folder: seed → picture, in the order of the seeds.

    Files that are no pictures (`report.jsonl`) and hidden ones are passed over.

    Raises:
        UserError: no such folder, a picture that is not named `<seed>.png` or `.jpg`, two for one
            seed, a seed below the test range, or fewer than 50 pictures.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the folder that `tomjerry translate` wrote")
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()):
        hidden = path.name.startswith(".")
        if hidden or not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        stem = path.stem
        named = stem.isascii() and stem.isdecimal() and str(int(stem)) == stem
        if not named or path.suffix.lower() not in _SUFFIXES:
            raise UserError(
                f"{path}: not named <seed>.png or <seed>.jpg, so its scene is not known: "
                "rename it, or move it elsewhere"
            )
        seed = int(stem)
        if seed in found:
            raise UserError(f"{path} and {found[seed].name} are of one scene: remove one of them")
        if seed < FIRST_SEED:
            raise UserError(
                f"{path}: seed {seed} is below the test range, where models are trained: translate "
                f"`tomjerry scenes --style cartoon --seeds {FIRST_SEED}:{FIRST_SEED + 300}`"
            )
        found[seed] = path
    if len(found) < FEWEST:
        raise UserError(
            f"{root}: {len(found)} translated scenes, at least {FEWEST} are needed for intervals "
            "that mean something: translate more"
        )
    return dict(sorted(found.items()))


def evaluate_folder(
    folder: str | Path,
    label: str | None = None,
    *,
    judges: str | Path | None = None,
    autoencoder: str | Path | None = None,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, Any]:
    """Score a folder of translated scenes, whoever made them.

    Args:
        folder: `<seed>.png` or `.jpg`, of any size.
        label: a name for the result; by default the folder's.
        judges: folder of the judges; by default those that ship.
        autoencoder: folder of the row's autoencoder; by default the one that ships.
        references: held-out natural scenes for KID, precision and recall.

    Returns:
        What `tomjerry evaluate` writes: schema, n, size, label, metrics, rows, by_class.

    Raises:
        UserError: see :func:`translated`; a broken picture; no judges or autoencoder.
    """
    found = translated(folder)
    images = np.stack([load_image(path, SIZE) for path in found.values()])
    judged = judging.load_judges(judges)
    seeds = list(found)
    options: dict[str, Any] = {"references": references, "bootstrap": bootstrap}
    made = score(images, seeds, judges=judged, show=True, **options)
    return {
        "schema": 1,
        "n": made["n"],
        "size": SIZE,
        "label": label or Path(folder).resolve().name,
        "metrics": made["metrics"],
        "rows": rows(seeds, judges=judged, autoencoder=autoencoder, **options),
        "by_class": made["by_class"],
    }


def table(result: Mapping[str, Any], *, columns: int = 5) -> str:
    """A result of :func:`evaluate_folder` as lines of text: value and interval of each metric.

    Args:
        columns: metrics beside each other; the others follow below.
    """
    entries = [(result["label"], result["metrics"]), *result["rows"].items()]
    entries += [(f"  {result['label']}: {cls}", row) for cls, row in result["by_class"].items()]
    names = list(result["metrics"])
    width = max(len(title) for title, _ in entries)
    lines = []
    for start in range(0, len(names), columns):
        part = names[start : start + columns]
        lines += [""] if start else []
        lines.append(" " * width + "".join(f"{name:>24}" for name in part))
        for title, metrics in entries:
            cells = [_cell(metrics.get(name)) for name in part]
            lines.append(f"{title:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "–"
    low, high = metric["ci95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def evaluate_command(
    translations: str | Path, *, json: str | Path, label: str | None = None
) -> dict[str, Any]:
    """`tomjerry evaluate`: score a folder, write the result as JSON, print it as a table.

    Raises:
        UserError: see :func:`evaluate_folder`.
        OSError: the JSON file cannot be written; found out before the work.
    """
    target = Path(json)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give --json a file name")
    translated(translations)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target.parent}: no permission to write there: choose another --json")
    result = evaluate_folder(translations, label)
    write_json(target, result)
    print(table(result))
    print(f"{result['n']} scenes, {result['size']} px; {features.NAME}: {target}")
    return result
