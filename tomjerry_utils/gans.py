"""The adversarial rivals: CUT and CycleGAN, trained from nothing on the same unpaired pictures.

- CUT (Park et al. 2020, arXiv 2007.15651): one generator; each patch of the translation must be
  recognised among the source's patches as its own (PatchNCE);
- CycleGAN (Zhu et al. 2017, arXiv 1703.10593): two generators, each of which must undo the other.

Both have the papers' losses, weights, start and Adam. What differs, for pictures of 64 px on a
CPU: narrower nets, six residual blocks, patches of 34 px where the papers see 70 of 256, all nets
stepping at once instead of in turn, and a constant learning rate with averaged weights of the
generator (Yazıcı et al. 2018, arXiv 1806.04498) instead of a rate that falls over the second half:
a run that the clock ends is then as finished as any.

`training.train` has one loss and one optimiser. Adam treats each weight by itself, so one loss
serves both players as long as no term of one reaches a weight of the other: the generator is
judged by a discriminator whose weights are detached, the discriminator sees detached pictures.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.gan_nets import (
    FACTOR,
    Generator,
    ImagePool,
    PatchHeads,
    discriminator,
    discriminator_loss,
    frozen,
    lsgan,
    patch_nce,
    start,
)
from tomjerry_utils.images import to_tensor, to_uint8
from tomjerry_utils.runs import atomic_path, read_json, write_json
from tomjerry_utils.training import OnLog, Schedule, apply_ema, train

KINDS = ("cut", "cyclegan")
TITLES = {"cut": "CUT", "cyclegan": "CycleGAN"}
WEIGHTS = "model.safetensors"
NCE_PATCHES = 256  # places per layer and picture, or all of them where there are fewer
POOL = 50  # fakes of earlier steps that a CycleGAN discriminator may see again
_NO_END = 10_000_000  # steps of a run that only the clock ends


@dataclass(frozen=True)
class GanSettings:
    """Sizes of the nets and weights of the losses; the papers' values in brackets.

    Attributes:
        width: channels after the generator's first convolution [64].
        blocks: residual blocks [9; 6 at 128 px].
        discriminator_width: channels after the discriminator's first convolution [64].
        discriminator_layers: its convolutions of stride 2; 2 see 34 px, 3 see 70 px [3].
        lambda_nce: CUT's weight of PatchNCE [1].
        nce_identity: CUT's PatchNCE on natural pictures too, which should stay as they are [yes].
        lambda_cycle: CycleGAN's weight of the way there and back [10].
        lambda_identity: of natural pictures staying natural ones, as a share of that [0.5].
    """

    width: int = 32
    blocks: int = 6
    discriminator_width: int = 32
    discriminator_layers: int = 2
    lambda_nce: float = 1.0
    nce_identity: bool = True
    lambda_cycle: float = 10.0
    lambda_identity: float = 0.5


@dataclass
class Gan:
    """A trained generator from cartoons to natural pictures.

    Attributes:
        kind: of :data:`KINDS`.
        generator: with averaged weights, in evaluation mode.
        facts: how it was trained: steps, seconds of its budget, learning rate, numbers of pictures
            and so on.
    """

    kind: str
    generator: Generator
    settings: GanSettings
    facts: dict[str, Any] = field(default_factory=dict)

    def translate(self, images: np.ndarray, batch_size: int = 16) -> np.ndarray:
        """Translate cartoons (N, H, W, 3) uint8 of any size from 8 px to the same, natural.

        Sizes that the generator cannot halve twice are mirrored over their edge and cut again.
        """
        device = next(self.generator.parameters()).device
        height, width = images.shape[1:3]
        pad = (0, -width % FACTOR, 0, -height % FACTOR)
        out = np.empty_like(images)
        with torch.inference_mode():
            for begin in range(0, len(images), batch_size):
                batch = to_tensor(images[begin : begin + batch_size]).to(device)
                made = self.generator(F.pad(batch, pad, mode="reflect"))
                out[begin : begin + len(batch)] = to_uint8(made[..., :height, :width])
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the generator's weights and `config.json`, the latter last."""
        from safetensors.torch import save_file

        state = {k: v.detach().cpu().contiguous() for k, v in self.generator.state_dict().items()}
        with atomic_path(Path(folder) / WEIGHTS) as temporary:
            save_file(state, temporary)
        config = {"kind": self.kind, "settings": asdict(self.settings), "training": self.facts}
        write_json(Path(folder) / "config.json", config)


