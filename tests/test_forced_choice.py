"""A study by human eyes: balanced, blind, and a page whose script does what it says."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_scripts import node, runs
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import mannwhitneyu

from tomjerry_utils import UserError, choice_answers, choice_page, cli, forced_choice
from tomjerry_utils.images import load_image

SECRETS = ("zebrafish", "wolverine", "capybara")  # methods
STEMS = tuple(f"quokka{i}" for i in range(12))


def folder(path: Path, seed: int, *, size: int = 16, stems: tuple[str, ...] = STEMS) -> Path:
    """Pictures of noise that carry a note about who made them."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    for stem in stems:
        note = PngInfo()
        note.add_text("Software", path.name)
        picture = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x010E] = path.name
        picture.save(path / f"{stem}.png", pnginfo=note, exif=exif)
    return path


@pytest.fixture
def methods(tmp_path: Path) -> dict[str, Path]:
    return {name: folder(tmp_path / name, seed) for seed, name in enumerate(SECRETS)}


@pytest.fixture
def made(tmp_path: Path, methods: dict[str, Path]) -> forced_choice.Study:
    return forced_choice.make_page(
        methods, tmp_path / "study", questions=("realism", "faithful"), trials=24,
        sources=folder(tmp_path / "cartoons", 10), real=folder(tmp_path / "photos", 11, size=24),
    )  # fmt: skip


def shown(page: Path) -> dict[str, Any]:
    """The study as the page holds it."""
    (found,) = re.findall(
        r'<script type="application/json" id="study">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return json.loads(found)


def script_of(page: Path) -> str:
    (found,) = re.findall(r"<script>(.*?)</script>", page.read_text(), re.DOTALL)
    return found


def picture(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(";base64,")[2])))


# ---- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("trials", [None, 1, 13])
def test_pairs_sides_and_scenes_are_even(count: int, trials: int | None) -> None:
    names = [f"m{i}" for i in range(count)]
    scenes = [f"s{i}" for i in range(15)]
    rng = np.random.default_rng(count)
    trials_made = forced_choice.plan(names, scenes, rng, trials=trials)
    main = [trial for trial in trials_made if trial.kind == "main"]
    assert len(main) >= (trials or 14)
    sides = Counter((t.left[0], t.right[0]) for t in main)
    assert set(sides) == set(itertools.permutations(names, 2))
    assert len(set(sides.values())) == 1
    lefts = Counter(t.left[0] for t in main)
    assert len(set(lefts.values())) == 1
    seen = Counter(t.scene for t in main)
    assert max(seen.values()) - min(seen[scene] for scene in scenes) <= 1
    pairs = Counter((frozenset((t.left[0], t.right[0])), t.scene) for t in main)
    assert max(pairs.values()) == 1
    assert all(t.left[1] == t.right[1] == t.scene for t in main)


def test_repeats_swap_sides_and_come_two_parts_later() -> None:
    planned = forced_choice.plan(
        ["a", "b", "c"], [str(i) for i in range(20)], np.random.default_rng(0)
    )
    named = {trial.name: trial for trial in planned}
    assert len(named) == len(planned)
    repeats = [trial for trial in planned if trial.kind == "repeat"]
    assert len(repeats) == 9
    for trial in repeats:
        first = named[trial.of]
        assert first.kind == "main"
        assert (trial.left, trial.right) == (first.right, first.left)
        assert trial.part - first.part == 2
    assert not [trial for trial in planned if trial.kind == "catch"]


def test_catch_trials_have_a_right_answer_on_either_side(made: forced_choice.Study) -> None:
    for question in forced_choice.QUESTIONS:
        catches = [t for t in made.trials if t.kind == "catch" and t.question == question]
        assert Counter(t.answer for t in catches) == {"left": 2, "right": 2}
        assert len({t.part for t in catches}) == 3
        for trial in catches:
            good, bad = trial.left, trial.right
            if trial.answer == "right":
                good, bad = bad, good
            if question == "realism":
                assert (good[0], bad) == ("@real", ("@source", trial.scene))
            else:
                assert good == ("@source", trial.scene)
                assert bad[0] == "@source"
                assert bad[1] != trial.scene


