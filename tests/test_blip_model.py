"""The BLIP of stage 03: its words, its tasks, its folders, and a similarity with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Captioned, tiny_blip, tune_blip
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from tomjerry_utils import UserError, blip, blip_model, blip_training, scenes
from tomjerry_utils.images import to_tensor
from tomjerry_utils.training import TrainResult

TEXTS = [
    "a cat is running on the street, facing left",
    "tom and jerry are reaching up in the living room, facing right",
    "a mouse is lying on the beach, facing left",
]


@pytest.fixture(scope="module")
def model() -> blip.Blip:
    return tiny_blip()


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def every_caption() -> list[str]:
    texts = set()
    for style, zoo in (("cartoon", False), ("natural", False), ("natural", True)):
        drawn = [scenes.describe(seed, zoo=zoo) for seed in range(1500)]
        texts |= {scenes.caption(scene, style) for scene in drawn}
    return sorted(texts)


# ---- words


def test_vocabulary_covers_every_caption_with_whole_words(model: blip.Blip) -> None:
    for text in every_caption():
        pieces = model.tokenizer.tokenize(text)
        assert "[UNK]" not in pieces
        assert not [piece for piece in pieces if piece.startswith("##")]
        ids, mask = model.tokens([text])
        assert mask.sum() < model.max_length
        assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_other_words_are_spelled_not_lost(model: blip.Blip) -> None:
    pieces = model.tokenizer.tokenize("a dog")
    assert pieces == ["a", "d", "##o", "##g"]


def test_captions_cross_to_natural_words() -> None:
    scene = scenes.describe(5, cls="both")
    cartoon, natural = (scenes.caption(scene, style) for style in scenes.STYLES)
    assert blip.to_natural(cartoon) == natural
    assert blip.to_natural("a cat chases a tomato") == "a cat chases a tomato"


# ---- its tasks


def test_pads_are_left_out_of_the_loss(model: blip.Blip, noise: np.ndarray) -> None:
    ids, mask = model.tokens(TEXTS, decode=True, length=30)
    features = model.vision_features(noise)

    def loss(labels: torch.Tensor, length: int = 30) -> float:
        return model.captioner.text_decoder(
            ids[:, :length],
            attention_mask=mask[:, :length],
            encoder_hidden_states=features,
            labels=labels[:, :length],
        ).loss.item()

    short = int(mask.sum(1).max())
    masked = blip.mask_labels(ids, mask)
    assert (masked == -100).sum() == (mask == 0).sum() > 0
    assert loss(masked) == pytest.approx(loss(masked, short), rel=1e-5)
    assert model.caption_loss(noise, TEXTS).item() == pytest.approx(loss(masked), rel=1e-5)
    # Without the mask the loss is another one: it asks for pads.
    assert abs(loss(ids) - loss(masked)) > 1e-3


def test_caption_loss_of_one_caption_is_the_mean_over_its_words(
    model: blip.Blip, noise: np.ndarray
) -> None:
    each = model.caption_loss(noise, TEXTS, reduction="none")
    alone = [model.caption_loss(noise[i : i + 1], TEXTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(each, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_neighbours_in_a_batch_change_nothing(model: blip.Blip, noise: np.ndarray) -> None:
    """Pads of a longer neighbour must not leak into texts, matching or generation."""
    torch.testing.assert_close(
        model.text_embeds(TEXTS),
        torch.cat([model.text_embeds([text]) for text in TEXTS]),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        model.itm_logits(noise, TEXTS),
        torch.cat([model.itm_logits(noise[i : i + 1], TEXTS[i : i + 1]) for i in range(3)]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert model.generate(noise) == model.generate(noise, batch_size=1)


def test_text_tokens_have_the_asked_length_and_a_mask(model: blip.Blip) -> None:
    features, mask = model.text_tokens(TEXTS, length=24)
    assert features.shape == (3, 24, 64)
    assert mask.shape == (3, 24)
    free, short = model.text_tokens(TEXTS)
    torch.testing.assert_close(features[:, : free.shape[1]][short.bool()], free[short.bool()])


def test_embeddings_have_unit_norm(model: blip.Blip, noise: np.ndarray) -> None:
    for embeds in (model.image_embeds(noise), model.text_embeds(TEXTS)):
        assert embeds.shape == (3, 64)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))


def test_tensor_pixels_equal_the_image_processor(model: blip.Blip, noise: np.ndarray) -> None:
    expected = model.processor(list(noise), return_tensors="pt").pixel_values
    torch.testing.assert_close(model.pixels(noise), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.pixels(to_tensor(noise)), expected, rtol=0, atol=1e-5)
    large = np.kron(noise, np.ones((1, 2, 2, 1), np.uint8))
    assert model.pixels(large).shape == expected.shape


# ---- its folders


def test_saved_folders_load_in_both_transformers_classes(
    model: blip.Blip, noise: np.ndarray, tmp_path: Path
) -> None:
    blip.save(model, tmp_path)
    captioner, found = BlipForConditionalGeneration.from_pretrained(
        tmp_path / "captioner", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    retrieval, found = BlipForImageTextRetrieval.from_pretrained(
        tmp_path / "retrieval", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ids, mask = model.tokens(TEXTS)
    pixels = model.pixels(noise)
    theirs = retrieval(input_ids=ids, pixel_values=pixels, attention_mask=mask).itm_score
    torch.testing.assert_close(theirs, model.itm_logits(noise, TEXTS))
    cosine = retrieval(
        input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False
    ).itm_score
    ours = model.image_embeds(noise) @ model.text_embeds(TEXTS).T
    torch.testing.assert_close(cosine, ours)
    ids, mask = model.tokens(TEXTS, decode=True)
    labels = blip.mask_labels(ids, mask)
    theirs = captioner(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(theirs.loss, model.caption_loss(noise, TEXTS))

    again = blip.load(tmp_path)
    assert again.captioner.vision_model is again.retrieval.vision_model
    torch.testing.assert_close(again.itm_logits(noise, TEXTS), model.itm_logits(noise, TEXTS))
    assert again.generate(noise) == model.generate(noise)


def test_half_precision_ships_half_the_bytes(
    model: blip.Blip, noise: np.ndarray, tmp_path: Path
) -> None:
    blip.save(model, tmp_path / "full")
    blip.save(model, tmp_path / "half", half=True)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors"))
        for name in ("full", "half")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    assert next(model.captioner.parameters()).dtype == torch.float32
    again = blip.load(tmp_path / "half")
    assert {p.dtype for part in again.parts().values() for p in part.parameters()} == {
        torch.float32
    }
    torch.testing.assert_close(
        again.image_embeds(noise), model.image_embeds(noise), rtol=0, atol=3e-3
    )


def test_a_captioning_checkpoint_alone_gets_a_text_encoder(
    model: blip.Blip, tmp_path: Path
) -> None:
    blip.save(model, tmp_path)
    alone = blip.load(tmp_path / "captioner")
    decoder = alone.captioner.text_decoder.bert.state_dict()
    for name, weight in alone.retrieval.text_encoder.state_dict().items():
        torch.testing.assert_close(weight, decoder[name])
    assert alone.captioner.vision_model is alone.retrieval.vision_model


def test_a_captioning_checkpoint_gets_the_same_heads_each_time(
    model: blip.Blip, noise: np.ndarray, tmp_path: Path
) -> None:
    """What it lacks starts at random, and yet a run can be repeated; nobody's dice are thrown."""
    blip.save(model, tmp_path)
    torch.manual_seed(1)
    first = blip.load(tmp_path / "captioner")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = blip.load(tmp_path / "captioner")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.itm_logits(noise, TEXTS), second.itm_logits(noise, TEXTS))
    assert torch.equal(first.image_embeds(noise), second.image_embeds(noise))


