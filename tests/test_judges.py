"""The judges: fit to judge on scenes they never saw, and apart from what they judge."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tomjerry_utils import UserError, judges, scenes
from tomjerry_utils.judge_nets import (
    ANSWERS,
    CELL,
    POINTS,
    LabelNet,
    PixelNet,
    label_loss,
    locate,
    pixel_loss,
)  # fmt: skip
from tomjerry_utils.runs import foundation_root

torch.set_num_threads(1)
OPTIONS = {"label_steps": 6, "pixel_steps": 6, "batch_size": 16, "learning_rate": 2e-3}


@lru_cache(maxsize=4)
def drawn(style: str, first: int, count: int, noise: bool = False) -> dict[str, np.ndarray]:
    seeds = range(first, first + count)
    data = scenes.render_many(seeds, style, 64, truth=True, noise=noise)
    return {**data, "seed": np.array(seeds)}


def pictures(name: str) -> dict[str, np.ndarray]:
    """A small stand-in for `foundation.pictures`."""
    return drawn("natural", 3_000_000, 120) if name == "judged" else drawn("cartoon", 3_500_000, 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    work = tmp_path_factory.mktemp("judges")
    held, judges.HELD_OUT = judges.HELD_OUT, 24
    try:
        return judges.train_judges(work, pictures, OPTIONS), work
    finally:
        judges.HELD_OUT = held


# ---- the shipped judges ------------------------------------------------------------------------


def test_shipped_judges_are_fit_to_judge() -> None:
    """The targets, on natural test scenes that no judge was trained on."""
    data = drawn("natural", 5_000_000, 150)
    scores = judges.held_out(judges.load_judges(), data)
    assert scores["class"] >= 0.99 and scores["action"] >= 0.97, scores
    assert scores["iou_cat"] >= 0.93 and scores["iou_mouse"] >= 0.88, scores
    assert scores["pck"] >= 0.95, scores


def test_shipped_judges_tell_a_cartoon() -> None:
    answers = judges.load_judges().classify(drawn("cartoon", 5_000_000, 60)["image"]).argmax(1)
    assert (answers == ANSWERS.index("cartoon")).mean() >= 0.97


def test_shipped_judges_read_soft_pictures() -> None:
    """A translation is a little soft: the judges must see the scene, not the sharpness."""
    data = drawn("natural", 5_000_000, 150)
    images = torch.from_numpy(data["image"]).permute(0, 3, 1, 2).float()
    soft = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear"
    )
    soft = (0.5 * images + 0.5 * soft).permute(0, 2, 3, 1).round().byte().numpy()
    scores = judges.held_out(judges.load_judges(), {**data, "image": soft})
    assert scores["class"] >= 0.97 and scores["action"] >= 0.95, scores
    assert min(scores["iou_cat"], scores["iou_mouse"]) >= 0.85, scores


def test_shipped_judges_are_small() -> None:
    files = list((foundation_root() / "judges").rglob("*.safetensors"))
    assert len(files) == 2 and sum(path.stat().st_size for path in files) <= 4_000_000


# ---- training ----------------------------------------------------------------------------------


def test_training_tells_what_it_did(trained: tuple[dict, Path]) -> None:
    made, _ = trained
    assert made["seconds"] > 0 and made["held_out_scenes"] == 24
    assert {row["judge"] for row in made["history"]} == {"labels", "pixels"}
    assert all(np.isfinite(row["loss"]) for row in made["history"])
    assert set(made["held_out"]) == {"class", "action", "iou_cat", "iou_mouse", "pck"}


@pytest.mark.parametrize("kind", [LabelNet, PixelNet])
def test_nets_learn(kind: type[torch.nn.Module]) -> None:
    data = judges._truth(drawn("natural", 3_000_000, 120))
    images = data["image"][:8].float() / 127.5 - 1
    torch.manual_seed(0)
    net = kind()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(16):
        if kind is LabelNet:
            loss, _ = label_loss(net, images, data["answer"][:8], data["action"][:8])
        else:
            loss, _ = pixel_loss(net, images, data["mask"][:8].long(), data["points"][:8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_finished_training_is_not_repeated(
    trained: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, work = trained
    monkeypatch.setattr(judges, "HELD_OUT", 24)
    monkeypatch.setattr(judges, "label_loss", None)  # a step would fail
    monkeypatch.setattr(judges, "pixel_loss", None)
    again = judges.train_judges(work, pictures, OPTIONS)
    assert again["held_out"] == made["held_out"] and again["history"] == made["history"]


def test_save_and_load(trained: tuple[dict, Path], tmp_path: Path) -> None:
    made, _ = trained
    made["save"](tmp_path)
    loaded = judges.load_judges(tmp_path)
    images = drawn("natural", 3_000_000, 120)["image"][:40]
    before, after = made["save"].__self__.read(images), loaded.read(images)
    assert np.abs(before.classes - after.classes).max() < 0.02  # fp16 on disk
    assert (before.masks == after.masks).mean() > 0.995
    assert np.array_equal(after.classes, loaded.classify(images))
    assert np.array_equal(after.actions, loaded.actions(images))
    assert np.array_equal(after.masks, loaded.segment(images))
    assert np.array_equal(after.keypoints, loaded.keypoints(images))


def test_shapes_and_ranges(trained: tuple[dict, Path]) -> None:
    judge = trained[0]["save"].__self__
    said = judge.read(drawn("natural", 3_000_000, 120)["image"][:3])
    assert said.classes.shape == (3, 4) and said.actions.shape == (3, 6)
    assert np.allclose(said.classes.sum(1), 1, atol=1e-5)
    assert said.masks.shape == (3, 64, 64) and said.masks.dtype == np.uint8
    assert said.keypoints.shape == (3, 2, POINTS, 3)
    assert said.keypoints[..., :2].min() >= 0 and said.keypoints[..., :2].max() <= 64


def test_other_sizes_are_resized(trained: tuple[dict, Path]) -> None:
    judge = trained[0]["save"].__self__
    large = np.stack(
        [scenes.render(scenes.describe(s), "natural", 128).image for s in (3_000_000, 3_000_001)]
    )
    assert judge.segment(large).shape == (2, 64, 64)
    with pytest.raises(ValueError, match="uint8"):
        judge.segment(large.astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        judge.segment(large[0])


def test_soften_keeps_range_and_seed() -> None:
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    one = judges.soften(images, torch.Generator().manual_seed(1))
    assert one.shape == images.shape and one.abs().max() <= 1
    assert torch.equal(one, judges.soften(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, judges.soften(images, torch.Generator().manual_seed(2)))


def test_species_order() -> None:
    """The scene's first actor is the mouse in `jerry`; the judges always put the cat first."""
    data = drawn("natural", 3_000_000, 120)
    points = judges.by_species(data["seed"], data["keypoints"])
    for i, seed in enumerate(data["seed"]):
        present = points[i, :, :, 2].any(1).tolist()
        wanted = {"tom": [True, False], "jerry": [False, True], "both": [True, True]}
        assert present == wanted[scenes.describe(int(seed)).cls]
        for which in np.flatnonzero(present):
            ys, xs = np.nonzero(data["mask"][i] == which + 1)
            centre = points[i, which, points[i, which, :, 2] > 0, :2].mean(0)
            assert xs.min() - 8 <= centre[0] <= xs.max() + 8
            assert ys.min() - 8 <= centre[1] <= ys.max() + 8


