"""Screens: what a person would throw out is thrown out, what a person would keep stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from tomjerry_utils import UserError, lettering, scenes, screens
from tomjerry_utils import screens_material as material
from tomjerry_utils.foundation import MAKERS
from tomjerry_utils.images import load_image
from tomjerry_utils.runs import foundation_root, read_json
from tomjerry_utils.screens import Limits, Measures, Scores, judge, measure

STARTER = Path(__file__).resolve().parents[1] / "data" / "starter"
PHOTO = STARTER / "photo" / "cat"
DRAWING = STARTER / "cartoon" / "cat" / "emojione__cat-face.png"
FINE = Measures(200, 100, 2.0, 0.0, 40.0, 6.0, 0.1, 50, 1.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chelsea() -> np.ndarray:
    return load_image(PHOTO / "skimage__chelsea.jpg")


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def soften(image: np.ndarray, share: float) -> np.ndarray:
    """Blurred by a share of the short side."""
    spread = share * min(image.shape[:2])
    return ndimage.gaussian_filter(image, (spread, spread, 0))


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photo", "drawing", "scene"])
def test_blur_is_read_in_pixels_and_at_any_size(name: str, chelsea: np.ndarray) -> None:
    image = {
        "photo": lambda: chelsea,
        "drawing": lambda: load_image(DRAWING),
        "scene": lambda: scenes.render(scenes.describe(1_900_003), "cartoon", 256).image,
    }[name]()
    sharp = measure(image).blur
    assert sharp < 1.3
    for sigma in (2, 3):
        soft = soften(image, sigma / screens.SIZE)
        # Blurs add in squares; lines that run into each other look a little sharper.
        assert measure(soft).blur == pytest.approx(np.hypot(sharp, sigma), rel=0.3)
        assert measure(scaled(soft, 3)).blur == pytest.approx(measure(soft).blur, rel=0.1)
    soft = soften(image, 4 / screens.SIZE)
    assert any(r.startswith("blurred: by") for r, _, _ in judge(measure(soft), None, ""))
    assert judge(measure(image), None, "") == judge(measure(scaled(image, 3)), None, "") == []


def test_grain_does_not_make_a_blurred_picture_sharp(chelsea: np.ndarray) -> None:
    soft = soften(chelsea, 4 / screens.SIZE)
    grain = np.random.default_rng(0).normal(0, 4, soft.shape)
    noisy = (soft + grain).clip(0, 255).astype(np.uint8)
    assert measure(noisy).blur > Limits().blur


def test_a_subtitle_does_not_make_a_blurred_picture_sharp(chelsea: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    written, _ = lettering.overlay(soften(chelsea, 4 / screens.SIZE), "subtitle", rng)
    assert measure(written).blur > Limits().blur


def test_a_sharp_animal_before_a_soft_background_is_sharp(chelsea: np.ndarray) -> None:
    mixed = soften(chelsea, 5 / screens.SIZE)
    mixed[:, 120:300] = chelsea[:, 120:300]
    assert measure(mixed).blur < Limits().blur < measure(soften(chelsea, 5 / screens.SIZE)).blur


def test_bars_and_flat_places_are_measured(chelsea: np.ndarray) -> None:
    barred = np.zeros((400, 451, 3), np.uint8)
    barred[50:350] = chelsea
    found, plain = measure(barred), measure(chelsea)
    assert found.border == pytest.approx(0.25, abs=0.01) and plain.border < 0.01
    assert found.blur == pytest.approx(plain.blur, abs=0.25)
    assert (found.width, found.height, round(found.aspect, 2)) == (451, 400, 1.13)
    assert measure(load_image(DRAWING)).flat > 0.5 > plain.flat
    assert plain.entropy > 6 > measure(load_image(DRAWING)).entropy


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (9, 9), (40, 4000), (17, 33)])
def test_any_shape_can_be_measured(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for image in (
        np.full((*shape, 3), 128, np.uint8),
        rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
    ):
        found = measure(image)
        assert (found.height, found.width) == shape
        assert all(np.isfinite(v) for v in vars(found).values())
        assert judge(found, None, "")  # too small, too narrow or empty


def test_only_pictures_are_measured() -> None:
    with pytest.raises(ValueError, match="uint8"):
        measure(np.zeros((9, 9), np.uint8))


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "scores", "domain", "reason"),
    [
        ({"width": 40, "height": 30}, None, "natural", "too small: 40x30 px, at least 64"),
        ({"aspect": 9.0}, None, "", "too narrow"),
        ({"contrast": 1.0}, None, "", "empty"),
        ({"blur": 5.0}, None, "", "blurred: by 5.0 px"),
        ({}, Scores(0.9, 0.31, 0.0), "natural", "text or watermark: on 31%"),
        ({}, Scores(0.9, 0.02, 0.83), "natural", "text or watermark: a line of it along the top"),
        ({}, Scores(0.04, 0.0, 0.0), "natural", "not a photograph: 0.04, at least"),
        ({}, Scores(0.96, 0.0, 0.0), "cartoon", "not a cartoon"),
    ],
)
def test_reasons_say_what_was_found_and_what_is_allowed(
    changed: dict[str, float], scores: Scores | None, domain: str, reason: str
) -> None:
    ((words, value, limit),) = judge(Measures(**{**vars(FINE), **changed}), scores, domain)
    assert words.startswith(reason)
    assert isinstance(value, float) and value != limit


def test_a_domain_asks_only_for_its_own_kind() -> None:
    assert judge(FINE, Scores(0.99, 0.0, 0.0), "natural") == []
    assert judge(FINE, Scores(0.01, 0.0, 0.0), "cartoon") == []
    assert judge(FINE, Scores(0.01, 0.0, 0.0), "") == judge(FINE, Scores(0.99, 0.0, 0.0), "") == []


def test_every_reason_is_given_and_limits_can_be_set() -> None:
    bad = Measures(40, 30, 1.3, 0.0, 40.0, 6.0, 0.1, 50, 9.0)
    assert [r.split(":")[0] for r, _, _ in judge(bad, Scores(0.0, 0.5, 0.0), "natural")] == [
        "too small", "blurred", "text or watermark", "not a photograph",
    ]  # fmt: skip
    lax = Limits(short_side=16, blur=20, text=1.0, photo_at_least=0.0)
    assert judge(bad, Scores(0.0, 0.5, 0.0), "natural", lax) == []


def test_too_few_edges_say_nothing_of_blur() -> None:
    assert judge(Measures(**{**vars(FINE), "edges": 1, "blur": 9.0}), None, "") == []


# ---- the probes that ship ------------------------------------------------------------------------


def test_photographs_and_drawings_are_told_apart(chelsea: np.ndarray) -> None:
    photos = [chelsea, load_image(PHOTO / "plasma__cat.jpg")]
    drawings = [load_image(p) for p in sorted((STARTER / "cartoon").rglob("*.png"))[::18]]
    found, features = screens.score(photos + drawings)
    assert features.shape == (len(found), 1280)
    refused = [
        bool(judge(FINE, s, domain))
        for s, domain in zip(found, ["natural"] * 2 + ["cartoon"] * len(drawings), strict=True)
    ]
    assert not any(refused), found
    # Control: each in the other's place is refused.
    assert all(judge(FINE, s, "cartoon") for s in found[:2])
    assert np.mean([bool(judge(FINE, s, "natural")) for s in found[2:]]) > 0.8


@pytest.mark.parametrize("size", [64, 128])
def test_generated_scenes_are_of_their_kind(size: int) -> None:
    for style in scenes.STYLES:
        images = scenes.render_many(range(9_000_000, 9_000_008), style, size, workers=1)["image"]
        found, _ = screens.score(images)
        assert not [s for s in found if judge(FINE, s, style)], (style, found)


def test_letters_are_found_where_they_are(chelsea: np.ndarray) -> None:
    clean = screens.to_size(chelsea)
    rng = np.random.default_rng(3)
    written, mask = lettering.overlay(clean, "card", rng, lettering.HELD_OUT_FONTS)
    (before, after), _ = screens.score([clean, written])
    assert before.text <= Limits().text < after.text
    with torch.no_grad():
        seen = screens.describe(written[None]).places
        chance = screens.text_map(seen, screens.load_probes())[0].numpy()
    cells = mask.reshape(32, 8, 32, 8).mean((1, 3))
    assert chance[cells > 0.9].mean() > 0.6 > 0.3 > chance[cells == 0].mean()


def test_small_marks_along_the_edge_are_found(chelsea: np.ndarray) -> None:
    """In a corner they cover a fiftieth of the picture: their area alone would let them pass."""
    clean = [screens.to_size(chelsea), load_image(PHOTO / "plasma__cat.jpg", 256)]
    rng = np.random.default_rng(3)
    marked = [
        lettering.overlay(image, "corner", rng, lettering.HELD_OUT_FONTS)[0]
        for image in clean
        for _ in range(8)
    ]
    found, _ = screens.score(clean + marked)
    assert not [s for s in found[:2] if judge(FINE, s, "natural")]
    reasons = [[why for why, _, _ in judge(FINE, s, "natural")] for s in found[2:]]
    assert (
        np.mean([any("along the top or bottom" in why for why in each) for each in reasons]) > 0.7
    )
    assert np.mean([s.text > Limits().text for s in found[2:]]) < 0.5  # control


def test_scores_do_not_depend_on_the_batch(chelsea: np.ndarray) -> None:
    pictures = [chelsea, load_image(DRAWING), chelsea[:, :200]]
    together, features = screens.score(pictures)
    for i, picture in enumerate(pictures):
        (alone,), feature = screens.score([picture], batch_size=1)
        assert alone.photo == pytest.approx(together[i].photo, abs=1e-3)
        assert alone.text == pytest.approx(together[i].text, abs=0.003)
        assert alone.mark == pytest.approx(together[i].mark, abs=0.003)
        np.testing.assert_allclose(feature[0], features[i], atol=1e-3)
    assert screens.score([])[0] == [] and screens.score([])[1].shape == (0, 1280)


def test_the_probes_say_where_they_are_from() -> None:
    folder = foundation_root() / "screens"
    record = read_json(folder / "provenance.json")
    assert "screens" in MAKERS and record["command"] == "tomjerry foundation screens"
    assert record["bytes"] == {screens.WEIGHTS: (folder / screens.WEIGHTS).stat().st_size}
    assert sum(record["bytes"].values()) < 50_000
    trained = {s.package for s in material.SOURCES if not s.held_out}
    assert {name.split(":")[0] for name in record["trained_on"]} <= trained | {"zoo scenes"}


def test_missing_probes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tomjerry foundation screens"):
        screens.read_probes(tmp_path / "none.safetensors")


# ---- what they learn from ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", lettering.KINDS)
def test_letters_are_written_where_the_mask_says(kind: str) -> None:
    image = np.full((256, 256, 3), 120, np.uint8)
    written, mask = lettering.overlay(image, kind, np.random.default_rng(5))
    again, _ = lettering.overlay(image, kind, np.random.default_rng(5))
    assert (written == again).all()
    changed = (written != image).any(-1)
    assert changed.any() and mask.max() > 0.9
    near = ndimage.maximum_filter(mask, 7) > 0
    if kind != "page":  # whose paper is changed too
        assert not (changed & ~near).any()


def test_a_view_is_drawn_from_its_generator_alone(chelsea: np.ndarray) -> None:
    opaque = np.dstack([chelsea, np.full(chelsea.shape[:2], 255, np.uint8)])
    one = material.Material(opaque, "chelsea", "here", True, True)
    looks = [material.view(one, np.random.default_rng(s)) for s in (1, 1, 2)]
    assert (looks[0] == looks[1]).all() and (looks[0] != looks[2]).any()
    plain = material.view(one, np.random.default_rng(0), plain=True)
    assert plain.shape == (256, 256, 3)
    assert np.abs(plain.astype(int) - screens.to_size(chelsea)).mean() < 3


def test_a_package_that_cannot_be_had_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "fetch", lambda package: None)
    found, versions = material.gather(material.SOURCES[:2])
    assert versions == {material.SOURCES[0].package: ""}
    assert {m.source for m in found} == {"starter"} and all(m.held_out for m in found)


def test_pictures_are_taken_out_of_an_unpacked_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: np.ndarray
) -> None:
    inside = tmp_path / "usr" / "share"
    inside.mkdir(parents=True)
    (tmp_path / "VERSION").write_text("1.2\n", encoding="utf-8")
    Image.fromarray(chelsea).save(inside / "cat.jpg")
    Image.fromarray(chelsea[:50, :50]).save(inside / "small cat.png")
    jpeg = (inside / "cat.jpg").read_bytes()
    packed = b"qres" + jpeg + bytes(9) + jpeg
    (inside / "many.rcc").write_bytes(packed)
    monkeypatch.setattr(material, "fetch", lambda package: tmp_path)
    source = material.Source("some", "MIT", True, False, "cat|many")
    found, versions = material.gather([source])
    names = [m.name for m in found if m.source == "some"]
    assert len(names) == 3 and names[0] == "cat.jpg" and names[1].startswith("many/")
    assert versions == {"some": "1.2"}
