"""What the denoisers learn from: pictures as latents, with all that they are conditioned on.

Made once by a stage and kept beside its models, so that no training step runs an autoencoder, a
segmenter or a text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomjerry_utils import blip, structure
from tomjerry_utils.autoencoder import encode_all
from tomjerry_utils.denoiser import NO_CLASS, Batch, repeat_texts
from tomjerry_utils.runs import atomic_path, read_json, write_json
from tomjerry_utils.scenes import CLASSES, LABELS, label_of

TEXT_LENGTH = 20  # tokens of a caption that the denoisers attend to
PIXELS_AT_ONCE = 64 * 64 * 64  # that the autoencoder encodes: 64 pictures of 64 px, or 1 of 512


@dataclass(eq=False)
class LatentSet:
    """Pictures as the denoisers see them.

    latents (N, C, h, w) float32; views (N, S, h, w) float16, tones standardised; labels (N,);
    text table (U, L, D) with masks (U, L) and row (N,) of each picture's caption; texts: the U
    captions; files: (N,) names in the collection.
    """

    latents: Tensor
    views: Tensor
    labels: Tensor
    table: Tensor
    masks: Tensor
    row: Tensor
    texts: list[str]
    files: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor) -> Batch:
        """The batch of some pictures, (B,) indices."""
        rows = self.row[index]
        return Batch(
            latents=self.latents[index],
            labels=self.labels[index],
            text=self.table[rows],
            mask=self.masks[rows],
            view=self.views[index].float(),
        )

    def classes(self) -> list[str | None]:
        """tom, jerry or both of each picture, of either domain; None where it has no class."""
        return [
            None if n == NO_CLASS else CLASSES[int(n) % len(CLASSES)] for n in self.labels.tolist()
        ]

    def save(self, path: Path) -> None:
        """Write the set as safetensors, atomically; the file names go into a JSON beside it."""
        with atomic_path(path) as temporary:
            save_file({k: getattr(self, k).contiguous() for k in _TENSORS}, temporary)
        write_json(path.with_suffix(".json"), {"texts": self.texts, "files": self.files})

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        """Read what :meth:`save` wrote."""
        stored: dict[str, Any] = {**load_file(path), **read_json(path.with_suffix(".json"))}
        return cls(**stored)


_TENSORS = ("latents", "views", "labels", "table", "masks", "row")


def latent_set(
    images: np.ndarray,
    labels: Sequence[str | None],
    texts: Sequence[str],
    *,
    vae: AutoencoderKL,
    net: structure.StructureNet,
    describer: blip.Blip,
    tone: tuple[list[float], list[float]] | None,
    files: Sequence[str] = (),
) -> tuple[LatentSet, tuple[list[float], list[float]]]:
    """Encode pictures of one domain with everything the denoisers are conditioned on.

    Args:
        images: (N, H, W, 3) uint8. labels: of `scenes.LABELS`, None for no class.
        texts: captions, species mapped to the natural domain.
        tone: statistics that standardise the views' tones; None measures them here.

    Returns:
        The set and the tone statistics used.
    """
    pictures = torch.from_numpy(images)
    at_once = min(64, max(1, PIXELS_AT_ONCE // (images.shape[1] * images.shape[2])))
    latents = encode_all(vae, pictures, at_once)
    views, _ = structure.look(net, pictures, (latents.shape[-2], latents.shape[-1]))
    tone = tone or structure.tone_statistics(views)
    views = structure.standardise(views, *tone)
    table, masks, row = repeat_texts(texts, describer, TEXT_LENGTH)
    numbers = torch.tensor([NO_CLASS if v is None else LABELS.index(v) for v in labels])
    return LatentSet(
        latents, views.half(), numbers, table, masks, row, sorted(set(texts)), list(files)
    ), tone


def join(sets: Sequence[LatentSet]) -> LatentSet:
    """Several sets as one."""
    offset, rows = 0, []
    for part in sets:
        rows.append(part.row + offset)
        offset += len(part.table)
    return LatentSet(
        latents=torch.cat([s.latents for s in sets]),
        views=torch.cat([s.views for s in sets]),
        labels=torch.cat([s.labels for s in sets]),
        table=torch.cat([s.table for s in sets]),
        masks=torch.cat([s.masks for s in sets]),
        row=torch.cat(rows),
        texts=[t for s in sets for t in s.texts],
        files=[f for s in sets for f in s.files],
    )


def wardrobe(natural: LatentSet) -> dict[str, Tensor]:
    """What the animals of each class wear: class → coats and mean tones, (N, COATS + 3).

    Args:
        natural: the natural training pictures; up to 300 of each class are taken, and
            all of them for a class that has none.
    """
    rows = torch.cat(
        [
            natural.views[:, structure.MAPS : -3, 0, 0].float(),
            natural.views[:, -3:].float().mean((2, 3)),
        ],
        1,
    )
    out = {}
    for cls in CLASSES:
        own = rows[natural.labels == LABELS.index(label_of(cls, "natural"))][:300]
        out[cls] = own if len(own) else rows
    return out
