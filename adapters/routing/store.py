"""What the database knows of routing: kept prompts, trained routers, which of them counts, and rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session, defer

from adapters.audit import record_act
from adapters.errors import ConflictError, IntegrityError
from adapters.routing.prompts import hash_prompts, sample_prompts
from adapters.routing.rules import RoutingRule, parse_rules
from adapters.tables import (
    AliasRow,
    AliasVersionRow,
    RouterMoveRow,
    RouterRow,
    RoutingPromptsRow,
    RoutingRulesRow,
    VersionRow,
    utc_now,
)

__all__ = [
    "RouterVersion",
    "Sources",
    "add_router",
    "drop_prompts",
    "keep_prompts",
    "list_routers",
    "load_prompts",
    "load_router",
    "load_rules",
    "load_sources",
    "move_back",
    "present_move",
    "read_sources",
    "rules_number",
    "save_rules",
]

_NUM_CONTENTS_KEPT = 20  # of the newest routers; older ones can't be rolled back to


@dataclass(frozen=True, slots=True)
class Sources:
    """What a router can be trained from: for each alias with prompts, its version's digest and their hash."""

    versions: Mapping[str, tuple[str, str]]
    embeddings: str | None  # which they are, if the base model's are used

    def to_json(self) -> dict[str, Any]:
        """The form that is stored and hashed."""
        return {"versions": {alias: list(pair) for alias, pair in self.versions.items()}, "embeddings": self.embeddings}

    @property
    def sha256(self) -> str:
        """A hash by which two are told apart."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RouterVersion:
    """One trained router: its number, the hash of its content and the versions that it was trained from, by alias."""

    number: int
    digest: str
    versions: Mapping[str, str]
    trained_at: datetime
    is_current: bool
    can_be_restored: bool


def keep_prompts(session: Session, digest: str, prompts: Sequence[str]) -> None:
    """Keep a sample of a version's training prompts, in place of what was kept of it."""
    kept = sample_prompts(prompts)
    if not kept:
        return
    row = session.get(RoutingPromptsRow, digest)
    if row is None:
        row = RoutingPromptsRow(digest=digest, prompts=kept, sha256=hash_prompts(kept), kept_at=utc_now())
        session.add(row)
    row.prompts, row.sha256, row.kept_at = kept, hash_prompts(kept), utc_now()
    session.flush()


def drop_prompts(session: Session, digest: str) -> None:
    """Forget what was kept of a version."""
    session.execute(delete(RoutingPromptsRow).where(RoutingPromptsRow.digest == digest))


def load_prompts(session: Session, digest: str) -> list[str]:
    """The kept prompts of a version; empty if none are."""
    row = session.get(RoutingPromptsRow, digest)
    return [] if row is None else list(row.prompts)


def read_sources(session: Session, embeddings: str | None) -> Sources:
    """The versions that aliases point to and that prompts are kept of, reward models left out."""
    points_to = (AliasVersionRow.alias == AliasRow.name) & (AliasVersionRow.number == AliasRow.number)
    statement = (
        select(AliasRow.name, VersionRow, RoutingPromptsRow.sha256)
        .join(AliasVersionRow, points_to)
        .join(VersionRow, VersionRow.digest == AliasVersionRow.digest)
        .join(RoutingPromptsRow, RoutingPromptsRow.digest == VersionRow.digest)
        .order_by(AliasRow.name)
    )
    found = session.execute(statement).all()
    versions = {name: (row.digest, sha256) for name, row, sha256 in found if row.kind == "chat"}
    return Sources(versions, embeddings)


def present_move(session: Session) -> RouterMoveRow | None:
    """The latest move; None before the first."""
    return session.scalars(select(RouterMoveRow).order_by(RouterMoveRow.id.desc()).limit(1)).first()


