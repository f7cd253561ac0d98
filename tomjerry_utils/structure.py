"""What both domains share in a picture: which part of an animal is where, and the tones behind it.

The poster's discussion proposes "segmentation maps to preserve action postures". A small
segmenter, trained on generated scenes of both styles, gives each pixel's part (eyes and limbs
included, not only a silhouette); together with the colours of the background, blurred to an 8×8
grid and standardised per domain, that is the domain-invariant *view* which the translator is
trained on with natural pictures and given from cartoons.

A view also has room for each animal's *coat*: its mean colour and how much that varies. This is no
shared part; a cartoon's is replaced by one drawn from the natural training pictures
(:func:`wear`), since a cat may wear any coat but must wear one. Without it, a short training
averages all coats into mud.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.scenes import PARTS

MOUSE = len(PARTS)  # index of the "this pixel belongs to a mouse" logit
FIRST_ANIMAL_PART = PARTS.index("torso")
TONE_CELLS = 8


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs) for _ in range(2)])
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(hidden)) + self.skip(x))


class UNet(ModelMixin, ConfigMixin):
    """What the small nets of this project share: (B, C, H, W) → (B, channels[0], H/2, W/2).

    It sees eight times as coarsely as that; H and W are multiples of 16.
    """

    def _build(self, inputs: int, channels: tuple[int, ...]) -> None:
        self.stem = nn.Conv2d(4 * inputs, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(channels):
            self.down.append(_Block(channels[max(i - 1, 0)], width))
        self.up = nn.ModuleList()
        for i in reversed(range(len(channels) - 1)):
            self.up.append(_Block(channels[i + 1] + channels[i], channels[i]))

    def _features(self, x: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(x, 2))
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if i else x)
            kept.append(x)
        for block, skip in zip(self.up, reversed(kept[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return x


class StructureNet(UNet):
    """A U-Net from pictures to part logits.

    Input (B, 3, H, W) in [−1, 1] with H and W multiples of 16; output (B, len(PARTS) + 1, H, W):
    one softmax over :data:`scenes.PARTS` and, last, the logit that a pixel belongs to a mouse.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (24, 40, 64, 96)) -> None:
        super().__init__()
        self._build(3, channels)
        # The last stage sees full-resolution pixels again: eyes are two pixels wide.
        self.head = nn.Conv2d(channels[0], 4 * 24, 1)
        self.fine = nn.Conv2d(24 + 3, 24, 3, padding=1)
        self.out = nn.Conv2d(24, len(PARTS) + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.head(self._features(images)), 2)
        return self.out(F.silu(self.fine(torch.cat([x, images], 1))))


