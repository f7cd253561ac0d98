"""The metrics: right by hand-computed values, worse where pictures are worse, and fenced in."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tomjerry_utils import UserError, autoencoder, features, metrics, scenes, scoring
from tomjerry_utils.foundation import PICTURES
from tomjerry_utils.images import save_image
from tomjerry_utils.judges import load_judges
from tomjerry_utils.twins import look, twins_of, with_noise

torch.set_num_threads(1)
PACKAGE = Path(metrics.__file__).parent
FIRST, COUNT, REFERENCES = 5_000_000, 60, 120
NAMES = set(metrics.KEYS)


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
    more = {name: (truth["metrics"][name], source["metrics"][name]) for name in metrics.KEYS}
    assert more["cartoon_share"][0]["value"] <= 0.05 < 0.95 <= more["cartoon_share"][1]["value"]
    assert more["structure"][0]["value"] > 0.05 and more["structure"][1]["value"] == 0
    for name in ("precision", "recall"):
        assert more[name][0]["value"] > 0.6 and more[name][1]["value"] < 0.1, name
        assert (more[name][0]["neighbours"], more[name][0]["references"]) == (3, REFERENCES)
    assert (more["kid"][0]["subsets"], more["kid"][0]["subset_size"]) == (100, 100)
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


# ---- graded corruption -------------------------------------------------------------------------

FEW = 36  # scenes
# natural pictures, cartoons, how much → pictures, float in [0, 255]
Corrupt = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def blended(natural: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    return (1 - share) * natural + share * other


def swapped(natural: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Of so many scenes, another's picture."""
    return np.where(np.arange(len(natural))[:, None, None, None] < share * FEW, other, natural)


def other_scene(how: Corrupt) -> Corrupt:
    return lambda natural, cartoon, amount: how(natural, natural[::-1], amount)


def other_class(natural: np.ndarray, cartoon: np.ndarray, share: float) -> np.ndarray:
    """Cat and mouse swapped: the picture of a scene of another class."""
    kinds = [scenes.describe(seed).cls for seed in range(FIRST, FIRST + FEW)]
    instead = [next(j for j in range(FEW) if kinds[j] != kind) for kind in kinds]
    return swapped(natural, natural[instead], share)


def moved(natural: np.ndarray, cartoon: np.ndarray, pixels: float) -> np.ndarray:
    return np.roll(natural, int(pixels), axis=2)


def grained(natural: np.ndarray, cartoon: np.ndarray, amount: float) -> np.ndarray:
    return natural + 255 * amount * np.random.default_rng(7).normal(size=natural.shape)


def blurred(natural: np.ndarray, cartoon: np.ndarray, pixels: float) -> np.ndarray:
    return gaussian_filter(natural, (0, pixels, pixels, 0))


def collapsed(natural: np.ndarray, cartoon: np.ndarray, share: float) -> np.ndarray:
    """Of so many scenes, one and the same picture."""
    return swapped(natural, natural[-1:], share)


