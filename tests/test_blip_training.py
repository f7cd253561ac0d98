"""Fine-tuning BLIP: it learns what it is shown, stops at its best, and survives being killed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Captioned, captioned, free_port, tiny_blip, tune_blip
from torch import Tensor

from tomjerry_utils import UserError, blip, blip_model, blip_scores, blip_training
from tomjerry_utils.blip_training import BEST, EVALUATIONS, held_out_loss, joint_loss
from tomjerry_utils.images import to_tensor
from tomjerry_utils.runs import read_jsonl, write_jsonl
from tomjerry_utils.training import TrainResult

TEXTS = [
    "a cat is running on the street, facing left",
    "tom and jerry are reaching up in the living room, facing right",
    "a mouse is lying on the beach, facing left",
]
SHORT: dict[str, Any] = {"steps": 6, "warmup_steps": 1, "batch_size": 4, "log_every": 1}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def foreign(dozen: Captioned) -> tuple[np.ndarray, list[str]]:
    """Held-out captions in an order of words that is not learnt: soon they only get worse."""
    texts = [" ".join(reversed(text.replace(",", "").split())) for text in dozen.texts]
    return dozen.images, texts


def weights(model: blip.Blip) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name, part in model.parts().items()
        for key, value in part.state_dict().items()
    }


def assert_same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / EVALUATIONS)


# ---- learning


def test_training_learns_the_dozen(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    model, result = learnt_blip
    first, last = result.history[0], result.history[-1]
    # Matching starts at ln 2 and is the last to be learnt: the others must lead it.
    for part, share in (("caption", 0.5), ("contrastive", 0.8), ("matching", 0.97)):
        assert last[part] < share * first[part], part
    hits = blip_scores.slot_hits(model.generate(dozen.images), dozen.texts)
    assert min(values.mean() for values in hits.values()) >= 0.75, hits


def test_it_learnt_the_pairs_not_only_the_language(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    """Negative control: the same captions on the wrong pictures must fit worse by every head."""
    model, _ = learnt_blip
    wrong = dozen.texts[1:] + dozen.texts[:1]
    images = to_tensor(dozen.images)
    with torch.no_grad():
        for variant in ("contrastive", "matching", "likelihood"):
            right = blip.similarity(model, images, None, variant, dozen.texts)
            other = blip.similarity(model, images, None, variant, wrong)
            assert (right > other).float().mean() >= 0.75, variant


def test_shuffled_captions_break_it(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned, tmp_path: Path
) -> None:
    model = tiny_blip()
    shuffled = Captioned(dozen.images, dozen.texts[5:] + dozen.texts[:5])
    tune_blip(model, shuffled, tmp_path)
    with torch.no_grad():
        right = learnt_blip[0].caption_loss(dozen.images, dozen.texts)
        broken = model.caption_loss(dozen.images, dozen.texts)
    assert broken > 1.5 * right


def test_training_on_pads_learns_the_words_slower(noise: np.ndarray) -> None:
    """The trap in figures: the same steps on unmasked labels leave a higher loss on the words."""

    def words_loss(masked: bool) -> float:
        model = tiny_blip()
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
    assert wrong > 1.3 * right


# ---- the loss


def test_equal_captions_are_no_negatives(noise: np.ndarray) -> None:
    """A batch of one caption has no negatives: contrast is at its floor, matching still runs."""
    generator = torch.Generator().manual_seed(0)
    _, parts = joint_loss(
        tiny_blip(), noise, [TEXTS[0]] * 3, contrastive_weight=1.0, generator=generator
    )
    assert parts["contrastive"].item() == pytest.approx(np.log(3), abs=0.2)
    assert torch.isfinite(parts["matching"])


def test_the_joint_loss_is_the_sum_of_its_parts(noise: np.ndarray) -> None:
    model = tiny_blip()
    generator = torch.Generator().manual_seed(0)
    loss, parts = joint_loss(model, noise, TEXTS, contrastive_weight=0.3, generator=generator)
    assert list(parts) == ["caption", "contrastive", "matching"]
    expected = parts["caption"] + 0.3 * (parts["contrastive"] + parts["matching"])
    torch.testing.assert_close(loss.detach(), expected)


def test_without_contrast_the_loss_is_the_caption_loss(
    noise: np.ndarray, dozen: Captioned, tmp_path: Path
) -> None:
    model = tiny_blip()
    loss, parts = joint_loss(
        model, noise, TEXTS, contrastive_weight=0.0, generator=torch.Generator()
    )
    assert list(parts) == ["caption"]
    assert loss.item() == model.caption_loss(noise, TEXTS).item()

    before = weights(model)
    result = tune_blip(model, dozen, tmp_path, **SHORT, contrastive_weight=0.0)
    assert "contrastive" not in result.history[0]
    after = weights(model)
    heads = ("text_encoder", "vision_proj", "text_proj", "itm_head")
    moved = {key.split("/")[0] for key in after if not torch.equal(before[key], after[key])}
    assert moved == set(model.parts()) - set(heads)


def test_a_label_teaches_its_words_and_not_that_the_caption_ends(noise: np.ndarray) -> None:
    """By hand: the words of the opening count, the end token and the pads do not."""
    model = tiny_blip()
    openings = ["a mouse", "tom and jerry", "a mouse"]
    ids, mask = model.tokens(openings, decode=True)
    with torch.no_grad():
        logits = model.captioner.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=model.vision_features(noise)
        ).logits
    picked = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    words = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    assert picked.shape == words.shape
    expected = (picked * words).sum() / words.sum()
    found = model.caption_loss(noise, openings, begun=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() != pytest.approx(model.caption_loss(noise, openings).item(), rel=1e-3)

    generator = torch.Generator().manual_seed(0)
    loss, parts = joint_loss(
        model,
        noise,
        TEXTS,
        contrastive_weight=0.3,
        generator=generator,
        labelled=(noise, openings),
    )
    assert list(parts) == ["caption", "label", "contrastive", "matching"]
    assert parts["label"].item() == pytest.approx(found.item(), rel=1e-5)
    rest = parts["caption"] + 0.3 * (parts["contrastive"] + parts["matching"])
    torch.testing.assert_close(loss.detach(), rest + parts["label"])


def test_pictures_with_labels_alone_teach_the_subject(dozen: Captioned, tmp_path: Path) -> None:
    """Two captioned pictures, the rest labelled: who it is can only be learnt from the labels."""
    openings = [text[: text.index(" is")] for text in dozen.texts if " is" in text]
    singles = [i for i, text in enumerate(dozen.texts) if " is" in text]
    assert len(set(openings)) > 1

    def begins_right(labelled: bool, folder: Path) -> float:
        model = tiny_blip()
        few = Captioned(dozen.images[:2], dozen.texts[:2])
        tune_blip(
            model,
            few,
            folder,
            steps=60,
            warmup_steps=5,
            batch_size=2,
            contrastive_weight=0.0,
            labelled=(dozen.images[singles], openings) if labelled else None,
            label_batch_size=8,
        )
        written = model.generate(dozen.images[singles])
        return float(
            np.mean([w.startswith(o + " ") for w, o in zip(written, openings, strict=True)])
        )

    assert begins_right(True, tmp_path / "with") > begins_right(False, tmp_path / "without") + 0.2


def test_mirroring_turns_the_caption_with_the_picture(noise: np.ndarray) -> None:
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


def test_held_out_loss_is_that_of_a_word(
    learnt_blip: tuple[blip.Blip, TrainResult], dozen: Captioned
) -> None:
    """By hand, over all words of all captions; how they are batched does not matter."""
    model, _ = learnt_blip
    texts = [*dozen.texts[:4], "a mouse"]
    ids, mask = model.tokens(texts, decode=True)
    with torch.no_grad():
        logits = model.captioner.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=model.vision_features(dozen.images[:5])
        ).logits
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = -(picked * mask[:, 1:]).sum().item() / mask[:, 1:].sum().item()
    for batch_size in (2, 64):
        found = held_out_loss(model, dozen.images[:5], texts, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(model.caption_loss(dozen.images[:5], texts).item(), rel=1e-5)


# ---- stopping


@pytest.fixture(scope="module")
def stopped(
    dozen: Captioned, foreign: tuple[np.ndarray, list[str]], tmp_path_factory: Any
) -> tuple[blip.Blip, TrainResult, Path]:
    folder = tmp_path_factory.mktemp("stopped")
    model = tiny_blip()
    result = tune_blip(
        model, dozen, folder, log_every=2, held=foreign, patience=2, keep_checkpoint=True
    )
    return model, result, folder


def test_training_stops_where_held_out_captions_get_worse(
    stopped: tuple[blip.Blip, TrainResult, Path], foreign: tuple[np.ndarray, list[str]]
) -> None:
    model, result, folder = stopped
    rows = evaluations(folder)
    losses = [row["held_out"] for row in rows]
    best = int(np.argmin(losses))
    assert result.finished
    assert result.ended_early
    assert result.steps == rows[-1]["step"] < 120
    assert [row["step"] for row in rows] == list(range(2, result.steps + 1, 2))
    assert 0 < best == len(rows) - 3  # two looks without a gain, and not three
    assert losses[0] > losses[best] < losses[-1]
    # What is left are the weights of the best look, not the last.
    found = held_out_loss(model, *foreign)
    assert found == pytest.approx(min(losses), abs=1e-5)
    assert abs(found - losses[-1]) > 1e-3
    assert not model.captioner.training


def test_without_patience_it_never_stops_but_keeps_the_best(
    dozen: Captioned,
    foreign: tuple[np.ndarray, list[str]],
    stopped: tuple[blip.Blip, TrainResult, Path],
    tmp_path: Path,
) -> None:
    model = tiny_blip()
    result = tune_blip(model, dozen, tmp_path, steps=30, log_every=2, held=foreign, patience=0)
    rows = evaluations(tmp_path)
    losses = [row["held_out"] for row in rows]
    assert result.steps == 30 == rows[-1]["step"]
    assert result.finished
    assert not result.ended_early
    assert int(np.argmin(losses)) < len(losses) - 4
    assert held_out_loss(model, *foreign) == pytest.approx(min(losses), abs=1e-5)


def test_it_goes_on_while_held_out_captions_get_better(dozen: Captioned, tmp_path: Path) -> None:
    """Negative control: patience alone ends nothing."""
    model = tiny_blip()
    held = (dozen.images, dozen.texts)
    result = tune_blip(model, dozen, tmp_path, steps=24, log_every=2, held=held, patience=1)
    assert not result.ended_early
    losses = [row["held_out"] for row in evaluations(tmp_path)]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    assert held_out_loss(model, *held) == pytest.approx(losses[-1], abs=1e-5)


def test_a_finished_run_returns_at_once_with_its_best_weights(
    stopped: tuple[blip.Blip, TrainResult, Path],
    dozen: Captioned,
    foreign: tuple[np.ndarray, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, result, folder = stopped
    rows = evaluations(folder)
    monkeypatch.setattr(
        blip_training, "held_out_loss", lambda *a, **k: pytest.fail("looked once more")
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a: pytest.fail("a step was made"))
    again = tiny_blip(seed=1)
    repeated = tune_blip(
        again, dozen, folder, log_every=2, held=foreign, patience=2, keep_checkpoint=True
    )
    assert (repeated.steps, repeated.finished, repeated.ended_early) == (result.steps, True, True)
    assert repeated.history == result.history
    assert evaluations(folder) == rows
    assert_same_weights(weights(again), weights(model))


def test_what_is_looked_at_is_the_average(
    dozen: Captioned, foreign: tuple[np.ndarray, list[str]], tmp_path: Path
) -> None:
    held = (dozen.images[6:], dozen.texts[6:])
    settings = {**SHORT, "log_every": 3, "held": held}
    found = {}
    for name, decay in (("average", 0.9), ("live", None)):
        model = tiny_blip()
        result = tune_blip(model, dozen, tmp_path / name, **settings, ema_decay=decay)
        found[name] = [row["held_out"] for row in evaluations(tmp_path / name)]
        if decay:
            twin = tiny_blip()
            for part, values in result.ema.items():
                twin.parts()[part].load_state_dict(values)
            last = found[name][-1]
            assert held_out_loss(twin, *held) == pytest.approx(last, abs=1e-6)
            # It was the best look, so these are the weights that were left, too.
            assert last == min(found[name])
            assert_same_weights(weights(twin), weights(model))
    # Control: the weights that are trained score otherwise.
    assert all(abs(a - b) > 1e-3 for a, b in zip(*found.values(), strict=True))


def test_without_held_out_pictures_the_average_is_left(dozen: Captioned, tmp_path: Path) -> None:
    model = tiny_blip()
    result = tune_blip(model, dozen, tmp_path, **SHORT, ema_decay=0.5)
    for name, part in model.parts().items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, result.ema[name][key])
    assert not (tmp_path / EVALUATIONS).exists()
    assert not (tmp_path / BEST).exists()


# ---- going on


def test_resumed_training_equals_uninterrupted(dozen: Captioned, tmp_path: Path) -> None:
    whole = tiny_blip()
    tune_blip(whole, dozen, tmp_path / "whole", **SHORT)
    first = tiny_blip()
    part = tune_blip(first, dozen, tmp_path / "parts", **SHORT, max_seconds=1e-6)
    assert part.steps < 6
    second = tiny_blip(seed=1)  # its start must not matter: the checkpoint holds everything
    rest = tune_blip(second, dozen, tmp_path / "parts", **SHORT)
    assert rest.finished
    assert_same_weights(weights(whole), weights(second))


@pytest.mark.parametrize(
    ("moment", "at"),
    [
        ("before the look", 14),
        ("before the line", 14),
        ("after the line", 14),
        ("after the line", 16),
    ],
)
def test_a_killed_run_stops_where_an_uninterrupted_one_does(
    moment: str,
    at: int,
    stopped: tuple[blip.Blip, TrainResult, Path],
    dozen: Captioned,
    foreign: tuple[np.ndarray, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed at a look: at the best one and at a worse one, with a checkpoint of a step before."""
    whole, result, folder = stopped
    settings: dict[str, Any] = {"log_every": 2, "held": foreign, "patience": 2}

    looks = 0

    def cut(now: str) -> None:
        if now == moment and 2 * looks == at:
            raise RuntimeError("power cut")

    def look(*args: Any, **options: Any) -> float:
        nonlocal looks
        looks += 1
        cut("before the look")
        return held_out_loss(*args, **options)

    def write(*args: Any) -> None:
        cut("before the line")
        write_jsonl(*args)
        cut("after the line")

    with monkeypatch.context() as patch:
        patch.setattr(blip_training, "held_out_loss", look)
        patch.setattr(blip_training, "write_jsonl", write)
        with pytest.raises(RuntimeError, match="power cut"):
            tune_blip(tiny_blip(), dozen, tmp_path, **settings, checkpoint_every_s=0.0)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"{at - 1:08d}"]
    assert len(evaluations(tmp_path)) == at // 2 - (moment != "after the line")

    second = tiny_blip(seed=1)
    rest = tune_blip(second, dozen, tmp_path, **settings)
    assert (rest.steps, rest.ended_early) == (result.steps, True)
    assert evaluations(tmp_path) == evaluations(folder)
    assert_same_weights(weights(second), weights(whole))


