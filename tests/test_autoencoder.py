"""The autoencoder E, D: shapes, normalised latents, measures and a loss that falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tomjerry_utils import UserError
from tomjerry_utils import autoencoder as ae
from tomjerry_utils.images import to_tensor


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.concatenate([tiny.pictures("cartoon", 6), tiny.pictures("natural", 6)])


def stable_diffusion_like() -> AutoencoderKL:
    """Stable Diffusion's layout in small: three input channels, one scaling factor."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


def test_the_picture_is_unshuffled_only_for_the_tiny_model() -> None:
    small, standard = ae.tiny_autoencoder(), stable_diffusion_like()
    assert (ae.patch_of(small), ae.factor_of(small)) == (2, 4)
    assert (ae.patch_of(standard), ae.factor_of(standard)) == (1, 2)
    images = torch.randn(2, 3, 16, 16)
    assert ae.to_patches(small, images).shape == (2, 12, 8, 8)
    assert torch.equal(ae.from_patches(small, ae.to_patches(small, images)), images)
    assert ae.to_patches(standard, images) is images


def test_latents_have_mean_zero_and_deviation_one_once_measured(images: np.ndarray) -> None:
    torch.manual_seed(0)
    vae = ae.tiny_autoencoder(4).eval()
    before = ae.encode_all(vae, torch.from_numpy(images))
    ae.measure_latents(vae, torch.from_numpy(images))
    latents = ae.encode_all(vae, torch.from_numpy(images))
    assert latents.shape == (12, 4, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    # Means alone fall short of 1 by the posterior's width.
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.1)
    with torch.no_grad():
        posterior = vae.encode(ae.to_patches(vae, to_tensor(images))).latent_dist
    # One draw is off by 2 % itself.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([posterior.sample(generator) for _ in range(50)])
    scale = torch.tensor(vae.config.latents_std)
    assert torch.allclose(drawn.std((0, 2, 3)) / scale, torch.ones(4), atol=0.02)
    # Measuring again finds the same: it measures the raw latents, not the normalised ones.
    kept = dict(vae.config)
    ae.measure_latents(vae, torch.from_numpy(images))
    assert vae.config.latents_std == kept["latents_std"]
    assert not torch.allclose(before, latents)


def test_encoding_does_not_depend_on_the_batch(images: np.ndarray) -> None:
    vae = tiny.tiny_vae(images)
    whole = ae.encode_all(vae, torch.from_numpy(images))
    parts = ae.encode_all(vae, torch.from_numpy(images), batch_size=5)
    with torch.no_grad():
        one = ae.encode(vae, to_tensor(images[7]))
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.allclose(whole[7:8], one, atol=1e-5)


def test_an_unused_channel_is_not_blown_up(images: np.ndarray) -> None:
    """A channel whose mean stays near 0 in a posterior as wide as the prior says nothing."""
    vae = tiny.tiny_vae(images)
    with torch.no_grad():
        vae.quant_conv.weight[0] *= 1e-3  # its mean
        vae.quant_conv.weight[4] *= 0.0  # its log-variance
        vae.quant_conv.bias[4] = 0.0
    ae.measure_latents(vae, torch.from_numpy(images))
    latents = ae.encode_all(vae, torch.from_numpy(images))
    assert vae.config.latents_std[0] == pytest.approx(1, abs=0.05)
    assert latents[:, 0].std() < 0.1
    assert torch.allclose(latents[:, 1:].std((0, 2, 3)), torch.ones(3), atol=0.2)


def test_decode_undoes_the_normalisation(images: np.ndarray) -> None:
    vae = tiny.tiny_vae(images)
    batch = to_tensor(images[:2])
    with torch.no_grad():
        raw = vae.encode(ae.to_patches(vae, batch)).latent_dist.mode()
        straight = ae.from_patches(vae, vae.decode(raw).sample)
        back = ae.decode(vae, ae.encode(vae, batch))
    assert back.shape == batch.shape
    assert torch.allclose(back, straight, atol=1e-5)


