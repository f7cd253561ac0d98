"""Configurations of the published models that the profiles name, for when only sizes are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.runs import model_source, read_json

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BLIP = "Salesforce/blip-image-captioning-base"
_WIDTH = {"hidden_size": 768, "intermediate_size": 3072}
_WIDTH |= {"num_hidden_layers": 12, "num_attention_heads": 12}
# Hub id → part → what its config.json says that decides a size. Sources: unet/config.json and
# vae/config.json of stable-diffusion-v1-5 (Rombach et al. 2022, v1-inference.yaml), config.json of
# blip-image-captioning-base (Li et al. 2022: ViT-B/16 at 384 px, BERT-base, 256-d projections).
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    SD: {
        "unet": {
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "in_channels": 4,
            "layers_per_block": 2,
            "out_channels": 4,
            "sample_size": 64,
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "out_channels": 3,
            "sample_size": 512,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    },
    BLIP: {
        "captioner": {
            "image_text_hidden_size": 256,
            "projection_dim": 512,
            "text_config": {**_WIDTH, "vocab_size": 30524, "max_position_embeddings": 512},
            "vision_config": {**_WIDTH, "image_size": 384, "patch_size": 16},
        },
    },
}


def config_of(source: str, part: str, *inside: str) -> dict[str, Any]:
    """A model's configuration: from a local folder, else of a published model.

    Args:
        part: its name in :data:`PUBLISHED`.
        inside: folders under the source where it may lie; the source itself comes last.
    """
    place = Path(model_source(source))
    if place.is_dir():
        for folder in (*(place / name for name in inside if name), place):
            if (folder / "config.json").is_file():
                return read_json(folder / "config.json")
        raise UserError(f"no config.json in {place}: give a folder that `save_pretrained` wrote")
    if part in PUBLISHED.get(source, {}):
        return dict(PUBLISHED[source][part])
    known = ", ".join(name for name, parts in PUBLISHED.items() if part in parts)
    raise UserError(
        f"the sizes of {source} ({part}) are not known here: name {known}, or a local folder, "
        "in the profile"
    )
