"""Files of decisions, one JSON object a line, as people write and mend them: read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError


def read_lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a file with where it stands, "FILE, line N"; empty lines are passed over.

    Args:
        what: names the file that is wanted, such as "the decisions.jsonl that a review wrote".

    Raises:
        UserError: no such file, no text, or a line that is no JSON object; the line is named.
    """
    try:
        # Only a line feed ends a line: JSON leaves other separators in texts as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"no file {path}: give {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file: give {what}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg}): mend or remove the line"
            ) from None
        if not isinstance(given, dict):
            raise UserError(f"{where}: not a decision: one JSON object a line is wanted")
        yield where, given


def texts(given: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, str]:
    """The named values of a line, "" where one is missing; what is no text is a `UserError`."""
    values = {}
    for name in names:
        value = given.get(name, "")
        if not isinstance(value, str):
            raise UserError(f"{where}: '{name}' is not a text: put it in quotes")
        values[name] = value
    return values
