"""The audit log: who did what to which name. Rows are added in the transaction of the act itself, and never changed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.database import Database, actor_of
from adapters.records import AuditAction, AuditEntry
from adapters.tables import AuditRow, utc_now

__all__ = ["AuditLog", "record_act"]


class AuditLog:
    """What was done."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def record(self, action: AuditAction, subject: str) -> None:
        """Add an act that changes nothing in the database."""
        with self.database.write() as session:
            record_act(session, action, subject)

    def list(self, *, limit: int) -> list[AuditEntry]:
        """The latest acts, newest first."""
        with self.database.read() as session:
            rows = session.scalars(select(AuditRow).order_by(AuditRow.id.desc()).limit(limit))
            return [
                AuditEntry(row.acted_at, row.actor, _action(row), row.subject, row.detail, row.request_id)
                for row in rows
            ]


def record_act(session: Session, action: AuditAction, subject: str, **detail: Any) -> None:
    """Add a row on behalf of the session's actor; it is written if and only if the session's transaction is.

    Args:
        session: The transaction of the act.
        action: What is done.
        subject: The name it is done to.
        detail: What else an operator would ask, as plain values; no secrets.
    """
    actor = actor_of(session)
    session.add(
        AuditRow(
            acted_at=utc_now(),
            actor=actor.id,
            action=action,
            subject=subject,
            detail=detail,
            request_id=actor.request_id,
        )
    )


def _action(row: AuditRow) -> AuditAction:
    return row.action  # type: ignore[return-value]  # only `record_act` writes rows
