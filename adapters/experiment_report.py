"""What came of an experiment: its arms, effects with their intervals over time, guardrails, split, and the verdict.

Pure: outcomes by unit go in, a report comes out; docs/verdicts.md says how to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from adapters.evidence import Evidence, Scale, Split, Treatment, Verdict
from adapters.experiment_comparisons import StageComparisons, guard_confidence
from adapters.experiment_metrics import built_in, num_outcomes_of
from adapters.outcomes import UnitOutcomes
from adapters.records import BUILT_IN_METRICS, Arm, Decision, Experiment, Metric, MetricKind
from adapters.settled_values import Outcomes, first_outcomes, means_so_far
from adapters.statistics import Interval, sample_ratio, thompson_weights
from adapters.verdicts import judge

__all__ = [
    "LEAST_SHARE",
    "ArmReport",
    "EffectPoint",
    "ExperimentReport",
    "MetricReport",
    "accepted_guardrails",
    "better_shares",
    "has_accepted_feedback",
    "make_report",
]

_Role = Literal["primary", "guardrail", "other"]
LEAST_SHARE = 5.0
_HISTORY_POINTS = 40
_MAX_METRICS = 50  # clients name metrics, and each costs a row
_SPLIT_ALPHA = 0.01  # false alarms of the split's check, over all looks and stages


@dataclass(frozen=True, slots=True)
class MetricReport:
    """One metric in one arm: the mean over units, of what is read as a ratio the geometric one.

    Of the plan's metrics each unit's first outcome counts, and the intervals hold at all looks at once. Of `other` ones
    the mean is that of the units' means so far, which go on changing, so that it has no interval.
    """

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
    """An experiment's present stage. Differences are against the first arm.

    `confidence` is that of the primary metric's intervals, whose error those of the guardrails share. `is_closing` is
    true while a fixed sample is there and feedback on it may still come.
    """

    experiment: Experiment
    confidence: float
    arms: tuple[ArmReport, ...]
    treatments: tuple[Treatment, ...]
    split: Split
    history: Mapping[str, tuple[EffectPoint, ...]]
    verdict: Verdict
    decisions: tuple[Decision, ...]
    is_closing: bool = False


def make_report(
    experiment: Experiment,
    outcomes: Outcomes,
    *,
    now: datetime,
    window: timedelta,
    decisions: Sequence[Decision] = (),
    history: Sequence[UnitOutcomes] = (),
    in_full: bool = True,
) -> ExperimentReport:
    """Read one stage of an experiment.

    Args:
        experiment: As it is now; its stage is the one that is read.
        outcomes: What came of that stage's units, by arm.
        now: The moment of reading, against which its end is held.
        window: How long feedback on an answer is taken.
        decisions: Everything that was decided; a person's word that feedback may differ is among them.
        history: What the units did on the alias before the experiment.
        in_full: Whether to compute what the verdict doesn't need, too: every metric of every arm, and the effect over
            time.
    """
    stage = StageComparisons(experiment, outcomes, now=now, window=window, history=history)
    treatments = tuple(stage.treatment(arm) for arm in experiment.arms[1:])
    split = _split(stage, decisions)
    is_judged = experiment.analysis == "fixed" and not stage.is_early
    evidence = Evidence(
        control=f"{experiment.arms[0].name} ({experiment.alias}@v{experiment.arms[0].number})",
        treatments=treatments,
        split=split,
        metric=experiment.metric.name if experiment.metric else None,
        smallest_effect=stage.smallest_effect(),
        num_units=sum(split.counts),
        planned_units=experiment.planned_units,
        is_early=stage.is_early,
        closes_at=None if stage.sample is None else stage.sample.closes_at,
        over=_over(experiment, now, is_judged=is_judged),
        has_started=experiment.state != "draft",
        accepts_feedback_gap=has_accepted_feedback(experiment, decisions),
        is_adaptive=experiment.allocation == "thompson",
        accepted_guardrails=accepted_guardrails(experiment, decisions),
    )
    names = _metric_names(experiment, outcomes) if in_full else []
    return ExperimentReport(
        experiment=experiment,
        confidence=stage.confidence,
        arms=tuple(
            _arm(stage, arm, treatment, names)
            for arm, treatment in zip(experiment.arms, (None, *treatments), strict=True)
        ),
        treatments=treatments,
        split=split,
        history={arm.name: _history(stage, arm) for arm in experiment.arms[1:]} if in_full else {},
        verdict=judge(evidence),
        decisions=tuple(decisions),
        is_closing=stage.is_early and stage.sample is not None,
    )


def better_shares(experiment: Experiment, outcomes: Outcomes, *, now: datetime, window: timedelta) -> dict[str, float]:
    """Each arm's share of the units, in whole percent, by how probable it is that it is the best (Thompson).

    By the units' first outcomes. No arm gets less than `LEAST_SHARE` percent, so that none is given up for bad luck at
    the beginning.
    """
    metric = experiment.metric
    assert metric is not None  # a plan without one can't ask for it
    columns = [
        first_outcomes(outcomes.get(arm.name, ()), metric, now=now, window=window).values for arm in experiment.arms
    ]
    floor = min(LEAST_SHARE / 100, 1 / len(columns))
    shares = thompson_weights([column.tolist() for column in columns], direction=metric.direction, floor=floor)
    percents = [math.floor(share * 100) for share in shares]
    percents[shares.index(max(shares))] += 100 - sum(percents)
    return {arm.name: float(percent) for arm, percent in zip(experiment.arms, percents, strict=True)}


def has_accepted_feedback(experiment: Experiment, decisions: Sequence[Decision]) -> bool:
    """Whether a person has let the present stage's arms differ in how often outcomes are known, and not undone it."""
    return any(d.action == "accept_feedback" and d.stage == experiment.stage for d in _standing(decisions))


