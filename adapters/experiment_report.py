"""What came of an experiment: its arms, effects with their intervals over time, guardrails, split, and the verdict.

Pure: outcomes by unit go in, a report comes out; docs/verdicts.md says how to read it. Of an experiment whose
weights were changed only the present stage is read: earlier units came by other odds, at other times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from adapters.experiment_config import is_share_metric
from adapters.experiment_metrics import built_in, can_be_missing, num_outcomes_of, scale_of, value_of
from adapters.records import BUILT_IN_METRICS, Arm, Decision, Direction, Experiment, Guardrail, Metric, UnitOutcomes
from adapters.settled_values import Settled
from adapters.statistics import (
    DEFAULT_PLANNED_UNITS,
    Interval,
    adjusted_confidence,
    difference_interval,
    difference_sequence,
    mean_sequence,
    sample_ratio,
    thompson_weights,
)
from adapters.verdicts import (
    Comparison,
    Evidence,
    Guard,
    Scale,
    Side,
    Split,
    Treatment,
    Verdict,
    guard_state,
    judge,
    outcome_of,
)

__all__ = [
    "LEAST_SHARE",
    "ArmReport",
    "EffectPoint",
    "ExperimentReport",
    "MetricReport",
    "Outcomes",
    "better_shares",
    "make_report",
    "stage_confidence",
]

Outcomes = Mapping[str, Sequence[UnitOutcomes]]  # by arm, in the order of the units' first exposures
_Role = Literal["primary", "guardrail", "other"]
LEAST_SHARE = 5.0
_HISTORY_POINTS = 40
_MAX_METRICS = 50  # clients name metrics, and each costs a comparison
_FIRST_STAGE = 6 / math.pi**2  # of alpha: one over the sum of 1, 1/4, 1/9, ...
_WIDEST_LOG = 50.0  # on a scale of logarithms: what is wider says nothing, and its exponential may be no float
_SPLIT_ALPHA = 0.01  # false alarms of the split's check, over all looks and stages
_LEAST_ALPHA = 1e-9  # below it, one less it is one: floats end there


@dataclass(frozen=True, slots=True)
class MetricReport:
    """One metric in one arm: the mean over units (of what is read as a ratio the geometric mean) and its interval."""

    metric: str
    role: _Role
    scale: Scale
    num_outcomes: int
    num_units: int
    num_missing: int
    mean: float
    interval: Interval | None
    difference: Interval | None


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm: its share, what it was exposed to and its outcomes."""

    arm: Arm
    num_exposures: int
    num_units: int
    num_errors: int
    metrics: tuple[MetricReport, ...]


@dataclass(frozen=True, slots=True)
class EffectPoint:
    """The primary metric's effect as it was after so many units, the last of which came at `at`."""

    num_units: int
    at: datetime
    interval: Interval


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """An experiment's present stage. Differences are against the first arm; `confidence` is that of every interval."""

    experiment: Experiment
    confidence: float
    arms: tuple[ArmReport, ...]
    treatments: tuple[Treatment, ...]
    split: Split
    history: Mapping[str, tuple[EffectPoint, ...]]
    verdict: Verdict
    decisions: tuple[Decision, ...]


def make_report(
    experiment: Experiment,
    outcomes: Outcomes,
    *,
    now: datetime,
    decisions: Sequence[Decision] = (),
    settled: Settled | None = None,
    in_full: bool = True,
) -> ExperimentReport:
    """Read one stage of an experiment.

    Args:
        experiment: As it is now; its stage is the one that is read.
        outcomes: What came of that stage's units, by arm.
        now: The moment of reading, against which its end is held.
        decisions: Everything that was decided; a person's word that feedback may differ is among them.
        settled: The primary metric's numbers. None takes them from the outcomes, for units that come once and whose
            numbers don't change; a fixed sample is not judged without.
        in_full: Whether to compute what the verdict doesn't need, too: every metric of every arm, and the effect over
            time. Both take far longer than the rest.
    """
    reader = _Reader(experiment, outcomes, settled)
    treatments = tuple(reader.treatment(arm) for arm in experiment.arms[1:])
    split = reader.split(decisions)
    evidence = Evidence(
        control=reader.label(experiment.arms[0]),
        treatments=treatments,
        split=split,
        metric=experiment.metric.name if experiment.metric else None,
        smallest_effect=reader.smallest_effect(),
        num_units=reader.num_units,
        planned_units=experiment.planned_units,
        is_early=reader.is_early,
        closes_at=reader.closes_at,
        over=_over(experiment, now, is_judged=experiment.analysis == "fixed" and not reader.is_early),
        accepts_feedback_gap=any(d.action == "accept_feedback" and d.stage == experiment.stage for d in decisions),
    )
    return ExperimentReport(
        experiment=experiment,
        confidence=reader.confidence,
        arms=tuple(reader.arm(arm, in_full=in_full) for arm in experiment.arms),
        treatments=treatments,
        split=split,
        history={arm.name: reader.history(arm) for arm in experiment.arms[1:]} if in_full else {},
        verdict=judge(evidence),
        decisions=tuple(decisions),
    )


