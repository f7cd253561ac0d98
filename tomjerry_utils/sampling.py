"""From noise to latents: one loop for every sampler, in one part or in several.

A timetable says which scheduler takes which step. Usually one takes them all; a denoiser whose last
steps were finished for a certain number of them (:mod:`finishing`) takes those as they were, and
more or fewer before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tomjerry_utils.denoiser import Batch, Conditioner, drop, from_x0, predict, to_x0

LAST_STEPS = 2  # that finishing tunes: what comes before decides on shapes

Timetable = Sequence[tuple[Any, Tensor]]  # (scheduler, timestep) of each step, in order


def timetable(scheduler: Any, steps: int, *, finished: int | None = None) -> Timetable:
    """The steps of a drawing.

    Args:
        scheduler: of diffusers; not changed.
        finished: how many steps a finished denoiser was finished for. Its drawings end with the
            last :data:`LAST_STEPS` of those, since each of them adds its share of texture: taken
            more finely they would add it again and again. The steps before are taken so finely
            that there are about `steps` in all. None where there is no such ending.
    """
    if finished is None or finished <= LAST_STEPS:
        return _regular(scheduler, steps)
    whole = _regular(scheduler, finished)
    ending = Fraction(LAST_STEPS, finished)  # of the schedule
    # Regular schedules of a multiple of this many steps have a step where the ending begins.
    unit = ending.denominator
    parts = max(1, round((steps - LAST_STEPS) / (unit * (1 - ending))))
    before = _regular(scheduler, unit * parts)
    return [*before[: int(len(before) * (1 - ending))], *whole[-LAST_STEPS:]]


def _regular(scheduler: Any, steps: int) -> Timetable:
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    return [(scheduler, t) for t in scheduler.timesteps]


def sample(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    batch: Batch,
    scheduler: Any,
    *,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    start: Tensor | None = None,
    strength: float = 1.0,
    guide: Any = None,
    noise: Tensor | None = None,
    finished: int | None = None,
) -> Tensor:
    """Draw latents under a batch's conditions with DDIM (or any diffusers scheduler).

    Args:
        batch: conditions; its latents only give the shape.
        steps, finished: see :func:`timetable`.
        guidance_scale, guide: see :func:`denoise`.
        noise: the starting noise; drawn from the generator where None.
        start, strength: begin from these latents, noised by a share of the schedule (SDEdit).

    Returns:
        (B, C, h, w) normalised latents.
    """
    table = timetable(scheduler, steps, finished=finished)
    if noise is None:
        noise = torch.randn(batch.latents.shape, generator=generator)
    latents = noise.to(batch.latents)
    if start is not None:
        # By time, not by number: a finished drawing's steps are not all as long.
        level = strength * scheduler.config.num_train_timesteps - 1
        first = min(range(len(table)), key=lambda i: abs(int(table[i][1]) - level))
        table = table[first:]
        noiser, t = table[0]
        latents = noiser.add_noise(start, latents, t.reshape(1).repeat(len(start)))
    with torch.no_grad():
        return denoise(
            unet,
            conditioner,
            batch,
            latents,
            table,
            guidance_scale=guidance_scale,
            generator=generator,
            guide=guide,
        )


def denoise(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    batch: Batch,
    latents: Tensor,
    steps: Timetable,
    *,
    guidance_scale: float,
    generator: torch.Generator | None = None,
    guide: Any = None,
) -> Tensor:
    """Take noisy latents (B, C, h, w) through some steps of a timetable.

    Args:
        guidance_scale: w of ẑ_∅ + w (ẑ_c − ẑ_∅), where ẑ_∅ has neither class nor caption but
            keeps the view; 1 runs the conditional model alone.
        generator: of samplers that draw noise at each step, such as DDPM.
        guide: (ẑ, share of the steps done) → ẑ, applied to each prediction: BLIP guidance.
    """
    if guidance_scale != 1.0:
        unused = torch.Generator()
        free = drop(batch, labels=1.1, captions=1.1, view=0.0, generator=unused)
    for i, (scheduler, t) in enumerate(steps):
        now = t.expand(len(latents)).to(latents.device)
        output = predict(unet, conditioner, latents, now, batch)
        if guidance_scale != 1.0:
            base = predict(unet, conditioner, latents, now, free)
            output = base + guidance_scale * (output - base)
        if guide is not None:
            total = scheduler.alphas_cumprod[int(t)].to(latents)
            alpha, sigma = total.sqrt(), (1 - total).sqrt()
            kind = scheduler.config.prediction_type
            x0 = guide(to_x0(output, latents, alpha, sigma, kind), i / len(steps))
            output = from_x0(x0, latents, alpha, sigma, kind)
        # Samplers that draw noise at each step must draw it from our generator.
        draws = "generator" in inspect.signature(scheduler.step).parameters
        seeded = {"generator": generator} if draws else {}
        latents = scheduler.step(output, t, latents, **seeded).prev_sample
    return latents
