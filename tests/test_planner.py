"""Plans: what they predict is what a training takes, and what they choose fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tomjerry_utils import UserError, cli, planner, tracing, workloads
from tomjerry_utils.memory import GIB, Memory
from tomjerry_utils.planner import Card, Planner
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.workloads import Training, Variant

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.10

# Training, settings other than mini's. Small batches and large ones, with and without
# checkpointing; two batches into one step, where gradients lie there from the start.
CASES: list[dict[str, Any]] = [
    {"training": "04 denoiser", "ldm": {"batch_size": 8}},
    {"training": "04 denoiser", "ldm": {"batch_size": 20}},
    {"training": "04 denoiser", "ldm": {"batch_size": 8, "gradient_checkpointing": True}},
    {"training": "04 denoiser", "ldm": {"batch_size": 20, "gradient_checkpointing": True}},
    {"training": "04 denoiser", "ldm": {"batch_size": 8, "accumulation": 2}},
    {"training": "04 decoder", "ldm": {"autoencoder_batch_size": 12}},
    {"training": "03 BLIP", "blip": {"batch_size": 12, "label_batch_size": 6}},
    {"training": "05 translator", "transfer": {"batch_size": 8, "blip_batch_size": 4}},
]


@pytest.fixture(scope="module")
def measured() -> list[float]:
    """Peak bytes of each case, in processes of their own."""
    done = subprocess.run(
        [sys.executable, HERE / "measured_training.py"],
        input=json.dumps(CASES),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def mini() -> Planner:
    """What one case traces serves the others."""
    return Planner(load_profile("mini"))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_predicted_memory_is_what_a_training_takes(
    number: int, measured: list[float], mini: Planner
) -> None:
    case = CASES[number]
    settings = {k: v for name in ("blip", "ldm", "transfer") for k, v in case.get(name, {}).items()}
    [training] = [t for t in mini.trainings if t.name == case["training"]]
    batch = settings.get(training.batch_key.partition(".")[2])
    second = settings.get(training.second_key.partition(".")[2], 0)
    variant = Variant(checkpointing=settings.get("gradient_checkpointing", False))
    accumulation = settings.get("accumulation", 1)
    need, _ = mini.need(training, variant, batch, accumulation, second)
    total = need.total
    if training.name == "05 translator":
        # Stage 04's denoiser waits on the CPU: beside a GPU, but here among the rest.
        with torch.device("meta"):
            total += tracing.bytes_of(training.make(variant).trained[:1])
    assert total == pytest.approx(measured[number], rel=TOLERANCE)


def test_the_cases_tell_settings_apart(measured: list[float]) -> None:
    """A prediction that ignored the batch, checkpointing or accumulation would be off by more."""
    small, large, small_checked, large_checked, accumulated = measured[:5]
    assert large > 1.5 * small
    assert large_checked < large / 1.5
    assert small_checked < small / (1 + 2 * TOLERANCE)
    assert accumulated > small


def test_a_batch_never_followed_is_found_from_small_ones(mini: Planner) -> None:
    """Moment by moment, the trace of a batch of 11 is what those of 4 and 5 foretell."""
    [training] = [t for t in mini.trainings if t.name == "04 decoder"]
    found = planner._extrapolate(mini._traced(training, Variant()), 11, 0)
    with torch.device("meta"):
        work = training.make(Variant())
    modules = [*work.trained, *work.beside]
    with tracing.fake(modules):
        real = tracing.trace(lambda: work.loss(11, 0), modules)
    assert found.peak() == pytest.approx(real.peak(), rel=1e-3)
    assert found.flops == pytest.approx(real.flops, rel=1e-6)


# ---- choosing, with memory that can be worked out by hand


class ByHand(Planner):
    """1 GiB of weights; 8 of trained states, 1 with adapters; 2 a picture, 1 with checkpointing."""

    def need(
        self, training: Training, variant: Variant, batch: int, accumulation: int, second: int
    ) -> tuple[Memory, float]:
        each = 1 if variant.checkpointing else 2
        trained = (1 if variant.lora_rank else 8) * GIB
        return Memory(GIB, trained, 0, 0, each * batch * GIB), 1e15 * (3 - each)

    def _static(self, training: Training, variant: Variant) -> tuple[int, int]:
        return 0, 0


def by_hand(**changes: Any) -> tuple[ByHand, Training]:
    made = ByHand(load_profile("paper"))
    [training] = [t for t in made.trainings if t.name == "04 denoiser"]
    training = replace(training, batch=8, accumulation=1, **changes)
    made.trainings = [training]
    return made, training


def card_of(gib: float, bf16: float = 100.0) -> Card:
    """A card on which a step of so many GiB just fits."""
    return Card("test", (gib + 0.01) * (1 + planner.FRAGMENTED) + planner.CONTEXT, 10.0, bf16)


@pytest.mark.parametrize(
    ("gib", "batch", "checkpointing", "rank"),
    [
        (25, 8, False, 0),  # the profile's own
        (24, 4, False, 0),  # then smaller batches, averaged
        (11, 1, False, 0),
        (10, 1, True, 0),  # then checkpointing
        (9, 2, False, 16),  # then adapters
        (3, 1, True, 16),
    ],
)
def test_least_change_that_fits(gib: float, batch: int, checkpointing: bool, rank: int) -> None:
    made, training = by_hand()
    plan = made.choose(training, card_of(gib))
    assert plan.fits
    assert (plan.batch, plan.variant.checkpointing, plan.variant.lora_rank) == (
        batch, checkpointing, rank,
    )  # fmt: skip
    assert plan.batch * plan.accumulation == training.batch * training.accumulation
    set_ = planner.changes(load_profile("paper"), [plan])
    assert set_["ldm.batch_size"] == batch
    assert set_.get("ldm.gradient_checkpointing", False) == checkpointing
    assert set_.get("ldm.lora_rank", 0) == rank


def test_what_the_profile_asks_for_is_not_undone() -> None:
    made, training = by_hand(lora_rank=4, checkpointing=True)
    plan = made.choose(training, card_of(1000))
    assert plan.variant == Variant(4, True, "bf16")


def test_one_switch_serves_two_trainings() -> None:
    made, training = by_hand()
    other = replace(training, name="05 translator", batch_key="transfer.batch_size", batch=2)
    only = replace(other, smallest=2)  # 13 GiB without checkpointing, 11 with
    made.trainings = [training, only]
    plans = made.plan(card_of(11))
    assert [p.variant.checkpointing for p in plans] == [True, True]
    assert plans[0].batch == 2  # more room than without


def test_a_card_without_bfloat16_gets_fp32_and_is_slower() -> None:
    made, training = by_hand()
    old, new = (made.choose(training, card_of(100, bf16)) for bf16 in (0.0, 100.0))
    assert (old.variant.precision, new.variant.precision) == ("fp32", "bf16")
    assert old.hours == pytest.approx(10 * new.hours)
    assert planner.changes(load_profile("paper"), [old])["precision"] == "fp32"


def test_time_is_operations_over_a_share_of_the_peak() -> None:
    made, training = by_hand()
    plan = made.at(training, card_of(100), Variant(0, False, "bf16"), 4)
    seconds = training.steps * 2 * 1e15 / (100e12 * planner.UTILISATION)
    assert plan.hours == pytest.approx(seconds / 3600)


def test_what_would_fit_is_said_where_nothing_does() -> None:
    made, training = by_hand()
    made.smaller[256] = made  # which needs as much
    plan = made.choose(training, card_of(2.5))
    assert not plan.fits
    assert plan.batch == 1
    assert "a card of the class T4" in plan.advice  # the smallest, and it holds 3 GiB
    assert planner.changes(load_profile("paper"), [plan]) == {}
    text = planner._block(load_profile("paper"), plan.card, [plan])
    assert "TOO MUCH" in text
    assert "What would: a card of the class T4" in text


def test_second_part_keeps_its_share() -> None:
    [translator] = [t for t in workloads.trainings(load_profile("paper")) if t.second_key][1:]
    assert translator.name == "05 translator"
    shares = {n: planner._share(translator, n) for n in planner._parts(translator)}
    assert shares == {32: 8, 16: 4, 8: 2, 4: 1, 2: 1, 1: 1}


# ---- the command


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", ["a100", "A100 80GB", "rtx-4090", "t4"])
def test_cards_by_any_of_their_names(name: str) -> None:
    assert planner.find_card(name) in planner.CARDS


def test_unknown_card_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "--plan", "--card", "B9000", "--profile", "paper")
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert all(card.name in err for card in planner.CARDS)
    code, _, err = _run(capsys, "--card", "T4")
    assert code == 2
    assert "--card goes with --plan" in err


def test_the_table_names_each_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner, "Planner", ByHand)
    code, out, _ = _run(capsys, "--plan", "--card", "rtx 4090", "--profile", "paper")
    assert code == 0
    assert "ESTIMATES" in out
    paper = load_profile("paper")
    [row] = [line.split() for line in out.splitlines() if line.startswith("  04 denoiser")]
    batch, accumulation = int(row[2]), int(row[4])
    assert batch * accumulation == paper.ldm.batch_size * paper.ldm.accumulation
    assert batch < paper.ldm.batch_size
    parts, needed = sum(map(float, row[7:12])), float(row[12])
    assert needed == pytest.approx(parts * (1 + planner.FRAGMENTED) + planner.CONTEXT, abs=0.1)
    assert needed <= planner.find_card("24GB").memory
    assert f"    ldm.batch_size: {batch}\n" in out
    names = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  0")]
    assert names == [t.name for t in workloads.trainings(paper)]

    with pytest.raises(UserError, match="no card 'x'"):
        planner.find_card("x")
