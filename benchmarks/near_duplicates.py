"""Near-duplicates: how many planted ones are found, what is wrongly found, and how fast.

    python benchmarks/near_duplicates.py [--scenes 2000] [--out results/near_duplicates.json]

Quality, on the starter set, frames of its clip and generated scenes: some pictures get a variant
of each kind, hidden among all pictures. Recall is the share of variants that are proposed and
confirmed with their original, for the even pictures, on which `THRESHOLD` was chosen, and for the
odd ones.
What is confirmed between two originals is listed by their numbers, to be looked at.

Search: hashes with the structure of real ones (of generated scenes, with some bits turned, so that
bands collide), of which a tenth is crowded: 5 % are equal, 5 % lie within three bits of one hash.
A hundredth are planted copies. Each number of pictures runs in a process of its own, so that its
peak memory is its own. Beside the JSON lies a PNG: seconds against pictures, both logarithmic.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import films, scenes
from tomjerry_utils import near_duplicates as near
from tomjerry_utils.images import list_images, load_image
from tomjerry_utils.runs import data_root, environment, log, project_root, write_json

RESULTS = Path("results") / "near_duplicates.json"
COUNTS = (10_000, 100_000, 1_000_000)
CLIP_EVERY = 12  # frames of the clip, 24 a second
Variant = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def main() -> None:
    given = _options()
    results: dict[str, Any] = {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": environment(),
        "settings": {"scenes": given.scenes, "size": given.size, "threshold": near.THRESHOLD},
        "quality": {},
        "search": [],
    }
    for name, pictures in _sets(given.scenes, given.size):
        results["quality"][name] = quality(pictures, given.variants)
        write_json(given.out, results)
    for count in given.counts:
        # A process of its own: its peak memory is that of this search alone.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results["search"].append(pool.submit(search, count).result())
        log(f"{count} pictures: {results['search'][-1]['seconds']:.1f} s")
        write_json(given.out, results)
    if results["search"]:
        _draw(results["search"], given.out.with_suffix(".png"))
    _report(results)


# ---- quality -------------------------------------------------------------------------------------


def quality(pictures: Sequence[np.ndarray], variants: int) -> dict[str, Any]:
    """Recall by kind, and what is confirmed among the originals, with planted variants of some."""
    chosen = np.linspace(0, len(pictures) - 1, min(variants, len(pictures))).astype(int)
    every = list(pictures)
    planted: list[tuple[str, int, int]] = []
    for i in chosen.tolist():
        for number, (kind, make) in enumerate(KINDS.items()):
            planted.append((kind, i, len(every)))
            every.append(make(pictures[i], np.random.default_rng([i, number])))
    begun = time.perf_counter()
    hashes = np.stack([near.perceptual_hashes(picture) for picture in every])
    hashed = time.perf_counter() - begun
    pairs = near.propose(hashes)
    # Two variants say nothing new, nor does a variant of another picture: that is the same question
    # as whether the pictures themselves are alike.
    origin = np.array([*range(len(pictures)), *(i for _, i, _ in planted)])
    apart = pairs.max(1) < len(pictures)
    own = (origin[pairs[:, 0]] == origin[pairs[:, 1]]) & (pairs[:, 0] < len(pictures))
    pairs, apart = pairs[apart | own], apart[apart | own]
    begun = time.perf_counter()
    distances = near.confirm(pairs, lambda indices: [every[i] for i in indices])
    confirming = time.perf_counter() - begun
    found = {(int(i), int(j)): float(d) for (i, j), d in zip(pairs, distances, strict=True)}
    among = sorted((found[i, j], i, j) for i, j in found if j < len(pictures))
    return {
        "pictures": len(pictures),
        "planted": {
            half: _recall([(kind, found.get((i, j))) for kind, i, j in planted if i % 2 == parity])
            for parity, half in enumerate(("even", "odd"))
        },
        "proposed_among_originals": int(apart.sum()),
        "confirmed_among_originals": [[i, j] for d, i, j in among if d <= near.THRESHOLD],
        "nearest_among_originals": [
            [round(d, 4), i, j] for d, i, j in among[:20] if np.isfinite(d)
        ],
        "hashes_per_second": len(every) / hashed,
        "pairs_per_second": len(pairs) / max(confirming, 1e-9),
    }


def _recall(rows: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """Shares found, by kind; distances of those that were proposed."""
    kinds = {"all": set(KINDS), **{kind: {kind} for kind in KINDS}}
    measured = sorted(d for _, d in rows if d is not None and np.isfinite(d))
    return {
        "variants": len(rows),
        "not_proposed": sum(d is None for _, d in rows),
        "not_laid": sum(d is not None and not np.isfinite(d) for _, d in rows),
        "farthest": [round(d, 4) for d in measured[:-11:-1]],
        "recall": {
            name: float(
                np.mean([d is not None and d <= near.THRESHOLD for k, d in rows if k in of])
            )
            for name, of in kinds.items()
        },
    }


def _sets(count: int, size: int) -> Any:
    root = data_root() / "starter"
    yield (
        "starter",
        [load_image(p) for part in ("cartoon", "photo") for p in list_images(root / part)],
    )
    film = root / "clip" / "big_buck_bunny_20s.mp4"
    yield (
        "clip",
        [
            frame.to_ndarray(format="rgb24")
            for number, frame in films.read_frames(film)
            if number % CLIP_EVERY == 0
        ],
    )
    for style in scenes.STYLES:
        first = scenes.RANGES[style][0]
        yield style, scenes.render_many(range(first, first + count), style, size)["image"]


def _encoded(image: np.ndarray, form: str, **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _half(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    return np.asarray(
        Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    )


def _cropped(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    tall, wide = round(0.95 * height), round(0.95 * width)
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    return image[top : top + tall, left : left + wide]


def _brightened(share: float) -> Variant:
    return lambda image, rng: (image * (1 + share)).round().clip(0, 255).astype(np.uint8)


def _marked(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of one colour with a bar of another in it, in some corner."""
    out = image.copy()
    side = round(min(image.shape[:2]) * rng.uniform(0.08, 0.15))
    y = 0 if rng.integers(2) else image.shape[0] - side
    x = 0 if rng.integers(2) else image.shape[1] - side
    out[y : y + side, x : x + side] = rng.integers(0, 256, 3)
    out[y + side // 3 : y + side // 2 + 1, x + side // 5 : x + side - side // 5] = rng.integers(
        0, 256, 3
    )
    return out


