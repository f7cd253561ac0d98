"""Caption scores and similarities: the libraries' values, hand-computed ones, worse where worse."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tomjerry_utils import UserError, scenes, wording
from tomjerry_utils.measures import paired_bootstrap

SETS: list[tuple[str, list[str]]] = [
    (
        "a cat is running to the left in the kitchen",
        ["a cat is running to the left in the kitchen"],
    ),
    (
        "a mouse is sitting in the garden",
        ["a mouse sits in the garden", "a small mouse is sitting in the green garden"],
    ),
    ("", ["an animal is lying on the rug"]),
    ("cat", ["a cat is jumping over the sofa", "the cat jumps"]),
    ("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    ("A cat, and a mouse!", ["a cat and a mouse."]),
    (
        "a cat and a mouse are standing in the street facing right today in the sun",
        ["a cat and a mouse are standing in the street"],
    ),
    ("a dog", ["a mouse is reaching up in the bedroom", "one mouse reaches up"]),
    (
        "Tom's tail is on the black-and-white floor",
        ["tom's tail lies on the black-and-white floor", "the tail of tom is on the floor"],
    ),
    ("mouse garden the in sitting is a", ["a mouse is sitting in the garden"]),
    (
        "a cat is running to the right in the kitchen",
        ["a cat is running to the left in the kitchen"],
    ),
    ("a cat sits", ["a cat sits", "a cat sits", "the cat sleeps"]),
    (
        "two animals are running and running and running",
        ["two animals are running", "a cat and a mouse are running and jumping"],
    ),
    (
        "jerry is reaching for cheese in the kitchen",
        [
            "jerry is reaching for the cheese in the kitchen",
            "a mouse reaches for some cheese",
            "in the kitchen jerry is reaching for cheese",
        ],
    ),
    ("in the living room a cat is lying", ["a cat is lying in the living room"]),
    ("!!!", ["a cat is lying in the living room", "cat"]),
    ("a cat is", ["a cat is lying in the living room in front of the fire with a mouse"]),
    ("mouse", ["mouse"]),
    (
        "a cat is sitting facing left in the garden",
        ["a cat is sitting facing left in the garden", "the cat sits"],
    ),
    ("don't move, 3 mice", ["three mice don't move", "don't move 3 mice"]),
]
CANDIDATES = [candidate for candidate, _ in SETS]
REFERENCES = [references for _, references in SETS]
# pycocoevalcap 1.2, CiderScorer(n=4, sigma=6), on the same words in lower case.
CIDER_D = [
    10.0,
    3.212256241,
    0.0,
    0.277715466,
    0.051817999,
    10.0,
    4.144375078,
    0.002540314,
    4.188115753,
    2.5,
    5.432210474,
    5.03609046,
    3.269160698,
    4.966341367,
    6.09498031,
    0.0,
    0.080941817,
    2.5,
    5.026240172,
    7.041666667,
]
# sacrebleu 2.6.0, BLEU(tokenize="none", smooth_method="none"); pycocoevalcap 1.2 gives
# 0.5860821567561453, since it adds 1e-9 to every denominator.
BLEU4 = 0.5860821567676866
MATCHES, TOTALS, LENGTHS = [103, 74, 56, 36], [118, 100, 84, 69], (118, 137)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [
        scenes.caption(scenes.describe(seed), "natural") for seed in range(7_100_000, 7_100_060)
    ]


def single(texts: list[str]) -> list[list[str]]:
    return [[text] for text in texts]


def corrupted(texts: list[str], count: int) -> list[str]:
    """The same captions with `count` of their words replaced, always the same places first."""
    out = []
    for index, text in enumerate(texts):
        words = wording.tokenize(text)
        for place in np.random.default_rng(index).permutation(len(words))[:count]:
            words[place] = f"word{place}"
        out.append(" ".join(words))
    return out


# ---- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat, running: LEFT!", ["a", "cat", "running", "left"]),
        (
            "Tom’s tail isn't black-and-white.",
            ["tom", "'s", "tail", "isn", "'t", "black-and-white"],
        ),
        ("'two' -- \"mice\" (3)_", ["two", "mice", "3"]),
        ("  ...  ", []),
        ("Käse für Jerry", ["käse", "für", "jerry"]),
    ],
)
def test_tokenize(text: str, words: list[str]) -> None:
    assert wording.tokenize(text) == words


# ---- BLEU --------------------------------------------------------------------------------------


def test_bleu_equals_the_libraries() -> None:
    assert wording.bleu4(CANDIDATES, REFERENCES) == pytest.approx(BLEU4, abs=1e-6)
    counts = wording.bleu_counts(CANDIDATES, REFERENCES)
    assert counts.matches.sum(0).tolist() == MATCHES
    assert counts.totals.sum(0).tolist() == TOTALS
    assert (counts.lengths.sum(), counts.reference_lengths.sum()) == LENGTHS


def test_bleu_by_hand() -> None:
    # Papineni et al. 2002, example 2: "the" is in a reference twice at most.
    texts = ["the cat is on the mat", "there is a cat on the mat"]
    counts = wording.bleu_counts(["the the the the the the the"], [texts])
    assert counts.matches.tolist() == [[2, 0, 0, 0]] and counts.totals.tolist() == [[7, 6, 5, 4]]
    # Six of six words, and all pairs, threes and fours, in a caption of six against eight words.
    long = "a cat sits on the mat in here"
    assert wording.bleu4(["a cat sits on the mat"], [[long]]) == pytest.approx(math.exp(1 - 8 / 6))
    # One word of six wrong, at the end: 5/6, 4/5, 3/4, 2/3.
    score = wording.bleu4(["a cat sits on the rug"], [["a cat sits on the mat"]])
    assert score == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # Of two references as far away, the shorter counts: no penalty.
    both = ["a cat sits on the mat now", "a cat sits on the"]
    assert wording.bleu_counts(["a cat sits on the mat"], [both]).reference_lengths == [5]


def test_bleu_bounds(captions: list[str]) -> None:
    assert wording.bleu4(captions, single(captions)) == pytest.approx(1)
    assert wording.bleu4([""] * 60, single(captions)) == 0
    assert wording.bleu4(["word"] * 60, single(captions)) == 0
    assert wording.bleu4(["a cat is"], [["a cat is"]]) == 0  # no run of four words to match


def test_bleu_interval(captions: list[str]) -> None:
    written = corrupted(captions[:30], 2) + captions[30:]
    low, high = wording.bleu4_interval(written, single(captions))
    assert 0 < low < wording.bleu4(written, single(captions)) < high < 1
    assert [low, high] == wording.bleu4_interval(written, single(captions))
    assert [low, high] != wording.bleu4_interval(written, single(captions), seed=1)
    assert wording.bleu4_interval(captions, single(captions)) == pytest.approx([1, 1])
    # What is drawn is captions: the same draws, scored from their texts, give the same interval.
    draws = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=20)
    scores = []
    for weights in draws:
        rows = np.repeat(np.arange(60), weights)
        scores.append(wording.bleu4([written[i] for i in rows], [[captions[i]] for i in rows]))
    by_text = np.percentile(scores, [2.5, 97.5])
    assert wording.bleu4_interval(written, single(captions), samples=20) == pytest.approx(by_text)


# ---- CIDEr-D -----------------------------------------------------------------------------------


def test_cider_equals_the_library() -> None:
    np.testing.assert_allclose(wording.cider_d(CANDIDATES, REFERENCES), CIDER_D, atol=1e-6)


def test_cider_by_hand() -> None:
    """Two images of one word each: an idf of log 2, and only single words to compare."""
    assert wording.cider_d(["cat", "cat"], [["cat"], ["mouse"]]).tolist() == pytest.approx([2.5, 0])
    # "cat cat" for "cat": clipped to log 2, norms of 2 log 2 and log 2, one pair of words more.
    expected = 10 / 4 * (1 / 2) * math.exp(-1 / 72)
    assert wording.cider_d(["cat cat", ""], [["cat"], ["mouse"]])[0] == pytest.approx(expected)
    # A word in every image weighs nothing: "the" changes the length alone, and no cosine.
    plain = wording.cider_d(["the cat", "the mouse"], [["the cat"], ["the mouse"]])
    assert plain.tolist() == pytest.approx([5, 5])
    # One image makes all its words common.
    assert wording.cider_d(["a cat sits on it"], [["a cat sits on it"]]).tolist() == [0]


def test_cider_takes_the_frequencies_of_a_larger_corpus(captions: list[str]) -> None:
    known = wording.count_documents(single(captions))
    assert known.images == 60 and known.counts[("a",)] <= 60
    assert max(known.counts.values()) <= 60
    written = corrupted(captions, 3)
    whole = wording.cider_d(written, single(captions))
    part = wording.cider_d(written[:9], single(captions[:9]), document_frequencies=known)
    np.testing.assert_allclose(part, whole[:9])
    assert not np.allclose(wording.cider_d(written[:9], single(captions[:9])), whole[:9])


def test_cider_tells_shuffled_captions(captions: list[str]) -> None:
    distinct = sorted(set(captions))
    same = wording.cider_d(distinct, single(distinct))
    assert same == pytest.approx(np.full(len(distinct), 10.0))
    shuffled = wording.cider_d(distinct[1:] + distinct[:1], single(sorted(distinct, key=hash_of)))
    assert 0 <= shuffled.mean() < 4
    assert wording.cider_d([""] * 60, single(captions)).tolist() == [0] * 60


def hash_of(text: str) -> int:
    """An order that has nothing to do with the alphabet, the same in each run."""
    return sum(ord(letter) * place**2 for place, letter in enumerate(text)) % 1009


@pytest.mark.parametrize("score", [wording.bleu4, lambda *pair: wording.cider_d(*pair).mean()])
def test_scores_fall_with_every_wrong_word(score: Callable[..., Any], captions: list[str]) -> None:
    values = [score(corrupted(captions, count), single(captions)) for count in range(7)]
    # No run of four words may be left: then BLEU stays at 0.
    assert all(a > b or a == b == 0 for a, b in pairwise(values))
    assert values[0] > values[1] > values[2] > values[3]


def test_cider_gain(captions: list[str]) -> None:
    """Captions that got better are told from ones that did not, with the usual intervals."""
    before, after = corrupted(captions, 5), corrupted(captions, 1)

    def gain(written: list[str]) -> dict[str, Any]:
        scores = [wording.cider_d(texts, single(captions)) for texts in (written, before)]
        return paired_bootstrap(*scores)

    assert 0 < gain(after)["ci95"][0] < gain(after)["difference"] < gain(after)["ci95"][1]
    assert gain(before)["ci95"] == [0, 0]
    # The same captions for other images gain far less.
    assert gain(after[30:] + after[:30])["ci95"][1] < gain(after)["ci95"][0]


@pytest.mark.parametrize("score", [wording.bleu4, wording.cider_d, wording.bleu4_interval])
@pytest.mark.parametrize(
    ("candidates", "references", "words"),
    [
        ([], [], "at least one"),
        (["a"], [["a"], ["b"]], "1 to score and references of 2"),
        (["a", "b"], [["a"], []], r"references\[1\]"),
        (["a cat"], ["a cat"], r"references\[0\]"),
    ],
)
def test_wrong_captions(
    score: Callable[..., Any], candidates: Any, references: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        score(candidates, references)


# ---- similarities ------------------------------------------------------------------------------


def test_recall() -> None:
    table = np.array([[0.9, 0.1, 0.5], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]])
    hits = wording.recall_at(table, np.eye(3, dtype=bool), (1, 2, 3))
    assert [hits[k].tolist() for k in (1, 2, 3)] == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]
    # The other direction: columns search rows.
    turned = wording.recall_at(table.T, np.eye(3, dtype=bool), (1, 2))
    assert [turned[k].tolist() for k in (1, 2)] == [[1, 0, 0], [1, 1, 1]]
    # Either of two right answers will do, and neither stands in the other's way.
    two = np.array([[0, 1, 1]], bool)
    assert wording.recall_at([[0.5, 0.6, 0.1]], two, (1,))[1] == [1]
    assert wording.recall_at([[0.5, 0.4, 0.1]], two, (1, 2))[2] == [1]


def test_recall_of_a_table_that_tells_nothing_apart() -> None:
    correct = np.eye(20, dtype=bool)
    for k, hits in wording.recall_at(np.zeros((20, 20)), correct, (1, 5, 19)).items():
        assert hits.sum() == 0, k
    assert wording.recall_at(np.zeros((20, 20)), correct, (20,))[20].all()
    # A tie with a wrong column is wrong even where everything else is right.
    table = np.eye(20)
    table[:, 3] = 1
    assert wording.recall_at(table, correct, (1,))[1].nonzero()[0].tolist() == [3]


def test_recall_of_chance() -> None:
    rng = np.random.default_rng(0)
    hits = wording.recall_at(
        rng.normal(size=(2000, 10)), np.arange(10) == rng.integers(10, size=(2000, 1))
    )
    assert {k: value.shape for k, value in hits.items()} == {1: (2000,), 5: (2000,), 10: (2000,)}
    assert hits[1].mean() == pytest.approx(0.1, abs=0.025)
    assert hits[5].mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("table", "correct", "words"),
    [
        (np.zeros((2, 3)), np.ones((3, 2), bool), "one shape"),
        (np.full((1, 2), np.nan), np.ones((1, 2), bool), "2 similarities are NaN"),
        (np.zeros((2, 2)), np.array([[1, 0], [0, 0]], bool), "row 1"),
    ],
)
def test_wrong_tables(table: np.ndarray, correct: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        wording.recall_at(table, correct)
    with pytest.raises(UserError, match="k is 0"):
        wording.recall_at(np.zeros((1, 1)), np.ones((1, 1), bool), (0, 1))


def test_calibration() -> None:
    table = wording.calibration([0.4, 0.1, 0.2, 0.3], [1, 0, 1, 1], bins=2)
    assert table.similarity.tolist() == pytest.approx([0.15, 0.35])
    assert table.hit_share.tolist() == [0.5, 1] and table.count.tolist() == [2, 2]
    rng = np.random.default_rng(0)
    level = rng.uniform(size=20_000)
    table = wording.calibration(level, rng.uniform(size=20_000) < level)
    assert table.count.tolist() == [2000] * 10
    np.testing.assert_allclose(table.hit_share, table.similarity, atol=0.04)
    # Hits that have nothing to do with it: flat.
    flat = wording.calibration(level, rng.uniform(size=20_000) < 0.3)
    np.testing.assert_allclose(flat.hit_share, 0.3, atol=0.04)
    assert len(wording.calibration([0.1, 0.2], [0, 1]).count) == 2


def test_calibration_makes_nothing_of_ties() -> None:
    table = wording.calibration(np.zeros(100), np.arange(100) >= 50)
    assert table.hit_share.tolist() == [0.5] * 10


@pytest.mark.parametrize(
    ("similarities", "hits", "bins", "words"),
    [
        ([], [], 10, "at least one"),
        ([0.1, 0.2], [1], 10, "as many of both"),
        ([0.1, np.nan], [1, 0], 10, "NaN"),
        ([0.1, 0.2], [1, 0.5], 10, "not 0 or 1"),
        ([0.1, 0.2], [1, 0], 0, "bins"),
    ],
)
def test_wrong_calibration(similarities: Any, hits: Any, bins: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        wording.calibration(similarities, hits, bins=bins)


def test_auc() -> None:
    assert wording.auc([3, 4], [1, 2]) == 1 and wording.auc([1, 2], [3, 4]) == 0
    assert wording.auc([0.5], [0.5, 0.5]) == 0.5
    # Six pairs: 0.8 beats all three, 0.4 beats 0.1, ties with 0.4, loses to 0.6.
    assert wording.auc([0.8, 0.4], [0.1, 0.4, 0.6]) == pytest.approx((3 + 1 + 0.5) / 6)
    rng = np.random.default_rng(0)
    assert wording.auc(rng.normal(size=3000), rng.normal(size=3000)) == pytest.approx(0.5, abs=0.03)
    # Normal values one deviation apart: Φ(1/√2).
    apart = wording.auc(rng.normal(1, 1, 3000), rng.normal(size=3000))
    assert apart == pytest.approx(0.7602, abs=0.025)
    for wrong in (([], [1.0]), ([1.0], []), ([np.nan], [1.0])):
        with pytest.raises(UserError, match="auc"):
            wording.auc(*wrong)


def test_no_model_is_needed() -> None:
    """The module scores words and numbers: it must not pull in torch or transformers."""
    tree = ast.parse(Path(wording.__file__).read_text(encoding="utf-8"))
    names = {
        alias.name if isinstance(node, ast.Import) else f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "scipy"}
