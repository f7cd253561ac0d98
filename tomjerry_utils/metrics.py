"""What `tomjerry evaluate` measures: translated test scenes against their hidden natural twins.

Unpaired translation is usually judged without a truth. Here every cartoon scene has an exact
natural twin, drawn by this module alone and only to score; no stage ever sees one. Six measures,
each with a 95 % bootstrap interval over pictures:

- class and action accuracy: does the class (action) judge see what the scene is about?
- mask IoU and PCK: are the animals, and their keypoints, where the twin has them?
- perceptual: distance to the twin in EfficientNet-Lite0's feature maps;
- KID: distance of the *set* to held-out natural scenes that are nobody's twin.

Four rows say what the numbers mean. `floor` is the best that can be reached: the twins themselves
with the camera's noise, so what is missing to 1 is the judges' own error. `autoencoder` is the
twins through encoder and decoder, with that noise again: the best that a latent diffusion model on
it can reach. `ceiling` is a translator that paints perfectly and ignores its source: the twin of
the next scene. `identity` is the cartoon untranslated, which is also the worst KID of interest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tomjerry_utils import UserError, features, measures, scenes
from tomjerry_utils import judges as judging
from tomjerry_utils.images import IMAGE_SUFFIXES, load_image, resize, to_tensor, to_uint8
from tomjerry_utils.measures import (
    BOOTSTRAP,
    bootstrap_ci,
    iou,
    kid,
    kid_interval,
    paired_bootstrap,
    pck,
)  # fmt: skip
from tomjerry_utils.runs import (
    atomic_path,
    foundation_root,
    hash_file,
    hash_obj,
    log,
    project_root,
    read_json,
    write_json,
)

__all__ = [
    "ROWS", "bootstrap_ci", "evaluate_command", "evaluate_folder", "find_twins", "iou", "kid",
    "kid_interval", "paired_bootstrap", "pck", "reference", "rows", "score", "table", "translated",
]  # fmt: skip

SIZE = judging.SIZE
FEWEST = 50  # pictures: with fewer, the intervals say nothing
FIRST_SEED = scenes.RANGES["test"][0]  # nothing from here on is ever trained or tuned on
REFERENCES = 600
REFERENCE_SEED = 4_900_000  # in the validation range, far from where tuning begins
TWIN_SEED = 4_800_000  # in the validation range, where nothing else looks
BATCH = 8  # pictures at a time: more outgrow a CPU's cache, 64 take twice as long
NOISE = 0.01  # of the range: the natural camera's
ROWS = ("floor", "autoencoder", "ceiling", "identity")
_SUFFIXES = (".png", ".jpg", ".jpeg")


# ---- the hidden twins and the reference --------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The twins of some scenes: images (N, 64, 64, 3) without the camera's noise, masks, keypoints
    (N, 2, K, 3) with the cat's first, and the indices of class and action."""

    seeds: tuple[int, ...]
    classes: np.ndarray
    actions: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    points: np.ndarray


@lru_cache(maxsize=2)
def _twins(seeds: tuple[int, ...]) -> Truth:
    described = [scenes.describe(seed) for seed in seeds]
    drawn = scenes.render_many(list(seeds), "natural", SIZE, truth=True, noise=False)
    return Truth(
        seeds,
        np.array([scenes.CLASSES.index(scene.cls) for scene in described]),
        np.array([scenes.ACTIONS.index(scene.action) for scene in described]),
        drawn["image"],
        drawn["mask"],
        judging.by_species(np.array(seeds), drawn["keypoints"]),
    )


