"""What is kept of what was read: screens, duplicates, classes, balance and splits.

Every decision follows from the notes in the journal and the settings alone, in the order of the
rows: the same notes give the same manifest, however often the reading was interrupted.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tomjerry_utils import UserError, class_probe, near_duplicates, screens
from tomjerry_utils.images import load_image
from tomjerry_utils.journal import Journal, Seen
from tomjerry_utils.picture_review import BY_HAND, DROPPED, Decision
from tomjerry_utils.runs import log
from tomjerry_utils.scenes import CLASSES, STYLES, label_of
from tomjerry_utils.sources import Row

SALT = "tomjerry split 1"
# Columns of the manifest, and the measures that they show; `text` is the caption there.
_MEASURED = {
    **{name: name for name in ("width", "height", "blur", "photo")},
    "letters": "text",
    "mark": "mark",
}
_PROBED = 4000  # labelled pictures of a class that a probe is fitted to at most
_CHUNK = 1024  # rows or features handled at once


@dataclass(frozen=True)
class Curation:
    """How pictures are chosen.

    Attributes:
        short_side: px; larger pictures are reduced to this, none is enlarged.
        validation_fraction: share of the groups.
        per_class: pictures of a class and domain at most; 0 for all.
        limits: of the screens; None for pictures that have been chosen with care before.
        precision: of the classes that a probe tells, on pictures held out; above 1, none are told.
        classes: those wanted; pictures of others are dropped.
        composites: photographs of the class `both` that there should be: what is missing is made of
            one cat and one mouse each.
        originals: folders that were collected, where files with masks may lie for that.
        decisions: by hand; they overrule the screens, the duplicates and the balance.
    """

    short_side: int
    validation_fraction: float
    per_class: int = 0
    limits: screens.Limits | None = field(default_factory=screens.Limits)
    precision: float = 2.0
    classes: tuple[str, ...] = CLASSES
    composites: int = 0
    originals: tuple[Path, ...] = ()
    decisions: Sequence[Decision] = ()


def split_of(group: str, validation_fraction: float) -> str:
    """The side of a group, "train" or "validation": a pure function of its name."""
    spread = hashlib.sha256(f"{SALT}:{group}".encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(spread[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


def kind_of(reason: str) -> str:
    """A reason without the names and numbers in it, for counting."""
    return reason.split(":")[0].split(" of images/")[0]


class Groups:
    """Names that are joined into larger groups; each is called by its first member's name."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def join(self, a: str, b: str) -> None:
        """From now on the two are one."""
        first, second = sorted((self.of(a), self.of(b)))
        if first != second:
            self._above[second] = first

    def of(self, name: str) -> str:
        """The name of the group that a name is in: itself, where it was joined to nothing."""
        top = name
        while top in self._above:
            top = self._above[top]
        while name != top:
            self._above[name], name = top, self._above[name]
        return top


def judge(journal: Journal, out: Path, how: Curation) -> np.ndarray:
    """Decide on every row of a journal and note it there.

    Returns:
        (N,) bool, whether each row is kept.
    """
    judged = _Judged(journal, out, how)
    judged.each_by_itself()
    judged.near_duplicates()
    judged.classes()
    judged.balance()
    return judged.write()


