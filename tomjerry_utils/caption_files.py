"""What a folder of captions holds: answers as recorded, captions after review, what has none.

`recorded.jsonl` is what the source said; `captions.jsonl` and `set_aside.jsonl` are that with the
decisions of a review applied. All are written whole, under a short lock, from everything that the
store knows: of two processes that caption into one folder, whichever writes last writes it all.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_answers import settled
from tomjerry_utils.caption_review import (
    DECISIONS,
    REJECTED,
    Decision,
    apply,
    read_decisions,
    write_decisions,
)
from tomjerry_utils.caption_store import Store
from tomjerry_utils.captioner import Caption, CaptionSource, OpenAISource, Session
from tomjerry_utils.runs import PROVENANCE, hash_file, locked, log, read_jsonl, write_jsonl
from tomjerry_utils.spending import Price

CAPTIONS = "captions.jsonl"
RECORDED = "recorded.jsonl"
SET_ASIDE = "set_aside.jsonl"
POSSIBLY_PAID = "possibly_paid.jsonl"
STORE = "store.jsonl"
REVIEW = "caption_review.jsonl"  # of a stage, beside its folder

SPECIES = {"tom": "cat", "jerry": "mouse"}


@dataclass(frozen=True)
class Captions:
    """The captions of a run.

    Attributes:
        folder: holds `captions.jsonl`, `set_aside.jsonl`, `recorded.jsonl`, and `sample.json` of a
            stage, `possibly_paid.jsonl` of captions that cost money.
        rows: `file_name`, `sha256`, `caption`, `subjects`, `action`, `place`, `model`,
            `prompt_version`, `input_tokens`, `output_tokens`, `usd`, `request_id`, `status`, `time`
            (ISO 8601) and `api` (how it was asked for); beside them `target` (the caption in the
            words of the target domain), `mapped` (the species that were exchanged for it, such as
            "tom -> cat"), `review` ("accepted", "edited" or "") and `edited_from`.
        set_aside: `file_name`, `status`, `reason` of pictures without a caption.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(repr=False)
    set_aside: list[dict[str, Any]] = field(repr=False)

    @property
    def usd(self) -> float:
        """What these captions cost."""
        return sum(row["usd"] for row in self.rows)

    @property
    def recorded(self) -> list[dict[str, Any]]:
        """All captions as they were before any review: what a review is about."""
        return read_recorded(self.folder)


def read_captions(folder: Path) -> Captions:
    """The captions that a folder holds."""
    return Captions(folder, read_jsonl(folder / CAPTIONS), read_jsonl(folder / SET_ASIDE))


