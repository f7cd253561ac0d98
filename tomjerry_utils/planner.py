"""Which settings let each training of the course fit a graphics card, and how long it will take.

Memory is counted, not guessed: weights, gradients, Adam's moments and averages from the models'
configurations, and what else lives at a step's fullest moment by following that step on tensors
without numbers (:mod:`tracing`). It is affine in the batch at every moment, so that two small
batches tell of any. Time is floating-point operations over a share of the card's peak: an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tomjerry_utils import UserError, tracing
from tomjerry_utils.memory import GIB, Memory
from tomjerry_utils.profiles import Profile
from tomjerry_utils.runs import log
from tomjerry_utils.workloads import Training, Variant, trainings

CONTEXT = 0.75  # GiB that CUDA itself, cuBLAS and cuDNN hold beside torch's tensors
FRAGMENTED = 0.05  # of a step's memory, on top: what the allocator holds and cannot use
UTILISATION = 0.35  # share of the peak that a training reaches; assumed, not measured
LORA_RANK = 16  # proposed where training all weights does not fit


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        memory: GiB that torch reports as its total, the least among the class.
        fp32, bf16: peak TFLOP/s of NVIDIA's data sheets, tensor cores for bf16 (dense, fp32 sums);
            0 where it has no bf16.
        also: other names.
    """

    name: str
    memory: float
    fp32: float
    bf16: float
    also: tuple[str, ...] = ()


# Memory is what "GPU 0 has a total capacity of …" says in torch's errors on these cards.
CARDS = (
    Card("T4", 14.56, 8.1, 0.0),
    # The least of each: an A10 has the least memory, an RTX 3090 the least bf16, an A10 fp32.
    Card("24GB", 21.96, 31.2, 71.0, ("RTX 3090", "RTX 4090", "3090", "4090", "A10")),
    Card("A40", 44.34, 37.4, 149.7),
    Card("A100-40", 39.38, 19.5, 312.0, ("A100-40GB", "A100 40GB")),
    Card("A100-80", 79.14, 19.5, 312.0, ("A100", "A100-80GB", "A100 80GB")),
    Card("H100", 79.10, 51.0, 756.0, ("H100-80", "H100-80GB", "H100 80GB")),  # PCIe, the slower
)


@dataclass(frozen=True)
class Plan:
    """How a training is run on a card.

    Attributes:
        memory: of a step; :attr:`needed` adds what is not torch's.
        hours: of the training, an estimate; `ablation_hours` of stage 05's ablation.
        fits: whether the card holds it; where not, this is the least that it can be.
        advice: what would fit, where this does not.
    """

    training: Training
    card: Card
    variant: Variant
    batch: int
    accumulation: int
    second: int
    memory: Memory
    hours: float
    ablation_hours: float
    fits: bool
    advice: str = ""

    @property
    def needed(self) -> float:
        """GiB of the card."""
        return self.memory.total / GIB * (1 + FRAGMENTED) + CONTEXT


