"""A streamed response that lets go of what it streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["ClosingStreamingResponse"]


class ClosingStreamingResponse(StreamingResponse):
    """A streamed response that closes its generator when it ends, however it ends.

    A client may leave while bytes wait for it. The generator then stands at a `yield` and would hold its request's
    place until the garbage collector comes by, since the error that ended the response refers to it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        async with aclosing(cast("AsyncGenerator[Any]", self.body_iterator)):
            await super().__call__(scope, receive, send)
