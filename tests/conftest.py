"""One torch thread, and runs in a temporary folder: no test touches the repository's own runs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from caption_server import Server
    from tiny_models import Captioned

    from tomjerry_utils.blip import Blip
    from tomjerry_utils.training import TrainResult

# Before anything imports torch: on a busy pair of cores two threads are slower than one.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("TOMJERRY_PROFILE", "TOMJERRY_ROOT", "TOMJERRY_NO_TRAINING"):
    os.environ.pop(name, None)


# Started in the background, a shell has Ctrl-C ignored, and the tests of Ctrl-C would wait for it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers for a test and its fixtures, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def session_runs() -> Iterator[Path]:
    """A run root for the whole session, so that one test's finished stage serves the next."""
    with tempfile.TemporaryDirectory(prefix="tomjerry-runs-") as folder:
        before = os.environ.get("TOMJERRY_RUNS")
        os.environ["TOMJERRY_RUNS"] = folder
        yield Path(folder)
        if before is None:
            os.environ.pop("TOMJERRY_RUNS", None)
        else:
            os.environ["TOMJERRY_RUNS"] = before


@pytest.fixture
def fresh_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run root for one test."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("TOMJERRY_RUNS", str(folder))
    return folder


@pytest.fixture
def own_runs(session_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run root for one test, with the pictures that the session has collected, and no money."""
    from tomjerry_utils import collect
    from tomjerry_utils.profiles import load_profile

    made = collect.ensure(load_profile("smoke"))
    shutil.copytree(made.folder, tmp_path / "runs" / "smoke" / made.folder.name)
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("TOMJERRY_CAPTION_BUDGET", raising=False)
    return tmp_path / "runs"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A loopback server that behaves like OpenAI's, and the key to it in the environment."""
    from caption_server import KEY, serving

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as made:
        yield made


@pytest.fixture(scope="session")
def dozen() -> Captioned:
    """Twelve training scenes of different captions, half of them cartoons."""
    import tiny_models

    return tiny_models.captioned()


@pytest.fixture(scope="session")
def learnt_blip(
    dozen: Captioned, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Blip, TrainResult]:
    """A tiny BLIP that knows the dozen by heart, and how it got there; nobody may change it."""
    import tiny_models

    model = tiny_models.tiny_blip()
    return model, tiny_models.tune_blip(model, dozen, tmp_path_factory.mktemp("learnt"))