KINDS: dict[str, Variant] = {
    **{
        f"jpeg {q}": lambda image, rng, q=q: _encoded(image, "JPEG", quality=q)
        for q in (30, 50, 70, 90)
    },
    "webp": lambda image, rng: _encoded(image, "WEBP", quality=int(rng.integers(40, 91))),
    "png": lambda image, rng: _encoded(image, "PNG"),
    "half": _half,
    "crop": _cropped,
    "darker": _brightened(-0.15),
    "brighter": _brightened(0.15),
    "mark": _marked,
}


# ---- search --------------------------------------------------------------------------------------


def search(count: int, radius: int = near.RADIUS) -> dict[str, Any]:
    """Time, memory and recall of one search among `count` pictures."""
    hashes, planted, crowd = structured_hashes(count, radius=radius)
    before = _peak()
    begun, used = time.perf_counter(), time.process_time()
    pairs = near.propose(hashes, radius=radius)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    codes = pairs[:, 0] * count + pairs[:, 1]
    low, high = planted.min(1), planted.max(1)
    hit = np.isin(low * count + high, codes)
    crowded = np.isin(planted[:, 0], crowd)
    return {
        "pictures": count,
        "hashes": int(hashes.size),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": _peak(),
        "mib_before": before,
        "pairs": len(pairs),
        "planted": len(planted),
        "recall": float(hit[~crowded].mean()),
        "recall_in_the_crowd": float(hit[crowded].mean()),
    }


