"""Training a UNet that is large for its GPU: LoRA adapters and gradient checkpointing.

Both are put on before a training and taken off after it, so that what is saved is a plain
UNet2DConditionModel and no other part of the project knows of them.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

# The projections of every self- and cross-attention, as in diffusers' own LoRA training.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def prepare(
    unet: UNet2DConditionModel, *, lora_rank: int, gradient_checkpointing: bool, seed: int
) -> None:
    """Choose what of a UNet is trained, and what of its activations is kept.

    Args:
        lora_rank: 0 trains every weight; r > 0 adapters of rank r beside the attention's weights
            (LoRA, Hu et al. 2021), and the first convolution whole, whose channels for the view
            are new and start at zero.
        gradient_checkpointing: compute each block's activations a second time in the backward
            pass instead of keeping them; the gradients are the same.
        seed: of the adapters' random half; the other half is zero, so the UNet starts unchanged.
    """
    unet.requires_grad_(True)
    if lora_rank:
        from peft import LoraConfig

        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=[*LORA_TARGETS])
        unet.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(config)
        unet.conv_in.requires_grad_(True)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def finish(unet: UNet2DConditionModel) -> None:
    """Fold the adapters into the weights they stand beside, and keep activations again.

    A UNet that `prepare` left as it was stays as it is.
    """
    if hasattr(unet, "peft_config"):
        unet.fuse_lora()
        unet.unload_lora()
    unet.requires_grad_(True)
    unet.disable_gradient_checkpointing()
