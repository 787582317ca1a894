"""The primary metric's values: one number for each unit, taken at a moment after which it stays what it is.

A sequence holds for numbers that don't change once they are counted, an interval for one look at one moment. What
guardrails and everything else are read from, all that has come so far, is in `exposures`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from adapters.experiment_metrics import value_of
from adapters.exposures import in_stage, read_outcomes
from adapters.records import BUILT_IN_METRICS, Experiment, UnitOutcomes
from adapters.tables import ExposureRow, FeedbackRow

__all__ = ["Settled", "SettledValue", "read_settled"]


@dataclass(frozen=True, slots=True)
class SettledValue:
    """One unit's number, and the moment from which on it is known."""

    value: float
    at: datetime


@dataclass(frozen=True, slots=True)
class Settled:
    """The primary metric's numbers by arm, in the order in which they became known.

    `values` is None while a plan with a fixed sample waits: for its units, or, when these are there, for `closes_at`.
    Once it is judged `num_units` says by arm how many units it has, with and without a number.
    """

    values: Mapping[str, Sequence[SettledValue]] | None
    closes_at: datetime | None = None
    num_units: Mapping[str, int] | None = None


def read_settled(session: Session, experiment: Experiment, *, now: datetime, window: timedelta) -> Settled:
    """Read the numbers of the experiment's present stage.

    With `analysis` sequential a unit's number is that of its first outcome: of what clients report the value that was
    reported first, of what exposures give that of the first one (with `feedback_rate` once its window is over). Later
    ones change nothing.

    With `analysis` fixed it is the mean over the unit's requests up to the moment at which the last planned unit came,
    once no feedback on them is taken any more: whoever reads it, then or later, reads the same.

    Args:
        session: The transaction.
        experiment: As it is now.
        now: The moment of reading.
        window: How long feedback on an answer is taken.
    """
    if experiment.metric is None:
        return Settled({})
    if experiment.analysis == "fixed":
        return _read_fixed(session, experiment, experiment.metric.name, now, window)
    if experiment.metric.name in BUILT_IN_METRICS:
        until = now - window if experiment.metric.name == "feedback_rate" else None
        outcomes = read_outcomes(session, experiment.id, experiment.stage, until=until, first_only=True)
        return Settled(_values(outcomes, experiment.metric.name))
    return Settled(_first_reports(session, experiment, experiment.metric.name))


def _read_fixed(session: Session, experiment: Experiment, metric: str, now: datetime, window: timedelta) -> Settled:
    assert experiment.planned_units is not None  # a fixed plan has it
    first_at = func.min(ExposureRow.served_at)
    arrivals = (
        select(first_at)
        .where(*in_stage(experiment.id, experiment.stage))
        .group_by(ExposureRow.arm, ExposureRow.unit)
        .order_by(first_at)
        .offset(experiment.planned_units - 1)
        .limit(1)
    )
    last = session.scalar(arrivals)
    if last is None:
        return Settled(None)
    closes_at = last + window
    if now < closes_at:
        return Settled(None, closes_at)
    outcomes = read_outcomes(session, experiment.id, experiment.stage, until=last)
    return Settled(_values(outcomes, metric), closes_at, {arm: len(units) for arm, units in outcomes.items()})


def _values(outcomes: Mapping[str, Sequence[UnitOutcomes]], metric: str) -> dict[str, list[SettledValue]]:
    return {
        arm: [SettledValue(value, unit.first_at) for unit in units if (value := value_of(unit, metric)) is not None]
        for arm, units in outcomes.items()
    }


def _first_reports(session: Session, experiment: Experiment, metric: str) -> dict[str, list[SettledValue]]:
    """In the order of the reports, not of the units: what comes late is behind what was counted before it."""
    order = FeedbackRow.reported_at, FeedbackRow.response_id
    place = func.row_number().over(partition_by=(ExposureRow.arm, ExposureRow.unit), order_by=order)
    reports = (
        select(ExposureRow.arm, FeedbackRow.value, FeedbackRow.reported_at, FeedbackRow.response_id, place.label("n"))
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(*in_stage(experiment.id, experiment.stage), FeedbackRow.metric == metric)
        .subquery()
    )
    columns = reports.c
    statement = select(columns.arm, columns.value, columns.reported_at).where(columns.n == 1)
    found: dict[str, list[SettledValue]] = defaultdict(list)
    for arm, value, at in session.execute(statement.order_by(columns.reported_at, columns.response_id)):
        found[arm].append(SettledValue(value, at))
    return dict(found)
