"""How good a captioner is, before and after: words, slots, retrieval, and trust in its similarity.

Everything here looks at held-out pictures with known captions, and gives 95 % bootstrap intervals
over them. Beside each number stands what it would be without seeing: the same captions given to
other pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tomjerry_utils import scenes, wording
from tomjerry_utils.blip_model import Blip
from tomjerry_utils.measures import bootstrap_ci, paired_bootstrap

SLOTS = ("subject", "action", "direction", "place")
RANKS = (1, 5, 10)
BINS = 8


def score(
    blip: Blip,
    images: np.ndarray,
    true: Sequence[str],
    domains: Sequence[str],
    *,
    batch_size: int = 64,
) -> dict[str, Any]:
    """What a model writes about held-out pictures, and what that is worth.

    Args:
        images: uint8 (N, H, W, 3); true: their captions; domains: "cartoon" or "natural" of each.

    Returns:
        written: N captions; cider_d and bleu4 against the true captions; exact: share of captions
        right in every word; slots, and by_domain: domain → slots; each {value, ci95, n}. loss:
        nats a word with "its picture" and with "another"; image_to_text and text_to_image: recall
        at ranks; similarity: calibration and AUC of the contrastive cosine.
    """
    written = blip.generate(images, batch_size=batch_size)
    return {
        "written": written,
        **score_words(written, true, domains),
        "loss": losses(blip, images, true, batch_size=batch_size),
        **retrieval(blip, images, true, batch_size=batch_size),
    }


def score_words(
    written: Sequence[str], true: Sequence[str], domains: Sequence[str]
) -> dict[str, Any]:
    """The part of `score` that needs the captions alone."""
    references = [[text] for text in true]
    each = wording.cider_d(written, references)
    exact = [a.split() == b.split() for a, b in zip(_plain(written), _plain(true), strict=True)]
    hits = slot_hits(written, true)
    places = {d: [i for i, at in enumerate(domains) if at == d] for d in dict.fromkeys(domains)}
    return {
        "cider_d": _mean(each),
        "bleu4": {
            "value": wording.bleu4(written, references),
            "ci95": wording.bleu4_interval(written, references),
            "n": len(true),
        },
        "exact": _mean(exact),
        "slots": {slot: _mean(values) for slot, values in hits.items()},
        "by_domain": {
            domain: {slot: _mean(values[rows]) for slot, values in hits.items()}
            for domain, rows in places.items()
        },
    }


def compare(
    before: dict[str, Any], after: dict[str, Any], true: Sequence[str], domains: Sequence[str]
) -> dict[str, Any]:
    """Before and after on the same pictures, with the two ends of the scale.

    Returns:
        before, after: as `score` gives them, without the captions; difference: after − before, by
        picture, in CIDEr-D and each slot, with intervals; truth: what the true captions score;
        shuffled: what the captions written after score when each goes to another picture, a
        control that has to fail.
    """
    references = [[text] for text in true]
    cider = [wording.cider_d(part["written"], references) for part in (after, before)]
    hits = [slot_hits(part["written"], true) for part in (after, before)]
    others = np.random.default_rng(0).permutation(len(true))
    shuffled = [after["written"][i] for i in others]
    return {
        "n": len(true),
        "before": _without_words(before),
        "after": _without_words(after),
        "difference": {
            "cider_d": paired_bootstrap(*cider),
            **{slot: _gain(hits[0][slot], hits[1][slot]) for slot in SLOTS},
        },
        "truth": {"cider_d": _mean(wording.cider_d(true, references))},
        "shuffled": score_words(shuffled, true, domains),
    }


def caption_slots(text: str) -> dict[str, str | None]:
    """What a caption says in each slot: subject, action, direction, place; None where nothing."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    subjects = [name for name in ("tom", "jerry", "cat", "mouse") if name in words]
    animals = "two_animals" if {"two", "animals"} <= words else "animal"
    verbs = {"sit": "sitting", "run": "running", "jump": "jumping", "lie": "lying"}
    verbs |= {"reach": "reaching", "stand": "standing"}
    slots: dict[str, str | None] = {
        "subject": "_".join(subjects) or (animals if words & {"animal", "animals"} else None),
        "action": next((a for a in scenes.ACTIONS if verbs[a] in words), None),
        "direction": next((f for f in scenes.FACINGS if f in words), None),
        "place": next((p for p in scenes.PLACES if set(p.split()) <= words), None),
    }
    return slots


