"""The data sheet: what was collected, whence, with which rights, and what is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tomjerry_utils.judging import kind_of
from tomjerry_utils.scenes import LABELS
from tomjerry_utils.sources import Row

Counts = Counter[tuple[str, ...]]


def datasheet(rows: Iterable[Row]) -> str:
    """A collection's data sheet as Markdown.

    Args:
        rows: of its manifest; gone through once.
    """
    told = _Told(rows)
    parts = [
        "# Data sheet",
        "",
        f"{told.met} pictures met, {told.kept} kept, in {len(told.groups)} groups. Written by "
        "`tomjerry_utils.collect`; every row of these tables counts rows of `manifest.jsonl`.",
        "",
        "## What was kept",
        "",
        *_by_split(("source", "role", "domain", "class", "train", "validation"), told.by_source),
        "",
        "Groups (a shot, a character, a scene, a run of numbered frames, and whatever holds near "
        "duplicates of theirs) never cross the split. "
        'Only the role "training" is trained on; there is no test split here, test scenes are '
        "drawn by the evaluation alone.",
        "",
        "## Who says the class",
        "",
        *_table(("said by", "class", "pictures"), told.labelled),
        "",
        *_as_read(told),
        "## What was dropped",
        "",
        *(_table(("source", "reason", "pictures"), told.dropped) if told.dropped else ["Nothing."]),
        "",
        "Each row of the manifest has the reason with its figures: the score and the limit that it "
        "missed, the picture that it is a duplicate of.",
        "",
        "## Rights",
        "",
        *_table(("source", "rights", "pictures"), told.rights),
        "",
        "## Known gaps",
        "",
        *(f"- {gap}" for gap in _gaps(told)),
        "",
    ]
    return "\n".join(parts)


class _Told:
    """What the sheet counts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.met = self.kept = 0
        self.groups: set[tuple[str, str]] = set()
        self.by_source: Counts = Counter()
        self.labelled: Counts = Counter()
        self.dropped: Counts = Counter()
        self.read_as: Counts = Counter()
        self.rights: Counts = Counter()
        self.training: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.joined = 0
        for row in rows:
            self.met += 1
            if not row["kept"]:
                self.dropped[row["source"], kind_of(row["reason"])] += 1
                continue
            self.kept += 1
            for note in filter(None, row["read_as"].split("; ")):
                self.read_as[row["source"], note] += 1
            self.groups.add((row["split"], row["group"]))
            self.by_source[
                row["source"],
                row["role"],
                row["domain"] or "unknown",
                row["class"] or "none",
                row["split"],
            ] += 1
            self.labelled[row["labelled_by"] or "nobody", row["class"] or "none"] += 1
            self.rights[row["source"], row["rights"] or "not stated"] += 1
            self.roles[row["role"]] += 1
            self.joined += bool(row["cluster"])
            if row["role"] == "training":
                self.training[row["label"]] += 1


def _by_split(columns: Sequence[str], counts: Counts) -> list[str]:
    """A table; the last part of each counted key is the split."""
    lines = _head(columns)
    for key in sorted({key[:-1] for key in counts}):
        numbers = (counts[(*key, "train")], counts[(*key, "validation")])
        lines.append(_line([*key, *map(str, numbers)]))
    return lines


def _as_read(told: _Told) -> list[str]:
    """What had to be decided to read the files of pictures that are kept; most need nothing."""
    if not told.read_as:
        return []
    table = _table(("source", "read as", "pictures"), told.read_as)
    return ["## How files were read", "", *table, ""]


def _table(columns: Sequence[str], counts: Counts) -> list[str]:
    return _head(columns) + [_line([*key, str(counts[key])]) for key in sorted(counts)]


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(columns), "|---" * len(columns) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _gaps(told: _Told) -> list[str]:
    found = {key[0] for key in told.by_source}
    gaps = [f"No training pictures of `{label}`." for label in LABELS if not told.training[label]]
    present = [count for label, count in told.training.items() if label and count]
    if present and max(present) > 2 * min(present):
        gaps.append("The classes differ more than twofold in number; see the table.")
    if "scenes" in found:
        gaps.append(
            "Generated scenes: one cat and one mouse design with varied coats, six actions, five "
            "places, a fixed camera. They are no photographs, and nothing here says how the "
            "translator does on any."
        )
    if "starter" in found:
        gaps.append(
            "Starter pictures: mostly emoji on an empty ground, four photographs, all of cats; no "
            "photograph of a mouse. Too few to train or to score on."
        )
    if "clip" in found:
        gaps.append("Film clip: rodents and a rabbit, no cat; its frames carry no class.")
    if found & {"kaggle", "archive"}:
        gaps.append(
            "Laboratory mice and house cats are photographed from other angles and in other "
            "places than cartoon animals are drawn in."
        )
    runs = {group for _, group in told.groups if re.match(r"mice/[^/]+/run ", group)}
    animals = {group for _, group in told.groups if re.match(r"mice/[^/]+/animal ", group)}
    if runs:
        gaps.append(
            f"Laboratory mice: {len(animals)} groups are one animal each, as their names tell. "
            f"{len(runs)} others are runs of files that tell none, so that one animal may be in "
            "training and in validation."
        )
    if "composites" in found:
        gaps.append(
            "Composites put a cat and a mouse from two photographs into one picture: light, "
            "sharpness and scale agree only roughly, and the two never look at each other."
        )
    if any(key[0] == "probe" for key in told.labelled):
        gaps.append(
            "Some classes were told by a probe, not by a person: see `labelled_by` and "
            "`confidence`. A look at them in the gallery is worth the time."
        )
    if told.roles["unlabelled"]:
        gaps.append("Unlabelled pictures have no class and are not trained on.")
    if found - {"scenes"}:
        gaps.append(
            "Near duplicates are found by a perceptual hash and confirmed by features: copies that "
            "were mirrored, turned, or cropped by much more than a twentieth can remain."
        )
    return gaps
