"""Ways from noise to a picture: diffusers' samplers on the schedule that the denoiser learnt.

All four visit the same few times of the same schedule and differ in what they do between them:
"ddpm" draws fresh noise at each step (Ho et al. 2020), "ddim" goes straight on (Song et al. 2021),
"dpm-solver++" and "unipc" also use how the last prediction differed from the one before (Lu et al.
2022, Zhao et al. 2023). `benchmarks/samplers.py` measures what each is worth; the functions here
show its results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomjerry_utils import UserError
from tomjerry_utils.runs import project_root, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "dpm-solver++": "DPM-Solver++", "unipc": "UniPC"}
SAMPLERS = tuple(TITLES)
RESULTS = Path("results") / "samplers.json"


def make_sampler(name: str, scheduler: Any) -> Any:
    """A sampler on a training scheduler's own schedule, for `sampling.sample` and the translator.

    Where the schedule ends in pure noise (`rescale_betas_zero_snr`), α = 0 and log SNR = −∞ there.
    DDPM and DDIM take that as it is; for the other two diffusers puts 2⁻²⁴ in place of the last α²,
    so that their first step, which is of first order, is DDIM's. Their last step goes to σ = 0,
    where log SNR = +∞: it has to be of first order, too, and UniPC must measure steps as "bh2",
    since "bh1" is not a number there.

    Args:
        name: one of `SAMPLERS`.
        scheduler: a diffusers scheduler, such as `denoiser.make_scheduler` gives; not changed.

    Raises:
        UserError: no such sampler.
    """
    import diffusers

    options: dict[str, Any] = {}
    higher = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
    match name:
        case "ddpm":
            kind = diffusers.DDPMScheduler
            options = {"variance_type": "fixed_small"}
        case "ddim":
            kind = diffusers.DDIMScheduler
        case "dpm-solver++":
            kind = diffusers.DPMSolverMultistepScheduler
            options = higher | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
        case "unipc":
            kind = diffusers.UniPCMultistepScheduler
            options = higher | {"predict_x0": True, "solver_type": "bh2"}
        case _:
            raise UserError(f"no sampler '{name}': choose from {', '.join(SAMPLERS)}")
    return kind.from_config(scheduler.config, **options)


# ---- what the benchmark found ------------------------------------------------------------------


def load_results(path: Path | None = None) -> dict[str, Any]:
    """What `benchmarks/samplers.py` wrote: settings, date, machine and points.

    Raises:
        UserError: it has not been run.
    """
    path = path or project_root() / RESULTS
    if not path.is_file():
        raise UserError(f"no {path}: `python benchmarks/samplers.py` measures and writes it")
    return read_json(path)


def few_against_many(
    results: Mapping[str, Any], *, few: int = 10, many: int = 50
) -> list[dict[str, Any]]:
    """Each sampler's points of at most `few` steps beside its own point of `many`.

    Returns:
        Rows of sampler, steps, kid and iou (whether they are no worse than the interval of `many`
        steps allows) and how many times faster denoising and the whole way are.
    """
    rows = []
    points = results["points"]
    long = {point["sampler"]: point for point in points if point["steps"] == many}
    for point in points:
        if point["steps"] > few or point["sampler"] not in long:
            continue
        full = long[point["sampler"]]
        kid, iou = point["metrics"]["kid"], point["metrics"]["mask_iou"]
        rows.append(
            {
                "sampler": point["sampler"],
                "steps": point["steps"],
                "kid": kid["value"] <= full["metrics"]["kid"]["ci95"][1],
                "iou": iou["value"] >= full["metrics"]["mask_iou"]["ci95"][0],
                "denoising": full["denoising_seconds"] / point["denoising_seconds"],
                "whole": full["seconds"] / point["seconds"],
            }
        )
    return rows


def samplers_table(results: Mapping[str, Any]) -> str:
    """The points as text: steps, milliseconds a picture, KID and mask IoU with 95 % intervals."""
    width = max(len(title) for title in TITLES.values())
    lines = [
        f"{'':<{width}} steps  denoising     whole   KID {'':<18} mask IoU",
        f"{'':<{width}} {'':>5} {'ms':>10} {'ms':>9}",
    ]
    for point in _ordered(results["points"]):
        metrics = point["metrics"]
        low, high = metrics["kid"]["ci95"]
        least, most = metrics["mask_iou"]["ci95"]
        lines.append(
            f"{TITLES[point['sampler']]:<{width}} {point['steps']:>5}"
            f" {1000 * point['denoising_seconds']:>10.1f} {1000 * point['seconds']:>9.1f}"
            f"   {metrics['kid']['value']:.4f} [{low:.4f}, {high:.4f}]"
            f"  {metrics['mask_iou']['value']:.3f} [{least:.3f}, {most:.3f}]"
        )
    return "\n".join(lines)


def draw_samplers(results: Mapping[str, Any], sheet: Path | None = None) -> Figure:
    """One scene by each sampler (rows) in each number of steps (columns), KID and time below.

    Args:
        results: as :func:`load_results` gives them.
        sheet: the pictures, a grid of `settings["size"]` pixel cells with a row for each of
            `SAMPLERS` and a column for each of `settings["steps"]`; by default the one beside the
            results.
    """
    from tomjerry_utils import figures
    from tomjerry_utils.images import load_image

    size, steps = results["settings"]["size"], results["settings"]["steps"]
    pixels = load_image(sheet or (project_root() / RESULTS).with_suffix(".png"))
    found = {(point["sampler"], point["steps"]): point for point in results["points"]}
    names = [name for name in SAMPLERS if any(key[0] == name for key in found)]
    images, titles = [], []
    for name in names:
        row = SAMPLERS.index(name) * size
        for column, count in enumerate(steps):
            images.append(pixels[row : row + size, column * size : (column + 1) * size])
            titles.append(_caption(found.get((name, count))))
    return figures.contact_sheet(
        images,
        titles,
        columns=len(steps),
        column_titles=[f"{count} step{'s' * (count > 1)}" for count in steps],
        row_titles=[TITLES[name] for name in names],
        title="Below each picture: KID over all scenes, and denoising time a picture",
    )


def _caption(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return ""
    return f"{point['metrics']['kid']['value']:.3f}, {1000 * point['denoising_seconds']:.0f} ms"


def _ordered(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(points, key=lambda point: (SAMPLERS.index(point["sampler"]), point["steps"]))
