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
# # 03 · BLIP fine-tuning
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/03_blip_finetuning.ipynb)
# [![View on GitHub](https://img.shields.io/badge/GitHub-view-black?logo=github)](https://github.com/tomjerry-real-life/tomjerry-real-life/blob/main/notebooks/03_blip_finetuning.ipynb)
#
# **In this notebook BLIP learns who Tom and Jerry are, and then describes every picture of both
# domains.**

# %% [markdown]
# **What you will learn**
#
# - what BLIP is, and which three things it is trained to do;
# - a trap that costs most first attempts: a loss that counts the padding;
# - how to tell a captioner that sees from one that has learnt to sound right;
# - how one space for pictures and words makes a cartoon comparable with a photograph.
#
# **You need** the captions of [02](02_gpt4_captioning.ipynb); if they are missing, they are made.
#
# | profile | time | memory | disk | cost |
# |---|---|---|---|---|
# | `smoke` | half a minute | 0.8 GB | 10 MB | nothing |
# | `mini` | 1 minute on two cores | 1 GB | 10 MB | nothing |
# | `colab` | about an hour on a T4 (estimate) | 12 GB of GPU | 2 GB | nothing |
# | `paper` | the poster: 15 hours on an A40 | 24 GB of GPU | 2 GB | nothing |
#
# **On the poster** this is *Methods*: "Fine-tuned for scene description, BLIP, a multi-modal model,
# facilitates content transfer across image domains."

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
import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from tomjerry_utils import blip, canvas, collect, figures, scenes
from tomjerry_utils.lessons import check, compare
from tomjerry_utils.profiles import load_profile

# %% tags=["parameters"]
profile: str = "mini"  # smoke, mini, colab, paper
seed: int = 0  # everything random follows from it

# %%
settings = load_profile(profile, seed=seed)
collection = collect.ensure(settings)
before = blip.load(settings.blip.pretrained)

# %% [markdown]
# ## 1 · BLIP in two sentences
#
# A vision tower turns a picture into tokens. Around it stand a **decoder** that writes a caption
# word by word while it looks at those tokens, a **text encoder** whose summary of a caption can be
# compared with the picture's, and a **matching head** that reads a caption with the picture before
# it and says whether the two belong together.
#
# The poster calls the whole thing $\varphi$. Each part has its loss, and they are trained together:
#
# $$\mathcal{L} = \underbrace{-\tfrac1N \textstyle\sum_i \log p(w_i \mid w_{<i}, \varphi(x))}_{
# \text{writing}} \;+\; w\,\big(\underbrace{\mathcal{L}_\text{ITC}}_{\text{contrast}} +
# \underbrace{\mathcal{L}_\text{ITM}}_{\text{matching}}\big)$$
#
# Contrast pulls the embedding of a picture towards that of its own caption and away from the others
# in the batch; matching is a yes-or-no question. All three share one tower, so what it learns from
# writing also shapes the similarity that notebook 05 will use.
#
# In `mini` the tower is tiny and has seen one thing only before: a *zoo* of natural animals without
# names. It stands to this notebook as BLIP-base, trained on millions of photographs, stands to the
# poster: it can see, but has never met Tom.

# %%
# NBVAL_CHECK_OUTPUT
print(f"{'part':<14} {'parameters':>11}")
for name, module in before.parts().items():
    print(f"{name:<14} {sum(p.numel() for p in module.parameters()):>11,}")
print(f"{'trained':<14} {blip.expected_parameters(before, settings.blip.lora_rank):>11,}")
size = before.image_size
tokens = before.vision_features(np.zeros((1, size, size, 3), np.uint8)).shape[1]
print(f"{size} × {size} pixels become {tokens} tokens")

# %% [markdown]
# ## 2 · The pad trap
#
# Captions have different lengths, and a batch is a rectangle: short ones are filled up with pads.
# The loss must not count them. Current `transformers` does **not** leave them out for you: hand it
# `labels=input_ids`, as many scripts do, and every pad is a word to be learnt. The decoder then
# spends its effort on writing pads, which is easy, so the loss looks wonderful.
#
# Two captions, filled up to 24 tokens, as such a script would:

