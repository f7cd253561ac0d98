"""Fused attention gives transformers' own numbers; word maps show where a word was read from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import Captioned, tiny_blip
from torch import nn
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from tomjerry_utils import blip, blip_attention, blip_model
from tomjerry_utils.blip_attention import word_maps
from tomjerry_utils.blip_training import joint_loss
from tomjerry_utils.training import TrainResult

# Captions of different lengths, so that there are pads to look past.
TEXTS = [
    "a cat is running on the street, facing left",
    "tom and jerry are reaching up in the living room, facing right",
    "a mouse",
]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def attentions(model: blip.Blip) -> list[nn.Module]:
    return [
        module
        for part in model.parts().values()
        for module in part.modules()
        if isinstance(module, (BlipAttention, BlipTextSelfAttention))
    ]


def spelled_out(model: blip.Blip) -> blip.Blip:
    """A copy whose attention is transformers' own."""
    plain = copy.deepcopy(model)
    for module in attentions(plain):
        del module.forward  # the class's is under it
    return plain


@pytest.fixture(scope="module")
def pair() -> tuple[blip.Blip, blip.Blip]:
    """A tiny BLIP with large weights, so that attention is far from even; and its plain copy."""
    model = tiny_blip()
    with torch.no_grad():
        for module in attentions(model):
            for name in ("qkv", "query", "key", "value"):
                if hasattr(module, name):
                    getattr(module, name).weight.mul_(8)
    return model, spelled_out(model)


def joint(model: blip.Blip, images: np.ndarray) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return joint_loss(model, images, TEXTS, contrastive_weight=0.5, generator=generator)[0]


def gradients(model: blip.Blip, images: np.ndarray) -> dict[str, torch.Tensor]:
    named = {
        f"{name}/{key}": parameter
        for name, part in model.parts().items()
        for key, parameter in part.named_parameters()
    }
    found = torch.autograd.grad(joint(model, images), list(named.values()), allow_unused=True)
    return {key: g for key, g in zip(named, found, strict=True) if g is not None}


# ---- the same numbers


def test_every_attention_is_fused(pair: tuple[blip.Blip, blip.Blip], noise: np.ndarray) -> None:
    fused, plain = pair
    # Vision, 4 layers; text, 2 models of 3 layers with 2 attentions.
    assert len(attentions(fused)) == 4 + 2 * 3 * 2
    assert all("forward" in vars(module) for module in attentions(fused))
    assert not any("forward" in vars(module) for module in attentions(plain))
    tower = fused.captioner.vision_model.encoder.layers[0].self_attn
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    assert tower(x)[1] is None  # no table of probabilities is made
    other = plain.captioner.vision_model.encoder.layers[0].self_attn
    assert other(x)[1].amax() > 2 / 17  # and they are not all alike, or anything would pass


def test_outputs_are_those_of_transformers(
    pair: tuple[blip.Blip, blip.Blip], noise: np.ndarray
) -> None:
    def outputs(model: blip.Blip) -> dict[str, torch.Tensor]:
        ids, mask = model.tokens(TEXTS, decode=True)
        assert (mask == 0).any()
        features = model.vision_features(noise)
        return {
            "features": features,
            "logits": model.captioner.text_decoder(
                ids, attention_mask=mask, encoder_hidden_states=features
            ).logits,
            "words": model.text_tokens(TEXTS)[0],
            "image_embeds": model.image_embeds(noise),
            "text_embeds": model.text_embeds(TEXTS),
            "matching": model.itm_logits(noise, TEXTS),
            "losses": model.caption_loss(noise, TEXTS, reduction="none"),
            "joint": joint(model, noise),
        }

    fused, plain = pair
    with torch.no_grad():
        ours, theirs = outputs(fused), outputs(plain)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)
        # Control: with the mask forgotten, pads are read and the words come out otherwise.
        ids, mask = fused.tokens(TEXTS)
        encoder = fused.retrieval.text_encoder
        blind = encoder(ids, attention_mask=torch.ones_like(mask)).last_hidden_state
        assert (blind - theirs["words"])[2].abs().max() > 1e-2


