"""`tomjerry translate`: files in, files out, and a report of how far each was from training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError, budgets, panorama, rivals, silhouette, transfer, u2net
from tomjerry_utils.autoencoder import factor_of
from tomjerry_utils.faithfulness import Dial
from tomjerry_utils.images import list_images, load_image, resize, resize_short, save_image
from tomjerry_utils.profiles import Profile
from tomjerry_utils.progress import progress
from tomjerry_utils.runs import (
    foundation_root,
    log,
    read_json,
    read_jsonl,
    run_root,
    write_jsonl,
)
from tomjerry_utils.translator import Translator, load_translator

SIZES = ("model", "keep")
CHUNK = 25  # pictures between two looks at the report, at most


def find_weights(profile: Profile, weights: Path | None) -> tuple[Path, str]:
    """The translator that `tomjerry translate` uses, and a line that says which.

    Raises:
        UserError: there is none; the line names the command that makes one.
    """
    if weights is not None:
        if not (weights / "translator.json").is_file():
            raise UserError(f"--weights {weights}: no translator there (no translator.json)")
        return weights, f"weights: {weights}"
    made = run_root(profile) / transfer.STAGE
    if (made / "provenance.json").is_file() and (made / "translator.json").is_file():
        return made, f"weights: {made} (your own run)"
    shipped = foundation_root() / "translator"
    if profile.name == "mini" and (shipped / "translator.json").is_file():
        return shipped, f"weights: {shipped} (shipped with the kit)"
    raise UserError(
        f"no translator for profile {profile.name}: run `make course PROFILE={profile.name}`, "
        "or name one with --weights"
    )


def distance(images: np.ndarray, reference: dict[str, Any]) -> np.ndarray:
    """How far pictures are from the training cartoons, (N,): 1 = as far as 95 % of those are.

    Cosine distance of their features from the centre of the training set's, in units of that
    set's own 95 % quantile.
    """
    from tomjerry_utils import features

    found = features.extract(images)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    centre = np.asarray(reference["centre"])
    return (1 - found @ centre / np.linalg.norm(centre)) / reference["p95"]


def translate_files(
    inputs: Sequence[Path],
    out: Path,
    *,
    profile: Profile,
    cls: str = "auto",
    method: str = "ours",
    steps: int | None = None,
    seed: int = 0,
    samples: int = 1,
    size: str = "model",
    weights: Path | None = None,
    overwrite: bool = False,
    faithfulness: float | None = None,
    silhouettes: bool = False,
) -> list[dict[str, Any]]:
    """Translate pictures and folders for `tomjerry translate`.

    Writes `<stem>.png` (folders mirrored), further samples as `<stem>_2.png` and so on, and
    `report.jsonl` with file, sample, class, distance, seconds. Every input is read before the
    first is translated. A translation depends on its picture, the seed and the sample's number, not
    on what else is translated with it. A picture is in the report before it is in the folder, so
    the same command goes on from wherever it was killed.

    Args:
        samples: translations of each input; they differ in noise and coats.
        size: "model" makes the shorter side the translator's own size, "keep" enlarges the result
            to the input's pixels, which adds no detail; either keeps the input's aspect.
        overwrite: make outputs anew that are there; without it they are kept.
        faithfulness: from 0, as real as can be, to 1, as drawn as can be; None leaves the dial
            alone, and out of the report.
        silhouettes: pictures farther from training than `silhouette.FAR` keep the outlines that
            U²-Net-p sees in them, if any; the report says which did.

    Raises:
        UserError: a missing or unreadable input, one longer than :data:`panorama.LONGEST` times its
            shorter side, two pictures with one output, no weights, an unknown method or size, a
            faithfulness outside 0 … 1; a faithfulness or silhouettes for a rival, which has
            neither; silhouettes whose net is not there and cannot be fetched.
    """
    Dial.at(faithfulness)
    if faithfulness is not None and method != "ours":
        raise UserError(
            f"--faithfulness turns our own method alone: leave it or --method {method} out"
        )
    if silhouettes and method != "ours":
        raise UserError(
            f"--silhouette goes with our own method alone: leave it or --method {method} out"
        )
    path, line = find_weights(profile, weights)
    log(line)
    if method not in ("ours", *budgets.RIVALS):
        raise UserError(f"--method {method}: choose from ours, {', '.join(budgets.RIVALS)}")
    if size not in SIZES:
        raise UserError(f"--size {size}: choose from {', '.join(SIZES)}")
    jobs = _jobs(inputs, out, samples)
    there = {job.target for job in jobs if job.target.exists()}
    if there and not overwrite:
        log(f"{len(there)} outputs exist and are kept; --overwrite makes them anew")
        jobs = [job for job in jobs if job.target not in there]
    translator = load_translator(path, profile)
    rival = None if method == "ours" else rivals.find(profile, method, translator)
    longest = translator.scheduler.config.num_train_timesteps
    if steps is not None and steps > longest:
        raise UserError(f"--steps {steps}: the noise schedule has {longest}; give no more")
    for source in dict.fromkeys(job.source for job in jobs):
        _read(source, translator.size)
    if silhouettes:
        u2net.weights()
    reference = read_json(path / "translator.json")["reference"]
    out.mkdir(parents=True, exist_ok=True)
    written = out / "report.jsonl"
    before = read_jsonl(written) if written.is_file() else []
    rows = {(row.get("file"), row.get("sample", 1)): row for row in before}
    for job in jobs:
        if job.target not in there:
            rows.pop(job.key, None)
    report: list[dict[str, Any]] = []
    with progress(len(jobs), "translate", unit="picture") as shown:
        for some in _chunks(jobs, min(CHUNK, profile.compare.batch_size)):
            pictures, edges = zip(
                *(_read(job.source, translator.size) for job in some), strict=True
            )
            layouts = [_lay_out(translator, picture) for picture in pictures]
            far = distance(_read_from(translator, pictures, layouts), reference)
            outlines = [
                silhouette.outline(load_image(job.source), picture.shape[:2])
                if silhouettes and d > silhouette.FAR
                else None
                for job, picture, d in zip(some, pictures, far, strict=True)
            ]
            made = _translate(
                translator,
                pictures,
                [None if cls == "auto" else cls] * len(some),
                layouts,
                outlines,
                rival=rival,
                steps=steps,
                seed=seed,
                numbers=[_number(x, job.sample) for x, job in zip(pictures, some, strict=True)],
                faithfulness=faithfulness,
            )
            new = [
                {
                    "file": str(job.source),
                    "sample": job.sample,
                    "class": each.cls,
                    "distance": round(float(d), 3),
                    "seconds": round(each.seconds, 4),
                    **({} if faithfulness is None else {"faithfulness": faithfulness}),
                    **({"silhouette": outline is not None} if silhouettes else {}),
                }
                for job, each, d, outline in zip(some, made, far, outlines, strict=True)
            ]
            rows |= {job.key: row for job, row in zip(some, new, strict=True)}
            write_jsonl(written, rows.values())
            for job, each, edge in zip(some, made, edges, strict=True):
                picture = resize(each.picture, edge) if size == "keep" else each.picture
                save_image(job.target, picture)
            report += new
            shown.update(len(some))
    unlike = sum(row["distance"] > silhouette.FAR for row in report)
    if unlike and method == "ours" and not silhouettes:
        log(f"{unlike} pictures are far from training: --silhouette would keep their outlines")
    return report


# ---- helpers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One picture to make."""

    source: Path
    target: Path
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        return str(self.source), self.sample