def test_the_best_weights_know_their_own_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run need not repeat bit for bit (a GPU): the best look may be one it does not."""
    data = captioned()
    looks = iter([5.0, 1.0, 6.0, 7.0])  # at 2, at 4 where it is killed, again at 4, at 6
    monkeypatch.setattr(blip_training, "held_out_loss", lambda *_, **__: next(looks))
    write, written = blip_training.write_jsonl, []

    def cut(*arguments: Any) -> None:
        write(*arguments)
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(blip_training, "write_jsonl", cut)
    settings = {"steps": 6, "warmup_steps": 0, "log_every": 2, "batch_size": 4}
    held = (data.images, data.texts)
    with pytest.raises(KeyboardInterrupt):
        tune_blip(tiny_blip(), data, tmp_path, held=held, checkpoint_every_s=0.0, **settings)
    kept = load_file(tmp_path / "best.safetensors")
    model = tiny_blip()
    tune_blip(model, data, tmp_path, held=held, **settings)
    for key, value in model.captioner.text_decoder.state_dict().items():
        assert torch.equal(value, kept[f"text_decoder/{key}"])
    assert [row["held_out"] for row in read_jsonl(tmp_path / "evaluations.jsonl")] == [5, 6, 7]


def test_measured_losses_are_not_smoothed(dozen: Captioned) -> None:
    model = tiny_blip()
    plain = held_out_loss(model, dozen.images, dozen.texts)
    trained_on = float(model.caption_loss(dozen.images, dozen.texts).detach())
    model.captioner.text_decoder.label_smoothing = 0.1
    assert held_out_loss(model, dozen.images, dozen.texts) == pytest.approx(plain)
    assert float(model.caption_loss(dozen.images, dozen.texts).detach()) != trained_on


def test_what_an_older_run_left_in_the_folder_is_no_measure(
    dozen: Captioned, foreign: tuple[np.ndarray, list[str]], tmp_path: Path
) -> None:
    """A finished run without a checkpoint starts anew: its looks are not those of the new one."""
    settings: dict[str, Any] = {**SHORT, "log_every": 2, "patience": 1}
    known = (dozen.images, dozen.texts)
    tune_blip(tiny_blip(), dozen, tmp_path, **settings, held=known)
    old = evaluations(tmp_path)
    model = tiny_blip(seed=1)
    tune_blip(model, dozen, tmp_path, **{**settings, "seed": 5}, held=foreign)
    rows = evaluations(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert not {row["held_out"] for row in rows} & {row["held_out"] for row in old}
    best = min(row["held_out"] for row in rows)
    assert held_out_loss(model, *foreign) == pytest.approx(best, abs=1e-5)


# ---- adapters


def test_lora_trains_adapters_and_heads_only_and_leaves_a_plain_blip(
    dozen: Captioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = tiny_blip(), tiny_blip()
    total = blip.trainable_parameters(model)
    seen = []
    real = blip_training.held_out_loss

    def look(*args: Any, **options: Any) -> float:
        seen.append(blip.trainable_parameters(model))
        return real(*args, **options)

    monkeypatch.setattr(blip_training, "held_out_loss", look)
    held = (dozen.images[:3], dozen.texts[:3])
    tune_blip(model, dozen, tmp_path, steps=4, warmup_steps=1, log_every=4, lora_rank=2, held=held)
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


def test_wrong_lora_targets_are_refused(
    dozen: Captioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that no layer has would leave its part untrained, in silence."""
    monkeypatch.setattr(blip_model, "LORA_TARGETS", ("query", "key", "value", "qkv", "out_proj"))
    with pytest.raises(UserError, match="parameters"):
        tune_blip(tiny_blip(), dozen, tmp_path, lora_rank=2)


