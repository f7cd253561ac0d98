"""The study "ablation": what each part of the method, its weight and its guidance bring.

`ablation_rows` trains and probes; here the rows of all training seeds become one table. Each row of
each seed is kept in `results/ablation`, so the study can be done in several sittings and on several
machines, and a table be made where nothing has run.

Beside each probe stand its chance, what it reads off a translation set against another cartoon of
the same class, and its oracle, what it reads off the cartoons' hidden natural twins: more nobody
can show. The twins are seen here alone, for this one line, and no row depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import transfer, tuning
from tomjerry_utils.ablation_rows import (
    PROBES,
    SCORES,
    VERSION,
    WHOLE,
    Point,
    Start,
    cartoon_seeds,
    facts,
    guided,
    make,
    origin,
    own_point,
    read,
    rows,
    slug,
    weighted,
)
from tomjerry_utils.images import resize
from tomjerry_utils.kept_parts import Part, kept, results_folder
from tomjerry_utils.pooling import one_run
from tomjerry_utils.profiles import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "ablation"  # of the kept parts, in the studies' results
CATCH = "independent source"  # λ = 0 and a source that nothing ties to the picture
# Rows that are the whole method with guidance turned on: name → what is turned on.
GUIDED = {
    "+ guidance": {"guidance_scale": 2.0},
    "+ BLIP guidance": {"blip_guidance": 1.0},
}
ORACLE, COURSE = "oracle", "course"  # the parts of a seed that are no row: names of their files
TERMS = {
    "chance": "a translation set against a cartoon drawn from those of the same class",
    "oracle": "the cartoons' hidden natural twins in place of translations",
    "above_chance": "value - chance",
    "of_oracle": "value / oracle",
    "from_chance": "(value - chance) / (oracle - chance)",
}
LABELS = {
    "action": "action kept",
    "facing": "direction kept",
    "silhouette_iou": "silhouettes' overlap with the source",
    "realism": "realism",
    "faithfulness": "faithfulness",
}


def ablate_seeds(variants: Sequence[Profile]) -> Iterator[dict[str, Any]]:
    """All rows of the first training seed, then of the next; a table after each seed.

    Args:
        variants: the training seeds' profiles; the first one's results hold the kept parts.

    Yields:
        seeds: covered so far; missing: parts of the others that nobody has made yet; n: cartoons;
        terms, criterion: in words; `rows`: as the course trains them, few steps; `full`: as long
        as the translator itself, and with guidance; `sweeps`: of the BLIP weight and of either
        guidance, each a row for each setting; oracle: probe → value, ci95, by_seed;
        trained_seconds: seed → row → seconds.

        A row has steps, n and, for each probe, value, ci95, one_run95, by_seed, chance, and
        :data:`TERMS` with value, ci95 and by_seed, None where an oracle is not above its chance;
        for each of `SCORES`, value, ci95 (of the seeds alone, None for one) and by_seed.
    """
    done: list[_Seed] = []
    for i, variant in enumerate(variants):
        done.append(_seed(variant, variants[0]))
        later = [(other, name) for other in variants[i + 1 :] for name in _parts(other)]
        missing = [
            f"{name}-seed{other.seed}"
            for other, name in later
            if not Path(f"{_path(variants[0], other, name)}.json").is_file()
        ]
        yield _table(done) | {"missing": missing}


@dataclass(eq=False)
class _Seed:
    """A training seed's kept parts: name → record and arrays."""

    profile: Profile
    parts: dict[str, Part]

    def point(self, name: str, point: Point) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Value and chance, (probes, pictures), and the scores of a row under a guidance."""
        index = rows(self.profile)[name].points.index(point)
        record, arrays = self.parts[name]
        return {part: arrays[part][index] for part in arrays}, record["scores"][index]


def _parts(profile: Profile) -> list[str]:
    """A seed's parts in the order in which they are made."""
    return [ORACLE, *rows(profile), COURSE]


def _path(first: Profile, variant: Profile, name: str) -> Path:
    return results_folder(first) / FOLDER / f"{slug(name)}-seed{variant.seed}"


def _seed(variant: Profile, first: Profile) -> _Seed:
    start, parts = Start(variant), {}
    for name in _parts(variant):
        if name == ORACLE:
            known, makes = origin(variant), partial(_oracle, start)
        elif name == COURSE:
            whole = variant.transfer.named()
            known, makes = {**origin(variant), "whole": whole}, partial(_course, variant)
        else:
            known, makes = facts(variant, name), partial(make, start, name)
        parts[name] = kept(_path(first, variant, name), known, makes)
    return _Seed(variant, parts)