def better_shares(experiment: Experiment, outcomes: Outcomes) -> dict[str, float]:
    """Each arm's share of the units, in whole percent, by how probable it is that it is the best (Thompson).

    No arm gets less than `LEAST_SHARE` percent, so that none is given up for bad luck at the beginning.
    """
    assert experiment.metric is not None  # a plan without one can't ask for it
    columns = [_read_column(outcomes.get(arm.name, ()), experiment.metric.name) for arm in experiment.arms]
    floor = min(LEAST_SHARE / 100, 1 / len(columns))
    shares = thompson_weights([column.values for column in columns], direction=experiment.metric.direction, floor=floor)
    percents = [math.floor(share * 100) for share in shares]
    percents[shares.index(max(shares))] += 100 - sum(percents)
    return {arm.name: float(percent) for arm, percent in zip(experiment.arms, percents, strict=True)}


def stage_confidence(experiment: Experiment) -> float:
    """The confidence of one interval, so that all comparisons and stages together keep the experiment's alpha.

    Several treatments share it (each has its own chance to be taken for better by chance). Stages have 1, 1/4, 1/9, ...
    of 6 / pi^2 of it, which add up to alpha however many there are: somebody who changes weights again and again gets
    no new chance for it.
    """
    alpha = max(experiment.alpha * _FIRST_STAGE / experiment.stage**2, _LEAST_ALPHA)
    return adjusted_confidence(1 - alpha, len(experiment.arms) - 1)


