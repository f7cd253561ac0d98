"""Settings: four sizes of one course, each a YAML file read into a strict, typed, frozen model.

Every value stands in every file, with a comment; there are no hidden defaults. An unknown key, a
missing key or a value of the wrong type is a `UserError` that names the file and the key.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tomjerry_utils import UserError

NAMES = ("smoke", "mini", "colab", "paper")
DEFAULT = "mini"
FOLDER = Path(__file__).parent / "profiles"

Fraction = Field(ge=0.0, le=1.0)
Positive = Field(gt=0)
NotNegative = Field(ge=0)


class _Settings(BaseModel):
    """Strict, frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def named(self) -> dict[str, Any]:
        """The settings that name a stage's run, as JSON takes them.

        Accumulation counts where there is any: a run made without it, before there was such a
        key, keeps its name.
        """
        values = self.model_dump(mode="json")
        return {k: v for k, v in values.items() if not (k.endswith("accumulation") and v == 1)}


class CollectSettings(_Settings):
    """Stage 01: where pictures come from and how they are split."""

    sources: tuple[Literal["scenes", "starter", "clip", "folder", "kaggle", "video"], ...] = Field(
        min_length=1, strict=False
    )
    per_class: int = Positive
    validation_fraction: float = Field(gt=0.0, lt=1.0)
    clip_every_s: float = Positive
    smallest: int = Positive
    both: Literal["found", "composites", "none"]
    neither: Literal["drop", "background"]
    label_precision: float = NotNegative
    decisions: str
    kaggle_cartoon: str
    kaggle_cat: str
    mouse_archive: str


class CaptionSettings(_Settings):
    """Stage 02: how many captions, and who writes them."""

    count: int = Positive
    source: Literal["replay", "openai"]
    model: str
    prompt_version: str
    detail: Literal["auto", "low", "high"]
    longest_side: int = Field(ge=32, le=2048)
    concurrency: int = Field(ge=1, le=256)


class BlipSettings(_Settings):
    """Stage 03: fine-tuning BLIP on the captions."""

    pretrained: str
    steps: int = Positive
    batch_size: int = Positive
    label_batch_size: int = NotNegative
    learning_rate: float = Positive
    warmup_steps: int = NotNegative
    accumulation: int = Positive
    ema_decay: float = Field(ge=0.0, lt=1.0)
    stopping_fraction: float = Field(gt=0.0, lt=1.0)
    patience: int = NotNegative
    max_length: int = Positive
    contrastive_weight: float = NotNegative
    lora_rank: int = NotNegative
    caption_batch_size: int = Positive


class LdmSettings(_Settings):
    """Stage 04: the autoencoder and the class-conditional latent diffusion model."""

    autoencoder: str
    autoencoder_subfolder: str
    denoiser: str
    denoiser_subfolder: str
    autoencoder_steps: int = NotNegative
    autoencoder_batch_size: int = Positive
    autoencoder_accumulation: int = Positive
    autoencoder_learning_rate: float = Positive
    steps: int = Positive
    batch_size: int = Positive
    accumulation: int = Positive
    learning_rate: float = Positive
    lora_rank: int = NotNegative
    gradient_checkpointing: bool
    prediction_type: Literal["sample", "epsilon", "v_prediction"]
    min_snr_gamma: float = Positive
    class_dropout: float = Fraction
    structure_dropout: float = Fraction
    caption_dropout: float = Fraction
    ema_decay: float = Field(ge=0.0, lt=1.0)
    warmup_steps: int = NotNegative
    sample_steps: int = Positive
    guidance_scale: float = NotNegative
    samples_per_class: int = Positive


