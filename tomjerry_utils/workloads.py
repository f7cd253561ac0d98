"""What each training of the course runs: its models, what lies beside them, and its loss.

Models are made from their configuration files alone, and the losses are the stages' own, so that
:mod:`tracing` can follow a step that no machine here could take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.initialization import no_init_weights

from tomjerry_utils import adapters, finishing, perceptual, structure, transfer
from tomjerry_utils.autoencoder import TEXTURE_WEIGHT, autoencoder_loss, decoder_alone, factor_of
from tomjerry_utils.blip_attention import fuse_attention
from tomjerry_utils.blip_model import Blip, add_lora
from tomjerry_utils.blip_training import joint_loss
from tomjerry_utils.denoiser import (
    Batch,
    Conditioner,
    denoising_loss,
    make_scheduler,
    widen,
    with_attention,
)
from tomjerry_utils.latents import TEXT_LENGTH
from tomjerry_utils.profiles import Profile
from tomjerry_utils.published import config_of
from tomjerry_utils.sampling import LAST_STEPS


@dataclass(frozen=True)
class Variant:
    """How a training saves memory. `lora_rank` 0 trains every weight."""

    lora_rank: int = 0
    checkpointing: bool = False
    precision: str = "fp32"


@dataclass(frozen=True, eq=False)
class Work:
    """A training's models, made by :attr:`Training.make` on whatever device is the default.

    Attributes:
        trained: the modules that `training.train` gets, frozen parts of them included.
        beside: modules that lie on the device at the same time and are not trained.
        loss: of a batch of so many pictures, of which so many more, or so many of which, are put to
            a second use (see :attr:`Training.second`).
    """

    trained: list[nn.Module]
    beside: list[nn.Module]
    loss: Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Training:
    """One training of a stage, at a profile.

    Attributes:
        batch_key, accumulation_key: in the profile, such as `ldm.batch_size`.
        batch, accumulation: what the profile says.
        second: a part of the batch (or a batch beside it) that grows with it, 0 where there is
            none: labelled pictures, pictures decoded for BLIP, pictures with latents of their own.
        second_key: its key, "" where it follows from the batch.
        steps: of the training; `ablation` steps of the same kind come on top in stage 05.
        smallest: the least batch that still teaches what the training is for.
        lora_rank: the profile's; None where there are no adapters for it.
        checkpointing: the profile's; None where it cannot be chosen.
        averaged: whether an average of the trained weights is kept.
    """

    name: str
    batch_key: str
    accumulation_key: str
    batch: int
    accumulation: int
    steps: int
    make: Callable[[Variant], Work]
    second: int = 0
    second_key: str = ""
    ablation: int = 0
    smallest: int = 1
    lora_rank: int | None = None
    checkpointing: bool | None = None
    averaged: bool = True


def trainings(profile: Profile) -> list[Training]:
    """The trainings of stages 03 to 05 that a profile asks for, in order.

    Raises:
        UserError: a model of which neither the folder nor the sizes are known here.
    """
    blip, ldm, transfer_, last = profile.blip, profile.ldm, profile.transfer, profile.finishing
    found = [
        Training(
            "03 BLIP",
            "blip.batch_size",
            "blip.accumulation",
            blip.batch_size,
            blip.accumulation,
            blip.steps,
            lambda variant: _blip_work(profile, variant),
            second=blip.label_batch_size,
            second_key="blip.label_batch_size",
            # Contrast needs others to tell a picture from.
            smallest=min(4, blip.batch_size),
            lora_rank=blip.lora_rank,
        ),
        Training(
            "04 decoder",
            "ldm.autoencoder_batch_size",
            "ldm.autoencoder_accumulation",
            ldm.autoencoder_batch_size,
            ldm.autoencoder_accumulation,
            ldm.autoencoder_steps,
            lambda variant: _decoder_work(profile),
        ),
        Training(
            "04 denoiser",
            "ldm.batch_size",
            "ldm.accumulation",
            ldm.batch_size,
            ldm.accumulation,
            ldm.steps,
            lambda variant: _denoiser_work(profile, variant),
            lora_rank=ldm.lora_rank,
            checkpointing=ldm.gradient_checkpointing,
        ),
        Training(
            "05 translator",
            "transfer.batch_size",
            "transfer.accumulation",
            transfer_.batch_size,
            transfer_.accumulation,
            transfer_.steps,
            lambda variant: _translator_work(profile, variant),
            second=transfer_.blip_batch_size if transfer_.blip_weight else 0,
            second_key="transfer.blip_batch_size",
            ablation=len(transfer.ABLATION) * transfer_.ablation_steps,
            lora_rank=transfer_.lora_rank,
            checkpointing=ldm.gradient_checkpointing,
        ),
        Training(
            # Of stage 05; that of 04 has no attention to the source and needs a little less.
            "04, 05 finishing",
            "finishing.batch_size",
            "finishing.accumulation",
            last.batch_size,
            last.accumulation,
            2 * last.steps,
            lambda variant: _finishing_work(profile, variant),
            second=finishing.own_in_batch(last.batch_size),
            lora_rank=transfer_.lora_rank,
            checkpointing=ldm.gradient_checkpointing,
        ),
    ]
    return [training for training in found if training.steps]


# ---- models from their configurations ----------------------------------------------------------


def _autoencoder(profile: Profile) -> AutoencoderKL:
    options = profile.ldm
    config = config_of(options.autoencoder, "vae", options.autoencoder_subfolder)
    return AutoencoderKL.from_config(config).eval()


class _Wordless(Blip):
    """A BLIP whose captions are all as long as any may be: bytes do not ask what they say."""

    def tokens(
        self, texts: Sequence[str], *, decode: bool = False, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        shape = len(texts), length or self.max_length
        return torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)


def _describer(profile: Profile) -> Blip:
    config = BlipConfig.from_dict(config_of(profile.blip.pretrained, "captioner", "captioner"))
    with no_init_weights():
        captioner = BlipForConditionalGeneration(config)
        retrieval = BlipForImageTextRetrieval(config)
    captioner.tie_weights()  # which came with the drawing of weights
    retrieval.vision_model = captioner.vision_model
    length = min(profile.blip.max_length, config.text_config.max_position_embeddings)
    statistics: Any = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tokenizer = SimpleNamespace(sep_token_id=0)
    blip = _Wordless(captioner.eval(), retrieval.eval(), tokenizer, statistics, length)
    fuse_attention(blip.parts().values())
    return blip


def _denoiser(
    profile: Profile, vae: AutoencoderKL, describer: Blip
) -> tuple[UNet2DConditionModel, Conditioner]:
    """As stage 04 trains it, the view's input channels included."""
    options = profile.ldm
    config = config_of(options.denoiser, "unet", options.denoiser_subfolder, "unet")
    unet = UNet2DConditionModel.from_config(config)
    widen(unet, vae.config.latent_channels + structure.VIEW_CHANNELS)
    width = describer.captioner.config.text_config.hidden_size
    return unet, Conditioner(text_dim=width, dim=unet.config.cross_attention_dim)


