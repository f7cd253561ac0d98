"""Labels by a probe: what a labelled part of a collection teaches about the rest.

Multinomial logistic regression on EfficientNet-Lite0's features (:mod:`features`). Its penalty is
chosen, its confidence calibrated and its accuracy measured by cross-validation over groups: all
pictures of a shot, a character or a vendor lie in one fold. Split picture by picture, such a probe
recognises the group and looks far better than it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from tomjerry_utils import UserError
from tomjerry_utils.runs import log

FOLDS = 5
PENALTIES = tuple(float(x) for x in np.logspace(-5, 1, 13))  # L2, per picture
PER_CLASS = 8  # pictures that a class needs, of two groups at least
REFUSED = ""  # the answer where confidence is too low


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what cross-validation says of it.

    Attributes:
        classes: names, sorted.
        weight: (D, K), on standardised features; `bias` (K,).
        mean, scale: (D,), which standardise features.
        penalty: L2, chosen by the held-out likelihood.
        temperature: divides the logits, fitted on held-out folds (Guo et al. 2017, 1706.04599).
        accuracy: share of held-out pictures whose class is right.
        balanced_accuracy: mean over classes of the same.
        calibration_error: mean gap of held-out confidence and accuracy, over ten bins of equal
            count.
        held_confidence, held_right: (N,), each picture's own, from the fold that did not see it.
    """

    classes: tuple[str, ...]
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    scale: np.ndarray = field(repr=False)
    penalty: float
    temperature: float
    accuracy: float
    balanced_accuracy: float
    calibration_error: float
    held_confidence: np.ndarray = field(repr=False)
    held_right: np.ndarray = field(repr=False)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Features (N, D) → calibrated probabilities (N, K), in the order of `classes`."""
        logits = (features - self.mean) / self.scale @ self.weight + self.bias
        return np.asarray(softmax(logits / self.temperature, axis=1))

    def predict(
        self, features: np.ndarray, *, at_least: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) → class names (N,) and confidences (N,).

        Args:
            at_least: below this confidence the answer is `REFUSED`; `threshold` gives one.
        """
        chance = self.probabilities(features)
        confidence = chance.max(1) if len(chance) else np.zeros(0)
        names = np.array(self.classes)[chance.argmax(1)] if len(chance) else np.zeros(0, str)
        return np.where(confidence >= at_least, names, REFUSED), confidence

    def threshold(self, precision: float = 0.95) -> float:
        """Lowest confidence above which held-out answers are this precise; 1.01 if none is."""
        order = np.argsort(-self.held_confidence, kind="stable")
        confidence, right = self.held_confidence[order], self.held_right[order]
        share = np.cumsum(right) / np.arange(1, len(right) + 1)
        # Equal confidences stand or fall together.
        ends = np.append(confidence[1:] < confidence[:-1], True)
        good = np.flatnonzero(ends & (share >= precision))
        return float(confidence[good[-1]]) if len(good) else 1.01

    def coverage(self, precision: float = 0.95) -> float:
        """Share of held-out pictures that are answered at `threshold(precision)`."""
        return float((self.held_confidence >= self.threshold(precision)).mean())


