"""Samplers that edit a source with a class-conditional diffusion model: the diffusion rivals.

- :func:`ddib`: the source inverted under its own label, drawn again under the target's;
- :func:`cycle_diffusion`: the noises of a random path to the source, replayed under the target's;
- :func:`ilvr`: a sample of the target whose low frequencies are the source's at every level;
- :func:`egsde`: a sample of the target pulled towards the source's low frequencies and, with a
  :class:`realism.DomainExpert`, away from the cartoons.

All walk a :func:`ladder` of noise levels. One rung up or down costs one evaluation of the denoiser
(two passes of its network under guidance): with `steps` rungs, :func:`ddib` and
:func:`cycle_diffusion` take `steps` of them under each label, the others `steps` in all.
Conditions are classes and nothing else. The last rung of a schedule with zero terminal SNR has
α = 0; no formula here divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tomjerry_utils import UserError
from tomjerry_utils.denoiser import NO_CLASS, Batch, Conditioner, predict, to_x0
from tomjerry_utils.realism import DomainExpert, energy_gradient

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class Knobs:
    """What the samplers can be tuned by; each reads those that it has.

    Attributes:
        strength: share of the noise up to which the source is taken, 0 … 1.
        factor: of :func:`low_pass` on the latents (ILVR, EGSDE).
        eta: share of DDPM's noise in each step, 0 … 1 (CycleDiffusion, ILVR).
        faithful: weight λ of the faithful energy (EGSDE).
        realism: weight of the realism energy, where an expert is given (EGSDE).
    """

    strength: float = 1.0
    factor: float = 4.0
    eta: float = 1.0
    faithful: float = 0.5
    realism: float = 1.0


# Starting points, to be tuned: DDIB and ILVR go up to pure noise, EGSDE half-way as in its paper.
KNOBS = {
    "ddib": Knobs(strength=1.0),
    "cyclediffusion": Knobs(strength=0.8, eta=0.1),
    "ilvr": Knobs(strength=1.0, factor=4.0, eta=1.0),
    "egsde": Knobs(strength=0.5, factor=4.0, faithful=0.5, realism=1.0),
}


@dataclass(frozen=True)
class Level:
    """A rung of the ladder: z = α·z₀ + σ·η; the clean one has no timestep (−1)."""

    timestep: int
    alpha: float
    sigma: float


CLEAN = Level(-1, 1.0, 0.0)


def ladder(scheduler: DDIMScheduler, steps: int, strength: float) -> list[Level]:
    """The clean level and `steps` noise levels above it, evenly spaced, the last at `strength`.

    diffusers' schedulers space their steps over the whole schedule only; here all `steps` of them
    lie below the strength, so that a rival's budget does not depend on it.

    Args:
        strength: share of the schedule, 0 … 1; 0 leaves the clean level alone. Where it holds
            fewer timesteps than `steps`, each is taken once.

    Raises:
        UserError: a strength outside 0 … 1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the strength {strength} is not a share of the noise: 0 to 1")
    levels = [CLEAN]
    if strength == 0:
        return levels
    held = max(1.0, strength * scheduler.config.num_train_timesteps)
    count = min(steps, int(held))
    for rung in range(1, count + 1):
        timestep = int(held * rung / count + 0.5) - 1
        total = float(scheduler.alphas_cumprod[timestep])
        levels.append(Level(timestep, math.sqrt(total), math.sqrt(1 - total)))
    return levels


@dataclass(frozen=True, eq=False)
class ClassDenoiser:
    """ẑ_θ(z_t, t, class) of a latent diffusion model, whatever its network predicts."""

    unet: UNet2DConditionModel
    conditioner: Conditioner
    scheduler: DDIMScheduler

    def x0(
        self, latents: Tensor, level: Level, labels: Tensor, guidance_scale: float = 1.0
    ) -> Tensor:
        """The clean latents (B, C, h, w) that the model sees in noisy ones, given labels (B,)."""
        batch = class_conditions(self.unet, self.conditioner, latents, labels)
        now = torch.full_like(labels, level.timestep)
        output = predict(self.unet, self.conditioner, latents, now, batch)
        if guidance_scale != 1.0:
            free = replace(batch, labels=torch.full_like(labels, NO_CLASS))
            base = predict(self.unet, self.conditioner, latents, now, free)
            output = base + guidance_scale * (output - base)
        alpha, sigma = latents.new_tensor(level.alpha), latents.new_tensor(level.sigma)
        kind = self.scheduler.config.prediction_type
        return to_x0(output.to(latents.dtype), latents, alpha, sigma, kind)


