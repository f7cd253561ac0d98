"""What the probes of :mod:`screens` learn from and are tested on.

Photographs and drawings come from Debian packages, which are downloaded and unpacked, never
installed; generated scenes of both styles are added. Only the probes ship, never these pictures.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tomjerry_utils import scenes
from tomjerry_utils.images import GROUND, IMAGE_SUFFIXES
from tomjerry_utils.runs import atomic_dir, data_root, log, project_root
from tomjerry_utils.screens import SIZE

LARGEST = 640  # px; pictures are kept no larger than this
SMALLEST = 96


@dataclass(frozen=True)
class Source:
    """Pictures of one kind in one Debian package.

    Attributes:
        package: name; `licence`: of these pictures, by the package's copyright file.
        photo: whether they are photographs.
        held_out: never trained on.
        wanted: regular expression on the path within the package.
        most: as many are taken, evenly over the sorted paths.
    """

    package: str
    licence: str
    photo: bool
    held_out: bool
    wanted: str
    most: int = 400


_STAMPS = (
    r"stamps/(animals|plants|food/(fruit|vegetables|nuts)|household/tools|vehicles)/"
    r"(?!.*(cartoon|penguin_with|pengwin|tux|fly|mosquito))"
)
SOURCES = (
    Source(
        "gcompris-qt-data",
        "CC-BY-SA, CC-BY, GFDL, public domain",
        True,
        False,
        r"(categorization|explore_farm_animals|explore_monuments|explore_world_animals|erase)\.rcc",
    ),
    Source("gcompris-qt-data", "GPL-3+, CC-BY-SA", False, False, r"/lang\.rcc"),
    Source("tuxpaint-stamps-default", "GPL-2+, public domain", True, False, _STAMPS, 250),
    Source("tuxpaint-stamps-default", "GPL-2+, public domain", False, False, r"/cartoon/", 120),
    Source(
        "openclipart-png",
        "public domain",
        False,
        False,
        r"/(animals|people|food|recreation|buildings|transportation/vehicles|plants|tools|unsorted)/",
        500,
    ),
    Source(
        "supertux-data",
        "GPL-2+, CC-BY-SA",
        False,
        False,
        r"/images/(background|creatures|objects|worldmap)/",
        400,
    ),
    Source(
        "lomiri-wallpapers-16.04", "CC-BY-SA", True, True,
        r"Bridge|Dragonfly|aitz|free_by|friends|greentock|life_|picos|seeding|sunset|Wine",
    ),
    Source("mate-backgrounds", "CC-BY-SA, GPL", True, True, r"mate/nature/(?!Aqua|Blinds)"),
    Source("palapeli-data", "GPL, CC-BY-SA", True, True, r"collection/.*jpg"),
    Source("plasma-workspace-data", "CC0", True, True,
           r"avatars/photos/(?!Bulb)|avatars/(Air|Astro|Cat|Cham|Pan|Par|Shu|Sus)"),
    Source("plasma-workspace-data", "CC-BY-SA", False, True, r"Konqi"),
    Source("python3-sklearn", "CC-BY", True, True, r"\.jpg"),
    Source("python3-skimage", "CC0, public domain", True, True,
           r"data/(astronaut|camera|chelsea|coffee|rocket|motorcycle_left|brick|grass|gravel)\."),
    Source(
        "opencv-doc", "Apache-2.0, BSD-3-Clause", True, True,
        r"examples/(data|hfs/data|text)/(aero1|aloeL|apple|baboon|basketball|box_in_scene|building|"
        r"butterfly|chicky|fruits|leuven|rubberwhale1|squirrel_cls|ela_original|00[12]|"
        r"plant|left0[15])[^/]*\.(jpg|png)$",
    ),
    Source("hedgewars-data", "GPL-2", False, True,
           r"/Themes/(?!.*(Tex|mask|Clouds|Girder|Border))|/Graphics/(Missions|Hats)", 300),
    Source("tuxmath-data", "GPL-3+, public domain", False, True, r"/images/(?!backgrounds)"),
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """One picture: `image` (H, W, 4) uint8 RGBA, its `name`, where it is from, what it is."""

    image: np.ndarray
    name: str
    source: str
    photo: bool
    held_out: bool


def folder() -> Path:
    """Where packages are unpacked."""
    return project_root() / "runs" / "foundation" / "packages"


def fetch(package: str) -> Path | None:
    """The folder of an unpacked package, downloaded once; None where it cannot be had.

    Its version is in the file `VERSION` within.
    """
    target = folder() / package
    if (target / "VERSION").is_file():
        return target
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    with atomic_dir(target) as made:
        done = subprocess.run(
            ["apt-get", "download", "-qq", package], cwd=made, capture_output=True, check=False
        )
        archives = sorted(made.glob("*.deb"))
        if not done.returncode and len(archives) == 1:
            subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(made)], check=True)
            show = ["dpkg-deb", "-f", str(archives[0]), "Version"]
            version = subprocess.run(show, capture_output=True, text=True, check=True).stdout
            (made / "VERSION").write_text(version.strip(), encoding="utf-8")
            archives[0].unlink()
    if not (target / "VERSION").is_file():
        shutil.rmtree(target)
        return None
    return target


def gather(sources: Sequence[Source] = SOURCES) -> tuple[list[Material], dict[str, str]]:
    """All pictures that can be had, and the version of each package, "" for one that cannot."""
    found: list[Material] = []
    versions: dict[str, str] = {}
    for source in sources:
        root = fetch(source.package)
        if root is None:
            if source.package not in versions:
                log(f"screens: no package {source.package} here, done without it")
            versions[source.package] = ""
            continue
        versions[source.package] = (root / "VERSION").read_text(encoding="utf-8").strip()
        found += _read(source, root)
    return found + _starter(), versions


def drawn_scenes(style: str, seeds: range, sizes: Sequence[int], *, zoo: bool) -> list[Material]:
    """Generated scenes, the seeds dealt out over the sizes."""
    return [
        Material(_opaque(image), str(seed), f"{'zoo' if zoo else 'course'} scenes",
                 style == "natural", not zoo)
        for i, size in enumerate(sizes)
        for seed, image in zip(
            seeds[i :: len(sizes)],
            scenes.render_many(seeds[i :: len(sizes)], style, size, zoo=zoo)["image"],
            strict=True,
        )
    ]  # fmt: skip


def view(material: Material, rng: np.random.Generator, *, plain: bool = False) -> np.ndarray:
    """One look at a picture, (256, 256, 3) uint8: on a ground, cropped, reduced, compressed.

    Args:
        plain: the whole picture on paper, as `images.load_image` lays it; nothing at random.
    """
    image = Image.fromarray(material.image)
    image = Image.alpha_composite(_ground(image.size, None if plain else rng), image).convert("RGB")
    if not plain:
        image = _cropped(image, rng)
        if rng.random() < 0.5:
            short = int(np.exp(rng.uniform(np.log(64), np.log(SIZE))))
            image = image.resize((short, short), Image.Resampling.BILINEAR)
        if rng.random() < 0.1:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.6:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
            image = Image.open(buffer).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


# ---- helpers -------------------------------------------------------------------------------------


_STARTS = rb"RIFF....WEBP|\xff\xd8\xff[\xe0\xe1\xdb]|\x89PNG\r\n"


def _read(source: Source, root: Path) -> list[Material]:
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in (*IMAGE_SUFFIXES, ".rcc")
        and re.search(source.wanted, path.as_posix())
        and path.is_file()
        and not path.is_symlink()
    ]
    # Twice as many as are wanted, since some turn out too small.
    paths = paths[:: max(1, len(paths) // (2 * source.most))]
    found: list[Material] = []
    for name, content in (pair for path in paths for pair in _files(path)):
        image = _load(content)
        if image is not None:
            found.append(Material(image, name, source.package, source.photo, source.held_out))
    step = max(1.0, len(found) / source.most)
    return [found[int(i * step)] for i in range(min(len(found), source.most))]


def _starter() -> list[Material]:
    """The starter pictures, held out, but for those of packages that are trained on."""
    root = data_root() / "starter"
    with (root / "attribution.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] in ("cat", "mouse", "rodent")]
    trained = {source.package for source in SOURCES if not source.held_out}
    found = []
    for row in rows:
        if row["package"].replace("-svg", "-png") in trained:
            continue
        image = _load((root / row["file"]).read_bytes())
        if image is not None:
            name = Path(row["file"]).name
            found.append(Material(image, name, "starter", row["domain"] == "photo", True))
    return found


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    if path.suffix != ".rcc":
        yield path.name, content
        return
    # A Qt resource file holds its pictures one after another, as they are.
    for match in re.finditer(
        rb"RIFF....WEBP|\xff\xd8\xff[\xe0\xe1\xdb]|\x89PNG\r\n", content, re.S
    ):
        yield f"{path.stem}/{match.start()}", content[match.start() : match.start() + 3_000_000]


def _load(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if min(opened.size) < SMALLEST or max(opened.size) > 3 * min(opened.size):
                return None
            opened.draft("RGB", (LARGEST, LARGEST))
            image = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((LARGEST, LARGEST), reducing_gap=2.0)
    array = np.array(image)
    # Nearly clear, or one colour: parts of drawings, not drawings.
    there = array[..., :3][array[..., 3] > 127]
    return array if array[..., 3].mean() >= 40 and len(there) and there.std(0).max() >= 8 else None


def _opaque(image: np.ndarray) -> np.ndarray:
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


def _ground(size: tuple[int, int], rng: np.random.Generator | None) -> Image.Image:
    """What shows through: paper, white, black, a colour, or a slope of two."""
    if rng is None or rng.random() < 0.2:
        return Image.new("RGBA", size, (*GROUND, 255))
    a, b = rng.integers(0, 256, (2, 3)).astype(float)
    pick = rng.random()
    if pick < 0.3:
        a = b = np.full(3, 255.0)
    elif pick < 0.4:
        a = b = np.zeros(3)
    elif pick < 0.7:
        b = a
    slope = np.linspace(0, 1, size[1])[:, None, None]
    plane = np.broadcast_to(a + slope * (b - a), (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(_opaque(plane))


def _cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.4:
        return image
    share = rng.uniform(0.55, 1.0, 2)
    width, height = (max(32, round(s * edge)) for s, edge in zip(share, image.size, strict=True))
    left = int(rng.integers(0, max(1, image.width - width)))
    top = int(rng.integers(0, max(1, image.height - height)))
    return image.crop((left, top, left + width, top + height))
