"""The denoiser ẑ_θ(z_t, t, c) and its loss: what stages 04 and 05 both train.

A diffusers UNet2DConditionModel with a :class:`Conditioner` that writes its cross-attention tokens
(class, caption and, in stage 05, the attended source) and, where the model has the input channels
for it, the domain-invariant view of :mod:`structure` beside the noisy latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.scenes import LABELS

NO_CLASS = len(LABELS)  # the label that classifier-free guidance drops to


class SourceAttention(nn.Module):
    """z^C = softmax(QKᵀ/√d) V between BLIP's tokens y and the source z, in both readings.

    "poster": Q = W_Q·y, K = W_K·z, V = W_V·z, as written on the poster: each of BLIP's tokens
    gathers from the source; z^C is (B, L, D). "ldm": the reverse, usual in latent diffusion: each
    place of the source asks BLIP's tokens; z^C is (B, h·w/4, D).
    """

    def __init__(self, reading: str, source_channels: int, text_dim: int, dim: int) -> None:
        super().__init__()
        if reading not in ("poster", "ldm"):
            raise ValueError(f"attention {reading!r} is neither 'poster' nor 'ldm'")
        self.reading = reading
        self.pool = nn.AvgPool2d(2)
        query, key = (
            (text_dim, source_channels) if reading == "poster" else (source_channels, text_dim)
        )
        self.to_q = nn.Linear(query, dim, bias=False)
        self.to_k = nn.Linear(key, dim, bias=False)
        self.to_v = nn.Linear(key, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, source: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Source (B, C, h, w), text (B, L, D_text), mask (B, L) 1 = a word → z^C (B, ·, D)."""
        z = self.pool(source).flatten(2).transpose(1, 2)
        asks, holds = (text, z) if self.reading == "poster" else (z, text)
        q, k, v = self.to_q(asks), self.to_k(holds), self.to_v(holds)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if self.reading == "ldm":
            scores = scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min)
        return self.out(scores.softmax(-1) @ v)


class Conditioner(ModelMixin, ConfigMixin):
    """Writes the tokens that the UNet attends to: class, caption, attended source.

    Args of the config:
        text_dim: width of BLIP's text features. dim: the UNet's `cross_attention_dim`.
        attention: None (stage 04), "poster" or "ldm". source_channels: channels of the source.
        tone_mean, tone_std: domain → statistics that standardise the view's tones.
    """

    @register_to_config
    def __init__(
        self,
        text_dim: int = 128,
        dim: int = 128,
        attention: str | None = None,
        source_channels: int = 0,
        tone_mean: dict[str, list[float]] | None = None,
        tone_std: dict[str, list[float]] | None = None,
        latent_channels: int = 4,
        factor: int = 4,
    ) -> None:
        super().__init__()
        self.classes = nn.Embedding(NO_CLASS + 1, dim)
        self.text = nn.Linear(text_dim, dim)
        self.no_text = nn.Parameter(torch.zeros(text_dim))
        self.attend = (
            SourceAttention(attention, source_channels, text_dim, dim) if attention else None
        )

    def forward(
        self, labels: Tensor, text: Tensor, mask: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, dim) and their mask (B, T) for the UNet.

        Args:
            labels: (B,) index into `scenes.LABELS`, or NO_CLASS.
            text: (B, L, text_dim) BLIP text features; mask: (B, L). A row whose mask is all 0 has
                no caption.
            source: (B, C, h, w) the source's latents or view, when there is attention to it.
        """
        empty = (mask.sum(1) == 0)[:, None]
        text = torch.where(empty[:, :, None], self.no_text.to(text.dtype), text)
        mask = torch.where(empty, torch.ones_like(mask), mask)
        tokens = [self.classes(labels)[:, None], self.text(text)]
        masks = [torch.ones_like(mask[:, :1]), mask]
        if self.attend is not None and source is not None:
            attended = self.attend(source, text, mask)
            tokens.append(attended)
            masks.append(
                mask if self.attend.reading == "poster" else mask.new_ones(attended.shape[:2])
            )
        return torch.cat(tokens, 1), torch.cat(masks, 1)


def tiny_denoiser(latent_channels: int, view_channels: int, dim: int = 128) -> UNet2DConditionModel:
    """The tiny UNet of the `smoke` and `mini` profiles: 16×16 latents, 4.9 M parameters.

    Even widths: most of what a view leaves open is fine detail, so the finest level gets as many
    channels as the coarsest.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels + view_channels,
        out_channels=latent_channels,
        block_out_channels=(96, 96, 96),
        layers_per_block=1,
        cross_attention_dim=dim,
        # diffusers reads this as the number of heads here: 4 of 24 channels.
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
    )