# ---- the page ----------------------------------------------------------------------------------


def test_page_says_nothing_of_who_made_what(made: forced_choice.Study, tmp_path: Path) -> None:
    text = made.page.read_text()
    study = shown(made.page)
    pictures = [base64.b64decode(uri.partition(",")[2]) for uri in study["pictures"]]
    for secret in (*SECRETS, "quokka", "photos", "cartoons", "@real", "key.json", str(tmp_path)):
        assert secret not in text
        assert not any(secret.encode() in data for data in pictures)
    # The control: what was read does carry its maker's name.
    for name in SECRETS:
        assert name.encode() in (tmp_path / name / f"{STEMS[0]}.png").read_bytes()
    assert set(study["trials"][0]) == {"name", "question", "part", "left", "right", "source"}
    assert {trial["source"] is None for trial in study["trials"]
            if trial["question"] == "realism"} == {True}  # fmt: skip
    for uri in study["pictures"]:
        one = picture(uri)
        assert (one.size, one.mode, one.format) == ((16, 16), "RGB", "PNG")
        assert not one.info
        assert not one.getexif()
    names = [trial["name"] for trial in study["trials"]]
    assert names == sorted(names)
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in names)


def test_a_pictures_number_does_not_tell_its_method(made: forced_choice.Study) -> None:
    key = json.loads(made.key.read_text())
    numbers: dict[str, set[int]] = {name: set() for name in SECRETS}
    for trial in shown(made.page)["trials"]:
        for side in ("left", "right"):
            who = key["trials"][trial["name"]][side][0]
            numbers.get(who, set()).add(trial[side])
    for name in SECRETS:
        others = set().union(*(numbers[other] for other in SECRETS if other != name))
        assert not numbers[name] & others
        assert mannwhitneyu(list(numbers[name]), list(others)).pvalue > 0.01
    assert mannwhitneyu(range(12), range(12, 36)).pvalue < 1e-5  # numbers in order would tell


def test_key_says_which_picture_is_whose(
    made: forced_choice.Study, methods: dict[str, Path], tmp_path: Path
) -> None:
    key, study = json.loads(made.key.read_text()), shown(made.page)
    assert key["page"] == study["page"]
    assert set(key["trials"]) == {trial["name"] for trial in study["trials"]}
    folders = {**methods, "@source": tmp_path / "cartoons"}
    for trial in study["trials"]:
        for side in ("left", "right"):
            who, stem = key["trials"][trial["name"]][side]
            if who != "@real":
                there = load_image(folders[who] / f"{stem}.png")
                assert np.array_equal(np.asarray(picture(study["pictures"][trial[side]])), there)
        if trial["question"] == "faithful":
            scene = key["trials"][trial["name"]]["scene"]
            cartoon = load_image(tmp_path / "cartoons" / f"{scene}.png")
            assert np.array_equal(np.asarray(picture(study["pictures"][trial["source"]])), cartoon)