def _course(variant: Profile) -> Part:
    """The few steps' rows that stage 05 of a run has trained."""
    return {"rows": transfer.ensure(variant).ablation}, {}


def _oracle(start: Start) -> Part:
    """What the probes read off the hidden twins, as the natural camera takes them."""
    from tomjerry_utils.twins import twins_of, with_noise

    drawn = with_noise(twins_of(tuple(cartoon_seeds(start.profile))).images, 0)
    return {}, read(start, np.stack([resize(x, start.profile.image_size) for x in drawn]))


# ---- the table ---------------------------------------------------------------------------------


def _table(seeds: Sequence[_Seed]) -> dict[str, Any]:
    profile = seeds[0].profile
    own = own_point(profile)
    full = {name: _row(seeds, name, own) for name in rows(profile)}
    for name, more in GUIDED.items():
        full[name] = _row(seeds, WHOLE, {**own, **more})
    by_weight = weighted(profile)
    sweeps: dict[str, list[dict[str, Any]]] = {
        "blip_weight": [{"setting": w, "row": row, **full[row]} for w, row in by_weight.items()]
    }
    for knob, other in (("guidance_scale", "blip_guidance"), ("blip_guidance", "guidance_scale")):
        swept = sorted(point[knob] for point in guided(profile) if point[other] == own[other])
        sweeps[knob] = [
            {"setting": value, "row": WHOLE, **_row(seeds, WHOLE, {**own, knob: value})}
            for value in swept
        ]
    in_sweep = set(by_weight.values()) - set(transfer.ABLATION)
    best = np.stack([seed.parts[ORACLE][1]["value"] for seed in seeds])
    return {
        "seeds": [seed.profile.seed for seed in seeds],
        "n": best.shape[-1],
        "version": VERSION,
        "terms": TERMS,
        "criterion": tuning.RULE,
        "rows": ablation_table([seed.parts[COURSE][0]["rows"] for seed in seeds]),
        "full": {name: row for name, row in full.items() if name not in in_sweep},
        "sweeps": sweeps,
        "oracle": {
            probe: _share(best[:, i], np.ones_like(best[:, i])) for i, probe in enumerate(PROBES)
        },
        "trained_seconds": {
            str(seed.profile.seed): {name: seed.parts[name][0]["seconds"] for name in rows(profile)}
            for seed in seeds
        },
    }


def _row(seeds: Sequence[_Seed], name: str, point: Point) -> dict[str, Any]:
    """One line of the table: a row under a guidance, over training seeds."""
    found = [seed.point(name, point) for seed in seeds]
    value, chance = (
        np.stack([arrays[part] for arrays, _ in found]) for part in ("value", "chance")
    )
    best = np.stack([seed.parts[ORACLE][1]["value"] for seed in seeds])
    plain = [
        {
            "row": name,
            "steps": seed.parts[name][0]["steps"],
            "n": value.shape[-1],
            **dict(zip(PROBES, each.mean(-1).tolist(), strict=True)),
        }
        for seed, each in zip(seeds, value, strict=True)
    ]
    row: dict[str, Any] = ablation_table([[each] for each in plain])[name]
    for i, probe in enumerate(PROBES):
        v, c, o = value[:, i], chance[:, i], best[:, i]
        row[probe] |= {
            "chance": float(c.mean()),
            "above_chance": _share(v - c, np.ones_like(v)),
            "of_oracle": _share(v, o),
            "from_chance": _share(v - c, o - c),
        }
    for score in SCORES:
        values = [float(scores[score]) for _, scores in found]
        ends = _interval(values, 0.0) if len(values) > 1 else None
        row[score] = {"value": float(np.mean(values)), "ci95": ends, "by_seed": values}
    return row


