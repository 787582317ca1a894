"""What a request may cost before anybody has looked at it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import InvalidInputError
from server.config import ServeSettings

__all__ = ["TIMEOUT_HEADER", "BodyLimitMiddleware", "SendLimitMiddleware", "larger_bodies", "read_timeout"]

_log = structlog.get_logger(__name__)

TIMEOUT_HEADER = "x-hotswap-timeout-s"
_MAX_SHOWN = 40
_MAX_FORM_BYTES = 10_000  # boundaries, headers and the small fields of an upload


def read_timeout(value: str | None, *, limit_s: float) -> float:
    """The seconds that one answer may take: what its header says, but never more than the server's limit.

    Raises:
        InvalidInputError: the header is not a positive number of seconds; names it.
    """
    if value is None:
        return limit_s
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        shown = value[:_MAX_SHOWN]
        raise InvalidInputError(
            f"{TIMEOUT_HEADER}: expected a positive number of seconds, found {shown!r}", param=TIMEOUT_HEADER
        )
    return min(seconds, limit_s)


def larger_bodies(settings: ServeSettings) -> dict[tuple[str, str], int]:
    """The routes that take files, by method and path, and how large their bodies may be."""
    return {
        ("POST", "/v1/adapters"): settings.max_adapter_bytes,
        ("POST", "/v1/files"): settings.max_file_bytes + _MAX_FORM_BYTES,
    }


class BodyLimitMiddleware:
    """Refuses bodies of more than `max_bytes`, counted while they are read, whatever the headers say.

    `larger` gives routes that take files, by method and path, a limit of their own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, larger: Mapping[tuple[str, str], int] | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        num_bytes = 0
        limit = self._larger.get((scope.get("method", ""), scope.get("path", "")), self._max_bytes)

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes")
            return message

        await self._app(scope, receive_counted if scope["type"] == "http" else receive, send)


class SendLimitMiddleware:
    """Cuts a client that takes nothing of its answer for `limit_s`: it holds a place among the requests in flight.

    The engine waits for no reader, and what an answer may hold is bounded by its tokens; a place must not be held
    for as long as a client likes.
    """

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self._app = app
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        stalled = False

        async def send_in_time(message: Message) -> None:
            nonlocal stalled
            try:
                async with asyncio.timeout(self._limit_s):
                    await send(message)
            except TimeoutError:
                stalled = True
                raise

        try:
            await self._app(scope, receive, send_in_time if scope["type"] == "http" else send)
        except Exception:
            if not stalled:
                raise
            _log.warning("client_stalled", path=scope["path"], limit_s=self._limit_s)