def test_adapters_stop_at_their_best_too(
    dozen: Captioned, foreign: tuple[np.ndarray, list[str]], tmp_path: Path
) -> None:
    """The best adapters are folded in; a finished run gives the same plain BLIP again."""
    settings: dict[str, Any] = {
        "log_every": 4, "lora_rank": 4, "learning_rate": 0.03, "held": foreign, "patience": 1,
        "keep_checkpoint": True, "steps": 100, "batch_size": 6,
    }  # fmt: skip
    model = tiny_blip()
    result = tune_blip(model, dozen, tmp_path, **settings)
    losses = [row["held_out"] for row in evaluations(tmp_path)]
    assert result.ended_early
    assert int(np.argmin(losses)) == len(losses) - 2
    assert held_out_loss(model, *foreign) == pytest.approx(min(losses), abs=1e-5)
    assert weights(model).keys() == weights(tiny_blip()).keys()
    again = tiny_blip()
    assert tune_blip(again, dozen, tmp_path, **settings).steps == result.steps
    assert_same_weights(weights(again), weights(model))


# ---- accumulation and processes


def test_two_processes_take_the_steps_of_one_that_accumulates_two(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        import torch
        from safetensors.torch import save_file
        from tiny_models import captioned, tiny_blip, tune_blip
        rank = int(os.environ["RANK"])
        data = captioned(3)
        model = tiny_blip(seed=rank)  # different starts: that of process 0 must win
        tune_blip(model, data, {str(tmp_path / "two")!r}, steps=3, warmup_steps=1, batch_size=3,
                  log_every=1, ema_decay=0.5, augmented=True, device="cpu",
                  held=(data.images, data.texts), patience=2, learning_rate=1e-3)
        save_file({{f"{{n}}/{{k}}": v.clone() for n, p in model.parts().items()
                   for k, v in p.state_dict().items()}}, f"{tmp_path}/{{rank}}.safetensors")
        """)
    )
    here = Path(__file__).resolve().parent
    shared = {
        **os.environ,
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**shared, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    data = captioned(3)
    one = tiny_blip()
    settings: dict[str, Any] = {
        "steps": 3, "warmup_steps": 1, "batch_size": 3, "log_every": 1, "ema_decay": 0.5,
        "augmented": True, "device": "cpu", "held": (data.images, data.texts), "patience": 2,
        "learning_rate": 1e-3,
    }  # fmt: skip
    tune_blip(one, data, tmp_path / "one", **settings, accumulation=2)
    alone = tiny_blip()
    tune_blip(alone, data, tmp_path / "alone", **settings)
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0]

    from safetensors.torch import load_file

    two = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert_same_weights(*two)
    for key, value in weights(one).items():
        torch.testing.assert_close(two[0][key], value, rtol=1e-4, atol=1e-5, msg=key)
    rows = [[row["held_out"] for row in evaluations(tmp_path / name)] for name in ("two", "one")]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)
    # Control: one process with one batch a step goes elsewhere.
    assert max((two[0][k] - v).abs().max() for k, v in weights(alone).items()) > 1e-3
