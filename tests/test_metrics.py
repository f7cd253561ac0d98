"""The metrics: right by hand-computed values, worse where pictures are worse, and fenced in."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tomjerry_utils import UserError, autoencoder, features, measures, metrics, scenes
from tomjerry_utils.foundation import PICTURES
from tomjerry_utils.images import save_image

torch.set_num_threads(1)
PACKAGE = Path(metrics.__file__).parent
FIRST, COUNT, REFERENCES = 5_000_000, 60, 120
NAMES = {"class_accuracy", "action_accuracy", "mask_iou", "pck", "perceptual", "kid"}


@lru_cache(maxsize=4)
def drawn(style: str) -> np.ndarray:
    return scenes.render_many(range(FIRST, FIRST + COUNT), style, 64)["image"]


def scored(images: np.ndarray) -> dict[str, Any]:
    seeds = range(FIRST, FIRST + len(images))
    return metrics.score(images, seeds, references=REFERENCES, bootstrap=200)


def folder_of(path: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    for seed, image in enumerate(images, FIRST):
        save_image(path / f"{seed}{suffix}", image)
    return path


# ---- intervals ---------------------------------------------------------------------------------


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = metrics.bootstrap_ci(values, samples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert metrics.bootstrap_ci(np.ones(50)) == [1.0, 1.0]
    assert metrics.bootstrap_ci(values) == metrics.bootstrap_ci(values)
    assert metrics.bootstrap_ci(values) != metrics.bootstrap_ci(values, seed=1)


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 5, 200)  # how hard a scene is, the same for both methods
    a, b = hard + 1 + 0.1 * rng.normal(size=200), hard + 0.1 * rng.normal(size=200)
    result = metrics.paired_bootstrap(a, b)
    assert result["difference"] == pytest.approx((a - b).mean())
    assert 0.9 < result["ci95"][0] < result["difference"] < result["ci95"][1] < 1.1
    # Unpaired, the same means could not be told apart.
    assert metrics.bootstrap_ci(a)[0] < metrics.bootstrap_ci(b)[1]
    assert metrics.paired_bootstrap(b, b)["ci95"] == [0.0, 0.0]
    a[:10] = np.nan
    assert metrics.paired_bootstrap(a, b)["n"] == 190


# ---- KID ---------------------------------------------------------------------------------------


def kid_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, pair by pair (Bińkowski et al. 2018, eq. 4)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    total = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    total += sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return total - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kid_is_its_definition() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(13, 7)), rng.normal(0.4, 1.2, size=(17, 7))
    assert metrics.kid(a, b) == pytest.approx(kid_by_loops(a, b), rel=1e-10)
    assert metrics.kid(a, b) == pytest.approx(metrics.kid(b, a))
    # By hand: one dimension, a = {0, 1}, b = {1, 2}: k(0,1)=1, k(1,2)=27; across 1, 1, 8, 27.
    small = metrics.kid(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    assert small == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kid_of_subsets_estimates_the_same() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(60, 8)), rng.normal(0.5, 1, size=(80, 8))
    whole = metrics.kid(a, b)
    parts = metrics.kid(a, b, subsets=400, subset_size=20)
    assert parts == pytest.approx(whole, rel=0.05)
    assert metrics.kid(a, b, subsets=1, subset_size=60) != whole  # 60 of b's 80


def test_kid_is_unbiased() -> None:
    """Over many pairs of samples from one distribution the mean is 0 at any size."""
    rng = np.random.default_rng(4)
    for size in (10, 40):
        values = [
            metrics.kid(rng.normal(size=(size, 6)), rng.normal(size=(size, 6))) for _ in range(300)
        ]
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
        assert np.min(values) < 0


def test_kid_interval() -> None:
    rng = np.random.default_rng(5)
    true, inside = 0.0, 0
    for _ in range(60):
        a, b = rng.normal(size=(50, 6)), rng.normal(0.6, 1, size=(60, 6))
        low, high = metrics.kid_interval(a, b, samples=300)
        assert low < metrics.kid(a, b) < high
        # E k(x, y) for these Gaussians, once, from a large sample.
        true = true or metrics.kid(rng.normal(size=(3000, 6)), rng.normal(0.6, 1, size=(3000, 6)))
        inside += low <= true <= high
    assert inside >= 50  # 95 % nominal, of 60
    assert np.isfinite(metrics.kid_interval(a[:2], b[:3])).all()  # with draws that hold no pair
    far = metrics.kid_interval(rng.normal(size=(50, 6)), rng.normal(2, 1, size=(60, 6)))
    assert far[0] > 0


@pytest.mark.parametrize("kind", ["shift", "spread", "collapse"])
def test_kid_grows_with_the_difference(kind: str) -> None:
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(200, 10)), rng.normal(size=(200, 10))
    made = {
        "shift": lambda t: fake + t,
        "spread": lambda t: fake * (1 + t),
        "collapse": lambda t: np.where(rng.random((200, 1)) < t / 2, fake[:1], fake),
    }[kind]
    values = [metrics.kid(made(t), real) for t in (0.0, 0.4, 0.8, 1.6)]
    assert all(a < b for a, b in pairwise(values)), values


# ---- masks and keypoints -----------------------------------------------------------------------


def test_iou_by_hand() -> None:
    true = np.zeros((4, 8, 8), np.uint8)
    true[0, :4] = 1  # cat in the upper half, mouse in a corner
    true[0, 6:, 6:] = 2
    true[1, :, :4] = 2  # a mouse alone
    true[2, :4] = 1
    found = np.zeros_like(true)
    found[0, :2] = 1  # half of the cat: 1/2; the mouse and as much again: 1/2
    found[0, 6:, 4:] = 2
    found[1, :, 2:6] = 2  # half on, half off: 1/3
    found[2] = true[2] * 2  # right place, wrong animal
    assert np.allclose(metrics.iou(found, true)[:3], [0.5, 1 / 3, 0.0])
    assert np.isnan(metrics.iou(found, true)[3])  # nobody there
    assert np.allclose(metrics.iou(true, true)[:3], 1)


def test_pck_by_hand() -> None:
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 10:40, 5:45] = 1  # box 30 × 40, diagonal 50: within 5 pixels
    masks[1, 10:16, 20:28] = 2  # box 6 × 8, diagonal 10: within 1 pixel
    true = np.zeros((2, 2, 4, 3))
    true[0, 0] = [[10, 10, 1], [20, 20, 1], [30, 30, 1], [70, 30, 0]]
    true[1, 1] = [[20, 12, 1], [24, 12, 1], [26, 12, 1], [28, 12, 1]]
    found = true.copy()
    found[0, 0, :, 0] += [4.9, 5.1, 0, 40]  # near, too far, exact, out of the picture
    found[1, 1, :, 1] += [0.9, 1.1, 2, 3]
    found[0, 1, :, 0] += 99  # no mouse there: does not count
    assert np.allclose(metrics.pck(found, true, masks), [2 / 3, 1 / 4])
    assert np.allclose(metrics.pck(found, true, masks, share=0.5), 1)
    assert np.isnan(metrics.pck(found, true, np.zeros_like(masks))).all()
    assert np.array_equal(
        np.isnan(measures.hits(found, true, masks)[0, 0]), [False, False, False, True]
    )


# ---- features ----------------------------------------------------------------------------------


def test_one_pass_gives_the_same_features() -> None:
    natural, cartoon = drawn("natural")[:6], drawn("cartoon")[:6]
    maps, pooled = metrics._look(natural)
    others, _ = metrics._look(cartoon)
    assert np.abs(pooled - features.extract(natural)).max() < 1e-3
    expected = features.perceptual_distance(natural, cartoon)
    assert np.allclose(metrics._distance(maps, others), expected, atol=1e-4)
    assert np.allclose(metrics._distance(maps, maps), 0)


# ---- scoring scenes ----------------------------------------------------------------------------


def test_scores_of_the_truth_and_of_the_source() -> None:
    truth, source = scored(drawn("natural")), scored(drawn("cartoon"))
    assert truth["n"] == COUNT and set(truth["metrics"]) == NAMES
    for name, (best, worst) in {
        "class_accuracy": (0.96, 0.10), "mask_iou": (0.88, 0.85), "pck": (0.95, 0.97),
    }.items():  # fmt: skip
        assert truth["metrics"][name]["value"] >= best, name
        assert source["metrics"][name]["value"] <= worst, name
    assert source["answers"].count("cartoon") >= 0.9 * COUNT
    assert source["metrics"]["kid"]["value"] > 4 * max(truth["metrics"]["kid"]["value"], 0)
    assert truth["metrics"]["perceptual"]["value"] < source["metrics"]["perceptual"]["value"] / 2
    gap = metrics.paired_bootstrap(
        truth["each"]["class_accuracy"], source["each"]["class_accuracy"]
    )
    assert gap["ci95"][0] > 0.8 and gap["n"] == COUNT
    for result in (truth, source):
        for metric in result["metrics"].values():
            low, high = metric["ci95"]
            assert low <= metric["value"] <= high and metric["n"] == COUNT
        assert set(result["by_class"]) == set(scenes.CLASSES)
        counts = [row["class_accuracy"]["n"] for row in result["by_class"].values()]
        assert sum(counts) == COUNT


def blended(share: float) -> np.ndarray:
    """Between the twin and the picture of another scene."""
    natural = drawn("natural").astype(float)
    return ((1 - share) * natural + share * natural[::-1]).round().astype(np.uint8)


def moved(pixels: int) -> np.ndarray:
    return np.roll(drawn("natural"), pixels, axis=2)


def grained(amount: float) -> np.ndarray:
    noise = np.random.default_rng(7).normal(size=drawn("natural").shape)
    return (drawn("natural") + 255 * amount * noise).clip(0, 255).astype(np.uint8)


CORRUPTIONS: dict[str, tuple[Any, tuple[float, ...], dict[str, int]]] = {
    # how, how much, metric → the direction it must go in at every step
    "other scene": (blended, (0.0, 0.35, 1.0), {
        "class_accuracy": -1, "action_accuracy": -1, "mask_iou": -1, "pck": -1, "perceptual": 1,
    }),
    "moved": (moved, (0, 5, 14), {"mask_iou": -1, "pck": -1, "perceptual": 1}),
    "noise": (grained, (0.0, 0.08, 0.3), {"perceptual": 1, "kid": 1, "mask_iou": -1, "pck": -1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_metrics_follow_a_graded_corruption(name: str) -> None:
    how, amounts, directions = CORRUPTIONS[name]
    results = [scored(how(amount))["metrics"] for amount in amounts]
    for metric, direction in directions.items():
        values = [result[metric]["value"] for result in results]
        assert all(direction * (b - a) > 0 for a, b in pairwise(values)), (metric, values)


def test_other_sizes_are_brought_to_64() -> None:
    large = scenes.render_many(range(FIRST, FIRST + COUNT), "natural", 128)["image"]
    assert scored(large)["metrics"]["mask_iou"]["value"] > 0.85


def test_score_refuses_what_was_trained_on() -> None:
    images = drawn("natural")[:3]
    with pytest.raises(ValueError, match="trained on"):
        metrics.score(images, [2_000_000, FIRST, FIRST + 1])
    with pytest.raises(ValueError, match="one seed per picture"):
        metrics.score(images, [FIRST])


# ---- words across the domains ------------------------------------------------------------------

SETS, AMONG, SMALL = 2, 30, 16  # pictures this small are still different ones
RENDER = scenes.render_many


def drawn_once(seeds: Sequence[int], style: str, size: int) -> dict[str, np.ndarray]:
    """The renderer, which draws each set but once."""
    return _drawn(tuple(seeds), style, size)


@cache
def _drawn(seeds: tuple[int, ...], style: str, size: int) -> dict[str, np.ndarray]:
    return RENDER(list(seeds), style, size, workers=1)


@cache
def seeds_of(style: str) -> dict[bytes, int]:
    """Which scene a picture shows: the oracle's knowledge."""
    found = {}
    for part in range(SETS):
        first = metrics.TWIN_SEED + part * AMONG
        seeds = range(first, first + AMONG)
        images = drawn_once(seeds, style, SMALL)["image"]
        found |= {image.tobytes(): seed for image, seed in zip(images, seeds, strict=True)}
    assert len(found) == SETS * AMONG
    return found


