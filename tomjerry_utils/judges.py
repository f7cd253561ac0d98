"""The judges: what reads class, action, masks and keypoints off a translated picture.

They are trained on natural scenes of their own range of seeds, with other architectures, starts
and losses than anything in stages 03–05, and only `metrics` may call them: a number that training,
guidance or picking had optimised would say nothing. Two nets:

- `LabelNet`, a small residual net: class (with the fourth answer `cartoon`) and action;
- `PixelNet`, a dilated encoder under a feature pyramid: background, cat or mouse per pixel, and a
  heatmap per keypoint and species.

Both also learn from softened, recoloured and noisy copies, so that a slightly soft translation is
read by what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomjerry_utils import UserError, scenes
from tomjerry_utils.runs import foundation_root, log, read_json, write_json
from tomjerry_utils.training import TrainResult, apply_ema, train

SIZE = 64
ANSWERS = (*scenes.CLASSES, "cartoon")
SPECIES = ("cat", "mouse")
HELD_OUT = 400
POINTS = len(scenes.KEYPOINTS)
CELL = 2  # pixels per heatmap cell
WIDTHS = (24, 48, 80, 128)
PIXEL_WIDTHS = (16, 40, 80)


# ---- the nets ----------------------------------------------------------------------------------


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


# ---- training ----------------------------------------------------------------------------------


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [−1, 1] as a camera or a translator might have given them.

    Half of them are blurred to some degree (a 3×3 mean, or half the resolution as an
    autoencoder's loss of detail); all get other contrasts and tints, and sensor noise.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    count = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    kind, amount = draw(count, 1, 1, 1), draw(count, 1, 1, 1)
    soft = torch.where(kind < 0.3, blurred, coarse)
    images = torch.lerp(images, soft, torch.where(kind < 0.55, amount, torch.zeros_like(amount)))
    gain = 1 + 0.15 * (2 * draw(count, 1, 1, 1) - 1) + 0.06 * (2 * draw(count, 3, 1, 1) - 1)
    lift = 0.10 * (2 * draw(count, 1, 1, 1) - 1) + 0.05 * (2 * draw(count, 3, 1, 1) - 1)
    noise = torch.randn(images.shape, generator=generator)
    return (images * gain + lift + (0.01 + 0.03 * draw(count, 1, 1, 1)) * noise).clamp(-1, 1)


def by_species(seeds: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Keypoints (N, 2, K, 3) in the order of a scene's actors → the cat's, then the mouse's."""
    out = np.array(keypoints, np.float32)
    for i, seed in enumerate(seeds):
        if scenes.describe(int(seed)).cls == "jerry":
            out[i] = out[i, ::-1]
    return out


