"""Stage 03: the tiny BLIP is real, learns what it is shown, and its similarity has gradients."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tomjerry_utils import UserError, blip, blip_model, collect, scenes
from tomjerry_utils.images import to_tensor
from tomjerry_utils.profiles import load_profile

TEXTS = [
    "a cat is running on the street, facing left",
    "tom and jerry are reaching up in the living room, facing right",
    "a mouse is lying on the beach, facing left",
]


def tiny(seed: int = 0) -> blip.Blip:
    return blip.create_tiny(scenes.vocabulary(), image_size=32, hidden_size=64, seed=seed)


@pytest.fixture(scope="module")
def model() -> blip.Blip:
    return tiny()


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@dataclass
class Dozen:
    images: np.ndarray
    texts: list[str]


@pytest.fixture(scope="module")
def dozen() -> Dozen:
    """Twelve training scenes of different captions, half of them cartoons."""
    images, texts = [], []
    for style, start in (("cartoon", 1_000_000), ("natural", 2_000_000)):
        drawn = [scenes.describe(seed) for seed in range(start, start + 6)]
        texts += [scenes.caption(scene, style) for scene in drawn]
        images += [scenes.render(scene, style, 32).image for scene in drawn]
    assert len(set(texts)) == 12
    return Dozen(np.stack(images), texts)


def tune(model: blip.Blip, data: Dozen, folder: Path, **settings):
    plain = {
        "steps": 120,
        "batch_size": 12,
        "learning_rate": 4e-3,
        "warmup_steps": 5,
        "contrastive_weight": 0.5,
        "seed": 0,
        "log_every": 10,
    }
    # A dozen pictures are learnt by heart, and sooner where they look the same each time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip, "augment", lambda images, texts, generator: (images, list(texts)))
        return blip.fine_tune(model, data.images, data.texts, folder=folder, **plain | settings)


@pytest.fixture(scope="module")
def learnt(dozen, tmp_path_factory):
    model = tiny()
    return model, tune(model, dozen, tmp_path_factory.mktemp("learnt"))


def every_caption() -> list[str]:
    texts = set()
    for style, zoo in (("cartoon", False), ("natural", False), ("natural", True)):
        drawn = [scenes.describe(seed, zoo=zoo) for seed in range(1500)]
        texts |= {scenes.caption(scene, style) for scene in drawn}
    return sorted(texts)


# ---- words


def test_vocabulary_covers_every_caption_with_whole_words(model):
    for text in every_caption():
        pieces = model.tokenizer.tokenize(text)
        assert "[UNK]" not in pieces
        assert not [piece for piece in pieces if piece.startswith("##")]
        ids, mask = model.tokens([text])
        assert mask.sum() < model.max_length
        assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_other_words_are_spelled_not_lost(model):
    pieces = model.tokenizer.tokenize("a dog")
    assert pieces == ["a", "d", "##o", "##g"]


def test_slots_of_every_caption_are_those_of_its_scene():
    subjects = {
        ("tom", "cartoon"): "tom",
        ("jerry", "cartoon"): "jerry",
        ("both", "cartoon"): "tom_jerry",
        ("tom", "natural"): "cat",
        ("jerry", "natural"): "mouse",
        ("both", "natural"): "cat_mouse",
    }
    for seed, style in itertools.product(range(200), scenes.STYLES):
        scene = scenes.describe(seed)
        assert blip.caption_slots(scenes.caption(scene, style)) == {
            "subject": subjects[scene.cls, style],
            "action": scene.action,
            "direction": scene.facing,
            "place": scene.place,
        }
    zoo = scenes.caption(scenes.describe(3, zoo=True), "natural")
    assert blip.caption_slots(zoo)["subject"] in ("animal", "two_animals")
    assert set(blip.caption_slots("nothing to see").values()) == {None}


def test_slot_accuracy_counts_hits():
    wrong = [text.replace("left", "right") for text in TEXTS]
    scores = blip.slot_accuracy(wrong, TEXTS)
    assert scores["subject"] == scores["action"] == scores["place"] == 1.0
    assert scores["direction"] == pytest.approx(1 / 3)


def test_captions_cross_to_natural_words():
    scene = scenes.describe(5, cls="both")
    cartoon, natural = (scenes.caption(scene, style) for style in scenes.STYLES)
    assert blip.to_natural(cartoon) == natural
    assert blip.to_natural("a cat chases a tomato") == "a cat chases a tomato"


# ---- the model


def test_pads_are_left_out_of_the_loss(model, noise):
    ids, mask = model.tokens(TEXTS, decode=True, length=30)
    features = model.vision_features(noise)

    def loss(labels, length=30):
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


def test_training_on_pads_learns_the_words_slower(noise):
    """The trap in figures: the same steps on unmasked labels leave a higher loss on the words."""

    def words_loss(masked: bool) -> float:
        model = tiny()
        ids, mask = model.tokens(TEXTS, decode=True, length=40)
        features = model.vision_features(noise).detach()
        decoder = model.captioner.text_decoder
        optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
        labels = blip.mask_labels(ids, mask) if masked else ids
        for _ in range(40):
            decoder(
                ids, attention_mask=mask, encoder_hidden_states=features, labels=labels
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return model.caption_loss(noise, TEXTS).item()

    right, wrong = words_loss(masked=True), words_loss(masked=False)
    print(right, wrong)
    assert wrong > 1.3 * right


def test_caption_loss_of_one_caption_is_the_mean_over_its_words(model, noise):
    each = model.caption_loss(noise, TEXTS, reduction="none")
    alone = [model.caption_loss(noise[i : i + 1], TEXTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(each, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_neighbours_in_a_batch_change_nothing(model, noise):
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


def test_text_tokens_have_the_asked_length_and_a_mask(model):
    features, mask = model.text_tokens(TEXTS, length=24)
    assert features.shape == (3, 24, 64)
    assert mask.shape == (3, 24)
    free, short = model.text_tokens(TEXTS)
    torch.testing.assert_close(features[:, : free.shape[1]][short.bool()], free[short.bool()])


def test_embeddings_have_unit_norm(model, noise):
    for embeds in (model.image_embeds(noise), model.text_embeds(TEXTS)):
        assert embeds.shape == (3, 64)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))


def test_tensor_pixels_equal_the_image_processor(model, noise):
    expected = model.processor(list(noise), return_tensors="pt").pixel_values
    torch.testing.assert_close(model.pixels(noise), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.pixels(to_tensor(noise)), expected, rtol=0, atol=1e-5)
    large = np.kron(noise, np.ones((1, 2, 2, 1), np.uint8))
    assert model.pixels(large).shape == expected.shape


def test_saved_folders_load_in_both_transformers_classes(model, noise, tmp_path):
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

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


def test_half_precision_ships_half_the_bytes(model, noise, tmp_path):
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


def test_a_captioning_checkpoint_alone_gets_a_text_encoder(model, tmp_path):
    blip.save(model, tmp_path)
    alone = blip.load(tmp_path / "captioner")
    decoder = alone.captioner.text_decoder.bert.state_dict()
    for name, weight in alone.retrieval.text_encoder.state_dict().items():
        torch.testing.assert_close(weight, decoder[name])
    assert alone.captioner.vision_model is alone.retrieval.vision_model


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no BLIP in") as caught:
        blip.load(tmp_path)
    assert "\n" not in str(caught.value)


# ---- learning


def test_training_learns_the_dozen(learnt, dozen):
    model, result = learnt
    first, last = result.history[0], result.history[-1]
    # Matching starts at ln 2 and is the last to be learnt: the others must lead it.
    for part, share in (("caption", 0.5), ("contrastive", 0.8), ("matching", 0.97)):
        assert last[part] < share * first[part], part
    scores = blip.slot_accuracy(model.generate(dozen.images), dozen.texts)
    assert min(scores.values()) >= 0.75, scores


def test_it_learnt_the_pairs_not_only_the_language(learnt, dozen):
    """Negative control: the same captions on the wrong pictures must fit worse by every head."""
    model, _ = learnt
    wrong = dozen.texts[1:] + dozen.texts[:1]
    images = to_tensor(dozen.images)
    with torch.no_grad():
        for variant in ("contrastive", "matching", "likelihood"):
            right = blip.similarity(model, images, None, variant, dozen.texts)
            other = blip.similarity(model, images, None, variant, wrong)
            assert (right > other).float().mean() >= 0.75, variant


def test_shuffled_captions_break_it(dozen, tmp_path, learnt):
    model = tiny()
    shuffled = Dozen(dozen.images, dozen.texts[5:] + dozen.texts[:5])
    tune(model, shuffled, tmp_path)
    with torch.no_grad():
        right = learnt[0].caption_loss(dozen.images, dozen.texts)
        broken = model.caption_loss(dozen.images, dozen.texts)
    assert broken > 1.5 * right


def test_resumed_training_equals_uninterrupted(dozen, tmp_path):
    short = {"steps": 6, "warmup_steps": 1, "batch_size": 4, "log_every": 1}
    whole = tiny()
    tune(whole, dozen, tmp_path / "whole", **short)
    first = tiny()
    part = tune(first, dozen, tmp_path / "parts", **short, max_seconds=1e-6)
    assert part.steps < 6
    second = tiny(seed=1)  # its start must not matter: the checkpoint holds everything
    rest = tune(second, dozen, tmp_path / "parts", **short)
    assert rest.finished
    for name, part in whole.parts().items():
        for key, weight in part.state_dict().items():
            assert torch.equal(weight, second.parts()[name].state_dict()[key]), (name, key)


def test_equal_captions_are_no_negatives(model, noise):
    """A batch of one caption has no negatives: contrast is at its floor, matching still runs."""
    generator = torch.Generator().manual_seed(0)
    _, parts = blip.joint_loss(
        model, noise, [TEXTS[0]] * 3, contrastive_weight=1.0, generator=generator
    )
    assert parts["contrastive"].item() == pytest.approx(np.log(3), abs=0.2)
    assert torch.isfinite(parts["matching"])


def test_mirroring_turns_the_caption_with_the_picture(noise):
    # Broad patches, which survive being moved by a few pixels.
    images = to_tensor(np.kron(noise[:, :4, :4], np.ones((1, 8, 8, 1), np.uint8)))
    images = images.repeat(20, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    turned, texts = blip.augment(images, TEXTS * 20, generator)
    original = [text == TEXTS[i % 3] for i, text in enumerate(texts)]
    assert 15 < sum(original) < 45
    for i, same in enumerate(original):
        other = images[i] if same else images[i].flip(-1)
        one, two = turned[i].flatten(), other.flatten()
        assert torch.corrcoef(torch.stack([one, two]))[0, 1] > 0.5


def test_lora_trains_adapters_and_heads_only_and_leaves_a_plain_blip(dozen, tmp_path):
    model, start = tiny(), tiny()
    total = blip.trainable_parameters(model)
    seen = []
    settings = {"steps": 4, "warmup_steps": 1, "log_every": 4, "lora_rank": 2}
    tune(
        model,
        dozen,
        tmp_path,
        **settings,
        on_log=lambda step, modules: seen.append(blip.trainable_parameters(model)),
    )
    # Vision, 4 layers: qkv 2·(64 + 192), projection 2·(64 + 64). Text, 2 models of 3 layers with
    # 2 attentions: query, key, value 2·(64 + 64). Heads: 2·(64·64 + 64) and 2·64 + 2.
    assert seen == [4 * (512 + 256) + 2 * 3 * 2 * 3 * 256 + 2 * 4160 + 130]
    assert blip.trainable_parameters(model) == total
    for name, part in start.parts().items():
        after = model.parts()[name].state_dict()
        assert set(after) == set(part.state_dict())
        for key, weight in part.state_dict().items():
            # Only the weights that LoRA names, and the heads, may move.
            touched = key.split(".")[-2] in blip.LORA_TARGETS if "." in key else True
            if not touched:
                assert torch.equal(weight, after[key]), (name, key)
    changed = model.captioner.vision_model.encoder.layers[0].self_attn.qkv.weight
    before = start.captioner.vision_model.encoder.layers[0].self_attn.qkv.weight
    assert not torch.equal(changed, before)


def test_wrong_lora_targets_are_refused(dozen, tmp_path, monkeypatch):
    """A target that no layer has would leave its part untrained, in silence."""
    monkeypatch.setattr(blip_model, "LORA_TARGETS", ("query", "key", "value", "qkv", "out_proj"))
    with pytest.raises(UserError, match="parameters"):
        tune(tiny(), dozen, tmp_path, lora_rank=2)


# ---- similarity


@pytest.mark.parametrize("variant", blip.VARIANTS)
def test_similarity_gradient_equals_finite_differences(variant):
    model = tiny()
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


def test_vision_similarity_of_a_picture_with_itself_is_one(model, noise):
    images = to_tensor(noise)
    torch.testing.assert_close(
        blip.similarity(model, images, images, "vision"), torch.ones(3), rtol=0, atol=1e-5
    )
    assert (blip.similarity(model, images, images.flip(0), "vision")[[0, 2]] < 0.999).all()


def test_similarity_writes_the_missing_captions_in_natural_words(learnt, dozen):
    model, _ = learnt
    source = to_tensor(dozen.images[:3])
    texts = [blip.to_natural(text) for text in model.generate(source)]
    for variant in ("contrastive", "matching", "likelihood"):
        torch.testing.assert_close(
            blip.similarity(model, source, source, variant),
            blip.similarity(model, source, None, variant, texts),
        )


def test_an_unknown_variant_is_refused(model, noise):
    with pytest.raises(ValueError, match="none of vision"):
        blip.similarity(model, to_tensor(noise), None, "cosine")


# ---- the stage


@pytest.fixture
def small_profile(fresh_runs, tmp_path):
    """Smoke with 24 scenes and a BLIP of 64 hidden units, so that the test needs no weights."""
    blip.save(tiny(), tmp_path / "pretrained")
    smoke = load_profile("smoke")
    return smoke.model_copy(
        update={
            "collect": smoke.collect.model_copy(
                update={"sources": ("scenes",), "per_class": 6, "validation_fraction": 0.3}
            ),
            "captions": smoke.captions.model_copy(update={"count": 20}),
            "blip": smoke.blip.model_copy(
                update={"pretrained": str(tmp_path / "pretrained"), "caption_batch_size": 10}
            ),
        }
    )


def test_the_stage_captions_every_picture_and_is_done_once(small_profile, monkeypatch):
    run = blip.ensure(small_profile)
    pictures = collect.ensure(small_profile)
    assert [row["file_name"] for row in run.captions] == [
        row["file_name"] for row in pictures.select()
    ]
    for row in run.captions:
        assert row["natural"] == blip.to_natural(row["caption"])
    held = {row["file_name"] for row in pictures.select(split="validation")}
    assert 0 < len(run.before_after) == len(held)
    assert {row["file_name"] for row in run.before_after} == held
    assert set(run.scores["after"]) == {"subject", "action", "direction", "place"}
    assert run.history[-1]["step"] == small_profile.blip.steps
    left = {path.name for path in run.folder.iterdir()}
    assert left == {
        "captioner",
        "retrieval",
        "history.jsonl",
        "before_after.jsonl",
        "scores.json",
        "all_captions.jsonl",
        "provenance.json",
    }

    monkeypatch.setattr(blip, "fine_tune", lambda *a, **k: pytest.fail("trained again"))
    assert blip.ensure(small_profile).captions == run.captions


def test_a_killed_stage_goes_on_where_it_stopped(small_profile, monkeypatch):
    whole = blip.ensure(small_profile)
    expected = [whole.captions, whole.before_after, whole.scores, _losses(whole)]
    shutil.rmtree(whole.folder)

    # Killed twice: in training, then after the first batch of captions.
    real_tune, real_generate = blip.fine_tune, blip.Blip.generate
    with monkeypatch.context() as patch:
        patch.setattr(
            blip, "fine_tune", lambda *a, **k: real_tune(*a, **k, max_seconds=1e-6) and _die()
        )
        with pytest.raises(KeyboardInterrupt):
            blip.ensure(small_profile)
    calls = []

    def short(self, images, **options):
        calls.append(len(images))
        return _die() if len(calls) == 4 else real_generate(self, images, **options)

    with monkeypatch.context() as patch:
        patch.setattr(blip.Blip, "generate", short)
        with pytest.raises(KeyboardInterrupt):
            blip.ensure(small_profile)
    # A kill may also cut a line short.
    with (whole.folder / "all_captions.partial.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "images/')

    monkeypatch.setattr(blip, "fine_tune", lambda *a, **k: pytest.fail("trained again"))
    calls.clear()
    monkeypatch.setattr(
        blip.Blip,
        "generate",
        lambda self, images, **o: calls.append(len(images)) or real_generate(self, images, **o),
    )
    again = blip.ensure(small_profile)
    assert sum(calls) == len(again.captions) - 10
    assert [again.captions, again.before_after, again.scores, _losses(again)] == expected


def _die() -> None:
    raise KeyboardInterrupt


def _losses(run: blip.BlipRun) -> list[float]:
    return [row["loss"] for row in run.history]


def test_without_validation_captions_groups_are_held_out():
    """Real pictures have no known caption: a share of the captioned groups is kept apart."""
    rows = [
        {"file_name": f"{i}.png", "group": f"shot {i // 4}", "split": "train", "text": None}
        for i in range(40)
    ]

    class Pictures:
        def select(self, *, split=None, kept=None):
            return [row for row in rows if split in (None, row["split"])]

    written = [{"file_name": row["file_name"], "caption": "a cat"} for row in rows[2:]]
    learn, held = blip._split(Pictures(), written, 0.2)
    assert {row["text"] for row in held} == {"a cat"}
    assert not {row["group"] for row in learn} & {row["group"] for row in held}
    assert len(learn) + len(held) == 38
    assert 2 <= len(held) <= 8
    with pytest.raises(UserError, match="no captioned picture"):
        blip._split(Pictures(), written[:1], 0.2)


def test_no_judge_is_known_here():
    for module in (blip, blip_model):
        assert "judges" not in Path(module.__file__).read_text(encoding="utf-8")
