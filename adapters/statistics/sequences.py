"""Confidence sequences: intervals of which all hold at once with the stated probability, however often one looks.

The functions of arrays are what the simulator in `benchmarks/experiments.py` runs; those of values are their scalar
case. docs/statistics.md derives them in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from adapters.statistics.intervals import Interval

__all__ = [
    "DEFAULT_PLANNED_UNITS",
    "MIN_UNITS",
    "ArmMoments",
    "difference_margin",
    "difference_p_value",
    "difference_sequence",
    "log_evidence",
    "mean_margin",
    "mean_sequence",
    "mixture_multiplier",
    "tuned_time",
]

DEFAULT_PLANNED_UNITS = 10_000
MIN_UNITS = 10

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArmMoments:
    """Number of units, mean and sample variance (divisor n - 1) of an arm; arrays of one shape where there are many."""

    count: Any
    mean: Any
    variance: Any

    @classmethod
    def of(cls, values: Sequence[float]) -> ArmMoments:
        """The moments of one value per unit, at least one; the variance of a single unit is 0."""
        return cls(len(values), float(np.mean(values)), float(np.var(values, ddof=1)) if len(values) > 1 else 0.0)


def difference_sequence(
    treatment: Sequence[float],
    control: Sequence[float],
    *,
    confidence: float = 0.95,
    planned_units: float = DEFAULT_PLANNED_UNITS,
) -> Interval | None:
    """Interval for mean(treatment) - mean(control) that holds at every look at once with probability `confidence`.

    Args:
        treatment: One number per unit; units must be independent.
        control: Likewise.
        confidence: Two-sided, over all looks together.
        planned_units: Units of both arms together at which the interval is made tightest; fix it before the first
            look. A wrong plan costs width, never validity.

    Returns:
        None below `MIN_UNITS` an arm, where an arm does not vary, or as long as nothing is excluded at all.
    """
    if min(len(treatment), len(control)) < MIN_UNITS:
        return None
    first, second = ArmMoments.of(treatment), ArmMoments.of(control)
    margin = float(difference_margin(first, second, confidence=confidence, planned_units=planned_units))
    if not math.isfinite(margin):
        return None
    estimate = first.mean - second.mean
    return Interval(estimate, estimate - margin, estimate + margin, confidence)


def difference_p_value(
    treatment: Sequence[float],
    control: Sequence[float],
    *,
    confidence: float = 0.95,
    planned_units: float = DEFAULT_PLANNED_UNITS,
) -> float:
    """A p-value for "no difference" that may be looked at after every unit; 1 where there is no interval yet.

    At most 1 - confidence exactly where `difference_sequence` with the same arguments excludes zero.
    """
    if difference_sequence(treatment, control, confidence=confidence, planned_units=planned_units) is None:
        return 1.0
    first, second = ArmMoments.of(treatment), ArmMoments.of(control)
    spread, freedom = _welch(first, second)
    time = _time(_balanced_units(first.count, second.count), confidence, planned_units)
    ratio = (first.mean - second.mean) ** 2 / spread
    return float(min(1.0, np.exp(-log_evidence(ratio, time, freedom))))


def mean_sequence(
    values: Sequence[float], *, confidence: float = 0.95, planned_units: float = DEFAULT_PLANNED_UNITS
) -> Interval | None:
    """Interval for the mean of one value per unit that holds at every look at once; None as `difference_sequence`."""
    if len(values) < MIN_UNITS:
        return None
    moments = ArmMoments.of(values)
    margin = float(mean_margin(moments, confidence=confidence, planned_units=planned_units))
    if not math.isfinite(margin):
        return None
    return Interval(moments.mean, moments.mean - margin, moments.mean + margin, confidence)


def difference_margin(treatment: ArmMoments, control: ArmMoments, *, confidence: float, planned_units: float) -> _Array:
    """Half the width of the sequence for a difference of means, elementwise; infinite where there is none yet."""
    spread, freedom = _welch(treatment, control)
    time = _time(_balanced_units(treatment.count, control.count), confidence, planned_units)
    margin = np.sqrt(spread) * mixture_multiplier(time, freedom, confidence)
    enough = (np.minimum(treatment.count, control.count) >= MIN_UNITS) & _both_vary(treatment, control)
    return np.where(enough, margin, np.inf)


def mean_margin(moments: ArmMoments, *, confidence: float, planned_units: float) -> _Array:
    """Half the width of the sequence for a mean, elementwise; infinite where there is none yet."""
    count = np.asarray(moments.count, dtype=float)
    time = _time(count, confidence, planned_units)
    margin = np.sqrt(moments.variance / count) * mixture_multiplier(time, np.maximum(count - 1, 1), confidence)
    return np.where((count >= MIN_UNITS) & (np.asarray(moments.variance) > 0), margin, np.inf)


def tuned_time(confidence: float) -> float:
    """The intrinsic time at which the boundary is tightest: x with log((1 + x) / alpha^2) = x, 8.21 for 0.95.

    Source: Waudby-Smith et al. (2024), Annals of Statistics 52:2613, section B.2; solved by Lambert's W.
    """
    alpha = 1 - confidence
    return float(-special.lambertw(-(alpha**2) / math.e, -1).real - 1)


def mixture_multiplier(time: Any, freedom: Any, confidence: float) -> _Array:
    """How many standard errors the boundary lies from the estimate; infinite where nothing can be excluded yet.

    With infinite freedom it is the Gaussian mixture boundary of Robbins, sqrt((1 + x) / x * log((1 + x) / alpha^2)),
    which asymptotic confidence sequences use; with finite freedom its counterpart for an estimated variance, which is
    exact for Gaussian values of equal variance.

    Args:
        time: Intrinsic time x: information about the mean relative to the mixture's, above 0.
        freedom: Degrees of freedom of the variance estimate, above 0.
        confidence: Two-sided, over all looks.

    Source: Gonen et al. (2005), The American Statistician 59:252, inverted; Waudby-Smith et al. (2024), eq. 9.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        excess = np.expm1((np.log1p(time) - 2 * math.log(1 - confidence)) / (np.asarray(freedom) + 1))
        ratio = (1 + time) * excess / (time - excess)
        return np.sqrt(np.where(excess < time, freedom * ratio, np.inf))