def captions_of(images: np.ndarray, style: str, words: str = "natural") -> list[str]:
    seen = [seeds_of(style)[image.tobytes()] for image in images]
    return [scenes.caption(scenes.describe(seed), words) for seed in seen]


def one_hot(texts: Sequence[str]) -> np.ndarray:
    """A vector for each known caption; any other has none."""
    return np.array([[float(text == one) for one in known_captions()] for text in texts])


@cache
def known_captions() -> list[str]:
    seeds = seeds_of("cartoon").values()
    return sorted({scenes.caption(scenes.describe(seed), "natural") for seed in seeds})


def twins(render: Any = drawn_once, **changes: Any) -> dict[str, Any]:
    """`find_twins` of an oracle, but for what is changed."""
    oracle: dict[str, Any] = {
        "embed_images": lambda images: one_hot(captions_of(images, "natural")),
        "embed_texts": one_hot,
        "write": lambda images: captions_of(images, "cartoon"),
        "sets": SETS,
        "among": AMONG,
        "size": SMALL,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render_many", render)
        return metrics.find_twins(**{**oracle, **changes})


def random_unit(items: Any, rng: np.random.Generator) -> np.ndarray:
    found = rng.normal(size=(len(items), 16))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_an_oracle_finds_every_twin() -> None:
    found = twins()
    assert (found["n"], found["among"], found["sets"]) == (60, 30, 2)
    for name in ("written", "true"):
        assert found[name] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 60}
    true = [
        [
            scenes.caption(scenes.describe(metrics.TWIN_SEED + 30 * s + i), "natural")
            for i in range(30)
        ]
        for s in range(SETS)
    ]
    chance = np.mean([[a == b for a in part for b in part] for part in true])
    assert found["chance"] == pytest.approx(chance)
    assert 1 / 30 <= found["chance"] < 0.1
    # The control: the same captions for other cartoons find their twins by luck alone.
    assert found["shuffled"]["value"] == pytest.approx(found["chance"], abs=0.12)
    assert found["shuffled"]["n"] == 60
    assert json.loads(json.dumps(found)) == found


