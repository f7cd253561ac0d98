"""Where the animal is in a photograph: by a mask file, by the picture's transparency, or by a net.

A mask file lies beside its picture, under one of the names in :data:`PLACES`. It is white (255, or
1) where the animal is and black elsewhere, or a trimap as the Oxford-IIIT pets have (1 animal,
2 ground, 3 the border between them). Without one, U²-Net-p (:mod:`silhouette`) finds what stands
out; its weights are fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from tomjerry_utils import UserError
from tomjerry_utils.images import load_image, save_image

if TYPE_CHECKING:
    from tomjerry_utils.sources import Row

PLACES = (
    *("{stem}.mask.png", "{stem}_mask.png", "masks/{stem}.png", "../masks/{stem}.png"),
    *("../annotations/trimaps/{stem}.png", "../trimaps/{stem}.png"),
)
HOW = (
    "put a mask beside each picture (NAME.mask.png, white animal on black, or an Oxford trimap in "
    "../annotations/trimaps/NAME.png), or go online once, so that U²-Net-p can be fetched"
)
_ANIMAL, _GROUND, _BORDER = 1, 2, 3


def finder(
    folder: Path, originals: Sequence[Path] = (), *, net: bool = True
) -> Callable[[Row], np.ndarray]:
    """How to find the masks of a collection's pictures.

    Args:
        folder: of the collection; masks that the net finds are kept in `.masks/` there.
        originals: the folders that were collected, where mask files lie beside the pictures.
        net: whether to ask U²-Net-p where there is no file.

    Returns:
        A function from a manifest row to (H, W) float32 in [0, 1], of the picture's shape, though
        not always of its size; it raises a UserError where there is no mask.
    """

    def find(row: Row) -> np.ndarray:
        if row["mask"]:  # its source has one of each picture
            return read_mask(folder / row["mask"])
        for place in originals:
            picture = place / str(row["origin"])
            if picture.is_file() and (found := beside(picture)) is not None:
                return found
        if (found := beside(folder / str(row["file_name"]))) is not None:
            return found
        kept = folder / ".masks" / f"{row['sha256'][:32]}.png"
        if not kept.is_file():
            if not net:
                raise UserError(f"{row['file_name']}: no mask: {HOW}")
            save_image(kept, (_by_net(folder / str(row["file_name"])) * 255 + 0.5).astype(np.uint8))
        return load_image(kept)[..., 0].astype(np.float32) / 255

    return find


def animal_mask(path: Path, *, net: bool = True) -> np.ndarray:
    """The mask of a picture file: (H, W) float32 in [0, 1], 1 where the animal is.

    Raises:
        UserError: the picture or its mask cannot be read, or there is no mask; the line says how
            to get one.
    """
    if (found := beside(path)) is not None:
        return found
    if not net:
        raise UserError(f"{path}: no mask: {HOW}")
    return _by_net(path)


def is_mask(path: Path) -> bool:
    """Whether a file is by its name another picture's mask, so no picture to collect."""
    named = path.stem.endswith((".mask", "_mask")) or path.parent.name in ("masks", "trimaps")
    return named and path.suffix == ".png"


def beside(path: Path) -> np.ndarray | None:
    """The mask that a picture's file comes with, in a file of its own or as its transparency."""
    for place in PLACES:
        file = path.parent / place.format(stem=path.stem)
        if file.is_file() and file != path:
            return read_mask(file)
    return _transparency(path)


def read_mask(file: Path) -> np.ndarray:
    """A mask file of either kind as (H, W) float32 in [0, 1], 1 where the animal is.

    Raises:
        UserError: it cannot be read, or is no mask.
    """
    values = load_image(file)[..., 0]
    kinds = set(np.unique(values).tolist())
    if kinds <= {_ANIMAL, _GROUND, _BORDER}:
        return _from_trimap(values)
    if kinds <= {0, 1}:
        return values.astype(np.float32)
    if max(kinds) < 128:
        raise UserError(
            f"{file}: holds values up to {max(kinds)}, so it is no mask: make the animal white "
            "(255) and the rest black, or write a trimap (1 animal, 2 ground, 3 border)"
        )
    return values.astype(np.float32) / 255


def _from_trimap(values: np.ndarray) -> np.ndarray:
    """The border falls from 1 at the animal to 0 at the ground."""
    if not (values == _ANIMAL).any() or not (values == _GROUND).any():
        return (values == _ANIMAL).astype(np.float32)
    inner = ndimage.distance_transform_edt(values != _ANIMAL)
    outer = ndimage.distance_transform_edt(values != _GROUND)
    return (outer / (inner + outer)).astype(np.float32)


def _transparency(path: Path) -> np.ndarray | None:
    shape = load_image(path).shape[:2]  # says what is wrong with a file that is no picture
    with Image.open(path) as image:
        if not (image.has_transparency_data and image.format in ("PNG", "WEBP", "GIF", "TIFF")):
            return None
        alpha = np.asarray(image.convert("RGBA").getchannel("A"), np.float32) / 255
    return alpha if alpha.min() < 1 and alpha.shape == shape else None


def _by_net(path: Path) -> np.ndarray:
    from tomjerry_utils import silhouette, u2net

    if not u2net.is_there():
        try:
            u2net.weights()
        except UserError as error:
            raise UserError(f"{path}: no mask: {HOW} ({error})") from None
    return silhouette.foreground(load_image(path)[None])[0]
