"""Decisions about pictures: read strictly, replayed exactly, never more than can be decided."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tomjerry_utils import UserError, picture_review
from tomjerry_utils.picture_review import (
    Decision,
    apply,
    decide,
    read_decisions,
    record,
    unfit,
    write_decisions,
)
from tomjerry_utils.sources import make_row


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def row(name: str, reason: str = "", cls: str = "tom", **more: Any) -> dict[str, Any]:
    made = make_row("folder", f"images/cartoon/{name}.png", "k", domain="cartoon", **{"class": cls})
    made.pop("_key")
    made.update(sha256=sha(name), kept=not reason, reason=reason)
    if not cls:
        made.update(role="unlabelled")
    return {**made, **more}


ROWS = [
    row("a"),
    row("b", "blurred: sharpness 3.1 under 5"),
    row("c", cls=""),
    row("d", "cannot be read: broken picture", sha256=""),
    row("e", "duplicate of images/cartoon/a.png", sha256=sha("a")),
    row("f"),
]


def about(name: str, verdict: Any, cls: str = "", note: str = "") -> dict[str, Decision]:
    return {sha(name): Decision(sha(name), f"images/cartoon/{name}.png", verdict, cls, note)}


def lines(path: Path, *rows: Any) -> Path:
    texts = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


# ---- the file


def test_decisions_come_back_and_the_file_has_one_form(tmp_path: Path) -> None:
    made = [Decision(sha(n), f"{n}.png", "drop", note=f"a \u2028 {n}") for n in "abc"]
    made += [
        Decision(sha("d"), "d.png", "keep", "both"),
        Decision(sha("e"), "e.png", "class", "tom"),
    ]
    path = write_decisions(tmp_path / "d.jsonl", made)
    found = read_decisions(path)
    assert list(found) == sorted(decision.sha256 for decision in made)
    assert found[sha("d")] == made[3]
    assert found[sha("a")].note == "a a"
    text = write_decisions(path, found.values()).read_bytes()
    assert (
        write_decisions(tmp_path / "e.jsonl", reversed(list(found.values()))).read_bytes() == text
    )
    # One decision more is one line more; what says nothing is left out.
    more = record(path, about("f", "drop"))
    after = path.read_bytes().splitlines()
    assert len(set(after) ^ set(text.splitlines())) == 1
    assert len(more) == 6
    (line,) = [json.loads(found) for found in after if sha("f").encode() in found]
    assert list(line) == ["sha256", "file_name", "decision"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "e.jsonl"]


def test_of_two_decisions_the_later_line_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = {"sha256": sha("a"), "file_name": "a.png", "decision": "drop"}
    path = lines(tmp_path / "d.jsonl", first, "", {**first, "decision": "keep"})
    assert read_decisions(path)[sha("a")].decision == "keep"
    assert "1 decisions overruled" in capfd.readouterr().err
    # Appended by hand, the hash in capitals.
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**first, "sha256": sha("a").upper(), "note": "logo"}))
    assert read_decisions(path) == {sha("a"): Decision(sha("a"), "a.png", "drop", note="logo")}


def test_what_others_wrote_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    record(path, about("a", "drop"))
    record(path, about("b", "keep"))
    assert list(record(path, {sha("a"): None})) == [sha("b")]
    assert list(read_decisions(path)) == [sha("b")]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        record(path, about("c", "drop"))
    assert path.read_text() == "{"


GOOD = {"sha256": sha("a"), "file_name": "a.png", "decision": "drop"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not valid JSON"),
        ("[1]", "one JSON object a line"),
        ({**GOOD, "sha256": "abc"}, "64 hex digits"),
        ({**GOOD, "file_name": ""}, "no 'file_name'"),
        ({**GOOD, "decision": "maybe"}, "'maybe': write one of keep, drop, class"),
        ({**GOOD, "decision": "class"}, "without 'class'"),
        ({**GOOD, "decision": "class", "class": "dog"}, "no class 'dog'"),
        ({**GOOD, "class": "tom"}, "takes no 'class'"),
        ({**GOOD, "notes": "x"}, "no key 'notes'"),
        ({**GOOD, "note": 3}, "'note' is not a text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, why: str) -> None:
    path = lines(tmp_path / "d.jsonl", GOOD, "", line)
    with pytest.raises(UserError) as caught:
        read_decisions(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert why in str(caught.value)


def test_missing_and_strange_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none.jsonl"):
        read_decisions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_decisions(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_decisions(tmp_path / "x")
    (tmp_path / "empty").write_text("\n")
    assert read_decisions(tmp_path / "empty") == {}


# ---- the replay


def test_a_person_overrules_the_screens_both_ways() -> None:
    decisions = (
        about("a", "drop", note="a logo") | about("b", "keep") | about("c", "class", "jerry")
    )
    before = json.dumps(ROWS)
    a, b, c, d, e, f = apply(ROWS, decisions)
    assert json.dumps(ROWS) == before
    assert (a["kept"], a["reason"], a["decided"]) == (False, "dropped by hand: a logo", "by hand")
    assert (b["kept"], b["reason"], b["decided"]) == (True, "", "by hand")
    assert b["screened"] == "blurred: sharpness 3.1 under 5"
    assert (c["class"], c["label"], c["role"], c["kept"]) == ("jerry", "jerry", "training", True)
    for old, new in ((ROWS[3], d), (ROWS[4], e), (ROWS[5], f)):
        assert new == {**old, "decided": "", "screened": "", "class_found": ""}
    assert apply(ROWS, about("f", "drop"))[5]["reason"] == "dropped by hand"
    kept = apply(ROWS, about("b", "keep", "both"))[1]
    assert (kept["kept"], kept["class"], kept["label"]) == (True, "both", "tom_jerry")
    # A class alone leaves the rest to the screens.
    only = apply(ROWS, about("b", "class", "both"))[1]
    assert (only["kept"], only["reason"], only["class"]) == (False, ROWS[1]["reason"], "both")


def test_what_is_not_there_is_never_revived() -> None:
    decisions = about("a", "keep") | about("d", "keep") | {"": Decision("", "d.png", "keep")}
    done = apply(ROWS, decisions)
    assert [r["kept"] for r in done] == [True, False, True, False, False, True]
    assert done[4]["decided"] == ""
    # Also where a screen dropped the first of two equal pictures: one comes back, not both.
    rows = [row("a", "blurred"), row("e", "duplicate of images/cartoon/a.png", sha256=sha("a"))]
    assert [r["kept"] for r in apply(rows, about("a", "keep"))] == [True, False]
    twins = [row("a", "blurred"), row("a", "blurred")]
    assert [r["kept"] for r in apply(twins, about("a", "keep"))] == [True, False]
    found = unfit([row("z", "cannot be read: torn")], about("z", "keep"))
    assert [why for _, why in found] == ["cannot be read: torn"]
    assert not apply([row("z", "cannot be read: torn")], about("z", "keep"))[0]["kept"]


def test_replays_agree_byte_for_byte() -> None:
    one = about("a", "drop") | about("b", "keep", "jerry") | about("c", "class", "tom")
    two = about("b", "drop", note="x") | about("f", "class", "both")
    once = apply(ROWS, one)
    assert json.dumps(apply(once, one)) == json.dumps(once)
    # Rows that carry other decisions give what the rows without any give: nothing is left over.
    assert json.dumps(apply(once, two)) == json.dumps(apply(ROWS, two))
    assert json.dumps(apply(apply(once, two), {})) == json.dumps(apply(ROWS, {}))
    assert once != apply(ROWS, {}) != apply(ROWS, two)


def test_a_renamed_picture_keeps_its_decision_and_a_changed_one_does_not() -> None:
    decision = about("a", "drop")
    renamed = [{**ROWS[0], "file_name": "images/cartoon/other.png"}]
    assert not apply(renamed, decision)[0]["kept"]
    changed = [{**ROWS[0], "sha256": sha("other bytes")}]
    assert apply(changed, decision)[0]["kept"]
    assert [why for _, why in unfit(changed, decision)] == ["fits no picture"]
    assert unfit(renamed, decision) == []
    # The first of two equal pictures can be decided about, in whatever order the rows come.
    assert unfit([ROWS[0], ROWS[4]], decision) == unfit([ROWS[4], ROWS[0]], decision) == []


def test_counts_are_told_in_words() -> None:
    decisions = about("a", "drop") | about("b", "keep", "both") | about("z", "drop")
    told = picture_review.count(ROWS, decisions)
    assert told == "1 kept, 1 dropped, 1 class changed by hand, 1 fits no picture"
    assert picture_review.count(apply(ROWS, decisions), decisions) == told
    unlabelled = picture_review.count(ROWS, about("c", "class", "tom"))
    assert unlabelled == "0 kept, 0 dropped, 1 class changed by hand"
    settled = picture_review.count([row("z", "cannot be read: torn")], about("z", "keep"))
    assert settled.endswith("1 cannot be followed (unreadable, or an exact duplicate)")


def test_a_class_without_a_domain_gives_no_label() -> None:
    nowhere = [{**row("a", cls=""), "domain": ""}]
    (done,) = apply(nowhere, about("a", "class", "tom"))
    assert (done["class"], done["label"], done["role"]) == ("tom", "", "unlabelled")
    beside = [{**row("a"), "role": "out_of_domain"}]
    assert apply(beside, about("a", "class", "jerry"))[0]["role"] == "out_of_domain"


# ---- what a reviewer does


def test_keeping_and_a_class_go_together_in_either_order() -> None:
    first = decide(ROWS[1], "jerry")
    assert first == Decision(sha("b"), ROWS[1]["file_name"], "class", "jerry")
    both = decide(ROWS[1], "keep", first)
    assert both == Decision(sha("b"), ROWS[1]["file_name"], "keep", "jerry")
    assert decide(ROWS[1], "jerry", decide(ROWS[1], "keep")) == both
    dropped = decide(ROWS[1], "drop", both, note=" a  logo ")
    assert dropped == Decision(sha("b"), ROWS[1]["file_name"], "drop", "", "a logo")
    assert decide(ROWS[1], "tom", dropped) == decide(ROWS[1], "tom")
    assert decide(ROWS[1], "clear", both) is None
    with pytest.raises(ValueError, match="no act"):
        decide(ROWS[1], "burn")
