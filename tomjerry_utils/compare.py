"""Stage 06: the translator beside its rivals, on scenes that nobody trained on.

Every method gets the same held-out cartoons and nothing else: no class, no caption, no truth; what
it is told of a picture, our own models read off it. `metrics` scores all alike, and "two visually
optimal outcomes for each class", which the poster picked by eye, are picked by a stated rule and
shown beside random and worst ones.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import baselines, features, ldm, metrics, painting, scenes, scoring, transfer
from tomjerry_utils.images import add_grain, load_image, save_image
from tomjerry_utils.judges import Judges, load_judges
from tomjerry_utils.measures import kid, kid_draws, on_manifold, paired_bootstrap, recall_draws
from tomjerry_utils.picking import PICKS, SHORTLIST, attempt_file, noise_seed, pick, rule
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    Stage,
    atomic_path,
    foundation_root,
    hash_file,
    hash_obj,
    open_stage,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tomjerry_utils.translator import Translator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGE = "06_compare"
METHODS = ("ours", *baselines.METHODS)
TITLES = {"ours": "ours", **baselines.TITLES}
METRICS: dict[str, tuple[str, bool, int]] = {
    # key in `results` → heading, whether higher is better, digits after the point
    "class_accuracy": ("class\naccuracy", True, 3),
    "action_accuracy": ("action\naccuracy", True, 3),
    "mask_iou": ("mask IoU", True, 3),
    "pck": ("PCK@0.1", True, 3),
    "perceptual": ("perceptual\ndistance", False, 3),
    "kid": ("KID", False, 4),
}
# Also in `results`, but in no table: whether higher is better.
MORE = {"cartoon_share": False, "structure": False, "precision": True, "recall": True}


class Pictures(Mapping[str, np.ndarray]):
    """Method → its translations, uint8 (N, S, S, 3), read when they are asked for."""

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self._folder, self._seeds = folder, list(seeds)
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, method: str) -> np.ndarray:
        if method not in METHODS:
            raise KeyError(method)
        if method not in self._read:
            files = [self._folder / method / f"{seed}.png" for seed in self._seeds]
            self._read[method] = np.stack([load_image(file) for file in files])
        return self._read[method]

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


@dataclass(eq=False)
class CompareRun:
    """What stage 06 leaves.

    Attributes:
        folder: holds `<method>/<seed>.png`, which `tomjerry evaluate` scores alike.
        results: methods → metrics with intervals, paired differences, reference rows, the share in
            which a swapped class is drawn, seconds.
        pictures: method → (N, S, S, 3) uint8; "identity" are the cartoons themselves.
        scenes: N rows of seed, class, action, facing, place, the class as read and the caption.
        rows: a row for each method and scene: its scores.
        picks: rows of class, kind (best, random, worst), seed, attempt, score and its two parts.
    """

    folder: Path
    results: dict[str, Any]
    pictures: Pictures
    scenes: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    picks: list[dict[str, Any]]
    key: str

    def picked(self, row: Mapping[str, Any]) -> np.ndarray:
        """The picture of a pick."""
        if row["attempt"] == 0:
            return load_image(self.folder / "ours" / f"{row['seed']}.png")
        return load_image(attempt_file(self.folder, row["seed"], row["attempt"]))


def ensure(profile: Profile) -> CompareRun:
    """Stage 06 at this profile: read it if it is finished, else make it, upstream included."""
    before = transfer.ensure(profile)
    judges = sorted((foundation_root() / "judges").rglob("*.safetensors"))
    inputs = {"transfer": before.key, "judges": hash_obj([hash_file(file) for file in judges])}
    stage = open_stage(profile, STAGE, profile.compare, inputs, version=5)
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, before.translator)
    return load(stage.folder)


def load(folder: Path) -> CompareRun:
    """Read a finished stage 06."""
    known = read_jsonl(folder / "scenes.jsonl")
    return CompareRun(
        folder=folder,
        results=read_json(folder / "results.json"),
        pictures=Pictures(folder, [row["seed"] for row in known]),
        scenes=known,
        rows=read_jsonl(folder / "scores.jsonl"),
        picks=read_json(folder / "picks.json"),
        key=read_json(folder / "provenance.json")["key"],
    )


def held_out_seeds(count: int) -> list[int]:
    """The first test seeds, as many of each class: what a class has enough of is passed over."""
    return balanced_seeds(count, scenes.RANGES["test"][0])


def balanced_seeds(count: int, first: int) -> list[int]:
    """The first seeds from one on with as many scenes of each class."""
    classes = scenes.CLASSES
    wanted = {
        cls: count // len(classes) + (i < count % len(classes)) for i, cls in enumerate(classes)
    }
    seeds: list[int] = []
    seed = first
    while len(seeds) < count:
        cls = scenes.describe(seed).cls
        if wanted[cls]:
            wanted[cls] -= 1
            seeds.append(seed)
        seed += 1
    return seeds


# ---- translating -------------------------------------------------------------------------------


def _make(stage: Stage, profile: Profile, translator: Translator) -> None:
    """Translate by every method, score, pick; what a killed run had finished is not redone."""
    folder, options = stage.folder, profile.compare
    judges = load_judges()  # first of all: without them the rest would be in vain
    seeds = held_out_seeds(options.test_scenes)
    sources = scenes.render_many(seeds, "cartoon", profile.image_size)["image"]
    model = ldm.ensure(profile)
    lent = ldm.lend(model)
    done = {
        method: translate_all(method, folder, sources, seeds, profile, translator, lent)
        for method in METHODS
    }
    known = [
        {**_describe(seed), "read": read, "caption": caption}
        for seed, read, caption in zip(
            seeds, done["ours"].classes, done["ours"].captions, strict=True
        )
    ]
    write_jsonl(folder / "scenes.jsonl", known)
    results, rows, vectors = score_all(folder, seeds, judges=judges, bootstrap=options.bootstrap)
    # What the camera's grain does to the measures: the same pictures without it.
    smooth = folder / "work" / "smooth"
    translate_all("ours", smooth, sources, seeds, profile, replace(translator, grain=0.0), lent)
    results["without_grain"] = metrics.score(
        Pictures(smooth, seeds)["ours"], seeds, judges=judges, bootstrap=options.bootstrap
    )["metrics"]
    results["grain"] = translator.grain
    results["class_swap"] = scoring.class_swap(
        translator,
        sources,
        [row["class"] for row in known],
        seed=noise_seed(profile, 0, 0),
        judges=judges,
        bootstrap=options.bootstrap,
    )
    results["samples"] = _class_samples(model, profile, judges)
    results["seconds_per_picture"] = {m: round(done[m].seconds / len(seeds), 4) for m in METHODS}
    results["settings"] = {**options.model_dump(mode="json"), "size": profile.image_size}
    write_jsonl(folder / "scores.jsonl", rows)
    with atomic_path(folder / "features.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **vectors)  # type: ignore[arg-type]
    write_json(folder / "picks.json", pick(folder, known, sources, profile, translator))
    results["rule"] = rule(options.candidates)
    write_json(folder / "results.json", results)
    shutil.rmtree(folder / "work", ignore_errors=True)
    stage.finish(metrics={m: results["methods"][m]["metrics"] for m in METHODS})


def _class_samples(model: ldm.LdmRun, profile: Profile, judges: Judges) -> dict[str, Any]:
    """Stage 04's samples measured: staged and painted, and told the class alone."""
    count = max(1, profile.compare.test_scenes // len(scenes.CLASSES))
    many = profile.ldm.model_copy(update={"samples_per_class": count})
    painter = painting.painter(model.folder, profile)
    free = ldm.sample_classes(
        model.unet,
        model.conditioner,
        model.vae,
        model.natural,
        model.scheduler,
        profile.model_copy(update={"ldm": many}),
    )
    drawn = {
        "staged": painter.draw_all(count),
        # By the same camera, so that neither gains by its grain.
        "free": {
            label: add_grain(images, painter.grain, seed=profile.seed, numbers=range(count))
            if scenes.LABELS.index(label) >= len(scenes.CLASSES)
            else images
            for label, images in free.items()
        },
    }
    known = scoring.vectors(painting.pictures_of(model.natural, profile))
    return {
        name: scoring.class_samples(
            samples, known, judges=judges, bootstrap=profile.compare.bootstrap
        )
        for name, samples in drawn.items()
    }


def _describe(seed: int) -> dict[str, Any]:
    scene = scenes.describe(seed)
    named = {name: getattr(scene, name) for name in ("action", "facing", "place")}
    return {"seed": seed, "class": scene.cls, **named}


@dataclass
class Translated:
    """What one method did: the classes it drew, the captions it read (ours alone), its seconds."""

    classes: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    seconds: float = 0.0


def translate_all(
    method: str,
    folder: Path,
    sources: np.ndarray,
    seeds: Sequence[int],
    profile: Profile,
    translator: Translator,
    model: baselines.Model,
) -> Translated:
    """Write `<folder>/<method>/<seed>.png` for all sources, batch by batch.

    A batch counts as done once its note in `work/` is written, so a run killed at any moment goes
    on from the first batch without one. Noise depends on the profile's seed and the batch.
    """
    total, size = Translated(), profile.compare.batch_size
    for start in progress(range(0, len(seeds), size), f"06 {method}"):
        note = folder / "work" / f"{method}-{start:06d}.json"
        if not note.is_file():
            part = sources[start : start + size]
            noise = noise_seed(profile, 0, start)
            began = time.monotonic()
            if method == "ours":
                made = translator.translate(part, None, seed=noise, batch_size=size)
                images, classes, captions = made.images, made.classes, made.captions
            else:
                images, classes = baselines.run(
                    method,
                    translator,
                    part,
                    [None] * len(part),
                    seed=noise,
                    strength=profile.compare.sdedit_strength,
                    model=model,
                )
                captions = []
            seconds = time.monotonic() - began
            for seed, image in zip(seeds[start : start + size], images, strict=True):
                save_image(folder / method / f"{seed}.png", image)
            write_json(note, {"classes": classes, "captions": captions, "seconds": seconds})
        written = read_json(note)
        total.classes += written["classes"]
        total.captions += written["captions"]
        total.seconds += written["seconds"]
    return total


# ---- scoring -----------------------------------------------------------------------------------


def score_all(
    folder: Path,
    seeds: Sequence[int],
    *,
    judges: Judges,
    bootstrap: int,
    references: int = metrics.REFERENCES,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, np.ndarray]]:
    """Score every method's folder as `tomjerry evaluate` does, and pair ours with each rival.

    Args:
        seeds: of the scenes, in ascending order, as `tomjerry evaluate` takes them.
        bootstrap: samples of an interval.
        references: held-out natural scenes for KID.

    Returns:
        results (see :class:`CompareRun`), the scores of each method and scene, and method → the
        features (N, 1280) that KID compares.
    """
    pictures = Pictures(folder, seeds)
    found = {}
    for method in progress(METHODS, "06 scores"):
        found[method] = metrics.score(
            pictures[method], seeds, judges=judges, references=references, bootstrap=bootstrap
        )
    rows = [
        {"method": method, "seed": seed, "answer": scored["answers"][i]}
        | {name: _number(values[i]) for name, values in scored["each"].items()}
        for method, scored in found.items()
        for i, seed in enumerate(seeds)
    ]
    results = {
        "schema": 1,
        "n": len(seeds),
        "features": features.NAME,
        "methods": {
            method: {"metrics": scored["metrics"], "by_class": scored["by_class"]}
            for method, scored in found.items()
        },
        "rows": metrics.rows(seeds, judges=judges, references=references, bootstrap=bootstrap),
        "differences": {
            rival: _differences(found["ours"], found[rival], references, bootstrap)
            for rival in baselines.METHODS
        },
    }
    return results, rows, {method: scored["features"] for method, scored in found.items()}


