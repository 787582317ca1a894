"""What a request may cost before anybody has looked at it."""

from __future__ import annotations

import math

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import InvalidInputError

__all__ = ["TIMEOUT_HEADER", "BodyLimitMiddleware", "read_timeout"]

TIMEOUT_HEADER = "x-hotswap-timeout-s"
_MAX_SHOWN = 40
_UPLOAD_PATH = "/v1/files"
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


class BodyLimitMiddleware:
    """Refuses bodies of more than `max_bytes`, counted while they are read, whatever the headers say.

    An upload may be larger: `max_file_bytes` and what the form around it takes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_file_bytes: int = 0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_file_bytes + _MAX_FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        limit = self._max_upload_bytes if _is_upload(scope) else self._max_bytes
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes")
            return message

        await self._app(scope, receive_counted if scope["type"] == "http" else receive, send)


def _is_upload(scope: Scope) -> bool:
    return (scope["type"], scope.get("method"), scope.get("path")) == ("http", "POST", _UPLOAD_PATH)
