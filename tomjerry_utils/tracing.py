"""What a training step allocates and computes, found without allocating or computing it.

The step runs on fake tensors, which have shapes, types and an autograd graph but no numbers, while
each storage's birth and death is written down. The fullest moment falls where it falls: at the end
of the forward pass, in a block that gradient checkpointing computes again, or late in the backward
pass, when the gradients are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: torch's CUDA allocator rounds each tensor up to a multiple


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward and backward pass: what lives after each allocation, beside the weights.

    Attributes:
        live: (T,) bytes, gradients among them; gradients: (T,) bytes of those alone.
        saved: bytes that autograd keeps at the end of the forward pass, weights left out.
        flops: of both passes, what checkpointing computes twice counted twice.
    """

    live: np.ndarray
    gradients: np.ndarray
    saved: float
    flops: float

    def peak(self, *, accumulated: bool = False) -> float:
        """Bytes at the fullest moment.

        Args:
            accumulated: the gradients of the batch before are there from the start.
        """
        if accumulated:
            return float((self.live - self.gradients + self.gradients[-1]).max())
        return float(self.live.max())

    def plus(self, other: Trace, times: float) -> Trace:
        """This trace and `times` another, moment by moment.

        Raises:
            ValueError: they are not of the same course.
        """
        if len(self.live) != len(other.live):
            raise ValueError(f"{len(self.live)} and {len(other.live)} allocations are two courses")
        return Trace(
            self.live + times * other.live,
            self.gradients + times * other.gradients,
            self.saved + times * other.saved,
            self.flops + times * other.flops,
        )


@contextmanager
def fake(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Tensors that are made in here have no numbers and take no memory.

    Args:
        modules: made on the meta device, outside; in here their tensors pass for the CPU's. What
            they share stays shared.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Tensor] = {}

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device="cpu")
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else empty
                )
            return made[id(tensor)]

        # All are replaced before any is dropped, so that no id is used twice.
        tables: list[dict[str, Any]] = [
            table
            for module in {part for whole in modules for part in whole.modules()}
            for table in (module._parameters, module._buffers)
        ]
        olds = [dict(table) for table in tables]
        for table, old in zip(tables, olds, strict=True):
            table.update({k: stand_in(t) for k, t in old.items() if t is not None})
        yield


def trace(
    loss: Callable[[], Tensor], modules: Sequence[nn.Module], *, precision: str = "fp32"
) -> Trace:
    """Follow the loss and its backward pass; within :func:`fake`.

    Args:
        modules: all that the loss uses, whose parameters are trained where they require a gradient.
        precision: bf16 runs the loss under autocast by the rules that hold on a GPU.
    """
    parameters = {p for module in modules for p in module.parameters()}
    for parameter in parameters:
        parameter.grad = None
    weights = {t.untyped_storage()._cdata for m in modules for t in _tensors(m)}
    book = _Book()
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = _size(storage)
        return tensor

    with ExitStack() as stack:
        stack.enter_context(book)
        if precision == "bf16":
            stack.enter_context(_norms_in_full(modules))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = loss()
            kept = sum(saved.values())
        value.backward()
    del value
    gradients = [p.grad for p in parameters if p.grad is not None]
    result = book.close({g.untyped_storage()._cdata for g in gradients})
    for parameter in parameters:
        parameter.grad = None
    return Trace(*result, saved=kept, flops=book.flops)


def bytes_of(modules: Sequence[nn.Module], *, trained: bool = False) -> int:
    """Bytes of the modules' parameters and buffers, what they share once.

    Args:
        trained: of the parameters alone that require a gradient.
    """
    tensors: dict[int, int] = {}
    for module in modules:
        for tensor in _tensors(module):
            if tensor.requires_grad or not trained:
                storage = tensor.untyped_storage()
                tensors[storage._cdata] = _size(storage)
    return sum(tensors.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _size(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // BLOCK) * BLOCK


class _Book(TorchDispatchMode):
    """Writes down when each storage is born and when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.sizes: list[int] = []  # of each birth, in order
        self.deaths: list[tuple[int, int]] = []  # births until then, which of them dies
        self.alive: dict[int, tuple[int, Any]] = {}  # storage → its birth, a weak reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out  # asked for at every turn, and no tensor
        self.flops += _flops(func, args, kwargs or {}, out)
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in given:
                    self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, number = storage._cdata, len(self.sizes)
        self.sizes.append(_size(storage))

        def dies(_: Any) -> None:
            if self.alive.get(key, (-1,))[0] == number:
                del self.alive[key]
                self.deaths.append((len(self.sizes), number))

        self.alive[key] = number, weakref.ref(storage, dies)

    def close(self, gradients: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """What lived after each birth, and the gradients' share of it."""
        kept = [self.alive[key][0] for key in gradients if key in self.alive]
        change = np.array([*self.sizes, 0], float)
        for when, number in self.deaths:
            change[when] -= self.sizes[number]
        mine = np.zeros_like(change)
        for number in kept:
            mine[number] = self.sizes[number]
        return change.cumsum()[:-1], mine.cumsum()[:-1]


@contextmanager
def _norms_in_full(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Autocast as CUDA does it: norms take and give fp32, where the CPU's leaves them as they come.

    What else differs between the two lists is small in these models. A hook holds in the second
    forward pass of checkpointing too.
    """

    def full(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(v.float() if isinstance(v, Tensor) else v for v in inputs)

    norms = {m for n in modules for m in n.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    hooks = [norm.register_forward_pre_hook(full) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one operation, by the formulas of `torch.utils.flop_counter`; 0 for what only moves data.

    They know the GPU's attention kernels; the CPU's does the same sums.
    """
    packet = func._overloadpacket
    if packet in flop_counter.flop_registry:
        return flop_counter.flop_registry[packet](*args, **kwargs, out_val=out)
    if packet == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return flop_counter.sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return flop_counter.sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    return 0