@dataclass(frozen=True)
class _Made:
    """A translation."""

    picture: np.ndarray
    cls: str
    seconds: float


def _jobs(inputs: Sequence[Path], out: Path, samples: int) -> list[_Job]:
    """The pictures to make, first samples first: they are batched as they are without others."""
    pairs: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_dir():
            # An output folder inside the input folder is no input.
            files = [p for p in list_images(given) if out.resolve() not in p.resolve().parents]
            pairs += [(p, out / p.relative_to(given).with_suffix(".png")) for p in files]
        elif given.is_file():
            pairs.append((given, out / f"{given.stem}.png"))
        else:
            raise UserError(f"{given}: no such file or folder; check the path")
    jobs = [_Job(source, target, 1) for source, target in pairs] + [
        _Job(source, target.with_name(f"{target.stem}_{sample}.png"), sample)
        for source, target in pairs
        for sample in range(2, samples + 1)
    ]
    seen: dict[Path, _Job] = {}
    for job in jobs:
        other = seen.setdefault(job.target, job)
        if other is not job:
            which = f"sample {job.sample} of " if job.sample > 1 else ""
            raise UserError(
                f"{which}{job.source} and {other.source} would both become {job.target}: rename one"
            )
    own = {source.resolve() for source, _ in pairs}
    if drowned := [target for target in seen if target.resolve() in own]:
        raise UserError(f"{drowned[0]} is an input and would be overwritten: choose another --out")
    return jobs


