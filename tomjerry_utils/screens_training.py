"""Trains the two probes of :mod:`screens` and tests them on pictures of other packages.

Whether a picture is a photograph: a :mod:`class_probe` on the network's features, its folds whole
pictures. Where letters lie: a small net on each place's features, taught by letters that
:mod:`lettering` writes itself, so it knows where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from tomjerry_utils import UserError, class_probe
from tomjerry_utils.lettering import HELD_OUT_FONTS, KINDS, TRAIN_FONTS, overlay
from tomjerry_utils.progress import progress
from tomjerry_utils.screens import (
    SIZE,
    Limits,
    Scores,
    describe,
    judge,
    mark_of,
    measure,
    text_map,
    text_share,
)
from tomjerry_utils.screens_material import Material, drawn_scenes, gather, view
from tomjerry_utils.training import TrainResult, train

CELL = 8  # px of a picture per place of the text probe
BLURS = (0.5, 1.0, 2.0, 3.0, 4.0)  # px at a short side of 256 px, blurs that are tested


def teach(
    folder: Path, options: Mapping[str, Any], seed: int
) -> tuple[dict[str, Tensor], TrainResult, dict[str, Any]]:
    """Train both probes.

    Args:
        folder: for the text probe's history and checkpoint.
        options: `views`, `scenes`, `hidden`, `steps`, `batch_size`, `learning_rate`.

    Returns:
        weights as they ship, the text probe's training, and facts for the provenance: what was
        seen, and the scores on what was held out.
    """
    found, versions = gather()
    count = int(options["scenes"])
    for style, first in (("natural", 0), ("cartoon", 500_000)):
        found += drawn_scenes(style, range(first, first + count), (64, 128, 256), zoo=True)
    found += held_out_scenes(count // 2)
    seen = [m for m in found if not m.held_out]
    weights = photo_probe(seen, int(options["views"]), seed)
    text, result = text_probe(seen, folder, options, seed)
    # Half precision, and measured as it ships.
    weights = {name: value.half() for name, value in {**weights, **text}.items()}
    facts = {
        "packages": {name: version or "not to be had" for name, version in versions.items()},
        "trained_on": _counts(seen),
        "held_out": {
            "pictures": _counts(m for m in found if m.held_out),
            **test({n: v.float() for n, v in weights.items()}, found, seed),
        },
    }
    return weights, result, facts


def held_out_scenes(count: int) -> list[Material]:
    """Scenes of the course to test on, so many of either style."""
    return [
        scene
        for style, first in (("natural", 2_900_000), ("cartoon", 1_900_000))
        for scene in drawn_scenes(style, range(first, first + count), (64, 256), zoo=False)
    ]


def photo_probe(materials: Sequence[Material], views: int, seed: int) -> dict[str, Tensor]:
    """Photograph or drawing: a logistic regression on several looks at each picture.

    Raises:
        UserError: too few pictures of either kind.
    """
    rng = np.random.default_rng(seed)
    looks, labels, groups = [], [], []
    for material in materials:
        for _ in range(views):
            looks.append(view(material, rng))
            labels.append("photo" if material.photo else "drawing")
            groups.append(f"{material.source} {material.name}")
    probe = class_probe.fit(summaries(looks, "photo probe"), labels, groups)
    gap = (probe.weight[:, 1] - probe.weight[:, 0]) / probe.scale / probe.temperature
    bias = (probe.bias[1] - probe.bias[0]) / probe.temperature - probe.mean @ gap
    return {
        "photo.weight": torch.from_numpy(gap).float(),
        "photo.bias": torch.tensor(float(bias)),
    }


class TextNet(nn.Module):
    """Letters at a place, from its features (…, G) → logits (…)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, places: Tensor) -> Tensor:
        x = (places - self.mean) / self.scale
        return self.outer(torch.relu(self.inner(x)))[..., 0]

    def folded(self) -> dict[str, Tensor]:
        """Weights on features as they come, named as `screens.text_map` reads them."""
        weight = self.inner.weight.detach() / self.scale
        return {
            "text.in.weight": weight.T.contiguous(),
            "text.in.bias": self.inner.bias.detach() - weight @ self.mean,
            "text.out.weight": self.outer.weight.detach()[0].clone(),
            "text.out.bias": self.outer.bias.detach()[0].clone(),
        }


