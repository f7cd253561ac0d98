"""Rivals on equal terms: seconds, trials and what is told, a study that survives being killed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

import tomjerry_utils
from tomjerry_utils import (
    UserError,
    baselines,
    budgets,
    collect,
    compare,
    contest,
    foundation,
    gans,
    kept_figures,
    ldm,
    rival_training,
    rivals,
    runs,
    scenes,
    transfer,
    tuning,
)
from tomjerry_utils.cli import main
from tomjerry_utils.denoiser import save_denoiser
from tomjerry_utils.images import load_image, save_image
from tomjerry_utils.judge_nets import LabelNet, PixelNet
from tomjerry_utils.judges import Judges
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import (
    foundation_root,
    hash_file,
    read_json,
    run_root,
    write_json,
    write_jsonl,
)

SCENES, ZOO, CARTOONS = 3, 3, 2
SECONDS = {
    "03 blip": 40.0,
    "04 decoder": 10.0,
    "04 denoiser": 20.0,
    "04 finishing": 5.0,
    "05 translator": 25.0,
    "05 finishing": 5.0,
}
PLACES = (
    "03_blip",
    "04_ldm/autoencoder_training",
    "04_ldm/denoiser_training",
    "04_ldm/finishing",
    "05_transfer/training",
    "05_transfer/finishing",
)
# 0.006 s and 0.6 s: a step, and a few.
SHARE = {"budget_share": 1e-4 / 2, "validation_scenes": CARTOONS, "zoo_pictures": ZOO}
TRAINED = (*budgets.DIFFUSION, *gans.KINDS)


def small_profile(seed: int = 0, **changes: Any) -> Profile:
    smoke = load_profile("smoke")
    few = {"test_scenes": SCENES, "batch_size": 2, "bootstrap": 20}
    return smoke.model_copy(
        update={
            "seed": seed,
            "name": "smoke" if seed == 0 else f"smoke-seed{seed}",
            "transfer": smoke.transfer.model_copy(update={"sample_steps": 1}),
            "compare": smoke.compare.model_copy(update=few),
            "rivals": smoke.rivals.model_copy(update=SHARE | changes),
        }
    )


def make_run(profile: Profile, translator: Any, collected: Path) -> ldm.LdmRun:
    """What stages 01 to 05 of a run leave, from tiny models: histories, latents, weights."""
    root = run_root(profile)
    shutil.copytree(collected, root / collected.name)
    for place, seconds in zip(PLACES, SECONDS.values(), strict=True):
        write_jsonl(
            root / place / "history.jsonl", [{"step": 1, "seconds": 1.0}, {"seconds": seconds}]
        )
    stage = root / ldm.STAGE
    for name in ("autoencoder", "finished/autoencoder"):
        translator.vae.save_pretrained(stage / name)
    save_denoiser(translator.unet, translator.conditioner, stage / "denoiser")
    write_json(stage / "provenance.json", {"key": "made"})
    sets = [
        ldm.latent_set(
            tiny.pictures(style, 6),
            [name for name in scenes.LABELS if (name in ("tom", "jerry", "tom_jerry")) == first]
            * 2,
            ["a cat is running"] * 6,
            vae=translator.vae,
            net=translator.net,
            describer=translator.describer,
            tone=None,
        )[0]
        for style, first in (("cartoon", True), ("natural", False))
    ]
    return ldm.LdmRun(
        stage, translator.vae, translator.unet, translator.conditioner, translator.scheduler,
        sets[0], sets[1], [], [], {}, {}, sets[1].views, "made",
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(
    session_runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Two training seeds' runs, finished up to stage 05, and judges that nobody has taught."""
    collected = collect.ensure(load_profile("smoke")).folder
    torch.manual_seed(5)
    judges = Judges(LabelNet().eval(), PixelNet().eval())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMJERRY_RUNS", str(tmp_path_factory.mktemp("runs")))
        variants = [small_profile(seed) for seed in (0, 1)]
        translators = [tiny.tiny_translator(attention=None, seed=v.seed) for v in variants]
        made = [make_run(v, t, collected) for v, t in zip(variants, translators, strict=True)]
        patch.setattr(ldm, "ensure", lambda profile: made[profile.seed])
        patch.setattr(
            transfer,
            "ensure",
            lambda p: SimpleNamespace(translator=translators[p.seed], key=f"made{p.seed}"),
        )
        patch.setattr(contest, "load_judges", lambda: judges)
        folder = tmp_path_factory.mktemp("kept")
        yield SimpleNamespace(
            variants=variants, translators=translators, stages=made, folder=folder, written=[]
        )


