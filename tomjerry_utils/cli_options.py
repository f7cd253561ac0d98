"""What the commands' options have in common: one parser, numbers that are checked, examples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tomjerry_utils import UserError

Handler = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line that says where the help is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")


def command_in(
    commands: Any, name: str, handler: Handler | None, text: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a command with its help.

    Args:
        commands: what `add_subparsers` gave.
        handler: None for a command that has commands of its own.
        text: one line, in lower case.
        examples: command lines.
    """
    added = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples_of(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if handler is not None:
        added.set_defaults(handler=handler)
    return added


def examples_of(*lines: str) -> str:
    """The last part of a help page."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def with_profile(parser: argparse.ArgumentParser) -> None:
    """Add `--profile`."""
    parser.add_argument(
        "--profile",
        metavar="P",
        help="smoke, mini, colab, paper or a YAML file (TOMJERRY_PROFILE, else mini)",
    )


def with_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")


# ---- types of options ----------------------------------------------------------------------------


def natural_number(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': give a whole number, 1 or more")
    return int(text)


def seed_number(text: str) -> int:
    """A whole number that any generator takes as its seed."""
    if not text.isdecimal() or int(text) >= 10**12:
        raise argparse.ArgumentTypeError(f"'{text}': give a whole number from 0 to 999999999999")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}': give a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': give a number from 0 to 1")
    return value


def price(text: str) -> tuple[float, float]:
    """(input, output) in dollars per million tokens."""
    try:
        first, second = (float(part) for part in text.split(","))
        if not (0 <= first < math.inf and 0 <= second < math.inf):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}': give dollars per million tokens as IN,OUT, such as 0.4,1.6"
        ) from None
    return first, second
