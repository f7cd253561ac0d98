"""Steps that are followed without numbers: what lives, what is computed, as in a real step."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_blip
from torch import Tensor, nn

from tomjerry_utils import memory, tracing
from tomjerry_utils.blip_training import joint_loss

BATCH, WIDE, MIDDLE = 512, 64, 128


def net_on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(
            nn.Linear(WIDE, MIDDLE, bias=False), nn.ReLU(), nn.Linear(MIDDLE, 256, bias=False)
        )


def followed(net: nn.Module, *, batch: int = BATCH, precision: str = "fp32") -> tracing.Trace:
    with tracing.fake([net]):
        return tracing.trace(
            lambda: net(torch.zeros(batch, WIDE)).sum(), [net], precision=precision
        )


def test_bytes_and_operations_by_hand() -> None:
    net = net_on_meta()
    found = followed(net)
    first, second = 4 * WIDE * MIDDLE, 4 * MIDDLE * 256
    assert tracing.bytes_of([net]) == tracing.bytes_of([net], trained=True) == first + second
    assert found.gradients[-1] == first + second
    # ReLU and the second layer keep one tensor between them; the first keeps its input.
    assert found.saved == 4 * BATCH * (WIDE + MIDDLE)
    once = 2 * BATCH * (WIDE * MIDDLE + MIDDLE * 256)
    # Backward: the weights' gradients cost a forward pass, and one input has a gradient.
    assert found.flops == 2 * once + 2 * BATCH * MIDDLE * 256
    # At the fullest: input, middle, its gradient, and what the sum's slope is spread to.
    assert found.peak() >= found.saved + 4 * BATCH * MIDDLE
    assert found.peak(accumulated=True) > found.peak()
    assert all(p.grad is None for p in net.parameters())


def test_what_is_frozen_has_no_gradient() -> None:
    net = net_on_meta()
    net[0].requires_grad_(False)
    assert tracing.bytes_of([net], trained=True) == 4 * MIDDLE * 256
    assert followed(net).gradients[-1] == 4 * MIDDLE * 256


def test_what_is_shared_stays_shared() -> None:
    net = net_on_meta()
    other = nn.Sequential(net[0])
    with tracing.fake([net, other]):
        assert other[0].weight is net[0].weight
        assert tracing.bytes_of([net, other]) == tracing.bytes_of([net])


def test_bfloat16_halves_what_layers_keep_but_not_what_norms_do() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(WIDE, MIDDLE), nn.LayerNorm(MIDDLE), nn.Linear(MIDDLE, 1))
    full, half = (followed(net, precision=p).saved for p in ("fp32", "bf16"))
    # As on a GPU the norm keeps fp32 of what it gets, and of what it gives a bf16 copy is kept.
    assert full > half > full / 2
    norm = 4 * BATCH * MIDDLE
    assert half > norm


def test_saved_as_a_real_forward_pass_saves() -> None:
    """The tiny BLIP's loss, followed, against the same loss with numbers."""
    model = tiny_blip()
    texts = [f"a cat {'sits ' * 9}{i}" for i in range(6)]
    longest = model.tokens(texts)[0].shape[1]

    def loss() -> Tensor:
        return joint_loss(
            model, torch.zeros(6, 3, 32, 32), texts, contrastive_weight=0.5,
            generator=torch.Generator(),
            negatives=lambda logits, same, generator: (range(6), [1, 2, 3, 4, 5, 0]),
        )[0]  # fmt: skip

    parts = list(model.parts().values())
    real = memory.saved_bytes(loss, [t for p in parts for t in (*p.parameters(), *p.buffers())])

    def told(some: list[str], **_: object) -> tuple[Tensor, Tensor]:
        shape = len(some), longest
        return torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)

    model.tokens = told  # type: ignore[method-assign, assignment]
    with tracing.fake(parts):
        found = tracing.trace(loss, parts)
    assert found.saved == pytest.approx(real, rel=0.03)


def test_two_courses_do_not_add() -> None:
    net = net_on_meta()
    short = followed(net)
    with torch.device("meta"):
        longer = nn.Sequential(net, nn.ReLU())
    with pytest.raises(ValueError, match="two courses"):
        short.plus(followed(longer), 1.0)
