"""How the rivals are trained on the terms of :mod:`budgets`; :mod:`rivals` tunes and uses them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import collect, foundation, gans, ldm, untold
from tomjerry_utils.autoencoder import load_autoencoder
from tomjerry_utils.budgets import EXPERT_SHARE, FOLDER, budget_seconds, course_seconds
from tomjerry_utils.denoiser import Conditioner, load_denoiser, make_scheduler, save_denoiser
from tomjerry_utils.painting import FINISHED
from tomjerry_utils.profiles import Profile
from tomjerry_utils.realism import DomainExpert, train_expert
from tomjerry_utils.runs import (
    PROVENANCE,
    atomic_dir,
    atomic_path,
    hash_obj,
    log,
    open_stage,
    read_json,
    read_jsonl,
    run_root,
    write_json,
    write_jsonl,
)
from tomjerry_utils.scenes import render_many
from tomjerry_utils.training import apply_ema, pick_device

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

# The foundation's pictures that a GAN sees under the total budget.
_ZOO = {"cartoon": ("cartoon zoo", "cartoon"), "natural": ("natural zoo", "natural")}
LOOKS = 12  # at a GAN during its training


@dataclass(eq=False)
class Denoiser:
    """What a diffusion rival draws with: a `baselines.Model`, with stage 04's finished decoder."""

    unet: UNet2DConditionModel
    conditioner: Conditioner
    vae: AutoencoderKL
    scheduler: DDIMScheduler


# ---- the diffusion rivals ----------------------------------------------------------------------


def train_diffusion(
    method: str, profile: Profile, folder: Path
) -> tuple[Denoiser, DomainExpert | None, float]:
    """A diffusion rival's denoiser and expert, and the seconds of training behind them.

    Args:
        folder: where EGSDE's expert is kept.
    """
    before = ldm.ensure(profile)
    parts = course_seconds(profile)
    stage_05 = sum(seconds for name, seconds in parts.items() if name[:2] == "05")
    rest = profile.rivals.budget_share * stage_05
    trained = sum(seconds for name, seconds in parts.items() if name[:2] == "04")
    expert = None
    if method == "egsde":
        expert, seconds = _train_expert(before, profile, folder, EXPERT_SHARE * rest)
        rest, trained = (1 - EXPERT_SHARE) * rest, trained + seconds
    model, seconds = _train_denoiser(before, profile, method, rest)
    return model, expert, trained + seconds


def _train_denoiser(
    before: ldm.LdmRun, profile: Profile, method: str, seconds: float
) -> tuple[Denoiser, float]:
    """Stage 04's denoiser, trained on with classes alone at the pace that it was trained at."""
    options = profile.ldm.model_copy(update={"structure_dropout": 1.0, "caption_dropout": 1.0})
    pace = profile.ldm.steps / course_seconds(profile)["04 denoiser"]
    weights = denoiser_folder(profile, method)
    stage = open_stage(
        profile,
        weights.parent.relative_to(run_root(profile)).as_posix(),
        {"steps": max(1, round(pace * seconds))},
        {"ldm": before.key},
    )
    with stage.lock():
        if not stage.finished:
            unet, conditioner = copy.deepcopy(before.unet), copy.deepcopy(before.conditioner)
            for module in (unet, conditioner):
                module.requires_grad_(True)
            result = ldm.train_denoiser(
                unet,
                conditioner,
                ldm.join([before.cartoon, before.natural]),
                before.scheduler,
                profile.model_copy(update={"ldm": options}),
                folder=stage.folder / "training",
                steps=stage.settings["steps"],
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
            )
            apply_ema({"unet": unet, "conditioner": conditioner}, result)
            with atomic_dir(weights) as target:
                save_denoiser(unet, conditioner, target)
            stage.finish(seconds=result.spent)
            shutil.rmtree(stage.folder / "training" / "checkpoint", ignore_errors=True)
    record = read_json(stage.folder / PROVENANCE)
    return load_model(profile, weights), float(record["extra"]["seconds"])


def denoiser_folder(profile: Profile, method: str) -> Path:
    """EGSDE's has trained for less, since its expert is part of its budget."""
    name = "egsde_denoiser" if method == "egsde" else "denoiser"
    return run_root(profile) / FOLDER / "course" / name / "weights"


def load_model(profile: Profile, folder: Path) -> Denoiser:
    device = pick_device(profile.device)
    unet, conditioner = load_denoiser(folder)
    return Denoiser(
        unet=unet.to(device).eval(),
        conditioner=conditioner.to(device).eval(),
        vae=_autoencoder(profile, f"{FINISHED}/autoencoder"),
        scheduler=make_scheduler(profile.ldm.prediction_type),
    )


def _train_expert(
    before: ldm.LdmRun, profile: Profile, folder: Path, seconds: float
) -> tuple[DomainExpert, float]:
    note = folder / "expert.json"
    if not note.is_file():
        expert, result = train_expert(
            before.cartoon.latents,
            before.natural.latents,
            scheduler=before.scheduler,
            folder=folder / "expert_training",
            seed=profile.seed,
            seconds=seconds,
            device=profile.device,
            threads=profile.threads,
        )
        with atomic_dir(folder / "expert") as target:
            expert.save_pretrained(target)
        write_json(note, {"seconds": result.spent, "history": result.history})
        shutil.rmtree(folder / "expert_training", ignore_errors=True)
    return load_expert(folder, profile), float(read_json(note)["seconds"])