def test_embeddings_that_know_nothing_find_twins_by_chance() -> None:
    rng = np.random.default_rng(0)
    hits = [
        twins(
            embed_images=lambda images: random_unit(images, rng),
            embed_texts=lambda texts: random_unit(texts, rng),
        )[name]["value"]
        for _ in range(4)
        for name in ("written", "true", "shuffled")
    ]
    assert np.mean(hits) == pytest.approx(twins()["chance"], abs=0.05)
    assert max(hits) < 0.25


def test_equal_embeddings_find_nothing() -> None:
    """What tells no two pictures apart ties with all of them, and a tie is no find."""

    def same(items: Any) -> np.ndarray:
        return np.ones((len(items), 1))

    found = twins(embed_images=same, embed_texts=same)
    for name in ("written", "true", "shuffled"):
        assert found[name]["value"] == 0


def test_what_is_written_counts() -> None:
    """A captioner in the cartoon's own words, or one with every second caption wrong."""
    unmapped = twins(write=lambda images: captions_of(images, "cartoon", "cartoon"))
    assert (unmapped["written"]["value"], unmapped["true"]["value"]) == (0.0, 1.0)

    def half(images: np.ndarray) -> list[str]:
        return [
            text if i % 2 else "nothing" for i, text in enumerate(captions_of(images, "cartoon"))
        ]

    found = twins(write=half)["written"]
    assert found["value"] == 0.5
    assert 0.3 < found["ci95"][0] < 0.5 < found["ci95"][1] < 0.7


