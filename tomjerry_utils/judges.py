"""The judges: what reads class, action, masks and keypoints off a translated picture.

They are trained on natural scenes of their own range of seeds, with other architectures, starts
and losses than anything in stages 03–05, and only `metrics` may call them: a number that training,
guidance or picking had optimised would say nothing. One net reads class and action, the other masks
and keypoints.

Both also learn from softened, recoloured and noisy copies, so that a slightly soft translation is
read by what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomjerry_utils import UserError, scenes
from tomjerry_utils.images import resize, to_tensor
from tomjerry_utils.judge_nets import (
    ANSWERS,
    POINTS,
    LabelNet,
    PixelNet,
    label_loss,
    locate,
    pixel_loss,
)  # fmt: skip
from tomjerry_utils.measures import animal_iou, hits
from tomjerry_utils.runs import foundation_root, log, read_json, write_json
from tomjerry_utils.training import TrainResult, apply_ema, train

SIZE = 64
SPECIES = ("cat", "mouse")
HELD_OUT = 400
BATCH = 8  # pictures at a time when judging: more outgrow a CPU's cache


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
        "learning_rate": options["learning_rate"], "ema_decay": 0.995,
        "weight_decay": 0.02, "precision": "bf16", "log_every": 100, "threads": 1,
        "keep_checkpoint": True, "on_log": look,
    }  # fmt: skip
    results: dict[str, TrainResult] = {}
    results["labels"] = train(
        {"labels": labels}, lambda b, s, g: label_loss(labels, *b), label_batch,
        steps=options["label_steps"], warmup_steps=min(50, options["label_steps"] // 5),
        folder=work / "labels", seed=31, describe="judge of class and action", **common,
    )  # fmt: skip
    apply_ema({"labels": labels}, results["labels"])
    results["pixels"] = train(
        {"pixels": pixels}, lambda b, s, g: pixel_loss(pixels, *b), pixel_batch,
        steps=options["pixel_steps"], warmup_steps=min(50, options["pixel_steps"] // 5),
        folder=work / "pixels", seed=32, describe="judge of masks and keypoints", **common,
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
        scores[f"iou_{name}"] = float(np.nanmean(animal_iou(masks, data["mask"], which)))
    found = judges.keypoints(images)
    scores["pck"] = float(np.nanmean(hits(found, truth["points"].numpy(), data["mask"])))
    return {name: round(value, 4) for name, value in scores.items()}


# ---- the judges at work ------------------------------------------------------------------------


@dataclass
class Reading:
    """What the judges say of N pictures.

    Attributes:
        classes: (N, 4) probabilities over `ANSWERS`: tom, jerry, both (cat, mouse, both in life),
            cartoon.
        actions: (N, 6) probabilities over ``scenes.ACTIONS``.
        masks: (N, 64, 64) uint8: 0 background, 1 cat, 2 mouse.
        keypoints: (N, 2, K, 3): x, y in pixels of 64, confidence; the cat's, then the mouse's.
    """

    classes: np.ndarray
    actions: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray


@dataclass
class Judges:
    """All judgements on pictures: uint8 (N, H, W, 3) of any size, resized to 64 px."""

    labels: LabelNet
    pixels: PixelNet

    def read(self, images: np.ndarray) -> Reading:
        """All four at once, each net run only once."""
        classes, actions = self._labels(images)
        masks, points = self._pixels(images)
        return Reading(classes, actions, masks, points)

    def classify(self, images: np.ndarray) -> np.ndarray:
        """(N, 4) probabilities over tom, jerry, both, cartoon."""
        return self._labels(images)[0]

    def actions(self, images: np.ndarray) -> np.ndarray:
        """(N, 6) probabilities over ``scenes.ACTIONS``."""
        return self._labels(images)[1]

    def segment(self, images: np.ndarray) -> np.ndarray:
        """(N, 64, 64) uint8: 0 background, 1 cat, 2 mouse."""
        return self._pixels(images)[0]

    def keypoints(self, images: np.ndarray) -> np.ndarray:
        """(N, 2, K, 3): x, y in pixels of 64, confidence; the cat's, then the mouse's."""
        return self._pixels(images)[1]

    def _labels(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        classes, actions = _run(self.labels, images, lambda out: (o.softmax(1) for o in out))
        return classes, actions

    def _pixels(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        masks, points = _run(
            self.pixels, images, lambda out: (out[0].argmax(1).to(torch.uint8), locate(out[1]))
        )
        return masks, points.reshape(len(points), 2, POINTS, 3)

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


def _run(
    net: nn.Module, images: np.ndarray, read: Callable[[Any], Iterable[Tensor]]
) -> tuple[np.ndarray, ...]:
    """Apply a net, a few pictures at a time, and read something off its outputs."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"need uint8 (N, H, W, 3), N > 0, got {images.dtype} {images.shape}")
    if images.shape[1:3] != (SIZE, SIZE):
        images = np.stack([resize(image, SIZE) for image in images])
    training = net.training
    net.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = to_tensor(images[start : start + BATCH])
            out = net(batch.to(memory_format=torch.channels_last))
            parts.append([tensor.numpy() for tensor in read(out)])
    net.train(training)
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


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
        files = (folder / name / "config.json", folder / name / "model.safetensors")
        if not all(file.is_file() for file in files):
            raise UserError(f"no judges in {folder}; make them with `tomjerry foundation judges`")
        try:
            net = kind(tuple(read_json(files[0])["widths"]))
            net.load_state_dict(load_file(files[1]))
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder / name}: not a judge that can be read ({str(error).splitlines()[0]}); "
                "make it anew with `tomjerry foundation judges`"
            ) from None
        nets.append(net.eval())
    return Judges(*nets)
