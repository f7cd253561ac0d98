"""Parts in small files: read back, made anew where they would be others, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tomjerry_utils import kept_parts
from tomjerry_utils.kept_parts import Part, kept, read_part

FACTS = {"seed": 0, "scale": (1.0, 2.5), "weights": {"net": "abc"}}


def part(value: float = 0.1) -> Part:
    record = {"seconds": {"trained": 1.5}, "points": {"b": {}, "a": {"steps": np.int64(3)}}}
    return record, {"each": np.array([value, np.nan]), "n": np.arange(3), "bit": np.array([True])}


def counted() -> tuple[list[int], Callable[[], Part]]:
    calls: list[int] = []

    def make() -> Part:
        calls.append(1)
        return part(len(calls) / 10)

    return calls, make


def test_a_part_is_read_back_as_it_was_made(tmp_path: Path) -> None:
    calls, make = counted()
    path = tmp_path / "deep" / "cut-seed0.v1"  # nothing of a name is taken for a suffix
    assert read_part(path, FACTS) is None
    record, arrays = kept(path, FACTS, make)
    again, same = kept(path, FACTS, make)
    assert len(calls) == 1
    assert record == again == {
        "seconds": {"trained": 1.5}, "points": {"b": {}, "a": {"steps": 3}},
    }  # fmt: skip
    assert list(again["points"]) == ["b", "a"]
    assert list(same) == ["each", "n", "bit"]
    for name, values in part()[1].items():
        assert np.array_equal(arrays[name], same[name], equal_nan=name == "each")
        assert np.allclose(same[name], values, rtol=1e-7, equal_nan=True)
    assert same["each"].dtype == np.float32  # half the bytes of what it was made as
    assert (same["n"].dtype, same["bit"].dtype) == (np.int64, bool)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "cut-seed0.v1.json",
        "cut-seed0.v1.npz",
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "other seed;"),
        ({"scale": (1.0, 2.6), "weights": {"net": "d"}}, "other scale, weights;"),
        ({"more": 1}, "other more;"),
    ],
)
def test_other_facts_make_it_anew_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], said: str
) -> None:
    calls, make = counted()
    kept(tmp_path / "a", FACTS, make)
    assert capsys.readouterr().err == ""
    facts = FACTS | other
    assert read_part(tmp_path / "a", facts) is None
    _, arrays = kept(tmp_path / "a", facts, make)
    assert len(calls) == 2 and arrays["each"][0] == np.float32(0.2)
    assert said in capsys.readouterr().err
    assert read_part(tmp_path / "a", facts) is not None
    assert read_part(tmp_path / "a", FACTS) is None


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_between_the_two_writes_leaves_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Whether the files are new or take the place of a part with other facts, or the same."""
    calls, make = counted()
    old = FACTS | {"seed": 1}
    if before:
        kept(tmp_path / "a", old, make)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept_parts, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path / "a", FACTS, make)
    assert (tmp_path / "a.npz").is_file()
    assert read_part(tmp_path / "a", FACTS) is None
    assert read_part(tmp_path / "a", old) is None  # its record is there, with other arrays
    made = len(calls)
    _, arrays = kept(tmp_path / "a", FACTS, make)
    assert len(calls) == made + 1 and arrays["each"][0] == np.float32(len(calls) / 10)


def test_files_of_two_machines_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("a", 0.1), ("b", 0.2)):
        kept(tmp_path / name, FACTS, lambda value=value: part(value))
    (tmp_path / "b.npz").replace(tmp_path / "a.npz")
    assert read_part(tmp_path / "a", FACTS) is None
    _, arrays = kept(tmp_path / "a", FACTS, lambda: part(0.3))
    assert arrays["each"][0] == np.float32(0.3)
    assert "made with other arrays" in capsys.readouterr().err
