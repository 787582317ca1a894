"""How the arms of an experiment's present stage are compared: which numbers, with which confidence, on which scale.

Of an experiment whose weights were changed only the present stage is read: earlier units came by other odds, at other
times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adapters.evidence import Comparison, Guard, Treatment, guard_state, outcome_of
from adapters.experiment_metrics import can_be_missing, is_share_metric, num_outcomes_of, scale_of
from adapters.outcomes import UnitOutcomes
from adapters.records import Arm, Experiment, Guardrail, Metric
from adapters.settled_values import Column, FixedSample, Outcomes, first_outcomes, plan_sample
from adapters.statistics import (
    DEFAULT_PLANNED_UNITS,
    Interval,
    adjust_for_covariate,
    adjusted_confidence,
    comparison_confidence,
    difference_interval,
    difference_sequence,
    mean_sequence,
)

__all__ = ["StageComparisons", "guard_confidence", "stage_confidence"]

_WIDEST_LOG = 50.0  # on a scale of logarithms: what is wider says nothing, and its exponential may be no float


def stage_confidence(experiment: Experiment) -> float:
    """The confidence of one comparison in the present stage; all of them together keep the experiment's alpha."""
    return comparison_confidence(experiment.alpha, num_treatments=len(experiment.arms) - 1, stage=experiment.stage)


def guard_confidence(experiment: Experiment) -> float:
    """The confidence of a guardrail's interval: guardrails share the error of a stage's comparison.

    One end of each says that it is breached, and so one end of the primary's that all is worse: together these err with
    at most alpha, however many guardrails there are.
    """
    return adjusted_confidence(stage_confidence(experiment), max(len(experiment.guardrails), 1))