def find_card(name: str) -> Card:
    """A card by name; capitals, spaces and dashes do not count.

    Raises:
        UserError: no such card.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for card in CARDS:
        if plain(name) in map(plain, (card.name, *card.also)):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise UserError(f"no card '{name}' is known: give --card one of {known}")


class Planner:
    """Plans at one profile; what was traced is kept for the next card."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.trainings = trainings(profile)
        self.static: dict[Any, tuple[int, int]] = {}
        self.traces: dict[Any, tuple[tracing.Trace, ...]] = {}
        self.smaller: dict[int, Planner] = {}

    def plan(self, card: Card) -> list[Plan]:
        """The best plan for each training of the profile, in order.

        One switch, `ldm.gradient_checkpointing`, serves two trainings: both have it if one must.
        """
        plans = [self.choose(training, card) for training in self.trainings]
        shared = [p for p in plans if p.fits and p.training.checkpointing is not None]
        if len({p.variant.checkpointing for p in shared}) > 1:
            plans = [
                self.choose(p.training, card, checkpointing=True) if p in shared else p
                for p in plans
            ]
        return plans

    def choose(self, training: Training, card: Card, *, checkpointing: bool | None = None) -> Plan:
        """The plan that costs the least time and changes the least of what is learnt.

        The profile's own settings where they fit; else smaller batches, averaged over more of
        them; then gradient checkpointing, which
        computes more; then adapters, which learn less.
        """
        for variant in self._variants(training, card, checkpointing):
            if self._lowest(training, variant) > self._room(card):
                continue  # not even without a batch: no need to follow a step
            for batch in _parts(training):
                plan = self.at(training, card, variant, batch)
                if plan.fits:
                    return plan
        variant = list(self._variants(training, card, checkpointing))[-1]
        least = self.at(training, card, variant, min(_parts(training)))
        return replace(least, advice=self._advice(least))

    def at(self, training: Training, card: Card, variant: Variant, batch: int) -> Plan:
        """What a training needs with these settings and so many pictures at once."""
        whole = training.batch * training.accumulation
        accumulation = whole // batch
        second = _share(training, batch)
        memory, flops = self.need(training, variant, batch, accumulation, second)
        peak = card.bf16 if variant.precision == "bf16" else card.fp32
        hours = flops * accumulation / (peak * 1e12 * UTILISATION) / 3600
        plan = Plan(
            training,
            card,
            variant,
            batch,
            accumulation,
            second,
            memory,
            hours * training.steps,
            hours * training.ablation,
            fits=False,
        )
        return replace(plan, fits=plan.needed <= card.memory)

    def need(
        self, training: Training, variant: Variant, batch: int, accumulation: int, second: int
    ) -> tuple[Memory, float]:
        """A step's memory at its fullest, and the operations of one of its batches."""
        weights, trained = self._static(training, variant)
        here = _extrapolate(self._traced(training, variant), batch, second)
        peak = here.peak(accumulated=accumulation > 1)
        averaged = training.averaged
        return Memory(
            weights=weights,
            gradients=trained,
            moments=2 * trained,
            average=trained if averaged else 0,
            activations=max(0, math.ceil(peak - trained)),
        ), here.flops

    def _variants(
        self, training: Training, card: Card, checkpointing: bool | None
    ) -> Iterator[Variant]:
        precision = self.profile.precision if card.bf16 else "fp32"
        own = bool(training.checkpointing)
        switches = [own] if own or training.checkpointing is None else [False, True]
        if checkpointing is not None:
            switches = [checkpointing]
        ranks = [training.lora_rank or 0]
        if training.lora_rank == 0:
            ranks.append(LORA_RANK)
        for rank in ranks:
            for switch in switches:
                yield Variant(rank, switch, precision)

    def _room(self, card: Card) -> float:
        return (card.memory - CONTEXT) / (1 + FRAGMENTED) * GIB

    def _lowest(self, training: Training, variant: Variant) -> int:
        weights, trained = self._static(training, variant)
        return weights + (4 if training.averaged else 3) * trained

    def _static(self, training: Training, variant: Variant) -> tuple[int, int]:
        """Bytes of all weights there, and of those that are trained."""
        key = training.name, variant.lora_rank
        if key not in self.static:
            with torch.device("meta"):
                work = training.make(variant)
            self.static[key] = (
                tracing.bytes_of([*work.trained, *work.beside]),
                tracing.bytes_of(work.trained, trained=True),
            )
        return self.static[key]

    def _traced(self, training: Training, variant: Variant) -> tuple[tracing.Trace, ...]:
        key = training.name, variant
        if key not in self.traces:
            log(f"{training.name}: following a step ({_said(variant)})")
            with torch.device("meta"):
                work = training.make(variant)
            modules = [*work.trained, *work.beside]
            sizes = [(4, 2), (5, 2), (5, 3)] if training.second else [(4, 0), (5, 0)]
            with tracing.fake(modules):
                self.traces[key] = tuple(
                    tracing.trace(
                        lambda size=size: work.loss(*size),  # type: ignore[misc]
                        modules,
                        precision=variant.precision,
                    )
                    for size in sizes
                )
        return self.traces[key]

    def _advice(self, plan: Plan) -> str:
        """The smallest card and the largest picture that would do."""
        ways = []
        larger = sorted((c for c in CARDS if c.memory > plan.card.memory), key=lambda c: c.memory)
        for card in larger:
            if self.would_fit(plan.training, card):
                ways.append(f"a card of the class {card.name}")
                break
        size = self.profile.image_size // 2
        if size >= 64 and plan.training.name != "03 BLIP":
            if size not in self.smaller:
                self.smaller[size] = Planner(self.profile.model_copy(update={"image_size": size}))
            if self.smaller[size].would_fit(plan.training, plan.card):
                ways.append(f"image_size: {size}")
        if plan.training.name in ("04 decoder", "04, 05 finishing"):
            key = plan.training.batch_key.replace("batch_size", "steps")
            ways.append(f"{key}: 0, which leaves it out")
        return " or ".join(ways) or "no card known here"

    def would_fit(self, training: Training, card: Card) -> bool:
        """Whether the settings that need least would do; no words about what else would."""
        [training] = [t for t in self.trainings if t.name == training.name]
        least = list(self._variants(training, card, None))[-1]
        if self._lowest(training, least) > self._room(card):
            return False
        return self.at(training, card, least, min(_parts(training))).fits