# %%
held = [row for row in collection.select(split="validation") if row["text"]]
held = sorted(held or [r for r in collection.select() if r["text"]], key=lambda r: len(r["text"]))
pair = [held[0], held[-1]]
texts = [row["text"] for row in pair]
with torch.no_grad():
    features = before.vision_features(collection.images(pair, size))
    ids, mask = before.tokens(texts, decode=True, length=24)
    logits = before.captioner.text_decoder(
        ids, attention_mask=mask, encoder_hidden_states=features
    ).logits
    # Position i predicts the word at i + 1.
    losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    library = before.captioner.text_decoder(
        ids, attention_mask=mask, encoder_hidden_states=features, labels=ids
    ).loss
words = mask[:, 1:].bool()
masked = losses[words].mean()
ours = before.caption_loss(collection.images(pair, size), texts).detach()

# The library counts the pads; the package does not.
assert torch.isclose(library, losses.mean(), atol=1e-4)
assert torch.isclose(ours, masked, atol=1e-4)

# %%
with mpl.rc_context(canvas.style()):
    figure = Figure(figsize=(11, 2.3), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(losses.clamp(max=8), cmap="cividis", vmin=0, vmax=8, aspect="auto")
    for (line, at), value in np.ndenumerate(losses.numpy()):
        token = before.tokenizer.convert_ids_to_tokens(int(ids[line, at + 1]))
        text = {"[SEP]": "end", "[PAD]": "pad"}.get(token, token)
        color = "black" if value > 4 else "white"
        axes.text(at, line, text, ha="center", va="center", fontsize=8.5, rotation=90, color=color)
    starts = words.sum(1).tolist()
    for line, start in enumerate(starts):
        axes.plot([start - 0.5] * 2, [line - 0.5, line + 0.5], color=canvas.VERMILLION, linewidth=3)
    axes.set_xticks([])
    axes.set_yticks([0, 1], ["shortest", "longest"])
    axes.grid(False)
    figure.colorbar(shown, ax=axes, label="−log p, 8 or more is yellow", pad=0.01)
saved = figures.save_figure(
    figure,
    "pad_trap",
    alt="The loss of each token of two captions, before fine-tuning. Right of a red line in each "
    "row stand the pads, which have a loss of their own that a careless mean would count.",
    run=settings,
    notebook="03_blip_finetuning",
)

# %%
# NBVAL_CHECK_OUTPUT
pads = float(losses[~words].sum() / losses.sum())
print(f"tokens that are pads:                {float((~words).float().mean()):.3f}")
print(f"loss, pads counted:                  {float(library):.3f}")
print(f"loss, words only:                    {float(masked):.3f}")
print(f"share of the loss that is about pads: {pads:.3f}")

# %% [markdown]
# Right of the red line nothing is to be learnt, and yet that is where most of the careless loss
# comes from at first. After a few hundred steps it is the other way round: pads are easy, their
# loss falls to nothing, and the mean over all tokens looks much better than the captions are. The
# remedy is one line: the label of every pad becomes $-100$, which cross-entropy skips.
#
# Left of the line you can read what this model knows: the place, the direction, even the action.
# What surprises it is *who*: it has never met a name.
#
# ## 3 · Fine-tuning
#
# Now the real thing, or its result if it has been done. Half of the pictures are mirrored on the
# way, and with them *left* and *right* in the caption.

# %%
run = blip.ensure(settings)

# %%
curves = {
    name: ([row["step"] for row in run.history], [row[name] for row in run.history])
    for name in ("caption", "contrastive", "matching")
}
figure = figures.curve(curves, y_label="loss, nats", title="BLIP learns to write, tell and match")
saved = figures.save_figure(
    figure,
    "blip_training",
    alt="Training curves of the three losses of BLIP over the steps of fine-tuning: caption, "
    "contrastive and matching.",
    run=settings,
    notebook="03_blip_finetuning",
)

# %% [markdown]
# The writing loss has a floor of its own, wherever a picture leaves room for doubt. The contrastive
# loss is measured against the other captions of a batch, many of which are nearly the same. Neither
# tells you what the captions are like, so:
#
# ## 4 · Before and after
#
# Held-out pictures, one of each label, the first in the order of the split. Nothing was picked.

# %%
rows = {row["file_name"]: row for row in collection.rows}
picked: dict[str, dict] = {}
for row in run.before_after:
    picked.setdefault(rows[row["file_name"]]["label"], row)
examples = [picked[label] for label in scenes.LABELS if label in picked]
pictures = collection.images([rows[row["file_name"]] for row in examples], max(64, size))
titles = [
    "\n".join(
        f"{'✓' if row[when] == row['true'] else '✗'} {when}: {row[when]}"
        for when in ("before", "after")
    )
    for row in examples
]
figure = figures.contact_sheet(pictures, titles, columns=3, cell=2.3, font_size=9, gap=0.2)
saved = figures.save_figure(
    figure,
    "captions_before_after",
    alt="Held-out pictures, each with the caption that BLIP wrote before and after fine-tuning; a "
    "tick marks captions that are right in every word. Before, it speaks of animals; after, of "
    "tom, jerry, a cat, a mouse.",
    run=settings,
    notebook="03_blip_finetuning",
)

# %% [markdown]
# A caption is a sentence with four **slots**: subject, action, place, direction. Counting whole
# captions is too strict, counting words too kind (half of them are the same in every caption), so
# we count slots:

# %%
# NBVAL_CHECK_OUTPUT
print(f"{len(run.before_after)} held-out pictures\n")
print("slot        before    after")
for slot in ("subject", "action", "place", "direction"):
    print(f"{slot:<10} {run.scores['before'][slot]:>7.3f} {run.scores['after'][slot]:>8.3f}")

# %% [markdown]
# The hardest slot is *who*. The zoo taught this tower that proportions mean nothing: any animal may
# have any ears. To tell a mouse from a cat it has to unlearn that, and at `mini` it gets three in
# four right after its minutes of training. So notebooks 04 and 05 never take the **class** from a
# caption: it comes from the data, or from the parts of the animals that a network sees.
#
# ## 5 · Does it look?
#
# The blind captioner of notebook 02 had a small loss as well. The test for eyes is to show the
# wrong picture: if the loss does not rise, the captions were learnt by heart.

# %%
# NBVAL_CHECK_OUTPUT
some = [rows[row["file_name"]] for row in run.before_after][:64]
images, true = collection.images(some, size), [row["text"] for row in some]
other = np.roll(images, 1, axis=0)
loss = {}
for name, model in (("before", before), ("after", run.blip)):
    with torch.no_grad():
        pairs = {"its picture": images, "another": other}
        loss[name] = {k: float(model.caption_loss(v, true)) for k, v in pairs.items()}
    print(f"{name:<7}" + "".join(f"{k:>14}: {v:.3f}" for k, v in loss[name].items()))

# %% [markdown]
# ## 6 · One space for pictures and words
#
# The other two heads give what the poster calls "BLIP encoder similarity". The contrastive one maps
# pictures and captions to unit vectors, whose product is the cosine of the angle between them:
#
# $$\text{sim}(x, w) = \varphi_\text{image}(x) \cdot \varphi_\text{text}(w)$$

# %%
with torch.no_grad():
    seen = run.blip.image_embeds(collection.images([rows[r["file_name"]] for r in examples], size))
    said = run.blip.text_embeds([row["true"] for row in examples])
similarity = (seen @ said.T).cpu().numpy()

# %%
with mpl.rc_context(canvas.style()):
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(similarity, cmap="cividis", vmin=-1, vmax=1)
    for (line, at), value in np.ndenumerate(similarity):
        color = "black" if value > 0.2 else "white"
        axes.text(at, line, f"{value:.2f}", ha="center", va="center", fontsize=10, color=color)
    names = [canvas.wrap(row["true"], 1.9, 8) for row in examples]
    labels = [label for label in scenes.LABELS if label in picked]
    axes.set_xticks(range(len(names)), [label.replace("_", "\nand ") for label in labels])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("caption of")
    axes.set_ylabel("picture of")
    axes.grid(False)
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.8)
saved = figures.save_figure(
    figure,
    "image_text_similarity",
    alt="Matrix of the similarities between pictures and captions: the brightest fields lie on the "
    "diagonal, where a picture meets its own caption.",
    run=settings,
    notebook="03_blip_finetuning",
)