def slot_hits(written: Sequence[str], true: Sequence[str]) -> dict[str, np.ndarray]:
    """Slot → (N,): 1 where it equals the true caption's, 0 where not, NaN where that has none."""
    pairs = [(caption_slots(a), caption_slots(b)) for a, b in zip(written, true, strict=True)]
    return {
        slot: np.array(
            [float(a[slot] == b[slot]) if b[slot] is not None else np.nan for a, b in pairs]
        )
        for slot in SLOTS
    }


@torch.no_grad()
def losses(
    blip: Blip, images: np.ndarray, true: Sequence[str], *, batch_size: int = 64
) -> dict[str, float]:
    """Caption loss in nats a word, with each caption's own picture and with another's.

    A captioner that learnt the language by heart and looks at nothing has the same loss twice.
    """
    other = np.roll(np.arange(len(true)), 1)
    found: dict[str, list[torch.Tensor]] = {"its picture": [], "another": []}
    for start in range(0, len(true), batch_size):
        part = slice(start, start + batch_size)
        for name, pictures in (("its picture", images[part]), ("another", images[other[part]])):
            found[name].append(blip.caption_loss(pictures, true[part], reduction="none"))
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


@torch.no_grad()
def retrieval(
    blip: Blip, images: np.ndarray, true: Sequence[str], *, batch_size: int = 64
) -> dict[str, Any]:
    """Does a picture find its caption, and a caption its picture, by the contrastive cosine?

    Pictures with equal captions are equally right. Chance is the share of right candidates.
    """
    choices = sorted(set(true))
    table = similarities(blip, images, choices, batch_size=batch_size)  # (N, choices)
    correct = np.array([[text == choice for choice in choices] for text in true])
    found = {
        "image_to_text": _recall(table, correct),
        "text_to_image": _recall(table.T, correct.T),
    }
    own = table[correct]
    other = np.roll(np.argmax(correct, 1), 1)
    strange = np.array([table[i, at] for i, at in enumerate(other) if not correct[i, at]])
    if not len(strange):
        return found  # one caption for all: there is nothing to tell apart
    top = table.max(1)
    right = wording.recall_at(table, correct, (1,))[1]
    bins = wording.calibration(top, right, bins=BINS)
    found["similarity"] = {
        "auc": wording.auc(own, strange),
        "own": {"mean": float(own.mean()), "std": float(own.std())},
        "another": {"mean": float(strange.mean()), "std": float(strange.std())},
        "bins": {name: values.tolist() for name, values in vars(bins).items()},
    }
    return found


@torch.no_grad()
def similarities(
    blip: Blip, images: np.ndarray, texts: Sequence[str], *, batch_size: int = 64
) -> np.ndarray:
    """Contrastive cosines (N, M) of N pictures, uint8 (N, H, W, 3), and M captions."""
    words = blip.text_embeds(texts)
    parts = range(0, len(images), batch_size)
    seen = [blip.image_embeds(images[i : i + batch_size]) for i in parts]
    return (torch.cat(seen) @ words.T).float().cpu().numpy()


def _recall(table: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    hits = wording.recall_at(table, correct, RANKS)
    return {
        **{f"at_{k}": _mean(values) for k, values in hits.items()},
        "chance_at_1": float(correct.mean()),
        "candidates": table.shape[1],
    }


def _mean(values: Any) -> dict[str, Any]:
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return {"value": None, "ci95": [None, None], "n": 0}
    return {"value": float(known.mean()), "ci95": bootstrap_ci(known), "n": len(known)}


def _gain(after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """After − before; like `_mean` without a value where no true caption has the slot."""
    if np.isnan(after - before).all():
        return {"difference": None, "ci95": [None, None], "n": 0}
    return paired_bootstrap(after, before)


def _without_words(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "written"}


def _plain(texts: Sequence[str]) -> list[str]:
    # BERT's tokenizer puts a space before a comma when it writes.
    return [text.replace(" ,", ",") for text in texts]
