"""What the topics of the job table share: finding a job for whoever asks, its events, and rows turned into records."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from adapters.database import Database, actor_of
from adapters.errors import NotFoundError
from adapters.files import ACTIVE_STATUSES
from adapters.paging import unknown_place
from adapters.records import Job, JobCheckpoint, JobError, JobEvent, JobStatus, checkpoint_name
from adapters.tables import JobCheckpointRow, JobEventRow, JobRow, utc_now

__all__ = ["JobTable", "find_job", "find_position", "read_status", "to_checkpoint", "to_event", "to_job"]

_MAX_MESSAGE_CHARS = 2000


class JobTable:
    """The table in one database; each topic of it is a class of its own, and `JobService` joins them.

    Args:
        database: Holds the table.
        clock: The present moment, by which leases run out.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.database = database
        self._clock = clock

    def _fail(self, session: Session, row: JobRow, error: JobError) -> None:
        row.status, row.finished_at, row.estimated_finish = "failed", self._clock(), None
        row.error = {"code": error.code, "message": error.message[:_MAX_MESSAGE_CHARS], "param": error.param}
        self._add_event(session, row.id, f"The job failed: {error.message}", level="error")

    def _add_event(
        self,
        session: Session,
        job_id: str,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        session.add(
            JobEventRow(
                id=f"ftevent-{secrets.token_hex(12)}",
                job_id=job_id,
                created_at=self._clock(),
                level=level,
                kind="message" if data is None else "metrics",
                message=message[:_MAX_MESSAGE_CHARS],
                data=None if data is None else dict(data),
            )
        )
        session.flush()  # one by one, so that their numbers keep their order


def find_job(session: Session, job_id: str) -> JobRow:
    """A job's row.

    Raises:
        NotFoundError: no job has this id, or it is for an alias that the session's actor may not see.
    """
    row = session.scalar(select(JobRow).where(JobRow.id == job_id))
    if row is None or not actor_of(session).can_see(row.alias):
        raise NotFoundError(f"there is no fine-tuning job {job_id[:80]!r}")
    return row


def find_position(
    session: Session,
    table: type[JobRow] | type[JobEventRow] | type[JobCheckpointRow],
    given: str,
    is_listed: ColumnElement[bool],
) -> int:
    """The number in a list's order of what a client calls `after`.

    Raises:
        InvalidInputError: the list has nothing of this name.
    """
    position = session.scalar(select(table.sequence).where(table.id == given, is_listed))
    if position is None:
        raise unknown_place(given)
    return position


def read_status(row: JobRow) -> JobStatus:
    """A row's status."""
    assert row.status in (*ACTIVE_STATUSES, "succeeded", "failed", "cancelled")
    return row.status  # type: ignore[return-value]


def to_job(row: JobRow, queue_position: int | None = None) -> Job:
    """A job as a record."""
    return Job(
        id=row.id,
        status=read_status(row),
        model=row.model,
        alias=row.alias,
        training_file=row.training_file,
        validation_file=row.validation_file,
        method=row.method,
        seed=row.seed,
        metadata=row.details,
        created_at=row.created_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        trained_tokens=row.trained_tokens,
        fine_tuned_model=row.fine_tuned_model,
        result_file=row.result_file,
        error=JobError(**row.error) if row.error else None,
        start_from=row.start_from,
        priority=row.priority,
        queue_position=queue_position,
        integrations=tuple(row.integrations),
    )


def to_event(row: JobEventRow) -> JobEvent:
    """An event as a record."""
    return JobEvent(row.id, row.created_at, _level(row), _kind(row), row.message, row.data)


def to_checkpoint(row: JobCheckpointRow, alias: str) -> JobCheckpoint:
    """A checkpoint of a job for `alias` as a record."""
    name = checkpoint_name(alias, row.job_id, row.step)
    return JobCheckpoint(row.id, row.job_id, row.step, row.created_at, row.metrics, name, row.digest is not None)


def _level(row: JobEventRow) -> Literal["info", "warn", "error"]:
    assert row.level in ("info", "warn", "error")
    return row.level  # type: ignore[return-value]


def _kind(row: JobEventRow) -> Literal["message", "metrics"]:
    assert row.kind in ("message", "metrics")
    return row.kind  # type: ignore[return-value]
