"""What is compared: one number for each unit, taken at a moment after which it stays what it is.

A sequence holds for numbers that don't change once they are counted, an interval for one look at one moment. A user's
mean so far is neither: it is shown beside them, and decides nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from adapters.evidence import Scale, Side
from adapters.experiment_metrics import analysed_value, first_value, is_share_metric, mean_value, scale_of
from adapters.outcomes import UnitOutcomes
from adapters.records import Metric
from adapters.statistics import MIN_UNITS
from adapters.statistics.mixtures import ArmMoments

__all__ = ["Column", "FixedSample", "Outcomes", "first_outcomes", "means_so_far", "plan_sample"]

Outcomes = Mapping[str, Sequence[UnitOutcomes]]  # by arm, in the order of the units' first exposures
_LEAST_KNOWN = 0.5  # of a sample's units: the part of which something must be known from before, for an adjustment


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one arm: the values of the units that have one, in the order in which they were known, and when.

    `came` has in the same order when the units themselves came, which is when their first answer was there; `before`
    what their values were before the experiment, where that is used.
    """

    scale: Scale
    values: NDArray[np.float64]
    arrivals: list[datetime]
    came: list[datetime]
    num_missing: int
    before: NDArray[np.float64] | None = None

    def side(self) -> Side:
        """Number and mean, of a ratio's logarithms the geometric one."""
        mean = float(self.values.mean()) if len(self.values) else None
        if mean is not None and self.scale == "ratio":
            mean = math.exp(mean)
        is_constant = len(self.values) >= MIN_UNITS and ArmMoments.of(self.values).variance == 0
        return Side(len(self.values), self.num_missing, mean, is_constant)

    def until(self, moment: datetime) -> Column:
        """The units that were known by then. Those without a value are not counted."""
        count = bisect_right(self.arrivals, moment)
        return Column(self.scale, self.values[:count], self.arrivals[:count], self.came[:count], 0)


@dataclass(frozen=True, slots=True)
class FixedSample:
    """The units of a plan that looks once: those that came until the last of the planned ones did, at `last`.

    At `closes_at` no feedback on their answers is taken any more: whoever reads them then, or later, reads the same.
    """

    last: datetime
    closes_at: datetime

    def column(self, units: Sequence[UnitOutcomes], metric: Metric, before: Mapping[str, float] | None) -> Column:
        """One arm's means over the requests up to the cut; `before` are the units' values of before, if they count."""
        there = [unit for unit in units if unit.first_at <= self.last]
        found = [(unit, mean_value(unit, metric.name, until=self.last)) for unit in there]
        known = [(unit, value) for unit, value in found if value is not None]
        values = _values([value for _, value in known], metric)
        earlier = None if before is None else np.array([before[unit.unit] for unit, _ in known], dtype=float)
        return Column(
            scale_of(metric.name, metric.kind),
            values,
            [unit.first_at for unit, _ in known],
            [unit.answered_at for unit, _ in known],
            len(there) - len(known),
            earlier,
        )

    def values_before(
        self, outcomes: Outcomes, history: Sequence[UnitOutcomes], metric: Metric
    ) -> dict[str, float] | None:
        """By unit what its value was before the experiment, the mean of the others' where it had none.

        None where too little is known for an adjustment, which the units' outcomes have no part in: where less than
        half of the sample's units, or fewer than `MIN_UNITS`, have a value from before, or all have the same.
        """
        units = {unit.unit for arm in outcomes.values() for unit in arm if unit.first_at <= self.last}
        found: dict[str, list[float]] = {}
        for unit in history:
            if unit.unit in units and (value := mean_value(unit, metric.name)) is not None:
                found.setdefault(unit.unit, []).append(value)
        known = {unit: analysed_value(math.fsum(values) / len(values), metric.name) for unit, values in found.items()}
        if len(known) < max(MIN_UNITS, _LEAST_KNOWN * len(units)) or len(set(known.values())) < 2:
            return None
        usual = math.fsum(known.values()) / len(known)
        return {unit: known.get(unit, usual) for unit in units}


def plan_sample(outcomes: Outcomes, planned_units: int, window: timedelta) -> FixedSample | None:
    """The sample of a plan with so many units; None until they are there.

    Args:
        outcomes: Of the present stage.
        planned_units: In all arms together.
        window: How long feedback on an answer is taken.
    """
    arrivals = sorted(unit.first_at for units in outcomes.values() for unit in units)
    if len(arrivals) < planned_units:
        return None
    last = arrivals[planned_units - 1]
    return FixedSample(last, last + window)


def first_outcomes(units: Sequence[UnitOutcomes], metric: Metric, *, now: datetime, window: timedelta) -> Column:
    """Each unit's first outcome, in the order in which they were known, not of the units.

    What is reported late is behind what was counted before it. A `feedback_rate` is known once the window is over.

    Args:
        units: Of one arm, in the order of their coming.
        metric: What is compared.
        now: The moment of reading.
        window: How long feedback on an answer is taken.
    """
    found = [(*value, unit.answered_at) for unit in units if (value := first_value(unit, metric.name)) is not None]
    if metric.name == "feedback_rate":
        found = [item for item in found if item[1] + window <= now]
    found.sort(key=lambda item: item[1])
    return Column(
        scale_of(metric.name, metric.kind),
        _values([value for value, _, _ in found], metric),
        [at for _, at, _ in found],
        [came for _, _, came in found],
        len(units) - len(found),
    )


def means_so_far(units: Sequence[UnitOutcomes], metric: Metric) -> Column:
    """Each unit's mean so far, which goes on changing: to be shown, not to be compared."""
    found = [value for unit in units if (value := mean_value(unit, metric.name)) is not None]
    return Column(scale_of(metric.name, metric.kind), _values(found, metric), [], [], len(units) - len(found))


def _values(found: Sequence[float], metric: Metric) -> NDArray[np.float64]:
    """As they are compared. A share outside of 0 to 1, taken while its answer was still streamed, is the nearer end."""
    values = np.array([analysed_value(value, metric.name) for value in found], dtype=float)
    return np.clip(values, 0, 1) if is_share_metric(metric.name, metric.kind) else values
