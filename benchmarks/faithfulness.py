"""What the dial from realistic to faithful does, on validation scenes.

    python benchmarks/faithfulness.py [--scenes 60] [--out results/faithfulness.json]

The translator of a finished course (or the shipped one) translates the same validation cartoons,
from the same noise, at each setting f of the dial. Measured at each: the perceptual distance to
the source, and the KID to natural pictures of the validation range that are nobody's twin; with
them, how much each falls or rises from one setting to the next, in how many scenes the distance
falls, and what the dial says to the translator. Two rows say what the numbers mean: `identity` is
the cartoon itself and `autoencoder` is what its latents alone keep of it, the nearest to it that
any translation can come.

Beside the JSON lies a PNG with a few scenes, a row each: the source, then each setting.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomjerry_utils import UserError, features, ldm, metrics, scenes, transfer, translator
from tomjerry_utils.autoencoder import decode, encode_all
from tomjerry_utils.cli_options import share
from tomjerry_utils.faithfulness import Dial
from tomjerry_utils.images import save_image, to_uint8
from tomjerry_utils.measures import kid_draws
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import environment, foundation_root, project_root, run_root, write_json

SETTINGS = (0.0, 0.25, 0.5, 0.75, 1.0)
RESULTS = Path("results") / "faithfulness.json"
EACH = 2  # scenes of each class on the sheet


def main() -> None:
    given = _options()
    profile = load_profile(given.profile)
    folder = given.translator or run_root(profile) / transfer.STAGE
    if not (folder / "translator.json").is_file():
        folder = foundation_root() / "translator"
    model = translator.load_translator(folder, profile)
    if threads := given.threads or profile.threads:
        torch.set_num_threads(threads)
    first = scenes.RANGES["validation"][0]
    seeds = range(first, first + given.scenes)
    drawn = scenes.render_many(seeds, "cartoon", model.size)["image"]
    # Laid out as a file's pixels are.
    sources = np.ascontiguousarray(drawn)
    real, _ = metrics.reference(given.references)
    made = {
        f: model.translate(sources, seed=given.seed, faithfulness=f).images
        for f in progress(given.settings, "faithfulness", unit="setting")
    }
    with torch.no_grad():
        again = to_uint8(decode(model.vae, encode_all(model.vae, torch.from_numpy(sources))))
    rows = {"identity": sources, "autoencoder": again}
    seen = {name: _look(images, sources) for name, images in {**made, **rows}.items()}
    results = {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": environment(),
        "settings": {
            "profile": profile.name,
            "translator": ldm.fingerprint(str(folder)),
            "scenes": [seeds.start, seeds.stop],
            "references": len(real),
            "seed": given.seed,
            "bootstrap": given.bootstrap,
        },
        "features": {"distance": features.DISTANCE_NAME, "kid": features.NAME},
        "points": [
            {"faithfulness": f, "dial": asdict(Dial.at(f)), **_measure(seen[f], real, given)}
            for f in given.settings
        ],
        "steps": [
            {"from": a, "to": b, **_step(seen[a], seen[b], real, given)}
            for a, b in pairwise(given.settings)
        ],
        "rows": {name: _measure(seen[name], real, given) for name in rows},
    }
    write_json(given.out, results)
    shown = _shown(seeds)
    columns = [sources[shown], *(images[shown] for images in made.values())]
    sheet = np.concatenate([np.concatenate(list(column)) for column in columns], 1)
    save_image(given.out.with_suffix(".png"), sheet)
    print(table(results))


Seen = Mapping[str, np.ndarray]


def _look(images: np.ndarray, sources: np.ndarray) -> Seen:
    """Each picture's distance to its source (N,), and its features (N, 1280)."""
    return {
        "distance": features.perceptual_distance(images, sources).astype(float),
        "features": features.extract(images),
    }


def _measure(seen: Seen, real: np.ndarray, given: argparse.Namespace) -> dict[str, Any]:
    away, vectors, samples = seen["distance"], seen["features"], given.bootstrap
    return {
        "distance": {
            "value": float(away.mean()),
            "ci95": metrics.bootstrap_ci(away, samples=samples),
        },
        "kid": {
            "value": metrics.kid(vectors, real),
            "ci95": metrics.kid_interval(vectors, real, samples=samples),
        },
    }


def _step(before: Seen, after: Seen, real: np.ndarray, given: argparse.Namespace) -> dict[str, Any]:
    """What changes from one setting to the next, with intervals over the same scenes."""
    changed = metrics.paired_bootstrap(
        after["distance"], before["distance"], samples=given.bootstrap
    )
    later, sooner = (
        kid_draws(seen["features"], real, samples=given.bootstrap) for seen in (after, before)
    )
    rise = metrics.kid(after["features"], real) - metrics.kid(before["features"], real)
    return {
        "distance": {"value": changed["difference"], "ci95": changed["ci95"]},
        "kid": {"value": rise, "ci95": np.percentile(later - sooner, [2.5, 97.5]).tolist()},
        "nearer": float((after["distance"] < before["distance"]).mean()),
    }


def _shown(seeds: range) -> list[int]:
    """Scenes for the sheet: the first ones of each class."""
    classes = [scenes.describe(seed).cls for seed in seeds]
    found = [[i for i, c in enumerate(classes) if c == name][:EACH] for name in scenes.CLASSES]
    return [i for some in found for i in some]


def table(results: Mapping[str, Any]) -> str:
    """The points and rows as text, each value with its 95 % interval."""
    lines = [f"{'':<12}{'distance to source':>24}{'KID to nature':>24}   nearer than before"]
    nearer = ["", *(f"{100 * step['nearer']:.0f} % of scenes" for step in results["steps"])]
    rows = [(f"f = {p['faithfulness']:g}", p) for p in results["points"]]
    for (name, row), note in zip(
        [*rows, *results["rows"].items()], [*nearer, *[""] * len(results["rows"])], strict=True
    ):
        cells = [_cell(row[key]) for key in ("distance", "kid")]
        lines.append(f"{name:<12}" + "".join(f"{cell:>24}" for cell in cells) + f"   {note}")
    return "\n".join(lines)


def _cell(metric: Mapping[str, Any]) -> str:
    low, high = metric["ci95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=60, help="validation scenes (60)")
    parser.add_argument("--settings", type=share, nargs="+", default=list(SETTINGS))
    parser.add_argument("--references", type=int, default=400, help="natural pictures (400)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--translator", type=Path, help="its folder (the course's, else shipped)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (the profile's)")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=project_root() / RESULTS)
    given = parser.parse_args()
    if given.scenes < 2 or given.references < 2 or given.settings != sorted(set(given.settings)):
        parser.error("need two scenes and references or more, and settings that rise")
    return given


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