@pytest.fixture(scope="module")
def table(world: SimpleNamespace) -> dict[str, Any]:
    """The whole study, budgets of a few steps, and what it wrote on its way."""
    return contest.run(world.variants, world.folder, references=40, write=world.written.append)


# ---- budgets -----------------------------------------------------------------------------------


def test_budgets_are_the_seconds_that_ours_took(world: SimpleNamespace) -> None:
    whole = small_profile(budget_share=1.0)
    assert budgets.course_seconds(whole) == SECONDS
    assert budgets.budget_seconds(whole, "course") == 65.0  # stages 04 and 05
    parts = ("autoencoder", "denoiser", "structure", "posture", "blip")
    own = [read_json(foundation_root() / n / "provenance.json")["seconds"] for n in parts]
    assert budgets.foundation_seconds(whole) == dict(zip(parts, own, strict=True))
    assert budgets.budget_seconds(whole, "total") == pytest.approx(sum(own) + 105.0)
    half = small_profile(budget_share=0.5)
    assert budgets.budget_seconds(half, "course") == 32.5


def test_a_run_that_is_not_finished_has_no_budget(fresh_runs: Path) -> None:
    with pytest.raises(UserError, match=r"no .*03_blip.*: run `tomjerry course --profile smoke`"):
        budgets.budget_seconds(small_profile(), "course")


def test_models_that_do_not_say_their_seconds_have_no_total(world: SimpleNamespace) -> None:
    profile = small_profile()
    other = profile.ldm.model_copy(update={"denoiser": "some/hub-model"})
    profile = profile.model_copy(update={"ldm": other})
    assert budgets.foundation_seconds(profile) is None
    with pytest.raises(UserError, match="compare under the budget 'course'"):
        budgets.budget_seconds(profile, "total")
    assert budgets.budget_seconds(profile, "course") > 0


def test_every_method_has_as_many_settings_to_try() -> None:
    for profile in (load_profile("mini"), load_profile("smoke"), load_profile("paper")):
        ours = max(row["steps"] for row in budgets.grid("ours", profile))
        for method in budgets.METHODS["course"]:
            rows = budgets.grid(method, profile)
            assert len(rows) == (1 if method == "identity" else budgets.TRIALS)
            assert len({str(row) for row in rows}) == len(rows)
            if method in budgets.DIFFUSION:
                assert {row["steps"] for row in rows} == {ours}
            if method in gans.KINDS:
                assert all(gans.GanSettings(**row) for row in rows)
    with pytest.raises(UserError, match="no method 'magic'"):
        budgets.grid("magic", load_profile("mini"))


def test_what_each_method_is_told_is_stated() -> None:
    assert set(budgets.SUPERVISION) == {"ours", "untold", *baselines.RIVALS, *gans.KINDS}
    keys = {"starts_from", "masks", "keypoints", "captions", "classes"}
    assert all(set(row) == keys for row in budgets.SUPERVISION.values())
    assert not any(budgets.SUPERVISION["cut"].values())  # pictures alone
    assert all(budgets.SUPERVISION["ours"].values())
    untold = dict(budgets.SUPERVISION["untold"])
    assert untold.pop("starts_from") == ("autoencoder",) and not any(untold.values())


# ---- the criterion -----------------------------------------------------------------------------


def test_realism_runs_from_cartoons_to_photographs(world: SimpleNamespace) -> None:
    cartoons, natural = tiny.pictures("cartoon", 12), tiny.pictures("natural", 40)
    criterion = tuning.Criterion(world.translators[0], cartoons, natural[:28])
    as_they_are = criterion.score(cartoons)
    assert as_they_are["realism"] == pytest.approx(0, abs=1e-9) and as_they_are["score"] <= 0
    photographs = criterion.score(natural[28:])
    assert photographs["realism"] > 0.4
    mixed = [
        criterion.score(np.concatenate([cartoons[:-count], natural[-count:]]))["realism"]
        for count in (3, 6, 9)
    ]
    assert 0 < mixed[0] < mixed[1] < mixed[2]
    assert criterion.score(255 - cartoons)["realism"] < photographs["realism"]
    product = photographs["realism"] * photographs["faithfulness"]
    assert photographs["score"] == pytest.approx(product)


