"""Samplers on the training schedule, against data whose best denoiser and flow are known exactly.

Of data N(μ, s²) the best ẑ is the posterior mean, and the flow from noise η that all deterministic
samplers approximate ends in μ + s η.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from tomjerry_utils import UserError, samplers, sampling
from tomjerry_utils import denoiser as dn
from tomjerry_utils.images import save_image

MEAN, SPREAD = 0.7, 0.5
STRAIGHT = ("ddim", "dpm-solver++", "unipc")  # no noise on the way
KINDS = ("sample", "epsilon", "v_prediction")


class Exact:
    """The best denoiser of latents N(MEAN, SPREAD²), in the UNet's place."""

    def __init__(self, kind: str = "sample") -> None:
        self.kind = kind
        self.config = SimpleNamespace(in_channels=4)
        self.total = dn.make_scheduler(kind).alphas_cumprod
        self.seen: list[int] = []

    def __call__(self, noisy: Tensor, timesteps: Tensor, *_: Any, **__: Any) -> SimpleNamespace:
        self.seen.append(int(timesteps[0]))
        total = self.total[timesteps][:, None, None, None]
        alpha, sigma = total.sqrt(), (1 - total).sqrt()
        share = alpha * SPREAD**2 / (total * SPREAD**2 + sigma**2)
        x0 = MEAN + share * (noisy - alpha * MEAN)
        return SimpleNamespace(sample=dn.from_x0(x0, noisy, alpha, sigma, self.kind))


WRITER = dn.Conditioner(text_dim=tiny.TEXT_DIM, dim=32)


