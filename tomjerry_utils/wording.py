"""Measures on captions and similarities alone: BLEU-4, CIDEr-D, recall, calibration. No model here.

Both caption scores count runs of one to four words ("n-grams") that a written caption shares with
the reference captions of its image. The similarities are scored as what they are used for: to rank
images by a caption, and to tell whether a picture still shows what its source showed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tomjerry_utils import UserError
from tomjerry_utils.measures import BOOTSTRAP

ORDERS = 4  # n-grams of one to four words
SIGMA = 6.0  # words; how far CIDEr-D lets the lengths of two captions differ

Ngram = tuple[str, ...]
# A word with its hyphens, or what hangs on one by an apostrophe: "tom's" is "tom" and "'s".
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|(?<=[^\W_])'[^\W_]+")


def tokenize(text: str) -> list[str]:
    """The words of a caption in lower case; punctuation is dropped, as caption scoring does."""
    return _WORD.findall(text.lower().replace("’", "'"))


# ---- BLEU --------------------------------------------------------------------------------------


@dataclass(eq=False)
class BleuCounts:
    """What BLEU needs to know of each caption; sums over captions give the score of a corpus.

    Attributes:
        matches: (N, 4), n-grams of the candidate that a reference holds, each at most as often as
            the reference that holds it most often does.
        totals: (N, 4), n-grams of the candidate.
        lengths: (N,), words of the candidate.
        reference_lengths: (N,), words of the reference closest in length; of two, the shorter.
    """

    matches: np.ndarray
    totals: np.ndarray
    lengths: np.ndarray
    reference_lengths: np.ndarray


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] with its brevity penalty (Papineni et al. 2002), not smoothed.

    Args:
        candidates: N captions; references: for each of them the true captions of its image.

    Raises:
        UserError: nothing to score, lists of different lengths, an image without a reference.
    """
    counts = bleu_counts(candidates, references)
    return float(_bleu(counts, np.ones((1, len(counts.lengths))))[0])


def bleu4_interval(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    samples: int = BOOTSTRAP,
    seed: int = 0,
) -> list[float]:
    """The 95 % percentile interval of :func:`bleu4`: captions drawn anew, the corpus scored again.

    BLEU is no mean over captions, so the counts are drawn and not the scores.
    """
    counts = bleu_counts(candidates, references)
    count = len(counts.lengths)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=samples)
    return np.percentile(_bleu(counts, weights), [2.5, 97.5]).tolist()


def bleu_counts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> BleuCounts:
    """Matches, totals and lengths of each caption, as :func:`bleu4` sums them."""
    _check(candidates, references)
    shape = (len(candidates), ORDERS)
    matches, totals = np.zeros(shape, int), np.zeros(shape, int)
    lengths, closest = np.zeros(len(candidates), int), np.zeros(len(candidates), int)
    for row, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        words, others = tokenize(candidate), [tokenize(text) for text in texts]
        most: Counter[Ngram] = Counter()
        for other in others:
            most |= _ngrams(other)
        for ngram, count in _ngrams(words).items():
            totals[row, len(ngram) - 1] += count
            matches[row, len(ngram) - 1] += min(count, most[ngram])
        lengths[row] = len(words)
        closest[row] = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    return BleuCounts(matches, totals, lengths, closest)


def _bleu(counts: BleuCounts, weights: np.ndarray) -> np.ndarray:
    """BLEU-4 (S,) of S corpora that hold caption i as often as weights (S, N) says."""
    matches, totals = weights @ counts.matches, weights @ counts.totals
    lengths, closest = weights @ counts.lengths, weights @ counts.reference_lengths
    with np.errstate(divide="ignore"):
        # Without one match of four words the logarithm is −∞ and the score 0, as defined.
        precision = np.log(matches / np.maximum(totals, 1)).mean(1)
    brevity = np.minimum(1 - closest / np.maximum(lengths, 1), 0)
    return np.exp(precision + brevity)


# ---- CIDEr-D -----------------------------------------------------------------------------------


@dataclass(eq=False)
class DocumentFrequencies:
    """In the references of how many images each n-gram stands, and of how many there are."""

    images: int
    counts: Mapping[Ngram, int]