def test_gradients_are_those_of_transformers(
    pair: tuple[blip.Blip, blip.Blip], noise: np.ndarray
) -> None:
    ours, theirs = (gradients(model, noise) for model in pair)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert max(value.abs().max() for value in theirs.values()) > 1e-2


def test_gradients_in_pixels_are_those_of_transformers(pair: tuple[blip.Blip, blip.Blip]) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images.requires_grad_(True)
    ours, theirs = (
        torch.autograd.grad(model.caption_loss(images, TEXTS), images)[0] for model in pair
    )
    assert theirs.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"batch_size": 1}])
def test_generation_is_that_of_transformers(
    pair: tuple[blip.Blip, blip.Blip],
    learnt_blip: tuple[blip.Blip, TrainResult],
    dozen: Captioned,
    options: dict[str, int],
) -> None:
    fused, plain = pair
    assert fused.generate(dozen.images, **options) == plain.generate(dozen.images, **options)
    model, _ = learnt_blip
    written = model.generate(dozen.images, **options)
    assert written == spelled_out(model).generate(dozen.images, **options)
    assert len(set(written)) > 3


def test_bfloat16_is_near(pair: tuple[blip.Blip, blip.Blip], noise: np.ndarray) -> None:
    fused, plain = pair
    exact = joint(plain, noise).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.vision_features(noise).dtype in (torch.bfloat16, torch.float32)
        ours, theirs = joint(fused, noise).item(), joint(plain, noise).item()
        found = gradients(fused, noise)
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours == pytest.approx(exact, rel=0.05)
    assert all(torch.isfinite(value).all() for value in found.values())
    true = gradients(plain, noise)
    one, two = (torch.cat([g[key].flatten() for key in true]) for g in (found, true))
    assert torch.cosine_similarity(one, two, dim=0) > 0.95


def test_dropout_falls_in_training_only(noise: np.ndarray) -> None:
    model = tiny_blip()
    for module in attentions(model):
        module.dropout.p = 0.5
    with torch.no_grad():
        rest = [model.caption_loss(noise, TEXTS).item() for _ in "ab"]
        model.captioner.train()
        torch.manual_seed(0)
        dropped = [model.caption_loss(noise, TEXTS).item() for _ in "ab"]
    assert rest[0] == rest[1]
    assert len({rest[0], *dropped}) == 3


def test_a_copy_has_its_own_weights(noise: np.ndarray) -> None:
    model = tiny_blip()
    twin = copy.deepcopy(model)
    assert all(module.forward.__self__ is module for module in attentions(twin))
    before = model.caption_loss(noise, TEXTS).item()
    assert twin.caption_loss(noise, TEXTS).item() == before
    with torch.no_grad():
        for module in attentions(twin):
            for parameter in module.parameters():
                parameter.mul_(3)
    assert model.caption_loss(noise, TEXTS).item() == before
    assert twin.caption_loss(noise, TEXTS).item() != before


def test_what_is_saved_and_loaded_is_fused_again(
    pair: tuple[blip.Blip, blip.Blip], noise: np.ndarray, tmp_path: Path
) -> None:
    fused, plain = pair
    blip.save(fused, tmp_path)
    again = blip.load(tmp_path)
    assert all("forward" in vars(module) for module in attentions(again))
    with torch.no_grad():
        torch.testing.assert_close(joint(again, noise), joint(plain, noise), rtol=1e-5, atol=1e-5)