def log_evidence(ratio: Any, time: Any, freedom: Any) -> _Array:
    """Log of the Bayes factor against a mean difference of 0, whose inverse is a p-value valid at every look.

    Args:
        ratio: Squared estimate over squared standard error.
        time: Intrinsic time, as in `mixture_multiplier`.
        freedom: Degrees of freedom of the variance estimate.
    """
    gain = np.log1p(ratio / freedom) - np.log1p(ratio / freedom / (1 + time))
    return np.asarray((freedom + 1) / 2 * gain - np.log1p(time) / 2)


def _time(units: Any, confidence: float, planned_units: float) -> Any:
    return tuned_time(confidence) * units / planned_units


def _balanced_units(first: Any, second: Any) -> _Array:
    """How many units, half in each arm, would tell as much: the clock of information, also when shares move."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    return np.asarray(4 * first * second / np.maximum(first + second, 1))


def _both_vary(treatment: ArmMoments, control: ArmMoments) -> NDArray[np.bool_]:
    return (np.asarray(treatment.variance) > 0) & (np.asarray(control.variance) > 0)


def _welch(treatment: ArmMoments, control: ArmMoments) -> tuple[_Array, _Array]:
    """Squared standard error of the difference, and Satterthwaite's degrees of freedom."""
    first_count, second_count = (np.asarray(arm.count, dtype=float) for arm in (treatment, control))
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = treatment.variance / first_count, control.variance / second_count
        spread = first + second
        shares = (first / spread) ** 2 / (first_count - 1) + (second / spread) ** 2 / (second_count - 1)
        freedom = 1 / shares
    return spread, np.where(np.isfinite(freedom), freedom, 1.0)
