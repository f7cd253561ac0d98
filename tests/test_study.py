"""Studies: seeds with runs of their own, intervals that hold what they promise, results on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tomjerry_utils import (
    UserError,
    ablation,
    ablation_rows,
    best_of_n,
    compare,
    contest,
    ldm,
    metrics,
    pooling,
    runs,
    study,
    transfer,
)
from tomjerry_utils.kept_parts import Part, results_folder
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import read_json, write_json, write_jsonl

SMOKE = load_profile("smoke")
NAMES = [name for name in compare.METRICS if name != "kid"]


# ---- seeds -------------------------------------------------------------------------------------


def test_training_seeds_have_runs_of_their_own(fresh_runs: Path) -> None:
    variants = study.training_seeds(SMOKE)
    assert [v.seed for v in variants] == [0, 1, 2]
    assert variants[0] == SMOKE
    assert len({runs.run_root(v) for v in variants}) == 3
    # Nothing but the seed and the name differs.
    for variant in variants:
        assert variant.model_copy(update={"seed": 0, "name": "smoke"}) == SMOKE
    assert variants[1].model_copy(update={"name": "smoke"}) == load_profile("smoke", seed=1)


def test_an_unknown_study_is_one_line() -> None:
    with pytest.raises(UserError, match="compare, ablation, rivals"):
        study.run_study(SMOKE, ["magic"])


# ---- intervals ---------------------------------------------------------------------------------


def test_two_levels_agree_with_one_where_there_is_one() -> None:
    values = np.random.default_rng(1).random((1, 400))
    low, high = np.percentile(pooling.two_level(values, 2000), [2.5, 97.5])
    plain = metrics.bootstrap_ci(values[0], samples=2000)
    assert (low, high) == pytest.approx(tuple(plain), abs=0.01)


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    scenes = rng.random(300)
    alike = np.stack([scenes] * 3)
    apart = alike + np.array([[-0.3], [0.0], [0.3]])
    widths = [
        np.ptp(np.percentile(pooling.two_level(v, 2000), [2.5, 97.5])) for v in (alike, apart)
    ]
    assert widths[1] > 3 * widths[0]


def test_two_levels_leave_out_what_does_not_apply() -> None:
    values = np.array([[1.0, np.nan, 3.0], [1.0, np.nan, 3.0]])
    draws = pooling.two_level(values, 500)
    draws = draws[~np.isnan(draws)]
    assert draws.min() >= 1.0 and draws.max() <= 3.0
    assert draws.mean() == pytest.approx(2.0, abs=0.1)


def test_one_more_run_falls_within_its_interval() -> None:
    rng = np.random.default_rng(3)
    inside = []
    for _ in range(2000):
        *few, more = rng.normal(0.7, 0.05, 4)
        low, high = pooling.one_run(few) or (0.0, 0.0)
        inside.append(low <= more <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)
    assert pooling.one_run([0.5]) is None


# ---- the tables --------------------------------------------------------------------------------


def fake_run(folder: Path, seed: int, *, better: float) -> Any:
    """Stage 06 of one seed with made-up scores; ours is `better` than the rivals everywhere."""
    rng = np.random.default_rng(seed)
    rows, vectors, methods = [], {}, {}
    for method in compare.METHODS:
        gain = better if method == "ours" else 0.0
        each = {
            name: np.clip(
                rng.normal(0.5, 0.1, 60) + (gain if compare.METRICS[name][1] else -gain), 0, 1
            )
            for name in NAMES
        }
        rows += [
            {"method": method, "seed": i, "answer": "tom", **{n: float(each[n][i]) for n in NAMES}}
            for i in range(60)
        ]
        vectors[method] = rng.standard_normal((60, 8)).astype(np.float32) + (0 if gain else 1)
        found = {
            n: {"value": float(v.mean()), "ci95": [0.0, 1.0], "n": 60} for n, v in each.items()
        }
        found["kid"] = {"value": 0.0 if gain else 1.0, "ci95": [0.0, 1.0], "n": 60}
        methods[method] = {"metrics": found}
    gaps = {
        rival: {
            name: {
                "difference": methods["ours"]["metrics"][name]["value"]
                - methods[rival]["metrics"][name]["value"],
                "n": 60,
            }
            for name in compare.METRICS
        }
        for rival in compare.METHODS[1:]
    }
    folder.mkdir(parents=True)
    np.savez(folder / "features.npz", **vectors)
    return SimpleNamespace(
        folder=folder,
        rows=rows,
        results={
            "n": 60,
            "features": "f",
            "methods": methods,
            "rows": {},
            "differences": gaps,
            "seconds_per_picture": dict.fromkeys(compare.METHODS, 0.1),
            "settings": {"bootstrap": 200, "candidates": 2},
        },
    )


@pytest.fixture
def made_up(tmp_path: Path, fresh_runs: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stages that are there at once, and real pictures' features of the same width."""
    monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    real = np.random.default_rng(9).standard_normal((80, 8)).astype(np.float32)
    monkeypatch.setattr(metrics, "reference", lambda: (real, None))
    asked: dict[str, Any] = {"compare": [], "ablation": []}

    def ensure(profile: Any) -> Any:
        asked["compare"].append((profile.name, profile.seed))
        return fake_run(tmp_path / "made" / profile.name, profile.seed, better=0.3)

    def trained(start: Any, name: str) -> Part:
        points = ablation_rows.rows(start.profile)[name].points
        scores = [dict.fromkeys(ablation_rows.SCORES, 0.5)] * len(points)
        asked["ablation"].append((start.profile.seed, name))
        record = {"steps": start.profile.transfer.steps, "seconds": 1.0, "scores": scores}
        shape = (len(points), 3, 12)
        return record, {"value": np.full(shape, 0.5), "chance": np.full(shape, 0.2)}

    def course(profile: Any) -> Part:
        steps = profile.transfer.ablation_steps
        return {
            "rows": [
                {"row": name, "steps": steps, "n": 48, **dict.fromkeys(study.PROBES, 0.2 + 0.1 * i)}
                for i, name in enumerate(transfer.ABLATION)
            ]
        }, {}

    monkeypatch.setattr(compare, "ensure", ensure)
    monkeypatch.setattr(ablation, "make", trained)
    monkeypatch.setattr(ablation, "_course", course)
    monkeypatch.setattr(ablation, "_oracle", lambda start: ({}, {"value": np.ones((3, 12))}))
    monkeypatch.setattr(ldm, "fingerprint", lambda *_: "weights")

    def run(variants: Any, folder: Path, *, write: Any) -> dict[str, Any]:
        asked["rivals"] = folder
        table = {"n": len(variants), "seeds": [0], "missing": ["course/cut-seed1"]}
        write(table)
        asked["written"] = read_json(folder.with_suffix(".json"))
        return {**table, "missing": []}

    monkeypatch.setattr(contest, "run", run)
    return asked


