"""A study by human eyes: two translations of one cartoon, and a rater must choose one.

`make_page` writes one page that needs no server and no network, and a key that stays with who asks.
Nothing in the page says which method made a picture: pictures are encoded anew in a shuffled order,
trials have random names. :mod:`tomjerry_utils.choice_answers` joins what raters send with the key.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tomjerry_utils import UserError
from tomjerry_utils.choice_page import body, script, style
from tomjerry_utils.images import list_images, load_image, resize
from tomjerry_utils.runs import atomic_path, hash_obj, read_json, write_json
from tomjerry_utils.static_page import data_uri, document, encoded

PAGE, KEY = "choose.html", "key.json"
QUESTIONS = {
    "realism": "Which picture looks more like a real photograph?",
    "faithful": "Which picture shows the cartoon's scene better: who, doing what, where?",
}
TRIALS = 60  # of a question; about five minutes
REPEATS = 0.15  # of the trials, shown again with the sides swapped
CATCHES, CATCH_SHARE = 4, 0.1  # at least, and of the trials
PARTS = 3  # of a question; what the first holds is repeated in the last
SHOWN, LOSSLESS, QUALITY = 256, 256, 95  # pixels; PNG up to; JPEG of larger pictures
SOURCE, REAL = "@source", "@real"  # who made a picture that no method made

Side = tuple[str, str]  # who made the picture, and its scene


@dataclass(frozen=True)
class Trial:
    """One choice.

    Attributes:
        name: random; all that the page says.
        kind: `main`; `repeat` of the trial named by `of`, sides swapped; `catch`, whose right
            answer is `answer`.
        part: of the page, counted through the questions; raters see the trials of a part in an
            order of their own.
        scene: the stem of the pictures.
    """

    name: str
    question: str
    kind: str
    part: int
    scene: str
    left: Side
    right: Side
    of: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Study:
    """What `make_page` made: the page for raters, the key for who asks, and the trials."""

    page: Path
    key: Path
    trials: tuple[Trial, ...]
    methods: tuple[str, ...]


def make_page(
    methods: Mapping[str, Path],
    out: Path,
    *,
    sources: Path | None = None,
    real: Path | None = None,
    questions: Sequence[str] = ("realism",),
    trials: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Study:
    """Write `out/choose.html`, to be sent to raters, and `out/key.json`, to be kept.

    Realism is judged without the cartoon in sight, so that faithfulness has no part in it. Its
    catch trials, where `sources` and `real` are given, set a cartoon beside a real picture; those
    of faithfulness set the cartoon itself beside another scene's.

    Args:
        methods: name → folder of translations, which hold pictures of the same stems.
        sources: the cartoons, by the same stems; needed to ask about faithfulness.
        real: real pictures.
        questions: of `QUESTIONS`.
        trials: of each question, made more until every pair of methods comes equally often, half
            the times on either side; None takes `TRIALS`, or as many as the scenes allow.
        size: bring all pictures to squares of this side first.
        seed: of scenes, sides and order; the same gives the same page.

    Raises:
        UserError: fewer than two methods or scenes, a picture missing or of another size, more
            trials than there are different ones, or `out` holds another study.
    """
    names = tuple(methods)
    if len(names) < 2:
        raise UserError("one method cannot be compared: give two or more as --methods NAME=DIR")
    if bad := [name for name in names if not name.strip() or name.startswith("@")]:
        raise UserError(f"'{bad[0]}': a method's name is words that do not start with @")
    if "faithful" in questions and sources is None:
        raise UserError("to ask what keeps the cartoon's scene needs the cartoons: give --sources")
    if real is not None and sources is None:
        raise UserError("--real without --sources: a catch trial sets a cartoon beside a real one")
    files = {name: _stems(folder) for name, folder in methods.items()}
    scenes = _common(methods, files)
    if sources is not None:
        files[SOURCE] = _stems(sources)
        if lacking := [scene for scene in scenes if scene not in files[SOURCE]]:
            raise UserError(f"{sources}: no cartoon '{lacking[0]}', which the methods translated")
    if real is not None:
        files[REAL] = _stems(real)

    rng = np.random.default_rng(seed)
    planned = plan(
        names, scenes, rng, questions=questions, trials=trials,
        cartoons=scenes if sources is not None else (), photographs=tuple(files.get(REAL, ())),
    )  # fmt: skip
    pictures = _load(files, planned, names, size)
    shape = next(iter(pictures.values())).shape[:2]
    shown = {side: _address(picture) for side, picture in pictures.items()}
    order = list(shown)
    rng.shuffle(order)
    place = {side: number for number, side in enumerate(order)}

    study: dict[str, Any] = {
        "questions": {name: QUESTIONS[name] for name in questions},
        "trials": [
            {
                "name": trial.name,
                "question": trial.question,
                "part": trial.part,
                "left": place[trial.left],
                "right": place[trial.right],
                "source": place[SOURCE, trial.scene] if trial.question == "faithful" else None,
            }
            for trial in sorted(planned, key=lambda trial: trial.name)
        ],
    }
    prints = [hashlib.sha256(shown[side].encode()).hexdigest() for side in order]
    page = study["page"] = hash_obj([study, prints, seed])
    study["pictures"] = [shown[side] for side in order]

    if (out / KEY).exists() and read_json(out / KEY).get("page") != page:
        raise UserError(f"{out / KEY}: the key of another study, whose answers need it: choose "
                        "another --out")  # fmt: skip
    key = {
        "page": page,
        "methods": list(names),
        "folders": {name: str(folder) for name, folder in methods.items()},
        "questions": study["questions"],
        "seed": seed,
        "size": list(shape),
        "trials": {trial.name: _plain(trial) for trial in planned},
    }
    write_json(out / KEY, key)
    scale = max(1, SHOWN // max(shape))
    text = document(
        "Which picture?", body(study, shape, scale), key=page, style=style(shape, scale),
        script=script(),
    )  # fmt: skip
    with atomic_path(out / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Study(out / PAGE, out / KEY, tuple(planned), names)


def plan(
    methods: Sequence[str],
    scenes: Sequence[str],
    rng: np.random.Generator,
    *,
    questions: Sequence[str] = ("realism",),
    trials: int | None = None,
    cartoons: Sequence[str] = (),
    photographs: Sequence[str] = (),
) -> list[Trial]:
    """The trials of a study, question by question and part by part.

    Of each question, every pair of methods comes equally often, each of the two on the left half
    the times, never twice on one scene; scenes come equally often within one. Repeats and catch
    trials are added to these.

    Args:
        trials: of each question; see `make_page`.
        cartoons, photographs: scenes and stems that catch trials can be made of.

    Raises:
        UserError: too few scenes.
    """
    pairs = list(itertools.combinations(methods, 2))
    most = len(scenes) // 2 * 2  # of a pair
    if most < 2:
        raise UserError(f"{len(scenes)} scene: a study needs two or more pictures of each method")
    each = -(-(TRIALS if trials is None else trials) // (2 * len(pairs))) * 2
    if trials is None:
        each = min(each, most)
    if each > most:
        raise UserError(
            f"{trials} trials need {each} scenes, so that no pair comes twice on one, and there "
            f"are {len(scenes)}: give --trials {most * len(pairs)} or fewer"
        )
    planned = []
    for number, question in enumerate(questions):
        new = partial(_trial, rng, question)
        deck = [scenes[i] for i in rng.permutation(len(scenes))]
        main = []  # (scene, left, right)
        for at, (a, b) in enumerate(pairs):
            swaps = rng.permutation(each) < each // 2
            for i, swapped in enumerate(swaps, start=at * each):
                scene = deck[i % len(deck)]
                left, right = (b, a) if swapped else (a, b)
                main.append((scene, (left, scene), (right, scene)))
        first = number * PARTS
        parts = np.array_split(rng.permutation(len(main)), PARTS)
        made = [
            new("main", first + part, *main[i])
            for part, members in enumerate(parts)
            for i in members
        ]
        again = rng.permutation(len(parts[0]))[: max(1, round(REPEATS * len(main)))]
        made += [
            new("repeat", first + PARTS - 1, one.scene, one.right, one.left, of=one.name)
            for one in (made[i] for i in again)
        ]
        count = max(CATCHES, round(CATCH_SHARE * len(main)))
        catches = _catches(question, cartoons, photographs, count, rng)
        for i, (scene, good, bad) in enumerate(catches):
            sides, answer = ((good, bad), "left") if i % 2 else ((bad, good), "right")
            made.append(new("catch", first + i % PARTS, scene, *sides, answer=answer))
        planned += made
    return planned


# ---- helpers -------------------------------------------------------------------------------------


def _trial(
    rng: np.random.Generator,
    question: str,
    kind: str,
    part: int,
    scene: str,
    left: Side,
    right: Side,
    **more: str,
) -> Trial:
    return Trial(rng.bytes(6).hex(), question, kind, part, scene, left, right, **more)


def _catches(
    question: str,
    cartoons: Sequence[str],
    photographs: Sequence[str],
    count: int,
    rng: np.random.Generator,
) -> list[tuple[str, Side, Side]]:
    """(scene, right, wrong picture) of catch trials; none where nothing is there to make them."""
    if not cartoons or (question == "realism" and not photographs):
        return []
    deck = [cartoons[i] for i in rng.permutation(len(cartoons))]
    found: list[tuple[str, Side, Side]] = []
    for i in range(count):
        own, other = deck[i % len(deck)], deck[(i + 1) % len(deck)]
        if question == "realism":
            photograph = photographs[int(rng.integers(len(photographs)))]
            found.append((own, (REAL, photograph), (SOURCE, own)))
        else:
            found.append((own, (SOURCE, own), (SOURCE, other)))
    return found


def _stems(folder: Path) -> dict[str, Path]:
    """Stem → picture file of a folder."""
    files = list_images(folder, recursive=False)
    times = Counter(path.stem for path in files)
    stem, most = times.most_common(1)[0]
    if most > 1:
        raise UserError(f"{folder}: {most} pictures are called '{stem}': keep one of them")
    return {path.stem: path for path in files}


def _common(methods: Mapping[str, Path], files: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """The stems that all methods have; it is a mistake if one lacks any."""
    every = sorted({stem for name in methods for stem in files[name]})
    for name, folder in methods.items():
        if lacking := [stem for stem in every if stem not in files[name]]:
            raise UserError(
                f"{folder}: {name} has no picture '{lacking[0]}', which another method has "
                f"({len(lacking)} missing): translate the same cartoons with each"
            )
    return every


def _load(
    files: Mapping[str, Mapping[str, Path]],
    trials: Sequence[Trial],
    methods: Sequence[str],
    size: int | None,
) -> dict[Side, np.ndarray]:
    """The pictures that trials show, all of one shape: a method could be told by its size."""
    wanted = {side for trial in trials for side in (trial.left, trial.right)}
    wanted |= {(SOURCE, trial.scene) for trial in trials if trial.question == "faithful"}
    found: dict[Side, np.ndarray] = {}
    first: tuple[Path, tuple[int, ...]] | None = None
    for who, stem in sorted(wanted, key=lambda side: (side[0] not in methods, side)):
        path = files[who][stem]
        picture = load_image(path, size)
        first = first or (path, picture.shape)
        if picture.shape != first[1]:
            if who in methods:
                raise UserError(
                    f"{path} is {picture.shape[1]}×{picture.shape[0]} and {first[0]} "
                    f"{first[1][1]}×{first[1][0]}, which tells them apart: give --size PIXELS"
                )
            picture = resize(
                picture, (first[1][0], first[1][1]), fit="crop" if who == REAL else "pad"
            )
        found[who, stem] = picture
    return found


def _address(picture: np.ndarray) -> str:
    return data_uri(*encoded(picture, lossless=LOSSLESS, quality=QUALITY))


def _plain(trial: Trial) -> dict[str, Any]:
    """A trial as the key holds it: what is empty is left out."""
    held = {name: getattr(trial, name) for name in ("question", "kind", "scene", "of", "answer")}
    sides = {"left": list(trial.left), "right": list(trial.right)}
    return {name: value for name, value in held.items() if value} | sides
