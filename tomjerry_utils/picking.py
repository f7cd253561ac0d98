"""Which translations to show: a stated rule instead of an eye.

The poster shows "two visually optimal outcomes for each translation class". Here a rule picks
them, by what the translator's own models see in source and output. It asks no judge and no feature
that a reported metric uses, so picking cannot flatter a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tomjerry_utils import blip, scenes, structure
from tomjerry_utils.images import load_image, save_image
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import hash_obj

if TYPE_CHECKING:
    from tomjerry_utils.translator import Translator

KINDS = ("best", "random", "worst")
PICKS = 2  # of each kind and class; the poster shows two
SHORTLIST = 4  # scenes of a class that are translated several times, of different actions


def rule(candidates: int) -> str:
    """The rule in words, for captions and tables."""
    return (
        "Each translation gets the sum of two standard scores among its class's: the BLIP "
        "similarity of the output and the source's caption, its species mapped across, and the "
        "overlap of the animals' silhouettes that the structure net sees in the output with those "
        "that the translator asked for, natural bodies in the source's pose. "
        f"Of the {SHORTLIST} captioned actions of a class that score highest, the best scene each "
        f"is translated {candidates} times; "
        f"the {PICKS} whose best try scores highest are shown, beside {PICKS} scenes drawn at "
        f"random and the {PICKS} that score lowest, as they first came out. No judge and no "
        "feature of a reported metric has a say."
    )


def pick(
    folder: Path,
    known: Sequence[Mapping[str, Any]],
    sources: np.ndarray,
    profile: Profile,
    translator: Translator,
) -> list[dict[str, Any]]:
    """Pick the best, two random and the worst outcomes of each class by :func:`rule`.

    Args:
        folder: holds `ours/`; further tries go to `attempts/`.
        known: rows of seed, class, read (the class as read off the source), caption.
        sources: (N, S, S, 3) uint8, the cartoons.
    """
    made = np.stack([load_image(folder / "ours" / f"{row['seed']}.png") for row in known])
    captions = [row["caption"] for row in known]
    actions = [blip.caption_slots(text)["action"] for text in captions]
    asked = asked_views(translator, sources, [row["read"] for row in known])
    first = agreement(translator, asked, made, captions)
    out = []
    for number, cls in enumerate(scenes.CLASSES):
        members = np.array([i for i, row in enumerate(known) if row["class"] == cls], int)
        if len(members) == 0:
            continue
        centre, spread = first[members].mean(0), first[members].std(0)
        parts = {(int(i), 0): first[i] for i in members}
        order = sorted(members, key=lambda i: -_standard(first[i], centre, spread))
        shortlist = np.array(varied(order, actions, SHORTLIST))
        for attempt in range(1, profile.compare.candidates):
            again = translator.translate(
                sources[shortlist],
                [known[i]["read"] for i in shortlist],
                seed=noise_seed(profile, attempt, number),
            ).images
            found = agreement(translator, asked[shortlist], again, [captions[i] for i in shortlist])
            for i, image, each in zip(shortlist, again, found, strict=True):
                save_image(attempt_file(folder, known[i]["seed"], attempt), image)
                parts[int(i), attempt] = each
        scores = {which: _standard(each, centre, spread) for which, each in parts.items()}
        listed = {which: score for which, score in scores.items() if which[0] in shortlist}
        rng = np.random.default_rng([profile.seed, number])
        chosen = {
            "best": best_attempts(listed, PICKS),
            "random": [
                (int(i), 0) for i in rng.choice(members, min(PICKS, len(members)), replace=False)
            ],
            "worst": [(int(i), 0) for i in order[::-1][:PICKS]],
        }
        for kind in KINDS:
            for i, attempt in chosen[kind]:
                text, overlap = parts[i, attempt]
                out.append(
                    {
                        "class": cls,
                        "kind": kind,
                        "seed": known[i]["seed"],
                        "attempt": attempt,
                        "score": round(scores[i, attempt], 4),
                        "blip_similarity": round(float(text), 4),
                        "silhouette_overlap": round(float(overlap), 4),
                        "caption": captions[i],
                    }
                )
    return out


def varied(order: Sequence[int], actions: Sequence[str | None], count: int) -> list[int]:
    """The first scene of each action, in their order; the others only where that is too few."""
    first = {actions[i]: int(i) for i in reversed(order)}.values()
    return sorted(map(int, order), key=lambda i: i not in first)[:count]


def best_attempts(scores: Mapping[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """The best (scene, attempt) of each scene, the best scenes first, `count` of them."""
    best: dict[int, tuple[int, int]] = {}
    for which in sorted(scores):
        scene = which[0]
        if scene not in best or scores[which] > scores[best[scene]]:
            best[scene] = which
    return sorted(best.values(), key=lambda which: (-scores[which], which))[:count]


def asked_views(
    translator: Translator, sources: np.ndarray, classes: Sequence[str], *, batch_size: int = 64
) -> torch.Tensor:
    """What the denoiser is told of sources' shapes: (N, VIEW_CHANNELS, h, w), on the CPU.

    Args:
        sources: (N, S, S, 3) uint8; classes: as read off them.
    """
    parts = [
        translator.conditions(
            sources[start : start + batch_size], classes[start : start + batch_size]
        ).batch.view.cpu()
        for start in range(0, len(sources), batch_size)
    ]
    return torch.cat(parts)


def agreement(
    translator: Translator,
    asked: torch.Tensor,
    made: np.ndarray,
    captions: Sequence[str],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """How well outputs agree with what was asked for, by our own models alone.

    The silhouettes are compared with the posed bodies in the denoiser's view, not with the
    drawing's: a natural body in the same pose is another shape, and meant to be.

    Args:
        asked: (N, VIEW_CHANNELS, h, w) from :func:`asked_views`.
        made: (N, S, S, 3) uint8; captions: of the sources, in natural words.

    Returns:
        (N, 2): BLIP's cosine of output and caption, and the overlap of the animals' silhouettes.
    """
    grid = (asked.shape[-2], asked.shape[-1])
    out = []
    with torch.no_grad():
        for start in range(0, len(made), batch_size):
            part = slice(start, start + batch_size)
            images = translator.describer.image_embeds(made[part])
            texts = translator.describer.text_embeds(captions[part])
            seen, _ = structure.look(translator.net, torch.from_numpy(made[part]), grid)
            wanted, shown = (structure.drawn_maps(views) for views in (asked[part], seen))
            similar = (images * texts).sum(-1).float().cpu()
            out.append(torch.stack([similar, silhouette_overlap(wanted, shown)], 1).numpy())
    return np.concatenate(out)


def silhouette_overlap(drawn: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Soft intersection over union of where the cat and the mouse are, (B,) in [0, 1].

    Args:
        drawn, shown: (B, len(PARTS) + 1, H, W) in the form of `structure.probabilities`.
    """

    def animals(maps: torch.Tensor) -> torch.Tensor:
        anyone = maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum(1)
        mouse = maps[:, structure.MOUSE].clamp(max=anyone)
        return torch.stack([anyone - mouse, mouse], 1)

    a, b = animals(drawn), animals(shown)
    both, either = torch.minimum(a, b), torch.maximum(a, b)
    return both.sum((1, 2, 3)) / either.sum((1, 2, 3)).clamp(min=1e-6)


def _standard(parts: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> float:
    return float(((parts - centre) / np.maximum(spread, 1e-6)).sum())


def attempt_file(folder: Path, seed: int, attempt: int) -> Path:
    """Where a further try of a scene lies."""
    return folder / "attempts" / f"{seed}-{attempt}.png"


def noise_seed(profile: Profile, attempt: int, number: int) -> int:
    """The seed of a batch's noise; attempt 0 is the translation that is scored."""
    return int(hash_obj([profile.seed, attempt, number]), 16) % 10**9
