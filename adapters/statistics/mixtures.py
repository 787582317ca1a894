"""The boundary of mixture sequences for means, and its evidence: functions of arrays, elementwise.

The simulator in `benchmarks/experiments.py` runs these very functions; docs/statistics.md derives them in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "MIN_UNITS",
    "ArmMoments",
    "difference_bounds",
    "difference_evidence",
    "mean_bounds",
    "mixture_multiplier",
    "tuned_time",
]

# Below this many units in an arm there is no interval: the variance and the skewness are not known well enough
# (`python -m benchmarks.experiments` shows what happens without it).
MIN_UNITS = 20
_ROUNDING = 1e-12  # of the largest value: what differs by less is equal

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArmMoments:
    """Units, mean, variance (divisor n - 1) and third central moment (divisor n); arrays of one shape for many arms."""

    count: Any
    mean: Any
    variance: Any
    third: Any

    @classmethod
    def of(cls, values: Sequence[float] | _Array) -> ArmMoments:
        """The moments of one value per unit, at least one; a single unit has variance 0, and so have equal ones."""
        array = np.asarray(values, dtype=float)
        # The mean of equal values is rounded: centred on it they would differ from it, all by the same, and an interval
        # of that width would exclude everything but rounding errors.
        if np.ptp(array) <= _ROUNDING * np.abs(array).max():
            return cls(len(array), float(array[0]), 0.0, 0.0)
        centred = array - array.mean()
        variance = float(centred @ centred) / max(len(array) - 1, 1)
        return cls(len(array), float(array.mean()), variance, float(np.mean(centred**3)))


def difference_bounds(
    treatment: ArmMoments, control: ArmMoments, *, confidence: float, planned_units: float
) -> tuple[_Array, _Array]:
    """Both ends of the sequence for mean(treatment) - mean(control); infinite where there is none.

    Args:
        treatment: Moments so far.
        control: Likewise.
        confidence: Two-sided, over all looks together.
        planned_units: Units of both arms at which it is tightest.

    Source: Waudby-Smith et al. (2024), Annals of Statistics 52:2613, with Student's mixture in place of the Gaussian
    one and Hall's (1992) first correction for skewness.
    """
    estimate, error, freedom = _welch(treatment, control)
    time = _time(treatment, control, confidence, planned_units)
    return _bounds(estimate, error, mixture_multiplier(time, freedom, confidence), _skewness(treatment, control))


def difference_evidence(
    treatment: ArmMoments, control: ArmMoments, difference: Any, *, confidence: float, planned_units: float
) -> _Array:
    """Log of the evidence against a true `difference`: `difference_bounds` exclude it where this is log(1 / alpha).

    The inverse of its exponential is a p-value that is valid at every look. Minus infinity where there is no interval.
    """
    estimate, error, freedom = _welch(treatment, control)
    time = _time(treatment, control, confidence, planned_units)
    distance = (estimate - difference) / error
    skewness = _skewness(treatment, control)
    against = np.where(distance < 0, np.maximum(skewness[1], 0), np.maximum(-skewness[0], 0))
    ratio = _uncorrected(np.abs(distance), against) ** 2 / freedom
    gain = np.log1p(ratio) - np.log1p(ratio / (1 + time))
    evidence = (freedom + 1) / 2 * gain - np.log1p(time) / 2
    return np.where(np.isfinite(error), evidence, -np.inf)


def mean_bounds(moments: ArmMoments, *, confidence: float, planned_units: float) -> tuple[_Array, _Array]:
    """Both ends of the sequence for one mean; infinite where there is none. `planned_units` are this arm's own."""
    count, variance = np.asarray(moments.count, dtype=float), np.asarray(moments.variance, dtype=float)
    known = (count >= MIN_UNITS) & (variance > 0)
    safe_count, safe_variance = np.where(known, count, 2.0), np.where(known, variance, 1.0)
    skewness = moments.third / safe_variance**1.5 / np.sqrt(safe_count)
    time = tuned_time(confidence) * safe_count / planned_units
    multiplier = mixture_multiplier(time, safe_count - 1, confidence)
    error = np.where(known, np.sqrt(safe_variance / safe_count), np.inf)
    return _bounds(np.asarray(moments.mean, dtype=float), error, multiplier, (skewness, skewness))


def tuned_time(confidence: float) -> float:
    """The intrinsic time at which the boundary is tightest: x with log((1 + x) / alpha^2) = x; 8.21 for 0.95.

    Source: Waudby-Smith et al. (2024), on tuning rho; solved by Lambert's W.
    """
    alpha = 1 - confidence
    return float(-special.lambertw(-(alpha**2) / math.e, -1).real - 1)


