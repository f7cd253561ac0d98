"""The diffusion rivals on Gaussians, whose best denoiser and maps are known in closed form."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tomjerry_utils import UserError, editing
from tomjerry_utils.denoiser import NO_CLASS, Conditioner, from_x0, make_scheduler
from tomjerry_utils.sampling import sample
from tomjerry_utils.scenes import LABELS

KINDS = ("sample", "epsilon", "v_prediction")
SHAPE = (4, 8, 8)
TOM, CAT = LABELS.index("tom"), LABELS.index("cat")
MEANS = torch.randn(NO_CLASS + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
DEVIATIONS = torch.tensor([0.5, 0.7, 0.9, 1.3, 1.1, 0.8, 1.5])


class Gaussians(nn.Module):
    """The optimal denoiser where label c's latents are N(MEANS[c], DEVIATIONS[c]²), as a UNet."""

    def __init__(self, scheduler: Any, deviations: Tensor = DEVIATIONS) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=SHAPE[0])
        self.scheduler, self.deviations = scheduler, deviations
        self.seen: list[tuple[int, int]] = []  # label and timestep of each pass

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, **_: Any) -> Any:
        labels = tokens[:, 0].argmax(-1)
        self.seen.append((int(labels[0]), int(timesteps[0])))
        total = self.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        alpha, sigma = total.sqrt(), (1 - total).sqrt()
        mean, deviation = MEANS[labels], self.deviations[labels][:, None, None, None]
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        x0 = mean + gain * (noisy - alpha * mean)
        kind = self.scheduler.config.prediction_type
        return SimpleNamespace(sample=from_x0(x0, noisy, alpha, sigma, kind))


def gaussians(kind: str = "sample", deviations: Tensor = DEVIATIONS) -> editing.ClassDenoiser:
    scheduler = make_scheduler(kind)
    conditioner = Conditioner(text_dim=4, dim=NO_CLASS + 1).eval()
    with torch.no_grad():
        conditioner.classes.weight.copy_(torch.eye(NO_CLASS + 1))  # a token names its label
    return editing.ClassDenoiser(Gaussians(scheduler, deviations), conditioner, scheduler)


def drawn(count: int, label: int = TOM, deviations: Tensor = DEVIATIONS) -> Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    return MEANS[label] + deviations[label] * noise


def run(
    method: str,
    latents: Tensor,
    model: editing.ClassDenoiser,
    *,
    steps: int = 10,
    source: int = TOM,
    target: int = CAT,
    seed: int = 0,
    guidance_scale: float = 1.0,
    expert: Any = None,
    **knobs: float,
) -> Tensor:
    chosen = editing.Knobs(**knobs)
    levels = editing.ladder(model.scheduler, steps, chosen.strength)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(latents), editing.noises(levels), *SHAPE, generator=generator)
    ones = torch.ones(len(latents), dtype=torch.long)
    return editing.edit(
        method, model, latents, source * ones, target * ones,
        levels=levels, noise=noise, guidance_scale=guidance_scale, knobs=chosen, expert=expert,
    )  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


# ---- the ladder --------------------------------------------------------------------------------


def test_the_ladder_spreads_its_steps_below_the_strength() -> None:
    scheduler = make_scheduler("sample")
    levels = editing.ladder(scheduler, 5, 1.0)
    assert levels[0] == editing.CLEAN
    assert [level.timestep for level in levels[1:]] == [199, 399, 599, 799, 999]
    assert levels[-1].alpha == 0 and levels[-1].sigma == 1
    assert [x.timestep for x in editing.ladder(scheduler, 4, 0.5)[1:]] == [124, 249, 374, 499]
    # Fewer timesteps than steps: each once; and no noise at all.
    assert [x.timestep for x in editing.ladder(scheduler, 9, 0.0025)] == [-1, 0, 2]
    assert editing.ladder(scheduler, 9, 0.0) == [editing.CLEAN]
    for steps in (7, 33, 1000):
        found = [x.timestep for x in editing.ladder(scheduler, steps, 1.0)[1:]]
        assert len(set(found)) == steps and found == sorted(found) and found[-1] == 999


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_the_ladder_refuses_a_strength_that_is_no_share(strength: float) -> None:
    with pytest.raises(UserError, match=str(strength)):
        editing.ladder(make_scheduler("sample"), 5, strength)


