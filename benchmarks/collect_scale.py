"""How memory, time and disk of stage 01 grow with the number of pictures and the hours of film.

    python benchmarks/collect_scale.py [--counts 1000 4000 16000] [--hours 1 10]

Draws folders of so many small pictures, all different but for one copy in ten, and collects each in
a process of its own, whose peak memory the operating system tells, that of its reading processes
too. Films are the starter clip over and over, its packets copied; each is looked through and one
frame a second read, in a process of its own too. What counts are the slopes: so many bytes for each
picture, so many for each hour more. Writes `results/collect_scale.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils.runs import data_root, environment, project_root, write_json

MILLION = 1_000_000
LIMIT_GB = 4.0
_CALL = """
import json, resource, sys, time
from pathlib import Path
from tomjerry_utils import collect
began = time.monotonic()
collect.collect_command(
    Path(sys.argv[2]), folders=[sys.argv[1]], domain="natural",
    smallest=16, per_class=500, screen=False
)
peak = [resource.getrusage(who).ru_maxrss / 1024 for who in
        (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"seconds": time.monotonic() - began, "mb": peak[0], "worker_mb": peak[1]}))
"""
_FILM = """
import json, resource, sys, time
from pathlib import Path
from tomjerry_utils import films
began = time.monotonic()
film = films.open_film(Path(sys.argv[1]))
looked = time.monotonic() - began
wanted = film.sample(1.0)
read = sum(picture is not None for picture in film.pictures(wanted))
print(json.dumps({"frames": len(film.times), "cuts": len(film.hard), "read": read,
    "look_seconds": looked, "seconds": time.monotonic() - began,
    "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0, 10.0])
    given = parser.parse_args()
    films = []
    for hours in given.hours:
        with tempfile.TemporaryDirectory() as home:
            films.append({"hours": hours, **_run(_FILM, _long_film(Path(home), hours))})
        print(json.dumps(films[-1]), flush=True)
    rows = []
    for count in given.counts:
        with tempfile.TemporaryDirectory() as home:
            rows.append(_measured(Path(home), count))
        print(json.dumps(rows[-1]), flush=True)
    counts = np.array([row["pictures"] for row in rows], float)
    slope, start = np.polyfit(counts, [row["mb"] for row in rows], 1)
    workers = 2 * max(row["worker_mb"] for row in rows)
    # Libraries take hundreds of megabytes: too few pictures more do not show beside them.
    shows = rows[-1]["mb"] > 1.1 * rows[0]["mb"]
    result = {
        "rows": rows,
        "kb_per_picture": round(1024 * slope, 3) if shows else None,
        "million_gb": round((start + slope * MILLION + workers) / 1024, 2) if shows else None,
        "films": films,
        "limit_gb": LIMIT_GB,
        "seconds_per_1000": round(
            1000 * float(np.polyfit(counts, [r["seconds"] for r in rows], 1)[0]), 1
        ),
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
    }
    path = write_json(project_root() / "results" / "collect_scale.json", result)
    told = f"{result['kb_per_picture']} kB a picture, {result['million_gb']} GB for a million"
    print(f"{told if shows else 'memory did not grow: give larger --counts'}: {path}")


def _measured(home: Path, count: int) -> dict[str, Any]:
    draws, last = np.random.default_rng(count), home
    for i in range(count):
        path = home / "in" / f"{i // 1000}" / f"{'cat' if i % 3 else 'mouse'} {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 10 == 9:
            shutil.copyfile(last, path)
            continue
        coarse = Image.fromarray(draws.integers(0, 255, (6, 6, 3), np.uint8))
        # Hard edges: what is blurred is dropped at once.
        coarse.resize((96, 96), Image.Resampling.NEAREST).save(path, quality=85)
        last = path
    found = _run(_CALL, home / "in", home / "out")
    journal = sum(p.stat().st_size for p in (home / "out").glob(".journal*"))
    return {"pictures": count, **found, "journal_mb": round(journal / 2**20, 1)}


def _run(code: str, *paths: Path) -> dict[str, Any]:
    call = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    return {name: round(value, 1) for name, value in json.loads(done.stdout).items()}


def _long_film(home: Path, hours: float) -> Path:
    """The starter clip over and over, its packets copied."""
    import av

    clip = data_root() / "starter" / "clip" / "big_buck_bunny_20s.mp4"
    path, shift = home / "film.mp4", 0
    with av.open(str(path), "w") as long:
        copy: Any = None
        while copy is None or shift * float(copy.time_base) < 3600 * hours:
            with av.open(str(clip)) as source:
                video = source.streams.video[0]
                if copy is None:
                    copy = long.add_stream_from_template(video)
                    copy.time_base = video.time_base
                last = 0
                for packet in source.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue
                    last = max(last, packet.pts + (packet.duration or 0))
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = copy
                    long.mux(packet)
                shift += last
    return path


if __name__ == "__main__":
    main()
