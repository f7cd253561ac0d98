"""Posture: keypoints across the domains, natural bodies on them, and the room behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tomjerry_utils import UserError, posture, scenes, structure
from tomjerry_utils.posture import ANIMALS, BODY, POINTS, Alignment
from tomjerry_utils.runs import foundation_root
from tomjerry_utils.scenes import KEYPOINTS

NOSE, HIP = KEYPOINTS.index("nose"), KEYPOINTS.index("hip")


def points_of(count: int, *, seed: int = 0, left: bool = False) -> torch.Tensor:
    """Keypoints of animals that face right (or left), spread about one pose."""
    generator = torch.Generator().manual_seed(seed)
    pose = 0.3 + 0.3 * torch.rand(ANIMALS, POINTS, 2, generator=torch.Generator().manual_seed(9))
    pose[:, NOSE, 0], pose[:, HIP, 0] = 0.8, 0.2
    found = pose + 0.03 * torch.randn(count, ANIMALS, POINTS, 2, generator=generator)
    return mirrored(found) if left else found


def mirrored(points: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - points[..., 0], points[..., 1]], -1)


def test_spots_are_where_the_points_are_and_absent_animals_leave_none() -> None:
    points = points_of(3)
    drawn = posture.spots(points, posture.present(["tom", "jerry", "both"]), 64)
    assert drawn.shape == (3, ANIMALS * POINTS, 64, 64)
    by_animal = drawn.unflatten(1, (ANIMALS, POINTS)).amax((2, 3, 4))
    assert (by_animal > 0.5).tolist() == [[True, False], [False, True], [True, True]]
    brightest = drawn[2].flatten(1).argmax(1)
    at = torch.stack([brightest % 64, brightest // 64], -1) + 0.5
    assert (at / 64 - points[2].flatten(0, 1)).abs().max() <= 0.5 / 64 + 1e-6


def test_the_expected_place_is_that_of_the_spot() -> None:
    points = points_of(2)
    logits = posture.spots(points, torch.ones(2, 2), 32).clamp(min=1e-9).log()
    assert (posture.expected(logits) - points).abs().max() < 0.05 / 32
    flat = posture.expected(torch.zeros(1, ANIMALS * POINTS, 32, 32))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5))


def test_the_pose_loss_is_least_at_the_truth_and_leaves_absent_animals_out() -> None:
    points, there = points_of(2), posture.present(["tom", "both"])
    images = torch.zeros(2, 3, 64, 64)

    def loss(shown: torch.Tensor) -> float:
        logits = 30 * posture.spots(shown, torch.ones(2, 2), 32)
        return float(posture.pose_loss(lambda _: logits, images, points, there)[0])  # type: ignore[arg-type]

    elsewhere = points.clone()
    elsewhere[0, 1] += 0.2  # the mouse that is not in the first picture
    assert loss(points) == pytest.approx(loss(elsewhere))
    elsewhere[0, 0] += 0.2
    assert loss(elsewhere) > loss(points) + 1


def test_alignment_takes_drawings_to_natural_places_and_mirrors_with_them() -> None:
    natural = points_of(60, seed=1)
    drawn = 0.5 + 1.3 * (points_of(60, seed=2) - 0.5) - 0.04
    classes, actions = ["both"] * 60, ["sit"] * 30 + ["run"] * 30
    aligned = Alignment(
        posture.statistics(drawn, classes, actions), posture.statistics(natural, classes, actions)
    )
    moved = aligned(drawn, classes, actions)
    assert (moved.mean(0) - natural.mean(0)).abs().max() < 0.005
    assert (moved.std(0) / natural.std(0) - 1).abs().max() < 0.25
    assert (drawn.mean(0) - natural.mean(0)).abs().max() > 0.04  # control: they were elsewhere
    # Order within a domain is kept: the highest head stays the highest.
    assert moved[:30, 0, NOSE, 1].argmax() == drawn[:30, 0, NOSE, 1].argmax()
    turned = aligned(mirrored(drawn), classes, actions)
    torch.testing.assert_close(turned, mirrored(moved))


def test_a_mouse_that_is_asked_for_takes_the_pose_of_the_cat_that_is_seen() -> None:
    natural, drawn = points_of(90, seed=1), 0.5 + 1.3 * (points_of(90, seed=2) - 0.5) - 0.04
    classes, actions = ["tom"] * 30 + ["jerry"] * 30 + ["both"] * 30, ["sit"] * 90
    aligned = Alignment(
        posture.statistics(drawn, classes, actions), posture.statistics(natural, classes, actions)
    )
    assert posture.takes_pose_of(
        ["jerry", "tom", "tom", "both", "jerry"], ["tom", "jerry", "tom", "jerry", "both"]
    ).tolist() == [[0, 0], [1, 1], [0, 1], [0, 1], [0, 1]]
    cats, sit = drawn[:30].clone(), ["sit"] * 30
    cats[:, 1] = 9.0  # what the finder says of a mouse that is not there
    moved = aligned(cats, ["jerry"] * 30, sit, ["tom"] * 30)[:, 1]
    mice = natural[30:60, 1]
    assert (moved.mean(0) - mice.mean(0)).abs().max() < 0.02
    # The pose is the cat's: who sat highest, or furthest right, still does.
    own = aligned(cats, ["tom"] * 30, sit)[:, 0]
    assert torch.equal(moved.argsort(0)[:, NOSE], own.argsort(0)[:, NOSE])
    # Without the class that is seen nothing crosses over.
    assert (aligned(cats, ["jerry"] * 30, sit)[:, 1] > 5).any()
    assert torch.equal(
        aligned(cats, ["tom"] * 30, sit, ["tom"] * 30), aligned(cats, ["tom"] * 30, sit)
    )


def test_a_class_and_action_with_few_pictures_takes_all_actions() -> None:
    points = points_of(40)
    points[:4] += 0.3
    classes, actions = ["tom"] * 40, ["jump"] * 4 + ["lie"] * 36
    found = posture.statistics(points, classes, actions)
    row = found[scenes.CLASSES.index("tom")]
    jump, lie, anything = (row[i] for i in (scenes.ACTIONS.index("jump"), 3, -1))
    assert scenes.ACTIONS[3] == "lie"
    torch.testing.assert_close(jump, anything)
    assert (lie[..., 0] - points[4:].mean(0)).abs().max() < 1e-6
    # A class that was never seen has the statistics of everything.
    torch.testing.assert_close(found[scenes.CLASSES.index("jerry")][0], anything)
    unknown = Alignment(found, found)(points, classes, [None] * 40)
    torch.testing.assert_close(unknown, points, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", [slice(0, 20), slice(30, 50)])
def test_another_body_takes_the_old_ones_place_and_the_room_is_filled_in(where: slice) -> None:
    count = len(scenes.PARTS) + 1
    maps = torch.zeros(1, count, 64, 64)
    wall, floor, torso = 0, scenes.PARTS.index("floor"), structure.FIRST_ANIMAL_PART
    maps[:, wall, :32], maps[:, floor, 32:] = 1, 1
    maps[:, :torso, 20:44, 20:44] = 0
    maps[:, torso, 20:44, 20:44] = 1
    bodies = torch.zeros(1, BODY + 1, 64, 64)
    bodies[:, 1, where, where] = 1
    new = posture.pose_again(maps, bodies)
    torch.testing.assert_close(new[:, : structure.MOUSE].sum(1), torch.ones(1, 64, 64))
    assert torch.equal(new[:, torso:], bodies)
    free = bodies[0, :BODY].sum(0) == 0
    assert (new[0, wall][:26][free[:26]] > 0.6).all()  # wall where the old animal hid the wall,
    assert (new[0, floor][38:][free[38:]] > 0.6).all()  # floor where it hid the floor


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = posture.Posture(posture.PoseNet((8, 16)).eval(), posture.LayoutNet((8, 16)).eval())
    nets.save(tmp_path / "bare")
    assert posture.load_posture(tmp_path / "bare").alignment is None
    points = points_of(20)
    found = posture.statistics(points, ["tom"] * 20, ["sit"] * 20)
    nets.alignment = Alignment(found, found + 0.01)
    nets.save(tmp_path / "fitted")
    again = posture.load_posture(tmp_path / "fitted")
    images = torch.from_numpy(tiny.pictures("cartoon", 3))
    maps = torch.rand(3, len(scenes.PARTS) + 1, 64, 64)
    for actions in (None, ["sit"] * 3):
        told = (images, maps, ["tom"] * 3, actions)
        torch.testing.assert_close(again.pose(*told), nets.pose(*told))
    with pytest.raises(UserError, match=r"no posture nets in .*tomjerry foundation posture"):
        posture.load_posture(tmp_path)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_the_shipped_nets_find_the_points_and_draw_the_body(style: str) -> None:
    nets = posture.load_posture(foundation_root() / "posture")
    first = scenes.RANGES["cartoon" if style == "cartoon" else "natural"][0] + 700_000
    seeds = list(range(first, first + 24))
    drawn = scenes.render_many(seeds, style, 64, truth=True, workers=1)
    classes = [scenes.describe(seed).cls for seed in seeds]
    true = torch.from_numpy(drawn["keypoints"][..., :2]).float() / 64
    jerry = torch.tensor([c == "jerry" for c in classes])
    true = torch.where(jerry[:, None, None, None], true.flip(1), true).clamp(0, 1)
    there = posture.present(classes)
    found = nets.find(torch.from_numpy(drawn["image"]))
    away = 64 * (found - true).norm(dim=-1).mean(-1)
    assert (away * there).sum() / there.sum() < 3.0  # pixels
    swapped = 64 * (found.roll(1, 0) - true).norm(dim=-1).mean(-1)
    assert (swapped * there).sum() / there.sum() > 8.0  # control: another picture's points
    if style == "natural":
        body = nets.bodies(found, there, size=64)[:, :BODY].sum(1).numpy() > 0.5
        animal = drawn["mask"] > 0
        overlap = (body & animal).sum((1, 2)) / np.maximum((body | animal).sum((1, 2)), 1)
        assert overlap.mean() > 0.8