class StageComparisons:
    """The treatments of one stage against its control, as of one moment.

    Args:
        experiment: As it is at that moment.
        outcomes: What came of the stage's units, by arm.
        now: The moment.
        window: How long feedback on an answer is taken.
        history: What the units did before the experiment; read by a plan with a fixed sample alone, once it is judged.
    """

    def __init__(
        self,
        experiment: Experiment,
        outcomes: Outcomes,
        *,
        now: datetime,
        window: timedelta,
        history: Sequence[UnitOutcomes] = (),
    ) -> None:
        self.experiment = experiment
        self._outcomes = outcomes
        self._now = now
        self._window = window
        self._history = history
        self._first: dict[tuple[str, str], Column] = {}
        planned = experiment.planned_units
        self._tuned_for = DEFAULT_PLANNED_UNITS if planned is None else planned
        self.confidence = stage_confidence(experiment)
        self.control = experiment.arms[0].name

    def units(self, arm: str) -> Sequence[UnitOutcomes]:
        """An arm's units, the earliest exposed first."""
        return self._outcomes.get(arm, ())

    @cached_property
    def sample(self) -> FixedSample | None:
        """The fixed sample once its units are there; None with a sequential analysis."""
        experiment = self.experiment
        if experiment.analysis != "fixed":
            return None
        assert experiment.planned_units is not None  # a fixed plan has it
        return plan_sample(self._outcomes, experiment.planned_units, self._window)

    @property
    def is_early(self) -> bool:
        """Whether a plan with a fixed sample waits: for its units, or for the last feedback on them."""
        if self.experiment.analysis != "fixed":
            return False
        return self.sample is None or self._now < self.sample.closes_at

    def treatment(self, arm: Arm) -> Treatment:
        """One treatment against the control."""
        experiment, metric = self.experiment, self.experiment.metric
        primary = None if metric is None else self._primary(arm, metric)
        watched = dict.fromkeys([*([metric.name] if metric else []), *(g.metric for g in experiment.guardrails)])
        return Treatment(
            name=arm.name,
            version=f"{experiment.alias}@v{arm.number}",
            primary=primary,
            outcome=outcome_of(primary, self.smallest_effect()),
            guards=tuple(self._guard(arm, guardrail) for guardrail in experiment.guardrails),
            gaps=tuple(self._gap(arm, name) for name in watched if can_be_missing(name)),
            feedback=self._gap(arm, "feedback_rate") if self._has_feedback_besides(watched) else None,
        )

    def smallest_effect(self) -> float | None:
        """On the scale that the metric is compared on: of a ratio, a share of the control's mean."""
        metric, smallest = self.experiment.metric, self.experiment.smallest_effect
        if metric is None or smallest is None or scale_of(metric.name, metric.kind) != "ratio":
            return smallest
        mean = self.primary_column(self.control, metric).side().mean
        return smallest / mean if mean else None

    def primary_column(self, arm: str, metric: Metric) -> Column:
        """The primary metric's numbers. Of a fixed sample that is not judged yet those that there are so far."""
        if self.experiment.analysis == "fixed" and self.sample is not None:
            return self.sample.column(self.units(arm), metric, None if self.is_early else self._before)
        return self.first_column(arm, metric)

    def first_column(self, arm: str, metric: Metric) -> Column:
        """Each unit's first outcome."""
        key = (arm, metric.name)
        if key not in self._first:
            self._first[key] = first_outcomes(self.units(arm), metric, now=self._now, window=self._window)
        return self._first[key]

    def compare(self, arm: Arm, treatment: Column, control: Column, metric: Metric, confidence: float) -> Comparison:
        """One metric of a treatment against the control, by sequence."""
        is_share = is_share_metric(metric.name, metric.kind)
        interval = self._sequence(arm, treatment, control, is_share, confidence)
        return _comparison(treatment, control, metric, interval)

    def own_interval(self, arm: Arm, column: Column, confidence: float) -> Interval | None:
        """The sequence of an arm's own mean, in the metric's own unit."""
        planned = self._tuned_for * arm.weight / 100
        interval = mean_sequence(column.values, confidence=confidence, planned_units=planned)
        return interval if interval is None or column.scale != "ratio" else _map_interval(math.exp, interval)

    @cached_property
    def _before(self) -> dict[str, float] | None:
        metric, sample = self.experiment.metric, self.sample
        assert metric is not None
        assert sample is not None
        return sample.values_before(self._outcomes, self._history, metric)

    def _primary(self, arm: Arm, metric: Metric) -> Comparison:
        """The primary metric's comparison: by sequence, or of a fixed sample for one look, once it is closed."""
        treatment, control = self.primary_column(arm.name, metric), self.primary_column(self.control, metric)
        if self.experiment.analysis == "sequential":
            return self.compare(arm, treatment, control, metric, self.confidence)
        if self.is_early:
            return _comparison(treatment, control, metric, None)
        return _compare_once(treatment, control, metric, self.confidence)

    def _guard(self, arm: Arm, guardrail: Guardrail) -> Guard:
        metric = Metric(guardrail.metric, guardrail.direction, guardrail.kind)
        sides = self.first_column(arm.name, metric), self.first_column(self.control, metric)
        compared = self.compare(arm, *sides, metric, guard_confidence(self.experiment))
        margin = _margin_on_scale(guardrail, compared)
        return Guard(compared, margin, "no_data" if margin is None else guard_state(compared, margin))

    @cached_property
    def reported_shares(self) -> frozenset[str]:
        """The reported metrics all of whose values so far are 0 or 1, as yes and no are.

        By the data, which the plan's own metrics are not read by: there is no interval of what is told by it.
        """
        units = [unit for arm in self._outcomes.values() for unit in arm]
        names = {name for unit in units for name in unit.reports}
        others = {
            name
            for unit in units
            for name, reports in unit.reports.items()
            if any(report.value not in (0, 1) for report in reports)
        }
        return frozenset(names - others)

    def _has_feedback_besides(self, watched: Collection[str]) -> bool:
        """Whether there is feedback of which nothing else is told: by other metrics than the plan's."""
        reported = {name for units in self._outcomes.values() for unit in units for name in unit.reports}
        return "feedback_rate" not in watched and not reported <= set(watched)

    def _gap(self, arm: Arm, metric: str) -> Comparison:
        """How much more often the treatment's requests have a value of a metric at all; `feedback_rate`: any feedback.

        Of all requests so far, since many clients report on a user's last answer alone. Such shares go on changing; an
        undue alarm, which that may raise more often, holds a promotion back until a person has looked.
        """
        treatment, control = (_coverage(self.units(name), metric) for name in (arm.name, self.control))
        interval = self._sequence(arm, treatment, control, True, self.confidence)
        return Comparison(metric, "increase", "share", treatment.side(), control.side(), interval)

    def _sequence(
        self,
        arm: Arm,
        treatment: Column,
        control: Column,
        is_share: bool,
        confidence: float,
    ) -> Interval | None:
        both = arm.weight + self.experiment.arms[0].weight
        return difference_sequence(
            treatment.values,
            control.values,
            confidence=confidence,
            planned_units=self._tuned_for * both / 100,
            treatment_share=arm.weight / both,
            is_share=is_share,
            places=(self._places(treatment, both), self._places(control, both)),
        )

    @cached_property
    def _times(self) -> NDArray[np.float64]:
        """[units] when those of all arms came."""
        return _seconds(sorted(unit.answered_at for units in self._outcomes.values() for unit in units))

    def _places(self, column: Column, percent: float) -> NDArray[np.int64]:
        """[units] the place of each among the units of two arms, which get so much of the traffic."""
        return (np.searchsorted(self._times, _seconds(column.came)) * percent / 100).astype(np.int64)