def class_conditions(
    unet: UNet2DConditionModel, conditioner: Conditioner, latents: Tensor, labels: Tensor
) -> Batch:
    """Conditions that hold a label (B,) and nothing else, as they are dropped in training."""
    count, channels, *grid = latents.shape
    here = latents.device
    return Batch(
        latents=latents,
        labels=labels,
        text=torch.zeros(count, 1, conditioner.config.text_dim, device=here),
        mask=torch.zeros(count, 1, dtype=torch.long, device=here),
        view=torch.zeros(count, unet.config.in_channels - channels, *grid, device=here),
    )


def edit(
    method: str,
    model: ClassDenoiser,
    latents: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    levels: Sequence[Level],
    noise: Tensor,
    guidance_scale: float,
    knobs: Knobs,
    expert: DomainExpert | None = None,
) -> Tensor:
    """Latents by the sampler of a name in :data:`KNOBS`, all of one signature.

    Args:
        latents: the source's, (B, C, h, w) normalised; the result has that shape.
        source, target: (B,) labels, indices into `scenes.LABELS`.
        levels: of :func:`ladder`.
        noise: (B, at least :func:`noises`, C, h, w) standard normal.
        guidance_scale: of the target's predictions; the source's are never guided.
        expert: EGSDE's, from :func:`realism.train_expert`.

    Raises:
        UserError: a knob outside its range, or an inversion in one step.
    """
    common: dict[str, Any] = {"levels": levels, "guidance_scale": guidance_scale}
    match method:
        case "ddib":
            return ddib(model, latents, source, target, **common)
        case "cyclediffusion":
            return cycle_diffusion(
                model, latents, source, target, noise=noise, eta=knobs.eta, **common
            )
        case "ilvr":
            return ilvr(
                model, latents, target, noise=noise, factor=knobs.factor, eta=knobs.eta, **common
            )
        case "egsde":
            return egsde(
                model,
                latents,
                target,
                noise=noise,
                factor=knobs.factor,
                faithful=knobs.faithful,
                expert=expert,
                realism=knobs.realism,
                **common,
            )
    raise ValueError(f"no sampler {method!r}: {', '.join(KNOBS)}")


# ---- the samplers ------------------------------------------------------------------------------
# Arguments that are not explained are those of `edit`.


def noises(levels: Sequence[Level]) -> int:
    """How many noises a picture needs, at most: a start, and two for each rung (ILVR)."""
    return 2 * len(levels) - 1


@torch.no_grad()
def ddib(
    model: ClassDenoiser,
    latents: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    levels: Sequence[Level],
    guidance_scale: float,
) -> Tensor:
    """Dual diffusion implicit bridges (Su et al. 2022, arXiv 2203.08382): no noise is drawn.

    Up the probability flow under the source's labels without guidance, down under the target's
    with it: two evaluations a rung.

    Raises:
        UserError: one rung from clean to (nearly) pure noise, which keeps nothing of the source.
    """
    made = invert(model, latents, source, levels=levels)
    for upper, lower in _downwards(levels):
        x0 = model.x0(made, upper, target, guidance_scale)
        made = _onward(x0, made, upper, lower, 0.0)
    return made


