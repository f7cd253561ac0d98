"""Stage 05: conditions read off a source, translations, ablation rows, `tomjerry translate`."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from tomjerry_utils import UserError, blip, ldm, structure, transfer
from tomjerry_utils.autoencoder import decode
from tomjerry_utils.denoiser import load_denoiser, make_scheduler
from tomjerry_utils.images import load_image, save_image, to_tensor
from tomjerry_utils.latents import wardrobe
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import read_json, read_jsonl, run_root, write_json
from tomjerry_utils.scenes import CLASSES, LABELS
from tomjerry_utils.translate import distance, find_weights, translate_files
from tomjerry_utils.translator import (
    SUBJECTS,
    Translator,
    load_translator,
    noise_for,
    ship,
    with_subject,
)

SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def translator() -> Translator:
    return tiny.tiny_translator()


@pytest.fixture(scope="module")
def cartoons() -> np.ndarray:
    return tiny.pictures("cartoon", 5)


@pytest.fixture(scope="module")
def weights(translator: Translator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_translator(translator, tmp_path_factory.mktemp("weights"))


# ---- words, noise, conditions ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "cls", "expected"),
    [
        ("tom is sitting on the beach", "tom", "a cat is sitting on the beach"),
        ("a cat is running", "jerry", "a mouse is running"),
        ("a mouse is lying", "both", "a cat and a mouse are lying"),
        ("a cat and a mouse are jumping", "tom", "a cat is jumping"),
        ("gibberish", "jerry", "a mouse is"),
        ("", "both", "a cat and a mouse are"),
    ],
)  # fmt: skip
def test_with_subject(caption: str, cls: str, expected: str) -> None:
    assert with_subject(caption, cls) == expected


def test_noise_belongs_to_the_picture_not_to_the_batch() -> None:
    whole = noise_for((4, 8, 8), 3, range(5))
    assert torch.equal(noise_for((4, 8, 8), 3, [2, 3]), whole[2:4])
    assert not torch.equal(noise_for((4, 8, 8), 4, range(5)), whole)
    assert len({float(row.sum()) for row in whole}) == 5


def test_conditions_are_read_off_the_source(translator: Translator, cartoons: np.ndarray) -> None:
    told = translator.conditions(cartoons, ["tom", None, "auto", "both", "jerry"])
    assert [told.classes[i] for i in (0, 3, 4)] == ["tom", "both", "jerry"]
    assert set(told.classes) <= set(CLASSES)
    for name, text in zip(told.classes, told.captions, strict=True):
        assert text.startswith(SUBJECTS[name])
    wanted = [LABELS.index("cat") + CLASSES.index(name) for name in told.classes]
    assert told.batch.labels.tolist() == wanted
    assert told.batch.view.shape == (5, structure.VIEW_CHANNELS, 8, 8)
    assert told.batch.latents.abs().max() == 0  # nothing of the source's own latents


def test_a_blind_translator_is_told_only_what_its_row_allows(
    translator: Translator, cartoons: np.ndarray
) -> None:
    seen = translator.conditions(cartoons, None).batch
    blind = transfer._Blind(**vars(translator)).conditions(cartoons, None).batch
    assert blind.view.abs().max() == 0
    assert blind.source is not None
    assert torch.equal(blind.source, seen.view)
    assert blind.mask.sum() > 0
    # "no source" has no attention, and nothing of the cartoon but its class is left.
    alone = transfer._Blind(**vars(tiny.tiny_translator(attention=None)))
    alone.told = False
    none = alone.conditions(cartoons, None).batch
    assert none.view.abs().max() == 0
    assert none.mask.sum() == 0


def test_coats_come_from_the_wardrobe_by_seed_and_number(
    translator: Translator, cartoons: np.ndarray
) -> None:
    coat = slice(structure.MAPS, structure.MAPS + structure.COATS)
    own = translator.conditions(cartoons, ["tom"] * 5).batch.view
    rows = torch.zeros(12, structure.COATS + 3)
    rows[:, : structure.COATS] = torch.arange(12.0)[:, None]
    dressed = Translator(**{**vars(translator), "wardrobe": {"tom": rows}})
    first = dressed.conditions(cartoons, ["tom"] * 5, seed=1).batch.view
    worn = first[:, coat.start, 0, 0]
    assert set(worn.tolist()) <= set(range(12)) and len(set(worn.tolist())) > 1
    assert torch.equal(first[:, : coat.start], own[:, : coat.start])
    assert torch.equal(first[:, coat.stop :], own[:, coat.stop :])
    # One picture's coat is its number's, however it is batched; another seed is another coat.
    one = dressed.conditions(cartoons[3:4], ["tom"], seed=1, numbers=[3]).batch.view
    assert torch.allclose(one[:, coat], first[3:4, coat])
    others = dressed.conditions(cartoons, ["tom"] * 5, seed=2).batch.view
    assert not torch.equal(others[:, coat], first[:, coat])


def test_a_wardrobe_holds_the_natural_pictures_of_each_class() -> None:
    count = 8
    views = torch.zeros(count, structure.VIEW_CHANNELS, 4, 4)
    views[:, structure.MAPS :] = torch.arange(float(count)).view(-1, 1, 1, 1)
    kinds = ["cat", "mouse", "cat_mouse", "tom"] * 2
    data = ldm.LatentSet(
        latents=torch.zeros(count, 4, 4, 4),
        views=views.half(),
        labels=torch.tensor([LABELS.index(k) for k in kinds]),
        table=torch.zeros(1, 2, 8),
        masks=torch.ones(1, 2),
        row=torch.zeros(count, dtype=torch.long),
        texts=["x"],
        files=[],
    )
    found = wardrobe(data)
    assert set(found) == set(CLASSES)
    assert found["tom"][:, 0].tolist() == [0.0, 4.0]  # cats; never the cartoons' own
    assert found["both"][:, -1].tolist() == [2.0, 6.0]
    assert found["jerry"].shape == (2, structure.COATS + 3)
    # A class without pictures of its own is dressed from everybody's.
    data.labels[data.labels == LABELS.index("mouse")] = LABELS.index("cat")
    assert len(wardrobe(data)["jerry"]) == count


# ---- translating -------------------------------------------------------------------------------


def test_a_translation_is_a_function_of_source_and_seed(
    translator: Translator, cartoons: np.ndarray
) -> None:
    made = translator.translate(cartoons, seed=1)
    assert made.images.shape == cartoons.shape
    assert made.images.dtype == np.uint8
    assert np.array_equal(translator.translate(cartoons, seed=1).images, made.images)
    assert not np.array_equal(translator.translate(cartoons, seed=2).images, made.images)
    # However they are batched; a rounding step aside.
    parts = translator.translate(cartoons, seed=1, batch_size=2)
    gap = np.abs(parts.images.astype(int) - made.images)
    assert gap.max() <= 1
    assert parts.captions == made.captions
    # And of the source: another one gives another picture under the same noise.
    other = translator.translate(cartoons[::-1].copy(), seed=1)
    assert not np.array_equal(other.images[0], made.images[0])


def test_grain_is_laid_on_what_was_drawn(translator: Translator, cartoons: np.ndarray) -> None:
    smooth = translator.translate(cartoons, seed=1).images
    grainy = replace(translator, grain=0.02)
    whole = grainy.translate(cartoons, seed=1)
    gap = whole.images.astype(int) - smooth
    inside = (smooth > 20) & (smooth < 235)
    assert gap[inside].std() == pytest.approx(0.02 * 255, rel=0.1)
    # Like the drawing itself, it does not depend on the batch.
    parts = grainy.translate(cartoons, seed=1, batch_size=2)
    assert np.abs(parts.images.astype(int) - whole.images).max() <= 1


def test_the_class_can_be_given(translator: Translator, cartoons: np.ndarray) -> None:
    cats = translator.translate(cartoons, ["tom"] * 5)
    mice = translator.translate(cartoons, ["jerry"] * 5)
    assert cats.classes == ["tom"] * 5
    assert not np.array_equal(cats.images, mice.images)


def test_starting_from_the_source_depends_on_it_beyond_its_view(
    translator: Translator, cartoons: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = translator.conditions(cartoons, ["tom"] * 5)
    monkeypatch.setattr(Translator, "conditions", lambda *_, **__: told)
    options: dict[str, Any] = {"start": "source", "strength": 0.34, "steps": 3}
    # Other pictures under the same conditions and noise: only the start can tell them apart.
    first, second = (translator.translate(x, **options).images for x in (cartoons, 255 - cartoons))
    assert not np.array_equal(first, second)
    free = [translator.translate(x, steps=3).images for x in (cartoons, 255 - cartoons)]
    assert np.array_equal(*free)


def test_blip_guidance_pushes_up_the_similarity(
    translator: Translator, cartoons: np.ndarray
) -> None:
    guide = translator._guide(cartoons, [""] * 5, 1.0)
    x0 = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    source = to_tensor(cartoons)

    def alike(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            picture = decode(translator.vae, z).clamp(-1, 1)
            return blip.similarity(translator.describer, picture, source, "vision")

    pushed = guide(x0, 0.0)
    assert not pushed.requires_grad
    assert (alike(pushed) > alike(x0)).all()
    step = (pushed - x0).flatten(1).norm(dim=1)
    assert torch.allclose(step, 0.02 * x0.flatten(1).norm(dim=1), rtol=1e-3)
    plain = translator.translate(cartoons, seed=1).images
    guided = translator.translate(cartoons, seed=1, blip_guidance=1.0).images
    assert not np.array_equal(plain, guided)


# ---- training a row ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(translator: Translator) -> Any:
    """What `train_row` reads of a finished stage 04, by models of random weights."""
    sets = {}
    for domain, labels in (("cartoon", ["tom", "jerry"]), ("natural", ["cat", "mouse"])):
        sets[domain], _ = ldm.latent_set(
            tiny.pictures(domain, 8), labels * 4, ["a cat is sitting", "a mouse is running"] * 4,
            vae=translator.vae, net=translator.net, describer=translator.describer, tone=None,
        )  # fmt: skip
    plain = tiny.tiny_translator(attention=None)
    return SimpleNamespace(
        unet=plain.unet, conditioner=plain.conditioner, vae=translator.vae,
        scheduler=make_scheduler("sample"), cartoon=sets["cartoon"], natural=sets["natural"],
        posed=torch.full_like(sets["natural"].views, 7.0),
    )  # fmt: skip


def row(before: Any, describer: blip.Blip, folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"attention": "ldm", "use_view": True, "blip_weight": 0.0}
    settings["use_posture"] = False
    return transfer.train_row(
        before, describer, SMOKE, folder=folder, steps=3, **{**settings, **options}
    )


def test_a_row_trains_both_models_and_leaves_stage_04_alone(
    before: Any, translator: Translator, tmp_path: Path
) -> None:
    kept = copy.deepcopy(before.unet.state_dict())
    unet, conditioner, result = row(before, translator.describer, tmp_path / "a")
    assert result.steps == 3
    assert conditioner.attend is not None
    assert conditioner.attend.out.weight.abs().max() > 0  # it started at zero
    assert not torch.equal(unet.conv_in.weight, kept["conv_in.weight"])
    assert all(torch.equal(before.unet.state_dict()[name], kept[name]) for name in kept)
    again, _, _ = row(before, translator.describer, tmp_path / "b")
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight)
    other, _, _ = row(before, translator.describer, tmp_path / "c", seed=5)
    assert not torch.equal(other.conv_in.weight, unet.conv_in.weight)


def test_an_independent_source_is_another_pictures_view_and_no_caption(
    before: Any, translator: Translator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ldm.Batch] = []
    real = transfer.denoising_loss

    def watched(unet: Any, conditioner: Any, batch: ldm.Batch, *given: Any, **options: Any) -> Any:
        seen.append(batch)
        return real(unet, conditioner, batch, *given, **options)

    monkeypatch.setattr(transfer, "denoising_loss", watched)
    monkeypatch.setattr(transfer.structure, "exaggerate", lambda views, *_, **__: views)
    row(before, translator.describer, tmp_path / "own", use_view=False)
    row(before, translator.describer, tmp_path / "other", use_view=False, source="other")
    own, other = seen[0], seen[len(seen) // 2]
    assert own.source is not None and other.source is not None
    assert torch.equal(other.latents, own.latents)  # the same pictures,
    assert torch.equal(other.source, own.source.roll(1, 0))  # each with its neighbour's view
    assert not torch.equal(other.source, own.source)
    assert own.mask.sum() > 0 and other.mask.sum() == 0
    assert other.view.abs().max() == 0


def test_half_of_the_views_show_the_body_of_their_pose(
    before: Any, translator: Translator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = transfer.denoising_loss

    def watched(unet: Any, conditioner: Any, batch: ldm.Batch, *given: Any, **options: Any) -> Any:
        seen.append(batch.view.clone())
        return real(unet, conditioner, batch, *given, **options)

    def exaggerate(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("shapes are exaggerated beside natural bodies")

    monkeypatch.setattr(transfer, "denoising_loss", watched)
    monkeypatch.setattr(transfer.structure, "exaggerate", exaggerate)
    row(before, translator.describer, tmp_path / "posed", use_posture=True)
    other = torch.cat(seen).mean((1, 2, 3)) > 5
    assert 0 < other.sum() < len(other)


def test_training_leaves_the_global_random_state_alone(
    before: Any, translator: Translator, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    row(before, translator.describer, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_blip_term_is_in_the_loss_and_reaches_the_denoiser(
    before: Any, translator: Translator, tmp_path: Path
) -> None:
    plain, _, first = row(before, translator.describer, tmp_path / "without")
    tuned, _, second = row(before, translator.describer, tmp_path / "with", blip_weight=5.0)
    assert "similarity" not in first.history[-1]
    for got in second.history:
        expected = got["denoising"] + 5.0 * (1 - got["similarity"])
        assert got["loss"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(plain.conv_in.weight, tuned.conv_in.weight)
    # BLIP and the autoencoder are the measure, not what is trained.
    frozen = [*translator.describer.captioner.parameters(), *before.vae.parameters()]
    assert all(p.grad is None for p in frozen)


def test_without_the_structure_path_the_view_only_reaches_the_attention(
    before: Any, translator: Translator, tmp_path: Path
) -> None:
    unet, _, _ = row(
        before, translator.describer, tmp_path / "blind", attention=None, use_view=False
    )
    # Weights of inputs that are always zero get no gradient, only decay.
    fresh = before.unet.conv_in.weight[:, 4:]
    moved = unet.conv_in.weight[:, 4:]
    assert torch.allclose(moved / fresh, (moved / fresh).mean(), atol=1e-3)
    assert not torch.allclose(unet.conv_in.weight[:, :4], before.unet.conv_in.weight[:, :4])


def test_a_probe_tells_kept_silhouettes_from_others(
    translator: Translator, cartoons: np.ndarray
) -> None:
    rows = [{"facing": "left", "text": "tom is sitting", "action": "sit"}] * 5
    same = transfer.probe(cartoons, cartoons, rows, translator.describer, translator.net)
    assert set(same) == {"action", "facing", "silhouette_iou"}
    assert all(0 <= value <= 1 for value in same.values())
    mixed = transfer.probe(
        cartoons, np.roll(cartoons, 1, 0), rows, translator.describer, translator.net
    )
    assert mixed["silhouette_iou"] <= same["silhouette_iou"]
    # Every output with every source: pairs that belong together are the probe, others the mixed.
    pairs = transfer.probe_pairs(cartoons, cartoons, rows, translator.describer, translator.net)
    for name, found in pairs.items():
        assert found.shape == (5, 5)
        assert found.diagonal().mean() == pytest.approx(same[name])
        rolled = found[np.arange(5) - 1, np.arange(5)].mean()
        assert rolled == pytest.approx(mixed[name])


def test_what_never_may_be_consulted_is_never_imported() -> None:
    """Translating and training may not know the judges, nor the twins that metrics draw."""
    code = (
        "import sys; from tomjerry_utils import blip, ldm, structure, transfer;"
        "print([m for m in sys.modules if m.endswith(('utils.judges', 'utils.metrics'))])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert found.stdout.strip() == "[]"


# ---- weights -----------------------------------------------------------------------------------


def test_far_pictures_are_far(weights: Path) -> None:
    reference = read_json(weights / "translator.json")["reference"]
    near = distance(tiny.pictures("cartoon", 8, first=1_000_100), reference)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert near.shape == (8,)
    assert np.median(near) < 1.2
    assert distance(noise, reference).min() > 1.5 * np.median(near)


def test_find_weights_prefers_what_is_named_then_the_own_run_then_the_shipped(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_runs: Path
) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    mini = load_profile("mini")
    with pytest.raises(UserError, match=r"no translator for profile mini: run `make course"):
        find_weights(mini, None)
    with pytest.raises(UserError, match=r"--weights .*nowhere"):
        find_weights(mini, tmp_path / "nowhere")
    shipped = tmp_path / "data" / "foundation" / "translator"
    shipped.mkdir(parents=True)
    write_json(shipped / "translator.json", {})
    assert find_weights(mini, None)[0] == shipped
    with pytest.raises(UserError, match="profile smoke"):
        find_weights(SMOKE, None)
    own = run_root(mini) / transfer.STAGE
    own.mkdir(parents=True)
    write_json(own / "translator.json", {})
    assert find_weights(mini, None)[0] == shipped  # unfinished
    write_json(own / "provenance.json", {"key": "x"})
    found, line = find_weights(mini, None)
    assert found == own
    assert "your own run" in line
    assert find_weights(mini, weights)[0] == weights


def test_weights_of_another_profile_are_a_users_mistake(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"profile smoke for 32 px pictures, profile mini .*--profile smoke"
    ):
        load_translator(weights, load_profile("mini"))
    with pytest.raises(UserError, match="holds no translator"):
        load_translator(tmp_path, SMOKE)


def test_shipped_weights_are_halves_that_translate_alike(
    weights: Path,
    translator: Translator,
    cartoons: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    foundation = tmp_path / "data" / "foundation"
    shipped = foundation / "translator"
    ship(weights, shipped)
    sizes = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (shipped, weights)]
    assert sizes[0] < 0.55 * sizes[1]
    # What no stage tunes lies beside it, once.
    with pytest.raises(UserError, match="no structure net in"):
        load_translator(shipped, SMOKE)
    for name in ("structure", "posture"):
        assert not list((shipped / name).rglob("config.json"))
        shutil.copytree(weights / name, foundation / name)
    loaded = load_translator(shipped, SMOKE)
    assert loaded.unet.dtype == torch.float32
    ours, theirs = (t.translate(cartoons, ["tom"] * 5).images for t in (translator, loaded))
    assert np.abs(ours.astype(int) - theirs).mean() < 3


# ---- tomjerry translate ------------------------------------------------------------------------


def translate(inputs: list[Path], out: Path, weights: Path, **options: Any) -> list[dict[str, Any]]:
    return translate_files(inputs, out, profile=SMOKE, weights=weights, **options)


@pytest.fixture
def inputs(tmp_path: Path, cartoons: np.ndarray) -> Path:
    """A folder as people have them: transparency, JPEG, a folder within, a file of text."""
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    rgba = np.concatenate([cartoons[0], np.full((32, 32, 1), 128, np.uint8)], -1)
    Image.fromarray(rgba, "RGBA").resize((90, 60)).save(folder / "clear.png")
    Image.fromarray(cartoons[1]).resize((200, 300)).save(folder / "photo.jpg")
    save_image(folder / "deeper" / "frame.png", cartoons[2])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_folders_are_mirrored_and_reported(inputs: Path, tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "out"
    report = translate([inputs], out, weights, cls="jerry")
    made = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert made == ["clear.png", "deeper/frame.png", "photo.png"]
    shapes = [load_image(out / name).shape for name in made]
    assert shapes == [(32, 48, 3), (32, 32, 3), (48, 32, 3)]
    rows = read_jsonl(out / "report.jsonl")
    assert rows == report
    assert [Path(r["file"]).name for r in rows] == ["clear.png", "frame.png", "photo.jpg"]
    assert all(r["class"] == "jerry" and r["distance"] > 0 and r["seconds"] > 0 for r in rows)


def test_a_seed_repeats_and_existing_outputs_are_kept(
    inputs: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    translate([inputs / "photo.jpg"], one, weights, seed=3)
    translate([inputs / "photo.jpg"], two, weights, seed=3)
    first = (one / "photo.png").read_bytes()
    assert (two / "photo.png").read_bytes() == first
    capsys.readouterr()
    # Again, with one more input and another seed: only the new one is made.
    report = translate([inputs / "photo.jpg", inputs / "clear.png"], one, weights, seed=4)
    assert "1 outputs exist and are kept" in capsys.readouterr().err
    assert [Path(r["file"]).name for r in report] == ["clear.png"]
    assert (one / "photo.png").read_bytes() == first
    assert len(read_jsonl(one / "report.jsonl")) == 2
    translate([inputs / "photo.jpg"], one, weights, seed=4, overwrite=True)
    assert (one / "photo.png").read_bytes() != first


def test_an_input_is_never_overwritten(inputs: Path, weights: Path) -> None:
    picture = inputs / "clear.png"
    before = picture.read_bytes()
    with pytest.raises(UserError, match=r"clear\.png is an input .*choose another --out"):
        translate([picture], inputs, weights, overwrite=True)
    assert picture.read_bytes() == before
    assert not (inputs / "report.jsonl").exists()


def test_more_steps_than_the_schedule_has_are_a_users_mistake(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    with pytest.raises(UserError, match="--steps 1001: the noise schedule has 1000"):
        translate([inputs], tmp_path / "out", weights, steps=1001)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "translator.json",
        "wardrobe.safetensors",
        "structure/diffusion_pytorch_model.safetensors",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "denoiser/unet/diffusion_pytorch_model.safetensors",
        "denoiser/conditioner/diffusion_pytorch_model.safetensors",
        "blip/captioner/model.safetensors",
        "blip/retrieval/model.safetensors",
    ],
)
def test_broken_weights_are_one_clear_line(name: str, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    load_translator(folder, SMOKE)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        load_translator(folder, SMOKE)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_line_says_which_weights(
    inputs: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translate([inputs / "photo.jpg"], tmp_path / "out", weights, method="identity")
    assert f"weights: {weights}" in capsys.readouterr().err.splitlines()[0]


def test_a_picture_is_translated_alike_alone_and_among_others(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    translate([inputs], tmp_path / "all", weights)
    translate([inputs / "photo.jpg"], tmp_path / "one", weights)
    both = [load_image(tmp_path / name / "photo.png").astype(int) for name in ("all", "one")]
    assert np.abs(both[0] - both[1]).max() <= 1
    # An output folder inside the input folder is not translated again.
    report = translate([inputs], inputs / "out", weights)
    assert len(translate([inputs], inputs / "out", weights, overwrite=True)) == len(report) == 3


def test_a_rival_method_writes_its_own_pictures(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    translate([inputs / "deeper"], tmp_path / "same", weights, method="identity")
    same = load_image(tmp_path / "same" / "frame.png")
    assert np.array_equal(same, load_image(inputs / "deeper" / "frame.png"))


def test_mistakes_are_one_line_each_and_leave_nothing(
    inputs: Path, tmp_path: Path, weights: Path, fresh_runs: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    twin = tmp_path / "other"
    twin.mkdir()
    Image.open(inputs / "photo.jpg").save(twin / "photo.png")
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([tmp_path / "missing.png"], {}, r"missing.png: no such file or folder"),
        ([tmp_path / "empty"], {}, r"no pictures in .*empty"),
        ([tmp_path / "broken.png"], {}, r"broken.png"),
        ([inputs / "photo.jpg", twin / "photo.png"], {}, r"would both become .*photo.png"),
        ([inputs], {"method": "magic"}, r"--method magic: choose from ours, identity"),
        ([inputs / "notes.txt"], {}, r"notes.txt: not a picture"),
    ]
    for given, options, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            translate(given, out, weights, **options)
        assert "\n" not in str(caught.value)
        assert not list(out.rglob("*.png"))
    with pytest.raises(UserError, match="no translator for profile smoke"):
        translate_files([inputs], out, profile=SMOKE)


def test_a_broken_picture_in_a_folder_is_named_before_any_work(
    inputs: Path, tmp_path: Path, weights: Path
) -> None:
    (inputs / "zz.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"zz.png"):
        translate([inputs], tmp_path / "out", weights)
    assert not list((tmp_path / "out").rglob("*.png"))


# ---- the stage, at smoke, from the shipped foundation models -----------------------------------


@pytest.fixture(scope="module")
def run() -> transfer.TransferRun:
    return transfer.ensure(SMOKE)


def test_the_stage_leaves_a_translator_that_stands_alone(
    run: transfer.TransferRun, tmp_path: Path
) -> None:
    names = ("denoiser", "autoencoder", "structure", "blip")
    for name in names:
        shutil.copytree(run.folder / name, tmp_path / name)
    for name in ("translator.json", "wardrobe.safetensors"):
        shutil.copy(run.folder / name, tmp_path)
    # Without its alignment it would draw other shapes, so it is not read at all.
    with pytest.raises(UserError, match=r"no alignment in .*posture"):
        load_translator(tmp_path, SMOKE)
    shutil.copytree(run.folder / "posture", tmp_path / "posture")
    alone = load_translator(tmp_path, SMOKE)
    images = tiny.pictures("cartoon", 2, first=4_000_000)
    assert np.array_equal(alone.translate(images).images, run.translator.translate(images).images)
    facts = read_json(run.folder / "translator.json")
    assert facts["size"] == SMOKE.image_size
    # The scenes' camera has a deviation of 0.01; a weak autoencoder loses texture with it.
    assert 0.008 < facts["grain"] < 0.02
    assert alone.grain == facts["grain"]
    assert facts["reference"]["p95"] > facts["reference"]["median"] > 0
    assert run.history[-1]["step"] == SMOKE.transfer.steps
    assert "similarity" in run.history[-1]


def test_denoiser_and_decoder_are_finished_on_what_the_translator_drew(
    run: transfer.TransferRun,
) -> None:
    own = ldm.ensure(SMOKE).vae.state_dict()
    finished = run.translator.vae.state_dict()
    moved = {name for name in own if not torch.allclose(own[name], finished[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    trained, conditioner = load_denoiser(run.folder / transfer.TRAINED)
    assert any(
        not torch.equal(value, run.translator.unet.state_dict()[name])
        for name, value in trained.state_dict().items()
    )
    same = run.translator.conditioner.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in conditioner.state_dict().items())
    drawn = load_file(run.folder / "drawn.safetensors")
    assert len(drawn["state"]) == SMOKE.finishing.pictures
    # Drawn from the pictures' own views: nearer to their own colours than to others'.
    images = decode(ldm.ensure(SMOKE).vae, drawn["own"])
    made, real = drawn["colours"], torch.nn.functional.avg_pool2d(images, 4)
    assert (made - real).square().mean() < (made - real.roll(1, 0)).square().mean()


def test_the_ablation_has_every_row_of_the_method(run: transfer.TransferRun) -> None:
    assert [r["row"] for r in run.ablation] == list(transfer.ABLATION)
    assert {r["steps"] for r in run.ablation} == {SMOKE.transfer.ablation_steps}
    for r in run.ablation:
        assert all(0 <= r[name] <= 1 for name in ("action", "facing", "silhouette_iou"))
    assert json.loads((run.folder / "ablation.json").read_text()) == run.ablation


def test_a_finished_stage_is_only_read(
    run: transfer.TransferRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "train", None)
    assert transfer.ensure(SMOKE).key == run.key