class _Judged:
    """The rows as far as they are decided on: a few numbers each, in the order of the journal."""

    def __init__(self, journal: Journal, out: Path, how: Curation) -> None:
        n = journal.count()
        self._journal, self._out, self._how = journal, out, how
        self._by_hand = {decision.sha256: decision for decision in how.decisions}
        self._reason: dict[int, str] = {}  # of the rows that are dropped
        self._extra: dict[int, Row] = {}  # columns that only some rows have
        self._groups = Groups()
        self._name = [""] * n
        self._group = [""] * n
        self._domain = [""] * n
        self._class = [""] * n
        self._role = [""] * n
        self._forced = np.zeros(n, bool)  # kept by hand
        self._screened = np.zeros(n, bool)
        self._worth = np.zeros(n)  # of two duplicates the one that is worth more stays
        self._rank = np.zeros(n, np.uint64)  # lots, drawn by a row's name
        self._hashes = np.zeros((n, 0), np.uint64)

    def each_by_itself(self) -> None:
        """What can be said of a picture without the others, and which are equal to a pixel."""
        owners: dict[bytes, int] = {}
        for i, (row, seen) in enumerate(self._journal.pictures()):
            self._name[i], self._group[i] = row["file_name"], row["group"]
            self._domain[i], self._class[i], self._role[i] = (
                row["domain"],
                row["class"],
                row["role"],
            )
            lot = hashlib.sha256(f"{row['source']}:{row['file_name']}".encode()).digest()
            self._rank[i] = int.from_bytes(lot[:8], "big")
            hashes = np.frombuffer(seen.hashes, np.uint64)
            if len(hashes) > self._hashes.shape[1]:
                self._hashes = np.zeros((len(self._name), len(hashes)), np.uint64)
            if len(hashes):
                self._hashes[i] = hashes
            reason = row["reason"] or self._own_reason(i, row, seen)
            if seen.sha256:
                first = owners.setdefault(bytes.fromhex(seen.sha256), i)
                if first != i:
                    self._groups.join(self._group[first], row["group"])
                    if not reason and first not in self._reason:
                        reason = f"duplicate of {self._name[first]}"
                        self._extra.setdefault(i, {})["duplicate_of"] = self._name[first]
            if reason:
                self._reason[i] = reason

    def _own_reason(self, i: int, row: Row, seen: Seen) -> str:
        if seen.error:
            return f"cannot be read: {seen.error}"
        if seen.measures:
            self._screened[i] = True
            short = min(seen.measures["width"], seen.measures["height"])
            self._worth[i] = min(short, self._how.short_side) / (1 + seen.measures["blur"])
            reason = self._screened_out(row, seen.measures)
        else:
            reason = ""
        decision = self._by_hand.get(seen.sha256)
        if decision is None:
            return reason or self._unwanted(i)
        self._extra[i] = {"decided": BY_HAND, "screened": reason, "class_found": row["class"]}
        if decision.decision == "drop":
            return DROPPED + (f": {decision.note}" if decision.note else "")
        if decision.cls:
            self._class[i] = decision.cls
            self._extra[i]["labelled_by"] = "hand"
        self._forced[i] = decision.decision == "keep"
        return self._unwanted(i) or ("" if self._forced[i] else reason)

    def _screened_out(self, row: Row, told: Mapping[str, float]) -> str:
        if self._how.limits is None:
            return ""
        # What a film's frames are its source knows; cartoons in three dimensions, lit and with
        # depth of field, pass for photographs.
        domain = "" if row["frame"] is not None else row["domain"]
        against = screens.judge(*_split(told), domain, self._how.limits)
        return against[0][0] if against else ""

    def _unwanted(self, i: int) -> str:
        if self._class[i] and self._class[i] not in self._how.classes:
            return f"not a wanted class: {self._class[i]}"
        return ""

    def near_duplicates(self) -> None:
        """Of pictures that show the same one is kept; all of them are one group."""
        places = [i for i in range(len(self._name)) if i not in self._reason]
        proposed = near_duplicates.propose(self._hashes[places])
        distance = near_duplicates.confirm(
            proposed, lambda wanted: [self._picture(places[i]) for i in wanted]
        )
        near = distance <= near_duplicates.THRESHOLD
        pairs = proposed[near]
        order = np.empty(len(places))
        order[sorted(range(len(places)), key=lambda k: self._order_of_worth(places[k]))] = range(
            len(places)
        )
        stands = near_duplicates.keep_best(pairs, -order)
        cluster = near_duplicates.clusters(len(places), pairs)
        how_far = dict(zip(map(tuple, pairs.tolist()), distance[near].tolist(), strict=True))
        for k in np.unique(pairs).tolist():
            i, best = places[k], places[int(stands[k])]
            self._groups.join(self._group[places[int(cluster[k])]], self._group[i])
            self._extra.setdefault(i, {})["cluster"] = self._name[places[int(cluster[k])]]
            if i == best:
                continue
            reason = (
                f"near duplicate of {self._name[best]}: "
                f"distance {how_far[min(k, int(stands[k])), max(k, int(stands[k]))]:.3f}, "
                f"at most {near_duplicates.THRESHOLD:g}"
            )
            if self._forced[i]:
                self._extra[i]["screened"] = self._extra[i]["screened"] or reason
            else:
                self._reason[i] = reason
                self._extra[i]["duplicate_of"] = self._name[best]

    def _order_of_worth(self, i: int) -> tuple[bool, bool, bool, float, int]:
        trained = self._role[i] == "training"
        return not self._forced[i], not trained, not self._class[i], -self._worth[i], i

    def _picture(self, place: int) -> np.ndarray:
        small = self._journal.thumb(self._name[place])
        return load_image(self._out / self._name[place]) if small is None else small

    def classes(self) -> None:
        """Where a source does not tell the class, a probe fitted to those that are told may."""
        for domain in STYLES:
            told: dict[str, list[int]] = {name: [] for name in self._how.classes}
            open_: list[int] = []
            for i, role in enumerate(self._role):
                if role == "training" and self._domain[i] == domain and self._screened[i]:
                    if self._class[i] in told:
                        told[self._class[i]].append(i)
                    elif not self._class[i] and i not in self._reason:
                        open_.append(i)
            if open_ and self._how.precision <= 1:
                self._probe(domain, told, open_)

    def _probe(self, domain: str, told: Mapping[str, Sequence[int]], open_: Sequence[int]) -> None:
        fitted = [
            i
            for places in told.values()
            for i in sorted((p for p in places if p not in self._reason), key=self._lot)[:_PROBED]
        ]
        try:
            probe = class_probe.fit(
                self._journal.features([self._name[i] for i in fitted]),
                [self._class[i] for i in fitted],
                [self._groups.of(self._group[i]) for i in fitted],
            )
        except UserError as error:
            log(f"collect: {len(open_)} {domain} pictures without a class stay so: {error}")
            return
        least = probe.threshold(self._how.precision)
        for start in range(0, len(open_), _CHUNK):
            part = open_[start : start + _CHUNK]
            names, sure = probe.predict(self._journal.features([self._name[i] for i in part]))
            for i, name, confidence in zip(part, names, sure, strict=True):
                self._extra.setdefault(i, {})["confidence"] = round(float(confidence), 4)
                if confidence >= least:
                    self._class[i] = str(name)
                    self._extra[i]["labelled_by"] = "probe"

    def _lot(self, i: int) -> int:
        return int(self._rank[i])

    def balance(self) -> None:
        """At most so many of a class and domain, spread over as many groups as there are."""
        if not self._how.per_class:
            return
        shelves: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, name in enumerate(self._class):
            if name and self._domain[i] and self._role[i] == "training" and i not in self._reason:
                shelves[self._domain[i], name].append(i)
        for places in shelves.values():
            met: dict[str, int] = defaultdict(int)
            order: list[tuple[bool, int, int, int]] = []
            for i in sorted(places, key=self._lot):
                group = self._groups.of(self._group[i])
                order.append((not self._forced[i], met[group], int(self._rank[i]), i))
                met[group] += 1
            for *_, i in sorted(order)[self._how.per_class :]:
                self._reason[i] = (
                    f"over the {self._how.per_class} asked for of this class and domain"
                )

    def write(self) -> np.ndarray:
        """Note all verdicts in the journal; (N,) bool, whether each row is kept."""
        kept = np.ones(len(self._name), bool)
        kept[list(self._reason)] = False
        for start in range(0, len(kept), _CHUNK):
            with self._journal.writing():
                for i, seen in enumerate(self._journal.notes(start, _CHUNK), start=start):
                    self._journal.decide(i, self._verdict(i, seen))
        return kept

    def _verdict(self, i: int, seen: Seen) -> Row:
        group, extra = self._groups.of(self._group[i]), self._extra.get(i, {})
        role, cls, domain = self._role[i], self._class[i], self._domain[i]
        if role == "training" and not (cls and domain):
            role = "unlabelled"
        return {
            "group": group,
            "split": split_of(group, self._how.validation_fraction),
            "class": cls,
            "label": label_of(cls, domain) if cls and domain else "",
            "role": role,
            "kept": i not in self._reason,
            "reason": self._reason.get(i, ""),
            "labelled_by": "source" if cls else "",
            "sha256": seen.sha256,
            "read_as": seen.read_as,
            **_columns(seen.measures or {}),
            **extra,
        }


def _split(told: Mapping[str, float]) -> tuple[screens.Measures, screens.Scores]:
    names = screens.Measures.__dataclass_fields__
    return (
        screens.Measures(**{name: told[name] for name in names}),  # type: ignore[arg-type]
        screens.Scores(**{n: value for n, value in told.items() if n not in names}),
    )


def _columns(told: Mapping[str, float]) -> Row:
    """What the manifest says of a picture's measures."""
    return {column: round(told[name], 4) for column, name in _MEASURED.items() if name in told}
