"""The perceptual network, its terms, and where its weights come from."""

from __future__ import annotations

import importlib.util
import pickle
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tomjerry_utils import UserError, perceptual, scenes
from tomjerry_utils.images import to_tensor


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "perceptual_weights.py"
    spec = importlib.util.spec_from_file_location("perceptual_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    drawn = scenes.render_many(range(2_800_000, 2_800_006), "natural", 64, workers=1)
    return to_tensor(np.ascontiguousarray(drawn["image"]))


def blurred(images: torch.Tensor, edge: int) -> torch.Tensor:
    padded = F.pad(images, (edge // 2,) * 4, mode="reflect")
    return F.avg_pool2d(padded, edge, 1)


def test_features_have_the_layers_sizes_and_see_edges(photographs: torch.Tensor) -> None:
    found = perceptual.trunk()(photographs)
    assert [tuple(layer.shape[1:]) for layer in found] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16),
    ]  # fmt: skip
    # An ImageNet network tells a photograph from its blur; one with random weights hardly does.
    assert not any(p.requires_grad for p in perceptual.trunk().parameters())
    soft = perceptual.trunk()(blurred(photographs, 5))
    assert all(b.std() < a.std() for a, b in zip(found, soft, strict=True))


@pytest.mark.parametrize("term", [perceptual.distance, perceptual.texture_gap])
def test_a_term_is_nought_for_the_picture_itself_and_grows_with_blur(
    term: object, photographs: torch.Tensor
) -> None:
    net = perceptual.trunk()
    real = net(photographs)
    values = [float(term(net(blurred(photographs, e)), real)) for e in (1, 3, 5, 7)]  # type: ignore[operator]
    assert values[0] < 1e-5
    assert values == sorted(values)
    assert values[1] > 0.01


def test_texture_asks_less_where_a_hair_lies_than_features_do(
    photographs: torch.Tensor,
) -> None:
    """Grain of another seed is the same texture; place by place it is as far as no grain at all."""
    net = perceptual.trunk()
    rng = torch.Generator().manual_seed(0)
    first, second = (
        photographs + 0.1 * torch.randn(photographs.shape, generator=rng) for _ in range(2)
    )
    real, other, none = net(first), net(second), net(photographs)
    texture, place = (
        term(other, real) / term(none, real)
        for term in (perceptual.texture_gap, perceptual.distance)
    )
    assert place > 0.9
    assert texture < 0.85 * place


def test_the_gradient_reaches_the_picture(photographs: torch.Tensor) -> None:
    net = perceptual.trunk()
    soft = blurred(photographs, 5).requires_grad_(True)
    real = net(photographs)
    before = perceptual.texture_gap(net(soft), real)
    (gradient,) = torch.autograd.grad(before, soft)
    after = perceptual.texture_gap(net(soft - 0.05 * gradient.sign()), real)
    assert after < before


def test_another_file_than_the_known_one_is_not_unpickled(
    script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": {}}))
    with pytest.raises(UserError, match="not read"):
        script.read_checkpoint(path)


def test_what_is_unpickled_is_arrays_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vgg16.ckpt"
    channels = perceptual.CHANNELS
    layers = {
        f"Conv_{i}": {
            "kernel": np.full((3, 3, a, b), i, np.float32),
            "bias": np.zeros(b, np.float32),
        }
        for i, (a, b) in enumerate(pairwise(channels))
    }
    path.write_bytes(pickle.dumps({"VGG16_0": layers}, 3).replace(b"numpy._core", b"numpy.core"))
    monkeypatch.setattr(script, "SHA256", script.hash_file(path))
    state = script.read_checkpoint(path)
    perceptual.Trunk().load_state_dict(state)
    assert state["layers.3.weight"].shape == (128, 128, 3, 3)

    path.write_bytes(pickle.dumps({"VGG16_0": Path("x")}))
    monkeypatch.setattr(script, "SHA256", script.hash_file(path))
    with pytest.raises(pickle.UnpicklingError, match="no array"):
        script.read_checkpoint(path)
