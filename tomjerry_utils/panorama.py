"""Pictures that are not square: squares of the translator's size, laid over them and joined.

A translator knows squares with whole animals in them. A square is therefore laid on the animals
first and told what any square picture is told: caption, coats, posture. What it leaves bare is
covered by further squares that are told only what is seen in them, under the first one's caption.
All have the noise of one wide field, and after each denoising step their predictions ẑ are joined
on it and cut out again, so that neighbours agree (Bar-Tal et al. 2023, MultiDiffusion, eq. 5); but
not as equals: a square on an animal lies over the others, and they meet it in a narrow seam.

Measured on 15 scenes of the validation range, each with its own place around it to 2:1 and the
animal anywhere along it: perceptual distance to the natural twin, IoU with its mask, and classes
read right. The same scenes as squares: 0.743, 0.73, 100 %. So laid: 0.741, 0.73, 100 %. Equal
squares at even distances, joined as pixels: 0.760, 0.73, 60 %, with animals of two coats where two
squares share one. The denoiser run at 2:1: 0.848, 0.68, 47 %, since the segmenter sees animals
squeezed. The whole picture letter-boxed into one square: 1.339, 0.50, 40 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tomjerry_utils import silhouette, structure
from tomjerry_utils.autoencoder import decode, encode_all, factor_of
from tomjerry_utils.denoiser import Batch
from tomjerry_utils.faithfulness import NATURAL, Dial
from tomjerry_utils.images import add_grain, to_tensor, to_uint8
from tomjerry_utils.sampling import sample
from tomjerry_utils.structure import COATS, FIRST_ANIMAL_PART, MAPS, MOUSE
from tomjerry_utils.translator import Translator, noise_for

SEAM = 8  # a square fades out over this part of its side
# Animals fill this share of a square at least: what the segmenter, which has always had one to
# find, makes out in a bare wall is less (0.07 at most in 30 scenes, a whole animal 0.11 at least).
LEAST = 0.08
LONGEST = 4  # times the shorter side; a widescreen film has 2.4


@dataclass(eq=False)
class Layout:
    """Squares that cover a picture: the leading ones lie on animals, and over the others.

    Attributes:
        size: edge of a square, which is the picture's shorter side, in pixels.
        length: the longer side; tall: whether that is the height.
        starts: where each square begins along the longer side.
        leading: how many of the squares lie on animals, 1 at least; they come first.
        own: tom, jerry or both, as read off each leading square.
    """

    size: int
    length: int
    tall: bool
    starts: list[int]
    leading: int = 1
    own: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shares = torch.from_numpy(_shares(self.starts, self.length, self.size)).float()

    @property
    def cls(self) -> str:
        """Whom the picture shows: tom, jerry or both."""
        return self.own[0] if len(set(self.own)) == 1 else "both"

    def cut(self, wide: Tensor) -> Tensor:
        """Squares (k, C, s, s) of a picture (C, s, l) or (C, l, s), at any scale."""
        axis = -2 if self.tall else -1
        side = wide.shape[-1 if self.tall else -2]
        return torch.stack(
            [wide.narrow(axis, start * side // self.size, side) for start in self.starts]
        )

    def squares(self, image: np.ndarray) -> np.ndarray:
        """Squares (k, S, S, 3) of a picture (H, W, 3)."""
        parts = self.cut(torch.from_numpy(image).permute(2, 0, 1))
        return parts.permute(0, 2, 3, 1).contiguous().numpy()

    def outlines(self, outline: np.ndarray | None) -> list[np.ndarray] | None:
        """The squares (S, S) of a picture's outline (H, W), if it has one."""
        if outline is None:
            return None
        return [square.numpy() for square in self.cut(torch.from_numpy(outline)[None])[:, 0]]

    def join(self, squares: Tensor) -> Tensor:
        """The picture of such squares, each with its share: `join(cut(x))` is x."""
        side = squares.shape[-1]
        shares = F.interpolate(self.shares[:, None], size=side, mode="area")[:, 0].to(squares)
        parts = squares.transpose(-1, -2) if self.tall else squares
        wide = parts.new_zeros(*parts.shape[1:-1], self.length * side // self.size)
        for start, part, share in zip(self.starts, parts, shares, strict=True):
            wide.narrow(-1, start * side // self.size, side).add_(part * share)
        return wide.transpose(-1, -2) if self.tall else wide


def lay_out(translator: Translator, image: np.ndarray, outline: np.ndarray | None = None) -> Layout:
    """Where the squares lie in a picture, and whom it shows.

    Args:
        image: (H, W, 3) uint8, the shorter side at the translator's size, the longer a multiple
            of what one latent covers (:func:`pad`).
        outline: (H, W) in [0, 1], of the animals; None leaves it to the segmenter to find them.
    """
    size, step = translator.size, factor_of(translator.vae)
    length, tall = max(image.shape[:2]), image.shape[0] > image.shape[1]
    even = Layout(size, length, tall, _cover([], length, size, step, overlap=size // 2))
    maps = _look(translator, even.squares(image), even.outlines(outline))[1]
    animal = maps[:, FIRST_ANIMAL_PART:MOUSE].sum(1).mean(-1 if tall else -2)
    columns = F.interpolate(animal[:, None], size=size, mode="linear")[:, 0] * even.shares
    mass = np.zeros(length)
    for start, part in zip(even.starts, columns.numpy(), strict=True):
        mass[start : start + size] += part
    leading = _on_animals(mass, size, step)
    starts = _cover(leading, length, size, step, overlap=size // 4)
    layout = Layout(size, length, tall, starts, leading=len(leading))
    own, given = layout.squares(image)[: len(leading)], layout.outlines(outline)
    layout.own = structure.classify(_look(translator, own, given and given[: len(leading)])[1])
    return layout


def pad(image: np.ndarray, step: int) -> np.ndarray:
    """A picture or outline whose edges are multiples of `step`: its last pixels, repeated."""
    down, right = (-edge % step for edge in image.shape[:2])
    return np.pad(image, ((0, down), (0, right), (0, 0))[: image.ndim], mode="edge")


def translate(
    translator: Translator,
    image: np.ndarray,
    layout: Layout,
    cls: str,
    *,
    rival: Callable[..., tuple[np.ndarray, list[str]]] | None = None,
    number: int = 0,
    seed: int = 0,
    steps: int | None = None,
    faithfulness: float | None = None,
    outline: np.ndarray | None = None,
) -> np.ndarray:
    """Translate a picture of any shape.

    Args:
        image: (H, W, 3) uint8, as for :func:`lay_out`; layout: its own.
        cls: tom, jerry or both.
        rival: in place of the translator, a `rivals.Rival.translate`, which knows nothing of
            neighbours: its squares are joined as pixels.
        number, seed: noise, coats and grain depend on these alone.
        faithfulness: as `Translator.translate` takes it; a rival has none.
        outline: as for :func:`lay_out`; a rival has none.

    Returns:
        A picture of the same shape.
    """
    squares = layout.squares(image)
    if rival is not None:
        given = [cls] * len(squares)
        numbers = [number] * len(squares)
        made, _ = rival(squares, given, seed=seed, steps=steps, numbers=numbers)
        return to_uint8(layout.join(to_tensor(made)))[0]
    dial = Dial.at(faithfulness)
    batch, captions = _conditions(
        translator,
        squares,
        layout,
        cls,
        seed=seed,
        number=number,
        dial=dial,
        outlines=layout.outlines(outline),
    )
    start, (steps, strength) = None, dial.begin(steps or translator.steps)
    if strength < 1:
        source = encode_all(translator.vae, torch.from_numpy(image)[None])
        start = layout.cut(source[0]).to(batch.latents)
    regularise = None
    if translator.blip_guidance:
        regularise = translator._guide(squares, captions, translator.blip_guidance)

    def agree(x0: Tensor, done: float) -> Tensor:
        return layout.cut(layout.join(x0 if regularise is None else regularise(x0, done)))

    channels, side = batch.latents.shape[1:3]
    along = layout.length * side // layout.size
    field = (channels, along, side) if layout.tall else (channels, side, along)
    latents = sample(
        translator.unet,
        translator.conditioner,
        batch,
        translator.scheduler,
        steps=steps,
        guidance_scale=translator.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        noise=layout.cut(noise_for(field, seed, [number])[0]),
        start=start,
        strength=strength,
        guide=agree,
        finished=translator.finished,
    )
    with torch.no_grad():
        drawn = to_uint8(decode(translator.vae, layout.join(latents)[None]))
    return add_grain(drawn, translator.grain, seed=seed, numbers=[number])[0]


# ---- where the squares lie ---------------------------------------------------------------------


def _on_animals(mass: np.ndarray, size: int, step: int) -> list[int]:
    """Where squares begin that have the animals well inside: the one that sees most comes first.

    Args:
        mass: the animals' share of each pixel's row or column along the longer side.
    """
    length = len(mass)
    places = range(0, length - size + 1, step)
    # Best is the middle of a square, but far better inside it than across its border.
    inside = 0.9 * _fade(size) + 0.1 * (1 - np.abs(np.linspace(-1, 1, size)))
    unseen = mass.copy()
    found: list[int] = []
    while True:
        scores = [float(unseen[start : start + size] @ inside) for start in places]
        centre = (length - size) / 2
        best = max(places, key=lambda s: (round(scores[s // step], 6), -abs(s - centre)))
        best = _snap(best, length, size)
        window = slice(best, best + size)
        new = unseen[window].sum()
        # What is mostly seen already is a tail that the first square cut.
        if found and (new < LEAST * size or new < mass[window].sum() / 2):
            return found
        found.append(best)
        unseen[window] = 0


def _cover(starts: list[int], length: int, size: int, step: int, *, overlap: int) -> list[int]:
    """The squares that begin at `starts`, and as many more as leave nothing bare."""
    starts = list(starts)
    while True:
        bare = np.flatnonzero(_bare(starts, length, size) > 1e-6)
        if len(bare) == 0:
            return starts
        start = min(max(int(bare[0]) - overlap, 0), length - size) // step * step
        starts.append(_snap(start, length, size))


def _snap(start: int, length: int, size: int) -> int:
    """Move a square that would leave a sliver at the picture's end to that end."""
    end = min((0, length - size), key=lambda place: abs(place - start))
    return end if abs(end - start) <= size // SEAM else start


def _fade(size: int, *, first: bool = False, last: bool = False) -> np.ndarray:
    """How opaque a square is along its side: 1, and less near its ends unless the picture ends."""
    edge = max(size // SEAM, 1)
    ramp = np.minimum((np.arange(size) + 0.5) / edge, 1.0)
    return (1.0 if first else ramp) * (np.ones(size) if last else ramp[::-1])


def _opacity(start: int, length: int, size: int) -> np.ndarray:
    return _fade(size, first=start == 0, last=start + size == length)


def _bare(starts: Sequence[int], length: int, size: int) -> np.ndarray:
    """How much of each pixel no square covers yet."""
    left = np.ones(length)
    for start in starts:
        left[start : start + size] *= 1 - _opacity(start, length, size)
    return left


def _shares(starts: Sequence[int], length: int, size: int) -> np.ndarray:
    """Each square's share of its pixels, (k, size): the first lies over the second, and so on."""
    left = np.ones(length)
    out = []
    for start in starts:
        window = slice(start, start + size)
        out.append(left[window] * _opacity(start, length, size))
        left[window] = left[window] - out[-1]
    return np.stack([part / (1 - left)[s : s + size] for s, part in zip(starts, out, strict=True)])


# ---- what the squares are told -----------------------------------------------------------------


def _conditions(
    translator: Translator,
    squares: np.ndarray,
    layout: Layout,
    cls: str,
    *,
    seed: int,
    number: int,
    dial: Dial = NATURAL,
    outlines: Sequence[np.ndarray] | None = None,
) -> tuple[Batch, list[str]]:
    """Conditions and captions of all squares of a picture.

    The squares beside the animals keep the shapes that are seen in them: asked for a posture they
    would be given an animal of their own.
    """
    leading, beside = layout.leading, len(squares) - layout.leading
    # Tom here and Jerry there are both, but neither square shows both.
    names = layout.own if cls == layout.cls else [cls] * leading
    told = translator.conditions(
        squares[:leading],
        names,
        seed=seed,
        numbers=[number] * leading,
        dial=dial,
        outlines=outlines and outlines[:leading],
    )
    seen, view = told.batch, told.batch.view
    if beside:
        found = _look(translator, squares[leading:], outlines and outlines[leading:])[0]
        found = dial.turn(
            translator.standardise(found, "cartoon"), translator.standardise(found, "natural")
        )
        view = torch.cat([view, found.to(view)])
    # The others are told the first one's class, caption and coats.
    rows = [*range(leading), *[0] * beside]
    view = layout.cut(layout.join(view))
    view[:, MAPS : MAPS + COATS] = seen.view[rows, MAPS : MAPS + COATS]
    batch = Batch(
        latents=seen.latents[rows],
        labels=seen.labels[rows],
        text=seen.text[rows],
        mask=seen.mask[rows],
        view=view,
    )
    return batch, [told.captions[row] for row in rows]


def _look(
    translator: Translator, squares: np.ndarray, outlines: Sequence[np.ndarray] | None
) -> tuple[Tensor, Tensor]:
    """`silhouette.look` at squares (k, s, s, 3) uint8."""
    cells = translator.size // factor_of(translator.vae)
    return silhouette.look(translator.net, torch.from_numpy(squares), (cells, cells), outlines)
