"""The denoiser: the poster's loss in three parametrisations, conditions, guidance, sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from diffusers import UNet2DConditionModel

from tomjerry_utils import UserError, sampling
from tomjerry_utils import denoiser as dn
from tomjerry_utils.scenes import LABELS

KINDS = ("sample", "epsilon", "v_prediction")


def conditioner(attention: str | None = None, *, source_channels: int = 3) -> dn.Conditioner:
    torch.manual_seed(0)
    return dn.Conditioner(
        text_dim=tiny.TEXT_DIM, dim=32, attention=attention,
        source_channels=source_channels if attention else 0,
    ).eval()  # fmt: skip


def unet(inputs: int = 7) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return tiny.tiny_unet(inputs, 4).eval()


# ---- parametrisations --------------------------------------------------------------------------


def at(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ of the plain schedule, which never reaches pure noise."""
    total = dn.make_scheduler("epsilon").alphas_cumprod[timesteps][:, None, None, None]
    return total.sqrt(), (1 - total).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_from_x0_inverts_to_x0(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    output, noisy = torch.randn(2, 4, 4, 8, 8, generator=generator)
    alpha, sigma = at(torch.tensor([5, 300, 700, 950]))
    x0 = dn.to_x0(output, noisy, alpha, sigma, kind)
    assert torch.allclose(dn.from_x0(x0, noisy, alpha, sigma, kind), output, atol=2e-3)


def test_the_truth_is_the_truth_in_every_parametrisation() -> None:
    generator = torch.Generator().manual_seed(0)
    z, eta = torch.randn(2, 3, 4, 8, 8, generator=generator)
    alpha, sigma = at(torch.tensor([50, 400, 900]))
    noisy = alpha * z + sigma * eta
    for kind, true in (("sample", z), ("epsilon", eta), ("v_prediction", alpha * eta - sigma * z)):
        assert torch.allclose(dn.from_x0(z, noisy, alpha, sigma, kind), true, atol=1e-4)
        loss = dn.weighted_loss(true, z, eta, alpha, sigma, kind, 5.0)
        assert loss.abs().max() < 1e-6
    with pytest.raises(ValueError, match="prediction_type 'x'"):
        dn.to_x0(z, noisy, alpha, sigma, "x")


def test_one_predictor_has_one_loss_whatever_it_predicts() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([1, 50, 300, 600, 900, 999])
    z, eta, guess = torch.randn(3, len(steps), 4, 8, 8, generator=generator)
    alpha, sigma = at(steps)
    noisy = alpha * z + sigma * eta
    losses = [
        dn.weighted_loss(
            dn.from_x0(guess, noisy, alpha, sigma, kind), z, eta, alpha, sigma, kind, 5.0
        )
        for kind in KINDS
    ]
    assert torch.allclose(losses[0], losses[1], rtol=2e-3)
    assert torch.allclose(losses[0], losses[2], rtol=2e-3)
    # And it is the poster's ‖ẑ − z‖², weighted by the SNR between 1 and γ.
    snr = (alpha / sigma).square().flatten()
    plain = (guess - z).square().flatten(1).mean(1)
    assert torch.allclose(losses[0], snr.clamp(1.0, 5.0) * plain, rtol=1e-4)
    assert snr.min() < 0.01
    assert snr.max() > 100
    # Control: without its own weight, the noise form of this loss is another one.
    raw = (dn.from_x0(guess, noisy, alpha, sigma, "epsilon") - eta).square().flatten(1).mean(1)
    assert not torch.allclose(raw, losses[0], rtol=0.1)


def test_the_last_step_is_pure_noise_but_for_epsilon() -> None:
    assert dn.make_scheduler("sample").alphas_cumprod[-1] == 0
    assert dn.make_scheduler("v_prediction").alphas_cumprod[-1] == 0
    assert dn.make_scheduler("epsilon").alphas_cumprod[-1] > 0
    scheduler = dn.make_scheduler("sample")
    scheduler.set_timesteps(6)
    assert scheduler.timesteps[0] == 999
    z = torch.ones(1, 4, 8, 8)
    eta = torch.zeros_like(z)
    assert scheduler.add_noise(z, eta, torch.tensor([999])).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_finite_and_has_gradients_everywhere(kind: str) -> None:
    model, writer = unet().train(), conditioner("ldm").train()
    batch = tiny.random_batch(6)
    loss, x0, steps = dn.denoising_loss(
        model, writer, batch, dn.make_scheduler(kind), torch.Generator().manual_seed(0), gamma=5.0
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert x0.shape == batch.latents.shape
    assert steps.shape == (6,)
    missing = [name for m in (model, writer) for name, p in m.named_parameters() if p.grad is None]
    assert missing == []


# ---- learning ----------------------------------------------------------------------------------


def test_the_loss_falls_and_shuffled_classes_stop_it_from_using_them() -> None:
    """Latents that only their class tells apart, read where noise hides them."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(6, 4, 1, 1, generator=generator)
    scheduler = dn.make_scheduler("sample")

    def batch(shuffled: bool) -> dn.Batch:
        labels = torch.randint(6, (16,), generator=generator)
        latents = means[labels] + 0.1 * torch.randn(16, 4, 8, 8, generator=generator)
        told = labels[torch.randperm(16, generator=generator)] if shuffled else labels
        mask = torch.zeros(16, 6, dtype=torch.long)
        return dn.Batch(latents, told, torch.zeros(16, 6, tiny.TEXT_DIM), mask, torch.zeros(0))

    def hidden(model: UNet2DConditionModel, writer: dn.Conditioner) -> float:
        """Error of ẑ where noise hides nearly all, told the right class."""
        errors = []
        with torch.no_grad():
            for _ in range(6):
                seen, steps = batch(False), torch.full((16,), 800)
                eta = torch.randn(seen.latents.shape, generator=generator)
                noisy = scheduler.add_noise(seen.latents, eta, steps)
                out = dn.predict(model, writer, noisy, steps, seen)
                errors.append(float((out - seen.latents).square().mean()))
        return sum(errors) / len(errors)

    def train(shuffled: bool) -> tuple[float, float, float]:
        model, writer = unet(4).train(), conditioner().train()
        optimizer = torch.optim.AdamW([*model.parameters(), *writer.parameters()], lr=3e-3)
        losses = []
        for _ in range(80):
            loss, _, _ = dn.denoising_loss(
                model, writer, batch(shuffled), scheduler, generator, gamma=5.0
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[:5]) / 5, sum(losses[25:30]) / 5, hidden(model.eval(), writer.eval())

    first, thirty, told = train(shuffled=False)
    assert thirty < 0.5 * first
    assert told < 0.75 * train(shuffled=True)[2]


# ---- conditions --------------------------------------------------------------------------------


def test_drop_leaves_out_each_condition_at_its_own_rate() -> None:
    batch = tiny.random_batch(4000, size=1)
    batch.mask[:] = 1
    generator = torch.Generator().manual_seed(0)
    out = dn.drop(batch, labels=0.3, captions=0.1, view=0.6, generator=generator)
    gone = {
        "labels": out.labels == dn.NO_CLASS,
        "captions": out.mask.sum(1) == 0,
        "view": (out.view == 0).flatten(1).all(1),
    }
    for name, share in (("labels", 0.3), ("captions", 0.1), ("view", 0.6)):
        assert gone[name].float().mean() == pytest.approx(share, abs=0.03), name
    both = (gone["labels"] & gone["view"]).float().mean()
    assert both == pytest.approx(0.18, abs=0.03)  # drawn apart
    assert torch.equal(out.labels[~gone["labels"]], batch.labels[~gone["labels"]])
    kept = dn.drop(batch, labels=0, captions=0, view=0, generator=generator)
    assert torch.equal(kept.view, batch.view)
    assert torch.equal(kept.mask, batch.mask)
    none = dn.drop(batch, labels=1.1, captions=1.1, view=1.1, generator=generator)
    assert (none.labels == len(LABELS)).all()
    assert none.view.abs().max() == 0
    assert none.mask.sum() == 0


def test_drop_hides_the_source_with_the_view() -> None:
    batch = tiny.random_batch(200, size=1)
    batch.source = batch.view.clone()
    out = dn.drop(batch, labels=0, captions=0, view=0.5, generator=torch.Generator().manual_seed(0))
    assert out.source is not None
    assert torch.equal(out.source == 0, out.view == 0)


def test_a_row_without_a_caption_says_so_and_nothing_else() -> None:
    writer = conditioner()
    torch.nn.init.normal_(writer.no_text)
    batch = tiny.random_batch(3)
    tokens, mask = writer(batch.labels, batch.text, batch.mask)
    assert tokens.shape == (3, 7, 32)
    assert mask.tolist()[0] == [1, 1, 1, 1, 1, 0, 0]
    assert mask.tolist()[1] == [1] * 7
    other = batch.text + 3
    changed, _ = writer(batch.labels, other, batch.mask)
    assert torch.equal(changed[1], tokens[1])
    assert not torch.allclose(changed[0], tokens[0])


@pytest.mark.parametrize("reading", ["poster", "ldm"])
def test_source_attention_in_both_readings(reading: str) -> None:
    torch.manual_seed(0)
    attention = dn.SourceAttention(reading, 3, tiny.TEXT_DIM, 32)
    source = torch.randn(2, 3, 8, 8)
    text = torch.randn(2, 6, tiny.TEXT_DIM)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    out = attention(source, text, mask)
    # "poster": a token of z^C for each word; "ldm": one for each place of the pooled source.
    assert out.shape == ((2, 6, 32) if reading == "poster" else (2, 16, 32))
    queries = tiny.TEXT_DIM if reading == "poster" else 3
    assert attention.to_q.in_features == queries
    assert attention.to_k.in_features == attention.to_v.in_features == tiny.TEXT_DIM + 3 - queries
    # Padding is never attended to; where each word asks for itself, a pad concerns its own row.
    padded = text.clone()
    padded[:, 4:] += 5
    again = attention(source, padded, mask)
    rows = slice(0, 4) if reading == "poster" else slice(None)
    assert torch.allclose(again[:, rows], out[:, rows], atol=1e-6)
    # Control: words and source are attended to.
    assert not torch.allclose(attention(source, text + 1, mask), out)
    assert not torch.allclose(attention(source.flip(3) * 2, text, mask), out)


def test_attention_is_the_formula_on_the_poster() -> None:
    torch.manual_seed(0)
    attention = dn.SourceAttention("poster", 3, tiny.TEXT_DIM, 32)
    source, y = torch.randn(1, 3, 4, 4), torch.randn(1, 6, tiny.TEXT_DIM)
    z = torch.nn.functional.avg_pool2d(source, 2).flatten(2).transpose(1, 2)
    q = y @ attention.to_q.weight.T
    k, v = z @ attention.to_k.weight.T, z @ attention.to_v.weight.T
    zc = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v
    mask = torch.ones(1, 6, dtype=torch.long)
    assert torch.allclose(attention(source, y, mask), attention.out(zc), atol=1e-6)
    with pytest.raises(ValueError, match="neither 'poster' nor 'ldm'"):
        dn.SourceAttention("both", 3, 4, 4)


@pytest.mark.parametrize(("reading", "more"), [("poster", 6), ("ldm", 16)])
def test_with_attention_adds_tokens_that_start_silent(reading: str, more: int) -> None:
    plain = conditioner()
    rich = dn.with_attention(plain, reading, 3).eval()
    batch = tiny.random_batch(2)
    before, _ = plain(batch.labels, batch.text, batch.mask)
    after, mask = rich(batch.labels, batch.text, batch.mask, batch.view)
    assert after.shape[1] == before.shape[1] + more == mask.shape[1]
    assert torch.equal(after[:, : before.shape[1]], before)
    assert after[:, before.shape[1] :].abs().max() == 0
    assert dn.with_attention(rich, None, 0).attend is None


def test_widen_starts_unchanged() -> None:
    narrow = unet(4)
    wide = unet(4)
    state = torch.get_rng_state()
    dn.widen(wide, 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert wide.config.in_channels == 9
    x, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = narrow(x, 10, tokens).sample
        got = wide(torch.cat([x, torch.randn(2, 5, 8, 8)], 1), 10, tokens).sample
    assert torch.allclose(expected, got, atol=1e-6)
    dn.widen(wide, 9)
    assert wide.conv_in.in_channels == 9


# ---- sampling ----------------------------------------------------------------------------------


def draw(seed: int = 0, **options: object) -> torch.Tensor:
    settings: dict = {"steps": 3, "guidance_scale": 1.0} | options
    return sampling.sample(
        unet(), conditioner(), tiny.random_batch(3), dn.make_scheduler("sample"),
        generator=torch.Generator().manual_seed(seed), **settings,
    )  # fmt: skip


def test_sampling_is_a_function_of_its_seed() -> None:
    assert draw().shape == (3, 4, 8, 8)
    assert torch.equal(draw(), draw())
    assert not torch.allclose(draw(), draw(1))


def test_guidance_moves_away_from_the_unconditional_model() -> None:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one, three = draw(noise=noise), draw(noise=noise, guidance_scale=3.0)
    assert not torch.allclose(one, three)
    # One step from pure noise is ẑ_∅ + w (ẑ_c − ẑ_∅), which is linear in w.
    zero, one, two = (draw(noise=noise, steps=1, guidance_scale=w) for w in (0.0, 1.0, 2.0))
    assert torch.allclose(two - one, one - zero, atol=1e-4)
    assert (one - zero).abs().max() > 1e-4


def test_a_guide_sees_every_prediction() -> None:
    seen = []

    def guide(x0: torch.Tensor, done: float) -> torch.Tensor:
        seen.append(done)
        return torch.full_like(x0, 0.25)

    assert torch.allclose(draw(guide=guide), torch.full((3, 4, 8, 8), 0.25), atol=1e-4)
    assert seen == pytest.approx([0, 1 / 3, 2 / 3])


def test_a_start_is_kept_more_the_less_it_is_noised() -> None:
    start = 2 * torch.ones(3, 4, 8, 8)

    def guide(x0: torch.Tensor, done: float) -> torch.Tensor:
        calls.append(done)
        return x0

    calls: list[float] = []
    draw(start=start, strength=0.3, steps=10, guide=guide)
    assert len(calls) == 3
    # A model that returns what it is told cannot show it; the noised start itself can.
    scheduler = dn.make_scheduler("sample")
    scheduler.set_timesteps(10)
    noise = torch.zeros_like(start)
    little, much = (
        scheduler.add_noise(start, noise, t.repeat(3)) for t in scheduler.timesteps[[7, 1]]
    )
    assert little.mean() > much.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parametrisation_samples_finite_latents(kind: str) -> None:
    out = sampling.sample(
        unet(), conditioner(), tiny.random_batch(2), dn.make_scheduler(kind), steps=4,
        guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.isfinite(out).all()


# ---- files -------------------------------------------------------------------------------------


def test_a_saved_unet_loads_in_plain_diffusers(tmp_path: Path) -> None:
    model, writer = unet(), conditioner("poster")
    dn.save_denoiser(model, writer, tmp_path)
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    again, writer2 = dn.load_denoiser(tmp_path, text_dim=1, latent_channels=1, factor=1)
    x, tokens = torch.randn(1, 7, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = model(x, 10, tokens).sample
        assert torch.equal(plain(x, 10, tokens).sample, expected)
        assert torch.equal(again.eval()(x, 10, tokens).sample, expected)
    batch = tiny.random_batch(2)
    told = (batch.labels, batch.text, batch.mask, batch.view)
    assert torch.equal(writer2(*told)[0], writer(*told)[0])
    assert list((tmp_path / "unet").glob("*.safetensors"))


def test_a_foreign_unet_gets_a_new_conditioner(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "pipe" / "unet")
    model, writer = dn.load_denoiser(
        tmp_path / "pipe", "unet", text_dim=48, latent_channels=4, factor=8
    )
    assert writer.config.text_dim == 48
    assert writer.config.dim == model.config.cross_attention_dim == 32
    with pytest.raises(UserError, match=r"no denoiser in .*tomjerry foundation denoiser"):
        dn.load_denoiser(tmp_path / "none", text_dim=1, latent_channels=1, factor=1)


def test_equal_captions_are_encoded_once() -> None:
    class Counting:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def text_tokens(self, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.seen += texts
            values = torch.tensor([float(len(text)) for text in texts])
            return values[:, None, None].expand(-1, length, 2), torch.ones(len(texts), length)

    blip = Counting()
    table, masks, row = dn.repeat_texts(["bb", "a", "bb", "ccc"], blip, 5)
    assert blip.seen == ["a", "bb", "ccc"]
    assert table.shape == (3, 5, 2)
    assert masks.shape == (3, 5)
    assert table[row][:, 0, 0].tolist() == [2, 1, 2, 3]
