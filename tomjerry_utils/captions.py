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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, collect
from tomjerry_utils.captioner import Caption, CaptionSource, OpenAISource
from tomjerry_utils.images import list_images
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    hash_file,
    log,
    open_stage,
    read_jsonl,
    run_root,
    write_json,
    write_jsonl,
)
from tomjerry_utils.spending import Detail

NAME = "02_captions"
VERSION = 1
CAPTIONS = "captions.jsonl"
SET_ASIDE = "set_aside.jsonl"
SAMPLE = "sample.json"
STORE = "store.jsonl"
BUDGET_VARIABLE = "TOMJERRY_CAPTION_BUDGET"
OPENAI = "https://api.openai.com/v1"
REPLAYED = "scene grammar"  # what recorded captions say in place of a model's name

_SPECIES = {"tom": "cat", "jerry": "mouse"}


@dataclass(frozen=True)
class Captions:
    """The captions of a run.

    Attributes:
        folder: holds `captions.jsonl`, `set_aside.jsonl` and `sample.json`.
        rows: `file_name`, `sha256`, `caption`, `subjects`, `action`, `place`, `model`,
            `prompt_version`, `input_tokens`, `output_tokens`, `usd`, `request_id`, `status`;
            beside them `target` (the caption in the words of the target domain) and `mapped` (the
            species that were exchanged for it, such as "tom -> cat").
        set_aside: `file_name`, `status`, `reason` of pictures without a caption.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(repr=False)
    set_aside: list[dict[str, Any]] = field(repr=False)

    @property
    def usd(self) -> float:
        """What these captions cost."""
        return sum(row["usd"] for row in self.rows)


def ensure(profile: Profile) -> Captions:
    """Caption the profile's sample, or return at once when that is done.

    With the source "openai" the key comes from `OPENAI_API_KEY`, the server from
    `OPENAI_BASE_URL`, and nothing is sent before `TOMJERRY_CAPTION_BUDGET` names the dollars that
    may be spent. Answers are kept beside the runs, so that no change of settings loses them.

    Raises:
        UserError: no recorded captions for these pictures, no budget, or the source stops.
    """
    pictures = collect.ensure(profile)
    stage = open_stage(profile, NAME, profile.captions, {"collect": pictures.key}, VERSION)
    with stage.lock():
        if not stage.finished:
            _make(stage, profile, pictures)
    return _read(stage.folder)


def caption_folder(
    images: Path,
    out: Path,
    *,
    base_url: str,
    model: str,
    budget: float,
    concurrency: int = 8,
    prompt_version: str = "v1",
    price: tuple[float, float] | None = None,
    detail: Detail = "auto",
    timeout: float = 60.0,
) -> Captions:
    """`tomjerry caption run`: caption all pictures of a folder, never above the budget.

    Answers are kept in `out/store.jsonl`; another run into the same folder goes on where this one
    stopped, and its budget counts what was spent before.

    Raises:
        UserError: no pictures, no key, an unknown price, a server that is not there, or the budget
            is spent; what has arrived is written first.
    """
    from filelock import FileLock, Timeout

    paths = list_images(images)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to write to")
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": path.relative_to(images).as_posix()} for path in paths]
    source = OpenAISource(
        out / STORE,
        model,
        base_url,
        budget,
        concurrency=concurrency,
        prompt_version=prompt_version,
        price=price,
        detail=detail,
        timeout=timeout,
    )
    try:
        with FileLock(out / ".lock", timeout=0):
            return write_captions(source, rows, images, out)
    except Timeout:
        raise UserError(f"another process is captioning into {out}: wait, or end it") from None


def write_captions(
    source: CaptionSource, rows: Sequence[dict[str, Any]], images: Path, out: Path
) -> Captions:
    """Run a source and write `captions.jsonl` and `set_aside.jsonl`, in the order of `rows`.

    Both are written even when the source stops early; the error goes on after that.
    """
    from tomjerry_utils.progress import progress

    got: dict[str, Caption] = {}
    try:
        with progress(len(rows), "captions", unit="picture") as bar:
            for caption in source(rows, images):
                got[caption.file_name] = caption
                bar.update()
    finally:
        # A source that refused to start must not wipe what an earlier run wrote.
        if got:
            _write([got[row["file_name"]] for row in rows if row["file_name"] in got], out)
    return _read(out)


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
        subjects = names if row["domain"] == "cartoon" else tuple(_SPECIES[n] for n in names)
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
        return f"{article.capitalize() if opens else article} {_SPECIES[name]}"

    return re.sub(r"\b(?P<name>tom|jerry)\b", species, caption, flags=re.IGNORECASE)


def mapped_species(caption: str) -> list[str]:
    """Which exchanges `to_target` makes in a caption, such as ["tom -> cat"]."""
    words = set(re.findall(r"\b(?:tom|jerry)\b", caption.lower()))
    return [f"{name} -> {species}" for name, species in _SPECIES.items() if name in words]


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


def _make(stage: Stage, profile: Profile, pictures: collect.Collection) -> None:
    settings = profile.captions
    pool = pictures.select(split="train")
    if settings.source == "replay":
        pool = [row for row in pool if row["text"]]
    if not pool:
        raise UserError(
            f"{pictures.folder}: no training pictures with a recorded caption: set captions.source "
            "to openai, or collect scenes"
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
    source: CaptionSource = replay if settings.source == "replay" else _paid(profile)
    log(f"{NAME}: {len(chosen)} captions from {_name_of(settings.source, settings.model)}")
    done = write_captions(source, chosen, pictures.folder, stage.folder)
    if not done.rows:
        raise UserError(f"{stage.folder / SET_ASIDE}: no picture got a caption: see the reasons")
    extra = {key: statistics(done.rows)[key] for key in ("captions", "vocabulary", "balance")}
    stage.finish(**extra, set_aside=len(done.set_aside), usd=round(done.usd, 6))


def _name_of(source: str, model: str) -> str:
    return REPLAYED if source == "replay" else model


def _paid(profile: Profile) -> OpenAISource:
    settings = profile.captions
    given = os.environ.get(BUDGET_VARIABLE, "")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", given) or float(given) <= 0:
        raise UserError(
            f"captions by {settings.model} cost money: set {BUDGET_VARIABLE} to the US dollars "
            f"that may be spent on {settings.count} of them, or captions.source to replay"
        )
    return OpenAISource(
        run_root(profile).parent / "caption_store" / STORE,
        settings.model,
        os.environ.get("OPENAI_BASE_URL") or OPENAI,
        float(given),
        prompt_version=settings.prompt_version,
    )


def _write(found: Sequence[Caption], out: Path) -> None:
    write_jsonl(out / CAPTIONS, [_row(caption) for caption in found if caption.status == "ok"])
    aside = [caption for caption in found if caption.status != "ok"]
    keys = ("file_name", "status", "reason")
    write_jsonl(out / SET_ASIDE, [{key: getattr(c, key) for key in keys} for c in aside])


def _row(caption: Caption) -> dict[str, Any]:
    row = asdict(caption)
    row.pop("reason")
    row["target"] = to_target(caption.caption)
    row["mapped"] = mapped_species(caption.caption)
    return row


def _read(folder: Path) -> Captions:
    return Captions(folder, read_jsonl(folder / CAPTIONS), read_jsonl(folder / SET_ASIDE))


def _balance(counts: Counter[str]) -> float:
    total = sum(counts.values())
    if len(counts) < 2:
        return 0.0
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return entropy / math.log(len(counts))
