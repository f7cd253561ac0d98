"""Staging: what a free sample of stage 04 shows, drawn at random before it is painted.

p(z | c) = Σ_v p(v | c) p(z | v, c). A few minutes of training teach a denoiser the second factor,
painting what a view shows, long before the first, inventing a room with an animal in it. The first
is therefore estimated from the training views themselves, taken apart and put together anew:

- a room, with its tones, is one picture's;
- the pose is drawn from a smoothed bootstrap over the pictures of the class: another picture's
  keypoints, pulled towards their mean and given back as much spread at random, as they covary; the
  posture nets draw the natural body. Cartoon bodies, which those nets do not know, are another
  picture's whole;
- coats come from pictures of the class in similar light (:func:`structure.wear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tomjerry_utils import blip, posture, structure
from tomjerry_utils.latents import LatentSet, wardrobe
from tomjerry_utils.scenes import CLASSES, LABELS

_SIZE = 64  # px of the maps that the posture nets learnt to draw
SMOOTHING = 0.6  # h of :func:`smoothed`


def smoothed(
    points: Tensor, count: int, generator: torch.Generator, h: float = SMOOTHING
) -> Tensor:
    """Draw from the smoothed bootstrap of some vectors, which keeps their mean and covariance.

    Args:
        points: (N, ...) with N ≥ 2.
        h: 0 draws the vectors themselves, 1 a Gaussian with their moments.

    Returns:
        (count, ...): √(1 − h²) times a drawn vector's deviation from the mean, and h times a
        Gaussian with the vectors' covariance (Silverman and Young 1987).
    """
    flat = points.flatten(1)
    away = flat - flat.mean(0)
    chosen = away[torch.randint(len(flat), (count,), generator=generator)]
    # Random weights of the deviations have their covariance, whatever its rank.
    weights = torch.randn((count, len(flat)), generator=generator) / (len(flat) - 1) ** 0.5
    drawn = flat.mean(0) + (1 - h * h) ** 0.5 * chosen + h * weights @ away
    return drawn.unflatten(1, points.shape[1:])


def posed_views(
    data: LatentSet, images: Tensor, net: structure.StructureNet, nets: posture.Posture
) -> Tensor:
    """Views of natural pictures, each with the posture nets' body in its own pose.

    Args:
        data: the pictures as latents; images: themselves, (N, H, W, 3) uint8.

    Returns:
        (N, VIEW_CHANNELS, h, w) float16. A picture without a class keeps its own shapes.
    """
    known = [i for i, name in enumerate(data.classes()) if name is not None]
    names = [name for name in data.classes() if name is not None]
    grid = (data.views.shape[-2], data.views.shape[-1])
    views = data.views.clone()
    for start in range(0, len(known), 256):
        some, named = known[start : start + 256], names[start : start + 256]
        _, maps = structure.look(net, images[some], grid)
        shaped = structure.reshape(views[some].float(), nets.pose(images[some], maps, named))
        views[some] = shaped.to(views.dtype)
    return views


@dataclass(eq=False)
class Stage:
    """What views are put together from.

    Attributes:
        cartoon, natural: the training pictures of each domain.
        points: (N, 2, POINTS, 2), the natural pictures' keypoints, of animals that face right.
        actions: their captions' actions, None where a caption names none.
    """

    cartoon: LatentSet
    natural: LatentSet
    nets: posture.Posture
    points: Tensor
    actions: Sequence[str | None]

    def views(self, label: str, count: int, generator: torch.Generator) -> Tensor:
        """Views of new scenes, (count, VIEW_CHANNELS, h, w), tones and coats standardised.

        Args:
            label: of `scenes.LABELS`; pictures of its whole domain serve where none has it.
        """
        natural = LABELS.index(label) >= len(CLASSES)
        data = self.natural if natural else self.cartoon
        rows = (data.labels == LABELS.index(label)).nonzero()[:, 0]
        if len(rows) < 2:
            rows = torch.arange(len(data))

        def some() -> Tensor:
            return rows[torch.randint(len(rows), (count,), generator=generator)]

        rooms, actors = data.views[some()].float(), some()
        if natural:
            name = CLASSES[LABELS.index(label) % len(CLASSES)]
            points = self._poses(rows, actors, generator)
            left = torch.rand(count, generator=generator) < 0.5
            points = posture.mirrored(points, left)
            bodies = self.nets.bodies(points, posture.present([name] * count), size=_SIZE)
        else:
            borrowed = data.views[actors].float()
            bodies = _maps(borrowed)[:, structure.FIRST_ANIMAL_PART :]
            coats = slice(structure.MAPS, structure.MAPS + structure.COATS)
            rooms[:, coats] = borrowed[:, coats]
        views = structure.reshape(rooms, posture.pose_again(_maps(rooms), bodies))
        if natural:
            seeds = torch.randint(2**31, (count,), generator=generator).tolist()
            views = structure.wear(views, [wardrobe(data)[name]] * count, seeds)
        return views

    def _poses(self, rows: Tensor, actors: Tensor, generator: torch.Generator) -> Tensor:
        """A new pose for each actor, like those of the class's pictures with its action."""
        out = torch.empty(len(actors), *self.points.shape[1:])
        acts = [self.actions[int(i)] for i in actors]
        for action in sorted(set(acts), key=str):
            alike = [int(i) for i in rows if self.actions[int(i)] == action]
            group = self.points[alike if len(alike) >= posture.FEWEST else rows]
            here = [i for i, act in enumerate(acts) if act == action]
            out[here] = smoothed(group, len(here), generator)
        return out


def _maps(views: Tensor) -> Tensor:
    """Part maps of views at the size that the posture nets draw at."""
    return F.interpolate(structure.drawn_maps(views), size=(_SIZE, _SIZE), mode="bilinear")


def stage_for(
    cartoon: LatentSet, natural: LatentSet, images: Tensor, nets: posture.Posture
) -> Stage:
    """A stage of training pictures.

    Args:
        images: (N, H, W, 3) uint8, the natural ones.
    """
    # A picture without a class tells nothing of poses by class, but must have a place in the row.
    names = [name or CLASSES[-1] for name in natural.classes()]
    points = nets.find(images)
    written = [blip.caption_slots(natural.texts[int(row)])["action"] for row in natural.row]
    return Stage(
        cartoon, natural, nets, posture.mirrored(points, posture.faces_left(points, names)), written
    )