def test_page_needs_no_network_and_runs_its_own_script_only(made: forced_choice.Study) -> None:
    text = made.page.read_text()
    bare = re.sub(r'"data:image/[^"]*"', '""', text)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|src=", bare)
    digest = base64.b64encode(hashlib.sha256(script_of(made.page).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_pictures_are_shown_at_whole_multiples() -> None:
    css = choice_page.style((64, 64, 3), 4)
    widths = [int(px) for px in re.findall(r"--shown: (\d+)px", css)]
    assert widths == [256, 192, 128, 64]
    assert "image-rendering: pixelated" in css
    # Two of them, their frames and the gap fit where each step begins to hold.
    steps = re.findall(r"max-width: (\d+)px\) { :root { --shown: (\d+)px", css)
    for (screen, _), larger in zip(steps, widths, strict=False):
        assert int(screen) / 2 - 40 == larger
    assert "pixelated" not in choice_page.style((512, 512, 3), 1)


def test_the_same_seed_gives_the_same_page(methods: dict[str, Path], tmp_path: Path) -> None:
    pages = [
        forced_choice.make_page(methods, tmp_path / str(at), trials=12, seed=seed).page.read_bytes()
        for at, seed in enumerate((0, 0, 1))
    ]
    assert pages[0] == pages[1] != pages[2]


def test_the_key_of_another_study_is_kept(methods: dict[str, Path], tmp_path: Path) -> None:
    made = forced_choice.make_page(methods, tmp_path / "out", trials=12)
    before = made.key.read_bytes()
    forced_choice.make_page(methods, tmp_path / "out", trials=12)
    with pytest.raises(UserError, match=r"key of another study.*another --out"):
        forced_choice.make_page(methods, tmp_path / "out", trials=12, seed=1)
    assert made.key.read_bytes() == before


def test_pictures_of_several_sizes(methods: dict[str, Path], tmp_path: Path) -> None:
    methods["large"] = folder(tmp_path / "large", 5, size=40)
    with pytest.raises(UserError, match=r"40×40 and .* 16×16.*--size"):
        forced_choice.make_page(methods, tmp_path / "out", trials=12)
    made = forced_choice.make_page(methods, tmp_path / "out", trials=12, size=32)
    assert {picture(uri).size for uri in shown(made.page)["pictures"]} == {(32, 32)}


def test_mistakes_are_named(methods: dict[str, Path], tmp_path: Path) -> None:
    def refused(match: str, given: dict[str, Path] = methods, **options: Any) -> None:
        with pytest.raises(UserError, match=match) as caught:
            forced_choice.make_page(given, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    first, second, *_ = methods
    refused("two or more", {first: methods[first]})
    refused("do not start with @", {first: methods[first], "@real": methods[second]})
    refused("give --sources", questions=("faithful",))
    refused("--real without --sources", real=methods[first])
    refused(r"need 14 scenes.*there are 12: give --trials 36", trials=37)
    refused("no folder", {first: methods[first], "b": tmp_path / "none"})
    few = folder(tmp_path / "few", 3, stems=STEMS[:5])
    refused("no cartoon 'quokka10'", questions=("faithful",), sources=few)
    refused(r"few: few has no picture 'quokka10'.*\(7 missing\)", {**methods, "few": few})
    lone = {name: folder(tmp_path / f"lone{name}", 1, stems=("x",)) for name in "ab"}
    refused("1 scene:", lone)
    (few / "quokka1.jpg").write_bytes((few / "quokka1.png").read_bytes())
    refused("2 pictures are called 'quokka1'", {**methods, "few": few})
    assert not (tmp_path / "out").exists()


# ---- its script, run -----------------------------------------------------------------------------

# A page without a browser: the elements that its HTML has, and a clock that tests move.
BROWSER = """
const { script, study, ids, hidden, storage, locked, steps } =
  JSON.parse(require("fs").readFileSync(0, "utf8"));
const elements = {}, listeners = {}, looks = [], files = [];
let clock = 1000, stored = { ...storage };
for (const id of ids) elements[id] = {
  hidden: hidden.includes(id), textContent: id === "study" ? study : "", value: "", src: "",
  clientWidth: 256, on: {}, addEventListener(kind, run) { this.on[kind] = run; },
  focus() { elements.focused = id; } };
const fail = () => { throw new Error("denied"); };
const context = {
  document: {
    getElementById: (id) => elements[id] || null,
    addEventListener: (kind, run) => { listeners[kind] = run; },
    createElement: () => ({ click() { files.push([this.download, this.href]); } }) },
  localStorage: locked ? { getItem: fail, setItem: fail } : {
    getItem: (name) => name in stored ? stored[name] : null,
    setItem: (name, value) => { stored[name] = String(value); } },
  Blob: class { constructor(parts) { this.text = parts.join(""); } },
  URL: { createObjectURL: (blob) => blob.text },
  window: { devicePixelRatio: 2 }, performance: { now: () => clock }, crypto: globalThis.crypto };
require("vm").runInNewContext(script, context);
const event = (more) => ({ preventDefault() {}, ...more });
const acts = {
  begin: (name) => { elements.rater.value = name; elements.start.on.submit(event()); },
  wait: (ms) => { clock += ms; },
  key: (key, more) => listeners.keydown(event({ key, ...more })),
  click: (id) => elements[id].on.click(event()),
  look: () => looks.push({
    progress: elements.progress.textContent, question: elements.question.textContent,
    first: elements.first.src, second: elements.second.src, bar: elements.bar.value,
    cartoon: elements.source.hidden ? null : elements.cartoon.src, kept: elements.kept.textContent,
    trial: !elements.trial.hidden, end: !elements.end.hidden, start: !elements.start.hidden,
    rater: elements.rater.value, undo: !elements.undo.disabled, focused: elements.focused }) };
for (const [act, ...given] of steps) acts[act](...given);
console.log(JSON.stringify({ looks, files, storage: stored }));
"""
LEFT: list[Any] = [["wait", 300], ["key", "ArrowLeft"]]
RIGHT: list[Any] = [["wait", 300], ["key", "ArrowRight"]]


def browse(page: Path, steps: list[Any], storage: Any = None, *, locked: bool = False) -> Any:
    """Take steps on the page, and tell what was seen, saved and stored."""
    text = page.read_text()
    study = json.dumps(shown(page))
    ids = re.findall(r'<\w+[^>]*\bid="(\w+)"', text)
    hidden = re.findall(r'<\w+[^>]*\bid="(\w+)"[^>]*\shidden>', text)
    return node(BROWSER, {
        "script": script_of(page), "study": study, "ids": ids, "hidden": hidden,
        "storage": storage or {}, "locked": locked, "steps": steps,
    })  # fmt: skip


@runs
def test_each_rater_has_an_order_of_their_own(made: forced_choice.Study) -> None:
    logic = (
        choice_page.LOGIC
        + """
      const { study, raters } = JSON.parse(require("fs").readFileSync(0, "utf8"));
      console.log(JSON.stringify(raters.map((r) => orderFor(study, r).map((t) => t.name))));"""
    )
    study = {**shown(made.page), "pictures": []}
    raters = ["anna", "anna", "ben", *(f"rater {i}" for i in range(40))]
    orders = node(logic, {"study": study, "raters": raters})
    assert orders[0] == orders[1] != orders[2]
    trials = {trial.name: trial for trial in made.trials}
    for order in orders:
        assert sorted(order) == sorted(trials)
        parts = [trials[name].part for name in order]
        assert parts == sorted(parts)
        assert {trials[name].question for name in order[: len(order) // 2]} == {"realism"}
        for at, name in enumerate(order):
            if trials[name].of:
                assert at - order.index(trials[name].of) > 8
    # Shuffled well: whichever trial comes first does so for few.
    assert max(Counter(order[0] for order in orders[2:]).values()) < 15


@runs
def test_a_session_by_keys_and_touch_to_its_answers(made: forced_choice.Study) -> None:
    total = len(made.trials)
    start = browse(made.page, [["look"], ["key", "ArrowLeft"], ["begin", "  "], ["look"]])
    assert all(look["start"] and not look["trial"] for look in start["looks"])

    steps = [["begin", " Anna  B. "], ["look"], *LEFT, ["look"], ["key", "ArrowRight"],
             ["wait", 300], ["key", "ArrowRight", {"repeat": True}], ["key", "x"],
             ["key", "ArrowRight", {"ctrlKey": True}], ["look"], ["wait", 300], ["click", "right"],
             ["look"], ["key", "Backspace"], ["look"], *LEFT, ["look"]]  # fmt: skip
    first = browse(made.page, steps)
    looks = first["looks"]
    assert [look["bar"] for look in looks] == pytest.approx(
        [0, 1 / total, 1 / total, 2 / total, 1 / total, 2 / total]
    )
    assert looks[0]["progress"] == f"0 of {total} answered"
    assert looks[0]["question"] == forced_choice.QUESTIONS["realism"]
    assert looks[0]["cartoon"] is None
    assert [look["undo"] for look in looks[:2]] == [False, True]
    assert looks[1]["first"] != looks[0]["first"]
    assert (looks[4]["first"], looks[4]["second"]) == (looks[1]["first"], looks[1]["second"])
    assert looks[0]["focused"] == "question"

    # Closed and opened again: the name is there, and the session goes on.
    rest = [["look"], ["begin", "Anna B."], ["look"], *(RIGHT * (total - 2)), ["look"],
            *RIGHT, ["click", "download"]]  # fmt: skip
    second = browse(made.page, rest, first["storage"])
    assert second["looks"][0]["rater"] == "Anna B."
    assert second["looks"][1]["bar"] == pytest.approx(2 / total)
    assert second["looks"][1]["first"] == looks[5]["first"]
    assert second["looks"][2]["end"]
    assert not second["looks"][2]["trial"]
    ((name, text),) = second["files"]
    assert name == "answers-Anna-B.json"
    saved = json.loads(text)
    assert (saved["complete"], saved["of"], saved["undone"]) == (True, total, 1)
    assert saved["screen"] == {"shown": 256, "ratio": 2}
    assert [row["choice"] for row in saved["answers"]] == ["left"] * 2 + ["right"] * (total - 2)
    assert all(row["ms"] >= 300 for row in saved["answers"])

    # What was answered is what was seen, by the key.
    study = shown(made.page)
    trials = {trial["name"]: trial for trial in study["trials"]}
    for row, look in zip(saved["answers"], [looks[0], looks[1]], strict=False):
        trial = trials[row["trial"]]
        assert look["first"] == study["pictures"][trial["left"]]
        assert look["second"] == study["pictures"][trial["right"]]
    path = made.page.with_name(name)
    path.write_text(text)
    read = choice_answers.read_answers(path, json.loads(made.key.read_text()), made.key)
    assert (read.rater, len(read.answers)) == ("Anna B.", total)


@runs
def test_cartoon_is_seen_where_the_question_is_about_it(made: forced_choice.Study) -> None:
    half = len(made.trials) // 2
    found = browse(made.page, [["begin", "a"], *(LEFT * half), ["look"]])
    (look,) = found["looks"]
    assert look["question"] == forced_choice.QUESTIONS["faithful"]
    assert look["cartoon"] in shown(made.page)["pictures"]


@runs
def test_raters_of_one_browser_do_not_mix(made: forced_choice.Study) -> None:
    first = browse(made.page, [["begin", "anna"], *LEFT, *LEFT])
    second = browse(made.page, [["begin", "ben"], ["look"], *LEFT], first["storage"])
    assert second["looks"][0]["bar"] == 0
    third = browse(made.page, [["begin", "anna"], ["look"]], second["storage"])
    assert third["looks"][0]["progress"].startswith("2 of")
    # What was kept of another page, or was changed, is not gone on with.
    storage = third["storage"]
    (name,) = [name for name in storage if name.endswith("-anna")]
    for change in ({"page": "other"}, {"answers": [{"trial": "strange"}]}, {"answers": None}):
        spoilt = {**storage, name: json.dumps({**json.loads(storage[name]), **change})}
        again = browse(made.page, [["begin", "anna"], ["look"]], spoilt)
        assert again["looks"][0]["bar"] == 0


@runs
def test_a_browser_that_keeps_nothing_says_so(made: forced_choice.Study) -> None:
    found = browse(
        made.page, [["begin", "anna"], *LEFT, ["look"], ["click", "download"]], locked=True
    )
    assert "keeps nothing" in found["looks"][0]["kept"]
    saved = json.loads(found["files"][0][1])
    assert (len(saved["answers"]), saved["complete"]) == (1, False)


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["choose", "choose page", "choose analyse"])
def test_help_shows_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*name.split(), "--help"])
    assert left.value.code == 0
    examples = re.findall(rf"^  tomjerry ({name}\b.*)$", capsys.readouterr().out, re.MULTILINE)
    assert examples
    for example in examples:
        assert cli._parser().parse_args(example.split()).handler


def test_command_makes_a_page(
    methods: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={path}" for name, path in methods.items()]
    out = tmp_path / "study"
    command = ["choose", "page", "--methods", *given, "--trials", "10", "--out", str(out)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "14 trials: 12 to compare, 2 repeated, 0 to catch" in told
    assert (out / "choose.html").is_file()
    assert f"{out / 'key.json'}: keep it to yourself" in told
    for wrong in (["ours"], ["ours="], ["a=x", "a=y"]):
        assert cli.main(["choose", "page", "--methods", *wrong, "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tomjerry: error: ")
