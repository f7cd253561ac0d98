"""What a captioner is worth: perfect ones score at the top, blind ones at the bottom."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Captioned, tiny_blip

from tomjerry_utils import blip, blip_scores, scenes, wording
from tomjerry_utils.training import TrainResult

TEXTS = [
    "a cat is running on the street, facing left",
    "tom and jerry are reaching up in the living room, facing right",
    "a mouse is lying on the beach, facing left",
]
SLOTS = ("subject", "action", "direction", "place")
DOMAINS = ["cartoon"] * 6 + ["natural"] * 6


def some_captions(count: int) -> tuple[list[str], list[str]]:
    """Captions of scenes, and their domains by turns."""
    domains = [scenes.STYLES[i % 2] for i in range(count)]
    return [scenes.caption(scenes.describe(i), style) for i, style in enumerate(domains)], domains


def values(slots: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {slot: found["value"] for slot, found in slots.items()}


# ---- slots


def test_slots_of_every_caption_are_those_of_its_scene() -> None:
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
    assert set(blip.caption_slots("nothing to see").values()) == {None}


def test_animals_of_the_zoo_are_subjects_too() -> None:
    found = set()
    for seed in range(40):
        scene = scenes.describe(seed, zoo=True)
        slots = blip.caption_slots(scenes.caption(scene, "natural"))
        assert slots["subject"] == ("two_animals" if scene.cls == "both" else "animal")
        found.add(slots["subject"])
    assert found == {"animal", "two_animals"}
    hits = blip_scores.slot_hits(["an animal is running", "a cat"], ["an animal is here"] * 2)
    assert hits["subject"].tolist() == [1, 0]


def test_slot_hits_count_what_is_right() -> None:
    wrong = [text.replace("left", "right") for text in TEXTS]
    hits = blip_scores.slot_hits(wrong, TEXTS)
    assert tuple(hits) == SLOTS
    for slot in ("subject", "action", "place"):
        assert hits[slot].tolist() == [1, 1, 1]
    assert hits["direction"].tolist() == [0, 1, 0]
    nothing = blip_scores.slot_hits(["", "", ""], TEXTS)
    assert all((hit == 0).all() for hit in nothing.values())


def test_slots_that_the_truth_lacks_count_for_nothing() -> None:
    true = ["a cat is running", "a mouse is here, facing left"]
    hits = blip_scores.slot_hits(["a cat is running on the beach, facing left"] * 2, true)
    assert hits["subject"].tolist() == [1, 0]
    np.testing.assert_array_equal(hits["action"], [1, np.nan])
    np.testing.assert_array_equal(hits["direction"], [np.nan, 1])
    np.testing.assert_array_equal(hits["place"], [np.nan, np.nan])
    slots = blip_scores.score_words(true, true, ["natural"] * 2)["slots"]
    assert slots["action"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 1}
    assert slots["place"] == {"value": None, "ci95": [None, None], "n": 0}


# ---- words


def test_perfect_captions_score_at_the_top() -> None:
    true, domains = some_captions(60)
    found = blip_scores.score_words(true, true, domains)
    assert found["cider_d"]["value"] == pytest.approx(10, abs=1e-6)
    assert found["bleu4"]["value"] == pytest.approx(1)
    assert found["exact"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 60}
    assert values(found["slots"]) == dict.fromkeys(SLOTS, 1.0)
    assert found["cider_d"]["n"] == found["bleu4"]["n"] == 60
    # BERT writes a space before a comma; that is no mistake.
    spaced = [text.replace(",", " ,") for text in true]
    assert blip_scores.score_words(spaced, true, domains) == found


def test_captions_of_other_pictures_score_low() -> None:
    true, domains = some_captions(60)
    others = [true[i] for i in np.random.default_rng(0).permutation(60)]
    found = blip_scores.score_words(others, true, domains)
    assert found["cider_d"]["ci95"][1] < 5
    assert found["exact"]["value"] < 0.1
    assert found["slots"]["subject"]["ci95"][1] < 0.6
    assert found["slots"]["action"]["ci95"][1] < 0.6
    low, high = found["slots"]["direction"]["ci95"]
    assert low < found["slots"]["direction"]["value"] < high


def test_scores_are_those_of_wording() -> None:
    true, domains = some_captions(20)
    written = [text.replace("street", "beach").replace("left", "right") for text in true]
    found = blip_scores.score_words(written, true, domains)
    references = [[text] for text in true]
    assert found["cider_d"]["value"] == wording.cider_d(written, references).mean()
    assert found["bleu4"]["value"] == wording.bleu4(written, references)
    low, high = found["bleu4"]["ci95"]
    assert low < found["bleu4"]["value"] < high < 1
    assert found["exact"]["value"] == np.mean([a == b for a, b in zip(written, true, strict=True)])


def test_domains_are_told_apart() -> None:
    """Right about cartoons, wrong about natural scenes: each domain has its own figures."""
    true, domains = some_captions(40)
    written = [
        text if domain == "cartoon" else "nothing"
        for text, domain in zip(true, domains, strict=True)
    ]
    found = blip_scores.score_words(written, true, domains)
    assert list(found["by_domain"]) == ["cartoon", "natural"]
    assert values(found["by_domain"]["cartoon"]) == dict.fromkeys(SLOTS, 1.0)
    assert values(found["by_domain"]["natural"]) == dict.fromkeys(SLOTS, 0.0)
    assert values(found["slots"]) == dict.fromkeys(SLOTS, 0.5)
    assert all(slot["n"] == 20 for part in found["by_domain"].values() for slot in part.values())


# ---- with and without seeing


def test_a_trained_model_reads_its_picture(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    found = blip_scores.losses(model, dozen.images, dozen.texts)
    assert found["another"] > 2 * found["its picture"]
    each = model.caption_loss(dozen.images, dozen.texts, reduction="none")
    assert found["its picture"] == pytest.approx(each.mean().item(), rel=1e-5)


def blind(model: blip.Blip) -> blip.Blip:
    """A copy whose vision tower sees one and the same thing in every picture."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.captioner.vision_model.embeddings.patch_embedding.weight.zero_()
    return copied


