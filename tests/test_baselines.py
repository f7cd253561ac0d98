"""The rivals: colours against known values, the diffusion rivals on pictures, the common door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SIZE, pictures, save_translator, tiny_translator

from tomjerry_utils import UserError, baselines, editing, scenes, structure
from tomjerry_utils.autoencoder import decode, encode, encode_all
from tomjerry_utils.cli import main
from tomjerry_utils.denoiser import make_scheduler
from tomjerry_utils.images import load_image, save_image, to_uint8
from tomjerry_utils.scenes import LABELS


@pytest.fixture(scope="module")
def cartoons() -> np.ndarray:
    return pictures("cartoon", 4)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    return pictures("natural", 12)


@pytest.fixture(scope="module")
def translator() -> Any:
    return tiny_translator()


# ---- colours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        # Published values for sRGB under D65 (brucelindbloom.com, to two places).
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 128), (53.59, 0.0, 0.0)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert baselines.to_lab(np.array(rgb, np.uint8)) == pytest.approx(lab, abs=0.02)


def test_lab_and_back_is_the_same_picture() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(baselines.from_lab(baselines.to_lab(images)), images)


def test_colour_transfer_brings_the_statistics_over(
    cartoons: np.ndarray, photographs: np.ndarray
) -> None:
    wanted = baselines.measure_colour(photographs)
    before = baselines.measure_colour(cartoons)
    after = baselines.measure_colour(baselines.transfer_colour(cartoons, wanted))
    for name in ("mean", "std"):
        gap = np.abs(np.subtract(before[name], wanted[name])).sum()
        left = np.abs(np.subtract(after[name], wanted[name])).sum()
        # What is left is what no screen can show.
        assert gap > 5
        assert left < 0.15 * gap


def test_colour_transfer_to_its_own_statistics_changes_nothing(cartoons: np.ndarray) -> None:
    one = cartoons[:1]
    made = baselines.transfer_colour(one, baselines.measure_colour(one))
    assert np.abs(made.astype(int) - one).max() <= 1


def test_colour_transfer_keeps_a_flat_picture_flat(photographs: np.ndarray) -> None:
    flat = np.full((1, SIZE, SIZE, 3), 90, np.uint8)
    flat[0, 0, 0] = 91
    made = baselines.transfer_colour(flat, baselines.measure_colour(photographs))
    assert np.ptp(made.reshape(-1, 3), axis=0).max() <= 8


# ---- SDEdit ------------------------------------------------------------------------------------


def test_sdedit_leaves_more_of_the_source_the_weaker_it_is(cartoons: np.ndarray) -> None:
    """With v-prediction even an untrained net keeps what little noise left standing."""
    model = tiny_translator(attention=None)
    model.scheduler = make_scheduler("v_prediction")
    with torch.no_grad():
        latents = encode_all(model.vae, torch.from_numpy(cartoons))
        rebuilt = to_uint8(decode(model.vae, latents))
    away = {}
    for strength in (0.0, 0.005, 0.3, 0.9):
        made = baselines.sdedit(
            model,
            cartoons,
            ["tom"] * 4,
            seed=0,
            steps=4,
            strength=strength,
            guidance_scale=1.0,
        )
        away[strength] = np.abs(made.astype(int) - rebuilt).mean()
    assert away[0.0] == 0
    assert away[0.005] < away[0.3] < away[0.9]
    assert away[0.005] < 0.25 * away[0.9]


def test_sdedit_takes_the_asked_for_evaluations_at_any_strength(
    cartoons: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_translator(attention=None)
    calls: list[int] = []
    forward = type(model.unet).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.unet), "forward", counted)
    for strength in (0.25, 0.6, 1.0):
        calls.clear()
        baselines.sdedit(
            model,
            cartoons[:1],
            ["tom"],
            seed=0,
            steps=5,
            strength=strength,
            guidance_scale=1.0,
        )
        assert len(calls) == 5


def test_sdedit_sees_the_class_and_neither_view_nor_caption(cartoons: np.ndarray) -> None:
    """At full strength only the class is left, so two sources with one class come out alike."""
    model = tiny_translator(attention="ldm")
    options: dict[str, Any] = {"seed": 3, "steps": 2, "strength": 1.0, "guidance_scale": 1.5}
    first = baselines.sdedit(model, cartoons[:1], ["tom"], **options)
    other = baselines.sdedit(model, cartoons[1:2], ["tom"], **options)
    assert np.array_equal(first, other)
    # The controls: another class and another seed do change it.
    assert not np.array_equal(first, baselines.sdedit(model, cartoons[:1], ["jerry"], **options))
    options["seed"] = 4
    assert not np.array_equal(first, baselines.sdedit(model, cartoons[:1], ["tom"], **options))


def test_sdedit_does_not_depend_on_batches(cartoons: np.ndarray) -> None:
    model = tiny_translator(attention=None)
    options: dict[str, Any] = {"seed": 0, "steps": 2, "strength": 0.5, "guidance_scale": 1.0}
    whole = baselines.sdedit(model, cartoons, ["tom"] * 4, **options)
    parts = baselines.sdedit(model, cartoons, ["tom"] * 4, batch_size=3, **options)
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert not np.array_equal(whole[0], whole[1])


def test_sdedit_refuses_a_strength_that_is_no_share(cartoons: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"1\.5"):
        baselines.sdedit(
            tiny_translator(attention=None),
            cartoons,
            ["tom"] * 4,
            seed=0,
            steps=2,
            strength=1.5,
            guidance_scale=1.0,
        )


# ---- the samplers of `editing` on pictures -----------------------------------------------------


def edited(method: str, model: Any, images: np.ndarray, **options: Any) -> np.ndarray:
    knobs = editing.Knobs(
        **{"strength": 0.6, "eta": 1.0, "factor": 4.0, **options.pop("knobs", {})}
    )
    plain = {"seed": 0, "steps": 2, "guidance_scale": 1.5}
    classes = options.pop("classes", ["tom"] * len(images))
    return baselines.edit(method, model, images, classes, knobs=knobs, **plain | options)


@pytest.fixture(scope="module")
def bare() -> Any:
    """With v-prediction even an untrained net keeps what little noise left standing."""
    model = tiny_translator(attention=None)
    model.scheduler = make_scheduler("v_prediction")
    return model


@pytest.mark.parametrize("method", editing.KNOBS)
def test_a_picture_does_not_depend_on_its_batch(
    method: str, bare: Any, cartoons: np.ndarray
) -> None:
    mixed = ["tom", "jerry", "both", "tom"]
    whole = edited(method, bare, cartoons, classes=mixed, numbers=[5, 6, 7, 8])
    parts = edited(method, bare, cartoons, classes=mixed, numbers=[5, 6, 7, 8], batch_size=3)
    alone = edited(method, bare, cartoons[2:3], classes=["both"], numbers=[7])
    turned = edited(method, bare, cartoons[::-1].copy(), classes=mixed[::-1], numbers=[8, 7, 6, 5])
    for other in (parts, turned[::-1]):
        assert np.abs(whole.astype(int) - other).max() <= 1
    assert np.abs(whole[2].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(whole[0], whole[3])


@pytest.mark.parametrize("method", editing.KNOBS)
def test_a_picture_depends_on_seed_number_and_class(
    method: str, bare: Any, cartoons: np.ndarray
) -> None:
    one = cartoons[:1]
    made = edited(method, bare, one)
    assert np.array_equal(made, edited(method, bare, one))
    # DDIB alone draws no noise.
    for change in ({"seed": 1}, {"numbers": [1]}):
        assert np.array_equal(made, edited(method, bare, one, **change)) == (method == "ddib")
    assert not np.array_equal(made, edited(method, bare, one, classes=["jerry"]))


@pytest.mark.parametrize("method", editing.KNOBS)
def test_without_strength_the_autoencoder_is_left(
    method: str, bare: Any, cartoons: np.ndarray
) -> None:
    with torch.no_grad():
        latents = encode_all(bare.vae, torch.from_numpy(cartoons))
        rebuilt = to_uint8(decode(bare.vae, latents))
    away = [
        np.abs(edited(method, bare, cartoons, knobs={"strength": s}).astype(int) - rebuilt).mean()
        for s in (0.0, 0.005, 0.9)
    ]
    assert away[0] == 0
    assert away[1] < 0.5 * away[2]


@pytest.mark.parametrize("method", [m for m in baselines.RIVALS if baselines.DIRECTIONS[m]])
def test_a_rival_evaluates_as_often_as_its_directions_say(
    method: str, cartoons: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_translator(attention="ldm")
    model.guidance_scale = 1.0
    labels: list[int] = []
    forward = type(model.conditioner).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels.append(int(args[0][0]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.conditioner), "forward", counted)
    for strength in (0.3, 1.0):
        labels.clear()
        baselines.run(method, model, cartoons[:1], ["both"], seed=0, steps=4, strength=strength)
        assert len(labels) == 4 * baselines.DIRECTIONS[method]
        assert labels.count(LABELS.index("cat_mouse")) == 4
        assert set(labels) <= {LABELS.index("tom_jerry"), LABELS.index("cat_mouse")}


def test_knobs_reach_their_samplers(translator: Any, cartoons: np.ndarray) -> None:
    one = cartoons[:1]

    def made(method: str, **options: Any) -> np.ndarray:
        return baselines.run(method, translator, one, ["tom"], seed=0, **options)[0]

    for method, change in (
        ("ddib", {"strength": 0.4}),
        ("cyclediffusion", {"eta": 0.9}),
        ("ilvr", {"factor": 1.5}),
        ("ilvr", {"eta": 0.0}),
        ("egsde", {"faithful": 5.0}),
        ("egsde", {"factor": 1.5}),
    ):
        own = editing.KNOBS[method]
        assert np.array_equal(made(method), made(method, knobs=own))
        assert not np.array_equal(made(method), made(method, knobs=replace(own, **change)))
        # Those of the others are not read.
        idle = {"ddib": {"eta": 0.3}, "cyclediffusion": {"factor": 2.0}}.get(
            method, {"realism": 3.0}
        )
        assert np.array_equal(made(method), made(method, knobs=replace(own, **idle)))
    both = made("ddib", knobs=editing.Knobs(strength=0.9), strength=0.4)
    assert np.array_equal(both, made("ddib", strength=0.4))
    with pytest.raises(UserError, match=r"factor 0\.5"):
        made("ilvr", knobs=editing.Knobs(factor=0.5))


def test_colour_goes_a_share_of_the_way(translator: Any, cartoons: np.ndarray) -> None:
    def made(share: float | None) -> np.ndarray:
        knobs = None if share is None else editing.Knobs(strength=share)
        named = ["tom"] * len(cartoons)
        return baselines.run("colour", translator, cartoons, named, seed=0, knobs=knobs)[0]

    assert np.array_equal(made(0.0), cartoons)
    assert np.array_equal(made(1.0), made(None))
    away = [np.abs(made(share).astype(int) - cartoons).mean() for share in (0.3, 0.6, 1.0)]
    assert 0 < away[0] < away[1] < away[2]


def test_sdedits_strength_and_every_guidance_can_be_given(
    translator: Any, cartoons: np.ndarray
) -> None:
    def made(method: str, **options: Any) -> np.ndarray:
        return baselines.run(method, translator, cartoons[:1], ["tom"], seed=0, **options)[0]

    some = made("sdedit", knobs=editing.Knobs(strength=0.3))
    assert np.array_equal(some, made("sdedit", strength=0.3))
    assert not np.array_equal(some, made("sdedit"))
    for method in ("sdedit", "ilvr"):
        own = made(method, guidance_scale=translator.guidance_scale)
        assert np.array_equal(own, made(method))
        assert not np.array_equal(own, made(method, guidance_scale=1.0))


# ---- the common door ---------------------------------------------------------------------------


def test_the_courses_table_has_the_first_of_the_rivals() -> None:
    assert baselines.METHODS == ("identity", "colour", "sdedit") == baselines.RIVALS[:3]
    assert set(baselines.RIVALS) == set(baselines.TITLES) == set(baselines.DIRECTIONS)
    assert set(baselines.RIVALS) == {*baselines.METHODS, *editing.KNOBS}


def test_every_method_gives_pictures_and_classes(translator: Any, cartoons: np.ndarray) -> None:
    for method in baselines.RIVALS:
        made, names = baselines.run(
            method, translator, cartoons, ["tom", None, "auto", "both"], seed=0
        )
        assert made.shape == cartoons.shape and made.dtype == np.uint8
        assert names[0] == "tom" and names[3] == "both"
        assert set(names) <= set(scenes.CLASSES)
        assert np.array_equal(made, cartoons) == (method == "identity")


@pytest.mark.parametrize("method", ["sdedit", "ilvr"])
def test_a_diffusion_rival_has_the_translators_camera(
    method: str, translator: Any, cartoons: np.ndarray
) -> None:
    named = ["tom"] * len(cartoons)
    smooth, _ = baselines.run(method, translator, cartoons, named, seed=0)
    taken, _ = baselines.run(method, replace(translator, grain=0.02), cartoons, named, seed=0)
    gap = (taken.astype(int) - smooth)[(smooth > 20) & (smooth < 235)]
    assert gap.std() == pytest.approx(0.02 * 255, rel=0.1)


@pytest.mark.parametrize("method", ["sdedit", "ddib"])
def test_a_rival_uses_stage_04_where_it_is_given(
    method: str, translator: Any, cartoons: np.ndarray
) -> None:
    other = tiny_translator(attention=None)
    torch.nn.init.normal_(other.unet.conv_out.weight)
    stage = SimpleNamespace(
        unet=other.unet, conditioner=other.conditioner, vae=other.vae, scheduler=other.scheduler
    )
    named = ["tom"] * len(cartoons)
    own, _ = baselines.run(method, translator, cartoons, named, seed=0)
    lent, _ = baselines.run(method, translator, cartoons, named, seed=0, model=stage)
    assert not np.array_equal(own, lent)


def test_classes_are_read_off_the_parts(translator: Any, cartoons: np.ndarray) -> None:
    names = baselines.read_classes(translator, cartoons, [None] * len(cartoons))
    grid = (SIZE // 4, SIZE // 4)
    _, maps = structure.look(translator.net, torch.from_numpy(cartoons), grid)
    assert names == structure.classify(maps)


def test_mistakes_are_one_line(cartoons: np.ndarray) -> None:
    plain = tiny_translator()
    plain.colour = None
    with pytest.raises(UserError, match=", ".join(baselines.RIVALS)):
        baselines.run("magic", plain, cartoons, ["tom"] * 4, seed=0)
    with pytest.raises(UserError, match="colour statistics"):
        baselines.run("colour", plain, cartoons, ["tom"] * 4, seed=0)


def test_the_command_takes_every_rival(
    translator: Any, cartoons: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_translator(translator, tmp_path / "weights")
    save_image(tmp_path / "a.png", cartoons[0])

    def command(method: str, *more: str) -> tuple[int, str]:
        out = str(tmp_path / method)
        given = ["translate", str(tmp_path / "a.png"), "--out", out, "--method", method]
        given += ["--weights", str(weights), "--profile", "smoke", "--class", "tom", *more]
        code = main(given)
        return code, capsys.readouterr().err

    made = {}
    for method in baselines.RIVALS:
        code, said = command(method, "--steps", "2")
        assert code == 0, said
        made[method] = load_image(tmp_path / method / "a.png", SIZE)
    assert len({picture.tobytes() for picture in made.values()}) == len(made)
    for method, more, line in (
        ("magic", (), "choose from ours, " + ", ".join(baselines.RIVALS)),
        ("ddib", ("--steps", "1", "--overwrite"), "give 2 steps or more"),
    ):
        code, said = command(method, *more)
        assert code == 2 and "Traceback" not in said
        assert line in said.strip().splitlines()[-1]


def test_the_help_names_every_rival(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["translate", "--help"])
    said = capsys.readouterr().out
    assert all(method in said for method in ("ours", *baselines.RIVALS))


def test_the_model_was_moved_by_nothing(cartoons: np.ndarray) -> None:
    """A rival leaves the translator's weights and attention as they were."""
    model = tiny_translator(attention="poster")
    before = {k: v.clone() for k, v in model.conditioner.state_dict().items()}
    for method in baselines.RIVALS:
        baselines.run(method, model, cartoons[:1], ["tom"], seed=0)
    after = model.conditioner.state_dict()
    assert model.conditioner.attend is not None
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert encode(model.vae, torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 4, 8, 8)
