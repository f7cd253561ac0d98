"""Processes that read pictures side by side, few at a time, so that memory is bounded."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from tomjerry_utils import UserError

_FEW = 24  # jobs that are not worth starting processes for


class Workers:
    """Processes that work through jobs, few at a time, so that memory is bounded.

    They are started with the first `_FEW` jobs gone by, since a handful of pictures is read sooner
    than a process starts; and they end by themselves when the process that started them is killed.
    """

    def __init__(self, count: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        self._count = min(cores, 16) if count is None else count
        self._pool: ProcessPoolExecutor | None = None
        self._done = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(
        self, work: Callable[..., Any], jobs: Iterable[tuple[Any, tuple[Any, ...]]]
    ) -> Iterator[tuple[Any, Any]]:
        """(tag, result) of each (tag, arguments), in order."""
        running: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for tag, arguments in jobs:
                if self._count < 1 or (self._pool is None and self._done < _FEW):
                    self._done += 1
                    yield tag, _alone(work, arguments)
                    continue
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(
                        self._count,
                        mp_context=get_context("spawn"),
                        initializer=_start,
                        initargs=(os.getpid(),),
                    )
                running.append((tag, self._pool.submit(work, *arguments)))
                if len(running) >= 3 * self._count:
                    done, future = running.popleft()
                    yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that reads pictures was ended from outside, perhaps for want of memory: "
                "free some and run the same command again, it goes on (in a script of your own, "
                "call from under `if __name__ == '__main__':`)"
            ) from None


def _start(parent: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """As a worker would: with one thread, since more can round differently."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*arguments)
    finally:
        torch.set_num_threads(threads)
