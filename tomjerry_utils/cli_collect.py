"""`tomjerry collect` and `tomjerry export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.cli_options import (
    above_zero,
    command_in,
    natural_number,
    with_out,
    with_profile,
)


def add(commands: Any) -> None:
    """Add `collect` to what `add_subparsers` gave."""
    added = command_in(
        commands,
        "collect",
        _collect,
        "collect pictures from films, folders, archives and Kaggle into a manifest with splits",
        "tomjerry collect --video show.mp4 --domain cartoon --out data/mine",
        "tomjerry collect --folder frames photos --out data/mine",
        "tomjerry collect --kaggle balabaskar/tom-and-jerry-image-classification --out data/show",
    )
    for option, metavar, text in (
        ("--video", "FILE", "films, or folders of films"),
        ("--folder", "DIR", "folders of pictures"),
        ("--archive", "FILE", "zip or tar files of pictures, or their http(s) addresses"),
        ("--kaggle", "SLUG", "Kaggle data sets, owner/name or owner/name/versions/N"),
    ):
        added.add_argument(
            option, nargs="+", action="extend", default=[], metavar=metavar, help=text
        )
    with_out(added)
    added.add_argument(
        "--domain",
        choices=("cartoon", "natural"),
        default="",
        help="of all of them; without it, told by the folders' names",
    )
    added.add_argument(
        "--every", type=above_zero, default=1.0, metavar="SECONDS", help="between film frames (1)"
    )
    added.add_argument(
        "--short-side",
        type=natural_number,
        default=512,
        metavar="PIXELS",
        help="reduce larger ones (512)",
    )
    for option, default, text in (
        ("--smallest", 64, "drop pictures with a shorter side (64)"),
        ("--per-class", 0, "pictures of a class and domain at most (all)"),
        ("--composites", 0, "compose photographs of cat and mouse until there are so many (0)"),
    ):
        added.add_argument(
            option, type=int, default=default, metavar="N" if default == 0 else "PIXELS", help=text
        )
    added.add_argument(
        "--neither",
        choices=("drop", "background"),
        default="drop",
        help="what becomes of frames that show neither character (drop)",
    )
    added.add_argument(
        "--precision",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of the classes that a probe tells, held out; above 1: none told (0.95)",
    )
    added.add_argument(
        "--decisions",
        type=Path,
        metavar="FILE",
        help="decisions by hand (keep, drop, class), as the gallery of notebook 01 writes them",
    )
    added.add_argument(
        "--no-screens",
        action="store_true",
        help="keep what is small, blurred, written on or of the other domain: chosen before",
    )
    added.add_argument(
        "--review",
        action="store_true",
        help="write a page, OUT/review.html, to look at all of it and make such decisions",
    )
    added.add_argument(
        "--validation", type=float, default=0.1, metavar="SHARE", help="of the groups (0.1)"
    )


def add_export(commands: Any) -> None:
    """Add `export` to what `add_subparsers` gave."""
    added = command_in(
        commands,
        "export",
        _export,
        "write the training pictures in the layout that other translators train on",
        "tomjerry export --layout cyclegan rivals/data",
        "tomjerry export --layout imagefolder dataset --profile smoke",
        "tomjerry export --layout imagefolder dataset --data data/mine",
        "tomjerry export --layout webdataset shards --shard-mb 500 --profile paper",
    )
    added.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    added.add_argument("--layout", choices=("cyclegan", "imagefolder", "webdataset"), required=True)
    added.add_argument(
        "--shard-mb", type=above_zero, metavar="MB", help="size of a webdataset's tar files (256)"
    )
    added.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="what `tomjerry collect` wrote, in place of a profile",
    )
    with_profile(added)


def _collect(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import collect, curate

    made = collect.collect_command(
        arguments.out,
        videos=arguments.video,
        folders=arguments.folder,
        archives=arguments.archive,
        kaggle=arguments.kaggle,
        domain=arguments.domain,
        every_s=arguments.every,
        short_side=arguments.short_side,
        validation_fraction=arguments.validation,
        screen=not arguments.no_screens,
        smallest=arguments.smallest,
        per_class=arguments.per_class,
        neither=arguments.neither,
        precision=arguments.precision,
        composites=arguments.composites,
        decisions=str(arguments.decisions or ""),
    )
    if arguments.review:
        from tomjerry_utils import picture_page, picture_review

        by_hand = picture_review.read_decisions(arguments.decisions) if arguments.decisions else {}
        page = made.folder / "review.html"
        print(picture_page.write_page(page, made.rows, made.thumb, by_hand))
    print(f"see {made.folder / curate.DATASHEET} and {made.folder / curate.MANIFEST}")


def _export(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import collect, exports
    from tomjerry_utils.profiles import load_profile

    sharded = arguments.layout == "webdataset"
    if arguments.shard_mb is not None and not sharded:
        raise UserError("--shard-mb goes with --layout webdataset: add it, or leave it out")
    if arguments.data is None:
        collection = collect.ensure(load_profile(arguments.profile))
    else:
        collection = collect.opened(arguments.data)
    size = exports.SHARD_MB if arguments.shard_mb is None else arguments.shard_mb
    counts = exports.export(collection, arguments.out, layout=arguments.layout, shard_mb=size)
    for folder, count in counts.items():
        print(f"{count:6d}  {arguments.out / folder}{'-*.tar' * sharded}")
