# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · LDM training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/04_ldm_training.ipynb)
# [![View on GitHub](https://img.shields.io/badge/GitHub-view-black?logo=github)](https://github.com/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/04_ldm_training.ipynb)
#
# **In this notebook a latent diffusion model learns what cartoons and natural pictures of a cat and
# a mouse look like.**

# %% [markdown]
# **What you will learn**
#
# - why diffusion happens in latents, and how good an autoencoder must be before it can;
# - the poster's loss, written out in ten lines and equal to what the package trains with;
# - what a class condition, its dropout and guidance do, and how to measure whether a model listens;
# - why eight steps of DDIM can do what a thousand steps were trained for.
#
# **You need** the pictures of [01](01_data_collection.ipynb) and the captions of
# [03](03_blip_finetuning.ipynb); what is missing is made.
#
# | profile | time | memory | disk | cost |
# |---|---|---|---|---|
# | `smoke` | half a minute | 1 GB | 40 MB | nothing |
# | `mini` | 3 minutes on two cores | 1.5 GB | 140 MB | nothing |
# | `colab` | some hours on a T4 | 14 GB of GPU | 10 GB | nothing |
# | `paper` | the poster: 20 hours on an A40 | 40 GB of GPU | 20 GB | nothing |
#
# **On the poster** this is *Methods*: "Stable Diffusion adapted from Latent Diffusion Models (LDMs)
# facilitates high-quality generative modeling frameworks", "the model incorporates class
# conditioning to align Tom with a cat and Jerry with a mouse", and the first two lines of formulae.

# %%
import importlib.util
import subprocess
import sys

