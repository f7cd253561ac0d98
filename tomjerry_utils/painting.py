"""The finished model of stage 04 and what it paints.

A copy of the trained denoiser and of the decoder is finished (:mod:`finishing`). With it, a sample
is drawn in two steps: p(v | c) by :mod:`staging`, p(z | v, c) by the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils import collect, finishing, posture, processes, structure
from tomjerry_utils.autoencoder import decode, load_autoencoder
from tomjerry_utils.denoiser import (
    Batch,
    Conditioner,
    drop,
    load_denoiser,
    make_scheduler,
    save_denoiser,
)
from tomjerry_utils.images import add_grain, to_uint8
from tomjerry_utils.latents import LatentSet
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import atomic_dir, atomic_path, model_source, read_json, write_json
from tomjerry_utils.sampling import sample
from tomjerry_utils.scenes import CLASSES, LABELS
from tomjerry_utils.staging import Stage, posed_views, stage_for
from tomjerry_utils.training import pick_device

FINISHED = "finished"  # in the stage's folder: what draws its samples
POSED = "posed.safetensors"  # natural views with the posture nets' bodies
AT_ONCE = 50  # samples drawn together


def finish(
    folder: Path,
    unet: UNet2DConditionModel,
    conditioner: Conditioner,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    profile: Profile,
) -> None:
    """Write the natural views with posed bodies, and a finished denoiser and autoencoder.

    Args:
        folder: of stage 04, with its latents; every process of a launch takes part.
    """
    data = LatentSet.load(folder / "natural.safetensors")
    images = torch.from_numpy(pictures_of(data, profile))
    if processes.is_main() and not (folder / POSED).is_file():
        net = structure.load_structure(model_source(profile.transfer.structure))
        nets = posture.load_posture(model_source(profile.transfer.posture))
        with atomic_path(folder / POSED) as temporary:
            save_file({"views": posed_views(data, images, net, nets)}, temporary)
    processes.wait_for_all(profile.device)
    views = load_file(folder / POSED)["views"]
    how: dict[str, Any] = {
        "steps": profile.ldm.sample_steps,
        "guidance_scale": profile.transfer.guidance_scale,
    }
    grain = finishing.lost_grain(photographs(profile), vae)
    if profile.finishing.steps:
        parts = (unet, conditioner, vae, scheduler, with_posed(data, views))
        if processes.is_main():
            finishing.draw(
                *parts,
                profile,
                **how,
                among=len(data),
                path=folder / "drawn.safetensors",
                describe="04 drawing",
            )
        processes.wait_for_all(profile.device)
        drawn = load_file(folder / "drawn.safetensors")
        unet, vae = finishing.finish(
            *parts,
            images[drawn["index"]],
            drawn,
            profile,
            **how,
            lora_rank=profile.ldm.lora_rank,
            grain=grain,
            folder=folder / "finishing",
            describe="04 finishing",
        )
    if not processes.is_main():
        return
    with atomic_dir(folder / FINISHED) as target:
        save_denoiser(unet, conditioner, target / "denoiser")
        vae.save_pretrained(target / "autoencoder")
        finished = profile.ldm.sample_steps if profile.finishing.steps else None
        write_json(target / "painter.json", {"grain": grain, "finished": finished})


def with_posed(data: LatentSet, views: Tensor) -> finishing.Conditions:
    """What a denoiser is told of pictures: as in stage 05, half of the views show posed bodies."""

    def conditions(index: Tensor, posed: Tensor) -> Batch:
        batch = data.batch(index)
        batch.view = torch.where(posed[:, None, None, None], views[index].float(), batch.view)
        return batch

    return conditions


def pictures_of(data: LatentSet, profile: Profile) -> np.ndarray:
    """The collected pictures that became these latents, (N, S, S, 3) uint8."""
    pictures = collect.ensure(profile)
    by_name = {row["file_name"]: row for row in pictures.rows}
    return pictures.images([by_name[name] for name in data.files], profile.image_size)


def photographs(profile: Profile) -> np.ndarray:
    """About a thousand natural training pictures: what a photograph looks like."""
    pictures = collect.ensure(profile)
    only = "scenes" if "scenes" in profile.collect.sources else None
    rows = pictures.select(domain="natural", split="train", source=only)
    some = rows[:: max(1, len(rows) // 1000)]
    return pictures.images(some, profile.image_size)


@dataclass(eq=False)
class Painter:
    """What paints the samples of stage 04: p(v | c), then p(z | v, c).

    Attributes:
        unet, vae: finished, for photographs; trained: the same before that, for cartoons.
        finished: the steps they were finished for; None where they were not.
        grain: of the camera, for photographs.
    """

    unet: UNet2DConditionModel
    conditioner: Conditioner
    vae: AutoencoderKL
    trained: tuple[UNet2DConditionModel, AutoencoderKL]
    scheduler: DDIMScheduler
    stage: Stage
    profile: Profile
    grain: float
    finished: int | None

    def draw(self, label: str, count: int, *, seed: int) -> np.ndarray:
        """Samples of a label of `scenes.LABELS`, (count, S, S, 3) uint8, without captions."""
        natural = LABELS.index(label) >= len(CLASSES)
        unet, vae = (self.unet, self.vae) if natural else self.trained
        generator = torch.Generator().manual_seed(seed)
        views = self.stage.views(label, count, generator)
        out = []
        for start in range(0, count, AT_ONCE):
            part = views[start : start + AT_ONCE]
            batch = self.stage.natural.batch(torch.zeros(len(part), dtype=torch.long))
            batch.labels, batch.view = torch.full((len(part),), LABELS.index(label)), part
            batch = drop(batch, labels=0.0, captions=1.1, view=0.0, generator=torch.Generator())
            latents = sample(
                unet,
                self.conditioner,
                batch.to(unet.device),
                self.scheduler,
                steps=self.profile.ldm.sample_steps,
                guidance_scale=self.profile.transfer.guidance_scale,
                generator=generator,
                finished=self.finished if natural else None,
            )
            with torch.no_grad():
                out.append(to_uint8(decode(vae, latents)))
        drawn = np.concatenate(out)
        if not natural:
            return drawn
        return add_grain(drawn, self.grain, seed=seed, numbers=range(count))

    def draw_all(self, count: int) -> dict[str, np.ndarray]:
        """So many samples of each label."""
        seed = self.profile.seed * 1000
        return {label: self.draw(label, count, seed=seed + i) for i, label in enumerate(LABELS)}


def painter(folder: Path, profile: Profile) -> Painter:
    """What draws the samples of a finished stage 04, from its folder."""
    device, facts = pick_device(profile.device), read_json(folder / FINISHED / "painter.json")
    unet, conditioner = load_denoiser(folder / FINISHED / "denoiser")
    trained, _ = load_denoiser(folder / "denoiser")
    cartoon, natural = (
        LatentSet.load(folder / f"{domain}.safetensors") for domain in ("cartoon", "natural")
    )
    nets = posture.load_posture(model_source(profile.transfer.posture))
    return Painter(
        unet=unet.to(device).eval(),
        conditioner=conditioner.to(device).eval(),
        vae=load_autoencoder(folder / FINISHED / "autoencoder").to(device),
        trained=(trained.to(device).eval(), load_autoencoder(folder / "autoencoder").to(device)),
        scheduler=make_scheduler(profile.ldm.prediction_type),
        stage=stage_for(cartoon, natural, torch.from_numpy(pictures_of(natural, profile)), nets),
        profile=profile,
        **facts,
    )
