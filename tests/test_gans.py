"""CUT and CycleGAN: each player minimises its own loss, and a domain shift is learnt from them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import Clock
from torch import Tensor, nn

from tomjerry_utils import UserError, training
from tomjerry_utils.gan_nets import (
    Generator,
    ImagePool,
    PatchHeads,
    discriminator,
    discriminator_loss,
    lsgan,
    patch_nce,
)
from tomjerry_utils.gans import KINDS, POOL, Cut, CycleGan, Gan, GanSettings, load_gan, train_gan

SIZE = 16
TINY = GanSettings(width=8, blocks=2, discriminator_width=8)
DARK, WARM = (40, 40, 70), (230, 60, 20)


def blobs(count: int, ground: tuple[int, int, int], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, SIZE, SIZE, 3) with one soft light blob each, and its place (x, y)."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(4, SIZE - 5, (count, 2))
    ys, xs = np.mgrid[:SIZE, :SIZE]
    away = (xs - places[:, :1, None]) ** 2 + (ys - places[:, 1:, None]) ** 2
    light = np.exp(-away / (2 * 2.0**2))[..., None]
    pictures = np.array(ground) + 60 * light + rng.normal(0, 2, (count, SIZE, SIZE, 3))
    return pictures.clip(0, 255).astype(np.uint8), places


def where(pictures: np.ndarray) -> np.ndarray:
    """The place (x, y) of what is lighter than the rest."""
    grey = pictures.astype(float).mean(3)
    light = (grey - np.quantile(grey, 0.8, axis=(1, 2), keepdims=True)).clip(0)
    mass = light.sum((1, 2)) + 1e-9
    spots = np.arange(SIZE)
    return (
        np.stack([(light.sum(1) * spots).sum(1), (light.sum(2) * spots).sum(1)], 1) / mass[:, None]
    )


def pair(count: int = 2, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    one, two = (torch.rand(count, 3, SIZE, SIZE, generator=rng) * 2 - 1 for _ in range(2))
    return one, two


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def fresh(kind: str, settings: GanSettings = TINY) -> Cut | CycleGan:
    torch.manual_seed(1)
    return Cut(settings) if kind == "cut" else CycleGan(settings, SIZE)


# ---- losses ------------------------------------------------------------------------------------


def test_lsgan_is_the_squared_distance() -> None:
    scores = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    assert lsgan(scores, real=True).item() == pytest.approx((0 + 0.25 + 4 + 1) / 4)
    assert lsgan(scores, real=False).item() == pytest.approx((1 + 0.25 + 1 + 4) / 4)


def test_a_discriminator_pays_half_for_each_kind() -> None:
    """On a net that answers with a picture's mean."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        net[1].weight.fill_(1)
        net[1].bias.fill_(0)
    real, fake = torch.full((3, 1, 4, 4), 0.7), torch.full((1, 1, 4, 4), 0.4, requires_grad=True)
    loss = discriminator_loss(net, real, fake)
    assert loss.item() == pytest.approx(0.5 * (0.3**2 + 0.4**2))
    loss.backward()
    assert fake.grad is None
    assert net[1].weight.grad is not None


def test_patch_nce_by_hand() -> None:
    """Each patch against those of its own picture, by the formula written out."""
    draw = np.random.default_rng(0).normal(size=(2, 2, 3, 4))
    queries, keys = draw / np.linalg.norm(draw, axis=3, keepdims=True)
    terms = []
    for b in range(2):
        for p in range(3):
            alike = [math.exp(queries[b, p] @ keys[b, other] / 0.07) for other in range(3)]
            terms.append(-math.log(alike[p] / sum(alike)))
    found = patch_nce(torch.tensor(queries), torch.tensor(keys))
    assert found.item() == pytest.approx(sum(terms) / 6, rel=1e-4)


