"""The study "ablation": its rows, what of them outlives a run, chance, oracle and intervals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from tomjerry_utils import ablation, ablation_rows, ldm, scenes, study, transfer
from tomjerry_utils.ablation_rows import PROBES, SCORES, WHOLE, Start
from tomjerry_utils.denoiser import make_scheduler
from tomjerry_utils.kept_parts import Part
from tomjerry_utils.profiles import Profile, load_profile
from tomjerry_utils.runs import read_json, write_json

SMOKE = load_profile("smoke")
N = 40


def changed(profile: Profile, **transfer_: Any) -> Profile:
    options = profile.transfer.model_copy(update=transfer_)
    return profile.model_copy(update={"transfer": options})


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "mini", "paper"])
def test_every_training_differs_and_no_swept_setting_is_trained_twice(name: str) -> None:
    profile = load_profile(name)
    found = ablation_rows.rows(profile)
    assert list(found)[: len(transfer.ABLATION)] == list(transfer.ABLATION)
    learnt = [
        (row.base, *({"blip_variant": profile.transfer.blip_variant,
                      "blip_weight": profile.transfer.blip_weight} | dict(row.changes)).values())
        for row in found.values()
    ]  # fmt: skip
    assert len(set(learnt)) == len(found)
    variants = {variant for base, variant, _ in learnt if base == WHOLE}
    assert variants == {"vision", "contrastive", "matching", "likelihood"}
    by_weight = ablation_rows.weighted(profile)
    assert set(by_weight) >= set(ablation_rows.WEIGHTS) and list(by_weight) == sorted(by_weight)
    assert by_weight[0.0] == "+ posture" and by_weight[profile.transfer.blip_weight] == WHOLE
    for weight, row in by_weight.items():
        if row not in transfer.ABLATION:
            assert dict(found[row].changes) == {"blip_weight": weight}
    assert len({ablation_rows.slug(row) for row in found}) == len(found)


def test_guidance_is_swept_in_the_finished_method_alone() -> None:
    for name, row in ablation_rows.rows(SMOKE).items():
        own = {"guidance_scale": SMOKE.transfer.guidance_scale, "blip_guidance": 0.0}
        assert row.points[0] == own
        assert len(row.points) == (6 if name == WHOLE else 1), name
    swept = ablation_rows.rows(SMOKE)[WHOLE].points
    assert {p["guidance_scale"] for p in swept} == set(ablation_rows.SCALES)
    assert {p["blip_guidance"] for p in swept} == set(ablation_rows.STRENGTHS)
    assert all({**swept[0], **more} in swept for more in ablation.GUIDED.values())


def test_facts_name_what_a_row_depends_on_and_nothing_else() -> None:
    own = ablation_rows.facts(SMOKE, WHOLE)
    assert ablation_rows.facts(changed(SMOKE, ablation_steps=9, finishing_steps=9), WHOLE) == own
    other = SMOKE.model_copy(update={"name": "other", "device": "cpu", "threads": 3})
    assert ablation_rows.facts(other, WHOLE) == own
    assert ablation_rows.facts(changed(SMOKE, steps=7), WHOLE) != own
    assert ablation_rows.facts(SMOKE.model_copy(update={"seed": 1}), WHOLE) != own
    every = [str(ablation_rows.facts(SMOKE, name)) for name in ablation_rows.rows(SMOKE)]
    assert len(set(every)) == len(every)


# ---- one row -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> Start:
    """A training seed whose stages 03 and 04 are models of random weights."""
    lent = tiny.tiny_translator()
    sets = {}
    for domain, labels in (("cartoon", ["tom", "jerry"]), ("natural", ["cat", "mouse"])):
        sets[domain], _ = ldm.latent_set(
            tiny.pictures(domain, 8), labels * 4, ["a cat is sitting", "a mouse is running"] * 4,
            vae=lent.vae, net=lent.net, describer=lent.describer, tone=None,
        )  # fmt: skip
    plain = tiny.tiny_translator(attention=None)
    before = SimpleNamespace(
        unet=plain.unet, conditioner=plain.conditioner, vae=lent.vae, key="tiny",
        scheduler=make_scheduler("sample"), cartoon=sets["cartoon"], natural=sets["natural"],
        posed=sets["natural"].views,
    )  # fmt: skip
    found = Start(SMOKE)
    # What is there already is not opened.
    found.__dict__.update(before=before, describer=lent.describer, nets=lent.posture)
    return found


def test_a_row_is_trained_with_its_own_term_and_read_under_each_guidance(
    start: Start, fresh_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = transfer.train_row

    def watched(before: Any, describer: Any, profile: Profile, **options: Any) -> Any:
        asked.append({"variant": profile.transfer.blip_variant, **options})
        return real(before, describer, profile, **options)

    monkeypatch.setattr(transfer, "train_row", watched)
    monkeypatch.setattr(ablation_rows, "training_pictures", lambda *_: tiny.pictures("natural", 4))
    record, arrays = ablation_rows.make(start, WHOLE)
    count = SMOKE.compare.test_scenes
    assert {name: values.shape for name, values in arrays.items()} == {
        "value": (6, 3, count),
        "chance": (6, 3, count),
    }
    assert all(values.min() >= 0 and values.max() <= 1 for values in arrays.values())
    assert record["steps"] == SMOKE.transfer.steps and len(record["scores"]) == 6
    # Guidance changes the pictures.
    assert len({score["realism"] for score in record["scores"]}) > 1
    ablation_rows.make(start, f"{WHOLE}, likelihood")
    ablation_rows.make(start, f"{WHOLE}, weight 1")
    blind, _ = ablation_rows.make(start, "no source")
    assert len(blind["scores"]) == 1
    assert [(a["variant"], a["blip_weight"], a["use_view"], a["source"]) for a in asked] == [
        ("vision", 0.1, True, "own"),
        ("likelihood", 0.1, True, "own"),
        ("vision", 1.0, True, "own"),
        ("vision", 0.0, False, "none"),
    ]
    assert len({a["folder"] for a in asked}) == 4


def test_what_ignores_its_source_is_at_chance_and_what_follows_it_is_not() -> None:
    rng = np.random.default_rng(0)
    classes = rng.choice(["tom", "jerry", "both"], 600).tolist()
    true = rng.integers(6, size=600)
    said = {"blind": rng.integers(6, size=600), "same": np.zeros(600, int), "follows": true}
    for name, words in said.items():
        found = ablation_rows.against(classes, [words[:, None] == true])
        value, chance = found["value"].mean(), found["chance"].mean()
        assert chance == pytest.approx(1 / 6, abs=0.05)
        assert value == pytest.approx(1.0 if name == "follows" else chance, abs=0.05)
        if name == "same":  # who always says one thing is right as often by chance
            assert value == pytest.approx(chance)
    # Knowing the class alone is no more than chance, as every row is told it.
    told = np.array(classes)[:, None] == np.array(classes)
    assert (ablation_rows.against(classes, [told])["chance"] == 1).all()


def test_the_oracle_reads_the_twins_of_the_cartoons(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(ablation, "read", lambda _, made: seen.append(made) or {"value": made})
    ablation._oracle(start)
    seeds = ablation_rows.cartoon_seeds(SMOKE)
    twins = scenes.render_many(seeds, "natural", SMOKE.image_size)["image"].astype(float)
    assert seen[0].shape == twins.shape == start.cartoons.shape
    away = np.array([[np.abs(twin - shown).mean() for shown in seen[0]] for twin in twins])
    assert (away.argmin(1) == np.arange(len(twins))).all()  # each in its cartoon's place
    assert away.diagonal().max() < 12 < np.abs(twins - start.cartoons).mean((1, 2, 3)).min()


# ---- the table ---------------------------------------------------------------------------------


def test_ablation_intervals_cover_the_mean_of_many_runs() -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        return [{"row": "no source", "steps": 3, "n": 48, **dict.fromkeys(PROBES, value)}]

    rng = np.random.default_rng(4)
    covered = []
    for _ in range(1000):
        found = rng.binomial(48, np.clip(rng.normal(0.6, 0.05, 3), 0, 1)) / 48
        row = ablation.ablation_table([rows(float(v)) for v in found])["no source"]["action"]
        covered.append(row["ci95"][0] <= 0.6 <= row["ci95"][1])
        assert row["value"] == pytest.approx(found.mean())
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_a_share_cover_the_share(seeds: int) -> None:
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(1000):
        hard = rng.random(96)  # a picture is as hard for every seed
        oracle = np.repeat(hard[None] < 0.95, seeds, 0).astype(float)
        kept = oracle * (rng.random((seeds, 96)) < 0.9)
        found = ablation._share(kept, oracle)
        assert found is not None
        covered.append(found["ci95"][0] <= 0.9 <= found["ci95"][1])
    assert np.mean(covered) >= 0.92
    assert ablation._share(np.ones((2, 4)), np.zeros((2, 4))) is None


def planted(start: Start, name: str) -> Part:
    """The catch at chance, all else at .9 of an oracle of 1, more with guidance."""
    row = ablation_rows.rows(start.profile)[name]
    value = np.ones((len(row.points), 3, N))
    value[:, :, : N // 10] = 0
    if name == ablation.CATCH:
        value[:, :, N // 4 :] = 0
        value[:, :, : N // 4] = 1
    value[-1, :, 0] = max(value[-1, 0, 0], float(len(row.points) > 1))
    scores = [dict.fromkeys(SCORES, 0.5 + 0.01 * start.profile.seed)] * len(row.points)
    record = {"steps": start.profile.transfer.steps, "loss": 0.1, "seconds": 2.0, "scores": scores}
    return record, {"value": value, "chance": np.full_like(value, 0.25)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, fresh_runs: Path) -> list[tuple[int, str]]:
    """Parts that are made at once; the list says which, in order."""
    asked: list[tuple[int, str]] = []

    def row(start: Start, name: str) -> Part:
        asked.append((start.profile.seed, name))
        return planted(start, name)

    def oracle(start: Start) -> Part:
        asked.append((start.profile.seed, "oracle"))
        return {}, {"value": np.ones((3, N)), "chance": np.full((3, N), 0.25)}

    def course(profile: Profile) -> Part:
        asked.append((profile.seed, "course"))
        values = dict.fromkeys(PROBES, 0.5)
        return {"rows": [{"row": r, "steps": 3, "n": 9, **values} for r in transfer.ABLATION]}, {}

    monkeypatch.setattr(ablation, "make", row)
    monkeypatch.setattr(ablation, "_oracle", oracle)
    monkeypatch.setattr(ablation, "_course", course)
    return asked


def test_a_killed_study_has_its_first_seed_and_goes_on_with_the_next(
    made: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch, fresh_runs: Path
) -> None:
    fake = ablation.make

    def killed(start: Start, name: str) -> Part:
        if (start.profile.seed, name) == (1, "ldm attention"):
            raise KeyboardInterrupt
        return fake(start, name)

    monkeypatch.setattr(ablation, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(SMOKE, ["ablation"])
    parts = ["oracle", *ablation_rows.rows(SMOKE), "course"]
    assert made[: len(parts)] == [(0, name) for name in parts]
    table = read_json(fresh_runs / "smoke" / "results" / "ablation.json")
    assert table["seeds"] == [0]
    assert table["missing"] == [f"{name}-seed{seed}" for seed in (1, 2) for name in parts]
    assert table["full"][WHOLE]["action"]["one_run95"] is None
    before = list(made)
    monkeypatch.setattr(ablation, "make", fake)
    study.run_study(SMOKE, ["ablation"])
    assert sorted(made) == sorted((seed, name) for seed in (0, 1, 2) for name in parts)
    assert made[len(before) :][0] == (1, "ldm attention")
    whole = read_json(fresh_runs / "smoke" / "results" / "ablation.json")
    assert whole["seeds"] == [0, 1, 2] and whole["missing"] == []
    assert len(whole["full"][WHOLE]["action"]["by_seed"]) == 3


def test_what_another_machine_has_made_is_not_missing(made: list[tuple[int, str]]) -> None:
    first, second, third = study.training_seeds(SMOKE)
    *_, _ = ablation.ablate_seeds([first, third])
    table = next(ablation.ablate_seeds([first, second, third]))
    assert table["seeds"] == [0]
    assert table["missing"] == [
        f"{n}-seed1" for n in ("oracle", *ablation_rows.rows(SMOKE), "course")
    ]


def test_the_table_is_made_again_where_nothing_has_run(
    made: list[tuple[int, str]], fresh_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = study.training_seeds(SMOKE)
    *_, first = ablation.ablate_seeds(variants)
    kept = fresh_runs / "smoke" / "results"
    assert {p.name for p in (kept / "ablation").glob("no_source-*")} == {
        f"no_source-seed{seed}.{kind}" for seed in (0, 1, 2) for kind in ("json", "npz")
    }
    moved = tmp_path / "elsewhere" / "smoke" / "results"
    moved.parent.mkdir(parents=True)
    kept.rename(moved)
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path / "elsewhere"))
    made.clear()
    *_, again = ablation.ablate_seeds(variants)
    assert made == [] and again == first
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["smoke"]
    # How long the course trains its rows says nothing of these.
    *_, _ = ablation.ablate_seeds([changed(SMOKE, ablation_steps=9)])
    assert made == [(0, "course")]


def test_the_table_sets_each_row_between_chance_and_oracle(
    made: list[tuple[int, str]], fresh_runs: Path
) -> None:
    *_, table = ablation.ablate_seeds(study.training_seeds(SMOKE))
    full = table["full"]
    assert list(full)[: len(transfer.ABLATION)] == list(transfer.ABLATION)
    assert list(full)[-2:] == list(ablation.GUIDED) and len(full) == len(transfer.ABLATION) + 5
    assert {row["steps"] for row in full.values()} == {SMOKE.transfer.steps}
    assert {row["steps"] for row in table["rows"].values()} == {3}
    for probe in PROBES:
        catch, fix = full[ablation.CATCH][probe], full[WHOLE][probe]
        low, high = catch["above_chance"]["ci95"]
        assert low < 0 < high and catch["from_chance"]["value"] == pytest.approx(0.0)
        assert catch["of_oracle"]["value"] == pytest.approx(0.25)
        assert fix["of_oracle"]["value"] == pytest.approx(0.9)
        assert fix["from_chance"]["value"] == pytest.approx((0.9 - 0.25) / 0.75)
        assert fix["above_chance"]["ci95"][0] > 0.5 and fix["chance"] == pytest.approx(0.25)
        assert table["oracle"][probe]["value"] == 1.0
    realism = full[WHOLE]["realism"]
    assert realism["by_seed"] == pytest.approx([0.5, 0.51, 0.52])
    assert realism["ci95"][0] < 0.5 and realism["ci95"][1] > 0.52
    sweeps = table["sweeps"]
    assert [row["setting"] for row in sweeps["blip_weight"]] == [0, 0.03, 0.1, 0.3, 1]
    assert sweeps["blip_weight"][0]["row"] == "+ posture"
    assert [row["setting"] for row in sweeps["guidance_scale"]] == [1, 1.5, 2, 3]
    assert [row["setting"] for row in sweeps["blip_guidance"]] == [0, 1, 5]
    # The planted gain is in the last point alone, BLIP guidance at its strongest.
    kept = [row["action"]["value"] for row in sweeps["blip_guidance"]]
    assert kept == pytest.approx([0.9, 0.9, 0.9 + 1 / N])
    assert table["trained_seconds"]["2"][WHOLE] == 2.0


def test_rows_and_sweeps_are_drawn_without_a_run(
    made: list[tuple[int, str]], tmp_path: Path, fresh_runs: Path
) -> None:
    (path,) = study.run_study(SMOKE, ["ablation"])
    table = read_json(path)
    for seeds in ("all", "one"):  # with one seed, realism has no interval
        if seeds == "one":
            for rows in table["sweeps"].values():
                for row in rows:
                    row["realism"]["ci95"] = row["faithfulness"]["ci95"] = None
        write_json(tmp_path / "results" / "ablation.json", table)
        drawn = study.draw_results(tmp_path / "results")
        assert [path.stem for path in drawn] == [
            *(f"study_ablation_{probe}" for probe in PROBES), "study_ablation_sweeps",
        ]  # fmt: skip
        assert all(path.stat().st_size > 1000 for path in drawn)
    figure = ablation.sweeps_figure(table)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "weight λ of the BLIP term", "classifier-free guidance", "BLIP guidance",
    ]  # fmt: skip
    bold = [t.get_text() for t in figure.axes[0].get_xticklabels() if t.get_fontweight() == "bold"]
    assert bold == [f"{SMOKE.transfer.blip_weight:g}"]
