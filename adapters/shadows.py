"""Shadows: a version that answers a sampled copy of an alias's requests, and how that compares with the live answers.

Nobody gets a shadow's answer. Knows no HTTP, and not how the copies are answered.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from sqlalchemy import Row, Select, case, func, select
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.chat_messages import answer_text
from adapters.comparisons import mean_of_units
from adapters.database import Database, actor_of
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.records import BASE_MODEL_NAME, Actor, parse_model_name, version_name
from adapters.registry import find_version
from adapters.statistics import MeanEstimate
from adapters.tables import ConversationRow, ExposureRow, ShadowAnswerRow, ShadowRow, utc_now

__all__ = ["Shadow", "ShadowAnswer", "ShadowOutcome", "ShadowPair", "ShadowReport", "ShadowService", "word_overlap"]

ShadowOutcome = Literal["answered", "dropped", "failed"]
_MAX_REASON_CHARS = 500
_BUCKETS = 1 << 64


@dataclass(frozen=True, slots=True)
class Shadow:
    """A candidate beside an alias: `share` is the percentage of the alias's requests that it gets a copy of."""

    id: str
    alias: str
    number: int
    digest: str
    share: float
    state: Literal["running", "stopped"]
    created_at: datetime
    stopped_at: datetime | None = None

    @property
    def label(self) -> str:
        """The candidate: `legal@v3`."""
        return f"{self.alias}@v{self.number}"

    def samples(self, response_id: str) -> bool:
        """Whether the response with this id is one of those that the candidate answers, too; always the same."""
        digest = hashlib.sha256(f"{self.id}:{response_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share / 100 * _BUCKETS


@dataclass(frozen=True, slots=True)
class ShadowAnswer:
    """How one copy ended, beside the live answer with this response's id. The messages are the assistant's.

    Only what `answered` has messages to compare; texts are kept where the conversation is.
    """

    response_id: str
    shadow_id: str
    outcome: ShadowOutcome
    reason: str | None
    live_tokens: int
    live_finish: str
    tokens: int
    finish: str | None
    live: dict[str, Any]
    answer: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ShadowPair:
    """A kept conversation with both answers to it, as assistant messages.

    `unit` is whose it is, `live_version` what gave the live answer: `legal@v1`, or `base`.
    """

    response_id: str
    unit: str
    live_version: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    live: dict[str, Any]
    shadow: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What came of a shadow, over the requests that both answered; differences are shadow minus live.

    `cut` are answers that ended at their limit of tokens. Means and shares are None while nothing was answered. Their
    intervals take the requests of one user for one observation, and are made for all looks at once
    (`mean_of_units` says how far that is known).
    """

    shadow: Shadow
    num_answered: int
    num_dropped: int
    num_failed: int
    num_kept: int
    num_units: int
    dropped_because: dict[str, int] = field(default_factory=dict)
    failed_because: dict[str, int] = field(default_factory=dict)
    same_share: MeanEstimate | None = None
    mean_overlap: float | None = None
    live_tokens: float | None = None
    shadow_tokens: float | None = None
    token_difference: MeanEstimate | None = None
    cut_difference: MeanEstimate | None = None


class ShadowService:
    """Shadows over one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def acting_for(self, actor: Actor) -> ShadowService:
        """The same service on somebody's behalf: shadows of aliases that the actor may not see don't exist in it."""
        return ShadowService(self.database.acting_for(actor))

    def start(self, alias: str, version: str, *, share: float) -> Shadow:
        """Have a version answer so many percent of an alias's requests, too.

        Args:
            alias: An existing alias.
            version: `v3`, `legal@v3`, or the beginning of its digest.
            share: Above 0, at most 100.

        Raises:
            InvalidInputError: the share is out of bounds, or the version is a reward model.
            NotFoundError: no such alias or version.
            ConflictError: a shadow runs on the alias already.
        """
        if not 0 < share <= 100:  # false for NaN, too
            raise InvalidInputError(f"share: expected above 0 and at most 100 percent, found {share:g}", param="share")
        name = parse_model_name(version_name(alias, version))
        if name.number is None and name.digest_prefix is None:
            raise InvalidInputError(f"{version!r} names no version of {alias!r}: expected v1, v2, ...", param="version")
        try:
            with self.database.write() as session:
                found = find_version(session, name)
                if found.version.kind == "reward":
                    raise InvalidInputError(
                        f"{found.label} is a reward model, which answers nobody: it can't be a shadow", param="version"
                    )
                row = ShadowRow(
                    id=f"shadow-{secrets.token_hex(6)}",
                    alias=alias,
                    number=found.number,
                    digest=found.version.digest,
                    share=share,
                    state="running",
                    created_at=utc_now(),
                )
                session.add(row)
                record_act(session, "start_shadow", row.id, alias=alias, version=found.label, share=share)
                session.flush()
                return _to_shadow(row)
        except SqlIntegrityError:
            raise ConflictError(f"a shadow runs on {alias!r} already; stop it first") from None

    def stop(self, name: str) -> Shadow:
        """Stop a shadow, named by its id or its alias.

        Raises:
            NotFoundError: there is none.
            ConflictError: it is stopped already.
        """
        with self.database.write() as session:
            row = _find_row(session, name)
            if row.state == "stopped":
                raise ConflictError(f"shadow {row.id} is stopped already")
            row.state, row.stopped_at = "stopped", utc_now()
            record_act(session, "stop_shadow", row.id, alias=row.alias)
            return _to_shadow(row)

    def get(self, name: str) -> Shadow:
        """A shadow by its id, or the newest one of an alias.

        Raises:
            NotFoundError: there is none.
        """
        with self.database.read() as session:
            return _to_shadow(_find_row(session, name))

    def list(self, *, is_running: bool = False, limit: int | None = None) -> list[Shadow]:
        """All shadows, or those that run, newest first; at most so many, if a limit is given."""
        statement = select(ShadowRow).order_by(ShadowRow.created_at.desc(), ShadowRow.id)
        if is_running:
            statement = statement.where(ShadowRow.state == "running")
        with self.database.read() as session:
            seen = (row for row in session.scalars(statement) if actor_of(session).can_see(row.alias))
            return [_to_shadow(row) for row in islice(seen, limit)]

    def record(self, answer: ShadowAnswer) -> None:
        """Write how a copy ended. Its text is written if the conversation is kept, and goes with it."""
        both = answer.answer is not None and answer.outcome == "answered"
        texts = [answer_text(message) for message in (answer.live, answer.answer or {})]
        row = ShadowAnswerRow(
            response_id=answer.response_id,
            shadow_id=answer.shadow_id,
            made_at=utc_now(),
            outcome=answer.outcome,
            reason=None if answer.reason is None else answer.reason[:_MAX_REASON_CHARS],
            live_tokens=answer.live_tokens,
            live_finish=answer.live_finish,
            tokens=answer.tokens,
            finish=answer.finish,
            is_same=texts[0] == texts[1] if both else None,
            overlap=word_overlap(*texts) if both else None,
        )
        with self.database.write() as session:
            kept = session.get(ConversationRow, answer.response_id)
            if kept is not None and both:
                row.answer = answer.answer
                kept.size_bytes += len(json.dumps(answer.answer))
            session.add(row)

    def pairs(self, name: str, *, limit: int | None = None) -> Sequence[ShadowPair]:
        """The kept conversations that a shadow has answered, too: the newest ones, at most so many, newest first."""
        with self.database.read() as session:
            shadow = _find_row(session, name)
            statement = (
                select(ConversationRow, ShadowAnswerRow, ExposureRow)
                .join(ShadowAnswerRow, ShadowAnswerRow.response_id == ConversationRow.response_id)
                .join(ExposureRow, ExposureRow.response_id == ConversationRow.response_id)
                .where(ShadowAnswerRow.shadow_id == shadow.id, ShadowAnswerRow.answer.is_not(None))
                .order_by(ShadowAnswerRow.made_at.desc(), ShadowAnswerRow.response_id)
                .limit(limit)
            )
            return [_to_pair(*rows) for rows in session.execute(statement)]

    def report(self, name: str) -> ShadowReport:
        """Sum a shadow up: how much of its share it answered, and its answers beside the live ones."""
        with self.database.read() as session:
            shadow = _to_shadow(_find_row(session, name))
            ends = session.execute(
                select(
                    ShadowAnswerRow.outcome, ShadowAnswerRow.reason, func.count(), func.count(ShadowAnswerRow.answer)
                )
                .where(ShadowAnswerRow.shadow_id == shadow.id)
                .group_by(ShadowAnswerRow.outcome, ShadowAnswerRow.reason)
                .order_by(func.count().desc())
            ).all()
            users = session.execute(_sums_by_user(shadow.id)).all()
        reasons: dict[str, dict[str, int]] = {"answered": {}, "dropped": {}, "failed": {}}
        for outcome, reason, count, _ in ends:
            told = reason or "no reason is known"  # none and an empty one are groups of their own in the database
            reasons[outcome][told] = reasons[outcome].get(told, 0) + count
        return ShadowReport(
            shadow,
            num_answered=sum(reasons["answered"].values()),
            num_dropped=sum(reasons["dropped"].values()),
            num_failed=sum(reasons["failed"].values()),
            num_kept=sum(kept for *_, kept in ends),
            num_units=len(users),
            dropped_because=reasons["dropped"],
            failed_because=reasons["failed"],
            **(_compare(users) if users else {}),
        )


def word_overlap(one: str, other: str) -> float:
    """How many words two texts share, 0 to 1: the harmonic mean of the shares of either's words (the F1 of SQuAD)."""
    first, second = Counter(one.split()), Counter(other.split())
    if not first or not second:
        return float(first == second)
    return 2 * (first & second).total() / (first.total() + second.total())


def _sums_by_user(shadow_id: str) -> Select[Any]:
    """Of what both answered, a row of sums for each user, in the order in which they came."""
    row = ShadowAnswerRow
    columns = {
        "count": func.count(),
        "same": func.sum(case((row.is_same.is_(True), 1.0), else_=0.0)),
        "overlap": func.sum(row.overlap),
        "live_tokens": func.sum(row.live_tokens),
        "tokens": func.sum(row.tokens),
        "live_cut": func.sum(case((row.live_finish == "length", 1.0), else_=0.0)),
        "cut": func.sum(case((row.finish == "length", 1.0), else_=0.0)),
    }
    return (
        select(*(column.label(name) for name, column in columns.items()))
        .select_from(row)
        .join(ExposureRow, ExposureRow.response_id == row.response_id)
        .where(row.shadow_id == shadow_id, row.outcome == "answered")
        .group_by(ExposureRow.unit)
        .order_by(func.min(row.made_at), ExposureRow.unit)
    )


def _compare(users: Sequence[Row[Any]]) -> dict[str, Any]:
    """The fields of a report that compare the answers."""
    columns: dict[str, list[float]] = {name: [float(row._mapping[name]) for row in users] for name in users[0]._fields}
    counts = [round(count) for count in columns["count"]]
    num = sum(counts)

    def difference(one: str, other: str) -> MeanEstimate:
        return mean_of_units([a - b for a, b in zip(columns[one], columns[other], strict=True)], counts)

    return {
        "same_share": mean_of_units(columns["same"], counts, is_share=True),
        "mean_overlap": sum(columns["overlap"]) / num,
        "live_tokens": sum(columns["live_tokens"]) / num,
        "shadow_tokens": sum(columns["tokens"]) / num,
        "token_difference": difference("tokens", "live_tokens"),
        "cut_difference": difference("cut", "live_cut"),
    }


def _to_pair(kept: ConversationRow, made: ShadowAnswerRow, exposure: ExposureRow) -> ShadowPair:
    return ShadowPair(
        response_id=kept.response_id,
        unit=exposure.unit,
        live_version=BASE_MODEL_NAME if exposure.number is None else f"{exposure.alias}@v{exposure.number}",
        messages=kept.messages,
        tools=kept.tools,
        live=kept.answers[0],
        shadow=made.answer or {},
    )


def _find_row(session: Session, name: str) -> ShadowRow:
    row = session.get(ShadowRow, name)
    if row is None:
        statement = select(ShadowRow).where(ShadowRow.alias == name).order_by(ShadowRow.created_at.desc())
        row = session.scalars(statement.limit(1)).first()
    if row is None or not actor_of(session).can_see(row.alias):
        raise NotFoundError(f"there is no shadow {name!r}: expected an id or an alias that has one")
    return row


def _to_shadow(row: ShadowRow) -> Shadow:
    return Shadow(
        id=row.id,
        alias=row.alias,
        number=row.number,
        digest=row.digest,
        share=row.share,
        state="running" if row.state == "running" else "stopped",
        created_at=row.created_at,
        stopped_at=row.stopped_at,
    )
