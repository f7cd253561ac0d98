"""The memory estimate: right about what can be measured, and it names the knob in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Captioned, tiny_blip, tune_blip
from torch import Tensor, nn

from tomjerry_utils import UserError, blip, blip_model, blip_training, memory
from tomjerry_utils.images import to_tensor

GIB = 2**30
ROOMY = memory.Memory(weights=1, gradients=2, moments=4, average=8, activations=16)


def forward_of(model: blip.Blip, data: Captioned, *, weight: float = 0.5) -> Any:
    """The training loss on so many pictures with the longest captions."""
    longest = sorted(data.texts, key=len, reverse=True)

    def forward(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = to_tensor(data.images[:1]).expand(count, -1, -1, -1)
        return blip_training.joint_loss(
            model, images, (longest * count)[:count], contrastive_weight=weight, generator=generator
        )[0]

    return forward


def weights_of(model: blip.Blip) -> list[Tensor]:
    return [t for part in model.parts().values() for t in (*part.parameters(), *part.buffers())]


def estimate(model: blip.Blip, data: Captioned, **changes: Any) -> memory.Memory:
    settings = {"batch_size": 8, "averaged": False, **changes}
    return memory.estimate(model.parts(), forward_of(model, data), **settings)


def same_but_activations(one: memory.Memory, two: memory.Memory) -> bool:
    return replace(one, activations=0) == replace(two, activations=0)


# ---- what is measured


@pytest.mark.parametrize("shape", [(5, 300), (2, 5, 300)])
@pytest.mark.parametrize("frozen", [False, True])
def test_saved_bytes_by_hand(frozen: bool, shape: tuple[int, ...]) -> None:
    """x ↦ Σ (Wx + b)² keeps x for W's gradient and Wx + b for the square's, and nothing else."""
    layer = nn.Linear(300, 200).requires_grad_(not frozen)
    x = torch.ones(shape, requires_grad=True)

    def forward() -> Tensor:
        return layer(x).square().sum()

    found = memory.saved_bytes(forward, layer.parameters())
    after = 4 * 200 * x.numel() // 300
    assert found == after + (0 if frozen else 4 * x.numel())
    # Control: the layer keeps a view of its weight, which is no activation.
    assert memory.saved_bytes(forward, []) >= found + 4 * 300 * 200


def test_nothing_is_saved_without_gradients(dozen: Captioned) -> None:
    model = tiny_blip()
    with torch.no_grad():
        assert memory.saved_bytes(lambda: forward_of(model, dozen)(4), []) == 0


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_carried_on_to_the_batch(
    dozen: Captioned, rank: int, precision: str
) -> None:
    model = tiny_blip()
    if rank:
        blip_model.add_lora(model, rank, seed=0)
    forward = forward_of(model, dozen)
    for batch_size in (3, 8):
        found = estimate(model, dozen, batch_size=batch_size, precision=precision).activations
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            measured = memory.saved_bytes(lambda n=batch_size: forward(n), weights_of(model))
        assert found == pytest.approx(measured, rel=0.05)


def test_the_estimate_changes_nothing(dozen: Captioned) -> None:
    model = tiny_blip()
    before = [tensor.clone() for tensor in weights_of(model)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    estimate(model, dozen)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))
    assert all(tensor.grad is None for tensor in weights_of(model))


# ---- what is counted


def test_weights_gradients_and_moments_by_hand(dozen: Captioned) -> None:
    model = tiny_blip()
    count = blip.trainable_parameters(model)
    found = estimate(model, dozen)
    assert found.gradients == 4 * count
    assert found.moments == 8 * count
    assert found.average == 0
    buffers = {b for part in model.parts().values() for b in part.buffers()}
    assert found.weights == 4 * count + sum(b.numel() * b.element_size() for b in buffers)
    averaged = estimate(model, dozen, averaged=True)
    assert averaged.average == 4 * count
    assert same_but_activations(averaged, replace(found, average=4 * count))
    assert averaged.activations == pytest.approx(found.activations, rel=1e-3)
    assert averaged.total - found.total == pytest.approx(4 * count, rel=0.01)


def test_adapters_need_less(dozen: Captioned) -> None:
    model, adapted = tiny_blip(), tiny_blip()
    blip_model.add_lora(adapted, 4, seed=0)
    full, lora = estimate(model, dozen), estimate(adapted, dozen)
    added = blip.trainable_parameters(adapted)
    assert lora.gradients == 4 * added < full.gradients / 5
    assert lora.moments == 8 * added
    assert lora.weights > full.weights  # the base stays, the adapters come on top
    assert lora.total < full.total


def test_bfloat16_needs_less(dozen: Captioned) -> None:
    full, half = (estimate(tiny_blip(), dozen, precision=p) for p in ("fp32", "bf16"))
    assert half.activations < 0.85 * full.activations
    assert same_but_activations(half, full)  # weights stay in fp32


def test_a_larger_batch_needs_more(dozen: Captioned) -> None:
    model = tiny_blip()
    small, large = (estimate(model, dozen, batch_size=n) for n in (4, 64))
    assert 10 * small.activations < large.activations < 16.1 * small.activations
    assert same_but_activations(large, small)


def test_memory_reads_as_gibibytes() -> None:
    need = memory.Memory(GIB, GIB // 2, GIB, 0, 2 * GIB)
    assert need.total == 4 * GIB + GIB // 2
    assert str(need) == (
        "4.50 GiB (weights 1.00, gradients 0.50, moments 1.00, average 0.00, activations 2.00)"
    )


# ---- what is said


@pytest.mark.parametrize(("free", "warned"), [(31, False), (30, True)])
def test_the_knob_is_named_where_memory_is_short(
    free: int, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    memory.announce("03 BLIP", ROOMY, torch.device("cpu"), "turn blip.batch_size")
    said = capsys.readouterr().err
    assert "03 BLIP: a step needs about" in said
    assert ("turn blip.batch_size" in said) == warned
    assert said.count("\n") == 1 + warned


@pytest.mark.parametrize("free", [2**50, 1000])
def test_fine_tuning_says_what_it_needs_before_it_starts(
    free: int,
    dozen: Captioned,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[memory.Memory] = []
    real = memory.announce
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)

    def announce(what: str, need: memory.Memory, *rest: Any) -> None:
        asked.append(need)
        real(what, need, *rest)

    monkeypatch.setattr(memory, "announce", announce)
    model = tiny_blip()
    settings = {"steps": 1, "warmup_steps": 0, "batch_size": 4, "ema_decay": 0.9}
    tune_blip(model, dozen, tmp_path, **settings, describe="03 BLIP")
    said = capsys.readouterr().err
    assert ("blip.batch_size" in said and "blip.accumulation" in said) == (free == 1000)
    [need] = asked
    expected = estimate(model, dozen, batch_size=4, averaged=True)
    assert same_but_activations(need, expected)
    assert need.activations == pytest.approx(expected.activations, rel=1e-3)


def test_free_memory_is_the_machines() -> None:
    import psutil

    found = memory.free_bytes(torch.device("cpu"))
    assert 0 < found < psutil.virtual_memory().total


# ---- and where it does run out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 68719476736 bytes."
        ),
    ],
)
def test_running_out_of_memory_names_the_knobs(
    error: Exception, dozen: Captioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = blip_training.joint_loss

    def fails(model: blip.Blip, images: Tensor, *rest: Any, **options: Any) -> Any:
        if len(images) == 3:  # the batch; not what the estimate looks at
            raise error
        return real(model, images, *rest, **options)

    monkeypatch.setattr(blip_training, "joint_loss", fails)
    with pytest.raises(UserError, match="out of memory at step 1") as caught:
        tune_blip(tiny_blip(), dozen, tmp_path, batch_size=3)
    assert "blip.batch_size" in str(caught.value)
    assert "blip.accumulation" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cpu_really_says_so(tmp_path: Path) -> None:
    """The words that are looked for are those of torch's own allocator."""
    from tomjerry_utils.training import train

    net = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"out of memory at step 1: lower batch_size"):
        train(
            {"net": net},
            lambda batch, step, generator: (net(torch.empty(2**58, 1)).sum(), {}),
            lambda step, generator: None,
            steps=1,
            learning_rate=1e-3,
            folder=tmp_path,
            seed=0,
        )


def test_another_error_passes_through(
    dozen: Captioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = blip_training.joint_loss

    def fails(model: blip.Blip, images: Tensor, *rest: Any, **options: Any) -> Any:
        if len(images) == 3:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return real(model, images, *rest, **options)

    monkeypatch.setattr(blip_training, "joint_loss", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tune_blip(tiny_blip(), dozen, tmp_path, batch_size=3)
