"""What came of an experiment's units: each one's requests, and what was reported on them, in the order of their coming.

Reads, and computes nothing; `experiment_metrics` makes numbers of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from adapters.records import Experiment
from adapters.tables import ExposureRow, FeedbackRow

__all__ = ["LONGEST_MS", "AnsweredRequest", "ReportedValue", "UnitOutcomes", "read_history", "read_outcomes"]

_ROWS_AT_ONCE = 5_000
LONGEST_MS = 86_400_000.0  # a longer answer is counted as a day's: any float may stand in a row, and dates end


class AnsweredRequest(NamedTuple):
    """One of a unit's requests, as it is analysed. `at` is when it was bound to what answers it."""

    at: datetime
    is_error: bool
    is_length: bool
    ttft_ms: float | None
    total_ms: float
    completion_tokens: int
    has_feedback: bool

    @property
    def ended_at(self) -> datetime:
        """When its answer was there, or had failed."""
        return self.at + timedelta(milliseconds=min(self.total_ms, LONGEST_MS))


class ReportedValue(NamedTuple):
    """What was reported on one of a unit's requests: when that was, and when the request was."""

    value: float
    at: datetime
    asked_at: datetime


@dataclass(slots=True)
class UnitOutcomes:
    """What came of one unit's requests in one arm and stage: the requests as they came, at least one.

    `reports` are by metric what clients reported, as it came.
    """

    unit: str
    requests: list[AnsweredRequest]
    reports: dict[str, list[ReportedValue]] = field(default_factory=dict)

    @property
    def first_at(self) -> datetime:
        """When the unit came."""
        return self.requests[0].at

    @property
    def first_answered(self) -> AnsweredRequest:
        """The request that was answered first, which need not be the one that was asked first."""
        first, ended_at = self.requests[0], self.requests[0].ended_at
        for request in self.requests[1:]:
            if request.at >= ended_at:  # as all behind it: most users wait for an answer before they ask again
                break
            if request.ended_at < ended_at:
                first, ended_at = request, request.ended_at
        return first

    @property
    def answered_at(self) -> datetime:
        """When its first answer was there, and the first of its rows was written."""
        return self.first_answered.ended_at


def read_outcomes(session: Session, experiment_id: str, stage: int) -> dict[str, list[UnitOutcomes]]:
    """By arm what came of each unit in one stage, the earliest exposed first; arms without units are not there.

    Forced exposures are left out. Two plain queries: grouping so many rows takes the database longer than reading them.
    """
    found = _read_units(
        session,
        (ExposureRow.experiment_id == experiment_id, ExposureRow.stage == stage, ExposureRow.forced.is_(False)),
    )
    outcomes: dict[str, list[UnitOutcomes]] = {}
    for (arm, _), unit in found.items():
        outcomes.setdefault(arm, []).append(unit)
    return outcomes


def read_history(session: Session, experiment: Experiment) -> list[UnitOutcomes]:
    """What the units of an experiment's present stage did on its alias before it began, whatever answered them then.

    Units that did nothing are not there. Of a unit that was in arms of other experiments there are several. What was
    reported later, on an answer of before, is none of it: the arm has had a part in that.
    """
    if experiment.starts_at is None:
        return []
    of_stage = select(ExposureRow.unit).where(
        ExposureRow.experiment_id == experiment.id, ExposureRow.stage == experiment.stage
    )
    before = (
        ExposureRow.alias == experiment.alias,
        ExposureRow.served_at < experiment.starts_at,
        ExposureRow.experiment_id.is_distinct_from(experiment.id),
        ExposureRow.unit.in_(of_stage),
    )
    return list(_read_units(session, before, reported=(FeedbackRow.reported_at < experiment.starts_at,)).values())


def _read_units(
    session: Session, wanted: Sequence[ColumnElement[bool]], *, reported: Sequence[ColumnElement[bool]] = ()
) -> dict[tuple[str, str], UnitOutcomes]:
    """By arm and unit, in the order in which the units came; equal times are ordered by the responses' ids."""
    # Plain rows, some at a time: as many objects of the session, or all rows at once, would take twice as long.
    connection = session.connection()
    statement = (
        select(FeedbackRow.response_id, FeedbackRow.metric, FeedbackRow.value, FeedbackRow.reported_at)
        .join(ExposureRow, ExposureRow.response_id == FeedbackRow.response_id)
        .where(*wanted, *reported)
        .order_by(FeedbackRow.reported_at, FeedbackRow.response_id)
        .execution_options(yield_per=_ROWS_AT_ONCE)
    )
    reports = [(response, metric, value, at) for response, metric, value, at in connection.execute(statement)]
    asked: dict[str, tuple[UnitOutcomes, datetime] | None] = dict.fromkeys(response for response, *_ in reports)
    units: dict[tuple[str, str], UnitOutcomes] = {}
    for response, arm, unit, *measured in connection.execute(_select_requests(wanted)):
        at, is_error, is_length, ttft_ms, total_ms, tokens = measured
        has_feedback = response in asked
        if (found := units.get((arm or "", unit))) is None:
            found = units[(arm or "", unit)] = UnitOutcomes(unit, [])
        found.requests.append(
            AnsweredRequest(at, bool(is_error), bool(is_length), ttft_ms, total_ms, tokens, has_feedback)
        )
        if has_feedback:
            asked[response] = found, at
    for response, metric, value, at in reports:
        # Two queries may see two states: a request whose feedback was read can be deleted before it is read itself.
        if (place := asked[response]) is not None:
            place[0].reports.setdefault(metric, []).append(ReportedValue(value, at, place[1]))
    return units


def _select_requests(wanted: Sequence[ColumnElement[bool]]) -> Select[*tuple[Any, ...]]:
    columns: tuple[Any, ...] = (
        ExposureRow.response_id,
        ExposureRow.arm,
        ExposureRow.unit,
        ExposureRow.served_at,
        ExposureRow.error.is_not(None),
        ExposureRow.finish_reason == "length",
        ExposureRow.ttft_ms,
        ExposureRow.total_ms,
        ExposureRow.completion_tokens,
    )
    in_order = select(*columns).where(*wanted).order_by(ExposureRow.served_at, ExposureRow.response_id)
    return in_order.execution_options(yield_per=_ROWS_AT_ONCE)
