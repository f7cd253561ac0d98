"""Composites of a cat and a mouse: likely pictures with true masks, or the reason why not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, animal_masks, composites, pasting, scenes, silhouette, u2net
from tomjerry_utils.composites import CAT, MOUSE, composite, make_composites, pairs
from tomjerry_utils.images import load_image, save_image
from tomjerry_utils.runs import data_root, hash_file
from tomjerry_utils.sources import Row, make_row

FETCHED = u2net.is_there()
Animal = tuple[np.ndarray, np.ndarray]


def rendered(cls: str, count: int, size: int) -> list[Animal]:
    """Generated natural scenes of one class, and where their animal is."""
    found: list[Animal] = []
    for seed in range(2_000_000, 2_000_400):
        if len(found) == count:
            break
        scene = scenes.describe(seed)
        if scene.cls == cls:
            picture = scenes.render(scene, "natural", size, truth=True)
            assert picture.mask is not None
            found.append((picture.image, picture.mask > 0))
    return found


@pytest.fixture(scope="module")
def mice() -> list[Animal]:
    return rendered("jerry", 3, 192)


@pytest.fixture(scope="module")
def cats() -> list[Animal]:
    """Cats with room on both sides: the middle of a wide scene."""
    found = []
    for image, mask in rendered("tom", 3, 192):
        wide = np.pad(image, ((0, 0), (120, 120), (0, 0)), mode="edge")
        found.append((wide, np.pad(mask, ((0, 0), (120, 120)))))
    return found


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def tall(mask: np.ndarray) -> int:
    top, bottom, *_ = box(mask)
    return bottom - top


# ---- one picture -------------------------------------------------------------------------------


def test_the_mouse_stands_beside_the_cat(cats: list[Animal], mice: list[Animal]) -> None:
    sides = set()
    for seed in range(6):
        (cat, cat_mask), (mouse, mouse_mask) = cats[seed % 3], mice[seed % 2]
        made = composite(cat, cat_mask, mouse, mouse_mask, seed=seed)
        assert made.image.shape == cat.shape
        assert made.image.dtype == made.mask.dtype == np.uint8
        assert set(np.unique(made.mask)) == {0, CAT, MOUSE}
        here = made.mask == MOUSE
        # A third of the cat, less where its tail is long; never more than it was photographed.
        assert 0.14 < tall(here) / tall(cat_mask) < 0.4
        assert tall(here) <= tall(mouse_mask)
        # On the ground that the cat is on, or before it; and clear of the cat.
        assert -2 <= box(here)[1] - box(cat_mask)[1] <= 0.45 * tall(cat_mask)
        assert ((made.mask == CAT) != cat_mask).sum() <= 0.02 * here.sum()
        # The rest of the photograph is untouched.
        top, bottom, left, right = box(here)
        reach = tall(here) // 2 + 4
        rest = np.ones(here.shape, bool)
        rest[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = False
        assert rest.any()
        assert np.array_equal(made.image[rest], cat[rest])
        assert "\n" not in made.note
        sides.add("left" in made.note)
        again = composite(cat, cat_mask, mouse, mouse_mask, seed=seed)
        assert np.array_equal(again.image, made.image)
        assert again.note == made.note
    assert sides == {True, False}
    other = composite(cat, cat_mask, mouse, mouse_mask, seed=99)
    assert not np.array_equal(other.image, made.image)


def test_another_background_takes_the_cat_along(cats: list[Animal], mice: list[Animal]) -> None:
    (cat, mask), mouse = cats[0], mice[0]
    ground = np.full((50, 70, 3), (40, 160, 60), np.uint8)
    made = composite(cat, mask, *mouse, ground, seed=1)
    assert made.image.shape == cat.shape
    assert (made.image[:4, :4] == (40, 160, 60)).all()
    inside = made.mask == CAT
    assert np.abs(made.image[inside].astype(int) - cat[inside]).mean() < 40
    assert np.abs(made.image[~mask].astype(int) - cat[~mask]).mean() > 40


def test_it_is_never_larger_than_photographed_unless_said(
    cats: list[Animal], mice: list[Animal]
) -> None:
    cat, mask = (each.repeat(2, 0).repeat(2, 1) for each in cats[0])
    image, mouse_mask = mice[0]
    side = round(192 * 0.2 * tall(mask) / tall(mouse_mask))
    size = (side, side)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    small_mask = np.asarray(Image.fromarray(mouse_mask).resize(size))
    made = composite(cat, mask, small, small_mask, seed=0)
    assert tall(made.mask == MOUSE) <= tall(small_mask)
    grown = composite(cat, mask, small, small_mask, seed=0, enlarge=True)
    assert tall(grown.mask == MOUSE) > tall(small_mask)
    tiny = small[::2, ::2], small_mask[::2, ::2]
    with pytest.raises(UserError, match="too small"):
        composite(cat, mask, *tiny, seed=0)


def shifted(animal: Animal, rows: int) -> Animal:
    """The animal moved down (or up) until the border cuts it."""
    return np.roll(animal[0], rows, 0), np.roll(animal[1], rows, 0)


def test_bad_pairs_are_refused_with_a_reason(cats: list[Animal], mice: list[Animal]) -> None:
    (cat, mask), (mouse, mouse_mask) = cats[0], mice[0]
    two = mouse_mask.copy()
    two[5:60, 5:60] |= np.hypot(*(np.mgrid[-27:28, -27:28])) < 20
    frame = np.zeros_like(mask)
    frame[:3], frame[-3:], frame[:, :3], frame[:, -3:] = True, True, True, True
    down = 192 - box(mouse_mask)[1] + tall(mouse_mask) // 3
    low = 192 - box(mask)[1] + tall(mask) // 3
    cut_mouse, cut_cat = shifted(mice[0], down), shifted(cats[0], low)
    cut_mouse[1][:40], cut_cat[1][:40] = False, False
    top, bottom, left, right = box(mask)
    tight = slice(None), slice(left, right)
    for arguments, reason in (
        ((cat, np.zeros_like(mask), mouse, mouse_mask), "mask of the cat is empty"),
        ((cat, mask, mouse, np.zeros_like(mouse_mask)), "mask of the mouse is empty"),
        ((cat, mask | frame, mouse, mouse_mask), "touches all four borders"),
        ((cat, mask, mouse, two), "mouse is in several pieces"),
        ((cat, mask, *cut_mouse), "mouse is cut off at the bottom"),
        ((*cut_cat, mouse, mouse_mask), "cat is cut off below"),
        ((cat[tight][: bottom + 2], mask[tight][: bottom + 2], mouse, mouse_mask), "no room"),
        ((cat, mask[1:], mouse, mouse_mask), "mask of the cat is"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            composite(*arguments, seed=0)
        assert "\n" not in str(error.value)
    assert top < bottom


def test_crumbs_of_a_mask_do_not_matter(cats: list[Animal], mice: list[Animal]) -> None:
    cat, mask = cats[0]
    crumbs = mask.copy()
    crumbs[2:6, 2:6] = True
    made, plain = (composite(cat, m, *mice[0], seed=3) for m in (crumbs, mask))
    assert np.array_equal(made.image, plain.image)
    assert np.array_equal(made.mask, plain.mask)


# ---- pixels ------------------------------------------------------------------------------------


def test_no_rim_of_the_old_ground_is_left() -> None:
    y, x = np.mgrid[:80, :120]
    share = np.clip(1.5 - np.hypot((y - 40) / 30, (x - 60) / 50) * 1.0, 0, 1)
    share = np.clip((share - 0.5) * 12 + 0.5, 0, 1).astype(np.float32)
    grey, green = np.array([120.0, 110, 105]), np.array([0.0, 255, 0])
    photo = (share[..., None] * grey + (1 - share[..., None]) * green).astype(np.uint8)
    scene = np.full((160, 200, 3), (130, 90, 90), np.uint8)

    def greenest(image: np.ndarray) -> int:
        return int((image[..., 1].astype(int) - image[..., [0, 2]].max(-1)).max())

    made = pasting.paste(scene, pasting.cut(photo, share, 0.5), (40, 40), np.ones(3))
    assert greenest(made) <= 2
    # The control: cut out by the same mask, without care for the rim.
    half, alpha = photo[::2, ::2], share[::2, ::2, None]
    careless = scene.copy()
    careless[40:80, 40:100] = half * alpha + careless[40:80, 40:100] * (1 - alpha)
    assert greenest(careless) > 20


def test_a_shadow_lies_where_the_feet_are(cats: list[Animal], mice: list[Animal]) -> None:
    cat, mask = cats[1]
    made = composite(cat, mask, *mice[1], seed=0)
    top, bottom, left, right = box(made.mask == MOUSE)
    change = made.image.astype(int) - cat
    change[made.mask == MOUSE] = 0
    ground = change[bottom - 2 : bottom + 4, left:right]
    assert ground.mean() < -3
    assert ground.min() < -12
    away = change[max(0, top - 10) : top, left:right]
    assert np.abs(away).mean() < 1


def test_light_follows_the_scene_a_little() -> None:
    share = np.zeros((60, 60), np.float32)
    share[20:40, 20:40] = 1
    none = np.zeros((60, 60), np.float32)

    def gain(animal: int, around: tuple[int, ...], scene: tuple[int, ...]) -> np.ndarray:
        photo = np.full((60, 60, 3), around, np.uint8)
        photo[share > 0] = animal
        return pasting.light(photo, share, np.full((60, 60, 3), scene, np.uint8), none)

    same = (120, 120, 120)
    assert np.allclose(gain(90, same, same), 1)
    assert 1.05 < gain(90, same, (150, 150, 150)).mean() < 1.3
    assert 0.75 < gain(90, same, (90, 90, 90)).mean() < 0.95
    # Neither the darkness of the mouse nor a coloured cloth is taken for the light.
    assert np.allclose(gain(20, same, same), 1)
    pink = gain(90, same, (200, 30, 90))
    assert 1.02 < pink[0] / pink.mean() < 1.08
    # White fur is not burnt out.
    assert gain(250, same, (255, 255, 255)).max() <= 1.01


# ---- pairs -------------------------------------------------------------------------------------


def photographs(kind: str, train: int, validation: int, rights: str = "CC0") -> list[Row]:
    rows = []
    for i in range(train + validation):
        cls = {"cat": "tom", "mouse": "jerry"}[kind]
        row = make_row(
            "folder", f"{kind}{i}", "", domain="natural", rights=rights, **{"class": cls}
        )
        row.update(
            split="train" if i < train else "validation",
            sha256=f"{kind} {i * 7919 % 1000:03}",
            group=f"{kind}-group-{i}",
            file_name=f"images/natural/{kind}{i}.png",
            kept=True,
        )
        rows.append(row)
    return rows


def paired(cats: list[Row], mice: list[Row], n: int, *, seed: int) -> list[tuple[Row, Row]]:
    found = pairs(cats, mice, n, seed=seed)
    return [pair for wanted, tries in found for pair in itertools.islice(tries, wanted)]


def names(found: Sequence[tuple[Row, Row]]) -> list[tuple[str, str]]:
    return [(cat["sha256"], mouse["sha256"]) for cat, mouse in found]


@pytest.mark.parametrize(("cat_count", "mouse_count"), [(6, 4), (5, 7), (3, 3), (1, 9)])
def test_pairs_are_even_different_and_of_one_split(cat_count: int, mouse_count: int) -> None:
    cats = photographs("cat", cat_count, 2)
    mice = photographs("mouse", mouse_count, 2)
    for n in (1, 5, cat_count * mouse_count // 2 + 2, 10_000):
        found = paired(cats, mice, n, seed=4)
        assert len(found) <= n
        assert len(set(names(found))) == len(found)
        assert all(cat["split"] == mouse["split"] for cat, mouse in found)
        for split in ("train", "validation"):
            for kind, rows in enumerate((cats, mice)):
                used = Counter(pair[kind]["sha256"] for pair in found if pair[0]["split"] == split)
                counts = [used[row["sha256"]] for row in rows if row["split"] == split]
                assert max(counts) - min(counts) <= 1
    assert len(found) == cat_count * mouse_count + 4  # all there are
    assert names(paired(cats[::-1], mice[::-1], 6, seed=4)) == names(paired(cats, mice, 6, seed=4))


def test_pairs_depend_on_the_seed_and_not_on_the_other_split() -> None:
    cats, mice = photographs("cat", 9, 3), photographs("mouse", 9, 3)
    assert names(paired(cats, mice, 8, seed=1)) != names(paired(cats, mice, 8, seed=2))
    assert Counter(c["split"] for c, _ in paired(cats, mice, 8, seed=1)) == {
        "train": 6,
        "validation": 2,
    }
    assert paired(cats, [m for m in mice if m["split"] == "train"], 8, seed=1)
    assert not paired(cats[:9], mice[9:], 8, seed=1)  # no split has both


# ---- a collection ------------------------------------------------------------------------------


@pytest.fixture
def collection(
    tmp_path: Path, cats: list[Animal], mice: list[Animal]
) -> tuple[Path, Path, list[Row]]:
    """A collection of three cats and three mice, and the folder with their trimaps."""
    out, originals = tmp_path / "out", tmp_path / "photos"
    rows = []
    for kind, animals in (("cat", cats), ("mouse", mice)):
        found = photographs(kind, 3, 0, rights=f"rights of the {kind}")
        for row, (image, mask) in zip(found, animals, strict=True):
            path = save_image(out / row["file_name"], image)
            row.update(sha256=hash_file(path), origin=f"images/{path.stem}.png")
            save_image(originals / row["origin"], image)
            trimap = np.where(mask, 1, 2).astype(np.uint8)
            save_image(originals / "annotations" / "trimaps" / path.name, trimap)
        rows += found
    return out, originals, rows


def test_a_collection_gets_composites(collection: tuple[Path, Path, list[Row]]) -> None:
    out, originals, rows = collection
    find = animal_masks.finder(out, [originals], net=False)
    made = make_composites(out, rows, 4, seed=7, mask_of=find)
    kept = [row for row in made if row["kept"]]
    assert len(kept) == 4
    by_name = {row["file_name"]: row for row in rows}
    for row in kept:
        assert (row["class"], row["domain"], row["label"]) == ("both", "natural", "cat_mouse")
        assert row["role"] == "training"
        assert row["split"] == "train"
        assert row["rights"] == "rights of the cat + rights of the mouse"
        first, second = row["origin"].removeprefix("composite of ").split(" (")[0].split(" + ")
        cat, mouse = by_name[first], by_name[second]
        assert (cat["class"], mouse["class"]) == ("tom", "jerry")
        assert row["group"] == f"{cat['group']} + {mouse['group']}"
        image = load_image(out / row["file_name"])
        assert hash_file(out / row["file_name"]) == row["sha256"]
        assert image.shape == load_image(out / first).shape
        truth = load_image(out / "masks" / "natural" / Path(row["file_name"]).name)
        assert set(np.unique(truth)) == {0, CAT, MOUSE}
        assert list(row) == [c for c in make_row("x", "y", "") if c != "_key"]
    hashes = [row["sha256"] for row in kept]
    assert len(set(hashes)) == 4
    assert make_composites(out, rows[::-1], 4, seed=7, mask_of=find) == made
    assert make_composites(out, rows, 4, seed=8, mask_of=find) != made


def test_what_cannot_be_used_is_refused_once(collection: tuple[Path, Path, list[Row]]) -> None:
    out, originals, rows = collection
    cats = [row for row in rows if row["class"] == "tom"]
    mice = [row for row in rows if row["class"] == "jerry"]
    cats[0]["rights"] = "CC-BY-ND-4.0"
    mask = originals / "annotations" / "trimaps" / Path(mice[0]["file_name"]).name
    save_image(mask, np.full((192, 192), 2, np.uint8))
    find = animal_masks.finder(out, [originals], net=False)
    made = make_composites(out, rows, 100, seed=0, mask_of=find)
    refused = [row["reason"] for row in made if not row["kept"]]
    assert sum("allows no altered copies" in reason for reason in refused) == 1
    assert sum("mask of the mouse is empty" in reason for reason in refused) == 1
    assert all(reason.startswith("no composite: ") for reason in refused)
    for row in made:
        if row["kept"]:
            assert cats[0]["file_name"] not in row["origin"]
            assert mice[0]["file_name"] not in row["origin"]
        else:
            assert not (out / row["file_name"]).exists()


def test_without_masks_one_line_says_how_to_get_them(
    collection: tuple[Path, Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, rows = collection

    def offline() -> Path:
        raise UserError("U²-Net-p cannot be fetched: go online")

    monkeypatch.setattr(u2net, "is_there", lambda: False)
    monkeypatch.setattr(u2net, "weights", offline)
    made = make_composites(out, rows, 3, seed=0, mask_of=animal_masks.finder(out))
    assert made
    assert not any(row["kept"] for row in made)
    assert "NAME.mask.png" in made[0]["reason"]
    assert "\n" not in made[0]["reason"]


# ---- masks -------------------------------------------------------------------------------------


def test_masks_of_files(tmp_path: Path, mice: list[Animal]) -> None:
    image, mask = mice[0]
    path = save_image(tmp_path / "images" / "a.png", image)
    with pytest.raises(UserError, match="no mask"):
        animal_masks.animal_mask(path, net=False)
    white = save_image(path.with_name("a.mask.png"), mask.astype(np.uint8) * 255)
    assert np.array_equal(animal_masks.animal_mask(path, net=False), mask)
    save_image(white, mask.astype(np.uint8))
    assert np.array_equal(animal_masks.animal_mask(path, net=False), mask)
    save_image(white, mask.astype(np.uint8) * 80)
    with pytest.raises(UserError, match=r"a\.mask\.png: holds values up to 80"):
        animal_masks.animal_mask(path, net=False)
    white.unlink()
    # A trimap: the border is half the animal's.
    trimap = np.full((40, 60), 2, np.uint8)
    trimap[10:30, 20:40], trimap[14:26, 24:36] = 3, 1
    save_image(tmp_path / "annotations" / "trimaps" / "a.png", trimap)
    found = animal_masks.animal_mask(path, net=False)
    assert (found[trimap == 1] == 1).all()
    assert (found[trimap == 2] == 0).all()
    assert np.allclose(found[16:24, 20:24].mean(0), [0.2, 0.4, 0.6, 0.8])


def test_every_place_of_a_mask_is_known_as_one(tmp_path: Path) -> None:
    for place in animal_masks.PLACES:
        file = tmp_path / "images" / place.format(stem="a")
        assert animal_masks.is_mask(file)
        picture = save_image(tmp_path / "images" / "a.png", np.full((9, 9, 3), 50, np.uint8))
        save_image(file, np.full((9, 9), 255, np.uint8))
        assert (animal_masks.animal_mask(picture, net=False) == 1).all()
        file.unlink()
    assert not animal_masks.is_mask(tmp_path / "images" / "a.png")
    assert not animal_masks.is_mask(tmp_path / "cat" / "masked cat.png")


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    path = data_root() / "starter" / "cartoon" / "mouse" / "noto__mouse.png"
    found = animal_masks.animal_mask(path, net=False)
    assert found.shape == load_image(path).shape[:2]
    assert 0.1 < (found > 0.5).mean() < 0.9


def test_the_nets_masks_are_found_once(
    collection: tuple[Path, Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, rows = collection
    asked: list[Any] = []

    def net(images: np.ndarray) -> np.ndarray:
        asked.append(images.shape)
        return (images.mean(-1) / 255).astype(np.float32)

    monkeypatch.setattr(u2net, "is_there", lambda: True)
    monkeypatch.setattr(silhouette, "foreground", net)
    first = animal_masks.finder(out)(rows[0])
    again = animal_masks.finder(out)(rows[0])
    assert len(asked) == 1
    assert np.array_equal(first, again)
    picture = load_image(out / rows[0]["file_name"])
    assert np.abs(first - picture.mean(-1) / 255).max() < 0.003


@pytest.mark.skipif(not FETCHED, reason="U²-Net-p has not been fetched")
def test_a_real_kitten_gets_a_real_mouses_place(mice: list[Animal]) -> None:
    path = data_root() / "starter" / "photo" / "cat" / "gcompris__playing-kitten.jpg"
    made = composite(load_image(path), animal_masks.animal_mask(path), *mice[0], seed=0)
    assert 0.05 < (made.mask == CAT).mean() < 0.5
    assert composites.SMALLEST < tall(made.mask == MOUSE) / tall(made.mask == CAT) < 0.4