# %% [markdown]
# The number to remember: shown a picture and the captions of all the others, how often does BLIP
# find the right one?

# %%
# NBVAL_CHECK_OUTPUT
choices = sorted(set(true))
answers = np.array([choices.index(text) for text in true])
found = {}
for name, model in (("before", before), ("after", run.blip)):
    with torch.no_grad():
        table = (model.image_embeds(images) @ model.text_embeds(choices).T).cpu().numpy()
    found[name] = float((table.argmax(1) == answers).mean())
    print(f"{name:<7} {found[name]:.3f} right among {len(choices)} different captions")
print(f"guessing {1 / len(choices):.3f}")

# %% [markdown]
# ## 7 · Words for everything
#
# Last, the fine-tuned BLIP captions **all** pictures of both domains. Notebook 04 trains on those
# captions, and 05 translates with them: the cartoon's caption, its species mapped across, tells the
# translator what the photograph should show.

# %%
# NBVAL_CHECK_OUTPUT
print(f"{len(run.captions)} captions, {len({row['caption'] for row in run.captions})} different\n")
for label in ("tom", "jerry", "tom_jerry"):
    row = next(row for row in run.captions if row["label"] == label)
    print(f"{row['file_name']}\n  {row['caption']}\n  -> {row['natural']}")

# %% [markdown]
# ## Check yourself
#
# ### Exercise 1 · Mend the trap
#
# Write `labels(ids, mask)`: the labels for the loss, in which every pad is $-100$ and every word
# itself. `mask` is 1 where there is a word.


