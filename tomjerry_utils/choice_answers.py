"""What raters chose on a forced-choice page, joined with its key: who is preferred, how surely.

The report of `analyse`, which is what it writes as JSON:

- `page`, `methods`, `settings` (prior, samples, seed, most_catches_failed)
- `raters`: for each, `rater`, `answered`, `of`, `seconds` (median of an answer), `left` (share of
  main trials), `repeats` and `alike` (of them, answered for the same picture), `catches` and
  `failed`, `excluded` (why, or "")
- `questions`: for each name
    - `text`, `answers` (of main trials, which alone are fitted), `raters`, `scenes`, `clusters`
      (what the bootstrap draws anew)
    - `strengths`, best first: `method`, `strength` (Bradley–Terry's log π, mean 0: a difference of
      1 means chosen 73 times in 100), `strength_ci95`, `chosen` (probability to be chosen over one
      of the others), `chosen_ci95`
    - `pairs`: `first`, `second`, `wins` of the first, `of`, `rate`, `rate_ci95`, `scenes_first` and
      `scenes_second` (scenes whose majority chose it; a draw counts for neither), `p` (sign test
      over scenes, two-sided), `p_holm` (Holm's correction over the pairs)
    - `alike`: `count`, `of`, `rate`, `rate_ci95` (Wilson) of repeats answered for the same picture
    - `left`: `count`, `of`, `rate`, `p` (binomial, against one half) of the left side chosen
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from tomjerry_utils import UserError
from tomjerry_utils.bradley_terry import PRIOR, chosen, cluster_weights, count_wins, fit
from tomjerry_utils.forced_choice import KEY
from tomjerry_utils.measures import BOOTSTRAP
from tomjerry_utils.runs import atomic_path, read_json

MOST_FAILED = 0.2  # of a rater's catch trials; who fails more did not look


@dataclass(frozen=True)
class Session:
    """One rater's answers: trial → "left" or "right"."""

    path: Path
    rater: str
    session: str
    answers: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Choices:
    """N choices as numbers: rater, scene, winner and loser of each, (N,) int from 0."""

    raters: np.ndarray
    scenes: np.ndarray
    winners: np.ndarray
    losers: np.ndarray


def analyse(
    answers: Sequence[Path],
    *,
    key: Path | None = None,
    prior: float = PRIOR,
    samples: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Any]:
    """The report of a study, as the module says it.

    Raters who fail more than a fifth of their catch trials are left out, and named with the reason.

    Args:
        answers: files that raters saved, whole sessions or not; of two of one session the fuller.
        key: None takes `key.json` beside the first answers.
        prior, samples, seed: of the fit and of the bootstrap.

    Raises:
        UserError: no key, a file that is broken or of another page, two raters of one name, or no
            answers left.
    """
    if not answers:
        raise UserError("no answers: give the files that raters saved")
    where = answers[0].parent / KEY if key is None else key
    held = _read_key(where)
    sessions = _sessions([read_answers(path, held, where) for path in answers])
    raters = [_rater(session, held["trials"]) for session in sessions]
    used = [s for s, row in zip(sessions, raters, strict=True) if not row["excluded"]]
    if not any(s.answers for s in used):
        raise UserError(
            f"no answers left of {len(sessions)} raters: all gave none, or failed the catch trials"
        )
    questions = {}
    for name, text in held["questions"].items():
        choices = _choices(used, held, name)
        if len(choices.winners):
            found = compare(choices, held["methods"], prior=prior, samples=samples, seed=seed)
            habits = _habits(used, held["trials"], name)
            questions[name] = {"text": text, **found, **habits}
    if not questions:
        raise UserError("the answers hold catch trials alone: let raters go on where they stopped")
    settings = {"prior": prior, "samples": samples, "seed": seed}
    return {
        "page": held["page"],
        "methods": held["methods"],
        "settings": settings | {"most_catches_failed": MOST_FAILED},
        "raters": raters,
        "questions": questions,
    }


def compare(
    choices: Choices,
    methods: Sequence[str],
    *,
    prior: float = PRIOR,
    samples: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Any]:
    """Strengths and pairs of one question, with 95 % percentile intervals of a bootstrap.

    Raters and scenes are drawn anew (`bradley_terry.cluster_weights`), or scenes alone where there
    is one rater: then the intervals speak of that rater only.
    """
    groups = {"raters": choices.raters, "scenes": choices.scenes}
    several = {name: group for name, group in groups.items() if len(np.unique(group)) > 1}
    clusters = [np.unique(group, return_inverse=True)[1] for group in several.values()]
    one = [np.zeros(len(choices.winners), int)]
    weights = cluster_weights(clusters or one, samples=samples, seed=seed)
    wins = count_wins(choices.winners, choices.losers, len(methods))
    drawn = count_wins(choices.winners, choices.losers, len(methods), weights)
    strength, strengths = fit(wins, prior=prior), fit(drawn, prior=prior)
    share, shares = chosen(strength), chosen(strengths)
    rows = [
        {
            "method": methods[i],
            "strength": float(strength[i]),
            "strength_ci95": _ci95(strengths[:, i]),
            "chosen": float(share[i]),
            "chosen_ci95": _ci95(shares[:, i]),
        }
        for i in np.argsort(-strength, kind="stable")
    ]
    return {
        "answers": len(choices.winners),
        "raters": len(np.unique(choices.raters)),
        "scenes": len(np.unique(choices.scenes)),
        "clusters": " and ".join(several) or "none: one rater, one scene",
        "strengths": rows,
        "pairs": _pairs(choices, methods, wins, drawn),
    }


