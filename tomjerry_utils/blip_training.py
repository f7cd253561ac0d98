"""How BLIP is fine-tuned: one loss for its three tasks, and a training that stops at its best.

The loss joins captioning, contrast and matching; pads are masked out of the labels, which
transformers does not do for you. Half of the pictures are mirrored, their captions with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tomjerry_utils import UserError, memory
from tomjerry_utils.blip_model import (
    Blip,
    Images,
    add_lora,
    expected_parameters,
    merge_lora,
    trainable_parameters,
)
from tomjerry_utils.images import to_tensor
from tomjerry_utils.runs import atomic_path, read_jsonl, write_jsonl
from tomjerry_utils.training import TrainResult, apply_ema, out_of_memory_told, train

EVALUATIONS = "evaluations.jsonl"
BEST = "best.safetensors"
MEMORY_KNOBS = (
    "halve blip.batch_size and blip.label_batch_size and double blip.accumulation in the profile "
    "(the same step in half the memory), or set blip.lora_rank to 16 (no optimiser state "
    "for the base weights)"
)
TEMPERATURE = 0.07  # of the contrastive logits; BLIP starts there, and its heads store none

Negatives = Callable[
    [torch.Tensor, torch.Tensor, torch.Generator], tuple[Sequence[int], Sequence[int]]
]


def hard_negatives(
    logits: torch.Tensor, same: torch.Tensor, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Which picture is shown with which text that is not its own, two lists of indices.

    Row i is mismatched once: its text with a foreign image, or its image with a foreign text.

    Args:
        logits: (B, B) contrastive logits; same: (B, B) bool, whether two captions are equal.
    """
    rows = (~same).any(1).nonzero()[:, 0].cpu()
    if not len(rows):
        return [], []
    weights = logits.detach().float().softmax(1) + 1 / len(same)
    chances = weights.masked_fill(same, 0).cpu()[rows]
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
    swap = torch.arange(len(rows)) % 2 == 0
    return torch.where(swap, drawn, rows).tolist(), torch.where(swap, rows, drawn).tolist()


