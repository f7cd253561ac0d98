"""Captions a second against a server that fails now and then: many requests at once, then one.

The server runs in a process of its own, answers after half a second, enforces 6000 requests a
minute and tells so. Every tenth picture meets a fault, by a fixed schedule that both runs share.

python benchmarks/captions_speed.py [--pictures 1200] [--concurrency 32]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from caption_server import (
    KEY,
    Fault,
    Server,
    answering,
    error,
    hang_up,
    picture_of,
    pictures,
)

from tomjerry_utils import captioner

LATENCY, LIMIT, TIMEOUT, SHARE = 0.5, 6000, 5.0, 0.1
KINDS = (
    *("429", "429 with Retry-After", "500", "503", "timeout"),
    *("cut connection", "invalid JSON", "refusal"),
)


def schedule(count: int) -> dict[int, str]:
    """Which pictures meet which fault: the same for all runs."""
    chosen = random.Random(0).sample(range(count), round(SHARE * count))
    return {picture: KINDS[i % len(KINDS)] for i, picture in enumerate(chosen)}


def silent(handler: BaseHTTPRequestHandler) -> bool:
    time.sleep(TIMEOUT + 1.0)
    return hang_up(handler)


def late(fault: Fault) -> Fault:
    """Faults of a model come as late as its answers."""

    def play(handler: BaseHTTPRequestHandler) -> bool:
        time.sleep(LATENCY)
        return fault(handler)

    return play


FAULTS: dict[str, Fault] = {
    "429": error(429, "slow down"),
    "429 with Retry-After": error(429, "slow down", retry_after="1"),
    "500": late(error(500)),
    "503": error(503),
    "timeout": silent,
    "cut connection": late(hang_up),
    "invalid JSON": late(answering('{"caption": "Tom is')),
    "refusal": late(answering({"refusal": "I cannot describe this."})),
}


def serve(link: Connection, images: Path) -> None:
    """The server's process: a new server for each "start", its counts for each "counts"."""
    paths = sorted(images.iterdir())
    number = {captioner.encode(path, 512)[0]: i for i, path in enumerate(paths)}
    server, thread = None, None
    while (order := link.recv()) != "end":
        if order == "start":
            server = Server()
            server.latency, server.limit = LATENCY, LIMIT
            again = [0]
            server.fault_of = fault_of(server, number, again)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            link.send(server.url)
        elif server is not None:
            link.send(
                {
                    "requests": len(server.requests),
                    "answered well": len(server.served),
                    "asked again after a success": again[0],
                    "most in any minute": server.most_in_window,
                    "above the limit": server.violations,
                }
            )
            server.shutdown()
            server.server_close()


def fault_of(
    server: Server, number: dict[str, int], again: list[int]
) -> Callable[[dict[str, Any]], Fault | None]:
    left = schedule(len(number))

    def choose(body: dict[str, Any]) -> Fault | None:
        picture = picture_of(body)
        again[0] += picture in server.served
        kind = left.get(number[picture])
        if kind is not None and kind != "refusal":  # a model that refuses once refuses again
            del left[number[picture]]
        return FAULTS[kind] if kind is not None else None

    return choose


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=1200)
    parser.add_argument("--concurrency", type=int, default=32)
    arguments = parser.parse_args()
    count = arguments.pictures
    os.environ["OPENAI_API_KEY"] = KEY
    planned = Counter(schedule(count).values())
    print(f"{count} pictures, faults: {', '.join(f'{n} {kind}' for kind, n in planned.items())}")
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder) / "in", count, size=64)
        rows = [{"file_name": path.name} for path in sorted(images.iterdir())]
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=serve, args=(there, images), daemon=True)
        process.start()
        seconds = {}
        for concurrency in (arguments.concurrency, 1):
            here.send("start")
            source = captioner.OpenAISource(
                Path(folder) / f"store-{concurrency}.jsonl",
                "gpt-4o",
                here.recv(),
                100.0,
                concurrency=concurrency,
                timeout=TIMEOUT,
            )
            begun = time.perf_counter()
            made = list(source(rows, images))
            seconds[concurrency] = time.perf_counter() - begun
            here.send("counts")
            counts = here.recv()
            states = Counter(row.status for row in made)
            reasons = Counter(row.reason for row in made if row.status != "ok")
            print(
                f"concurrency {concurrency}: {seconds[concurrency]:.1f} s, {states['ok']} "
                f"captioned, {reasons.total()} set aside {dict(reasons)}, "
                f"{count - len(made)} lost"
            )
            print("  server: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
        here.send("end")
        process.join()
    ratio = seconds[1] / seconds[arguments.concurrency]
    print(f"ratio {ratio:.1f} (limit {LIMIT} a minute, latency {LATENCY} s, timeout {TIMEOUT} s)")


if __name__ == "__main__":
    main()
