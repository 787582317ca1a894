"""From a call's events to an HTTP answer, whole or as server-sent events; notices a client that goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from adapters.errors import EngineFailureError, HotswapError
from server.calls import Call
from server.engine.core import EngineEvent
from server.errors import count_error, describe_error
from server.streaming import ClosingStreamingResponse

__all__ = ["AnswerWriter", "respond"]

_T = TypeVar("_T")
_CLIENT_CLOSED_REQUEST = 499  # nginx's number for it; nobody is left to read it


class AnswerWriter(Protocol):
    """Writes one response in the form of its endpoint."""

    def whole(self, events: Mapping[str, Sequence[EngineEvent]]) -> dict[str, Any]:
        """The whole answer, from each answer's events by the engine's request id."""

    def chunks(self, event: EngineEvent) -> Iterator[dict[str, Any]]:
        """What one event brings to a stream."""

    def end(self) -> Iterator[dict[str, Any]]:
        """What comes behind the last event."""


async def respond(
    call: Call, events: AsyncGenerator[EngineEvent], writer: AnswerWriter, request: Request, *, is_streamed: bool
) -> Response:
    """The answer to a call. If the client goes away the events are closed, so that the engine stops.

    Raises:
        HotswapError: no answer has begun.
    """
    if not is_streamed:
        collected = await _unless_client_leaves(_collect(events), request)
        if collected is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JSONResponse(writer.whole(collected), headers=call.headers)
    # An answer that fails before its first token gets a proper status code: wait for that token before the headers.
    first = await _unless_client_leaves(anext(events), request)
    if first is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return ClosingStreamingResponse(
        _stream(writer, first, events, request),
        media_type="text/event-stream",
        headers={**call.headers, "cache-control": "no-store"},
    )


async def _collect(events: AsyncGenerator[EngineEvent]) -> dict[str, list[EngineEvent]]:
    """All events, by the request that they belong to."""
    collected: dict[str, list[EngineEvent]] = {}
    async for event in events:
        collected.setdefault(event.request_id, []).append(event)
    return collected


async def _unless_client_leaves(work: Coroutine[Any, Any, _T], request: Request) -> _T | None:
    """The work's result; None, and the work cancelled, if the client goes away first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    writer: AnswerWriter, first: EngineEvent, events: AsyncGenerator[EngineEvent], request: Request
) -> AsyncIterator[bytes]:
    try:
        for chunk in writer.chunks(first):
            yield _event(chunk)
        async for event in events:
            for chunk in writer.chunks(event):
                yield _event(chunk)
        for chunk in writer.end():
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except HotswapError as error:
        # The status line is long gone. A well-formed event makes OpenAI's clients raise instead of ending quietly.
        yield _error_event(error, request)
    except Exception:
        yield _error_event(EngineFailureError("the answer broke off"), request)
        raise
    finally:
        await events.aclose()


def _error_event(error: HotswapError, request: Request) -> bytes:
    answer, body = describe_error(error)
    count_error(request, answer.code)
    return _event(body)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()
