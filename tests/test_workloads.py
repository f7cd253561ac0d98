"""What the stages train, from configurations alone: the sizes of the real models."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tomjerry_utils import UserError, blip_model, finishing, published, workloads
from tomjerry_utils.autoencoder import load_autoencoder
from tomjerry_utils.denoiser import load_denoiser
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import foundation_root
from tomjerry_utils.workloads import Variant, Work, trainings


def count(*modules: torch.nn.Module, trained: bool = False) -> int:
    found = {p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in found if p.requires_grad or not trained)


def made(profile: str, name: str, variant: Variant | None = None) -> Work:
    [training] = [t for t in trainings(load_profile(profile)) if t.name == name]
    with torch.device("meta"):
        return training.make(variant or Variant())


def test_published_models_have_their_published_sizes() -> None:
    """Parameters as the weights' publishers and users count them."""
    parts = published.PUBLISHED[published.SD]
    with torch.device("meta"):
        assert count(UNet2DConditionModel.from_config(parts["unet"])) == 859_520_964
        assert count(AutoencoderKL.from_config(parts["vae"])) == 83_653_863
        blip = workloads._describer(load_profile("paper"))
    # The hub's number counts the embedding that the decoder shares a second time.
    assert count(blip.captioner) + 30524 * 768 == 247_414_076
    assert blip.image_size == 384
    assert blip.max_length == 48


def test_tiny_models_are_those_that_ship() -> None:
    root = foundation_root()
    blip = blip_model.load(root / "blip")
    parts = made("mini", "03 BLIP").trained
    assert count(*parts, trained=True) == blip_model.trainable_parameters(blip)
    unet, conditioner = load_denoiser(root / "denoiser")
    assert count(*made("mini", "04 denoiser").trained) == count(unet, conditioner)
    [decoder] = made("mini", "04 decoder").trained
    vae = load_autoencoder(root / "autoencoder")
    assert count(decoder, trained=True) == count(vae.decoder, vae.post_quant_conv)


@pytest.mark.parametrize("rank", [4, 16])
def test_adapters_are_counted_as_fine_tuning_expects_them(rank: int) -> None:
    with torch.device("meta"):
        blip = workloads._describer(load_profile("paper"))
    work = made("paper", "03 BLIP", Variant(lora_rank=rank))
    assert count(*work.trained, trained=True) == blip_model.expected_parameters(blip, rank)


def test_stage_05_trains_no_frozen_part() -> None:
    work = made("mini", "05 translator")
    assert count(*work.beside, trained=True) == 0
    assert count(*work.trained, trained=True) == count(*work.trained)


def test_trainings_are_the_profiles() -> None:
    paper = {t.name: t for t in trainings(load_profile("paper"))}
    assert list(paper) == [
        "03 BLIP", "04 decoder", "04 denoiser", "05 translator", "04, 05 finishing",
    ]  # fmt: skip
    assert paper["04 denoiser"].batch == load_profile("paper").ldm.batch_size
    assert paper["04, 05 finishing"].second == finishing.own_in_batch(
        paper["04, 05 finishing"].batch
    )
    # What a profile leaves out is not planned.
    assert "04 decoder" not in {t.name for t in trainings(load_profile("colab"))}


def test_unknown_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"the sizes of someone/else \(unet\) are not known"):
        published.config_of("someone/else", "unet")
    with pytest.raises(UserError, match=r"no config\.json in"):
        published.config_of(str(foundation_root()), "unet")
