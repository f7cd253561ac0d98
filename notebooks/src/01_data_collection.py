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
# # 01 · Data collection
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/01_data_collection.ipynb)
# [![View on GitHub](https://img.shields.io/badge/GitHub-view-black?logo=github)](https://github.com/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/01_data_collection.ipynb)
#
# **In this notebook pictures from several sources become one data set that you can trust: every
# picture accounted for, the bad ones out, nothing leaking from training into evaluation.**

# %% [markdown]
# **What you will learn**
#
# - how a *manifest* keeps the story of every picture, the dropped ones included;
# - how damaged, blurred, marked and **duplicate** pictures are found, and how well, measured;
# - why pictures are split by **group**, and how much a careless split flatters you, measured;
# - how a film is cut into shots;
# - how to look at a data set before training on it, and overrule what the machine decided.
#
# **You need** nothing from before; [00](00_start_here.ipynb) explains the generated world.
#
# | profile | time | memory | disk | cost |
# |---|---|---|---|---|
# | `smoke` | a minute | 1 GB | 30 MB | nothing |
# | `mini` | 2 minutes on two cores | 1 GB | 60 MB | nothing |
# | `colab`, `paper` | the downloads, then minutes (estimate) | 2 GB | 20 GB | nothing |
#
# **On the poster** this is *Data*: "acquiring 5000 images for each of the source/cartoon and
# target/natural domains … from Kaggle, Andresen et al., and Tom & Jerry show videos, each
# meticulously curated".

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
import csv
import hashlib
import itertools
import random
import shutil
from collections import Counter, defaultdict

import matplotlib as mpl
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from tomjerry_utils import UserError, canvas, collect, collection_figures, curate, features
from tomjerry_utils import figures, films, picture_gallery, scenes
from tomjerry_utils.animal_masks import read_mask
from tomjerry_utils.composites import composite
from tomjerry_utils.images import load_image, resize
from tomjerry_utils.judging import kind_of, split_of
from tomjerry_utils.lessons import check, compare
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import data_root, run_root

# %% tags=["parameters"]
profile: str = "mini"  # smoke, mini, colab, paper
seed: int = 0  # everything random follows from it

# %%
settings = load_profile(profile, seed=seed)

# %% [markdown]
# ## 1 · Sources
#
# A profile names its sources. Each one is a function that names its pictures before it reads them,
# so that a run that was stopped goes on with what is missing.
#
# | source | what | used by |
# |---|---|---|
# | `scenes` | generated cartoons and natural pictures, from seeds of their own | smoke, mini |
# | `starter` | drawings of cats and mice and 4 photos, freely licensed | smoke, mini |
# | `clip` | 20 seconds of *Big Buck Bunny*, a real cartoon film | smoke, mini |
# | `kaggle` | 5478 frames of the show; photos of cats; the mice of Andresen et al. | colab, paper |
# | `folder`, `video` | your own pictures and films, in `data/raw/` | colab, paper |
#
# One call collects them all, or returns at once if that has been done.

# %%
collection = collect.ensure(settings)

# %% [markdown]
# ## 2 · The manifest
#
# Every picture met has a row, kept or not. A row says where the picture comes from, what it may be
# used for, and which bytes it has:

# %%
# NBVAL_CHECK_OUTPUT
row = collection.select(domain="cartoon")[0]
for column in ("file_name", "source", "origin", "group", "split", "class", "label", "text"):
    print(f"{column:<10} {row[column]}")
print(f"{'sha256':<10} {row['sha256'][:16]}…")

# %%
# NBVAL_CHECK_OUTPUT
kept = [row for row in collection.rows if row["kept"]]
counts = Counter((row["source"], row["domain"], row["role"], row["split"]) for row in kept)
print(f"{len(collection.rows)} pictures met, {len(kept)} kept\n")
for (source, domain, role, split), count in sorted(counts.items()):
    print(f"{source:<8} {domain:<8} {role:<14} {split:<11} {count:>5}")

# %% [markdown]
# Only the role `training` is ever trained on. The starter pictures and the film look like nothing
# in the training set; they stay `out_of_domain`, as an honest test of the finished translator. And
# there is **no test split**: the test scenes are drawn by the evaluation itself, so that nothing
# can learn from them by accident.
#
# Now the best part of any data set: looking at it.

