"""Intervals for means of independent units, for one look planned in advance.

Looking repeatedly and stopping when an interval excludes zero is not covered by them; nothing here gives a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # not scipy.stats, whose import takes longer than all of ours together

__all__ = ["Interval", "MeanEstimate", "all_binary", "difference_interval", "mean_interval"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True)
class MeanEstimate:
    """A mean over units; `interval` is None where there are too few units for one. `method` names how it was made."""

    num_units: int
    mean: float
    interval: Interval | None
    method: str


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> MeanEstimate:
    """The mean of one value per unit and its interval.

    All values 0 or 1: Wilson's score interval, which holds near 0 and 1 and for few units. Otherwise Student's t.

    Args:
        values: One number per unit, at least one; units must be independent.
        confidence: Two-sided coverage.

    Source: Wilson (1927), JASA 22:209; Student (1908), Biometrika 6:1.
    """
    mean = float(np.mean(values))
    if all_binary(values):
        low, high = _wilson(mean, len(values), confidence)
        return MeanEstimate(len(values), mean, Interval(mean, low, high, confidence), "Wilson")
    if len(set(values)) < 2:
        return MeanEstimate(len(values), mean, None, "no variation between units: no interval")
    half = _student((1 + confidence) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return MeanEstimate(len(values), mean, Interval(mean, mean - half, mean + half, confidence), "Student's t")


def difference_interval(
    treatment: Sequence[float], control: Sequence[float], *, confidence: float = 0.95
) -> Interval | None:
    """Interval for mean(treatment) - mean(control), variances not assumed equal.

    None with fewer than two units a side, or where nothing varies. Where all values are 0 or 1 it is Newcombe's hybrid
    of two Wilson intervals, otherwise Welch's t.

    Source: Welch (1947), Biometrika 34:28; Newcombe (1998), Statistics in Medicine 17:873, method 10.
    """
    if len(treatment) < 2 or len(control) < 2:
        return None
    if len(set(treatment)) == 1 and len(set(control)) == 1 and not all_binary(treatment, control):
        return None
    estimate = float(np.mean(treatment) - np.mean(control))
    if all_binary(treatment, control):
        return _newcombe(treatment, control, confidence)
    variances = [float(np.var(side, ddof=1)) / len(side) for side in (treatment, control)]
    spread = sum(variances)
    if spread**2 == 0:  # values so small that their variance can't be represented
        return None
    freedom = spread**2 / sum(
        variance**2 / (len(side) - 1) for variance, side in zip(variances, (treatment, control), strict=True)
    )
    half = _student((1 + confidence) / 2, freedom) * math.sqrt(spread)
    return Interval(estimate, estimate - half, estimate + half, confidence)


def _student(probability: float, freedom: float) -> float:
    """The quantile of Student's t."""
    return float(special.stdtrit(freedom, probability))


def all_binary(*sides: Sequence[float]) -> bool:
    """Whether every value is 0 or 1."""
    return all(value in (0.0, 1.0) for side in sides for value in side)


def _wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    z = float(special.ndtri((1 + confidence) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At shares 0 and 1 the bound is exactly 0 or 1; rounding must not push the estimate out of its own interval.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _newcombe(treatment: Sequence[float], control: Sequence[float], confidence: float) -> Interval:
    first, second = float(np.mean(treatment)), float(np.mean(control))
    first_low, first_high = _wilson(first, len(treatment), confidence)
    second_low, second_high = _wilson(second, len(control), confidence)
    low = math.hypot(first - first_low, second_high - second)
    high = math.hypot(first_high - first, second - second_low)
    return Interval(first - second, first - second - low, first - second + high, confidence)
