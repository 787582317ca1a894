"""The job table: what is to be trained, who is at it, and what came of it.

Clients create jobs and cancel, pause and resume them (here). A supervisor claims one for a time that it keeps renewing
(`job_claims`). Both read what happened (`job_history`). Whoever dies loses the claim when its lease has run out, and
the job is taken up again from its newest checkpoint.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, sql
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database, actor_of
from adapters.errors import (
    AliasForbiddenError,
    ConflictError,
    InvalidInputError,
    InvalidNameError,
    NotFoundError,
    OverloadedError,
)
from adapters.files import ACTIVE_STATUSES, TRAINING_PURPOSE, can_see_file
from adapters.job_claims import MAX_ATTEMPTS, Claim, JobClaims, Standing
from adapters.job_history import JobHistory
from adapters.job_table import find_job, find_position, to_job
from adapters.records import (
    Actor,
    AuditAction,
    Job,
    JobStatus,
    NumberedVersion,
    check_alias_name,
    parse_model_name,
)
from adapters.registry import find_version
from adapters.tables import FileRow, JobRow, utc_now

__all__ = ["MAX_ATTEMPTS", "Claim", "JobOrder", "JobService", "RequestIdentity", "Standing"]

_RETRY_AFTER_S = 60
_WAITING: tuple[JobStatus, ...] = ("validating_files", "queued")


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What a client calls its request by (at most 255 characters), and the SHA-256 of what it asks for."""

    key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What a client asks for. Without an alias, one is made of the model's name and the job's id.

    Args:
        model: The base model's name.
        training_file: Id of the data.
        method: How to train.
        seed: Of everything that is drawn.
        alias: What to publish under.
        validation_file: Id of the data to measure on.
        metadata: The client's own notes.
        row_kinds: What the rows of the files may be; None is anything.
        start_from: A version that training goes on from, `legal` or `legal@v2`; it is bound when the job is created.
        reward: A reward version that judges answers, bound like `start_from` and written so into the method.
        priority: Higher ones are trained earlier.
        integrations: Services that are told how the run goes on.
        identity: Asked for again, the same request makes no second job.
    """

    model: str
    training_file: str
    method: Mapping[str, Any]
    seed: int
    alias: str | None = None
    validation_file: str | None = None
    metadata: Mapping[str, str] | None = None
    row_kinds: Collection[str] | None = None
    start_from: str | None = None
    reward: str | None = None
    priority: int = 0
    integrations: tuple[Mapping[str, Any], ...] = ()
    identity: RequestIdentity | None = None


class JobService(JobClaims, JobHistory):
    """Jobs over one database; safe to use from several threads and processes.

    Args:
        database: Holds the job table.
        max_queued: Jobs that may wait, and as many that may be paused; more are refused.
        clock: The present moment, by which leases run out.
    """

    def __init__(self, database: Database, *, max_queued: int = 100, clock: Callable[[], datetime] = utc_now) -> None:
        super().__init__(database, clock=clock)
        self._max_queued = max_queued

    def acting_for(self, actor: Actor) -> JobService:
        """The same service on somebody's behalf: jobs for aliases that the actor may not see do not exist in it."""
        return JobService(self.database.acting_for(actor), max_queued=self._max_queued, clock=self._clock)

    def create(self, order: JobOrder) -> Job:
        """Take a job: its files are validated next, then it waits to be trained.

        The same request of the same client, by its identity, gives the job that it made before.

        Raises:
            AliasForbiddenError: the actor is limited to other aliases.
            InvalidInputError: a file or the version to start from does not exist or doesn't fit; names the field.
            InvalidNameError: the alias breaks the grammar.
            ConflictError: the client called another request by the same key.
            OverloadedError: too many jobs are waiting.
        """
        with self.database.write() as session:
            if order.identity is not None and (made := _find_made(session, order.identity)):
                return _describe(session, made)
            job_id = f"ftjob-{secrets.token_hex(12)}"
            model, start_from = _bind_start(session, order)
            method = _bind_reward(session, order)
            alias = check_alias_name(order.alias or _make_alias(model, job_id))
            if not self.database.actor.can_see(alias):
                raise AliasForbiddenError(
                    f"this API key may not train {alias!r}; the suffix names the alias", param="suffix"
                )
            _check_file(session, order.training_file, order.row_kinds, "training_file")
            if order.validation_file is not None:
                _check_file(session, order.validation_file, order.row_kinds, "validation_file")
            self._check_room(session)
            row = JobRow(
                id=job_id,
                status="validating_files",
                model=model,
                alias=alias,
                training_file=order.training_file,
                validation_file=order.validation_file,
                method=method,
                seed=order.seed,
                details=dict(order.metadata or {}),
                created_at=self._clock(),
                num_attempts=0,
                is_validated=False,
                priority=order.priority,
                start_from=start_from,
                integrations=[dict(one) for one in order.integrations],
                owner=self.database.actor.id,
                request_key=order.identity.key if order.identity else None,
                request_sha256=order.identity.sha256 if order.identity else None,
            )
            session.add(row)
            session.flush()
            record_act(session, "create_job", job_id, alias=alias)
            self._add_event(session, job_id, f"Created fine-tuning job: {job_id}")
            return to_job(row)

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFoundError: no job has this id.
        """
        with self.database.read() as session:
            return _describe(session, find_job(session, job_id))

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
            positions = _queue(session)
            if after is not None:
                aliases = session.scalars(select(JobRow.alias).where(JobRow.id == after)).all()
                is_seen = all(actor_of(session).can_see(alias) for alias in aliases)
                position = find_position(session, JobRow, after, sql.true() if is_seen else sql.false())
                statement = statement.where(JobRow.sequence < position)
            with session.scalars(statement.execution_options(yield_per=100)) as rows:
                for row in rows:
                    # Compared here: keys are the client's own, and no database's path language should read them.
                    if not actor_of(session).can_see(row.alias):
                        continue
                    if metadata and any(row.details.get(key) != value for key, value in metadata.items()):
                        continue
                    if len(found) == limit:
                        return found, True
                    found.append(to_job(row, positions.get(row.id)))
        return found, False

    def cancel(self, job_id: str) -> Job:
        """End a job for good; nothing of it is published. The trainer notices at its next step.

        Raises:
            ConflictError: it has succeeded or failed.
        """
        with self.database.write() as session:
            row = find_job(session, job_id)
            if row.status != "cancelled":
                _check_turn(row, "cancelled", *_WAITING, "running", "paused")
                row.finished_at = self._clock()
                self._turn(session, row, "cancelled", "cancel_job", "The job was cancelled")
            return to_job(row)

    def pause(self, job_id: str) -> Job:
        """Stop a job after a checkpoint, which the trainer writes at its next step.

        Raises:
            ConflictError: it is at its end.
            OverloadedError: too many jobs are paused, each with its checkpoints on the disk.
        """
        with self.database.write() as session:
            row = find_job(session, job_id)
            if row.status != "paused":
                _check_turn(row, "paused", *_WAITING, "running")
                self._check_paused(session)
                self._turn(session, row, "paused", "pause_job", "The job was paused")
            return to_job(row)

    def resume(self, job_id: str) -> Job:
        """Let a paused job wait again, for the validation of its files where that was not finished.

        Raises:
            ConflictError: it is not paused.
            OverloadedError: too many jobs are waiting.
        """
        with self.database.write() as session:
            row = find_job(session, job_id)
            if row.status not in _WAITING:
                _check_turn(row, "resumed", "paused")
                self._check_room(session)
                status: JobStatus = "queued" if row.is_validated else "validating_files"
                self._turn(session, row, status, "resume_job", "The job was resumed")
            return _describe(session, row)

    def _turn(self, session: Session, row: JobRow, status: JobStatus, act: AuditAction, message: str) -> None:
        row.status, row.estimated_finish = status, None
        record_act(session, act, row.id)
        self._add_event(session, row.id, message)

    def _check_room(self, session: Session) -> None:
        waiting = session.scalar(select(func.count()).where(JobRow.status.in_(_WAITING))) or 0
        if waiting >= self._max_queued:
            raise OverloadedError(
                f"{self._max_queued} jobs are waiting, as many as this server takes", retry_after_s=_RETRY_AFTER_S
            )

    def _check_paused(self, session: Session) -> None:
        if (session.scalar(select(func.count()).where(JobRow.status == "paused")) or 0) >= self._max_queued:
            raise OverloadedError(
                f"{self._max_queued} jobs are paused, as many as this server keeps; cancel or resume one",
                retry_after_s=_RETRY_AFTER_S,
            )


def _describe(session: Session, row: JobRow) -> Job:
    return to_job(row, _queue(session).get(row.id) if row.status == "queued" else None)


def _queue(session: Session) -> dict[str, int]:
    """Every job that waits for a trainer, and its place among them from 1; as many as may wait."""
    statement = select(JobRow.id).where(JobRow.status == "queued")
    ordered = session.scalars(statement.order_by(JobRow.priority.desc(), JobRow.sequence))
    return {job_id: place for place, job_id in enumerate(ordered, start=1)}


def _check_turn(row: JobRow, turn: str, *allowed: JobStatus) -> None:
    if row.status in allowed:
        return
    if row.status in ACTIVE_STATUSES:
        raise ConflictError(f"job {row.id} is {row.status}; only a paused job can be {turn}")
    raise ConflictError(f"job {row.id} is {row.status} and stays so; it can't be {turn}")


def _find_made(session: Session, identity: RequestIdentity) -> JobRow | None:
    """The job that the actor's request of this name has made.

    Raises:
        ConflictError: that was another request.
    """
    owner = actor_of(session).id
    statement = select(JobRow).where(JobRow.owner == owner, JobRow.request_key == identity.key)
    row = session.scalar(statement)
    if row is not None and row.request_sha256 != identity.sha256:
        raise ConflictError(
            f"the idempotency key {identity.key[:80]!r} was sent with another request, which made job {row.id}; "
            "send a key of its own with each request"
        )
    return row


def _bind_start(session: Session, order: JobOrder) -> tuple[str, str | None]:
    """What the job's `model` says, and the version that it goes on from, by its digest: the alias may move on."""
    if order.start_from is None:
        return order.model, None
    try:
        found = find_version(session, parse_model_name(order.start_from))
    except (InvalidNameError, NotFoundError) as error:
        raise InvalidInputError(
            f"model: expected the base model ({order.model!r}) or a version to go on from: {error}", param="model"
        ) from None
    if found.version.kind == "reward" and order.method["type"] != "reward":
        raise InvalidInputError(
            f"model: {found.label} is a reward model; only method reward can go on from it, found "
            f"{order.method['type']}",
            param="model",
        )
    return found.label, _by_digest(found)


