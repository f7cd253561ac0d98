"""Pictures a second of stage 04's denoiser training against diffusers' text-to-image loop.

    python benchmarks/ldm_training.py [--steps 60] [--rounds 2] [--out results/ldm_training.json]

Both start from the shipped denoiser and see as many pictures of the course, 64 px, with the same
captions, classes, views, shares left out, loss weights, batch, optimiser settings and schedule.

Ours is `ldm.train_denoiser` on what stage 04 caches: latents, views and text features, made once.
That time is charged to us: a run of s steps pays s/S of it, S being the steps of the whole stage.

The rival does, in our words, what `examples/text_to_image/train_text_to_image.py` of diffusers
does with the settings that its documentation recommends (--use_ema, here with --foreach_ema,
--center_crop, --random_flip, --max_grad_norm=1, --snr_gamma=5): pictures are opened, resized,
cropped, mirrored and normalised and captions are tokenised as they are drawn, in the main process
or in workers; autoencoder and text encoder run in each step; accelerate, AdamW and EMAModel do the
rest. Left out to its advantage: logging to a tracker and checkpoints on the way. Recommended for
little memory alone, and slower: --gradient_checkpointing, which has an arm of its own. What it
cannot do and is given, so that both learn the same: to predict the clean latent, and
`denoiser.drop`.

The view is no part of a text-to-image loop. In most arms the rival reads it ready made, which
nobody charges it for; "views in the step" has it computed like all else. "cached latents" reads
latents, too, and its time to make those is charged as ours is, and not charged: both are printed.

Each contender runs in a process of its own, in turn, there and back, so that its peak memory is its
own and a machine that slows down slows all. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tomjerry_utils import UserError, blip, collect, ldm, structure
from tomjerry_utils.autoencoder import encode, encode_all, load_autoencoder
from tomjerry_utils.blip_training import mirrored_text
from tomjerry_utils.denoiser import (
    NO_CLASS,
    Batch,
    denoising_loss,
    drop,
    load_denoiser,
    make_scheduler,
    predict,
)
from tomjerry_utils.images import load_image
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    environment,
    foundation_root,
    log,
    project_root,
    read_json,
    read_jsonl,
    run_root,
    write_json,
)
from tomjerry_utils.scenes import LABELS
from tomjerry_utils.training import apply_ema, pick_device

DRAWS = 4  # times and noises drawn for each held-out picture


@dataclass(frozen=True)
class Arm:
    """One way to train: ours, or the rival with these settings."""

    name: str
    workers: int | None = None  # None is ours
    views: str = "ready"  # or "step": computed in each step
    latents: str = "step"  # or "ready"
    checkpointing: bool = False


ARMS = (
    Arm("ours"),
    Arm("diffusers, 0 workers", 0),
    Arm("diffusers, 1 worker", 1),
    Arm("diffusers, 2 workers", 2),
    Arm("diffusers, checkpointing", 0, checkpointing=True),
    Arm("diffusers, views in the step", 0, views="step"),
    Arm("diffusers, cached latents", 0, latents="ready"),
)


def main() -> None:
    given = _options()
    if given.contend:
        _contend(given)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.arms}
    with tempfile.TemporaryDirectory() as work:
        facts = _prepare(given, Path(work))
        for number in range(given.rounds):
            for name in given.arms if number % 2 == 0 else reversed(given.arms):
                found[name].append(_in_own_process(name, given, Path(work), number))
                row = found[name][-1]
                rate = row["samples"] / row["seconds"]
                log(
                    f"round {number + 1}/{given.rounds}, {name}: {rate:.1f} pictures/s, "
                    f"held-out loss {row['loss']:.4f}, {row['peak_mb']:.0f} MB"
                )
    _report(given, facts, found)


# ---- the parent --------------------------------------------------------------------------------


def _prepare(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rows and ready-made latents, views and text features of the course's pictures, as files."""
    profile = _profile(given)
    root = run_root(profile)
    captions = root / blip.STAGE / "all_captions.jsonl"
    if not captions.is_file():
        raise UserError(f"no {captions}: `tomjerry course --only 03` makes it")
    texts = {row["file_name"]: row["natural"] for row in read_jsonl(captions)}
    pictures = collect.Collection(root / collect.NAME, profile.image_size)
    models = Models(profile)
    sets: dict[str, list[ldm.LatentSet]] = {"train": [], "held": []}
    kept: list[dict[str, Any]] = []
    for domain in ("cartoon", "natural"):
        tone = None
        for part, split in (("train", "train"), ("held", "validation")):
            rows = pictures.select(domain=domain, split=split, source="scenes")
            rows = rows[: (given.pictures or len(rows)) if part == "train" else given.held_out // 2]
            made, tone = ldm.latent_set(
                pictures.images(rows, profile.image_size),
                [row["label"] for row in rows],
                [texts[row["file_name"]] for row in rows],
                tone=tone,
                **models.readers(),
            )
            sets[part].append(made)
            if part == "train":
                kept += [
                    {
                        "path": str(pictures.path(row).resolve()),
                        "text": texts[row["file_name"]],
                        "label": row["label"],
                        "domain": domain,
                        "tone": tone,
                    }
                    for row in rows
                ]
    for part, both in sets.items():
        ldm.join(both).save(work / f"{part}.safetensors")
    write_json(work / "rows.json", kept)
    return {
        "pictures": len(kept),
        "held_out": len(sets["held"][0]) + len(sets["held"][1]),
        "whole_steps": profile.ldm.steps,
        "loss_before": held_out_loss(models.fresh(), models, work),
    }


def _in_own_process(
    name: str, given: argparse.Namespace, work: Path, number: int
) -> dict[str, Any]:
    """Run one contender; what it measured."""
    out = work / f"result-{number}.json"
    command = [sys.executable, __file__, "--contend", name, "--work", str(work), "--out", str(out)]
    for option in ("steps", "warm_up", "batch_size", "threads", "precision", "device", "profile"):
        command += [f"--{option.replace('_', '-')}", str(getattr(given, option))]
    command += ["--seed", str(number)]
    env = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, check=False)
    if done.returncode:
        raise UserError(f"{name} ended with exit code {done.returncode}; its own words are above")
    return read_json(out)


