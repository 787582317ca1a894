"""How many units, and how long: planned before an experiment starts."""

from __future__ import annotations

import math
from typing import Literal

from scipy import special

from adapters.statistics.mixtures import tuned_time

__all__ = ["duration_days", "required_units"]

Analysis = Literal["sequential", "fixed"]


def required_units(
    effect: float,
    *,
    base_rate: float | None = None,
    std_dev: float | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
    treatment_share: float = 0.5,
    analysis: Analysis = "sequential",
) -> int:
    """Units of both arms together with which a true difference of `effect` is found with probability `power`.

    Args:
        effect: Difference of the means, treatment minus control, not 0.
        base_rate: The control's mean, of values 0 or 1; or else
        std_dev: standard deviation of one unit's value, in both arms.
        confidence: Two-sided.
        power: Above 0, below 1.
        treatment_share: The treatment's share of the units.
        analysis: "sequential": the sequence, tuned to this very number of units, excludes zero there or before it (at
            least with `power`); "fixed": one look at the end, with a normal quantile.

    Raises:
        ValueError: not exactly one of base_rate and std_dev, or a number out of its range.
    """
    _check(effect, power, treatment_share, confidence)
    spread = _spread(effect, base_rate, std_dev, treatment_share)
    reach = _boundary(confidence, analysis) + float(special.ndtri(power))
    return max(2, math.ceil(spread * (max(reach, 0.0) / effect) ** 2))


def duration_days(num_units: int, *, units_per_day: float, traffic_percent: float = 100.0) -> int:
    """Days until so many units have been exposed, rounded up.

    Args:
        num_units: Units of all arms.
        units_per_day: Units that are new on a day; a user who comes back is not.
        traffic_percent: The experiment's share of them.

    Raises:
        ValueError: no units a day.
    """
    if not units_per_day * traffic_percent > 0:
        raise ValueError(f"expected units every day, found {units_per_day} and {traffic_percent} % of them")
    return math.ceil(num_units / (units_per_day * traffic_percent / 100))


def _boundary(confidence: float, analysis: Analysis) -> float:
    """Standard errors from the estimate to the interval's end, at the planned number of units."""
    if analysis == "fixed":
        return float(special.ndtri((1 + confidence) / 2))
    return math.sqrt(1 + tuned_time(confidence))


def _spread(effect: float, base_rate: float | None, std_dev: float | None, treatment_share: float) -> float:
    """Variance of the estimated difference, times the number of units."""
    if (base_rate is None) == (std_dev is None):
        raise ValueError("expected either base_rate or std_dev")
    if base_rate is None:
        assert std_dev is not None
        if not std_dev > 0:
            raise ValueError(f"expected a standard deviation above 0, found {std_dev}")
        return std_dev**2 * (1 / treatment_share + 1 / (1 - treatment_share))
    rate = base_rate + effect
    if not (0 <= base_rate <= 1 and 0 <= rate <= 1):
        raise ValueError(f"rates lie between 0 and 1, found {base_rate:g} and {rate:g}")
    return rate * (1 - rate) / treatment_share + base_rate * (1 - base_rate) / (1 - treatment_share)


def _check(effect: float, power: float, treatment_share: float, confidence: float) -> None:
    if effect == 0 or not math.isfinite(effect):
        raise ValueError(f"expected an effect that is not 0, found {effect}")
    for name, value in (("power", power), ("treatment_share", treatment_share), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"expected {name} between 0 and 1, found {value}")
