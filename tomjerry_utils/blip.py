"""Stage 03: BLIP fine-tuned on the captions; then a caption for every image of both domains.

The model, its loading and its similarity stand in `blip_model`, the training in `blip_training`;
both are re-exported here. `blip_scores` measures.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError, blip_scores, captions, collect, scenes
from tomjerry_utils.blip_model import (
    LORA_TARGETS,
    VARIANTS,
    Blip,
    create_tiny,
    load,
    mask_labels,
    save,
    similarity,
    tiny_config,
    to_natural,
    trainable_parameters,
)
from tomjerry_utils.blip_scores import caption_slots
from tomjerry_utils.blip_training import BEST, EVALUATIONS, augment, fine_tune, joint_loss
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    Stage,
    hash_file,
    hash_obj,
    model_source,
    open_stage,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tomjerry_utils.training import pick_device, progress

__all__ = [
    "LORA_TARGETS",
    "VARIANTS",
    "Blip",
    "BlipRun",
    "augment",
    "caption_slots",
    "create_tiny",
    "ensure",
    "fine_tune",
    "joint_loss",
    "load",
    "mask_labels",
    "save",
    "similarity",
    "tiny_config",
    "to_natural",
    "trainable_parameters",
]

STAGE = "03_blip"
# How a caption of each label begins; other captioners are asked for the same words.
OPENINGS = {scenes.label_of(*who): words for who, (words, _) in scenes.SUBJECTS.items()}
SCORED = 400  # held-out pictures that are captioned before and after fine-tuning, at most
LOG_LINES = 24  # of a training; at each the stopping pictures are looked at


@dataclass(eq=False)
class BlipRun:
    """What stage 03 leaves: the fine-tuned BLIP and a caption for every image.

    Attributes:
        blip: the model, on the profile's device.
        captions: rows `file_name`, `domain`, `label`, `split`, `caption`, and `natural`, the
            caption with its species mapped across.
        before_after: rows `file_name`, `true`, `before`, `after` of held-out pictures.
        scores: on those, as `blip_scores.compare` gives them, and how many `pictures` were learnt
            from, with a caption or a label alone, stopped by and held out.
        history: rows of the training log.
        evaluations: rows `step`, `held_out`: caption loss on the pictures that training stops by.
    """

    folder: Path
    blip: Blip
    captions: list[dict[str, Any]]
    before_after: list[dict[str, Any]]
    scores: dict[str, Any]
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def ensure(profile: Profile) -> BlipRun:
    """Stage 03 at this profile: read it if it is finished, else make it, upstream included."""
    pictures = collect.ensure(profile)
    written = captions.ensure(profile)
    inputs = {
        "captions": hash_file(written.folder / "captions.jsonl"),
        "manifest": hash_file(pictures.folder / "manifest.jsonl"),
        "pretrained": _fingerprint(profile.blip.pretrained),
    }
    settings = profile.blip.model_dump(mode="json", exclude={"caption_batch_size"})
    settings["precision"] = profile.precision
    stage = open_stage(profile, STAGE, settings, inputs)
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, pictures, written.rows)
    folder = stage.folder
    return BlipRun(
        folder=folder,
        blip=load(folder, pick_device(profile.device), max_length=profile.blip.max_length),
        captions=read_jsonl(folder / "all_captions.jsonl"),
        before_after=read_jsonl(folder / "before_after.jsonl"),
        scores=read_json(folder / "scores.json"),
        history=read_jsonl(folder / "history.jsonl"),
        evaluations=read_jsonl(folder / EVALUATIONS),
    )


def _make(
    stage: Stage, profile: Profile, pictures: collect.Collection, written: list[dict[str, Any]]
) -> None:
    """Fine-tune, score, caption everything; each part is skipped where a killed run finished it."""
    folder = stage.folder
    if not (folder / "scores.json").is_file():
        _tune_and_score(stage, profile, pictures, written)
    blip = load(folder, pick_device(profile.device), max_length=profile.blip.max_length)
    rows = pictures.select(kept=True)
    path = folder / "all_captions.partial.jsonl"
    done = _read_partial(path)
    missing = [row for row in rows if row["file_name"] not in done]
    size = profile.blip.caption_batch_size
    with path.open("a", encoding="utf-8") as file:
        for start in progress(range(0, len(missing), size), "03 captions"):
            part = missing[start : start + size]
            texts = blip.generate(pictures.images(part, blip.image_size), batch_size=size)
            for row, text in zip(part, texts, strict=True):
                record = {key: row[key] for key in ("file_name", "domain", "label", "split")}
                done[row["file_name"]] = {**record, "caption": text, "natural": to_natural(text)}
                file.write(json.dumps(done[row["file_name"]]) + "\n")
            file.flush()
    write_jsonl(folder / "all_captions.jsonl", [done[row["file_name"]] for row in rows])
    path.unlink()
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    (folder / BEST).unlink(missing_ok=True)
    stage.finish(scores=read_json(folder / "scores.json"))


def _tune_and_score(
    stage: Stage, profile: Profile, pictures: collect.Collection, written: list[dict[str, Any]]
) -> None:
    settings, folder = profile.blip, stage.folder
    blip = load(settings.pretrained, pick_device(profile.device), max_length=settings.max_length)
    learn, labelled, stop, held = _split(
        pictures, written, profile.collect.validation_fraction, settings.stopping_fraction
    )
    if not settings.label_batch_size:
        labelled = []

    def read(rows: list[dict[str, Any]]) -> tuple[np.ndarray, list[str]]:
        return pictures.images(rows, blip.image_size), [row["text"] for row in rows]

    images, true = read(held)
    domains = [row["domain"] for row in held]
    size = settings.caption_batch_size
    before = blip_scores.score(blip, images, true, domains, batch_size=size)
    fine_tune(
        blip,
        *read(learn),
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        schedule="cosine",
        contrastive_weight=settings.contrastive_weight,
        labelled=read(labelled) if labelled else None,
        label_batch_size=settings.label_batch_size,
        ema_decay=settings.ema_decay,
        held=read(stop),
        patience=settings.patience,
        seed=profile.seed,
        folder=folder,
        lora_rank=settings.lora_rank,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        checkpoint_every_s=profile.checkpoint_every_s,
        keep_checkpoint=True,
        log_every=max(1, settings.steps // LOG_LINES),
        describe="03 BLIP",
    )
    save(blip, folder)
    after = blip_scores.score(blip, images, true, domains, batch_size=size)
    table = zip(held, true, before["written"], after["written"], strict=True)
    write_jsonl(
        folder / "before_after.jsonl",
        (
            {"file_name": row["file_name"], "true": text, "before": first, "after": last}
            for row, text, first, last in table
        ),
    )
    scores = blip_scores.compare(before, after, true, domains)
    counts = {
        "learnt": len(learn),
        "labelled": len(labelled),
        "stopping": len(stop),
        "held_out": len(held),
    }
    write_json(folder / "scores.json", {**scores, "pictures": counts})


def _split(
    pictures: collect.Collection,
    written: list[dict[str, Any]],
    fraction: float,
    stopping_fraction: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Pictures to learn captions from, labels from, to stop by, and to score: rows with `text`.

    Labels are learnt from training pictures that have a class and no caption; their `text` is how
    a caption of that class begins.

    Scored is the validation split where its captions are known, as those of scenes are; else a
    share of the captioned pictures by group. Stopping has a share of its own, so that the scored
    pictures decide nothing. No group, such as the frames of one shot, is on two sides.
    """
    by_name = {row["file_name"]: row for row in pictures.select(kept=True)}
    learn = [
        {**by_name[row["file_name"]], "text": row["caption"]}
        for row in written
        if row["file_name"] in by_name
    ]
    held = [row for row in pictures.select(split="validation", kept=True) if row.get("text")]
    if not held:
        held = _share(learn, fraction)
    learn = _apart(learn, held)
    stop = _share(learn, stopping_fraction)
    learn = _apart(learn, stop)
    captioned = {row["file_name"] for row in written}
    labelled = [
        {**row, "text": OPENINGS[row["label"]]}
        for row in pictures.select(split="train", kept=True)
        if row["file_name"] not in captioned and row["label"] in OPENINGS
    ]
    labelled = _apart(labelled, [*stop, *held])
    if not learn or not stop:
        raise UserError(
            "03 BLIP: no captioned picture is left to learn from beside the held-out ones: "
            "raise captions.count, or collect pictures of more than one group"
        )
    # A fixed shuffle, so that a cap takes both domains and all classes.
    scored = sorted(held, key=lambda row: hash_obj(row["file_name"]))[:SCORED]
    return learn, labelled, stop, scored


def _share(rows: list[dict[str, Any]], fraction: float) -> list[dict[str, Any]]:
    """The rows of a share of the groups, at least one; the groups are drawn by their hash."""
    order = sorted({row["group"] for row in rows}, key=hash_obj)
    groups = set(order[: max(1, round(fraction * len(order)))])
    return [row for row in rows if row["group"] in groups]


def _apart(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = {row["group"] for row in others}
    return [row for row in rows if row["group"] not in groups]


def _read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """Captions a killed run had written; a last line cut short is dropped."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    path.write_text(whole, encoding="utf-8")
    return {row["file_name"]: row for row in map(json.loads, whole.splitlines())}


def _fingerprint(source: str) -> str:
    """What names a pretrained model: the hashes of a folder's weights, or a hub id."""
    folder = Path(model_source(source))
    if not folder.is_dir():
        return source
    return hash_obj(
        {str(p.relative_to(folder)): hash_file(p) for p in folder.rglob("*.safetensors")}
    )
