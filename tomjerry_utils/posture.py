"""Posture: where an animal's joints are in a picture, and the body a natural animal has there.

A drawn cat has another head, other paws and other eyes than a cat, so the drawing's part map,
however well it is read, is the wrong shape to fill with fur. What both domains share is the pose.
Three steps take a picture's pose across, learnt without any pair:

1. :class:`PoseNet` finds each animal's keypoints, in drawings and photographs alike;
2. :class:`Alignment` moves a drawing's keypoints to where natural animals of its class and action
   have theirs: mean and deviation of each coordinate, over each domain's own training pictures;
3. :class:`LayoutNet`, which has only ever seen natural animals, draws the part map of a natural
   body on those keypoints.

The result replaces the animal in the picture's own part map (:func:`pose_again`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.scenes import ACTIONS, CLASSES, KEYPOINTS
from tomjerry_utils.structure import FIRST_ANIMAL_PART, MOUSE, UNet

ANIMALS = 2  # the cat's keypoints first, then the mouse's
POINTS = len(KEYPOINTS)
BODY = MOUSE - FIRST_ANIMAL_PART  # parts that an animal has
SPREAD = 1.5 / 64  # deviation of a keypoint's spot on the map that LayoutNet reads
FEWEST = 8  # pictures of a class and action; below it the statistics of all actions serve
ALIGNMENT = "alignment.safetensors"
_NOSE, _HIP = KEYPOINTS.index("nose"), KEYPOINTS.index("hip")


class PoseNet(UNet):
    """A U-Net from pictures to keypoints.

    Input (B, 3, H, W) in [−1, 1], H and W multiples of 16; output (B, 2·POINTS, H/2, W/2): for each
    keypoint of the cat and of the mouse the logits of where it is.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (24, 40, 64, 96)) -> None:
        super().__init__()
        self._build(3, channels)
        self.out = nn.Conv2d(channels[0], ANIMALS * POINTS, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self._features(images))


class LayoutNet(UNet):
    """A U-Net from keypoints to the part map of natural animals.

    Input: spots (B, 2·POINTS, H, W) from :func:`spots`; output (B, BODY + 2, H, W): one softmax
    over the background and the animals' parts, and, last, the logit of "this is the mouse".
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (24, 40, 64, 96)) -> None:
        super().__init__()
        self._build(ANIMALS * POINTS, channels)
        self.head = nn.Conv2d(channels[0], 4 * 24, 1)
        self.out = nn.Conv2d(24, BODY + 2, 3, padding=1)

    def forward(self, points: Tensor) -> Tensor:
        return self.out(F.silu(F.pixel_shuffle(self.head(self._features(points)), 2)))


def spots(points: Tensor, there: Tensor, size: int) -> Tensor:
    """Keypoints as a picture: a Gaussian spot each, (B, 2·POINTS, size, size).

    Args:
        points: (B, 2, POINTS, 2) x and y in shares of the picture.
        there: (B, 2), 1 where the cat and the mouse are in the picture; others leave no spot.
    """
    at = (torch.arange(size, device=points.device) + 0.5) / size
    across, down = (
        (-0.5 * ((at - points[..., axis : axis + 1]) / SPREAD).square()).exp() for axis in (0, 1)
    )
    drawn = down[..., :, None] * across[..., None, :]
    return (drawn * there[:, :, None, None, None]).flatten(1, 2)


def expected(logits: Tensor) -> Tensor:
    """The mean place of each keypoint under its softmax: (B, 2, POINTS, 2) in shares."""
    b, _, h, w = logits.shape
    chance = logits.float().flatten(2).softmax(-1).view(b, ANIMALS, POINTS, h, w)
    x = (chance.sum(-2) * (torch.arange(w, device=logits.device) + 0.5)).sum(-1) / w
    y = (chance.sum(-1) * (torch.arange(h, device=logits.device) + 0.5)).sum(-1) / h
    return torch.stack([x, y], -1)


def pose_loss(
    net: PoseNet, images: Tensor, points: Tensor, there: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy with a soft target around each keypoint, and its distance in pixels of 64.

    Args:
        images: (B, 3, H, W); points: (B, 2, POINTS, 2) in shares; there: (B, 2).
    """
    logits = net(images).float()
    # No answer lies outside the picture: a paw beyond the edge is looked for at the edge.
    points = points.clamp(0, 1)
    wanted = spots(points, torch.ones_like(there), logits.shape[-1]).flatten(2)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-8)
    counted = there.repeat_interleave(POINTS, 1)
    each = -(wanted * logits.flatten(2).log_softmax(-1)).sum(-1)
    spot_loss = (each * counted).sum() / counted.sum().clamp(min=1)
    away = 64 * (expected(logits) - points).norm(dim=-1).flatten(1)
    distance = (away * counted).sum() / counted.sum().clamp(min=1)
    return spot_loss + 0.2 * distance, {"pixels": distance.detach()}