def mixture_multiplier(time: Any, freedom: Any, confidence: float) -> _Array:
    """How many standard errors the boundary lies from the estimate; infinite where nothing can be excluded yet.

    With infinite freedom it is Robbins' boundary, sqrt((1 + x) / x * log((1 + x) / alpha^2)), which asymptotic
    confidence sequences use; with finite freedom its counterpart for an estimated variance, exact for Gaussian values.

    Args:
        time: Intrinsic time x: the information so far, relative to that of the mixture; above 0.
        freedom: Degrees of freedom of the variance estimate; above 0.
        confidence: Two-sided, over all looks.

    Source: Gonen et al. (2005), The American Statistician 59:252, the Bayes factor solved for t.
    """
    freedom = np.asarray(freedom, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        excess = np.expm1((np.log1p(time) - 2 * math.log(1 - confidence)) / (freedom + 1))
        return np.sqrt(np.where(excess < time, freedom * (1 + time) * excess / (time - excess), np.inf))


def _bounds(
    estimate: _Array, error: _Array, multiplier: _Array, skewness: tuple[_Array, _Array]
) -> tuple[_Array, _Array]:
    known = np.isfinite(error) & np.isfinite(multiplier)
    error, multiplier = np.where(known, error, 0.0), np.where(known, multiplier, 0.0)
    # Where outcomes are skewed to the right, means are too low more often than too high, and look too sure of it.
    correction = (2 * multiplier**2 + 1) / 6
    below, above = np.maximum(-skewness[0], 0) * correction, np.maximum(skewness[1], 0) * correction
    low = np.where(known, estimate - error * (multiplier + below), -np.inf)
    return low, np.where(known, estimate + error * (multiplier + above), np.inf)


def _uncorrected(distance: _Array, skewness: _Array) -> _Array:
    """What the correction leaves of a distance: the m with m + skewness * (2 m^2 + 1) / 6 = distance, or 0."""
    left = np.maximum(distance - skewness / 6, 0)
    return np.asarray(2 * left / (1 + np.sqrt(1 + 4 / 3 * skewness * left)))


def _time(treatment: ArmMoments, control: ArmMoments, confidence: float, planned_units: float) -> _Array:
    """Intrinsic time by the number of units that, half in each arm, would tell as much."""
    first, second = np.asarray(treatment.count, dtype=float), np.asarray(control.count, dtype=float)
    return np.asarray(tuned_time(confidence) / planned_units * 4 * first * second / np.maximum(first + second, 1))


def _is_known(treatment: ArmMoments, control: ArmMoments) -> NDArray[np.bool_]:
    varies = (np.asarray(treatment.variance) > 0) & (np.asarray(control.variance) > 0)
    return np.asarray(varies & (np.minimum(treatment.count, control.count) >= MIN_UNITS))


def _safe(arm: ArmMoments, known: NDArray[np.bool_]) -> tuple[_Array, _Array, _Array]:
    """Count, variance and third moment, with harmless numbers where they are not used."""
    filled = [(arm.count, 2.0), (arm.variance, 1.0), (arm.third, 0.0)]
    count, variance, third = (np.where(known, value, other) for value, other in filled)
    return count, variance, third


def _welch(treatment: ArmMoments, control: ArmMoments) -> tuple[_Array, _Array, _Array]:
    """The difference, its standard error (infinite where it is not known), Satterthwaite's degrees of freedom."""
    known = _is_known(treatment, control)
    (n1, v1, _), (n0, v0, _) = _safe(treatment, known), _safe(control, known)
    first, second = v1 / n1, v0 / n0
    spread = first + second
    freedom = 1 / ((first / spread) ** 2 / (n1 - 1) + (second / spread) ** 2 / (n0 - 1))
    return np.asarray(treatment.mean - control.mean), np.where(known, np.sqrt(spread), np.inf), freedom


def _skewness(treatment: ArmMoments, control: ArmMoments) -> tuple[_Array, _Array]:
    """Skewness of the estimated difference, the lower and the higher of two estimates.

    One takes each arm's third moment; the other the shape of both arms together, since the skewness of a small arm is
    underestimated. For equal arms of equal size it is 0.
    """
    known = _is_known(treatment, control)
    (n1, v1, k1), (n0, v0, k0) = _safe(treatment, known), _safe(control, known)
    spread = v1 / n1 + v0 / n0
    scale = spread * np.sqrt(spread)
    own = (k1 / n1**2 - k0 / n0**2) / scale
    cube1, cube0 = v1 * np.sqrt(v1), v0 * np.sqrt(v0)  # of the standard deviations; ** 1.5 is slow
    shape = (n1 * k1 + n0 * k0) / (n1 * cube1 + n0 * cube0)
    pooled = shape * (cube1 / n1**2 - cube0 / n0**2) / scale
    return np.minimum(own, pooled), np.maximum(own, pooled)