# On Colab: fetch the course and add what is missing. Anywhere else this cell does nothing.
if "google.colab" in sys.modules and importlib.util.find_spec("tomjerry_utils") is None:
    url, course = "https://github.com/tomjerry-real-life/tomjerry-real-life", "/content/course"
    subprocess.run(["git", "clone", "--depth", "1", url, course], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", course], check=True)
    sys.path.insert(0, course)

# %%
import time

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from tomjerry_utils import canvas, collect, denoiser, figures, ldm, samplers, sampling, scenes
from tomjerry_utils.autoencoder import decode, encode_all, psnr
from tomjerry_utils.images import to_tensor, to_uint8
from tomjerry_utils.lessons import check, compare
from tomjerry_utils.profiles import load_profile

# %% tags=["parameters"]
profile: str = "mini"  # smoke, mini, colab, paper
seed: int = 0  # everything random follows from it

# %%
settings = load_profile(profile, seed=seed)
collection = collect.ensure(settings)

# %% [markdown]
# The next cell does all of stage 04, or reads it if it has been done: it tunes the decoder on the
# pictures of both domains, turns them all into latents, and trains the denoiser on those.
# Everything after it explains what happened. Interrupt it if you like; it goes on where it was.

# %%
run = ldm.ensure(settings)
device = run.unet.device
options = settings.ldm

# %% [markdown]
# ## 1 · A smaller world
#
# A picture has far more numbers than it has content. Latent diffusion first learns a pair of maps,
# an encoder $\mathcal{E}$ and a decoder $\mathcal{D}$, with
#
# $$z = \mathcal{E}(x), \qquad \mathcal{D}(\mathcal{E}(x)) \approx x,$$
#
# and does everything else on the small $z$. The tiny models here are the same classes as Stable
# Diffusion's (`AutoencoderKL`, `UNet2DConditionModel`), and in `mini` they start from weights that
# learnt on the zoo of nameless animals, as the poster's start from Stable Diffusion. Of the
# autoencoder only the decoder is tuned: the denoiser learnt to read *these* latents, and an encoder
# that moved would make it start again.

# %%
# NBVAL_CHECK_OUTPUT
side = settings.image_size
channels, height, width = run.natural.latents.shape[1:]
print(f"picture  3 × {side} × {side} = {3 * side * side} numbers")
print(f"latents  {channels} × {height} × {width} = {channels * height * width} numbers")
for name, model in (("autoencoder", run.vae), ("denoiser", run.unet), ("tokens", run.conditioner)):
    print(f"{name:<12} {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
print(f"learnt from {len(run.cartoon)} cartoons and {len(run.natural)} natural pictures")

# %% [markdown]
# What the autoencoder cannot bring back, no diffusion on its latents ever will: eyes that it loses
# are lost to the translator. So look at it first, on pictures that it was not tuned on.

# %%
held = collection.select(split="validation")
examples = [next((r for r in held if r["label"] == label), None) for label in scenes.LABELS]
examples = [row for row in examples if row is not None]
images = collection.images(examples)
with torch.no_grad():
    back = to_uint8(decode(run.vae, encode_all(run.vae, torch.from_numpy(images)).to(device)))
gap = (128 + 4.0 * (back.astype(float) - images)).clip(0, 255).astype(np.uint8)
figure = figures.contact_sheet(
    np.concatenate([images, back, gap]),
    columns=len(examples),
    column_titles=[row["label"].replace("_", " and ") for row in examples],
    row_titles=["picture", "there and back", "4 × the difference"],
)
saved = figures.save_figure(
    figure,
    "reconstructions",
    alt="Held-out pictures of each label, what the autoencoder brings back of them, and the "
    "difference enlarged four times: outlines and fur texture are where it errs.",
    run=settings,
    notebook="04_ldm_training",
)

# %%
# NBVAL_CHECK_OUTPUT
quality = {}
for domain in scenes.STYLES:
    pictures = collection.images([row for row in held if row["domain"] == domain][:64])
    with torch.no_grad():
        again = decode(run.vae, encode_all(run.vae, torch.from_numpy(pictures)).to(device)).cpu()
    quality[domain] = float(psnr(again, to_tensor(pictures)).mean())
    print(f"{domain:<8} {len(pictures):>3} held-out pictures, PSNR {quality[domain]:.1f} dB")

# %% [markdown]
# PSNR is the mean squared error on a logarithmic scale: 30 dB is an error of 3 % of the range, and
# every 6 dB halve it. Sensor noise alone, which nobody can predict, holds natural pictures at about
# 40 dB.
#
# ## 2 · Noise, a little at a time
#
# Diffusion destroys a latent step by step, and learns to undo it. At time $t$
#
# $$z_t := \alpha_t z + \sigma_t \eta, \qquad \eta \sim \mathcal{N}(0, 1),$$
#
# with $\alpha_t^2 + \sigma_t^2 = 1$, so that latents of variance one keep it. That is why the
# latents' channels are normalised, with statistics that come with the autoencoder.

# %%
picture = next(i for i, label in enumerate(run.natural.labels) if scenes.LABELS[label] == "cat")
z = run.natural.latents[picture][None].to(device)
eta = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(device)
times = [0, 200, 400, 600, 800, 999]
steps = torch.tensor(times, device=device)
noisy = run.scheduler.add_noise(z.repeat(6, 1, 1, 1), eta.repeat(6, 1, 1, 1), steps)
with torch.no_grad():
    shown = to_uint8(decode(run.vae, noisy))
figure = figures.image_row(shown, [f"t = {t}" for t in times])
saved = figures.save_figure(
    figure,
    "forward_noise",
    alt="A natural picture decoded from its latents with more and more noise: at t = 0 whole, at "
    "400 still recognisable, at 999 nothing but coloured noise.",
    run=settings,
    notebook="04_ldm_training",
)

# %%
# NBVAL_CHECK_OUTPUT
total = run.scheduler.alphas_cumprod
print("   t   alpha   sigma        SNR")
for t in times:
    alpha, sigma = float(total[t].sqrt()), float((1 - total[t]).sqrt())
    print(f"{t:>4}  {alpha:>6.3f}  {sigma:>6.3f}  {(alpha / sigma) ** 2:>9.3f}")

# %% [markdown]
# Stable Diffusion's own schedule stops short of pure noise: a little of the picture's brightness
# leaks through at $t = 999$, and a model that learnt to rely on it draws everything medium grey
# when it starts from real noise. The schedule here is rescaled until the last SNR is exactly zero
# (Lin et al. 2023). A model that predicts the *noise* has nothing to say there, since its input is
# its answer; one that predicts $z$ has. The poster predicts $z$.
#
# ## 3 · The poster's loss
#
# $$\hat\theta := \min_\theta\;
# \mathbb{E}_{z,c,\eta,t}\big[\,\|\hat z_\theta(z_t, t, c) - z\|^2\,\big]$$
#
# In words: take a latent, a random time and random noise; mix; let the model guess what the latent
# was; square the error. Here it is, and the package's own function beside it.


# %%
def poster_loss(batch: denoiser.Batch, generator: torch.Generator) -> torch.Tensor:
    z = batch.latents
    t = torch.randint(1000, (len(z),), generator=generator).to(z.device)
    eta = torch.randn(z.shape, generator=generator).to(z.device)
    alpha = run.scheduler.alphas_cumprod.to(z.device)[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    z_t = alpha * z + sigma * eta
    output = denoiser.predict(run.unet, run.conditioner, z_t, t, batch)
    z_hat = denoiser.to_x0(output, z_t, alpha, sigma, options.prediction_type)
    weight = (alpha / sigma).square().flatten().clamp(1, options.min_snr_gamma)
    return (weight * (z_hat - z).square().flatten(1).mean(1)).mean()


both = ldm.join([run.cartoon, run.natural])
index = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))[:32]
some = both.batch(index).to(device)
with torch.no_grad():
    ours = poster_loss(some, torch.Generator().manual_seed(1))
    package, _, _ = denoiser.denoising_loss(
        run.unet, run.conditioner, some, run.scheduler, torch.Generator().manual_seed(1),
        gamma=options.min_snr_gamma,
    )  # fmt: skip
assert torch.isclose(ours, package, rtol=1e-3), (ours, package)

# %%
# NBVAL_CHECK_OUTPUT
print(f"inline {float(ours):.3f}, package {float(package):.3f}, on {len(index)} pictures")

# %% [markdown]
# One line is not on the poster: the **weight**. Guessing $z$ from a barely noised $z_t$ is easy and
# says most about fine detail; guessing it from noise is hopeless and says most about layout. Which
# should count how much? Predicting noise, as Stable Diffusion does, *is* a choice: the same guess
# costs SNR times as much when it is measured on the noise,
#
# $$\|\hat\eta - \eta\|^2 = \text{SNR}\cdot\|\hat z - z\|^2,$$
#
# and nearly all the weight goes to the easy end. Min-SNR weighting (Hang et al. 2023) caps it at
# $\gamma$. Below SNR = 1 we keep the poster's own weight, one, because that is where sampling
# starts and all that follows depends on it.

# %%
t = torch.arange(1, 1000)
snr = total[t] / (1 - total[t])
lines = {
    "predicting noise": snr,
    "min-SNR": snr.clamp(max=options.min_snr_gamma),
    "the poster": torch.ones(len(t)),
    "here": snr.clamp(1, options.min_snr_gamma),
}
figure = figures.curve(
    {name: (t.tolist(), weight.clamp(min=1e-3).tolist()) for name, weight in lines.items()},
    x_label="t, from a clean latent to pure noise",
    y_label="weight of ‖ẑ − z‖²",
    log=True,
    smooth=1,
)
saved = figures.save_figure(
    figure,
    "loss_weights",
    alt="Four weightings of the loss over time, on a logarithmic axis: predicting noise falls from "
    "a thousand to a thousandth, min-SNR is capped at five, the poster's is one throughout, and "
    "the one used here runs from five down to one.",
    run=settings,
    notebook="04_ldm_training",
)

# %% [markdown]
# ## 4 · How it went
#
# Two trainings: the decoder's, seen as PSNR on what it trains on, and the denoiser's loss. The
# loss is noisy because each step draws other times $t$, and easy times cost less than hard ones;
# its floor is not zero, since much of a picture cannot be known from noise.
#
# What is kept is not the last weights but their **exponential moving average**, $\bar\theta
# \leftarrow d\,\bar\theta + (1 - d)\,\theta$ after every step. It averages away the last steps'
# jitter, and samples from it look better at no cost.

# %%
with mpl.rc_context(canvas.style()):
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = run.autoencoder_history
    if history:
        dB = [10 * np.log10(4 / row["mse"]) for row in history]
        left.plot([row["step"] for row in history], dB)
    left.set(title="decoder", xlabel="step", ylabel="PSNR, dB")
    at = [row["step"] for row in run.history]
    right.plot(at, [row["loss"] for row in run.history], color=canvas.VERMILLION)
    right.set(title="denoiser", xlabel="step", ylabel="weighted ‖ẑ − z‖²")
saved = figures.save_figure(
    figure,
    "training_curves",
    alt="Two training curves. Left, the decoder's PSNR over its steps; right, the denoiser's "
    "loss over its steps, noisy and falling.",
    run=settings,
    notebook="04_ldm_training",
)

# %% [markdown]
# ## 5 · Telling it the class
#
# The denoiser is told three things, and each is left out at random during training: the **class**
# $c$ (tom, jerry, both, cat, mouse, both), the **caption** that BLIP wrote, and the **view**, a
# map of which part of an animal is where (notebook 05 is about that one). So one network is also a
# model without any of them.
#
# Does it listen? Ask the loss. Give it the same noised pictures with no caption and no view, and
# tell it the right class, none, the wrong animal, or the wrong domain. If it did not listen, all
# four would be equal.

# %%
picked = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed + 1))[:96]
right = both.batch(picked)
right = denoiser.drop(right, labels=0, captions=1.1, view=1.1, generator=torch.Generator())
domain, animal = right.labels // 3, right.labels % 3
told = {
    "the right class": right.labels,
    "nothing": torch.full_like(right.labels, denoiser.NO_CLASS),
    "the wrong animal": 3 * domain + (animal + 1) % 3,
    "the wrong domain": 3 * (1 - domain) + animal,
}
listening = {}
with torch.no_grad():
    for name, labels in told.items():
        right.labels = labels
        draws = [poster_loss(right.to(device), torch.Generator().manual_seed(k)) for k in range(3)]
        listening[name] = float(torch.stack(draws).mean())

