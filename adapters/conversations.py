"""The log of conversations: what was asked and answered, by the response's id, for as long as the operator says.

It is written only where the operator asked for it. Knows no HTTP; nothing that answers requests reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from adapters.database import Database, actor_of
from adapters.tables import ConversationRow, ExposureRow, FeedbackRow, ShadowAnswerRow, utc_now

__all__ = ["MAX_CONVERSATION_BYTES", "Conversation", "ConversationLog", "RatedConversation", "prompt_sha256"]

MAX_CONVERSATION_BYTES = 1 << 20
_BATCH = 500  # rows deleted in one transaction: requests that end meanwhile have exposures to write


@dataclass(frozen=True, slots=True)
class Conversation:
    """One request's messages and tools as the wire has them, and an assistant message for each of its answers."""

    response_id: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RatedConversation:
    """A kept conversation, what answered it, and one outcome that was reported for it."""

    conversation: Conversation
    prompt_sha256: str
    version: str
    digest: str | None
    finish_reason: str | None
    metric: str
    value: float
    comment: str | None
    reported_at: datetime


class ConversationLog:
    """Kept conversations in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def keep(self, conversation: Conversation) -> bool:
        """Write a conversation whose exposure is written; False if it is larger than a conversation may be."""
        parts = [list(conversation.messages), list(conversation.tools), list(conversation.answers)]
        size = len(json.dumps(parts, ensure_ascii=False).encode(errors="surrogatepass"))
        if size > MAX_CONVERSATION_BYTES:
            return False
        messages, tools, answers = parts
        row = ConversationRow(
            response_id=conversation.response_id,
            kept_at=utc_now(),
            size_bytes=size,
            prompt_sha256=prompt_sha256(messages, tools),
            messages=messages,
            tools=tools,
            answers=answers,
        )
        with self.database.write() as session:
            session.add(row)
        return True

    def delete_old(self, *, days: int, max_bytes: int, now: datetime | None = None) -> int:
        """Delete what is older than so many days, then the oldest until the rest takes at most so many bytes.

        Returns:
            How many conversations were deleted.
        """
        limit = (now or utc_now()) - timedelta(days=days)
        num_deleted = 0
        while count := self._delete_oldest(before=limit):
            num_deleted += count
        while count := self._delete_excess(max_bytes):
            num_deleted += count
        return num_deleted

    def rated(self, alias: str, metric: str) -> list[RatedConversation]:
        """The kept conversations of an alias for which an outcome of this metric was reported, oldest report first.

        Those of all its versions, and of experiments on it.
        """
        statement = (
            select(ConversationRow, ExposureRow, FeedbackRow)
            .join(ExposureRow, ExposureRow.response_id == ConversationRow.response_id)
            .join(FeedbackRow, FeedbackRow.response_id == ConversationRow.response_id)
            .where(ExposureRow.alias == alias, FeedbackRow.metric == metric)
            .order_by(FeedbackRow.reported_at, ConversationRow.response_id)
        )
        with self.database.read() as session:
            if not actor_of(session).can_see(alias):
                return []
            return [_to_rated(*rows) for rows in session.execute(statement)]

    def metrics(self, alias: str) -> dict[str, int]:
        """What was reported on the kept conversations of an alias: each metric and how often."""
        statement = (
            select(FeedbackRow.metric, func.count())
            .join(ConversationRow, ConversationRow.response_id == FeedbackRow.response_id)
            .join(ExposureRow, ExposureRow.response_id == FeedbackRow.response_id)
            .where(ExposureRow.alias == alias)
            .group_by(FeedbackRow.metric)
            .order_by(FeedbackRow.metric)
        )
        with self.database.read() as session:
            return {str(metric): int(count) for metric, count in session.execute(statement)}

    def _delete_oldest(self, *, before: datetime) -> int:
        oldest = select(ConversationRow.response_id).where(ConversationRow.kept_at < before)
        with self.database.write() as session:
            return _delete(session, session.scalars(oldest.order_by(ConversationRow.kept_at).limit(_BATCH)).all())

    def _delete_excess(self, max_bytes: int) -> int:
        """Delete some of the oldest conversations, if all of them take more bytes than may be."""
        with self.database.write() as session:
            excess = (session.scalar(select(func.sum(ConversationRow.size_bytes))) or 0) - max_bytes
            oldest = select(ConversationRow.response_id, ConversationRow.size_bytes).order_by(ConversationRow.kept_at)
            leaving: list[str] = []
            for response_id, size in session.execute(oldest.limit(_BATCH)) if excess > 0 else ():
                if excess <= 0:
                    break
                leaving.append(response_id)
                excess -= size
            return _delete(session, leaving)


def prompt_sha256(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    """Names what was asked: the same for the same messages and tools."""
    text = json.dumps([list(messages), list(tools)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _delete(session: Session, response_ids: Sequence[str]) -> int:
    """Delete conversations, and with them what shadows answered in them."""
    if response_ids:
        shadows = update(ShadowAnswerRow).where(ShadowAnswerRow.response_id.in_(response_ids))
        session.execute(shadows.values(answer=None))
        session.execute(delete(ConversationRow).where(ConversationRow.response_id.in_(response_ids)))
    return len(response_ids)


def _to_rated(kept: ConversationRow, exposure: ExposureRow, feedback: FeedbackRow) -> RatedConversation:
    return RatedConversation(
        conversation=Conversation(kept.response_id, kept.messages, kept.tools, kept.answers),
        prompt_sha256=kept.prompt_sha256,
        version=exposure.alias if exposure.number is None else f"{exposure.alias}@v{exposure.number}",
        digest=exposure.digest,
        finish_reason=exposure.finish_reason,
        metric=feedback.metric,
        value=feedback.value,
        comment=feedback.comment,
        reported_at=feedback.reported_at,
    )
