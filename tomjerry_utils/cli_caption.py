"""`tomjerry caption`: estimate, run, batch, review and import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomjerry_utils.cli_options import above_zero, command_in, natural_number, price, with_out

if TYPE_CHECKING:
    from tomjerry_utils.captions import Captions


def add(commands: Any) -> None:
    """Add the command to what `add_subparsers` gave."""
    parser = command_in(
        commands,
        "caption",
        None,
        "captions of a folder of pictures by a paid model, never above a budget",
        "tomjerry caption estimate --images frames --model gpt-4.1-mini",
        "tomjerry caption run --images frames --model gpt-4.1-mini --budget 2 --out captions",
        "tomjerry caption review --images frames --out captions",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    added = command_in(
        actions,
        "estimate",
        _estimate,
        "what captions would cost, before anything is sent; needs no key",
        "tomjerry caption estimate --images frames --model gpt-4.1-mini",
        "tomjerry caption estimate --images frames --model gpt-5-mini --detail low --out captions",
        "tomjerry caption estimate --images frames --model mine --price 0.5,2 --longest-side 768",
    )
    _with_pictures(added)
    _with_model(added)
    _with_price(added)
    added.add_argument(
        "--out", type=Path, metavar="DIR", help="folder whose answers need not be asked again"
    )

    added = command_in(
        actions,
        "run",
        _run,
        "caption, or go on where it stopped",
        "tomjerry caption run --images frames --model gpt-4.1-mini --budget 2 --out captions",
        "tomjerry caption run --images frames --base-url http://localhost:8000/v1 --model llava "
        "--price 0,0 --budget 1 --out captions",
    )
    _with_payment(added)
    added.add_argument(
        "--api",
        choices=("auto", "responses", "chat_schema", "chat_json", "chat_text"),
        default="auto",
        help="form of a request; auto takes the first that the server knows (auto)",
    )

    added = command_in(
        actions,
        "batch",
        _batch,
        "caption by the batch interface: half the price, answers within a day",
        "tomjerry caption batch --images frames --model gpt-4.1-mini --budget 1 --out captions",
        "tomjerry caption batch --images frames --model gpt-4.1 --budget 4 --out captions "
        "--no-wait",
    )
    _with_payment(added)
    added.add_argument(
        "--no-wait",
        action="store_true",
        help="hand in what is left, fetch what is ready, and return; run it again later",
    )
    added.add_argument(
        "--poll",
        type=above_zero,
        default=30.0,
        metavar="SECONDS",
        help="between looks at the batches (30)",
    )

    added = command_in(
        actions,
        "review",
        _review,
        "write a page to accept, edit and reject captions on, or apply what was decided",
        "tomjerry caption review --images frames --out captions",
        "tomjerry caption review --out captions --decisions ~/Downloads/decisions.jsonl",
    )
    with_out(added)
    added.add_argument("--images", type=Path, metavar="DIR", help="pictures, for the page")
    added.add_argument(
        "--decisions", type=Path, metavar="FILE", help="apply these in place of those before"
    )

    added = command_in(
        actions,
        "import",
        _import,
        "take captions bought or written elsewhere, so that they are not asked for again",
        "tomjerry caption import bought.csv --images frames --model gpt-4o --out captions",
        "tomjerry caption import mine.jsonl --images runs/mini/01_collect --model gpt-4.1-mini "
        "--out runs/caption_store",
    )
    added.add_argument(
        "file", type=Path, metavar="FILE", help=".csv or .jsonl with file_name and caption"
    )
    _with_pictures(added)
    _with_model(added)
    with_out(added)


# ---- handlers ------------------------------------------------------------------------------------


def _estimate(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import caption_estimate

    found = caption_estimate.estimate(
        arguments.images,
        arguments.model,
        detail=arguments.detail,
        longest_side=arguments.longest_side,
        prompt_version=arguments.prompt_version,
        price=arguments.price,
        out=arguments.out,
    )
    print(found.report())


def _run(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import captions

    made = captions.caption_folder(
        arguments.images, arguments.out, api=arguments.api, **_payment(arguments)
    )
    _told(made)


def _batch(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import captions

    made = captions.batch_folder(
        arguments.images,
        arguments.out,
        wait=not arguments.no_wait,
        poll=arguments.poll,
        **_payment(arguments),
    )
    _told(made)


def _review(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import captions

    if arguments.decisions is None:
        path = captions.review_page(arguments.out, arguments.images)
        return print(f"{path}: open it in a browser, then apply what it saves with --decisions")
    made, skipped = captions.apply_decisions(arguments.out, arguments.decisions)
    for name, reason in skipped:
        print(f"skipped: {name}: {reason}")
    print(
        f"{len(made.rows)} captions, {len(made.set_aside)} set aside, {len(skipped)} decisions "
        f"skipped: {made.folder / captions.CAPTIONS}"
    )


def _import(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import captions

    found = captions.import_folder(
        arguments.file,
        arguments.images,
        arguments.out,
        model=arguments.model,
        prompt_version=arguments.prompt_version,
        detail=arguments.detail,
        longest_side=arguments.longest_side,
    )
    for line, reason in found.skipped:
        print(f"line {line}: {reason}")
    print(
        f"{found.taken} captions imported, {found.known} known before, {len(found.skipped)} lines "
        f"skipped, {found.paid_elsewhere:.4f} USD paid elsewhere: {arguments.out / captions.STORE}"
    )


def _payment(arguments: argparse.Namespace) -> dict[str, Any]:
    from tomjerry_utils.captions import OPENAI

    names = ("model", "budget", "concurrency", "prompt_version", "price", "detail")
    given = {name: getattr(arguments, name) for name in (*names, "longest_side", "timeout")}
    return {"base_url": arguments.base_url or OPENAI, **given}


def _told(made: Captions) -> None:
    from tomjerry_utils.captions import CAPTIONS

    pending = sum(row["status"] == "pending" for row in made.set_aside)
    waiting = f"{pending} in batches, " if pending else ""
    print(
        f"{len(made.rows)} captions, {waiting}{len(made.set_aside) - pending} set aside, "
        f"{made.usd:.4f} USD: {made.folder / CAPTIONS}"
    )


# ---- options -------------------------------------------------------------------------------------


def _with_pictures(added: argparse.ArgumentParser) -> None:
    added.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures")


def _with_model(added: argparse.ArgumentParser) -> None:
    added.add_argument("--model", required=True, metavar="M", help="name of the model")
    added.add_argument(
        "--detail",
        choices=("auto", "low", "high"),
        default="auto",
        help="how closely the model looks (auto)",
    )
    added.add_argument(
        "--longest-side",
        type=natural_number,
        default=512,
        metavar="PIXELS",
        help="larger pictures are sent reduced to this (512)",
    )
    added.add_argument(
        "--prompt-version", default="v1", metavar="V", help="which instruction it is given (v1)"
    )


def _with_price(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--price", type=price, metavar="IN,OUT", help="USD per million tokens of another model"
    )


def _with_payment(added: argparse.ArgumentParser) -> None:
    _with_pictures(added)
    _with_model(added)
    _with_price(added)
    added.add_argument(
        "--budget",
        type=above_zero,
        required=True,
        metavar="USD",
        help="never spend more than this",
    )
    with_out(added)
    added.add_argument(
        "--base-url", metavar="URL", help="any server with OpenAI's interface (OpenAI's own)"
    )
    added.add_argument(
        "--concurrency",
        type=natural_number,
        default=8,
        metavar="N",
        help="requests under way at once (8)",
    )
    added.add_argument(
        "--timeout", type=above_zero, default=60.0, metavar="SECONDS", help="for one request (60)"
    )