def _batch(count: int, profile: Profile, vae: AutoencoderKL, describer: Blip) -> Batch:
    side = profile.image_size // factor_of(vae)
    width = describer.captioner.config.text_config.hidden_size
    return Batch(
        latents=torch.zeros(count, vae.config.latent_channels, side, side),
        labels=torch.zeros(count, dtype=torch.long),
        text=torch.zeros(count, TEXT_LENGTH, width),
        mask=torch.ones(count, TEXT_LENGTH, dtype=torch.long),
        view=torch.zeros(count, structure.VIEW_CHANNELS, side, side),
        captions=[""] * count,
    )


# ---- the trainings -----------------------------------------------------------------------------


def _blip_work(profile: Profile, variant: Variant) -> Work:
    blip, options = _describer(profile), profile.blip
    if variant.lora_rank:
        add_lora(blip, variant.lora_rank, seed=0)
    parts = list(blip.parts().values())
    for part in parts:
        part.train()

    def others(logits: Tensor, same: Tensor, generator: torch.Generator) -> Any:
        row = range(len(same))  # every caption is another one: all rows have a negative
        return row, [*row[1:], 0]

    def pictures(count: int) -> Tensor:
        return torch.zeros(count, 3, blip.image_size, blip.image_size)

    def loss(count: int, labelled: int) -> Tensor:
        return joint_loss(
            blip,
            pictures(count),
            [str(i) for i in range(count)],
            contrastive_weight=options.contrastive_weight,
            generator=torch.Generator(),
            labelled=(pictures(labelled), [""] * labelled) if labelled else None,
            negatives=others,
        )[0]

    return Work(parts, [], loss)