class _Reader:
    """The outcomes of one stage, with how they are to be compared."""

    def __init__(self, experiment: Experiment, outcomes: Outcomes, settled: Settled | None) -> None:
        self.experiment = experiment
        self.outcomes = outcomes
        self.settled = None if settled is None else settled.values
        self.closes_at = None if settled is None else settled.closes_at
        self.num_settled = None if settled is None else settled.num_units
        self.confidence = stage_confidence(experiment)
        self.control = experiment.arms[0].name
        self.num_units = sum(len(self.units(arm.name)) for arm in experiment.arms)
        planned = experiment.planned_units
        self.is_early = experiment.analysis == "fixed" and self.settled is None
        self.tuned_for = DEFAULT_PLANNED_UNITS if planned is None else planned
        self._columns: dict[tuple[str, str], _Column] = {}

    def units(self, arm: str) -> Sequence[UnitOutcomes]:
        return self.outcomes.get(arm, ())

    def column(self, arm: str, metric: str) -> _Column:
        key = (arm, metric)
        if key not in self._columns:
            self._columns[key] = _read_column(self.units(arm), metric)
        return self._columns[key]

    def settled_column(self, arm: str, metric: str) -> _Column:
        """The primary metric's numbers in the order in which they were known."""
        if self.settled is None:
            return self.column(arm, metric)
        found = self.settled.get(arm, ())
        num_units = len(self.units(arm)) if self.num_settled is None else self.num_settled.get(arm, 0)
        missing = max(num_units - len(found), 0)
        return _Column(scale_of(metric), [item.value for item in found], [item.at for item in found], missing)

    def label(self, arm: Arm) -> str:
        return f"{arm.name} ({self.experiment.alias}@v{arm.number})"

    def split(self, decisions: Sequence[Decision]) -> Split:
        """The check of the split; once it has fired it stays so, also in later stages, until a person accepts it.

        Were a new stage a new beginning, a change of weights by a hair would silence it. The stages share its false
        alarms: the n-th has 6 / (pi n)^2 of them, which adds up to all.
        """
        stage = self.experiment.stage
        counts = tuple(len(self.units(arm.name)) for arm in self.experiment.arms)
        weights = tuple(arm.weight for arm in self.experiment.arms)
        ratio = sample_ratio(counts, weights, alpha=_SPLIT_ALPHA * 6 / (math.pi * stage) ** 2)
        fired = {told for d in decisions if d.action == "verdict" for told in d.numbers["split"]["stages"]}
        fired |= {stage} if ratio.fired else set()
        accepted = {told for d in decisions if d.action == "accept_split" for told in d.numbers["stages"]}
        left = tuple(sorted(fired - accepted))
        return Split(counts, weights, ratio.p_value, bool(left), stage, left, tuple(sorted(accepted)))

    def smallest_effect(self) -> float | None:
        """On the scale that the metric is compared on: of a ratio, a share of the control's mean."""
        metric, smallest = self.experiment.metric, self.experiment.smallest_effect
        if metric is None or smallest is None or scale_of(metric.name) != "ratio":
            return smallest
        mean = self.settled_column(self.control, metric.name).side().mean
        return smallest / mean if mean else None

    def treatment(self, arm: Arm) -> Treatment:
        metric = self.experiment.metric
        primary = None if metric is None else self._primary(arm, metric)
        watched = dict.fromkeys([*([metric.name] if metric else []), *(g.metric for g in self.experiment.guardrails)])
        return Treatment(
            name=arm.name,
            version=f"{self.experiment.alias}@v{arm.number}",
            primary=primary,
            outcome=outcome_of(primary, self.smallest_effect()),
            guards=tuple(self._guard(arm, guardrail) for guardrail in self.experiment.guardrails),
            gaps=tuple(self._gap(arm, name) for name in watched if can_be_missing(name)),
        )

    def arm(self, arm: Arm, *, in_full: bool) -> ArmReport:
        units = self.units(arm.name)
        found = [self._metric(arm, name) for name in self._metric_names()] if in_full else []
        return ArmReport(
            arm=arm,
            num_exposures=sum(unit.num_exposures for unit in units),
            num_units=len(units),
            num_errors=sum(unit.num_errors for unit in units),
            metrics=tuple(report for report in found if report is not None),
        )

    def history(self, arm: Arm) -> tuple[EffectPoint, ...]:
        """The primary's interval after the first units whose outcome was known, the first few more, ... all of them.

        Empty for a plan with a fixed sample: an interval for one look has no history.
        """
        metric = self.experiment.metric
        if metric is None or self.experiment.analysis == "fixed":
            return ()
        sides = self._sides(arm, metric)
        arrivals = sorted(moment for side in sides for moment in side.arrivals)
        points = []
        for count in sorted({len(arrivals) * step // _HISTORY_POINTS for step in range(1, _HISTORY_POINTS + 1)} - {0}):
            until = arrivals[count - 1]
            treatment, control = (side.until(until) for side in sides)
            compared = self._compare(arm, treatment, control, metric)
            if compared.interval is not None:
                points.append(EffectPoint(count, until, compared.interval))
        return tuple(points)

    def _sides(self, arm: Arm, metric: Metric) -> tuple[_Column, _Column]:
        return self.settled_column(arm.name, metric.name), self.settled_column(self.control, metric.name)

    def _primary(self, arm: Arm, metric: Metric) -> Comparison:
        """The primary metric's comparison: by sequence, or of a fixed sample for one look, once it is closed."""
        treatment, control = self._sides(arm, metric)
        if self.experiment.analysis == "sequential":
            return self._compare(arm, treatment, control, metric)
        if self.is_early:
            return _comparison(treatment, control, metric, None)
        interval = difference_interval(treatment.values, control.values, confidence=self.confidence)
        return _comparison(treatment, control, metric, interval)

    def _guard(self, arm: Arm, guardrail: Guardrail) -> Guard:
        metric = Metric(guardrail.metric, guardrail.direction, guardrail.kind)
        sides = self.column(arm.name, metric.name), self.column(self.control, metric.name)
        compared = self._compare(arm, *sides, metric)
        margin = _margin_on_scale(guardrail, compared)
        return Guard(compared, margin, "no_data" if margin is None else guard_state(compared, margin))

    def _gap(self, arm: Arm, metric: str) -> Comparison:
        """How much more often the treatment's requests have a value of a metric at all."""
        treatment, control = ([_coverage(unit, metric) for unit in self.units(n)] for n in (arm.name, self.control))
        first, second = (Side(len(v), 0, math.fsum(v) / len(v) if v else None) for v in (treatment, control))
        interval = self._sequence(arm, treatment, control, is_share=True)
        return Comparison(metric, "increase", "share", first, second, interval)

    def _compare(self, arm: Arm, treatment: _Column, control: _Column, metric: Metric) -> Comparison:
        is_share = is_share_metric(metric.name, metric.kind)
        sides = [side.as_shares() if is_share else side for side in (treatment, control)]
        interval = self._sequence(arm, sides[0].values, sides[1].values, is_share=is_share)
        return _comparison(treatment, control, metric, interval)

    def _sequence(
        self, arm: Arm, treatment: Sequence[float], control: Sequence[float], *, is_share: bool
    ) -> Interval | None:
        both = arm.weight + self.experiment.arms[0].weight
        return difference_sequence(
            treatment,
            control,
            confidence=self.confidence,
            planned_units=self.tuned_for * both / 100,
            treatment_share=arm.weight / both,
            is_share=is_share,
        )

    def _metric(self, arm: Arm, name: str) -> MetricReport | None:
        role = self._role(name)
        column = self.settled_column(arm.name, name) if role == "primary" else self.column(arm.name, name)
        side = column.side()
        if side.mean is None:
            return None
        metric = self._planned(name) or Metric(name, self._direction(name))
        own = mean_sequence(column.values, confidence=self.confidence, planned_units=self.tuned_for * arm.weight / 100)
        difference = None
        if arm.name != self.control:
            compared = (
                self._primary(arm, metric)
                if role == "primary"
                else self._compare(arm, column, self.column(self.control, name), metric)
            )
            difference = compared.interval
        return MetricReport(
            metric=name,
            role=role,
            scale=scale_of(name),
            num_outcomes=sum(num_outcomes_of(unit, name) for unit in self.units(arm.name)),
            num_units=side.num_units,
            num_missing=side.num_missing,
            mean=side.mean,
            interval=None if self.is_early and role == "primary" else _own_interval(own, name),
            difference=difference,
        )

    def _role(self, metric: str) -> _Role:
        if self.experiment.metric is not None and self.experiment.metric.name == metric:
            return "primary"
        return "guardrail" if any(g.metric == metric for g in self.experiment.guardrails) else "other"

    def _planned(self, metric: str) -> Metric | None:
        """The metric as the plan has it."""
        if self.experiment.metric is not None and self.experiment.metric.name == metric:
            return self.experiment.metric
        found = (item for item in self.experiment.guardrails if item.metric == metric)
        return next((Metric(item.metric, item.direction, item.kind) for item in found), None)

    def _direction(self, metric: str) -> Direction:
        known = built_in(metric)
        return known.direction if known else "increase"

    def _metric_names(self) -> list[str]:
        """The primary metric, the guardrails, what else exposures give, what else clients reported; at most so many."""
        planned = [self.experiment.metric.name] if self.experiment.metric else []
        guarded = [guardrail.metric for guardrail in self.experiment.guardrails]
        reported = sorted({name for units in self.outcomes.values() for unit in units for name in unit.feedback})
        return list(dict.fromkeys([*planned, *guarded, *sorted(BUILT_IN_METRICS), *reported]))[:_MAX_METRICS]


@dataclass(frozen=True, slots=True)
class _Column:
    """One metric of one arm: the values of the units that have one, in the order in which these came, and when."""

    scale: Scale
    values: list[float]
    arrivals: list[datetime]
    num_missing: int

    def side(self) -> Side:
        """Number and mean, of a ratio's logarithms the geometric one."""
        mean = math.fsum(self.values) / len(self.values) if self.values else None
        if mean is not None and self.scale == "ratio":
            mean = math.exp(mean)
        return Side(len(self.values), self.num_missing, mean)

    def as_shares(self) -> _Column:
        """The values within 0 and 1: one outside, taken while its answer was still streamed, counts as the nearer."""
        return replace(self, values=[min(max(value, 0.0), 1.0) for value in self.values])

    def until(self, moment: datetime) -> _Column:
        """The units that had come by then. Those without a value are not counted."""
        count = bisect_right(self.arrivals, moment)
        return _Column(self.scale, self.values[:count], self.arrivals[:count], 0)


def _coverage(unit: UnitOutcomes, metric: str) -> float:
    """The share of a unit's requests that have a value of a metric."""
    return num_outcomes_of(unit, metric) / unit.num_exposures


def _read_column(units: Sequence[UnitOutcomes], metric: str) -> _Column:
    found = [(value, unit.first_at) for unit in units if (value := value_of(unit, metric)) is not None]
    values, arrivals = [value for value, _ in found], [moment for _, moment in found]
    return _Column(scale_of(metric), values, arrivals, len(units) - len(found))


def _over(experiment: Experiment, now: datetime, *, is_judged: bool) -> str | None:
    """Why nothing more is to come, if so; a fixed sample that is judged has had its look."""
    if experiment.state == "decided":
        return "it was decided"
    if is_judged:
        return f"the planned {experiment.planned_units:,} users are there"
    if experiment.ends_at is not None and experiment.ends_at <= now:
        return "its end date has passed"
    return "it was stopped" if experiment.state == "stopped" else None


def _comparison(treatment: _Column, control: _Column, metric: Metric, interval: Interval | None) -> Comparison:
    if interval is not None and treatment.scale == "ratio":
        interval = _map_interval(math.expm1, interval)
    return Comparison(metric.name, metric.direction, treatment.scale, treatment.side(), control.side(), interval)


def _own_interval(interval: Interval | None, metric: str) -> Interval | None:
    """An interval of a mean in the metric's own unit."""
    if interval is None or scale_of(metric) != "ratio":
        return interval
    return _map_interval(math.exp, interval)


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
    if mean is None or (comparison.scale == "ratio" and mean == 0):
        return None
    return guardrail.margin * abs(mean) if guardrail.is_relative else guardrail.margin / mean
