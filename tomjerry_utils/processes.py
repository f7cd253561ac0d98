"""Several processes that make one stage, as `accelerate launch` or torchrun starts them.

They train together (`training.train` averages their gradients); whatever else a stage does, the
main process does alone while the others wait, and they read what it wrote. With one process, the
usual case, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from tomjerry_utils.runs import NO_TRAINING, Stage

LONGEST_WAIT = timedelta(hours=24)  # for the main process, which may encode a whole data set


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True in the only process, and in the first of several: the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all(device: str) -> None:
    """Return when every process has called this.

    Args:
        device: a profile's `device`, which says how processes speak to each other.
    """
    if count() == 1:
        return
    from accelerate import PartialState

    from tomjerry_utils.training import pick_device

    cpu = pick_device(device).type == "cpu"
    PartialState(cpu=cpu, timeout=LONGEST_WAIT).wait_for_everyone()


@contextlib.contextmanager
def main_first(device: str) -> Iterator[None]:
    """The main process goes through the block first, then the others together."""
    if not is_main():
        wait_for_all(device)
    yield
    if is_main():
        wait_for_all(device)


@contextlib.contextmanager
def held(stage: Stage, device: str) -> Iterator[None]:
    """Hold a stage's folder for all processes; at the end they wait for each other."""
    with stage.lock() if is_main() else contextlib.nullcontext():
        yield
        wait_for_all(device)


@contextlib.contextmanager
def only_finished() -> Iterator[None]:
    """With several processes, stages before this one are read and never made.

    Not every stage is made for several, and two that make one would be in each other's way.

    Raises:
        UserError: inside of it, from a stage that is not finished.
    """
    if count() == 1 or NO_TRAINING in os.environ:
        yield
        return
    os.environ[NO_TRAINING] = "1"
    try:
        yield
    finally:
        del os.environ[NO_TRAINING]