# %%
def labels(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    return None  # ← yours


made = labels(ids, mask)
check(made if made is None else made.tolist(), blip.mask_labels(ids, mask).tolist())

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.where(condition, a, b)` takes `a` where the condition holds.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def labels(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
#     return torch.where(mask == 1, ids, -100)
# ```
# </details>
#
# ### Exercise 2 · Among the first three
#
# Retrieval is often scored as *recall at k*: the share of pictures whose own caption is among the
# $k$ most similar ones. Write it for a table of similarities, one row a picture, and the number of
# the right column for each row.


# %%
def recall_at(k: int, table: np.ndarray, answers: np.ndarray) -> float | None:
    return None  # ← yours


small = np.array([[0.9, 0.1, 0.3, 0.2], [0.5, 0.4, 0.6, 0.7], [0.2, 0.8, 0.7, 0.1]])
check(
    [recall_at(k, small, np.array([0, 1, 2])) for k in (1, 2, 3, 4)]
    + [recall_at(1, table, answers)],
    [1 / 3, 2 / 3, 2 / 3, 1.0, found["after"]],
    tolerance=1e-6,
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `np.argsort(-table, axis=1)[:, :k]` are the columns of the $k$ largest values of each row.
# </details>
#
# <details><summary>Answer</summary>
#
# ```python
# def recall_at(k: int, table: np.ndarray, answers: np.ndarray) -> float | None:
#     first = np.argsort(-table, axis=1)[:, :k]
#     return float((first == answers[:, None]).any(1).mean())
# ```
# </details>

# %% [markdown]
# ## Takeaways
#
# - One tower, three tasks: writing, contrast, matching.
# - Pads are not words: mask them out of the labels, or the loss measures pads.
# - Score the slots on held-out pictures, and show the wrong picture to see whether it looks.
# - $\varphi$ puts cartoons and photographs into one space of words. That is what notebook 05 holds
#   on to.

# %%
# NBVAL_CHECK_OUTPUT
after, gain = run.scores["after"], loss["after"]["another"] / loss["after"]["its picture"]
compare(
    profile,
    {
        "subject": (after["subject"], {"smoke": (0, 1), "mini": (0.65, 1)}),
        "action": (after["action"], {"smoke": (0.5, 1), "mini": (0.8, 1)}),
        "place": (after["place"], {"smoke": (0.5, 1), "mini": (0.9, 1)}),
        "direction": (after["direction"], {"smoke": (0.5, 1), "mini": (0.8, 1)}),
        "loss, another picture / its own": (gain, {"smoke": (1, None), "mini": (5, None)}),
        "caption found": (found["after"], {"smoke": (0.2, 1), "mini": (0.6, 1)}),
    },
)

# %% [markdown]
# **Next:** [04 · LDM training](04_ldm_training.ipynb), where a diffusion model learns what natural
# pictures look like.
