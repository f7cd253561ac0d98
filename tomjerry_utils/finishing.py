"""Finishing: a denoiser's last steps and its decoder learn to make photographs.

A denoiser that minimises E‖ẑ − z‖² hedges: what it cannot know it leaves out, and a decoder that
has only ever seen encoded photographs shows that as smooth fur and a faint grid. So after the
training of stage 04, and again after that of stage 05, the model draws natural training pictures
from their own views, and the last steps of that drawing are tuned together with the decoder. A
drawing shows the same animal in the same place, but other hairs: it is asked for as much texture as
the photograph has in each patch (:func:`perceptual.texture_gap`), for the colours it had, and the
decoder still for the photograph itself where the latent is the photograph's own. The encoder and
the latents stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils import adapters, perceptual
from tomjerry_utils.autoencoder import decode, decoder_alone, encode_all
from tomjerry_utils.denoiser import Batch, Conditioner
from tomjerry_utils.images import measure_grain, to_uint8
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import atomic_path
from tomjerry_utils.sampling import LAST_STEPS, Timetable, denoise, timetable
from tomjerry_utils.training import apply_ema, pick_device, train

# Weights of the terms, tuned on KID of 150 validation scenes (EfficientNet, not VGG).
COLOUR, SAME, PERCEPTUAL, TEXTURE = 2.0, 0.5, 0.3, 0.6
CELL = 4  # px over which colours must stay
DRAWN_AT_ONCE = 50

Conditions = Callable[[Tensor, Tensor], Batch]


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    vae: AutoencoderKL,
    scheduler: Any,
    conditions: Conditions,
    profile: Profile,
    *,
    steps: int,
    guidance_scale: float,
    among: int,
    path: Path,
    describe: str,
) -> dict[str, Tensor]:
    """What the denoiser draws for some natural training pictures, made once and kept.

    Args:
        conditions: (indices (B,), posed (B,) bool) → what the denoiser is told of those pictures,
            where posed with the posture nets' body in the view; its latents are their own.
        steps, guidance_scale: of the drawing, see :func:`sampling.denoise`.
        among: how many pictures there are to draw from.
        path: a safetensors file, read where it is there.

    Returns:
        index (N,) of the pictures and posed (N,), both drawn at random; state (N, C, h, w), the
        noisy latents before the last steps; own (N, C, h, w), the pictures' latents; and colours
        (N, 3, H/CELL, W/CELL) of the drawing as it was, in [−1, 1].
    """
    if path.is_file():
        return load_file(path)
    device = unet.device
    generator = torch.Generator().manual_seed(profile.seed)
    index = torch.randperm(among, generator=generator)[: profile.finishing.pictures]
    posed = torch.rand(len(index), generator=generator) < 0.5
    table = timetable(scheduler, steps)
    found: dict[str, list[Tensor]] = {"state": [], "own": [], "colours": []}
    parts = torch.arange(len(index)).split(DRAWN_AT_ONCE)
    for part in progress(parts, describe, unit=f"x{DRAWN_AT_ONCE}"):
        batch = conditions(index[part], posed[part]).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        walk: dict[str, Any] = {"guidance_scale": guidance_scale, "generator": generator}
        state = denoise(unet, conditioner, batch, noise, table[:-LAST_STEPS], **walk)
        drawn = denoise(unet, conditioner, batch, state, table[-LAST_STEPS:], **walk)
        found["state"].append(state.float().cpu())
        found["own"].append(batch.latents.float().cpu())
        found["colours"].append(F.avg_pool2d(decode(vae, drawn).float(), CELL).cpu())
    out = {"index": index, "posed": posed, **{name: torch.cat(v) for name, v in found.items()}}
    out = {name: value.contiguous() for name, value in out.items()}
    with atomic_path(path) as temporary:
        save_file(out, temporary)
    return out


def own_in_batch(batch_size: int) -> int:
    """How many pictures of a batch are also decoded from their own latents."""
    return max(1, batch_size // 3)


def finishing_loss(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    vae: AutoencoderKL,
    net: perceptual.Trunk,
    told: Batch,
    before: dict[str, Tensor],
    real: Tensor,
    noise: Tensor,
    *,
    last: Timetable,
    guidance_scale: float,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Texture and colours of drawings, and the photograph itself from its own latents.

    Args:
        told: what the denoiser is told of B pictures; before: `state`, `own` and `colours` of
            them, see :func:`draw`.
        real: (B, 3, H, W) in [−1, 1], the photographs; noise: (B + S, 3, H, W), the camera's, where
            the first S are also decoded from their own latents.
        last: the steps that are taken.
    """
    size, same = len(real), len(noise) - len(real)
    latents = denoise(
        unet,
        conditioner,
        told,
        before["state"],
        last,
        guidance_scale=guidance_scale,
        generator=generator,
    )
    made = decode(vae, torch.cat([latents, before["own"][:same]])).float()
    with torch.no_grad():
        wanted = net(real)
    seen = net(made + noise)
    free = [layer[:size] for layer in seen]
    bound = [layer[size:] for layer in seen]
    colour = (F.avg_pool2d(made[:size], CELL) - before["colours"]).abs().mean()
    pixels = (made[size:] - real[:same]).abs().mean()
    unlike = perceptual.distance(bound, [layer[:same] for layer in wanted])
    texture = perceptual.texture_gap(free, wanted)
    numbers = {"colour": colour, "pixels": pixels, "perceptual": unlike, "texture": texture}
    total = COLOUR * colour + SAME * pixels + PERCEPTUAL * unlike + TEXTURE * texture
    return total, {name: value.detach() for name, value in numbers.items()}


