"""The judges' two nets and their losses; `judges` trains and uses them.

- `LabelNet`, a small residual net: class (with the fourth answer `cartoon`) and action;
- `PixelNet`, a dilated encoder under a feature pyramid: background, cat or mouse per pixel, and a
  heatmap per keypoint and species.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomjerry_utils import scenes

ANSWERS = (*scenes.CLASSES, "cartoon")
POINTS = len(scenes.KEYPOINTS)
CELL = 2  # pixels per heatmap cell
WIDTHS = (24, 48, 80, 128)
PIXEL_WIDTHS = (16, 40, 80)


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride)
        self.second = _conv(outputs, outputs, dilation=dilation)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(
            nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class LabelNet(nn.Module):
    """A residual net 64 → 32 → 16 → 8.

    Input (B, 3, 64, 64) in [−1, 1]; output logits (B, 4) over :data:`ANSWERS` and (B, 6) over
    ``scenes.ACTIONS``.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.widths = widths
        self.stem = _conv(3, widths[0])
        self.stages = nn.Sequential(
            *(_Residual(a, b, stride=2) for a, b in pairwise(widths)),
            _Residual(widths[-1], widths[-1]),
        )
        self.dropout = nn.Dropout(0.1)
        self.answer = nn.Linear(2 * widths[-1], len(ANSWERS))
        self.action = nn.Linear(2 * widths[-1], len(scenes.ACTIONS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stages(F.relu(self.stem(images)))
        x = self.dropout(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return self.answer(x), self.action(x)


class PixelNet(nn.Module):
    """A dilated encoder (64, 32, 16) under a feature pyramid.

    Input (B, 3, 64, 64) in [−1, 1]; output mask logits (B, 3, 64, 64) over background, cat, mouse
    and heatmap logits (B, 2·K, 32, 32), the cat's keypoints first.
    """

    def __init__(self, widths: tuple[int, ...] = PIXEL_WIDTHS) -> None:
        super().__init__()
        self.widths = widths
        fine, middle, coarse = widths
        self.stem = _conv(3, fine)
        self.middle = nn.Sequential(_conv(fine * 4, middle), nn.ReLU(), _Residual(middle, middle))
        self.coarse = nn.Sequential(
            _Residual(middle, coarse, stride=2, dilation=1),
            _Residual(coarse, coarse, dilation=2),
            _Residual(coarse, coarse, dilation=4),
        )
        self.whole = nn.Linear(coarse, coarse)
        self.lateral = nn.Conv2d(coarse, middle, 1)
        self.merge = _Residual(middle, middle)
        self.points = nn.Sequential(
            _conv(middle, middle), nn.ReLU(), nn.Conv2d(middle, 2 * POINTS, 1)
        )
        self.finer = nn.Conv2d(middle, 4 * fine, 1)
        self.smooth = _conv(2 * fine, 2 * fine)
        self.mask = nn.Conv2d(2 * fine, 3, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.stem(images))
        middle = self.middle(F.pixel_unshuffle(fine, 2))
        coarse = self.coarse(middle)
        # Which animals are in the picture at all is seen only from the whole of it.
        coarse = coarse + self.whole(coarse.mean((2, 3)))[:, :, None, None]
        up = F.interpolate(self.lateral(coarse), scale_factor=2.0, mode="bilinear")
        middle = self.merge(middle + up)
        up = F.pixel_shuffle(self.finer(middle), 2)
        out = F.relu(self.smooth(torch.cat([fine, up], 1)))
        return self.mask(out), self.points(middle)


def locate(heatmaps: Tensor) -> Tensor:
    """Where heatmaps peak, to a fraction of a cell.

    The soft-argmax is taken over the 5×5 cells around the highest one, so that a second hill
    elsewhere does not pull the point into the valley between.

    Args:
        heatmaps: (B, N, h, w) logits.

    Returns:
        (B, N, 3): x and y in pixels of the picture, and the share of probability in the window.
    """
    batch, count, height, width = heatmaps.shape
    chance = heatmaps.float().flatten(2).softmax(2)
    best = chance.argmax(2)
    rows, cols = (best // width)[:, :, None, None], (best % width)[:, :, None, None]
    y = torch.arange(height, device=chance.device).view(1, 1, -1, 1)
    x = torch.arange(width, device=chance.device).view(1, 1, 1, -1)
    window = ((y - rows).abs() <= 2) & ((x - cols).abs() <= 2)
    chance = chance.view(batch, count, height, width) * window
    mass = chance.sum((2, 3))
    centre_x = (chance * (x + 0.5)).sum((2, 3)) / mass
    centre_y = (chance * (y + 0.5)).sum((2, 3)) / mass
    return torch.stack([CELL * centre_x, CELL * centre_y, mass], 2)


# ---- losses ------------------------------------------------------------------------------------


def label_loss(net: LabelNet, images: Tensor, answer: Tensor, action: Tensor) -> Any:
    """Cross-entropy of class and of action; action −1 (a cartoon) does not count."""
    answers, actions = net(images)
    first = F.cross_entropy(answers.float(), answer)
    second = F.cross_entropy(actions.float(), action, ignore_index=-1)
    return first + second, {"class_loss": first.detach(), "action_loss": second.detach()}


def pixel_loss(net: PixelNet, images: Tensor, mask: Tensor, points: Tensor) -> Any:
    """Cross-entropy and overlap (soft Dice) of the mask, cross-entropy of the heatmaps.

    Args:
        images: (B, 3, 64, 64); mask: (B, 64, 64) long; points: (B, 2, K, 3) in pixels, visible.
    """
    logits, heatmaps = net(images)
    logits = logits.float()
    cross = F.cross_entropy(logits, mask)
    chance = logits.softmax(1)[:, 1:]
    true = F.one_hot(mask, 3).permute(0, 3, 1, 2)[:, 1:].float()
    overlap = 2 * (chance * true).sum((0, 2, 3)) + 1
    dice = (1 - overlap / (chance.sum((0, 2, 3)) + true.sum((0, 2, 3)) + 1)).mean()

    points = points.flatten(1, 2)
    cells = torch.arange(heatmaps.shape[-1], device=images.device) + 0.5
    away_x = (cells - points[..., 0:1] / CELL).square()
    away_y = (cells - points[..., 1:2] / CELL).square()
    wanted = torch.exp(-0.5 * (away_y[..., :, None] + away_x[..., None, :]) / 0.8**2).flatten(2)
    wanted = wanted / wanted.sum(2, keepdim=True).clamp(min=1e-6)
    each = -(wanted * heatmaps.float().flatten(2).log_softmax(2)).sum(2)
    seen = points[..., 2]
    spot = (each * seen).sum() / seen.sum().clamp(min=1)
    loss = 2 * cross + dice + 0.3 * spot
    return loss, {"mask_loss": cross.detach(), "dice": dice.detach(), "point_loss": spot.detach()}