# ---- parts -------------------------------------------------------------------------------------


def test_locate_is_exact_between_cells() -> None:
    cells = torch.arange(32) + 0.5
    x, y = 21.3 / CELL, 44.9 / CELL
    peak = -0.5 * ((cells[None] - x) ** 2 + (cells[:, None] - y) ** 2) / 0.8**2
    found = locate(peak[None, None])[0, 0]
    assert torch.allclose(found[:2], torch.tensor([21.3, 44.9]), atol=0.1)
    assert found[2] > 0.95
    # A second, lower hill far off does not pull the point away.
    other = -0.5 * ((cells[None] - 3) ** 2 + (cells[:, None] - 3) ** 2) / 0.8**2 - 0.5
    both = torch.logaddexp(peak, other)
    assert torch.allclose(locate(both[None, None])[0, 0, :2], found[:2], atol=0.1)


def test_pixel_loss_prefers_the_truth() -> None:
    class Fixed(torch.nn.Module):
        """Says a given mask and given points, whatever it sees."""

        def __init__(self, mask: torch.Tensor, points: torch.Tensor) -> None:
            super().__init__()
            self.mask, self.points = mask, points

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = 8.0 * torch.nn.functional.one_hot(self.mask, 3).permute(0, 3, 1, 2)
            cells = torch.arange(32) + 0.5
            x, y = self.points.flatten(1, 2)[..., :2].unbind(-1)
            away = (cells[None, None, None] - x[..., None, None] / CELL) ** 2
            away = away + (cells[None, None, :, None] - y[..., None, None] / CELL) ** 2
            return logits, -0.5 * away / 0.8**2

    data = drawn("natural", 3_000_000, 120)
    mask = torch.from_numpy(data["mask"][:4]).long()
    points = torch.from_numpy(judges.by_species(data["seed"], data["keypoints"])[:4])
    images = torch.zeros(4, 3, 64, 64)
    right, parts = pixel_loss(Fixed(mask, points), images, mask, points)
    shifted = points + torch.tensor([6.0, 0, 0])
    for wrong in (
        Fixed(mask.roll(6, 2), points),
        Fixed(mask, shifted),
        Fixed(mask.flip(2), points),
    ):
        assert pixel_loss(wrong, images, mask, points)[0] > right + 0.05
    # A point out of the picture does not count.
    hidden = points.clone()
    hidden[..., 2] = 0
    assert pixel_loss(Fixed(mask, shifted), images, mask, hidden)[1]["point_loss"] == 0
    assert parts["dice"] < 0.05


def test_nets_differ_from_the_translators_own() -> None:
    """Another family of net than the structure net: batch norm, dilation, no U of skips."""
    from tomjerry_utils.structure import StructureNet

    kinds = {type(m) for net in (LabelNet(), PixelNet()) for m in net.modules()}
    others = {type(m) for m in StructureNet().modules()}
    assert torch.nn.BatchNorm2d in kinds and torch.nn.GroupNorm not in kinds
    assert torch.nn.GroupNorm in others and torch.nn.BatchNorm2d not in others


def test_missing_and_broken_judges(trained: tuple[dict, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tomjerry foundation judges"):
        judges.load_judges(tmp_path / "nowhere")
    trained[0]["save"](tmp_path / "broken")
    path = tmp_path / "broken" / "pixels" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="pixels"):
        judges.load_judges(tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "labels")
    with pytest.raises(UserError, match="no judges"):
        judges.load_judges(tmp_path / "broken")