def layout_loss(
    net: LayoutNet, points: Tensor, there: Tensor, parts: Tensor, mouse: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the parts, small ones weighted up, plus that of "mouse" on animal pixels.

    Args:
        points: (B, 2, POINTS, 2) in shares; there: (B, 2).
        parts: (B, H, W) long into `scenes.PARTS`; mouse: (B, H, W) bool.
    """
    logits = net(spots(points, there, parts.shape[-1])).float()
    body = (parts - FIRST_ANIMAL_PART + 1).clamp(min=0)
    weight = torch.ones(BODY + 1, device=logits.device)
    weight[3:6] = 2.0  # ear, eye and nose: a few pixels each
    part_loss = F.cross_entropy(logits[:, :-1], body, weight=weight)
    each = F.binary_cross_entropy_with_logits(logits[:, -1], mouse.float(), reduction="none")
    animal = body > 0
    mouse_loss = (each * animal).sum() / animal.sum().clamp(min=1)
    found = logits[:, :-1].argmax(1) > 0
    overlap = (found & animal).sum() / (found | animal).sum().clamp(min=1)
    return part_loss + 0.3 * mouse_loss, {"iou": overlap.float()}


@dataclass(eq=False)
class Alignment:
    """Where keypoints are in each domain: tensors (classes, actions + 1, 2, POINTS, 2, 2).

    Unpaired, but not without an assumption: within a class and action, both sets show the same
    mixture of poses and places.

    The last axis holds mean and deviation, in shares; the last action stands for all of them.
    Animals that face left are mirrored first, so both directions share their statistics.
    """

    drawn: Tensor
    natural: Tensor

    def __call__(
        self,
        points: Tensor,
        classes: Sequence[str],
        actions: Sequence[str | None],
        seen: Sequence[str] | None = None,
    ) -> Tensor:
        """A drawing's keypoints (B, 2, POINTS, 2) where a natural animal would have them.

        Args:
            seen: the classes in the drawings, where other ones are asked for.
        """
        seen = seen or classes
        of = takes_pose_of(classes, seen)
        points = _taken(points, of)
        left = faces_left(points, classes)
        folded = mirrored(points, left)
        crossed = (of != takes_pose_of(classes, classes)).any(1).tolist()
        asked = torch.tensor([CLASSES.index(name) for name in classes])
        own = torch.tensor(
            [
                CLASSES.index(s if c else name)
                for s, c, name in zip(seen, crossed, classes, strict=True)
            ]
        )
        known = (*ACTIONS, None)
        columns = torch.tensor([known.index(a if a in ACTIONS else None) for a in actions])
        mean, std = _taken(self.drawn[own, columns], of).to(points).unbind(-1)
        to_mean, to_std = self.natural[asked, columns].to(points).unbind(-1)
        # A coordinate that hardly varies in drawings says nothing: its gain stays near 1.
        gain = (to_std + 0.01) / (std + 0.01)
        return mirrored((folded - mean) * gain + to_mean, left)


def takes_pose_of(classes: Sequence[str], seen: Sequence[str]) -> Tensor:
    """(B, 2): whose pose the cat and the mouse take, 0 the cat's and 1 the mouse's.

    Each its own, except where one alone is asked for and the other alone is seen.
    """
    alone = {("jerry", "tom"): [0, 0], ("tom", "jerry"): [1, 1]}
    return torch.tensor([alone.get(pair, [0, 1]) for pair in zip(classes, seen, strict=True)])


def _taken(each: Tensor, of: Tensor) -> Tensor:
    """Rows (B, 2, …) of both animals, each replaced by those of the animal named in (B, 2)."""
    return each[torch.arange(len(each))[:, None], of.to(each.device)]


def statistics(points: Tensor, classes: Sequence[str], actions: Sequence[str | None]) -> Tensor:
    """Mean and deviation of a domain's keypoints by class and action: one side of `Alignment`.

    Args:
        points: (N, 2, POINTS, 2) from `find`; classes: N of tom, jerry, both; actions: N names, or
            None where a caption names none.
    """
    folded = mirrored(points, faces_left(points, classes))
    everywhere = torch.stack([folded.mean(0), folded.std(0)], -1)
    out = []
    for name in CLASSES:
        own = torch.tensor([c == name for c in classes])
        rows = []
        for action in (*ACTIONS, None):
            chosen = own & torch.tensor([action in (None, a) for a in actions])
            some = folded[chosen]
            rows.append(
                torch.stack([some.mean(0), some.std(0)], -1) if len(some) >= FEWEST else None
            )
        whole = everywhere if rows[-1] is None else rows[-1]
        out.append(torch.stack([whole if row is None else row for row in rows]))
    return torch.stack(out)


def present(classes: Sequence[str]) -> Tensor:
    """(B, 2): which animals a class has, cat first."""
    return torch.tensor([[float(c != "jerry"), float(c != "tom")] for c in classes])


def faces_left(points: Tensor, classes: Sequence[str]) -> Tensor:
    """(B,) bool: the nose is left of the hip, the cat's where there is one."""
    ahead = points[:, :, _NOSE, 0] - points[:, :, _HIP, 0]
    cat = present(classes)[:, 0].bool().to(points.device)
    return torch.where(cat, ahead[:, 0], ahead[:, 1]) < 0


def mirrored(points: Tensor, which: Tensor) -> Tensor:
    """Keypoints (B, 2, POINTS, 2), those of the pictures in `which` (B,) bool seen in a mirror."""
    x = torch.where(which[:, None, None], 1 - points[..., 0], points[..., 0])
    return torch.stack([x, points[..., 1]], -1)


@dataclass(eq=False)
class Posture:
    """The two nets and, once both domains are known, how their keypoints are aligned."""

    finder: PoseNet
    layout: LayoutNet
    alignment: Alignment | None = None

    def to(self, device: torch.device | str) -> Posture:
        """Both nets on a device."""
        self.finder.to(device)
        self.layout.to(device)
        return self

    def pose(
        self,
        images: Tensor,
        maps: Tensor,
        classes: Sequence[str],
        actions: Sequence[str | None] | None = None,
        *,
        seen: Sequence[str] | None = None,
        drawn: float = 0.0,
    ) -> Tensor:
        """Part maps with natural bodies in the animals' poses.

        Args:
            images: (N, H, W, 3) uint8; maps: theirs, from `structure.look`.
            classes: tom, jerry or both; only a class's animals are drawn.
            actions, seen, drawn: see :meth:`points`.
        """
        points = self.points(images, classes, actions, seen=seen, drawn=drawn)
        return pose_again(maps, self.bodies(points, present(classes), size=maps.shape[-1]))

    def points(
        self,
        images: Tensor,
        classes: Sequence[str],
        actions: Sequence[str | None] | None = None,
        *,
        seen: Sequence[str] | None = None,
        drawn: float = 0.0,
    ) -> Tensor:
        """Keypoints (N, 2, POINTS, 2) where natural animals of a class have them.

        Args:
            images: (N, H, W, 3) uint8; classes: tom, jerry or both.
            actions: of drawings, whose keypoints are aligned; None for natural pictures.
            seen: the classes in the pictures, where they are others: a cat that is asked for where
                a mouse alone is seen takes the mouse's pose, and the other way round.
            drawn: share of the way back from the aligned keypoints to those of the drawings.
        """
        found, seen = self.find(images), seen or classes
        if actions is None or self.alignment is None:
            return _taken(found, takes_pose_of(classes, seen))
        aligned = self.alignment(found, classes, actions, seen)
        return torch.lerp(aligned, _taken(found, takes_pose_of(classes, seen)), drawn)

    def save(self, folder: Path) -> None:
        """Write both nets and the alignment into a folder."""
        self.finder.save_pretrained(folder / "pose")
        self.layout.save_pretrained(folder / "layout")
        if self.alignment is not None:
            save_file(vars(self.alignment), folder / ALIGNMENT)

    @torch.no_grad()
    def find(self, images: Tensor, *, size: int = 64, batch_size: int = 64) -> Tensor:
        """Keypoints (N, 2, POINTS, 2) in shares of the pictures (N, H, W, 3) uint8."""
        device = self.finder.device
        out = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device).permute(0, 3, 1, 2).float()
            batch = batch / 127.5 - 1
            if batch.shape[-2:] != (size, size):
                batch = F.interpolate(batch, size=(size, size), mode="area")
            out.append(expected(self.finder(batch)).cpu())
        return torch.cat(out)

    @torch.no_grad()
    def bodies(self, points: Tensor, there: Tensor, *, size: int, batch_size: int = 64) -> Tensor:
        """Part maps of natural animals on keypoints: (N, BODY + 1, size, size) in [0, 1].

        The parts' probabilities, and each pixel's share of the mouse.
        """
        out = []
        for start in range(0, len(points), batch_size):
            some = slice(start, start + batch_size)
            drawn = spots(points[some], there[some], size).to(self.layout.device)
            logits = self.layout(drawn).float().cpu()
            parts = logits[:, :-1].softmax(1)[:, 1:]
            animal = parts.sum(1, keepdim=True)
            out.append(torch.cat([parts, logits[:, -1:].sigmoid() * animal], 1))
        return torch.cat(out)


