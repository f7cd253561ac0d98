"""The training loop that every model of this project uses.

One function, `train`, under `accelerate`: AdamW, warm-up and decay to zero, an exponential moving
average of the weights (EMA), gradient clipping, mixed precision, several processes, checkpoints
that survive being killed at any moment, and a history that the figures are drawn from.

Nothing but the step number moves the data: the batch of step s is a function of (seed, s, process)
alone. A resumed run is therefore the uninterrupted run, bit for bit, on the CPU in fp32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.runs import atomic_dir, log, read_json, read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from accelerate import Accelerator

Modules = Mapping[str, nn.Module]
LossFn = Callable[[Any, int, torch.Generator], tuple[Tensor, Mapping[str, Any]]]
Batches = Callable[[int, torch.Generator], Any]
OnLog = Callable[[int, dict[str, nn.Module]], None]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass
class TrainResult:
    """What a training leaves behind.

    Attributes:
        history: one row per `log_every` steps: step, loss and the loss function's own numbers
            (means over those steps), grad_norm, learning_rate, seconds since the start.
        seconds: training time, over all sessions of a resumed run.
        steps: steps done.
        finished: False where `max_seconds` ended the run before its last step.
        ema: name of module → state dict with averaged weights, for the modules in `ema_on`.
    """

    history: list[dict[str, Any]]
    seconds: float
    steps: int
    finished: bool
    ema: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)


def train(
    modules: Modules,
    loss_fn: LossFn,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    folder: str | os.PathLike[str],
    seed: int,
    warmup_steps: int = 0,
    schedule: Schedule = "linear",
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    grad_clip: float | None = 1.0,
    ema_decay: float | None = None,
    ema_on: Sequence[str] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    threads: int = 0,
    checkpoint_every_s: float = 120.0,
    log_every: int = 50,
    max_seconds: float | None = None,
    keep_checkpoint: bool = False,
    describe: str = "training",
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train modules in place, or go on from where a killed run stopped.

    Each step draws `batches(step, generator)` and calls `loss_fn(batch, step, generator)`, which
    returns the loss and a dict of numbers to log. The generator lives on the CPU and is seeded
    from (seed, step, process); torch's global generators are seeded likewise for dropout, and get
    their own state back at the end. Steps count from 0 here and from 1 in the history.

    Under `accelerate launch` every process draws its own batch and gradients are averaged, so the
    batch is `processes` times as large. With bf16 the loss function runs under autocast while
    weights, gradients, EMA and optimiser state stay in fp32.

    Any loss or gradient norm that is not finite stops the training at the next log line, and none
    is ever written into a checkpoint: both are summed over all steps since the last check, so the
    check misses no step and costs nothing in between. The last good checkpoint stays.

    Ctrl-C (or SIGTERM from a scheduler) ends the current step, writes a checkpoint and then goes
    its ordinary way; a second Ctrl-C does not wait.

    Args:
        modules: name → module; parameters with `requires_grad` are trained, kept in fp32.
        loss_fn: (batch, step, generator) → (scalar loss, numbers to log).
        batches: (step, generator) → batch; tensors in it are moved to the device.
        steps: length of the schedule, and of the training unless `max_seconds` ends it.
        folder: receives `history.jsonl` and, until the training is finished, `checkpoint/`.
        warmup_steps: steps of linear warm-up from 0.
        schedule: decay to 0 at the last step, or none.
        weight_decay: on matrices and kernels; biases and norms have none.
        grad_clip: largest norm of the whole gradient; None for no clipping.
        ema_decay: None for no averaging; the first steps use min(decay, (1 + step)/(10 + step)).
        ema_on: names of the modules to average; None for all.
        device: `auto`, or a torch device type.
        threads: torch threads while training; 0 leaves them as they are.
        max_seconds: time budget over all sessions; the checkpoint is then kept, and a later call
            with a larger budget goes on from it.
        keep_checkpoint: keep `checkpoint/` of a finished training: the next call returns at once.
        on_log: called with (step, modules) at each log line of the main process, while the
            modules hold their averaged weights, in evaluation mode and without gradients.

    Returns:
        The history and the averaged weights; `apply_ema` puts those into the modules. The modules
        are left in evaluation mode on their device.

    Raises:
        UserError: a loss or gradient that is not finite, a checkpoint of other settings or a
            broken one, too little GPU memory.
    """
    if steps < 1 or log_every < 1 or not 0 <= warmup_steps <= steps:
        raise ValueError("need steps >= 1, log_every >= 1 and 0 <= warmup_steps <= steps")
    names = list(modules if ema_on is None else ema_on)
    if unknown := set(names) - set(modules):
        raise ValueError(f"ema_on names modules that are not there: {sorted(unknown)}")

    accelerator = _accelerator(precision, device)
    for module in modules.values():
        module.to(accelerator.device)
    trained = _trained_parameters(modules)
    optimizer = _adamw(trained, learning_rate, betas=betas, weight_decay=weight_decay)
    ema = _Ema(modules, names, ema_decay) if ema_decay is not None else None
    _same_start(trained, ema, accelerator)

    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "schedule": schedule,
        "betas": list(betas),
        "weight_decay": weight_decay,
        "grad_clip": grad_clip,
        "ema_decay": ema_decay,
        "ema_on": names if ema else [],
        "precision": precision,
        "seed": seed,
        "weights": {name: list(parameter.shape) for name, parameter in trained.items()},
    }
    state = _State(
        Path(folder),
        modules,
        trained,
        optimizer,
        ema,
        settings,
        accelerator.num_processes,
        describe,
    )
    state.load()
    begun = time.monotonic() - state.seconds
    parameters = list(trained.values())
    process = accelerator.process_index

    with (
        _threads(threads),
        _own_randomness(accelerator.device),
        _Interrupts() as interrupts,
        progress(steps, describe, unit="step", initial=state.step) as bar,
    ):
        bar.show = accelerator.is_main_process
        _set_training(modules, True)
        saved = time.monotonic()
        over = max_seconds is not None and state.seconds >= max_seconds
        while state.step < steps and not over:
            step = state.step
            generator = _seed_step(seed, step, process, accelerator.device)
            try:
                batch = _to_device(batches(step, generator), accelerator.device)
                with accelerator.autocast():
                    loss, numbers = loss_fn(batch, step, generator)
                loss.backward()
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{describe}: out of GPU memory at step {step + 1}: "
                    "lower batch_size (or image_size) in the profile"
                ) from None
            _average_gradients(parameters, accelerator)
            grad_norm = _clip(parameters, grad_clip)
            rate = learning_rate * schedule_factor(
                step, steps=steps, warmup_steps=warmup_steps, schedule=schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update(step)
            state.window.add(loss=loss, grad_norm=grad_norm, **numbers)
            state.step += 1
            state.seconds = time.monotonic() - begun
            bar.update()

            if state.step % log_every == 0 or state.step == steps:
                row = state.log_row(rate)
                bar.note(loss=row["loss"])
                if on_log is not None and accelerator.is_main_process:
                    with _averaged(modules, ema):
                        on_log(state.step, dict(modules))
            over = _agreed(
                interrupts.caught is not None
                or (max_seconds is not None and state.seconds >= max_seconds),
                state.step,
                accelerator,
            )
            due = time.monotonic() - saved >= checkpoint_every_s
            if accelerator.is_main_process and (due or over) and state.step < steps:
                state.save()
                saved = time.monotonic()
            if over and interrupts.caught is not None:
                log(f"{describe}: stopped at step {state.step}, checkpoint in {folder}")
                interrupts.go_on()

    finished = state.step >= steps
    if accelerator.is_main_process and finished:
        if keep_checkpoint:
            state.save()
        else:
            state.remove()
    accelerator.wait_for_everyone()
    _set_training(modules, False)
    averaged = ema.state_dicts() if ema else {}
    return TrainResult(state.history, state.seconds, state.step, finished, averaged)


def apply_ema(modules: Modules, result: TrainResult) -> None:
    """Put the averaged weights of a training into its modules; without EMA nothing changes."""
    for name, weights in result.ema.items():
        modules[name].load_state_dict(weights)


def schedule_factor(step: int, *, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The factor on the learning rate at a step (from 0): warm-up from 0, then decay to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = 1.0 - (step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case "linear":
            return left
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        case "constant":
            return 1.0
    raise ValueError(f"no schedule '{schedule}': linear, cosine or constant")


def pick_device(name: str = "auto") -> torch.device:
    """The device that `train` uses for a profile's `device` setting.

    Raises:
        UserError: the named device is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    elif not present.get(name, False):
        raise UserError(f"device '{name}' is not on this machine: set 'device: auto' or 'cpu'")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


# ---- progress ----------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; elsewhere (notebooks, Slurm, CI) a log line about every 30 seconds."""

    def __init__(
        self, items: Iterable[Any] | int, describe: str, *, unit: str, initial: int, every_s: float
    ) -> None:
        self._items = items
        self._describe = describe
        self._unit = unit
        self._every_s = every_s
        if isinstance(items, int):
            self.total: int | None = items
        else:
            self.total = len(items) if isinstance(items, Sized) else None
        self.done = self._first = initial
        self.show = True
        self._notes: dict[str, float] = {}
        self._bar: Any = None

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._begun = self._logged = time.monotonic()
        self._bar = tqdm(
            total=self.total,
            desc=self._describe,
            unit=self._unit,
            initial=self.done,
            disable=None,
            dynamic_ncols=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A last line only where there were others: short work stays silent.
        if self._bar.disable and self._logged > self._begun and kind is None:
            self._log()
        self._bar.close()

    def __iter__(self) -> Iterator[Any]:
        items = range(self._items) if isinstance(self._items, int) else self._items
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """Say that `count` more are done."""
        self.done += count
        if not self.show:
            return
        if not self._bar.disable:
            self._bar.update(count)
        elif time.monotonic() - self._logged >= self._every_s:
            self._log()

    def note(self, **values: float) -> None:
        """Numbers to show beside the count."""
        self._notes = values
        if self.show and not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def _log(self) -> None:
        self._logged = time.monotonic()
        rate = (self.done - self._first) / max(self._logged - self._begun, 1e-9)
        line = f"{self._describe}: {self.done}"
        if self.total:
            left = (self.total - self.done) / rate if rate else 0.0
            line += f"/{self.total}, {int(left // 60)}:{int(left % 60):02d} left"
        line += f", {rate:.3g} {self._unit}/s"
        if self.show:
            log(line + "".join(f", {name} {value:.4g}" for name, value in self._notes.items()))


def progress(
    items: Iterable[Any] | int,
    describe: str,
    *,
    unit: str = "it",
    initial: int = 0,
    every_s: float = 30.0,
) -> Progress:
    """Show how far a loop is: iterate over the result, or use it with `with` and `.update()`.

    Args:
        items: what to iterate over, or a number of steps.
        describe: what is being done, in a word or two.
        initial: how many were done before, in a resumed loop.
        every_s: seconds between log lines where there is no terminal.
    """
    return Progress(items, describe, unit=unit, initial=initial, every_s=every_s)


# ---- the parts of a step -----------------------------------------------------------------------


def _accelerator(precision: str, device: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision not in ("fp32", "bf16"):
        raise ValueError(f"no precision '{precision}': fp32 or bf16")
    # accelerate keeps one precision per interpreter; a course trains several models in one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=pick_device(device).type == "cpu",
    )


def _trained_parameters(modules: Modules) -> dict[str, nn.Parameter]:
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


def _adamw(
    trained: Mapping[str, nn.Parameter],
    learning_rate: float,
    *,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    matrices = [parameter for parameter in trained.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True
    )


class _Ema:
    """Exponential moving average of the trained parameters of some modules."""

    def __init__(self, modules: Modules, names: Sequence[str], decay: float) -> None:
        self.decay = decay
        self.modules = {name: modules[name] for name in names}
        self.live = _trained_parameters(self.modules)
        self.shadow = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), weight)

    def swap(self) -> None:
        """Exchange live and averaged weights; no number is copied."""
        for name, parameter in self.live.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
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


def _frozen(module: nn.Module, value: Any, moving: set[int]) -> bool:
    return isinstance(value, nn.Parameter) and id(value) not in moving


@contextmanager
def _averaged(modules: Modules, ema: _Ema | None) -> Iterator[None]:
    if ema:
        ema.swap()
    _set_training(modules, False)
    try:
        with torch.no_grad():
            yield
    finally:
        _set_training(modules, True)
        if ema:
            ema.swap()


def _set_training(modules: Modules, mode: bool) -> None:
    """Training mode for modules that learn; wholly frozen ones stay in evaluation mode."""
    for module in modules.values():
        module.train(mode and any(p.requires_grad for p in module.parameters()))


def _seed_step(seed: int, step: int, process: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)
    return torch.Generator().manual_seed(number ^ 0x5DEECE66D)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Give torch's global generators their state back at the end."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_device(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def _clip(parameters: Sequence[nn.Parameter], grad_clip: float | None) -> Tensor:
    if grad_clip is not None:
        return nn.utils.clip_grad_norm_(parameters, grad_clip)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _same_start(
    trained: Mapping[str, nn.Parameter], ema: _Ema | None, accelerator: Accelerator
) -> None:
    """Every process starts from the weights of the first."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(broadcast(parameter.detach().clone(), from_process=0))
        if ema:
            for name, value in ema.shadow.items():
                value.copy_(ema.live[name])


def _average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean of the gradients over the processes, in one exchange.

    The loss function holds the modules themselves, so they are not wrapped. A parameter that only
    some processes used counts as zero in the others; one that none used keeps no gradient.
    """
    if accelerator.num_processes == 1:
        return
    used = [p.grad is not None for p in parameters]
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.flatten() for piece in pieces])
    flat = torch.cat([flat, torch.tensor(used, dtype=flat.dtype, device=flat.device)])
    flat = accelerator.reduce(flat, reduction="mean")
    values, counts = flat[: -len(used)], flat[-len(used) :].tolist()
    split = values.split([p.numel() for p in parameters])
    for parameter, value, count in zip(parameters, split, counts, strict=True):
        parameter.grad = value.view_as(parameter) if count > 0 else None


def _agreed(stop: bool, step: int, accelerator: Accelerator) -> bool:
    """Whether to stop now: processes ask each other every tenth step, so that none waits alone."""
    if accelerator.num_processes == 1:
        return stop
    if step % 10:
        return False
    votes = torch.tensor(float(stop), device=accelerator.device)
    return bool(accelerator.reduce(votes, reduction="sum") > 0)


class _Interrupts:
    """Holds back Ctrl-C and SIGTERM until the running step is complete."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ordinary = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
            for number, handler in ordinary.items():
                # A signal that someone else handles, or that nohup ignores, stays theirs.
                if signal.getsignal(number) == handler:
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


# ---- what a checkpoint holds -------------------------------------------------------------------


class _Window:
    """Sums since the last log line, left on the device: no step waits for a number."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def plain(self) -> dict[str, Any]:
        return {name: [float(value), self.counts[name]] for name, value in self.sums.items()}

    def restore(self, plain: Mapping[str, Any]) -> None:
        # A float32 sum survives the way through JSON's float64 unchanged.
        self.sums = {name: torch.tensor(value[0]) for name, value in plain.items()}
        self.counts = {name: value[1] for name, value in plain.items()}


class _State:
    """All that a resumed run needs, in memory and on disk.

    On disk: `checkpoint/<step>/` with `weights`, `ema` and `optimizer` as safetensors and
    `state.json`. A checkpoint is complete from the moment it has its name; the one before it is
    removed after that.
    """

    def __init__(
        self,
        folder: Path,
        modules: Modules,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: _Ema | None,
        settings: dict[str, Any],
        processes: int,
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
        self.window = _Window()
        self.history: list[dict[str, Any]] = []
        self.main = int(os.environ.get("RANK", "0")) == 0

    def check_finite(self) -> dict[str, Any]:
        sums = self.window.plain()
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
            if name in sums and not math.isfinite(sums[name][0]):
                kept = self._last()
                where = f"the last good checkpoint is {kept}" if kept else "no checkpoint yet"
                raise UserError(
                    f"{self.describe}: {what} stopped being finite at or shortly before step "
                    f"{self.step} ({where}): lower learning_rate (now "
                    f"{self.settings['learning_rate']:g}), raise warmup_steps, or use precision fp32"
                )
        return sums

    def log_row(self, rate: float) -> dict[str, Any]:
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
        self.window = _Window()
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
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        window = self.check_finite()
        before = self._last()
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
                "processes": self.processes,
                "window": window,
                "settings": self.settings,
            }
            write_json(temporary / "state.json", state)
        if before is not None and before != target:
            shutil.rmtree(before)

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
        self.window.restore(state["window"])

    def remove(self) -> None:
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
