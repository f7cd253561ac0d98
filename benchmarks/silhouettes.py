"""Whose silhouettes are right, U²-Net-p's or our own segmenter's, and what a translation gains.

    python benchmarks/silhouettes.py [--scenes 60] [--every 3] [--out results/silhouettes.json]

Masks: IoU with the truth on generated cartoons of the validation range and on starter cartoons,
whose transparent ground is one. U²-Net-p sees files in their own size (generated ones at 256 px);
the row "small" shows it the 64 px that our own net sees.

Translations: of starter cartoons and of frames of the starter film (their middle square), by the
translator of a finished course or the shipped one. `plain` is an ordinary translation, `outlines`
that of `tomjerry translate --silhouette`, and `no_posture` an ordinary one whose animals keep the
shapes that our own segmenter sees, which is what of the difference is none of U²-Net-p's. Each is
scored by the IoU of the silhouette that was drawn with that of the source, which is the truth where
it is known and else what U²-Net-p sees. The drawn one is seen by the judges' segmenter, and again
by U²-Net-p, which is then on both sides.

Beside the JSON lies a PNG, a picture a column: the source, our mask, U²-Net-p's mask, plain,
outlines.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from tomjerry_utils import (
    UserError,
    judges,
    ldm,
    metrics,
    scenes,
    silhouette,
    structure,
    transfer,
    translator,
    u2net,
)
from tomjerry_utils.autoencoder import factor_of
from tomjerry_utils.images import list_images, load_image, resize, save_image
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    data_root,
    environment,
    foundation_root,
    project_root,
    read_json,
    run_root,
    write_json,
)
from tomjerry_utils.structure import FIRST_ANIMAL_PART, MOUSE
from tomjerry_utils.translate import distance

RESULTS = Path("results") / "silhouettes.json"
LARGE = 256  # pixels of a generated cartoon as U²-Net-p sees it
SHOWN = 10  # pictures of each kind on the sheet


def main() -> None:
    given = _options()
    u2net.weights()
    profile = load_profile(given.profile)
    folder = given.translator or run_root(profile) / transfer.STAGE
    if not (folder / "translator.json").is_file():
        folder = foundation_root() / "translator"
    model = translator.load_translator(folder, profile)
    if threads := given.threads or profile.threads:
        torch.set_num_threads(threads)
    reference = read_json(folder / "translator.json")["reference"]
    kinds = {
        "generated": _generated(given.scenes, model.size),
        "starter": _starter(given.every, model.size),
        "film": _film(given.frames, model.size),
    }
    results: dict[str, Any] = {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": environment(),
        "settings": {
            "profile": profile.name,
            "translator": ldm.fingerprint(str(folder)),
            "far": silhouette.FAR,
            "seed": given.seed,
            "bootstrap": given.bootstrap,
        },
        "distance": {},
        "masks": {},
        "translations": {},
    }
    sheet = []
    for kind, (files, pictures, truth) in kinds.items():
        away = distance(pictures, reference)
        results["distance"][kind] = np.percentile(away, [0, 5, 50, 95, 100]).round(3).tolist()
        own, seen = _own(model, pictures), _fit(_see(files, kind), model.size)
        if truth is not None:
            masks = {"own": own, "u2netp": seen}
            if kind == "starter":
                masks["u2netp_small"] = _fit(_see(list(pictures), f"{kind}, small"), model.size)
            results["masks"][kind] = {
                name: _score(mask, truth, given.bootstrap) for name, mask in masks.items()
            }
        if kind == "generated":
            continue
        outlines = [
            silhouette.sure(mask) if d > silhouette.FAR else None
            for mask, d in zip(seen, away, strict=True)
        ]
        made = {
            "plain": model.translate(pictures, seed=given.seed).images,
            "outlines": model.translate(pictures, seed=given.seed, outlines=outlines).images,
            "no_posture": replace(model, posture=None).translate(pictures, seed=given.seed).images,
        }
        wanted = seen if truth is None else truth
        results["translations"][kind] = {
            "outlined": sum(outline is not None for outline in outlines),
            **{name: _drawn(images, wanted, name, given) for name, images in made.items()},
        }
        few = np.linspace(0, len(pictures) - 1, SHOWN).astype(int)
        rows = [pictures, _grey(own), _grey(seen), made["plain"], made["outlines"]]
        sheet.append(np.concatenate([np.concatenate(list(row[few]), 1) for row in rows]))
    write_json(given.out, results)
    save_image(given.out.with_suffix(".png"), np.concatenate(sheet, 1))
    print(table(results))


# Files in their own size, the same as the translator sees them, and their true silhouettes.
Kind = tuple[list[np.ndarray], np.ndarray, np.ndarray | None]


def _generated(count: int, size: int) -> Kind:
    first = scenes.RANGES["validation"][0]
    seeds = range(first, first + count)
    small = scenes.render_many(seeds, "cartoon", size, truth=True)
    large = scenes.render_many(seeds, "cartoon", LARGE)["image"]
    return list(large), small["image"], (small["mask"] > 0).astype(np.float32)


def _starter(every: int, size: int) -> Kind:
    paths = list_images(data_root() / "starter" / "cartoon")[::every]
    # This one is drawn in outline, and clear inside: its ground is no silhouette.
    paths = [path for path in paths if "sleeping-cat" not in path.name]
    files = [load_image(path) for path in paths]
    alpha = [np.array(Image.open(path).convert("RGBA").getchannel("A")) for path in paths]
    truth = np.stack([resize(each, size) for each in alpha]) / np.float32(255)
    return files, np.stack([resize(file, size) for file in files]), truth


def _film(count: int, size: int) -> Kind:
    with av.open(str(data_root() / "starter" / "clip" / "big_buck_bunny_20s.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    chosen = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
    files = [resize(frame, min(frame.shape[:2])) for frame in chosen]
    return files, np.stack([resize(file, size) for file in files]), None


def _see(files: Sequence[np.ndarray], what: str) -> list[np.ndarray]:
    return [silhouette.foreground(file[None])[0] for file in progress(files, what, unit="picture")]


def _fit(masks: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.stack([silhouette.fit(mask, (size, size)) for mask in masks])


def _own(model: translator.Translator, pictures: np.ndarray) -> np.ndarray:
    """What our own segmenter takes for an animal, (N, S, S)."""
    cells = model.size // factor_of(model.vae)
    maps = structure.look(model.net, torch.from_numpy(pictures), (cells, cells), size=model.size)[1]
    return maps[:, FIRST_ANIMAL_PART:MOUSE].sum(1).numpy()


def _drawn(
    images: np.ndarray, wanted: np.ndarray, name: str, given: argparse.Namespace
) -> dict[str, Any]:
    segmented = (judges.load_judges().segment(images) > 0).astype(np.float32)
    size = wanted.shape[-1]
    seen = {
        "judges": np.stack([silhouette.fit(mask, (size, size)) for mask in segmented]),
        "u2netp": _fit(_see(list(images), name), size),
    }
    return {by: _score(mask, wanted, given.bootstrap) for by, mask in seen.items()}


def _score(masks: np.ndarray, truth: np.ndarray, samples: int) -> dict[str, Any]:
    """Mean IoU of masks (N, S, S) with the truth, at one half, with its interval."""
    one, other = masks > 0.5, truth > 0.5
    each = (one & other).sum((1, 2)) / np.maximum((one | other).sum((1, 2)), 1)
    interval = metrics.bootstrap_ci(each, samples=samples)
    return {"iou": float(each.mean()), "ci95": interval, "n": len(each)}


def _grey(masks: np.ndarray) -> np.ndarray:
    return np.repeat((255 * masks[..., None]).round().astype(np.uint8), 3, -1)


def table(results: Mapping[str, Any]) -> str:
    """All scores as text, each with its 95 % interval."""
    lines = [f"{'masks':<30}IoU with the truth"]
    for kind, rows in results["masks"].items():
        lines += [f"{kind + ' ' + name:<30}{_cell(score)}" for name, score in rows.items()]
    lines.append(f"{'translations':<30}IoU with the source, as the judges see it; as U²-Net-p does")
    for kind, rows in results["translations"].items():
        for name, score in rows.items():
            if name != "outlined":
                cells = "; ".join(_cell(score[by]) for by in ("judges", "u2netp"))
                lines.append(f"{kind + ' ' + name:<30}{cells}")
    return "\n".join(lines)


def _cell(score: Mapping[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['iou']:.2f} [{low:.2f}, {high:.2f}]"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=60, help="generated cartoons (60)")
    parser.add_argument("--every", type=int, default=3, help="of the starter cartoons (3)")
    parser.add_argument("--frames", type=int, default=15, help="of the film (15)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--translator", type=Path, help="its folder (the course's, else shipped)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (the profile's)")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=project_root() / RESULTS)
    given = parser.parse_args()
    if given.scenes < 2 or given.every < 1 or given.frames < 2:
        parser.error("need two scenes and frames or more, and a step of one or more")
    return given


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