def joint_loss(
    blip: Blip,
    images: Images,
    texts: Sequence[str],
    *,
    contrastive_weight: float,
    generator: torch.Generator,
    labelled: tuple[Images, Sequence[str]] | None = None,
    negatives: Negatives = hard_negatives,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Captioning + weight · (contrastive + matching) on one batch, as BLIP trains (§3.2).

    With weight 0 only captioning is computed, and the retrieval heads stay as they are. `labelled`
    are pictures of which only the class is known, with the words that their captions begin with:
    the decoder learns those words from them and nothing else.

    Equal captions in a batch are no negatives of each other: they share the contrastive target,
    and matching draws its negatives from the others, about half of them hard (in proportion to
    exp of the logits), half at random: hard ones alone teach a head from scratch nothing.
    """
    features = blip.vision_features(images)
    loss = blip.caption_loss(None, texts, features=features)
    parts = {"caption": loss}
    if labelled:
        parts["label"] = blip.caption_loss(*labelled, begun=True)
        loss = loss + parts["label"]
    if not contrastive_weight:
        return loss, {name: value.detach() for name, value in parts.items()}
    logits = blip.project(features) @ blip.text_embeds(texts).T / TEMPERATURE
    groups = {text: index for index, text in enumerate(texts)}
    group = torch.tensor([groups[text] for text in texts])
    same = (group[:, None] == group[None]).to(logits.device)
    target = same / same.sum(1, keepdim=True)
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    others = negatives(logits, same, generator)
    images_at, texts_at = ([*range(len(texts)), *indices] for indices in others)
    matches = (torch.arange(len(images_at)) < len(texts)).long().to(logits.device)
    scores = blip.itm_logits(None, [texts[i] for i in texts_at], features=features[images_at])
    matching = F.cross_entropy(scores, matches)
    loss = loss + contrastive_weight * (contrast + matching)
    parts |= {"contrastive": contrast, "matching": matching}
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
    return (images * (1 + gain) + shift).clamp(-1, 1), [
        mirrored_text(text) if flip[i] else text for i, text in enumerate(texts)
    ]


def mirrored_text(text: str) -> str:
    """A caption as it reads for the mirrored picture."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda side: other[side[0]], text)


def fine_tune(
    blip: Blip,
    images: np.ndarray,
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    contrastive_weight: float,
    seed: int,
    folder: str | Path,
    lora_rank: int = 0,
    weight_decay: float = 0.05,
    augmented: bool = True,
    labelled: tuple[np.ndarray, Sequence[str]] | None = None,
    label_batch_size: int = 0,
    held: tuple[np.ndarray, Sequence[str]] | None = None,
    patience: int = 0,
    **options: Any,
) -> TrainResult:
    """Train `blip` in place on pictures and their captions; resumes from `folder`.

    Args:
        images: uint8 (N, H, W, 3), also a memory map; texts: N captions.
        batch_size: of one process; `accumulation` and processes multiply it.
        lora_rank: 0 trains every weight; r > 0 adapters of rank r on attention, and the heads.
        augmented: mirror, move and tint the pictures, see `augment`.
        labelled: pictures without a caption, and the words that their class begins one with;
            `label_batch_size` of them join each batch, see `joint_loss`.
        held: pictures and captions that nothing is learnt from. Their caption loss is measured at
            every log line (`evaluations.jsonl`), on averaged weights where there is an average, and
            the weights that score best are the result.
        patience: log lines without a better score after which training ends; 0 = it never does.
        options: passed on to `training.train`.

    Raises:
        UserError: the number of trainable parameters is not what the settings say.
    """
    expected = expected_parameters(blip, lora_rank)
    if lora_rank:
        add_lora(blip, lora_rank, seed)
    if (found := trainable_parameters(blip)) != expected:
        raise UserError(f"BLIP trains {found} parameters, {expected} expected: check lora_rank")
    if not label_batch_size:
        labelled = None
    best = _Best(blip, Path(folder), *held, patience=patience) if held else None

    def draw(
        images: np.ndarray, texts: Sequence[str], count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[str]]:
        rows = torch.randint(len(texts), (count,), generator=generator).tolist()
        batch = to_tensor(images[rows]), [texts[row] for row in rows]
        return augment(*batch, generator) if augmented else batch

    def batches(step: int, generator: torch.Generator) -> tuple[Any, Any]:
        captioned = draw(images, texts, batch_size, generator)
        return captioned, draw(*labelled, label_batch_size, generator) if labelled else None

    def loss_fn(
        batch: tuple[Any, Any], step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        captioned, named = batch
        return joint_loss(
            blip,
            *captioned,
            contrastive_weight=contrastive_weight,
            generator=generator,
            labelled=named,
        )

    what = options.get("describe", "BLIP")
    with out_of_memory_told(lambda: f"{what}: out of memory before the first step: {MEMORY_KNOBS}"):
        # A picture with a label alone needs no more than one with a caption.
        most = batch_size + (label_batch_size if labelled else 0)
        _announce_memory(blip, images, texts, loss_fn, most, options)
    result = train(
        blip.parts(),
        loss_fn,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        folder=folder,
        seed=seed,
        weight_decay=weight_decay,
        on_log=best,
        memory_knobs=MEMORY_KNOBS,
        **options,
    )
    if best and result.finished:
        best.restore()
    else:
        apply_ema(blip.parts(), result)
    merge_lora(blip)
    blip.captioner.eval()
    blip.retrieval.eval()
    return result


def _announce_memory(
    blip: Blip,
    images: np.ndarray,
    texts: Sequence[str],
    loss_fn: Any,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    """Say what a step will need, by the longest captions that may meet in it."""
    if os.environ.get("RANK", "0") != "0":
        return
    longest = sorted(set(texts), key=len, reverse=True)

    def forward(count: int) -> torch.Tensor:
        batch = to_tensor(images[:1]).expand(count, -1, -1, -1), (longest * count)[:count]
        return loss_fn((batch, None), 0, torch.Generator().manual_seed(0))[0]

    need = memory.estimate(
        blip.parts(),
        forward,
        batch_size=batch_size,
        averaged=options.get("ema_decay") is not None,
        precision=options.get("precision", "fp32"),
    )
    memory.announce(options.get("describe", "BLIP"), need, blip.device, MEMORY_KNOBS)


class _Best:
    """Watches the caption loss on held-out pictures and keeps the weights that did best."""

    def __init__(
        self, blip: Blip, folder: Path, images: np.ndarray, texts: Sequence[str], *, patience: int
    ) -> None:
        self.blip, self.images, self.texts, self.patience = blip, images, texts, patience
        self.log, self.weights = folder / EVALUATIONS, folder / BEST
        if not any((folder / "checkpoint").glob("[0-9]*")):
            # Training begins anew: what an earlier one left is not its best.
            self.weights.unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)

    def __call__(self, step: int, modules: dict[str, torch.nn.Module]) -> bool:
        """Measure; True where `patience` runs out. A resumed run measures again what it repeats."""
        from safetensors.torch import save_file

        loss = held_out_loss(self.blip, self.images, self.texts)
        at, least = self.best()
        if loss < least:
            facts = {"step": str(step), "held_out": repr(loss)}
            with atomic_path(self.weights) as temporary:
                save_file(_tensors(modules), temporary, metadata=facts)
            at = step
        rows = read_jsonl(self.log) if self.log.is_file() else []
        rows = [*(row for row in rows if row["step"] < step), {"step": step, "held_out": loss}]
        write_jsonl(self.log, rows)
        return bool(self.patience) and sum(row["step"] > at for row in rows) >= self.patience

    def best(self) -> tuple[int, float]:
        """Step and loss of the weights that are kept; the file itself knows."""
        from safetensors import safe_open

        if not self.weights.is_file():
            return 0, float("inf")
        with safe_open(self.weights, "pt") as file:
            facts = file.metadata()
        return int(facts["step"]), float(facts["held_out"])

    def restore(self) -> None:
        """Put the best weights into the modules."""
        from safetensors.torch import load_file

        kept = load_file(self.weights)
        with torch.no_grad():
            for name, module in self.blip.parts().items():
                for key, value in module.state_dict(keep_vars=True).items():
                    value.copy_(kept[f"{name}/{key}"])


def _tensors(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    # Tied weights stand under each of their names; safetensors wants them apart.
    return {
        f"{name}/{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


@torch.no_grad()
def held_out_loss(
    blip: Blip, images: np.ndarray, texts: Sequence[str], *, batch_size: int = 64
) -> float:
    """Mean −log p of a word of a caption, over the words of all captions; pads left out.

    images: uint8 (N, H, W, 3); texts: N captions.
    """
    total, words = 0.0, 0
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        each = blip.caption_loss(images[part], texts[part], reduction="none")
        counts = blip.tokens(texts[part])[1].sum(1) - 1
        total += float((each * counts).sum())
        words += int(counts.sum())
    return total / words
