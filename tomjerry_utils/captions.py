"""Stage 02: captions for a random sample of the training images, and where each comes from.

Two sources with one interface (`captioner.CaptionSource`): `replay` gives the true captions of
generated scenes, marked "scene grammar"; `captioner.OpenAISource` asks a model and pays for it.
Captions speak of tom and jerry in cartoons, of cats and mice in photographs; `to_target` maps the
species across, and every row records what it mapped.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, collect
from tomjerry_utils.caption_answers import LONGEST_SIDE
from tomjerry_utils.caption_files import (
    CAPTIONS,
    REVIEW,
    SET_ASIDE,
    SPECIES,
    STORE,
    Captions,
    answers_in,
    read_captions,
    rows_in,
    write_answers,
    write_captions,
)
from tomjerry_utils.caption_files import apply_decisions as apply_decisions
from tomjerry_utils.caption_files import mapped_species as mapped_species
from tomjerry_utils.caption_files import review_page as review_page
from tomjerry_utils.caption_files import to_target as to_target
from tomjerry_utils.caption_import import Imported, import_answers
from tomjerry_utils.captioner import Caption, CaptionSource, OpenAISource
from tomjerry_utils.images import list_images
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    hash_file,
    hash_obj,
    log,
    open_stage,
    read_jsonl,
    run_root,
    write_json,
)
from tomjerry_utils.spending import Detail

NAME = "02_captions"
VERSION = 2
SAMPLE = "sample.json"
BUDGET_VARIABLE = "TOMJERRY_CAPTION_BUDGET"
OPENAI = "https://api.openai.com/v1"
REPLAYED = "scene grammar"  # what recorded captions of scenes say in place of a model's name


def ensure(profile: Profile) -> Captions:
    """Caption the profile's sample, or return at once when that is done.

    With the source "openai" the key comes from `OPENAI_API_KEY`, the server from
    `OPENAI_BASE_URL`, and nothing is sent before `TOMJERRY_CAPTION_BUDGET` names the dollars that
    may be spent. Answers are kept in `caption_store` beside the runs, so that no change of settings
    loses them; where all that is wanted is in there, neither key nor budget is needed. The source
    "replay" takes such answers of `captions.model` too, and for pictures without one the scene's
    own words. A review in `review_path` is applied.

    Raises:
        UserError: no recorded captions for these pictures, no budget, the source stops, or the file
            of a review is broken.
    """
    pictures = collect.ensure(profile)
    settings = profile.captions.model_dump(mode="json", exclude={"concurrency"})
    inputs = {"collect": pictures.key}
    if review_path(profile).is_file():
        inputs["review"] = hash_file(review_path(profile))
    pool = pictures.select(split="train")
    recorded = answers_in(_source(profile), pool, pictures.folder)
    if profile.captions.source == "replay" and recorded:
        inputs["recorded"] = hash_obj({n: [c.caption, c.sha256] for n, c in recorded.items()})
    stage = open_stage(profile, NAME, settings, inputs, VERSION)
    with stage.lock():
        if not stage.finished:
            _make(stage, profile, pictures, pool, recorded)
    return read_captions(stage.folder)


def review_path(profile: Profile) -> Path:
    """Where decisions about a run's captions are kept: outside of the stage that they change."""
    return run_root(profile) / REVIEW


def store_path(profile: Profile) -> Path:
    """Where answers that were paid for or imported are kept, for all runs."""
    return run_root(profile).parent / "caption_store" / STORE


def caption_folder(
    images: Path, out: Path, *, base_url: str, model: str, budget: float, **options: Any
) -> Captions:
    """`tomjerry caption run`: caption all pictures of a folder, never above the budget.

    Answers are kept in `out/store.jsonl`; another run into the same folder goes on where this one
    stopped, also while this one runs, and the budget counts what was spent by all.

    Args:
        options: further settings of `captioner.OpenAISource`.

    Raises:
        UserError: no pictures, no key, an unknown price, a server that is not there, or the budget
            is spent; what has arrived is written first.
    """
    source = OpenAISource(out / STORE, model, base_url, budget, **options)
    return write_captions(source, _rows_of(images, out), images, out, paid=source)


