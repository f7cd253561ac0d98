"""Stage 03: BLIP fine-tuned on the captions; then a caption for every image of both domains.

The model itself, its loading and its similarity stand in `blip_model` and are re-exported here.
The loss joins captioning, contrast and matching; pads are masked out of the labels, which
transformers does not do for you.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tomjerry_utils import UserError, captions, collect, scenes
from tomjerry_utils.blip_model import (
    LORA_TARGETS,
    VARIANTS,
    Blip,
    Images,
    add_lora,
    caption_slots,
    create_tiny,
    expected_parameters,
    load,
    mask_labels,
    merge_lora,
    save,
    similarity,
    slot_accuracy,
    tiny_config,
    to_natural,
    trainable_parameters,
)
from tomjerry_utils.images import to_tensor
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
from tomjerry_utils.training import TrainResult, pick_device, progress, train

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
    "slot_accuracy",
    "tiny_config",
    "to_natural",
    "train_foundation",
    "trainable_parameters",
]

STAGE = "03_blip"
TEMPERATURE = 0.07  # of the contrastive logits; BLIP starts there, and its heads store none
EVALUATED = 256  # held-out captions written before and after fine-tuning, at most


@dataclass(eq=False)
class BlipRun:
    """What stage 03 leaves: the fine-tuned BLIP and a caption for every image.

    Attributes:
        blip: the model, on the profile's device.
        captions: rows `file_name`, `domain`, `label`, `split`, `caption`, and `natural`, the
            caption with its species mapped across.
        before_after: rows `file_name`, `true`, `before`, `after` of held-out pictures.
        scores: "before" and "after" → slot → accuracy on those.
        history: rows of the training log.
    """

    folder: Path
    blip: Blip
    captions: list[dict[str, Any]]
    before_after: list[dict[str, Any]]
    scores: dict[str, dict[str, float]]
    history: list[dict[str, Any]]


def ensure(profile: Profile) -> BlipRun:
    """Stage 03 at this profile: read it if it is finished, else make it, upstream included."""
    pictures = collect.ensure(profile)
    written = captions.ensure(profile)
    inputs = {
        "captions": hash_file(written.folder / "captions.jsonl"),
        "manifest": hash_file(pictures.folder / "manifest.jsonl"),
        "pretrained": _fingerprint(profile.blip.pretrained),
    }
    settings = {**profile.blip.model_dump(mode="json"), "precision": profile.precision}
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
    stage.finish(scores=read_json(folder / "scores.json"))


def _tune_and_score(
    stage: Stage, profile: Profile, pictures: collect.Collection, written: list[dict[str, Any]]
) -> None:
    settings, folder = profile.blip, stage.folder
    blip = load(settings.pretrained, pick_device(profile.device), max_length=settings.max_length)
    learn, held = _split(pictures, written, profile.collect.validation_fraction)
    images = pictures.images(held, blip.image_size)
    before = blip.generate(images, batch_size=settings.caption_batch_size)
    fine_tune(
        blip,
        pictures.images(learn, blip.image_size),
        [row["text"] for row in learn],
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        contrastive_weight=settings.contrastive_weight,
        seed=profile.seed,
        folder=folder,
        lora_rank=settings.lora_rank,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        checkpoint_every_s=profile.checkpoint_every_s,
        keep_checkpoint=True,
        log_every=max(1, settings.steps // 40),
        describe="03 BLIP",
    )
    save(blip, folder)
    after = blip.generate(images, batch_size=settings.caption_batch_size)
    true = [row["text"] for row in held]
    table = zip(held, true, before, after, strict=True)
    write_jsonl(
        folder / "before_after.jsonl",
        (
            {"file_name": row["file_name"], "true": text, "before": first, "after": last}
            for row, text, first, last in table
        ),
    )
    scores = {"before": slot_accuracy(before, true), "after": slot_accuracy(after, true)}
    write_json(folder / "scores.json", scores)


def _split(
    pictures: collect.Collection, written: list[dict[str, Any]], fraction: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Captioned pictures to learn from, and held-out ones with a known caption, as manifest rows.

    Held out is the validation split where its captions are known, as those of scenes are; else a
    share of the captioned pictures by group, so that no shot is on both sides.
    """
    by_name = {row["file_name"]: row for row in pictures.select(kept=True)}
    learn = [
        {**by_name[row["file_name"]], "text": row["caption"]}
        for row in written
        if row["file_name"] in by_name
    ]
    held = [row for row in pictures.select(split="validation", kept=True) if row.get("text")]
    if not held:
        order = sorted({row["group"] for row in learn}, key=hash_obj)
        groups = set(order[: max(1, round(fraction * len(order)))])
        held = [row for row in learn if row["group"] in groups]
    apart = {row["group"] for row in held}
    learn = [row for row in learn if row["group"] not in apart]
    if not learn:
        raise UserError(
            "03 BLIP: no captioned picture is left to learn from beside the held-out ones: "
            "raise captions.count, or collect pictures of more than one group"
        )
    # A fixed shuffle, so that a cap takes both domains and all classes.
    return learn, sorted(held, key=lambda row: hash_obj(row["file_name"]))[:EVALUATED]


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


# ---- fine-tuning -------------------------------------------------------------------------------