def read_recorded(folder: Path) -> list[dict[str, Any]]:
    """The captions of a folder as they were answered, whatever a review made of them."""
    there = (folder / RECORDED).is_file()
    return read_jsonl(folder / (RECORDED if there else CAPTIONS))


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The pictures that a folder of captions is about, with their hashes where it knows them."""
    hashes: dict[str, str] = {}
    for name in (SET_ASIDE, RECORDED):
        if (folder / name).is_file():
            hashes |= {r["file_name"]: r.get("sha256", "") for r in read_jsonl(folder / name)}
    if (folder / STORE).is_file():
        with contextlib.closing(Store(folder / STORE)) as store:
            sent = [sent for batch in store.batches.values() for sent in batch.requests]
        hashes |= {name: request.sha256 for request in sent for name in request.names}
    return [{"file_name": name, "sha256": hashes[name]} for name in sorted(hashes)]


def write_captions(
    source: CaptionSource,
    rows: Sequence[dict[str, Any]],
    images: Path,
    out: Path,
    *,
    paid: OpenAISource | None = None,
    decisions: Path | None = None,
) -> Captions:
    """Run a source and write what a folder of captions holds, in the order of `rows`.

    Everything is written even when the source stops early; the error goes on after that.

    Args:
        paid: whose store knows more answers than this run has seen, such as another process's.
        decisions: file of a review to apply, if it is there; `out/decisions.jsonl` by default.

    Raises:
        UserError: the source stops, or the file of decisions is broken (before anything is asked).
    """
    from tomjerry_utils.progress import progress

    path = decisions or out / DECISIONS
    made = read_decisions(path) if path.is_file() else {}
    got: dict[str, Caption] = {}
    try:
        with progress(len(rows), "captions", unit="picture") as bar:
            for caption in source(rows, images):
                got[caption.file_name] = caption
                bar.update()
    finally:
        # A source that refused to start must not wipe what an earlier run wrote.
        if got:
            _write(rows, got, images, out, paid, made)
    return read_captions(out)


def write_answers(
    rows: Sequence[dict[str, Any]], images: Path, out: Path, paid: OpenAISource
) -> None:
    """Write what a folder of captions holds from the store alone; nothing is asked."""
    path = out / DECISIONS
    made = read_decisions(path) if path.is_file() else {}
    _write(rows, {}, images, out, paid, made)


def answers_in(
    source: OpenAISource, rows: Sequence[dict[str, Any]], images: Path
) -> dict[str, Caption]:
    """What a source's store says already, without asking: file name → caption, or why none.

    Pictures that another request would make sense about are left out.
    """
    if not source.store.is_file():
        return {}
    with contextlib.closing(Store(source.store)) as store:
        return dict(_settled(source, store, _hashes(rows, {}, images)))


def apply_decisions(out: Path, file: Path) -> tuple[Captions, list[tuple[str, str]]]:
    """`tomjerry caption review --decisions`: apply a review to a folder of captions.

    It takes the place of any review before, and starts from the captions as they were recorded.
    Decisions that fit are kept in `out/decisions.jsonl`, so that later runs apply them too; those
    about a stage of the course in `caption_review.jsonl` beside it, and the stage applies them.

    Returns:
        The captions, and (file name, reason) of each decision that was skipped.

    Raises:
        UserError: no captions there, or a broken file; then nothing is changed.
    """
    _demand(out)
    decisions = read_decisions(file)
    with locked(out / CAPTIONS, wait=60.0):
        recorded = read_recorded(out)
        skipped = apply(recorded, decisions).skipped
        misfits = {name for name, _ in skipped}
        fitting = {name: made for name, made in decisions.items() if name not in misfits}
        path = _review_of(out)
        if path.parent != out:
            # A finished stage is what its inputs say: the review is one of them.
            write_decisions(path, fitting.values())
            log(f"{path}: {len(fitting)} decisions, which the next 'tomjerry course' applies")
            return read_captions(out), skipped
        aside = [row for row in read_jsonl(out / SET_ASIDE) if row["status"] != "rejected"]
        # In this order a kill leaves the answers whole, and a second call sets all right.
        write_jsonl(out / RECORDED, recorded)
        write_decisions(path, fitting.values())
        _publish(recorded, aside, fitting, out)
    return read_captions(out), skipped


def review_page(out: Path, images: Path | None) -> Path:
    """`tomjerry caption review`: write `out/review.html`, where captions are decided about.

    Raises:
        UserError: no captions there, or no folder of pictures.
    """
    from tomjerry_utils.caption_page import PAGE, write_page

    _demand(out)
    if images is None:
        raise UserError("a page needs pictures: give their folder with --images")
    if not images.is_dir():
        raise UserError(f"no folder {images}: give the one that was captioned")
    path = _review_of(out)
    made = read_decisions(path) if path.is_file() else {}
    return write_page(out / PAGE, read_recorded(out), images, made)


def to_target(caption: str) -> str:
    """The caption in the words of the target domain: tom becomes a cat, jerry a mouse.

    "tom and jerry are running" → "a cat and a mouse are running". A second mention takes "the".
    Captions of photographs come back unchanged.
    """
    met: set[str] = set()

    def species(found: re.Match[str]) -> str:
        name = found["name"].lower()
        article = "the" if name in met else "a"
        met.add(name)
        # A name opens a sentence with a capital; elsewhere it had one as a name only.
        opens = found["name"][0].isupper() and re.search(
            r"(^|[.!?]\s*)$", found.string[: found.start()]
        )
        return f"{article.capitalize() if opens else article} {SPECIES[name]}"

    return re.sub(r"\b(?P<name>tom|jerry)\b", species, caption, flags=re.IGNORECASE)


def mapped_species(caption: str) -> list[str]:
    """Which exchanges `to_target` makes in a caption, such as ["tom -> cat"]."""
    words = set(re.findall(r"\b(?:tom|jerry)\b", caption.lower()))
    return [f"{name} -> {species}" for name, species in SPECIES.items() if name in words]


# ---- helpers -------------------------------------------------------------------------------------


def _review_of(out: Path) -> Path:
    """Where the decisions about a folder of captions are kept: of a stage's, beside it."""
    return out.resolve().parent / REVIEW if (out / PROVENANCE).is_file() else out / DECISIONS