def _chunks(jobs: Sequence[_Job], most: int) -> list[list[_Job]]:
    """Jobs in batches; further samples never share one with first samples."""
    out = []
    for kind in ([j for j in jobs if j.sample == 1], [j for j in jobs if j.sample > 1]):
        out += [kind[begin : begin + most] for begin in range(0, len(kind), most)]
    return out


def _read(source: Path, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture with its shorter side at `size`, and the file's own (height, width)."""
    picture = load_image(source)
    height, width = picture.shape[:2]
    if max(height, width) > panorama.LONGEST * min(height, width):
        raise UserError(
            f"{source}: {width}×{height} pixels, longer than {panorama.LONGEST} times the shorter "
            "side: cut it into parts"
        )
    return resize_short(picture, size), (height, width)


def _number(picture: np.ndarray, sample: int) -> int:
    """What a translation's noise is drawn by, beside the seed."""
    more = b"" if sample == 1 else sample.to_bytes(8)
    return int.from_bytes(sha256(picture.tobytes() + more).digest()[:4])


def _lay_out(translator: Translator, picture: np.ndarray) -> panorama.Layout | None:
    """Where the squares lie in a picture that is none itself."""
    if picture.shape[0] == picture.shape[1]:
        return None
    return panorama.lay_out(translator, panorama.pad(picture, factor_of(translator.vae)))


def _read_from(
    translator: Translator,
    pictures: Sequence[np.ndarray],
    layouts: Sequence[panorama.Layout | None],
) -> np.ndarray:
    """The squares (N, S, S, 3) that the pictures' classes are read from."""
    step = factor_of(translator.vae)
    return np.stack(
        [
            picture if layout is None else layout.squares(panorama.pad(picture, step))[0]
            for picture, layout in zip(pictures, layouts, strict=True)
        ]
    )


def _translate(
    translator: Translator,
    pictures: Sequence[np.ndarray],
    classes: Sequence[str | None],
    layouts: Sequence[panorama.Layout | None],
    outlines: Sequence[np.ndarray | None],
    *,
    rival: rivals.Rival | None,
    steps: int | None,
    seed: int,
    numbers: Sequence[int],
    faithfulness: float | None,
) -> list[_Made]:
    """Translate pictures whose shorter side has the translator's size; squares go together."""
    made: dict[int, _Made] = {}
    square = [i for i, layout in enumerate(layouts) if layout is None]
    if square:
        begun = time.monotonic()
        options: dict[str, Any] = {"seed": seed, "steps": steps}
        options["numbers"] = [numbers[i] for i in square]
        images, given = np.stack([pictures[i] for i in square]), [classes[i] for i in square]
        if rival is None:
            translation = translator.translate(
                images,
                given,
                faithfulness=faithfulness,
                outlines=[outlines[i] for i in square],
                **options,
            )
            results, names = translation.images, translation.classes
        else:
            results, names = rival.translate(images, given, **options)
        each = (time.monotonic() - begun) / len(square)
        for i, picture, name in zip(square, results, names, strict=True):
            made[i] = _Made(picture, name, each)
    for i, layout in enumerate(layouts):
        if layout is None:
            continue
        begun = time.monotonic()
        height, width = pictures[i].shape[:2]
        padded = panorama.pad(pictures[i], factor_of(translator.vae))
        outline = outlines[i]
        if outline is not None:
            outline = panorama.pad(outline, factor_of(translator.vae))
            layout = panorama.lay_out(translator, padded, outline)
        name = classes[i] or layout.cls
        picture = panorama.translate(
            translator,
            padded,
            layout,
            name,
            rival=rival.translate if rival else None,
            seed=seed,
            steps=steps,
            number=numbers[i],
            faithfulness=faithfulness,
            outline=outline,
        )
        made[i] = _Made(picture[:height, :width], name, time.monotonic() - begun)
    return [made[i] for i in range(len(pictures))]
