"""How fast a server may be asked: its own limits, read from its headers, and its wish to wait.

OpenAI tells in each answer how many requests and tokens a minute are allowed, how many are left,
and how long until all are there again (`x-ratelimit-limit-requests`, `-remaining-`, `-reset-`, and
the same with `tokens`). Servers of one's own mostly tell nothing, and are not held back for.
"""

from __future__ import annotations

import email.utils
import math
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping

from tomjerry_utils.runs import log

WINDOW = 60.0  # seconds: the limits are told per minute
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def duration(text: str) -> float | None:
    """Seconds of "1s", "6m0s", "20ms" or "1m2.5s"; of a bare number too, as Azure writes it."""
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|µs|d|h|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone for: milliseconds, seconds or a date."""
    text = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text) / 1000
    text = headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):
        return None
    return max(seconds, 0.0)


class Pacer:
    """Lets threads through to a server as fast as its limits allow, and no faster.

    A request counts against a limit from the moment it is sent until a window after its answer is
    here. The server saw it somewhere between the two, so that no window of the server's ever holds
    more than the limit. What others use of the same limit shows in what is left of it.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._lock = threading.Lock()
        self._limits = {"requests": _Limit(), "tokens": _Limit()}
        self._not_before = 0.0
        self._told = 0.0
        self._tickets = 0

    def start(self, tokens: int) -> int | None:
        """Wait for a turn; a ticket to hand back, or None where all is to stop.

        Args:
            tokens: what the request may use at most, input and output together.
        """
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                pause = max(
                    self._not_before - now,
                    self._limits["requests"].pause(1, now),
                    self._limits["tokens"].pause(tokens, now),
                )
                if pause <= 0:
                    self._tickets += 1
                    self._limits["requests"].send(self._tickets, 1)
                    self._limits["tokens"].send(self._tickets, tokens)
                    return self._tickets
                self._tell(pause, now)
            # Jitter keeps the threads from coming back all at once.
            self._stop.wait(min(pause, 5.0) + random.uniform(0.0, min(0.1 * pause, 0.5)))
        return None

    def finish(self, ticket: int, headers: Mapping[str, str] | None = None) -> None:
        """Hand a ticket back, with the headers of the answer where there is one."""
        with self._lock:
            now = time.monotonic()
            for kind, limit in self._limits.items():
                limit.land(ticket, now)
                if headers is not None:
                    limit.learn(headers, kind, now)

    def cancel(self, ticket: int) -> None:
        """Hand a ticket back that no request was sent for."""
        with self._lock:
            for limit in self._limits.values():
                limit.cancel(ticket)

    def hold(self, seconds: float) -> None:
        """Leave the server alone for so long, all threads."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _tell(self, pause: float, now: float) -> None:
        if pause > 5.0 and now > self._told:
            self._told = now + pause
            log(f"captions: waiting {math.ceil(pause)} s, as the server's limits ask for")


class _Limit:
    """One limit of the server's: what is allowed, and what of it is used."""

    def __init__(self) -> None:
        self._limit = math.inf
        self._flying: dict[int, float] = {}  # ticket → cost
        self._landed: deque[tuple[float, float]] = deque()  # (when, cost)
        self._used = 0.0  # by ourselves: all of the two above
        self._others = 0.0  # by others, or by ourselves before this run
        self._others_until = 0.0

    def pause(self, cost: float, now: float) -> float:
        self._forget(now)
        others = self._others if now < self._others_until else 0.0
        used = self._used + others
        # A request above the whole limit is the server's to judge.
        if used <= 0 or used + cost <= self._limit:
            return 0.0
        ends = [self._others_until] if others > 0 else []
        if self._landed:
            ends.append(self._landed[0][0] + WINDOW)
        wait = min(ends, default=now + 0.05) - now
        # An answer on its way may tell that there is room earlier.
        return min(wait, 0.05) if self._flying else wait

    def send(self, ticket: int, cost: float) -> None:
        self._flying[ticket] = cost
        self._used += cost

    def land(self, ticket: int, now: float) -> None:
        self._landed.append((now, self._flying.pop(ticket)))

    def cancel(self, ticket: int) -> None:
        self._used -= self._flying.pop(ticket)

    def learn(self, headers: Mapping[str, str], kind: str, now: float) -> None:
        limit = headers.get(f"x-ratelimit-limit-{kind}", "")
        left = headers.get(f"x-ratelimit-remaining-{kind}", "")
        reset = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
        # Some servers write -1 where they have no limit.
        if not limit.isdecimal() or int(limit) == 0:
            return
        self._limit = float(limit)
        if not left.isdecimal() or reset is None:
            return
        self._forget(now)
        gone = self._limit - float(left)
        self._others = max(0.0, gone - self._used)
        if reset > WINDOW and gone > 0:
            # A limit by the day fills up bit by bit: look again when the first of it is back.
            reset = max(WINDOW, reset / gone)
        self._others_until = now + reset

    def _forget(self, now: float) -> None:
        while self._landed and self._landed[0][0] + WINDOW <= now:
            self._used -= self._landed.popleft()[1]
