"""What every notebook's last page uses: exercises that answer at once, expected beside got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Range = tuple[float | None, float | None]


def check(answer: Any, right: Any, *, tolerance: float = 0.0) -> None:
    """Print whether an exercise's answer is right.

    Args:
        answer: None, or a list or tuple with None in it, while the exercise is not answered; else
            a number, a text, an array, or a list, tuple or dict of those.
        right: what it should be.
        tolerance: how far a number may be off.
    """
    items = answer if isinstance(answer, (list, tuple)) else [answer]
    if any(item is None for item in items):
        print("not answered yet")
    else:
        print("right" if _same(answer, right, tolerance) else "not yet: see the hint")


def compare(profile: str, rows: Mapping[str, tuple[float, Mapping[str, Range]]]) -> None:
    """Print what a run got beside what it is expected to get.

    Args:
        profile: the run's profile.
        rows: what was measured → (got, profile → (lowest, highest)); None leaves an end open.
            A profile without a range is one where nobody has measured it yet.
    """
    width = max(len(what) for what in rows)
    print(f"   {'':<{width}}  {'expected':>16}  {'got':>8}")
    for what, (got, ranges) in rows.items():
        low, high = ranges.get(profile, (None, None))
        inside = (low is None or got >= low) and (high is None or got <= high)
        print(f"{'ok' if inside else '! '} {what:<{width}}  {_range(low, high):>16}  {got:>8.4g}")


def _same(answer: Any, right: Any, tolerance: float) -> bool:
    # Lists of texts and numbers are compared item by item, so that each kind has its own rule.
    if isinstance(right, dict):
        return (
            isinstance(answer, dict)
            and answer.keys() == right.keys()
            and all(_same(answer[key], right[key], tolerance) for key in right)
        )
    if isinstance(right, (list, tuple)):
        return (
            isinstance(answer, (list, tuple))
            and len(answer) == len(right)
            and all(_same(a, b, tolerance) for a, b in zip(answer, right, strict=True))
        )
    if isinstance(right, bool):
        return isinstance(answer, (bool, np.bool_)) and bool(answer) == right
    if isinstance(right, str):
        return isinstance(answer, str) and answer == right
    try:
        ours, theirs = np.asarray(answer, float), np.asarray(right, float)
    except (TypeError, ValueError):
        return False
    return ours.shape == theirs.shape and bool(np.all(np.abs(ours - theirs) <= tolerance))


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "not measured"
    if high is None:
        return f"at least {low:g}"
    if low is None:
        return f"at most {high:g}"
    return f"{low:g} to {high:g}"
