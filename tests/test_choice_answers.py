"""What raters chose: joined with the key, careless raters out, intervals that tell the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tomjerry_utils import UserError, choice_answers, cli
from tomjerry_utils.choice_answers import Choices, compare
from tomjerry_utils.forced_choice import QUESTIONS, SOURCE, Trial, plan

METHODS = ("ours", "cut", "sdedit")
WORTH = {"ours": 1.0, "cut": 0.0, "sdedit": -1.0}


@pytest.fixture
def trials() -> list[Trial]:
    scenes = [f"s{i}" for i in range(20)]
    return plan(
        METHODS, scenes, np.random.default_rng(0), questions=tuple(QUESTIONS), trials=60,
        cartoons=scenes, photographs=("p0", "p1"),
    )  # fmt: skip


@pytest.fixture
def key(trials: list[Trial], tmp_path: Path) -> Path:
    from tomjerry_utils.forced_choice import _plain

    path = tmp_path / "key.json"
    held = {trial.name: _plain(trial) for trial in trials}
    path.write_text(json.dumps(
        {"page": "this", "methods": METHODS, "questions": QUESTIONS, "trials": held}
    ))  # fmt: skip
    return path


def choice_of(trial: Trial, rng: np.random.Generator, kind: str) -> str:
    """How a rater answers: who looks, who presses any key, or always the left one."""
    if kind == "left":
        return "left"
    if kind == "looks" and trial.answer:
        return trial.answer
    odds = 0.0
    if kind == "looks":
        odds = WORTH[trial.left[0]] - WORTH[trial.right[0]]
    return "left" if rng.random() < 1 / (1 + np.exp(-odds)) else "right"


def write(
    folder: Path, trials: list[Trial], rater: str, kind: str = "looks", *, count: int | None = None,
    seed: int = 0, session: str = "", **changes: Any,
) -> Path:  # fmt: skip
    rng = np.random.default_rng([seed, *rater.encode()])
    rows = [
        {"trial": t.name, "choice": choice_of(t, rng, kind), "ms": 900, "at": ""}
        for t in trials[:count]
    ]
    path = folder / f"answers-{rater}{len(rows)}{session}.json"
    whole = {"page": "this", "rater": rater, "session": session or rater, "answers": rows}
    path.write_text(json.dumps(whole | changes))
    return path


def test_report_ranks_what_raters_prefer(trials: list[Trial], key: Path, tmp_path: Path) -> None:
    files = [write(tmp_path, trials, f"r{i}") for i in range(6)]
    report = choice_answers.analyse(files)
    assert set(report["questions"]) == set(QUESTIONS)
    for one in report["questions"].values():
        assert (one["answers"], one["scenes"]) == (360, 20)
        assert one["clusters"] == "raters and scenes"
        assert [row["method"] for row in one["strengths"]] == list(METHODS)
        assert sum(row["strength"] for row in one["strengths"]) == pytest.approx(0, abs=1e-9)
        for row in one["strengths"]:
            low, high = row["strength_ci95"]
            assert low <= WORTH[row["method"]] <= high
            assert row["chosen_ci95"][0] <= row["chosen"] <= row["chosen_ci95"][1]
        assert one["strengths"][0]["strength_ci95"][0] > 0
        (far,) = [p for p in one["pairs"] if {p["first"], p["second"]} == {"ours", "sdedit"}]
        assert far["of"] == 120
        assert far["rate_ci95"][0] > 0.5
        assert far["p"] <= far["p_holm"] < 0.05
        assert one["alike"]["of"] == 6 * 9
        assert one["left"]["p"] > 0.01
    assert not any(row["excluded"] for row in report["raters"])
    told = choice_answers.table(report)
    assert "6 raters, 20 scenes, 360 answers; 95 % intervals by bootstrap over raters" in told
    assert json.loads(json.dumps(report)) == report


def test_random_clicking_shows_no_difference(
    trials: list[Trial], key: Path, tmp_path: Path
) -> None:
    no_catches = [trial for trial in trials if trial.kind != "catch"]
    files = [write(tmp_path, no_catches, f"r{i}", "random", seed=3) for i in range(6)]
    report = choice_answers.analyse(files)
    for one in report["questions"].values():
        for row in one["strengths"]:
            assert row["strength_ci95"][0] < 0 < row["strength_ci95"][1]
        for row in one["pairs"]:
            assert row["rate_ci95"][0] < 0.5 < row["rate_ci95"][1]
            assert row["p_holm"] > 0.05
        assert one["alike"]["rate_ci95"][0] < 0.5 < one["alike"]["rate_ci95"][1]


def test_who_does_not_look_is_left_out(trials: list[Trial], key: Path, tmp_path: Path) -> None:
    good = [write(tmp_path, trials, f"r{i}") for i in range(3)]
    bad = write(tmp_path, trials, "sleepy", "left")
    report = choice_answers.analyse([*good, bad])
    (row,) = [row for row in report["raters"] if row["rater"] == "sleepy"]
    assert row["excluded"] == "failed 6 of 12 catch trials"
    assert (row["left"], row["alike"], row["repeats"]) == (1.0, 0, 18)
    without = choice_answers.analyse(good)
    assert report["questions"] == without["questions"]
    assert choice_answers.table(report).startswith("left out: sleepy: failed 6 of 12")
    with pytest.raises(UserError, match="no answers left of 1 raters"):
        choice_answers.analyse([bad])


def test_a_preferred_side_is_seen(trials: list[Trial], key: Path, tmp_path: Path) -> None:
    without = [trial for trial in trials if trial.kind != "catch"]
    report = choice_answers.analyse([write(tmp_path, without, "r", "left")])
    for one in report["questions"].values():
        assert one["left"]["rate"] == 1
        assert one["left"]["p"] < 1e-6
        assert one["alike"]["rate"] == 0
        # Sides are even: such a rater says nothing for any method.
        assert all(abs(row["strength"]) < 1e-6 for row in one["strengths"])


def test_repeats_and_catches_are_not_fitted(trials: list[Trial], key: Path, tmp_path: Path) -> None:
    main = [trial for trial in trials if trial.kind == "main"]
    rng = np.random.default_rng(0)
    answers = {t.name: choice_of(t, rng, "looks") for t in trials}
    rows = [[{"trial": t.name, "choice": answers[t.name], "ms": 1} for t in some]
            for some in (trials, main)]  # fmt: skip
    whole = choice_answers.analyse([write(tmp_path, trials, "a", answers=rows[0])])
    fitted = choice_answers.analyse([write(tmp_path, main, "a", answers=rows[1])])
    for name in QUESTIONS:
        for part in ("answers", "strengths", "pairs"):
            assert whole["questions"][name][part] == fitted["questions"][name][part]
        assert whole["questions"][name]["alike"]["of"] == 9
        assert fitted["questions"][name]["alike"]["of"] == 0


def test_unfinished_sessions_and_the_fuller_of_two(
    trials: list[Trial], key: Path, tmp_path: Path
) -> None:
    part = write(tmp_path, trials, "r", count=40)
    half = choice_answers.analyse([part])
    assert set(half["questions"]) == {"realism"}
    assert half["questions"]["realism"]["clusters"] == "scenes"
    assert f"not finished: r: 40 of {len(trials)}" in choice_answers.table(half)
    whole = write(tmp_path, trials, "r")
    assert choice_answers.analyse([part, whole]) == choice_answers.analyse([whole])
    other = write(tmp_path, trials, "r", session="second")
    with pytest.raises(UserError, match="two sessions of a rater 'r'"):
        choice_answers.analyse([whole, other])


def test_one_line_for_each_broken_file(trials: list[Trial], key: Path, tmp_path: Path) -> None:
    good = write(tmp_path, trials, "good")
    row = {"trial": trials[0].name, "choice": "left", "ms": 1}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("another page than", {"page": "that"}),
        ("changed since", {"answers": [row, row]}),
        ("changed since", {"answers": [{**row, "choice": "both"}]}),
        ("changed since", {"answers": [{**row, "trial": "none"}]}),
        ("changed since", {"rater": " "}),
        ("not answers as", {"answers": [{"trial": trials[0].name}]}),
        ("not answers as", {"answers": [{**row, "trial": []}]}),
        ("not answers as", {"answers": [{**row, "ms": "soon"}]}),
        ("not answers as", {"answers": 3}),
    ]
    path = tmp_path / "bad.json"
    for match, change in cases:
        path.write_text(json.dumps(json.loads(good.read_text()) | change))
        with pytest.raises(UserError, match=match) as caught:
            choice_answers.analyse([good, path], key=key)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    for text in ("{", "[]", "null", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="not answers as the page saves them"):
            choice_answers.analyse([path], key=key)
    with pytest.raises(UserError, match="no file"):
        choice_answers.analyse([tmp_path / "none.json"], key=key)
    with pytest.raises(UserError, match=r"no key .*--key"):
        choice_answers.analyse([good], key=tmp_path / "nokey.json")
    with pytest.raises(UserError, match="not the key of a page"):
        choice_answers.analyse([good], key=good)


def test_raters_who_copy_add_no_certainty() -> None:
    rng = np.random.default_rng(5)
    scenes = np.arange(30)
    won = rng.random(30) < 0.6
    one = Choices(np.zeros(30, int), scenes, np.where(won, 0, 1), np.where(won, 1, 0))
    copies = Choices(np.repeat(np.arange(20), 30), *(np.tile(a, 20) for a in (
        one.scenes, one.winners, one.losers)))  # fmt: skip
    width, many, lone = (
        np.ptp(compare(choices, ("a", "b"))["pairs"][0]["rate_ci95"])
        for choices in (
            one,
            copies,
            Choices(copies.raters, np.arange(600), copies.winners, copies.losers),
        )
    )
    assert many > 0.9 * width
    assert lone < 0.5 * width  # were the answers about as many scenes, they would add some
    assert compare(copies, ("a", "b"))["pairs"][0]["p"] == compare(one, ("a", "b"))["pairs"][0]["p"]


def test_separable_choices_have_an_end() -> None:
    choices = Choices(np.repeat([0, 1], 8), np.tile(np.arange(8), 2), np.zeros(16, int),
                      np.ones(16, int))  # fmt: skip
    found = compare(choices, ("a", "b"))
    strengths = [row["strength"] for row in found["strengths"]]
    assert 1 < strengths[0] < 5
    assert np.isfinite([row["strength_ci95"] for row in found["strengths"]]).all()
    (pair,) = found["pairs"]
    assert (pair["scenes_first"], pair["scenes_second"]) == (8, 0)
    assert pair["p"] == pytest.approx(2 / 2**8)


def test_holm_by_hand() -> None:
    assert choice_answers._holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert choice_answers._holm([0.9, 0.8]) == [1.0, 1.0]


def test_command_writes_report_and_figure(
    trials: list[Trial], key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write(tmp_path, trials, f"r{i}")) for i in range(2)]
    report, figure = tmp_path / "out" / "report.json", tmp_path / "out" / "report.png"
    command = ["choose", "analyse", *files, "--json", str(report)]
    assert cli.main([*command, "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert f"realism: {QUESTIONS['realism']}" in told
    assert "ours over sdedit: " in told
    assert json.loads(report.read_text())["page"] == "this"
    assert figure.stat().st_size > 5000
    assert cli.main([*command, "--figure", "x.gif"]) == 2
    assert cli.main([*command, "--key", files[0]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert SOURCE not in told