def _demand(out: Path) -> None:
    if not (out / CAPTIONS).is_file():
        raise UserError(f"no captions in {out}: make them first with 'tomjerry caption run'")


def _write(
    rows: Sequence[dict[str, Any]],
    got: Mapping[str, Caption],
    images: Path,
    out: Path,
    paid: OpenAISource | None,
    decisions: Mapping[str, Decision],
) -> None:
    hashes = _hashes(rows, got, images) if paid is not None else {}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / CAPTIONS, wait=60.0):
        found = dict(got)
        if paid is not None:
            # Read under the lock: who writes last has then seen all that came before.
            with contextlib.closing(Store(paid.store)) as store:
                found.update(_settled(paid, store, hashes))
                names = {sha256: name for name, sha256 in reversed(hashes.items())}
                unsure = store.possibly_paid()
            keys = ("sha256", "usd", "time", "reason")
            write_jsonl(
                out / POSSIBLY_PAID,
                (
                    {
                        "file_name": names.get(row["sha256"], ""),
                        **{key: row[key] for key in keys},
                    }
                    for row in unsure
                ),
            )
        before = {}
        if paid is not None and (out / SET_ASIDE).is_file():
            # Of a picture that this run did not come to, an earlier one may know why.
            earlier = read_jsonl(out / SET_ASIDE)
            before = {r["file_name"]: r for r in earlier if r["status"] != "rejected"}
        recorded, aside = [], []
        for name in (row["file_name"] for row in rows):
            caption = found.get(name)
            if caption is not None and caption.status == "ok":
                recorded.append(_row(caption))
            elif caption is not None:
                told = ("file_name", "status", "reason")
                aside.append({key: getattr(caption, key) for key in told})
            elif name in before:
                aside.append(before[name])
        write_jsonl(out / RECORDED, recorded)
        for name, why in _publish(recorded, aside, decisions, out):
            log(f"review: {name}: decision skipped: {why}")


def _publish(
    recorded: Sequence[dict[str, Any]],
    aside: Sequence[dict[str, Any]],
    decisions: Mapping[str, Decision],
    out: Path,
) -> list[tuple[str, str]]:
    """Write `captions.jsonl` and `set_aside.jsonl` after review; the decisions that do not fit."""
    reviewed = apply(recorded, decisions)
    write_jsonl(out / CAPTIONS, (_worded(row) for row in reviewed.rows))
    rejected = (
        {"file_name": row["file_name"], "status": "rejected", "reason": REJECTED}
        for row in reviewed.rejected
    )
    write_jsonl(out / SET_ASIDE, [*aside, *rejected])
    there = {row["file_name"] for row in recorded}
    return [(name, why) for name, why in reviewed.skipped if name in there]


def _row(caption: Caption) -> dict[str, Any]:
    row = asdict(caption)
    row.pop("reason")
    return _worded({**row, "target": "", "mapped": [], "review": "", "edited_from": ""})


def _worded(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose words for the target domain follow from its caption."""
    caption = row["caption"]
    return {**row, "target": to_target(caption), "mapped": mapped_species(caption)}


def _hashes(
    rows: Sequence[dict[str, Any]], got: Mapping[str, Caption], images: Path
) -> dict[str, str]:
    """File name → SHA-256 of the picture, of those that can be read."""
    hashes = {}
    for row in rows:
        name = row["file_name"]
        known = got[name].sha256 if name in got else row.get("sha256")
        with contextlib.suppress(OSError):
            hashes[name] = known or hash_file(images / name)
    return hashes


def _settled(
    source: OpenAISource, store: Store, hashes: Mapping[str, str]
) -> Iterator[tuple[str, Caption]]:
    session = Session(source, store, Price(0, 0), secret="", client=None)
    billed: set[str] = set()
    for name, sha256 in hashes.items():
        answers = store.answers.get(source.key_of(sha256), [])
        if settled(answers):
            yield name, session.caption(name, sha256, answers[-1], billed)
