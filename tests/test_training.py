"""The training loop: it learns, and a run that was stopped is the run that was not."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import free_port
from torch import Tensor, nn

from tomjerry_utils import UserError, checkpoints, cli, training
from tomjerry_utils.training import TrainResult, apply_ema, progress, schedule_factor, train

# A subprocess and the tests train this same model: dropout and batch norm make exact resume hard.
SETUP = """
import os, signal, sys, time
import torch
from torch import nn

def make(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 1)
    )

def batches(step, generator):
    x = torch.randn(32, 6, generator=generator)
    return x, (x[:, :1] * x[:, 1:2] + x[:, 2:3])

def loss_of(net):
    def loss_fn(batch, step, generator):
        x, y = batch
        noise = 0.05 * torch.randn(x.shape, generator=generator)
        error = net(x + noise) - y
        return error.square().mean(), {"mae": error.abs().mean()}
    return loss_fn
"""
_names: dict = {}
exec(SETUP, _names)
make, batches, loss_of = _names["make"], _names["batches"], _names["loss_of"]

SETTINGS = {
    "steps": 60, "learning_rate": 1e-2, "warmup_steps": 5, "seed": 7, "ema_decay": 0.95,
    "log_every": 8, "threads": 1,
}  # fmt: skip


def run(folder: Path, **changes: object) -> tuple[nn.Module, TrainResult]:
    net = make()
    settings = {**SETTINGS, **changes}
    return net, train({"net": net}, loss_of(net), batches, folder=folder, **settings)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_time(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, TrainResult]:
    return run(tmp_path_factory.mktemp("whole"))


def assert_equal_runs(
    got: tuple[nn.Module, TrainResult], whole: tuple[nn.Module, TrainResult]
) -> None:
    assert same(got[0].state_dict(), whole[0].state_dict())
    assert same(got[1].ema["net"], whole[1].ema["net"])
    assert without_time(got[1].history) == without_time(whole[1].history)


def test_loss_falls_and_history_is_written(tmp_path: Path) -> None:
    net, result = run(tmp_path, steps=400)
    assert result.finished
    assert result.steps == 400
    tail = [row["loss"] for row in result.history[-10:]]
    assert sum(tail) / len(tail) < 1.2
    assert set(result.history[0]) == {
        "step", "loss", "mae", "grad_norm", "learning_rate", "seconds",
    }  # fmt: skip
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert not (tmp_path / "checkpoint").exists()
    assert not net.training


def test_shuffled_targets_learn_nothing(tmp_path: Path) -> None:
    """Negative control: what falls is the loss of a task, not just any number."""
    net = make()

    def shuffled(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = batches(step, generator)
        return x, y[torch.randperm(len(y), generator=generator)]

    settings = {**SETTINGS, "steps": 400}
    result = train({"net": net}, loss_of(net), shuffled, folder=tmp_path, **settings)
    tail = [row["loss"] for row in result.history[-10:]]
    assert sum(tail) / len(tail) > 1.8  # the variance of the targets is 2


def test_two_runs_are_equal_and_another_seed_is_not(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    assert_equal_runs(run(tmp_path / "again"), uninterrupted)
    other, _ = run(tmp_path / "other", seed=8)
    assert not same(other.state_dict(), uninterrupted[0].state_dict())


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    net = make()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train({"net": net}, loss_of(net), batches, folder=tmp_path, **{**SETTINGS, "steps": 6})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop_at", [0, 1, 13, 24, 59])
def test_resumed_run_equals_uninterrupted(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult], stop_at: int
) -> None:
    """An error in the middle of a step: the run goes on from the checkpoint before it."""
    net = make()
    inner = loss_of(net)

    def fails(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step == stop_at:
            raise RuntimeError("power cut")
        return inner(batch, step, generator)

    with pytest.raises(RuntimeError, match="power cut"):
        train({"net": net}, fails, batches, folder=tmp_path, checkpoint_every_s=0.0, **SETTINGS)
    assert_equal_runs(run(tmp_path), uninterrupted)


def test_killed_run_equals_uninterrupted(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    """SIGKILL at no chosen moment (most likely while a checkpoint is written), then at a step."""
    script = tmp_path / "job.py"
    script.write_text(
        SETUP
        + textwrap.dedent(f"""
        from tomjerry_utils.training import train
        net = make()
        inner = loss_of(net)
        def loss_fn(batch, step, generator):
            if step == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[1] == "-1" and step == 40:
                time.sleep(600)  # however late the kill comes, it comes before the end
            return inner(batch, step, generator)
        train({{"net": net}}, loss_fn, batches, folder={str(tmp_path / "run")!r},
              checkpoint_every_s=0.0, **{SETTINGS!r})
        """)
    )
    history = tmp_path / "run/history.jsonl"
    worker = subprocess.Popen([sys.executable, str(script), "-1"], env=_env())
    while not (history.exists() and history.read_text().count("\n") >= 2):
        assert worker.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL

    done = subprocess.run([sys.executable, str(script), "42"], env=_env(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "run/checkpoint").iterdir()] == ["00000042"]
    assert_equal_runs(run(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("around", [nullcontext, cli._interrupts])
def test_interrupt_writes_a_checkpoint_first(
    around: Any, tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    net = make()
    inner = loss_of(net)

    def interrupted(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step == 20:
            signal.raise_signal(signal.SIGINT)
        return inner(batch, step, generator)

    with pytest.raises(KeyboardInterrupt), around():
        train({"net": net}, interrupted, batches, folder=tmp_path, **SETTINGS)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert (tmp_path / "checkpoint/00000021/state.json").exists()
    assert_equal_runs(run(tmp_path), uninterrupted)


def test_interrupt_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    net = make()
    inner = loss_of(net)

    def interrupted(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step == 59:
            signal.raise_signal(signal.SIGINT)
        return inner(batch, step, generator)

    with pytest.raises(KeyboardInterrupt):
        train({"net": net}, interrupted, batches, folder=tmp_path, **SETTINGS)
    assert run(tmp_path)[1].finished


def test_interrupt_in_the_step_that_ends_early_is_not_lost(tmp_path: Path) -> None:
    def on_log(step: int, modules: dict[str, nn.Module]) -> bool:
        if step == 24:
            signal.raise_signal(signal.SIGINT)
        return step == 24

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_log=on_log)
    assert (tmp_path / "checkpoint/00000024/state.json").exists()


def test_sigterm_of_a_scheduler_writes_a_checkpoint_first(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        SETUP
        + textwrap.dedent(f"""
        from tomjerry_utils.training import train
        net = make()
        inner = loss_of(net)
        def loss_fn(batch, step, generator):
            if step == 20:
                # To this thread: by way of another one it could arrive when all steps are over.
                signal.raise_signal(signal.SIGTERM)
            return inner(batch, step, generator)
        train({{"net": net}}, loss_fn, batches, folder={str(tmp_path / "run")!r}, **{SETTINGS!r})
        """)
    )
    # Coverage, where it measures this process, takes SIGTERM for itself.
    env = {name: value for name, value in _env().items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "stopped at step 21" in done.stderr
    assert (tmp_path / "run/checkpoint/00000021/state.json").exists()


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    run(tmp_path, max_seconds=0.0, keep_checkpoint=True)
    run(tmp_path, keep_checkpoint=True)
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "ema.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip


def test_kept_checkpoint_returns_at_once(tmp_path: Path) -> None:
    first, done = run(tmp_path, keep_checkpoint=True)
    net = make(seed=99)

    def never(step: int, generator: torch.Generator) -> None:
        raise AssertionError("a finished training draws no batch")

    again = train(
        {"net": net}, loss_of(net), never, folder=tmp_path, keep_checkpoint=True, **SETTINGS
    )
    assert same(net.state_dict(), first.state_dict())
    assert same(again.ema["net"], done.ema["net"])
    assert again.history == done.history


def test_budget_ends_a_run_that_a_larger_one_goes_on_with(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    net = make()
    inner = loss_of(net)

    def slow(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        time.sleep(0.01)
        return inner(batch, step, generator)

    part = train({"net": net}, slow, batches, folder=tmp_path, max_seconds=0.2, **SETTINGS)
    assert not part.finished
    assert 1 <= part.steps < 60
    assert part.ema["net"].keys() == net.state_dict().keys()
    assert run(tmp_path, max_seconds=0.2)[1].steps == part.steps
    assert_equal_runs(run(tmp_path), uninterrupted)


class Hand:
    """A clock that stands still unless it is moved."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


