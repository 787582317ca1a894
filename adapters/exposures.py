"""Exposures and feedback: one row for each request that was bound to what answers it, and what came of it by unit.

Functions over a session, so that whoever writes or reads them decides what else is in the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.orm import Session

from adapters.database import actor_of
from adapters.errors import ConflictError, FeedbackTooLateError, NotFoundError
from adapters.experiment_config import check_feedback_name, check_feedback_value
from adapters.experiment_rows import load_plan
from adapters.records import Exposure, Feedback, UnitOutcomes
from adapters.tables import ExposureRow, FeedbackRow, utc_now

__all__ = ["FEEDBACK_WINDOW", "MAX_FEEDBACK_NAMES", "add_exposure", "add_feedback", "in_stage", "read_outcomes"]

FEEDBACK_WINDOW = timedelta(days=7)
MAX_FEEDBACK_NAMES = 32  # of one response
_MAX_ERROR_CHARS = 500
_Conditions = tuple[ColumnElement[bool], ...]


def add_exposure(session: Session, exposure: Exposure, feedback: Sequence[Feedback] = ()) -> None:
    """Add the row of an exposure, and what was reported on it before it ended."""
    binding = exposure.binding
    session.add(
        ExposureRow(
            response_id=exposure.response_id,
            served_at=exposure.bound_at or utc_now(),
            alias=binding.alias,
            route=binding.route,
            number=binding.number,
            digest=binding.digest,
            experiment_id=binding.experiment_id,
            arm=binding.arm,
            stage=binding.stage,
            forced=binding.forced,
            confidence=binding.confidence,
            unit=exposure.unit,
            unit_source=exposure.unit_source,
            prompt_tokens=exposure.prompt_tokens,
            completion_tokens=exposure.completion_tokens,
            ttft_ms=exposure.ttft_ms,
            total_ms=exposure.total_ms,
            finish_reason=exposure.finish_reason,
            error=exposure.error[:_MAX_ERROR_CHARS] if exposure.error else None,
        )
    )
    if feedback:
        session.flush()  # feedback points to it
        session.add_all(_feedback_row(item) for item in feedback)


def add_feedback(session: Session, feedback: Feedback, *, window: timedelta) -> None:
    """Add an outcome, or replace the one that the response has for this metric.

    Raises:
        InvalidInputError: the metric is one that is measured anyway, or a share and the value is none.
        NotFoundError: no response that the actor may see has this id.
        ConflictError: there is feedback by as many metrics as there may be.
        FeedbackTooLateError: the response is older than the window.
    """
    check_feedback_name(feedback.metric)
    exposure = session.get(ExposureRow, feedback.response_id)
    if exposure is None or not actor_of(session).can_see(exposure.alias):
        raise NotFoundError(f"there is no response {feedback.response_id!r}")
    age = utc_now() - exposure.served_at
    if age > window:
        raise FeedbackTooLateError(
            f"response {feedback.response_id!r} is {age.total_seconds() / 3600:.1f} hours old; feedback is taken for "
            f"{window.total_seconds() / 3600:g} hours"
        )
    if exposure.experiment_id is not None:
        check_feedback_value(load_plan(session, exposure.experiment_id), feedback.metric, feedback.value)
    if (before := session.get(FeedbackRow, (feedback.response_id, feedback.metric))) is not None:
        before.value, before.comment = feedback.value, feedback.comment  # it keeps its place among the outcomes
        return
    names = select(func.count()).where(FeedbackRow.response_id == feedback.response_id)
    if session.scalars(names).one() >= MAX_FEEDBACK_NAMES:
        raise ConflictError(
            f"{feedback.response_id!r} has feedback by {MAX_FEEDBACK_NAMES} metrics, the most there may be"
        )
    session.add(_feedback_row(feedback))


def _feedback_row(feedback: Feedback) -> FeedbackRow:
    return FeedbackRow(
        response_id=feedback.response_id,
        metric=feedback.metric,
        value=feedback.value,
        comment=feedback.comment,
        reported_at=utc_now(),
    )


def read_outcomes(
    session: Session, experiment_id: str, stage: int, *, until: datetime | None = None, first_only: bool = False
) -> dict[str, list[UnitOutcomes]]:
    """By arm what came of each unit in one stage, the earliest exposed first; arms without units are not there.

    Three grouped queries, whatever the number of metrics: over exposures, over responses with feedback, and over
    feedback by metric. Forced exposures are left out, and if so asked those after a moment, and all but each unit's
    first.
    """
    wanted = in_stage(experiment_id, stage)
    if until is not None:
        wanted += (ExposureRow.served_at <= until,)
    if first_only:
        wanted += (ExposureRow.response_id.in_(_first_responses(wanted)),)
    feedback = _feedback_by_unit(session, wanted)
    num_with_feedback = _responses_with_feedback(session, wanted)
    outcomes: dict[str, list[UnitOutcomes]] = defaultdict(list)
    first_at = func.min(ExposureRow.served_at)
    statement = (
        select(
            ExposureRow.arm,
            ExposureRow.unit,
            first_at,
            func.count(),
            func.count(ExposureRow.error),
            func.sum(case((ExposureRow.finish_reason == "length", 1), else_=0)),
            func.count(ExposureRow.ttft_ms),
            func.coalesce(func.sum(ExposureRow.ttft_ms), 0.0),
            func.sum(ExposureRow.total_ms),
            func.sum(ExposureRow.completion_tokens),
        )
        .where(*wanted)
        .group_by(ExposureRow.arm, ExposureRow.unit)
        .order_by(first_at, ExposureRow.unit)
    )
    for arm, unit, first, exposures, errors, length, with_ttft, ttft_ms, total_ms, tokens in session.execute(statement):
        key = (arm or "", unit)
        outcomes[arm or ""].append(
            UnitOutcomes(
                unit=unit,
                first_at=first,
                num_exposures=exposures,
                num_errors=errors,
                num_length=length,
                num_ttft=with_ttft,
                sum_ttft_ms=ttft_ms,
                sum_total_ms=total_ms,
                sum_completion_tokens=tokens,
                num_with_feedback=num_with_feedback.get(key, 0),
                feedback=feedback.get(key, {}),
            )
        )
    return dict(outcomes)


def in_stage(experiment_id: str, stage: int) -> tuple[ColumnElement[bool], ...]:
    """What selects the exposures that count in a stage."""
    return (ExposureRow.experiment_id == experiment_id, ExposureRow.stage == stage, ExposureRow.forced.is_(False))


def _first_responses(wanted: _Conditions) -> Select[tuple[str]]:
    """The id of each unit's first response."""
    order = ExposureRow.served_at, ExposureRow.response_id
    place = func.row_number().over(partition_by=(ExposureRow.arm, ExposureRow.unit), order_by=order)
    placed = select(ExposureRow.response_id, place.label("n")).where(*wanted).subquery()
    return select(placed.c.response_id).where(placed.c.n == 1)


def _responses_with_feedback(session: Session, wanted: _Conditions) -> dict[tuple[str, str], int]:
    statement = (
        select(ExposureRow.arm, ExposureRow.unit, func.count(ExposureRow.response_id.distinct()))
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(*wanted)
        .group_by(ExposureRow.arm, ExposureRow.unit)
    )
    return {(arm or "", unit): count for arm, unit, count in session.execute(statement)}


def _feedback_by_unit(session: Session, wanted: _Conditions) -> dict[tuple[str, str], Mapping[str, tuple[float, int]]]:
    """By arm and unit, and then by metric: the mean value and how many responses have one."""
    statement = (
        select(ExposureRow.arm, ExposureRow.unit, FeedbackRow.metric, func.avg(FeedbackRow.value), func.count())
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(*wanted)
        .group_by(ExposureRow.arm, ExposureRow.unit, FeedbackRow.metric)
    )
    found: dict[tuple[str, str], dict[str, tuple[float, int]]] = defaultdict(dict)
    for arm, unit, metric, mean, count in session.execute(statement):
        found[(arm or "", unit)][metric] = (float(mean), count)
    return dict(found)