def make_scheduler(prediction_type: str) -> DDIMScheduler:
    """The noise schedule: Stable Diffusion's, rescaled so that the last step is pure noise.

    With zero terminal SNR an ε-prediction has nothing to say there, so it keeps the plain schedule.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def to_x0(
    output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """ẑ from a prediction of any kind, given z_t = α z + σ η."""
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - sigma * output) / alpha.clamp(min=1e-4)
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * output
    raise ValueError(f"prediction_type {prediction_type!r}: sample, epsilon or v_prediction")


def from_x0(
    x0: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """The prediction of a kind that says ẑ = x0: the inverse of :func:`to_x0`."""
    if prediction_type == "sample":
        return x0
    noise = (noisy - alpha * x0) / sigma.clamp(min=1e-8)
    return noise if prediction_type == "epsilon" else alpha * noise - sigma * x0


def weighted_loss(
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    gamma: float,
) -> Tensor:
    """w·‖ẑ − z‖² with w = min(max(SNR, 1), γ), written for each parametrisation; (B,).

    Above SNR 1 this is min-SNR weighting (Hang et al. 2023). Below, plain min-SNR lets the weight
    of an x0-loss fall to nothing just where sampling starts; there the poster's unweighted loss
    holds. One predictor gives the same value in all three parametrisations, since
    ‖ẑ − z‖² = ‖η̂ − η‖²/SNR = ‖v̂ − v‖²/(SNR + 1).
    """
    snr = (alpha / sigma.clamp(min=1e-8)) ** 2
    weight = snr.clamp(1.0, max(gamma, 1.0)).flatten()
    if prediction_type == "sample":
        target = latents
    elif prediction_type == "epsilon":
        target, weight = noise, weight / snr.flatten().clamp(min=1e-8)
    else:
        target, weight = alpha * noise - sigma * latents, weight / (snr.flatten() + 1)
    return weight * (output.float() - target).square().flatten(1).mean(1)


@dataclass
class Batch:
    """What one training step sees; every tensor has B rows.

    latents (B, C, h, w); labels (B,); text (B, L, D) and mask (B, L); view (B, S, h, w), already
    standardised; source: what the source attention reads, the view where None; images (B, 3, H, W)
    in [−1, 1] for the BLIP term, where it is used.
    """

    latents: Tensor
    labels: Tensor
    text: Tensor
    mask: Tensor
    view: Tensor
    source: Tensor | None = None
    images: Tensor | None = None
    captions: list[str] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; `accelerate` calls this for every training batch."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking) if torch.is_tensor(value) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


def drop(
    batch: Batch, *, labels: float, captions: float, view: float, generator: torch.Generator
) -> Batch:
    """Leave conditions out at random, row by row, for classifier-free guidance."""

    def chosen(share: float) -> Tensor:
        return torch.rand(len(batch.labels), generator=generator).to(batch.latents.device) < share

    no_view = chosen(view)[:, None, None, None]
    hidden = torch.zeros((), device=batch.view.device, dtype=batch.view.dtype)
    return Batch(
        latents=batch.latents,
        labels=torch.where(chosen(labels), NO_CLASS, batch.labels),
        text=batch.text,
        mask=batch.mask * ~chosen(captions)[:, None],
        view=torch.where(no_view, hidden, batch.view),
        source=batch.source if batch.source is None else torch.where(no_view, hidden, batch.source),
        images=batch.images,
        captions=batch.captions,
    )


def predict(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    noisy: Tensor,
    timesteps: Tensor,
    batch: Batch,
) -> Tensor:
    """The UNet's output for noisy latents under a batch's conditions."""
    source = batch.view if batch.source is None else batch.source
    tokens, mask = conditioner(batch.labels, batch.text, batch.mask, source)
    if unet.config.in_channels > noisy.shape[1]:
        noisy = torch.cat([noisy, batch.view.to(noisy.dtype)], 1)
    return unet(noisy, timesteps, tokens, encoder_attention_mask=mask.bool()).sample


def denoising_loss(
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    batch: Batch,
    scheduler: DDIMScheduler,
    generator: torch.Generator,
    *,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The poster's E‖ẑ_θ(z_t, t, c) − z‖², weighted by min-SNR.

    Returns:
        The mean loss, ẑ (B, C, h, w) and the timesteps (B,), for terms that look at the output.
    """
    z = batch.latents
    timesteps = torch.randint(
        scheduler.config.num_train_timesteps, (len(z),), generator=generator
    ).to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z)
    total = scheduler.alphas_cumprod.to(z.device)[timesteps][:, None, None, None]
    alpha, sigma = total.sqrt(), (1 - total).sqrt()
    noisy = alpha * z + sigma * noise
    output = predict(unet, conditioner, noisy, timesteps, batch)
    kind = scheduler.config.prediction_type
    loss = weighted_loss(output, z, noise, alpha, sigma, kind, gamma).mean()
    return loss, to_x0(output.float(), noisy, alpha, sigma, kind), timesteps