def _coverage(units: Sequence[UnitOutcomes], metric: str) -> Column:
    """Of each unit the share of its requests that have a value of a metric; of `feedback_rate`: any feedback."""
    shares = [_num_known(unit, metric) / len(unit.requests) for unit in units]
    return Column("share", np.array(shares, dtype=float), [], [unit.answered_at for unit in units], 0)


def _num_known(unit: UnitOutcomes, metric: str) -> int:
    if metric == "feedback_rate":
        return sum(request.has_feedback for request in unit.requests)
    return num_outcomes_of(unit, metric)


def _seconds(moments: Sequence[datetime]) -> NDArray[np.float64]:
    return np.array([moment.timestamp() for moment in moments], dtype=float)


def _compare_once(treatment: Column, control: Column, metric: Metric, confidence: float) -> Comparison:
    """For one look; less what was known from before the experiment, where that is enough."""
    if treatment.before is None or control.before is None or not len(treatment.values) or not len(control.values):
        interval = difference_interval(treatment.values.tolist(), control.values.tolist(), confidence=confidence)
        return _comparison(treatment, control, metric, interval)
    sides = [column.tolist() for column in (treatment.values, control.values, treatment.before, control.before)]
    adjusted = adjust_for_covariate(*sides)
    interval = difference_interval(adjusted.treatment, adjusted.control, confidence=confidence)
    return _comparison(treatment, control, metric, interval, adjusted.variance_removed)


def _comparison(
    treatment: Column,
    control: Column,
    metric: Metric,
    interval: Interval | None,
    variance_removed: float | None = None,
) -> Comparison:
    if interval is not None and treatment.scale == "ratio":
        interval = _map_interval(math.expm1, interval)
    sides = treatment.side(), control.side()
    return Comparison(metric.name, metric.direction, treatment.scale, *sides, interval, variance_removed)


def _map_interval(function: Callable[[float], float], interval: Interval) -> Interval | None:
    """An interval of logarithms on another scale, by a function that increases; None if it is too wide for one."""
    if interval.high - interval.low > _WIDEST_LOG or interval.high > _WIDEST_LOG:
        return None
    return Interval(function(interval.estimate), function(interval.low), function(interval.high), interval.confidence)


def _margin_on_scale(guardrail: Guardrail, comparison: Comparison) -> float | None:
    """A guardrail's margin on the scale of the comparison; None while the control has no mean to hold it against.

    A margin in milliseconds of a metric that is read as a ratio, or a relative one of a metric that is not, is turned
    by the control's mean as it is at this look.
    """
    if guardrail.is_relative == (comparison.scale == "ratio"):
        return guardrail.margin
    mean = comparison.control.mean
    if not mean:  # of nothing there is no share, and nothing to be a share of
        return None
    return guardrail.margin * abs(mean) if guardrail.is_relative else guardrail.margin / mean