# %%
rows = collect.gallery(collection, 8, seed=settings.seed)
size = max(64, settings.image_size)
pictures = {title: list(collection.images(part, size)) for title, part in rows}
blank = np.full((size, size, 3), 255, np.uint8)
sheet = [picture for row in pictures.values() for picture in (row + [blank] * 8)[:8]]
figure = figures.contact_sheet(
    sheet,
    columns=8,
    row_titles=[title.replace(": ", "\n") for title in pictures],
    cell=1.0,
)
saved = figures.save_figure(
    figure,
    "data_samples",
    alt="Rows of random pictures from the data set: cartoon Tom, Jerry and both; natural cat, "
    "mouse and both; then drawings and photos from the starter set, and frames of a film.",
    run=settings,
    notebook="01_data_collection",
)

# %% [markdown]
# ## 3 · Curation
#
# "Each meticulously curated", says the poster. A collection from the wild holds what nobody wants:
# files that broke on the way, thumbnails, blur, watermarks, photographs among the drawings, and
# above all the same picture again: saved anew, made smaller, cropped, with a logo in its corner.
# The shipped pictures were chosen by hand, so there is little to find in them. To see what curation
# does, and whether it does it right, we **soil a copy** of them and see if it is cleaned.

# %%
starter = data_root() / "starter"
drawings = sorted((starter / "cartoon" / "cat").glob("*.png"))[::3]
soiled = run_root(settings) / "lessons" / "soiled"
print(f"{len(drawings)} drawings to soil")


# %%
def crop(image: Image.Image) -> Image.Image:
    """Without the outer twentieth."""
    w, h = image.size
    return image.crop((w // 40, h // 40, w - w // 40, h - h // 40))


def logo(image: Image.Image) -> Image.Image:
    """With a mark in its corner."""
    marked = image.copy()
    side = image.width // 8
    ImageDraw.Draw(marked).rectangle((4, 4, side, side), fill=(200, 30, 30))
    return marked


# %%
def mark(image: Image.Image) -> Image.Image:
    """With a watermark all over."""
    marked, size = image.copy(), image.width // 7
    for y in range(0, image.height, 2 * size):
        text = "© all rights reserved"
        ImageDraw.Draw(marked).text((4, y), text, fill=(90, 90, 90), font_size=size)
    return marked


def sign(image: Image.Image) -> Image.Image:
    """With its owner's name in a corner."""
    signed, size = image.copy(), image.width // 18
    at = (image.width - size, image.height - size)
    pen = ImageDraw.Draw(signed)
    pen.text(at, "© R. Mouse 2026", fill=(70, 70, 70), font_size=size, anchor="rb")
    return signed


# %% [markdown]
# Each drawing goes in three times: as it is, in another guise, and spoiled.

# %%
copies = {
    "re-encoded": lambda i: i,
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2)),
    "cropped by 5 %": crop,
    "15 % brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.15),
    "with a logo": logo,
}
spoiled = {
    "blurred": lambda i: i.filter(ImageFilter.GaussianBlur(i.width / 24)),
    "watermark": mark,
    "signed": sign,
    "tiny": lambda i: i.resize((40, 40)),
}
shutil.rmtree(soiled, ignore_errors=True)
(soiled / "cartoon" / "cat").mkdir(parents=True)
planted = {}
for number, path in enumerate(drawings):
    image = Image.fromarray(load_image(path))
    image.save(soiled / "cartoon" / "cat" / f"{path.stem}.png")
    for kinds in (copies, spoiled):
        kind = list(kinds)[number % len(kinds)]
        planted[f"cartoon/cat/{path.stem}, {kind}.jpg"] = (kind, kinds is copies)
        guise = kinds[kind](image)
        guise.save(soiled / "cartoon" / "cat" / f"{path.stem}, {kind}.jpg", quality=80)
