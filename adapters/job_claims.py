"""The side of the job table that supervisors and trainers use: who is at a job, and what they write into it.

Every write bears the claim's token: whoever has lost the claim writes nothing any more.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from adapters.errors import ConflictError
from adapters.files import ACTIVE_STATUSES
from adapters.job_table import JobTable, find_job, to_job
from adapters.records import Job, JobError, JobStatus
from adapters.tables import JobCheckpointRow, JobRow

__all__ = ["MAX_ATTEMPTS", "Claim", "JobClaims", "Standing"]

MAX_ATTEMPTS = 3

Standing = Literal["continue", "pause", "stop"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a job, to validate its files or to train it; `token` is what makes it this one."""

    job: Job
    token: str


class JobClaims(JobTable):
    """Claims, and what their holders report."""

    def claim(self, *, lease_s: float, device: str | None = None) -> Claim | None:
        """Take a job that is to be trained or whose trainer is lost, by priority, then by age; None if there is none.

        Args:
            lease_s: Seconds that the claim holds without being renewed.
            device: Where it is going to be trained; while another job's claim names the same, nothing is taken.
        """
        with self.database.write() as session:
            if device is not None and self._is_taken(session, device):
                return None
            return self._take(session, ("queued", "running"), "running", lease_s, device)

    def claim_validation(self, *, lease_s: float) -> Claim | None:
        """Take a job whose files are to be validated, whether another one is being trained or not."""
        with self.database.write() as session:
            return self._take(session, ("validating_files",), "validating_files", lease_s, None)

    def renew(self, claim: Claim, *, lease_s: float) -> bool:
        """Hold a claim for another while; False if it is lost."""
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim != claim.token:
                return False
            row.lease_until = self._clock() + timedelta(seconds=lease_s)
            return True

    def standing(self, claim: Claim) -> Standing:
        """What the holder of a claim has to do: go on, write a checkpoint and end, or end at once."""
        with self.database.read() as session:
            row = find_job(session, claim.job.id)
            if row.claim != claim.token or row.status not in ACTIVE_STATUSES:
                return "stop"
            return "continue" if row.status in ("running", "validating_files") else "pause"

    def pass_validation(self, claim: Claim) -> None:
        """The files are good: the job waits to be trained, unless it was paused or cancelled meanwhile."""
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim != claim.token or row.status not in ACTIVE_STATUSES:
                return
            row.is_validated, row.num_attempts = True, 0
            if row.status == "validating_files":
                row.status = "queued"
                self._add_event(session, row.id, "The files are valid; the job is queued")

    def release(self, claim: Claim, *, problem: str | None = None, last: JobError | None = None) -> Job:
        """Give a claim back; a job that was still running waits again. Without a `problem` the attempt doesn't count.

        With `last`, the job fails with that error if it has no attempt left. Does nothing but read the job where the
        claim is lost.
        """
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim == claim.token:
                row.claim = row.lease_until = row.estimated_finish = row.device = None
                if problem is None:
                    row.num_attempts = 0
                else:
                    self._add_event(session, row.id, problem, level="warn")
                is_open = row.status in ("running", "validating_files")
                if last is not None and is_open and row.num_attempts >= MAX_ATTEMPTS:
                    self._fail(session, row, last)
                elif row.status == "running":
                    row.status = "queued"
            return to_job(row)

    def note(self, claim: Claim, message: str, *, level: Literal["info", "warn"] = "info") -> None:
        """Write an event of a job that one holds."""
        with self.database.write() as session:
            if find_job(session, claim.job.id).claim == claim.token:
                self._add_event(session, claim.job.id, message, level=level)

    def note_metrics(
        self, claim: Claim, message: str, data: Mapping[str, Any], *, trained_tokens: int, seconds_left: float
    ) -> None:
        """Write what was measured at `data["step"]`, how far the job is, and when it will be at its end."""
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim == claim.token:
                row.trained_tokens = trained_tokens
                row.estimated_finish = self._clock() + timedelta(seconds=seconds_left)
                self._add_event(session, row.id, message, data=data)

    def add_checkpoint(
        self, claim: Claim, step: int, metrics: Mapping[str, float], *, digest: str | None = None
    ) -> None:
        """Record that a step's state lies in the job's folder, whole. The job is given all its attempts again.

        `digest` is the step's adapter in the store, if it was put there.
        """
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim != claim.token:
                return
            row.num_attempts = min(row.num_attempts, 1)
            found = session.scalars(
                select(JobCheckpointRow).where(JobCheckpointRow.job_id == row.id, JobCheckpointRow.step == step)
            ).first()
            if found is not None:
                found.digest = digest or found.digest
                return
            session.add(
                JobCheckpointRow(
                    id=f"ftckpt-{secrets.token_hex(12)}",
                    job_id=row.id,
                    step=step,
                    created_at=self._clock(),
                    metrics=dict(metrics),
                    digest=digest,
                )
            )
            self._add_event(session, row.id, f"Checkpoint at step {step}")

    def fail(self, claim: Claim, error: JobError) -> None:
        """End a job that one holds with an error; one that was cancelled stays cancelled."""
        with self.database.write() as session:
            row = find_job(session, claim.job.id)
            if row.claim == claim.token and row.status in ACTIVE_STATUSES:
                self._fail(session, row, error)

    def succeed(
        self, session: Session, claim: Claim, *, fine_tuned_model: str, result_file: str, trained_tokens: int
    ) -> None:
        """End a job well, in the transaction that publishes what came of it.

        Raises:
            ConflictError: the claim is lost, or the job was cancelled or paused meanwhile; nothing is to be published.
        """
        row = find_job(session, claim.job.id)
        if row.claim != claim.token or row.status != "running":
            raise ConflictError(f"job {row.id} is {row.status}, and no longer this trainer's")
        row.status, row.finished_at = "succeeded", self._clock()
        row.fine_tuned_model, row.result_file, row.trained_tokens = fine_tuned_model, result_file, trained_tokens
        row.estimated_finish = None
        self._add_event(session, row.id, f"New fine-tuned model created: {fine_tuned_model}")
        self._add_event(session, row.id, "The job has successfully completed")

    def _is_taken(self, session: Session, device: str) -> bool:
        statement = select(func.count()).where(
            JobRow.device == device, JobRow.claim.is_not(None), JobRow.lease_until >= self._clock()
        )
        return bool(session.scalar(statement))

    def _take(
        self, session: Session, takes: tuple[JobStatus, ...], becomes: JobStatus, lease_s: float, device: str | None
    ) -> Claim | None:
        now = self._clock()
        is_free = or_(JobRow.claim.is_(None), JobRow.lease_until < now)
        statement = select(JobRow).where(JobRow.status.in_(takes), is_free)
        ordered = statement.order_by(JobRow.priority.desc(), JobRow.sequence)
        for row in session.scalars(ordered.with_for_update(skip_locked=True)).all():
            if row.num_attempts >= MAX_ATTEMPTS:
                self._end_exhausted(session, row)
                continue
            row.status, row.claim, row.device = becomes, secrets.token_hex(12), device
            row.lease_until = now + timedelta(seconds=lease_s)
            row.num_attempts += 1
            message = "The job is running" if becomes == "running" else "Validating the files"
            self._add_event(session, row.id, message)
            return Claim(to_job(row), row.claim)
        return None

    def _end_exhausted(self, session: Session, row: JobRow) -> None:
        lost = "trainer" if row.is_validated else "process that validates the files"
        message = f"the {lost} was lost {row.num_attempts} times without reaching another checkpoint"
        self._fail(session, row, JobError("trainer_lost", message))