def _truth(data: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    described = [scenes.describe(int(s)) for s in data["seed"]]
    return {
        "image": torch.from_numpy(data["image"]).permute(0, 3, 1, 2).contiguous(),
        "mask": torch.from_numpy(data["mask"]),
        "points": torch.from_numpy(by_species(data["seed"], data["keypoints"])),
        "answer": torch.tensor([scenes.CLASSES.index(s.cls) for s in described]),
        "action": torch.tensor([scenes.ACTIONS.index(s.action) for s in described]),
    }


def train_judges(
    work: Path, pictures: Callable[[str], dict[str, np.ndarray]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Train both nets and measure them on held-out scenes of their own range.

    Args:
        work: folder for checkpoints; one that stopped half-way goes on from there.
        pictures: gives "judged" (natural) and "judged cartoon" scenes with their truth.
        options: `label_steps`, `pixel_steps`, `batch_size`, `learning_rate`.

    Returns:
        save (folder → None), seconds, history and held_out, as `foundation` ships them.
    """
    natural, drawn = pictures("judged"), pictures("judged cartoon")
    held = {k: v[-HELD_OUT:] for k, v in natural.items()}
    data = _truth({k: v[:-HELD_OUT] for k, v in natural.items()})
    cartoons = torch.from_numpy(drawn["image"]).permute(0, 3, 1, 2).contiguous()
    size = options["batch_size"]
    torch.manual_seed(31)
    labels = LabelNet()
    torch.manual_seed(32)
    pixels = PixelNet()

    def pick(count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(data["image"]), (count,), generator=generator)

    def label_batch(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        fakes = size // 8
        index = pick(size - fakes, generator)
        other = torch.randint(len(cartoons), (fakes,), generator=generator)
        images = torch.cat([data["image"][index], cartoons[other]]).float() / 127.5 - 1
        answer = torch.cat([data["answer"][index], torch.full((fakes,), len(ANSWERS) - 1)])
        action = torch.cat([data["action"][index], torch.full((fakes,), -1)])
        mirror = torch.rand(size, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirror, images.flip(3), images)
        dx, dy = torch.randint(0, 7, (2,), generator=generator).tolist()
        images = F.pad(images, (3, 3, 3, 3), mode="reflect")[..., dy : dy + SIZE, dx : dx + SIZE]
        return soften(images, generator), answer, action

    def pixel_batch(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        index = pick(size // 2, generator)
        images = data["image"][index].float() / 127.5 - 1
        mask, points = data["mask"][index].long(), data["points"][index].clone()
        # Near and far are counted from the camera, so mirroring swaps no names.
        mirror = torch.rand(len(index), generator=generator) < 0.5
        images[mirror], mask[mirror] = images[mirror].flip(3), mask[mirror].flip(2)
        points[mirror, ..., 0] = SIZE - points[mirror, ..., 0]
        return soften(images, generator), mask, points

    def look(step: int, modules: dict[str, Any]) -> None:
        if step % 500 == 0:
            scores = held_out(Judges(labels, pixels), held)
            kept = ("class", "action") if "labels" in modules else ("iou_cat", "iou_mouse", "pck")
            log(f"judges {step}: " + ", ".join(f"{name} {scores[name]:.4f}" for name in kept))

    common: dict[str, Any] = {
        "learning_rate": options["learning_rate"], "warmup_steps": 50, "ema_decay": 0.995,
        "weight_decay": 0.02, "precision": "bf16", "log_every": 100, "threads": 1,
        "keep_checkpoint": True, "on_log": look,
    }  # fmt: skip
    results: dict[str, TrainResult] = {}
    results["labels"] = train(
        {"labels": labels}, lambda b, s, g: label_loss(labels, *b), label_batch,
        steps=options["label_steps"], folder=work / "labels", seed=31,
        describe="judge of class and action", **common,
    )  # fmt: skip
    apply_ema({"labels": labels}, results["labels"])
    results["pixels"] = train(
        {"pixels": pixels}, lambda b, s, g: pixel_loss(pixels, *b), pixel_batch,
        steps=options["pixel_steps"], folder=work / "pixels", seed=32,
        describe="judge of masks and keypoints", **common,
    )  # fmt: skip
    apply_ema({"pixels": pixels}, results["pixels"])

    judges = Judges(labels.eval(), pixels.eval())
    rows = [{"judge": name, **row} for name, r in results.items() for row in r.history]
    return {
        "save": judges.save,
        "seconds": sum(r.seconds for r in results.values()),
        "history": rows,
        "held_out": held_out(judges, held),
        "held_out_scenes": len(held["seed"]),
    }


def held_out(judges: Judges, data: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The judges' own accuracy on natural scenes, with the camera's noise, without mirroring."""
    rng = np.random.default_rng(0)
    seen = data["image"] / 255 + 0.01 * rng.standard_normal(data["image"].shape)
    images = (seen.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    truth = _truth(data)
    masks = judges.segment(images)
    scores = {
        "class": float((judges.classify(images).argmax(1) == truth["answer"].numpy()).mean()),
        "action": float((judges.actions(images).argmax(1) == truth["action"].numpy()).mean()),
    }
    for which, name in enumerate(SPECIES, 1):
        true, found = data["mask"] == which, masks == which
        there = true.any((1, 2))
        ratio = (true & found).sum((1, 2)) / np.maximum((true | found).sum((1, 2)), 1)
        scores[f"iou_{name}"] = float(ratio[there].mean())
    points, found_points = truth["points"].numpy(), judges.keypoints(images)
    hits = []
    for i, which in zip(*np.nonzero(points[..., 2].any(2)), strict=True):
        ys, xs = np.nonzero(data["mask"][i] == which + 1)
        if len(ys) == 0:
            continue
        reach = 0.1 * np.hypot(np.ptp(ys) + 1, np.ptp(xs) + 1)
        away = np.hypot(*(found_points[i, which] - points[i, which])[:, :2].T)
        hits.extend((away <= reach)[points[i, which, :, 2] > 0])
    scores["pck"] = float(np.mean(hits))
    return {name: round(value, 4) for name, value in scores.items()}


# ---- the judges at work ------------------------------------------------------------------------


@dataclass
class Judges:
    """All four judgements on pictures; uint8 (N, H, W, 3), any size: they are resized to 64 px."""

    labels: LabelNet
    pixels: PixelNet

    def classify(self, images: np.ndarray) -> np.ndarray:
        """(N, 4) probabilities over tom, jerry, both (cat, mouse, both in life), cartoon."""
        return _run(self.labels, images, lambda out: out[0].float().softmax(1))

    def actions(self, images: np.ndarray) -> np.ndarray:
        """(N, 6) probabilities over ``scenes.ACTIONS``."""
        return _run(self.labels, images, lambda out: out[1].float().softmax(1))

    def segment(self, images: np.ndarray) -> np.ndarray:
        """(N, 64, 64) uint8: 0 background, 1 cat, 2 mouse."""
        return _run(self.pixels, images, lambda out: out[0].argmax(1).to(torch.uint8))

    def keypoints(self, images: np.ndarray) -> np.ndarray:
        """(N, 2, K, 3): x, y in pixels of 64, confidence; the cat's first, then the mouse's."""
        found = _run(self.pixels, images, lambda out: locate(out[1]))
        return found.reshape(len(found), 2, POINTS, 3)

    def save(self, folder: str | Path) -> None:
        """Write both nets, fp16, each with its config."""
        from safetensors.torch import save_file

        for name, net in (("labels", self.labels), ("pixels", self.pixels)):
            path = Path(folder) / name
            path.mkdir(parents=True, exist_ok=True)
            half = {
                k: (v.half() if v.is_floating_point() else v).contiguous()
                for k, v in net.state_dict().items()
            }
            save_file(half, path / "model.safetensors")
            config = {"net": type(net).__name__, "widths": list(net.widths), "image_size": SIZE}
            if name == "labels":
                config |= {"answers": list(ANSWERS), "actions": list(scenes.ACTIONS)}
            else:
                config |= {"masks": ["background", *SPECIES], "points": list(scenes.KEYPOINTS)}
            write_json(path / "config.json", config)


def _run(net: nn.Module, images: np.ndarray, read: Callable[[Any], Tensor]) -> np.ndarray:
    """Apply a net in batches of 64 and read something off its output."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images: want uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    if images.shape[1:3] != (SIZE, SIZE):
        from PIL import Image

        images = np.stack(
            [
                np.asarray(Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
                for i in images
            ]
        )
    out = []
    training = net.training
    net.eval()
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + 64]))
            out.append(read(net(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1)).numpy())
    net.train(training)
    return np.concatenate(out)


def load_judges(folder: str | Path | None = None) -> Judges:
    """The judges of a folder, by default those that ship with the kit; float32, evaluation mode.

    Raises:
        UserError: no judges there, or a broken file.
    """
    place = Path(folder) if folder is not None else foundation_root() / "judges"
    return _load(place.resolve())


@lru_cache(maxsize=4)
def _load(folder: Path) -> Judges:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    nets: list[Any] = []
    for name, kind in (("labels", LabelNet), ("pixels", PixelNet)):
        try:
            net = kind(tuple(read_json(folder / name / "config.json")["widths"]))
            net.load_state_dict(load_file(folder / name / "model.safetensors"))
        except FileNotFoundError:
            raise UserError(
                f"no judges in {folder}; make them with `tomjerry foundation judges`"
            ) from None
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder / name}: not a judge that can be read ({str(error).splitlines()[0]}); "
                "make it anew with `tomjerry foundation judges`"
            ) from None
        nets.append(net.eval())
    return Judges(*nets)