def _with_noise(images: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seen = images / 255 + NOISE * rng.standard_normal(images.shape, np.float32)
    return (seen.clip(0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=2)
def reference(count: int = REFERENCES) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, 1280) and class indices of held-out natural scenes: KID's other side.

    Computed once and kept under `runs/metrics`.
    """
    seeds = range(REFERENCE_SEED, REFERENCE_SEED + count)
    classes = np.array([scenes.CLASSES.index(scenes.describe(seed).cls) for seed in seeds])
    path = _cache("reference", {"seeds": [seeds.start, seeds.stop]}, ".npy")
    if path.is_file():
        return np.load(path, allow_pickle=False), classes
    log(f"evaluate: features of {count} held-out natural scenes")
    images = scenes.render_many(seeds, "natural", SIZE)["image"]
    values = np.concatenate([_look(images[i : i + BATCH])[1] for i in range(0, count, BATCH)])
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, values)
    except OSError as error:
        log(f"evaluate: not kept for next time ({error.strerror}: {path.parent})")
    return values, classes


def _cache(name: str, facts: Mapping[str, Any], suffix: str) -> Path:
    """Where a result is kept that depends on these facts and on the code that it comes from."""
    base = os.environ.get("TOMJERRY_RUNS")
    folder = Path(base).expanduser().resolve() if base else project_root() / "runs"
    rooms = [Path(module.__file__ or "") for module in (features, judging, measures)]
    sources = [Path(__file__), *rooms, *sorted(Path(scenes.__file__).parent.glob("*.py"))]
    key = hash_obj({**facts, "size": SIZE, "code": [hash_file(path) for path in sources]})
    return folder / "metrics" / f"{name}_{key}{suffix}"


# ---- scoring -----------------------------------------------------------------------------------


def _look(images: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
    """Feature maps, and the pooled features that `features.extract` gives, in one pass.

    Channels last halves the time of EfficientNet's many thin convolutions on a CPU.
    """
    net = features.network()
    with torch.inference_mode():
        maps = features.feature_maps(to_tensor(images).to(memory_format=torch.channels_last))
        pooled = net._swish(net._bn1(net._conv_head(maps[-1]))).mean((2, 3))
    return maps, pooled.numpy()


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> np.ndarray:
    """`features.perceptual_distance` from feature maps that are already there."""
    total = torch.zeros(len(first[0]))
    for a, b in zip(first, second, strict=True):
        gap = F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)
        total += gap.square().sum(1).mean((1, 2))
    return (total / len(first)).numpy()


def _measure(
    sets: Mapping[str, np.ndarray],
    truth: Truth,
    judges: judging.Judges,
    *,
    references: int,
    bootstrap: int,
) -> dict[str, dict[str, Any]]:
    """Score sets of pictures of the same scenes; the twins' own features are computed once."""
    near: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    for start in range(0, len(truth.seeds), BATCH):
        part = slice(start, start + BATCH)
        twin, _ = _look(truth.images[part])
        for name, images in sets.items():
            maps, vectors = _look(images[part])
            near[name].append(_distance(maps, twin))
            pooled[name].append(vectors)
    out = {}
    for name, images in sets.items():
        said = judges.read(images)
        answers = said.classes.argmax(1)
        each = {
            "class_accuracy": (answers == truth.classes).astype(float),
            "action_accuracy": (said.actions.argmax(1) == truth.actions).astype(float),
            "mask_iou": iou(said.masks, truth.masks),
            "pck": pck(said.keypoints, truth.points, truth.masks),
            "perceptual": np.concatenate(near[name]).astype(float),
        }
        vectors = np.concatenate(pooled[name])
        everyone = np.ones(len(truth.seeds), bool)
        out[name] = {
            "n": len(truth.seeds),
            "metrics": _summary(each, vectors, everyone, None, references, bootstrap),
            "by_class": {
                cls: _summary(each, vectors, truth.classes == i, i, references, bootstrap)
                for i, cls in enumerate(scenes.CLASSES)
                if (truth.classes == i).any()
            },
            "each": each,
            "answers": [judging.ANSWERS[i] for i in answers],
            "features": vectors,
        }
    return out


def _summary(
    each: Mapping[str, np.ndarray],
    vectors: np.ndarray,
    chosen: np.ndarray,
    cls: int | None,
    references: int,
    bootstrap: int,
) -> dict[str, dict[str, Any]]:
    """Value, interval and number of pictures of every metric, over the chosen ones."""
    out: dict[str, dict[str, Any]] = {}
    for name, values in each.items():
        kept = values[chosen & ~np.isnan(values)]
        if len(kept):
            interval = bootstrap_ci(kept, samples=bootstrap)
            out[name] = {"value": float(kept.mean()), "ci95": interval, "n": len(kept)}
    out["perceptual"]["features"] = features.DISTANCE_NAME
    real, classes = reference(references)
    real = real if cls is None else real[classes == cls]
    fakes = vectors[chosen]
    if min(len(fakes), len(real)) >= 2:
        out["kid"] = {
            "value": kid(fakes, real),
            "ci95": kid_interval(fakes, real, samples=bootstrap),
            "n": len(fakes),
            "references": len(real),
            "features": features.NAME,
        }
    return out


def score(
    images: np.ndarray,
    seeds: Sequence[int],
    *,
    judges: judging.Judges | None = None,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, Any]:
    """Score translations of scenes against the scenes' hidden twins.

    Args:
        images: (N, H, W, 3) uint8, resized to 64 px where they are not.
        seeds: of the scenes, in the order of the images; validation or test range and above.
        judges: by default those that ship.

    Returns:
        n; metrics and by_class as in `tomjerry evaluate`; and, to pair methods scene by scene,
        each: metric → (N,) with NaN where it does not apply; answers: the class judge's words;
        features: (N, 1280).

    Raises:
        ValueError: not one seed per picture, or a seed from a range that is trained on.
    """
    if len(images) != len(seeds) or not len(seeds):
        raise ValueError(f"need one seed per picture, got {len(images)} and {len(seeds)}")
    if min(seeds) < scenes.RANGES["validation"][0]:
        raise ValueError(f"seed {min(seeds)} is from a range that models are trained on")
    if images.shape[1:3] != (SIZE, SIZE):
        images = np.stack([resize(image, SIZE) for image in images])
    truth = _twins(tuple(int(seed) for seed in seeds))
    judges = judges or judging.load_judges()
    sets = {"translations": images}
    return _measure(sets, truth, judges, references=references, bootstrap=bootstrap)["translations"]


def rows(
    seeds: Sequence[int],
    *,
    judges: judging.Judges | None = None,
    autoencoder: str | Path | None = None,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, dict[str, Any]]:
    """The four rows to read a score by, name → metrics.

    Kept under `runs/metrics`, since only the scenes, the judges and the autoencoder decide them.

    Args:
        seeds: as for :func:`score`.
        autoencoder: folder of an autoencoder; by default the one that ships.

    Raises:
        UserError: no judges or no autoencoder there.
    """
    from tomjerry_utils.autoencoder import decode, encode, load_autoencoder

    judges = judges or judging.load_judges()
    place = Path(autoencoder) if autoencoder else foundation_root() / "autoencoder"
    vae = load_autoencoder(place)
    facts = {
        "seeds": [int(seed) for seed in seeds],
        "judges": _weights_key(judges),
        "autoencoder": [hash_file(path) for path in sorted(place.glob("*.safetensors"))],
        "references": references,
        "bootstrap": bootstrap,
    }
    path = _cache("rows", facts, ".json")
    if path.is_file():
        return read_json(path)
    log("evaluate: the rows to compare with: floor, autoencoder, ceiling, identity")
    truth = _twins(tuple(int(seed) for seed in seeds))
    floor = _with_noise(truth.images, 0)
    back = []
    with torch.inference_mode():
        for start in range(0, len(floor), BATCH):
            batch = to_tensor(floor[start : start + BATCH])
            back.append(to_uint8(decode(vae, encode(vae, batch))))
    sets = {
        "floor": floor,
        "autoencoder": _with_noise(np.concatenate(back), 1),
        "ceiling": np.roll(floor, 1, axis=0),
        "identity": scenes.render_many(list(truth.seeds), "cartoon", SIZE)["image"],
    }
    scored = _measure(sets, truth, judges, references=references, bootstrap=bootstrap)
    found = {name: scored[name]["metrics"] for name in ROWS}
    try:
        write_json(path, found)
    except OSError as error:
        log(f"evaluate: not kept for next time ({error.strerror}: {path.parent})")
    return found


def _weights_key(judges: judging.Judges) -> str:
    digest = hashlib.sha256()
    for net in (judges.labels, judges.pixels):
        for tensor in net.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# ---- words across the domains ------------------------------------------------------------------


def find_twins(
    embed_images: Callable[[np.ndarray], np.ndarray],
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    write: Callable[[np.ndarray], Sequence[str]],
    *,
    sets: int = 5,
    among: int = 100,
    size: int = SIZE,
    examples: int = 0,
) -> dict[str, Any]:
    """Does the caption of a cartoon find its natural twin? What stage 05's similarity relies on.

    Cartoons of the validation range are captioned; each caption, its species mapped across, ranks
    the natural twins of `among` scenes. A hit: the first one's true caption is the query's, since
    scenes with one caption are told apart by nobody.

    Args:
        embed_images: uint8 (N, size, size, 3) → unit vectors (N, P).
        embed_texts: captions → unit vectors (N, P).
        write: uint8 cartoons → captions in natural words.
        sets: so many disjoint sets of scenes; a query only meets its own.
        examples: so many queries of the first set are returned as pictures.

    Returns:
        n, among, sets; written: top-1 of the written captions; true: of the true ones, what a
        perfect captioner would reach; shuffled: of captions from other cartoons of the set, a
        control; each {value, ci95, n}; chance: the mean share of right twins; examples: rows of
        `cartoon`, `caption`, `first` (the three first twins, most similar first) and `right`.
    """
    from tomjerry_utils.wording import recall_at

    found: dict[str, list[np.ndarray]] = {"written": [], "true": [], "shuffled": []}
    chances = []
    for number in range(sets):
        first = TWIN_SEED + number * among
        seeds = list(range(first, first + among))
        true = [scenes.caption(scenes.describe(seed), "natural") for seed in seeds]
        pictures = {
            style: scenes.render_many(seeds, style, size)["image"] for style in scenes.STYLES
        }
        twins = embed_images(pictures["natural"])
        written = list(write(pictures["cartoon"]))
        correct = np.array([[a == b for b in true] for a in true])
        others = np.random.default_rng(number).permutation(among)
        queries = {"written": written, "true": true, "shuffled": [written[i] for i in others]}
        for name, texts in queries.items():
            found[name].append(recall_at(embed_texts(texts) @ twins.T, correct, (1,))[1])
        chances.append(correct.mean())
        if number == 0:
            order = np.argsort(-(embed_texts(written) @ twins.T), axis=1)[:examples, :3]
            shown = [
                {
                    "cartoon": pictures["cartoon"][i],
                    "caption": written[i],
                    "first": pictures["natural"][row],
                    "right": bool(correct[i, row[0]]),
                }
                for i, row in enumerate(order)
            ]
    out: dict[str, Any] = {"n": sets * among, "among": among, "sets": sets, "examples": shown}
    for name, hits in found.items():
        values = np.concatenate(hits)
        out[name] = {
            "value": float(values.mean()),
            "ci95": bootstrap_ci(values.astype(float)),
            "n": len(values),
        }
    return {**out, "chance": float(np.mean(chances))}


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
        references: held-out natural scenes for KID.

    Returns:
        What `tomjerry evaluate` writes: schema, n, size, label, metrics, rows, by_class.

    Raises:
        UserError: see :func:`translated`; a broken picture; no judges or autoencoder.
    """
    found = translated(folder)
    images = np.stack([load_image(path, SIZE) for path in found.values()])
    judged = judging.load_judges(judges)
    seeds, options = list(found), {"references": references, "bootstrap": bootstrap}
    made = score(images, seeds, judges=judged, **options)
    return {
        "schema": 1,
        "n": made["n"],
        "size": SIZE,
        "label": label or Path(folder).resolve().name,
        "metrics": made["metrics"],
        "rows": rows(seeds, judges=judged, autoencoder=autoencoder, **options),
        "by_class": made["by_class"],
    }


def table(result: Mapping[str, Any]) -> str:
    """A result of :func:`evaluate_folder` as lines of text: value and interval of each metric."""
    entries = [(result["label"], result["metrics"]), *result["rows"].items()]
    entries += [(f"  {result['label']}: {cls}", row) for cls, row in result["by_class"].items()]
    names = list(result["metrics"])
    width = max(len(title) for title, _ in entries)
    lines = [" " * width + "".join(f"{name:>24}" for name in names)]
    for title, metrics in entries:
        cells = [_cell(metrics.get(name)) for name in names]
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
