"""The rivals, trained and tuned on the terms of :mod:`budgets`.

- the diffusion rivals take stage 04's denoiser and train it on, for the seconds that ours spends in
  stage 05, on what they will ask of it (the class and nothing else); EGSDE gives a share of those
  to its realism expert;
- CUT and CycleGAN start from nothing, on the course's training pictures; under the total budget on
  the foundation's as well;
- ours without any truth from the scenes (:mod:`untold`) starts from stage 04's autoencoder alone.

Each method, ours too, gets its trials on validation cartoons, and the best by the one score of
:mod:`tuning` competes. A GAN's trial is a short training. Only the first training seed is tuned,
under the course's budget; the others, and the total budget, take over its setting. Finished parts
are not redone: the work lies in `runs/<profile>/rivals/<budget>/<method>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomjerry_utils import UserError, baselines, editing, gans, ldm, transfer, untold
from tomjerry_utils.budgets import (
    BUDGETS,
    DIFFUSION,
    FOLDER,
    METHODS,
    TITLES,
    TRIAL_SHARE,
    TUNED,
    budget_seconds,
    course_seconds,
    grid,
)
from tomjerry_utils.profiles import Profile
from tomjerry_utils.rival_training import (
    Denoiser,
    denoiser_folder,
    load_expert,
    load_model,
    load_untold,
    train_diffusion,
    train_gan,
    train_untold,
    training_pictures,
    weights_folder,
)
from tomjerry_utils.runs import (
    PROVENANCE,
    Stage,
    log,
    open_stage,
    read_json,
    run_root,
    write_json,
)
from tomjerry_utils.scenes import RANGES, render_many
from tomjerry_utils.training import pick_device
from tomjerry_utils.translator import Translator
from tomjerry_utils.tuning import Criterion

if TYPE_CHECKING:
    from tomjerry_utils.realism import DomainExpert

NATURAL = 1000  # natural training pictures whose colours and textures are the aim


# ---- a method, ready to translate --------------------------------------------------------------


@dataclass(eq=False)
class Rival:
    """A method with its weights and its setting; `translator` lends what is not its own."""

    method: str
    translator: Translator
    setting: Mapping[str, Any] = field(default_factory=dict)
    model: Denoiser | None = None
    expert: DomainExpert | None = None
    gan: gans.Gan | None = None
    own: untold.Untold | None = None

    def translate(
        self,
        images: np.ndarray,
        classes: Sequence[str | None] | None = None,
        *,
        seed: int,
        steps: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """Translate cartoons (N, S, S, 3) uint8; arguments and result as of `baselines.run`.

        Args:
            classes: None reads them all off the pictures, by our own nets for every method.
            steps: None for the setting's.
        """
        given = [None] * len(images) if classes is None else list(classes)
        setting, scale = self.setting, self.setting.get("guidance_scale")
        if self.gan is not None:
            names = baselines.read_classes(self.translator, images, given)
            return self.gan.translate(images), names
        if self.own is not None:
            options = {**setting, "steps": steps or setting["steps"]}
            # The same camera as the translator's; its nets read classes for the report alone.
            made = self.own.translate(
                images, seed=seed, grain=self.translator.grain, numbers=numbers, **options
            )
            return made, baselines.read_classes(self.translator, images, given)
        if self.method == "ours":
            ours = self.translator
            ours = ours if scale is None else replace(ours, guidance_scale=scale)
            drawn = ours.translate(
                images, given, seed=seed, steps=steps or setting.get("steps"), numbers=numbers
            )
            return drawn.images, drawn.classes
        named = {f.name for f in fields(editing.Knobs)}
        changes = {name: value for name, value in setting.items() if name in named}
        own = editing.KNOBS.get(self.method, editing.Knobs())
        return baselines.run(
            self.method,
            self.translator,
            images,
            given,
            seed=seed,
            steps=steps or setting.get("steps"),
            guidance_scale=scale,
            knobs=replace(own, **changes) if changes else None,
            model=self.model,
            expert=self.expert,
            numbers=numbers,
        )


@dataclass(eq=False)
class RivalRun:
    """A method trained and tuned under a budget.

    Attributes:
        folder: of its weights and trials.
        trials: a row for each setting tried: setting, realism, faithfulness, score, seconds; none
            where the setting was given.
        points: name → setting of everything that can be translated with; best: the one that
            competes.
        seconds: budget, trained (in the course or from nothing), tuning.
        steps: of a GAN's training.
        curve: of a GAN under the total budget, its scores on validation cartoons on the way:
            seconds, realism, faithfulness, score.
    """

    method: str
    budget: str
    folder: Path
    key: str
    profile: Profile = field(repr=False)
    trials: list[dict[str, Any]] = field(repr=False)
    points: dict[str, dict[str, Any]] = field(repr=False)
    best: str
    seconds: dict[str, float]
    steps: int | None = None
    curve: list[dict[str, float]] = field(default_factory=list, repr=False)

    @property
    def setting(self) -> dict[str, Any]:
        """Of the point that competes."""
        return self.points[self.best]

    def open(self, translator: Translator) -> dict[str, Rival]:
        """The method at each of its points, by name."""
        model, expert, own, gan = None, None, None, {}
        if self.method in gans.KINDS:
            device = pick_device(self.profile.device)
            for name in self.points:
                gan[name] = gans.load_gan(weights_folder(self.folder, name))
                gan[name].generator.to(device)
        elif self.method in DIFFUSION:
            model = load_model(self.profile, denoiser_folder(self.profile, self.method))
            expert = load_expert(self.folder, self.profile) if self.method == "egsde" else None
        elif self.method == "untold":
            own = load_untold(self.profile, self.folder)
        return {
            name: Rival(self.method, translator, setting, model, expert, gan.get(name), own)
            for name, setting in self.points.items()
        }


def find(profile: Profile, method: str, translator: Translator) -> Rival:
    """A rival for `tomjerry translate --method`, by the best weights that the run has for it.

    A diffusion rival as the study left it; else with stage 04's denoiser; else with the
    translator's own. A GAN as the study left it, of the larger budget if it has both.

    Raises:
        UserError: a GAN that nobody has trained.
    """
    root = run_root(profile) / FOLDER
    if method in gans.KINDS:
        for budget in reversed(BUDGETS):
            if (root / budget / method / PROVENANCE).is_file():
                run = _load(root / budget / method, profile, budget, method)
                log(f"{TITLES[method]}: {weights_folder(run.folder, run.best)}")
                return replace(run, points={run.best: run.setting}).open(translator)[run.best]
        raise UserError(
            f"nobody has trained {TITLES[method]} for profile {profile.name}: "
            f"`tomjerry study rivals --profile {profile.name}` does"
        )
    if method not in DIFFUSION:
        return Rival(method, translator)
    made, stage = root / "course" / method, run_root(profile) / ldm.STAGE
    whole = (stage / PROVENANCE).is_file()  # its autoencoder is needed in either case
    if whole and (made / PROVENANCE).is_file():
        run = _load(made, profile, "course", method)
        log(f"{TITLES[method]}: {denoiser_folder(profile, method)}, as the study tuned it")
        return run.open(translator)[run.best]
    if whole:
        log(f"{TITLES[method]}: {stage / 'denoiser'}")
        return Rival(method, translator, model=load_model(profile, stage / "denoiser"))
    log(f"{TITLES[method]}: the translator's own denoiser, as this run has no stage 04")
    return Rival(method, translator)


# ---- training and tuning -----------------------------------------------------------------------


def ensure(
    profile: Profile, budget: str, method: str, *, setting: Mapping[str, Any] | None = None
) -> RivalRun:
    """A method under a budget: read it if it is finished, else train and tune it.

    Args:
        budget, method: of `budgets.METHODS`.
        setting: given, it is taken without any trial, as the first training seed found it under
            the budget :data:`~budgets.TUNED`; None only there.

    Raises:
        UserError: what has no such budget; see `budgets.budget_seconds`.
    """
    if method not in METHODS.get(budget, ()):
        raise UserError(f"no {method} under the budget '{budget}'")
    if setting is None and budget != TUNED:
        raise ValueError(f"settings are tried under the budget '{TUNED}': give the one found there")
    before = transfer.ensure(profile)
    stage = open_stage(
        profile,
        f"{FOLDER}/{budget}/{method}",
        {
            "grid": grid(method, profile),
            "setting": setting,
            "seconds": round(budget_seconds(profile, budget), 1),
            "trial_share": TRIAL_SHARE,
            **profile.rivals.model_dump(mode="json"),
        },
        {"transfer": before.key},
    )
    if not stage.finished:
        with stage.lock():
            if not stage.finished:
                _make(stage, profile, before.translator, budget, method, setting)
    return _load(stage.folder, profile, budget, method)


def _load(folder: Path, profile: Profile, budget: str, method: str) -> RivalRun:
    record = read_json(folder / PROVENANCE)
    return RivalRun(method, budget, folder, record["key"], profile, **record["extra"])


def _make(
    stage: Stage,
    profile: Profile,
    translator: Translator,
    budget: str,
    method: str,
    setting: Mapping[str, Any] | None,
) -> None:
    folder, allowed = stage.folder, budget_seconds(profile, budget)
    rival, trained = Rival(method, translator), 0.0
    log(f"rivals: {TITLES[method]} under the budget '{budget}', {allowed:.0f} s")
    if method in DIFFUSION:
        rival.model, rival.expert, trained = train_diffusion(method, profile, folder)
    elif method == "untold":
        rival.own, trained = train_untold(profile, folder)
    elif method == "ours":
        parts = course_seconds(profile)
        trained = sum(seconds for name, seconds in parts.items() if name[:2] in ("04", "05"))
    trials: list[dict[str, Any]] = []
    curve: list[dict[str, float]] = []
    steps: int | None = None
    if setting is None:
        trials = _tune(rival, profile, folder, allowed)
        points = {str(i): row["setting"] for i, row in enumerate(trials)}
        best = max(points, key=lambda name: trials[int(name)]["score"])
    else:
        points, best = {"final": dict(setting)}, "final"
    if method in gans.KINDS:
        points["final"] = points[best]
        best = "final"
        look = _look(_criterion(profile, translator)) if budget == "total" else None
        gan = train_gan(method, profile, folder, best, budget, points[best], allowed, look)
        trained, steps = gan.facts["seconds"], gan.facts["steps"]
        curve = gan.facts.get("curve", [])
    stage.finish(
        trials=trials,
        points=points,
        best=best,
        seconds={
            "budget": round(allowed, 1),
            "trained": round(trained, 1),
            "tuning": round(sum(row["seconds"] for row in trials), 1),
        },
        steps=steps,
        curve=curve,
    )


def _criterion(profile: Profile, translator: Translator) -> Criterion:
    count, start = profile.rivals.validation_scenes, RANGES["validation"][0]
    cartoons = render_many(range(start, start + count), "cartoon", profile.image_size)["image"]
    natural = training_pictures(profile, "natural")
    return Criterion(translator, cartoons, natural[:: max(1, len(natural) // NATURAL)])


def _look(criterion: Criterion) -> Callable[[gans.Gan], dict[str, float]]:
    return lambda gan: criterion.score(gan.translate(criterion.cartoons))


def _tune(rival: Rival, profile: Profile, folder: Path, allowed: float) -> list[dict[str, Any]]:
    """Try every setting of the grid; a trial that a killed run had finished is not redone.

    Args:
        allowed: seconds of the budget, of which each of a GAN's trials takes its share.
    """
    criterion: Criterion | None = None
    rows = []
    for number, setting in enumerate(grid(rival.method, profile)):
        note = folder / "trials" / f"{number}.json"
        if not note.is_file():
            criterion = criterion or _criterion(profile, rival.translator)
            seconds, tried = 0.0, replace(rival, setting=setting)
            if rival.method in gans.KINDS:
                short, name = TRIAL_SHARE * allowed, str(number)
                tried.gan = train_gan(rival.method, profile, folder, name, TUNED, setting, short)
                seconds = tried.gan.facts["seconds"]
            made, _ = tried.translate(criterion.cartoons, seed=profile.seed)
            found = criterion.score(made)
            write_json(note, {"setting": setting, **found, "seconds": seconds})
            log(f"rivals: {rival.method} trial {number + 1}: {setting}: score {found['score']:.3f}")
        rows.append(read_json(note))
    return rows
