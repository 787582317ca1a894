"""The job table: what is to be trained, who is at it, and what came of it.

Clients create jobs and cancel, pause and resume them; a supervisor claims one for a time that it keeps renewing.
Whoever dies loses the claim when its lease has run out, and the job is taken up again from its newest checkpoint.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, or_, select, sql
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database, actor_of
from adapters.errors import AliasForbiddenError, ConflictError, InvalidInputError, NotFoundError, OverloadedError
from adapters.files import ACTIVE_STATUSES, TRAINING_PURPOSE
from adapters.paging import unknown_place
from adapters.records import (
    Actor,
    Job,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobStatus,
    check_alias_name,
)
from adapters.tables import FileRow, JobCheckpointRow, JobEventRow, JobRow, utc_now

__all__ = ["MAX_ATTEMPTS", "Claim", "JobOrder", "JobService", "Standing"]

MAX_ATTEMPTS = 3
_RETRY_AFTER_S = 60
_MAX_MESSAGE_CHARS = 2000

Standing = Literal["continue", "pause", "stop"]


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What a client asks for. Without an alias, one is made of the model's name and the job's id."""

    model: str
    training_file: str
    method: Mapping[str, Any]
    seed: int
    alias: str | None = None
    validation_file: str | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a job; `token` is what makes it this one."""

    job: Job
    token: str


class JobService:
    """Jobs over one database; safe to use from several threads and processes.

    Args:
        database: Holds the job table.
        max_queued: Jobs that may wait; more are refused.
        clock: The present moment, by which leases run out.
    """

    def __init__(self, database: Database, *, max_queued: int = 100, clock: Callable[[], datetime] = utc_now) -> None:
        self.database = database
        self._max_queued = max_queued
        self._clock = clock

    def acting_for(self, actor: Actor) -> JobService:
        """The same service on somebody's behalf: jobs for aliases that the actor may not see do not exist in it."""
        return JobService(self.database.acting_for(actor), max_queued=self._max_queued, clock=self._clock)

    def create(self, order: JobOrder) -> Job:
        """Queue a job.

        Raises:
            AliasForbiddenError: the actor is limited to other aliases.
            InvalidInputError: a file does not exist or is no training data; names the field.
            InvalidNameError: the alias breaks the grammar.
            OverloadedError: too many jobs are waiting.
        """
        job_id = f"ftjob-{secrets.token_hex(12)}"
        alias = check_alias_name(order.alias or _make_alias(order.model, job_id))
        if not self.database.actor.can_see(alias):
            raise AliasForbiddenError(
                f"this API key may not train {alias!r}; the suffix names the alias", param="suffix"
            )
        with self.database.write() as session:
            _check_file(session, order.training_file, "training_file")
            if order.validation_file is not None:
                _check_file(session, order.validation_file, "validation_file")
            if _count_queued(session) >= self._max_queued:
                raise OverloadedError(
                    f"{self._max_queued} jobs are waiting, as many as this server takes", retry_after_s=_RETRY_AFTER_S
                )
            row = JobRow(
                id=job_id,
                status="queued",
                model=order.model,
                alias=alias,
                training_file=order.training_file,
                validation_file=order.validation_file,
                method=dict(order.method),
                seed=order.seed,
                details=dict(order.metadata or {}),
                created_at=self._clock(),
                num_attempts=0,
            )
            session.add(row)
            session.flush()
            record_act(session, "create_job", job_id, alias=alias)
            self._add_event(session, job_id, f"Created fine-tuning job: {job_id}")
            return _to_job(row)

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFoundError: no job has this id.
        """
        with self.database.read() as session:
            return _to_job(_find(session, job_id))

    def events(self, job_id: str, *, limit: int, after: str | None = None) -> tuple[list[JobEvent], bool]:
        """A job's events, newest first, behind the one called `after`, and whether there are more."""
        with self.database.read() as session:
            _find(session, job_id)
            statement = select(JobEventRow).where(JobEventRow.job_id == job_id)
            if after is not None:
                position = _find_position(session, JobEventRow, after, JobEventRow.job_id == job_id)
                statement = statement.where(JobEventRow.sequence < position)
            rows = session.scalars(statement.order_by(JobEventRow.sequence.desc()).limit(limit + 1)).all()
        return [_to_event(row) for row in rows[:limit]], len(rows) > limit

    def follow(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], JobStatus]:
        """A job's events in the order in which they happened, behind the one called `after`, and its status by then."""
        with self.database.read() as session:
            job = _find(session, job_id)
            statement = select(JobEventRow).where(JobEventRow.job_id == job_id)
            if after is not None:
                position = _find_position(session, JobEventRow, after, JobEventRow.job_id == job_id)
                statement = statement.where(JobEventRow.sequence > position)
            rows = session.scalars(statement.order_by(JobEventRow.sequence).limit(limit)).all()
            return [_to_event(row) for row in rows], _status(job)

    def metrics(self, job_id: str) -> list[Mapping[str, Any]]:
        """What was measured at each step, in order; of a step that was taken twice, the later."""
        with self.database.read() as session:
            statement = select(JobEventRow.data).where(JobEventRow.job_id == job_id, JobEventRow.kind == "metrics")
            found = [data for data in session.scalars(statement.order_by(JobEventRow.sequence)) if data]
        return [data for _, data in sorted({data["step"]: data for data in found}.items())]

    def checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> tuple[list[JobCheckpoint], bool]:
        """A job's checkpoints, newest first, behind the one called `after`, and whether there are more."""
        with self.database.read() as session:
            _find(session, job_id)
            statement = select(JobCheckpointRow).where(JobCheckpointRow.job_id == job_id)
            if after is not None:
                position = _find_position(session, JobCheckpointRow, after, JobCheckpointRow.job_id == job_id)
                statement = statement.where(JobCheckpointRow.sequence < position)
            rows = session.scalars(statement.order_by(JobCheckpointRow.sequence.desc()).limit(limit + 1)).all()
        return [_to_checkpoint(row) for row in rows[:limit]], len(rows) > limit

    def list(
        self, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """Jobs, newest first, behind the one called `after`, and whether there are more.

        Args:
            limit: How many at most.
            after: The last job of the page before.
            metadata: Only jobs whose metadata has all of these.
        """
        statement = select(JobRow).order_by(JobRow.sequence.desc())
        found: list[Job] = []
        with self.database.read() as session:
            if after is not None:
                aliases = session.scalars(select(JobRow.alias).where(JobRow.id == after)).all()
                is_seen = all(actor_of(session).can_see(alias) for alias in aliases)
                position = _find_position(session, JobRow, after, sql.true() if is_seen else sql.false())
                statement = statement.where(JobRow.sequence < position)
            for row in session.scalars(statement.execution_options(yield_per=100)):
                # Compared here: keys are the client's own, and no database's path language should read them.
                if not actor_of(session).can_see(row.alias):
                    continue
                if metadata and any(row.details.get(key) != value for key, value in metadata.items()):
                    continue
                if len(found) == limit:
                    return found, True
                found.append(_to_job(row))
        return found, False

    def cancel(self, job_id: str) -> Job:
        """End a job for good; nothing of it is published. The trainer notices at its next step.

        Raises:
            ConflictError: it has succeeded or failed.
        """
        return self._turn(job_id, "cancelled", {"queued", "running", "paused"}, "The job was cancelled")

    def pause(self, job_id: str) -> Job:
        """Stop a job after a checkpoint, which the trainer writes at its next step.

        Raises:
            ConflictError: it is at its end.
        """
        return self._turn(job_id, "paused", {"queued", "running"}, "The job was paused")

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again.

        Raises:
            ConflictError: it is not paused.
        """
        return self._turn(job_id, "queued", {"paused"}, "The job was resumed")

    def claim(self, *, lease_s: float) -> Claim | None:
        """Take the oldest job that waits, or whose trainer is lost; None if there is none."""
        with self.database.write() as session:
            now = self._clock()
            is_free = or_(JobRow.claim.is_(None), JobRow.lease_until < now)
            statement = select(JobRow).where(JobRow.status.in_(("queued", "running")), is_free)
            for row in session.scalars(statement.order_by(JobRow.sequence).with_for_update(skip_locked=True)).all():
                if row.num_attempts >= MAX_ATTEMPTS:
                    self._end_exhausted(session, row)
                    continue
                row.status, row.claim = "running", secrets.token_hex(12)
                row.lease_until = now + timedelta(seconds=lease_s)
                row.num_attempts += 1
                self._add_event(session, row.id, "The job is running")
                return Claim(_to_job(row), row.claim)
        return None

    def renew(self, claim: Claim, *, lease_s: float) -> bool:
        """Hold a claim for another while; False if it is lost."""
        with self.database.write() as session:
            row = _find(session, claim.job.id)
            if row.claim != claim.token:
                return False
            row.lease_until = self._clock() + timedelta(seconds=lease_s)
            return True

    def standing(self, claim: Claim) -> Standing:
        """What the holder of a claim has to do: go on, write a checkpoint and end, or end at once."""
        with self.database.read() as session:
            row = _find(session, claim.job.id)
            if row.claim != claim.token or row.status not in ACTIVE_STATUSES:
                return "stop"
            return "continue" if row.status == "running" else "pause"

    def release(self, claim: Claim, *, problem: str | None = None) -> Job:
        """Give a claim back; a job that was still running waits again. Without a `problem` the attempt doesn't count.

        Does nothing but read the job where the claim is lost.
        """
        with self.database.write() as session:
            row = _find(session, claim.job.id)
            if row.claim == claim.token:
                row.claim = row.lease_until = row.estimated_finish = None
                if problem is None:
                    row.num_attempts = 0
                else:
                    self._add_event(session, row.id, problem, level="warn")
                if row.status == "running":
                    row.status = "queued"
            return _to_job(row)

    def note(self, claim: Claim, message: str) -> None:
        """Write an event of a job that one holds."""
        with self.database.write() as session:
            if _find(session, claim.job.id).claim == claim.token:
                self._add_event(session, claim.job.id, message)

    def note_metrics(
        self, claim: Claim, message: str, data: Mapping[str, Any], *, trained_tokens: int, seconds_left: float
    ) -> None:
        """Write what was measured at `data["step"]`, how far the job is, and when it will be at its end."""
        with self.database.write() as session:
            row = _find(session, claim.job.id)
            if row.claim == claim.token:
                row.trained_tokens = trained_tokens
                row.estimated_finish = self._clock() + timedelta(seconds=seconds_left)
                self._add_event(session, row.id, message, data=data)

    def add_checkpoint(self, claim: Claim, step: int, metrics: Mapping[str, float]) -> None:
        """Record that a step's state lies in the job's folder, whole. The job is given all its attempts again."""
        with self.database.write() as session:
            row = _find(session, claim.job.id)
            if row.claim != claim.token:
                return
            row.num_attempts = min(row.num_attempts, 1)
            found = session.scalars(
                select(JobCheckpointRow).where(JobCheckpointRow.job_id == row.id, JobCheckpointRow.step == step)
            ).first()
            if found is not None:
                return
            session.add(
                JobCheckpointRow(
                    id=f"ftckpt-{secrets.token_hex(12)}",
                    job_id=row.id,
                    step=step,
                    created_at=self._clock(),
                    metrics=dict(metrics),
                )
            )
            self._add_event(session, row.id, f"Checkpoint at step {step}")

    def fail(self, claim: Claim, error: JobError) -> None:
        """End a job that one holds with an error; one that was cancelled stays cancelled."""
        with self.database.write() as session:
            row = _find(session, claim.job.id)
            if row.claim == claim.token and row.status in ACTIVE_STATUSES:
                self._fail(session, row, error)

    def succeed(
        self, session: Session, claim: Claim, *, fine_tuned_model: str, result_file: str, trained_tokens: int
    ) -> None:
        """End a job well, in the transaction that publishes what came of it.

        Raises:
            ConflictError: the claim is lost, or the job was cancelled or paused meanwhile; nothing is to be published.
        """
        row = _find(session, claim.job.id)
        if row.claim != claim.token or row.status != "running":
            raise ConflictError(f"job {row.id} is {row.status}, and no longer this trainer's")
        row.status, row.finished_at = "succeeded", self._clock()
        row.fine_tuned_model, row.result_file, row.trained_tokens = fine_tuned_model, result_file, trained_tokens
        row.estimated_finish = None
        self._add_event(session, row.id, f"New fine-tuned model created: {fine_tuned_model}")
        self._add_event(session, row.id, "The job has successfully completed")

    def _turn(self, job_id: str, status: JobStatus, allowed: set[str], message: str) -> Job:
        with self.database.write() as session:
            row = _find(session, job_id)
            if row.status != status:
                if row.status not in allowed:
                    expected = " or ".join(sorted(allowed))
                    raise ConflictError(f"job {row.id} is {row.status}; expected {expected}")
                row.status = status
                row.estimated_finish = None
                if status == "cancelled":
                    row.finished_at = self._clock()
                    record_act(session, "cancel_job", row.id)
                self._add_event(session, row.id, message)
            return _to_job(row)

    def _end_exhausted(self, session: Session, row: JobRow) -> None:
        message = f"the trainer was lost {row.num_attempts} times without reaching another checkpoint"
        self._fail(session, row, JobError("trainer_lost", message))

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


def _make_alias(model: str, job_id: str) -> str:
    """`smollm2-135m-ft-1a2b3c4d`: the base model's name, cut to what an alias may be, and the beginning of the id."""
    letters = [
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in model.lower()
    ]
    name = "".join(letters).strip("._-")[:40] or "model"
    return f"{name}-ft-{job_id.removeprefix('ftjob-')[:8]}"


def _check_file(session: Session, file_id: str, param: str) -> None:
    row = session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None:
        raise InvalidInputError(f"{param}: there is no file {file_id[:80]!r}", param=param)
    if row.purpose != TRAINING_PURPOSE:
        raise InvalidInputError(
            f"{param}: expected a file with purpose {TRAINING_PURPOSE!r}, {row.id} has {row.purpose!r}", param=param
        )


def _count_queued(session: Session) -> int:
    return session.scalar(select(func.count()).where(JobRow.status.in_(("queued", "paused")))) or 0


def _find(session: Session, job_id: str) -> JobRow:
    row = session.scalar(select(JobRow).where(JobRow.id == job_id))
    if row is None or not actor_of(session).can_see(row.alias):
        raise NotFoundError(f"there is no fine-tuning job {job_id[:80]!r}")
    return row


def _find_position(
    session: Session,
    table: type[JobRow] | type[JobEventRow] | type[JobCheckpointRow],
    given: str,
    is_listed: ColumnElement[bool],
) -> int:
    position = session.scalar(select(table.sequence).where(table.id == given, is_listed))
    if position is None:
        raise unknown_place(given)
    return position


def _status(row: JobRow) -> JobStatus:
    assert row.status in (*ACTIVE_STATUSES, "succeeded", "failed", "cancelled")
    return row.status  # type: ignore[return-value]


def _to_job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        status=_status(row),
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
    )


def _to_event(row: JobEventRow) -> JobEvent:
    return JobEvent(row.id, row.created_at, _level(row), _kind(row), row.message, row.data)


def _level(row: JobEventRow) -> Literal["info", "warn", "error"]:
    assert row.level in ("info", "warn", "error")
    return row.level  # type: ignore[return-value]


def _kind(row: JobEventRow) -> Literal["message", "metrics"]:
    assert row.kind in ("message", "metrics")
    return row.kind  # type: ignore[return-value]


def _to_checkpoint(row: JobCheckpointRow) -> JobCheckpoint:
    return JobCheckpoint(row.id, row.job_id, row.step, row.created_at, row.metrics)
