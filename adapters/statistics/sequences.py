"""Confidence sequences: intervals that all hold at once with the stated probability, however often one looks.

Means of any values get the asymptotic sequence of `mixtures`, shares also the exact one of `betting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.statistics.betting import Bets, Places, mean_share_bounds, share_bounds
from adapters.statistics.intervals import Interval
from adapters.statistics.mixtures import ArmMoments, difference_bounds, mean_bounds

__all__ = ["DEFAULT_PLANNED_UNITS", "EXACT_PART", "difference_sequence", "mean_sequence"]

DEFAULT_PLANNED_UNITS = 10_000
# Of the error that a share's sequence may make, the part that the exact sequence may make; the rest is the asymptotic
# one's. What holds for both holds with the sum, so that the narrower may be taken at every look.
EXACT_PART = 0.2

Values = Sequence[float] | NDArray[np.float64]


def difference_sequence(
    treatment: Values,
    control: Values,
    *,
    confidence: float = 0.95,
    planned_units: float = DEFAULT_PLANNED_UNITS,
    treatment_share: float = 0.5,
    is_share: bool | None = None,
    places: Places | None = None,
) -> Interval | None:
    """Interval for mean(treatment) - mean(control) that holds at every look at once with probability `confidence`.

    Args:
        treatment: One number per unit, in the order in which they came; units must be independent.
        control: Likewise.
        confidence: Two-sided, over all looks together.
        planned_units: Units of both arms together at which the interval is made tightest. Like the two below, fix it
            before the first look: a wrong plan costs width, a changed one validity.
        treatment_share: The treatment's planned share of both arms' units.
        is_share: Whether values lie between 0 and 1 by their nature, as rates and yes-or-no answers do: then there is
            an interval from the first units on, and for arms without variation. None: if all are 0 or 1.
        places: Each unit's place among all that came, from 0, of treatment and control; whoever has no outcome (yet)
            has one too, so that the others' stay. The exact part then sets units against each other that came at about
            the same time: needed where levels change with time, and the arms are of very different size or outcomes
            are known more often in one of them. None: one after the other.

    Returns:
        None where nothing is excluded yet: other than for shares, below `MIN_UNITS` an arm or where one does not vary.

    Raises:
        ValueError: is_share is given as true and a value lies outside 0 to 1.
    """
    if not len(treatment) or not len(control):
        return None
    treatment, control = np.asarray(treatment, dtype=float), np.asarray(control, dtype=float)
    first, second = ArmMoments.of(treatment), ArmMoments.of(control)
    if not _are_shares(treatment, control, is_share):
        low, high = _asymptotic(first, second, confidence, planned_units)
    else:
        asymptotic = _asymptotic(first, second, _part(confidence, 1 - EXACT_PART), planned_units)
        exact_confidence = _part(confidence, EXACT_PART)
        bets = Bets.planned(confidence=exact_confidence, planned_units=planned_units, treatment_share=treatment_share)
        low, high = share_bounds(
            treatment, control, bets, confidence=exact_confidence, places=places, within=asymptotic
        )
        if not low <= first.mean - second.mean <= high:  # the two contradict each other: what either of them holds
            exact = share_bounds(treatment, control, bets, confidence=exact_confidence, places=places)
            low, high = max(min(asymptotic[0], exact[0]), -1.0), min(max(asymptotic[1], exact[1]), 1.0)
    if (math.isinf(low) and math.isinf(high)) or (low, high) == (-1.0, 1.0):
        return None
    return Interval(first.mean - second.mean, low, high, confidence)


def mean_sequence(
    values: Values, *, confidence: float = 0.95, planned_units: float = DEFAULT_PLANNED_UNITS
) -> Interval | None:
    """Interval for the mean of one value per unit that holds at every look at once with probability `confidence`.

    Exact where all values are 0 or 1, otherwise asymptotic. None where nothing is excluded yet, as in
    `difference_sequence`; `planned_units` are those of this arm.
    """
    if not len(values):
        return None
    values = np.asarray(values, dtype=float)
    moments = ArmMoments.of(values)
    if _are_binary(values):
        bounds = mean_share_bounds(round(values.sum()), len(values), confidence=confidence, planned_units=planned_units)
        return None if bounds == (0.0, 1.0) else Interval(moments.mean, *bounds, confidence)
    low, high = (float(end) for end in mean_bounds(moments, confidence=confidence, planned_units=planned_units))
    return Interval(moments.mean, low, high, confidence) if math.isfinite(low) else None


def _are_shares(treatment: NDArray[np.float64], control: NDArray[np.float64], is_share: bool | None) -> bool:
    if is_share is None:
        return _are_binary(treatment) and _are_binary(control)
    if is_share and not all(((side >= 0) & (side <= 1)).all() for side in (treatment, control)):
        raise ValueError("expected shares, which lie between 0 and 1, found a value outside")
    return is_share


def _are_binary(values: NDArray[np.float64]) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _part(confidence: float, part: float) -> float:
    return 1 - (1 - confidence) * part


def _asymptotic(
    treatment: ArmMoments, control: ArmMoments, confidence: float, planned_units: float
) -> tuple[float, float]:
    low, high = difference_bounds(treatment, control, confidence=confidence, planned_units=planned_units)
    return float(low), float(high)
