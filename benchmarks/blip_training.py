"""Samples a second of BLIP's fine-tuning, `blip.fine_tune` against the plain Trainer.

python benchmarks/blip_training.py [--steps 200] [--threads 2] [--rounds 3] …

Both train the shipped tiny BLIP on the same captioned scenes, for the captioning loss alone and
without augmentation. They share learning rate, schedule, warm-up, weight decay, clipping, fused
AdamW, batch, precision and threads; neither evaluates or saves within the time measured. The
`transformers.Trainer` has the model as transformers loads it, captions tokenised beforehand and
padded to the longest of a batch; its pictures go through BLIP's image processor as they are drawn,
in the main process or in workers. Two more arms say where the difference comes from: one has all
pixels ready, the other our attention besides. Every arm is run once to warm up, then in turn,
round by round; what counts is the median. The loss on held-out scenes shows that all learn the
same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    BlipForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tomjerry_utils import blip, scenes
from tomjerry_utils.blip_training import held_out_loss
from tomjerry_utils.progress import Progress, progress
from tomjerry_utils.runs import log, project_root

PICTURES, HELD_OUT = 1200, 256
FIRST_SEED = 9_200_000
WARM_UP = 10  # steps of each arm before anything is measured
# As the profile `mini` trains.
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, CLIP, MAX_LENGTH = 5e-4, 0.05, 20, 1.0, 32


@dataclass(frozen=True)
class Arm:
    """One way to train: ours, or the Trainer with these settings."""

    name: str
    workers: int | None = None  # None is ours
    grouped: bool = False
    cached: bool = False
    fused: bool = False


ARMS = (
    Arm("ours", fused=True),
    Arm("Trainer, 0 workers", 0),
    Arm("Trainer, 1 worker", 1),
    Arm("Trainer, 2 workers", 2),
    Arm("Trainer, 0 workers, by length", 0, grouped=True),
    Arm("Trainer, pixels ready", 0, cached=True),
    Arm("Trainer, pixels and attention", 0, cached=True, fused=True),
)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    images, texts = _scenes(PICTURES + HELD_OUT, options.threads)
    learn = images[:PICTURES], texts[:PICTURES]
    held = images[PICTURES:], texts[PICTURES:]
    start = held_out_loss(_fresh(fused=False), *held)

    speeds: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    losses: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for arm in ARMS:
        run(arm, *learn, options, steps=min(WARM_UP, options.steps), seed=0)
    for number in range(options.rounds):
        # There and back, so that a machine that slows down slows all of them.
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            model, seconds = run(arm, *learn, options, steps=options.steps, seed=number)
            speeds[arm.name].append(options.steps * options.batch_size / seconds)
            losses[arm.name].append(held_out_loss(model, *held))
            log(
                f"round {number + 1}/{options.rounds}, {arm.name}: "
                f"{speeds[arm.name][-1]:.1f} samples/s, held-out loss {losses[arm.name][-1]:.4f}"
            )
    _report(options, start, speeds, losses)


def run(
    arm: Arm,
    images: np.ndarray,
    texts: Sequence[str],
    options: argparse.Namespace,
    *,
    steps: int,
    seed: int,
) -> tuple[blip.Blip, float]:
    """Train a fresh BLIP for some steps; the model and the seconds, all of the call included."""
    model = _fresh(fused=arm.fused)
    with tempfile.TemporaryDirectory() as folder:
        if arm.workers is None:
            train = _ours(model, images, texts, options, steps, seed, Path(folder))
        else:
            train = _trainer(arm, model, images, texts, options, steps, seed, Path(folder))
        begun = time.perf_counter()
        train()
        seconds = time.perf_counter() - begun
    model.captioner.eval()
    return model, seconds


# ---- ours --------------------------------------------------------------------------------------


def _ours(
    model: blip.Blip,
    images: np.ndarray,
    texts: Sequence[str],
    options: argparse.Namespace,
    steps: int,
    seed: int,
    folder: Path,
) -> Any:
    def train() -> None:
        blip.fine_tune(
            model,
            images,
            texts,
            steps=steps,
            batch_size=options.batch_size,
            learning_rate=LEARNING_RATE,
            warmup_steps=_warmup(steps),
            contrastive_weight=0.0,
            augmented=False,
            seed=seed,
            folder=folder,
            weight_decay=WEIGHT_DECAY,
            grad_clip=CLIP,
            schedule="linear",
            precision=options.precision,
            device="cpu",
            threads=options.threads,
            checkpoint_every_s=float("inf"),
            log_every=_log_every(steps),
            describe="ours",
        )

    return train


# ---- the Trainer -------------------------------------------------------------------------------


class Captioned(torch.utils.data.Dataset):
    """Pictures and token ids; each picture is preprocessed as it is drawn, or beforehand."""

    def __init__(
        self, model: blip.Blip, images: np.ndarray, texts: Sequence[str], *, cached: bool
    ) -> None:
        self.processor = model.processor
        self.pictures = [Image.fromarray(image) for image in images]
        self.ids = model.tokenizer(
            list(texts), truncation=True, max_length=model.max_length
        ).input_ids
        self.pixels = self._preprocess(self.pictures) if cached else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.pixels is not None:
            pixels = self.pixels[index]
        else:
            pixels = self._preprocess(self.pictures[index])[0]
        return {"pixel_values": pixels, "input_ids": self.ids[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Token ids alone: the sampler that groups by length goes once over everything."""
        return ({"input_ids": ids} for ids in self.ids)

    def _preprocess(self, pictures: Any) -> torch.Tensor:
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"]