def train_gan(
    kind: str,
    cartoon: np.ndarray,
    natural: np.ndarray,
    *,
    folder: str | os.PathLike[str],
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
    settings: GanSettings | None = None,
    batch_size: int = 1,
    learning_rate: float = 2e-4,
    schedule: Schedule = "constant",
    ema_decay: float | None = 0.999,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    threads: int = 0,
    checkpoint_every_s: float = 120.0,
    log_every: int = 50,
    on_log: OnLog | None = None,
) -> Gan:
    """Train a generator from cartoons to natural pictures, or go on where a killed run stopped.

    Batches are drawn from each set by itself, half of the pictures mirrored: nothing pairs them.
    A run of the same seed that was killed and resumed gives the same weights as one that was not.

    Args:
        cartoon: (N, S, S, 3) uint8, S a multiple of 4; natural: (M, S, S, 3) uint8.
        folder: of the run's `history.jsonl` and `checkpoint/`; after a budget of seconds the
            checkpoint stays, and a call with a larger budget goes on from it.
        steps: how many; None where `seconds` alone ends the run.
        seconds: training time over all sessions, as `training.train` counts it; the step that uses
            it up is the last.
        settings: None for the defaults.
        batch_size: pictures of each set in a step [1 in both papers].
        learning_rate: [2e-4 in both papers], with Adam's β = (0.5, 0.999) as theirs.
        schedule: other than constant only where `steps` says when its end is.
        ema_decay: of the averaged generator; None for its last weights.
        on_log: see `training.train`; the modules' "generator" is the one to look at.

    Raises:
        UserError: an unknown kind, pictures of unlike or unusable sizes, and what
            `training.train` raises.
    """
    if kind not in KINDS:
        raise UserError(f"no GAN '{kind}': choose from {', '.join(KINDS)}")
    if steps is None and (seconds is None or schedule != "constant"):
        raise ValueError("need steps, or seconds and a constant learning rate")
    settings = settings or GanSettings()
    _check(cartoon, natural, smallest=4 * 2**settings.discriminator_layers)
    size = cartoon.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets: Cut | CycleGan = Cut(settings) if kind == "cut" else CycleGan(settings, size)
    sets = [torch.from_numpy(images) for images in (cartoon, natural)]

    def batches(step: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(_draw(images, batch_size, rng) for images in sets)

    result = train(
        dict(nets.named_children()),
        lambda batch, step, rng: nets.loss(batch[0], batch[1], rng),
        batches,
        steps=steps or _NO_END,
        learning_rate=learning_rate,
        folder=folder,
        seed=seed,
        schedule=schedule,
        betas=(0.5, 0.999),
        weight_decay=0.0,
        # A norm over all nets would let one player's gradient shrink the other's.
        grad_clip=None,
        ema_decay=ema_decay,
        ema_on=["generator"],
        precision=precision,
        device=device,
        threads=threads,
        checkpoint_every_s=checkpoint_every_s,
        log_every=log_every,
        max_seconds=seconds,
        describe=TITLES[kind],
        memory_knobs="lower batch_size or the width in its settings",
        on_log=on_log,
    )
    apply_ema({"generator": nets.generator}, result)
    facts = {
        "steps": result.steps,
        "seconds": round(result.spent, 1),
        "budget_seconds": seconds,
        "seed": seed,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "ema_decay": ema_decay,
        "size": size,
        "pictures": {"cartoon": len(cartoon), "natural": len(natural)},
        "parameters": {
            name: sum(p.numel() for p in net.parameters())
            for name, net in nets.named_children()
            if not isinstance(net, ImagePool)
        },
    }
    return Gan(kind, nets.generator, settings, facts)


def load_gan(folder: str | os.PathLike[str]) -> Gan:
    """The generator that `Gan.save` wrote, in evaluation mode on the CPU.

    Raises:
        UserError: no such folder, or one that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    if not all((path / name).is_file() for name in ("config.json", WEIGHTS)):
        raise UserError(f"no GAN in {path}: need config.json and {WEIGHTS}, as Gan.save writes")
    config = read_json(path / "config.json")
    try:
        settings = GanSettings(**config["settings"])
        generator = Generator(settings.width, settings.blocks)
        generator.load_state_dict(load_file(path / WEIGHTS))
        kind, facts = config["kind"], config["training"]
        if kind not in KINDS:
            raise ValueError(f"kind '{kind}'")
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a GAN that can be read ({str(error).splitlines()[0]}): train it anew"
        ) from None
    return Gan(kind, generator.eval(), settings, facts)


def _check(cartoon: np.ndarray, natural: np.ndarray, *, smallest: int) -> None:
    for images in (cartoon, natural):
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(f"need uint8 (N, S, S, 3), N > 0, got {images.dtype} {images.shape}")
    first, second = cartoon.shape[1:3], natural.shape[1:3]
    size = first[0]
    if first != (size, size) or first != second or size % FACTOR or size < smallest:
        raise UserError(
            f"a GAN cannot learn from cartoons of {first[1]}×{first[0]} px and natural pictures of "
            f"{second[1]}×{second[0]} px: make both square, of one size, a multiple of {FACTOR} "
            f"and at least {smallest}"
        )


def _draw(images: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """(count, 3, S, S) in [−1, 1] of pictures (N, S, S, 3) uint8, half of them mirrored."""
    index = torch.randint(len(images), (count,), generator=rng)
    batch = images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
    mirror = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
    return torch.where(mirror, batch.flip(3), batch)


# ---- the two methods ---------------------------------------------------------------------------


class Cut(nn.Module):
    """CUT's three nets and its loss (Park et al. 2020, section 3)."""

    def __init__(self, settings: GanSettings) -> None:
        super().__init__()
        self.settings = settings
        self.generator = Generator(settings.width, settings.blocks)
        self.discriminator = _discriminator(settings)
        self.heads = PatchHeads(self.generator.feature_channels)
        self.apply(start)

    def loss(
        self, cartoon: Tensor, natural: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses as one, from (B, 3, S, S) in [−1, 1] of each set; and its terms."""
        own = self.settings.nce_identity
        sources = torch.cat([cartoon, natural]) if own else cartoon
        # The features that the paper encodes a second time are those that the fake is made of.
        features = self.generator.encode(sources)
        made = self.generator.decode(features[-1])
        places = [
            torch.randperm(layer[0, 0].numel(), generator=rng)[:NCE_PATCHES] for layer in features
        ]
        with torch.no_grad():
            keys = self.heads(features, places)
        queries = self.heads(self.generator.encode(made), places)
        # With natural pictures in the batch, the mean of the terms of both sets, as the authors
        # have it in their code.
        pairs = zip(queries, keys, strict=True)
        nce = torch.stack([patch_nce(query, key) for query, key in pairs]).mean()

        fake = made[: len(cartoon)]
        adversarial = lsgan(frozen(self.discriminator, fake), real=True)
        judged = discriminator_loss(self.discriminator, natural, fake)
        numbers = {"adversarial": adversarial, "nce": nce, "discriminator": judged}
        return adversarial + self.settings.lambda_nce * nce + judged, numbers


class CycleGan(nn.Module):
    """CycleGAN's four nets, its two pools of past fakes and its loss (Zhu et al. 2017, section 3).

    The pools' pictures are buffers, so a checkpoint holds them and a resumed run draws the same.
    """

    def __init__(self, settings: GanSettings, size: int) -> None:
        super().__init__()
        self.settings = settings
        self.generator = Generator(settings.width, settings.blocks)
        self.inverse = Generator(settings.width, settings.blocks)
        self.discriminator = _discriminator(settings)
        self.inverse_discriminator = _discriminator(settings)
        self.natural_pool = ImagePool(POOL, size)
        self.cartoon_pool = ImagePool(POOL, size)
        self.apply(start)

    def loss(
        self, cartoon: Tensor, natural: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses as one, from (B, 3, S, S) in [−1, 1] of each set; and its terms."""
        weight, count = self.settings.lambda_cycle, len(cartoon)
        own = self.settings.lambda_identity > 0
        there = self.generator(torch.cat([cartoon, natural] if own else [cartoon]))
        fake_natural, *same_natural = there.split(count)
        sources = [natural, fake_natural, cartoon] if own else [natural, fake_natural]
        fake_cartoon, cycled, *same_cartoon = self.inverse(torch.cat(sources)).split(count)
        cycle = F.l1_loss(cycled, cartoon) + F.l1_loss(self.generator(fake_cartoon), natural)

        adversarial = lsgan(frozen(self.discriminator, fake_natural), real=True) + lsgan(
            frozen(self.inverse_discriminator, fake_cartoon), real=True
        )
        past_natural = self.natural_pool(fake_natural, rng)
        past_cartoon = self.cartoon_pool(fake_cartoon, rng)
        judged = discriminator_loss(self.discriminator, natural, past_natural)
        judged = judged + discriminator_loss(self.inverse_discriminator, cartoon, past_cartoon)
        numbers = {"adversarial": adversarial, "cycle": cycle, "discriminator": judged}
        loss = adversarial + weight * cycle + judged
        if own:
            identity = F.l1_loss(same_natural[0], natural) + F.l1_loss(same_cartoon[0], cartoon)
            numbers["identity"] = identity
            loss = loss + weight * self.settings.lambda_identity * identity
        return loss, numbers


def _discriminator(settings: GanSettings) -> nn.Sequential:
    return discriminator(settings.discriminator_width, settings.discriminator_layers)
