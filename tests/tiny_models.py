"""Models small enough for a test: the real classes, random weights, 32 px pictures."""

from __future__ import annotations

import contextlib
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tomjerry_utils import posture, scenes, structure
from tomjerry_utils.autoencoder import encode_all, measure_latents, tiny_autoencoder
from tomjerry_utils.denoiser import Batch, Conditioner, make_scheduler

if TYPE_CHECKING:
    from tomjerry_utils.blip import Blip
    from tomjerry_utils.training import TrainResult
    from tomjerry_utils.translator import Translator

SIZE = 32
TEXT_DIM = 64


class Clock:
    """Stands in for a module's `time`: each look at it takes an eighth of a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.125
        return self.now


def free_port() -> str:
    """A port for processes that will meet there in a while.

    From below those that the system gives to whoever asks for any: nobody gets it meanwhile.
    """
    choose = random.SystemRandom()  # seeded alike, two workers would choose alike
    while True:
        port = choose.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def pictures(style: str, count: int, *, size: int = SIZE, first: int | None = None) -> np.ndarray:
    """Scenes of a style's training range, (count, size, size, 3) uint8."""
    start = scenes.RANGES[style][0] if first is None else first
    return scenes.render_many(range(start, start + count), style, size, workers=1)["image"]


def truth(style: str, count: int, *, size: int = 64, cls: str | None = None) -> dict[str, Tensor]:
    """Scenes with their truth: images (N, 3, S, S) in [−1, 1], maps as `probabilities` gives."""
    drawn = [
        scenes.render(scenes.describe(seed, cls=cls), style, size, noise=False, truth=True)
        for seed in range(scenes.RANGES[style][0], scenes.RANGES[style][0] + count)
    ]
    images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2).float()
    parts = torch.from_numpy(np.stack([d.parts for d in drawn]))
    mouse = torch.from_numpy(np.stack([d.mask == 2 for d in drawn]))
    return {
        "images": images / 127.5 - 1,
        "maps": structure.one_hot(parts, mouse),
        "parts": parts.long(),
        "mouse": mouse,
    }


def tiny_unet(inputs: int, outputs: int, *, dim: int = 32) -> UNet2DConditionModel:
    """Two levels, 0.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=dim,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class Captioned:
    """Pictures (N, 32, 32, 3) uint8 with a caption each."""

    images: np.ndarray
    texts: list[str]


def captioned(count: int = 6) -> Captioned:
    """Training scenes of different captions, `count` cartoons and then `count` natural ones."""
    found = Captioned(
        np.concatenate([pictures(style, count) for style in scenes.STYLES]),
        [
            scenes.caption(scenes.describe(scenes.RANGES[style][0] + i), style)
            for style in scenes.STYLES
            for i in range(count)
        ],
    )
    assert len(set(found.texts)) == 2 * count
    return found


def tiny_blip(seed: int = 0) -> Blip:
    """A BLIP of 64 hidden units from a random start; it knows the words of the scenes."""
    from tomjerry_utils import blip

    return blip.create_tiny(scenes.vocabulary(), image_size=SIZE, hidden_size=TEXT_DIM, seed=seed)


def tune_blip(model: Blip, data: Captioned, folder: Path, **settings: Any) -> TrainResult:
    """Fine-tune a tiny BLIP; with the settings left as they are it knows a dozen by heart."""
    from tomjerry_utils import blip

    plain: dict[str, Any] = {
        "steps": 180,
        "batch_size": 12,
        "learning_rate": 4e-3,
        "warmup_steps": 5,
        "contrastive_weight": 0.5,
        "seed": 0,
        "log_every": 10,
        "augmented": False,  # pictures are learnt sooner where they look the same each time
    }
    return blip.fine_tune(model, data.images, data.texts, folder=folder, **plain | settings)


def random_batch(
    count: int, *, channels: int = 4, view_channels: int = 3, seed: int = 0, size: int = 8
) -> Batch:
    """Conditions and latents of random numbers; the second row has no caption."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[:, 4:] = 0
    if count > 1:
        mask[1] = 0
    return Batch(
        latents=torch.randn(count, channels, size, size, generator=generator),
        labels=torch.arange(count) % 6,
        text=torch.randn(count, 6, TEXT_DIM, generator=generator),
        mask=mask,
        view=torch.randn(count, view_channels, size, size, generator=generator),
    )