def test_equal_true_captions_are_both_right() -> None:
    """Scenes with one caption are told apart by nobody: either twin is a hit."""
    counts = [
        len(set(captions_of(list_of(style, part), style))) for style in scenes.STYLES
        for part in range(SETS)
    ]  # fmt: skip
    assert min(counts) < AMONG  # there are such scenes
    assert twins()["true"]["value"] == 1


def list_of(style: str, part: int) -> np.ndarray:
    pictures = list(seeds_of(style))[part * AMONG : (part + 1) * AMONG]
    return np.stack([np.frombuffer(p, np.uint8).reshape(SMALL, SMALL, 3) for p in pictures])


def test_examples_of_twins_are_pictures() -> None:
    found = twins(examples=4, write=lambda images: captions_of(images, "cartoon")[::-1])
    assert twins()["examples"] == []
    rows = found["examples"]
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert np.array_equal(row["cartoon"], list_of("cartoon", 0)[i])
        assert row["caption"] == captions_of(list_of("cartoon", 0), "cartoon")[::-1][i]
        assert row["first"].shape == (3, SMALL, SMALL, 3)
        assert captions_of(row["first"][:1], "natural") == [row["caption"]]
        true = captions_of(row["cartoon"][None], "cartoon")[0]
        assert row["right"] == (row["caption"] == true)
    assert not all(row["right"] for row in rows)
    assert all(row["right"] for row in twins(examples=4)["examples"])