def batch_folder(
    images: Path,
    out: Path,
    *,
    base_url: str,
    model: str,
    budget: float,
    wait: bool = True,
    poll: float = 30.0,
    **options: Any,
) -> Captions:
    """`tomjerry caption batch`: as `caption_folder`, by the batch interface at half the price.

    Args:
        images: need not be there to collect what another machine handed in; `out` knows the rest.
        wait: until all batches have ended; else hand in, take what is ready, and return: what is
            still in a batch is set aside as "pending", and the next call takes it.
        poll: seconds between looks at the batches.
        options: further settings of `captioner.OpenAISource`.

    Raises:
        UserError: as `caption_folder`.
    """
    from tomjerry_utils.caption_batches import run_batches

    source = OpenAISource(out / STORE, model, base_url, budget, **options)

    def batches(rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        left = {row["file_name"] for row in rows}
        for caption in run_batches(source, rows, images, out, wait=wait, poll=poll):
            left.discard(caption.file_name)
            yield caption
        for name in sorted(left):
            yield Caption(name, "", status="pending", reason="in a batch: run this again")

    rows = rows_in(out) if not images.is_dir() else []
    return write_captions(batches, rows or _rows_of(images, out), images, out, paid=source)


def import_folder(
    file: Path,
    images: Path,
    out: Path,
    *,
    model: str,
    prompt_version: str = "v1",
    detail: Detail = "auto",
    longest_side: int = LONGEST_SIDE,
) -> Imported:
    """`tomjerry caption import`: take captions bought or written elsewhere into `out/store.jsonl`.

    `out/captions.jsonl` follows, unless it holds captions of another model.

    Raises:
        UserError: a broken file, or one that is about none of the pictures; nothing is written.
    """
    rows = _rows_of(images, out)
    source = OpenAISource(
        out / STORE,
        model,
        OPENAI,
        0.0,
        prompt_version=prompt_version,
        detail=detail,
        longest_side=longest_side,
    )
    found = import_answers(file, images, source)
    others = read_jsonl(out / CAPTIONS) if (out / CAPTIONS).is_file() else []
    if any((row["model"], row["prompt_version"]) != (model, prompt_version) for row in others):
        log(f"captions: {out / CAPTIONS} holds captions of another model and stays as it is")
    else:
        write_answers(rows, images, out, source)
    return found


def replay(rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
    """The caption source without an account: the true captions of generated scenes.

    Args:
        rows: manifest rows with `text`, `class`, `domain`, `action` and `place`.
    """
    for row in rows:
        sha256 = row.get("sha256") or hash_file(images / row["file_name"])
        if not row.get("text"):
            reason = "no recorded caption: only generated scenes have one"
            yield Caption(row["file_name"], sha256, status="invalid", reason=reason)
            continue
        names = {"tom": ("tom",), "jerry": ("jerry",), "both": ("tom", "jerry")}[row["class"]]
        subjects = names if row["domain"] == "cartoon" else tuple(SPECIES[n] for n in names)
        yield Caption(
            row["file_name"],
            sha256,
            caption=row["text"],
            subjects=subjects,
            action=row["action"],
            place=row["place"],
            model=REPLAYED,
            prompt_version="none",
        )


def sample(rows: Sequence[dict[str, Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """A random sample without replacement, in the rows' order; all of them where there are fewer.

    The same rows and seed give the same sample, whatever order the rows come in.
    """
    ordered = sorted(rows, key=lambda row: row["file_name"])
    if count >= len(ordered):
        return ordered
    chosen = random.Random(seed).sample(range(len(ordered)), count)
    return [ordered[i] for i in sorted(chosen)]


def statistics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a set of captions is like: length, vocabulary, balance of actions, subjects, places.

    `balance` is the entropy of the actions over that of as many equally frequent ones: 1 when all
    are equally common, 0 when there is but one.
    """
    words = [re.findall(r"[\w'-]+", row["caption"].lower()) for row in rows]
    lengths = [len(part) for part in words]
    vocabulary = Counter(word for part in words for word in part)
    counts = {
        "actions": Counter(row["action"].lower() for row in rows),
        "places": Counter(row["place"].lower() for row in rows),
        "subjects": Counter(" and ".join(row["subjects"]) for row in rows),
    }
    return {
        "captions": len(rows),
        "distinct": len({row["caption"] for row in rows}),
        "words": {
            "mean": sum(lengths) / len(lengths) if lengths else 0.0,
            "least": min(lengths, default=0),
            "most": max(lengths, default=0),
            "histogram": dict(sorted(Counter(lengths).items())),
        },
        "vocabulary": len(vocabulary),
        "commonest": vocabulary.most_common(20),
        **{name: dict(found.most_common()) for name, found in counts.items()},
        "balance": _balance(counts["actions"]),
    }


# ---- helpers -------------------------------------------------------------------------------------


def _make(
    stage: Stage,
    profile: Profile,
    pictures: collect.Collection,
    pool: list[dict[str, Any]],
    recorded: dict[str, Caption],
) -> None:
    settings = profile.captions
    replayed = settings.source == "replay"
    if replayed:
        recorded = {name: caption for name, caption in recorded.items() if caption.status == "ok"}
        pool = [row for row in pool if row["text"] or row["file_name"] in recorded]
    if not pool:
        raise UserError(
            f"{pictures.folder}: no training pictures with a recorded caption: take some in with "
            f"'tomjerry caption import FILE --images {pictures.folder} --model {settings.model} "
            f"--out {store_path(profile).parent}', set captions.source to openai, or collect scenes"
        )
    chosen = sample(pool, settings.count, seed=profile.seed)
    if len(chosen) < settings.count:
        log(
            f"{NAME}: only {len(chosen)} training pictures for {settings.count} captions: all taken"
        )
    names = [row["file_name"] for row in chosen]
    write_json(
        stage.folder / SAMPLE,
        {"seed": profile.seed, "wanted": settings.count, "from": len(pool), "file_names": names},
    )

    def remembered(rows: Sequence[dict[str, Any]], images: Path) -> Iterator[Caption]:
        for row in rows:
            if row["file_name"] in recorded:
                yield recorded[row["file_name"]]
            else:
                yield from replay([row], images)

    source: CaptionSource = remembered
    paid = None
    known = sum(name in recorded for name in names)
    if not replayed and known < len(names):
        source = paid = _paid(profile)
        log(f"{NAME}: {len(chosen)} captions from {settings.model}")
    else:
        log(
            f"{NAME}: {known} recorded captions by {settings.model}, "
            f"{len(chosen) - known} by the {REPLAYED}"
        )
    done = write_captions(
        source, chosen, pictures.folder, stage.folder, paid=paid, decisions=review_path(profile)
    )
    if not done.rows:
        raise UserError(f"{stage.folder / SET_ASIDE}: no picture got a caption: see the reasons")
    extra = {key: statistics(done.rows)[key] for key in ("captions", "vocabulary", "balance")}
    stage.finish(**extra, set_aside=len(done.set_aside), usd=round(done.usd, 6))


def _paid(profile: Profile) -> OpenAISource:
    settings = profile.captions
    given = os.environ.get(BUDGET_VARIABLE, "")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", given) or float(given) <= 0:
        raise UserError(
            f"captions by {settings.model} cost money: set {BUDGET_VARIABLE} to the US dollars "
            f"that may be spent on {settings.count} of them, or captions.source to replay"
        )
    return _source(profile, float(given))


def _source(profile: Profile, budget: float = 0.0) -> OpenAISource:
    settings = profile.captions
    return OpenAISource(
        store_path(profile),
        settings.model,
        os.environ.get("OPENAI_BASE_URL") or OPENAI,
        budget,
        concurrency=settings.concurrency,
        prompt_version=settings.prompt_version,
        detail=settings.detail,
        longest_side=settings.longest_side,
    )


def _rows_of(images: Path, out: Path) -> list[dict[str, Any]]:
    """A row for each picture of a folder, once it is sure that `out` can be a folder."""
    paths = list_images(images)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to write to")
    return [{"file_name": path.relative_to(images).as_posix()} for path in paths]


def _balance(counts: Counter[str]) -> float:
    total = sum(counts.values())
    if len(counts) < 2:
        return 0.0
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return entropy / math.log(len(counts))
