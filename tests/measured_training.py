"""Trainings of the stages with the tiny models, and what memory they really take.

Run as a program: each case in a process of its own, forked from one that has only imported; a line
of JSON for each. Numbers do not matter here, so that all inputs are zeros.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomjerry_utils import adapters, blip_training, ldm, structure, training, transfer
from tomjerry_utils.autoencoder import factor_of, load_autoencoder
from tomjerry_utils.blip_model import Blip, load
from tomjerry_utils.denoiser import NO_CLASS, load_denoiser, make_scheduler, widen
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import foundation_root

STEPS = 2  # moments and averages are there from the second step on


def profile_of(case: dict[str, Any]) -> Profile:
    """The mini profile with a case's changes: section → key → value."""
    profile = load_profile("mini")
    changes = {k: v for k, v in case.items() if isinstance(v, dict)}
    changes["ldm"] = {"autoencoder_steps": STEPS, **changes.get("ldm", {})}
    sections = {
        name: getattr(profile, name).model_copy(update=values) for name, values in changes.items()
    }
    return profile.model_copy(update={"threads": 1, **sections})


def train_blip(profile: Profile, folder: Path) -> None:
    blip = load(foundation_root() / "blip", max_length=profile.blip.max_length)
    side = blip.image_size
    images = np.zeros((64, side, side, 3), np.uint8)
    # Longer than any may be, so that all are cut to the profile's length.
    texts = [f"a cat number {'x' * (40 + i)}" for i in range(64)]
    os.environ["RANK"] = "1"  # the estimate of its own is not what is measured
    blip_training.fine_tune(
        blip, images, texts, steps=STEPS, folder=folder, seed=0, threads=1, device="cpu",
        batch_size=profile.blip.batch_size, accumulation=profile.blip.accumulation,
        contrastive_weight=profile.blip.contrastive_weight, lora_rank=profile.blip.lora_rank,
        ema_decay=profile.blip.ema_decay, learning_rate=1e-4, augmented=False,
        labelled=(images, texts), label_batch_size=profile.blip.label_batch_size,
        checkpoint_every_s=1e9,
    )  # fmt: skip


def train_decoder(profile: Profile, folder: Path) -> None:
    blip = load(foundation_root() / "blip")  # lies beside it
    vae = load_autoencoder(foundation_root() / "autoencoder")
    images = np.zeros((16, profile.image_size, profile.image_size, 3), np.uint8)
    ldm.tune_autoencoder(vae, images, profile, folder)
    del blip


def _latents(profile: Profile, vae: Any, describer: Blip) -> ldm.LatentSet:
    side, width = profile.image_size // factor_of(vae), 128
    assert describer.captioner.config.text_config.hidden_size == width
    return ldm.LatentSet(
        latents=torch.zeros(4, vae.config.latent_channels, side, side),
        views=torch.zeros(4, structure.VIEW_CHANNELS, side, side).half(),
        labels=torch.full((4,), NO_CLASS),
        table=torch.zeros(1, ldm.TEXT_LENGTH, width),
        masks=torch.ones(1, ldm.TEXT_LENGTH, dtype=torch.long),
        row=torch.zeros(4, dtype=torch.long),
        texts=["a cat sits facing left " + " ".join(["on the floor"] * 20)],
        files=[""] * 4,
    )


def train_denoiser(profile: Profile, folder: Path) -> None:
    root = foundation_root()
    vae, blip = load_autoencoder(root / "autoencoder"), load(root / "blip")
    unet, conditioner = load_denoiser(root / "denoiser")
    adapters.prepare(
        unet, lora_rank=profile.ldm.lora_rank, seed=0,
        gradient_checkpointing=profile.ldm.gradient_checkpointing,
    )  # fmt: skip
    ldm.train_denoiser(
        unet, conditioner, _latents(profile, vae, blip), make_scheduler("sample"), profile,
        folder=folder, steps=STEPS, batch_size=profile.ldm.batch_size, learning_rate=1e-4,
    )  # fmt: skip


def train_translator(profile: Profile, folder: Path) -> None:
    root = foundation_root()
    vae, blip = load_autoencoder(root / "autoencoder"), load(root / "blip")
    unet, conditioner = load_denoiser(root / "denoiser")
    widen(unet, vae.config.latent_channels + structure.VIEW_CHANNELS)
    data = _latents(profile, vae, blip)
    before = ldm.LdmRun(
        folder,
        vae,
        unet,
        conditioner,
        make_scheduler("sample"),
        data,
        data,
        [],
        [],
        {},
        {},
        data.views,
        "",
    )
    transfer.train_row(
        before, blip, profile, folder=folder, steps=STEPS, attention=profile.transfer.attention,
        use_view=True, use_posture=False, blip_weight=profile.transfer.blip_weight,
    )  # fmt: skip


RUNS = {
    "03 BLIP": train_blip,
    "04 decoder": train_decoder,
    "04 denoiser": train_denoiser,
    "05 translator": train_translator,
}


def _warm_up() -> None:
    """What a first training imports and sets up once."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 1))
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            {"net": net}, lambda batch, step, generator: (net(batch).mean(), {}),
            lambda step, generator: torch.zeros(2, 3, 8, 8), steps=1, learning_rate=1e-3,
            folder=folder, seed=0, ema_decay=0.9, device="cpu", threads=1,
        )  # fmt: skip


def measure(case: dict[str, Any]) -> float:
    """Peak bytes of a training in torch's own allocator, its models included."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    _warm_up()  # not before the fork, which no thread pool of torch's outlives
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
    ):
        RUNS[case["training"]](profile_of(case), Path(folder))
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(sums.max())


def main() -> None:
    for case in json.loads(sys.stdin.read()):
        child = os.fork()
        if not child:
            print(json.dumps(measure(case)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, case


if __name__ == "__main__":
    main()
