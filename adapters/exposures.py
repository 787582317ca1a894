"""Exposures and feedback: one row for each request that was bound to what answers it, and what came of it by unit.

Functions over a session, so that whoever writes or reads them decides what else is in the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from adapters.database import actor_of
from adapters.errors import FeedbackTooLateError, NotFoundError
from adapters.experiment_config import check_feedback_name
from adapters.records import Exposure, Feedback, UnitOutcomes
from adapters.tables import ExposureRow, FeedbackRow, utc_now

__all__ = ["FEEDBACK_WINDOW", "add_exposure", "add_feedback", "read_outcomes"]

FEEDBACK_WINDOW = timedelta(days=7)
_MAX_ERROR_CHARS = 500


def add_exposure(session: Session, exposure: Exposure, feedback: Sequence[Feedback] = ()) -> None:
    """Add the row of an exposure, and what was reported on it before it ended."""
    binding = exposure.binding
    session.add(
        ExposureRow(
            response_id=exposure.response_id,
            served_at=utc_now(),
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
        InvalidInputError: the metric is one that is measured anyway.
        NotFoundError: no response that the actor may see has this id.
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
    session.merge(_feedback_row(feedback))


def _feedback_row(feedback: Feedback) -> FeedbackRow:
    return FeedbackRow(
        response_id=feedback.response_id,
        metric=feedback.metric,
        value=feedback.value,
        comment=feedback.comment,
        reported_at=utc_now(),
    )


def read_outcomes(session: Session, experiment_id: str, stage: int) -> dict[str, list[UnitOutcomes]]:
    """By arm what came of each unit in one stage, the earliest exposed first; arms without units are not there.

    Three grouped queries, whatever the number of metrics: over exposures, over responses with feedback, and over
    feedback by metric. Forced exposures are left out.
    """
    feedback = _feedback_by_unit(session, experiment_id, stage)
    num_with_feedback = _responses_with_feedback(session, experiment_id, stage)
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
        .where(*_in_stage(experiment_id, stage))
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


def _in_stage(experiment_id: str, stage: int) -> tuple[ColumnElement[bool], ...]:
    return (ExposureRow.experiment_id == experiment_id, ExposureRow.stage == stage, ExposureRow.forced.is_(False))


def _responses_with_feedback(session: Session, experiment_id: str, stage: int) -> dict[tuple[str, str], int]:
    statement = (
        select(ExposureRow.arm, ExposureRow.unit, func.count(ExposureRow.response_id.distinct()))
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(*_in_stage(experiment_id, stage))
        .group_by(ExposureRow.arm, ExposureRow.unit)
    )
    return {(arm or "", unit): count for arm, unit, count in session.execute(statement)}


def _feedback_by_unit(
    session: Session, experiment_id: str, stage: int
) -> dict[tuple[str, str], Mapping[str, tuple[float, int]]]:
    """By arm and unit, and then by metric: the mean value and how many responses have one."""
    statement = (
        select(ExposureRow.arm, ExposureRow.unit, FeedbackRow.metric, func.avg(FeedbackRow.value), func.count())
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(*_in_stage(experiment_id, stage))
        .group_by(ExposureRow.arm, ExposureRow.unit, FeedbackRow.metric)
    )
    found: dict[tuple[str, str], dict[str, tuple[float, int]]] = defaultdict(dict)
    for arm, unit, metric, mean, count in session.execute(statement):
        found[(arm or "", unit)][metric] = (float(mean), count)
    return dict(found)