def read_answers(path: Path, key: Mapping[str, Any], where: Path) -> Session:
    """Read what a rater saved.

    Raises:
        UserError: not such a file, or of another page than `key`, which was read from `where`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        page, rater, session = (found[name] for name in ("page", "rater", "session"))
        rows = [(row["trial"], row["choice"], float(row["ms"])) for row in found["answers"]]
        answers = {trial: choice for trial, choice, _ in rows}
    except FileNotFoundError:
        raise UserError(f"no file {path}: give what a rater saved from the page") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not answers as the page saves them: have it saved anew") from None
    if page != key["page"]:
        raise UserError(
            f"{path}: answers to another page than {where} belongs to: give that page's --key"
        )
    strange = [
        t for t, c in answers.items() if t not in key["trials"] or c not in ("left", "right")
    ]
    if strange or len(answers) < len(rows) or not (isinstance(rater, str) and rater.strip()):
        raise UserError(f"{path}: changed since the page saved it: have it saved anew")
    seconds = float(np.median([ms for *_, ms in rows])) / 1000 if rows else 0.0
    return Session(path, rater.strip(), str(session), answers, seconds)


def table(report: Mapping[str, Any]) -> str:
    """The report to be read: excluded raters, then each question."""
    lines = [f"left out: {r['rater']}: {r['excluded']}" for r in report["raters"] if r["excluded"]]
    for row in report["raters"]:
        if not row["excluded"] and row["answered"] < row["of"]:
            lines.append(f"not finished: {row['rater']}: {row['answered']} of {row['of']} trials")
    wide = max(len(name) for name in [*report["methods"], "method"])
    for name, one in report["questions"].items():
        alike, left = one["alike"], one["left"]
        lines += [
            "",
            f"{name}: {one['text']}",
            f"{one['raters']} raters, {one['scenes']} scenes, {one['answers']} answers; 95 % "
            f"intervals by bootstrap over {one['clusters']}",
            f"  {'method':{wide}}  {'strength':>8}  {'95 %':16}  chosen",
        ]
        for row in one["strengths"]:
            low, high = row["strength_ci95"]
            lines.append(
                f"  {row['method']:{wide}}  {row['strength']:+8.2f}  "
                f"{f'{low:+.2f} … {high:+.2f}':16}  {row['chosen']:.2f}"
            )
        for row in one["pairs"]:
            low, high = row["rate_ci95"]
            lines.append(
                f"  {row['first']} over {row['second']}: {row['wins']} of {row['of']} "
                f"({row['rate']:.2f}, {low:.2f} … {high:.2f}); {row['scenes_first']} scenes to "
                f"{row['scenes_second']}, p = {row['p']:.2g} ({row['p_holm']:.2g} by Holm)"
            )
        if alike["of"]:
            lines.append(f"  repeats answered alike: {alike['count']} of {alike['of']}")
        lines.append(f"  left side chosen: {left['rate']:.2f}, p = {left['p']:.2g}")
    return "\n".join(lines).lstrip("\n")


def write_figure(report: Mapping[str, Any], path: Path) -> Path:
    """Draw all strengths with their intervals as `.png` or `.pdf`; 0 is the methods' mean."""
    import matplotlib as mpl

    from tomjerry_utils.figures import intervals, style

    several = len(report["questions"]) > 1
    rows = {
        f"{row['method']} · {name}" if several else row["method"]: (
            row["strength"], *row["strength_ci95"],
        )
        for name, one in report["questions"].items()
        for row in one["strengths"]
    }  # fmt: skip
    label = "strength (log π), higher is chosen more often"
    figure = intervals(rows, label=label, bands={"mean of the methods": 0.0})
    with mpl.rc_context(style()), atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", pad_inches=0.1)
    return path


# ---- helpers -------------------------------------------------------------------------------------


