"""One dial between a realistic and a faithful translation: `tomjerry translate --faithfulness`.

A translation takes four things over from its source, and each can be taken as it is drawn or as it
would be in nature:

| | as in nature | as drawn |
|---|---|---|
| keypoints | where natural animals of the class and action have them | where the drawing has them |
| shapes | the part map of a natural body on the keypoints | the drawing's own part map |
| colours | a coat from the wardrobe, tones standardised among cartoons | the drawing's own |
| strength | 1: from noise | from the drawing's own latents with less noise |

The dial f turns all four, and :meth:`Dial.at` is the one place that says how far: shapes and
colours by f, the strength from 1 down by 0.85 f, to the nearest step. The keypoints go ahead, by
2 f up to 1, so that the natural body already stands where the drawn one does when the two are
mixed. At f = 0 a translation is what it is where nobody turns the dial.

How near each takes a translation to its source, as the perceptual distance over 60 validation
scenes, by the translator before its last steps were finished: none of them 0.90; keypoints alone
0.88, with the shapes 0.80; colours alone 0.86; a strength of 0.5 alone 0.73 (the last 8 of 16
steps). `benchmarks/faithfulness.py` measures the dial as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tomjerry_utils import UserError
from tomjerry_utils.structure import MAPS

FEWEST = 8  # steps
LATEST = 0.85  # of the noise is left out at f = 1: outlines come back, fur is still drawn


@dataclass(frozen=True)
class Dial:
    """How much of each is the drawing's own, in shares of 1, and the noise that is begun from."""

    keypoints: float = 0.0
    shapes: float = 0.0
    colours: float = 0.0
    strength: float = 1.0

    @classmethod
    def at(cls, faithfulness: float | None) -> Dial:
        """The dial at a faithfulness f of 0 … 1; nothing falls back as f rises.

        Raises:
            UserError: f is no number from 0 to 1.
        """
        if faithfulness is None:
            return cls()
        f = faithfulness
        if not 0 <= f <= 1:
            raise UserError(f"faithfulness {f}: give a number from 0 (realistic) to 1 (as drawn)")
        return cls(keypoints=min(2 * f, 1.0), shapes=f, colours=f, strength=1 - LATEST * f)

    def begin(self, steps: int) -> tuple[int, float]:
        """Steps and strength for `sampling.sample`, which begins at the step of the nearest noise.

        The more faithful, the fewer steps are left of the timetable. Where it has few, a dial that
        is turned at all takes one of :data:`FEWEST`: of fewer, none has as little noise.
        """
        return (steps, 1.0) if self.strength == 1 else (max(steps, FEWEST), self.strength)

    def turn(self, views: Tensor, drawn: Tensor) -> Tensor:
        """Views on the way to those of the drawings themselves.

        Args:
            views: (B, VIEW_CHANNELS, h, w), as they would be in nature.
            drawn: of the same pictures as drawn, standardised as natural pictures are.
        """
        weight = views.new_full((views.shape[1], 1, 1), self.colours)
        weight[:MAPS] = self.shapes
        return torch.lerp(views, drawn, weight)


NATURAL = Dial()  # all as in nature
