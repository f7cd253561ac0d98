"""The realism expert: what it learns, where it knows nothing, which way its gradient leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Clock
from torch import Tensor

from tomjerry_utils import realism, training
from tomjerry_utils.denoiser import make_scheduler
from tomjerry_utils.training import TrainResult

SHAPE = (4, 8, 8)


def latents(domain: str, count: int, *, seed: int) -> Tensor:
    """Two domains that differ by a pattern, under more noise than pattern."""
    pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return noise + (0.6 if domain == "natural" else -0.6) * pattern


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[realism.DomainExpert, TrainResult]:
    return realism.train_expert(
        latents("cartoon", 128, seed=1),
        latents("natural", 128, seed=2),
        scheduler=make_scheduler("sample"),
        folder=tmp_path_factory.mktemp("expert"),
        steps=80,
        seed=0,
        batch_size=32,
        learning_rate=3e-3,
        device="cpu",
    )


def odds(expert: realism.DomainExpert, clean: Tensor, timestep: int) -> Tensor:
    times = torch.full((len(clean),), timestep)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return expert(make_scheduler("sample").add_noise(clean, noise, times), times)


def test_the_expert_tells_the_domains_until_noise_hides_them(
    trained: tuple[realism.DomainExpert, TrainResult],
) -> None:
    expert, result = trained
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    right = {}
    for timestep in (0, 200, 999):
        scores = odds(expert, latents("natural", 100, seed=3), timestep) > 0
        others = odds(expert, latents("cartoon", 100, seed=4), timestep) < 0
        right[timestep] = torch.cat([scores, others]).float().mean().item()
    assert right[0] > 0.95 and right[200] > 0.9
    # At the last step nothing but noise is left, the same for both.
    assert right[999] == 0.5


def test_the_gradient_leads_to_the_natural_domain(
    trained: tuple[realism.DomainExpert, TrainResult],
) -> None:
    expert, _ = trained
    clean = latents("cartoon", 20, seed=6)
    slope = realism.energy_gradient(expert, clean, 0)
    times = torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        before, after = expert(clean, times), expert(clean - 0.2 * slope, times)
        back = expert(clean + 0.2 * slope, times)
    assert (after > before).all() and (back < before).all()
    # Finite differences along the slope say the same.
    small = 1e-2
    unit = slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        ends = [-torch.nn.functional.logsigmoid(expert(clean + d * unit, times))
                for d in (-small, small)]  # fmt: skip
    measured = (ends[1] - ends[0]) / (2 * small)
    assert torch.allclose(measured, slope.flatten(1).norm(dim=1), rtol=0.05, atol=1e-3)
    # A picture's gradient is its own, whatever else is in the batch; the weights have none.
    assert torch.allclose(realism.energy_gradient(expert, clean[3:4], 0), slope[3:4], atol=1e-5)
    assert all(p.grad is None for p in expert.parameters())


def test_the_expert_is_saved_and_read(
    trained: tuple[realism.DomainExpert, TrainResult], tmp_path: Path
) -> None:
    expert, _ = trained
    expert.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    again = realism.DomainExpert.from_pretrained(tmp_path).eval()
    clean = latents("natural", 3, seed=7)
    assert torch.allclose(odds(again, clean, 100), odds(expert, clean, 100), atol=1e-4)


def test_an_expert_can_be_given_seconds_instead_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "time", Clock())
    scheduler = make_scheduler("sample")
    options: dict[str, Any] = {"scheduler": scheduler, "seed": 0, "batch_size": 8, "device": "cpu"}
    sets = [latents(domain, 16, seed=1) for domain in ("cartoon", "natural")]
    _, result = realism.train_expert(*sets, folder=tmp_path, seconds=0.5, **options)
    # A look when a step ends, and one at whether a checkpoint is due.
    assert (result.steps, result.seconds) == (2, 0.5)
    with pytest.raises(ValueError, match="steps or seconds"):
        realism.train_expert(*sets, folder=tmp_path, **options)
