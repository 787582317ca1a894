"""What the database knows of routing: kept prompts, trained routers, which of them counts, and rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session, defer

from adapters.audit import record_act
from adapters.errors import ConflictError, IntegrityError
from adapters.routing import ROUTER_FORMAT
from adapters.routing.prompts import hash_prompts, sample_prompts
from adapters.routing.rules import RoutingRule, parse_rules
from adapters.tables import (
    AliasChangeRow,
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
    "KeptPrompts",
    "RouterVersion",
    "Sources",
    "add_router",
    "count_prompts",
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


class KeptPrompts(NamedTuple):
    """Which prompts are meant: the digest of their version, and their hash, since they can be replaced."""

    digest: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Sources:
    """What a router can be trained from: the prompts of each alias that has any, the oldest alias first."""

    versions: Mapping[str, KeptPrompts]
    embeddings: str | None  # which they are, if the base model's are used

    def to_json(self) -> dict[str, Any]:
        """The form that is stored and hashed. A program with another format trains a router of its own."""
        versions = {alias: list(kept) for alias, kept in self.versions.items()}
        return {"versions": versions, "embeddings": self.embeddings, "format": ROUTER_FORMAT}

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
        row = RoutingPromptsRow(digest=digest)
        session.add(row)
    row.prompts, row.sha256, row.kept_at = kept, hash_prompts(kept), utc_now()
    session.flush()


def drop_prompts(session: Session, digest: str) -> None:
    """Forget what was kept of a version, and every router that was made from it: a router holds its prompts' words."""
    session.execute(delete(RoutingPromptsRow).where(RoutingPromptsRow.digest == digest))
    statement = select(RouterRow.number, RouterRow.sources).where(RouterRow.content.is_not(None))
    made_from_it = [
        number
        for number, sources in session.execute(statement)
        if digest in {kept.digest for kept in _kept_in(sources).values()}
    ]
    _drop_contents(session, RouterRow.number.in_(made_from_it))


def load_prompts(session: Session, kept: KeptPrompts) -> list[str]:
    """Prompts of a version; empty if none are kept, or others than those that are meant."""
    row = session.get(RoutingPromptsRow, kept.digest)
    return list(row.prompts) if row is not None and row.sha256 == kept.sha256 else []


def count_prompts(session: Session, digest: str) -> int:
    """How many prompts are kept of a version."""
    row = session.get(RoutingPromptsRow, digest)
    return 0 if row is None else len(row.prompts)


def read_sources(session: Session, embeddings: str | None) -> Sources:
    """The versions that aliases point to and that prompts are kept of, reward models left out."""
    points_to = (AliasVersionRow.alias == AliasRow.name) & (AliasVersionRow.number == AliasRow.number)
    first_moves = select(AliasChangeRow.alias, func.min(AliasChangeRow.id).label("id")).group_by(AliasChangeRow.alias)
    ages = first_moves.subquery()
    statement = (
        select(AliasRow.name, VersionRow, RoutingPromptsRow.sha256)
        .join(AliasVersionRow, points_to)
        .join(VersionRow, VersionRow.digest == AliasVersionRow.digest)
        .join(RoutingPromptsRow, RoutingPromptsRow.digest == VersionRow.digest)
        .outerjoin(ages, ages.c.alias == AliasRow.name)
        .order_by(ages.c.id, AliasRow.name)
    )
    found = session.execute(statement).all()
    versions = {name: KeptPrompts(row.digest, sha256) for name, row, sha256 in found if row.kind == "chat"}
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
        _drop_contents(session, RouterRow.number <= number - _NUM_CONTENTS_KEPT)
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


def load_sources(session: Session, number: int) -> dict[str, KeptPrompts]:
    """What a router was trained from, by alias."""
    return _kept_in(session.get_one(RouterRow, number).sources)


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
    """Make the router count that did before the present one; repeated calls go further back.

    Those that are not kept any more, or were made with another base model or another format, are passed over.

    Raises:
        ConflictError: there is none.
    """
    for number in reversed(_trail(session)[:-1]):
        row = None if number is None else session.get_one(RouterRow, number, options=[defer(RouterRow.content)])
        if row is None or not _can_be_restored(session, row.number) or not _is_alike(row.sources, sources):
            continue
        _add_move(session, "rollback", row.number, sources.sha256, None)
        record_act(session, "rollback_router", f"router {row.number}", versions=row.sources["versions"])
        return row.number
    raise ConflictError("there is no earlier router to roll back to")


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


def _trail(session: Session) -> list[int | None]:
    """The routers that counted and were not rolled back from; the last is the present. None where there was none."""
    trail: list[int | None] = []
    for action, number in session.execute(
        select(RouterMoveRow.action, RouterMoveRow.number).order_by(RouterMoveRow.id)
    ):
        if action == "rollback":
            while trail and trail[-1] != number:
                trail.pop()
        else:
            trail.append(number)
    return trail


def _can_be_restored(session: Session, number: int) -> bool:
    is_kept = select(RouterRow.content.is_not(None)).where(RouterRow.number == number)
    return bool(session.scalar(is_kept))


def _is_alike(made_from: Mapping[str, Any], sources: Sources) -> bool:
    """Whether a router can be used by whoever would train from these sources."""
    present = sources.to_json()
    return all(made_from.get(name) == present[name] for name in ("embeddings", "format"))


def _kept_in(sources: Mapping[str, Any]) -> dict[str, KeptPrompts]:
    return {alias: KeptPrompts(*pair) for alias, pair in sources["versions"].items()}


def _versions_of(row: RouterRow) -> dict[str, str]:
    return {alias: kept.digest for alias, kept in _kept_in(row.sources).items()}


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


def _drop_contents(session: Session, which: ColumnElement[bool]) -> None:
    session.execute(update(RouterRow).where(which, RouterRow.content.is_not(None)).values(content=None))
