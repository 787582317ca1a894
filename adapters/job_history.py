"""What happened in a job: its events, what was measured, its checkpoints. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select

from adapters.job_table import JobTable, find_job, find_position, read_status, to_checkpoint, to_event
from adapters.records import JobCheckpoint, JobEvent, JobStatus
from adapters.tables import JobCheckpointRow, JobEventRow

__all__ = ["JobHistory"]


class JobHistory(JobTable):
    """Events, metrics and checkpoints of jobs."""

    def events(
        self, job_id: str, *, limit: int, after: str | None = None, level: str | None = None
    ) -> tuple[list[JobEvent], bool]:
        """A job's events, newest first, behind the one called `after`, and whether there are more.

        With `level` only those of it.
        """
        with self.database.read() as session:
            find_job(session, job_id)
            statement = select(JobEventRow).where(JobEventRow.job_id == job_id)
            if level is not None:
                statement = statement.where(JobEventRow.level == level)
            if after is not None:
                position = find_position(session, JobEventRow, after, JobEventRow.job_id == job_id)
                statement = statement.where(JobEventRow.sequence < position)
            rows = session.scalars(statement.order_by(JobEventRow.sequence.desc()).limit(limit + 1)).all()
        return [to_event(row) for row in rows[:limit]], len(rows) > limit

    def follow(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], JobStatus]:
        """A job's events in the order in which they happened, behind the one called `after`, and its status by then."""
        with self.database.read() as session:
            job = find_job(session, job_id)
            statement = select(JobEventRow).where(JobEventRow.job_id == job_id)
            if after is not None:
                position = find_position(session, JobEventRow, after, JobEventRow.job_id == job_id)
                statement = statement.where(JobEventRow.sequence > position)
            rows = session.scalars(statement.order_by(JobEventRow.sequence).limit(limit)).all()
            return [to_event(row) for row in rows], read_status(job)

    def metrics(self, job_id: str) -> list[Mapping[str, Any]]:
        """What was measured at each step, in order; of a step that was taken twice, the later."""
        with self.database.read() as session:
            statement = select(JobEventRow.data).where(JobEventRow.job_id == job_id, JobEventRow.kind == "metrics")
            found = [data for data in session.scalars(statement.order_by(JobEventRow.sequence)) if data]
        return [data for _, data in sorted({data["step"]: data for data in found}.items())]

    def checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> tuple[list[JobCheckpoint], bool]:
        """A job's checkpoints, newest first, behind the one called `after`, and whether there are more."""
        with self.database.read() as session:
            alias = find_job(session, job_id).alias
            statement = select(JobCheckpointRow).where(JobCheckpointRow.job_id == job_id)
            if after is not None:
                position = find_position(session, JobCheckpointRow, after, JobCheckpointRow.job_id == job_id)
                statement = statement.where(JobCheckpointRow.sequence < position)
            rows = session.scalars(statement.order_by(JobCheckpointRow.sequence.desc()).limit(limit + 1)).all()
        return [to_checkpoint(row, alias) for row in rows[:limit]], len(rows) > limit