def save_denoiser(unet: UNet2DConditionModel, conditioner: Conditioner, folder: Path) -> None:
    """Write `unet/` and `conditioner/` under a folder; the UNet loads in plain diffusers."""
    unet.save_pretrained(folder / "unet")
    conditioner.save_pretrained(folder / "conditioner")


def load_denoiser(
    source: str | Path,
    subfolder: str = "",
    *,
    text_dim: int = 0,
    latent_channels: int = 4,
    factor: int = 8,
    seed: int = 0,
) -> tuple[UNet2DConditionModel, Conditioner]:
    """A UNet by folder or hub name, with its conditioner, or a new one where none came with it.

    Args:
        subfolder: "unet" of a Stable Diffusion; found alone in a local folder.
        text_dim, latent_channels, factor, seed: of a new conditioner, which writes tokens of the
            width that the UNet's cross-attention reads.

    Raises:
        UserError: nothing there that diffusers can read.
    """
    path = Path(source)
    inside = subfolder or ("unet" if (path / "unet").is_dir() else None)
    try:
        unet = UNet2DConditionModel.from_pretrained(
            str(source), subfolder=inside, torch_dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no denoiser in {source}: {str(error).splitlines()[0]}; "
            "make it with `tomjerry foundation denoiser` or name another in the profile"
        ) from None
    if (path / "conditioner").is_dir():
        conditioner = Conditioner.from_pretrained(
            str(path / "conditioner"), torch_dtype=torch.float32
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conditioner = Conditioner(
                text_dim=text_dim,
                dim=unet.config.cross_attention_dim,
                latent_channels=latent_channels,
                factor=factor,
            )
    return unet, conditioner


def widen(unet: UNet2DConditionModel, channels: int) -> None:
    """Give a UNet more input channels, the new weights zero, so that it starts unchanged."""
    extra = channels - unet.config.in_channels
    if extra <= 0:
        return
    old = unet.conv_in
    new = nn.utils.skip_init(
        nn.Conv2d,
        channels,
        old.out_channels,
        old.kernel_size,
        padding=old.padding,
        device=old.weight.device,
    )
    assert new.bias is not None
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : unet.config.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def with_attention(
    conditioner: Conditioner, attention: str | None, source_channels: int
) -> Conditioner:
    """A copy of a conditioner with a (new) source attention, whose output starts at zero."""
    config = {k: v for k, v in conditioner.config.items() if not k.startswith("_")}
    config.update(attention=attention, source_channels=source_channels)
    fresh = Conditioner(**config)
    fresh.load_state_dict(
        {k: v for k, v in conditioner.state_dict().items() if not k.startswith("attend")},
        strict=False,
    )
    if fresh.attend is not None:
        nn.init.zeros_(fresh.attend.out.weight)
        nn.init.zeros_(fresh.attend.out.bias)
    return fresh


def repeat_texts(texts: Sequence[str], blip: Any, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """BLIP text features of captions, each different one computed once.

    Returns:
        table (U, L, D), its masks (U, L) and each caption's row in them (N,).
    """
    unique = sorted(set(texts))
    features, masks = [], []
    with torch.no_grad():
        for start in range(0, len(unique), 64):
            f, m = blip.text_tokens(unique[start : start + 64], length=length)
            features.append(f.float().cpu())
            masks.append(m.cpu())
    where = {text: i for i, text in enumerate(unique)}
    return torch.cat(features), torch.cat(masks), torch.tensor([where[t] for t in texts])