def test_twins_are_drawn_from_validation_seeds_only() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    sizes: list[int] = []

    def watched(seeds: Any, style: str, *rest: Any, **options: Any) -> Any:
        calls.append((style, tuple(seeds)))
        return drawn_once(seeds, style, *rest, **options)

    def embed(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return one_hot(captions_of(images, "natural"))

    twins(render=watched, embed_images=embed)
    starts = [metrics.TWIN_SEED + AMONG * part for part in range(SETS)]
    expected = [
        (style, tuple(range(start, start + AMONG))) for start in starts for style in scenes.STYLES
    ]
    assert sorted(calls) == sorted(expected)
    assert sizes == [AMONG] * SETS  # a query only meets its own set
    low, high = scenes.RANGES["validation"]
    assert low <= metrics.TWIN_SEED
    # As they are by default: five sets of a hundred, and nothing that KID is compared with.
    assert metrics.TWIN_SEED + 5 * 100 <= metrics.REFERENCE_SEED <= high


# ---- tomjerry evaluate -------------------------------------------------------------------------


def test_evaluate_folder(
    tmp_path: Path, session_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "out", drawn("natural"))
    (folder / "report.jsonl").write_text("{}\n")
    (folder / ".hidden.png").write_text("")
    options: dict[str, Any] = {"references": REFERENCES, "bootstrap": 200}
    result = metrics.evaluate_folder(folder, "twins", **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result) == ["schema", "n", "size", "label", "metrics", "rows", "by_class"]
    assert (result["schema"], result["n"], result["size"]) == (1, COUNT, 64)
    assert result["label"] == "twins" and set(result["metrics"]) == NAMES
    assert result["metrics"]["kid"]["features"] == features.NAME
    assert result["metrics"]["perceptual"]["features"] == features.DISTANCE_NAME
    assert set(result["rows"]) == {"floor", "autoencoder", "ceiling", "identity"}

    rows = result["rows"]
    value = {name: {m: rows[name][m]["value"] for m in NAMES} for name in rows}
    assert value["floor"]["class_accuracy"] >= 0.96 and value["identity"]["class_accuracy"] <= 0.1
    # The ceiling is a faultless picture of another scene: all but KID must tell.
    assert value["ceiling"]["class_accuracy"] < 0.6 and value["ceiling"]["action_accuracy"] < 0.5
    assert value["ceiling"]["mask_iou"] < 0.5 and value["ceiling"]["pck"] < 0.3
    assert abs(value["ceiling"]["kid"]) < 0.2 * value["identity"]["kid"]
    order = [value[name]["perceptual"] for name in ("floor", "autoencoder", "ceiling")]
    assert order[0] < order[1] < order[2]
    assert value["floor"]["mask_iou"] >= value["autoencoder"]["mask_iou"] > 0.6
    # The twins themselves score as the floor does.
    for name in ("mask_iou", "pck"):
        assert abs(result["metrics"][name]["value"] - value["floor"][name]) < 0.02

    # Again: the rows and the reference come from the cache, and nothing differs.
    monkeypatch.setattr(autoencoder, "decode", None)  # computing anew would fail
    assert metrics.evaluate_folder(folder, "twins", **options) == result
    kept = {path.suffix for path in (session_runs / "metrics").iterdir()}
    assert kept <= {".json", ".npy"}  # numbers and features: no twin is ever written

    table = metrics.table(result)
    assert "ceiling" in table and "twins: both" in table and "mask_iou" in table


def test_reference_is_kept_on_disk(fresh_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.reference.cache_clear()
    vectors, classes = metrics.reference(20)
    assert vectors.shape == (20, 1280) and len(classes) == 20
    metrics.reference.cache_clear()
    monkeypatch.setattr(metrics, "_look", None)  # computing anew would fail
    assert np.array_equal(metrics.reference(20)[0], vectors)
    [file] = (fresh_runs / "metrics").iterdir()
    assert file.suffix == ".npy"
    metrics.reference.cache_clear()


def test_reference_is_nobodys_twin() -> None:
    low, high = scenes.RANGES["validation"]
    assert low < metrics.REFERENCE_SEED
    assert metrics.REFERENCE_SEED + metrics.REFERENCES <= high <= metrics.FIRST_SEED


def test_an_unwritable_cache_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "file"))
    metrics.reference.cache_clear()
    assert metrics.reference(3)[0].shape == (3, 1280)
    metrics.reference.cache_clear()