def test_patch_nce_wants_each_patch_at_its_own_place() -> None:
    keys = torch.eye(3)[None].requires_grad_()
    right = torch.eye(3)[None].requires_grad_()
    assert patch_nce(right, keys, 0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    wrong = patch_nce(right[:, [1, 2, 0]], keys, 0.5)
    assert wrong.item() == pytest.approx(math.log(math.exp(2) + 2))
    wrong.backward()
    assert keys.grad is None
    assert right.grad is not None


# ---- one loss for two players ------------------------------------------------------------------


def gradients(nets: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    nets.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in nets.named_parameters() if p.grad is not None}


def cut_in_turn(nets: Any, cartoon: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    """CUT's two losses as its authors take them: one encoding after the other, set by set.

    In pictures as small as these every place of every layer is among the 256 that are drawn.
    """

    def nce(source: Tensor, made: Tensor) -> Tensor:
        layers = zip(nets.generator.encode(source), nets.generator.encode(made), strict=True)
        terms = []
        for (before, after), head in zip(layers, nets.heads.heads, strict=True):
            key, query = (
                F.normalize(head(x.flatten(2).transpose(1, 2)), dim=2) for x in (before, after)
            )
            terms.append(patch_nce(query, key.detach()))
        return sum(terms, torch.zeros(())) / 5

    fake = nets.generator(cartoon)
    both = (nce(cartoon, fake) + nce(natural, nets.generator(natural))) / 2
    player = lsgan(nets.discriminator(fake), real=True) + TINY.lambda_nce * both
    return player, opponent(nets.discriminator, natural, fake)


def cyclegan_in_turn(nets: Any, cartoon: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
    fake_natural, fake_cartoon = nets.generator(cartoon), nets.inverse(natural)
    player = (
        lsgan(nets.discriminator(fake_natural), real=True)
        + lsgan(nets.inverse_discriminator(fake_cartoon), real=True)
        + 10 * (nets.inverse(fake_natural) - cartoon).abs().mean()
        + 10 * (nets.generator(fake_cartoon) - natural).abs().mean()
        + 5 * (nets.generator(natural) - natural).abs().mean()
        + 5 * (nets.inverse(cartoon) - cartoon).abs().mean()
    )
    other = opponent(nets.discriminator, natural, fake_natural)
    return player, other + opponent(nets.inverse_discriminator, cartoon, fake_cartoon)


def opponent(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return ((net(real) - 1) ** 2).mean() / 2 + (net(fake.detach()) ** 2).mean() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_loss_has_the_gradients_of_two(kind: str) -> None:
    nets = fresh(kind).double()
    cartoon, natural = (images.double() for images in pair())
    in_turn: Callable[..., tuple[Tensor, Tensor]] = (
        cut_in_turn if kind == "cut" else cyclegan_in_turn
    )
    loss, numbers = nets.loss(cartoon, natural, rng())
    together = gradients(nets, loss)
    first = gradients(nets, in_turn(nets, cartoon, natural)[0])
    second = gradients(nets, in_turn(nets, cartoon, natural)[1])
    both = gradients(nets, sum(in_turn(nets, cartoon, natural), torch.zeros(())))

    assert together.keys() == {name for name, _ in nets.named_parameters()}
    leaked = 0
    for name, gradient in together.items():
        own = second if "discriminator" in name else first
        assert (gradient - own[name]).norm() < 1e-4 * own[name].norm() + 1e-6, name
        # Control: the plain sum of both losses would have each discriminator work against itself.
        leaked += bool((gradient - both[name]).norm() > 0.1 * gradient.norm())
    assert leaked
    assert second.keys() == {name for name in together if "discriminator" in name}
    player, other = in_turn(nets, cartoon, natural)
    assert loss.item() == pytest.approx((player + other).item(), rel=1e-4)
    assert numbers["discriminator"].item() == pytest.approx(other.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "without"), [("cut", {"nce_identity": False}), ("cyclegan", {"lambda_identity": 0.0})]
)
def test_identity_terms_can_be_left_out(kind: str, without: dict[str, Any]) -> None:
    nets, (cartoon, natural) = fresh(kind, GanSettings(**{**vars(TINY), **without})), pair()
    loss, numbers = nets.loss(cartoon, natural, rng())
    assert "identity" not in numbers
    if kind == "cut":
        # Natural pictures then teach the discriminator alone.
        other = nets.loss(cartoon, natural.flip(2), rng())[1]
        assert torch.equal(other["nce"], numbers["nce"])
        assert not torch.equal(fresh("cut").loss(cartoon, natural, rng())[1]["nce"], other["nce"])
    assert torch.isfinite(loss)


# ---- nets --------------------------------------------------------------------------------------


def test_the_pool_gives_half_from_earlier_once_it_is_full() -> None:
    pool, draw = ImagePool(10, 2), rng()
    numbers = torch.arange(410.0).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 2, 2)
    given = [int(pool(fake, draw)[0, 0, 0, 0]) for fake in numbers]
    assert given[:10] == list(range(10))
    old = [number != now for now, number in enumerate(given)][10:]
    assert 0.4 < np.mean(old) < 0.6
    assert all(number <= now for now, number in enumerate(given))
    # What was given back is gone; the first ten were given on their way in as well.
    assert len(set(given[10:])) == 400
    assert not set(pool.images[:, 0, 0, 0].tolist()) & set(given[10:])
    assert len(set(pool.images[:, 0, 0, 0].tolist())) == 10


def test_discriminators_see_patches() -> None:
    """A score depends on 34 px of the picture where no norm tells it of the rest."""
    net = discriminator(8, 2)
    for i, layer in enumerate(net):
        if isinstance(layer, nn.InstanceNorm2d):
            net[i] = nn.Identity()
    picture = torch.randn(1, 3, 64, 64, requires_grad=True)
    scores = net(picture)
    assert scores.shape == (1, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    assert picture.grad is not None
    rows = picture.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 34


def test_the_generators_layers_are_the_papers() -> None:
    net = Generator(8, 9)
    picture = torch.randn(1, 3, 32, 32)
    layers = net.encode(picture)
    assert [tuple(x.shape[1:]) for x in layers] == [
        (3, 32, 32), (16, 16, 16), (32, 8, 8), (32, 8, 8), (32, 8, 8),
    ]  # fmt: skip
    assert net.middle == 5
    assert tuple(x.shape[1] for x in layers) == net.feature_channels
    assert torch.equal(net(picture), net.decode(layers[-1]))
    assert net(picture).abs().max() <= 1


def test_heads_put_the_patches_of_given_places_on_the_sphere() -> None:
    heads = PatchHeads((3, 8))
    layers = [torch.randn(2, 3, 4, 5), torch.randn(2, 8, 2, 2)]
    found = heads(layers, [torch.tensor([7, 0]), torch.tensor([3])])
    assert [tuple(x.shape) for x in found] == [(2, 2, 256), (2, 1, 256)]
    for point, head, patch in (
        (found[0][1, 0], heads.heads[0], layers[0][1, :, 1, 2]),
        (found[1][0, 0], heads.heads[1], layers[1][0, :, 1, 1]),
    ):
        raw = head(patch)
        assert torch.allclose(point, raw / raw.norm(), atol=1e-5)


def test_pictures_of_any_size_are_translated() -> None:
    gan = Gan("cut", fresh("cut").generator.eval(), TINY)
    drawn = np.random.default_rng(0).integers(0, 256, (3, 21, 34, 3), dtype=np.uint8)
    made = gan.translate(drawn, batch_size=2)
    assert made.shape == drawn.shape and made.dtype == np.uint8
    alone = gan.translate(drawn[2:])
    assert np.abs(made[2:].astype(int) - alone).max() <= 1
    assert not np.array_equal(made[0], made[1])


# ---- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gan:
    cartoon, _ = blobs(64, DARK, seed=1)
    natural, _ = blobs(64, WARM, seed=2)
    return train_gan(
        request.param,
        cartoon,
        natural,
        folder=tmp_path_factory.mktemp(request.param),
        seed=0,
        steps=80,
        settings=TINY,
        batch_size=2,
        learning_rate=1e-3,
        ema_decay=0.9,
        device="cpu",
        threads=1,
    )


def moved(made: np.ndarray) -> float:
    """How far the mean colour has come from the dark set's to the warm set's; 1 is there."""
    start, end = (blobs(64, c, seed=9)[0].mean((0, 1, 2)) for c in (DARK, WARM))
    return float((made.mean((0, 1, 2)) - start) @ (end - start) / ((end - start) @ (end - start)))


def follows(made: np.ndarray, places: np.ndarray) -> float:
    """Correlation of the blobs' places with the sources', the smaller of both axes."""
    found = where(made)
    return min(float(np.corrcoef(found[:, i], places[:, i])[0, 1]) for i in (0, 1))


def test_a_domain_shift_is_learnt_from_unpaired_pictures(learnt: Gan) -> None:
    source, places = blobs(40, DARK, seed=3)
    assert follows(source, places) > 0.95
    made = learnt.translate(source)
    assert moved(made) == pytest.approx(1, abs=0.3)
    assert follows(made, places) > 0.7
    # Controls: other pictures' places, and nets that learnt nothing.
    assert abs(follows(made, np.roll(places, 1, axis=0))) < 0.5
    untrained = Gan(learnt.kind, fresh(learnt.kind).generator.eval(), TINY)
    assert abs(moved(untrained.translate(source)) - 1) > 0.3
    assert learnt.facts["steps"] == 80
    assert learnt.facts["parameters"]["generator"] == sum(
        p.numel() for p in learnt.generator.parameters()
    )


def test_saved_and_loaded_gans_are_equal(learnt: Gan, tmp_path: Path) -> None:
    learnt.save(tmp_path / "kept")
    again = load_gan(tmp_path / "kept")
    source, _ = blobs(3, DARK, seed=4)
    assert np.array_equal(again.translate(source), learnt.translate(source))
    assert (again.kind, again.settings, again.facts) == (learnt.kind, TINY, learnt.facts)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_unusable_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no GAN in .*nowhere: need config\.json"):
        load_gan(tmp_path / "nowhere")
    kept = tmp_path / "kept"
    gan = Gan("cut", fresh("cut").generator, TINY, {"steps": 1})
    gan.save(kept)
    assert load_gan(kept).facts == {"steps": 1}
    config = json.loads((kept / "config.json").read_text())
    wider = {**config, "settings": {**config["settings"], "width": 16}}
    for broken in (wider, {**config, "kind": "magic"}, {"kind": "cut"}, []):
        (kept / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"kept: not a GAN that can be read \([^\n]+train it"):
            load_gan(kept)
    gan.save(kept)
    (kept / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a GAN that can be read"):
        load_gan(kept)


class PowerCut(Exception):
    pass


def short(kind: str, folder: Path, **changes: Any) -> Gan:
    plain: dict[str, Any] = {
        "steps": 16,
        "seed": 3,
        "settings": TINY,
        "batch_size": 8 if kind == "cyclegan" else 2,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
    }
    return train_gan(
        kind,
        blobs(12, DARK, seed=1)[0],
        blobs(10, WARM, seed=2)[0],
        folder=folder,
        **plain | changes,
    )


def stopped(kind: str, folder: Path, at: int) -> Path:
    """A run that died at a step, having written a checkpoint at the one before."""

    def cut_off(step: int, modules: dict[str, nn.Module]) -> None:
        if step == at:
            raise PowerCut

    with pytest.raises(PowerCut):
        short(kind, folder, checkpoint_every_s=0.0, on_log=cut_off)
    (checkpoint,) = (folder / "checkpoint").iterdir()
    assert checkpoint.name == f"{at - 1:08d}"
    return checkpoint


def same(one: Gan, two: Gan) -> bool:
    pairs = zip(one.generator.parameters(), two.generator.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    """Died at step 11 of 16, when CycleGAN's pools have been full since step 7."""
    whole = short(kind, tmp_path / "whole")
    checkpoint = stopped(kind, tmp_path / "cut", at=11)
    shutil.copytree(tmp_path / "cut", tmp_path / "emptied")
    resumed = short(kind, tmp_path / "cut")
    assert same(resumed, whole)
    assert resumed.facts["steps"] == whole.facts["steps"] == 16
    assert not same(short(kind, tmp_path / "other", seed=4), whole)
    if kind == "cyclegan":
        # Control: without the past fakes of its checkpoint the run goes elsewhere.
        file = tmp_path / "emptied" / "checkpoint" / checkpoint.name / "weights.safetensors"
        weights = load_file(file)
        assert weights["natural_pool/filled"].item() == POOL
        assert weights["natural_pool/images"].std() > 0.05
        save_file({**weights, "natural_pool/images": weights["natural_pool/images"] * 0}, file)
        assert not same(short(kind, tmp_path / "emptied"), whole)


def test_a_budget_of_seconds_ends_a_run_that_a_larger_one_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "time", Clock())

    def within(seconds: float) -> Gan:
        made = short("cut", tmp_path / "part", seconds=seconds, steps=None, batch_size=1)
        rows = (tmp_path / "part" / "history.jsonl").read_text().splitlines()
        taken = [0.0, *(json.loads(row)["seconds"] for row in rows)]
        assert taken[-2] < seconds <= taken[-1], "the step that uses it up is the last"
        assert made.facts["steps"] == len(rows) >= 1
        return made

    first = within(0.6)
    again = within(0.6)
    assert again.facts["steps"] == first.facts["steps"]
    assert same(again, first)
    # The first call's seconds count, and the weights are those of one run of as many steps.
    longer = within(1.5)
    whole = short("cut", tmp_path / "whole", steps=longer.facts["steps"], batch_size=1)
    assert same(whole, longer)
    assert not same(whole, first)


def test_wrong_calls_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GAN 'magic': choose from cut, cyclegan"):
        short("magic", tmp_path)
    with pytest.raises(ValueError, match="need steps"):
        short("cut", tmp_path, steps=None)
    with pytest.raises(ValueError, match="constant"):
        short("cut", tmp_path, steps=None, seconds=1.0, schedule="linear")
    cartoon, natural = blobs(2, DARK, seed=1)[0], blobs(2, WARM, seed=2)[0]
    for one, two in (
        (cartoon, natural[:, :12, :12]),
        (cartoon[:, :12], natural[:, :12]),
        (cartoon[:, :12, :12], natural[:, :12, :12]),
        (np.repeat(cartoon, 3, 1)[:, :18, :16], natural),
    ):
        with pytest.raises(UserError, match="multiple of 4 and at least 16"):
            train_gan("cut", one, two, folder=tmp_path, seed=0, steps=1, settings=TINY)
    with pytest.raises(ValueError, match="uint8"):
        train_gan("cut", cartoon / 255, natural, folder=tmp_path, seed=0, steps=1)
    assert not list(tmp_path.iterdir())