def _report(
    given: argparse.Namespace, facts: dict[str, Any], found: dict[str, list[dict[str, Any]]]
) -> None:
    samples = given.steps * given.batch_size
    share = given.steps / facts["whole_steps"]
    rates: dict[str, float] = {}
    for name, rows in found.items():
        rates[name] = samples / median(row["seconds"] for row in rows)
    cost = {name: _median_parts([row["caching"] for row in rows]) for name, rows in found.items()}
    charged = {
        name: samples / (samples / rate + share * sum(cost[name].values()))
        for name, rate in rates.items()
    }
    print(f"held-out loss before: {facts['loss_before']:.4f}")
    print(f"{'':30s} pictures/s  with caching  held-out loss  peak MB")
    for name, rows in found.items():
        print(
            f"{name:30s} {rates[name]:>10.1f}  {charged[name]:>12.1f}"
            f"  {mean(row['loss'] for row in rows):>13.4f}"
            f"  {median(row['peak_mb'] for row in rows):>7.0f}"
        )
    ratios: dict[str, dict[str, float]] = {}
    if "ours" in found:
        for name, parts in cost.items():
            if parts:
                said = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
                print(f"{name} caches: {said}")
        print(f"of which {share:.3f} is charged: {given.steps} of the stage's steps")
        for name in (n for n in found if n != "ours"):
            ratios[name] = {
                "charged": charged["ours"] / charged[name],
                "rival_not_charged": charged["ours"] / rates[name],
                "training_alone": rates["ours"] / rates[name],
            }
            said = ", ".join(
                f"{what.replace('_', ' ')} {v:.2f}" for what, v in ratios[name].items()
            )
            print(f"ours / {name}: {said}")
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": environment(),
        "settings": {k: v for k, v in vars(given).items() if k not in ("out", "contend", "work")},
        **facts,
        "caching_seconds": cost,
        "charged_share": share,
        "arms": found,
        "pictures_per_s": rates,
        "pictures_per_s_charged": charged,
        "ratios": ratios,
    }
    write_json(given.out, record)