def draw(
    name: str, steps: int, *, count: int = 32, kind: str = "sample", seed: int = 0, **options: Any
) -> Tensor:
    """Latents (count, 4, 8, 8) by one sampler with the exact denoiser."""
    return sampling.sample(
        options.pop("model", Exact(kind)),  # type: ignore[arg-type]
        WRITER,
        tiny.random_batch(count),
        samplers.make_sampler(name, dn.make_scheduler(kind)),
        steps=steps,
        guidance_scale=options.pop("guidance_scale", 1.0),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def noise(count: int = 32) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def error(name: str, steps: int, kind: str = "sample") -> float:
    """Root mean square distance to where the exact flow ends."""
    eta = noise()
    return distance(draw(name, steps, kind=kind, noise=eta), MEAN + SPREAD * eta)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


# ---- right -------------------------------------------------------------------------------------


def times(steps: int, finished: int | None) -> list[int]:
    """The timesteps of a drawing on the mini profile's schedule."""
    table = sampling.timetable(dn.make_scheduler("sample"), steps, finished=finished)
    return [int(t) for _, t in table]


def test_a_finished_drawing_ends_with_the_steps_that_were_finished() -> None:
    whole = [999, 874, 749, 624, 499, 374, 249, 124]
    assert times(8, None) == times(8, 8) == whole
    assert times(4, None) == [999, 749, 499, 249]
    assert times(4, 8) == [999, 749, 499, 249, 124]
    assert times(14, 8) == [*times(16, None)[:12], 249, 124]
    for steps in (5, 8, 11, 14, 20, 32, 50):
        found = times(steps, 8)
        assert len(found) == steps and found[-2:] == [249, 124]
        assert all(a > b for a, b in pairwise(found)) and found[0] == 999
    assert abs(len(times(25, 8)) - 25) <= 2
    assert times(2, 2) == times(2, None)  # nothing comes before


@pytest.mark.parametrize("finished", [None, 8])
def test_a_drawing_from_latents_begins_at_the_noise_of_its_strength(finished: int | None) -> None:
    start = torch.zeros(4, 4, 8, 8)
    for steps, strength in ((8, 0.5), (20, 0.6), (50, 0.25), (50, 1.0)):
        model = Exact()
        draw("ddim", steps, count=4, model=model, start=start, strength=strength, finished=finished)
        assert abs(model.seen[0] - (1000 * strength - 1)) <= 500 / min(steps, 20)
        assert model.seen == times(steps, finished)[-len(model.seen) :]


@pytest.mark.parametrize("steps", [5, 14, 50])
def test_every_step_of_a_finished_drawing_begins_where_the_last_one_ended(steps: int) -> None:
    """With the exact denoiser a deterministic sampler's error falls as its steps get finer."""
    noise = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = MEAN + SPREAD * noise
    made = draw("ddim", steps, noise=noise, finished=8)
    coarse = draw("ddim", 2, noise=noise)
    assert (made - exact).abs().mean() < 0.5 * (coarse - exact).abs().mean()
    if steps > 8:
        regular = draw("ddim", 8, noise=noise)
        assert (made - exact).abs().mean() < (regular - exact).abs().mean()


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samples_have_the_datas_mean_and_spread(name: str) -> None:
    few, many = draw(name, 4), draw(name, 250)
    # 8192 numbers: the mean is known to 0.006, the spread to 0.004.
    assert float(many.mean()) == pytest.approx(MEAN, abs=0.025)
    assert float(many.std()) == pytest.approx(SPREAD, abs=0.03)
    # Control: the measure can tell, and few steps lack spread.
    assert float(few.std()) < 0.8 * SPREAD


@pytest.mark.parametrize("name", STRAIGHT)
def test_more_steps_come_nearer_to_the_exact_flow(name: str) -> None:
    errors = [error(name, steps) for steps in (2, 5, 10, 25, 50, 100, 200)]
    assert all(later < 0.9 * sooner for sooner, later in pairwise(errors))
    assert errors[-1] < 0.012
    assert errors[0] > 0.3


def test_ddpm_gains_spread_with_each_step() -> None:
    gaps = [SPREAD - float(draw("ddpm", steps).std()) for steps in (2, 5, 10, 25, 100)]
    assert all(later < sooner for sooner, later in pairwise(gaps))


def test_the_higher_orders_need_fewer_steps_than_ddim() -> None:
    eta = noise()
    for name in ("dpm-solver++", "unipc"):
        far = {
            other: distance(draw(other, 10, noise=eta), draw(other, 200, noise=eta))
            for other in (name, "ddim")
        }
        assert far[name] < 0.9 * far["ddim"], name
        assert error(name, 50) < 0.65 * error("ddim", 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_parametrisation_ends_at_the_data(name: str, kind: str) -> None:
    made = draw(name, 50, kind=kind)
    assert torch.isfinite(made).all()
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(made.std()) == pytest.approx(SPREAD, abs=0.07)


# ---- pure noise at the start, none at the end --------------------------------------------------


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_all_visit_the_same_times_from_pure_noise_on(name: str, steps: int) -> None:
    model = Exact()
    made = draw(name, steps, model=model, count=2)
    assert torch.isfinite(made).all()
    assert model.seen[0] == 999
    assert len(model.seen) == steps
    reference = dn.make_scheduler("sample")
    reference.set_timesteps(steps)
    assert model.seen == reference.timesteps.tolist()


@pytest.mark.parametrize("name", STRAIGHT)
def test_one_step_is_the_mean_of_the_data(name: str) -> None:
    """Pure noise says nothing: the best guess there is the mean, whatever the noise."""
    made = draw(name, 1, count=2)
    assert torch.allclose(made, torch.full_like(made, MEAN), atol=1e-3)


def test_the_schedule_is_the_denoisers_own() -> None:
    trained = dn.make_scheduler("sample")
    for name in samplers.SAMPLERS:
        made = samplers.make_sampler(name, trained)
        assert torch.allclose(made.alphas_cumprod, trained.alphas_cumprod, atol=1e-6), name
        assert made.config.prediction_type == "sample"
        assert made.config.timestep_spacing == "trailing"
        assert not made.config.get("clip_sample", False)


def test_unipc_with_other_steps_is_not_a_number() -> None:
    """Why `make_sampler` says "bh2": the control that the setting matters."""
    made = samplers.make_sampler("unipc", dn.make_scheduler("sample"))
    broken = type(made).from_config(made.config, solver_type="bh1")
    for scheduler, right in ((made, True), (broken, False)):
        drawn = sampling.sample(
            Exact(),  # type: ignore[arg-type]
            WRITER,
            tiny.random_batch(2),
            scheduler,
            steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        assert bool(torch.isfinite(drawn).all()) is right


# ---- in our sampling loop ----------------------------------------------------------------------


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_same_seed_draws_the_same(name: str) -> None:
    torch.manual_seed(1)
    first = draw(name, 4, count=2)
    torch.manual_seed(2)
    assert torch.equal(draw(name, 4, count=2), first)
    assert not torch.allclose(draw(name, 4, count=2, seed=1), first)


def test_only_ddpm_draws_on_the_way() -> None:
    for name in samplers.SAMPLERS:
        eta = noise(2)
        one, two = (draw(name, 4, count=2, noise=eta, seed=seed) for seed in (0, 1))
        assert torch.equal(one, two) is (name != "ddpm"), name


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_guides_and_starts_work_with_each(name: str) -> None:
    shares = []

    def guide(x0: Tensor, done: float) -> Tensor:
        shares.append(done)
        return torch.full_like(x0, 0.25)

    made = draw(name, 4, count=2, guide=guide)
    assert torch.allclose(made, torch.full_like(made, 0.25), atol=1e-3)
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75])
    # The less a start is noised, the more of it stays.
    start = torch.full((8, 4, 8, 8), 2.0)
    little, much = (
        draw(name, 20, count=8, start=start, strength=strength) for strength in (0.2, 0.9)
    )
    assert float(little.mean()) > float(much.mean()) + 0.2
    # Guidance between two equal predictions changes nothing.
    eta = noise(2)
    plain, guided = (draw(name, 4, count=2, noise=eta, guidance_scale=w) for w in (1.0, 3.0))
    assert torch.allclose(plain, guided, atol=1e-4)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(UserError, match="no sampler 'euler': choose from ddpm, ddim"):
        samplers.make_sampler("euler", dn.make_scheduler("sample"))


# ---- results -----------------------------------------------------------------------------------


def point(name: str, steps: int, kid: float, iou: float) -> dict[str, Any]:
    return {
        "sampler": name,
        "steps": steps,
        "denoising_seconds": 0.01 * steps,
        "seconds": 0.01 * steps + 0.1,
        "metrics": {
            "kid": {"value": kid, "ci95": [kid - 0.002, kid + 0.002]},
            "mask_iou": {"value": iou, "ci95": [iou - 0.02, iou + 0.02]},
        },
    }


def results() -> dict[str, Any]:
    return {
        "settings": {"size": 8, "steps": [8, 50]},
        "points": [
            point("unipc", 8, 0.020, 0.85),
            point("ddim", 50, 0.010, 0.80),
            point("ddim", 8, 0.0119, 0.79),
            point("unipc", 50, 0.017, 0.88),
        ],
    }


def test_few_steps_are_held_against_the_interval_of_many() -> None:
    rows = {row["sampler"]: row for row in samplers.few_against_many(results())}
    assert rows["ddim"]["kid"]
    assert rows["ddim"]["iou"]
    assert rows["ddim"]["denoising"] == pytest.approx(50 / 8)
    assert rows["ddim"]["whole"] == pytest.approx(0.6 / 0.18)
    assert not rows["unipc"]["kid"]  # .020 is above .019
    assert not rows["unipc"]["iou"]  # .85 is below .86
    assert samplers.few_against_many(results(), few=4) == []


def test_the_table_has_each_point_in_order() -> None:
    lines = samplers.samplers_table(results()).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        ["DDIM", "8"],
        ["DDIM", "50"],
        ["UniPC", "8"],
        ["UniPC", "50"],
    ]
    assert "80.0" in lines[0]
    assert "180.0" in lines[0]
    assert "0.0119 [0.0099, 0.0139]" in lines[0]
    assert "0.790 [0.770, 0.810]" in lines[0]


def test_the_figure_shows_a_picture_for_each_point(tmp_path: Path) -> None:
    sheet = np.zeros((8 * len(samplers.SAMPLERS), 16, 3), np.uint8)
    for row in range(len(samplers.SAMPLERS)):
        sheet[8 * row : 8 * row + 8, :8] = 10 * row + 1
        sheet[8 * row : 8 * row + 8, 8:] = 10 * row + 2
    save_image(tmp_path / "samplers.png", sheet)
    figure = samplers.draw_samplers(results(), tmp_path / "samplers.png")
    shown = sorted(int(np.asarray(image.get_array()).max()) for image in figure.axes[0].images)
    assert shown == [11, 12, 31, 32]  # DDIM's and UniPC's rows of the sheet
    said = [text.get_text() for text in figure.axes[0].texts]
    assert {"DDIM", "UniPC", "8 steps", "50 steps"} <= set(said)
    assert "0.012, 80 ms" in said


def test_results_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmarks/samplers\.py"):
        samplers.load_results(tmp_path / "samplers.json")
    (tmp_path / "samplers.json").write_text(json.dumps(results()), encoding="utf-8")
    assert samplers.load_results(tmp_path / "samplers.json") == results()
