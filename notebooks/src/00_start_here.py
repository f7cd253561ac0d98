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
# # 00 · Start here
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/00_start_here.ipynb)
# [![View on GitHub](https://img.shields.io/badge/GitHub-view-black?logo=github)](https://github.com/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/00_start_here.ipynb)
#
# **In this notebook you meet the problem, solve it badly in ten lines, and see the road to solving
# it well.**

# %% [markdown]
# **What you will learn**
#
# - what "unpaired translation from cartoon to natural" means, on pictures you can check;
# - why matching the statistics of two picture sets isn't enough;
# - which notebook does what, and how to choose a profile for the machine you have;
# - what in this course is real, what is generated, and what is nobody's to ship.
#
# **You need** nothing from before: no GPU, no account, no download.
#
# | profile | time | memory | disk | cost |
# |---|---|---|---|---|
# | `smoke`, `mini`, `colab`, `paper` | half a minute on two cores | 0.6 GB | 2 MB | nothing |
#
# **On the poster** this is the *Introduction* and the *Project workflow* of *Methods*.

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
import numpy as np

from tomjerry_utils import doctor, figures, profiles, scenes
from tomjerry_utils.lessons import check, compare
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import project_root

# %% tags=["parameters"]
profile: str = "mini"  # smoke, mini, colab, paper
seed: int = 0  # everything random follows from it

# %%
settings = load_profile(profile, seed=seed)

# %% [markdown]
# ## 1 · The problem
#
# Here are cartoon pictures of a cat named Tom and a mouse named Jerry. There are photographs of
# cats and mice. Nobody has ever photographed the very moment that a cartoon shows, so there are
# **no pairs** to learn from. The poster writes this as drawing source and target independently:
#
# $$(x, y) \sim (\mathcal{X}, \mathcal{Y})$$
#
# The task: take a cartoon $x$ and make the photograph that could have been, with **Tom as a cat,
# Jerry as a mouse, doing the same thing in the same place**.
#
# The frames of the show are under copyright, so this course comes with a world of its own. A
# *scene* is a description: who, doing what, where, in which light. Two renderers draw it, one as a
# cartoon, one as a natural picture with fur, shadow and a lens. What you see below no data set of
# real cartoons can give: **each picture with its twin**.

# %%
# One scene of each action, first in the order of seeds; the classes take turns.
first = 300 * (seed % 3000)
chosen: dict[str, scenes.Scene] = {}
for number in range(first, first + 300):
    scene = scenes.describe(number)
    wanted = scenes.CLASSES[len(chosen) % 3]
    if scene.action not in chosen and scene.cls == wanted and scene.light == "day":
        chosen[scene.action] = scene
pairs = {
    style: [scenes.render(scene, style, 192).image for scene in chosen.values()]
    for style in scenes.STYLES
}

# %%
figure = figures.contact_sheet(
    pairs["cartoon"] + pairs["natural"],
    columns=len(chosen),
    column_titles=list(chosen),
    row_titles=["cartoon x", "its twin y"],
    cell=1.5,
)
saved = figures.save_figure(
    figure,
    "twins",
    alt="Two rows of six pictures. Above, cartoon scenes of Tom, Jerry or both with black "
    "outlines, one for each action; below, the same scenes with natural proportions, fur, shadow.",
    run=settings,
    notebook="00_start_here",
)

# %%
# NBVAL_CHECK_OUTPUT
for scene in chosen.values():
    print(f"seed {scene.seed:<4} {scene.cls:<6} {scenes.caption(scene, 'cartoon')}")
    print(f"{'':<16} {scenes.caption(scene, 'natural')}")

# %% [markdown]
# Training never sees such a pair. Cartoons to learn from come from one range of seeds, natural
# pictures from another, and the twins of the test scenes are drawn only to **score** a translation
# that is already finished. So we can train as the poster had to, and measure as it could not.

# %%
# NBVAL_CHECK_OUTPUT
for name, (low, high) in scenes.RANGES.items():
    print(f"{name:<11} {low:>9,} to {high - 1:>9,}")

