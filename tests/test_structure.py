"""Parts and views: what both domains share, and how a cartoonist's proportions are undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from tomjerry_utils import UserError, scenes, structure
from tomjerry_utils.scenes import PARTS

GRID = (16, 16)
ANIMAL = slice(structure.FIRST_ANIMAL_PART, structure.MOUSE)
FACE = [PARTS.index(name) for name in ("head", "ear", "eye", "nose")]


@pytest.fixture(scope="module")
def natural() -> dict[str, Tensor]:
    return tiny.truth("natural", 8)


@pytest.fixture(scope="module")
def cartoon() -> dict[str, Tensor]:
    return tiny.truth("cartoon", 8)


def views_of(drawn: dict[str, Tensor]) -> Tensor:
    views = structure.view(drawn["maps"], drawn["images"], GRID)
    return structure.standardise(views, *structure.tone_statistics(views))


def shares(views: Tensor) -> Tensor:
    """Part shares (B, len(PARTS), 2h, 2w) without the wall; the mouse's share last."""
    return (F.pixel_shuffle(views[:, : structure.MAPS], 2) + 1) / 2


def mass(views: Tensor, names: list[str]) -> Tensor:
    return shares(views)[:, [PARTS.index(n) - 1 for n in names]].sum((1, 2, 3))


def test_one_hot_and_probabilities_have_one_form(natural: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16)).eval()
    with torch.no_grad():
        found = structure.probabilities(net, natural["images"][:2])
    true = natural["maps"][:2]
    assert found.shape == true.shape == (2, len(PARTS) + 1, 64, 64)
    for maps in (found, true):
        assert torch.allclose(maps[:, : structure.MOUSE].sum(1), torch.ones(2, 64, 64), atol=1e-5)
        # The mouse is a part of the animals, never of the wall.
        assert (maps[:, structure.MOUSE] <= maps[:, ANIMAL].sum(1) + 1e-5).all()


def test_view_has_every_part_at_twice_the_grid(natural: dict[str, Tensor]) -> None:
    views = structure.view(natural["maps"], natural["images"], GRID)
    assert views.shape == (8, structure.VIEW_CHANNELS, *GRID)
    assert 4 * len(PARTS) == structure.MAPS
    assert structure.MAPS + structure.COATS + 3 == structure.VIEW_CHANNELS
    assert views[:, : structure.MAPS].min() >= -1
    assert views[:, : structure.MAPS].max() <= 1
    expected = F.interpolate(natural["maps"][:, 1:], size=(32, 32), mode="area")
    assert torch.allclose(shares(views), expected, atol=1e-5)
    # Two pixels wide on 64, an eye is still there on the grid of the latents.
    eyes = natural["maps"][:, PARTS.index("eye")].sum((1, 2)) > 0
    assert (mass(views, ["eye"])[eyes] > 0).all()
    assert eyes.sum() >= 4


def test_a_view_gives_its_part_maps_back(natural: dict[str, Tensor]) -> None:
    views = structure.view(natural["maps"], natural["images"], GRID)
    back = structure.drawn_maps(views)
    assert torch.allclose(back, F.avg_pool2d(natural["maps"], 2), atol=1e-5)
    standard = structure.standardise(views, *structure.tone_statistics(views))
    assert torch.equal(structure.drawn_maps(standard), back)  # tones are no part of the shapes


def test_tones_are_those_of_the_background_alone(natural: dict[str, Tensor]) -> None:
    maps, images = natural["maps"], natural["images"]
    animal = maps[:, ANIMAL].sum(1, keepdim=True) > 0.5
    painted = torch.where(animal, torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1), images)
    tones, changed = (structure.view(maps, x, GRID)[:, -3:] for x in (images, painted))
    assert torch.allclose(tones, changed, atol=1e-5)
    # Control: another wall is another tone.
    behind = torch.where(animal, images, -images)
    assert (structure.view(maps, behind, GRID)[:, -3:] - tones).abs().mean() > 0.1


def test_standardised_coats_and_tones_have_mean_zero_and_deviation_one(
    natural: dict[str, Tensor],
) -> None:
    maps, colours = structure.MAPS, structure.COATS + 3
    views = structure.view(natural["maps"], natural["images"], GRID)
    done = views_of(natural)
    assert torch.equal(done[:, :maps], views[:, :maps])
    assert done[:, maps:].mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(done[:, maps:].std((0, 2, 3)), torch.ones(colours), atol=1e-4)
    flat = structure.standardise(views, [0.0] * colours, [0.0] * colours)
    assert torch.isfinite(flat).all()