def test_the_comparison_pools_seeds_and_scenes(made_up: dict[str, Any]) -> None:
    (path,) = study.run_study(SMOKE, ["compare"])
    table = read_json(path)
    assert made_up["compare"] == [("smoke", 0), ("smoke-seed1", 1), ("smoke-seed2", 2)]
    assert table["seeds"] == [0, 1, 2] and table["n"] == 60
    for method in compare.METHODS:
        for name, row in table["methods"][method]["metrics"].items():
            assert len(row["by_seed"]) == 3
            assert row["value"] == pytest.approx(np.mean(row["by_seed"]))
            if name != "kid":
                assert row["ci95"][0] < row["value"] < row["ci95"][1]
            low, high = row["one_run95"]
            assert all(low <= value <= high for value in row["by_seed"])
    for rival in compare.METHODS[1:]:
        verdicts = {n: row["verdict"] for n, row in table["differences"][rival].items()}
        assert verdicts == dict.fromkeys(compare.METRICS, "better")
    # Two rivals that were drawn alike are not told apart.
    assert set(table) >= {"date", "versions", "device", "settings", "seconds", "schema"}


def test_the_ablation_has_short_and_full_rows(made_up: dict[str, Any]) -> None:
    (path,) = study.run_study(SMOKE, ["ablation"])
    table = read_json(path)
    assert list(table["rows"]) == list(table["full"])[:7] == list(transfer.ABLATION)
    assert table["rows"]["no source"]["steps"] == SMOKE.transfer.ablation_steps
    assert {row["steps"] for row in table["full"].values()} == {SMOKE.transfer.steps}
    trained = list(ablation_rows.rows(SMOKE))
    assert made_up["ablation"] == [(seed, name) for seed in (0, 1, 2) for name in trained]


def test_the_rivals_are_compared_over_all_training_seeds(made_up: dict[str, Any]) -> None:
    (path,) = study.run_study(SMOKE, ["rivals"])
    table = read_json(path)
    # Three are asked for; the study says how many it has, and so on its way.
    assert (table["study"], table["n"], table["seeds"]) == ("rivals", 3, [0])
    assert set(table) >= {"date", "versions", "device", "settings", "seconds", "schema"}
    assert made_up["written"] == {**table, "missing": ["course/cut-seed1"]}
    assert made_up["rivals"] == path.parent / "rivals" == results_folder(SMOKE) / "rivals"


# ---- files and figures -------------------------------------------------------------------------


def test_only_the_default_profile_writes_what_is_committed(
    made_up: dict[str, Any], tmp_path: Path, fresh_runs: Path
) -> None:
    written = study.run_study(SMOKE)
    assert written == [fresh_runs / "smoke" / "results" / f"{n}.json" for n in study.STUDIES]
    assert study.results("compare") is None
    made_up_again = study.run_study(load_profile("mini"), ["ablation"])
    assert made_up_again == [tmp_path / "results" / "ablation.json"]
    read = study.results("ablation")
    assert read is not None and read["profile"] == "mini"


