"""The tiny foundation models: what Stable Diffusion and BLIP-base are to the paper profile.

They learn from the zoo (natural animals of random proportions and coats, without class names), so
that the course has a general prior to fine-tune. Each step is resumable, leaves its log beside the
weights, and takes at most about an hour on two cores:

    tomjerry foundation blip | autoencoder | structure | posture | judges | denoiser | translator
    tomjerry foundation screens
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tomjerry_utils import UserError, scenes
from tomjerry_utils.runs import (
    atomic_dir,
    atomic_path,
    foundation_root,
    hash_file,
    log,
    project_root,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tomjerry_utils.training import TrainResult, apply_ema, progress, train

SIZE = 64
SEEDS = {
    "autoencoder": 0,
    "structure": 1,
    "blip": 2,
    "denoiser": 3,
    "posture": 4,
    "judges": 31,
    "translator": 0,
    "screens": 5,
}
STEPS: dict[str, dict[str, Any]] = {
    # Small and many: at one size of budget, batch 8 and narrow layers gave the crispest pictures.
    "autoencoder": {
        "steps": 38_000,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "latent_channels": 16,
        # The second from two thirds on: first well-spread latents, then the last decibels.
        "kl_weights": (2e-7, 2e-8),
        "widths": (32, 64),
        # Then the decoder alone, for as much fur as the pictures have.
        "decoder_steps": 6_000,
    },
    # The second phase sees drawings too, grain, and three times the animals.
    "blip": {
        "steps": 2_500,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "further_steps": 8_000,
        "further_learning_rate": 6e-4,
        "ema_decay": 0.998,
    },
    "structure": {"steps": 4_000, "batch_size": 16, "learning_rate": 2e-3},
    "posture": {
        "pose_steps": 1_500,
        "layout_steps": 1_200,
        "batch_size": 24,
        "learning_rate": 2e-3,
    },
    "judges": {"label_steps": 1_500, "pixel_steps": 3_500, "batch_size": 32, "learning_rate": 2e-3},
    # Small batches and many steps again. At a rate of 2e-3 it blew up after 1700 of them.
    "denoiser": {"steps": 12_500, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.998},
    "screens": {
        "views": 2,
        "scenes": 300,
        "hidden": 24,
        "steps": 3_000,
        "batch_size": 1024,
        "learning_rate": 3e-3,
    },
}
BLIP_OPTIONS: dict[str, Any] = {
    "warmup_steps": 100,
    "contrastive_weight": 0.5,
    "device": "cpu",
    "threads": 2,
    "log_every": 50,
    "describe": "foundation BLIP",
}
# What is rendered for them: (style, zoo, first seed, count).
PICTURES = {
    "natural zoo": ("natural", True, 0, 9_000),
    "more natural zoo": ("natural", True, 9_000, 15_000),
    "cartoon zoo": ("cartoon", True, 500_000, 3_000),
    "cartoon": ("cartoon", False, 1_900_000, 2_500),
    "natural": ("natural", False, 2_900_000, 2_500),
    "held out": ("natural", True, 900_000, 300),
    "judged": ("natural", False, 3_000_000, 8_000),
    "judged cartoon": ("cartoon", False, 3_500_000, 2_500),
}


def pictures(name: str) -> dict[str, np.ndarray]:
    """A set of :data:`PICTURES` with its truth, rendered once and kept under `runs/foundation`.

    Returns:
        ``image``, ``mask``, ``parts`` (N, 64, 64[, 3]) uint8, ``keypoints``, ``seed`` (N,); without
        sensor noise, which each training adds itself.
    """
    style, zoo, first, count = PICTURES[name]
    kind = "zoo" if zoo else "scenes"
    path = (
        project_root()
        / "runs"
        / "foundation"
        / kind
        / f"{style}_{SIZE}_{first}_{first + count}.npz"
    )
    if not path.is_file():
        log(f"foundation: drawing {count} {name} scenes")
        parts: list[dict[str, np.ndarray]] = []
        for start in progress(range(first, first + count, 500), f"draw {name}"):
            seeds = range(start, min(start + 500, first + count))
            parts.append(scenes.render_many(seeds, style, SIZE, zoo=zoo, truth=True, noise=False))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})  # type: ignore[arg-type]
    with np.load(path) as stored:
        data = {k: stored[k] for k in stored.files}
    data["seed"] = np.arange(first, first + count)
    return data


def noisy(images: Tensor, generator: torch.Generator, amount: float = 0.02) -> Tensor:
    """Pictures in [−1, 1] with the camera's noise (deviation 0.01 of the range, so 0.02 here)."""
    return images + amount * torch.randn(images.shape, generator=generator)


