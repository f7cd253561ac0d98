"""The adversarial rivals' nets and losses; `gans` trains and uses them.

- `Generator`, `discriminator`, `PatchHeads`, `ImagePool`: the parts of CUT (Park et al. 2020, arXiv
  2007.15651) and CycleGAN (Zhu et al. 2017, arXiv 1703.10593);
- `lsgan`, `discriminator_loss`, `patch_nce`: what they minimise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

FACTOR = 4  # between a picture's edge and the residual blocks'
NCE_TEMPERATURE = 0.07
NCE_DIM = 256


# ---- nets --------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Johnson et al.'s residual net: (B, 3, H, W) in [−1, 1] → the same, H and W multiples of 4."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), *_normed(width))
        self.down = nn.ModuleList(
            nn.Conv2d(k * width, 2 * k * width, 3, stride=2, padding=1) for k in (1, 2)
        )
        self.blocks = nn.ModuleList(_Residual(4 * width) for _ in range(blocks))
        self.up = nn.Sequential(
            *(
                layer
                for k in (4, 2)
                for layer in (
                    nn.ConvTranspose2d(
                        k * width, k // 2 * width, 3, stride=2, padding=1, output_padding=1
                    ),
                    *_normed(k // 2 * width),
                )
            ),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )
        self.middle = (blocks + 1) // 2
        self.feature_channels = (3, 2 * width, 4 * width, 4 * width, 4 * width)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images)[-1])

    def encode(self, images: Tensor) -> list[Tensor]:
        """CUT's five layers: the picture, both convolutions of stride 2, the first and the middle
        block [the first and the fifth of nine]."""
        found = [images]
        x = self.stem(images)
        for convolution in self.down:
            found.append(convolution(x))
            x = F.relu(F.instance_norm(found[-1]))
        for block in self.blocks[: self.middle]:
            x = block(x)
            if len(found) == 3:
                found.append(x)
        return [*found, x]

    def decode(self, x: Tensor) -> Tensor:
        """From the last layer that `encode` gives to the translation."""
        for block in self.blocks[self.middle :]:
            x = block(x)
        return self.up(x)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            *_normed(channels),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _normed(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(channels), nn.ReLU()


def discriminator(width: int, layers: int) -> nn.Sequential:
    """PatchGAN (Isola et al. 2017): (B, 3, H, W) → a score for each patch, (B, 1, h, w).

    A patch is 34 px wide with two layers of stride 2 and 70 px with three; pictures have to have
    an edge of `4 * 2**layers` at least.
    """
    net = nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
    for k in range(1, layers + 1):
        before, after = (width * min(2**i, 8) for i in (k - 1, k))
        stride = 2 if k < layers else 1
        net.append(nn.Conv2d(before, after, 4, stride=stride, padding=1))
        net.append(nn.InstanceNorm2d(after))
        net.append(nn.LeakyReLU(0.2))
    return net.append(nn.Conv2d(after, 1, 4, padding=1))


class PatchHeads(nn.Module):
    """CUT's perceptrons, one per layer of features, from a patch to a point on the unit sphere."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, NCE_DIM), nn.ReLU(), nn.Linear(NCE_DIM, NCE_DIM))
            for inputs in channels
        )

    def forward(self, features: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
        """Features (B, C, h, w) at places (P,) in reading order → (B, P, NCE_DIM), per layer."""
        return [
            F.normalize(head(layer.flatten(2)[:, :, place.to(layer.device)].mT), dim=2)
            for head, layer, place in zip(self.heads, features, places, strict=True)
        ]


class ImagePool(nn.Module):
    """Fakes of earlier steps, for a discriminator not to forget them (Shrivastava et al. 2017).

    While it fills, fakes come back as they are; then half of them are swapped for an older one.
    """

    images: Tensor
    filled: Tensor

    def __init__(self, capacity: int, size: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(capacity, 3, size, size))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, fakes: Tensor, rng: torch.Generator) -> Tensor:
        """(B, 3, S, S) of this step → as many, some of them from earlier; without gradients."""
        given = fakes.detach().clone()
        for i, fake in enumerate(fakes):
            if self.filled < len(self.images):
                self.images[self.filled] = fake
                self.filled += 1
            elif torch.rand((), generator=rng) < 0.5:
                place = int(torch.randint(len(self.images), (), generator=rng))
                given[i] = self.images[place]
                self.images[place] = fake
        return given


def start(layer: nn.Module) -> None:
    """Both papers' start: weights from N(0, 0.02²), biases 0."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.02)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


# ---- losses ------------------------------------------------------------------------------------


def lsgan(scores: Tensor, *, real: bool) -> Tensor:
    """Mean squared distance of a discriminator's scores from 1 or from 0 (Mao et al. 2017)."""
    return (scores.float() - float(real)).square().mean()


def discriminator_loss(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises: half the sum of both kinds; nothing reaches the fakes."""
    scores = net(torch.cat([real, fake.detach()]))
    return 0.5 * (lsgan(scores[: len(real)], real=True) + lsgan(scores[len(real) :], real=False))


def frozen(net: nn.Module, images: Tensor) -> Tensor:
    """A net's answer with gradients to its input and none to its weights."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    return functional_call(net, weights, (images,))


def patch_nce(queries: Tensor, keys: Tensor, temperature: float = NCE_TEMPERATURE) -> Tensor:
    """Cross-entropy of finding each patch among those of its source (Park et al., section 3).

    Args:
        queries: (B, P, D) of unit length, from the translations.
        keys: (B, P, D) of unit length, from the sources; they get no gradient.
    """
    logits = queries.float() @ keys.detach().float().transpose(1, 2) / temperature
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten())
