"""BLIP's attention: computed in one fused step, and looked at.

transformers computes it step by step; torch has a kernel that does the same at once. Where a
word looks is read off the cross-attention of the decoder.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

if TYPE_CHECKING:
    from tomjerry_utils.blip_model import Blip


def fuse_attention(modules: Iterable[nn.Module]) -> None:
    """Let torch's fused attention do what transformers' BLIP spells out; the numbers are the same.

    transformers has no other attention than the eager one for BLIP, which stores a (B, heads, L, L)
    table in every layer and copies what it permutes.
    """
    for part in modules:
        for module in part.modules():
            if isinstance(module, BlipAttention):
                module.forward = types.MethodType(_look, module)
            elif isinstance(module, BlipTextSelfAttention):
                module.forward = types.MethodType(_read, module)


def _look(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """`BlipAttention.forward`, fused: (B, L, D) → (B, L, D)."""
    batch, length, width = hidden_states.shape
    parts = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, -1)
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    dropout = self.dropout.p if self.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return self.projection(context.transpose(1, 2).reshape(batch, length, width)), None


def _read(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`BlipTextSelfAttention.forward`, fused: (B, L, D) → (B, L, D), of words or of the picture."""
    if past_key_values is not None:  # while writing, word by word, transformers keeps the books
        return BlipTextSelfAttention.forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **options,
        )
    seen = encoder_hidden_states is not None
    source = encoder_hidden_states if seen else hidden_states
    # A picture has no pads: its mask never gets this far in transformers either.
    mask = options.get("encoder_attention_mask") if seen else attention_mask
    query, key, value = (
        projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        for projected in (self.query(hidden_states), self.key(source), self.value(source))
    )
    dropout = self.dropout.p if self.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2), None


def word_maps(blip: Blip, image: np.ndarray, caption: str) -> tuple[list[str], np.ndarray]:
    """Which places of a picture each word of a caption was read from.

    The gradient of the word's log probability by the scores that the decoder's last layer gives
    the places before its softmax, where that is positive, summed over heads: places where a closer
    look would have helped the word. Attention alone also shows where the model looks without using
    it (Chefer et al. 2021, arXiv 2103.15679).

    Args:
        image: uint8 (H, W, 3).

    Returns:
        The caption's tokens, and a map for each, (tokens, rows, columns), each from 0 to 1.
    """
    ids, mask = blip.tokens([caption], decode=True)
    with torch.no_grad():
        features = blip.vision_features(image[None])
    features.requires_grad_()  # so that a frozen model has slopes too
    last = blip.captioner.text_decoder.bert.encoder.layer[-1].crossattention.self
    kept: dict[str, torch.Tensor] = {}

    def spelled_out(self: Any, hidden_states: torch.Tensor, *_: Any, **options: Any) -> Any:
        context, probabilities = BlipTextSelfAttention.forward(
            self, hidden_states, encoder_hidden_states=features
        )
        kept["attention"] = probabilities
        return context, probabilities

    fused, last.forward = last.forward, types.MethodType(spelled_out, last)
    try:
        with torch.enable_grad():
            decoder = blip.captioner.text_decoder
            logits = decoder(ids, attention_mask=mask, encoder_hidden_states=features).logits
            chosen = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).unbind()
    finally:
        last.forward = fused
    maps = []
    for position, word in enumerate(chosen):
        (slope,) = torch.autograd.grad(word, kept["attention"], retain_graph=True)
        by_place = (slope * kept["attention"])[0, :, position]  # (heads, places)
        # Through the softmax: what all places have in common says nothing.
        attention = kept["attention"][0, :, position]
        used = (by_place - attention * by_place.sum(-1, keepdim=True)).clamp(min=0).sum(0)
        maps.append(used[1:].detach())  # without the class token, which is no place
    side = int(len(maps[0]) ** 0.5)
    found = torch.stack(maps)[:-1].reshape(-1, side, side)  # the last one wrote the end
    found = found / found.amax((1, 2), keepdim=True).clamp(min=1e-12)
    tokens = blip.tokenizer.convert_ids_to_tokens(ids[0, 1:-1].tolist())
    return tokens, found.cpu().numpy()