def flat_animals(cat: float, mouse: float) -> tuple[Tensor, Tensor]:
    """A picture, blue behind, with a cat and a mouse of one red each, and its maps."""
    maps = torch.zeros(1, len(PARTS) + 1, 64, 64)
    maps[:, PARTS.index("wall")] = 1
    images = torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    for place, red, is_mouse in ((slice(4, 40), cat, 0.0), (slice(48, 60), mouse, 1.0)):
        maps[:, PARTS.index("wall"), 20:60, place] = 0
        maps[:, PARTS.index("torso"), 20:60, place] = 1
        maps[:, structure.MOUSE, 20:60, place] = is_mouse
        images[:, :, 20:60, place] = torch.tensor([red, 0.0, 0.0]).view(1, 3, 1, 1)
    return maps, images


def test_coats_are_each_animals_own_colours() -> None:
    maps, images = flat_animals(0.8, -0.6)
    coats = structure.coats(maps, images)
    assert coats.shape == (1, structure.COATS)
    cat, cat_spread, mouse, mouse_spread = coats[0].split(3)
    assert torch.allclose(cat, torch.tensor([0.8, 0.0, 0.0]), atol=0.02)
    assert torch.allclose(mouse, torch.tensor([-0.6, 0.0, 0.0]), atol=0.05)
    assert cat_spread.max() < 0.15
    # Stripes on the cat are in its spread, and in nothing else.
    striped = images.clone()
    striped[:, 0, 20:60:2, 4:40] -= 0.5
    again = structure.coats(maps, striped)[0].split(3)
    assert again[1][0] > cat_spread[0] + 0.1
    assert torch.allclose(again[2], mouse, atol=0.03)
    assert torch.allclose(again[3], mouse_spread, atol=0.03)
    # Another wall is no other coat; an animal that is not there has the other's.
    assert torch.allclose(
        structure.coats(maps, torch.where(maps[:, :1] > 0, -images, images)), coats, atol=1e-5
    )
    alone = maps.clone()
    alone[:, structure.MOUSE] = 0
    one = structure.coats(alone, images)[0].split(3)
    assert torch.allclose(one[0], one[2], atol=0.01)
    empty = torch.zeros_like(maps)
    empty[:, 0] = 1
    assert torch.isfinite(structure.coats(empty, images)).all()


def test_wear_takes_a_coat_from_much_the_same_light(natural: dict[str, Tensor]) -> None:
    views, coat = views_of(natural)[:2], slice(structure.MAPS, structure.MAPS + structure.COATS)
    tones = views[:, -3:].mean((2, 3))
    # 40 pictures in the first one's light, of coats 0 to 39, and 40 in a light far away.
    near = torch.cat([torch.arange(40.0)[:, None].expand(40, 12), tones[:1].expand(40, 3)], 1)
    far = torch.cat([torch.full((40, 12), -5.0), tones[:1].expand(40, 3) + 9], 1)
    clothes = torch.cat([far, near])
    drawn = [structure.wear(views[:1], [clothes], [seed]) for seed in range(30)]
    worn = {float(view[0, structure.MAPS, 0, 0]) for view in drawn}
    assert -5.0 not in worn
    assert 5 < len(worn) <= structure.NEIGHBOURS
    assert torch.equal(structure.wear(views[:1], [clothes], [3]), drawn[3])
    # Nothing else of the view changes, and each picture has a seed of its own.
    one = drawn[0]
    assert torch.equal(one[:, : coat.start], views[:1, : coat.start])
    assert torch.equal(one[:, coat.stop :], views[:1, coat.stop :])
    assert (one[:, coat] == one[:, coat.start, :1, :1]).all()
    both = structure.wear(views, [clothes, far], [3, 0])
    assert torch.equal(both[:1], drawn[3])
    assert float(both[1, coat.start, 0, 0]) == -5.0


def test_exaggerate_grows_heads_and_eyes(natural: dict[str, Tensor]) -> None:
    views = views_of(natural)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [structure.exaggerate(views, generator, head=1.6) for _ in range(6)]
    ).flatten(0, 1)
    before = views.repeat(6, 1, 1, 1)
    face = ["head", "ear", "eye", "nose"]
    assert mass(drawn, face).mean() > 1.15 * mass(before, face).mean()
    assert mass(drawn, ["eye"]).mean() > 2 * mass(before, ["eye"]).mean()
    # Coats and tones stay, and but for a rim of eye on its neighbours a pixel still holds one part.
    assert torch.equal(drawn[:, structure.MAPS :], before[:, structure.MAPS :])
    assert (shares(drawn)[:, :-1].sum(1) - 1).clamp(min=0).mean() < 0.005
    # The body keeps its place: the head covers some of it, no more.
    assert mass(drawn, ["leg", "tail"]).mean() > 0.75 * mass(before, ["leg", "tail"]).mean()