def accepted_guardrails(experiment: Experiment, decisions: Sequence[Decision]) -> frozenset[str]:
    """The metrics of the guardrails that a person no longer waits for in the present stage."""
    found = [d for d in _standing(decisions) if d.action == "accept_guardrail" and d.stage == experiment.stage]
    return frozenset(decision.numbers["metric"] for decision in found)


def _standing(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions that nobody has undone."""
    undone = {decision.numbers.get("undoes") for decision in decisions}
    return [decision for decision in decisions if decision.id not in undone]


def _split(compared: StageComparisons, decisions: Sequence[Decision]) -> Split:
    """The check of the split; once it has fired it stays so, also in later stages, until a person accepts it.

    Were a new stage a new beginning, a change of weights by a hair would silence it. The stages share its false
    alarms: the n-th has 6 / (pi n)^2 of them, which adds up to all.
    """
    experiment, stage = compared.experiment, compared.experiment.stage
    counts = tuple(len(compared.units(arm.name)) for arm in experiment.arms)
    weights = tuple(arm.weight for arm in experiment.arms)
    ratio = sample_ratio(counts, weights, alpha=_SPLIT_ALPHA * 6 / (math.pi * stage) ** 2)
    fired = {told for d in decisions if d.action == "verdict" for told in d.numbers["split"]["stages"]}
    fired |= {stage} if ratio.fired else set()
    accepted = {told for d in _standing(decisions) if d.action == "accept_split" for told in d.numbers["stages"]}
    left = tuple(sorted(fired - accepted))
    return Split(counts, weights, ratio.p_value, bool(left), stage, left, tuple(sorted(accepted)))


def _over(experiment: Experiment, now: datetime, *, is_judged: bool) -> str | None:
    """Why nothing more is to come, if so; a fixed sample that is judged has had its look."""
    if experiment.state == "decided":
        return "it was decided"
    if is_judged:
        return f"the planned {experiment.planned_units:,} users are there"
    if experiment.ends_at is not None and experiment.ends_at <= now:
        return "its end date has passed"
    return "it was stopped" if experiment.state == "stopped" else None


def _arm(stage: StageComparisons, arm: Arm, treatment: Treatment | None, names: Sequence[str]) -> ArmReport:
    """One arm, with the metrics of these names; `treatment` is what it is compared as, None of the control."""
    units = stage.units(arm.name)
    found = [_metric(stage, arm, treatment, name) for name in names]
    return ArmReport(
        arm=arm,
        num_exposures=sum(len(unit.requests) for unit in units),
        num_units=len(units),
        num_errors=sum(request.is_error for unit in units for request in unit.requests),
        metrics=tuple(report for report in found if report is not None),
    )


def _metric_names(experiment: Experiment, outcomes: Outcomes) -> list[str]:
    """The primary metric, the guardrails, what else exposures give, what else clients reported; at most so many."""
    planned = [experiment.metric.name] if experiment.metric else []
    guarded = [guardrail.metric for guardrail in experiment.guardrails]
    reported = sorted({name for units in outcomes.values() for unit in units for name in unit.reports})
    return list(dict.fromkeys([*planned, *guarded, *sorted(BUILT_IN_METRICS), *reported]))[:_MAX_METRICS]


def _metric(stage: StageComparisons, arm: Arm, treatment: Treatment | None, name: str) -> MetricReport | None:
    role, metric = _role_of(stage, name)
    units, own = stage.units(arm.name), None
    if role == "other":
        column = means_so_far(units, metric)
    elif role == "guardrail":
        column = stage.first_column(arm.name, metric)
        own = stage.own_interval(arm, column, guard_confidence(stage.experiment))
    else:
        column = stage.primary_column(arm.name, metric)
        own = None if stage.is_early else stage.own_interval(arm, column, stage.confidence)
    side = column.side()
    if side.mean is None:
        return None
    return MetricReport(
        metric=name,
        role=role,
        scale=column.scale,
        num_outcomes=sum(num_outcomes_of(unit, name) for unit in units),
        num_units=side.num_units,
        num_missing=side.num_missing,
        mean=side.mean,
        interval=own,
        difference=None if treatment is None else _difference(treatment, role, name),
    )


def _role_of(stage: StageComparisons, name: str) -> tuple[_Role, Metric]:
    """What part a metric has in the verdict, and the metric as the plan has it, else as its values look."""
    experiment = stage.experiment
    if experiment.metric is not None and experiment.metric.name == name:
        return "primary", experiment.metric
    for guardrail in experiment.guardrails:
        if guardrail.metric == name:
            return "guardrail", Metric(name, guardrail.direction, guardrail.kind)
    known = built_in(name)
    kind: MetricKind = "share" if name in stage.reported_shares else "number"
    return "other", Metric(name, known.direction if known else "increase", kind)


def _difference(treatment: Treatment, role: _Role, name: str) -> Interval | None:
    compared = [guard.comparison for guard in treatment.guards] if role == "guardrail" else [treatment.primary]
    if role == "other":
        return None
    return next((item.interval for item in compared if item is not None and item.metric == name), None)


def _history(stage: StageComparisons, arm: Arm) -> tuple[EffectPoint, ...]:
    """The primary's interval after the first units whose outcome was known, the first few more, ... all of them.

    Empty for a plan with a fixed sample: an interval for one look has no history.
    """
    metric = stage.experiment.metric
    if metric is None or stage.experiment.analysis == "fixed":
        return ()
    sides = stage.primary_column(arm.name, metric), stage.primary_column(stage.control, metric)
    arrivals = sorted(moment for side in sides for moment in side.arrivals)
    points = []
    for count in sorted({len(arrivals) * step // _HISTORY_POINTS for step in range(1, _HISTORY_POINTS + 1)} - {0}):
        until = arrivals[count - 1]
        treatment, control = (side.until(until) for side in sides)
        compared = stage.compare(arm, treatment, control, metric, stage.confidence)
        if compared.interval is not None:
            points.append(EffectPoint(count, until, compared.interval))
    return tuple(points)
