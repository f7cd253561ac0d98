"""The training loop that every model of this project uses.

One function, `train`, under `accelerate`: AdamW, warm-up and decay to zero, an exponential moving
average of the weights (EMA), gradient clipping, mixed precision, several processes, checkpoints
that survive being killed at any moment, and a history that the figures are drawn from.

Nothing but the step number moves the data: the batch of step s is a function of (seed, s, process)
alone. A resumed run is therefore the uninterrupted run, bit for bit, on the CPU in fp32.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tomjerry_utils import UserError
from tomjerry_utils.checkpoints import Ema, Interrupts, Modules, State, trained_parameters
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import log

if TYPE_CHECKING:
    from accelerate import Accelerator

LossFn = Callable[[Any, int, torch.Generator], tuple[Tensor, Mapping[str, Any]]]
Batches = Callable[[int, torch.Generator], Any]
OnLog = Callable[[int, dict[str, nn.Module]], bool | None]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass
class TrainResult:
    """What a training leaves behind.

    Attributes:
        history: one row per `log_every` steps: step, loss and the loss function's own numbers
            (means over those steps), grad_norm, learning_rate, seconds since the start.
        seconds: training time, over all sessions of a resumed run.
        spent: of these, what counts towards `max_seconds`.
        steps: steps done.
        finished: False where `max_seconds` ended the run before its last step.
        ended_early: True where `on_log` ended it.
        ema: name of module → state dict with averaged weights, for the modules in `ema_on`.
    """

    history: list[dict[str, Any]]
    seconds: float
    spent: float
    steps: int
    finished: bool
    ema: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    ended_early: bool = False


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
    accumulation: int = 1,
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
    memory_knobs: str = "lower batch_size (or image_size) in the profile",
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train modules in place, or go on from where a killed run stopped.

    Each step draws `batches(step, generator)` and calls `loss_fn(batch, step, generator)`, which
    returns the loss and a dict of numbers to log. The generator lives on the CPU and is seeded
    from (seed, step, batch); torch's global generators are seeded likewise for dropout, and get
    their own state back at the end. Steps count from 0 here and from 1 in the history.

    Under `accelerate launch` every process draws its own batch and gradients are averaged, so the
    batch is `processes` times as large; `accumulation` does the same one after the other. Two
    processes therefore see the very batches, and take the steps, of one process that accumulates
    two. With bf16 the loss function runs under autocast while weights, gradients, EMA and
    optimiser state stay in fp32.

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
        accumulation: batches whose gradients are averaged into one step.
        ema_decay: None for no averaging; the first steps use min(decay, (1 + step)/(10 + step)).
        ema_on: names of the modules to average; None for all.
        device: `auto`, or a torch device type.
        threads: torch threads while training; 0 leaves them as they are.
        max_seconds: time budget over all sessions, in seconds in which nothing else runs: steps
            count at the training's own best pace, see `checkpoints.Pace`. The checkpoint is then
            kept, and a later call with a larger budget goes on from it.
        keep_checkpoint: keep `checkpoint/` of a finished training: the next call returns at once.
        memory_knobs: what to do about too little memory, for the error's last words.
        on_log: called with (step, modules) at each log line, while the modules hold their averaged
            weights, in evaluation mode and without gradients. When it returns True on the main
            process the training ends there.

    Returns:
        The history and the averaged weights; `apply_ema` puts those into the modules. The modules
        are left in evaluation mode on their device.

    Raises:
        UserError: a loss or gradient that is not finite, a checkpoint of other settings or a
            broken one, too little memory, more warm-up than steps, a device that is not there.
    """
    if steps < 1 or log_every < 1 or accumulation < 1:
        raise ValueError("need steps, log_every and accumulation >= 1")
    if warmup_steps > steps:
        raise UserError(
            f"{describe}: warmup_steps {warmup_steps} is more than steps {steps}: "
            "lower it in the profile"
        )
    names = list(modules if ema_on is None else ema_on)
    if unknown := set(names) - set(modules):
        raise ValueError(f"ema_on names modules that are not there: {sorted(unknown)}")

    accelerator = _accelerator(precision, device)
    for module in modules.values():
        module.to(accelerator.device)
    trained = trained_parameters(modules)
    optimizer = _adamw(trained, learning_rate, betas=betas, weight_decay=weight_decay)
    ema = Ema(modules, names, ema_decay) if ema_decay is not None else None
    _same_start(trained, ema, accelerator)

    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "schedule": schedule,
        "betas": list(betas),
        "weight_decay": weight_decay,
        "grad_clip": grad_clip,
        "accumulation": accumulation,
        "ema_decay": ema_decay,
        "ema_on": names if ema else [],
        "precision": precision,
        "seed": seed,
        "weights": {name: list(parameter.shape) for name, parameter in trained.items()},
    }
    state = State(
        Path(folder),
        modules,
        trained=trained,
        optimizer=optimizer,
        ema=ema,
        settings=settings,
        processes=accelerator.num_processes,
        main=accelerator.is_main_process,
        describe=describe,
    )
    state.load()
    begun = time.monotonic() - state.seconds
    parameters = list(trained.values())
    process = accelerator.process_index

    with (
        out_of_memory_told(
            lambda: f"{describe}: out of memory at step {state.step + 1}: {memory_knobs}"
        ),
        _threads(threads),
        _own_randomness(accelerator.device),
        Interrupts() as interrupts,
        progress(
            steps,
            describe,
            unit="step",
            initial=state.step,
            show=accelerator.is_main_process,
        ) as bar,
    ):
        _set_training(modules, True)
        saved = time.monotonic()
        over = max_seconds is not None and state.spent >= max_seconds
        while state.step < steps and not over and not state.ended_early:
            step = state.step
            for part in range(accumulation):
                number = part * accelerator.num_processes + process
                generator = _seed_step(seed, step, number, accelerator.device)
                batch = _to_device(batches(step, generator), accelerator.device)
                with accelerator.autocast():
                    loss, numbers = loss_fn(batch, step, generator)
                (loss / accumulation if accumulation > 1 else loss).backward()
                state.window.add(loss=loss, **numbers)
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
            state.window.add(grad_norm=grad_norm)
            state.step += 1
            state.seconds = time.monotonic() - begun
            state.pace.tell(state.step, state.seconds)
            bar.update()

            if state.step % log_every == 0 or state.step == steps:
                row = state.log_row(rate)
                bar.note(loss=row["loss"])
                if on_log is not None:
                    ended = False
                    with _averaged(modules, ema):
                        if accelerator.is_main_process:
                            ended = bool(on_log(state.step, dict(modules)))
                    state.ended_early = _any(ended, accelerator) and state.step < steps
            over = _agreed(
                interrupts.caught is not None
                or (max_seconds is not None and state.spent >= max_seconds),
                state.step,
                accelerator,
            )
            due = time.monotonic() - saved >= checkpoint_every_s
            interrupted = over and interrupts.caught is not None
            more = state.step < steps
            if accelerator.is_main_process and (interrupted or (more and (due or over))):
                state.save()
                saved = time.monotonic()
            if interrupted:
                log(f"{describe}: stopped at step {state.step}, checkpoint in {folder}")
                interrupts.go_on()

    finished = state.step >= steps or state.ended_early
    if accelerator.is_main_process and finished:
        if keep_checkpoint:
            state.save()
        else:
            state.remove()
    accelerator.wait_for_everyone()
    _set_training(modules, False)
    averaged = ema.state_dicts() if ema else {}
    return TrainResult(
        state.history,
        state.seconds,
        state.spent,
        state.step,
        finished,
        averaged,
        state.ended_early,
    )


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


@contextmanager
def _averaged(modules: Modules, ema: Ema | None) -> Iterator[None]:
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
    trained: Mapping[str, nn.Parameter], ema: Ema | None, accelerator: Accelerator
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
    return _any(stop, accelerator) if step % 10 == 0 else False


def _any(vote: bool, accelerator: Accelerator) -> bool:
    """Whether any process votes for it; all of them have to ask."""
    if accelerator.num_processes == 1:
        return vote
    votes = torch.tensor(float(vote), device=accelerator.device)
    return bool(accelerator.reduce(votes, reduction="sum") > 0)


@contextmanager
def out_of_memory_told(told: Callable[[], str]) -> Iterator[None]:
    """Turn every allocator's way to say that memory is short into one line with what to do.

    A GPU has an error of its own; the CPU's and Apple's allocators raise a plain one.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(
            "can't allocate memory|out of memory", str(error)
        ):
            raise
        raise UserError(told()) from None