def fit(
    features: np.ndarray,
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Probe:
    """Fit a probe; the same input gives the same probe.

    Each fold is scored under the penalty and the temperature that the other folds chose, so that
    its figures are not the best of all.

    Args:
        features: (N, D) float, of the labelled pictures.
        labels: N class names.
        groups: N names; pictures of one group are never on both sides of a split.

    Raises:
        UserError: one class alone, or a class of fewer than eight pictures or two groups: nothing
            could be said of how far to trust it.
    """
    x, names, group = np.asarray(features, np.float64), np.asarray(labels), np.asarray(groups)
    if x.ndim != 2 or not len(x) == len(names) == len(group):
        raise ValueError(f"features {x.shape}, {len(names)} labels, {len(group)} groups")
    if not np.isfinite(x).all():
        raise ValueError("features are not finite")
    classes = _check(names, group)
    y = np.searchsorted(classes, names)
    fold = folds(y, group)
    held = np.zeros((len(penalties), len(x), len(classes)))
    for k in range(fold.max() + 1):
        out = fold == k
        mean, scale = _standard(x[~out])
        start = None
        for i in reversed(range(len(penalties))):  # strongest first: each starts where it ended
            w, b = start = _solve((x[~out] - mean) / scale, y[~out], len(classes),
                                  penalties[i], start)  # fmt: skip
            held[i, out] = (x[out] - mean) / scale @ w + b
    loss = np.stack([_losses(h, y) for h in held])
    chance = np.zeros((len(x), len(classes)))
    for k in range(fold.max() + 1):
        out = fold == k
        best = int(loss[:, ~out].mean(1).argmin())
        chance[out] = softmax(held[best, out] / _temperature(held[best, ~out], y[~out]), axis=1)
    best = int(loss.mean(1).argmin())
    mean, scale = _standard(x)
    weight, bias = _solve((x - mean) / scale, y, len(classes), penalties[best], None)
    right = chance.argmax(1) == y
    confidence = chance.max(1)
    probe = Probe(
        classes=tuple(classes.tolist()),
        weight=weight,
        bias=bias,
        mean=mean,
        scale=scale,
        penalty=penalties[best],
        temperature=_temperature(held[best], y),
        accuracy=float(right.mean()),
        balanced_accuracy=float(np.mean([right[y == c].mean() for c in range(len(classes))])),
        calibration_error=calibration_error(confidence, right),
        held_confidence=confidence,
        held_right=right,
    )
    log(
        f"class probe: {len(x)} pictures, {len(set(group.tolist()))} groups, "
        f"{', '.join(probe.classes)}: held out {probe.accuracy:.1%} right, calibration error "
        f"{probe.calibration_error:.3f}, at 95 % precision it answers {probe.coverage():.0%}"
    )
    return probe


def folds(classes: np.ndarray, groups: np.ndarray, count: int = FOLDS) -> np.ndarray:
    """Fold of each picture, (N,): whole groups, largest first, each where its classes are fewest.

    Args:
        classes: (N,) int.
        groups: (N,) names.
    """
    names, index = np.unique(groups, return_inverse=True)
    table = np.zeros((len(names), classes.max() + 1), int)
    np.add.at(table, (index, classes), 1)
    count = min(count, len(names))
    filled = np.zeros((count, table.shape[1]), int)
    placed = np.zeros(len(names), int)
    total = table.sum(0)
    for g in sorted(range(len(names)), key=lambda g: (-table[g].sum(), names[g])):
        # Rare classes weigh more; then the emptier fold.
        crowd = (filled * table[g] / total**2).sum(1)
        placed[g] = min(range(count), key=lambda k: (crowd[k], filled[k].sum(), k))
        filled[placed[g]] += table[g]
    return placed[index]


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over bins of equal count, weighted by count."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    gaps = [len(p) * abs(confidence[p].mean() - right[p].mean()) for p in parts if len(p)]
    return float(sum(gaps) / len(confidence))


# ---- helpers -------------------------------------------------------------------------------------


def _check(names: np.ndarray, groups: np.ndarray) -> np.ndarray:
    counts = Counter(names.tolist())
    if len(counts) < 2:
        raise UserError(
            f"class probe: labels of one class only ({', '.join(counts) or 'none'}): "
            "label pictures of the others too"
        )
    for name, count in sorted(counts.items()):
        several = len(set(groups[names == name].tolist()))
        if count < PER_CLASS or several < 2:
            raise UserError(
                f"class probe: {count} pictures of {name!r} in {several} group(s): label at least "
                f"{PER_CLASS} in two groups, or leave the class out"
            )
    return np.array(sorted(counts))


def _standard(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each feature, and its deviation, floored so that a dead one is not blown up."""
    deviation = x.std(0)
    typical = np.sqrt(np.mean(deviation**2)) or 1.0
    # Divided by √D: a penalty then means the same for any number of features.
    return x.mean(0), np.maximum(deviation, 0.1 * typical) * np.sqrt(x.shape[1])


def _solve(
    x: np.ndarray,
    y: np.ndarray,
    count: int,
    penalty: float,
    start: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The weights (D, K) and bias (K,) of least mean loss + penalty/(2N)·|W|², by L-BFGS."""
    n, d = x.shape
    wanted = np.eye(count)[y]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: d * count].reshape(d, count), flat[d * count :]
        logs = log_softmax(x @ w + b, axis=1)
        gap = (np.exp(logs) - wanted) / n
        loss = -(logs * wanted).sum() / n + penalty / (2 * n) * (w**2).sum()
        slope = np.concatenate([(x.T @ gap + penalty / n * w).ravel(), gap.sum(0)])
        return float(loss), slope

    begin = np.zeros((d + 1) * count) if start is None else np.r_[start[0].ravel(), start[1]]
    found = minimize(objective, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return found[: d * count].reshape(d, count), found[d * count :]


def _losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each picture, at the temperature that suits all."""
    return -log_softmax(logits / _temperature(logits, y), axis=1)[np.arange(len(y)), y]


def _temperature(logits: np.ndarray, y: np.ndarray) -> float:
    rows = np.arange(len(y))

    def loss(power: float) -> float:
        return float(-log_softmax(logits / np.exp(power), axis=1)[rows, y].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