def test_seconds_of_finished_stages(fresh_runs: Path) -> None:
    for stage, seconds in (("04_ldm", 12.5), ("05_transfer", 3.0)):
        record = {"key": "k", "seconds": seconds}
        write_json(fresh_runs / "smoke" / stage / "provenance.json", record)
    (fresh_runs / "smoke" / "06_compare").mkdir()
    assert study.stage_seconds(SMOKE) == {"04_ldm": 12.5, "05_transfer": 3.0}


def test_a_finished_courses_numbers_are_kept_and_drawn_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = tmp_path / "project", tmp_path / "runs" / "smoke"
    monkeypatch.setenv("TOMJERRY_ROOT", str(root))
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "runs"))
    assert study.keep_results(SMOKE) is None  # nothing has run
    cell = {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}
    scores = dict.fromkeys(("class_accuracy", "action_accuracy", "mask_iou", "pck", "kid"), cell)
    methods = ("ours", "identity", "colour", "sdedit")
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    write_json(
        folder / "06_compare" / "results.json",
        {
            "methods": {name: {"metrics": scores} for name in methods},
            "rows": {"floor": scores},
            "n": 9,
            "features": "some features",
        },
    )
    write_json(folder / "05_transfer" / "ablation.json", [])
    for stage in ("04_ldm/denoiser_training", "05_transfer/training"):
        write_jsonl(folder / stage / "history.jsonl", history)
    assert study.keep_results(SMOKE) is None  # not finished
    write_json(
        folder / "06_compare" / "provenance.json",
        {"started": "2026-01-02T03:04:05+00:00", "device": "a laptop", "key": "abc"},
    )
    kept = study.keep_results(SMOKE)
    assert kept == root / "results" / "smoke" / "course.json"
    table = read_json(kept)
    assert (table["date"], table["key"]) == ("2026-01-02", "abc")
    assert table["05 translator"] == history
    drawn = study.draw_results(root / "results")
    assert [path.name for path in drawn] == [
        "results_metrics_table.pdf", "results_mask_iou.pdf", "results_training.pdf",
    ]  # fmt: skip
    assert all(path.parent == root / "figures" and path.stat().st_size > 1000 for path in drawn)
    assert read_json(drawn[0].with_suffix(".json"))["extra"]["key"] == "abc"
    # What a course without these stages lacks is drawn where they have run.
    why = {"meaning": "so", "failures": 1, "others": 0.05, "mended_by": {"shapes": 1, "view": 0}}
    failed = {"causes": {"posture": why}, "failed": 1, "n": 9}
    write_json(folder / "06_failures" / "failures.json", failed)
    write_json(folder / "06_frontier" / "frontier.json", sweep())
    rows = [{"n": n, "value": 0.5, "gain": 0.0, "gain_ci95": [0.0, 0.0]} for n in (1, 2)]
    curves = {name: {"rule": rows, "twin": rows} for name in best_of_n.QUALITIES}
    write_json(folder / "06_best_of_n" / "best_of_n.json", {"curves": curves})
    assert study.keep_results(SMOKE) == kept and read_json(kept)["failures"] == failed
    assert [path.name for path in study.draw_results(root / "results")][3:] == [
        "results_frontier.pdf", "results_failure_causes.pdf", "results_best_of_n.pdf",
    ]  # fmt: skip


def sweep() -> dict[str, Any]:
    """A frontier of two methods with two settings each."""
    rows = [
        {"budget": "course", "method": method, "point": str(i), "best": i == 0, "setting": {},
         "perceptual": {"value": far, "ci95": [far - 0.1, far + 0.1]},
         "kid": {"value": near, "ci95": [near - 0.1, near + 0.1]}}
        for method, i, far, near in (
            ("ours", 0, 0.5, 0.2), ("ours", 1, 0.7, 0.1), ("sdedit", 0, 0.6, 0.5),
            ("sdedit", 1, 0.9, 0.4),
        )
    ]  # fmt: skip
    said = [{"budget": "course", "method": "sdedit", "verdict": "dominated"}]
    return {"n": 9, "frontier": rows, "dominance": said}


def test_the_rivals_frontier_is_drawn_from_the_studys_results(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_json(folder / "rivals.json", {"date": "2026-01-02", "seeds": [0], **sweep()})
    (drawn,) = study.draw_results(folder)
    assert drawn == tmp_path / "figures" / "study_frontier.pdf"
    # Results from before the rule was asked hold no verdicts and draw nothing.
    write_json(folder / "rivals.json", {"date": "2026-01-02", "seeds": [0]})
    assert study.draw_results(folder) == []


def test_results_are_drawn_without_a_run(made_up: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    assert study.draw_results(folder) == []
    for path in study.run_study(SMOKE):
        write_json(folder / path.name, read_json(path))
    drawn = study.draw_results(folder)
    assert [path.stem for path in drawn] == [
        "study_comparison", *(f"study_ablation_{probe}" for probe in study.PROBES),
        "study_ablation_sweeps",
    ]  # fmt: skip
    for path in drawn:
        assert path.parent == tmp_path / "figures" and path.stat().st_size > 1000
        assert len(read_json(path.with_suffix(".json"))["alt"].split()) > 8