def structure_loss(
    net: StructureNet, images: Tensor, parts: Tensor, mouse: Tensor, *, known: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of parts, rare ones weighted up, plus that of "mouse" on animal pixels.

    Args:
        images: (B, 3, H, W); parts: (B, H, W) long; mouse: (B, H, W) bool.
        known: (B,) bool, whether the picture's species are known (not in the zoo).
    """
    logits = net(images).float()
    weight = torch.ones(len(PARTS), device=logits.device)
    weight[PARTS.index("eye")] = 3.0
    weight[PARTS.index("nose")] = 3.0
    weight[PARTS.index("ear")] = 2.0
    weight[PARTS.index("tail")] = 2.0
    part_loss = F.cross_entropy(logits[:, :MOUSE], parts, weight=weight)
    animal = (parts >= FIRST_ANIMAL_PART) & known[:, None, None]
    each = F.binary_cross_entropy_with_logits(logits[:, MOUSE], mouse.float(), reduction="none")
    mouse_loss = (each * animal).sum() / animal.sum().clamp(min=1)
    right = (logits[:, :MOUSE].argmax(1) == parts).float().mean()
    return part_loss + 0.3 * mouse_loss, {"right": right.detach(), "mouse": mouse_loss.detach()}


def probabilities(net: StructureNet, images: Tensor) -> Tensor:
    """(B, len(PARTS) + 1, H, W) in [0, 1]: parts' probabilities and each pixel's mouse share."""
    logits = net(images).float()
    parts = logits[:, :MOUSE].softmax(1)
    animal = parts[:, FIRST_ANIMAL_PART:].sum(1, keepdim=True)
    return torch.cat([parts, logits[:, MOUSE:].sigmoid() * animal], 1)


def one_hot(parts: Tensor, mouse: Tensor) -> Tensor:
    """True parts (B, H, W) and mouse pixels (B, H, W) in the form of :func:`probabilities`."""
    maps = F.one_hot(parts.long(), len(PARTS)).permute(0, 3, 1, 2).float()
    return torch.cat([maps, mouse[:, None].float()], 1)


MAPS = 4 * len(PARTS)  # channels of a view that hold part maps; then coats, then three tones
COATS = 12  # for the cat and for the mouse: mean and deviation of red, green and blue
VIEW_CHANNELS = MAPS + COATS + 3
NEIGHBOURS = 16  # training pictures in the most similar light, of which one lends its coats


def view(maps: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The domain-invariant view of pictures on the grid of their latents.

    Args:
        maps: (B, len(PARTS) + 1, H, W) from :func:`probabilities` (any resolution).
        images: (B, 3, H, W) in [−1, 1], for the tones of the background (the maps' resolution).
        grid: (h, w) of the latents.

    Returns:
        (B, VIEW_CHANNELS, h, w). All parts but the wall (which is what is left) and the mouse's
        share at twice the grid's resolution, in [−1, 1]; then the animals' coats, the same
        everywhere, and last the three tones, neither yet standardised.
    """
    behind = 1 - maps[:, FIRST_ANIMAL_PART:MOUSE].sum(1, keepdim=True).clamp(0, 1)
    cells = (TONE_CELLS, TONE_CELLS)
    share = F.adaptive_avg_pool2d(behind, cells)
    colour = F.adaptive_avg_pool2d(behind * images, cells)
    everywhere = colour.sum((2, 3), keepdim=True) / share.sum((2, 3), keepdim=True).clamp(min=1e-3)
    # Cells that an animal fills take the mean of the rest.
    tone = (colour + 0.05 * everywhere) / (share + 0.05)
    tone = F.interpolate(tone, size=grid, mode="bilinear", align_corners=False)
    coat = coats(maps, images)[:, :, None, None].expand(-1, -1, *grid)
    return torch.cat([_shapes(maps, grid), coat, tone], 1)


def reshape(views: Tensor, maps: Tensor) -> Tensor:
    """Views with the shapes of other part maps; coats and tones stay."""
    return torch.cat([_shapes(maps, (views.shape[-2], views.shape[-1])), views[:, MAPS:]], 1)


def _shapes(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    half = F.interpolate(maps[:, 1:], size=(2 * grid[0], 2 * grid[1]), mode="area")
    return 2 * F.pixel_unshuffle(half, 2) - 1


def drawn_maps(views: Tensor) -> Tensor:
    """The part maps that views hold, at twice their grid: the way back from :func:`view`.

    Args:
        views: (B, VIEW_CHANNELS, h, w).

    Returns:
        (B, len(PARTS) + 1, 2h, 2w) in the form of :func:`probabilities`.
    """
    known = (F.pixel_shuffle(views[:, :MAPS].float(), 2) + 1) / 2
    wall = (1 - known[:, :-1].sum(1, keepdim=True)).clamp(min=0)
    return torch.cat([wall, known], 1)


def coats(maps: Tensor, images: Tensor) -> Tensor:
    """Colours of the cat and of the mouse in each picture: mean and deviation, (B, COATS).

    An animal that is not there gets those of the one that is.
    """
    animal = maps[:, FIRST_ANIMAL_PART:MOUSE].sum(1, keepdim=True).clamp(0, 1)
    mouse = torch.minimum(maps[:, MOUSE:], animal)
    few = 0.002 * animal[0].numel()

    def moments(weight: Tensor, prior: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mass = weight.sum((2, 3)) + few
        mean = ((weight * images).sum((2, 3)) + few * prior[0]) / mass
        away = (images - mean[:, :, None, None]).square()
        return mean, ((weight * away).sum((2, 3)) + few * prior[1]) / mass

    nothing = torch.zeros_like(images[:, :, 0, 0])
    whole = moments(animal, (nothing, nothing))
    each = [moments(weight, whole) for weight in (animal - mouse, mouse)]
    return torch.cat([m for mean, variance in each for m in (mean, variance.sqrt())], 1)


def wear(views: Tensor, wardrobes: list[Tensor], seeds: list[int]) -> Tensor:
    """Views whose animals wear coats from natural pictures taken in much the same light.

    Args:
        views: (B, VIEW_CHANNELS, h, w), standardised.
        wardrobes: for each view, (N, COATS + 3): coats and mean tones of pictures of its class,
            standardised; see `latents.wardrobe`.
        seeds: for each view, the number that draws one of the nearest in tone.
    """
    views = views.clone()
    for view_, clothes, seed in zip(views, wardrobes, seeds, strict=True):
        away = (clothes[:, COATS:].to(views) - view_[-3:].mean((1, 2))).square().sum(1)
        near = away.argsort()[:NEIGHBOURS]
        one = near[np.random.default_rng(seed).integers(len(near))]
        view_[MAPS : MAPS + COATS] = clothes[one, :COATS].to(views)[:, None, None]
    return views


@torch.no_grad()
def look(
    net: StructureNet,
    images: Tensor,
    grid: tuple[int, int],
    *,
    size: int = 64,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Views and part maps of many pictures; the net sees them at the size that it learnt on.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        (N, VIEW_CHANNELS, h, w) float32, coats and tones not standardised, and the maps
        (N, len(PARTS) + 1, size, size).
    """
    device = next(net.parameters()).device
    views, maps = [], []
    for start in range(0, len(images), batch_size):
        batch = (
            images[start : start + batch_size].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        )
        if batch.shape[-2:] != (size, size):
            batch = F.interpolate(batch, size=(size, size), mode="area")
        part = probabilities(net, batch)
        views.append(view(part, batch, grid).cpu())
        maps.append(part.cpu())
    return torch.cat(views), torch.cat(maps)


def tone_statistics(views: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of coats and tones over a domain's training pictures."""
    tones = views[:, MAPS:]
    return tones.mean((0, 2, 3)).tolist(), tones.std((0, 2, 3)).tolist()


def standardise(views: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Views with coats and tones standardised by their own domain's statistics."""
    centre = views.new_tensor(mean)[:, None, None]
    spread = views.new_tensor(std)[:, None, None].clamp(min=1e-3)
    return torch.cat([views[:, :MAPS], (views[:, MAPS:] - centre) / spread], 1)


def exaggerate(
    views: Tensor, generator: torch.Generator, *, head: float, eye: bool = True
) -> Tensor:
    """Views of natural animals as a cartoonist would draw them: larger heads, far larger eyes.

    The two domains' views differ in proportions, and a model trained on exact views would give a
    cat a cartoon's head. Trained on views exaggerated at random, it learns to shrink them back; no
    pairs are needed, only how much larger heads are drawn, which the part maps of the two unpaired
    training sets tell.

    Args:
        views: (B, VIEW_CHANNELS, h, w), standardised.
        head: upper end of the head's magnification; the lower end is 1.
    """
    maps = F.pixel_shuffle(views[:, :MAPS], 2)
    b, _, h, w = maps.shape
    share = (maps + 1) / 2
    # Channels without the wall: index = PARTS index − 1.
    at = {name: PARTS.index(name) - 1 for name in PARTS[1:]}
    face = share[:, [at[n] for n in ("head", "ear", "eye", "nose")]].sum(1).clamp(0, 1)
    mouse = share[:, -1]
    ys = torch.linspace(-1, 1, h).view(1, h, 1)
    xs = torch.linspace(-1, 1, w).view(1, 1, w)
    grid = torch.stack([xs.expand(b, h, w), ys.expand(b, h, w)], -1).clone()
    strength = 1 + (head - 1) * torch.rand(b, 1, 1, generator=generator)
    for part in (face * (1 - mouse), face * mouse):
        mass = part.sum((1, 2), keepdim=True)
        there = (mass > 2).float()
        cx = (part * xs).sum((1, 2), keepdim=True) / mass.clamp(min=1e-3)
        cy = (part * ys).sum((1, 2), keepdim=True) / mass.clamp(min=1e-3)
        radius = (mass / torch.pi).sqrt() * (2 / h)
        dx, dy = xs - cx, ys - cy
        far = (dx.square() + dy.square()).sqrt() / radius.clamp(min=1e-3)
        pull = (1 - 1 / strength) * (1 - ((far - 1) / 1.2).clamp(0, 1)) * there
        grid[..., 0] -= dx * pull
        grid[..., 1] -= dy * pull
    maps = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if eye:
        drawn = F.max_pool2d(maps[:, at["eye"]][:, None], 3, 1, 1)[:, 0]
        grown = torch.rand(b, 1, 1, generator=generator) < 0.8
        gain = torch.where(grown, drawn, maps[:, at["eye"]])
        taken = (gain - maps[:, at["eye"]]) / 2
        maps = maps.clone()
        maps[:, at["eye"]] = gain
        maps[:, at["head"]] = torch.maximum(maps[:, at["head"]] - 2 * taken, torch.tensor(-1.0))
    return torch.cat([F.pixel_unshuffle(maps, 2), views[:, MAPS:]], 1)


def head_ratio(drawn: Tensor, natural: Tensor) -> float:
    """How much larger heads are drawn than they are, along an edge, from unpaired views."""

    def size(views: Tensor) -> float:
        share = (F.pixel_shuffle(views[:, :MAPS].float(), 2) + 1) / 2
        animal = share[:, FIRST_ANIMAL_PART - 1 : MOUSE - 1].sum((1, 2, 3)).clamp(min=1)
        names = ("head", "ear", "eye", "nose")
        face = share[:, [PARTS.index(n) - 1 for n in names]].sum((1, 2, 3))
        return float((face / animal).mean()) ** 0.5

    return size(drawn) / max(size(natural), 1e-6)


def classify(maps: Tensor) -> list[str]:
    """tom, jerry or both, by how much of the picture each animal covers."""
    animal = maps[:, FIRST_ANIMAL_PART:MOUSE].sum((1, 2, 3))
    mouse = maps[:, MOUSE].sum((1, 2))
    share = (mouse / animal.clamp(min=1e-6)).tolist()
    return ["tom" if s < 0.06 else "jerry" if s > 0.90 else "both" for s in share]


def load_structure(path: str | Path) -> StructureNet:
    """The segmenter of a folder, float32, evaluation mode.

    Raises:
        UserError: no such model there.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"no structure net in {path}; make it with `tomjerry foundation structure`")
    net = StructureNet.from_pretrained(str(path), torch_dtype=torch.float32)
    return net.eval()
