"""Simulated experiments, thousands at a time, each looked at after every unit, with the product's own formulas.

Arrays are [runs, looks]: look t is after t + 1 units (or requests, where units come back) in both arms together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from adapters.statistics.betting import Bets, share_evidence
from adapters.statistics.mixtures import MIN_UNITS, ArmMoments, difference_bounds, difference_evidence
from adapters.statistics.sample_ratio import log_mismatch_evidence
from adapters.statistics.sequences import EXACT_PART

__all__ = [
    "HEARD_LESS",
    "METRICS",
    "RARE_THEN_OFTEN",
    "Looks",
    "Metric",
    "Plan",
    "Value",
    "assign",
    "cumulative_moments",
    "family_errors",
    "find_exclusions",
    "find_mismatches",
    "find_peeks",
    "first_looks",
    "returning_units",
]

_Array = NDArray[np.float64]
_Flags = NDArray[np.bool_]
Value = Literal["first", "mean"]
Draw = Callable[[np.random.Generator, tuple[int, int]], _Array]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a unit's value is drawn from without treatment: ones with a rate, or what `draw` gives.

    `late_rate` is the rate of the last two fifths of the units, in both arms; `known_share` the part of the treatment's
    units whose outcome is ever known, where the control's all are.
    """

    name: str
    rate: float | None = None
    draw: Draw | None = None
    late_rate: float | None = None
    known_share: float = 1.0

    def values(self, generator: np.random.Generator, in_treatment: _Flags, effect: float = 0.0) -> _Array:
        """[runs, units] one value per unit; the treatment adds `effect` to the values, or to the rate."""
        if self.rate is not None:
            is_late = np.arange(in_treatment.shape[1]) >= 0.6 * in_treatment.shape[1]
            rate = np.where(is_late, self.rate if self.late_rate is None else self.late_rate, self.rate)
            return np.asarray(generator.random(in_treatment.shape) < rate + effect * in_treatment, dtype=float)
        assert self.draw is not None
        return self.draw(generator, (in_treatment.shape[0], in_treatment.shape[1])) + effect * in_treatment

    def known(self, generator: np.random.Generator, in_treatment: _Flags) -> _Flags | np.bool_:
        """[runs, units] whose outcome is ever known."""
        if self.known_share == 1:
            return np.True_
        return np.asarray(~in_treatment | (generator.random(in_treatment.shape) < self.known_share))


METRICS = (
    Metric("binary, p = 0.5", rate=0.5),
    Metric("binary, p = 0.05", rate=0.05),
    Metric("binary, p = 0.005", rate=0.005),
    Metric("Gaussian", draw=lambda generator, shape: generator.normal(size=shape)),
    Metric("skewed: lognormal, skewness 6", draw=lambda generator, shape: generator.lognormal(size=shape)),
    Metric("heavy-tailed: Student t3", draw=lambda generator, shape: generator.standard_t(3, size=shape)),
    Metric("heavy-tailed: Pareto 3", draw=lambda generator, shape: generator.pareto(3, size=shape)),
)
# What befalls both versions alike, as an outage does, or only seems to differ, since users of one are heard less often.
RARE_THEN_OFTEN = Metric("binary, p = 0.005, late 0.08", rate=0.005, late_rate=0.08)
HEARD_LESS = Metric("binary, p = 0.3, late 0.6, one arm reports 0.7 as often", rate=0.3, late_rate=0.6, known_share=0.7)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fixed before an experiment starts."""

    planned_units: float
    confidence: float = 0.95
    treatment_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Looks:
    """The moments of both arms at every look, and, for values 0 and 1, what the exact sequence counts."""

    treatment: ArmMoments
    control: ArmMoments
    ones: tuple[_Array, _Array] | None = None

    @classmethod
    def of(
        cls, values: _Array, in_treatment: _Flags, *, is_binary: bool, is_known: _Flags | np.bool_ = np.True_
    ) -> Looks:
        """What is known after each unit of `values` [runs, units], some of which may never be."""
        masks = in_treatment & is_known, ~in_treatment & is_known
        arms = [cumulative_moments(values, mask) for mask in masks]
        ones = (_in_order(values, masks[0]), _in_order(values, masks[1])) if is_binary else None
        return cls(arms[0], arms[1], ones)


def assign(generator: np.random.Generator, shape: tuple[int, int], treatment_share: float = 0.5) -> _Flags:
    """Each unit's arm, by chance: whether it is the treatment."""
    return np.asarray(generator.random(shape) < treatment_share)