@torch.no_grad()
def invert(
    model: ClassDenoiser, latents: Tensor, labels: Tensor, *, levels: Sequence[Level]
) -> Tensor:
    """The latents at the last level from which DDIM under these labels draws the given ones.

    With v = α·ε − σ·x₀ a DDIM step is a turn by the angle φ = atan(σ/α), z' = cos Δφ·z − sin Δφ·v
    (Salimans & Ho 2022, arXiv 2202.00512), finite at both ends of the schedule. Its
    inverse needs v at the rung it goes to: there the last v carries the latents for a first guess,
    the model reads v off the guess, and the step is taken anew. One evaluation a rung, and the
    round trip's error falls with the square of the steps. (diffusers' inverse scheduler reads v
    off the latents of the rung below, first order, and has no step that starts clean for a model
    that predicts z₀.)

    Raises:
        UserError: one rung from clean to (nearly) pure noise.
    """
    v = torch.zeros_like(latents)
    for lower, upper in pairwise(levels):
        turn = math.atan2(upper.sigma, upper.alpha) - math.atan2(lower.sigma, lower.alpha)
        if math.cos(turn) < 0.1:
            raise UserError(
                "DDIM inversion cannot go from a picture to noise in one step: "
                "give 2 steps or more, or less strength"
            )
        guess = math.cos(turn) * latents + math.sin(turn) * v
        v = (upper.alpha * guess - model.x0(guess, upper, labels)) / upper.sigma
        latents = (latents + math.sin(turn) * v) / math.cos(turn)
    return latents


@torch.no_grad()
def cycle_diffusion(
    model: ClassDenoiser,
    latents: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    levels: Sequence[Level],
    noise: Tensor,
    eta: float,
    guidance_scale: float,
) -> Tensor:
    """CycleDiffusion (Wu & De la Torre 2022, arXiv 2210.05559).

    A path from noise to the source is drawn from q(z_{t−1} | z_t, z₀). Each of its steps departs
    from the mean that the model under the source's label expects by σ_t times a noise; the same
    departures are added to the model's means under the target's label. The last rung has σ = 0,
    and its departure, what the model cannot say of the source, is carried over all the same:
    equal labels give back the source. Two evaluations a rung.

    Args:
        eta: share of DDPM's noise in each step, 0 … 1.
    """
    top = levels[-1]
    path = made = top.alpha * latents + top.sigma * noise[:, 0]
    for i, (upper, lower) in enumerate(_downwards(levels), 1):
        deviation = _deviation(upper, lower, eta)
        onward = _onward(latents, path, upper, lower, deviation) + deviation * noise[:, i]
        expected = _onward(model.x0(path, upper, source), path, upper, lower, deviation)
        x0 = model.x0(made, upper, target, guidance_scale)
        made = _onward(x0, made, upper, lower, deviation) + (onward - expected)
        path = onward
    return made


@torch.no_grad()
def ilvr(
    model: ClassDenoiser,
    latents: Tensor,
    target: Tensor,
    *,
    levels: Sequence[Level],
    noise: Tensor,
    factor: float,
    eta: float,
    guidance_scale: float,
) -> Tensor:
    """Iterative latent variable refinement (Choi et al. 2021, arXiv 2108.02938).

    After each step the low frequencies of the sample are replaced by those of the source, noised
    to that level: those of the result are the source's own. One evaluation a rung.

    Args:
        factor: of :func:`low_pass`: 1 gives back the source, more leaves more to the model.
        eta: share of DDPM's noise in each step, 0 … 1.
    """
    top = levels[-1]
    made = top.alpha * latents + top.sigma * noise[:, 0]
    for i, (upper, lower) in enumerate(_downwards(levels), 1):
        deviation = _deviation(upper, lower, eta)
        x0 = model.x0(made, upper, target, guidance_scale)
        made = _onward(x0, made, upper, lower, deviation) + deviation * noise[:, 2 * i - 1]
        near = lower.alpha * latents + lower.sigma * noise[:, 2 * i]
        made = made + low_pass(near - made, factor)
    return made


