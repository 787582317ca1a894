"""The wire of what came of an experiment: verdict, effects, guardrails, split. Written from the core's report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field

from adapters.evidence import Comparison, Guard, Treatment
from adapters.experiment_report import ArmReport, ExperimentReport, MetricReport
from adapters.statistics import Interval

__all__ = ["ReportObject", "report_object"]

_Direction = Literal["increase", "decrease"]
_Scale = Literal["share", "ratio", "number"]


class IntervalObject(BaseModel):
    """An estimate with its two-sided confidence interval; it holds at all looks at once, however many."""

    estimate: float
    low: float
    high: float
    confidence: float


class MetricObject(BaseModel):
    """One metric in one arm; the mean is over users, with the scale `ratio` a geometric one.

    Of the plan's metrics each user's first outcome counts; of others all answers, without an interval.
    """

    metric: str
    role: Literal["primary", "guardrail", "other"] = Field(description="`other` takes no part in the verdict.")
    scale: _Scale
    num_outcomes: int = Field(description="Requests that have a value.")
    num_units: int = Field(description="Users that have a value.")
    num_missing: int = Field(description="Users that have none.")
    mean: float
    interval: IntervalObject | None
    difference: IntervalObject | None = Field(
        description="Against the first arm; with the scale `ratio` as a relative change, 0.1 is 10 % more."
    )


class ArmReportObject(BaseModel):
    """One arm and what came of it."""

    name: str
    version: str
    digest: str
    weight: float
    num_exposures: int
    num_units: int
    num_errors: int
    metrics: list[MetricObject]


class ComparisonObject(BaseModel):
    """One metric of a treatment against the control."""

    metric: str
    direction: _Direction = Field(description="In which direction it gets better.")
    scale: _Scale
    difference: IntervalObject | None = Field(description="Null while there is too little data.")
    variance_removed: float | None = Field(
        None,
        description="How much of users' differences their past explains, where a fixed sample was adjusted by it.",
    )


class GuardrailObject(ComparisonObject):
    """A guardrail: held if worse than the margin is ruled out, breached if anything better is."""

    margin: float | None = Field(description="By how much it may be worse, on the scale of the difference.")
    state: Literal["held", "breached", "open", "no_data", "no_variation"]


class TreatmentObject(BaseModel):
    """A treatment against the control."""

    arm: str
    version: str
    outcome: Literal["better", "worse", "equivalent", "open", "no_data"]
    primary: ComparisonObject | None
    guardrails: list[GuardrailObject]
    gaps: list[ComparisonObject] = Field(
        description="How much more often the treatment's requests have a value of a metric at all."
    )
    feedback: ComparisonObject | None = Field(
        description="How much more often they have any feedback; null without any, or if `gaps` tell it."
    )


class SplitObject(BaseModel):
    """Users by arm against the weights; `fired`: chance does not explain the difference, and nothing is promoted."""

    counts: list[int]
    weights: list[float]
    p_value: float | None
    fired: bool
    stage: int = Field(description="The present stage, whose users these are.")
    stages: list[int] = Field(description="Where the check has fired and nobody has accepted it.")
    accepted: list[int] = Field(description="Where it has fired and a person has accepted it.")


class VerdictObject(BaseModel):
    """What the numbers allow, in one plain sentence."""

    kind: Literal["promote", "roll_back", "continue", "inconclusive"]
    arm: str | None = Field(description="The treatment that is meant.")
    sentence: str
    notes: list[str]
    next_step: str


class EffectObject(BaseModel):
    """The primary metric's effect after so many users of the treatment and the control."""

    arm: str
    num_units: int
    at: int
    interval: IntervalObject


class ReportObject(BaseModel):
    """What came of an experiment's present stage."""

    confidence: float = Field(
        description="Of the primary metric's intervals; guardrails share its error. It rises with arms and stages."
    )
    verdict: VerdictObject
    report: list[ArmReportObject] = Field(description="By arm, the control first.")
    treatments: list[TreatmentObject]
    split: SplitObject
    history: list[EffectObject] = Field(description="By treatment, then by users; empty for a fixed sample.")


def report_object(report: ExperimentReport) -> ReportObject:
    """A report as it is sent."""
    verdict = report.verdict
    return ReportObject(
        confidence=report.confidence,
        verdict=VerdictObject(**asdict(verdict)),
        report=[_arm(report.experiment.alias, arm) for arm in report.arms],
        treatments=[_treatment(treatment) for treatment in report.treatments],
        split=SplitObject(**asdict(report.split)),
        history=[
            EffectObject(
                arm=arm, num_units=point.num_units, at=int(point.at.timestamp()), interval=_present(point.interval)
            )
            for arm, points in report.history.items()
            for point in points
        ],
    )


def _arm(alias: str, report: ArmReport) -> ArmReportObject:
    return ArmReportObject(
        name=report.arm.name,
        version=f"{alias}@v{report.arm.number}",
        digest=report.arm.digest,
        weight=report.arm.weight,
        num_exposures=report.num_exposures,
        num_units=report.num_units,
        num_errors=report.num_errors,
        metrics=[_metric(metric) for metric in report.metrics],
    )


def _metric(report: MetricReport) -> MetricObject:
    return MetricObject(
        metric=report.metric,
        role=report.role,
        scale=report.scale,
        num_outcomes=report.num_outcomes,
        num_units=report.num_units,
        num_missing=report.num_missing,
        mean=report.mean,
        interval=_interval(report.interval),
        difference=_interval(report.difference),
    )


def _treatment(treatment: Treatment) -> TreatmentObject:
    return TreatmentObject(
        arm=treatment.name,
        version=treatment.version,
        outcome=treatment.outcome,
        primary=None if treatment.primary is None else ComparisonObject(**_compared(treatment.primary)),
        guardrails=[_guardrail(guard) for guard in treatment.guards],
        gaps=[ComparisonObject(**_compared(gap)) for gap in treatment.gaps],
        feedback=None if treatment.feedback is None else ComparisonObject(**_compared(treatment.feedback)),
    )


def _guardrail(guard: Guard) -> GuardrailObject:
    return GuardrailObject(**_compared(guard.comparison), margin=guard.margin, state=guard.state)


def _compared(comparison: Comparison) -> dict[str, Any]:
    return {
        "metric": comparison.metric,
        "direction": comparison.direction,
        "scale": comparison.scale,
        "difference": _interval(comparison.interval),
        "variance_removed": comparison.variance_removed,
    }


def _interval(interval: Interval | None) -> IntervalObject | None:
    return None if interval is None else _present(interval)


def _present(interval: Interval) -> IntervalObject:
    return IntervalObject(**asdict(interval))