def _median_parts(caching: Sequence[dict[str, float]]) -> dict[str, float]:
    return {part: median(each[part] for each in caching) for part in caching[0]}


# ---- a contender -------------------------------------------------------------------------------


class Models:
    """The shipped models, as stage 04 starts from them."""

    def __init__(self, profile: Profile) -> None:
        root, self.device = foundation_root(), pick_device(profile.device)
        self.profile = profile
        self.vae = load_autoencoder(root / "autoencoder").to(self.device)
        self.net = structure.load_structure(root / "structure").to(self.device)
        self.blip = blip.load(root / "blip", self.device)
        self.scheduler = make_scheduler(profile.ldm.prediction_type)
        for module in (self.vae, self.net, *self.blip.parts().values()):
            module.requires_grad_(False)

    def readers(self) -> dict[str, Any]:
        """What `ldm.latent_set` reads pictures with."""
        return {"vae": self.vae, "net": self.net, "describer": self.blip}

    def fresh(self) -> dict[str, Any]:
        """The untrained denoiser and conditioner."""
        unet, conditioner = load_denoiser(foundation_root() / "denoiser")
        modules = {"unet": unet, "conditioner": conditioner}
        return {name: module.to(self.device) for name, module in modules.items()}


def _contend(given: argparse.Namespace) -> None:
    """Warm up, train, and write what it took and what was learnt."""
    torch.set_num_threads(given.threads)
    profile = _profile(given)
    models = Models(profile)
    arm = next(arm for arm in ARMS if arm.name == given.contend)
    rows = read_json(given.work / "rows.json")
    caching: dict[str, float] = {}
    if arm.workers is None:
        data, caching = _cache(rows, models)
        train: Callable[..., None] = _ours(data, models, given)
    else:
        train, caching = _rival(arm, rows, models, given)
    if given.warm_up:
        train(models.fresh(), given.warm_up)
    modules = models.fresh()
    begun = time.perf_counter()
    train(modules, given.steps)
    if models.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    record = {
        "seconds": seconds,
        "samples": given.steps * given.batch_size,
        "caching": caching,
        "peak_mb": _peak_mb(models.device),
        "loss": held_out_loss(modules, models, given.work),
    }
    write_json(given.out, record)


def held_out_loss(modules: dict[str, Any], models: Models, work: Path) -> float:
    """The weighted loss on held-out latents, at the same times and with the same noise for all."""
    data = ldm.LatentSet.load(work / "held.safetensors")
    generator = torch.Generator().manual_seed(0)
    losses = []
    with torch.no_grad():
        for module in modules.values():
            module.eval()
        for _ in range(DRAWS):
            for index in torch.arange(len(data)).split(64):
                loss, _, _ = denoising_loss(
                    modules["unet"],
                    modules["conditioner"],
                    data.batch(index).to(models.device),
                    models.scheduler,
                    generator,
                    gamma=models.profile.ldm.min_snr_gamma,
                )
                losses.append(float(loss) * len(index))
    return sum(losses) / (DRAWS * len(data))


def _peak_mb(device: torch.device) -> float:
    """High-water mark of this process: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


# ---- ours --------------------------------------------------------------------------------------


class Laps:
    """Seconds since the last lap, added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def _cache(rows: Sequence[dict[str, Any]], models: Models) -> tuple[ldm.LatentSet, dict]:
    """What stage 04 caches, domain by domain as it does, and the seconds of each part."""
    laps = Laps()
    sets = []
    for domain in ("cartoon", "natural"):
        some = [row for row in rows if row["domain"] == domain]
        images = _pictures(some, models)
        laps.lap("pictures")
        made, _ = ldm.latent_set(
            images,
            [row["label"] for row in some],
            [row["text"] for row in some],
            tone=None,
            **models.readers(),
        )
        laps.lap("latents, views and texts")
        with tempfile.TemporaryDirectory() as folder:
            made.save(Path(folder) / "latents.safetensors")
        sets.append(made)
        laps.lap("written")
    data = ldm.join(sets)
    laps.lap("written")
    return data, laps.seconds