def _differences(
    ours: Mapping[str, Any], rival: Mapping[str, Any], references: int, bootstrap: int
) -> dict[str, dict[str, Any]]:
    """Ours minus a rival's, scene by scene, with intervals and what they say."""
    out = {
        name: paired_bootstrap(ours["each"][name], rival["each"][name], samples=bootstrap)
        for name in ours["each"]
    }
    real, _ = metrics.reference(references)
    draws = [kid_draws(scored["features"], real, samples=bootstrap) for scored in (ours, rival)]
    out["kid"] = {
        "difference": kid(ours["features"], real) - kid(rival["features"], real),
        "ci95": np.percentile(draws[0] - draws[1], [2.5, 97.5]).tolist(),
        "n": len(ours["features"]),
    }
    sets = [scored["features"] for scored in (ours, rival)]
    recalls = [recall_draws(vectors, real, samples=bootstrap) for vectors in sets]
    covered = [float(on_manifold(real, vectors).mean()) for vectors in sets]
    out["recall"] = {
        "difference": covered[0] - covered[1],
        "ci95": np.nanpercentile(recalls[0] - recalls[1], [2.5, 97.5]).tolist(),
        "n": len(ours["features"]),
    }
    return {name: row | {"verdict": verdict(name, row["ci95"])} for name, row in out.items()}