# ---- DDIB --------------------------------------------------------------------------------------


def bridge(latents: Tensor, top: editing.Level) -> Tensor:
    """Where the probability flow carries a source: up Tom's Gaussian to `top`, down the cat's."""
    up, down = (
        (top.alpha**2 * DEVIATIONS[c] ** 2 + top.sigma**2).sqrt() / DEVIATIONS[c]
        for c in (TOM, CAT)
    )
    noisy = top.alpha * MEANS[TOM] + up * (latents - MEANS[TOM])
    return MEANS[CAT] + (noisy - top.alpha * MEANS[CAT]) / down


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_ddib_is_the_bridge_between_two_gaussians(kind: str, strength: float) -> None:
    model, latents = gaussians(kind), drawn(3)
    true = bridge(latents, editing.ladder(model.scheduler, 10, strength)[-1])
    gaps = [
        distance(run("ddib", latents, model, steps=n, strength=strength), true)
        for n in (20, 80, 320)
    ]
    assert gaps[1] < 0.6 * gaps[0] and gaps[2] < 0.6 * gaps[1]
    assert gaps[2] < 0.02
    assert distance(latents, true) > 0.3  # the control: the bridge leads somewhere


@pytest.mark.parametrize("kind", KINDS)
def test_ddib_under_one_label_gives_back_the_source(kind: str) -> None:
    model, latents = gaussians(kind), drawn(3)
    gaps = [
        distance(run("ddib", latents, model, steps=n, target=TOM), latents) for n in (5, 10, 20, 40)
    ]
    # Second order: half the step, about a quarter of the gap.
    for before, after in pairwise(gaps):
        assert after < 0.4 * before
    assert gaps[-1] < 0.01


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_inversion_reaches_pure_noise(kind: str) -> None:
    """At zero terminal SNR the source must come out as the noise that stands for it."""
    model, latents = gaussians(kind), drawn(3)
    true = (latents - MEANS[TOM]) / DEVIATIONS[TOM]
    gaps = {}
    for steps in (20, 200):
        levels = editing.ladder(model.scheduler, steps, 1.0)
        assert levels[-1].alpha == 0
        found = editing.invert(model, latents, torch.full((3,), TOM), levels=levels)
        gaps[steps] = distance(found, true)
    assert gaps[200] < 0.3 * gaps[20] and gaps[200] < 0.03
    # Under another label it is another noise.
    other = editing.invert(model, latents, torch.full((3,), CAT), levels=levels)
    assert distance(found, other) > 0.3


def test_inversion_takes_two_steps_at_least() -> None:
    model, latents = gaussians(), drawn(2)
    with pytest.raises(UserError, match="2 steps"):
        run("ddib", latents, model, steps=1)
    assert run("ddib", latents, model, steps=2).isfinite().all()
    assert run("ddib", latents, model, steps=1, strength=0.5).isfinite().all()


# ---- CycleDiffusion ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_cycle_diffusion_under_one_label_is_exact(kind: str, eta: float) -> None:
    model, latents = gaussians(kind), drawn(3)
    made = run("cyclediffusion", latents, model, steps=3, target=TOM, eta=eta)
    assert torch.allclose(made, latents, atol=1e-4)
    assert distance(run("cyclediffusion", latents, model, steps=3, eta=eta), latents) > 0.3


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cycle_diffusion_shifts_by_the_difference_of_the_means(kind: str, eta: float) -> None:
    """Two Gaussians of one deviation and a path from pure noise: exact at any number of steps."""
    same = torch.full_like(DEVIATIONS, 0.8)
    latents = drawn(3, deviations=same)
    made = run("cyclediffusion", latents, gaussians(kind, same), steps=4, eta=eta)
    assert torch.allclose(made, latents + MEANS[CAT] - MEANS[TOM], atol=1e-4)
    # A path from less noise keeps more of the source's own mean.
    less = run("cyclediffusion", latents, gaussians(kind, same), steps=4, eta=eta, strength=0.4)
    assert 0.1 < distance(less, latents) / distance(made, latents) < 0.9


