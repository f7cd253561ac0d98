"""The autoencoder E, D of the latent diffusion model, on top of diffusers' AutoencoderKL.

A small picture has no room for three halvings, so the tiny model sees it pixel-unshuffled: each
2×2 block of pixels becomes 12 channels. A model whose first convolution takes 3 channels (Stable
Diffusion's) sees the picture as it is; the number of input channels says which. Latents are
normalised per channel with statistics measured on the training pictures and kept in the config.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tomjerry_utils import UserError

TEXTURE_WEIGHT = 0.3  # of the texture term, where the decoder is trained alone


def tiny_autoencoder(
    latent_channels: int = 16, widths: tuple[int, int] = (32, 64)
) -> AutoencoderKL:
    """The tiny architecture of the `smoke` and `mini` profiles: f = 4, 0.7 M parameters."""
    vae = AutoencoderKL(
        in_channels=12,
        out_channels=12,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    # The posterior starts narrow. Started at deviation 1, half of the channels carry more noise
    # than picture, the KL term gives them up in the first steps and they never come back.
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.bias[latent_channels:] -= 6.0
    return vae


def decoder_alone(vae: AutoencoderKL) -> nn.ModuleDict:
    """The decoding half, ready to be trained; the encoding half is frozen and its latents stay."""
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    vae.requires_grad_(False)
    return decoder.requires_grad_(True)


def patch_of(vae: AutoencoderKL) -> int:
    """Edge of the pixel blocks that the first convolution takes as channels: 1 or 2."""
    return math.isqrt(vae.config.in_channels // 3)


def factor_of(vae: AutoencoderKL) -> int:
    """Pixels per latent, along an edge."""
    return patch_of(vae) * 2 ** (len(vae.config.block_out_channels) - 1)


def to_patches(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] as the model's input."""
    patch = patch_of(vae)
    return F.pixel_unshuffle(images, patch) if patch > 1 else images


def from_patches(vae: AutoencoderKL, output: Tensor) -> Tensor:
    """The model's output as images (B, 3, H, W)."""
    patch = patch_of(vae)
    return F.pixel_shuffle(output, patch) if patch > 1 else output


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C, 1, 1) of each channel; Stable Diffusion's one factor else."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        scale = 1.0 / vae.config.scaling_factor
        count = vae.config.latent_channels
        mean, std = [vae.config.shift_factor or 0.0] * count, [scale] * count
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return torch.tensor(mean, **options)[:, None, None], torch.tensor(std, **options)[:, None, None]


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """z = E(x): images (B, 3, H, W) in [−1, 1] → normalised latents (B, C, H/f, W/f)."""
    latents = vae.encode(to_patches(vae, images)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """D(z): normalised latents → images (B, 3, H, W), about [−1, 1]; differentiable."""
    mean, std = _statistics(vae, latents)
    return from_patches(vae, vae.decode(latents * std + mean).sample)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, batch_size: int = 64) -> Tensor:
    """Latents of many pictures, (N, C, h, w) float32 on the CPU; images uint8 (N, H, W, 3)."""
    device = next(vae.parameters()).device
    out = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size].to(device)
        out.append(encode(vae, chunk.permute(0, 3, 1, 2).float() / 127.5 - 1).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, images: Tensor, batch_size: int = 64) -> None:
    """Measure the latents' statistics on pictures and store them in the model's config.

    The deviation is that of latents *sampled* from their posterior, not of the posterior's mean: a
    channel that the model does not use has a mean near 0 and a deviation near 1, and divided by the
    former it would be blown up to noise that every denoiser after it has to learn.

    Args:
        images: (N, H, W, 3) uint8.
    """
    device = next(vae.parameters()).device
    means, variances = [], []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size].to(device)
        seen = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(to_patches(vae, seen.contiguous())).latent_dist
        means.append(posterior.mean.float().cpu())
        variances.append(posterior.var.float().mean((2, 3)).cpu())
    latents = torch.cat(means)
    std = (latents.var((0, 2, 3)) + torch.cat(variances).mean(0)).sqrt()
    vae.register_to_config(
        latents_mean=[round(float(v), 6) for v in latents.mean((0, 2, 3))],
        latents_std=[round(float(v), 6) for v in std],
    )


def autoencoder_loss(
    vae: AutoencoderKL,
    seen: Tensor,
    wanted: Tensor,
    generator: torch.Generator,
    *,
    edge_weight: float = 0.5,
    kl_weight: float = 2e-7,
    texture_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction (L1 on pixels and on their differences) plus a small KL term.

    Args:
        seen: (B, 3, H, W) in [−1, 1], what the encoder gets.
        wanted: the picture to come back, without the camera's noise where that is known.
        texture_weight: of a term that asks for as much fine detail, place by place, as there was.
            Which way a single hair lies cannot always be told from the latents, and L1 then
            prefers none to a wrong one.
    """
    posterior = vae.encode(to_patches(vae, seen)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    latents = posterior.mean + posterior.std * noise
    output = from_patches(vae, vae.decode(latents).sample).float()
    pixel = (output - wanted).abs().mean()
    edges = (output.diff(dim=2) - wanted.diff(dim=2)).abs().mean()
    edges = edges + (output.diff(dim=3) - wanted.diff(dim=3)).abs().mean()
    kl = posterior.kl().float().mean()
    mse = (output.detach().clamp(-1, 1) - wanted).square().mean()
    total = pixel + edge_weight * edges + kl_weight * kl
    if texture_weight:
        total = total + texture_weight * (_texture(output) - _texture(wanted)).abs().mean()
    return total, {"mse": mse, "kl": kl.detach()}


def _fine_band(images: Tensor) -> Tensor:
    """A picture minus its 3×3 mean: the finest detail, where fur lives."""
    return images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)


def _texture(images: Tensor) -> Tensor:
    """How strong the fine detail is in each 4×4 cell: its root mean square, (B, 3, H/4, W/4)."""
    return (F.avg_pool2d(_fine_band(images).square(), 4) + 1e-6).sqrt()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB, (B,); images in [−1, 1]."""
    mse = (a.clamp(-1, 1) - b).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse)


def fine_band_energy(images: Tensor, mask: Tensor) -> Tensor:
    """Energy of the finest band (picture minus its 3×3 mean) inside a mask.

    Args:
        images: (B, 3, H, W); mask: (B, H, W) bool.

    Returns:
        The mean squared fine detail over all masked pixels, a scalar.
    """
    fine = _fine_band(images)
    return (fine.square() * mask[:, None]).sum() / (3 * mask.sum().clamp(min=1))


def load_autoencoder(path: str | Path, subfolder: str | None = None) -> AutoencoderKL:
    """An autoencoder by local folder or hub name, float32, evaluation mode.

    Raises:
        UserError: nothing there that diffusers can read.
    """
    try:
        vae = AutoencoderKL.from_pretrained(
            str(path), subfolder=subfolder, torch_dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no autoencoder in {path}: {str(error).splitlines()[0]}; "
            "make it with `tomjerry foundation autoencoder` or name another in the profile"
        ) from None
    return vae.eval()
