"""What is to be seen in a sample: poses drawn from a density, rooms and coats put together anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tomjerry_utils import ldm, painting, posture, staging, structure
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import model_source
from tomjerry_utils.scenes import LABELS

SMOKE = load_profile("smoke")


def correlated(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, 2, generator=generator)
    return torch.stack([base[:, 0], base[:, 0] + 0.1 * base[:, 1]], 1) + 5


@pytest.mark.parametrize("h", [0.0, 0.6, 1.0])
def test_a_smoothed_bootstrap_keeps_mean_and_covariance(h: float) -> None:
    points = correlated(400)
    drawn = staging.smoothed(points, 20_000, torch.Generator().manual_seed(1), h)
    # 20 000 draws: four standard errors are about 0.03.
    assert torch.allclose(drawn.mean(0), points.mean(0), atol=0.03)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(points.T), atol=0.06)


def test_it_draws_the_vectors_themselves_or_new_ones() -> None:
    points = correlated(5)
    same = staging.smoothed(points, 50, torch.Generator().manual_seed(0), 0.0)
    assert torch.cdist(same, points).min(1).values.max() < 1e-5
    other = staging.smoothed(points, 50, torch.Generator().manual_seed(0), 0.6)
    assert torch.cdist(other, points).min(1).values.median() > 0.1


def test_drawn_poses_keep_their_shape() -> None:
    points = torch.rand(6, 2, 5, 2)
    assert staging.smoothed(points, 3, torch.Generator(), 0.5).shape == (3, 2, 5, 2)


# ---- views and samples of a finished stage 04 at smoke ------------------------------------------


@pytest.fixture(scope="module")
def run() -> ldm.LdmRun:
    return ldm.ensure(SMOKE)


@pytest.fixture(scope="module")
def painter(run: ldm.LdmRun) -> painting.Painter:
    return painting.painter(run.folder, SMOKE)


def shares(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of any animal, and of the mouse among them, for each view."""
    maps = structure.drawn_maps(views)
    animal = maps[:, structure.FIRST_ANIMAL_PART : structure.MOUSE].sum((1, 2, 3))
    return animal, maps[:, structure.MOUSE].sum((1, 2)) / animal


@pytest.mark.parametrize("label", ["cat", "mouse", "tom"])
def test_views_show_the_animals_of_their_label(painter: painting.Painter, label: str) -> None:
    views = painter.stage.views(label, 12, torch.Generator().manual_seed(3))
    own = painter.stage.natural if label in ("cat", "mouse") else painter.stage.cartoon
    assert views.shape == (12, *own.views.shape[1:])
    animal, mouse = shares(views)
    size = structure.drawn_maps(views)[0, 0].numel()
    assert (animal / size > 0.02).all() and (animal / size < 0.7).all()
    assert bool((mouse > 0.5).float().mean() > 0.8) == (label == "mouse")


def test_no_view_is_a_training_picture_and_its_room_is_one(painter: painting.Painter) -> None:
    data = painter.stage.natural
    views = painter.stage.views("cat", 8, torch.Generator().manual_seed(0))
    known = data.views.float()
    whole = torch.cdist(views.flatten(1), known.flatten(1)).min(1).values
    apart = torch.cdist(known.flatten(1), known.flatten(1)).fill_diagonal_(1e9).min(1).values
    assert (whole > 0.2 * apart.median()).all()
    tones = torch.cdist(views[:, -3:].flatten(1), known[:, -3:].flatten(1)).min(1).values
    assert tones.max() < 1e-2  # half precision


def test_the_generator_decides(painter: painting.Painter) -> None:
    one, same, other = (
        painter.stage.views("mouse", 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_label_without_pictures_takes_its_domains(run: ldm.LdmRun) -> None:
    natural = ldm.LatentSet(**vars(run.natural))
    natural.labels = torch.full_like(natural.labels, LABELS.index("cat"))
    images = torch.from_numpy(painting.pictures_of(run.natural, SMOKE))
    nets = posture.load_posture(model_source(SMOKE.transfer.posture))
    stage = staging.stage_for(run.cartoon, natural, images, nets)
    _, mouse = shares(stage.views("mouse", 6, torch.Generator().manual_seed(0)))
    assert (mouse > 0.5).float().mean() > 0.8


def test_samples_are_the_stages_own_and_depend_on_the_seed(
    painter: painting.Painter, run: ldm.LdmRun
) -> None:
    again = painter.draw_all(SMOKE.ldm.samples_per_class)
    assert all(np.array_equal(again[label], run.samples[label]) for label in LABELS)
    assert not np.array_equal(painter.draw("cat", 2, seed=1), painter.draw("cat", 2, seed=2))


def test_the_finished_model_ends_its_drawings_as_it_was_finished(
    painter: painting.Painter, run: ldm.LdmRun
) -> None:
    assert painter.finished == SMOKE.ldm.sample_steps
    finished, trained = painter.unet.state_dict(), run.unet.state_dict()
    assert any(not torch.equal(trained[name], finished[name]) for name in trained)
    before = [part.state_dict() for part in (run.unet, run.vae)]
    for part, state in zip(painter.trained, before, strict=True):  # which draws cartoons
        assert all(torch.equal(v, part.state_dict()[k]) for k, v in state.items())
    encoder = {k: v for k, v in run.vae.state_dict().items() if k.startswith("encoder.")}
    assert all(torch.equal(v, painter.vae.state_dict()[k]) for k, v in encoder.items())
