"""What this machine can do: versions, cores, memory, device, shipped weights, keys, profile."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tomjerry_utils import __version__, u2net
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import (
    PROVENANCE,
    foundation_root,
    hash_file,
    project_root,
    read_json,
    run_root,
)

GIB = 2**30
# What ships; the course itself makes a translator, so that one may be missing.
MODELS = (
    *("autoencoder", "blip", "structure", "posture", "denoiser", "judges", "translator"),
    "screens",
)
SPARE = ("translator",)
STAGES = ("01_collect", "02_captions", "03_blip", "04_ldm", "05_transfer", "06_compare")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what, its value, and what to do where something is amiss.

    `state` is "ok", "note" (nothing wrong, good to know) or "bad" (the course will not run).
    """

    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def examine(profile: Profile) -> list[Finding]:
    """Look at this machine and this checkout; never shows a key, never uses the network."""
    return [
        _python(),
        _package(),
        *_hardware(profile),
        *_libraries(),
        *_weights(),
        _silhouettes(),
        *_keys(),
        _run(profile),
        suggest_profile(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines of text."""
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"{'':<{width + 7}}-> {finding.advice}")
    return "\n".join(lines)


def suggest_profile() -> Finding:
    """The largest profile that this machine's device carries."""
    name, memory = _device()
    if name.startswith("cuda") and memory >= 40:
        return Finding("profile", f"paper ({memory:.0f} GiB of GPU memory)")
    if name.startswith("cuda") and memory >= 14:
        return Finding("profile", f"colab ({memory:.0f} GiB of GPU memory)")
    return Finding("profile", "mini (no GPU with 14 GiB or more)")


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python",
        f"{platform.python_version()} at {sys.executable}",
        "ok" if good else "bad",
        "" if good else "diffusers and transformers need Python 3.11 or newer",
    )


def _package() -> Finding:
    return Finding("tomjerry-utils", f"{__version__} in {project_root()}")


def _hardware(profile: Profile) -> Iterator[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{cores}")
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    yield Finding(
        "memory",
        f"{free:.1f} GiB free of {memory.total / GIB:.1f}",
        "ok" if free >= 4 else "note",
        "" if free >= 4 else "mini wants about 4 GiB: close other programs, or use smoke",
    )
    folder = _existing(run_root(profile))
    disk = shutil.disk_usage(folder).free / GIB
    yield Finding(
        "disk",
        f"{disk:.1f} GiB free in {folder}",
        "ok" if disk >= 3 else "note",
        "" if disk >= 3 else "a mini run wants about 3 GiB: set TOMJERRY_RUNS to a larger disk",
    )
    writable = os.access(folder, os.W_OK)
    yield Finding(
        "runs",
        f"{run_root(profile)}",
        "ok" if writable else "bad",
        "" if writable else "not writable: set TOMJERRY_RUNS to a folder of yours",
    )
    name, gpu = _device()
    yield Finding("device", f"{name}, {gpu:.0f} GiB" if gpu else name)


def _device() -> tuple[str, float]:
    """The device that `device: auto` means, and its memory in GiB (0 for the CPU)."""
    try:
        import torch
    except ImportError:
        return "none (torch is not installed)", 0.0
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return f"cuda: {facts.name}", facts.total_memory / GIB
    if torch.backends.mps.is_available():
        return "mps: Apple GPU", 0.0
    return f"cpu, {torch.get_num_threads()} torch threads", 0.0


def _libraries() -> Iterator[Finding]:
    for package in ("torch", "diffusers", "transformers", "accelerate", "papermill", "jupyterlab"):
        try:
            yield Finding(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "not installed", "bad", "run 'make course', or pip install -e .")


def _weights() -> Iterator[Finding]:
    total = 0
    for model in MODELS:
        folder = foundation_root() / model
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            yield Finding(
                f"weights {model}",
                "missing",
                "note" if model in SPARE else "bad",
                f"clone the project again, or run 'tomjerry foundation {model}'",
            )
        for file in files:
            size = file.stat().st_size
            total += size
            promised = _promised(folder).get(file.relative_to(folder).as_posix(), size)
            yield Finding(
                f"weights {model}",
                f"{file.relative_to(folder)}  {size / 1e6:.1f} MB  sha256 {hash_file(file)[:16]}",
                "ok" if size == promised else "bad",
                "" if size == promised else f"should have {promised} bytes: clone again",
            )
    yield Finding("weights in all", f"{total / 1e6:.1f} MB in {foundation_root()}")


def _promised(folder: Path) -> dict[str, int]:
    path = folder / PROVENANCE
    return dict(read_json(path).get("bytes", {})) if path.is_file() else {}


def _silhouettes() -> Finding:
    there = u2net.is_there()
    return Finding(
        "U²-Net-p",
        f"{'in' if there else 'not in'} {u2net.place().parent}",
        "ok" if there else "note",
        "" if there else "only needed by `tomjerry translate --silhouette`, which fetches it",
    )


def _keys() -> Iterator[Finding]:
    openai = bool(os.environ.get("OPENAI_API_KEY"))
    yield Finding(
        "OpenAI key",
        "set" if openai else "not set",
        "ok" if openai else "note",
        "" if openai else "only needed to caption real pictures; the replay source needs none",
    )
    from tomjerry_utils.kaggle import credentials

    kaggle = bool(credentials())
    yield Finding(
        "Kaggle token",
        "set" if kaggle else "not set",
        "ok" if kaggle else "note",
        "" if kaggle else "only needed to fetch the poster's data; scenes need none",
    )


def _run(profile: Profile) -> Finding:
    done = [stage for stage in STAGES if (run_root(profile) / stage / PROVENANCE).is_file()]
    value = ", ".join(done) if done else "nothing yet"
    return Finding(f"run of {profile.name}", f"finished: {value}")


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder
