"""Adapters of jobs' checkpoints: in the store like versions, called by the name of job and step, without a number.

The newest three of a job are kept while it goes on, and for a week after its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from adapters.database import Database, actor_of
from adapters.errors import ConflictError, NotFoundError
from adapters.files import ACTIVE_STATUSES
from adapters.manifest import Manifest
from adapters.records import CheckpointName, NumberedVersion
from adapters.store import ArtifactStore
from adapters.tables import AliasVersionRow, JobCheckpointRow, JobRow, utc_now

__all__ = ["MAX_KEPT", "CheckpointAdapters", "check_not_needed", "find_checkpoint_digest", "is_checkpoint"]

MAX_KEPT = 3
_KEPT_FOR = timedelta(days=7)


class CheckpointAdapters:
    """Keeps and discards adapters of checkpoints over a database and a store."""

    def __init__(self, database: Database, store: ArtifactStore, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.database = database
        self.store = store
        self._clock = clock

    def add(self, source: Path, manifest: Manifest, record: Callable[[str], None]) -> None:
        """Store a checked adapter; `record` is given its digest, and has to write it into the checkpoint's row."""
        with self.store.held():
            record(self.store.add(source, manifest)[0])

    def prune(self, job_id: str) -> None:
        """Discard all of a job's adapters but the newest three; the checkpoints' rows stay."""
        statement = select(JobCheckpointRow).where(
            JobCheckpointRow.job_id == job_id, JobCheckpointRow.digest.is_not(None)
        )
        self._discard(
            lambda session: session.scalars(statement.order_by(JobCheckpointRow.step.desc())).all()[MAX_KEPT:]
        )

    def sweep(self) -> None:
        """Discard the adapters of jobs that ended more than a week ago."""
        ended = JobRow.finished_at < self._clock() - _KEPT_FOR
        statement = select(JobCheckpointRow).join(JobRow, JobRow.id == JobCheckpointRow.job_id)
        old = statement.where(JobCheckpointRow.digest.is_not(None), ended)
        self._discard(lambda session: session.scalars(old).all())

    def _discard(self, choose: Callable[[Session], Sequence[JobCheckpointRow]]) -> None:
        with self.database.read() as session:
            if not choose(session):
                return
        # Alone: a publisher of equal content must not find the files between the commit and their deletion.
        with self.store.held(alone=True):
            with self.database.write() as session:
                digests = _forget(choose(session))
                session.flush()
                orphans = [digest for digest in digests if not _is_stored_for_others(session, digest)]
            for digest in orphans:
                self.store.remove(digest)


def find_checkpoint_digest(session: Session, name: CheckpointName) -> str:
    """The version in the store that a checkpoint's name stands for.

    Raises:
        NotFoundError: no such checkpoint, it is not kept any more, or the actor may not see its alias.
    """
    statement = (
        select(JobCheckpointRow.digest)
        .join(JobRow, JobRow.id == JobCheckpointRow.job_id)
        .where(JobRow.alias == name.alias, JobRow.id.startswith(name.job_prefix, autoescape=True))
        .where(JobCheckpointRow.step == name.step, JobCheckpointRow.digest.is_not(None))
    )
    found = session.scalars(statement).all() if actor_of(session).can_see(name.alias) else []
    if len(found) != 1 or found[0] is None:
        raise NotFoundError(
            f"there is no checkpoint of {name.alias!r} at step {name.step}, or it is not kept any more; "
            f"the newest {MAX_KEPT} of a job are, for {_KEPT_FOR.days} days after its end"
        )
    return found[0]


def is_checkpoint(session: Session, digest: str) -> bool:
    """Whether a version in the store is the adapter of a checkpoint that is kept."""
    return bool(session.scalar(select(func.count()).where(JobCheckpointRow.digest == digest)))


def check_not_needed(session: Session, version: NumberedVersion) -> None:
    """Refuse to lose what a job goes on from, or what judges its answers.

    Raises:
        ConflictError: a job that is not at its end was created with this version.
    """
    name = f"{version.alias}@{version.version.digest}"
    for job in session.scalars(select(JobRow).where(JobRow.status.in_(ACTIVE_STATUSES))):
        if name in (job.start_from, _reward_of(job)):
            can_see = actor_of(session).can_see(job.alias)
            shown = f"job {job.id}" if can_see else "a job for another alias than this key's"
            does = "goes on from" if name == job.start_from else "is judged by"
            raise ConflictError(f"{shown}, which is {job.status}, {does} {version.label}; cancel the job first")


def _reward_of(job: JobRow) -> str | None:
    reward: str | None = job.method[job.method["type"]]["hyperparameters"].get("reward")
    return reward


def _forget(rows: Sequence[JobCheckpointRow]) -> set[str]:
    digests = {row.digest for row in rows if row.digest is not None}
    for row in rows:
        row.digest = None
    return digests


def _is_stored_for_others(session: Session, digest: str) -> bool:
    is_version = session.scalar(select(func.count()).where(AliasVersionRow.digest == digest))
    return bool(is_version) or is_checkpoint(session, digest)
