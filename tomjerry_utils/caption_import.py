"""Captions that were bought or written elsewhere, taken into the store as answers."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_answers import settled
from tomjerry_utils.caption_store import Store, Taken
from tomjerry_utils.captioner import OpenAISource
from tomjerry_utils.images import list_images
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import hash_file

IMPORTED = "imported"  # what such an answer says in place of the way it was asked for
_TEXTS = ("caption", "action", "place", "sha256", "request_id", "model")


@dataclass(frozen=True)
class Imported:
    """What became of a file of captions.

    Attributes:
        taken: answers added to the store.
        known: pictures that had an answer already, or whose content came twice.
        skipped: (line number, reason) of rows that are no answer to any picture.
        paid_elsewhere: US dollars that the file says were paid for what was taken.
    """

    taken: int
    known: int
    skipped: list[tuple[int, str]] = field(repr=False)
    paid_elsewhere: float


@dataclass(frozen=True)
class _Row:
    line: int
    file_name: str
    caption: str
    subjects: tuple[str, ...]
    usd: float
    action: str
    place: str
    sha256: str
    request_id: str
    model: str


def import_answers(file: Path, images: Path, source: OpenAISource) -> Imported:
    """Take a CSV or JSONL file of captions into a source's store, so that they are not asked again.

    Columns: `file_name`, relative to `images`, and `caption`; if known also `subjects`, `action`,
    `place`, `usd`, `sha256` (of the picture), `request_id` and `model`. Others are passed over.
    Nothing is booked against a budget: what was paid elsewhere is noted beside each answer.

    Args:
        source: whose store, model, prompt, detail and size the captions are answers for.

    Raises:
        UserError: a file that is not there or broken, or about none of the pictures; then nothing
            is written.
    """
    rows = list(_read(file))
    paths = {path.relative_to(images).as_posix(): path for path in list_images(images)}
    taken, known, paid = 0, 0, 0.0
    skipped: list[tuple[int, str]] = []
    answers: list[tuple[str, _Row]] = []
    seen: dict[str, int] = {}
    for row in progress(rows, "imported captions", unit="row"):
        path = paths.get(row.file_name)
        sha256 = hash_file(path) if path else ""
        if why := _unfit(row, sha256, source.model, seen):
            skipped.append((row.line, why))
            continue
        seen[row.file_name] = row.line
        answers.append((sha256, row))
    if not answers:
        line, why = skipped[0]
        raise UserError(
            f"{file}: none of its {len(rows)} captions is about a picture in {images}; "
            f"line {line}: {why}"
        )
    with contextlib.closing(Store(source.store)) as store:
        for sha256, row in answers:
            key = source.key_of(sha256)
            try:
                name = store.begin(key, 0.0, math.inf, sha256=sha256, settled=settled)
            except Taken:
                known += 1
                continue
            store.end(name, "answer", key=key, **_record(row, source.model))
            taken, paid = taken + 1, paid + row.usd
    return Imported(taken, known, skipped, paid)


# ---- helpers -------------------------------------------------------------------------------------


def _unfit(row: _Row, sha256: str, model: str, seen: dict[str, int]) -> str:
    """Why a row is no answer: "" where it is."""
    if not row.file_name:
        return "no file_name"
    if not sha256:
        return f"{row.file_name}: no such picture"
    if not row.caption:
        return f"{row.file_name}: the caption is empty"
    if row.sha256 and row.sha256.lower() != sha256:
        return f"{row.file_name}: the caption is about another picture (sha256 differs)"
    # A dated snapshot answers for the model that was asked for by its family's name.
    family = re.sub(r"-\d{4}-\d{2}-\d{2}$", "", row.model)
    if row.model and model not in (row.model, family):
        return f"{row.file_name}: by '{row.model}', not '{model}': import it with that name"
    if row.file_name in seen:
        return f"{row.file_name}: has the caption of line {seen[row.file_name]} already"
    return ""


def _record(row: _Row, model: str) -> dict[str, Any]:
    return {
        "status": "ok",
        "caption": row.caption,
        "subjects": list(row.subjects),
        "action": row.action,
        "place": row.place,
        "model": model,
        "answered_by": row.model or model,
        "api": IMPORTED,
        "input_tokens": 0,
        "output_tokens": 0,
        "usd": 0.0,
        "paid_elsewhere": row.usd,
        "request_id": row.request_id,
    }


def _read(file: Path) -> Iterator[_Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {file}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder: give a .csv or .jsonl file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file: save it as one") from None
    match file.suffix.lower():
        case ".csv":
            found = _from_csv(text, file)
        case ".jsonl" | ".ndjson":
            found = _from_jsonl(text, file)
        case other:
            raise UserError(f"{file}: cannot read '{other}': give a .csv or .jsonl file")
    none = True
    for number, values in found:
        none = False
        yield _row(number, values, f"{file}, line {number}")
    if none:
        raise UserError(f"{file}: holds no captions: it needs the columns file_name and caption")


def _from_csv(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    end = 1
    try:
        _demand(reader.fieldnames or (), f"{file}, line 1")
        end = reader.line_num
        for values in reader:
            # A quoted caption may go on over lines: a row is named by its first.
            number, end = end + 1, reader.line_num
            if None in values or None in values.values():
                raise UserError(
                    f"{file}, line {number}: not as many columns as line 1 names: put a caption "
                    "with commas in quotes"
                )
            yield number, values
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not valid CSV ({error})") from None


def _from_jsonl(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg}): mend the line") from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: not a caption: one JSON object a line is wanted")
        _demand(values, where)
        yield number, values


def _demand(names: Any, where: str) -> None:
    for name in ("file_name", "caption"):
        if name not in names:
            raise UserError(f"{where}: no column '{name}': it needs file_name and caption")


def _row(line: int, values: dict[str, Any], where: str) -> _Row:
    texts = {}
    for name in ("file_name", *_TEXTS):
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: '{name}' is not a text: put it in quotes")
        texts[name] = " ".join((value or "").split())
    if texts["sha256"] and not re.fullmatch(r"[0-9a-fA-F]{64}", texts["sha256"]):
        raise UserError(f"{where}: sha256 '{texts['sha256'][:20]}' is not 64 hex digits")
    try:
        usd = float(values.get("usd") or 0)
    except (TypeError, ValueError):
        usd = math.nan
    if not 0 <= usd < math.inf:
        raise UserError(f"{where}: usd is '{values.get('usd')}': write dollars as a number, 0.003")
    subjects = _subjects(values.get("subjects"), where)
    return _Row(line=line, subjects=subjects, usd=usd, **texts)


def _subjects(given: Any, where: str) -> tuple[str, ...]:
    """A JSON list, or names with ";", "," or "and" between them."""
    if isinstance(given, str) and given.strip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            given = json.loads(given)
    if isinstance(given, str):
        given = re.split(r"[;,|]|\band\b", given)
    if not isinstance(given or [], list) or not all(isinstance(name, str) for name in given or []):
        raise UserError(f"{where}: 'subjects' is no list of names: write tom; jerry")
    return tuple(dict.fromkeys(name.strip() for name in given or [] if name.strip()))
