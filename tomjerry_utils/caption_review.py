"""What a person decides about captions: accept, edit or reject, kept in a file of its own.

Decisions never touch the answers they are about. The captions of a folder or stage are the answers
with the decisions applied, so that another decision, or none, always starts from the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tomjerry_utils import UserError
from tomjerry_utils.decision_lines import read_lines, texts
from tomjerry_utils.runs import log, write_jsonl

DECISIONS = "decisions.jsonl"
Verdict = Literal["accept", "edit", "reject"]
VERDICTS: tuple[Verdict, ...] = ("accept", "edit", "reject")
REJECTED = "rejected in review"


@dataclass(frozen=True)
class Decision:
    """What was decided about the caption of one picture.

    Attributes:
        sha256: of the picture's file.
        caption: the new words of an edit; of the others, the caption as it was.
        recorded: the caption that was judged; an edit that does not say it fits any.
    """

    file_name: str
    sha256: str
    decision: Verdict
    caption: str = ""
    recorded: str = ""


@dataclass(frozen=True)
class Reviewed:
    """Rows after a review.

    Attributes:
        rows: those kept, with `review` ("accepted", "edited" or "") and `edited_from`.
        rejected: those that were not, as they came.
        skipped: (file name, reason) of decisions that fit no row.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    rejected: list[dict[str, Any]] = field(repr=False)
    skipped: list[tuple[str, str]] = field(repr=False)


def read_decisions(path: Path) -> dict[str, Decision]:
    """Read a file of decisions, one JSON object a line; of two about a picture the later holds.

    Returns:
        File name → decision, in the order of the file.

    Raises:
        UserError: no such file, or a line that is no decision; the line is named.
    """
    found: dict[str, Decision] = {}
    overruled = 0
    for where, given in read_lines(path, "the decisions.jsonl that a review wrote"):
        decision = _decision(given, where)
        # The later one also takes the later place, so that a file reads as it was decided.
        overruled += found.pop(decision.file_name, None) is not None
        found[decision.file_name] = decision
    if overruled:
        log(f"{path.name}: {overruled} decisions overruled by later ones about the same picture")
    return found


def write_decisions(path: Path, decisions: Iterable[Decision]) -> Path:
    """Write decisions, one JSON object a line, atomically, and return the path."""
    return write_jsonl(path, (asdict(decision) for decision in decisions))


def decide(row: Mapping[str, Any], verdict: Verdict, words: str = "") -> Decision:
    """The decision about a row of captions, whether it has been reviewed before or not.

    Args:
        words: of an edit. The recorded caption itself is no edit: that accepts it.

    Raises:
        UserError: an edit without words.
    """
    recorded, words = recorded_caption(row), " ".join(words.split())
    if verdict == "edit" and not words:
        raise UserError(f"{row['file_name']}: an edit needs words: write a caption, or reject it")
    if verdict == "edit" and words == recorded:
        verdict = "accept"
    caption = words if verdict == "edit" else recorded
    return Decision(row["file_name"], row["sha256"], verdict, caption, recorded)


def recorded_caption(row: Mapping[str, Any]) -> str:
    """The caption that was answered, also of a row that an edit has changed."""
    return row.get("edited_from") or row["caption"]


def fits(decision: Decision, row: Mapping[str, Any]) -> str:
    """Why a decision is not about this row: "" where it is."""
    if decision.sha256 != row["sha256"]:
        return "the picture is another one than was decided about"
    judged = decision.recorded or (decision.caption if decision.decision != "edit" else "")
    if judged and judged != recorded_caption(row):
        return "the caption has changed since"
    return ""


def apply(rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]) -> Reviewed:
    """Apply decisions to rows as they were recorded.

    An edit changes the caption alone: `subjects`, `action` and `place` stay the answer's.
    """
    kept, rejected, skipped = [], [], []
    for row in rows:
        decision = decisions.get(row["file_name"])
        if decision is not None and (why := fits(decision, row)):
            skipped.append((row["file_name"], why))
            decision = None
        if decision is not None and decision.decision == "reject":
            rejected.append(dict(row))
            continue
        changed = {"review": "", "edited_from": ""}
        if decision is not None and decision.decision == "edit":
            changed = {
                "caption": decision.caption,
                "review": "edited",
                "edited_from": row["caption"],
            }
        elif decision is not None:
            changed["review"] = "accepted"
        kept.append({**row, **changed})
    there = {row["file_name"] for row in rows}
    skipped += [(name, "there is no caption of it") for name in decisions if name not in there]
    return Reviewed(kept, rejected, skipped)


def count(decisions: Iterable[Decision], total: int) -> str:
    """How far a review is, in words: "3 accepted, 1 edited, 0 rejected, 16 open"."""
    times = Counter(decision.decision for decision in decisions)
    told = f"{times['accept']} accepted, {times['edit']} edited, {times['reject']} rejected"
    return f"{told}, {total - times.total()} open"


# ---- helpers -------------------------------------------------------------------------------------


def _decision(given: Mapping[str, Any], where: str) -> Decision:
    values = texts(given, ("file_name", "sha256", "decision", "caption", "recorded"), where)
    for name in ("file_name", "sha256"):
        if not values[name]:
            raise UserError(f"{where}: no '{name}': copy it from captions.jsonl")
    if values["decision"] not in VERDICTS:
        raise UserError(
            f"{where}: the decision is '{values['decision']}': write one of {', '.join(VERDICTS)}"
        )
    values["caption"] = " ".join(values["caption"].split())
    if values["decision"] == "edit" and not values["caption"]:
        raise UserError(f"{where}: an edit without a caption: write one, or reject the picture")
    return Decision(**values)  # type: ignore[arg-type]  # the verdict is checked above
