"""Pictures a second of both renderers at 64 px: one process, then two.

python benchmarks/scenes_speed.py [count]
"""

from __future__ import annotations

import sys
import time

from tomjerry_utils import scenes


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    seeds = range(9_000_000, 9_000_000 + count)
    for style in scenes.STYLES:
        for workers in (1, 2):
            begun = time.perf_counter()
            scenes.render_many(seeds, style, 64, workers=workers)
            seconds = time.perf_counter() - begun
            print(f"{style:8s} {workers} process(es): {count / seconds:6.1f} pictures/s")


if __name__ == "__main__":
    main()
