"""What the notebooks' last pages use: instant checks, expected beside got."""

from __future__ import annotations

import numpy as np
import pytest

from tomjerry_utils.lessons import check, compare


@pytest.mark.parametrize(
    ("answer", "right", "tolerance", "said"),
    [
        (None, 1.0, 0.0, "not answered yet"),
        ([None, "a"], ["b", "a"], 0.0, "not answered yet"),
        (1.0004, 1.0, 0.001, "right"),
        (1.002, 1.0, 0.001, "not yet"),
        (float("nan"), 1.0, 0.1, "not yet"),
        ("tom", "tom", 0.0, "right"),
        ("Tom", "tom", 0.0, "not yet"),
        (1, "tom", 0.0, "not yet"),
        ("tom", 1.0, 0.0, "not yet"),
        (np.True_, True, 0.0, "right"),
        (1, True, 0.0, "not yet"),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0]), 0.0, "right"),
        (np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0]), 0.0, "not yet"),
        (["a", 2.0], ("a", 2), 0.0, "right"),
        (["a"], ["a", "b"], 0.0, "not yet"),
        ({"a": 1, "b": [2, 3]}, {"b": [2, 3], "a": 1}, 0.0, "right"),
        ({"a": 1}, {"a": 1, "b": 2}, 0.0, "not yet"),
        ([[1, -100], [2, 3]], [[1, -100], [2, 3]], 0.0, "right"),
        ([[1, -100], [2, 4]], [[1, -100], [2, 3]], 0.0, "not yet"),
    ],
)
def test_check_says_right_only_where_it_is(
    answer: object,
    right: object,
    tolerance: float,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(answer, right, tolerance=tolerance)
    printed = capsys.readouterr().out
    assert printed.startswith(said) and printed.count("\n") == 1


def test_compare_marks_what_lies_outside(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "inside": (0.5, {"mini": (0.4, 0.6)}),
        "at the edge": (0.4, {"mini": (0.4, None)}),
        "too small": (0.3, {"mini": (0.4, None)}),
        "too large": (7.0, {"mini": (None, 6)}),
        "not a number": (float("nan"), {"mini": (0, 1)}),
        "elsewhere": (0.3, {"paper": (0.4, None)}),
    }
    compare("mini", rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines[1:]] == ["ok", "ok", "! ", "! ", "! ", "ok"]
    assert "0.4 to 0.6" in lines[1] and "at least 0.4" in lines[3] and "at most 6" in lines[4]
    assert "not measured" in lines[6]
    assert len({len(line) for line in lines}) == 1
