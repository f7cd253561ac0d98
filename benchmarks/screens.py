"""What the screens of stage 01 refuse: as they ship, of pictures that their probes never saw.

    python benchmarks/screens.py [--scenes 150] [--out results/screens.json]

Pictures of Debian packages (`screens_material.SOURCES`, fetched once, needs `apt-get`), the starter
pictures and generated scenes; letters in fonts of their own and blurs are put on here. The limits
were chosen on the even half of the real pictures: the odd half stands beside the whole.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from tomjerry_utils import screens
from tomjerry_utils.runs import environment, project_root, write_json
from tomjerry_utils.screens_material import gather
from tomjerry_utils.screens_training import blurred, held_out_scenes, test


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=150, help="of either style")
    parser.add_argument("--out", type=Path, default=project_root() / "results" / "screens.json")
    given = parser.parse_args()
    found, versions = gather()
    real = [m for m in found if m.held_out]
    drawn = held_out_scenes(given.scenes)
    weights, seed = screens.load_probes(), 5
    results = {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": environment(),
        "packages": versions,
        "whole": test(weights, real + drawn, seed),
        "odd half": test(weights, real[1::2] + drawn[1::2], seed),
        "blurred, odd half": blurred(real[1::2] + drawn[1::2], screens.Limits()),
    }
    print(write_json(given.out, results))


if __name__ == "__main__":
    main()