def _floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _draw(images: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    """A random batch from uint8 (N, 3, H, W) with its indices and whether it is mirrored."""
    index = torch.randint(len(images), (size,), generator=generator)
    mirror = bool(torch.rand((), generator=generator) < 0.5)
    batch = images[index].float() / 127.5 - 1
    return (batch.flip(3) if mirror else batch), index, mirror


def _work(name: str) -> Path:
    return project_root() / "runs" / "foundation" / name


def _ship(
    name: str,
    save: Callable[[Path], None],
    *,
    seconds: float,
    history: list[dict[str, Any]],
    threads: int = 1,
    **facts: Any,
) -> Path:
    """Write a finished model with its log into data/foundation, all at once."""
    target = foundation_root() / name
    with atomic_dir(target) as folder:
        save(folder)
        write_jsonl(folder / "history.jsonl", history)
        files = sorted(folder.rglob("*.safetensors"))
        weights = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        write_json(
            folder / "provenance.json",
            {
                "command": f"tomjerry foundation {name}",
                "settings": STEPS.get(name, {}),
                "seed": SEEDS[name],
                "seconds": round(seconds, 1),
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{os.cpu_count()} CPU cores, {threads} used",
                "torch": torch.__version__,
                "licence": "MIT; trained on scenes generated by this project alone",
                "bytes": weights,
                **facts,
            },
        )
    shutil.rmtree(_work(name), ignore_errors=True)
    log(f"foundation: {name} written to {target}")
    return target


def make_autoencoder() -> Path:
    """Train the autoencoder on zoo pictures of both styles; measure it on held-out scenes."""
    from tomjerry_utils.autoencoder import (
        TEXTURE_WEIGHT,
        autoencoder_loss,
        decode,
        decoder_alone,
        encode,
        fine_band_energy,
        measure_latents,
        psnr,
        tiny_autoencoder,
    )

    options = STEPS["autoencoder"]
    both = np.concatenate([pictures("natural zoo")["image"], pictures("cartoon zoo")["image"]])
    images = torch.from_numpy(both).permute(0, 3, 1, 2).contiguous()
    held = pictures("held out")
    wanted, mask = _floats(held["image"]), torch.from_numpy(held["mask"] > 0)
    torch.manual_seed(0)
    vae = tiny_autoencoder(options["latent_channels"], options["widths"])
    steps = {"autoencoder": options["steps"], "decoder": options["decoder_steps"]}
    scores: dict[str, float] = {}

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch, _, _ = _draw(images, options["batch_size"], generator)
        return noisy(batch, generator), batch

    def look(step: int, modules: dict[str, Any]) -> None:
        if step % 2000 and step not in steps.values():
            return
        seen = noisy(wanted, torch.Generator().manual_seed(1))
        back = decode(vae, encode(vae, seen))
        fur = fine_band_energy(back, mask) / fine_band_energy(wanted, mask)
        scores.update(
            psnr_db=round(float(psnr(back, wanted).mean()), 2), fur_energy=round(float(fur), 3)
        )
        log(f"autoencoder {step}: {scores}")

    def phase(
        name: str, module: nn.Module, rate: float, weights: Callable[[int], dict[str, float]]
    ) -> TrainResult:
        def loss(batch: tuple[Tensor, Tensor], step: int, generator: torch.Generator) -> Any:
            return autoencoder_loss(vae, batch[0], batch[1], generator, **weights(step))

        result = train(
            {name: module},
            loss,
            batches,
            steps=steps[name],
            learning_rate=rate,
            warmup_steps=100,
            folder=_work("autoencoder") / name,
            seed=SEEDS["autoencoder"],
            ema_decay=0.998,
            weight_decay=0.0,
            precision="bf16",
            log_every=200,
            on_log=look,
            threads=1,
            describe=name,
            keep_checkpoint=True,
        )
        apply_ema({name: module}, result)
        return result

    first = phase(
        "autoencoder",
        vae,
        options["learning_rate"],
        lambda step: {"kl_weight": options["kl_weights"][3 * step >= 2 * options["steps"]]},
    )
    last = {"kl_weight": 0.0, "texture_weight": TEXTURE_WEIGHT}
    second = phase("decoder", decoder_alone(vae), options["learning_rate"] / 3, lambda step: last)
    measure_latents(vae, torch.from_numpy(both[:2000]))
    return _ship(
        "autoencoder",
        lambda folder: vae.half().save_pretrained(folder),
        seconds=first.seconds + second.seconds,
        history=[
            {"phase": n, **row}
            for n, r in zip(steps, (first, second), strict=True)
            for row in r.history
        ],
        held_out=scores,
    )


def make_structure() -> Path:
    """Train the part segmenter on zoo and course scenes of both styles."""
    from tomjerry_utils.structure import StructureNet, structure_loss

    options = STEPS["structure"]
    sets = [pictures(n) for n in ("natural zoo", "cartoon zoo", "cartoon", "natural")]
    known = np.concatenate([np.full(len(s["image"]), i >= 2) for i, s in enumerate(sets)])
    images = torch.from_numpy(np.concatenate([s["image"] for s in sets]))
    images = images.permute(0, 3, 1, 2).contiguous()
    parts = torch.from_numpy(np.concatenate([s["parts"] for s in sets]))
    masks = torch.from_numpy(np.concatenate([s["mask"] for s in sets]))
    # Every kind of picture equally often.
    ends = np.cumsum([0] + [len(s["image"]) for s in sets])
    torch.manual_seed(1)
    net = StructureNet()

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        each = options["batch_size"] // 4
        index = torch.cat(
            [torch.randint(int(a), int(b), (each,), generator=generator) for a, b in pairwise(ends)]
        )
        x = images[index].float() / 127.5 - 1
        p, m = parts[index].long(), masks[index]
        if torch.rand((), generator=generator) < 0.5:
            x, p, m = x.flip(3), p.flip(2), m.flip(2)
        # Other colours, contrasts and blurs, so that drawings it never saw are still read.
        gain = 1 + 0.35 * (2 * torch.rand(len(x), 3, 1, 1, generator=generator) - 1)
        lift = 0.25 * (2 * torch.rand(len(x), 3, 1, 1, generator=generator) - 1)
        x = (x * gain + lift).clamp(-1, 1)
        x = noisy(x, generator, 0.05 * float(torch.rand((), generator=generator)))
        return x, p, m == 2, torch.from_numpy(known[index.numpy()])

    def loss(batch: tuple[Tensor, ...], step: int, generator: torch.Generator) -> Any:
        return structure_loss(net, batch[0], batch[1], batch[2], known=batch[3])

    result = train(
        {"structure": net},
        loss,
        batches,
        steps=options["steps"],
        learning_rate=options["learning_rate"],
        warmup_steps=100,
        folder=_work("structure"),
        seed=SEEDS["structure"],
        ema_decay=0.998,
        precision="bf16",
        log_every=100,
        threads=1,
        describe="structure",
    )
    apply_ema({"structure": net}, result)
    return _ship(
        "structure",
        lambda folder: net.half().save_pretrained(folder),
        seconds=result.seconds,
        history=result.history,
    )


def make_posture() -> Path:
    """Train the pose net on course scenes of both styles, the layout net on natural ones alone."""
    from tomjerry_utils.judges import by_species
    from tomjerry_utils.posture import LayoutNet, PoseNet, layout_loss, pose_loss

    options = STEPS["posture"]
    sets = {name: pictures(name) for name in ("natural", "cartoon")}
    images, points, there, parts, mouse = {}, {}, {}, {}, {}
    for name, data in sets.items():
        images[name] = torch.from_numpy(data["image"]).permute(0, 3, 1, 2).contiguous()
        seen = torch.from_numpy(by_species(data["seed"], data["keypoints"])[..., :2]).float()
        points[name] = (seen / SIZE).clamp(0, 1)
        named = [scenes.describe(int(seed)).cls for seed in data["seed"]]
        there[name] = torch.tensor([[c != "jerry", c != "tom"] for c in named]).float()
        parts[name] = torch.from_numpy(data["parts"])
        mouse[name] = torch.from_numpy(data["mask"] == 2)
    torch.manual_seed(SEEDS["posture"])
    nets = {"pose": PoseNet(), "layout": LayoutNet()}

    def mirrored(at: Tensor) -> Tensor:
        return torch.stack([1 - at[..., 0], at[..., 1]], -1)

    def pictured(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = [
            (*_draw(images[name], options["batch_size"] // 2, generator), name) for name in sets
        ]
        x = torch.cat([batch for batch, _, _, _ in drawn])
        at = torch.cat(
            [mirrored(points[n][i]) if flip else points[n][i] for _, i, flip, n in drawn]
        )
        # Other colours and contrasts, so that drawings it never saw are still read.
        gain = 1 + 0.35 * (2 * torch.rand(len(x), 3, 1, 1, generator=generator) - 1)
        lift = 0.25 * (2 * torch.rand(len(x), 3, 1, 1, generator=generator) - 1)
        x = noisy((x * gain + lift).clamp(-1, 1), generator, 0.03)
        return x, at, torch.cat([there[n][i] for _, i, _, n in drawn])

    def laid_out(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        index = torch.randint(len(points["natural"]), (options["batch_size"],), generator=generator)
        at, p, m = (kind["natural"][index] for kind in (points, parts, mouse))
        if torch.rand((), generator=generator) < 0.5:
            at, p, m = mirrored(at), p.flip(2), m.flip(2)
        # As uncertain as the pose net is.
        at = (at + 0.008 * torch.randn(at.shape, generator=generator)).clamp(0, 1)
        return at, there["natural"][index], p.long(), m

    results = {}
    for name, batches, loss in (
        ("pose", pictured, lambda batch, step, generator: pose_loss(nets["pose"], *batch)),
        ("layout", laid_out, lambda batch, step, generator: layout_loss(nets["layout"], *batch)),
    ):
        results[name] = train(
            {name: nets[name]},
            loss,
            batches,
            steps=options[f"{name}_steps"],
            learning_rate=options["learning_rate"],
            warmup_steps=100,
            schedule="cosine",
            folder=_work("posture") / name,
            seed=SEEDS["posture"],
            ema_decay=0.995,
            log_every=50,
            threads=1,
            describe=name,
            keep_checkpoint=True,
        )
        apply_ema({name: nets[name]}, results[name])

    def save(folder: Path) -> None:
        for name, net in nets.items():
            net.half().save_pretrained(folder / name)

    return _ship(
        "posture",
        save,
        seconds=sum(result.seconds for result in results.values()),
        history=[{"net": n, **row} for n, result in results.items() for row in result.history],
    )


def make_blip() -> Path:
    """Train the tiny BLIP on zoo scenes and their captions ("an animal is …"), in two phases."""
    from tomjerry_utils import blip

    options = STEPS["blip"]
    shared = {"batch_size": options["batch_size"], "seed": SEEDS["blip"]}
    first = pictures("natural zoo")
    start = blip.create_tiny(scenes.vocabulary(), seed=SEEDS["blip"])
    begun = blip.fine_tune(
        start,
        first["image"],
        _zoo_captions(first),
        steps=options["steps"],
        learning_rate=options["learning_rate"],
        folder=_work("blip") / "first",
        keep_checkpoint=True,
        **shared,
        **BLIP_OPTIONS,
    )
    further = further_blip(start, _work("blip") / "further")
    return _ship(
        "blip",
        lambda folder: blip.save(start, folder, half=True),
        seconds=begun.seconds + further.seconds,
        history=[
            {"phase": name, **row}
            for name, result in (("first", begun), ("further", further))
            for row in result.history
        ],
        threads=2,
    )


def further_blip(model: Any, folder: Path) -> TrainResult:
    """The second phase of the foundation's BLIP, in place: more animals, drawings, grain."""
    from tomjerry_utils import blip

    options = STEPS["blip"]
    sets = [pictures(name) for name in ("natural zoo", "more natural zoo", "cartoon zoo")]
    rng = np.random.default_rng(SEEDS["blip"])
    images = np.concatenate([data["image"] for data in sets])
    for part in np.array_split(images, 16):
        seen = part + rng.normal(0, 2.55, part.shape).astype(np.float32)
        part[:] = np.clip(seen, 0, 255).astype(np.uint8)
    return blip.fine_tune(
        model,
        images,
        [text for data in sets for text in _zoo_captions(data)],
        steps=options["further_steps"],
        batch_size=options["batch_size"],
        learning_rate=options["further_learning_rate"],
        seed=SEEDS["blip"] + 100,
        folder=folder,
        ema_decay=options["ema_decay"],
        schedule="cosine",
        keep_checkpoint=True,
        **BLIP_OPTIONS,
    )


def _zoo_captions(data: dict[str, np.ndarray]) -> list[str]:
    # A drawing of a nameless animal is captioned like its photograph.
    return [scenes.caption(scenes.describe(int(s), zoo=True), "natural") for s in data["seed"]]


def make_judges() -> Path:
    """Train the judges on their own range of seeds."""
    from tomjerry_utils import judges

    return _ship("judges", **judges.train_judges(_work("judges"), pictures, STEPS["judges"]))


def make_denoiser() -> Path:
    """Train the denoiser on zoo latents, with views and captions, without classes."""
    from tomjerry_utils import ldm

    options = STEPS["denoiser"]
    unet, result, facts = ldm.train_foundation(_work("denoiser"), pictures("natural zoo"), options)
    return _ship(
        "denoiser",
        lambda folder: unet.half().save_pretrained(folder),
        seconds=result.seconds,
        history=result.history,
        threads=2,
        **facts,
    )


def make_translator() -> Path:
    """Ship the translator that the newest `mini` course made."""
    from tomjerry_utils.profiles import load_profile
    from tomjerry_utils.runs import run_root

    made = run_root(load_profile("mini")) / "05_transfer"
    if not (made / "provenance.json").is_file():
        raise UserError(f"no finished translator in {made}; run `make course` first")
    source = read_json(made / "provenance.json")

    def save(folder: Path) -> None:
        from tomjerry_utils.translator import ship

        ship(made, folder)

    return _ship(
        "translator",
        save,
        seconds=source["seconds"],
        history=read_jsonl(made / "training" / "history.jsonl"),
        made_by="make course",
        course=source,
    )


def make_screens() -> Path:
    """Train the probes that collected pictures pass, on pictures of Debian packages and the zoo."""
    from safetensors.torch import save_file

    from tomjerry_utils import screens, screens_training

    def save(folder: Path) -> None:
        save_file(weights, folder / screens.WEIGHTS)
        (folder / screens.WEIGHTS).chmod(0o644)

    work = _work("screens")
    begun = time.perf_counter()
    weights, result, facts = screens_training.teach(
        work / "text", STEPS["screens"], SEEDS["screens"]
    )
    return _ship(
        "screens",
        save,
        seconds=time.perf_counter() - begun,
        history=result.history,
        licence="MIT, the weights; of what they saw only packages' names ship, see trained_on",
        **facts,
    )


MAKERS = {
    "blip": make_blip,
    "autoencoder": make_autoencoder,
    "structure": make_structure,
    "posture": make_posture,
    "judges": make_judges,
    "denoiser": make_denoiser,
    "translator": make_translator,
    "screens": make_screens,
}


def make(step: str) -> Path:
    """Run one step of `tomjerry foundation`.

    Raises:
        UserError: an unknown step, or one that it builds on is missing.
    """
    if step not in MAKERS:
        raise UserError(f"no foundation step {step!r}; choose from {', '.join(MAKERS)}")
    return MAKERS[step]()


def shipped() -> list[dict[str, Any]]:
    """What ships: rows of name, file, bytes and sha256 of every weight file."""
    rows = []
    for path in sorted(foundation_root().rglob("*.safetensors")):
        name = path.relative_to(foundation_root())
        rows.append(
            {
                "model": name.parts[0],
                "file": str(name),
                "bytes": path.stat().st_size,
                "sha256": hash_file(path),
            }
        )
    return rows