class TransferSettings(_Settings):
    """Stage 05: the source-conditioned, BLIP-regularised translator."""

    structure: str
    posture: str
    steps: int = Positive
    batch_size: int = Positive
    accumulation: int = Positive
    learning_rate: float = Positive
    lora_rank: int = NotNegative
    attention: Literal["poster", "ldm"]
    blip_weight: float = NotNegative
    blip_batch_size: int = Positive
    blip_variant: Literal["vision", "contrastive", "matching", "likelihood"]
    structure_noise: float = NotNegative
    sample_steps: int = Positive
    guidance_scale: float = NotNegative
    blip_guidance: float = NotNegative
    ablation_steps: int = Positive


class FinishingSettings(_Settings):
    """Stages 04 and 05, after their trainings: see `finishing`."""

    pictures: int = Positive
    steps: int = NotNegative
    batch_size: int = Positive
    accumulation: int = Positive
    learning_rate: float = Positive


class CompareSettings(_Settings):
    """Stage 06: how many test scenes, and the rivals' knobs."""

    test_scenes: int = Positive
    batch_size: int = Positive
    sdedit_strength: float = Field(gt=0.0, le=1.0)
    bootstrap: int = Positive
    candidates: int = Positive
    sweep_scenes: int = Field(ge=2)


class RivalSettings(_Settings):
    """The study's comparison on equal terms, see `rivals`."""

    budget_share: float = Field(gt=0.0, le=1.0)
    validation_scenes: int = Positive
    zoo_pictures: int = Positive


class Profile(_Settings):
    """All settings of one run of the course."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = NotNegative
    image_size: int = Field(ge=32, multiple_of=8)
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int = NotNegative
    precision: Literal["fp32", "bf16"]
    checkpoint_every_s: float = Positive
    collect: CollectSettings
    captions: CaptionSettings
    blip: BlipSettings
    ldm: LdmSettings
    transfer: TransferSettings
    finishing: FinishingSettings
    compare: CompareSettings
    rivals: RivalSettings


def load_profile(name: str | Path | None = None, *, seed: int | None = None) -> Profile:
    """Read a profile by name or from a YAML file.

    Args:
        name: one of `NAMES`, a path to a `.yaml` file, or None for the environment variable
            `TOMJERRY_PROFILE`, and `mini` where that is not set.
        seed: replaces the profile's own seed.

    Raises:
        UserError: no such profile, unreadable YAML, an unknown or missing key, a bad value.
    """
    path = _find(name if name is not None else os.environ.get("TOMJERRY_PROFILE") or DEFAULT)
    values = _read(path)
    if seed is not None:
        values["seed"] = seed
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, path)) from None
    if profile.name != path.stem:
        # Two profiles with one name would overwrite each other's run folder.
        raise UserError(
            f"{path}: the key 'name' says '{profile.name}' but the file is '{path.name}': "
            f"write 'name: {path.stem}' or rename the file"
        )
    return profile


def _find(name: str | Path) -> Path:
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"no profile file {path}: give a file that exists, or one of {_list()}")
        return path
    if text not in NAMES:
        near = difflib.get_close_matches(text, NAMES, n=1, cutoff=0.0)
        raise UserError(
            f"no profile '{text}': did you mean '{near[0]}'? There are {_list()}; "
            "a file of your own must end in .yaml"
        )
    return FOLDER / f"{text}.yaml"


def _list() -> str:
    return ", ".join(NAMES)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}, line {line}: not valid YAML ({error.problem}): mend that line"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: not a YAML text file: copy one from {FOLDER}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no 'key: value' lines: copy one from {FOLDER}")
    return values


def _explain(error: ValidationError, path: Path) -> str:
    """The first mistake in one line: unknown keys first, since a typo also makes a key missing."""
    mistakes = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    first = mistakes[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        hint = f": did you mean '{near[0]}'?" if near else ": remove it"
        return f"{path}: unknown key '{where}'{hint}"
    if first["type"] == "missing":
        return f"{path}: the key '{where}' is missing: copy its line from {FOLDER / 'mini.yaml'}"
    message = first["msg"].replace("\n", " ")
    return f"{path}: key '{where}': {message[0].lower()}{message[1:]}, got {first['input']!r}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Profile
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields)