def test_a_model_without_statistics_uses_its_scaling_factor() -> None:
    vae = stable_diffusion_like()
    batch = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        raw = vae.encode(batch).latent_dist.mode()
        assert torch.allclose(ae.encode(vae, batch), raw * 0.18215, atol=1e-6)
        assert torch.allclose(ae.decode(vae, raw * 0.18215), vae.decode(raw).sample, atol=1e-5)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    assert torch.allclose(ae.psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-4)


def test_fine_band_energy_sees_fur_and_only_inside_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    fur = torch.randn(1, 3, 16, 16, generator=generator)
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    everywhere = torch.ones(1, 16, 16, dtype=torch.bool)
    left = everywhere.clone()
    left[..., 8:] = False
    assert ae.fine_band_energy(fur, everywhere) > 0.5
    inside = everywhere.clone()
    inside[..., [0, -1]] = False  # the border is mirrored, and a mirrored ramp bends
    assert ae.fine_band_energy(ramp, inside) < 1e-6
    only_right = torch.cat([torch.zeros(1, 3, 16, 9), fur[..., 9:]], 3)
    assert ae.fine_band_energy(only_right, left) < 1e-9
    # A blurred copy has lost its finest band.
    blurred = F.avg_pool2d(fur, 3, 1, 1)
    assert ae.fine_band_energy(blurred, everywhere) < 0.2 * ae.fine_band_energy(fur, everywhere)


def test_the_texture_term_asks_for_as_much_detail_not_for_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    fur, other = torch.randn(2, 4, 3, 32, 32, generator=generator)
    blurred = F.avg_pool2d(fur, 3, 1, 1)

    def gap(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((ae._texture(a) - ae._texture(b)).abs().mean())

    assert ae._texture(fur).shape == (4, 3, 8, 8)
    assert gap(fur, other) < 0.3 * gap(fur, blurred)
    # In the loss it is what its weight says, and without a weight it is not there.
    vae = tiny.tiny_vae(tiny.pictures("natural", 4))
    seen = to_tensor(tiny.pictures("natural", 4))
    plain, halved, whole = (
        ae.autoencoder_loss(vae, seen, seen, torch.Generator().manual_seed(1), **weight)[0].item()
        for weight in ({}, {"texture_weight": 0.5}, {"texture_weight": 1.0})
    )
    assert whole > plain
    assert halved - plain == pytest.approx((whole - plain) / 2, rel=1e-3)


def test_the_loss_falls_as_it_learns_to_copy(images: np.ndarray) -> None:
    batch = F.avg_pool2d(to_tensor(images[[0, 1, 2, 6, 7, 8]]), 2)

    def train(mixed: bool) -> float:
        torch.manual_seed(0)
        vae = ae.tiny_autoencoder(4)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(0)
        values = []
        for step in range(60):
            wanted = batch.roll(step % 5 + 1, 0) if mixed else batch
            loss, numbers = ae.autoencoder_loss(vae, batch, wanted, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(numbers["mse"]))
        return values[-1] / values[0]

    assert train(mixed=False) < 0.3
    # Control: asked for a different picture each time, there is nothing to copy.
    assert train(mixed=True) > 0.38


def test_saved_statistics_come_back(images: np.ndarray, tmp_path: Path) -> None:
    vae = tiny.tiny_vae(images)
    vae.save_pretrained(tmp_path / "vae")
    back = ae.load_autoencoder(tmp_path / "vae")
    assert not back.training
    assert torch.equal(
        ae.encode_all(back, torch.from_numpy(images[:2])),
        ae.encode_all(vae, torch.from_numpy(images[:2])),
    )


def test_a_missing_autoencoder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no autoencoder in .*nothing.*tomjerry foundation"):
        ae.load_autoencoder(tmp_path / "nothing")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("not json")
    with pytest.raises(UserError, match="no autoencoder in"):
        ae.load_autoencoder(tmp_path / "broken")