# %%
# NBVAL_CHECK_OUTPUT
print("told                    loss")
for name, value in listening.items():
    print(f"{name:<20} {value:>7.3f}")

# %% [markdown]
# After minutes it hears the **domain** clearly, since paint and fur differ everywhere, and the
# **animal** hardly: most of a picture is background, which does not depend on who sits in it. A
# class alone is a thin thread to hold a translation by.
#
# **Guidance** makes it listen harder. Run the model twice, with the class and without, and go
# further in the direction that the class points to:
#
# $$\hat z = \hat z_\varnothing + w\,(\hat z_c - \hat z_\varnothing)$$
#
# $w = 0$ ignores the class, $w = 1$ is the model as trained, larger $w$ exaggerates, until colours
# burn out. That is what the dropout of classes in training is for.
#
# Here are free samples of every class: no caption, no view, only noise and one word.

# %%
figure = figures.contact_sheet(
    np.concatenate(
        [run.free[scenes.label_of(c, style)] for c in scenes.CLASSES for style in scenes.STYLES]
    ),
    columns=2 * options.samples_per_class,
    row_titles=["Tom | cat", "Jerry | mouse", "both | both"],
    title=f"guidance {options.guidance_scale:g}, {options.sample_steps} DDIM steps",
)
saved = figures.save_figure(
    figure,
    "free_samples",
    alt="Free samples of the diffusion model, a few for each of the six labels: on the left "
    "cartoon Tom, Jerry and both, on the right natural cat, mouse and both.",
    run=settings,
    notebook="04_ldm_training",
)

