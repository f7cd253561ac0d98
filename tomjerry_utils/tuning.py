"""By what a method's settings are chosen: one score, the same for ours and for every rival.

Each setting translates the same validation cartoons, and gets realism × faithfulness:

- realism is 1 − d/d₀. d is how far the pictures' colours and textures are from those of natural
  training pictures: the 1-Wasserstein distance of each of twelve simple statistics, in units of
  its spread among natural pictures, averaged. d₀ is that of the cartoons as they are, so an
  untranslated cartoon has 0 and a set of photographs about 1.
- faithfulness is the overlap of the cat's and the mouse's silhouettes, as the structure net sees
  them in the output, with natural bodies in the cartoon's pose, as the posture nets draw them. Not
  with the cartoon's own silhouettes, which would be an argument for leaving it a cartoon.

A product, because neither is worth anything without the other, and because a share gained in one
weighs as much as that share in the other, wherever on its sweep a method stands. A sum of ranks
would not do: where a knob trades the one for the other, all its settings have the same sum.

Nothing here is reported on test scenes: no judge, no twin, no feature of KID or of the perceptual
distance has a say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from tomjerry_utils import blip, structure
from tomjerry_utils.autoencoder import factor_of
from tomjerry_utils.baselines import to_lab
from tomjerry_utils.picking import silhouette_overlap
from tomjerry_utils.translator import Translator

RULE = (
    "realism × faithfulness on validation cartoons; realism: 1 − d/d₀, d the distance of twelve "
    "colour and texture statistics to natural training pictures and d₀ the untranslated cartoons'; "
    "faithfulness: overlap of the silhouettes with natural bodies in the cartoon's pose"
)
OCTAVES = 3  # of lightness, each with its strength and its sparsity


@dataclass(eq=False)
class Criterion:
    """Scores translations of some validation cartoons.

    Attributes:
        translator: whose structure and posture nets look.
        cartoons: (N, S, S, 3) uint8.
        natural: (M, S, S, 3) uint8 natural training pictures.
    """

    translator: Translator
    cartoons: np.ndarray
    natural: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        self._wanted = statistics(self.natural)
        self._spread = np.maximum(self._wanted.std(0), 1e-6)
        self._bodies = natural_bodies(self.translator, self.cartoons)
        self._cartoons_away = self._away(self.cartoons)

    def score(self, made: np.ndarray) -> dict[str, float]:
        """Realism, faithfulness and their product as `score`, of the cartoons' translations."""
        realism = 1 - self._away(made) / max(self._cartoons_away, 1e-6)
        seen = _maps(self.translator, made)
        faithfulness = float(silhouette_overlap(self._bodies, seen).mean())
        # Where the pictures are further from photographs than the cartoons, nothing makes it good.
        score = realism * faithfulness if realism > 0 else realism
        return {"realism": realism, "faithfulness": faithfulness, "score": score}

    def _away(self, images: np.ndarray) -> float:
        found = statistics(images) / self._spread
        wanted = self._wanted / self._spread
        gaps = [wasserstein_distance(a, b) for a, b in zip(found.T, wanted.T, strict=True)]
        return float(np.mean(gaps))


def statistics(images: np.ndarray) -> np.ndarray:
    """What colours and textures each picture has, (N, 6 + 2·OCTAVES).

    Mean and deviation of L*, a* and b*; then, for each octave of L* from the finest, the logarithm
    of its mean strength, and its sparsity: root mean square over mean, high where flat fills lie
    between outlines.

    Args:
        images: (N, H, W, 3) uint8.
    """
    out = np.empty((len(images), 6 + 2 * OCTAVES))
    for i, image in enumerate(images):
        lab = to_lab(image)
        level, octaves = lab[..., 0], []
        for _ in range(OCTAVES):
            height, width = (edge // 2 * 2 for edge in level.shape)
            level = level[:height, :width]
            coarse = level.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
            band = np.abs(level - coarse.repeat(2, 0).repeat(2, 1))
            strength = band.mean() + 1e-3
            octaves += [np.log(strength), np.sqrt((band**2).mean()) / strength]
            level = coarse
        out[i] = [*lab.mean((0, 1)), *lab.std((0, 1)), *octaves]
    return out


def natural_bodies(translator: Translator, cartoons: np.ndarray) -> Tensor:
    """Part maps with natural bodies in the cartoons' poses; without posture nets, their own."""
    maps = _maps(translator, cartoons)
    if translator.posture is None:
        return maps
    told = translator.conditions(cartoons, None)
    actions = [blip.caption_slots(text)["action"] for text in told.captions]
    pictures = torch.from_numpy(cartoons)
    return translator.posture.pose(pictures, maps, told.classes, actions).cpu()


def _maps(translator: Translator, images: np.ndarray) -> Tensor:
    factor = factor_of(translator.vae)
    grid = (images.shape[1] // factor, images.shape[2] // factor)
    return structure.look(translator.net, torch.from_numpy(images), grid)[1]
