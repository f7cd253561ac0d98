"""Quality against steps and seconds of DDPM, DDIM, DPM-Solver++ and UniPC, on validation scenes.

    python benchmarks/samplers.py [--scenes 100] [--out results/samplers.json]

The translator of a finished course, as training left it, translates validation cartoons by each
sampler in each number of steps, from the same noise. Not as finishing left it: that tunes the last
two steps of a certain timetable, which would take sides. The seconds of a picture are those of
denoising alone and of the whole way from cartoon to photograph, all models included; scoring is
not counted. KID and mask IoU are what `tomjerry evaluate` gives, and "no worse" means inside the
95 % interval of the same sampler's 50 steps.

A point is written as soon as it is measured, and a second call goes on after the last one, if its
settings are the same. Beside the JSON lies a PNG with one scene by each sampler in each number of
steps, which `samplers.draw_samplers` shows. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tomjerry_utils import UserError, ldm, scenes, transfer, translator
from tomjerry_utils.autoencoder import load_autoencoder
from tomjerry_utils.denoiser import load_denoiser
from tomjerry_utils.images import load_image, save_image
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    environment,
    log,
    project_root,
    run_root,
    write_json,
)
from tomjerry_utils.samplers import (
    RESULTS,
    SAMPLERS,
    TITLES,
    few_against_many,
    load_results,
    make_sampler,
    samplers_table,
)
from tomjerry_utils.scoring import score

STEPS = (2, 4, 6, 8, 10, 15, 25, 50)
KEPT = ("kid", "mask_iou", "class_accuracy", "action_accuracy", "perceptual")
TARGET = 4.5  # times faster denoising in at most 10 steps, no worse than 50


def main() -> None:
    given = _options()
    profile = load_profile(given.profile)
    folder = given.translator or run_root(profile) / transfer.STAGE
    model = translator.load_translator(folder, profile)
    trained = load_denoiser(folder / transfer.TRAINED)[0].to(model.unet.device).eval()
    vae = load_autoencoder(run_root(profile) / ldm.STAGE / "autoencoder").to(model.vae.device)
    model = replace(model, unet=trained, vae=vae, finished=None)
    if threads := given.threads or profile.threads:
        torch.set_num_threads(threads)
    first = scenes.RANGES["validation"][0]
    seeds = range(first, first + given.scenes)
    settings = {
        "profile": profile.name,
        "translator": ldm.fingerprint(str(folder)),
        "scenes": [seeds.start, seeds.stop],
        "shown": seeds[given.shown],
        "size": model.size,
        "steps": given.steps,
        "guidance_scale": model.guidance_scale,
        "batch_size": given.batch_size,
        "threads": torch.get_num_threads(),
        "bootstrap": given.bootstrap,
    }
    results = _begin(given.out, settings)
    done = {(point["sampler"], point["steps"]) for point in results["points"]}
    todo = [(name, n) for n in given.steps for name in SAMPLERS if (name, n) not in done]
    if todo:
        sources = scenes.render_many(seeds, "cartoon", model.size)["image"]
        model.translate(sources[:2], steps=2)  # the first call pays for what is only done once
    for name, steps in progress(todo, "samplers", unit="point"):
        point, shown = _measure(model, name, steps, sources, seeds, given)
        results["points"].append(point)
        results["date"] = datetime.now(UTC).date().isoformat()
        _keep_picture(given.out.with_suffix(".png"), shown[given.shown], name, steps, settings)
        write_json(given.out, results)
        log(f"{TITLES[name]}, {steps} steps: KID {point['metrics']['kid']['value']:.4f}")
    _report(results)


def _measure(
    model: translator.Translator,
    name: str,
    steps: int,
    sources: np.ndarray,
    seeds: range,
    given: argparse.Namespace,
) -> tuple[dict[str, Any], np.ndarray]:
    """One point of the table, and its pictures."""
    by = replace(model, scheduler=make_sampler(name, model.scheduler))
    with _watch_sampling() as spent:
        begun = time.perf_counter()
        made = by.translate(sources, None, seed=0, steps=steps, batch_size=given.batch_size)
        seconds = time.perf_counter() - begun
    found = score(made.images, seeds, bootstrap=given.bootstrap)["metrics"]
    point = {
        "sampler": name,
        "steps": steps,
        "denoising_seconds": sum(spent) / len(seeds),
        "seconds": seconds / len(seeds),
        "metrics": {
            key: {"value": found[key]["value"], "ci95": found[key]["ci95"]} for key in KEPT
        },
    }
    return point, made.images


@contextmanager
def _watch_sampling() -> Iterator[list[float]]:
    """The seconds of each call that the translator makes to `sampling.sample`."""
    spent: list[float] = []
    sample = translator.sample

    def timed(*args: Any, **options: Any) -> torch.Tensor:
        begun = time.perf_counter()
        latents = sample(*args, **options)
        if latents.is_cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begun)
        return latents

    with mock.patch.object(translator, "sample", timed):
        yield spent


def _begin(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or new ones."""
    if not path.is_file():
        return {"schema": 1, "machine": environment(), "settings": settings, "points": []}
    results = load_results(path)
    changed = [key for key in settings if results["settings"].get(key) != settings[key]]
    if changed:
        raise UserError(
            f"{path} was measured with other settings ({', '.join(changed)}): "
            "remove it or give another --out"
        )
    return results


def _keep_picture(
    path: Path, picture: np.ndarray, name: str, steps: int, settings: dict[str, Any]
) -> None:
    """Put the shown scene into its cell of the sheet."""
    size, columns = settings["size"], settings["steps"]
    wide = (len(SAMPLERS) * size, len(columns) * size, 3)
    sheet = load_image(path) if path.is_file() else np.full(wide, 255, np.uint8)
    row, column = SAMPLERS.index(name) * size, columns.index(steps) * size
    sheet[row : row + size, column : column + size] = picture
    save_image(path, sheet)


def _report(results: dict[str, Any]) -> None:
    print(samplers_table(results))
    print(f"\nat most 10 steps against 50 of the same sampler (wanted: {TARGET} times faster)")
    for row in few_against_many(results):
        quality = f"KID {'no worse' if row['kid'] else 'worse'}, IoU " + (
            "no worse" if row["iou"] else "worse"
        )
        reached = row["kid"] and row["iou"] and row["denoising"] >= TARGET
        print(
            f"{'ok' if reached else '  '} {TITLES[row['sampler']]:<12} {row['steps']:>3} steps: "
            f"{quality}; denoising {row['denoising']:.1f}×, the whole way {row['whole']:.2f}×"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=100, help="validation scenes (100)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--translator", type=Path, help="its folder (the course's, else shipped)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (the profile's)")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--shown", type=int, default=0, help="which of the scenes is kept (0)")
    parser.add_argument("--out", type=Path, default=project_root() / RESULTS)
    given = parser.parse_args()
    if given.scenes < 2 or min(given.steps) < 1 or not 0 <= given.shown < given.scenes:
        parser.error("need two scenes or more, one step or more, and a --shown among the scenes")
    return given


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
