"""Decides which conversations are kept, and deletes old ones in the background."""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapters.conversations import MAX_CONVERSATION_BYTES, Conversation, ConversationLog
from adapters.errors import DatabaseBusyError, InvalidInputError
from server.calls import Call, answer_messages
from server.config import ServeSettings
from server.schemas import ChatRequest

__all__ = ["ConversationKeeper"]

_log = structlog.get_logger(__name__)
_SWEEP_EVERY_S = 300.0


class ConversationKeeper:
    """Keeps conversations if the settings say so, and deletes old ones whatever they say.

    Args:
        log: Where they are kept.
        settings: Whether, how long, and how much of it.
    """

    def __init__(self, log: ConversationLog, settings: ServeSettings) -> None:
        self._log = log
        self._is_on = settings.keep_conversations
        self._days = settings.conversation_days
        self._max_bytes = settings.conversation_mb * 1_000_000

    def wants(self, body: ChatRequest) -> bool:
        """Whether a request's conversation is to be kept; never if the request declines.

        Raises:
            InvalidInputError: the request insists on it, and this server keeps none.
        """
        if body.store and not self._is_on:
            raise InvalidInputError(
                "store: this server keeps no conversations (setting serve.keep_conversations): expected false, "
                "found true",
                param="store",
            )
        return self._is_on and body.store is not False

    def keep(self, call: Call, body: ChatRequest) -> None:
        """Write what was asked and answered, behind its exposure; not doing so costs nobody the answer."""
        conversation = Conversation(
            call.response_id,
            [message.model_dump(exclude_none=True) for message in body.messages],
            [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            answer_messages(call),
        )
        try:
            if not self._log.keep(conversation):
                _log.info("conversation_too_large", response_id=call.response_id, max_bytes=MAX_CONVERSATION_BYTES)
        except (SQLAlchemyError, DatabaseBusyError):
            _log.exception("conversation_not_kept", response_id=call.response_id)

    async def run(self) -> None:
        """Delete what is too old or too much, at the start and every five minutes, until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except (SQLAlchemyError, DatabaseBusyError):
                # As with pins: there is nobody to tell, and the next round tries again.
                _log.exception("conversations_not_swept")
            await asyncio.sleep(_SWEEP_EVERY_S)

    def sweep(self) -> None:
        """Delete what is too old or too much, also where nothing is kept any more."""
        if num_deleted := self._log.delete_old(days=self._days, max_bytes=self._max_bytes):
            _log.info("conversations_deleted", num_deleted=num_deleted)