def cumulative_moments(values: _Array, mask: _Flags) -> ArmMoments:
    """The moments of the masked values up to each look, [runs, looks]."""
    count, total = mask.astype(float), np.where(mask, values, 0.0)
    squares = total * total
    return _moments(*(np.cumsum(part, axis=1) for part in (count, total, squares, squares * total)))


def find_exclusions(looks: Looks, difference: float, plan: Plan) -> _Flags:
    """At which looks `difference_sequence` does not hold a difference."""
    if looks.ones is None:
        return _outside(looks, difference, plan, plan.confidence)
    exact_confidence = 1 - (1 - plan.confidence) * EXACT_PART
    asymptotic = _outside(looks, difference, plan, 1 - (1 - plan.confidence) * (1 - EXACT_PART))
    return asymptotic | _outside_exactly(looks, difference, plan, exact_confidence)


def find_peeks(looks: Looks, difference: float, confidence: float = 0.95) -> _Flags:
    """At which looks an ordinary z-test, from `MIN_UNITS` an arm on, rejects a difference."""
    treatment, control = looks.treatment, looks.control
    spread = treatment.variance / np.maximum(treatment.count, 1) + control.variance / np.maximum(control.count, 1)
    enough = (np.minimum(treatment.count, control.count) >= MIN_UNITS) & (spread > 0)
    distance = np.abs(treatment.mean - control.mean - difference)
    return np.asarray(enough & (distance > special.ndtri((1 + confidence) / 2) * np.sqrt(spread)))


def first_looks(flags: _Flags) -> NDArray[np.int64]:
    """The first flagged look of each run, counted from 1; the number of looks + 1 where there is none."""
    return np.asarray(np.where(flags.any(axis=1), flags.argmax(axis=1), flags.shape[1]) + 1)


def find_mismatches(
    generator: np.random.Generator, shape: tuple[int, int], *, true_share: float, alpha: float
) -> _Flags:
    """At which looks `sample_ratio` fires where half of the units should have been assigned to each arm."""
    first = np.cumsum(assign(generator, shape, true_share), axis=1)
    counts = np.stack([first, np.arange(1, shape[1] + 1) - first], axis=-1)
    return np.asarray(log_mismatch_evidence(counts, np.array([0.5, 0.5])) >= -math.log(alpha))


def family_errors(
    generator: np.random.Generator, shape: tuple[int, int], *, num_treatments: int, effect: float, plan: Plan
) -> dict[str, _Flags]:
    """Whether some treatment without effect was ever called different from control; only the last has one.

    By name of the rule: each comparison at the full level, Bonferroni's, and Holm's on p-values of one look.
    """
    arms = generator.integers(num_treatments + 1, size=shape)
    values = generator.normal(size=shape) + effect * (arms == num_treatments)
    control = cumulative_moments(values, arms == 0)
    evidence = np.stack(
        [
            difference_evidence(
                cumulative_moments(values, arms == arm),
                control,
                0.0,
                confidence=1 - (1 - plan.confidence) / num_treatments,
                planned_units=plan.planned_units,
            )
            for arm in range(1, num_treatments + 1)
        ]
    )
    level = -math.log(1 - plan.confidence)
    idle = evidence[:-1] if effect else evidence
    # Holm's second step, with one true difference: once it is found, the rest is held to a level for one fewer.
    found = evidence[-1] >= level + math.log(num_treatments)
    holm_level = np.where(found & bool(effect), math.log(num_treatments - 1), math.log(num_treatments)) + level
    return {
        "uncorrected": np.asarray((idle >= level).any(axis=(0, 2))),
        "Bonferroni": np.asarray((idle >= level + math.log(num_treatments)).any(axis=(0, 2))),
        "Holm": np.asarray((idle >= holm_level).any(axis=(0, 2))),
    }


