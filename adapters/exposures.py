"""Writes exposures and feedback: a row for each request that was bound to what answers it, and for what is said of it.

Functions over a session, so that whoever writes decides what else is in the transaction. `outcomes` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from adapters.database import actor_of
from adapters.errors import ConflictError, FeedbackTooLateError, NotFoundError
from adapters.experiment_config import check_feedback_name, check_feedback_value
from adapters.experiment_rows import load_plan
from adapters.records import Exposure, Feedback
from adapters.tables import ExposureRow, FeedbackRow, utc_now

__all__ = ["FEEDBACK_WINDOW", "MAX_FEEDBACK_NAMES", "add_exposure", "add_feedback"]

FEEDBACK_WINDOW = timedelta(days=7)
MAX_FEEDBACK_NAMES = 32  # of one response
_MAX_ERROR_CHARS = 500


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