def verdict(metric: str, ci95: Sequence[float]) -> str:
    """What the interval of a difference ours − rival says: better, worse or undecided."""
    low, high = ci95
    if low <= 0 <= high:
        return "undecided"
    higher = METRICS[metric][1] if metric in METRICS else MORE[metric]
    return "better" if (low > 0) == higher else "worse"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


# ---- figures -----------------------------------------------------------------------------------


def comparison_figure(run: CompareRun, *, cell: float = 1.25) -> Figure:
    """The poster's comparison: a row for each pick, a column for each method.

    On the left the two best outcomes of each class beside the rivals' pictures of the same scenes;
    on the right, so that nobody is misled, two random and the two worst ones.

    Args:
        cell: side of a picture in inches.
    """
    from tomjerry_utils.canvas import BLUE, INK, MUTED, blank, place, wrap

    where = {row["seed"]: i for i, row in enumerate(run.scenes)}
    blocks: dict[str, tuple[str, ...]] = {
        "best": ("identity", "colour", "sdedit", "ours"),
        "random": ("identity", "ours"),
        "worst": ("identity", "ours"),
    }
    titles = {"best": "two best outcomes", "random": "two at random", "worst": "two worst"}
    heads = {**TITLES, "identity": "cartoon"}
    classes = [c for c in scenes.CLASSES if any(row["class"] == c for row in run.picks)]
    gap, apart, side, head, foot = 0.06, 0.3, 1.15, 0.66, 0.5
    step = cell + gap
    left = [side + i * (2 * step + apart) + (2 * step if i else 0) for i in range(3)]
    width = left[2] + 2 * step - gap
    height = head + len(classes) * (PICKS * step + apart) - apart + foot
    fig, canvas = blank(width, height)
    for x, (kind, methods) in zip(left, blocks.items(), strict=True):
        canvas.text(x, height - 0.04, titles[kind], fontsize=13, weight="bold", va="top", color=INK)
        for column, method in enumerate(methods):
            at = x + column * step + cell / 2
            weight = "bold" if method == "ours" else "normal"
            color = BLUE if method == "ours" else MUTED
            y = height - head + 0.1
            canvas.text(at, y, heads[method], ha="center", weight=weight, color=color)
    for number, cls in enumerate(classes):
        top = height - head - number * (PICKS * step + apart)
        middle = top - PICKS * step / 2
        said = _MEANING[cls]
        canvas.text(0, middle, said, fontsize=12, va="center", color=INK, linespacing=1.35)
        for x, (kind, methods) in zip(left, blocks.items(), strict=True):
            rows = [r for r in run.picks if r["class"] == cls and r["kind"] == kind]
            for line, row in enumerate(rows):
                y = top - (line + 1) * step + gap
                for column, method in enumerate(methods):
                    ours = method == "ours"
                    image = run.picked(row) if ours else run.pictures[method][where[row["seed"]]]
                    frame = BLUE if ours and kind == "best" else None
                    place(canvas, image, x + column * step, y, cell, frame)
    candidates = run.results["settings"]["candidates"]
    note = (
        f"Held-out scenes. Picked without any judge, by BLIP similarity and by the silhouettes' "
        f"overlap with the bodies that were asked for; of each class's {SHORTLIST} most promising "
        f"scenes of different actions, the best of {candidates} tries. Random and worst ones are "
        "first tries."
    )
    canvas.text(0, 0.02, wrap(note, width, 9), fontsize=9, color=MUTED, linespacing=1.3)
    return fig