def pose_again(maps: Tensor, bodies: Tensor) -> Tensor:
    """Part maps in which other bodies take the animals' place.

    Where the old animal hid the room and the new one does not, the room is filled in from around.

    Args:
        maps: (B, len(PARTS) + 1, H, W) from `structure.probabilities`.
        bodies: (B, BODY + 1, H, W) from :meth:`Posture.bodies`.
    """
    room = maps[:, :FIRST_ANIMAL_PART]
    seen = room.sum(1, keepdim=True)
    # Ever wider averages of what is seen: the narrowest that has seen anything decides.
    filled, known = room, seen
    for width in (3, 7, 15, 31, 63):
        pad = width // 2
        mean = F.avg_pool2d(room, width, 1, pad, count_include_pad=False)
        mass = F.avg_pool2d(seen, width, 1, pad, count_include_pad=False)
        missing = (1 - known).clamp(min=0)
        filled = filled + missing * mean
        known = known + missing * mass
    filled = filled / filled.sum(1, keepdim=True).clamp(min=1e-6)
    left = (1 - bodies[:, :BODY].sum(1, keepdim=True)).clamp(0, 1)
    return torch.cat([filled * left, bodies], 1)


def load_posture(path: str | Path, alignment: Path | None = None) -> Posture:
    """The two nets of a folder, float32, evaluation mode, with the alignment if there is one.

    Args:
        alignment: its file, which must be there; by default one in the same folder, if any.

    Raises:
        UserError: no such models, or no such alignment.
    """
    folder = Path(path)
    if not (folder / "pose" / "config.json").is_file():
        raise UserError(f"no posture nets in {path}; make them with `tomjerry foundation posture`")
    pose, layout = (
        kind.from_pretrained(str(folder / name), torch_dtype=torch.float32).eval()
        for kind, name in ((PoseNet, "pose"), (LayoutNet, "layout"))
    )
    assert isinstance(pose, PoseNet)
    assert isinstance(layout, LayoutNet)
    if alignment is not None and not alignment.is_file():
        raise UserError(f"no alignment in {alignment.parent}: copy or make the translator anew")
    stored = alignment or folder / ALIGNMENT
    return Posture(pose, layout, Alignment(**load_file(stored)) if stored.is_file() else None)
