"""`tomjerry choose`: a study by human eyes, its page and its analysis."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.cli_options import (
    above_zero,
    command_in,
    natural_number,
    seed_number,
    with_out,
)


def add(commands: Any) -> None:
    """Add the command to what `add_subparsers` gave."""
    parser = command_in(
        commands,
        "choose",
        None,
        "let people choose between translations: a blind page, and what their choices say",
        "tomjerry choose page --methods ours=out cut=cut/results --out study",
        "tomjerry choose analyse study/answers-*.json --json study/report.json",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    added = command_in(
        actions,
        "page",
        _page,
        "write a page that shows two translations at a time, and the key to it",
        "tomjerry choose page --methods ours=out cut=cut/results --out study",
        "tomjerry choose page --methods ours=out sdedit=sd cut=cut --sources frames "
        "--question both --real photos --trials 90 --out study",
    )
    added.add_argument(
        "--methods",
        nargs="+",
        action="extend",
        type=_method,
        required=True,
        metavar="NAME=DIR",
        help="each method's translations, under the same file names",
    )
    added.add_argument("--sources", type=Path, metavar="DIR", help="the cartoons")
    added.add_argument(
        "--real", type=Path, metavar="DIR", help="photographs, to catch who does not look"
    )
    added.add_argument(
        "--question",
        choices=("realism", "faithful", "both"),
        default="realism",
        help="what looks more real, or what keeps the cartoon's scene (realism)",
    )
    added.add_argument(
        "--trials",
        type=natural_number,
        metavar="N",
        help="of each question, made more until all pairs and sides are even (60)",
    )
    added.add_argument(
        "--size", type=natural_number, metavar="PIXELS", help="cut and bring all to this side first"
    )
    added.add_argument(
        "--seed", type=seed_number, default=0, metavar="S", help="of scenes, sides and order (0)"
    )
    with_out(added)

    added = command_in(
        actions,
        "analyse",
        _analyse,
        "who is chosen how often: strengths, pairs, intervals, and how raters worked",
        "tomjerry choose analyse study/answers-*.json --json study/report.json",
        "tomjerry choose analyse a.json b.json --key study/key.json --json report.json "
        "--figure report.png",
    )
    added.add_argument(
        "answers", nargs="+", type=Path, metavar="ANSWERS", help="files that raters saved"
    )
    added.add_argument(
        "--key", type=Path, metavar="FILE", help="of the page (key.json beside the first answers)"
    )
    added.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write it")
    added.add_argument(
        "--figure", type=Path, metavar="FILE", help="also draw the strengths, .png or .pdf"
    )
    added.add_argument(
        "--prior",
        type=above_zero,
        default=0.1,
        metavar="WINS",
        help="added to both sides of every pair, against strengths without end (0.1)",
    )
    added.add_argument(
        "--seed", type=seed_number, default=0, metavar="S", help="of the bootstrap (0)"
    )


# ---- handlers ------------------------------------------------------------------------------------


def _page(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import forced_choice

    methods = dict(arguments.methods)
    if len(methods) < len(arguments.methods):
        raise UserError("two methods of one name: give each NAME=DIR a name of its own")
    every = tuple(forced_choice.QUESTIONS)
    made = forced_choice.make_page(
        methods,
        arguments.out,
        sources=arguments.sources,
        real=arguments.real,
        questions=every if arguments.question == "both" else (arguments.question,),
        trials=arguments.trials,
        size=arguments.size,
        seed=arguments.seed,
    )
    kinds = [trial.kind for trial in made.trials]
    print(
        f"{len(kinds)} trials: {kinds.count('main')} to compare, {kinds.count('repeat')} repeated, "
        f"{kinds.count('catch')} to catch who does not look"
    )
    print(f"{made.page}: send it to raters; {made.key}: keep it to yourself")


def _analyse(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import choice_answers
    from tomjerry_utils.runs import write_json

    figure = arguments.figure
    if figure is not None and figure.suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"{figure}: cannot draw '{figure.suffix}': use .png or .pdf")
    report = choice_answers.analyse(
        arguments.answers, key=arguments.key, prior=arguments.prior, seed=arguments.seed
    )
    print(choice_answers.table(report))
    print(write_json(arguments.json, report))
    if figure is not None:
        print(choice_answers.write_figure(report, figure))


# ---- types of options ----------------------------------------------------------------------------


def _method(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name.strip() and sign and folder):
        raise argparse.ArgumentTypeError(f"'{text}': give NAME=DIR, such as ours=out")
    return name.strip(), Path(folder)