_MEANING = {
    "tom": "Tom → cat",
    "jerry": "Jerry →\nmouse",
    "both": "Tom and\nJerry → cat\nand mouse",
}


def metrics_table_figure(run: CompareRun | Mapping[str, Any]) -> Figure:
    """The table of methods and metrics, each value over its 95 % interval, the best in colour.

    Args:
        run: a run, or a table of the same form such as `study.results("compare")`.
    """
    from tomjerry_utils.canvas import BLUE, FAINT, INK, MUTED, blank

    table = run.results if isinstance(run, CompareRun) else run
    lines = [(TITLES[m], table["methods"][m]["metrics"], True) for m in METHODS]
    lines += [
        (name, row, False) for name, row in table.get("rows", {}).items() if name != "identity"
    ]
    side, column, line, head, foot = 1.75, 1.22, 0.47, 0.58, 0.4
    width, height = side + column * len(METRICS), head + line * len(lines) + foot
    fig, canvas = blank(width, height)
    for number, (key, (title, higher, digits)) in enumerate(METRICS.items()):
        x = side + (number + 0.5) * column
        arrow = "↑" if higher else "↓"
        canvas.text(x, height - head + 0.1, f"{title} {arrow}", ha="center", color=MUTED)
        values = [row[key]["value"] for _, row, rival in lines if rival and row.get(key)]
        best = (max if higher else min)(values) if values else None
        for place, (_, row, rival) in enumerate(lines):
            if not (found := row.get(key)):
                continue
            y = height - head - (place + 0.5) * line
            wins = rival and found["value"] == best
            canvas.text(
                x, y + 0.015, f"{found['value']:.{digits}f}", ha="center", fontsize=12,
                weight="bold" if wins else "normal",
                color=BLUE if wins else INK if rival else MUTED,
            )  # fmt: skip
            if found.get("ci95"):
                low, high = found["ci95"]
                text = f"{low:.{digits}f} – {high:.{digits}f}"
                canvas.text(x, y - 0.03, text, ha="center", va="top", fontsize=7.5, color=MUTED)
    for place, (name, _, rival) in enumerate(lines):
        y = height - head - place * line
        # A darker line where the methods end and the rows to read them by begin.
        edge = place in (0, len(METHODS))
        canvas.plot([0, width], [y, y], color=MUTED if edge else FAINT, linewidth=0.9)
        weight = "bold" if name == "ours" else "normal"
        color = INK if rival else MUTED
        canvas.text(0, y - line / 2, name, va="center", fontsize=12, weight=weight, color=color)
    note = f"{table['n']} held-out scenes against their hidden twins; 95 % intervals. "
    note += f"Features of KID and distance: {table['features']}."
    canvas.text(0, 0.02, note, fontsize=9, color=MUTED)
    return fig