def _decoder_work(profile: Profile) -> Work:
    vae, describer = _autoencoder(profile), _describer(profile)
    decoder = decoder_alone(vae).train()

    def loss(count: int, _: int) -> Tensor:
        images = torch.zeros(count, 3, profile.image_size, profile.image_size)
        generator = torch.Generator()
        return autoencoder_loss(
            vae, images, images, generator, kl_weight=0.0, texture_weight=TEXTURE_WEIGHT
        )[0]

    return Work([decoder], [vae, *describer.parts().values()], loss)


def _denoiser_work(profile: Profile, variant: Variant) -> Work:
    vae, describer = _autoencoder(profile), _describer(profile)
    unet, conditioner = _denoiser(profile, vae, describer)
    _prepare(unet, variant)

    def loss(count: int, _: int) -> Tensor:
        batch, gamma = _batch(count, profile, vae, describer), profile.ldm.min_snr_gamma
        generator, scheduler = torch.Generator(), _scheduler(profile)
        return denoising_loss(unet, conditioner, batch, scheduler, generator, gamma=gamma)[0]

    return Work([unet, conditioner], [vae, *describer.parts().values()], loss)


def _translator_work(profile: Profile, variant: Variant) -> Work:
    options = profile.transfer
    vae, describer = _autoencoder(profile), _describer(profile)
    unet, plain = _denoiser(profile, vae, describer)
    conditioner = with_attention(plain, options.attention, structure.VIEW_CHANNELS)
    _prepare(unet, variant)
    beside = [plain, vae, *describer.parts().values()]
    for module in beside:
        module.requires_grad_(False)

    def loss(count: int, decoded: int) -> Tensor:
        return transfer.regularised_loss(
            unet,
            conditioner,
            _batch(count, profile, vae, describer),
            _scheduler(profile),
            torch.Generator(),
            vae=vae,
            describer=describer,
            gamma=profile.ldm.min_snr_gamma,
            blip_weight=options.blip_weight,
            blip_batch_size=decoded,
            blip_variant=options.blip_variant,
        )[0]

    return Work([unet, conditioner], beside, loss)


def _finishing_work(profile: Profile, variant: Variant) -> Work:
    before, describer, net = _autoencoder(profile), _describer(profile), perceptual.Trunk()
    drew, plain = _denoiser(profile, before, describer)  # the translator as it was stays there
    conditioner = with_attention(plain, profile.transfer.attention, structure.VIEW_CHANNELS)
    beside = [before, drew, plain, conditioner, net, *describer.parts().values()]
    for module in beside:
        module.requires_grad_(False)
    vae, (unet, _) = _autoencoder(profile), _denoiser(profile, before, describer)
    decoder = decoder_alone(vae).train()
    _prepare(unet, variant)

    def loss(count: int, own: int) -> Tensor:
        told, size = _batch(count, profile, vae, describer), profile.image_size
        real, noise = torch.zeros(count, 3, size, size), torch.zeros(count + own, 3, size, size)
        colours = F.avg_pool2d(real, finishing.CELL)
        state = {"state": told.latents, "own": told.latents, "colours": colours}
        last = [(_Step(), torch.zeros((), dtype=torch.long))] * LAST_STEPS
        return finishing.finishing_loss(
            unet,
            conditioner,
            vae,
            net,
            told,
            state,
            real,
            noise,
            last=last,
            guidance_scale=profile.transfer.guidance_scale,
            generator=torch.Generator(),
        )[0]

    return Work([unet, decoder], [vae, *beside], loss)


class _Step:
    """A step of DDIM as far as memory goes: where it leads asks no number that is not there."""

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        return SimpleNamespace(prev_sample=0.5 * latents + 0.5 * output)


def _scheduler(profile: Profile) -> Any:
    # Made when the loss is, since the models are made without numbers.
    return make_scheduler(profile.ldm.prediction_type)


def _prepare(unet: UNet2DConditionModel, variant: Variant) -> None:
    rank, on = variant.lora_rank, variant.checkpointing
    adapters.prepare(unet, lora_rank=rank, gradient_checkpointing=on, seed=0)
    unet.train()
