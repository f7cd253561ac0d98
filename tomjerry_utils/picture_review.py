"""What a person decides about pictures: keep, drop or another class, in a file that is replayed.

A decision overrules what the screens of stage 01 said, both ways, and finds its picture by the
hash of its bytes, so that it outlives a renamed file. It cannot bring back what is not there: a
picture that could not be read, or an exact duplicate of another.

`apply` starts from what the screens said, also of rows that carry other decisions already: taking
a decision out of the file takes it back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tomjerry_utils import UserError, scenes
from tomjerry_utils.decision_lines import read_lines, texts
from tomjerry_utils.runs import log, write_jsonl

Row = dict[str, Any]
DECISIONS = "decisions.jsonl"
Verdict = Literal["keep", "drop", "class"]
VERDICTS: tuple[Verdict, ...] = ("keep", "drop", "class")
BY_HAND = "by hand"
DROPPED = "dropped by hand"
FITS_NONE = "fits no picture"
# Reasons that no decision overrules, by how they begin.
SETTLED = ("cannot be read", "duplicate of ")
ACTS = ("keep", "drop", *scenes.CLASSES, "clear")
_COLUMNS = ("sha256", "file_name", "decision", "class", "note")


@dataclass(frozen=True)
class Decision:
    """What was decided about one picture.

    Attributes:
        sha256: of the picture's file, 64 hex digits; finds the picture.
        file_name: what it was called then, for who reads the file.
        decision: "class" changes the class and leaves the rest to the screens.
        cls: "tom", "jerry" or "both"; of a "keep", "" for the class as it was found.
        note: why, in the decider's words; of a "drop" it becomes part of the reason.
    """

    sha256: str
    file_name: str
    decision: Verdict
    cls: str = ""
    note: str = ""

    def row(self) -> dict[str, str]:
        """The decision as a line of the file; what says nothing is left out."""
        values = (self.sha256, self.file_name, self.decision, self.cls, self.note)
        return {name: value for name, value in zip(_COLUMNS, values, strict=True) if value}


def read_decisions(path: Path) -> dict[str, Decision]:
    """Read a file of decisions; of two about one picture the later line holds.

    Returns:
        SHA-256 → decision, in the order of the hashes.

    Raises:
        UserError: no such file, or a line that is no decision; file and line are named.
    """
    found: dict[str, Decision] = {}
    overruled = 0
    for where, given in read_lines(path, "the decisions.jsonl that the gallery saved"):
        decision = _decision(given, where)
        overruled += decision.sha256 in found
        found[decision.sha256] = decision
    if overruled:
        log(f"{path.name}: {overruled} decisions overruled by later ones about the same picture")
    return dict(sorted(found.items()))


def write_decisions(path: Path, decisions: Iterable[Decision]) -> Path:
    """Write decisions atomically, one line a picture, in the order of their hashes.

    The same decisions give the same bytes, and another one changes one line: a commit shows what
    was decided and nothing else. Of two about one picture the later holds.
    """
    found = {decision.sha256: decision for decision in decisions}
    return write_jsonl(path, (found[sha].row() for sha in sorted(found)))


def record(path: Path, changes: Mapping[str, Decision | None]) -> dict[str, Decision]:
    """Change a file of decisions, keeping what others have written to it meanwhile.

    Args:
        path: need not exist.
        changes: SHA-256 → the new decision, or None to take one back.

    Returns:
        what the file holds now.

    Raises:
        UserError: the file is broken; it is left as it is.
    """
    found = read_decisions(path) if path.is_file() else {}
    for sha, decision in changes.items():
        if decision is None:
            found.pop(sha, None)
        else:
            found[sha] = decision
    write_decisions(path, found.values())
    return dict(sorted(found.items()))


def decide(
    row: Mapping[str, Any], what: str, earlier: Decision | None = None, *, note: str = ""
) -> Decision | None:
    """The decision that an act of a reviewer makes of an earlier one; None takes it back.

    Args:
        row: of a manifest.
        what: one of `ACTS`: "keep", "drop", a class, or "clear".
        earlier: what was decided before. Keeping and giving a class go together, in either order.
        note: why, for a "drop".

    Raises:
        ValueError: no such act.
    """
    if what not in ACTS:
        raise ValueError(f"no act '{what}': {', '.join(ACTS)}")
    if what == "clear":
        return None
    sha, name = row["sha256"], row["file_name"]
    if what == "drop":
        return Decision(sha, name, "drop", note=" ".join(note.split()))
    if what == "keep":
        return Decision(sha, name, "keep", earlier.cls if earlier else "")
    kept = earlier is not None and earlier.decision == "keep"
    return Decision(sha, name, "keep" if kept else "class", what)


def settled(row: Mapping[str, Any]) -> str:
    """Why nothing can be decided about a row's picture: "" where something can."""
    reason = str(row.get("screened") or row["reason"])
    if not row["sha256"]:
        return reason or "no picture was read"
    return reason if reason.startswith(SETTLED) else ""