def returning_units(
    generator: np.random.Generator, shape: tuple[int, int], *, new_share: float, concentration: float, value: Value
) -> Looks:
    """Looks after every request of units that come back: outcomes are beta-binomial with rate 0.3.

    Args:
        generator: Of random numbers.
        shape: Runs and requests.
        new_share: Probability that a request is of a unit that is new; otherwise it is of any earlier one.
        concentration: Of the Beta distribution of the units' own rates: small means that units differ much.
        value: A unit's "first" outcome, which never changes, or its "mean" so far.
    """
    runs, requests = shape
    rates = generator.beta(0.3 * concentration, 0.7 * concentration, size=shape)
    arms = assign(generator, shape).astype(int)
    totals, counts, rows = np.zeros(shape), np.zeros(shape), np.arange(runs)
    num_units = np.zeros(runs, dtype=np.int64)
    changes = np.zeros((4, 2, runs, requests))  # of the sums over units, by arm
    for step in range(requests):
        is_new = (generator.random(runs) < new_share) | (num_units == 0)
        unit = np.where(is_new, num_units, np.floor(generator.random(runs) * np.maximum(num_units, 1)).astype(np.int64))
        num_units += is_new
        outcome = generator.random(runs) < rates[rows, unit]
        before = _powers(totals[rows, unit], counts[rows, unit])
        counts_here = is_new if value == "first" else np.ones(runs, dtype=bool)
        totals[rows, unit] += outcome * counts_here
        counts[rows, unit] += counts_here
        changes[:, arms[rows, unit], rows, step] = _powers(totals[rows, unit], counts[rows, unit]) - before
    sums = np.cumsum(changes, axis=-1)
    return Looks(_moments(*sums[:, 1]), _moments(*sums[:, 0]))


def _powers(totals: _Array, counts: _Array) -> _Array:
    """[4, runs] what a unit adds to the number of units and to the sums of values, squares and cubes."""
    values = totals / np.maximum(counts, 1)
    return np.stack([counts > 0, values, values**2, values**3])


def _moments(count: _Array, total: _Array, squares: _Array, cubes: _Array) -> ArmMoments:
    safe = np.maximum(count, 1)
    mean, square = total / safe, squares / safe
    spread = square - mean**2
    spread = np.where(spread < 1e-12 * np.maximum(square, 1e-300), 0.0, spread)  # what is left by rounding
    third = cubes / safe - 3 * mean * square + 2 * mean**3
    return ArmMoments(count, mean, spread * safe / np.maximum(count - 1, 1), third)


def _outside(looks: Looks, difference: float, plan: Plan, confidence: float) -> _Flags:
    low, high = difference_bounds(
        looks.treatment, looks.control, confidence=confidence, planned_units=plan.planned_units
    )
    return np.asarray((low > difference) | (high < difference))


def _outside_exactly(looks: Looks, difference: float, plan: Plan, confidence: float) -> _Flags:
    assert looks.ones is not None
    bets = Bets.planned(confidence=confidence, planned_units=plan.planned_units, treatment_share=plan.treatment_share)
    arms = looks.treatment.count, looks.control.count
    counts = [np.zeros((*arms[0].shape, 2)) for _ in arms]  # [runs, looks, zeros and ones] in whole blocks
    strata = bets.strata(np.arange(arms[0].shape[1]))
    for stratum in np.unique(strata):
        places = np.flatnonzero(strata == stratum)
        before, there = zip(*(_in_stretch(count, places[0], places[-1]) for count in arms), strict=True)
        blocks = np.minimum(there[0] // bets.block[0], there[1] // bets.block[1])
        for side, ones, size, first in zip(counts, looks.ones, bets.block, before, strict=True):
            found = np.take_along_axis(ones, first + blocks * size, axis=1) - np.take_along_axis(ones, first, axis=1)
            side += np.stack([blocks * size - found, found], axis=-1)
    threshold = math.log(2 / (1 - confidence))
    sides = [
        share_evidence(np.array([0.0, 1.0]), counts[0], counts[1], difference, bets, side=side) for side in (1, -1)
    ]
    return np.asarray(np.maximum(*sides) >= threshold)


def _in_stretch(count: _Array, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many units of an arm came before a stretch, [runs, 1], and how many in it until each look, [runs, looks]."""
    before = count[:, first - 1 : first] if first else np.zeros((len(count), 1))
    there = np.maximum(np.minimum(count, count[:, last : last + 1]) - before, 0)
    return before.astype(np.int64), there.astype(np.int64)


def _in_order(values: _Array, mask: _Flags) -> _Array:
    """[runs, units + 1] the sum of the first n masked values, at place n."""
    sums: Any = np.zeros((values.shape[0], values.shape[1] + 1))
    places = np.cumsum(mask, axis=1, dtype=np.int64)
    np.put_along_axis(sums, places, np.cumsum(np.where(mask, values, 0.0), axis=1), axis=1)
    return np.asarray(sums)
