"""What takes hours: the course's stages 04 to 06 and their ablation over several training seeds.

`tomjerry study` writes `results/compare.json`, `results/ablation.json` and `results/rivals.json`,
which the repository carries; the notebooks read them, say their date, and check that what they
train live falls within.
Each training seed has a run of its own (`runs/<profile>-seed<k>`), whose stages resume by
themselves: a study that was killed goes on with the same command. The two longest go on without
their runs too: what the tables need of each finished part of `ablation` and `contest` stays in
`results/ablation/` and `results/rivals/`, small enough to be committed, and the tables say which
parts are missing.

What one finished course measured is kept too, in `results/<profile>/course.json`, so that its
figures can be drawn where its run is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError, ablation, baselines
from tomjerry_utils.kept_parts import results_folder
from tomjerry_utils.pooling import over_seeds, pooled_row, two_level
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    PROVENANCE,
    environment,
    log,
    project_root,
    read_json,
    read_jsonl,
    run_root,
    write_json,
)

TRAINING_SEEDS = 3
PROBES = ablation.PROBES


def run_study(profile: Profile, names: Sequence[str] | None = None) -> list[Path]:
    """Run studies and write their results, the ablation's after each training seed.

    Args:
        profile: the first training seed is its own; its run is shared with the course.
        names: of :data:`STUDIES`; None for all.

    Returns:
        The files: in `results/` at the default profile, which is the one that the repository
        carries; in the profile's own run folder otherwise.

    Raises:
        UserError: an unknown name.
    """
    for name in names or ():
        if name not in STUDIES:
            raise UserError(f"no study '{name}': choose from {', '.join(STUDIES)}")
    written = []
    for name in names or STUDIES:
        variants = training_seeds(profile)
        log(f"study {name}: training seeds {', '.join(str(v.seed) for v in variants)}")
        for table in STUDIES[name](variants):
            path = _write(name, variants, table)
        written.append(path)
    return written


def _write(name: str, variants: Sequence[Profile], table: Mapping[str, Any]) -> Path:
    profile = variants[0]
    record = {
        "schema": 1,
        "study": name,
        "date": time.strftime("%Y-%m-%d"),
        "profile": profile.name,
        "seeds": [variant.seed for variant in variants],
        **table,
        "seconds": {str(variant.seed): stage_seconds(variant) for variant in variants},
        "settings": profile.model_dump(mode="json"),
        **environment(),
    }
    return write_json(results_folder(profile) / f"{name}.json", record)


def results(name: str) -> dict[str, Any] | None:
    """A study's committed results, or None where there are none."""
    path = project_root() / "results" / f"{name}.json"
    return read_json(path) if path.is_file() else None


def training_seeds(profile: Profile, count: int = TRAINING_SEEDS) -> list[Profile]:
    """The profile itself, and copies with the next seeds and runs of their own."""
    others = range(profile.seed + 1, profile.seed + count)
    return [
        profile,
        *(
            profile.model_copy(update={"seed": seed, "name": f"{profile.name}-seed{seed}"})
            for seed in others
        ),
    ]


def stage_seconds(profile: Profile) -> dict[str, float]:
    """Seconds that each finished stage of a run took."""
    found = sorted(run_root(profile).glob(f"[0-9][0-9]_*/{PROVENANCE}"))
    return {path.parent.name: read_json(path)["seconds"] for path in found}


# ---- the comparison ----------------------------------------------------------------------------


def compare_seeds(variants: Sequence[Profile]) -> dict[str, Any]:
    """Stage 06 of every training seed, and one table over seeds and scenes.

    Returns:
        methods, rows and differences as in stage 06's results, each value the mean over the
        seeds, with `by_seed`, `ci95` (seeds and scenes drawn anew) and `one_run95`.
    """
    from tomjerry_utils import compare, metrics
    from tomjerry_utils.measures import kid_draws

    runs = [compare.ensure(variant) for variant in variants]
    first = runs[0].results
    samples = first["settings"]["bootstrap"]
    real, _ = metrics.reference()
    each = {method: _by_scene(runs, method) for method in compare.METHODS}
    draws = {}
    for method in compare.METHODS:
        vectors = [np.load(run.folder / "features.npz")[method] for run in runs]
        draws[method] = np.stack([kid_draws(v, real, samples=samples) for v in vectors])
    methods: dict[str, Any] = {}
    differences: dict[str, dict[str, Any]] = {}
    for method in compare.METHODS:
        table = {name: two_level(each[method][name], samples) for name in each[method]}
        table["kid"] = over_seeds(draws[method])
        methods[method] = {
            "metrics": {
                name: pooled_row(
                    [run.results["methods"][method]["metrics"][name] for run in runs], drawn
                )
                for name, drawn in table.items()
            }
        }
    for rival in baselines.METHODS:
        table = {
            name: two_level(each["ours"][name] - each[rival][name], samples)
            for name in each["ours"]
        }
        table["kid"] = over_seeds(draws["ours"] - draws[rival])
        differences[rival] = {}
        for name, drawn in table.items():
            found = [run.results["differences"][rival][name] for run in runs]
            row = pooled_row(found, drawn, key="difference")
            differences[rival][name] = row | {"verdict": compare.verdict(name, row["ci95"])}
    return {
        "n": first["n"],
        "features": first["features"],
        "methods": methods,
        "rows": first["rows"],
        "differences": differences,
        "seconds_per_picture": {
            method: [run.results["seconds_per_picture"][method] for run in runs]
            for method in compare.METHODS
        },
    }


