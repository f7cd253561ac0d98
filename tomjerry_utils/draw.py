"""Write generated scenes as files, for the eye and for outside evaluation.

Unlike the stages this may draw any seed in any style; no stage reads what it writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import UserError, scenes
from tomjerry_utils.runs import atomic_path, log, write_jsonl

CHUNK = 256  # scenes drawn before they are written: bounds the memory
SIZES = (16, 2048)


def parse_seeds(text: str) -> range:
    """Read `A:B` as the seeds A ≤ seed < B."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--seeds {text}: write FIRST:END with 0 <= FIRST < END, such as 0:100")
    return range(int(first), int(last))


def draw_scenes(
    seeds: range, out: str | Path, *, style: str, size: int, truth: bool = False
) -> Path:
    """Draw scenes into a folder: `<seed>.png` and `metadata.jsonl`, which is written last.

    Args:
        seeds: one picture each.
        out: folder; made if missing, its pictures of the same seeds are replaced.
        style: `cartoon` or `natural`.
        size: pixels a side.
        truth: also `masks/<seed>.png` (0 background, 1 cat or Tom, 2 mouse or Jerry) and
            `keypoints.jsonl` (x, y in pixels and whether it is visible, by name).
    """
    if style not in scenes.STYLES:
        raise UserError(f"no style '{style}': choose from {', '.join(scenes.STYLES)}")
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"--size {size}: choose a size from {SIZES[0]} to {SIZES[1]} pixels")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for start in range(seeds.start, seeds.stop, CHUNK):
        chunk = range(start, min(start + CHUNK, seeds.stop))
        drawn = scenes.render_many(chunk, style, size, truth=truth)
        for index, seed in enumerate(chunk):
            scene = scenes.describe(seed)
            name = f"{seed}.png"
            _write_png(folder / name, drawn["image"][index])
            rows.append(_row(scene, style, name))
            if truth:
                _write_png(folder / "masks" / name, drawn["mask"][index])
                points.append(_points(scene, name, drawn["keypoints"][index]))
        if len(seeds) > CHUNK:
            log(f"scenes: {chunk.stop - seeds.start} of {len(seeds)} drawn")
    if truth:
        write_jsonl(folder / "keypoints.jsonl", points)
    return write_jsonl(folder / "metadata.jsonl", rows)


def _row(scene: scenes.Scene, style: str, name: str) -> dict[str, Any]:
    return {
        "file_name": name,
        "text": scenes.caption(scene, style),
        "class": scene.cls,
        "action": scene.action,
        "facing": scene.facing,
        "place": scene.place,
        "seed": scene.seed,
    }


def _points(scene: scenes.Scene, name: str, points: np.ndarray) -> dict[str, Any]:
    """The keypoints (A, K, 3) of a scene's animals by name; "cat" is Tom, "mouse" is Jerry."""
    found = {
        actor.kind: {
            key: [round(float(x), 2), round(float(y), 2), int(visible)]
            for key, (x, y, visible) in zip(scenes.KEYPOINTS, points[index], strict=True)
        }
        for index, actor in enumerate(scene.actors)
    }
    return {"file_name": name, "seed": scene.seed, "keypoints": found}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