def _bind_reward(session: Session, order: JobOrder) -> dict[str, Any]:
    """The order's method, with the version that judges answers by its digest: the alias may move on."""
    method = dict(order.method)
    if order.reward is None:
        return method
    try:
        found = find_version(session, parse_model_name(order.reward))
    except (InvalidNameError, NotFoundError) as error:
        raise InvalidInputError(f"reward: {error}", param="method") from None
    if found.version.kind != "reward":
        raise InvalidInputError(
            f"reward: expected a version that method reward has made, found {found.label}, which is for chat",
            param="method",
        )
    chosen = method[method["type"]]
    bound = {**chosen["hyperparameters"], "reward": _by_digest(found)}
    return method | {method["type"]: {**chosen, "hyperparameters": bound}}


def _by_digest(found: NumberedVersion) -> str:
    return f"{found.alias}@{found.version.digest}"


def _make_alias(model: str, job_id: str) -> str:
    """`smollm2-135m-ft-1a2b3c4d`: the model's name, cut to what an alias may be, and the beginning of the id."""
    letters = [
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in model.lower()
    ]
    name = "".join(letters).strip("._-")[:40] or "model"
    return f"{name}-ft-{job_id.removeprefix('ftjob-')[:8]}"


def _check_file(session: Session, file_id: str, row_kinds: Collection[str] | None, param: str) -> None:
    row = session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None or not can_see_file(session, row):
        raise InvalidInputError(f"{param}: there is no file {file_id[:80]!r}", param=param)
    if row.purpose != TRAINING_PURPOSE:
        raise InvalidInputError(
            f"{param}: expected a file with purpose {TRAINING_PURPOSE!r}, {row.id} has {row.purpose!r}", param=param
        )
    if row_kinds is not None and row.kind not in row_kinds:
        raise InvalidInputError(
            f"{param}: this method is trained on {' or '.join(sorted(row_kinds))} rows, {row.id} holds {row.kind} rows",
            param=param,
        )