def test_a_model_that_ignores_its_picture_is_found_out(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    """Negative control: the language is learnt, the eyes are shut."""
    model = blind(learnt_blip[0])
    found = blip_scores.losses(model, dozen.images, dozen.texts)
    assert found["its picture"] == pytest.approx(found["another"], rel=1e-5)
    scored = blip_scores.retrieval(model, dozen.images, dozen.texts)
    assert scored["image_to_text"]["at_1"]["value"] <= 1 / 12 + 1e-9
    # To a caption all pictures are equally like: a tie, which is no find.
    assert scored["text_to_image"]["at_1"]["value"] <= 1 / 12 + 1e-9
    assert scored["similarity"]["auc"] == pytest.approx(0.5, abs=0.1)


def test_retrieval_of_a_trained_model_is_above_chance(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    found = blip_scores.retrieval(learnt_blip[0], dozen.images, dozen.texts)
    for way in ("image_to_text", "text_to_image"):
        assert found[way]["chance_at_1"] == pytest.approx(1 / 12)
        assert found[way]["candidates"] == 12
        assert found[way]["at_1"]["value"] > 4 / 12
        assert found[way]["at_1"]["value"] <= found[way]["at_5"]["value"]
        assert found[way]["at_5"]["value"] <= found[way]["at_10"]["value"]
    similarity = found["similarity"]
    assert similarity["auc"] > 0.8
    assert similarity["own"]["mean"] > similarity["another"]["mean"]
    assert sum(similarity["bins"]["count"]) == 12


@pytest.mark.parametrize("kind", ["constant", "random"])
def test_embeddings_that_know_nothing_retrieve_nothing(
    kind: str, dozen: Captioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def embed(self: blip.Blip, items: Any) -> torch.Tensor:
        if kind == "constant":
            return torch.ones(len(items), 4) / 2
        found = torch.randn(len(items), 64, generator=generator)
        return found / found.norm(dim=1, keepdim=True)

    monkeypatch.setattr(blip.Blip, "image_embeds", embed)
    monkeypatch.setattr(blip.Blip, "text_embeds", embed)
    found = blip_scores.retrieval(tiny_blip(), dozen.images, dozen.texts)
    for way in ("image_to_text", "text_to_image"):
        assert found[way]["at_1"]["value"] <= (0 if kind == "constant" else 3 / 12)
    assert found["similarity"]["auc"] == pytest.approx(0.5, abs=1e-9 if kind == "constant" else 0.3)


def test_equal_captions_are_equally_right(dozen: Captioned) -> None:
    model = tiny_blip()
    texts = [dozen.texts[0]] * 6 + [dozen.texts[1]] * 6
    found = blip_scores.retrieval(model, dozen.images, texts)
    assert found["image_to_text"]["candidates"] == 2
    assert found["text_to_image"]["candidates"] == 12
    assert found["text_to_image"]["chance_at_1"] == found["image_to_text"]["chance_at_1"] == 0.5
    assert found["image_to_text"]["at_5"]["value"] == 1
    assert found["text_to_image"]["at_1"]["n"] == 2


def test_the_size_of_the_batches_changes_nothing(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    whole, parts = (
        blip_scores.score(model, dozen.images, dozen.texts, DOMAINS, batch_size=n) for n in (12, 5)
    )
    assert parts["written"] == whole["written"]
    assert parts["image_to_text"] == whole["image_to_text"]
    for name, loss in whole["loss"].items():
        assert parts["loss"][name] == pytest.approx(loss, rel=1e-5)
    assert parts["similarity"]["own"]["mean"] == pytest.approx(
        whole["similarity"]["own"]["mean"], abs=1e-5
    )


def test_similarities_are_cosines_of_every_pair(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, _ = learnt_blip
    table = blip_scores.similarities(model, dozen.images, dozen.texts[:5])
    assert table.shape == (12, 5)
    assert np.abs(table).max() <= 1 + 1e-6
    images = torch.from_numpy(dozen.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        one = blip.similarity(model, images[3:4], None, "contrastive", [dozen.texts[2]])
    assert table[3, 2] == pytest.approx(one.item(), abs=1e-5)


# ---- before and after


def test_before_and_after_are_compared(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    before, after = (
        blip_scores.score(model, dozen.images, dozen.texts, DOMAINS)
        for model in (tiny_blip(), learnt_blip[0])
    )
    assert len(after["written"]) == 12
    found = blip_scores.compare(before, after, dozen.texts, DOMAINS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"n", "before", "after", "difference", "truth", "shuffled"}
    assert found["n"] == 12
    assert "written" not in found["after"]
    assert found["truth"]["cider_d"]["value"] == pytest.approx(10, abs=1e-6)
    assert found["before"]["cider_d"]["value"] < 1
    assert found["after"]["cider_d"]["value"] > 5
    gap = found["difference"]["cider_d"]
    each = [found[part]["cider_d"]["value"] for part in ("after", "before")]
    assert gap["difference"] == pytest.approx(each[0] - each[1])
    assert gap["ci95"][0] > 0
    for slot in SLOTS:
        assert found["after"]["slots"][slot]["value"] >= 0.75
        assert found["difference"][slot]["ci95"][0] > 0
    # The control: the same sentences under other pictures.
    assert found["shuffled"]["cider_d"]["value"] < 0.6 * found["after"]["cider_d"]["value"]
    assert found["shuffled"]["exact"]["value"] < 0.3


def test_nothing_gained_is_no_gain(dozen: Captioned) -> None:
    """Negative control: a model compared with itself."""
    scored = blip_scores.score(tiny_blip(), dozen.images, dozen.texts, DOMAINS)
    found = blip_scores.compare(scored, scored, dozen.texts, DOMAINS)
    for gap in found["difference"].values():
        assert gap == {"difference": 0.0, "ci95": [0.0, 0.0], "n": 12}


def test_captions_of_other_words_and_one_picture_alone_are_compared_too(dozen: Captioned) -> None:
    """Pictures of one's own: the truth may have no slots, and be one single picture."""
    for count, true in ((3, ["something here", "that thing", "what is it"]), (1, dozen.texts[:1])):
        images, domains = dozen.images[:count], ["cartoon"] * count
        scored = blip_scores.score(tiny_blip(), images, true, domains)
        found = blip_scores.compare(scored, scored, true, domains)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        if count == 1:
            assert "similarity" not in found["after"]  # there is no other caption to compare with
        else:
            assert found["difference"]["place"] == {
                "difference": None, "ci95": [None, None], "n": 0
            }  # fmt: skip