def spoil(folder: Path, how: str) -> None:
    first = folder / f"{FIRST}.png"
    if how == "another name":
        first.rename(folder / "kitchen.png")
    elif how == "a leading zero":
        first.rename(folder / f"0{FIRST}.png")
    elif how == "another format":
        first.rename(folder / f"{FIRST}.webp")
    elif how == "twice":
        (folder / f"{FIRST}.jpg").write_bytes(first.read_bytes())
    elif how == "too few":
        for path in sorted(folder.iterdir())[: COUNT - 49]:
            path.unlink()
    elif how == "trained on":
        first.rename(folder / "2000000.png")
    elif how == "validation":
        first.rename(folder / "4000000.png")
    elif how == "broken":
        first.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("another name", "kitchen.png: not named <seed>"),
        ("a leading zero", f"0{FIRST}.png: not named"),
        ("another format", "webp: not named"),
        ("twice", "of one scene"),
        ("too few", "49 translated scenes, at least 50"),
        ("trained on", "seed 2000000 is below the test range"),
        ("validation", "seed 4000000 is below the test range"),
        ("broken", "not a picture"),
    ],
)
def test_evaluate_refuses(how: str, says: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", drawn("cartoon")[:, ::8, ::8])
    spoil(folder, how)
    target = tmp_path / "result.json"
    with pytest.raises(UserError, match=says) as caught:
        metrics.evaluate_command(folder, json=target)
    assert "\n" not in str(caught.value) and not target.exists()


def test_evaluate_refuses_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        metrics.evaluate_command(tmp_path / "nowhere", json=tmp_path / "a.json")
    with pytest.raises(UserError, match="give --json a file name"):
        metrics.evaluate_command(tmp_path, json=tmp_path)


def test_evaluate_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "mine", drawn("natural"), ".jpg")
    real = metrics.evaluate_folder
    monkeypatch.setattr(
        metrics, "evaluate_folder",
        lambda *a: real(*a, references=REFERENCES, bootstrap=200),
    )  # fmt: skip
    target = tmp_path / "new" / "result.json"
    result = metrics.evaluate_command(folder, json=target)
    assert json.loads(target.read_text()) == result and result["label"] == "mine"
    printed = capsys.readouterr().out
    assert "identity" in printed and str(target) in printed