def _read_key(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no key {path}: give the key.json that was written with the page as --key")
    key = read_json(path)
    if not isinstance(key, dict) or not {"page", "methods", "questions", "trials"} <= set(key):
        raise UserError(f"{path}: not the key of a page: give the key.json written with it")
    return key


def _sessions(read: Sequence[Session]) -> list[Session]:
    """One session a rater: of files saved during the same one, that with the most answers."""
    found: dict[str, Session] = {}
    for one in read:
        other = found.setdefault(one.rater, one)
        if other.session != one.session:
            raise UserError(
                f"{other.path} and {one.path} are two sessions of a rater '{one.rater}': leave one "
                "out, or give one another name in its file"
            )
        if len(one.answers) > len(other.answers):
            found[one.rater] = one
    return [found[rater] for rater in sorted(found)]


def _rater(session: Session, trials: Mapping[str, Any]) -> dict[str, Any]:
    main = [c for t, c in session.answers.items() if trials[t]["kind"] == "main"]
    catches = [(t, c) for t, c in session.answers.items() if trials[t]["kind"] == "catch"]
    failed = sum(choice != trials[trial]["answer"] for trial, choice in catches)
    excluded = ""
    if catches and failed > MOST_FAILED * len(catches):
        excluded = f"failed {failed} of {len(catches)} catch trials"
    alike, repeats = _alike([session], trials)
    return {
        "rater": session.rater,
        "answered": len(session.answers),
        "of": len(trials),
        "seconds": round(session.seconds, 2),
        "left": main.count("left") / len(main) if main else None,
        "repeats": repeats,
        "alike": alike,
        "catches": len(catches),
        "failed": failed,
        "excluded": excluded,
    }


def _choices(sessions: Sequence[Session], key: Mapping[str, Any], question: str) -> Choices:
    rows = []
    number = {name: i for i, name in enumerate(key["methods"])}
    scenes = {
        scene: i for i, scene in enumerate(sorted({t["scene"] for t in key["trials"].values()}))
    }
    for rater, session in enumerate(sessions):
        for name, choice in session.answers.items():
            trial = key["trials"][name]
            if trial["kind"] == "main" and trial["question"] == question:
                other = "right" if choice == "left" else "left"
                winner, loser = number[trial[choice][0]], number[trial[other][0]]
                rows.append((rater, scenes[trial["scene"]], winner, loser))
    return Choices(*np.array(rows, int).reshape(-1, 4).T)


def _alike(
    sessions: Sequence[Session], trials: Mapping[str, Any], question: str | None = None
) -> tuple[int, int]:
    """Repeats answered for the same picture, and all repeats whose first showing was answered."""
    same = []
    for session in sessions:
        for name, choice in session.answers.items():
            trial = trials[name]
            first = session.answers.get(trial.get("of", ""))
            if first and question in (None, trial["question"]):
                # The sides are swapped: who chooses the same picture chooses the other side.
                same.append(choice != first)
    return sum(same), len(same)


def _habits(
    sessions: Sequence[Session], trials: Mapping[str, Any], question: str
) -> dict[str, Any]:
    """What raters do whatever the pictures: consistency, and a side that they prefer."""
    alike, of = _alike(sessions, trials, question)
    main = [
        choice == "left"
        for session in sessions
        for name, choice in session.answers.items()
        if trials[name]["kind"] == "main" and trials[name]["question"] == question
    ]
    interval = binomtest(alike, of).proportion_ci(method="wilson") if of else (None, None)
    sides = binomtest(sum(main), len(main))
    return {
        "alike": {
            "count": alike, "of": of, "rate": alike / of if of else None,
            "rate_ci95": list(interval),
        },
        "left": {
            "count": sum(main), "of": len(main), "rate": sum(main) / len(main), "p": sides.pvalue,
        },
    }  # fmt: skip


def _pairs(
    choices: Choices, methods: Sequence[str], wins: np.ndarray, drawn: np.ndarray
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, j in itertools.combinations(range(len(methods)), 2):
        met = int(wins[i, j] + wins[j, i])
        if not met:
            continue
        here = ((choices.winners == i) & (choices.losers == j)) | (
            (choices.winners == j) & (choices.losers == i)
        )
        votes = np.where(choices.winners[here] == i, 1, -1)
        majority = np.sign(np.bincount(choices.scenes[here], weights=votes))
        first, second = int((majority > 0).sum()), int((majority < 0).sum())
        with np.errstate(invalid="ignore"):  # a sample in which the two never met
            rates = drawn[:, i, j] / (drawn[:, i, j] + drawn[:, j, i])
        rows.append({
            "first": methods[i], "second": methods[j], "wins": int(wins[i, j]), "of": met,
            "rate": wins[i, j] / met, "rate_ci95": _ci95(rates[~np.isnan(rates)]),
            "scenes_first": first, "scenes_second": second,
            "p": binomtest(first, first + second).pvalue if first + second else 1.0,
        })  # fmt: skip
    for row, p in zip(rows, _holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def _holm(p: Sequence[float]) -> list[float]:
    """Holm 1979's step-down correction for as many tests as there are."""
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = most
    return adjusted


def _ci95(draws: np.ndarray) -> list[float]:
    return np.percentile(draws, [2.5, 97.5]).tolist()