def test_a_folder_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no BLIP in") as caught:
        blip.load(tmp_path)
    assert "\n" not in str(caught.value)


# ---- a folder as the hub has it


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of Salesforce/blip-image-captioning-base, small: one folder, no text encoder."""
    folder = tmp_path_factory.mktemp("hub") / "blip-image-captioning-base"
    # BERT's vocabulary begins so; BLIP's [DEC] and [ENC] stand behind its end.
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words += [*letters, *(f"##{letter}" for letter in letters), *scenes.vocabulary()]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    ids |= {"[DEC]": len(ids), "[ENC]": len(ids) + 1}
    tokenizer = BertTokenizer(vocab=ids, model_input_names=["input_ids", "attention_mask"])
    config = BlipConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 48,
            "encoder_hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": ids["[DEC]"],
            "eos_token_id": 2,
            "sep_token_id": ids["[SEP]"],
            "pad_token_id": 0,
            "label_smoothing": 0.1,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 48,
            "patch_size": 16,
            "initializer_range": 0.02,
        },
        projection_dim=32,
        image_text_hidden_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        captioner = BlipForConditionalGeneration(config)
    processor = BlipImageProcessorPil(size={"height": 48, "width": 48})
    for part in (captioner, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def test_a_hub_folder_loads_and_works(hub: Path, noise: np.ndarray) -> None:
    model = blip.load(hub, max_length=100)
    assert model.image_size == 48
    assert model.max_length == 64  # no more positions than it has
    assert model.tokenizer.tokenize("A Cat is running.") == ["a", "cat", "is", "running", "."]
    ids, _ = model.tokens(TEXTS, decode=True)
    assert (ids[:, 0] == model.tokenizer.convert_tokens_to_ids("[DEC]")).all()
    assert (model.tokens(TEXTS)[0][:, 0] == model.tokenizer.cls_token_id).all()
    assert model.vision_features(noise).shape == (3, 10, 64)
    assert model.text_embeds(TEXTS).shape == model.image_embeds(noise).shape == (3, 32)
    assert model.itm_logits(noise, TEXTS).shape == (3, 2)
    assert len(model.generate(noise)) == 3
    assert blip.trainable_parameters(model) == blip_model.expected_parameters(model, 0)


def test_a_hub_folder_s_loss_is_that_of_transformers(hub: Path, noise: np.ndarray) -> None:
    """Its label smoothing is in it."""
    model = blip.load(hub)
    theirs = BlipForConditionalGeneration.from_pretrained(hub)
    ids, mask = model.tokens(TEXTS, decode=True)
    out = theirs(
        pixel_values=model.pixels(noise),
        input_ids=ids,
        attention_mask=mask,
        labels=blip.mask_labels(ids, mask),
    )
    torch.testing.assert_close(model.caption_loss(noise, TEXTS), out.loss)
    plain = F.cross_entropy(
        theirs.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=model.vision_features(noise)
        ).logits[:, :-1].transpose(1, 2),
        blip.mask_labels(ids, mask)[:, 1:],
    )  # fmt: skip
    assert out.loss.item() != pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hub_folder_is_tuned_saved_and_read_by_transformers(
    hub: Path, rank: int, dozen: Captioned, noise: np.ndarray, tmp_path: Path
) -> None:
    model, start = blip.load(hub), blip.load(hub)
    tune_blip(
        model, dozen, tmp_path / "run", steps=2, warmup_steps=0, batch_size=4, lora_rank=rank,
        log_every=1, held=(dozen.images[:4], dozen.texts[:4]), augmented=True,
    )  # fmt: skip
    blip.save(model, tmp_path)
    moved = {
        name
        for name, part in start.parts().items()
        for key, weight in part.state_dict().items()
        if not torch.equal(weight, model.parts()[name].state_dict()[key])
    }
    assert moved == set(start.parts())

    again = blip.load(tmp_path)
    expected = model.caption_loss(noise, TEXTS)
    assert (expected - start.caption_loss(noise, TEXTS)).abs() > 1e-4
    torch.testing.assert_close(again.caption_loss(noise, TEXTS), expected)
    torch.testing.assert_close(again.itm_logits(noise, TEXTS), model.itm_logits(noise, TEXTS))
    kinds: list[tuple[str, Any]] = [
        ("captioner", BlipForConditionalGeneration),
        ("retrieval", BlipForImageTextRetrieval),
    ]
    ids, mask = model.tokens(TEXTS, decode=True)
    for name, kind in kinds:
        plain, found = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        if name == "captioner":
            out = plain(
                pixel_values=model.pixels(noise),
                input_ids=ids,
                attention_mask=mask,
                labels=blip.mask_labels(ids, mask),
            )
            torch.testing.assert_close(out.loss, expected)
        else:
            words, seen = model.tokens(TEXTS)
            out = plain(
                input_ids=words, pixel_values=model.pixels(noise), attention_mask=seen
            ).itm_score
            torch.testing.assert_close(out, model.itm_logits(noise, TEXTS))


# ---- similarity


@pytest.mark.parametrize("variant", blip.VARIANTS)
def test_similarity_gradient_equals_finite_differences(variant: str) -> None:
    model = tiny_blip()
    model.captioner.double()
    model.retrieval.double()
    generator = torch.Generator().manual_seed(0)
    output, source, direction = (
        torch.rand(2, 3, 24, 24, generator=generator, dtype=torch.float64) * 2 - 1 for _ in "abc"
    )

    def value(images: torch.Tensor) -> torch.Tensor:
        return blip.similarity(model, images, source, variant, TEXTS[:2]).sum()

    output.requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(output), output)
    with torch.no_grad():
        step = 1e-5
        slope = (value(output + step * direction) - value(output - step * direction)) / (2 * step)
    assert gradient.abs().sum() > 0
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_vision_similarity_of_a_picture_with_itself_is_one(
    model: blip.Blip, noise: np.ndarray
) -> None:
    images = to_tensor(noise)
    torch.testing.assert_close(
        blip.similarity(model, images, images, "vision"), torch.ones(3), rtol=0, atol=1e-5
    )
    assert (blip.similarity(model, images, images.flip(0), "vision")[[0, 2]] < 0.999).all()


def test_similarity_writes_the_missing_captions_in_natural_words(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    source = to_tensor(dozen.images[:3])
    texts = [blip.to_natural(text) for text in model.generate(source)]
    for variant in ("contrastive", "matching", "likelihood"):
        torch.testing.assert_close(
            blip.similarity(model, source, source, variant),
            blip.similarity(model, source, None, variant, texts),
        )


def test_an_unknown_variant_is_refused(model: blip.Blip, noise: np.ndarray) -> None:
    with pytest.raises(ValueError, match="none of vision"):
        blip.similarity(model, to_tensor(noise), None, "cosine")


def test_no_judge_is_known_here() -> None:
    for module in (blip, blip_model, blip_training):
        assert "judges" not in Path(str(module.__file__)).read_text(encoding="utf-8")