def finish(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    vae: AutoencoderKL,
    scheduler: Any,
    conditions: Conditions,
    images: Tensor,
    drawn: dict[str, Tensor],
    profile: Profile,
    *,
    steps: int,
    guidance_scale: float,
    lora_rank: int,
    grain: float,
    folder: Path,
    describe: str,
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Tune copies of a denoiser and of an autoencoder's decoder on the last steps of drawings.

    Args:
        conditions, drawn: of :func:`draw`.
        images: (N, H, W, 3) uint8, the photographs, as `drawn` has them.
        steps, guidance_scale: of the drawings.
        lora_rank: of an adapter that is trained in place of the denoiser's weights; 0 for none.
        grain: deviation of the camera's noise that drawings get, as a share of the range.
        folder: of the training, see `training.train`.

    Returns:
        The copies, in evaluation mode.
    """
    options, device = profile.finishing, pick_device(profile.device)
    unet, vae = copy.deepcopy(unet).to(device), copy.deepcopy(vae).to(device)
    conditioner = conditioner.to(device).requires_grad_(False)
    adapters.prepare(
        unet,
        lora_rank=lora_rank,
        gradient_checkpointing=profile.ldm.gradient_checkpointing,
        seed=profile.seed,
    )
    decoder = decoder_alone(vae)
    net = perceptual.trunk().to(device)
    last = timetable(scheduler, steps)[-LAST_STEPS:]
    size = options.batch_size
    same = own_in_batch(size)

    def batches(step: int, generator: torch.Generator) -> tuple[Any, ...]:
        rows = torch.randint(len(images), (size,), generator=generator)
        real = images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = 2 * grain * torch.randn((size + same, *real.shape[1:]), generator=generator)
        told = conditions(drawn["index"][rows], drawn["posed"][rows])
        before = {name: drawn[name][rows] for name in ("state", "own", "colours")}
        return told, before, real, noise

    def loss(batch: tuple[Any, ...], step: int, generator: torch.Generator) -> Any:
        return finishing_loss(
            unet,
            conditioner,
            vae,
            net,
            *batch,
            last=last,
            guidance_scale=guidance_scale,
            generator=generator,
        )

    modules = {"unet": unet, "decoder": decoder}
    result = train(
        modules,
        loss,
        batches,
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=min(20, options.steps),
        accumulation=options.accumulation,
        folder=folder,
        seed=profile.seed,
        ema_decay=0.97,
        weight_decay=0.0,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        log_every=max(1, options.steps // 20),
        checkpoint_every_s=profile.checkpoint_every_s,
        describe=describe,
        keep_checkpoint=True,
    )
    apply_ema(modules, result)
    adapters.finish(unet)
    return unet.eval(), vae.eval()


def lost_grain(photographs: np.ndarray, vae: AutoencoderKL) -> float:
    """The grain of photographs (N, H, W, 3) uint8 that their latents do not hold, so that no
    denoiser can draw it: a deviation, as a share of the range. Measured on the first 200.
    """
    some = photographs[:200]
    with torch.no_grad():
        latents = encode_all(vae, torch.from_numpy(some)).split(8)
        back = np.concatenate([to_uint8(decode(vae, part.to(vae.device))) for part in latents])
    lost = measure_grain(some) ** 2 - measure_grain(back) ** 2
    return round(max(lost, 0.0) ** 0.5, 5)
