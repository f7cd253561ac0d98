"""The hidden truth that stage 06 scores against; no other room draws these pictures.

Every cartoon scene has an exact natural twin. Nothing that is trained, tuned or picked ever sees
one: twins are drawn here, in memory, for `metrics` and for :func:`find_twins` alone. Beside them
stand two sets of held-out natural scenes that are nobody's twin: the reference that sets of
pictures are compared with, and the others, which say how far apart two real sets are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomjerry_utils import features, scenes
from tomjerry_utils import judges as judging
from tomjerry_utils.images import to_tensor
from tomjerry_utils.measures import bootstrap_ci
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import atomic_path, hash_file, hash_obj, log, project_root

SIZE = judging.SIZE
BATCH = 8  # pictures at a time: more outgrow a CPU's cache, 64 take twice as long
NOISE = 0.01  # of the range: the natural camera's
REFERENCES = 2000
OTHERS = 300
# Three stretches of the validation range, far from its beginning, where settings are tuned.
OTHER_SEED = 4_700_000
TWIN_SEED = 4_800_000
REFERENCE_SEED = 4_900_000


@dataclass(frozen=True)
class Truth:
    """Some scenes as they are: images (N, 64, 64, 3) of the twins without the camera's noise,
    sources (N, 64, 64, 3) of the cartoons, masks, keypoints (N, 2, K, 3) with the cat's first,
    parts (N, 64, 64), and the indices of class and action."""

    seeds: tuple[int, ...]
    classes: np.ndarray
    actions: np.ndarray
    images: np.ndarray
    sources: np.ndarray
    masks: np.ndarray
    points: np.ndarray
    parts: np.ndarray


@lru_cache(maxsize=4)
def twins_of(seeds: tuple[int, ...]) -> Truth:
    """The truth of these scenes."""
    described = [scenes.describe(seed) for seed in seeds]
    drawn = scenes.render_many(list(seeds), "natural", SIZE, truth=True, noise=False)
    return Truth(
        seeds,
        np.array([scenes.CLASSES.index(scene.cls) for scene in described]),
        np.array([scenes.ACTIONS.index(scene.action) for scene in described]),
        drawn["image"],
        scenes.render_many(list(seeds), "cartoon", SIZE)["image"],
        drawn["mask"],
        judging.by_species(np.array(seeds), drawn["keypoints"]),
        drawn["parts"],
    )


def with_noise(images: np.ndarray, seed: int) -> np.ndarray:
    """The pictures as the natural camera takes them, uint8."""
    rng = np.random.default_rng(seed)
    seen = images / 255 + NOISE * rng.standard_normal(images.shape, np.float32)
    return (seen.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def other_scenes(count: int = OTHERS) -> Truth:
    """Natural scenes that are neither anybody's twin nor in the reference."""
    return twins_of(tuple(range(OTHER_SEED, OTHER_SEED + count)))


@lru_cache(maxsize=2)
def reference(count: int = REFERENCES) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, 1280) and class indices of held-out natural scenes: KID's other side.

    Computed once and kept under `runs/metrics`.
    """
    seeds = range(REFERENCE_SEED, REFERENCE_SEED + count)
    classes = np.array([scenes.CLASSES.index(scenes.describe(seed).cls) for seed in seeds])
    path = kept("reference", {"seeds": [seeds.start, seeds.stop]}, ".npy", code=[features.__file__])
    if path.is_file():
        return np.load(path, allow_pickle=False), classes
    log(f"evaluate: features of {count} held-out natural scenes, once")
    parts = []
    for start in progress(range(0, count, 100), "evaluate: held-out scenes", unit="x100"):
        images = scenes.render_many(seeds[start : start + 100], "natural", SIZE)["image"]
        parts += [look(images[i : i + BATCH])[1] for i in range(0, len(images), BATCH)]
    values = np.concatenate(parts)
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, values)
    except OSError as error:
        log(f"evaluate: not kept for next time ({error.strerror}: {path.parent})")
    return values, classes


def look(images: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
    """Feature maps, and the pooled features that `features.extract` gives, in one pass.

    Channels last halves the time of EfficientNet's many thin convolutions on a CPU.
    """
    net = features.network()
    with torch.inference_mode():
        maps = features.feature_maps(to_tensor(images).to(memory_format=torch.channels_last))
        pooled = net._swish(net._bn1(net._conv_head(maps[-1]))).mean((2, 3))
    return maps, pooled.numpy()


def kept(name: str, facts: Mapping[str, Any], suffix: str, *, code: Sequence[str]) -> Path:
    """Where a result is kept that depends on these facts, on how scenes are drawn, and on the
    code in these files beside this one."""
    base = os.environ.get("TOMJERRY_RUNS")
    folder = Path(base).expanduser().resolve() if base else project_root() / "runs"
    sources = [Path(__file__), *map(Path, code), *sorted(Path(scenes.__file__).parent.glob("*.py"))]
    key = hash_obj({**facts, "size": SIZE, "code": [hash_file(path) for path in sources]})
    return folder / "metrics" / f"{name}_{key}{suffix}"


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