@torch.no_grad()
def egsde(
    model: ClassDenoiser,
    latents: Tensor,
    target: Tensor,
    *,
    levels: Sequence[Level],
    noise: Tensor,
    factor: float,
    faithful: float,
    guidance_scale: float,
    expert: DomainExpert | None = None,
    realism: float = 1.0,
) -> Tensor:
    """Energy-guided SDE (Zhao et al. 2022, arXiv 2207.06635), begun from the noised source.

    The reverse SDE's score is lessened by the gradient of two energies. The faithful one is
    λ·E‖φ(z_t) − φ(x_t)‖² over the noised source x_t, with φ the :func:`low_pass`; its gradient
    2λ·φ(z_t − α_t x₀) is known in closed form, and so is the flow along it over a rung, which
    shrinks the gap's low frequencies by (ᾱ_t/ᾱ_s)^2λ: stable at the few steps where the paper's
    Euler step of 2λβ_t is not. The realism energy is −log p(natural | z_t, t) by a domain
    classifier, in place of the paper's cosine of such a classifier's features with the source's.
    Without an expert it is left out, and this is a soft ILVR. One evaluation a rung.

    Args:
        faithful: λ of the faithful energy; 0 leaves SDEdit with DDPM's noise.
        realism: weight of the realism energy, where there is an expert.
    """
    if faithful < 0 or realism < 0:
        raise UserError(f"EGSDE's weights are {faithful} and {realism}: give 0 or more")
    top = levels[-1]
    made = top.alpha * latents + top.sigma * noise[:, 0]
    for i, (upper, lower) in enumerate(_downwards(levels), 1):
        deviation = _deviation(upper, lower, 1.0)
        x0 = model.x0(made, upper, target, guidance_scale)
        step = _onward(x0, made, upper, lower, deviation) + deviation * noise[:, i]
        # Pure noise says nothing of its domain.
        if expert is not None and realism and upper.alpha > 0:
            span = 2 * math.log(lower.alpha / upper.alpha)  # ∫β dt over the rung
            step = step - realism * span * energy_gradient(expert, made, upper.timestep)
        kept = (upper.alpha / lower.alpha) ** (4 * faithful)
        made = step + (1 - kept) * low_pass(lower.alpha * latents - step, factor)
    return made


def low_pass(latents: Tensor, factor: float) -> Tensor:
    """The lowest 1/factor of the frequencies of each side, (…, h, w), at least the mean.

    A projection on the first cosines (DCT-II): low_pass(low_pass(x)) = low_pass(x) exactly, which
    blurring is not, and opposite edges do not mix as under a Fourier transform.
    """
    height, width = latents.shape[-2:]
    rows, columns = _first_cosines(height, factor), _first_cosines(width, factor)
    return rows.to(latents) @ latents @ columns.to(latents)


def _first_cosines(size: int, factor: float) -> Tensor:
    """The projection (size, size) on the first size/factor cosines."""
    if factor < 1:
        raise UserError(f"the low-pass factor {factor} is below 1, which keeps all frequencies")
    kept = torch.arange(max(1, round(size / factor)), dtype=torch.float64)
    places = torch.arange(size, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / size * kept[:, None] * places)
    waves = waves / waves.norm(dim=1, keepdim=True)
    return waves.T @ waves


def _downwards(levels: Sequence[Level]) -> Iterator[tuple[Level, Level]]:
    return pairwise(reversed(levels))


def _deviation(upper: Level, lower: Level, eta: float) -> float:
    """Of the noise that a step adds (Song et al. 2021, arXiv 2010.02502, equation 16)."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is not a share of DDPM's noise: 0 to 1")
    share = 1 - (upper.alpha / lower.alpha) ** 2
    return eta * lower.sigma / upper.sigma * math.sqrt(share)


def _onward(x0: Tensor, latents: Tensor, upper: Level, lower: Level, deviation: float) -> Tensor:
    """Mean of the next latents given the clean ones: q(z_s | z_t, x₀) of DDIM (equation 7)."""
    noise = (latents - upper.alpha * x0) / upper.sigma
    return lower.alpha * x0 + math.sqrt(max(lower.sigma**2 - deviation**2, 0.0)) * noise