def text_probe(
    materials: Sequence[Material], folder: Path, options: Mapping[str, Any], seed: int
) -> tuple[dict[str, Tensor], TrainResult]:
    """Where letters lie: places of written and of clean pictures."""
    rng = np.random.default_rng([seed, 1])
    features, wanted = [], []
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    for i, number in enumerate(progress(rng.permutation(len(materials)), "text probe")):
        image = view(materials[number], rng)
        mask = np.zeros((SIZE, SIZE), np.float32)
        if i % 3:
            # A hard limit would teach it letters that cannot be made out.
            image, mask = overlay(image, KINDS[i % len(KINDS)], rng, TRAIN_FONTS)
        batch.append((image, mask))
        if len(batch) == 16 or i + 1 == len(materials):
            for x, y in _places(batch, rng):
                features.append(x)
                wanted.append(y)
            batch = []
    x, y = torch.cat(features), torch.cat(wanted)
    torch.manual_seed(seed)
    net = TextNet(x.shape[1], int(options["hidden"]))
    net.mean, net.scale = x.float().mean(0), x.float().std(0).clamp(min=1e-3)

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(x), (int(options["batch_size"]),), generator=generator)
        return x[index].float(), y[index]

    def loss(batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        logits = net(batch[0])
        right = ((logits > 0) == (batch[1] > 0.5)).float().mean()
        cost = nn.functional.binary_cross_entropy_with_logits(logits, batch[1])
        return cost, {"right": right}

    result = train(
        {"text": net},
        loss,
        batches,
        steps=int(options["steps"]),
        learning_rate=float(options["learning_rate"]),
        folder=folder,
        seed=seed,
        log_every=100,
        threads=1,
        describe="text probe",
    )
    return net.folded(), result


def summaries(images: Sequence[np.ndarray], what: str) -> np.ndarray:
    """(N, F) float32, what the photo probe looks at, of pictures (256, 256, 3)."""
    starts = progress(range(0, len(images), 16), what)
    return np.concatenate([describe(np.stack(images[s : s + 16])).summary.numpy() for s in starts])


# ---- tests on what was held out ------------------------------------------------------------------


def test(
    weights: dict[str, Tensor], materials: Sequence[Material], seed: int
) -> dict[str, dict[str, Any]]:
    """Scores on held-out pictures, and what the default limits do to them.

    Letters are put on by the test itself, in fonts that no training saw.
    """
    held = [m for m in materials if m.held_out]
    if len({m.photo for m in held}) < 2:
        raise UserError("screens: no held-out photographs and drawings to test on")
    rng = np.random.default_rng([seed, 2])
    images = [view(m, rng, plain=True) for m in held]
    limits = Limits()
    photo, lettered = scored(images, weights, limits)
    real = np.array(["scenes" not in m.source for m in held])
    is_photo = np.array([m.photo for m in held])
    names = ("text", "mark", "photo_at_least", "photo_at_most")
    out: dict[str, dict[str, Any]] = {"limits": {name: getattr(limits, name) for name in names}}
    for name, part in (("real", real), ("scenes", ~real)):
        a, b = photo[part & is_photo], photo[part & ~is_photo]
        out[f"photo probe, {name}"] = {
            "photographs": len(a),
            "drawings": len(b),
            "auc": _round(auc(a, b)),
            "accuracy": _round(np.mean(np.r_[a > 0.5, b <= 0.5])),
            "drawings found at 2 % of photographs lost": _round(np.mean(b < np.quantile(a, 0.02))),
            "photographs refused": _round(np.mean(a < limits.photo_at_least)),
            "drawings let through": _round(np.mean(b >= limits.photo_at_least)),
            "drawings refused as cartoons": _round(np.mean(b > limits.photo_at_most)),
            "photographs let through as cartoons": _round(np.mean(a <= limits.photo_at_most)),
        }
    out["text, clean pictures refused"] = {
        name: _round(np.mean(lettered[part]))
        for name, part in (
            ("photographs", real & is_photo),
            ("drawings", real & ~is_photo),
            ("scenes", ~real),
        )
    }
    out["text, written pictures refused"] = {}
    for kind in KINDS:
        written = [overlay(image, kind, rng, HELD_OUT_FONTS)[0] for image in images]
        refused = scored(written, weights, limits)[1]
        out["text, written pictures refused"][kind] = _round(np.mean(refused))
    return out


def blurred(materials: Sequence[Material], limits: Limits) -> dict[str, Any]:
    """Share of pictures refused as blurred, as they are and under each of :data:`BLURS`."""
    from scipy import ndimage

    rows: dict[str, list[bool]] = {}
    for m in materials:
        image = np.array(m.image[..., :3])
        image[m.image[..., 3] < 128] = 244
        kind = f"{'scenes' if 'scenes' in m.source else 'photographs' if m.photo else 'drawings'}"
        for sigma in (0.0, *BLURS):
            spread = sigma * min(image.shape[:2]) / SIZE
            soft = ndimage.gaussian_filter(image, (spread, spread, 0)) if sigma else image
            reasons = judge(measure(soft), Scores(0.5, 0.0, 0.0), "", limits)
            rows.setdefault(f"{kind}, {sigma:g} px", []).append(
                any(reason.startswith("blurred") for reason, _, _ in reasons)
            )
    return {name: _round(np.mean(row)) for name, row in sorted(rows.items())}


def scored(
    images: Sequence[np.ndarray], weights: dict[str, Tensor], limits: Limits
) -> tuple[np.ndarray, np.ndarray]:
    """Photo scores of pictures (256, 256, 3) and whether text would have them refused, with probes
    that need not ship."""
    photo, lettered = [], []
    for start in range(0, len(images), 16):
        seen = describe(np.stack(images[start : start + 16]))
        photo.append(torch.sigmoid(seen.summary @ weights["photo.weight"] + weights["photo.bias"]))
        letters = text_map(seen.places, weights)
        lettered.append((text_share(letters) > limits.text) | (mark_of(letters) > limits.mark))
    return torch.cat(photo).numpy(), torch.cat(lettered).numpy()


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Chance that one of `high` is above one of `low`; ties count half."""
    ranks = rankdata(np.r_[high, low])[: len(high)].sum()
    return float((ranks - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


# ---- helpers -------------------------------------------------------------------------------------


def _places(
    batch: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator, most: int = 60
) -> Iterable[tuple[Tensor, Tensor]]:
    """Features (n, G) half and targets (n,) of some places of each picture."""
    places = describe(np.stack([image for image, _ in batch])).places
    for grid, (_, mask) in zip(places, batch, strict=True):
        cells = mask.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL).mean((1, 3)).ravel()
        flat = grid.flatten(0, 1)
        # What is half within a line of text is neither.
        for target, there in ((1.0, cells > 0.5), (0.0, cells < 0.05)):
            index = rng.permutation(np.flatnonzero(there))[:most]
            yield flat[index].half(), torch.full((len(index),), target)


def _counts(materials: Iterable[Material]) -> dict[str, int]:
    kinds = Counter(f"{m.source}: {'photographs' if m.photo else 'drawings'}" for m in materials)
    return dict(sorted(kinds.items()))


def _round(value: Any) -> float:
    return round(float(value), 4)
