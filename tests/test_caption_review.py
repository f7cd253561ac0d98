"""Decisions about captions: read strictly, applied to the recorded rows, skipped when outdated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tomjerry_utils import UserError, caption_review
from tomjerry_utils.caption_review import Decision, apply, decide, read_decisions


def row(name: str, caption: str, **changes: Any) -> dict[str, Any]:
    return {"file_name": name, "sha256": f"sha-{name}", "caption": caption, **changes}


ROWS = [row("a.png", "tom sits"), row("b.png", "jerry runs"), row("c.png", "a cat lies")]


def written(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_decisions_come_back_as_they_were_written(tmp_path: Path) -> None:
    made = [decide(ROWS[0], "accept"), decide(ROWS[1], "edit", " jerry\u2028 walks "),
            decide(ROWS[2], "reject")]  # fmt: skip
    path = caption_review.write_decisions(tmp_path / "d.jsonl", made)
    assert list(read_decisions(path).values()) == made
    assert made[1].caption == "jerry walks"
    assert made[1].recorded == "jerry runs"


def test_decisions_are_applied_to_what_was_recorded() -> None:
    made = [decide(ROWS[0], "accept"), decide(ROWS[1], "edit", "jerry walks")]
    found = apply(ROWS, {decision.file_name: decision for decision in made})
    assert [(r["caption"], r["review"], r["edited_from"]) for r in found.rows] == [
        ("tom sits", "accepted", ""),
        ("jerry walks", "edited", "jerry runs"),
        ("a cat lies", "", ""),
    ]
    assert (found.rejected, found.skipped) == ([], [])
    # A decision about a row that an edit has changed is one about the answer below it.
    again = decide(found.rows[1], "reject")
    assert again.recorded == "jerry runs"
    assert apply(ROWS, {"b.png": again}).rejected == [ROWS[1]]
    assert decide(found.rows[1], "edit", "jerry runs").decision == "accept"
    assert ROWS[1] == row("b.png", "jerry runs")


def test_decisions_about_something_else_are_skipped_and_told() -> None:
    decisions = {
        "a.png": Decision("a.png", "another", "reject", recorded="tom sits"),
        "b.png": Decision("b.png", "sha-b.png", "reject", recorded="jerry stood"),
        "d.png": Decision("d.png", "sha-d.png", "reject"),
    }
    found = apply(ROWS, decisions)
    assert [r["caption"] for r in found.rows] == [r["caption"] for r in ROWS]
    assert {r["review"] for r in found.rows} == {""}
    assert found.rejected == []
    assert dict(found.skipped) == {
        "a.png": "the picture is another one than was decided about",
        "b.png": "the caption has changed since",
        "d.png": "there is no caption of it",
    }
    seen = {"b.png": Decision("b.png", "sha-b.png", "reject", "jerry stood")}
    assert apply(ROWS, seen).rejected == []
    # Without the caption that was judged, the picture alone decides.
    bare = {"b.png": Decision("b.png", "sha-b.png", "reject")}
    assert apply(ROWS, bare).rejected == [ROWS[1]]


def test_of_two_decisions_the_later_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = {"file_name": "a.png", "sha256": "sha-a.png", "decision": "reject"}
    other = {"file_name": "b.png", "sha256": "sha-b.png", "decision": "accept"}
    path = written(tmp_path / "d.jsonl", first, other, "", {**first, "decision": "accept"})
    found = read_decisions(path)
    assert [(name, d.decision) for name, d in found.items()] == [
        ("b.png", "accept"),
        ("a.png", "accept"),
    ]
    assert "1 decisions overruled" in capfd.readouterr().err
    read_decisions(written(tmp_path / "once.jsonl", first, other))
    assert "overruled" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: not a decision"),
        ({"sha256": "s", "decision": "accept"}, "line 2: no 'file_name'"),
        ({"file_name": "a", "decision": "accept"}, "line 2: no 'sha256'"),
        ({"file_name": "a", "sha256": "s"}, "line 2: the decision is ''"),
        ({"file_name": "a", "sha256": "s", "decision": "keep"}, "accept, edit, reject"),
        ({"file_name": "a", "sha256": "s", "decision": "edit"}, "line 2: an edit without"),
        ({"file_name": "a", "sha256": "s", "decision": "edit", "caption": " "}, "an edit without"),
        ({"file_name": 3, "sha256": "s", "decision": "accept"}, "'file_name' is not a text"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: Any, told: str) -> None:
    good = {"file_name": "x", "sha256": "s", "decision": "accept"}
    with pytest.raises(UserError, match=told):
        read_decisions(written(tmp_path / "d.jsonl", good, line))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_decisions(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_decisions(tmp_path / "binary.jsonl")
    with pytest.raises(UserError, match="an edit needs words"):
        decide(ROWS[0], "edit", "  ")


def test_count_says_how_far_a_review_is() -> None:
    made = [decide(ROWS[0], "accept"), decide(ROWS[1], "reject")]
    assert caption_review.count(made, 3) == "1 accepted, 0 edited, 1 rejected, 1 open"