class Shown(TrainerCallback):
    """The same progress as ours, in place of the Trainer's own on stdout."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()


def _trainer(
    arm: Arm,
    model: blip.Blip,
    images: np.ndarray,
    texts: Sequence[str],
    options: argparse.Namespace,
    steps: int,
    seed: int,
    folder: Path,
) -> Any:
    first = model.captioner.config.text_config.bos_token_id

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = model.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]},
            padding="longest",
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ids[:, 0] = first
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": blip.mask_labels(ids, mask),
        }

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=_warmup(steps),
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=options.precision == "bf16",
        use_cpu=True,
        train_sampling_strategy="group_by_length" if arm.grouped else "random",
        dataloader_num_workers=arm.workers,
        dataloader_persistent_workers=bool(arm.workers),
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_steps=_log_every(steps),
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model.captioner,
        args=arguments,
        train_dataset=Captioned(model, images, texts, cached=arm.cached),
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)

    def train() -> None:
        with progress(steps, arm.name, unit="step") as bar:
            trainer.add_callback(Shown(bar))
            trainer.train()

    return train


# ---- what they share ---------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=_count, default=200)
    parser.add_argument("--batch-size", type=_count, default=24)
    parser.add_argument("--threads", type=_count, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=_count, default=3)
    options = parser.parse_args()
    if options.batch_size > PICTURES:
        parser.error(f"--batch-size is at most {PICTURES}, the number of pictures")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _warmup(steps: int) -> int:
    return min(WARMUP_STEPS, steps // 10)


def _log_every(steps: int) -> int:
    return max(1, steps // 40)


def _fresh(*, fused: bool) -> blip.Blip:
    """The shipped model; without our attention, the captioner is as transformers loads it."""
    folder = project_root() / "data/foundation/blip"
    model = blip.load(folder, max_length=MAX_LENGTH)
    if fused:
        return model
    plain = BlipForConditionalGeneration.from_pretrained(folder / "captioner", dtype=torch.float32)
    return replace(model, captioner=plain.eval())


def _scenes(count: int, workers: int) -> tuple[np.ndarray, list[str]]:
    """Captioned scenes, half of them drawings and half natural, in turn."""
    images, texts = [], []
    for start in progress(range(0, count, 208), "scenes"):
        seeds = range(FIRST_SEED + start, FIRST_SEED + min(start + 208, count))
        for style, part in (("cartoon", seeds[::2]), ("natural", seeds[1::2])):
            images.append(scenes.render_many(part, style, 64, workers=workers)["image"])
            texts += [scenes.caption(scenes.describe(seed), style) for seed in part]
    order = np.random.default_rng(0).permutation(count)
    return np.concatenate(images)[order], [texts[i] for i in order]


def _report(
    options: argparse.Namespace,
    start: float,
    speeds: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> None:
    medians = {name: median(values) for name, values in speeds.items()}
    rivals = [arm.name for arm in ARMS if arm.workers is not None and not arm.cached]
    best = max(rivals, key=lambda name: medians[name])
    others = [arm.name for arm in ARMS if arm.cached]
    print(f"{'':32s} samples/s (median)   held-out loss (mean; {start:.4f} before training)")
    for name, values in speeds.items():
        spread = f"{medians[name]:8.1f}  [{min(values):.1f}, {max(values):.1f}]"
        print(f"{name:32s} {spread:28s} {mean(losses[name]):.4f}")
    print(f"ours / Trainer at its best ({best}): {medians['ours'] / medians[best]:.2f}")
    for name in others:
        print(f"ours / {name}: {medians['ours'] / medians[name]:.2f}")
    record = {
        "settings": vars(options),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "loss_before": start,
        "arms": {n: {"samples_per_s": speeds[n], "loss": losses[n]} for n in speeds},
        "best_trainer": best,
        "ratio": medians["ours"] / medians[best],
        "other_ratios": {name: medians["ours"] / medians[name] for name in others},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
