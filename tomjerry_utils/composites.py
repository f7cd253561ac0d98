"""Photographs of a cat and a mouse together, made of one of each: the class `both` at real scale.

Nobody has photographs of both in number, and a model that has never seen any draws two animals as
one. So the mouse of one photograph is cut out and set on the ground beside the cat of another:
a third of the cat's height, never larger than it was photographed, clear of the cat's face, its
light moved a little towards the scene's, with a shadow where it touches the ground. A composite
says that it is one in its manifest row, and a pair of which no likely picture can be made is
refused with the reason.

What this cannot know: where the camera stood, where the light came from, and whether what lies
beside the cat is ground at all. It is training material, no evidence.

Masks come from `animal_masks`.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from tomjerry_utils import UserError, pasting
from tomjerry_utils.images import load_image, resize, resize_short, save_image
from tomjerry_utils.runs import hash_file, log
from tomjerry_utils.sources import Row, digest, make_row, one_line

SOURCE = "composites"
CAT, MOUSE = 1, 2  # as in the masks of `scenes`

LEAST_SHARE = 0.005  # of a photograph: a smaller mask is none
OTHER_PIECES = 0.2  # of the largest piece: what is larger is a second animal, or a bad mask
HEIGHT = (0.28, 0.37)  # of the cat's height: how tall the mouse may be
SMALLEST = 0.16  # of the cat's height: a smaller mouse is a spot
FEWEST_PIXELS = 20  # of the mouse's height
WIDTH = 0.45  # of the cat's length: how long it may be, with its tail
NEAR = 0.7  # of the cat's height: how far from the cat it may stand
CUT_OFF = 0.25  # of the cat's width on the lower border: then its ground is not in the picture
NEARER = (0.0, 0.2, 0.35)  # of the cat's height: how far below its feet the mouse's may be


class Useless(UserError):
    """A photograph of which no composite can be made; `who` is "cat" or "mouse"."""

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(reason)
        self.who = who


class Composite(NamedTuple):
    """What `composite` makes.

    Attributes:
        image: (H, W, 3) uint8, of the cat's photograph's size.
        mask: (H, W) uint8: 0 ground, 1 cat, 2 mouse.
        note: one line on how it was made.
    """

    image: np.ndarray
    mask: np.ndarray
    note: str


def composite(
    cat: np.ndarray,
    cat_mask: np.ndarray,
    mouse: np.ndarray,
    mouse_mask: np.ndarray,
    background: np.ndarray | None = None,
    *,
    seed: int,
    enlarge: bool = False,
) -> Composite:
    """Set the mouse of one photograph beside the cat of another.

    Args:
        cat, mouse: (H, W, 3) uint8, each of its own size.
        cat_mask, mouse_mask: (H, W) of their photographs' sizes, bool or float in [0, 1].
        background: (H, W, 3) uint8: the scene in place of the cat's own photograph; the cat stays
            where it is in the frame.
        seed: where the mouse stands, how tall it is and which way it looks.
        enlarge: let the mouse become larger than it was photographed.

    Raises:
        UserError: a mask is no single animal's, the animal is cut off, the mouse was photographed
            too small, or there is no room beside the cat; one line.
    """
    rng = random.Random(seed)
    cat_share = _single(cat_mask, cat, "cat")
    mouse_share = _single(mouse_mask, mouse, "mouse")
    _whole_mouse(mouse_share)
    top, bottom, left, right = _box(cat_share > 0.5)
    height = bottom - top
    if (cat_share[-1] > 0.5).sum() > CUT_OFF * (right - left):
        raise Useless("cat", "the cat is cut off below, so the ground it is on cannot be seen")
    scene, moved = cat, ""
    if background is not None:
        scene = resize(background, cat.shape[:2])
        gain = pasting.light(cat, cat_share, scene, np.zeros_like(cat_share))
        crop = slice(top, bottom), slice(left, right)
        cutout = pasting.cut(cat[crop], cat_share[crop], 1.0, whole=False)
        scene = pasting.paste(scene, cutout, (top, left), gain)
        moved = "cat on another ground, "
    gain = pasting.light(mouse, mouse_share, scene, cat_share)
    m_top, m_bottom, m_left, m_right = _box(mouse_share > 0.5)
    crop = slice(m_top, m_bottom), slice(m_left, m_right)
    tall, long = m_bottom - m_top, m_right - m_left
    scale = min(rng.uniform(*HEIGHT) * height / tall, WIDTH * max(height, right - left) / long)
    if not enlarge:
        scale = min(scale, 1.0)
    flip = rng.random() < 0.5
    nearer = rng.uniform(0.0, 0.08)
    # Rather before the cat than small beside it.
    for shrunk, lower in itertools.product((1.0, 0.8, 0.64), NEARER):
        if scale * shrunk * tall < max(SMALLEST * height, FEWEST_PIXELS):
            break
        cutout = pasting.cut(mouse[crop], mouse_share[crop], scale * shrunk, flip=flip)
        at = _stand(cat_share > 0.5, cutout.alpha, round(bottom + (nearer + lower) * height), rng)
        if at is None:
            continue
        image = pasting.paste(scene, cutout, at, gain)
        mask = np.where(cat_share > 0.5, CAT, 0).astype(np.uint8)
        h, w = cutout.alpha.shape
        mask[at[0] : at[0] + h, at[1] : at[1] + w][cutout.alpha > 0.5] = MOUSE
        side = "left" if at[1] + w / 2 < (left + right) / 2 else "right"
        light = " ".join(f"{value:.2f}" for value in gain)
        return Composite(
            image,
            mask,
            f"{moved}mouse {side} of the cat, {h / height:.2f} of its height, light × {light}",
        )
    if scale * tall < max(SMALLEST * height, FEWEST_PIXELS):
        raise UserError("the mouse was photographed too small to stand beside this cat")
    raise UserError("there is no room beside the cat")


def pairs(
    cats: Sequence[Row], mice: Sequence[Row], n: int, *, seed: int
) -> Iterator[tuple[int, Iterator[tuple[Row, Row]]]]:
    """Which cat goes with which mouse.

    Both are of the same split, no pair comes twice, and of the first pairs each photograph is in as
    many as any other of its kind and split, give or take one. The splits get shares of `n` by their
    numbers of photographs. Neither the order of the rows nor what else is in the manifest matters.

    Args:
        cats, mice: manifest rows, with `split` and `sha256`.

    Yields:
        For each split its share of `n`, and all its pairs in the order they are to be tried in.
    """
    sides = _sides(cats, mice)
    counts = _shares(n, {split: len(c) + len(m) for split, (c, m) in sides.items()})
    for split, found in sides.items():
        yield counts[split], _all_pairs(*found, f"{seed} {split}")


def make_composites(
    folder: Path,
    rows: Sequence[Row],
    n: int,
    *,
    seed: int,
    mask_of: Callable[[Row], np.ndarray],
    short_side: int = 512,
    notes: Path | None = None,
) -> list[Row]:
    """Make composites of a collection's kept photographs and write them beside these.

    Where a pair is refused the next one takes its place. The same call gives the same files.

    Args:
        folder: of the collection; gets `images/natural/composite-*.png` and `masks/` of the same
            names (0 ground, 1 cat, 2 mouse).
        rows: its manifest rows; the kept natural ones of classes `tom` and `jerry` are used.
        n: how many pictures to make at most.
        mask_of: the mask of a row's picture, (H, W) in [0, 1]; `animal_masks.finder` makes one.
        short_side: larger scenes are reduced to this.
        notes: a file that a killed or an earlier call left, of what need not be made again.

    Returns:
        Manifest rows: the composites, kept, and a row for each refused pair, with the reason; a
        photograph that no composite can be made of is refused once. A `group` names the groups of
        both parents, and the `split` is theirs: do not derive it from the group again.
    """
    usable = [r for r in rows if r["kept"] and r["domain"] == "natural" and r["role"] == "training"]
    cats = [row for row in usable if row["class"] == "tom"]
    mice = [row for row in usable if row["class"] == "jerry"]
    useless: set[str] = set()
    known = _read_notes(notes)
    out: list[Row] = []
    for wanted, tries in pairs(cats, mice, n, seed=seed):
        made = 0
        for cat, mouse in itertools.islice(tries, 10 * wanted + 100):
            if made == wanted:
                break
            if useless & {cat["sha256"], mouse["sha256"]}:
                continue
            row = _row(cat, mouse, seed)
            if (old := known.get(f"{row['file_name']} {short_side}")) and _there(folder, old):
                row, who = old["row"], old["useless"]
                if who:
                    useless.add((cat if who == "cat" else mouse)["sha256"])
                made += row["kept"]
                out.append(row)
                continue
            who = ""
            try:
                image, truth, note = _made(folder, cat, mouse, mask_of, row["seed"], short_side)
            except UserError as error:
                row["reason"] = f"no composite: {one_line(error)}"
                if isinstance(error, Useless):
                    who = error.who
                    useless.add((cat if who == "cat" else mouse)["sha256"])
            else:
                path = save_image(folder / row["file_name"], image)
                save_image(folder / "masks" / Path(row["file_name"]).relative_to("images"), truth)
                row.update(sha256=hash_file(path), kept=True, origin=f"{row['origin']} ({note})")
                made += 1
            out.append(row)
            if notes is not None:
                with notes.open("a", encoding="utf-8") as file:
                    note_row = {"row": row, "useless": who, "short_side": short_side}
                    file.write(json.dumps(note_row, ensure_ascii=False) + "\n")
    kept = sum(row["kept"] for row in out)
    log(f"composites: {kept} of {n} made, {len(out) - kept} pairs refused")
    return out


def _read_notes(path: Path | None) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if path is not None and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                note = json.loads(line)
                known[f"{note['row']['file_name']} {note['short_side']}"] = note
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill tore
    return known


def _there(folder: Path, note: Mapping[str, Any]) -> bool:
    row = note["row"]
    path = folder / row["file_name"]
    return not row["kept"] or (path.is_file() and hash_file(path) == row["sha256"])


# ---- pairs and rows ----------------------------------------------------------------------------


def _sides(cats: Sequence[Row], mice: Sequence[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    """Cats and mice of each split that has both, in an order of their own."""
    sides: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for kind, rows in enumerate((cats, mice)):
        for row in sorted(rows, key=lambda r: str(r["sha256"])):
            sides[row["split"]][kind].append(row)
    return {split: found for split, found in sorted(sides.items()) if all(found)}


def _all_pairs(cats: list[Row], mice: list[Row], seed: str) -> Iterator[tuple[Row, Row]]:
    rng = random.Random(seed)
    cats, mice = rng.sample(cats, len(cats)), rng.sample(mice, len(mice))
    # Both turn round at their own pace; after a common multiple one of them moves on by one, so
    # that no pair comes back until all have been.
    common = math.lcm(len(cats), len(mice))
    for i in range(len(cats) * len(mice)):
        yield cats[i % len(cats)], mice[(i + i // common) % len(mice)]


def _shares(n: int, sizes: dict[str, int]) -> dict[str, int]:
    """`n` in whole parts in proportion to some sizes, the largest remainders rounded up."""
    total = sum(sizes.values())
    exact = {name: n * size / total for name, size in sizes.items()}
    parts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda k: (parts[k] - exact[k], k))[: n - sum(parts.values())]:
        parts[name] += 1
    return parts


def _made(
    folder: Path,
    cat: Row,
    mouse: Row,
    mask_of: Callable[[Row], np.ndarray],
    seed: int,
    short_side: int,
) -> Composite:
    pictures, masks = [], []
    for who, row in (("cat", cat), ("mouse", mouse)):
        if re.search(r"\bnd\b|no.?deriv", str(row["rights"]), re.IGNORECASE):
            raise Useless(who, f"{row['file_name']}: its licence allows no altered copies")
        try:
            image, mask = load_image(folder / row["file_name"]), mask_of(row)
        except UserError as error:
            raise Useless(who, str(error)) from None
        if who == "cat" and min(image.shape[:2]) > short_side:
            image = resize_short(image, short_side)
        pictures.append(image)
        masks.append(_fitted(mask, image, who))
    return composite(pictures[0], masks[0], pictures[1], masks[1], seed=seed)


def _row(cat: Row, mouse: Row, seed: int) -> Row:
    name = digest(f"{cat['sha256']} {mouse['sha256']} {seed}")
    rights = dict.fromkeys(str(row["rights"]) for row in (cat, mouse))
    row = make_row(
        SOURCE,
        name,
        "",
        domain="natural",
        group=f"{cat['group']} + {mouse['group']}",
        split=cat["split"],
        seed=int(name, 16) % 2**31,
        origin=f"composite of {cat['file_name']} + {mouse['file_name']}",
        rights=" + ".join(rights),
        **{"class": "both"},
    )
    row["file_name"] = f"images/natural/composite-{name}.png"
    row.pop("_key")
    return row


# ---- masks -------------------------------------------------------------------------------------


def _fitted(mask: np.ndarray, image: np.ndarray, who: str) -> np.ndarray:
    """A mask in the size of a picture of the same shape."""
    height, width = image.shape[:2]
    if mask.shape == (height, width):
        return mask
    if abs(mask.shape[1] / mask.shape[0] / (width / height) - 1) > 0.02:
        raise Useless(who, f"the mask of the {who} has another shape than its picture")
    values = Image.fromarray(np.asarray(mask, np.float32))
    return np.asarray(values.resize((width, height), Image.Resampling.BOX))


def _single(mask: np.ndarray, image: np.ndarray, who: str) -> np.ndarray:
    """The mask of one whole animal, float32, or why it is none."""
    if mask.shape != image.shape[:2]:
        raise Useless(who, f"the mask of the {who} is {mask.shape}, the picture {image.shape[:2]}")
    share = np.asarray(mask, np.float32)
    inside = share > 0.5
    if inside.mean() < LEAST_SHARE:
        raise Useless(who, f"the mask of the {who} is empty")
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    if all(edge.any() for edge in edges):
        raise Useless(who, f"the mask of the {who} touches all four borders")
    pieces, count = ndimage.label(inside, np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel())[1:]
        largest = int(sizes.argmax()) + 1
        if (np.delete(sizes, largest - 1) > OTHER_PIECES * sizes.max()).any():
            raise Useless(who, f"the mask of the {who} is in several pieces")
        # Crumbs go, with their soft rims.
        share = share * ndimage.binary_dilation(pieces == largest, np.ones((3, 3)), 2)
    return share


def _whole_mouse(share: np.ndarray) -> None:
    inside = share > 0.5
    top, bottom, left, right = _box(inside)
    for edge, name in zip(
        (inside[0], inside[-1], inside[:, 0], inside[:, -1]),
        ("top", "bottom", "left", "right"),
        strict=True,
    ):
        if edge.sum() > 0.03 * (bottom - top + right - left):
            raise Useless("mouse", f"the mouse is cut off at the {name} of its photograph")


def _box(inside: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a mask, the second and the last outside it."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


# ---- placing -----------------------------------------------------------------------------------


def _stand(
    cat: np.ndarray, alpha: np.ndarray, ground: int, rng: random.Random
) -> tuple[int, int] | None:
    """Top and left of the mouse with its feet on the ground row, or None where it has no room.

    It keeps clear of the cat. Of a cat that is taller than long the face is above, and there the
    mouse may stand before its lower half where nothing else is free.
    """
    h, w = alpha.shape
    top, bottom, left, right = _box(cat)
    rows, columns = cat.shape
    margin = max(2, round(0.015 * min(rows, columns)))
    y = min(ground, rows - margin) - h
    if y < 0 or columns - 2 * margin < w:
        return None
    inside = alpha > 0.5
    band = cat[y : y + h]
    step = max(1, w // 16)
    near = NEAR * (bottom - top)
    beside: list[tuple[float, int]] = []
    before: list[int] = []
    for x in range(margin, columns - margin - w + 1, step):
        covered = float((band[:, x : x + w] & inside).sum()) / inside.sum()
        gap = max(left - (x + w), x - right, 0)
        if covered <= 0.01:
            beside.append((gap, x))
        elif covered <= 0.3 and bottom - top > right - left and y > top + 0.55 * (bottom - top):
            before.append(x)
    close = [x for gap, x in beside if gap <= near] or [x for _, x in sorted(beside)[:1]]
    options = close or before
    return (y, rng.choice(options)) if options else None