def _pictures(rows: Sequence[dict[str, Any]], models: Models) -> np.ndarray:
    return np.stack([load_image(row["path"], models.profile.image_size) for row in rows])


def _ours(data: ldm.LatentSet, models: Models, given: argparse.Namespace) -> Callable[..., None]:
    def train(modules: dict[str, Any], steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            result = ldm.train_denoiser(
                modules["unet"],
                modules["conditioner"],
                data,
                models.scheduler,
                models.profile,
                folder=Path(folder),
                steps=steps,
                batch_size=given.batch_size,
                learning_rate=models.profile.ldm.learning_rate,
            )
        apply_ema(modules, result)

    return train


# ---- the rival ---------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Pictures with captions, transformed and tokenised batch by batch as they are drawn."""

    def __init__(
        self, arm: Arm, rows: Sequence[dict[str, Any]], models: Models, data: ldm.LatentSet
    ) -> None:
        self.rows, self.data, self.ready = rows, data, arm.latents == "ready"
        self.with_views = arm.views == "ready"
        self.tokenizer, self.size = models.blip.tokenizer, models.profile.image_size
        # Standardised tones belong to a domain, and no picture says which it is of.
        self.tones = [torch.tensor(row["tone"]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        examples: list[dict[str, Tensor]] = []
        texts = []
        for index in indices:
            # Cached latents cannot be mirrored any more.
            flip = not self.ready and bool(torch.rand(()) < 0.5)
            text = self.rows[index]["text"]
            texts.append(mirrored_text(text) if flip else text)
            example = {"label": torch.tensor(_number(self.rows[index])), "tone": self.tones[index]}
            if self.ready:
                example["latents"] = self.data.latents[index]
            else:
                example["pixels"] = self._pixels(index, flip)
            if self.with_views:
                example["view"] = self._view(index, flip)
            examples.append(example)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=ldm.TEXT_LENGTH,
            return_tensors="pt",
        )
        for example, ids, mask in zip(
            examples, tokens.input_ids, tokens.attention_mask, strict=True
        ):
            example |= {"ids": ids, "mask": mask}
        return examples

    def _pixels(self, index: int, flip: bool) -> Tensor:
        """(3, S, S) in [−1, 1]: the short side resized, the middle cut out, perhaps mirrored."""
        image = Image.open(self.rows[index]["path"]).convert("RGB")
        if min(image.size) != self.size:
            scale = self.size / min(image.size)
            image = image.resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
            )
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        if image.size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return values.float().div(255).sub(0.5).div(0.5)

    def _view(self, index: int, flip: bool) -> Tensor:
        view = self.data.views[index].float()
        return _mirrored_view(view) if flip else view


def _mirrored_view(view: Tensor) -> Tensor:
    """The view of the mirrored picture: its maps lie at twice the grid's resolution."""
    maps = F.pixel_shuffle(view[: structure.MAPS], 2).flip(-1)
    return torch.cat([F.pixel_unshuffle(maps, 2), view[structure.MAPS :].flip(-1)])


def _collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}


