"""How much memory a training will need, known before it begins.

Weights, gradients, averages and Adam's two moments can be counted. What a backward pass keeps of
the forward pass depends on the model, the batch and the precision, so it is measured: once on a
few pictures, by watching what autograd saves, and carried on to the real batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tomjerry_utils.runs import log

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs at its fullest."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum((self.weights, self.gradients, self.moments, self.average, self.activations))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in vars(self).items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def estimate(
    modules: Mapping[str, nn.Module],
    forward: Callable[[int], Tensor],
    *,
    batch_size: int,
    averaged: bool,
    precision: str = "fp32",
) -> Memory:
    """What one training step at this batch size needs.

    Args:
        modules: as `training.train` gets them; what requires a gradient is trained.
        forward: the loss on a batch of so many pictures; it is run on 2 and on 4.
        averaged: whether an average of the weights is kept.
        precision: bf16 runs the forward pass under autocast, as training does.
    """
    tensors = {t for m in modules.values() for t in (*m.parameters(), *m.buffers())}
    parameters = {p for m in modules.values() for p in m.parameters()}
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    device = next(iter(parameters)).device.type
    few = {}
    for count in (2, 4):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            few[count] = saved_bytes(lambda count=count: forward(count), tensors)  # type: ignore[misc]
    each = (few[4] - few[2]) / 2
    return Memory(
        weights=sum(t.numel() * t.element_size() for t in tensors),
        gradients=trained,
        moments=2 * trained,
        average=sum(t.numel() * t.element_size() for t in parameters) if averaged else 0,
        activations=int(few[2] + (batch_size - 2) * each),
    )


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of a forward pass; `weights` do not count."""
    # By address: a linear layer keeps a transposed view of its weight, another tensor.
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    # Until here the graph has held all of them, so that no address was used twice.
    del loss
    return sum(seen.values())


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def announce(what: str, memory: Memory, device: torch.device, knobs: str) -> None:
    """Say what a training will need, and what to turn where that is more than is free."""
    free = free_bytes(device)
    log(f"{what}: a step needs about {memory}; {free / GIB:.1f} GiB are free on {device.type}")
    if memory.total > free:
        log(f"{what}: that is more than there is: {knobs}")