def test_exaggerate_by_one_changes_nothing(natural: dict[str, Tensor]) -> None:
    views = views_of(natural)
    same = structure.exaggerate(views, torch.Generator().manual_seed(0), head=1.0, eye=False)
    assert torch.allclose(same, views, atol=1e-4)


def test_exaggerate_leaves_a_scene_without_animals(natural: dict[str, Tensor]) -> None:
    empty = torch.zeros(1, len(PARTS) + 1, 64, 64)
    empty[:, PARTS.index("wall"), :40] = 1
    empty[:, PARTS.index("floor"), 40:] = 1
    views = structure.view(empty, natural["images"][:1], GRID)
    same = structure.exaggerate(views, torch.Generator().manual_seed(0), head=2.0)
    assert torch.allclose(same, views, atol=1e-4)


def test_exaggerate_draws_a_strength_for_each_picture(natural: dict[str, Tensor]) -> None:
    views = views_of(natural)[:1].repeat(12, 1, 1, 1)
    drawn = structure.exaggerate(views, torch.Generator().manual_seed(1), head=1.6)
    sizes = mass(drawn, ["head"])
    assert sizes.std() > 0.03 * sizes.mean()
    again = structure.exaggerate(views, torch.Generator().manual_seed(1), head=1.6)
    assert torch.equal(drawn, again)


def test_head_ratio_says_how_much_larger_heads_are_drawn(
    natural: dict[str, Tensor], cartoon: dict[str, Tensor]
) -> None:
    life, drawn = views_of(natural), views_of(cartoon)
    assert structure.head_ratio(life, life) == pytest.approx(1.0)
    assert 1.1 < structure.head_ratio(drawn, life) < 2.0
    inverse = 1 / structure.head_ratio(drawn, life)
    assert structure.head_ratio(life, drawn) == pytest.approx(inverse)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_classify_reads_the_class_off_the_true_maps(style: str) -> None:
    for cls in scenes.CLASSES:
        assert structure.classify(tiny.truth(style, 6, cls=cls)["maps"]) == [cls] * 6


def test_look_takes_any_size_and_any_batch() -> None:
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16)).eval()
    images = torch.from_numpy(tiny.pictures("cartoon", 5, size=96))
    views, maps = structure.look(net, images, (24, 24))
    assert views.shape == (5, structure.VIEW_CHANNELS, 24, 24)
    assert maps.shape == (5, len(PARTS) + 1, 64, 64)
    assert torch.allclose(structure.look(net, images, (24, 24), batch_size=2)[0], views, atol=1e-5)


def test_the_loss_falls_and_shuffled_parts_stop_it(natural: dict[str, Tensor]) -> None:
    half = {
        name: F.interpolate(value.float() if value.ndim == 4 else value[:, None].float(), size=32)
        for name, value in natural.items()
    }
    images = half["images"]
    parts, mouse = half["parts"][:, 0].long(), half["mouse"][:, 0] > 0.5
    known = torch.ones(8, dtype=torch.bool)

    def train(order: list[int]) -> tuple[float, float]:
        torch.manual_seed(0)
        net = structure.StructureNet((16, 24))
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        right = []
        for step in range(40):
            mixed = [order[(i + step) % 8] for i in range(8)] if order != list(range(8)) else order
            loss, numbers = structure.structure_loss(
                net, images, parts[mixed], mouse[mixed], known=known
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append(float(numbers["right"]))
        return right[0], float(np.mean(right[-5:]))

    first, last = train(list(range(8)))
    assert last > first + 0.2
    assert train([3, 4, 5, 6, 7, 0, 1, 2])[1] < last - 0.05


def test_unknown_species_do_not_train_the_mouse_logit(natural: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16))
    for known, expected in ((True, True), (False, False)):
        net.zero_grad()
        flags = torch.full((2,), known)
        parts, mouse = natural["parts"][:2], natural["mouse"][:2]
        loss, _ = structure.structure_loss(net, natural["images"][:2], parts, mouse, known=flags)
        loss.backward()
        assert net.out.bias.grad is not None
        assert bool(net.out.bias.grad[structure.MOUSE] != 0) is expected


def test_a_saved_net_comes_back_and_a_missing_one_is_a_users_mistake(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = structure.StructureNet((8, 16)).eval()
    net.save_pretrained(tmp_path / "net")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(structure.load_structure(tmp_path / "net")(images), net(images))
    with pytest.raises(UserError, match=r"no structure net in .*tomjerry foundation structure"):
        structure.load_structure(tmp_path / "other")