def _by_scene(runs: Sequence[Any], method: str) -> dict[str, np.ndarray]:
    """metric → (seeds, scenes), NaN where it does not apply."""
    rows = [[row for row in run.rows if row["method"] == method] for run in runs]
    names = [name for name in rows[0][0] if name not in ("method", "seed", "answer")]
    return {
        name: np.array([[np.nan if r[name] is None else r[name] for r in run] for run in rows])
        for name in names
    }


# ---- the rivals --------------------------------------------------------------------------------


def rival_seeds(variants: Sequence[Profile]) -> dict[str, Any]:
    """Ours and every rival on equal terms: see :mod:`contest`.

    Its results are written after each part from which on they say anything, and its parts kept.
    """
    from tomjerry_utils import contest

    folder = results_folder(variants[0]) / "rivals"
    return contest.run(variants, folder, write=partial(_write, "rivals", variants))


# Each gives its table, and may give those of its first training seeds on the way.
STUDIES: dict[str, Callable[[Sequence[Profile]], Iterable[dict[str, Any]]]] = {
    "compare": lambda variants: [compare_seeds(variants)],
    "ablation": ablation.ablate_seeds,
    "rivals": lambda variants: [rival_seeds(variants)],
}


# ---- one course --------------------------------------------------------------------------------


def keep_results(profile: Profile) -> Path | None:
    """Keep a finished course's numbers as `results/<profile>/course.json`; None without a run."""
    from tomjerry_utils import kept_figures

    folder = run_root(profile)
    parts = {
        "compare": folder / "06_compare" / "results.json",
        "ablation": folder / "05_transfer" / "ablation.json",
        "04 denoiser": folder / "04_ldm" / "denoiser_training" / "history.jsonl",
        "05 translator": folder / "05_transfer" / "training" / "history.jsonl",
    }
    later = {name: folder / place for name, place in kept_figures.PLACES.items()}
    record = folder / "06_compare" / PROVENANCE
    if not record.is_file() or not all(path.is_file() for path in parts.values()):
        return None
    found = {
        name: read_json(path) if path.suffix == ".json" else read_jsonl(path)
        for name, path in {**parts, **later}.items()
        if path.is_file()
    }
    made = read_json(record)
    target = project_root() / "results" / profile.name / "course.json"
    write_json(
        target,
        {
            "profile": profile.name,
            "seed": profile.seed,
            "date": made["started"][:10],
            "device": made["device"],
            "key": made["key"],
            **found,
        },
    )
    return target


def _draw_course(table: Mapping[str, Any], root: Path) -> list[Path]:
    from tomjerry_utils import compare, figures, kept_figures

    methods = table["compare"]["methods"]
    overlap = {
        compare.TITLES[name]: (
            row["metrics"]["mask_iou"]["value"],
            *row["metrics"]["mask_iou"]["ci95"],
        )
        for name, row in methods.items()
    }
    drawings = {
        "metrics_table": (
            compare.metrics_table_figure(table["compare"]),
            "Table of six measures for ours, identity, colour transfer and SDEdit, with 95 % "
            "intervals, and below the reference rows floor, autoencoder and ceiling.",
        ),
        "mask_iou": (
            figures.intervals(
                overlap,
                label="mask IoU with the hidden twin, higher is better",
                highlight=[compare.TITLES["ours"]],
            ),
            "Mask overlap with the hidden twin for each method, with its 95 % interval.",
        ),
        "training": (
            figures.curve(
                {name: table[name] for name in ("04 denoiser", "05 translator")},
                y_label="weighted loss",
            ),
            "The losses of stage 04's denoiser and of stage 05's translator over their steps.",
        ),
    }
    drawings |= kept_figures.drawings(table)
    return [
        figures.save_figure(
            figure, f"results_{name}", alt=alt, run=root, show=False,
            extra={"date": table["date"], "profile": table["profile"], "key": table["key"]},
        ).with_suffix(".pdf")
        for name, (figure, alt) in drawings.items()
    ]  # fmt: skip


# ---- figures -----------------------------------------------------------------------------------


def draw_results(folder: Path) -> list[Path]:
    """Draw what committed results hold, without a run: `figures/{results,study}_*.pdf`."""
    drawn = []
    for path in sorted(folder.glob("*/course.json")):
        drawn += _draw_course(read_json(path), folder.parent)
    return drawn + draw_studies(folder)


def draw_studies(folder: Path) -> list[Path]:
    """Draw what the committed studies hold: `figures/study_*.pdf`."""
    from tomjerry_utils import compare, kept_figures
    from tomjerry_utils.figures import save_figure

    root = folder.parent
    drawn = []
    if (folder / "compare.json").is_file():
        table = read_json(folder / "compare.json")
        path = save_figure(
            compare.metrics_table_figure(table), "study_comparison", run=root,
            alt=f"Table of methods and metrics over {len(table['seeds'])} training seeds: ours "
            "against identity, colour transfer and SDEdit, with 95 % intervals.",
            extra={"date": table["date"], "seeds": table["seeds"]}, show=False,
        )  # fmt: skip
        drawn.append(path.with_suffix(".pdf"))
    if (folder / "rivals.json").is_file():
        table = read_json(folder / "rivals.json")
        drawn += [
            save_figure(
                figure, f"study_{name}", alt=alt, run=root, show=False,
                extra={"date": table["date"], "seeds": table["seeds"]},
            ).with_suffix(".pdf")
            for name, (figure, alt) in kept_figures.rivals_drawings(table).items()
        ]  # fmt: skip
    if (folder / "ablation.json").is_file():
        table = read_json(folder / "ablation.json")
        drawn += [
            save_figure(
                figure, f"study_{name}", alt=alt, run=root, show=False,
                extra={"date": table["date"], "seeds": table["seeds"]},
            ).with_suffix(".pdf")
            for name, (figure, alt) in ablation.drawings(table).items()
        ]  # fmt: skip
    return drawn
