"""The command line: parses, calls, prints. Stages are imported by the command that needs them."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tomjerry_utils import UserError, __version__, cli_caption, cli_choose, cli_collect
from tomjerry_utils.cli_options import (
    Parser,
    command_in,
    examples_of,
    natural_number,
    seed_number,
    share,
    with_out,
    with_profile,
)

OK, MISTAKE, STOPPED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = argparse.Namespace()
    try:
        with _interrupts():
            arguments = _parser().parse_args(argv)
            arguments.handler(arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("tomjerry: stopped; start the same command again to go on", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except UserError as error:
        return _mistake(str(error))
    except OSError as error:
        return _mistake(_explain(error, getattr(arguments, "out", None)))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _mistake("out of memory: lower the batch_size of this stage in the profile's YAML")
    return OK


def _mistake(message: str) -> int:
    print(f"tomjerry: error: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE


def _explain(error: OSError, out: Path | None = None) -> str:
    """An error of the operating system in one line: what, where, how to mend it.

    A write that finds no room does not say where; then it was on its way to `out`.
    """
    space = "free some space or choose another disk (TOMJERRY_RUNS moves the runs)"
    full = {errno.ENOSPC: space, errno.EDQUOT: space, errno.EFBIG: f"{space}, or raise ulimit -f"}
    hints = {
        **full,
        errno.EROFS: "choose a folder that can be written to",
        errno.EACCES: "choose a folder that you may write to, or change its permissions",
        errno.EPERM: "choose a folder that you may write to, or change its permissions",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a part of the path is a file: check the path",
        errno.EISDIR: "give a file, not a folder",
        errno.EEXIST: "there is a file where a folder is wanted: choose another name",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    if not error.strerror and str(error):
        return str(error)  # raised by a library, or by us, with words of its own
    place = error.filename or (out if error.errno in full else None)
    where = f"{place}: " if place else ""
    what = (error.strerror or type(error).__name__).lower()
    hint = hints.get(error.errno or 0, "check the disk, the network and the path")
    return f"{where}{what}: {hint}"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C stop this process alone: workers that it forked end with it, without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt

    stop.ordinary = True  # type: ignore[attr-defined]  # a training may hold it back for a step
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- handlers: one a command -------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import doctor
    from tomjerry_utils.profiles import load_profile

    if arguments.card and not arguments.plan:
        raise UserError("--card goes with --plan: add it")
    if arguments.plan:
        from tomjerry_utils import planner

        cards = [planner.find_card(arguments.card)] if arguments.card else planner.CARDS
        return print(planner.report(load_profile(arguments.profile), cards))
    findings = doctor.examine(load_profile(arguments.profile))
    print(doctor.report(findings))
    bad = [finding.name for finding in findings if finding.state == "bad"]
    if bad:
        raise UserError(f"the course cannot run yet: mend {', '.join(bad)} as shown above")


def _course(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import course
    from tomjerry_utils.profiles import load_profile

    if arguments.check:
        problems = course.check_pairs()
        for problem in problems:
            print(problem)
        if problems:
            raise UserError(f"{len(problems)} problems between notebooks and their sources")
        return print("notebooks and sources are in step")
    profile = load_profile(arguments.profile)
    if arguments.sync:
        changed = course.sync(profile)
        return print("\n".join(f"rewrote {path}" for path in changed) or "nothing to change")
    # A profile that is a file must be found from the notebooks' folder too.
    given = str(Path(arguments.profile).resolve()) if _is_file(arguments.profile) else profile.name
    result = course.run_course(profile, arguments.only, given=given, fresh=arguments.fresh)
    for figure in result.figures:
        print(figure)
    for figure in result.published:
        print(figure)
    print(
        f"{len(result.executed)} notebooks executed, {len(result.skipped)} up to date, "
        f"{len(result.figures)} figures, {result.seconds / 60:.1f} min: {result.folder}"
    )


def _translate(arguments: argparse.Namespace) -> None:
    from tomjerry_utils.profiles import load_profile
    from tomjerry_utils.translate import translate_files

    report = translate_files(
        arguments.input,
        arguments.out,
        profile=load_profile(arguments.profile),
        cls=arguments.cls,
        method=arguments.method,
        steps=arguments.steps,
        seed=arguments.seed,
        samples=arguments.samples,
        size=arguments.size,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
        faithfulness=arguments.faithfulness,
        silhouettes=arguments.silhouette,
    )
    print(f"{len(report)} pictures translated: {arguments.out / 'report.jsonl'}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import metrics

    metrics.evaluate_command(arguments.translations, json=arguments.json, label=arguments.label)


def _figures(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import course
    from tomjerry_utils.profiles import load_profile

    source, drawn = course.redraw(load_profile(arguments.profile))
    for path in drawn:
        print(path)
    print(f"{len(drawn)} figures redrawn from {source}; nothing was trained")


def _study(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import study
    from tomjerry_utils.profiles import load_profile

    for path in study.run_study(load_profile(arguments.profile), arguments.name or None):
        print(path)


def _scenes(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import draw

    seeds = draw.parse_seeds(arguments.seeds)
    path = draw.draw_scenes(
        seeds,
        arguments.out,
        style=arguments.style,
        size=arguments.size,
        truth=arguments.truth,
    )
    print(f"{len(seeds)} {arguments.style} scenes: {path}")


def _foundation(arguments: argparse.Namespace) -> None:
    from tomjerry_utils import foundation

    if not arguments.model:
        for row in foundation.shipped():
            print(f"{row['bytes']:>10}  {row['sha256']}  {row['file']}")
    for model in arguments.model:
        print(foundation.make(model))


# ---- the parser --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tomjerry",
        description="Tom & Jerry in real life: translate cartoon frames into natural photographs.",
        epilog=examples_of(
            "tomjerry doctor", "tomjerry course", "tomjerry translate frame.png --out out"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tomjerry {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = functools.partial(command_in, commands)

    added = command(
        "doctor",
        _doctor,
        "what this machine can do, and which profile suits it",
        "tomjerry doctor",
        "tomjerry doctor --profile paper",
        "tomjerry doctor --plan --card A40 --profile paper",
    )
    with_profile(added)
    added.add_argument(
        "--plan",
        action="store_true",
        help="memory and time of each training on graphics cards, and what to set for them to fit",
    )
    added.add_argument(
        "--card", metavar="NAME", help="T4, 24GB, A40, A100-40, A100-80 or H100 (all of them)"
    )

    added = command(
        "course",
        _course,
        "execute the notebooks in order, skipping what is up to date",
        "tomjerry course",
        "tomjerry course --profile smoke",
        "tomjerry course --only 03 --fresh",
        "tomjerry course --check",
    )
    with_profile(added)
    added.add_argument(
        "--only", nargs="+", metavar="NN", help="these notebooks only, by number or name"
    )
    added.add_argument("--fresh", action="store_true", help="execute what is up to date as well")
    either = added.add_mutually_exclusive_group()
    either.add_argument(
        "--sync", action="store_true", help="rewrite notebooks/*.ipynb from the executed run"
    )
    either.add_argument(
        "--check", action="store_true", help="check that notebooks and sources are in step"
    )

    cli_collect.add(commands)
    cli_caption.add(commands)

    added = command(
        "translate",
        _translate,
        "translate cartoons into photographs",
        "tomjerry translate frame.png --out out",
        "tomjerry translate data/starter/cartoon/cat --class tom --out out",
        "tomjerry translate frames --method sdedit --seed 3 --out out --overwrite",
        "tomjerry translate wide.jpg --samples 4 --size keep --out out",
        "tomjerry translate frame.png --faithfulness 0.5 --out out",
        "tomjerry translate drawings --silhouette --out out",
    )
    added.add_argument("input", nargs="+", type=Path, metavar="INPUT", help="pictures and folders")
    with_out(added)
    added.add_argument(
        "--class",
        dest="cls",
        choices=("auto", "tom", "jerry", "both"),
        default="auto",
        help="whom the pictures are about; auto reads it off each (auto)",
    )
    added.add_argument(
        "--method",
        default="ours",
        metavar="NAME",
        help="ours, identity, colour, sdedit, ddib, cyclediffusion, ilvr or egsde; after "
        "`tomjerry study rivals` also cut or cyclegan (ours)",
    )
    added.add_argument(
        "--faithfulness",
        type=share,
        metavar="F",
        help="0 … 1: as real as can be … shapes and colours as drawn (0)",
    )
    added.add_argument(
        "--silhouette",
        action="store_true",
        help="keep the outlines of pictures that are far from training, as U²-Net-p sees them "
        "(fetched once, 4 MB)",
    )
    added.add_argument(
        "--steps", type=natural_number, metavar="N", help="DDIM steps (the profile's)"
    )
    added.add_argument("--seed", type=seed_number, default=0, metavar="S", help="of the noise (0)")
    added.add_argument(
        "--samples",
        type=natural_number,
        default=1,
        metavar="N",
        help="of each picture: NAME.png, NAME_2.png … NAME_N.png (1)",
    )
    added.add_argument(
        "--size",
        choices=("model", "keep"),
        default="model",
        help="shorter side as the model draws it, or all enlarged to the input's pixels (model)",
    )
    added.add_argument("--weights", type=Path, metavar="DIR", help="a translator's folder")
    with_profile(added)
    added.add_argument("--overwrite", action="store_true", help="replace what is there")

    added = command(
        "evaluate",
        _evaluate,
        "score a folder of translated test scenes, <seed>.png, against their hidden twins",
        "tomjerry evaluate --translations out --json out/scores.json",
        "tomjerry evaluate --translations cut/results --label CUT --json cut.json",
    )
    added.add_argument("--translations", type=Path, required=True, metavar="DIR")
    added.add_argument(
        "--label", metavar="NAME", help="what to call it in the report (the folder's name)"
    )
    added.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write it")

    cli_choose.add(commands)

    cli_collect.add_export(commands)
    added = command(
        "figures",
        _figures,
        "redraw the figures from a run or from the committed results, without training",
        "tomjerry figures",
        "tomjerry figures --profile smoke",
    )
    with_profile(added)

    added = command(
        "scenes",
        _scenes,
        "draw generated scenes as pictures with captions and, if wanted, their truth",
        "tomjerry scenes --style cartoon --seeds 9000000:9000020 --size 64 --out cartoons",
        "tomjerry scenes --style natural --seeds 0:8 --size 512 --out photos --truth",
    )
    added.add_argument("--style", choices=("cartoon", "natural"), required=True)
    added.add_argument("--seeds", required=True, metavar="A:B", help="A <= seed < B")
    added.add_argument(
        "--size", type=natural_number, default=64, metavar="PIXELS", help="a side (64)"
    )
    with_out(added)
    added.add_argument("--truth", action="store_true", help="also masks and keypoints")

    added = command(
        "foundation",
        _foundation,
        "make the tiny foundation models, or list those that ship",
        "tomjerry foundation",
        "tomjerry foundation autoencoder",
    )
    added.add_argument(
        "model",
        nargs="*",
        metavar="MODEL",
        help="autoencoder, denoiser, blip, structure, posture, judges, screens or translator; "
        "none: list them",
    )

    added = command(
        "study",
        _study,
        "run what takes hours (ablations, rivals, three training seeds) into results/",
        "tomjerry study",
        "tomjerry study ablation",
    )
    added.add_argument("name", nargs="*", metavar="NAME", help="these studies only")
    with_profile(added)
    return parser


def _is_file(name: str | None) -> bool:
    return bool(name) and str(name).endswith((".yaml", ".yml"))