def test_adapters_go_on_top(noise: np.ndarray) -> None:
    """LoRA replaces layers inside of the attention: they are used, and learn the same way."""
    fused = tiny_blip()
    start = joint(fused, noise).item()
    blip_model.add_lora(fused, 2, seed=0)
    assert joint(fused, noise).item() == pytest.approx(start, rel=1e-6)
    with torch.no_grad():  # B starts at 0, where the adapters do nothing
        for name, parameter in fused.captioner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    plain = spelled_out(fused)
    with torch.no_grad():
        assert abs(joint(fused, noise).item() - start) > 1e-3
        torch.testing.assert_close(joint(fused, noise), joint(plain, noise), rtol=1e-5, atol=1e-5)

    def slopes(model: blip.Blip) -> dict[str, torch.Tensor]:
        named = {n: p for n, p in model.captioner.named_parameters() if p.requires_grad}
        loss = model.caption_loss(noise, TEXTS)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    ours, theirs = slopes(fused), slopes(plain)
    assert any("lora_A" in name for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


# ---- where a word was read


def test_word_maps_are_one_for_each_token(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    peaks: list[float] = []
    for image, text in zip(dozen.images, dozen.texts, strict=True):
        tokens, maps = word_maps(model, image, text)
        assert tokens == model.tokenizer.tokenize(text)
        assert maps.shape == (len(tokens), 4, 4)
        assert np.isfinite(maps).all()
        assert maps.min() >= 0
        peaks += maps.max((1, 2)).tolist()
    # A word that no place of the picture made likelier has an empty map; such words are few.
    full = np.isclose(peaks, 1, rtol=1e-6)
    assert (full | (np.array(peaks) == 0)).all()
    assert full.mean() > 0.75


def test_a_word_map_belongs_to_its_picture(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    text = dozen.texts[0]
    maps = [word_maps(model, image, text)[1] for image in dozen.images]
    assert np.array_equal(maps[0], word_maps(model, dozen.images[0], text)[1])
    for other in maps[1:]:
        assert np.abs(maps[0] - other).mean() > 0.02
    # Words of one caption are read from different places, too.
    assert np.ptp(maps[0], axis=0).max() > 0.5


def test_a_model_that_ignores_its_picture_has_empty_maps(dozen: Captioned) -> None:
    """Negative control: there is attention, but nothing that is attended to is used."""
    model = tiny_blip()
    assert word_maps(model, dozen.images[0], TEXTS[0])[1].max() == pytest.approx(1)
    attention = model.captioner.text_decoder.bert.encoder.layer[-1].crossattention.self
    with torch.no_grad():
        attention.value.weight.zero_()
        attention.value.bias.zero_()
    assert word_maps(model, dozen.images[0], TEXTS[0])[1].max() == 0


def test_word_maps_leave_the_model_as_it_was(
    dozen: Captioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_blip()
    last = model.captioner.text_decoder.bert.encoder.layer[-1].crossattention.self
    kept = last.forward
    marks = {}
    for part in model.parts().values():
        for parameter in part.parameters():
            parameter.grad = marks[parameter] = torch.full_like(parameter, 0.5)
    before = [module.training for module in model.captioner.modules()]
    word_maps(model, dozen.images[0], TEXTS[0])
    assert last.forward == kept
    assert [module.training for module in model.captioner.modules()] == before
    for parameter, mark in marks.items():
        assert parameter.grad is mark
        assert (mark == 0.5).all()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    head = model.captioner.text_decoder.cls
    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", fails)
        with pytest.raises(RuntimeError, match="power cut"):
            word_maps(model, dozen.images[0], TEXTS[0])
    assert last.forward == kept


def test_word_maps_of_a_frozen_model_and_of_no_words(dozen: Captioned) -> None:
    """Stage 05 freezes its BLIP; and a model that has learnt nothing may write nothing."""
    model = tiny_blip()
    free = word_maps(model, dozen.images[0], TEXTS[0])
    for part in model.parts().values():
        part.requires_grad_(False)
    with torch.no_grad():
        frozen = word_maps(model, dozen.images[0], TEXTS[0])
    assert frozen[0] == free[0]
    np.testing.assert_allclose(frozen[1], free[1], atol=1e-6)
    tokens, maps = blip_attention.word_maps(model, dozen.images[0], "")
    assert (tokens, maps.shape) == ([], (0, 4, 4))
