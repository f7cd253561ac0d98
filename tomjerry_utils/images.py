"""Pictures in and out: load, save, resize, tensors, grids.

In memory a picture is `(H, W, 3)` uint8 RGB; `picture_files` brings files of every kind into that
form.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.picture_files import GROUND, read_picture
from tomjerry_utils.picture_files import MAX_PIXELS as MAX_PIXELS
from tomjerry_utils.runs import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".avif"),
)

Fit = Literal["crop", "pad", "stretch"]


def load_image(path: str | os.PathLike[str], size: int | None = None) -> np.ndarray:
    """Read a picture file as `(H, W, 3)` uint8 RGB.

    Args:
        path: a picture file of any kind that `picture_files` reads.
        size: make it square, `(size, size, 3)`, by `resize`; None keeps its own size.

    Raises:
        UserError: no such file, not a picture, broken, or more than `MAX_PIXELS`.
    """
    array = read_picture(path).array
    return array if size is None else resize(array, size)


def save_image(path: str | os.PathLike[str], array: np.ndarray, *, quality: int = 92) -> Path:
    """Write `(H, W, 3)` or `(H, W)` uint8 as PNG or JPEG, by the path's suffix, atomically.

    Equal pictures give equal bytes.
    """
    target = Path(path)
    image = Image.fromarray(np.ascontiguousarray(_check(array)))
    with atomic_path(target) as temporary:
        match target.suffix.lower():
            case ".png":
                image.save(temporary, format="PNG")
            case ".jpg" | ".jpeg":
                image.save(temporary, format="JPEG", quality=quality, subsampling=0)
            case other:
                raise UserError(f"{target}: cannot write '{other}': use .png or .jpg")
    return target


def resize(array: np.ndarray, size: int | tuple[int, int], *, fit: Fit = "crop") -> np.ndarray:
    """Resize a picture with Lanczos' filter.

    Args:
        array: `(H, W, 3)` or `(H, W)` uint8.
        size: side of a square, or (height, width).
        fit: `crop` cuts the longer side evenly to the wanted shape, `pad` lays the whole picture on
            the soft ground, `stretch` bends it.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"no picture of {height}×{width}")
    if _check(array).shape[:2] == (height, width):
        return array.copy()
    image = Image.fromarray(np.ascontiguousarray(array))
    match fit:
        case "crop":
            # One filter pass straight from the cropped box: no rounding of an intermediate size.
            scale = min(image.width / width, image.height / height)
            box_width, box_height = width * scale, height * scale
            left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
            box = (left, top, left + box_width, top + box_height)
            return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
        case "pad":
            scale = min(width / image.width, height / image.height)
            inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            small = np.asarray(image.resize(inner, Image.Resampling.LANCZOS))
            ground: int | tuple[int, int, int] = GROUND if array.ndim == 3 else GROUND[1]
            canvas = np.full((height, width, *array.shape[2:]), ground, dtype=np.uint8)
            top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
            canvas[top : top + inner[1], left : left + inner[0]] = small
            return canvas
        case "stretch":
            return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    raise ValueError(f"no fit '{fit}': crop, pad or stretch")


def resize_short(array: np.ndarray, size: int) -> np.ndarray:
    """Resize a picture so that its shorter side has `size` pixels, and keep its aspect."""
    height, width = _check(array).shape[:2]
    short = min(height, width)
    return resize(array, (round(height * size / short), round(width * size / short)))


def to_tensor(images: np.ndarray) -> Tensor:
    """`(B, H, W, 3)` or `(H, W, 3)` uint8 → `(B, 3, H, W)` float32 in [-1, 1]."""
    import torch

    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[-1] != 3 or batch.dtype != np.uint8:
        raise ValueError(f"need (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
    tensor = torch.from_numpy(np.array(batch.transpose(0, 3, 1, 2), order="C"))
    return tensor.float().div_(127.5).sub_(1.0)


def to_uint8(tensor: Tensor) -> np.ndarray:
    """`(B, 3, H, W)` or `(3, H, W)` float in [-1, 1] → `(B, H, W, 3)` uint8, rounded, clipped."""
    batch = tensor[None] if tensor.ndim == 3 else tensor
    levels = batch.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def measure_grain(images: np.ndarray) -> float:
    """The camera's grain in photographs: deviation of the noise as a share of the range, 0 … 1.

    The Laplacian residual of Immerkær 1996 (Comput. Vis. Image Und. 64(2)), which plain slopes do
    not excite, over each picture's flattest blocks of 8 × 8, where texture is least; the median
    over pictures. Blocks that are clipped to black or white say nothing and are left out.

    Args:
        images: (N, H, W, 3) uint8, 16 px a side at least.
    """
    values = images.astype(np.float32) / 255
    across = values[:, :, :-2] - 2 * values[:, :, 1:-1] + values[:, :, 2:]
    residual = (across[:, :-2] - 2 * across[:, 1:-1] + across[:, 2:]) / 6
    rows, columns = (edge // 8 for edge in residual.shape[1:3])

    def blocks(a: np.ndarray) -> np.ndarray:
        cut = a[:, : rows * 8, : columns * 8].reshape(len(a), rows, 8, columns, 8, 3)
        return cut.mean((2, 4)).reshape(len(a), -1)

    deviation, level = np.sqrt(blocks(residual**2)), blocks(values[:, 1:-1, 1:-1])
    deviation[(level < 0.05) | (level > 0.95)] = np.nan
    kept = deviation[~np.isnan(deviation).all(1)]
    if not len(kept):
        return 0.0
    return float(np.median(np.nanquantile(kept, 0.1, axis=1)) / _FLATTEST)


# The 10 % quantile of a block's deviation where there is nothing but noise of deviation 1.
_FLATTEST = 0.80


def add_grain(
    images: np.ndarray, amount: float, *, seed: int, numbers: Sequence[int]
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 with white noise of deviation `amount` of the range.

    A picture's grain depends on the seed and its number, not on what else is in its batch.
    """
    if not amount:
        return images
    out = np.empty_like(images)
    for i, (image, number) in enumerate(zip(images, numbers, strict=True)):
        noise = np.random.default_rng([seed, number]).standard_normal(image.shape, np.float32)
        out[i] = (image + 255 * amount * noise + 0.5).clip(0, 255).astype(np.uint8)
    return out


def grid(
    images: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    pad: int = 2,
    *,
    ground: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """Lay pictures of one size out in rows, with `pad` pixels between them and none outside.

    Returns:
        One picture, uint8; places left over in the last row show the ground.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError("a grid needs at least one picture and one column")
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, 3)
    sheet = np.full(shape, ground, dtype=np.uint8)
    for index, image in enumerate(images):
        if image.shape != (height, width, 3):
            raise ValueError(f"picture {index} is {image.shape}, the first {(height, width, 3)}")
        top, left = (index // columns) * (height + pad), (index % columns) * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def list_images(folder: str | os.PathLike[str], *, recursive: bool = True) -> list[Path]:
    """The picture files of a folder, sorted by path; hidden files and folders are left out.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder {root}: check the path")
    found = [
        path
        for path in (root.rglob("*") if recursive else root.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not found:
        raise UserError(f"no pictures in {root}: need files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(found)


# ---- helpers -----------------------------------------------------------------------------------


def _check(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"need (H, W, 3) or (H, W) uint8, got {array.shape} {array.dtype}")
    return array
