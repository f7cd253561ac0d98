"""Scores of translated scenes: every measure of `metrics`, with its interval, on arrays.

Here each picture is looked at and judged; `metrics` reads folders and adds the rows to compare
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import Tensor

from tomjerry_utils import features, scenes
from tomjerry_utils import judges as judging
from tomjerry_utils.images import resize
from tomjerry_utils.measures import (
    BOOTSTRAP,
    NEIGHBOURS,
    SUBSET_SIZE,
    SUBSETS,
    bootstrap_ci,
    iou,
    kid,
    kid_interval,
    on_manifold,
    pck,
    recall_draws,
    structure_distance,
)
from tomjerry_utils.progress import progress
from tomjerry_utils.twins import (
    BATCH,
    REFERENCES,
    SIZE,
    Truth,
    look,
    other_scenes,
    reference,
    twins_of,
    with_noise,
)

if TYPE_CHECKING:
    from tomjerry_utils.translator import Translator

KEYS = (
    "class_accuracy", "action_accuracy", "mask_iou", "pck", "perceptual", "kid",
    "cartoon_share", "structure", "precision", "recall",
)  # fmt: skip
STRUCTURE_NAME = "efficientnet-lite0 self-similarity at 1/16"
# The depth whose self-similarity tells a scene's cartoon and twin from other pairs best: of 1/4,
# 1/8, 1/16 and 1/32, twins lie apart .77, .69, .61 and .82 of what strangers do.
_STRUCTURE_MAP = 3
_CARTOON = judging.ANSWERS.index("cartoon")


def score(
    images: np.ndarray,
    seeds: Sequence[int],
    *,
    judges: judging.Judges | None = None,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
    show: bool = False,
) -> dict[str, Any]:
    """Score translations of scenes against the scenes' hidden twins.

    Args:
        images: (N, H, W, 3) uint8, resized to 64 px where they are not.
        seeds: of the scenes, in the order of the images; validation or test range and above.
        judges: by default those that ship.
        show: say how far it is.

    Returns:
        n; metrics and by_class as in `tomjerry evaluate`; and, to pair methods scene by scene,
        each: metric → (N,) with NaN where it does not apply; answers: the class judge's words;
        features: (N, 1280), from which KID and recall come.

    Raises:
        ValueError: not one seed per picture, or a seed from a range that is trained on.
    """
    if len(images) != len(seeds) or not len(seeds):
        raise ValueError(f"need one seed per picture, got {len(images)} and {len(seeds)}")
    if min(seeds) < scenes.RANGES["validation"][0]:
        raise ValueError(f"seed {min(seeds)} is from a range that models are trained on")
    if images.shape[1:3] != (SIZE, SIZE):
        images = np.stack([resize(image, SIZE) for image in images])
    truth = twins_of(tuple(int(seed) for seed in seeds))
    judges = judges or judging.load_judges()
    options = {"references": references, "bootstrap": bootstrap}
    found = measure({"made": images}, truth, judges, show=show, **options)["made"]
    found["by_class"] = {}
    for i, cls in enumerate(scenes.CLASSES):
        if (chosen := truth.classes == i).any():
            each = {name: values[chosen] for name, values in found["each"].items()}
            vectors = found["features"][chosen]
            found["by_class"][cls] = _summary(each, vectors, i, references, bootstrap)
    return found


def diversity(images: np.ndarray, *, bootstrap: int = BOOTSTRAP) -> dict[str, Any]:
    """How different several outputs of one source are: the mean perceptual distance of two.

    Args:
        images: (N, M, H, W, 3) uint8, M ≥ 2 outputs of each of N sources.

    Returns:
        value, ci95 over the sources, n, outputs and features.
    """
    count = images.shape[1]
    if count < 2:
        raise ValueError(f"one picture of a source is like no other: need two, got {count}")
    values = []
    for outputs in images:
        maps, _ = look(outputs)
        first, second = (list(side) for side in zip(*combinations(range(count), 2), strict=True))
        values.append(_distance([m[first] for m in maps], [m[second] for m in maps]).mean())
    spread = np.array(values, float)
    return {
        "value": float(spread.mean()),
        "ci95": bootstrap_ci(spread, samples=bootstrap),
        "n": len(spread),
        "outputs": count,
        "features": features.DISTANCE_NAME,
    }


def class_swap(
    translator: Translator,
    cartoons: np.ndarray,
    classes: Sequence[str],
    *,
    seed: int,
    judges: judging.Judges,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, Any]:
    """Is the class drawn that is asked for? Each Tom is translated as a mouse, each Jerry as a cat.

    Args:
        cartoons: (N, S, S, 3) uint8 at the translator's size; classes: of each, in truth. Scenes
            with both have nothing to swap and are left out.

    Returns:
        value, the share in which the class judge sees the class asked for; ci95 and n.
    """
    other = {"tom": "jerry", "jerry": "tom"}
    alone = [i for i, cls in enumerate(classes) if cls in other]
    if not alone:
        raise ValueError("no scene has one animal alone: there is no class to swap")
    asked = [other[classes[i]] for i in alone]
    made = translator.translate(cartoons[alone], asked, seed=seed).images
    seen = [judging.ANSWERS[k] for k in judges.classify(made).argmax(1)]
    drawn = np.array([a == b for a, b in zip(seen, asked, strict=True)], float)
    return {
        "value": float(drawn.mean()),
        "ci95": bootstrap_ci(drawn, samples=bootstrap),
        "n": len(drawn),
    }


def class_samples(
    samples: Mapping[str, np.ndarray],
    training: np.ndarray,
    *,
    judges: judging.Judges,
    references: int = REFERENCES,
    bootstrap: int = BOOTSTRAP,
) -> dict[str, Any]:
    """Samples of stage 04 judged: the class asked for, KID, and whether they are copies.

    Args:
        samples: label of `scenes.LABELS` → (n, S, S, 3) uint8, as many of each.
        training: (N, 1280), natural training pictures' features, see :func:`vectors`.

    Returns:
        class_accuracy of the natural labels and cartoon_share of the others, each with value, ci95
        and n; kid of the natural ones; by_label, the share of each that is judged as asked; and
        novelty: the median distance of a sample's features to the nearest training picture's, as a
        share of what it is for held-out natural scenes. A copy has 0, a new scene about 1.
    """
    names = dict(zip(scenes.LABELS[len(scenes.CLASSES) :], scenes.CLASSES, strict=True))
    right, by_label = {}, {}
    for label, images in samples.items():
        seen = judges.classify(images).argmax(1)
        right[label] = (seen == judging.ANSWERS.index(names.get(label, "cartoon"))).astype(float)
        by_label[label] = float(right[label].mean())

    def share(labels: Sequence[str]) -> dict[str, Any]:
        values = np.concatenate([right[label] for label in labels])
        interval = bootstrap_ci(values, samples=bootstrap)
        return {"value": float(values.mean()), "ci95": interval, "n": len(values)}

    natural = [label for label in samples if label in names]
    drawn = vectors(np.concatenate([samples[label] for label in natural]))
    real = reference(references)[0]
    away = [float(np.median(cdist(some, training).min(1))) for some in (drawn, _held_out())]
    return {
        "class_accuracy": share(natural),
        "cartoon_share": share([label for label in samples if label not in names]),
        "by_label": by_label,
        "kid": {
            "value": kid(drawn, real),
            "ci95": kid_interval(drawn, real, samples=bootstrap),
            "n": len(drawn),
            "references": len(real),
            "features": features.NAME,
        },
        "novelty": {"value": away[0] / away[1], "n": len(drawn), "training": len(training)},
    }


@lru_cache(maxsize=1)
def _held_out() -> np.ndarray:
    return vectors(with_noise(other_scenes().images, 2))


def vectors(images: np.ndarray) -> np.ndarray:
    """Features (N, 1280) of pictures (N, H, W, 3) uint8 of any size."""
    if images.shape[1:3] != (SIZE, SIZE):
        images = np.stack([resize(image, SIZE) for image in images])
    return np.concatenate([look(images[i : i + BATCH])[1] for i in range(0, len(images), BATCH)])


def measure(
    sets: Mapping[str, np.ndarray],
    truth: Truth,
    judges: judging.Judges,
    *,
    references: int,
    bootstrap: int,
    show: bool,
) -> dict[str, dict[str, Any]]:
    """Score sets of pictures of the same scenes; what they share is looked at once.

    Args:
        sets: name → (N, 64, 64, 3) uint8, in the order of the truth's scenes.
        show: say how far it is.

    Returns:
        name → n, metrics, each, answers and features as :func:`score` returns them.
    """
    near: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    layout: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    starts = range(0, len(truth.seeds), BATCH)
    for start in progress(starts, "evaluate: features", unit=f"x{BATCH}", show=show):
        part = slice(start, start + BATCH)
        twin, _ = look(truth.images[part])
        source = look(truth.sources[part])
        cells = source[0][_STRUCTURE_MAP].numpy()
        for name, images in sets.items():
            maps, vectors = source if images is truth.sources else look(images[part])
            near[name].append(_distance(maps, twin))
            layout[name].append(structure_distance(maps[_STRUCTURE_MAP].numpy(), cells))
            pooled[name].append(vectors)
    real, _ = reference(references)
    out = {}
    for name, images in progress(sets.items(), "evaluate: judges", unit="set", show=show):
        said = judges.read(images)
        answers = said.classes.argmax(1)
        vectors = np.concatenate(pooled[name])
        each = {
            "class_accuracy": (answers == truth.classes).astype(float),
            "action_accuracy": (said.actions.argmax(1) == truth.actions).astype(float),
            "mask_iou": iou(said.masks, truth.masks),
            "pck": pck(said.keypoints, truth.points, truth.masks),
            "perceptual": np.concatenate(near[name]).astype(float),
            "cartoon_share": (answers == _CARTOON).astype(float),
            "structure": np.concatenate(layout[name]),
            "precision": on_manifold(vectors, real).astype(float),
        }
        out[name] = {
            "n": len(truth.seeds),
            "each": each,
            "answers": [judging.ANSWERS[i] for i in answers],
            "features": vectors,
            "metrics": _summary(each, vectors, None, references, bootstrap),
        }
    return out


# ---- helpers ------------------------------------------------------------------------------------


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> np.ndarray:
    """`features.perceptual_distance` from feature maps that are already there."""
    total = torch.zeros(len(first[0]))
    for a, b in zip(first, second, strict=True):
        gap = F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)
        total += gap.square().sum(1).mean((1, 2))
    return (total / len(first)).numpy()


def _summary(
    each: Mapping[str, np.ndarray],
    vectors: np.ndarray,
    cls: int | None,
    references: int,
    bootstrap: int,
) -> dict[str, dict[str, Any]]:
    """Value, interval and number of pictures of every metric; of a class, its own reference's."""
    out: dict[str, dict[str, Any]] = {}
    for name, values in each.items():
        there = values[~np.isnan(values)]
        if len(there):
            interval = bootstrap_ci(there, samples=bootstrap)
            out[name] = {"value": float(there.mean()), "ci95": interval, "n": len(there)}
    out["perceptual"]["features"] = features.DISTANCE_NAME
    out["structure"]["features"] = STRUCTURE_NAME
    everyone, classes = reference(references)
    real = everyone if cls is None else everyone[classes == cls]
    # Of a class too, precision asks for any natural picture: it is judged picture by picture.
    manifold = {"neighbours": NEIGHBOURS, "features": features.NAME}
    out["precision"] |= {"references": len(everyone), **manifold}
    counts = {"n": len(vectors), "references": len(real)}
    if min(counts.values()) >= 2:
        out["kid"] = {
            "value": kid(vectors, real),
            "ci95": kid_interval(vectors, real, samples=bootstrap),
            **counts,
            "subsets": SUBSETS,
            "subset_size": SUBSET_SIZE,
            "features": features.NAME,
        }
    if len(vectors) > NEIGHBOURS and len(real):
        draws = recall_draws(vectors, real, samples=bootstrap)
        out["recall"] = {
            "value": float(on_manifold(real, vectors).mean()),
            "ci95": np.nanpercentile(draws, [2.5, 97.5]).tolist(),
            **counts,
            **manifold,
        }
    return {name: out[name] for name in KEYS if name in out}
