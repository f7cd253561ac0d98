"""Make a stage of the course in as many processes as `accelerate launch` starts.

    accelerate launch --multi_gpu --num_processes 4 scripts/stage.py 04 --profile paper

Each process draws a batch of its own, so a step sees `num_processes` times the profile's batch.
The stages before it must be finished; `tomjerry course` then finds this one finished. Started by
hand on a machine without a GPU, `--multi_gpu` starts several processes all the same, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from tomjerry_utils import UserError
from tomjerry_utils.profiles import load_profile

STAGES = {"04": "tomjerry_utils.ldm"}  # those that several processes can make together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--profile", help="smoke, mini, colab, paper or a YAML file")
    given = parser.parse_args()
    try:
        profile = load_profile(given.profile)
        import_module(STAGES[given.stage]).ensure(profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
