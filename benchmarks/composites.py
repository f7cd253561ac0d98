"""How fast composites are made at 512 px, and how they look.

    python benchmarks/composites.py [--number 40] [--out composites.png]

The cats are the starter photographs with the masks of U²-Net-p, which is not timed; the mice are
generated natural scenes with their true masks, in place of photographs, of which the kit has none.
The PNG is a sheet of the first composites.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tomjerry_utils import UserError, animal_masks, scenes
from tomjerry_utils.composites import composite
from tomjerry_utils.images import grid, list_images, load_image, resize, save_image
from tomjerry_utils.runs import data_root

SIZE = 512


def main() -> None:
    """Make some composites, print their rate and write the sheet."""
    parser = argparse.ArgumentParser(description="Speed and looks of composites.")
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("composites.png"))
    arguments = parser.parse_args()
    animals = list(itertools.product(cats(), mice(6)))
    made, spent = [], 0.0
    for number in range(arguments.number):
        (cat, cat_mask), (mouse, mouse_mask) = animals[number % len(animals)]
        begun = time.process_time()
        try:
            result = composite(cat, cat_mask, mouse, mouse_mask, seed=number)
        except UserError as error:
            print(f"{number}: {error}")
            continue
        spent += time.process_time() - begun
        made.append(result.image)
    print(f"{len(made)} composites of {SIZE} px: {len(made) / spent:.0f} a second of one core")
    print(save_image(arguments.out, grid(made[:12], 4)))


def cats() -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for path in list_images(data_root() / "starter" / "photo" / "cat"):
        mask = Image.fromarray(animal_masks.animal_mask(path))
        square = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX))
        found.append((resize(load_image(path), SIZE, fit="stretch"), square))
    return found


def mice(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for seed in range(*scenes.RANGES["natural"]):
        if len(found) == count:
            break
        if (scene := scenes.describe(seed)).cls == "jerry":
            picture = scenes.render(scene, "natural", SIZE, truth=True)
            assert picture.mask is not None
            found.append((picture.image, picture.mask == 2))
    return found


if __name__ == "__main__":
    main()
