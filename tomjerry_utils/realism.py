"""A realism expert for :func:`editing.egsde`: is this noisy picture a photograph or a cartoon?

A small domain classifier that knows the noise level, trained on the latents of both domains as
stage 04 holds them: on training pictures alone, as their labels are all it is told.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tomjerry_utils.training import TrainResult, apply_ema, train

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_NO_END = 10_000_000  # steps of a run that only the clock ends


class DomainExpert(ModelMixin, ConfigMixin):
    """log-odds that noisy latents z_t are a natural picture's; 0.2 M parameters."""

    @register_to_config
    def __init__(self, latent_channels: int = 4, width: int = 48) -> None:
        super().__init__()
        self.waves = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, width)
        self.stem = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=width, temb_channels=width, groups=8, down=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, C, h, w) at timesteps (B,) → (B,)."""
        time = self.time(self.waves(timesteps).to(latents.dtype))
        hidden = self.stem(latents)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.head(hidden.mean((2, 3)))[:, 0]


def train_expert(
    cartoon: Tensor,
    natural: Tensor,
    *,
    scheduler: DDIMScheduler,
    folder: Path,
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    device: str = "auto",
    threads: int = 0,
) -> tuple[DomainExpert, TrainResult]:
    """Train the realism expert on the noised training latents of both domains.

    Args:
        cartoon, natural: (N, C, h, w) and (M, C, h, w) normalised latents.
        folder: receives the training's history.
        steps: how many, at a rate that falls to 0; None where `seconds` ends it, at a constant one.
        seconds: training time over all sessions.

    Returns:
        The expert with averaged weights, and the training's result (loss and accuracy, over all
        noise levels).
    """
    if steps is None and seconds is None:
        raise ValueError("need steps or seconds")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expert = DomainExpert(latent_channels=cartoon.shape[1])
    length = scheduler.config.num_train_timesteps

    def batches(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        half = batch_size // 2
        picked = [
            part[torch.randint(len(part), (half,), generator=generator)]
            for part in (cartoon, natural)
        ]
        timesteps = torch.randint(length, (2 * half,), generator=generator)
        clean = torch.cat(picked).float()
        noise = torch.randn(clean.shape, generator=generator)
        return {
            "latents": scheduler.add_noise(clean, noise, timesteps),
            "timesteps": timesteps,
            "natural": torch.arange(2 * half).ge(half).float(),
        }

    def loss(
        batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        odds = expert(batch["latents"], batch["timesteps"])
        value = nn.functional.binary_cross_entropy_with_logits(odds, batch["natural"])
        return value, {"accuracy": ((odds > 0) == (batch["natural"] > 0)).float().mean()}

    result = train(
        {"expert": expert},
        loss,
        batches,
        steps=steps or _NO_END,
        learning_rate=learning_rate,
        schedule="linear" if steps else "constant",
        folder=folder,
        seed=seed,
        warmup_steps=min(20, steps or _NO_END),
        ema_decay=0.99,
        max_seconds=seconds,
        device=device,
        threads=threads,
        describe="realism expert",
        memory_knobs="lower batch_size",
    )
    apply_ema({"expert": expert}, result)
    return expert, result


def energy_gradient(expert: DomainExpert, latents: Tensor, timestep: int) -> Tensor:
    """∂/∂z of −log p(natural | z_t, t), (B, C, h, w): each picture's depends on it alone."""
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    with torch.enable_grad():
        z = latents.detach().requires_grad_(True)
        energy = -nn.functional.logsigmoid(expert(z, timesteps)).sum()
        (gradient,) = torch.autograd.grad(energy, z)
    return gradient