def _parts(training: Training) -> list[int]:
    """Batches that make the profile's, as often as needed: its own, then from the largest down."""
    whole = training.batch * training.accumulation
    least = min(training.smallest, training.batch)
    parts = [n for n in range(whole, 0, -1) if whole % n == 0 and n >= least]
    return sorted(parts, key=lambda n: n != training.batch)


def _share(training: Training, batch: int) -> int:
    """The second part of a smaller batch, in proportion; at least one where there is any."""
    if not training.second:
        return 0
    return max(1, round(training.second * batch / training.batch))


def _extrapolate(traces: Sequence[tracing.Trace], batch: int, second: int) -> tracing.Trace:
    """Any batch from those that were followed, moment by moment."""
    first, more = traces[0], traces[1]
    found = first.plus(more, batch - 4).plus(first, 4 - batch)
    if len(traces) > 2:
        found = found.plus(traces[2], second - 2).plus(more, 2 - second)
    return found


# ---- what is said ------------------------------------------------------------------------------


def _said(variant: Variant) -> str:
    how = f"LoRA {variant.lora_rank}" if variant.lora_rank else "all weights"
    return f"{how}{', checkpointing' if variant.checkpointing else ''}, {variant.precision}"


def report(profile: Profile, cards: Sequence[Card]) -> str:
    """A table for each card, and the lines to set in the profile where they differ."""
    planner = Planner(profile)
    blocks = [
        f"profile {profile.name}, {profile.image_size} px. GiB at a step's fullest, counted on the "
        f"models' configurations; + {FRAGMENTED:.0%} for the allocator + {CONTEXT} GiB for CUDA = "
        f"needed. Hours are ESTIMATES: operations at {UTILISATION:.0%} of the card's peak."
    ]
    blocks += [_block(profile, card, planner.plan(card)) for card in cards]
    return "\n\n".join(blocks)


COLUMNS = (
    "training", "batch", "trained", "ckpt", "weights", "grads", "Adam", "average", "rest",
    "needed", "hours",
)  # fmt: skip


def _block(profile: Profile, card: Card, plans: Sequence[Plan]) -> str:
    rows = [COLUMNS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [f"{card.name}: {card.memory:.1f} GiB, {plans[0].variant.precision}"]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    for plan in plans:
        if not plan.fits:
            lines.append(
                f"  {plan.training.name} does not fit: at its least it needs {plan.needed:.1f} GiB "
                f"of {card.memory:.1f}. What would: {plan.advice}"
            )
    set_ = changes(profile, plans)
    lines.append("  set in the profile:" if set_ else "  the profile's settings fit as they are")
    lines += [f"    {key}: {str(value).lower()}" for key, value in set_.items()]
    return "\n".join(lines)


def _row(plan: Plan) -> tuple[str, ...]:
    memory = plan.memory
    parts = (memory.weights, memory.gradients, memory.moments, memory.average, memory.activations)
    hours = f"{plan.hours:.1f}"
    if plan.ablation_hours:
        hours += f" + {plan.ablation_hours:.1f} ablation"
    return (
        plan.training.name,
        f"{plan.batch} x {plan.accumulation}",
        f"LoRA {plan.variant.lora_rank}" if plan.variant.lora_rank else "all",
        "on" if plan.variant.checkpointing else "-",
        *(f"{value / GIB:.2f}" for value in parts),
        f"{plan.needed:.1f}" + ("" if plan.fits else " TOO MUCH"),
        hours if plan.fits else "-",
    )


def changes(profile: Profile, plans: Sequence[Plan]) -> dict[str, Any]:
    """Keys of the profile, with values, that the plans that fit ask to be other than they are."""
    wanted: dict[str, Any] = {}
    for plan in plans:
        if not plan.fits:
            continue
        training, variant = plan.training, plan.variant
        wanted["precision"] = variant.precision
        wanted[training.batch_key] = plan.batch
        wanted[training.accumulation_key] = plan.accumulation
        if training.second_key and training.second:
            wanted[training.second_key] = plan.second
        if training.lora_rank is not None and training.lora_rank != variant.lora_rank:
            section = training.batch_key.partition(".")[0]
            wanted[f"{section}.lora_rank"] = variant.lora_rank
        if training.checkpointing is not None:
            wanted["ldm.gradient_checkpointing"] = variant.checkpointing
    return {key: value for key, value in wanted.items() if value != _now(profile, key)}


def _now(profile: Profile, key: str) -> Any:
    value: Any = profile
    for name in key.split("."):
        value = getattr(value, name)
    return value
