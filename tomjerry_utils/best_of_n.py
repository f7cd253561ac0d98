"""Best of n: what it is worth to translate a scene several times and let the rule pick.

The rule of `picking` asks our own models alone. Whether what it likes is any better, judges and
hidden twins say: here scenes of the validation range are translated several times, and for each n
the try of n that the rule scores highest is set against one try. Nothing is tuned on the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata

from tomjerry_utils import compare, features, picking, scenes, scoring, structure, transfer
from tomjerry_utils.autoencoder import factor_of
from tomjerry_utils.images import resize
from tomjerry_utils.judges import load_judges
from tomjerry_utils.measures import bootstrap_ci
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import Stage, open_stage, read_json, write_json
from tomjerry_utils.translator import Translator
from tomjerry_utils.twins import REFERENCES, SIZE, twins_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGE = "06_best_of_n"
FIRST = 4_500_000  # of the validation range; settings are tuned far from here
TRIES = 8
LEAST = 0.005  # that a gain's axis reaches, up and down
QUALITIES = {
    # judged by → heading, whether higher is better
    "perceptual": ("perceptual distance", False),
    "action_accuracy": ("action accuracy", True),
    "mask_iou": ("mask IoU", True),
}
SCORES = {
    "rule": "the rule",
    "blip": "BLIP similarity alone",
    "asked": "overlap with the bodies asked for",
    "source": "overlap with the drawing, which the rule does not ask",
}


def ensure(profile: Profile) -> dict[str, Any]:
    """The curve at this profile: measure it, or read what was measured.

    Returns:
        n, tries, features; curves: quality → `rule` and `twin`, what the rule gains and what one
        who saw the twin would, rows of :func:`curve`; ranks: score → quality → value and ci95 of
        :func:`rank_correlation`, signed so that positive is right.
    """
    before = transfer.ensure(profile)
    options = {
        "scenes": profile.compare.sweep_scenes,
        "tries": TRIES,
        "bootstrap": profile.compare.bootstrap,
    }
    stage = open_stage(profile, STAGE, options, {"transfer": before.key})
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, before.translator)
    return read_json(stage.folder / "best_of_n.json")


# ---- arithmetic --------------------------------------------------------------------------------


def expected_best(scores: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """The mean quality of the highest-scored of n tries, over all ways to draw n of them.

    Args:
        scores, quality: (N, M) of M tries of each scene.

    Returns:
        (N, M): for n = 1 … M; n = 1 is the mean of all tries.
    """
    tries = scores.shape[1]
    ranked = np.take_along_axis(quality, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    # The r-th best is picked if it is drawn and all others drawn are among those below it.
    chance = np.array(
        [
            [comb(tries - 1 - r, n - 1) / comb(tries, n) for r in range(tries)]
            for n in _counts(tries)
        ]
    )
    return ranked @ chance.T


def curve(scores: np.ndarray, quality: np.ndarray, *, samples: int) -> list[dict[str, Any]]:
    """The best of n by score against one try, for n = 1 … M.

    Returns:
        rows of n; value and ci95, the mean quality; gain and gain_ci95, its difference from one
        try of the same scenes; intervals over scenes.
    """
    best = expected_best(scores, quality)
    gains = best - best[:, :1]
    return [
        {
            "n": n,
            "value": float(best[:, i].mean()),
            "ci95": bootstrap_ci(best[:, i], samples=samples),
            "gain": float(gains[:, i].mean()),
            "gain_ci95": bootstrap_ci(gains[:, i], samples=samples),
        }
        for i, n in enumerate(_counts(scores.shape[1]))
    ]


def rank_correlation(
    scores: np.ndarray, quality: np.ndarray, *, samples: int
) -> dict[str, Any] | None:
    """Spearman's correlation of score and quality among the tries of a scene, averaged over scenes.

    Scenes all of whose tries are equally good, or score alike, say nothing and are left out; None
    where no other is left.
    """
    ranks = [rankdata(values, axis=1) for values in (scores, quality)]
    centred = [rank - rank.mean(1, keepdims=True) for rank in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    told = spread > 0
    if not told.any():
        return None
    found = (centred[0] * centred[1]).sum(1)[told] / spread[told]
    interval = bootstrap_ci(found, samples=samples)
    return {"value": float(found.mean()), "ci95": interval, "n": int(told.sum())}


def _counts(tries: int) -> range:
    return range(1, tries + 1)


# ---- measuring ---------------------------------------------------------------------------------


def _make(stage: Stage, profile: Profile, translator: Translator) -> None:
    judges = load_judges()
    samples, size = profile.compare.bootstrap, profile.compare.batch_size
    seeds = compare.balanced_seeds(profile.compare.sweep_scenes, FIRST)
    sources = scenes.render_many(seeds, "cartoon", profile.image_size)["image"]
    tries = [
        translator.translate(
            sources, None, seed=picking.noise_seed(profile, attempt, 0), batch_size=size
        )
        for attempt in progress(range(TRIES), "06 tries")
    ]
    kinds = np.array([scenes.describe(seed).cls for seed in seeds])
    scores = scored(translator, sources, [made.images for made in tries], tries[0], kinds)
    found = scoring.measure(
        {
            str(i): np.stack([resize(image, SIZE) for image in made.images])
            for i, made in enumerate(tries)
        },
        twins_of(tuple(seeds)),
        judges,
        references=REFERENCES,
        bootstrap=2,
        show=True,
    )
    quality = {
        name: np.stack([found[str(i)]["each"][name] for i in range(TRIES)], 1) for name in QUALITIES
    }
    signs = {name: 1 if higher else -1 for name, (_, higher) in QUALITIES.items()}
    table = {
        "n": len(seeds),
        "tries": TRIES,
        "features": features.NAME,
        "curves": {
            name: {
                "rule": curve(scores["rule"], values, samples=samples),
                "twin": curve(-quality["perceptual"], values, samples=samples),
            }
            for name, values in quality.items()
        },
        "ranks": {
            name: {
                by: rank_correlation(values, signs[by] * judged, samples=samples)
                for by, judged in quality.items()
            }
            for name, values in scores.items()
        },
    }
    write_json(stage.folder / "best_of_n.json", table)
    stage.finish(ranks=table["ranks"])


def scored(
    translator: Translator,
    sources: np.ndarray,
    tries: list[np.ndarray],
    read: Any,
    kinds: np.ndarray,
) -> dict[str, np.ndarray]:
    """Each of :data:`SCORES` for every try, (N, M).

    Args:
        sources: (N, S, S, 3) uint8; tries: M of the same shape.
        read: their `classes` and `captions`, as read off the sources.
        kinds: (N,) the scenes' classes, within which the rule's parts are standardised.
    """
    asked = picking.asked_views(translator, sources, read.classes)
    grid = (sources.shape[1] // factor_of(translator.vae),) * 2
    drawn = structure.look(translator.net, torch.from_numpy(sources), grid)[1]
    parts = np.stack(
        [picking.agreement(translator, asked, images, read.captions) for images in tries], 1
    )
    own = [
        picking.silhouette_overlap(
            drawn, structure.look(translator.net, torch.from_numpy(images), grid)[1]
        ).numpy()
        for images in tries
    ]
    rule = np.zeros(parts.shape[:2])
    for kind in np.unique(kinds):
        some = parts[kinds == kind]
        spread = np.maximum(some.std((0, 1)), 1e-6)
        rule[kinds == kind] = ((some - some.mean((0, 1))) / spread).sum(-1)
    return {
        "rule": rule,
        "blip": parts[..., 0],
        "asked": parts[..., 1],
        "source": np.stack(own, 1),
    }


# ---- the figure --------------------------------------------------------------------------------


def gain_figure(table: Mapping[str, Any]) -> Figure:
    """What the best of n gains over one try, by the rule and by one who sees the twin.

    Args:
        table: from :func:`ensure`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from tomjerry_utils.canvas import BLUE, MUTED, style

    with mpl.rc_context(style()):
        fig = Figure(figsize=(9.6, 3.5), layout="constrained")
        axes = fig.subplots(1, len(QUALITIES))
        for panel, (name, (title, higher)) in zip(axes, QUALITIES.items(), strict=True):
            curves = table["curves"][name]
            panel.axhline(0, color=MUTED, linewidth=1)
            for by, color, label, line in (
                ("twin", MUTED, "picked by the hidden twin", "--"),
                ("rule", BLUE, "picked by the rule", "-"),
            ):
                rows = curves[by]
                counts = [row["n"] for row in rows]
                low, high = np.array([row["gain_ci95"] for row in rows]).T
                panel.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
                gains = [row["gain"] for row in rows]
                panel.plot(counts, gains, line, color=color, marker="o", markersize=4, label=label)
            panel.set_title(f"{title}\none try: {curves['rule'][0]['value']:.3f}", fontsize=11)
            panel.set_xlabel("best of n tries")
            panel.set_xticks(counts)
            panel.set_ylabel(f"gain, {'higher' if higher else 'lower'} is better")
            # Where nothing is gained, the axis shows how little that is, not the last digit.
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, -LEAST), max(high, LEAST))
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return fig