def test_seeds_above_every_range_are_scored(tmp_path: Path) -> None:
    """9 000 000 and above is kept for outside evaluation."""
    for seed in range(9_000_000, 9_000_050):
        save_image(tmp_path / f"{seed}.png", np.zeros((4, 4, 3), np.uint8))
    assert list(metrics.translated(tmp_path)) == list(range(9_000_000, 9_000_050))


# ---- the fence ---------------------------------------------------------------------------------


@cache
def imports_of(path: Path) -> set[str]:
    """The package's own modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tomjerry_utils"):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("tomjerry_utils.")}
    return {name for name in found if (PACKAGE / f"{name}.py").is_file()}


def reach(name: str) -> set[str]:
    """All modules that one imports, directly or through others."""
    seen: set[str] = set()
    todo = {name}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= imports_of(PACKAGE / f"{module}.py") - seen
    return seen - {name}


@pytest.mark.parametrize("stage", ["ldm", "transfer", "structure", "blip", "baselines"])
def test_no_stage_reaches_the_judges(stage: str) -> None:
    assert not reach(stage) & {"judges", "judge_nets", "metrics", "foundation", "compare"}
    assert "judges" in reach("metrics")  # the search does find what is there


def natural_calls(path: Path) -> list[str]:
    """Calls of a renderer whose style is not plainly "cartoon"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("render", "render_many", "flow"):
            style = next((k.value for k in node.keywords if k.arg == "style"), None)
            place = 2 if name == "flow" else 1
            style = style or (node.args[place] if len(node.args) > place else None)
            if not (isinstance(style, ast.Constant) and style.value == "cartoon"):
                found.append(ast.unparse(node))
    return found


def test_only_metrics_draws_hidden_twins() -> None:
    """Who else draws natural pictures, and from which seeds: each is known, none reaches 4–6 M."""
    low, high = scenes.RANGES["validation"][0], scenes.RANGES["test"][1]
    drawing = {path.stem for path in PACKAGE.glob("*.py") if natural_calls(path)}
    assert "metrics" in drawing
    # `draw` is the command `tomjerry scenes`, whose output no stage reads.
    others = drawing - {"metrics", "draw"}
    assert others <= {"foundation", "sources", "collect", "workflow"}, others
    for name in others:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                assert not low <= node.value < high, f"{name} holds the seed {node.value}"
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("RANGES"):
                assert ast.unparse(node.slice) not in ("'validation'", "'test'"), name
    for style, zoo, first, count in PICTURES.values():
        assert zoo or style == "cartoon" or not (first < high and first + count > low)


def test_scoring_draws_twins_only_of_its_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At run time too: the natural renderer is called for the scored seeds and nothing else."""
    calls: list[tuple[str, tuple[int, ...]]] = []
    real = scenes.render_many

    def watched(seeds: Any, style: str, *rest: Any, **options: Any) -> Any:
        calls.append((style, tuple(seeds)))
        return real(seeds, style, *rest, **options)

    metrics.reference(REFERENCES)
    metrics._twins.cache_clear()
    images = drawn("cartoon")[:4]
    monkeypatch.setattr(scenes, "render_many", watched)
    seeds = [5_000_700, 5_000_703, 5_000_701, 5_000_702]
    metrics.score(images, seeds, references=REFERENCES, bootstrap=10)
    assert calls == [("natural", tuple(seeds))]
    metrics._twins.cache_clear()