# %% [markdown]
# Be honest about these. Cartoon or natural, what kind of place, which colours: that comes within
# minutes. An animal with its legs in the right places, out of nothing, takes a hundred times
# longer, as it took Stable Diffusion.
#
# ### First what there is to see, then how it looks
#
# Drawing *what a view shows* is far easier. So split the task where it is hard:
#
# $$p(z \mid c) = \sum_v p(v \mid c)\; p(z \mid v, c)$$
#
# The second factor is this denoiser told a view. The first need not be a network at all: views are
# small and made of parts, so it is the training views themselves, taken apart and put together
# anew (`staging`). A room is one picture's. A pose is drawn from a **smoothed bootstrap**: another
# picture's keypoints, pulled towards the mean of their class and action, and given back as much
# spread at random, as keypoints covary. A small net draws a natural body there, and the coat comes
# from a third picture. Cartoon bodies are borrowed whole, since that net has only seen animals.
#
# Photographs are drawn by a copy of the model that has also been *finished*: its last two steps and
# its decoder were tuned on what it draws, for texture. Section 6 of notebook 05 explains how.

# %%
figure = figures.contact_sheet(
    np.concatenate(
        [run.samples[scenes.label_of(c, style)] for c in scenes.CLASSES for style in scenes.STYLES]
    ),
    columns=2 * options.samples_per_class,
    row_titles=["Tom | cat", "Jerry | mouse", "both | both"],
    title=f"views drawn first; {options.sample_steps} DDIM steps",
)
saved = figures.save_figure(
    figure,
    "class_samples",
    alt="Samples drawn in two steps, a few for each of the six labels: on the left cartoon Tom, "
    "Jerry and both, on the right natural cat, mouse and both, each in a room, with all its limbs.",
    run=settings,
    notebook="04_ldm_training",
)