def count_documents(references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """Count n-grams over the true captions of a set of images, each image once."""
    counts: Counter[Ngram] = Counter()
    for texts in references:
        counts.update({ngram for text in texts for ngram in _ngrams(tokenize(text))})
    return DocumentFrequencies(len(references), counts)


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    document_frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
    """CIDEr-D of each caption (N,), in [0, 10]; the mean is the corpus score.

    The similarity of two captions is the cosine of their n-gram counts, each weighted by how rare
    the n-gram is among images and clipped to the reference's, times a penalty on a difference in
    length (Vedantam et al. 2015, section 8). An n-gram that stands in every image weighs nothing,
    so one image alone scores 0, and a caption can reach 10 only with runs of one, two, three and
    four words that not every image has. Intervals, also of a difference on the same images, are
    those of any mean (`measures.bootstrap_ci`, `paired_bootstrap`): how rare a word is stays what
    it is among all of them.

    Args:
        candidates: N captions; references: for each of them the true captions of its image.
        document_frequencies: those of a larger corpus, so that the scores of small sets compare;
            by default counted from `references`.

    Raises:
        UserError: nothing to score, lists of different lengths, an image without a reference.
    """
    _check(candidates, references)
    known = document_frequencies or count_documents(references)
    scores = np.zeros(len(candidates))
    for row, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        words, others = tokenize(candidate), [tokenize(text) for text in texts]
        written = _rarities(words, known)
        scores[row] = 10 * np.mean(
            [_alike(written, _rarities(other, known), _longer(words, other)) for other in others]
        )
    return scores


def _rarities(words: Sequence[str], known: DocumentFrequencies) -> list[dict[Ngram, float]]:
    """For each order, n-gram → count · log(images / images that hold it), of one caption."""
    weights: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
    for ngram, count in _ngrams(words).items():
        rarity = math.log(known.images) - math.log(max(1, known.counts.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * rarity
    return weights


def _longer(written: Sequence[str], true: Sequence[str]) -> int:
    """By how much a caption is longer, in neighbouring pairs of words, as the authors' code is."""
    return max(len(written) - 1, 0) - max(len(true) - 1, 0)


def _alike(written: list[dict[Ngram, float]], true: list[dict[Ngram, float]], longer: int) -> float:
    """Clipped cosine of two captions, mean over the orders, times the penalty on length."""
    cosines = np.zeros(ORDERS)
    for order, (a, b) in enumerate(zip(written, true, strict=True)):
        shared = sum(min(weight, b[ngram]) * b[ngram] for ngram, weight in a.items() if ngram in b)
        norm = np.linalg.norm(list(a.values())) * np.linalg.norm(list(b.values()))
        cosines[order] = shared / norm if norm > 0 else 0.0
    return float(cosines.mean() * np.exp(-(longer**2) / (2 * SIGMA**2)))


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each run of one to four words stands in a caption."""
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not len(candidates) or len(candidates) != len(references):
        raise UserError(
            f"captions: {len(candidates)} to score and references of {len(references)} images: "
            "give one caption for each image, and at least one"
        )
    # A string is a list of its letters: each would pass for a caption.
    wrong = next(
        (i for i, texts in enumerate(references) if isinstance(texts, str) or not len(texts)), None
    )
    if wrong is not None:
        raise UserError(
            f"captions: references[{wrong}] is {references[wrong]!r}: give a list of true captions"
        )


# ---- similarities ------------------------------------------------------------------------------


@dataclass(eq=False)
class Calibration:
    """How often pairs of each level of similarity are hits; one value a bin, lowest first.

    Attributes:
        similarity: (bins,), mean similarity; hit_share: (bins,), in [0, 1]; count: (bins,), pairs.
    """

    similarity: np.ndarray
    hit_share: np.ndarray
    count: np.ndarray


def recall_at(
    table: ArrayLike, correct: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, np.ndarray]:
    """Whether a right column is among the k most similar, row by row.

    A wrong column as similar as the best right one ranks before it, so that a table which tells
    nothing apart finds nothing. For the other direction give both transposed.

    Args:
        table: (N, M) similarities of queries with what they search.
        correct: bool (N, M), what a query should find: several where captions are equal.
        ks: how many of the best to look at.

    Returns:
        k → (N,) of 0 and 1; the mean is the recall at k.

    Raises:
        UserError: shapes that differ, a similarity that is no number, a row with nothing to find.
    """
    table, correct = np.asarray(table, float), np.asarray(correct, bool)
    if table.ndim != 2 or table.shape != correct.shape:
        raise UserError(
            f"recall: similarities {table.shape} and right answers {correct.shape}: "
            "give two tables (queries, answers) of one shape"
        )
    if np.isnan(table).any():
        raise UserError(
            f"recall: {int(np.isnan(table).sum())} similarities are NaN: mend the model"
        )
    if len(empty := np.flatnonzero(~correct.any(1))):
        raise UserError(f"recall: no right answer for row {empty[0]}: leave such queries out")
    if min(ks) < 1:
        raise UserError(f"recall: k is {min(ks)}: look at one answer at least")
    best = np.where(correct, table, -np.inf).max(1, keepdims=True)
    before = (~correct & (table >= best)).sum(1)
    return {k: (before < k).astype(float) for k in ks}


def calibration(similarities: ArrayLike, hits: ArrayLike, *, bins: int = 10) -> Calibration:
    """How well a similarity predicts a hit: its share in bins of about equally many pairs.

    Pairs of one similarity share their hits evenly, so that their order decides nothing where a
    bin ends among them.

    Args:
        similarities: (N,); hits: (N,) of 0 and 1; bins: at most one for each pair.

    Raises:
        UserError: no pairs, shapes that differ, a value that is no number, no bins.
    """
    values, found = np.asarray(similarities, float), np.asarray(hits, float)
    if values.ndim != 1 or not len(values) or values.shape != found.shape:
        raise UserError(
            f"calibration: similarities {values.shape} and hits {found.shape}: "
            "give as many of both, in one row, and at least one"
        )
    if np.isnan(values).any() or not np.isin(found, (0, 1)).all() or bins < 1:
        raise UserError("calibration: a similarity is NaN, a hit is not 0 or 1, or bins is below 1")
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    shared = (np.bincount(place, found) / ties)[place]
    parts = np.array_split(np.argsort(values), min(bins, len(values)))
    return Calibration(
        np.array([values[part].mean() for part in parts]),
        np.array([shared[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve: how often a true pair is more similar than a wrong one.

    Args:
        positive: (N,) similarities of true pairs; negative: (M,) of wrong ones. Ties count half.

    Returns:
        1 where they are apart, 0.5 where the similarity says nothing.

    Raises:
        UserError: one of them is empty, or a similarity is no number.
    """
    true, wrong = np.ravel(positive).astype(float), np.sort(np.ravel(negative).astype(float))
    if not len(true) or not len(wrong) or np.isnan(true).any() or np.isnan(wrong).any():
        raise UserError(
            f"auc: {len(true)} true and {len(wrong)} wrong similarities, NaN among them or none "
            "of a kind: give numbers of both kinds"
        )
    below = np.searchsorted(wrong, true, "left") + np.searchsorted(wrong, true, "right")
    return float(below.mean() / (2 * len(wrong)))