def ablation_table(tables: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean and intervals of the same ablation rows over training seeds.

    `ci95` is of the mean over seeds: the spread of the seeds, and that of the few pictures.
    """
    out: dict[str, Any] = {}
    for same in zip(*tables, strict=True):
        found: dict[str, Any] = {"steps": same[0]["steps"], "n": same[0]["n"]}
        for probe in PROBES:
            values = [float(row[probe]) for row in same]
            mean = float(np.mean(values))
            # All probes lie in [0, 1], where p(1 − p) bounds a picture's variance.
            low, high = _interval(values, math.sqrt(mean * (1 - mean) / same[0]["n"]))
            found[probe] = {
                "value": mean,
                "ci95": [max(0.0, low), min(1.0, high)],
                "one_run95": one_run(values),
                "by_seed": values,
            }
        out[same[0]["row"]] = found
    return out


def _share(part: np.ndarray, whole: np.ndarray) -> dict[str, Any] | None:
    """Mean of `part` over mean of `whole`, both (seeds, pictures), or None for a whole of nothing.

    The pictures are the same for all seeds: each pulls at the ratios of all of them at once.
    """
    over = whole.mean(1)
    if not (over > 0).all():
        return None
    ratios = part.mean(1) / over
    pulls = ((part - ratios[:, None] * whole) / over[:, None]).mean(0)
    values = ratios.tolist()
    return {
        "value": float(np.mean(values)),
        "ci95": _interval(values, float(pulls.std()) / math.sqrt(len(pulls))),
        "by_seed": values,
    }


def _interval(values: Sequence[float], pictures: float) -> list[float]:
    """Of the mean over seeds: from their spread, and the standard error of the pictures."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    seeds = np.var(values, ddof=1) / count if count > 1 else 0.0
    factor = float(t.ppf(0.975, count - 1)) if count > 1 else 0.0
    reach = math.sqrt(factor**2 * seeds + 1.96**2 * pictures**2)
    return [mean - reach, mean + reach]


# ---- figures -----------------------------------------------------------------------------------


def drawings(table: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures of the study's results: name → figure, alt text."""
    found = {
        f"ablation_{probe}": (
            ablation_figure(table, probe),
            f"Ablation: {LABELS[probe]} for each row, from no source at all to the whole method "
            "with guidance, with 95 % intervals over training seeds; chance and oracle are marked.",
        )
        for probe in PROBES
    }
    found["ablation_sweeps"] = (
        sweeps_figure(table),
        "Three sweeps of the whole method: probes, realism and faithfulness over the weight of the "
        "BLIP term, the scale of classifier-free guidance, and the strength of BLIP guidance.",
    )
    return found


def ablation_figure(table: Mapping[str, Any], probe: str = "action") -> Figure:
    """One probe of the study for each row, with its interval, between chance and oracle.

    Args:
        table: from `study.results("ablation")`.
        probe: of :data:`PROBES`.
    """
    from tomjerry_utils.figures import intervals

    full = table["full"]
    steps = full[WHOLE]["steps"]
    return intervals(
        {name: (row[probe]["value"], *row[probe]["ci95"]) for name, row in full.items()},
        label=f"{LABELS[probe]}, higher is better ({steps} steps a row)",
        highlight=[WHOLE],
        bands={"chance": full[CATCH][probe]["chance"], "oracle": table["oracle"][probe]["value"]},
    )


def sweeps_figure(table: Mapping[str, Any]) -> Figure:
    """Probes, realism and faithfulness over each of the three knobs, the profile's own in bold.

    Args:
        table: from `study.results("ablation")`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from tomjerry_utils.canvas import COLORS, MUTED
    from tomjerry_utils.canvas import style as plain

    titles = {
        "blip_weight": "weight λ of the BLIP term",
        "guidance_scale": "classifier-free guidance",
        "blip_guidance": "BLIP guidance",
    }
    with mpl.rc_context(plain()):
        fig = Figure(figsize=(10.5, 3.8), layout="constrained")
        for axes, (knob, title) in zip(
            fig.subplots(1, 3, sharey=True), titles.items(), strict=True
        ):
            swept = table["sweeps"][knob]
            for i, (name, label) in enumerate(LABELS.items()):
                # Side by side, so that intervals do not hide each other.
                places = np.arange(len(swept)) + 0.06 * (i - 2)
                values = [row[name]["value"] for row in swept]
                ends = [row[name]["ci95"] or [row[name]["value"]] * 2 for row in swept]
                axes.errorbar(
                    places, values, yerr=np.abs(np.array(ends).T - values), color=COLORS[i],
                    marker="osD^v"[i], markersize=6, linewidth=1.8, elinewidth=1.1, label=label,
                )  # fmt: skip
            own = table["settings"]["transfer"][knob]
            names = [f"{row['setting']:g}" for row in swept]
            axes.set_xticks(range(len(swept)), names)
            for text, row in zip(axes.get_xticklabels(), swept, strict=True):
                text.set_fontweight("bold" if row["setting"] == own else "normal")
            axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        fig.axes[0].set_ylabel("higher is better", color=MUTED)
    return fig
