"""Near-duplicates: hashes that propose, features that confirm, clusters that no split may cut."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import near_duplicates as near
from tomjerry_utils import scenes
from tomjerry_utils.hash_search import propose
from tomjerry_utils.images import list_images, load_image
from tomjerry_utils.runs import data_root


def starter(name: str) -> np.ndarray:
    return load_image(data_root() / "starter" / name)


def variants(image: np.ndarray) -> dict[str, np.ndarray]:
    height, width = image.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=30)
    half = Image.fromarray(image).resize((width // 2, height // 2))
    small = io.BytesIO()
    half.save(small, "JPEG", quality=80)
    marked = image.copy()
    marked[: height * 15 // 100, -(width * 15 // 100) :] = (200, 30, 60)
    return {
        "jpeg": np.asarray(Image.open(buffer)),
        "half": np.asarray(half),
        # At 32 px compression leaves too little to tell by.
        **({"half, jpeg": np.asarray(Image.open(small))} if width >= 128 else {}),
        "crop": image[: round(height * 0.95), width - round(width * 0.95) :],
        "darker": (image * 0.85).astype(np.uint8),
        "brighter": (image * 1.15).clip(0, 255).astype(np.uint8),
        "mark": marked,
    }


def turned(hashes: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    out = hashes.copy()
    for i in range(len(out)):
        for bit in rng.choice(64, bits, replace=False):
            out[i] ^= np.uint64(1) << np.uint64(bit)
    return out


# ---- hashes and the search -----------------------------------------------------------------------


def test_a_hash_is_a_function_of_the_picture_and_a_flat_one_has_none_of_its_own() -> None:
    image = scenes.render(scenes.describe(1_000_000), "cartoon", 64).image
    hashes = near.perceptual_hashes(image)
    assert hashes.shape == (5,) and hashes.dtype == np.uint64
    assert np.array_equal(hashes, near.perceptual_hashes(image.copy()))
    for level in (0, 97, 255):
        assert not near.perceptual_hashes(np.full((50, 80, 3), level, np.uint8)).any()


def test_the_search_finds_exactly_what_comparing_all_with_all_finds() -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (400, 3), dtype=np.uint64)
    hashes[200:250, 1] = turned(hashes[:50, 0], 6, rng)
    hashes[250:300, 0] = turned(hashes[50:100, 2], 3, rng)
    hashes[300:310] = hashes[100:110]
    apart = np.bitwise_count(hashes[:, None, :, None] ^ hashes[None, :, None, :]).min((2, 3))
    for radius in (0, 3, 6, 9):
        wanted = np.argwhere(np.triu(apart <= radius, 1))
        assert np.array_equal(propose(hashes, radius=radius), wanted)
    assert len(wanted) >= 110


def test_the_search_holds_at_larger_numbers_and_finds_planted_pairs() -> None:
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**64, (30_000, 1), dtype=np.uint64)
    hashes[-300:, 0] = turned(hashes[:300, 0], 6, rng)
    pairs = propose(hashes, radius=6)
    assert np.array_equal(pairs, [(i, 29_700 + i) for i in range(300)])


def test_equal_hashes_are_linked_without_their_square() -> None:
    hashes = np.full((5000, 2), 77, np.uint64)
    pairs = propose(hashes, most=8)
    assert len(pairs) <= 5000 * 9
    assert (near.clusters(5000, pairs) == 0).all()
    # A few equal ones are paired completely.
    assert len(propose(hashes[:9], most=8)) == 36


def test_a_dense_ball_gives_a_bounded_number_of_pairs() -> None:
    rng = np.random.default_rng(3)
    ball = turned(np.full(3000, 0x1234_5678_9ABC_DEF0, np.uint64), 3, rng)[:, None]
    pairs = propose(ball, most=8)
    assert 2 * 3000 < len(pairs) < 3000 * 16
    assert (pairs[:, 0] < pairs[:, 1]).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (4, 0), (1, 5)])
def test_nothing_to_pair(shape: tuple[int, int]) -> None:
    assert propose(np.zeros(shape, np.uint64)).shape == (0, 2)


def test_wrong_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint64"):
        propose(np.zeros((3, 2), np.int64))
    with pytest.raises(ValueError, match="bits"):
        propose(np.zeros((3, 2), np.uint64), radius=13)


# ---- the starter set, looked at ------------------------------------------------------------------

# Pictures of the starter set that are one drawing, and how it was seen: all pairs up to twice the
# threshold were laid side by side. Beyond these come the plain and the modelled renderings of one
# design (fluent-3d and fluent-color), whose shading and outlines differ: two drawings.
ONE_DRAWING = {
    ("fluent-color__cat-face", "fluent-color__grinning-cat"): "one outline is a pixel or two wider",
}


def test_the_starter_set_holds_the_near_duplicates_that_were_seen_and_no_others() -> None:
    root = data_root() / "starter"
    files = [path for part in ("cartoon", "photo") for path in list_images(root / part)]
    pictures = [load_image(path) for path in files]
    pairs = propose(np.stack([near.perceptual_hashes(picture) for picture in pictures]))
    distances = near.confirm(pairs, lambda indices: [pictures[i] for i in indices])
    assert len(pairs) > 50  # there is something to refuse
    found = {
        (files[i].stem, files[j].stem)
        for (i, j), distance in zip(pairs.tolist(), distances, strict=True)
        if distance <= near.THRESHOLD
    }
    assert found == set(ONE_DRAWING)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_scenes_are_not_near_duplicates_of_each_other(style: str) -> None:
    first = scenes.RANGES[style][0]
    pictures = scenes.render_many(range(first, first + 110), style, 32, workers=1)["image"]
    hashes = np.stack([near.perceptual_hashes(picture) for picture in pictures])
    pairs = propose(hashes, radius=9)  # wider than usual: few scenes come near each other
    assert len(pairs) > 5
    distances = near.confirm(pairs, lambda indices: [pictures[i] for i in indices])
    assert (distances > near.THRESHOLD).all()


# ---- confirmation --------------------------------------------------------------------------------

SOURCES = (
    "cartoon/cat/twemoji__cat-face.png",
    "cartoon/mouse/noto__rat.png",
    "photo/cat/skimage__chelsea.jpg",
)


def test_variants_are_proposed_and_confirmed() -> None:
    pictures = [starter(name) for name in SOURCES]
    pictures += [
        scenes.render(scenes.describe(seed), style, 64).image
        for seed, style in ((1_000_001, "cartoon"), (2_000_001, "natural"))
    ]
    count, wanted = len(pictures), []
    for i in range(count):
        for image in variants(pictures[i]).values():
            wanted.append((i, len(pictures)))
            pictures.append(image)
    asked: Counter[int] = Counter()

    def load(indices: Sequence[int]) -> list[np.ndarray]:
        asked.update(indices)
        return [pictures[i] for i in indices]

    pairs = propose(np.stack([near.perceptual_hashes(image) for image in pictures]))
    found = {tuple(pair) for pair in pairs.tolist()}
    assert not [pair for pair in wanted if pair not in found]
    distances = {
        (i, j): d for (i, j), d in zip(pairs.tolist(), near.confirm(pairs, load), strict=True)
    }
    assert max(distances[pair] for pair in wanted) <= near.THRESHOLD
    assert max(asked.values()) == 1


def test_drawings_of_one_family_are_not_duplicates() -> None:
    pictures = [
        starter(f"cartoon/cat/{name}.png")
        for name in ("noto__cat-face", "noto__grinning-cat", "noto__grinning-cat-with-smiling-eyes")
    ]
    pairs = np.array([(0, 1), (0, 2), (1, 2)])
    distances = near.confirm(pairs, lambda indices: [pictures[i] for i in indices])
    assert (distances > near.THRESHOLD).all()


def test_confirmation_does_not_depend_on_order_or_memory() -> None:
    image = starter(SOURCES[2])
    pictures = [image, *variants(image).values()]
    pairs = np.array([(i, j) for i in range(len(pictures)) for j in range(i + 1, len(pictures))])

    def load(indices: Sequence[int]) -> list[np.ndarray]:
        return [pictures[i] for i in indices]

    plain = near.confirm(pairs, load)
    order = np.random.default_rng(0).permutation(len(pairs))
    turned_round = near.confirm(pairs[order][:, ::-1], load, memory=1)
    assert np.allclose(plain[order], turned_round, atol=1e-4)
    assert len(near.confirm(np.zeros((0, 2), np.int64), load)) == 0


# ---- clusters ------------------------------------------------------------------------------------


def test_clusters_are_named_by_their_lowest_member() -> None:
    found = near.clusters(7, np.array([(5, 6), (4, 1), (1, 2)]))
    assert found.tolist() == [0, 1, 1, 3, 1, 5, 5] and found.dtype == np.int64
    assert near.clusters(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]


def test_of_a_chain_only_what_is_like_a_kept_one_is_dropped() -> None:
    chain = np.array([(0, 1), (1, 2), (2, 3), (3, 4)])
    # The middle is the best: its neighbours go, the ends are not like it and stay.
    kept = near.keep_best(chain, np.array([1.0, 2.0, 9.0, 2.0, 1.0]))
    assert kept.tolist() == [0, 2, 2, 2, 4]
    assert near.keep_best(chain[:1], np.array([3.0, 3.0, 1.0])).tolist() == [0, 0, 2]