def _rival(
    arm: Arm, rows: Sequence[dict[str, Any]], models: Models, given: argparse.Namespace
) -> tuple[Callable[..., None], dict[str, float]]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel, compute_snr

    options, scheduler = models.profile.ldm, models.scheduler
    data = ldm.LatentSet.load(given.work / "train.safetensors")
    # What it computes in each step it does not hold in memory.
    data.table = data.latents = torch.zeros(0)
    laps = Laps()
    if arm.latents == "ready":
        images = _pictures(rows, models)
        laps.lap("pictures")
        data.latents = encode_all(models.vae, torch.from_numpy(images))
        laps.lap("latents")
    if arm.views == "step":
        data.views = torch.zeros(0)
    dataset = Rows(arm, rows, models, data)
    weight_dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    text_encoder = models.blip.retrieval.text_encoder
    if given.precision == "bf16":
        text_encoder.to(dtype=weight_dtype)
        models.vae.to(dtype=weight_dtype)

    def conditions(batch: dict[str, Tensor], latents: Tensor) -> Batch:
        text = text_encoder(batch["ids"], attention_mask=batch["mask"]).last_hidden_state
        if arm.views == "ready":
            view = batch["view"]
        else:
            maps = structure.probabilities(models.net, batch["pixels"])
            grid = (latents.shape[-2], latents.shape[-1])
            view = structure.view(maps, batch["pixels"], grid)
            centre, spread = batch["tone"][:, :, :, None, None].unbind(1)
            tones = (view[:, structure.MAPS :] - centre) / spread.clamp(min=1e-3)
            view = torch.cat([view[:, : structure.MAPS], tones], 1)
        return drop(
            Batch(latents, batch["label"], text.float(), batch["mask"], view),
            labels=options.class_dropout,
            captions=options.caption_dropout,
            view=options.structure_dropout,
            generator=torch.default_generator,
        )

    def train(modules: dict[str, Any], steps: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            mixed_precision="bf16" if given.precision == "bf16" else "no",
            cpu=models.device.type == "cpu",
        )
        set_seed(given.seed)
        parameters = [p for module in modules.values() for p in module.parameters()]
        ema = EMAModel(parameters, decay=options.ema_decay, foreach=True)
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=1e-2)
        loader = torch.utils.data.DataLoader(
            dataset,
            shuffle=True,
            collate_fn=_collate,
            batch_size=given.batch_size,
            num_workers=arm.workers or 0,
        )
        rate = get_scheduler(
            "linear",
            optimizer=optimizer,
            num_warmup_steps=min(options.warmup_steps, steps),
            num_training_steps=steps,
        )
        unet, conditioner, optimizer, loader, rate = accelerator.prepare(
            modules["unet"], modules["conditioner"], optimizer, loader, rate
        )
        ema.to(accelerator.device)
        if arm.checkpointing:
            modules["unet"].enable_gradient_checkpointing()
        unet.train()
        conditioner.train()
        with progress(steps, arm.name, unit="step") as bar:
            for batch in _without_end(loader, steps):
                with accelerator.accumulate(unet, conditioner):
                    if arm.latents == "ready":
                        latents = batch["latents"]
                    else:
                        latents = encode(models.vae, batch["pixels"].to(weight_dtype)).float()
                    noise = torch.randn_like(latents)
                    timesteps = torch.randint(
                        scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                    )
                    noisy = scheduler.add_noise(latents, noise, timesteps)
                    told = conditions(batch, latents)
                    output = predict(unet, conditioner, noisy, timesteps, told)
                    weight = compute_snr(scheduler, timesteps).clamp(1.0, options.min_snr_gamma)
                    loss = F.mse_loss(output.float(), latents, reduction="none")
                    loss = (loss.mean((1, 2, 3)) * weight).mean()
                    shown = accelerator.gather(loss.repeat(len(latents))).mean().item()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    rate.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ema.step(parameters)
                    bar.update()
                bar.note(loss=shown)
        ema.copy_to(parameters)
        with tempfile.TemporaryDirectory() as folder:
            accelerator.unwrap_model(unet).save_pretrained(folder)

    return train, laps.seconds


def _without_end(loader: Any, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after the other, as many as there are steps."""
    done = 0
    while True:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


# ---- what they share ---------------------------------------------------------------------------


def _number(row: dict[str, Any]) -> int:
    return NO_CLASS if row["label"] is None else LABELS.index(row["label"])


def _profile(given: argparse.Namespace) -> Profile:
    profile = load_profile(given.profile)
    changed = {name: getattr(given, name) for name in ("device", "threads", "precision", "seed")}
    return profile.model_copy(update=changed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=_count, default=60)
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those that count (5)")
    parser.add_argument("--rounds", type=_count, default=2, help="every other one backwards (2)")
    parser.add_argument("--batch-size", type=_count, default=16)
    parser.add_argument("--threads", type=_count, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--pictures", type=int, default=0, help="of each domain, 0 for all")
    parser.add_argument("--held-out", type=int, default=192, help="held-out pictures (192)")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=project_root() / "results/ldm_training.json")
    parser.add_argument("--contend", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