# %% [markdown]
# ## 2 · The smallest translator
#
# Before anything deep, the cheapest idea: natural pictures are darker and less colourful than
# cartoons, so give each colour channel of the cartoon the mean $\mu$ and the spread $\sigma$ of the
# natural pictures:
#
# $$\hat y = \frac{x - \mu_\mathcal{X}}{\sigma_\mathcal{X}}\,\sigma_\mathcal{Y} + \mu_\mathcal{Y}$$
#
# It needs no pairs: $\mu$ and $\sigma$ are measured on cartoons of *some* scenes and natural
# pictures of *others*. (Done in a colour space made for it, this is the rival "colour transfer" of
# notebook 06.)


# %%
def draw(start: int, count: int, style: str) -> np.ndarray:
    """Scenes of consecutive seeds: (N, 64, 64, 3) in [0, 1]."""
    seeds = range(first + start, first + start + count)
    return scenes.render_many(seeds, style, 64)["image"] / 255.0


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each colour channel."""
    return images.mean((0, 1, 2)), images.std((0, 1, 2))


(mean_x, spread_x), (mean_y, spread_y) = (
    statistics(draw(0, 48, "cartoon")),
    statistics(draw(48, 48, "natural")),
)
cartoon, twin = draw(96, 24, "cartoon"), draw(96, 24, "natural")
recoloured = np.clip((cartoon - mean_x) / spread_x * spread_y + mean_y, 0, 1)

# %%
shown = np.concatenate([part[:6] for part in (cartoon, recoloured, twin)])
figure = figures.contact_sheet(
    (255 * shown).round().astype(np.uint8),
    columns=6,
    row_titles=["cartoon", "recoloured", "hidden twin"],
)
saved = figures.save_figure(
    figure,
    "smallest_translator",
    alt="Three rows of six pictures: cartoons, the same cartoons in the colours of natural "
    "pictures, and the natural twins. Recoloured cartoons keep outlines, flat fills, big heads.",
    run=settings,
    notebook="00_start_here",
)

# %% [markdown]
# The colours are right and it is still a cartoon. Three numbers say so:
#
# - **colour gap**: distance between the channel statistics of the result and of the twins. This is
#   what we fitted, so it should nearly vanish.
# - **error**: root-mean-square distance to the twin, pixel by pixel.
# - **flat**: the share of pixels whose neighbours have exactly their colour. Paint is flat, fur
#   never is.


# %%
# NBVAL_CHECK_OUTPUT
def gap(images: np.ndarray) -> float:
    return float(np.linalg.norm(np.subtract(statistics(images), statistics(twin))))


def error(images: np.ndarray) -> float:
    return float(np.sqrt(((images - twin) ** 2).mean((1, 2, 3))).mean())


def flat(images: np.ndarray) -> float:
    steps = [np.abs(np.diff(images, axis=axis)).max(-1) for axis in (1, 2)]
    return float(np.mean((steps[0][:, :, 1:] < 0.005) & (steps[1][:, 1:] < 0.005)))


print(f"{'':<12} colour gap   error    flat")
for name, images in (("cartoon", cartoon), ("recoloured", recoloured), ("hidden twin", twin)):
    print(f"{name:<12} {gap(images):>10.3f} {error(images):>7.3f} {flat(images):>7.3f}")

# %% [markdown]
# The gap all but closes, the error falls by a fifth, and as much is flat as before: **two picture
# sets can agree in their statistics while no single picture has become natural.** Proportions must
# change, fur must appear where paint was, shadow must fall. That takes a model that knows what
# natural pictures look like (notebook 04) and something that holds on to *this* scene while it
# draws (notebooks 03 and 05).
#
# ## 3 · The map
#
# The poster's words: *"pre-train conditional diffusion, finetune BLIP for captioning, and enforce
# regularization for transfer."*

# %%
saved = figures.save_figure(
    figures.workflow_diagram(),
    "workflow",
    alt=figures.WORKFLOW_ALT,
    run=settings,
    notebook="00_start_here",
)

# %% [markdown]
# | notebook | what happens | what it leaves in `runs/<profile>/` |
# |---|---|---|
# | [01 Data collection][01] | sources become pictures, a manifest, splits | `01_collect/` |
# | [02 GPT-4 captioning][02] | a random sample gets captions | `02_captions/` |
# | [03 BLIP fine-tuning][03] | BLIP learns to describe, then describes everything | `03_blip/` |
# | [04 LDM training][04] | autoencoder and class-conditional diffusion | `04_ldm/` |
# | [05 Regularized transfer][05] | the translator | `05_transfer/` |
# | [06 Result comparison][06] | rivals, measures, the poster's figure | `06_compare/` |
#
# [01]: 01_data_collection.ipynb
# [02]: 02_gpt4_captioning.ipynb
# [03]: 03_blip_finetuning.ipynb
# [04]: 04_ldm_training.ipynb
# [05]: 05_regularized_transfer.ipynb
# [06]: 06_result_comparison.ipynb
#
# Each notebook **explains**; the module of the same number in `tomjerry_utils` **does**. Each runs
# alone: what it needs from before and does not find, it makes. What is finished stays finished, so
# you can stop anywhere, and go on tomorrow.
#
# ## 4 · What this machine can do

# %%
print(doctor.report(doctor.examine(settings)).replace(str(project_root()), "."))

# %% [markdown]
# ## 5 · Four profiles, one course
#
# A profile is a YAML file of settings. Only the values differ; the code path is the same from a
# laptop's minutes to the poster's two days on an A40. Choose one in the parameters cell above, or
# for the whole course: `make course PROFILE=smoke`.

# %%
# NBVAL_CHECK_OUTPUT
every = {name: load_profile(name) for name in profiles.NAMES}
table = {
    "pixels a side": lambda p: p.image_size,
    "pictures a class and domain": lambda p: p.collect.per_class,
    "captions": lambda p: p.captions.count,
    "who captions": lambda p: p.captions.model,
    "BLIP steps": lambda p: p.blip.steps,
    "LDM steps": lambda p: p.ldm.steps,
    "transfer steps": lambda p: p.transfer.steps,
    "test scenes": lambda p: p.compare.test_scenes,
}
print(f"{'':<28}" + "".join(f"{name:>15}" for name in every))
for what, value in table.items():
    print(f"{what:<28}" + "".join(f"{value(p):>15}" for p in every.values()))

# %% [markdown]
# | for | profile | machine | time for the whole course |
# |---|---|---|---|
# | tests | `smoke` | anything | minutes |
# | learning | `mini` | a laptop, two cores | half an hour |
# | real frames, an evening | `colab` | one T4 with 16 GB | hours |
# | the poster | `paper` | A40, A100 or H100 | the poster: 20 h LDM + 15 h BLIP + 8 h transfer |
#
# ## 6 · How to use the course
#
# - **Read, run, change.** `make lab` opens JupyterLab here. Step with Shift+Enter; change a value,
#   and run again.
# - **All at once**: `make course` runs everything and leaves executed notebooks in
#   `runs/mini/notebooks/` and figures in `runs/mini/figures/`. Killed? The same command goes on.
# - **Check yourself** at the end of each notebook answers at once: replace `None`, run the cell.
#   There is a hint, and an answer to unfold.
# - **Every figure has a passport**: beside `<name>.pdf` and `<name>.png` lies `<name>.json`. It
#   names notebook, run, settings, seed and versions, and says in words what is to be seen.
# - **To change a notebook for good**, edit `notebooks/src/*.py`, which holds the same cells as
#   text, and run `make notebooks`.
#
# ## 7 · What is real, and what is generated
#
# | part | `colab`, `paper` | `smoke`, `mini`: no account, no GPU |
# |---|---|---|
# | diffusion model | Stable Diffusion 1.5 | the same `diffusers` classes, tiny, weights included |
# | captioner | BLIP-base | the same `transformers` classes, tiny, weights included |
# | captions | OpenAI's API | the scene's own words, marked `scene grammar`, **never** "gpt-4" |
# | image features | EfficientNet-Lite0 (ImageNet) | the same: real weights |
# | pictures | frames of the show, photos | generated scenes, and freely licensed starter files |
#
# **Be clear about what that means.** The generated natural pictures are *photo-like*, not
# photographs. The numbers of `mini` say how well a method works in this world; they must not be put
# beside published scores on photographs, and no figure here does.
#
# **Copyright and data.** *Tom and Jerry* belongs to its owners. No frame of the show is in this
# repository and none is needed. If you hold the data lawfully, `colab` and `paper` read it: 5478
# labelled frames on Kaggle, laboratory mice by Andresen et al. (to be cited:
# doi 10.1371/journal.pone.0228059), any set of cat photos, your own recordings. Whether you may
# share pictures or weights made from them is for you to find out first. The starter files, 148
# drawings, 4 photos and a film clip, carry author and licence one by one in
# `data/starter/attribution.csv`.

# %% [markdown]
# ## Check yourself
#
# ### Exercise 1 · Whose seed is it?
#
# Write `range_of(seed)`: the name of the range in `scenes.RANGES` that a seed belongs to. Ranges
# include their first seed and exclude their last.


# %%
def range_of(number: int) -> str | None:
    return None  # ← yours


asked = (12, 1_999_999, 2_000_000, 3_141_592, 4_000_000, 5_999_999)
check(
    [range_of(number) for number in asked],
    ["zoo", "cartoon", "natural", "judges", "validation", "test"],
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scenes.RANGES.items()` gives `(name, (low, high))`; the seed you look for has
# `low <= number < high`.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def range_of(number: int) -> str | None:
#     return next(name for name, (low, high) in scenes.RANGES.items() if low <= number < high)
# ```
# </details>
#
# ### Exercise 2 · The laziest translator
#
# Write `lazy(images)`: a translator that **ignores** its input, and still has a smaller pixel error
# to the twins than the cartoon itself. You may use natural pictures of other scenes, such as
# `draw(48, 48, "natural")`.


# %%
def lazy(images: np.ndarray) -> np.ndarray | None:
    return None  # ← yours


made = lazy(cartoon)
check(
    None if made is None else (error(made) < error(cartoon), np.allclose(made, lazy(1 - cartoon))),
    (True, True),
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which single picture has the smallest mean squared distance to all natural pictures?
# </details>
#
# <details><summary>Answer</summary>
#
# The mean picture. It shows no animal at all and still wins: a pixel error rewards blur. That is
# why notebook 06 asks judges who look for class, action, outline and keypoints instead.
#
# ```python
# def lazy(images: np.ndarray) -> np.ndarray | None:
#     return np.broadcast_to(draw(48, 48, "natural").mean(0), images.shape)
# ```
# </details>

# %% [markdown]
# ## Takeaways
#
# - Unpaired translation has no right answer to copy; it needs a model of the target and a hold on
#   the source.
# - Matching statistics changes the colours and nothing else.
# - The generated world hides a twin behind each cartoon: never trained on, only used to score.
# - One course, four profiles; what isn't free to ship isn't here.

# %%
# NBVAL_CHECK_OUTPUT
got = {
    "colour gap, recoloured": (gap(recoloured), (None, 0.08)),
    "error, recoloured / cartoon": (error(recoloured) / error(cartoon), (0.65, 1.0)),
    "flat share, recoloured - cartoon": (flat(recoloured) - flat(cartoon), (-0.05, 0.05)),
}
compare(profile, {what: (value, {profile: ends}) for what, (value, ends) in got.items()})

# %% [markdown]
# These scenes are the same in every profile; the ranges allow for other seeds.
#
# **Next:** [01 · Data collection](01_data_collection.ipynb), where the pictures come from and how
# not to fool yourself with them.