def tiny_vae(images: np.ndarray, *, seed: int = 0) -> AutoencoderKL:
    """The tiny architecture from a random start, its latents measured on pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = tiny_autoencoder(4).eval()
    measure_latents(vae, torch.from_numpy(images))
    return vae


def tiny_translator(*, attention: str | None = "ldm", seed: int = 0) -> Translator:
    """A translator of random weights; nothing it draws looks like anything."""
    from tomjerry_utils import baselines
    from tomjerry_utils.translator import Translator

    images = pictures("cartoon", 6)
    vae = tiny_vae(images, seed=seed)
    describer = tiny_blip(seed)
    describer.max_length = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = structure.StructureNet((8, 16)).eval()
        nets = posture.Posture(posture.PoseNet((8, 16)).eval(), posture.LayoutNet((8, 16)).eval())
        same = torch.full((3, 7, posture.ANIMALS, posture.POINTS, 2, 2), 0.2)
        nets.alignment = posture.Alignment(same, same.clone())
        unet = tiny_unet(4 + structure.VIEW_CHANNELS, 4).eval()
        views, _ = structure.look(net, torch.from_numpy(images), (8, 8))
        mean, std = structure.tone_statistics(views)
        conditioner = Conditioner(
            text_dim=TEXT_DIM,
            dim=32,
            attention=attention,
            source_channels=structure.VIEW_CHANNELS if attention else 0,
            tone_mean={"cartoon": mean, "natural": mean},
            tone_std={"cartoon": std, "natural": std},
        ).eval()
    assert encode_all(vae, torch.from_numpy(images)).shape == (6, 4, 8, 8)
    return Translator(
        unet=unet,
        conditioner=conditioner,
        scheduler=make_scheduler("sample"),
        vae=vae,
        net=net,
        describer=describer,
        size=SIZE,
        steps=3,
        guidance_scale=2.0,
        blip_variant="vision",
        colour=baselines.measure_colour(pictures("natural", 6)),
        wardrobe={
            name: torch.randn(20, structure.COATS + 3, generator=torch.Generator().manual_seed(i))
            for i, name in enumerate(scenes.CLASSES)
        },
        posture=nets,
    )


def save_translator(translator: Translator, folder: Path, *, profile: str = "smoke") -> Path:
    """The folder that stage 05 leaves, for a translator of random weights."""
    from tomjerry_utils import blip, features
    from tomjerry_utils.denoiser import save_denoiser
    from tomjerry_utils.runs import write_json
    from tomjerry_utils.translator import WARDROBE

    save_denoiser(translator.unet, translator.conditioner, folder / "denoiser")
    translator.vae.save_pretrained(folder / "autoencoder")
    translator.net.save_pretrained(folder / "structure")
    assert translator.posture is not None
    translator.posture.save(folder / "posture")
    blip.save(translator.describer, folder / "blip")
    found = features.extract(pictures("cartoon", 24))
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    centre = found.mean(0)
    inside = 1 - found @ centre / np.linalg.norm(centre)
    if translator.wardrobe is not None:
        save_file(translator.wardrobe, folder / WARDROBE)
    write_json(
        folder / "translator.json",
        {
            "profile": profile,
            "size": translator.size,
            "sample_steps": translator.steps,
            "guidance_scale": translator.guidance_scale,
            "blip_guidance": translator.blip_guidance,
            "blip_variant": translator.blip_variant,
            "prediction_type": "sample",
            "colour": translator.colour,
            "reference": {
                "features": features.NAME,
                "centre": centre.tolist(),
                "median": float(np.median(inside)),
                "p95": float(np.quantile(inside, 0.95)),
                "n": 24,
            },
        },
    )
    return folder