def load_expert(folder: Path, profile: Profile) -> DomainExpert:
    expert = DomainExpert.from_pretrained(folder / "expert")
    return expert.to(pick_device(profile.device)).eval()


# ---- ours, told nothing ------------------------------------------------------------------------


def train_untold(profile: Profile, folder: Path) -> tuple[untold.Untold, float]:
    """Ours without truth, and the seconds of training behind it: stage 04's decoder and its own."""
    decoder = course_seconds(profile).get("04 decoder", 0.0)
    allowed = budget_seconds(profile, "course") - profile.rivals.budget_share * decoder
    note = folder / "untold.json"
    if not note.is_file():
        made, seconds = untold.fit(
            training_pictures(profile, "cartoon"),
            training_pictures(profile, "natural"),
            _autoencoder(profile),
            profile,
            folder=folder / "training",
            seconds=allowed,
        )
        made.save(folder / "untold")
        write_json(note, {"seconds": seconds})
        shutil.rmtree(folder / "training" / "checkpoint", ignore_errors=True)
    return load_untold(profile, folder), decoder + float(read_json(note)["seconds"])


def load_untold(profile: Profile, folder: Path) -> untold.Untold:
    return untold.load(folder / "untold", _autoencoder(profile), profile.ldm.prediction_type)


def _autoencoder(profile: Profile, name: str = "autoencoder") -> AutoencoderKL:
    """Stage 04's: the foundation's, its decoder tuned on the course's pictures, and on no view."""
    folder = run_root(profile) / ldm.STAGE / name
    return load_autoencoder(folder).to(pick_device(profile.device))


# ---- the adversarial rivals --------------------------------------------------------------------


def train_gan(
    kind: str,
    profile: Profile,
    folder: Path,
    name: str,
    budget: str,
    setting: Mapping[str, Any],
    seconds: float,
    look: Callable[[gans.Gan], dict[str, float]] | None = None,
) -> gans.Gan:
    """Train for so many seconds, or go on where a killed run stopped, or read what is finished.

    Args:
        look: scores it :data:`LOOKS` times in equal steps of its seconds, which looking does not
            use up; the trained GAN's facts have the scores, with their seconds, as `curve`.
    """
    weights = weights_folder(folder, name)
    if not (weights / "config.json").is_file():
        sets = {
            domain: np.concatenate(
                [training_pictures(profile, domain)]
                + ([_zoo(profile, domain)] if budget == "total" else [])
            )
            for domain in ("cartoon", "natural")
        }
        training = _training_folder(kind, profile, name, budget, setting)
        curve = training / "curve.jsonl"
        rows = read_jsonl(curve) if curve.is_file() else []
        # The clock stands still between two calls, and the second goes on where the first stopped.
        pieces = LOOKS if look else 1
        for piece in range(min(len(rows), pieces - 1), pieces):
            gan = gans.train_gan(
                kind,
                sets["cartoon"],
                sets["natural"],
                folder=training,
                seed=profile.seed,
                seconds=seconds * (piece + 1) / pieces,
                settings=gans.GanSettings(**setting),
                precision=profile.precision,
                device=profile.device,
                threads=profile.threads,
                checkpoint_every_s=profile.checkpoint_every_s,
            )
            if look:
                rows[piece:] = [{"seconds": gan.facts["seconds"], **look(gan)}]
                write_jsonl(curve, rows)
        gan.facts["curve"] = rows
        gan.save(weights)
        # After a budget of seconds the whole state of the training stays; nobody goes on with it.
        shutil.rmtree(training / "checkpoint", ignore_errors=True)
    gan = gans.load_gan(weights)
    gan.generator.to(pick_device(profile.device))
    return gan


def _training_folder(
    kind: str, profile: Profile, name: str, budget: str, setting: Mapping[str, Any]
) -> Path:
    """Where a GAN trains: a place that depends on nothing but what its training depends on.

    The total budget takes hours. They outlive another version of the stages before, and a budget
    that has become a little longer since.
    """
    facts = {
        "setting": dict(setting),
        "seed": profile.seed,
        "precision": profile.precision,
        "image_size": profile.image_size,
        "pictures": collect.training_facts(profile),
        "zoo": profile.rivals.zoo_pictures if budget == "total" else 0,
    }
    parent = run_root(profile) / FOLDER / "training"
    return parent / f"{budget}-{kind}-{name}-{hash_obj(facts)[:12]}"


def weights_folder(folder: Path, name: str) -> Path:
    return folder / "weights" / name


def training_pictures(profile: Profile, domain: str) -> np.ndarray:
    """The course's training pictures of a domain, as stage 04 has them."""
    pictures = collect.ensure(profile)
    only = "scenes" if "scenes" in profile.collect.sources else None
    rows = pictures.select(domain=domain, split="train", source=only)
    return pictures.images(rows, profile.image_size)


def _zoo(profile: Profile, domain: str) -> np.ndarray:
    """The foundation's pictures of a domain, with the camera's noise, drawn once and kept."""
    most, size = profile.rivals.zoo_pictures, profile.image_size
    path = run_root(profile) / FOLDER / f"zoo_{domain}_{size}_{most}.npy"
    if not path.is_file():
        drawn = []
        for name in _ZOO[domain]:
            style, zoo, first, count = foundation.PICTURES[name]
            log(f"rivals: drawing the foundation's {name} pictures")
            seeds = range(first, first + min(count, most))
            drawn.append(render_many(seeds, style, size, zoo=zoo)["image"])
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(drawn))
    return np.load(path, allow_pickle=False)
