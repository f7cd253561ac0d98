"""What lets a training be stopped at any moment and go on as if it had not been.

Used by `training.train` alone: the averaged weights, the sums since the last log line, the
checkpoint on disk, and the signals that ask for a stop.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.runs import atomic_dir, log, read_json, read_jsonl, write_json, write_jsonl

Modules = Mapping[str, nn.Module]
SPAN = 15.0  # seconds over which a training's pace is taken


def trained_parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """`module/parameter` → each parameter with `requires_grad`, once, made float32."""
    trained: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.data = parameter.data.float()
                trained[f"{name}/{key}"] = parameter
    if not trained:
        raise ValueError("nothing to train: no parameter of these modules has requires_grad")
    return trained


class Ema:
    """Exponential moving average of the trained parameters of some modules."""

    def __init__(self, modules: Modules, names: Sequence[str], decay: float) -> None:
        self.decay = decay
        self.modules = {name: modules[name] for name in names}
        self.live = trained_parameters(self.modules)
        self.shadow = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), weight)

    def swap(self) -> None:
        """Exchange live and averaged weights; no number is copied."""
        for name, parameter in self.live.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Name of module → its state dict with the averaged weights."""
        self.swap()
        moving = {id(parameter) for parameter in self.live.values()}
        try:
            return {
                name: {
                    # Frozen weights are shared, not copied: with LoRA they are nearly all.
                    key: value if _frozen(module, value, moving) else value.detach().clone()
                    for key, value in module.state_dict(keep_vars=True).items()
                }
                for name, module in self.modules.items()
            }
        finally:
            self.swap()


class Window:
    """Sums since the last log line, left on the device: no step waits for a number."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, **values: Any) -> None:
        """Add one step's numbers or scalar tensors."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def plain(self) -> dict[str, Any]:
        """Name → [sum, count], as JSON takes it."""
        return {name: [float(value), self.counts[name]] for name, value in self.sums.items()}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go back to what `plain` gave."""
        # A float32 sum survives the way through JSON's float64 unchanged.
        self.sums = {name: torch.tensor(value[0]) for name, value in plain.items()}
        self.counts = {name: value[1] for name, value in plain.items()}


class Pace:
    """Steps a second where nothing else was running, which is what a budget of seconds buys.

    The fastest of a training's spans of :data:`SPAN` seconds. So other work beside a training, a
    checkpoint on a slow disk or a pause make it later, not shorter.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self._since: tuple[int, float] | None = None

    def tell(self, step: int, seconds: float) -> None:
        """A step is done: its number and the seconds of training so far."""
        if self._since is None:
            self._since = (step, seconds)
            return
        steps, span = step - self._since[0], seconds - self._since[1]
        if span >= SPAN:
            self.best = max(self.best or 0.0, steps / span)
            self._since = (step, seconds)

    def spent(self, step: int, seconds: float) -> float:
        """Seconds of a budget that the steps so far have used up: at the best pace, once known."""
        return seconds if self.best is None else min(seconds, step / self.best)


