"""Films: how well cuts and dissolves are found, and how fast against OpenCV with a hash a frame.

    python -m pip install --no-deps --target /tmp/opencv opencv-python-headless
    python benchmarks/film_frames.py --opencv /tmp/opencv [--seeds 2] [--rounds 3] \
        [--out results/film_frames.json]

Cuts: the starter clip and films edited out of it (tests/film_clips.py), whose cuts, dissolves and
fades are known to the frame; hits within one frame. Speed: one process on one core, in turns:

- OpenCV decodes every frame to BGR at full size, takes its difference hash (8 × 8) and keeps it
  where more than `--bits` bits differ from the frame last kept.
- `films.open_film` finds the shots, `Film.sample` chooses, `Film.pictures` reads the chosen frames.

Both end with the kept frames as arrays. Without --opencv only the cuts are scored.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from film_clips import CLIP, KINDS, edit, score, true_cuts, write

from tomjerry_utils import films
from tomjerry_utils.runs import project_root, write_json

CODECS = {"grain": ("mpeg4", ".avi"), "grey": ("mpeg2video", ".mpg"), "short": ("libx264", ".mkv")}


def quality(folder: Path, seeds: int) -> dict[str, Any]:
    """Cuts, dissolves and sampled frames over all edited films."""
    rows = []
    for kind, seed in itertools.product(KINDS, range(seeds)):
        made = edit(kind, seed)
        codec, suffix = CODECS.get(kind, ("libx264", ".mp4"))
        found = films.open_film(write(folder / f"{kind}{seed}{suffix}", made.frames, codec=codec))
        hits, false, missed = score(found.hard, made.cuts)
        spans = made.dissolves + made.fades
        met = [any(t.first < b and a < t.end for t in found.transitions) for a, b in spans]
        kept = found.sample(0.5)
        # The very ends of a span show one shot alone, but for a few percent.
        inside = [f for f in kept if any(a + 1 <= f < b - 1 for a, b in spans)]
        rows.append(
            {
                "film": f"{kind} {seed}",
                "frames": len(made.frames),
                "cuts": hits + missed,
                "hits": hits,
                "false": false,
                "dissolves and fades": len(spans),
                "found": sum(met),
                "falsely found": sum(
                    not any(t.first < b + 3 and a - 3 < t.end for a, b in spans)
                    for t in found.transitions
                ),
                "kept": len(kept),
                "kept inside": len(inside),
            }
        )
        print(" · ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "film"}
    f1 = 2 * total["hits"] / (total["hits"] + total["false"] + total["cuts"])
    clip = score(films.open_film(CLIP).hard, true_cuts())
    print(f"{len(rows)} edited films: F1 of cuts {f1:.4f}, {total}")
    print(f"starter clip: {clip[0]} of {len(true_cuts())} cuts, {clip[1]} false")
    return {"films": rows, "total": total, "f1": f1, "clip": {"hits": clip[0], "false": clip[1]}}


def with_opencv(path: Path, bits: int) -> list[int]:
    """Numbers of the kept frames."""
    import cv2

    film = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    kept: list[int] = []
    pictures: list[np.ndarray] = []
    last, number = None, 0
    while True:
        there, image = film.read()
        if not there:
            return kept
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
        now = small[:, 1:] > small[:, :-1]
        if last is None or int((now != last).sum()) > bits:
            last = now
            kept.append(number)
            pictures.append(image)
        number += 1


def with_films(path: Path, every_s: float) -> list[int]:
    found = films.open_film(path)
    wanted = found.sample(every_s)
    pictures = list(found.pictures(wanted))
    return [n for n, picture in zip(wanted, pictures, strict=True) if picture is not None]


def speed(path: Path, rounds: int, bits: int) -> dict[str, Any]:
    """Seconds of one core for each way, the best of some rounds taken in turns."""
    ways: dict[str, Callable[[], list[int]]] = {
        "opencv": lambda: with_opencv(path, bits),
        "one a shot": lambda: with_films(path, 60.0),
        "one a second": lambda: with_films(path, 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    kept: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            kept[name] = way()
            seconds[name].append(time.process_time() - begun)
    found = films.open_film(path)
    out: dict[str, Any] = {"frames": len(found.times), "way": {}}
    for name in ways:
        best = min(seconds[name])
        out["way"][name] = {
            "seconds": best,
            "all": seconds[name],
            "kept": len(kept[name]),
            "shot recall": _recall(kept[name], len(found.times)),
            "ratio": min(seconds["opencv"]) / best,
        }
        row = out["way"][name]
        print(
            f"{path.name}: {name}: {best:.3f} s, {row['kept']} frames kept, shot recall "
            f"{row['shot recall']:.3f}, {row['ratio']:.2f} × as fast as OpenCV",
            flush=True,
        )
    return out


def _recall(kept: Sequence[int], frames: int) -> float:
    edges = [0, *true_cuts(), frames]
    met = [any(a <= k < b for k in kept) for a, b in itertools.pairwise(edges)]
    return sum(met) / len(met)


def enlarged(path: Path, height: int) -> Path:
    """The starter clip at another size, encoded as broadcasters do."""
    width = height * 8 // 9 * 2
    frames = [
        frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
        for _, frame in films.read_frames(CLIP)
    ]
    options = {"crf": "20", "preset": "fast"}
    return write(path, [frame.to_ndarray() for frame in frames], options=options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--opencv", type=Path, help="folder that OpenCV is installed in")
    parser.add_argument("--seeds", type=int, default=2, help="edited films of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=10)
    parser.add_argument("--heights", type=int, nargs="*", default=[360, 720])
    parser.add_argument("--out", type=Path, default=project_root() / "results/film_frames.json")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = {name: str(value) for name, value in vars(given).items() if name != "out"}
    results: dict[str, Any] = {"settings": settings, "machine": platform.processor()}
    with tempfile.TemporaryDirectory() as folder:
        if given.opencv:
            sys.path.insert(0, str(given.opencv))
            import cv2

            cv2.setNumThreads(1)
            results["opencv"] = cv2.__version__
            results["speed"] = {}
            for height in given.heights:
                path = CLIP if height == 360 else enlarged(Path(folder) / f"{height}p.mp4", height)
                results["speed"][str(height)] = speed(path, given.rounds, given.bits)
        if given.seeds:
            results["cuts"] = quality(Path(folder), given.seeds)
    write_json(given.out, results)


if __name__ == "__main__":
    main()
