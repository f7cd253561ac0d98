"""How far a loop is: a bar on a terminal, a log line now and then everywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Self

from tomjerry_utils.runs import log


def progress(
    items: Iterable[Any] | int,
    describe: str,
    *,
    unit: str = "it",
    initial: int = 0,
    every_s: float = 30.0,
    show: bool = True,
) -> Progress:
    """Show how far a loop is: iterate over the result, or use it with `with` and `.update()`.

    Args:
        items: what to iterate over, or a number of steps.
        describe: what is being done, in a word or two.
        initial: how many were done before, in a resumed loop.
        every_s: seconds between log lines where there is no terminal.
        show: False in all processes but the main one.
    """
    return Progress(items, describe, unit=unit, initial=initial, every_s=every_s, show=show)


class Progress:
    """A bar on a terminal; elsewhere (notebooks, Slurm, CI) a log line about every 30 seconds."""

    def __init__(
        self,
        items: Iterable[Any] | int,
        describe: str,
        *,
        unit: str,
        initial: int,
        every_s: float,
        show: bool,
    ) -> None:
        self._items = items
        self._describe = describe
        self._unit = unit
        self._every_s = every_s
        if isinstance(items, int):
            self.total: int | None = items
        else:
            self.total = len(items) if isinstance(items, Sized) else None
        self.done = self._first = initial
        self._show = show
        self._notes: dict[str, float] = {}
        self._bar: Any = None

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._begun = self._logged = time.monotonic()
        self._bar = tqdm(
            total=self.total,
            desc=self._describe,
            unit=self._unit,
            initial=self.done,
            disable=None if self._show else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A last line only where there were others: short work stays silent.
        if self._bar.disable and self._logged > self._begun and kind is None:
            self._log()
        self._bar.close()

    def __iter__(self) -> Iterator[Any]:
        items = range(self._items) if isinstance(self._items, int) else self._items
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """Say that `count` more are done."""
        self.done += count
        if not self._show:
            return
        if not self._bar.disable:
            self._bar.update(count)
        elif time.monotonic() - self._logged >= self._every_s:
            self._log()

    def note(self, **values: float) -> None:
        """Numbers to show beside the count."""
        self._notes = values
        if self._show and not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def _log(self) -> None:
        self._logged = time.monotonic()
        rate = (self.done - self._first) / max(self._logged - self._begun, 1e-9)
        line = f"{self._describe}: {self.done}"
        if self.total:
            left = (self.total - self.done) / rate if rate else 0.0
            line += f"/{self.total}, {int(left // 60)}:{int(left % 60):02d} left"
        line += f", {rate:.3g} {self._unit}/s"
        if self._show:
            log(line + "".join(f", {name} {value:.4g}" for name, value in self._notes.items()))