def joint_loss(
    blip: Blip,
    images: Images,
    texts: Sequence[str],
    *,
    contrastive_weight: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Captioning + weight · (contrastive + matching) on one batch, as BLIP trains (§3.2).

    Equal captions in a batch are no negatives of each other: they share the contrastive target,
    and matching draws its negatives from the others, about half of them hard (in proportion to
    exp of the logits), half at random: hard ones alone teach a head from scratch nothing.
    """
    features = blip.vision_features(images)
    writing = blip.caption_loss(None, texts, features=features)
    logits = blip.project(features) @ blip.text_embeds(texts).T / TEMPERATURE
    groups = {text: index for index, text in enumerate(texts)}
    group = torch.tensor([groups[text] for text in texts])
    same = (group[:, None] == group[None]).to(logits.device)
    target = same / same.sum(1, keepdim=True)
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    # Row i is mismatched once: its text with a foreign image, or its image with a foreign text.
    weights = logits.detach().float().softmax(1) + 1 / len(texts)
    rows = (~same).any(1).nonzero()[:, 0].cpu()
    images_at = texts_at = torch.arange(len(texts))
    if len(rows):
        chances = weights.masked_fill(same, 0).cpu()[rows]
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
        swap = torch.arange(len(rows)) % 2 == 0
        images_at = torch.cat([images_at, torch.where(swap, drawn, rows)])
        texts_at = torch.cat([texts_at, torch.where(swap, rows, drawn)])
    matches = (torch.arange(len(images_at)) < len(texts)).long().to(logits.device)
    scores = blip.itm_logits(None, [texts[i] for i in texts_at], features=features[images_at])
    matching = F.cross_entropy(scores, matches)
    loss = writing + contrastive_weight * (contrast + matching)
    parts = {"caption": writing, "contrastive": contrast, "matching": matching}
    return loss, {name: value.detach() for name, value in parts.items()}


def augment(
    images: torch.Tensor, texts: Sequence[str], generator: torch.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Mirror half of the pictures, left and right in their captions with them; move, zoom, tint.

    images: (B, 3, H, W), float in [-1, 1]. Nothing that a caption says changes but the direction.
    """
    count = len(images)
    flip = torch.rand(count, generator=generator) < 0.5
    zoom = 1 + 0.12 * (2 * torch.rand(count, generator=generator) - 1)
    moves = torch.zeros(count, 2, 3)
    moves[:, 0, 0] = torch.where(flip, -zoom, zoom)
    moves[:, 1, 1] = zoom
    moves[:, :, 2] = 0.12 * (2 * torch.rand(count, 2, generator=generator) - 1)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, shift = 0.08 * torch.randn(2, count, 3, 1, 1, generator=generator)
    other = {"left": "right", "right": "left"}
    turned = [re.sub(r"\b(left|right)\b", lambda m: other[m[0]], text) for text in texts]
    return (images * (1 + gain) + shift).clamp(-1, 1), [
        turned[i] if flip[i] else texts[i] for i in range(count)
    ]


def fine_tune(
    blip: Blip,
    images: np.ndarray,
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    contrastive_weight: float,
    seed: int,
    folder: Path,
    lora_rank: int = 0,
    weight_decay: float = 0.05,
    **options: Any,
) -> TrainResult:
    """Train `blip` in place on pictures and their captions; resumes from `folder`.

    Args:
        images: uint8 (N, H, W, 3), also a memory map; texts: N captions.
        lora_rank: 0 trains every weight; r > 0 adapters of rank r on attention, and the heads.
        options: passed on to `training.train`.

    Raises:
        UserError: the number of trainable parameters is not what the settings say.
    """
    expected = expected_parameters(blip, lora_rank)
    if lora_rank:
        add_lora(blip, lora_rank, seed)
    if (found := trainable_parameters(blip)) != expected:
        raise UserError(f"BLIP trains {found} parameters, {expected} expected: check lora_rank")

    def batches(step: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        rows = torch.randint(len(texts), (batch_size,), generator=generator).tolist()
        return augment(to_tensor(images[rows]), [texts[row] for row in rows], generator)

    def loss_fn(
        batch: tuple[torch.Tensor, list[str]], step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return joint_loss(blip, *batch, contrastive_weight=contrastive_weight, generator=generator)

    result = train(
        blip.parts(),
        loss_fn,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        folder=folder,
        seed=seed,
        weight_decay=weight_decay,
        **options,
    )
    merge_lora(blip)
    blip.captioner.eval()
    blip.retrieval.eval()
    return result


# ---- the tiny foundation model ----


@dataclass(eq=False)
class FoundationBlip:
    """The tiny BLIP and the training that made it."""

    blip: Blip
    history: list[dict[str, Any]]
    seconds: float


def train_foundation(
    folder: str | Path,
    images: np.ndarray,
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    warmup_steps: int = 100,
    contrastive_weight: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> FoundationBlip:
    """Train the tiny BLIP from a random start on zoo scenes; resumes from `folder`.

    Args:
        images: uint8 (N, 64, 64, 3), also a memory map; texts: N zoo captions.
        options: passed on to `training.train`.
    """
    blip = create_tiny(scenes.vocabulary(), seed=seed)
    result = fine_tune(
        blip,
        images,
        texts,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        contrastive_weight=contrastive_weight,
        seed=seed,
        folder=Path(folder),
        **{"describe": "foundation BLIP", **options},
    )
    return FoundationBlip(blip, result.history, result.seconds)