def test_faithfulness_is_the_overlap_with_the_body_that_the_posture_nets_draw(
    world: SimpleNamespace,
) -> None:
    cartoons = tiny.pictures("cartoon", 4)
    criterion = tuning.Criterion(world.translators[0], cartoons, tiny.pictures("natural", 4))
    bodies = tuning.natural_bodies(world.translators[0], cartoons)
    own = tuning._maps(world.translators[0], cartoons)
    assert not torch.allclose(bodies, own, atol=1e-2)
    overlap = float(tuning.silhouette_overlap(bodies, own).mean())
    assert criterion.score(cartoons)["faithfulness"] == pytest.approx(overlap)


def test_no_judge_has_a_say_in_tuning() -> None:
    """Nor a twin, nor a feature that a reported metric uses: not even by way of another module."""
    package = Path(tomjerry_utils.__file__).parent
    told = {"judges", "judge_nets", "metrics", "scoring", "twins", "compare", "contest"}
    for name in ("rivals", "rival_training", "untold", "tuning", "budgets"):
        tree = ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))
        named = {
            alias.name.rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        } | {
            (node.module or "").rpartition(".")[2]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
        }
        assert not named & (told | {"features"}), name
    code = (
        "import sys, tomjerry_utils.rivals\n"
        f"told = {{f'tomjerry_utils.{{name}}' for name in {told}}}\n"
        "assert not told & set(sys.modules), told & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the study ---------------------------------------------------------------------------------


def test_each_method_gets_its_trials_and_the_best_of_them_competes(
    table: dict[str, Any], world: SimpleNamespace
) -> None:
    assert table["trials"] == budgets.TRIALS == 6
    assert {b: tuple(t) for b, t in table["methods"].items()} == budgets.METHODS
    for budget, methods in table["methods"].items():
        assert table["budgets"][budget]["tuned_under"] == "course"
        for method, row in methods.items():
            if budget == "total":
                assert row["trials"] == [] and row["seeds"] == [0]
                assert row["setting"] == table["methods"]["course"][method]["setting"]
                continue
            wanted = budgets.grid(method, world.variants[0])
            assert [trial["setting"] for trial in row["trials"]] == wanted
            assert len(wanted) == (1 if method == "identity" else budgets.TRIALS)
            scores = [trial["score"] for trial in row["trials"]]
            assert row["setting"] == wanted[int(np.argmax(scores))]
            # The other training seed was given the setting, and tried none.
            assert row["seeds"] == [0, 1]
            for variant in world.variants[1:]:
                again = rivals.ensure(variant, budget, method, setting=row["setting"])
                assert again.trials == [] and again.setting == row["setting"]
    with pytest.raises(ValueError, match="tried under the budget 'course'"):
        rivals.ensure(world.variants[0], "total", "cut")


def test_what_each_was_trained_for_is_told(table: dict[str, Any], world: SimpleNamespace) -> None:
    profile = world.variants[0]
    for budget, methods in table["methods"].items():
        allowed = budgets.budget_seconds(profile, budget)
        assert table["budgets"][budget]["seconds"]["0"] == pytest.approx(allowed, abs=0.06)
        for method in set(methods) & set(gans.KINDS):
            trained = methods[method]["seconds"][0]["trained"]
            assert trained >= allowed - 0.06
            setting = methods[method]["setting"] if budget == "total" else None
            run = rivals.ensure(profile, budget, method, setting=setting)
            facts = gans.load_gan(rival_training.weights_folder(run.folder, "final")).facts
            course = {d: len(rival_training.training_pictures(profile, d)) for d in scenes.STYLES}
            more = 2 * ZOO if budget == "total" else 0
            assert facts["pictures"] == {d: n + more for d, n in course.items()}
            assert facts["budget_seconds"] == pytest.approx(allowed)
            assert facts["seconds"] == trained
            if budget == "course":
                short = gans.load_gan(rival_training.weights_folder(run.folder, "0")).facts
                assert short["budget_seconds"] == pytest.approx(budgets.TRIAL_SHARE * allowed)
    told = table["supervision"]
    assert told["cut"]["seconds"]["pretraining"] == 0
    assert told["ours"]["seconds"]["pretraining"] == pytest.approx(
        sum(table["budgets"]["total"]["foundation"].values()), abs=0.1
    )
    assert told["sdedit"]["seconds"]["course"] >= 30  # stage 04, and then some
    own = told["untold"]["seconds"]
    assert own["course"] > 10  # stage 04's decoder, and then some
    before = table["budgets"]["total"]["foundation"]
    assert own["pretraining"] == pytest.approx(before["autoencoder"], abs=0.1)
    assert told["ours"]["seconds"]["course"] == 65 and told["ours"]["seconds"]["captioner"] == 40


def test_a_gan_is_looked_at_on_its_way_through_the_total_budget(
    table: dict[str, Any], world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = world.variants[0]
    assert not any(row["curve"] for row in table["methods"]["course"].values())
    for row in table["methods"]["total"].values():
        seconds = [look["seconds"] for look in row["curve"]]
        assert len(seconds) == rival_training.LOOKS and seconds == sorted(seconds)
        assert row["seconds"][0]["trained"] == pytest.approx(seconds[-1], abs=0.06)
        assert all(set(look) == set(row["curve"][0]) for look in row["curve"])
        assert {"realism", "faithfulness", "score"} < set(row["curve"][0])
    # Killed at the third look, it goes on from there, and looking takes nothing off its budget.
    asked: list[float] = []

    def trains(*_: Any, folder: Path, seconds: float, **__: Any) -> gans.Gan:
        asked.append(seconds)
        return gans.Gan(
            "cut", gans.Generator(2, 1), gans.GanSettings(width=2, blocks=1), {"seconds": seconds}
        )

    def look(gan: gans.Gan) -> dict[str, float]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"score": gan.facts["seconds"]}

    monkeypatch.setattr(rival_training.gans, "train_gan", trains)
    arguments = ("cut", profile, tmp_path, "final", "course", {}, 24.0, look)
    with pytest.raises(KeyboardInterrupt):
        rival_training.train_gan(*arguments)
    assert asked == [2.0, 4.0, 6.0]
    curve = rival_training.train_gan(*arguments).facts["curve"]
    assert asked[3:] == [2.0 * piece for piece in range(3, 13)]
    assert curve == [{"seconds": 2.0 * i, "score": 2.0 * i} for i in range(1, 13)]


def test_the_zoo_that_gans_see_is_the_foundations(world: SimpleNamespace, table: Any) -> None:
    found = rival_training._zoo(world.variants[0], "natural")
    first, second = (foundation.PICTURES[n] for n in ("natural zoo", "natural"))
    for at, (style, zoo, seed, _) in ((0, first), (ZOO, second)):
        one = scenes.render_many([seed], style, tiny.SIZE, zoo=zoo, workers=1)["image"]
        assert np.array_equal(found[at], one[0])


def test_ours_is_set_against_each_scene_by_scene(table: dict[str, Any]) -> None:
    for budget, rows in table["differences"].items():
        assert set(rows) == set(budgets.METHODS[budget]) - {"ours"}
        for rival, gaps in rows.items():
            for metric in ("perceptual", "kid", "class_accuracy", "action_accuracy", "mask_iou"):
                row, found = gaps[metric], table["methods"][budget][rival]["metrics"][metric]
                ours = table["methods"]["course"]["ours"]["metrics"][metric]
                seeds = len(found["by_seed"])
                assert row["by_seed"] == pytest.approx(
                    [a - b for a, b in zip(ours["by_seed"][:seeds], found["by_seed"], strict=True)]
                )
                assert row["ci95"][0] <= row["ci95"][1]
                assert row["verdict"] == compare.verdict(metric, row["ci95"])
    assert len(table["differences"]["course"]["sdedit"]["kid"]["by_seed"]) == 2


def test_the_frontier_has_every_rivals_whole_sweep(
    table: dict[str, Any], world: SimpleNamespace
) -> None:
    rows = table["frontier"]
    assert not {row["method"] for row in rows} & set(budgets.VARIANTS)  # ours, not a rival
    for budget, methods in budgets.METHODS.items():
        for method in set(methods) - set(budgets.VARIANTS):
            mine = [r for r in rows if (r["budget"], r["method"]) == (budget, method)]
            extra = method in gans.KINDS  # short trainings, and the whole one
            tried = len(budgets.grid(method, world.variants[0])) if budget == "course" else 0
            assert len(mine) == tried + extra
            assert sum(row["best"] for row in mine) == 1
    ours = [r for r in rows if r["method"] == "ours"]
    for row in (r for r in rows if r["method"] != "ours"):
        near = [
            o["kid"]["value"]
            for o in ours
            if o["perceptual"]["value"] <= row["perceptual"]["value"]
        ]
        assert row["ours_kid"] == (min(near) if near else None)
    said = {(row["budget"], row["method"]): row for row in table["dominance"]}
    assert set(said) == {(r["budget"], r["method"]) for r in rows} - {("course", "ours")}
    for key, row in said.items():
        points = [r for r in rows if (r["budget"], r["method"]) == key]
        assert row["points"] == len(points)
        gaps = [r["difference"] for r in points]
        assert row["holds"] == all(gap is not None and gap < 0 for gap in gaps)
    strengths = {r["setting"]["strength"]: r for r in rows if r["method"] == "colour"}
    far = [strengths[s]["perceptual"]["value"] for s in sorted(strengths)]
    assert len(set(far)) == budgets.TRIALS  # each share is a picture of its own


# ---- its parts ---------------------------------------------------------------------------------


def names(variants: int = 2, total: bool = True) -> list[str]:
    """The parts in the order in which they are made."""
    course = [f"course/{m}-seed{k}" for k in range(variants) for m in budgets.METHODS["course"]]
    return course + [f"total/{m}-seed0" for m in gans.KINDS if total]


def no_runs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine on which nothing has run, and on which nothing can be made."""
    patch.setenv("TOMJERRY_RUNS", str(folder))
    patch.setattr(rivals, "ensure", None)
    patch.setattr(contest.contest_parts, "translate", None)
    patch.setattr(contest.contest_parts.scoring, "measure", None)
    patch.setattr(contest, "load_judges", None)


def test_with_all_parts_kept_no_run_is_needed(
    table: dict[str, Any], world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_runs(monkeypatch, tmp_path / "none")
    assert contest.run(world.variants, world.folder, references=40) == table
    assert not (tmp_path / "none").exists()
    assert table["missing"] == [] and table["covers"] == {"course": [0, 1], "total": [0]}
    kept = [str(p.relative_to(world.folder)) for p in world.folder.rglob("*") if p.is_file()]
    assert sorted(kept) == sorted(f"{name}{end}" for name in names() for end in (".json", ".npz"))


def test_a_part_has_what_does_not_depend_on_the_machine_as_its_facts(
    table: dict[str, Any], world: SimpleNamespace
) -> None:
    stored = read_json(world.folder / "total" / "cut-seed0.json")
    course = table["methods"]["course"]["cut"]
    assert stored["facts"]["setting"] == course["setting"]
    assert read_json(world.folder / "course" / "cut-seed0.json")["facts"]["setting"] is None
    assert not any("seconds" in name for name in stored["facts"])
    record = stored["record"]
    assert record["course_seconds"] == SECONDS
    assert record["seconds"]["budget"] == table["budgets"]["total"]["seconds"]["0"]
    with np.load(world.folder / "course" / "sdedit-seed0.npz") as arrays:
        points = [row["point"] for row in table["frontier"] if row["method"] == "sdedit"]
        for name in points:
            assert arrays[f"kid {name}"].shape == (20,)
            assert arrays[f"perceptual {name}"].shape == (SCENES,)
        assert not any("features" in name for name in arrays)


def test_results_are_written_from_the_first_seed_on_and_say_what_is_missing(
    table: dict[str, Any], world: SimpleNamespace
) -> None:
    order, written = names(), world.written
    first = len(budgets.METHODS["course"])
    assert [t["missing"] for t in written] == [order[k:] for k in range(first, len(order) + 1)]
    assert all(t["covers"] == {"course": [0]} == {"course": t["seeds"]} for t in written[:first])
    assert written[first]["covers"] == written[-2]["covers"] == {"course": [0, 1]}
    assert written[-1] == table
    for one in (written[0], written[-2]):
        assert list(one["methods"]) == list(one["budgets"]) == ["course"]
        assert {row["budget"] for row in one["frontier"] + one["dominance"]} == {"course"}
        assert one["methods"]["course"]["ours"]["seeds"] == one["seeds"]
        figures = kept_figures.rivals_drawings(one)  # with a budget missing
        (axes,) = figures["frontier"][0].axes
        assert len(axes.containers) == first - len(budgets.VARIANTS)


def test_only_what_is_missing_is_made_anew(
    table: dict[str, Any],
    world: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A part was lost, and one of a later seed was made with a setting that is not the first's."""
    folder = tmp_path / "kept"
    shutil.copytree(world.folder, folder)
    for end in (".json", ".npz"):
        (folder / "course" / f"ilvr-seed1{end}").unlink()
    note = folder / "course" / "colour-seed1.json"
    stored = read_json(note)
    stored["facts"]["setting"] = {"strength": 0.123}
    write_json(note, {**stored, "key": runs.hash_obj(stored["facts"])})
    make, made = contest.contest_parts.make, []

    def counts(task: Any, *arguments: Any, **options: Any) -> Any:
        made.append(task.name)
        if task.name == kill:
            raise KeyboardInterrupt
        return make(task, *arguments, **options)

    monkeypatch.setattr(contest.contest_parts, "make", counts)
    kill, parts = "course/ilvr-seed1", len(names())
    with pytest.raises(KeyboardInterrupt):
        contest.run(world.variants, folder, references=40)
    said = capsys.readouterr().err
    left = "left: course seed 1: colour, ilvr"
    assert f"{parts - 2} of {parts} parts kept in {folder}; {left}\n" in said
    assert f"{parts - 1} of {parts} parts kept in {folder}; left: course seed 1: ilvr\n" in said
    assert "colour-seed1.json: made with other setting" in said
    kill = ""
    found = contest.run(world.variants, folder, references=40)
    assert made == ["course/colour-seed1", "course/ilvr-seed1", "course/ilvr-seed1"]
    assert found["methods"] == table["methods"]
    # Whose setting is found by trials decides about those of the other seeds, and of the total.
    for end in (".json", ".npz"):
        (folder / "course" / f"cut-seed0{end}").unlink()
    no_runs(monkeypatch, tmp_path / "none")
    monkeypatch.setattr(contest, "load_judges", lambda: None)
    monkeypatch.setattr(contest.contest_parts, "make", counts)
    made.clear()
    kill = "course/cut-seed0"
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        contest.run(world.variants, folder, references=40)
    assert "course seed 0: cut; course seed 1: cut; total seed 0: cut\n" in capsys.readouterr().err
    assert made == [kill]


def test_parts_of_other_settings_are_not_read(
    table: dict[str, Any], world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_runs(monkeypatch, tmp_path / "none")
    monkeypatch.setattr(contest, "load_judges", lambda: None)

    def stops(task: Any, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(contest.contest_parts, "make", stops)
    first = world.variants[0]
    changed = first.transfer.model_copy(update={"steps": first.transfer.steps + 1})
    other = first.model_copy(update={"transfer": changed})
    shutil.copytree(world.folder, tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        contest.run([other, world.variants[1]], tmp_path / "kept", references=40)
    with pytest.raises(KeyboardInterrupt):
        contest.run(world.variants, tmp_path / "kept", references=41)
    assert contest.run(world.variants, tmp_path / "kept", references=40) == table


def test_without_a_total_the_course_is_compared(
    table: dict[str, Any], world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_runs(monkeypatch, tmp_path / "none")
    monkeypatch.setattr(budgets, "foundation_seconds", lambda profile: None)
    found = contest.run(world.variants, world.folder, references=40)
    assert list(found["methods"]) == list(found["differences"]) == ["course"]
    assert found["missing"] == [] and found["covers"] == {"course": [0, 1]}


# ---- killed ------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hash_file(path), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("progress", "."))
    }


def test_a_killed_study_keeps_what_is_finished(
    world: SimpleNamespace, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = small_profile(validation_scenes=3)  # other work than the study's
    other = profile.model_copy(update={"name": "smoke-killed"})
    shutil.copytree(
        run_root(profile), run_root(other), ignore=shutil.ignore_patterns("rivals", ".*.lock")
    )
    train = rivals.train_gan

    def stops(*arguments: Any) -> Any:
        if arguments[3] == "3":
            raise KeyboardInterrupt
        return train(*arguments)

    rivals.ensure(other, "course", "sdedit")
    root = run_root(other) / "rivals" / "course"
    monkeypatch.setattr(rivals, "train_gan", stops)
    with pytest.raises(KeyboardInterrupt):
        rivals.ensure(other, "course", "cut")
    before = {name: stamps(root / name) for name in ("sdedit", "denoiser", "cut")}
    assert {f"weights/{i}/config.json" for i in range(3)} <= set(before["cut"])
    assert "provenance.json" not in before["cut"]
    trained: list[str] = []

    def counts(*arguments: Any) -> Any:
        trained.append(arguments[3])
        return train(*arguments)

    monkeypatch.setattr(rivals, "train_gan", counts)
    rivals.ensure(other, "course", "sdedit")
    run = rivals.ensure(other, "course", "cut")
    assert trained == ["3", "4", "5", "final"]
    assert len(run.trials) == budgets.TRIALS
    after = {name: stamps(root / name) for name in before}
    for name, files in before.items():
        assert {path: after[name][path] for path in files} == files
    # Other settings are other work: nothing of it is kept.
    more = other.model_copy(update={"rivals": small_profile(validation_scenes=1).rivals})
    rivals.ensure(more, "course", "colour")
    assert rivals.ensure(other, "course", "cut").key == run.key


# ---- tomjerry translate ------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    save_image(tmp_path / "a.png", tiny.pictures("cartoon", 1)[0])
    return tmp_path / "a.png"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_translator(tiny.tiny_translator(), tmp_path_factory.mktemp("weights"))


def command(source: Path, out: Path, weights: Path, method: str) -> int:
    given = ["translate", str(source), "--out", str(out), "--method", method, "--class", "tom"]
    return main([*given, "--weights", str(weights), "--profile", "smoke"])


@pytest.mark.parametrize("method", gans.KINDS)
def test_a_gan_of_the_study_translates(
    method: str,
    table: Any,
    world: SimpleNamespace,
    picture: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = np.concatenate(list(tiny.pictures("cartoon", 2)), 1)
    save_image(tmp_path / "wide.png", wide)
    assert command(picture, tmp_path / "out", weights, method) == 0
    # The larger budget's, as it has both.
    folder = run_root(world.variants[0]) / "rivals" / "total" / method / "weights" / "final"
    assert str(folder) in capsys.readouterr().err
    made = load_image(tmp_path / "out" / "a.png")
    expected = gans.load_gan(folder).translate(load_image(picture)[None])[0]
    assert np.array_equal(made, expected) and not np.array_equal(made, load_image(picture))
    assert command(tmp_path / "wide.png", tmp_path / "out", weights, method) == 0
    assert load_image(tmp_path / "out" / "wide.png").shape == wide.shape


def test_a_diffusion_rival_is_what_the_study_left(
    table: Any, world: SimpleNamespace, picture: Path, weights: Path, tmp_path: Path
) -> None:
    assert command(picture, tmp_path / "tuned", weights, "egsde") == 0
    found = rivals.find(world.variants[0], "egsde", world.translators[0])
    assert found.setting == table["methods"]["course"]["egsde"]["setting"]
    assert found.expert is not None and found.model is not None
    assert rivals.find(world.variants[0], "sdedit", world.translators[0]).expert is None
    cartoons = tiny.pictures("cartoon", 2)
    whole, _ = found.translate(cartoons, ["tom"] * 2, seed=0)
    found.expert = None
    alone, _ = found.translate(cartoons, ["tom"] * 2, seed=0)
    assert not np.array_equal(whole, alone)


def test_without_a_study_stage_04_or_the_translator_lends_its_denoiser(
    world: SimpleNamespace,
    picture: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = world.stages[1].folder
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "runs"))
    assert command(picture, tmp_path / "own", weights, "ddib") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "DDIB" in line]
    assert len(said) == 1 and "the translator's own denoiser" in said[0]
    shutil.copytree(stage, tmp_path / "runs" / "smoke" / ldm.STAGE)
    assert command(picture, tmp_path / "lent", weights, "ddib") == 0
    assert str(tmp_path / "runs" / "smoke" / ldm.STAGE) in capsys.readouterr().err
    pictures = [load_image(tmp_path / name / "a.png") for name in ("own", "lent")]
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("method", gans.KINDS)
def test_a_gan_that_nobody_trained_is_named_with_its_command(
    method: str,
    picture: Path,
    weights: Path,
    tmp_path: Path,
    fresh_runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(picture, tmp_path / "out", weights, method) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"nobody has trained {gans.TITLES[method]}" in line
    assert "`tomjerry study rivals --profile smoke`" in line
    assert not (tmp_path / "out").exists()