CORRUPTIONS: dict[str, tuple[Corrupt, tuple[float, ...], dict[str, int]]] = {
    # how, how much, metric → the direction it must go in at every step
    "other scene": (other_scene(blended), (0.0, 0.35, 1.0), {
        "class_accuracy": -1, "action_accuracy": -1, "mask_iou": -1, "pck": -1, "perceptual": 1,
        "structure": 1,
    }),
    "other class": (other_class, (0.0, 0.5, 1.0), {
        "class_accuracy": -1, "mask_iou": -1, "perceptual": 1, "structure": 1,
    }),
    "moved": (moved, (0, 5, 14), {
        "mask_iou": -1, "pck": -1, "perceptual": 1, "structure": 1,
    }),
    "noise": (grained, (0.0, 0.08, 0.3), {
        "perceptual": 1, "kid": 1, "mask_iou": -1, "pck": -1, "structure": 1,
    }),
    "blur": (blurred, (0.0, 1.0, 3.0), {"perceptual": 1, "kid": 1}),
    "cartoon": (blended, (0.0, 0.5, 1.0), {
        "cartoon_share": 1, "class_accuracy": -1, "kid": 1, "structure": -1, "perceptual": 1,
    }),
    "cartoons among them": (swapped, (0.0, 0.5, 1.0), {
        "cartoon_share": 1, "class_accuracy": -1, "kid": 1, "precision": -1, "structure": -1,
    }),
    "collapse": (collapsed, (0.0, 0.6, 1.0), {"recall": -1, "kid": 1, "action_accuracy": -1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def corrupted() -> dict[str, dict[str, Any]]:
    """Every corruption, scored in one go: `name amount` → metrics."""
    truth = twins_of(tuple(range(FIRST, FIRST + FEW)))
    natural, cartoon = with_noise(truth.images, 0), truth.sources
    sets = {
        f"{name} {amount}": how(natural.astype(float), cartoon, amount).clip(0, 255).round()
        for name, (how, amounts, _) in CORRUPTIONS.items()
        for amount in amounts
        if amount
    }
    sets = {"": natural} | {name: images.astype(np.uint8) for name, images in sets.items()}
    found = scoring.measure(
        sets, truth, load_judges(), references=REFERENCES, bootstrap=50, show=False
    )
    return {name: made["metrics"] for name, made in found.items()}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_metrics_follow_a_graded_corruption(
    name: str, corrupted: dict[str, dict[str, Any]]
) -> None:
    _, amounts, directions = CORRUPTIONS[name]
    results = [corrupted[f"{name} {amount}" if amount else ""] for amount in amounts]
    for metric, direction in directions.items():
        values = [result[metric]["value"] for result in results]
        assert all(direction * (b - a) > 0 for a, b in pairwise(values)), (metric, values)


def test_collapse_is_no_loss_of_precision(corrupted: dict[str, dict[str, Any]]) -> None:
    """What precision cannot see, recall does; and the reverse for noise."""
    whole, one = corrupted[""], corrupted["collapse 1.0"]
    assert one["precision"]["value"] >= whole["precision"]["value"] - 0.2
    assert one["recall"]["value"] < 0.1 < 0.5 < whole["recall"]["value"]
    # Another scene's picture is no less real, nor is another class's.
    assert corrupted["other scene 1.0"]["kid"]["value"] == pytest.approx(whole["kid"]["value"])
    assert corrupted["cartoon 1.0"]["precision"]["value"] < 0.1
    # Some blurred ones lie within the widest balls; their share is still clearly lower.
    assert corrupted["blur 3.0"]["precision"]["ci95"][1] < whole["precision"]["ci95"][0]


def test_diversity() -> None:
    natural = drawn("natural")[:9].reshape(3, 3, 64, 64, 3).astype(float)
    middle = natural.mean(1, keepdims=True)
    graded = [
        metrics.diversity((natural + share * (middle - natural)).round().astype(np.uint8))
        for share in (0.0, 0.5, 1.0)
    ]
    values = [entry["value"] for entry in graded]
    assert values[0] > values[1] > values[2] == pytest.approx(0, abs=1e-6)
    outputs = natural.astype(np.uint8)
    by_hand = [
        np.mean([
            features.perceptual_distance(outputs[i, [a]], outputs[i, [b]])[0]
            for a, b in ((0, 1), (0, 2), (1, 2))
        ])
        for i in range(3)
    ]  # fmt: skip
    assert values[0] == pytest.approx(np.mean(by_hand), rel=1e-4)
    low, high = graded[0]["ci95"]
    assert min(by_hand) - 1e-4 <= low < values[0] < high <= max(by_hand) + 1e-4
    assert (graded[0]["n"], graded[0]["outputs"]) == (3, 3)
    assert graded[0]["features"] == features.DISTANCE_NAME
    with pytest.raises(ValueError, match="need two"):
        metrics.diversity(outputs[:, :1])


class Painter:
    """Draws natural pictures of other scenes: of the class asked for, or whatever it is asked."""

    def __init__(self, listens: bool) -> None:
        self.listens = listens

    def translate(self, images: np.ndarray, asked: list[str], *, seed: int) -> SimpleNamespace:
        classes = [scenes.describe(number).cls for number in range(FIRST, FIRST + COUNT)]
        first = classes.index("tom")
        chosen = [classes.index(cls) if self.listens else first for cls in asked]
        return SimpleNamespace(images=drawn("natural")[chosen])


def test_a_swapped_class_counts_where_the_judge_sees_what_was_asked_for() -> None:
    cartoons = drawn("cartoon")
    classes = [scenes.describe(number).cls for number in range(FIRST, FIRST + COUNT)]
    options: dict[str, Any] = {"seed": 0, "judges": load_judges(), "bootstrap": 100}
    alone = [cls for cls in classes if cls != "both"]
    found = scoring.class_swap(Painter(True), cartoons, classes, **options)  # type: ignore[arg-type]
    assert found == {"value": 1.0, "ci95": [1.0, 1.0], "n": len(alone)}
    deaf = scoring.class_swap(Painter(False), cartoons, classes, **options)  # type: ignore[arg-type]
    assert deaf["value"] == pytest.approx(alone.count("jerry") / len(alone))  # asked for a cat
    assert deaf["ci95"][0] < deaf["value"] < deaf["ci95"][1]
    with pytest.raises(ValueError, match="no class to swap"):
        scoring.class_swap(Painter(True), cartoons[:1], ["both"], **options)  # type: ignore[arg-type]


def test_samples_are_judged_by_their_label_and_copies_are_noticed() -> None:
    classes = [scenes.describe(number).cls for number in range(FIRST, FIRST + COUNT)]
    pictures = {style: drawn(style) for style in scenes.STYLES}
    samples = {
        scenes.label_of(cls, style): images[[name == cls for name in classes]]
        for style, images in pictures.items()
        for cls in scenes.CLASSES
    }
    options: dict[str, Any] = {"judges": load_judges(), "references": 60, "bootstrap": 100}
    other = with_noise(twins_of(tuple(range(FIRST + COUNT, FIRST + 2 * COUNT))).images, 0)
    known = scoring.vectors(other)
    found = scoring.class_samples(samples, known, **options)
    assert found["class_accuracy"]["value"] > 0.95 and found["cartoon_share"]["value"] > 0.95
    assert found["class_accuracy"]["n"] == found["kid"]["n"] == COUNT
    assert found["by_label"].keys() == samples.keys()
    assert 0.8 < found["novelty"]["value"] < 1.2  # they are new scenes
    copied = scoring.class_samples(samples, scoring.vectors(pictures["natural"]), **options)
    assert copied["novelty"]["value"] < 0.05
    # A cartoon is no cat, and far from photographs.
    wrong = {**samples, "cat": samples["tom"], "mouse": samples["jerry"]}
    wrong["cat_mouse"] = samples["tom_jerry"]
    unlike = scoring.class_samples(wrong, known, **options)
    assert unlike["class_accuracy"]["value"] < 0.05
    assert unlike["kid"]["value"] > found["kid"]["value"] + 0.5


# ---- scoring -----------------------------------------------------------------------------------


def test_distance_is_that_of_the_features() -> None:
    natural, cartoon = drawn("natural")[:6], drawn("cartoon")[:6]
    maps, others = look(natural)[0], look(cartoon)[0]
    expected = features.perceptual_distance(natural, cartoon)
    assert np.allclose(scoring._distance(maps, others), expected, atol=1e-4)
    assert np.allclose(scoring._distance(maps, maps), 0)


def test_other_sizes_are_brought_to_64() -> None:
    large = scenes.render_many(range(FIRST, FIRST + COUNT), "natural", 128)["image"]
    assert scored(large)["metrics"]["mask_iou"]["value"] > 0.85


def test_score_refuses_what_was_trained_on() -> None:
    images = drawn("natural")[:3]
    with pytest.raises(ValueError, match="trained on"):
        metrics.score(images, [2_000_000, FIRST, FIRST + 1])
    with pytest.raises(ValueError, match="one seed per picture"):
        metrics.score(images, [FIRST])


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
    assert list(result["rows"]) == list(metrics.ROWS)
    assert {"floor", "autoencoder", "ceiling", "identity"} <= set(metrics.ROWS)

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
    # The set measures of `real` and `autoencoder` are those of other scenes, as many as 120 allow.
    real = rows["real"]
    assert {m: entry["n"] for m, entry in real.items()} == dict.fromkeys(NAMES, REFERENCES)
    assert abs(value["real"]["kid"]) < 0.1 * value["identity"]["kid"]
    assert value["real"]["class_accuracy"] > 0.95 and value["real"]["cartoon_share"] < 0.05
    assert min(value["real"]["precision"], value["real"]["recall"]) > 0.7
    assert {m for m, entry in rows["autoencoder"].items() if entry["n"] == REFERENCES} == {
        "kid", "precision", "recall",
    }  # fmt: skip
    assert value["real"]["kid"] < value["autoencoder"]["kid"] < 0.25 * value["identity"]["kid"]
    # The null rows: untouched cartoons, and one picture whatever is asked.
    assert value["identity"]["cartoon_share"] >= 0.95 and value["identity"]["structure"] == 0
    assert value["identity"]["precision"] < 0.1 and value["identity"]["recall"] < 0.1
    assert value["mean"]["recall"] == 0 and value["mean"]["kid"] > value["identity"]["kid"]
    assert value["mean"]["action_accuracy"] < 0.5 and value["mean"]["mask_iou"] < 0.2
    order = [value[name]["structure"] for name in ("identity", "floor", "ceiling")]
    assert order[0] < order[1] < order[2]
    # The twins themselves score as the floor does.
    for name in ("mask_iou", "pck"):
        assert abs(result["metrics"][name]["value"] - value["floor"][name]) < 0.02

    # Again: the rows and the reference come from the cache, and nothing differs.
    monkeypatch.setattr(autoencoder, "decode", None)  # computing anew would fail
    assert metrics.evaluate_folder(folder, "twins", **options) == result
    kept = {path.suffix for path in (session_runs / "metrics").iterdir()}
    assert kept <= {".json", ".npy"}  # numbers and features: no twin is ever written

    table = metrics.table(result).splitlines()
    assert max(map(len, table)) <= 140
    for row in ("ceiling", "  twins: both"):
        assert len([line for line in table if line.startswith(row)]) == 2
    assert all(any(name in line for line in table) for name in NAMES)


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
    fenced = {"judges", "judge_nets", "metrics", "scoring", "twins", "foundation", "compare"}
    assert not reach(stage) & fenced
    assert {"judges", "scoring", "twins"} <= reach("metrics")  # the search does find what is there


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


def test_only_twins_draws_hidden_twins() -> None:
    """Who else draws natural pictures, and from which seeds: each is known, none reaches 4–6 M."""
    low, high = scenes.RANGES["validation"][0], scenes.RANGES["test"][1]
    drawing = {path.stem for path in PACKAGE.glob("*.py") if natural_calls(path)}
    assert "twins" in drawing
    # `draw` is the command `tomjerry scenes`, whose output no stage reads.
    others = drawing - {"twins", "draw"}
    # `rival_training` draws the foundation's own pictures, from the seeds of `PICTURES` below;
    # `screens_material` the zoo, for the probes, and training scenes to try them on.
    known = {"foundation", "rival_training", "screens_material", "sources", "collect", "workflow"}
    assert others <= known, others
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
    twins_of.cache_clear()
    images = drawn("cartoon")[:4]
    monkeypatch.setattr(scenes, "render_many", watched)
    seeds = [5_000_700, 5_000_703, 5_000_701, 5_000_702]
    metrics.score(images, seeds, references=REFERENCES, bootstrap=10)
    assert calls == [(style, tuple(seeds)) for style in ("natural", "cartoon")]
    twins_of.cache_clear()