def apply(rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]) -> list[Row]:
    """Manifest rows with a person's decisions in them; the given rows are not changed.

    Replaying gives the same rows: `apply(apply(rows, a), b) == apply(rows, b)`. A text that a
    source gave with a picture is not changed with the class: captions have a review of their own.

    Args:
        rows: columns as of `sources.make_row`.
        decisions: SHA-256 → decision; those that fit no picture do nothing (see `unfit`).

    Returns:
        Rows with `kept`, `reason`, `class`, `label` and `role` as decided, and three columns
        more: `decided` ("by hand" or ""), and of such rows `screened`, the reason that the screens
        had for dropping the picture, and `class_found`, the class that its source gave.
    """
    done, there = [], set()
    for row in rows:
        sha, new = row["sha256"], _as_screened(row)
        # Of one picture under two names only the first may be decided about.
        if sha in decisions and sha not in there and not settled(new):
            there.add(sha)
            new = _decided(new, decisions[sha])
        done.append(new)
    return done


def unfit(
    rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]
) -> list[tuple[Decision, str]]:
    """The decisions that `apply` could not follow, each with the reason."""
    reasons: dict[str, str] = {}
    for row in rows:
        why = settled(row)
        # The first of a picture's rows that can be decided about is enough.
        if not why or reasons.get(row["sha256"], "x"):
            reasons[row["sha256"]] = why
    told = ((d, reasons.get(sha, FITS_NONE)) for sha, d in sorted(decisions.items()))
    return [(decision, why) for decision, why in told if why]


def count(rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]) -> str:
    """What decisions did to rows: "2 kept, 5 dropped, 1 class changed by hand, 1 fits no picture".

    Args:
        rows: before or after `apply`.
    """
    told: Counter[str] = Counter()
    for row in apply(rows, decisions):
        if row["decided"]:
            told["kept"] += decisions[row["sha256"]].decision == "keep"
            told["dropped"] += decisions[row["sha256"]].decision == "drop"
            told["class"] += row["class"] != row["class_found"]
    without = Counter(
        why if why == FITS_NONE else "cannot be followed" for _, why in unfit(rows, decisions)
    )
    classes = f"{told['class']} class{'' if told['class'] == 1 else 'es'} changed"
    text = f"{told['kept']} kept, {told['dropped']} dropped, {classes} by hand"
    if number := without[FITS_NONE]:
        text += f", {number} {'fits' if number == 1 else 'fit'} no picture"
    if number := without["cannot be followed"]:
        text += f", {number} cannot be followed (unreadable, or an exact duplicate)"
    return text


def relabelled(row: Mapping[str, Any], cls: str) -> dict[str, str]:
    """`class`, `label` and `role` of a row of another class."""
    known = cls and row["domain"] in scenes.STYLES
    role = row["role"]
    if role in ("training", "unlabelled"):
        role = "training" if known else "unlabelled"
    label = scenes.label_of(cls, row["domain"]) if known else ""
    return {"class": cls, "label": label, "role": role}


# ---- helpers -------------------------------------------------------------------------------------


def _as_screened(row: Mapping[str, Any]) -> Row:
    """The row as the screens left it."""
    new = dict(row)
    if new.get("decided"):
        reason = new["screened"]
        new.update(kept=not reason, reason=reason)
        if new["class_found"] != new["class"]:
            new.update(relabelled(new, new["class_found"]))
    return {**new, "decided": "", "screened": "", "class_found": ""}


def _decided(row: Row, decision: Decision) -> Row:
    new = {**row, "decided": BY_HAND, "screened": row["reason"], "class_found": row["class"]}
    if decision.cls and decision.cls != row["class"]:
        new.update(relabelled(row, decision.cls))
    if decision.decision == "keep":
        new.update(kept=True, reason="")
    elif decision.decision == "drop":
        new.update(kept=False, reason=f"{DROPPED}: {decision.note}" if decision.note else DROPPED)
    return new


def _decision(given: Mapping[str, Any], where: str) -> Decision:
    if unknown := sorted(given.keys() - set(_COLUMNS)):
        raise UserError(f"{where}: no key '{unknown[0]}': known are {', '.join(_COLUMNS)}")
    values = texts(given, _COLUMNS, where)
    sha, verdict, cls = values["sha256"].lower(), values["decision"], values["class"]
    if not re.fullmatch(r"[0-9a-f]{64}", sha):
        raise UserError(f"{where}: 'sha256' is not 64 hex digits: copy it from manifest.jsonl")
    if not values["file_name"]:
        raise UserError(f"{where}: no 'file_name': copy it from manifest.jsonl")
    if verdict not in VERDICTS:
        raise UserError(f"{where}: the decision is '{verdict}': write one of {', '.join(VERDICTS)}")
    if cls not in ("", *scenes.CLASSES):
        raise UserError(f"{where}: no class '{cls}': write one of {', '.join(scenes.CLASSES)}")
    if verdict == "class" and not cls:
        raise UserError(f"{where}: a class decision without 'class': write which one")
    if verdict == "drop" and cls:
        raise UserError(f"{where}: a drop takes no 'class': remove one of the two")
    note = " ".join(values["note"].split())
    return Decision(sha, values["file_name"], verdict, cls, note)  # type: ignore[arg-type]