_ = (soiled / "cartoon" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 half a download")

# %% [markdown]
# Two things decide about duplicates. A **perceptual hash** proposes: the signs of a picture's 64
# slowest cosine waves, which a re-encoding or another size hardly changes. How many signs differ is
# the distance. Among a million pictures that is a search, not a comparison of all with all. But two
# different cats on white look alike to so coarse an eye, so the **features** of a network trained
# on photographs confirm, on the few pairs that were proposed. `tomjerry collect` does all of it:

# %%
cleaned = collect.collect_command(
    soiled.with_name("cleaned"), folders=[str(soiled)], smallest=settings.collect.smallest
)

# %%
# NBVAL_CHECK_OUTPUT
told = {row["origin"]: kind_of(row["reason"]) or "kept" for row in cleaned.rows}
became = defaultdict(Counter)
for origin, (kind, _) in planted.items():
    became[kind][told[origin]] += 1
for kind, found in became.items():
    print(f"{kind:<16}", ", ".join(f"{count} {what}" for what, count in found.most_common()))

# %%
figure, left = collection_figures.funnel(cleaned.rows)
saved = figures.save_figure(
    figure,
    "data_funnel",
    alt="Left: pictures left after each step of curation. Right: pictures dropped, by reason; near "
    "duplicates lead, then blur, watermarks and size.",
    run=settings,
    notebook="01_data_collection",
    extra=left,
)

# %%
pairs = [
    (row, next(other for other in cleaned.rows if other["file_name"] == row["duplicate_of"]))
    for row in cleaned.rows
    if row["duplicate_of"]
]
shown = [pair for pair in pairs if pair[0]["origin"] in planted][:8]
figure = figures.contact_sheet(
    [resize(cleaned.thumb(row), 96) for side in (1, 0) for row in (pair[side] for pair in shown)],
    ["kept"] * len(shown) + [planted[row["origin"]][0] for row, _ in shown],
    columns=len(shown),
    cell=1.0,
)
saved = figures.save_figure(
    figure,
    "data_duplicates",
    alt="Pairs of pictures that were found to be the same: above the one that was kept, below the "
    "copy that was dropped, with what had been done to it.",
    run=settings,
    notebook="01_data_collection",
)

# %% [markdown]
# How good is that? Of the copies that were planted, the share that was found is the **recall**; of
# the pictures that were called near duplicates, the share that is one is the **precision**. The set
# itself holds real ones too: vendors redraw their emoji a little from one release to the next.
# So what was called a duplicate and was not planted is for you to judge, below.

# %%
# NBVAL_CHECK_OUTPUT
is_copy = {origin for origin, (_, copy) in planted.items() if copy}
same = {row["origin"]: row["cluster"] for row in cleaned.rows}
caught = [o for o in is_copy if same[o] and same[o] == same[o.split(", ")[0] + ".png"]]
duplicate_recall = len(caught) / len(is_copy)
print(f"{len(caught)} of {len(is_copy)} planted copies found: recall {duplicate_recall:.3f}")

# %% [markdown]
# ### You decide
#
# No screen is always right. The gallery shows what was kept and dropped, with the reasons; a person
# overrules it with a key. Decisions are lines of a small file, found again by the picture's hash,
# which you commit and pass to `tomjerry collect --decisions` or name in the profile: whoever
# collects next gets what you decided. (Where no one can click, as on GitHub, it is a picture.)

# %%
decisions = cleaned.folder / "decisions.jsonl"
picture_gallery.review(cleaned.rows, cleaned.thumb, decisions)

# %% [markdown]
# ## 4 · Splits that do not leak
#
# A model is judged on pictures that it has not seen. But "not seen" is slippery: two frames of one
# shot, or two expressions of one drawn cat, are nearly the same picture. So pictures come in
# **groups** (a shot, a character, a scene) and a whole group goes to one side; groups that hold
# near duplicates of each other are joined into one. Which side follows from the group's name $g$
# alone, by a hash that spreads evenly over $[0, 1)$:
#
# $$\text{split}(g) = \begin{cases}\text{validation} & \text{if } \text{hash}(g) / 2^{64} < f \\
# \text{train} & \text{otherwise}\end{cases}$$
#
# No list of splits has to be kept, and a group stays on its side whatever is added later, unless a
# near duplicate joins it to another. In code it's three lines, and the package gives the same
# answer for every row:

# %%
fraction = settings.collect.validation_fraction


def side(group: str) -> str:
    """The split of a group, as in the formula."""
    digest = hashlib.sha256(f"tomjerry split 1:{group}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") / 2**64 < fraction else "train"


assert all(side(row["group"]) == row["split"] for row in kept)
assert all(side(row["group"]) == split_of(row["group"], fraction) for row in kept)

sides = defaultdict(set)
for row in kept:
    sides[row["group"]].add(row["split"])
assert all(len(found) == 1 for found in sides.values())

# %% [markdown]
# ### What a leak is worth
#
# Is this worth the trouble? Measure it, on the **real** drawings that come with the course. Here is
# a classifier with no understanding at all: it shrinks a drawing to 16 × 16 pixels and answers
# "cat" or "mouse" as the most similar drawing it knows does (one nearest neighbour). We train it on
# 80 % of the drawings and ask it about the rest, a hundred times: once drawing lots for each
# *picture*, once for each *group*, which here is one character with all its faces.

# %%
with (starter / "attribution.csv").open(newline="", encoding="utf-8") as file:
    drawings = [
        {"picture": r["file"], "group": r["character_group"], "mouse": r["class"] == "mouse"}
        for r in csv.DictReader(file)
        if r["domain"] == "cartoon" and r["class"] in ("cat", "mouse")
    ]
thumbs = np.stack([load_image(starter / r["picture"], 16) for r in drawings]).astype(float)
distance = np.stack([np.square(thumbs - one).sum((1, 2, 3)) for one in thumbs])
mouse = np.array([r["mouse"] for r in drawings])
print(f"{len(drawings)} drawings of {len({r['group'] for r in drawings})} characters")


# %%
def score(units: list[str], draws: random.Random) -> float:
    """Accuracy on a fifth of the units, mean of cats and mice, so that guessing gets 0.5."""
    names = sorted(set(units))
    held = set(draws.sample(names, len(names) // 5))
    test = np.array([unit in held for unit in units])
    right = mouse[~test][distance[test][:, ~test].argmin(1)] == mouse[test]
    kinds = [right[mouse[test] == kind] for kind in (False, True)]
    return float(np.mean([kind.mean() for kind in kinds if len(kind)]))


# %%
# NBVAL_CHECK_OUTPUT
leak = {}
for unit in ("picture", "group"):
    draws = random.Random(settings.seed)
    leak[unit] = [score([r[unit] for r in drawings], draws) for _ in range(100)]
    print(f"split by {unit:<8} accuracy {np.mean(leak[unit]):.3f} ± {np.std(leak[unit]):.3f}")

# %%
with mpl.rc_context(canvas.style()):
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for line, scores in enumerate(leak.values()):
        color = (canvas.VERMILLION, canvas.BLUE)[line]
        spread = line + 0.28 * np.random.default_rng(0).uniform(-1, 1, len(scores))
        axes.plot(scores, spread, "o", color=color, alpha=0.35, markersize=6, markeredgewidth=0)
        axes.plot([np.mean(scores)] * 2, [line - 0.38, line + 0.38], color=color, linewidth=3)
    axes.axvline(0.5, color=canvas.MUTED, linewidth=1, linestyle=":")
    axes.text(0.505, 1.44, "guessing", color=canvas.MUTED, fontsize=9)
    axes.set_yticks([0, 1], [f"split by {unit}" for unit in leak])
    axes.set_ylim(1.5, -0.5)
    axes.grid(False)
    axes.set_xlabel("accuracy on held-out drawings, mean of cats and mice")
saved = figures.save_figure(
    figure,
    "split_leak",
    alt="Accuracies of a hundred random splits as dots. Split by picture they lie to the right, "
    "split by group much nearer to guessing: the difference is leakage.",
    run=settings,
    notebook="01_data_collection",
    extra={unit: float(np.mean(scores)) for unit, scores in leak.items()},
)

# %% [markdown]
# Same classifier, same drawings. The upper row would have gone into a paper; the lower one is what
# a new character would meet. **The difference isn't skill, it is leakage:** the classifier had seen
# the same cat with another smile.
#
# ## 5 · A film has shots
#
# Frames within a shot are one group, so the shots must be found. A *cut* is a frame $i$ where two
# things change at once, and only there: the colours and the edges. With $h$ the colour histogram
# and $e$ the strength of the edges, both of a thumbnail, the package looks for peaks of
#
# $$s_i = \tfrac12 \lVert h_i - h_{i-1} \rVert_1 \; (1 - \text{corr}(e_i, e_{i-1}))$$
#
# that stand out from the frames on either side and do not come back as a flash would. For the clip
# that comes with the course the true cuts are known, so the detector can be scored: **precision**
# is the share of found cuts that are real, **recall** the share of real cuts that were found.

# %%
# NBVAL_CHECK_OUTPUT
clip = starter / "clip" / "big_buck_bunny_20s.mp4"
film = films.open_film(clip)
with (starter / "clip" / "cuts.csv").open(newline="", encoding="utf-8") as file:
    true = {int(line["first_frame_of_new_shot"]) for line in csv.DictReader(file)}
found = set(film.cuts) - {0}
precision, recall = len(found & true) / len(found), len(found & true) / len(true)
print(f"{len(true)} true cuts, {len(found)} found: precision {precision:.3f}, recall {recall:.3f}")

# %%
middles = film.sample(every_s=60)
frames = [f.to_ndarray(format="rgb24") for i, f in films.read_frames(clip) if i in middles]
figure = figures.contact_sheet(
    [resize(frame, 160) for frame in frames],
    [f"shot {film.shot_of(i)}, {film.times[i]:.1f} s" for i in middles],
    columns=5,
    cell=1.3,
)
saved = figures.save_figure(
    figure,
    "film_shots",
    alt="The middle frame of each of the nine shots of the film clip with its time: rodents, a "
    "rabbit and a butterfly in a meadow.",
    run=settings,
    notebook="01_data_collection",
)

# %% [markdown]
# *Big Buck Bunny* © 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
#
# ## 6 · A cat and a mouse in one picture
#
# The class `both` has a difficulty of its own: hardly anyone photographs a cat and a mouse
# together. Where a collection holds too few such pictures, `collect` **composes** them. The mouse
# of one photograph is cut out by its mask and set beside the cat of another: on the ground that
# the cat is on, about a third as tall, clear of its face, its light moved a little towards the
# scene's, with a shadow below. Manifest and data sheet call such a picture a composite, and a
# setting leaves them out. The starter set has no photograph of a mouse, so generated ones stand in
# here.

# %%
names = ("gcompris__kitten", "gcompris__playing-kitten", "plasma__cat", "skimage__chelsea")
drawn = (scenes.describe(number) for number in range(*scenes.RANGES["natural"]))
mice = [scene for scene in itertools.islice(drawn, 20) if scene.cls == "jerry"]
composed = []
for number, (name, scene) in enumerate(zip(names, mice[1:], strict=False), start=1):
    cat = load_image(starter / "photo" / "cat" / f"{name}.jpg")
    where = read_mask(starter / "masks" / f"{name}.png")
    mouse = scenes.render(scene, "natural", 512, truth=True)
    try:
        composed.append(composite(cat, where, mouse.image, mouse.mask == 2, seed=number))
        print(f"{name}: {composed[-1].note}")
    except UserError as refused:
        print(f"{name}: no composite: {refused}")

# %%
colours = np.array([(244, 240, 232), (0, 114, 178), (230, 159, 0)], np.uint8)
figure = figures.contact_sheet(
    [made.image for made in composed] + [colours[made.mask] for made in composed],
    columns=len(composed),
    row_titles=["composite", "who is where"],
    cell=2.2,
)
saved = figures.save_figure(
    figure,
    "data_composites",
    alt="Photographs of cats, each with a small generated mouse set beside the cat; below them the "
    "masks, the cat in blue and the mouse in orange.",
    run=settings,
    notebook="01_data_collection",
)

# %% [markdown]
# The last cat fills its frame: the ground that a mouse could stand on is not in the picture, and a
# composite that would need it is refused, with the reason in its row. And look at the mice: in
# place, in size and in light they fit, and still a glance tells them from the cat. A composite is
# only as natural as what it's made of. The masks are guesses as well, U²-Net-p's: it took a plank
# for a part of the first cat. So composites are training material, and nothing is measured on one.
#
# ## 7 · Balance, and the gap
#
# A model learns what is common and guesses it where it's unsure. So: how common is what?


# %%
def shares(column: str, values: tuple[str, ...], domain: str) -> list[int]:
    counted = Counter(row[column] for row in collection.select(domain=domain))
    return [counted[value] for value in values]


# %%
with mpl.rc_context(canvas.style()):
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    columns = {"class": scenes.CLASSES, "action": scenes.ACTIONS, "place": scenes.PLACES}
    widths = [len(values) for values in columns.values()]
    all_axes = figure.subplots(1, 3, sharey=True, width_ratios=widths)
    for axes, (column, values) in zip(all_axes, columns.items(), strict=True):
        for shift, domain in ((-0.2, "cartoon"), (0.2, "natural")):
            color = canvas.BLUE if domain == "cartoon" else canvas.ORANGE
            at = np.arange(len(values)) + shift
            axes.bar(at, shares(column, values, domain), 0.36, color=color, label=domain)
        axes.set_xticks(range(len(values)), [value.replace(" ", "\n") for value in values])
        axes.set_title(column)
    all_axes[0].set_ylabel("training pictures")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
saved = figures.save_figure(
    figure,
    "data_balance",
    alt="Bars of the number of training pictures for each class, action and place, cartoon beside "
    "natural: classes are equal by design, actions and places nearly so by chance.",
    run=settings,
    notebook="01_data_collection",
)

# %% [markdown]
# The classes are equal because we took the first $n$ of each; actions and places are as the seeds
# fell, close to equal. Real collections are not like that: of the 5478 labelled Kaggle frames some
# classes hold twice as many as others, which is why `collect` takes at most `per_class` of each,
# spread over as many groups as there are.
#
# And how far is it from one domain to the other? In the features of the network that screened the
# pictures, each picture is a point. Here are the cartoons, the natural pictures and the real
# drawings, flattened to the two directions in which they differ most:

# %%
groups = {
    "cartoon scenes": collection.select(domain="cartoon")[:200],
    "natural scenes": collection.select(domain="natural")[:200],
    "starter drawings": collection.select(domain="cartoon", source="starter"),
    "film clip": collection.select(source="clip"),
}
seen = {name: collection.images(rows, 96) for name, rows in groups.items()}
points = {name: features.extract(images) for name, images in seen.items()}
figure, gaps = collection_figures.domain_gap(points, seen)
saved = figures.save_figure(
    figure,
    "domain_gap",
    alt="Pictures as points on a plane: cartoon scenes, natural scenes, starter drawings and film "
    "frames form four separate clouds.",
    run=settings,
    notebook="01_data_collection",
    extra=gaps,
)

# %%
# NBVAL_CHECK_OUTPUT
for pair, gap in gaps.items():
    print(f"{pair:<36} {gap:.2f} of the variance lies between them")

# %% [markdown]
# Translating means crossing that gap while keeping all that the two sides share. And the drawings
# lie far from the cartoons that the course trains on: they will be the harder test.
#
# ## 8 · Nothing hides
#
# The last question before anyone may train: does any picture sit on both sides, or in both domains?

# %%
# NBVAL_CHECK_OUTPUT
training = collection.select()
seeds = [{r["seed"] for r in training if r["domain"] == d} - {None} for d in scenes.STYLES]
hashes = {s: {r["sha256"] for r in kept if r["split"] == s} for s in ("train", "validation")}
drawn = [r for r in training if r["source"] == "scenes"]
outside = [r for r in drawn if r["seed"] not in range(*scenes.RANGES[r["domain"]])]
held_out = len(collection.select(split="validation")) / len(training)
print("scenes in both domains:    ", len(seeds[0] & seeds[1]))
print("pictures in both splits:   ", len(hashes["train"] & hashes["validation"]))
print("seeds outside their range: ", len(outside))
print(f"share held out:             {held_out:.3f}, asked for {fraction}")

# %% [markdown]
# All of this is also written down in words. The **data sheet** travels with the data, and says what
# is missing as plainly as what is there:

# %%
sheet_text = (collection.folder / curate.DATASHEET).read_text(encoding="utf-8")
display(Markdown(sheet_text[sheet_text.index("## Known gaps") :].replace("## ", "#### ")))

# %% [markdown]
# ## 9 · Your own
#
# With a Kaggle account and films of your own, nothing changes but what is named. On the command
# line, into a folder:
#
# ```bash
# tomjerry collect --video episodes/ --domain cartoon --out data/show
# tomjerry collect --kaggle balabaskar/tom-and-jerry-image-classification --out data/frames
# tomjerry collect --folder my_photos --decisions decisions.jsonl --out data/mine
# tomjerry export --profile paper --layout webdataset --out shards
# ```
#
# or in a profile, as `paper` does it, for the whole course. Films are cut into shots, bars and
# borders cropped, black, blurred and title frames left out; laboratory mice come as the archive
# that their authors published; where no photograph shows a cat and a mouse together, the class
# `both` is composed from one of each and marked as such, or left out. A run that breaks off goes on
# where it was, and files that you add later cost only themselves.

# %% [markdown]
# ## Check yourself
#
# ### Exercise 1 · Find the leak
#
# Write `leaked(train, test)`: the sorted names of the groups that have pictures on both sides. Each
# argument is a list of manifest rows.


# %%
def leaked(train: list[dict], test: list[dict]) -> list[str] | None:
    return None  # ← yours


train = [{"group": name} for name in ("tom/sad", "tom/angry", "jerry/happy", "tom/sad")]
test = [{"group": name} for name in ("tom/sad", "jerry/asleep", "jerry/happy")]
check(leaked(train, test), ["jerry/happy", "tom/sad"])

# %% [markdown]
# <details><summary>Hint</summary>
#
# A set comprehension over `row["group"]` for each side, then `&`.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def leaked(train: list[dict], test: list[dict]) -> list[str] | None:
#     return sorted({row["group"] for row in train} & {row["group"] for row in test})
# ```
# </details>
#
# ### Exercise 2 · How many shots would a longer film need?
#
# Splitting by group has a price: with few groups the held-out share is far from what you asked
# for. If each of $n$ groups is held out with probability $f = 0.1$, independently, what is the
# probability that **no** group at all is held out, for the 9 shots of this clip, and for 100?

# %%
nobody: list[float] | None = None  # ← yours: [for 9 groups, for 100 groups]

check(nobody, [np.exp(n * np.log1p(-0.1)) for n in (9, 100)], tolerance=0.001)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One group stays in training with probability $1 - f$. All of them do so together with …
# </details>
#
# <details><summary>Answer</summary>
#
# $(1 - f)^n$. With nine shots a validation set would be missing in two films of five; a hundred
# groups make it a matter of 1 in 38 000.
#
# ```python
# nobody = [0.9**9, 0.9**100]
# ```
# </details>

# %% [markdown]
# ## Takeaways
#
# - A manifest has a row for every picture met, with the reason where one was dropped.
# - Test a cleaner on dirt that you planted. What you did not plant, look at.
# - Split by group, by a hash of the group's name. A careless split can be worth more than a better
#   model, and is worth nothing.
# - Cartoon and natural pictures come from different seeds: the data is unpaired by construction.
# - Look at the pictures, count the classes, write down what is missing.

# %%
# NBVAL_CHECK_OUTPUT
gain = float(np.mean(leak["picture"]) - np.mean(leak["group"]))
got = {
    "accuracy gained by leaking": (gain, (0.05, 0.3)),
    "planted copies found": (duplicate_recall, (0.95, 1)),
    "cut precision": (precision, (1, 1)),
    "cut recall": (recall, (1, 1)),
}
rows = {what: (value, {profile: ends}) for what, (value, ends) in got.items()}
rows["share held out"] = (held_out, {"smoke": (0.02, 0.3), "mini": (0.07, 0.13)})
compare(profile, rows)

# %% [markdown]
# **Next:** [02 · GPT-4 captioning](02_gpt4_captioning.ipynb), where a random sample of these
# pictures gets words.
