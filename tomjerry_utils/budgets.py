"""The terms on which methods are compared: seconds of training, trials, and what each starts from.

Two budgets, both of seconds of training on the same machine (of a quiet one: `checkpoints.Pace`):

- course: as many as ours took in stages 04 and 05; what can start from our foundation does;
- total: as many as ours took from the very beginning, its foundation and its BLIP included. What
  starts from the foundation has had those already: under this budget it is what it is under the
  other, and only what starts from nothing is trained anew: with the setting that its trials found
  under the other, and the whole budget for one training.

:mod:`rivals` trains and tunes by these terms.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError, baselines, gans, ldm, transfer
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import PROVENANCE, model_source, read_json, read_jsonl, run_root

FOLDER = "rivals"  # in a run
BUDGETS = ("course", "total")
DIFFUSION = tuple(name for name, count in baselines.DIRECTIONS.items() if count)
RIVALS = (*baselines.RIVALS, *gans.KINDS)
VARIANTS = ("untold",)  # of ours: rows of the comparison, no rivals that it must beat
METHODS = {"course": ("ours", *VARIANTS, *RIVALS), "total": gans.KINDS}
TITLES = {"ours": "ours", "untold": "ours, told nothing", **baselines.TITLES, **gans.TITLES}

TRIALS = 6  # of each method's settings; the identity has none
TUNED = "course"  # the budget under which settings are tried; the total takes over what it found
TRIAL_SHARE = 0.2  # a GAN's trial, as a share of that budget
EXPERT_SHARE = 0.1  # of what EGSDE trains beyond stage 04, for its realism expert

# What each method starts from, and what it is told of pictures in training, there or later.
_DENOISER: dict[str, Any] = {
    "starts_from": ("autoencoder", "denoiser", "structure"),
    "masks": "parts of zoo and course scenes, by the structure net that reads the class and whose "
    "views the foundation's denoiser learnt with",
    "keypoints": "",
    "captions": "zoo scenes, by the foundation's denoiser",
    "classes": "course pictures",
}
_NOTHING: dict[str, Any] = {
    "starts_from": (),
    "masks": "",
    "keypoints": "",
    "captions": "",
    "classes": "",
}
SUPERVISION: dict[str, dict[str, Any]] = {
    "ours": {
        "starts_from": ("autoencoder", "denoiser", "structure", "posture", "blip"),
        "masks": "parts of zoo and course scenes, by the structure and posture nets",
        "keypoints": "course scenes of both styles, by the posture nets",
        "captions": "zoo scenes; a sample of the course pictures",
        "classes": "course pictures",
    },
    "untold": {**_NOTHING, "starts_from": ("autoencoder",)},
    "identity": _NOTHING,
    "colour": _NOTHING,
    **dict.fromkeys(DIFFUSION, _DENOISER),
    **dict.fromkeys(gans.KINDS, _NOTHING),
}


def course_seconds(profile: Profile) -> dict[str, float]:
    """Seconds of training in stages 03 to 05 of a finished run, as their histories have them.

    The ablation's are not among them: they are no part of the method.

    Raises:
        UserError: a stage that is not finished.
    """
    histories = {
        "03 blip": "03_blip/history.jsonl",
        "04 decoder": f"{ldm.STAGE}/autoencoder_training/history.jsonl",
        "04 denoiser": f"{ldm.STAGE}/denoiser_training/history.jsonl",
        "04 finishing": f"{ldm.STAGE}/finishing/history.jsonl",
        "05 translator": f"{transfer.STAGE}/training/history.jsonl",
        "05 finishing": f"{transfer.STAGE}/finishing/history.jsonl",
    }
    if not profile.ldm.autoencoder_steps:
        del histories["04 decoder"]
    if not profile.finishing.steps:
        del histories["04 finishing"], histories["05 finishing"]
    found = {}
    for name, place in histories.items():
        path = run_root(profile) / place
        if not path.is_file():
            raise UserError(f"no {path}: run `tomjerry course --profile {profile.name}` first")
        found[name] = float(read_jsonl(path)[-1]["seconds"])
    return found


def foundation_seconds(profile: Profile) -> dict[str, float] | None:
    """Seconds that the models took which ours starts from; None where one of them does not say."""
    sources = {
        "autoencoder": profile.ldm.autoencoder,
        "denoiser": profile.ldm.denoiser,
        "structure": profile.transfer.structure,
        "posture": profile.transfer.posture,
        "blip": profile.blip.pretrained,
    }
    found = {}
    for name, source in sources.items():
        record = Path(model_source(source)) / PROVENANCE
        if not record.is_file():
            return None
        found[name] = float(read_json(record)["seconds"])
    return found


def budget_seconds(profile: Profile, budget: str) -> float:
    """How long a method may train in all under a budget, times the profile's share.

    Raises:
        UserError: a stage that is not finished; a total of models that do not say their seconds.
    """
    parts = course_seconds(profile)
    course = sum(seconds for name, seconds in parts.items() if name[:2] in ("04", "05"))
    if budget == "course":
        return profile.rivals.budget_share * course
    before = foundation_seconds(profile)
    if before is None:
        raise UserError(
            f"profile {profile.name} starts from models that do not say how long they were "
            "trained, so nobody can be given as long: compare under the budget 'course'"
        )
    return profile.rivals.budget_share * (sum(before.values()) + sum(parts.values()))


def grid(method: str, profile: Profile) -> list[dict[str, Any]]:
    """The settings that a method tries: :data:`TRIALS`, and one for the identity.

    A diffusion rival takes as many steps as ours does where it takes most.
    """
    steps = profile.transfer.sample_steps
    # Ours is told a view and a caption; of the rivals' models, which hear the class alone, stage
    # 04's guidance is the measure.
    scale = profile.ldm.guidance_scale
    scales, common = (scale / 2, scale), {"steps": 2 * steps}
    match method:
        case "ours":
            guided = [profile.transfer.guidance_scale * factor for factor in (1, 1.5, 2)]
            return [
                {"steps": count, "guidance_scale": value}
                for count, value in product((steps, 2 * steps), guided)
            ]
        case "untold":
            return [
                {"steps": steps, "blur": deviation, "guidance_scale": value}
                for deviation, value in product((0.0, 1.0), (1.0, 2.0, 3.0))
            ]
        case "identity":
            return [{}]
        case "colour":
            return [{"strength": share} for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        case "sdedit":
            return [
                {**common, "guidance_scale": scale, "strength": share}
                for share in (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
            ]
        case "ddib" | "cyclediffusion":
            return [
                {**common, "guidance_scale": value, "strength": share}
                for value, share in product(scales, (0.6, 0.8, 1.0))
            ]
        case "ilvr":
            return [
                {**common, "guidance_scale": value, "factor": factor}
                for value, factor in product(scales, (2.0, 4.0, 8.0))
            ]
        case "egsde":
            return [
                {
                    **common,
                    "guidance_scale": scale,
                    "strength": share,
                    "faithful": kept,
                    "realism": r,
                }
                for share, (kept, r) in product((0.4, 0.6, 0.8), ((0.5, 1.0), (0.1, 3.0)))
            ]
        case "cut":
            return [
                {"lambda_nce": weight, "width": width}
                for weight, width in product((0.5, 1.0, 2.0), (16, 32))
            ]
        case "cyclegan":
            return [
                {"lambda_cycle": weight, "width": width}
                for weight, width in product((5.0, 10.0, 20.0), (16, 32))
            ]
    raise UserError(f"no method '{method}': choose from ours, {', '.join(RIVALS)}")