# ---- ILVR --------------------------------------------------------------------------------------


def test_low_pass_is_a_projection() -> None:
    x = drawn(2)
    low = editing.low_pass(x, 2)
    assert torch.allclose(editing.low_pass(low, 2), low, atol=1e-5)
    assert torch.allclose((low * (x - low)).sum(), torch.zeros(()), atol=1e-3)  # orthogonal
    assert 0.15 < distance(low, low.mean()) ** 2 / distance(x, x.mean()) ** 2 < 0.4
    assert torch.allclose(editing.low_pass(x, 1), x, atol=1e-5)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    assert torch.allclose(editing.low_pass(x, 100), mean, atol=1e-5)
    assert torch.allclose(editing.low_pass(mean, 4), mean, atol=1e-5)
    # The largest scales are those that are kept, on sides of two lengths and odd ones too.
    ramp = torch.linspace(-1, 1, 9)[:, None].expand(1, 1, 9, 6)
    flicker = ramp.sign() * (-1) ** torch.arange(9)[:, None]
    kept = [editing.low_pass(v, 3).norm() / v.norm() for v in (ramp, flicker)]
    assert kept[0] > 0.95 and kept[1] < 0.3
    with pytest.raises(UserError, match=r"0\.5"):
        editing.low_pass(x, 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_ilvr_keeps_the_sources_low_pass_and_sdedit_does_not(kind: str, strength: float) -> None:
    model, latents = gaussians(kind), drawn(3)
    made = run("ilvr", latents, model, strength=strength, factor=4)
    low, own = editing.low_pass(made, 4), editing.low_pass(latents, 4)
    assert torch.allclose(low, own, atol=1e-4)
    assert distance(made - low, latents - own) > 0.3
    labels = torch.full((3,), CAT)
    sdedit = sample(
        model.unet, model.conditioner,
        editing.class_conditions(model.unet, model.conditioner, latents, labels),
        model.scheduler, steps=20, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
        start=latents, strength=strength,
    )  # fmt: skip
    assert distance(editing.low_pass(sdedit, 4), own) > 0.2


def test_ilvr_leaves_less_of_the_source_the_larger_its_factor() -> None:
    model, latents = gaussians(), drawn(8)
    made = [run("ilvr", latents, model, factor=f) for f in (1, 1.6, 2.5, 4, 8)]
    away = [distance(m, latents) for m in made]
    assert away[0] < 1e-4
    assert away == sorted(away) and away[-1] > 1.2 * away[1]


# ---- EGSDE -------------------------------------------------------------------------------------


def test_egsde_without_energy_samples_the_target() -> None:
    made = run("egsde", drawn(400), gaussians(), steps=200, faithful=0.0)
    assert distance(made.mean(0), MEANS[CAT]) < 1.5 * DEVIATIONS[CAT] / 20
    assert made.std(0).mean().item() == pytest.approx(DEVIATIONS[CAT].item(), rel=0.05)


def test_egsde_nears_the_sources_low_pass_with_its_weight() -> None:
    model, latents = gaussians(), drawn(8)
    weights = (0.0, 0.1, 0.5, 2.0, 10.0, 1000.0)
    made = [run("egsde", latents, model, strength=0.6, faithful=w) for w in weights]
    own = editing.low_pass(latents, 4)
    gaps = [distance(editing.low_pass(m, 4), own) for m in made]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3 < 0.2 < gaps[0]
    # The energy is of the low frequencies alone; without its weight it is not there.
    high = [distance(m - editing.low_pass(m, 4), latents - own) for m in made]
    assert high[-1] == pytest.approx(high[0], rel=1e-3)
    free = [run("egsde", latents, model, strength=0.6, faithful=0.0, factor=f) for f in (1, 8)]
    assert torch.equal(*free)


@pytest.mark.parametrize("kind", KINDS)
def test_egsde_is_stable_from_pure_noise(kind: str) -> None:
    made = run("egsde", drawn(4), gaussians(kind), steps=3, faithful=5.0)
    assert made.isfinite().all() and made.abs().max() < 10


class Towards(nn.Module):
    """An expert that knows the domains by one direction: log-odds β·(z · direction)."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.direction = direction / direction.norm()

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        assert (timesteps < 999).all(), "pure noise has no domain to ask for"
        return latents.flatten(1) @ self.direction.flatten()


def test_egsdes_expert_moves_its_samples_by_its_weight() -> None:
    model, latents = gaussians(), drawn(8)
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    expert = Towards(direction)
    without = run("egsde", latents, model)
    made = [run("egsde", latents, model, expert=expert, realism=w) for w in (0.0, 1.0, 4.0)]
    assert torch.equal(made[0], without)
    along = [expert(m, torch.zeros(1)).mean() for m in made]
    assert along[0] < along[1] < along[2]


# ---- what all have in common -------------------------------------------------------------------


@pytest.mark.parametrize("method", editing.KNOBS)
def test_more_strength_leaves_less_of_the_source(method: str) -> None:
    # ILVR and EGSDE with what holds them to the source all but let go.
    loose = {"factor": 8.0, "faithful": 0.0}
    model, latents = gaussians(), drawn(8)
    away = [
        distance(run(method, latents, model, strength=s, **loose), latents)
        for s in (0.0, 0.02, 0.3, 0.6, 0.9)
    ]
    assert away[0] == 0
    assert away == sorted(away) and away[-1] > 3 * away[1]


@pytest.mark.parametrize("method", editing.KNOBS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_evaluations_and_guidance_are_as_told(method: str, strength: float) -> None:
    """`steps` evaluations under each label that is used; only the target's are guided."""
    model = gaussians()
    run(method, drawn(2), model, steps=6, strength=strength, guidance_scale=2.0)
    labels = [label for label, _ in model.unet.seen]
    both = method in ("ddib", "cyclediffusion")
    assert labels.count(CAT) == labels.count(NO_CLASS) == 6
    assert labels.count(TOM) == (6 if both else 0)
    assert len(labels) == (18 if both else 12)
    assert max(timestep for _, timestep in model.unet.seen) == round(1000 * strength) - 1


@pytest.mark.parametrize("method", editing.KNOBS)
def test_guidance_pushes_away_from_no_class(method: str) -> None:
    # Equal deviations: the classes differ by their means alone.
    same = torch.full_like(DEVIATIONS, 0.8)
    latents = drawn(8, deviations=same)
    towards = (MEANS[CAT] - MEANS[NO_CLASS]).flatten()
    along = [
        (run(method, latents, gaussians("sample", same), guidance_scale=w, factor=8.0)
         .flatten(1) @ towards).mean().item()
        for w in (1.0, 1.5, 2.0)
    ]  # fmt: skip
    assert along[0] < along[1] < along[2]


@pytest.mark.parametrize("method", editing.KNOBS)
def test_the_three_parametrisations_agree(method: str) -> None:
    """One predictor written in three ways, on the schedule that all three can use."""
    made = []
    for kind in KINDS:
        model = gaussians("epsilon")
        model.scheduler.register_to_config(prediction_type=kind)
        made.append(run(method, drawn(3), model, steps=8))
    assert torch.allclose(made[0], made[1], atol=2e-3)
    assert torch.allclose(made[0], made[2], atol=2e-3)


@pytest.mark.parametrize("method", ["cyclediffusion", "ilvr"])
def test_eta_is_a_share(method: str) -> None:
    with pytest.raises(UserError, match="eta 2"):
        run(method, drawn(1), gaussians(), eta=2.0)


def test_egsdes_weights_are_not_negative() -> None:
    for knobs in ({"faithful": -1.0}, {"realism": -1.0}):
        with pytest.raises(UserError, match="-1"):
            run("egsde", drawn(1), gaussians(), **knobs)


def test_a_sampler_of_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        run("magic", drawn(1), gaussians())