SLOW = {"quiet": range(0), "late": range(9, 99), "early": range(2)}


@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_work_beside_a_training_takes_nothing_off_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: range
) -> None:
    clock = Hand()
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(checkpoints, "SPAN", 4.0)

    def within(seconds: float) -> TrainResult:
        net = make()
        inner = loss_of(net)

        def loss(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
            clock.now += 5.0 if step in slow else 1.0
            return inner(batch, step, generator)

        return train({"net": net}, loss, batches, folder=tmp_path, max_seconds=seconds, **SETTINGS)

    first = within(14.0)
    assert (first.steps, first.spent) == (14, 14.0)
    clock.now += 1000.0
    result = within(24.0)  # the pace found so far outlives a stop
    assert (result.steps, result.spent) == (24, 24.0)
    assert result.seconds == 24.0 + 4.0 * len(set(slow) & set(range(24)))


def test_a_budget_too_short_for_a_pace_is_of_the_clocks_seconds() -> None:
    pace = checkpoints.Pace()
    for step in range(1, 5):
        pace.tell(step, 3.0 * step)
    assert pace.best is None and pace.spent(4, 12.0) == 12.0


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    net = make()
    inner = loss_of(net)

    def poisoned(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        loss, numbers = inner(batch, step, generator)
        return (loss * math.nan if step == 21 else loss), numbers

    with pytest.raises(UserError, match="learning_rate"):
        train({"net": net}, poisoned, batches, folder=tmp_path, checkpoint_every_s=0.0, **SETTINGS)
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    assert checkpoint.name == "00000021"
    # One poisoned step between two log lines is found even where no checkpoint asks.
    with pytest.raises(UserError, match="no checkpoint yet"):
        train({"net": make()}, poisoned, batches, folder=tmp_path / "b", **SETTINGS)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_seconds=0.0)  # a budget of nothing still trains nothing
    assert not (tmp_path / "checkpoint").exists()
    run(tmp_path, keep_checkpoint=True)
    with pytest.raises(UserError, match=r"learning_rate 0\.01 → 0\.02.*remove"):
        run(tmp_path, learning_rate=2e-2)


def test_broken_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    run(tmp_path, keep_checkpoint=True)
    (file,) = tmp_path.glob("checkpoint/*/weights.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="broken checkpoint") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)


def test_stray_folder_of_a_killed_write_is_removed(tmp_path: Path) -> None:
    stray = tmp_path / "checkpoint/.tmp-1234-00000030"
    stray.mkdir(parents=True)
    (stray / "weights.safetensors").write_bytes(b"half")
    run(tmp_path, keep_checkpoint=True)
    assert not stray.exists()


def test_every_older_checkpoint_is_removed(tmp_path: Path) -> None:
    """A kill between a checkpoint's name and the removal of the one before leaves both."""
    run(tmp_path, max_seconds=1e-6)
    (path,) = (tmp_path / "checkpoint").iterdir()
    shutil.copytree(path, path.with_name("00000000"))
    run(tmp_path, keep_checkpoint=True)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["00000060"]


def test_out_of_memory_in_the_optimiser_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's moments are made in its first step."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(UserError, match="out of memory at step 1: lower batch_size"):
        run(tmp_path)


def test_cut_history_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 8, "loss": 1.0}\n{"step": 16, "lo')
    _, result = run(tmp_path)
    assert [row["step"] for row in result.history] == [8, 16, 24, 32, 40, 48, 56, 60]


def test_ema_is_the_average_it_says(tmp_path: Path) -> None:
    """Against the recursion written out by hand; the live weights are something else."""
    net = nn.Linear(3, 1)
    seen: list[Tensor] = [net.weight.detach().clone()]

    def loss_fn(batch: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step:
            seen.append(net.weight.detach().clone())
        return net(batch).square().mean(), {}

    result = train(
        {"net": net},
        loss_fn,
        lambda step, generator: torch.randn(8, 3, generator=generator),
        steps=12, learning_rate=0.1, folder=tmp_path, seed=0, ema_decay=0.5,
    )  # fmt: skip
    seen.append(net.weight.detach().clone())
    average = seen[0]
    for step, weight in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(result.ema["net"]["weight"], average)
    assert not torch.allclose(net.weight, average)
    apply_ema({"net": net}, result)
    assert torch.equal(net.weight, result.ema["net"]["weight"])


def test_on_log_sees_averaged_weights_and_changes_nothing(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    seen: list[tuple[int, Tensor]] = []

    def on_log(step: int, modules: dict[str, nn.Module]) -> None:
        assert not modules["net"].training
        assert not torch.is_grad_enabled()
        torch.rand(5)  # drawing a picture may use randomness
        seen.append((step, modules["net"][0].weight.clone()))

    got = run(tmp_path, on_log=on_log)
    assert_equal_runs(got, uninterrupted)
    assert [step for step, _ in seen] == [8, 16, 24, 32, 40, 48, 56, 60]
    assert torch.equal(seen[-1][1], got[1].ema["net"]["0.weight"])


def test_only_what_requires_grad_is_trained(tmp_path: Path) -> None:
    net, frozen = make(), nn.BatchNorm1d(6)
    frozen.requires_grad_(False)
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    inner = loss_of(net)

    def loss_fn(batch: tuple, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        assert not frozen.training
        return inner((frozen(batch[0]), batch[1]), step, generator)

    result = train(
        {"net": net, "frozen": frozen}, loss_fn, batches, folder=tmp_path, ema_on=["net"],
        **SETTINGS,
    )  # fmt: skip
    assert torch.equal(net[0].weight, before)
    assert torch.equal(result.ema["net"]["0.weight"], before)
    assert set(result.ema) == {"net"}
    with pytest.raises(ValueError, match="nothing to train"):
        train({"f": frozen}, loss_fn, batches, folder=tmp_path, **SETTINGS)


def test_tied_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    """BLIP's decoder shares its embedding with its head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    net = Tied()

    def loss_fn(batch: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        return nn.functional.cross_entropy(net.head(net.embed(batch)), batch), {}

    result = train(
        {"net": net},
        loss_fn,
        lambda step, generator: torch.randint(0, 5, (8,), generator=generator),
        steps=5, learning_rate=0.01, folder=tmp_path, seed=0, ema_decay=0.9, keep_checkpoint=True,
    )  # fmt: skip
    apply_ema({"net": net}, result)
    assert net.head.weight is net.embed.weight


def test_bf16_keeps_fp32_weights_and_learns(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 1, 3)).half()
    kinds = set()

    def loss_fn(batch: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        out = net(batch)
        kinds.add(out.dtype)
        return (out.float() - batch[..., 2:-2, 2:-2]).square().mean(), {}

    def draw(step: int, generator: torch.Generator) -> Tensor:
        return torch.randn(4, 1, 12, 12, generator=generator)

    result = train(
        {"net": net}, loss_fn, draw, steps=80, learning_rate=1e-2, folder=tmp_path, seed=0,
        precision="bf16", log_every=10,
    )  # fmt: skip
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_warms_up_and_decays_to_zero(schedule: str) -> None:
    factors = [
        schedule_factor(step, steps=100, warmup_steps=10, schedule=schedule) for step in range(101)
    ]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    """Two processes with a batch each step like one with both batches (no dropout, plain loss)."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, torch
        from torch import nn
        from safetensors.torch import save_file
        from tomjerry_utils.training import train
        rank = int(os.environ["RANK"])
        torch.manual_seed(rank)  # different starts: those of process 0 must win
        net = nn.Linear(3, 1)
        data = torch.arange(24.0).reshape(2, 4, 3) / 24
        def loss_fn(batch, step, generator):
            return (net(batch) - batch.sum(1, keepdim=True)).square().mean(), {{}}
        result = train({{"net": net}}, loss_fn, lambda step, generator: data[rank], steps=10,
                       learning_rate=0.05, folder={str(tmp_path / "two")!r}, seed=0, device="cpu",
                       ema_decay=0.5)
        save_file(result.ema["net"], f"{tmp_path}/ema{{rank}}.safetensors")
        save_file(net.state_dict(), f"{tmp_path}/{{rank}}.safetensors")
        """)
    )
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=_env(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port),
        )
        for port in [free_port()]
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0]

    from safetensors.torch import load_file

    two = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert same(*two)
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    data = torch.arange(24.0).reshape(8, 3) / 24
    one = train(
        {"net": net},
        lambda batch, *_: ((net(batch) - batch.sum(1, keepdim=True)).square().mean(), {}),
        lambda step, generator: data,
        steps=10, learning_rate=0.05, folder=tmp_path / "one", seed=0, device="cpu", ema_decay=0.5,
    )  # fmt: skip
    for key, value in net.state_dict().items():
        torch.testing.assert_close(two[0][key], value)
    averaged = load_file(tmp_path / "ema1.safetensors")
    torch.testing.assert_close(averaged["weight"], one.ema["net"]["weight"])
    assert len((tmp_path / "two/history.jsonl").read_text().splitlines()) == 1


def plain_loss(net: nn.Module) -> Any:
    def loss_fn(batch: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        loss = (net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss, {"first": batch[0, 0]}

    return loss_fn


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


LINEAR = {"steps": 10, "learning_rate": 0.05, "seed": 0, "device": "cpu", "log_every": 5}


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_accumulated_halves_equal_the_whole_batch(grad_clip: float | None, tmp_path: Path) -> None:
    """For a loss that is a mean: same weights, averages, moments, loss and norm of the gradient."""
    data = torch.randn(10, 8, 3, generator=torch.Generator().manual_seed(1))
    asked: list[tuple[int, int]] = []

    def halves(step: int, generator: torch.Generator) -> Tensor:
        part = sum(1 for at, _ in asked if at == step)
        asked.append((step, part))
        return data[step, 4 * part : 4 * part + 4]

    def first_half(step: int, generator: torch.Generator) -> Tensor:
        return data[step, :4]

    found = {}
    for name, batches_of, accumulation in (
        ("whole", lambda step, generator: data[step], 1),
        ("halves", halves, 2),
        ("half", first_half, 1),
        ("twice", first_half, 2),
    ):
        net = linear()
        result = train(
            {"net": net}, plain_loss(net), batches_of, folder=tmp_path / name, ema_decay=0.5,
            accumulation=accumulation, grad_clip=grad_clip, keep_checkpoint=True, **LINEAR,
        )  # fmt: skip
        found[name] = (net, result)
    assert asked == [(step, part) for step in range(10) for part in (0, 1)]
    for one, two in (("halves", "whole"), ("twice", "half")):
        (net, result), (other, expected) = found[one], found[two]
        torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=1e-6)
        torch.testing.assert_close(result.ema["net"], expected.ema["net"], rtol=0, atol=1e-6)
        for row, true in zip(result.history, expected.history, strict=True):
            assert row["loss"] == pytest.approx(true["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-5)
    # Control: half of the data is not the whole of it.
    difference = found["half"][0].weight - found["whole"][0].weight
    assert difference.abs().max() > 1e-3


def test_accumulation_logs_the_mean_over_its_batches(tmp_path: Path) -> None:
    net = linear()
    result = train(
        {"net": net}, plain_loss(net), lambda step, generator: torch.full((4, 3), float(step % 2)),
        folder=tmp_path / "a", accumulation=3, **{**LINEAR, "log_every": 2},
    )  # fmt: skip
    assert [row["first"] for row in result.history] == [0.5] * 5
    seen: list[float] = []

    def drawn(step: int, generator: torch.Generator) -> Tensor:
        batch = torch.rand(4, 3, generator=generator)
        seen.append(batch[0, 0].item())
        return batch

    net = linear()
    settings = {**LINEAR, "log_every": 1}
    result = train(
        {"net": net}, plain_loss(net), drawn, folder=tmp_path / "b", accumulation=3, **settings
    )
    assert len(set(seen)) == 30  # no batch is drawn twice
    means = [sum(seen[i : i + 3]) / 3 for i in range(0, 30, 3)]
    assert [row["first"] for row in result.history] == pytest.approx(means, rel=1e-6)


def test_resumed_accumulation_equals_uninterrupted(tmp_path: Path) -> None:
    """Killed between two batches of one step: the step begins anew."""
    whole = run(tmp_path / "whole", accumulation=2)
    net = make()
    inner = loss_of(net)
    calls = 0

    def fails(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        nonlocal calls
        calls += 1
        if calls == 28:
            raise RuntimeError("power cut")
        return inner(batch, step, generator)

    settings = {**SETTINGS, "accumulation": 2, "checkpoint_every_s": 0.0}
    with pytest.raises(RuntimeError, match="power cut"):
        train({"net": net}, fails, batches, folder=tmp_path / "cut", **settings)
    assert [p.name for p in (tmp_path / "cut/checkpoint").iterdir()] == ["00000013"]
    assert_equal_runs(run(tmp_path / "cut", accumulation=2), whole)
    run(tmp_path / "other", accumulation=2, keep_checkpoint=True)
    with pytest.raises(UserError, match="accumulation 2 → 1"):
        run(tmp_path / "other")


def test_two_processes_equal_one_that_accumulates_two(tmp_path: Path) -> None:
    """They draw the very batches of it, and an end that the main process decides is everyone's."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, os, torch
        from torch import nn
        from safetensors.torch import save_file
        from tomjerry_utils.training import train
        rank = int(os.environ["RANK"])
        torch.manual_seed(rank)
        net = nn.Linear(3, 1)
        drawn = []
        def batches(step, generator):
            batch = torch.randn(4, 3, generator=generator)
            drawn.append(batch[0, 0].item())
            return batch
        def loss_fn(batch, step, generator):
            noise = 0.1 * torch.randn(batch.shape, generator=generator)
            return (net(batch + noise) - batch.sum(1, keepdim=True)).square().mean(), {{}}
        result = train({{"net": net}}, loss_fn, batches, folder={str(tmp_path / "two")!r},
                       ema_decay=0.5, keep_checkpoint=True, **{ {**LINEAR, "log_every": 3}!r},
                       on_log=lambda step, modules: step == 6)
        save_file(net.state_dict(), f"{tmp_path}/{{rank}}.safetensors")
        facts = [result.steps, result.finished, result.ended_early, drawn]
        open(f"{tmp_path}/{{rank}}.json", "w").write(json.dumps(facts))
        """)
    )
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=_env(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port),
        )
        for rank in ("0", "1")
    ]
    drawn: list[float] = []

    def draw(step: int, generator: torch.Generator) -> Tensor:
        batch = torch.randn(4, 3, generator=generator)
        drawn.append(batch[0, 0].item())
        return batch

    def noisy(net: nn.Module) -> Any:
        def loss_fn(batch: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
            noise = 0.1 * torch.randn(batch.shape, generator=generator)
            return (net(batch + noise) - batch.sum(1, keepdim=True)).square().mean(), {}

        return loss_fn

    nets = {}
    for accumulation in (2, 1):
        nets[accumulation] = linear()
        train(
            {"net": nets[accumulation]}, noisy(nets[accumulation]), draw,
            folder=tmp_path / f"one {accumulation}", ema_decay=0.5, accumulation=accumulation,
            on_log=lambda step, modules: step == 6, **{**LINEAR, "log_every": 3},
        )  # fmt: skip
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0]

    from safetensors.torch import load_file

    two = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert same(*two)
    assert [fact[:3] for fact in facts] == [[6, True, True]] * 2
    assert [x for pair in zip(facts[0][3], facts[1][3], strict=True) for x in pair] == drawn[:12]
    for key, value in nets[2].state_dict().items():
        torch.testing.assert_close(two[0][key], value, rtol=0, atol=1e-5)
    assert (two[0]["weight"] - nets[1].weight).abs().max() > 1e-4


def test_on_log_may_end_the_training(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    net = make()
    seen: list[int] = []

    def enough(step: int, modules: dict[str, nn.Module]) -> bool:
        seen.append(step)
        return step >= 24

    first = train(
        {"net": net}, loss_of(net), batches, folder=tmp_path, keep_checkpoint=True, on_log=enough,
        **SETTINGS,
    )  # fmt: skip
    assert (first.steps, first.finished, first.ended_early) == (24, True, True)
    assert seen == [8, 16, 24]
    assert without_time(first.history) == without_time(uninterrupted[1].history[:3])
    assert not net.training
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["00000024"]

    def never(*_: object) -> None:
        raise AssertionError("a training that has ended makes no step and asks nobody")

    again = make(seed=99)
    second = train(
        {"net": again}, never, never, folder=tmp_path, keep_checkpoint=True, on_log=never,
        **SETTINGS,
    )  # fmt: skip
    assert (second.steps, second.finished, second.ended_early) == (24, True, True)
    assert same(again.state_dict(), net.state_dict())
    assert same(second.ema["net"], first.ema["net"])
    assert second.history == first.history


def test_an_end_leaves_no_checkpoint_unless_it_is_kept(tmp_path: Path) -> None:
    _, result = run(tmp_path, on_log=lambda step, modules: True, checkpoint_every_s=0.0)
    assert (result.steps, result.ended_early) == (8, True)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("answer", [None, False, 0])
def test_only_a_yes_ends_it(
    answer: Any, tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    got = run(tmp_path, on_log=lambda step, modules: answer)
    assert not got[1].ended_early
    assert_equal_runs(got, uninterrupted)


def test_a_yes_at_the_last_step_is_no_early_end(
    tmp_path: Path, uninterrupted: tuple[nn.Module, TrainResult]
) -> None:
    got = run(tmp_path, on_log=lambda step, modules: step == 60)
    assert got[1].finished
    assert not got[1].ended_early
    assert_equal_runs(got, uninterrupted)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("no"), False),
    ],
)
def test_out_of_memory_names_the_knob(error: Exception, told: bool, tmp_path: Path) -> None:
    net = make()
    inner = loss_of(net)

    def fails(batch: object, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        if step == 3:
            raise error
        return inner(batch, step, generator)

    with pytest.raises(UserError if told else type(error)) as caught:
        train({"net": net}, fails, batches, folder=tmp_path, memory_knobs="halve it", **SETTINGS)
    if told:
        assert str(caught.value) == "training: out of memory at step 4: halve it"
    else:
        assert caught.value is error


def test_processes_draw_different_batches() -> None:
    from tomjerry_utils.training import _seed_step

    cpu = torch.device("cpu")
    draws = {
        key: torch.rand(1, generator=_seed_step(*key, cpu)).item()
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len(set(draws.values())) == 4


def test_wrong_calls_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ema_on"):
        run(tmp_path, ema_on=["nett"])
    with pytest.raises(UserError, match="warmup_steps 100 is more than steps 60"):
        run(tmp_path, warmup_steps=100)
    with pytest.raises(ValueError, match="accumulation >= 1"):
        run(tmp_path, accumulation=0)
    with pytest.raises(ValueError, match="precision"):
        run(tmp_path, precision="fp16")
    with pytest.raises(UserError, match="device"):
        run(tmp_path, device="tpu")


def test_progress_logs_lines_off_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], "counting", every_s=0.0)) == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert "counting: 3/3" in lines[-1]
    assert list(progress(2, "quick")) == [0, 1]
    assert capsys.readouterr().err == ""


def test_overhead_of_a_step_is_small(tmp_path: Path) -> None:
    """Everything but forward, backward and AdamW itself, in times of just these.

    Both in this thread's own seconds, in turns, the least of each: a busy machine slows both.
    """
    net = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def bare() -> None:
        for _ in range(200):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def whole() -> None:
        train(
            {"net": net},
            lambda batch, step, generator: (net(batch).square().mean(), {}),
            lambda step, generator: x,
            steps=200, learning_rate=1e-3, folder=tmp_path, seed=0, ema_decay=0.99, threads=1,
        )  # fmt: skip

    taken: dict[Any, list[float]] = {bare: [], whole: []}
    for run_all in (bare, whole) * 4:
        began = time.thread_time()
        run_all()
        taken[run_all].append(time.thread_time() - began)
    assert min(taken[whole]) < 12 * min(taken[bare])  # under a millisecond a step


def _env(**more: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {
        **os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **more
    }  # fmt: skip