def structured_hashes(
    count: int, *, radius: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes as real ones crowd, planted near pairs (Q, 2), and who is in the dense ball."""
    rng = np.random.default_rng(seed)
    pool = np.stack(
        [
            near.perceptual_hashes(image)
            for style in scenes.STYLES
            for image in scenes.render_many(
                range(scenes.RANGES[style][0], scenes.RANGES[style][0] + 300), style, 32
            )["image"]
        ]
    )
    columns = pool.shape[1]
    hashes = pool[rng.integers(len(pool), size=count)]
    # One mask for all hashes of a picture and a little of its own for each, as in real ones.
    hashes ^= _mask(rng, (count, 1), 0.15) ^ _mask(rng, (count, columns), 0.02)
    order = rng.permutation(count)
    tenth, twentieth = count // 10, count // 20
    equal, ball = order[:twentieth], order[twentieth:tenth]
    hashes[equal] = pool[0]
    hashes[ball] = pool[1] ^ _turned(rng, (len(ball), 1), 3)
    copies = order[tenth : tenth + count // 100]
    sources = rng.permutation(np.concatenate([order[tenth + len(copies) :], ball]))[: len(copies)]
    hashes[copies] = hashes[sources] ^ _turned(rng, (len(copies), columns), radius)
    return hashes, np.stack([sources, copies], axis=1), ball


def _mask(rng: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    mask = np.zeros(shape, np.uint64)
    for bit in range(64):
        mask |= (rng.random(shape, np.float32) < share).astype(np.uint64) << np.uint64(bit)
    return mask


def _turned(rng: np.random.Generator, shape: tuple[int, int], most: int) -> np.ndarray:
    """Masks of 0 to `most` bits."""
    mask = np.zeros(shape, np.uint64)
    wanted = rng.integers(0, most + 1, shape)
    for number in range(most):
        bit = np.uint64(1) << rng.integers(0, 64, shape).astype(np.uint64)
        mask |= np.where(number < wanted, bit, np.uint64(0))
    return mask


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- what is shown -------------------------------------------------------------------------------


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from tomjerry_utils.figures import curve
    from tomjerry_utils.runs import atomic_path

    counts, seconds = [row["pictures"] for row in rows], [row["seconds"] for row in rows]
    linear = [seconds[0] * count / counts[0] for count in counts]
    figure = curve(
        {"measured": (counts, seconds), "linear": (counts, linear)},
        x_label="pictures",
        y_label="seconds",
        title="Search for near hashes",
        log=True,
        smooth=1,
    )
    figure.axes[0].set_xscale("log")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def _report(results: dict[str, Any]) -> None:
    for name, row in results["quality"].items():
        by_kind = ", ".join(
            f"{kind} {share:.3f}" for kind, share in row["planted"]["odd"]["recall"].items()
        )
        print(
            f"{name}: {row['pictures']} pictures, recall {by_kind}; among the originals "
            f"{row['proposed_among_originals']} pairs proposed, "
            f"{len(row['confirmed_among_originals'])} confirmed; "
            f"{row['hashes_per_second']:.0f} pictures/s, "
            f"{row['pairs_per_second']:.0f} pairs/s"
        )
    for row in results["search"]:
        print(
            f"{row['pictures']} pictures ({row['hashes']} hashes): {row['seconds']:.1f} s, "
            f"{row['peak_mib']:.0f} MiB, {row['pairs']} pairs, recall {row['recall']:.4f}, "
            f"in the crowd {row['recall_in_the_crowd']:.4f}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000, help="of each style (2000)")
    parser.add_argument("--size", type=int, default=64, help="pixels of the scenes (64)")
    parser.add_argument("--variants", type=int, default=60, help="pictures a set that get variants")
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--out", type=Path, default=project_root() / RESULTS)
    given = parser.parse_args()
    if given.scenes < 4 or given.variants < 2 or min(given.counts, default=10_000) < 10_000:
        parser.error(
            "need four scenes, two pictures with variants and ten thousand hashes, or more"
        )
    return given


if __name__ == "__main__":
    main()
