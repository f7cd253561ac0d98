"""Real features: they know a cat, and their distance orders pictures as an eye does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tomjerry_utils import scenes
from tomjerry_utils.features import (
    CAT_CLASSES,
    NAME,
    extract,
    feature_maps,
    imagenet_probabilities,
    network,
    perceptual_distance,
    perceptual_loss,
)
from tomjerry_utils.images import load_image, to_tensor

STARTER = Path(__file__).resolve().parents[1] / "data" / "starter"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return load_image(STARTER / "photo/cat/skimage__chelsea.jpg", 224)


def test_a_real_cat_photo_is_a_cat_and_a_drawn_one_is_not(cat: np.ndarray) -> None:
    drawn = load_image(STARTER / "cartoon/cat/emojione__cat-face.png", 224)
    photo, drawing = imagenet_probabilities(np.stack([cat, drawn]))
    assert photo.sum() == pytest.approx(1.0, abs=1e-4)
    assert photo.argmax() in CAT_CLASSES
    assert photo[CAT_CLASSES].sum() > 0.7
    assert drawing[CAT_CLASSES].sum() < 0.05


def test_range_is_the_networks_own() -> None:
    """Every grey level reaches the network as (level - 127)/128."""
    from tomjerry_utils.features import _prepare

    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    got = _prepare(to_tensor(levels), 16)[0, 0].flatten()
    torch.testing.assert_close(got, (torch.arange(256) - 127) / 128)


def test_extract_is_the_packages_own_features(cat: np.ndarray) -> None:
    got = extract(cat[None], size=224)
    assert got.shape == (1, 1280)
    assert got.dtype == np.float32
    raw = torch.from_numpy((cat.astype(np.float32) - 127) / 128).permute(2, 0, 1)[None]
    want = network().extract_features(raw).mean((2, 3))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_batches_do_not_matter(cat: np.ndarray) -> None:
    images = np.stack([np.roll(cat[::2, ::2], 9 * shift, 1) for shift in range(5)])
    whole = extract(images)
    np.testing.assert_allclose(extract(images, batch_size=2), whole, atol=1e-4)
    np.testing.assert_allclose(extract(to_tensor(images)), whole, atol=1e-4)
    assert extract(images[:0]).shape == (0, 1280)


def test_features_tell_styles_apart() -> None:
    """A nearest-centre rule on held-out scenes: which renderer drew it."""
    seeds = range(9_000_000, 9_000_012)
    found = {
        style: extract(
            np.stack([scenes.render(scenes.describe(s), style, 64).image for s in seeds])
        )
        for style in ("cartoon", "natural")
    }
    centres = {style: values[:6].mean(0) for style, values in found.items()}
    right = sum(
        min(centres, key=lambda c: np.linalg.norm(row - centres[c])) == style
        for style, values in found.items()
        for row in values[6:]
    )
    assert right >= 11


def test_maps_have_five_depths(cat: np.ndarray) -> None:
    maps = feature_maps(cat[None])
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 64, 64), (24, 32, 32), (40, 16, 16), (112, 8, 8), (320, 4, 4),
    ]  # fmt: skip


def test_distance_orders_pictures_as_an_eye_does(cat: np.ndarray) -> None:
    image = Image.fromarray(cat)
    rng = np.random.default_rng(0)

    def blurred(radius: float) -> np.ndarray:
        return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))

    other = load_image(STARTER / "photo/cat/plasma__cat.jpg", 224)
    noise = np.clip(cat + rng.normal(0, 4, cat.shape), 0, 255).astype(np.uint8)
    rows = np.stack([cat, noise, blurred(1), blurred(3), blurred(8), other])
    got = perceptual_distance(np.repeat(cat[None], len(rows), 0), rows)
    assert got.shape == (6,)
    assert got[0] == 0
    assert 0 < got[1] < got[3]
    assert got[2] < got[3] < got[4]
    assert got[4] < 4
    assert got[5] > 3 * got[2]


def test_distance_is_symmetric_and_pairwise(cat: np.ndarray) -> None:
    other = np.ascontiguousarray(cat[:, ::-1])
    forth = perceptual_distance(np.stack([cat, cat]), np.stack([other, cat]), batch_size=1)
    back = perceptual_distance(np.stack([other, cat]), np.stack([cat, cat]))
    np.testing.assert_allclose(forth, back, atol=1e-5)
    assert forth[1] == 0
    with pytest.raises(ValueError, match="as many pictures"):
        perceptual_distance(np.stack([cat, cat]), cat[None])


def test_loss_leads_back_to_the_picture(cat: np.ndarray) -> None:
    """Gradient descent on the pixels comes closer; the network itself stays as it is."""
    target = to_tensor(load_image(STARTER / "photo/cat/skimage__chelsea.jpg", 64))
    torch.manual_seed(0)
    image = (target + 0.3 * torch.randn(target.shape)).clamp(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.03)
    losses = []
    for _ in range(12):
        loss = perceptual_loss(image, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert not any(p.requires_grad or p.grad is not None for p in network().parameters())
    want = perceptual_distance(image.detach(), target)
    assert perceptual_loss(image, target).item() == pytest.approx(want.mean(), rel=1e-4)


def test_autocast_around_the_loss_changes_nothing(cat: np.ndarray) -> None:
    a, b = to_tensor(cat[:64, :64]), to_tensor(cat[64:128, :64])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = perceptual_loss(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, perceptual_loss(a, b))


def test_the_name_says_which_features() -> None:
    assert "efficientnet" in NAME
    assert network() is network("cpu")