class State:
    """All that a resumed run needs, in memory and on disk.

    On disk: `checkpoint/<step>/` with `weights`, `ema` and `optimizer` as safetensors and
    `state.json`. A checkpoint is complete from the moment it has its name; the one before it is
    removed after that.
    """

    def __init__(
        self,
        folder: Path,
        modules: Modules,
        *,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        settings: dict[str, Any],
        processes: int,
        main: bool,
        describe: str,
    ) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoint"
        self.modules = modules
        self.trained = trained
        self.optimizer = optimizer
        self.ema = ema
        self.settings = settings
        self.processes = processes
        self.describe = describe
        self.step = 0
        self.seconds = 0.0
        self.pace = Pace()
        self.ended_early = False
        self.window = Window()
        self.history: list[dict[str, Any]] = []
        self.main = main

    @property
    def spent(self) -> float:
        """Seconds of a budget that are used up."""
        return self.pace.spent(self.step, self.seconds)

    def check_finite(self) -> dict[str, Any]:
        """The sums of the window, or a `UserError` where a step in it went wrong."""
        sums = self.window.plain()
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
            if name in sums and not math.isfinite(sums[name][0]):
                kept = self._last()
                where = f"the last good checkpoint is {kept}" if kept else "no checkpoint yet"
                raise UserError(
                    f"{self.describe}: {what} stopped being finite at or shortly before "
                    f"step {self.step} ({where}): lower learning_rate (now "
                    f"{self.settings['learning_rate']:g}), raise warmup_steps, or use fp32"
                )
        return sums

    def log_row(self, rate: float) -> dict[str, Any]:
        """Close the window: its means become a row of the history."""
        means = {name: total / count for name, (total, count) in self.check_finite().items()}
        loss = means.pop("loss")
        rest = {name: value if math.isfinite(value) else None for name, value in means.items()}
        row = {
            "step": self.step,
            "loss": loss,
            **rest,
            "learning_rate": rate,
            "seconds": round(self.seconds, 3),
        }
        self.window = Window()
        self.history.append(row)
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _last(self) -> Path | None:
        done = [p for p in self.checkpoints.glob("[0-9]*") if p.is_dir()]
        return max(done, key=lambda path: int(path.name)) if done else None

    def save(self) -> None:
        """Write a checkpoint, then remove those before it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        window = self.check_finite()
        target = self.checkpoints / f"{self.step:08d}"
        with atomic_dir(target) as temporary:
            try:
                save_file(_plain_tensors(self._weights()), temporary / "weights.safetensors")
                save_file(_plain_tensors(self._moments()), temporary / "optimizer.safetensors")
                if self.ema:
                    save_file(_plain_tensors(self.ema.shadow), temporary / "ema.safetensors")
            except SafetensorError as error:
                raise OSError(f"cannot write a checkpoint to {target}: {error}") from None
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "pace": self.pace.best,
                "processes": self.processes,
                "ended_early": self.ended_early,
                "window": window,
                "settings": self.settings,
            }
            write_json(temporary / "state.json", state)
        # More than one, where a kill came between a checkpoint's name and this.
        for old in self.checkpoints.glob("[0-9]*"):
            if old != target:
                shutil.rmtree(old)

    def load(self) -> None:
        """Go to the last checkpoint, if there is one, and cut the history to match."""
        path = self._last()
        if path is not None:
            self._load(path)
            log(f"{self.describe}: going on from step {self.step} of {self.settings['steps']}")
        if not self.main:
            return
        for stray in self.checkpoints.glob(".tmp-*"):
            shutil.rmtree(stray)
        file = self.folder / "history.jsonl"
        if file.exists():
            self.history = [row for row in _rows(file) if row["step"] <= self.step]
            write_jsonl(file, self.history)

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        state = read_json(path / "state.json")
        changed = [
            f"{name} {_short(state['settings'].get(name))} → {_short(value)}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if changed:
            raise UserError(
                f"{path}: made with other settings ({', '.join(changed)}): "
                f"set them back, or remove {self.checkpoints} to start anew"
            )
        if state["processes"] != self.processes:
            log(
                f"{self.describe}: {self.processes} processes instead of {state['processes']}: "
                "the rest of this run sees other batches"
            )
        try:
            _copy_into(self._weights(), load_file(path / "weights.safetensors"))
            if self.ema:
                _copy_into(self.ema.shadow, load_file(path / "ema.safetensors"))
            moments = load_file(path / "optimizer.safetensors")
        except (SafetensorError, FileNotFoundError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path}: broken checkpoint ({str(error).splitlines()[0]}): "
                f"remove {self.checkpoints} to start anew"
            ) from None
        for key, value in moments.items():
            name, slot = key.rsplit("::", 1)
            parameter = self.trained[name]
            self.optimizer.state[parameter][slot] = value.to(parameter.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.pace.best = state.get("pace")  # none in a checkpoint of before
        self.ended_early = state["ended_early"]
        self.window.restore(state["window"])

    def remove(self) -> None:
        """Remove the checkpoint of a finished training."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _weights(self) -> dict[str, Tensor]:
        """Trained parameters and the buffers that a state dict holds (batch norm's statistics)."""
        tensors: dict[str, Tensor] = dict(self.trained)
        for name, module in self.modules.items():
            stored = module.state_dict(keep_vars=True)
            for key, buffer in module.named_buffers():
                if key in stored:
                    tensors[f"{name}/{key}"] = buffer
        return tensors

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}::{slot}": value
            for name, parameter in self.trained.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
        }


class Interrupts:
    """Holds back Ctrl-C and SIGTERM until the running step is complete."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ordinary = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
            for number, handler in ordinary.items():
                # A signal that someone else handles, or that nohup ignores, stays theirs.
                now = signal.getsignal(number)
                if now == handler or getattr(now, "ordinary", False):
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.caught is not None and kind is None:
            # It came while the very last step was running, whose work is complete.
            signal.raise_signal(self.caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number

    def go_on(self) -> None:
        """Let the caught signal do what it ordinarily does."""
        caught, self.caught = self.caught, None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if caught is not None:
            signal.raise_signal(caught)
        sys.exit(128 + (caught or 0))


def _frozen(module: nn.Module, value: Any, moving: set[int]) -> bool:
    return isinstance(value, nn.Parameter) and id(value) not in moving


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a history; a kill may have cut its last line short."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return read_jsonl(path)


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