def add_router(session: Session, sources: Sources, content: bytes | None, reason: str | None) -> None:
    """Make a router the present one; without content, from here on nothing is routed by learning, for that reason."""
    number = None
    if content is not None:
        row = RouterRow(
            digest=hashlib.sha256(content).hexdigest(),
            sources=sources.to_json(),
            content=content,
            trained_at=utc_now(),
        )
        session.add(row)
        session.flush()
        number = row.number
        _drop_old_contents(session, number)
    _add_move(session, "train", number, sources.sha256, reason)


def load_router(session: Session, number: int) -> bytes:
    """The content of a router, checked against its hash.

    Raises:
        IntegrityError: it is not kept any more, or damaged.
    """
    row = session.get(RouterRow, number)
    if row is None or row.content is None:
        raise IntegrityError(f"router {number} is not kept any more")
    if (found := hashlib.sha256(row.content).hexdigest()) != row.digest:
        raise IntegrityError(f"router {number} is damaged: expected SHA-256 {row.digest}, found {found}")
    return row.content


def load_sources(session: Session, number: int) -> dict[str, str]:
    """The digests of the versions that a router was trained from, by alias."""
    return _versions_of(session.get_one(RouterRow, number))


def list_routers(session: Session, *, limit: int) -> list[RouterVersion]:
    """The latest routers, newest first."""
    present = present_move(session)
    statement = select(RouterRow, RouterRow.content.is_not(None)).options(defer(RouterRow.content))
    rows = session.execute(statement.order_by(RouterRow.number.desc()).limit(limit))
    return [
        RouterVersion(
            number=row.number,
            digest=row.digest,
            versions=_versions_of(row),
            trained_at=row.trained_at,
            is_current=present is not None and present.number == row.number,
            can_be_restored=is_kept,
        )
        for row, is_kept in rows
    ]


def move_back(session: Session, sources: Sources) -> int:
    """Make the router before the present one count; repeated calls go further back.

    Raises:
        ConflictError: there is none, or it is not kept any more.
    """
    present = present_move(session)
    before = select(RouterRow).order_by(RouterRow.number.desc()).limit(1)
    if present is not None and present.number is not None:
        before = before.where(RouterRow.number < present.number)
    row = session.scalars(before).first() if present is not None else None
    if row is None or row.content is None:
        raise ConflictError("there is no earlier router to roll back to")
    _add_move(session, "rollback", row.number, sources.sha256, None)
    record_act(session, "rollback_router", f"router {row.number}", versions=row.sources["versions"])
    return row.number


def rules_number(session: Session) -> int:
    """The number of the present rules; it changes with them. 0 before the first."""
    return session.scalar(select(func.max(RoutingRulesRow.number))) or 0


def load_rules(session: Session) -> tuple[RoutingRule, ...]:
    """The present rules in order."""
    row = session.scalars(select(RoutingRulesRow).order_by(RoutingRulesRow.number.desc()).limit(1)).first()
    return () if row is None else parse_rules({"rules": row.rules})


def save_rules(session: Session, rules: Sequence[RoutingRule]) -> None:
    """Replace all rules."""
    documents = [rule.model_dump(exclude_none=True) for rule in rules]
    session.add(RoutingRulesRow(rules=documents, made_at=utc_now()))
    record_act(session, "set_routing_rules", "routing rules", names=[rule.name for rule in rules])


def _versions_of(row: RouterRow) -> dict[str, str]:
    return {alias: pair[0] for alias, pair in row.sources["versions"].items()}


def _add_move(session: Session, action: str, number: int | None, sources_sha256: str, reason: str | None) -> None:
    session.add(
        RouterMoveRow(
            action=action,
            number=number,
            sources_sha256=sources_sha256,
            reason=None if reason is None else reason[:500],
            moved_at=utc_now(),
        )
    )
    session.flush()


def _drop_old_contents(session: Session, number: int) -> None:
    least = select(func.max(RouterRow.number)).scalar_subquery() - _NUM_CONTENTS_KEPT
    for row in session.scalars(select(RouterRow).where(RouterRow.number <= least, RouterRow.content.is_not(None))):
        row.content = None
