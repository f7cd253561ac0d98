"""How memory, time and disk of `tomjerry collect` grow with the number of pictures.

    python benchmarks/collect_scale.py [--counts 1000 4000 16000]

Draws folders of so many small pictures, all different but for one copy in ten, and collects each in
a process of its own, whose peak memory the operating system tells, that of its reading processes
too. What counts is the slope: so many bytes for each picture more. Writes
`results/collect_scale.json`.
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

from tomjerry_utils.runs import environment, project_root, write_json

MILLION = 1_000_000
LIMIT_GB = 4.0
_CALL = """
import json, resource, sys, time
from pathlib import Path
from tomjerry_utils import collect
began = time.monotonic()
collect.collect_command(
    Path(sys.argv[2]), folders=[sys.argv[1]], domain="natural", smallest=16, per_class=500
)
peak = [resource.getrusage(who).ru_maxrss / 1024 for who in
        (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"seconds": time.monotonic() - began, "mb": peak[0], "worker_mb": peak[1]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000, 16000])
    given = parser.parse_args()
    rows = []
    for count in given.counts:
        with tempfile.TemporaryDirectory() as home:
            rows.append(_measured(Path(home), count))
        print(json.dumps(rows[-1]), flush=True)
    counts = np.array([row["pictures"] for row in rows], float)
    slope, start = np.polyfit(counts, [row["mb"] for row in rows], 1)
    workers = 2 * max(row["worker_mb"] for row in rows)
    result = {
        "rows": rows,
        "kb_per_picture": round(1024 * slope, 3),
        "million_gb": round((start + slope * MILLION + workers) / 1024, 2),
        "limit_gb": LIMIT_GB,
        "seconds_per_1000": round(
            1000 * float(np.polyfit(counts, [r["seconds"] for r in rows], 1)[0]), 1
        ),
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
    }
    path = write_json(project_root() / "results" / "collect_scale.json", result)
    print(
        f"{result['kb_per_picture']} kB a picture, {result['million_gb']} GB for a million: {path}"
    )


def _measured(home: Path, count: int) -> dict[str, Any]:
    draws, last = np.random.default_rng(count), home
    for i in range(count):
        path = home / "in" / f"{i // 1000}" / f"{'cat' if i % 3 else 'mouse'} {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 10 == 9:
            shutil.copyfile(last, path)
            continue
        coarse = Image.fromarray(draws.integers(0, 255, (6, 6, 3), np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=85)
        last = path
    call = [sys.executable, "-c", _CALL, str(home / "in"), str(home / "out")]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    journal = sum(p.stat().st_size for p in (home / "out").glob(".journal*"))
    found = {name: round(value, 1) for name, value in json.loads(done.stdout).items()}
    return {"pictures": count, **found, "journal_mb": round(journal / 2**20, 1)}


if __name__ == "__main__":
    main()
