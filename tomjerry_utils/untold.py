"""Ours, told nothing: the translator's idea without any truth from the scenes.

Stage 05 learns from natural pictures, each conditioned on its own domain-invariant view, and is
given the cartoon's view instead. Its view is read by nets that learnt from the generated scenes'
part masks, keypoints and captions. Here the same is done with a view computed from pixels alone,
alike in both domains:

- where a pixel's colours differ from those at both ends of its row, which is mostly the animals;
- edges of lightness at two scales;
- the tones of what is not different, blurred to an 8×8 grid and standardised per domain;
- a coat: mean and deviation of the colours of what is different. As in stage 05 a cartoon's is
  replaced by one from the natural training pictures.

A cartoon's maps are given the levels that natural maps have (histograms of the two unpaired sets,
no pairs), and training blurs the maps and adds noise to them, so that shapes may differ. The
autoencoder is the foundation's, with the decoder that stage 04 tuned, both from pictures alone; the
denoiser starts from nothing and hears no class, no caption and no text. In the study its settings
are chosen as every method's are, by :mod:`tuning`, whose nets were told of masks and keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils.autoencoder import decode, encode_all, factor_of
from tomjerry_utils.denoiser import make_scheduler, weighted_loss
from tomjerry_utils.images import add_grain, to_uint8
from tomjerry_utils.latents import PIXELS_AT_ONCE
from tomjerry_utils.runs import atomic_dir
from tomjerry_utils.sampling import timetable
from tomjerry_utils.training import apply_ema, train
from tomjerry_utils.translator import noise_for

if TYPE_CHECKING:
    from tomjerry_utils.profiles import Profile

TONE_CELLS = 8
SCALES = (0.25, 0.75)  # deviations of the edges' blur, in latents
MAPS = 4 * (1 + len(SCALES))  # channels of a view that hold maps, four pixels of them a latent
COAT = 6  # mean and deviation of red, green and blue
VIEW_CHANNELS = MAPS + COAT + 3
NEIGHBOURS = 16  # training pictures of the most similar tones, of which one lends its coat
LEVELS = 257  # of a map's histogram
BLUR, NOISE, DROPPED = (
    1.5,
    0.25,
    0.1,
)  # largest blur and noise of a view in training; views left out
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, EMA_DECAY = 16, 1e-3, 100, 0.998
_NO_END = 10_000_000  # steps of a run that only the clock ends


# ---- the view ----------------------------------------------------------------------------------


def look(images: np.ndarray, grid: tuple[int, int], batch_size: int = 64) -> Tensor:
    """What pixels alone tell of pictures, not yet standardised.

    Args:
        images: (N, H, W, 3) uint8.
        grid: (h, w) of the latents.

    Returns:
        (N, VIEW_CHANNELS, h, w): maps at twice the grid's resolution, coat, tones.
    """
    return torch.cat(
        [
            _look(torch.from_numpy(images[i : i + batch_size]), grid)
            for i in range(0, len(images), batch_size)
        ]
    )


def _look(images: Tensor, grid: tuple[int, int]) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = F.interpolate(pixels, size=(4 * grid[0], 4 * grid[1]), mode="area")
    small = F.avg_pool2d(pixels, 2)
    # Two thirds of the strongest contrast are enough for a figure, and a hole in it belongs to it.
    figure = _closed((1.5 * _scaled(_unlike_rim(pixels))).clamp(max=1))
    figure = F.avg_pool2d(figure, 2)
    maps = [figure]
    for scale in SCALES:
        grey = blur(pixels.mean(1, keepdim=True), 4 * scale)
        maps.append(_scaled(F.max_pool2d(_gradient(grey), 2)))
    coat = torch.cat(_moments(figure, small), 1)[:, :, None, None].expand(-1, -1, *grid)
    behind = F.adaptive_avg_pool2d((1 - figure) * small, TONE_CELLS)
    weight = F.adaptive_avg_pool2d(1 - figure, TONE_CELLS)
    everywhere = behind.mean((2, 3), keepdim=True) / weight.mean((2, 3), keepdim=True).clamp(1e-3)
    tone = (behind + 0.05 * everywhere) / (weight + 0.05)
    tone = F.interpolate(tone, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([F.pixel_unshuffle(torch.cat(maps, 1), 2), coat, tone], 1)


def _unlike_rim(pixels: Tensor) -> Tensor:
    """How far each pixel is from the colours at the nearer in colour of its row's two ends."""
    width = max(1, pixels.shape[-1] // 8)
    ends = [
        side.median(-1, keepdim=True).values for side in (pixels[..., :width], pixels[..., -width:])
    ]
    away = [(pixels - end).abs().mean(1, keepdim=True) for end in ends]
    return torch.minimum(*away)


def _closed(maps: Tensor, edge: int = 3) -> Tensor:
    """Maps without holes that are narrower than so many pixels."""
    grown = F.max_pool2d(maps, edge, 1, edge // 2)
    return -F.max_pool2d(-grown, edge, 1, edge // 2)


def _gradient(grey: Tensor) -> Tensor:
    """Sobel's magnitude of (B, 1, H, W)."""
    smooth, slope = grey.new_tensor([1.0, 2.0, 1.0]) / 4, grey.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None]
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)


def _scaled(maps: Tensor) -> Tensor:
    """Maps in units of their own picture's strong places, so that a low contrast counts as much."""
    strong = maps.flatten(1).quantile(0.95, dim=1).clamp(min=0.02)
    return (maps / strong[:, None, None, None]).clamp(max=1.5)


def _moments(weight: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mass = weight.sum((2, 3)).clamp(min=1e-3)
    mean = (weight * pixels).sum((2, 3)) / mass
    away = (pixels - mean[:, :, None, None]).square()
    return mean, ((weight * away).sum((2, 3)) / mass).sqrt()


def blur(maps: Tensor, deviation: Tensor | float) -> Tensor:
    """Gaussian blur of (B, C, H, W), by one deviation in pixels or one for each picture (B,)."""
    count, channels, height, width = maps.shape
    deviation = torch.as_tensor(deviation, dtype=maps.dtype).expand(count).clamp(min=1e-3)
    reach = max(1, int(3 * float(deviation.max()) + 0.5))
    steps = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (steps / deviation[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = maps.reshape(1, count * channels, height, width)
    for shape, pad in (((-1, 1, 1, len(steps)), (reach, reach, 0, 0)),
                       ((-1, 1, len(steps), 1), (0, 0, reach, reach))):  # fmt: skip
        flat = F.conv2d(
            F.pad(flat, pad, mode="replicate"), kernel.reshape(shape), groups=count * channels
        )
    return flat.reshape(maps.shape)


def soften(views: Tensor, deviation: Tensor | float) -> Tensor:
    """Views with their maps blurred by a deviation in the maps' pixels, half a latent each."""
    maps = blur(F.pixel_shuffle(views[:, :MAPS], 2), deviation)
    return torch.cat([F.pixel_unshuffle(maps, 2), views[:, MAPS:]], 1)


@dataclass(eq=False)
class Statistics:
    """What the two unpaired training sets' views are like, which makes them alike.

    levels: domain → (M, LEVELS), each map's quantiles. mean, std: domain → (VIEW_CHANNELS,), of
    coats and tones in either domain, of maps at natural levels.
    """

    levels: dict[str, Tensor]
    mean: dict[str, Tensor]
    std: dict[str, Tensor]

    @classmethod
    def measure(cls, cartoon: Tensor, natural: Tensor) -> Statistics:
        """From the views of both training sets, as :func:`look` gives them."""
        sets = {"cartoon": cartoon, "natural": natural}
        levels = {domain: _levels(views) for domain, views in sets.items()}
        mean = {domain: views.mean((0, 2, 3)) for domain, views in sets.items()}
        std = {domain: views.std((0, 2, 3)).clamp(min=1e-3) for domain, views in sets.items()}
        for table in (mean, std):
            table["cartoon"][:MAPS] = table["natural"][:MAPS]
        return cls(levels, mean, std)

    def standardise(self, views: Tensor, domain: str) -> Tensor:
        """Views of a domain, a cartoon's maps at natural levels, everything about 0 ± 1."""
        if domain != "natural":
            maps = F.pixel_shuffle(views[:, :MAPS], 2).numpy()
            own, wanted = self.levels[domain].numpy(), self.levels["natural"].numpy()
            ramp = 1e-6 * np.arange(own.shape[1])  # flat fills have many places at one level
            leveled = [
                np.interp(maps[:, i], own[i] + ramp, wanted[i]) for i in range(maps.shape[1])
            ]
            matched = torch.from_numpy(np.stack(leveled, 1)).to(views)
            views = torch.cat([F.pixel_unshuffle(matched, 2), views[:, MAPS:]], 1)
        mean, std = (table[domain][:, None, None] for table in (self.mean, self.std))
        return (views - mean) / std

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; :meth:`from_tensors` is the way back."""
        return {
            f"{name} {domain}": value.contiguous()
            for name, table in vars(self).items()
            for domain, value in table.items()
        }

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> Statistics:
        tables: dict[str, dict[str, Tensor]] = {"levels": {}, "mean": {}, "std": {}}
        for key, value in stored.items():
            name, domain = key.split()
            tables[name][domain] = value
        return cls(**tables)


def _levels(views: Tensor) -> Tensor:
    maps = F.pixel_shuffle(views[:, :MAPS], 2).transpose(0, 1).flatten(1).numpy()
    found = np.quantile(maps, np.linspace(0, 1, LEVELS), axis=1).T
    return torch.from_numpy(np.ascontiguousarray(found, np.float32))


def wear(views: Tensor, wardrobe: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standardised views in coats of natural pictures of much the same tones.

    Args:
        wardrobe: (N, COAT + 3), coats and mean tones of natural training pictures, standardised.
        seeds: for each view, the number that draws one of the nearest.
    """
    views = views.clone()
    for view, seed in zip(views, seeds, strict=True):
        away = (wardrobe[:, COAT:] - view[-3:].mean((1, 2))).square().sum(1)
        near = away.argsort()[:NEIGHBOURS]
        one = near[np.random.default_rng(seed).integers(len(near))]
        view[MAPS : MAPS + COAT] = wardrobe[one, :COAT, None, None]
    return views


# ---- the model ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Untold:
    """A translator that nobody has told anything but which pictures are cartoons."""

    unet: UNet2DModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    statistics: Statistics
    wardrobe: Tensor

    def translate(
        self,
        images: np.ndarray,
        *,
        seed: int,
        steps: int,
        blur: float = 0.0,
        guidance_scale: float = 1.0,
        grain: float = 0.0,
        numbers: Sequence[int] | None = None,
        batch_size: int = 50,
    ) -> np.ndarray:
        """Translate cartoons (N, S, S, 3) uint8 to the same, natural.

        Args:
            steps: DDIM steps.
            blur: of the view's maps, in their pixels.
            guidance_scale: w of ẑ_∅ + w (ẑ_v − ẑ_∅), where ẑ_∅ has no view.
            grain: the camera's, see `images.add_grain`.
            numbers: the pictures' numbers, on which noise, coat and grain depend; None counts them.
        """
        numbers = range(len(images)) if numbers is None else numbers
        out = []
        for begin in range(0, len(images), batch_size):
            part = slice(begin, begin + batch_size)
            views = soften(self.view(images[part], seed=seed, numbers=numbers[part]), blur)
            drawn = self._draw(views, steps, guidance_scale, seed, numbers[part])
            out.append(add_grain(drawn, grain, seed=seed, numbers=numbers[part]))
        return np.concatenate(out)

    def view(self, images: np.ndarray, *, seed: int, numbers: Sequence[int]) -> Tensor:
        """The views of cartoons, standardised, each in a coat of its own."""
        factor = factor_of(self.vae)
        seen = look(images, (images.shape[1] // factor, images.shape[2] // factor))
        seeds = [1_000_003 * (seed + 1) + int(number) for number in numbers]
        return wear(self.statistics.standardise(seen, "cartoon"), self.wardrobe, seeds)

    @torch.no_grad()
    def _draw(
        self, views: Tensor, steps: int, scale: float, seed: int, numbers: Sequence[int]
    ) -> np.ndarray:
        device, channels = self.unet.device, self.vae.config.latent_channels
        views = views.to(device)
        latents = noise_for((channels, *views.shape[2:]), seed, numbers).to(device)
        for scheduler, t in timetable(self.scheduler, steps):
            output = self.unet(torch.cat([latents, views], 1), t).sample
            if scale != 1.0:
                free = self.unet(torch.cat([latents, torch.zeros_like(views)], 1), t).sample
                output = free + scale * (output - free)
            latents = scheduler.step(output, t, latents).prev_sample
        return to_uint8(decode(self.vae, latents))

    def save(self, folder: Path) -> None:
        """Write all but the autoencoder, which is stage 04's."""
        with atomic_dir(folder) as target:
            self.unet.save_pretrained(target / "unet")
            tensors = {**self.statistics.tensors(), "wardrobe": self.wardrobe.contiguous()}
            save_file(tensors, target / "views.safetensors")


def load(folder: Path, vae: AutoencoderKL, prediction_type: str) -> Untold:
    """What :meth:`Untold.save` wrote, on the autoencoder's device."""
    unet = UNet2DModel.from_pretrained(str(folder / "unet"), torch_dtype=torch.float32)
    tensors = load_file(folder / "views.safetensors")
    wardrobe = tensors.pop("wardrobe")
    return Untold(
        unet.to(vae.device).eval(),
        vae,
        make_scheduler(prediction_type),
        Statistics.from_tensors(tensors),
        wardrobe,
    )


# ---- training ----------------------------------------------------------------------------------


def denoiser(latent_channels: int) -> UNet2DModel:
    """The tiny denoiser without a way to hear a text: twice as fast a step, 3.7 M parameters."""
    return UNet2DModel(
        sample_size=16,
        in_channels=latent_channels + VIEW_CHANNELS,
        out_channels=latent_channels,
        block_out_channels=(96, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=24,
    )


def fit(
    cartoon: np.ndarray,
    natural: np.ndarray,
    vae: AutoencoderKL,
    profile: Profile,
    *,
    folder: Path,
    seconds: float,
) -> tuple[Untold, float]:
    """Train for so many seconds on natural pictures and their mirror images, by their own views.

    Args:
        cartoon, natural: (N, S, S, 3) uint8 training pictures, unpaired. Of the cartoons only the
            views' levels, mean and deviation are used.
        folder: receives the training's history, and a checkpoint until it is finished.

    Returns:
        The translator with averaged weights, and the seconds of the budget that it took.
    """
    natural = np.concatenate([natural, natural[:, :, ::-1]])
    at_once = min(64, max(1, PIXELS_AT_ONCE // natural[0, ..., 0].size))
    latents = encode_all(vae, torch.from_numpy(natural), at_once)
    grid = (latents.shape[-2], latents.shape[-1])
    seen = look(natural, grid)
    statistics = Statistics.measure(look(cartoon, grid), seen)
    views = statistics.standardise(seen, "natural")
    wardrobe = torch.cat([views[:, MAPS:-3, 0, 0], views[:, -3:].mean((2, 3))], 1)
    views = views.half()
    scheduler = make_scheduler(profile.ldm.prediction_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(profile.seed)
        unet = denoiser(latents.shape[1])

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        size = (BATCH_SIZE, 1, 1, 1)
        view = soften(views[index].float(), BLUR * torch.rand(BATCH_SIZE, generator=generator))
        shake = NOISE * torch.rand(size, generator=generator)
        view = view + shake * torch.randn(view.shape, generator=generator)
        return latents[index], view * (torch.rand(size, generator=generator) >= DROPPED)

    def loss(batch: tuple[Tensor, Tensor], step: int, generator: torch.Generator) -> Any:
        z, view = batch
        length = scheduler.config.num_train_timesteps
        timesteps = torch.randint(length, (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        total = scheduler.alphas_cumprod.to(z.device)[timesteps][:, None, None, None]
        alpha, sigma = total.sqrt(), (1 - total).sqrt()
        output = unet(torch.cat([alpha * z + sigma * noise, view], 1), timesteps).sample
        kind, gamma = scheduler.config.prediction_type, profile.ldm.min_snr_gamma
        return weighted_loss(output, z, noise, alpha, sigma, kind, gamma).mean(), {}

    result = train(
        {"unet": unet},
        loss,
        batches,
        steps=_NO_END,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        schedule="constant",
        betas=(0.9, 0.99),
        grad_clip=0.5,
        folder=folder,
        seed=profile.seed,
        ema_decay=EMA_DECAY,
        precision=profile.precision,
        device=profile.device,
        threads=profile.threads,
        checkpoint_every_s=profile.checkpoint_every_s,
        max_seconds=seconds,
        describe="ours, told nothing",
    )
    apply_ema({"unet": unet}, result)
    return Untold(unet.eval(), vae, scheduler, statistics, wardrobe), result.spent
