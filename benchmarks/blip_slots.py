"""How often a fine-tuned BLIP is right about scenes that nothing trains on or chooses by.

    python benchmarks/blip_slots.py [--scenes 1000] [--blip FOLDER] [--json FILE]

The validation split that notebook 03 scores holds some 170 natural pictures, so one error more or
less is half a point. Here are as many scenes as you like of each domain, from stretches of the
training ranges that no stage, foundation model or judge draws from, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from tomjerry_utils import blip, blip_scores, scenes
from tomjerry_utils.measures import bootstrap_ci
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import run_root

FIRST = {"cartoon": 1_600_000, "natural": 2_600_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000, help="of each domain (1000)")
    parser.add_argument("--blip", type=Path, help="a BLIP's folder (stage 03 of the mini course)")
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    given = parser.parse_args()
    folder = given.blip or run_root(load_profile("mini")) / blip.STAGE
    model = blip.load(folder)
    found: dict[str, dict[str, dict[str, object]]] = {}
    for domain, first in FIRST.items():
        seeds = range(first, first + given.scenes)
        images = scenes.render_many(seeds, domain, 64)["image"]
        true = [scenes.caption(scenes.describe(seed), domain) for seed in seeds]
        hits = blip_scores.slot_hits(model.generate(images), true)
        found[domain] = {
            slot: {"value": float(np.mean(values)), "ci95": bootstrap_ci(values), "n": len(values)}
            for slot, values in hits.items()
        }
        for slot, row in found[domain].items():
            low, high = row["ci95"]  # type: ignore[misc]
            print(f"{domain:<8} {slot:<10} {row['value']:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
