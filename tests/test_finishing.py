"""Last steps and decoder learn to make photographs of what is drawn, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tomjerry_utils import finishing, perceptual, scenes
from tomjerry_utils.autoencoder import decode, encode_all, load_autoencoder
from tomjerry_utils.denoiser import Batch, Conditioner, load_denoiser, make_scheduler
from tomjerry_utils.images import to_tensor
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import foundation_root
from tomjerry_utils.sampling import LAST_STEPS, denoise, sample, timetable
from tomjerry_utils.scenes import LABELS

SMOKE = load_profile("smoke")
PICTURES, STEPS, DRAWING = 12, 20, 4
OPTIONS = {"pictures": 9, "steps": STEPS, "batch_size": 4, "learning_rate": 4e-4}
PROFILE = SMOKE.model_copy(update={"finishing": SMOKE.finishing.model_copy(update=OPTIONS)})
HOW: dict[str, Any] = {"steps": DRAWING, "guidance_scale": 1.0, "describe": "a test"}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    seeds = range(2_810_000, 2_810_000 + PICTURES)
    return torch.from_numpy(scenes.render_many(seeds, "natural", 64, workers=1)["image"])


class World:
    """The shipped denoiser and autoencoder with conditions that name each picture's class."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.vae = load_autoencoder(foundation_root() / "autoencoder")
        self.unet, self.conditioner = load_denoiser(foundation_root() / "denoiser")
        self.unet.eval(), self.conditioner.eval()
        self.scheduler = make_scheduler("sample")
        self.own = encode_all(self.vae, pictures)
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def conditions(self, index: torch.Tensor, posed: torch.Tensor) -> Batch:
        self.asked.append((index, posed))
        latents = self.own[index]
        views = self.unet.config.in_channels - latents.shape[1]
        view = torch.zeros(len(index), views, *latents.shape[2:])
        return Batch(
            latents=latents,
            labels=LABELS.index("cat") + index % 3,
            text=torch.zeros(len(index), 2, self.conditioner.config.text_dim),
            mask=torch.zeros(len(index), 2, dtype=torch.long),
            view=view + 0.5 * posed[:, None, None, None],
        )

    def parts(self) -> tuple[object, Conditioner, object, object]:
        return self.unet, self.conditioner, self.vae, self.scheduler


@pytest.fixture(scope="module")
def world(pictures: torch.Tensor) -> World:
    return World(pictures)


@pytest.fixture(scope="module")
def drawn(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("drawn") / "drawn.safetensors"
    made = finishing.draw(
        *world.parts(), world.conditions, PROFILE, among=PICTURES, path=path, **HOW
    )  # type: ignore[arg-type]
    before = len(world.asked)
    kept = finishing.draw(
        *world.parts(), world.conditions, PROFILE, among=PICTURES, path=path, **HOW
    )  # type: ignore[arg-type]
    assert len(world.asked) == before  # read, not drawn again
    assert made.keys() == kept.keys() and all(torch.equal(made[k], kept[k]) for k in made)
    return made


def walk(world: World, drawn: dict[str, torch.Tensor], unet: torch.nn.Module) -> torch.Tensor:
    """The last steps from the kept states, by a denoiser."""
    last = timetable(world.scheduler, DRAWING)[-LAST_STEPS:]
    told = world.conditions(drawn["index"], drawn["posed"])
    with torch.no_grad():
        return denoise(unet, world.conditioner, told, drawn["state"], last, guidance_scale=1.0)  # type: ignore[arg-type]


def test_each_drawing_is_kept_before_its_last_steps(
    world: World, drawn: dict[str, torch.Tensor]
) -> None:
    assert len(drawn["index"].unique()) == OPTIONS["pictures"]  # no picture twice,
    assert torch.equal(drawn["own"], world.own[drawn["index"]])  # each beside its own latent,
    assert 0 < drawn["posed"].sum() < len(drawn["posed"])
    # and the last steps, taken from the kept state, end where the whole drawing ended.
    ends = torch.nn.functional.avg_pool2d(
        decode(world.vae, walk(world, drawn, world.unet)), finishing.CELL
    )
    assert torch.allclose(ends, drawn["colours"], atol=1e-4)
    assert (drawn["state"] - drawn["own"]).std() > 0.1


def test_a_drawing_in_two_parts_is_the_drawing_in_one(world: World) -> None:
    told = world.conditions(torch.arange(3), torch.zeros(3, dtype=torch.bool))
    noise = torch.randn(told.latents.shape, generator=torch.Generator().manual_seed(1))
    whole = sample(
        world.unet,
        world.conditioner,
        told,
        world.scheduler,
        steps=DRAWING,
        guidance_scale=2.0,
        generator=torch.Generator(),
        noise=noise,
    )
    table, latents = timetable(world.scheduler, DRAWING), noise
    for part in (table[:-LAST_STEPS], table[-LAST_STEPS:]):
        with torch.no_grad():
            latents = denoise(
                world.unet, world.conditioner, told, latents, part, guidance_scale=2.0
            )
    assert torch.equal(latents, whole)


def test_texture_comes_back_and_nothing_but_last_steps_and_decoder_changes(
    world: World, drawn: dict[str, torch.Tensor], pictures: torch.Tensor, tmp_path: Path
) -> None:
    parts = {"unet": world.unet, "conditioner": world.conditioner, "vae": world.vae}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    state = torch.get_rng_state()

    def finish() -> tuple[torch.nn.Module, torch.nn.Module]:
        return finishing.finish(
            *world.parts(),
            world.conditions,
            pictures[drawn["index"]],
            drawn,
            PROFILE,
            **HOW,
            lora_rank=0,
            grain=0.0,
            folder=tmp_path / "training",
        )  # type: ignore[arg-type]

    unet, vae = finish()
    assert torch.equal(torch.get_rng_state(), state)
    for name, part in parts.items():
        assert all(torch.equal(v, before[name][k]) for k, v in part.state_dict().items()), name
    moved = {k for k, v in vae.state_dict().items() if not torch.equal(v, before["vae"][k])}
    assert moved and all(n.startswith(("decoder.", "post_quant_conv.")) for n in moved)
    assert any(not torch.equal(v, before["unet"][k]) for k, v in unet.state_dict().items())
    assert torch.equal(encode_all(vae, pictures), world.own)
    assert vae.config.latents_mean == world.vae.config.latents_mean

    real = to_tensor(np.ascontiguousarray(pictures[drawn["index"]].numpy()))
    net = perceptual.trunk()
    with torch.no_grad():
        wanted = net(real)
        ends = [
            decode(decoder, walk(world, drawn, steps))
            for steps, decoder in ((world.unet, world.vae), (world.unet, vae), (unet, vae))
        ]
        gaps = [float(perceptual.texture_gap(net(made), wanted)) for made in ends]
        tones = torch.nn.functional.avg_pool2d(ends[2], finishing.CELL) - drawn["colours"]
        kept = (decode(vae, drawn["own"]) - real).abs().mean()
        was = (decode(world.vae, drawn["own"]) - real).abs().mean()
    assert gaps[2] < 0.95 * gaps[0]
    assert gaps[2] < gaps[1]  # the last steps have learnt their share
    # Colours stay: the drift is small beside what sets the pictures apart.
    apart = (drawn["colours"] - drawn["colours"].roll(1, 0)).abs().mean()
    assert tones.abs().mean() < 0.3 * apart
    assert kept < 1.3 * was  # photographs' own latents still come back as they were

    again = finish()
    for first, second in zip((unet, vae), again, strict=True):
        one, two = first.state_dict(), second.state_dict()
        assert all(torch.equal(value, two[name]) for name, value in one.items())