# %% [markdown]
# Nobody drew these scenes before: no room had that animal in that pose and coat. How many are
# judged to be what was asked for, how far they are from photographs, and whether they are copies
# is measured in notebook 06, by judges that had no part in it.
#
# ## 6 · A thousand steps, or eight
#
# Training uses a thousand times $t$. Sampling need not visit them all: DDIM (Song et al. 2021)
# jumps from $t$ to any earlier $s$ by guessing $z$, computing which noise that implies, and mixing
# both anew:
#
# $$z_s = \alpha_s\,\hat z_\theta(z_t, t, c) + \sigma_s\,\hat\eta, \qquad
# \hat\eta = \frac{z_t - \alpha_t\,\hat z_\theta}{\sigma_t}$$
#
# No fresh noise enters, so the same start gives the same picture, only rougher with fewer steps.
# The poster's discussion asks for this ("Markovian process could be modified akin to denoising
# diffusion implicit models").
#
# Below, the model is given the views and captions of five natural pictures, and must draw them.

# %%
order = torch.randperm(len(run.natural), generator=torch.Generator().manual_seed(seed + 2))[:5]
shown_batch = run.natural.batch(order).to(device)
tried, seconds = (1, 2, 4, 8, 16, 32), {}
drawn: dict[int, torch.Tensor] = {}
for count in tried:
    begun = time.monotonic()
    drawn[count] = sampling.sample(
        run.unet, run.conditioner, shown_batch, run.scheduler, steps=count,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    seconds[count] = (time.monotonic() - begun) / len(order)
with torch.no_grad():
    rows = [to_uint8(decode(run.vae, latents)) for latents in drawn.values()]
    rows = [to_uint8(decode(run.vae, shown_batch.latents)), *rows]

# %%
figure = figures.contact_sheet(
    np.concatenate(rows),
    columns=len(order),
    row_titles=["the picture"]
    + [f"{count} step{'s' * (count > 1)}, {1000 * seconds[count]:.0f} ms" for count in tried],
)
saved = figures.save_figure(
    figure,
    "ddim_steps",
    alt="Five natural pictures, and what the model draws of their views and captions in 1, 2, 4, "
    "8, 16 and 32 steps of DDIM: after one step a blur, after eight nearly what 32 steps give.",
    run=settings,
    notebook="04_ldm_training",
)

# %%
# NBVAL_CHECK_OUTPUT
print(f"steps   distance to {tried[-1]} steps   to the picture")
distance = {}
for count in tried:
    distance[count] = float((drawn[count] - drawn[tried[-1]]).square().mean())
    true = float((drawn[count] - shown_batch.latents).square().mean())
    print(f"{count:>5} {distance[count]:>23.3f} {true:>16.3f}")

# %% [markdown]
# Read the right column closely: it is smallest for **one** step. A single guess from noise is the
# mean of all pictures that fit, and no single picture is nearer to everything than the mean. That
# is what blur is, and why squared error must not choose the number of steps.
#
# ### Four samplers
#
# DDIM is one of many ways down the same schedule. `benchmarks/samplers.py` let four of diffusers'
# translate the same held-out cartoons from the same noise, by the translator of notebook 05 as
# training leaves it. One of the scenes:

# %%
measured = samplers.load_results()
figure = samplers.draw_samplers(measured)
saved = figures.save_figure(
    figure,
    "samplers",
    alt="One held-out cartoon translated by DDPM, DDIM, DPM-Solver++ and UniPC, a row each, in 2 "
    "to 50 steps from left to right, with KID and time below each picture.",
    run=settings,
    notebook="04_ldm_training",
)

# %%
# NBVAL_CHECK_OUTPUT
print(f"{measured['settings']['scenes'][1] - measured['settings']['scenes'][0]} scenes,")
print(f"{measured['machine']['device']}, {measured['date']}\n")
print(samplers.samplers_table(measured))
print("\nin at most ten steps no worse than in fifty, and faster by:")
for row in samplers.few_against_many(measured):
    if row["kid"] and row["iou"]:
        name = samplers.TITLES[row["sampler"]]
        print(f"  {name:<12} {row['steps']:>2} steps: denoising {row['denoising']:.1f}x,", end="")
        print(f" whole way {row['whole']:.1f}x")

# %% [markdown]
# ## Check yourself
#
# ### Exercise 1 · The noise in a guess
#
# Write `noise_of(z_hat, z_t, alpha, sigma)`: the noise $\hat\eta$ that a guess $\hat z$ implies.


# %%
def noise_of(z_hat, z_t, alpha, sigma):
    return None  # ← yours


mixed = 0.8 * z + 0.6 * eta
answer = noise_of(z, mixed, 0.8, 0.6)
check(
    answer if answer is None else float((answer - eta).abs().max()),
    0.0,
    tolerance=1e-4,
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Solve $z_t = \alpha z + \sigma \eta$ for $\eta$.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def noise_of(z_hat, z_t, alpha, sigma):
#     return (z_t - alpha * z_hat) / sigma
# ```
# </details>
#
# ### Exercise 2 · One step of DDIM
#
# Write `ddim(z_hat, z_t, t, s)`: the latent at time `s`, given the guess at time `t`. `total[t]` is
# $\alpha_t^2$. The check compares you with diffusers' own scheduler.


# %%
def ddim(z_hat, z_t, t, s):
    return None  # ← yours


library = denoiser.make_scheduler("sample")
library.set_timesteps(10)
t, s = (int(v) for v in library.timesteps[4:6])
guess, current = 0.3 * z.cpu(), eta.cpu()
answer = ddim(guess, current, t, s)
wanted = library.step(guess, t, current).prev_sample
check(
    answer if answer is None else float((answer - wanted).abs().max()),
    0.0,
    tolerance=1e-4,
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two lines: the implied noise at `t`, as in exercise 1, then the mixture at `s`.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def ddim(z_hat, z_t, t, s):
#     noise = (z_t - total[t].sqrt() * z_hat) / (1 - total[t]).sqrt()
#     return total[s].sqrt() * z_hat + (1 - total[s]).sqrt() * noise
# ```
# </details>
#
# ### Exercise 3 · How long a memory?
#
# An exponential moving average with decay $d$ gives the weights of $k$ steps ago the factor $d^k$.
# After how many steps is it down to a half? Give the number, rounded to one decimal, for $d =
# 0.995$ and $d = 0.9999$.

# %%
half_life = (None, None)  # ← yours

check(list(half_life), [138.3, 6931.1], tolerance=0.1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $d^k = \tfrac12$ is solved by $k = \ln\tfrac12 / \ln d$.
# </details>
#
# <details><summary>Answer</summary>
#
# A run of 400 steps with $d = 0.9999$ would still remember its first step: the decay must fit the
# length of the training.
#
# ```python
# half_life = tuple(round(float(np.log(0.5) / np.log(d)), 1) for d in (0.995, 0.9999))
# ```
# </details>

# %% [markdown]
# ## Takeaways
#
# - First the autoencoder, then the diffusion: what it loses stays lost.
# - The poster's loss is a squared error on the clean latent; its weight over time is a choice, and
#   noise prediction is one of the choices.
# - Measure whether a condition is used by telling the model the wrong one.
# - Guidance is extrapolation, and needs a model that sometimes went without.
# - DDIM needs few steps, and the squared error would choose too few.

# %%
# NBVAL_CHECK_OUTPUT
hears = listening["the wrong domain"] / listening["the right class"]
compare(
    profile,
    {
        "PSNR, cartoon, dB": (quality["cartoon"], {"smoke": (15, None), "mini": (25, None)}),
        "PSNR, natural, dB": (quality["natural"], {"smoke": (20, None), "mini": (29, None)}),
        "loss, wrong domain / right class": (hears, {"smoke": (0.8, None), "mini": (1.01, None)}),
        "distance of 8 steps to 32": (distance[8], {"smoke": (0, 2), "mini": (0, 0.05)}),
        "distance of 1 step to 32": (distance[1], {"smoke": (0, 3), "mini": (0.1, None)}),
    },
)

# %% [markdown]
# **Next:** [05 · Regularized transfer](05_regularized_transfer.ipynb), where this model is made to
# draw what a cartoon shows.
