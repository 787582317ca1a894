"""POST /v1/chat/completions: whole answers and server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from adapters.errors import EngineFailureError, HotswapError
from server.chat import ChatCall
from server.engine.core import EngineEvent
from server.errors import describe_error
from server.observe import request_id_of
from server.schemas import ChatRequest, chat_chunk, chat_completion, usage_body
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()
_T = TypeVar("_T")
_CLIENT_CLOSED_REQUEST = 499  # nginx's number for it; nobody is left to read it


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request, services: CurrentServices) -> Response:
    """Answer a conversation with the version that `model` names."""
    call = await services.chat.accept(body, request_id=request_id_of(request.scope))
    events = services.chat.generate(call)
    if not body.stream:
        return await _answer_whole(call, body, events, request)
    # An answer that fails before its first token gets a proper status code: wait for that token before the headers.
    first = await _unless_client_leaves(anext(events), request)
    if first is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(
        _stream(call, body.model, first, events, include_usage=include_usage),
        media_type="text/event-stream",
        headers={**call.headers, "cache-control": "no-store"},
    )


async def _answer_whole(
    call: ChatCall, body: ChatRequest, events: AsyncGenerator[EngineEvent], request: Request
) -> Response:
    text = await _unless_client_leaves(_collect(events), request)
    if text is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    content = chat_completion(
        response_id=call.response_id,
        created=call.created,
        model=body.model,
        text=text,
        finish_reason=call.finish_reason or "stop",
        usage=_usage(call),
    )
    return JSONResponse(content, headers=call.headers)


async def _collect(events: AsyncGenerator[EngineEvent]) -> str:
    return "".join([event.text async for event in events])


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
    call: ChatCall, model: str, first: EngineEvent, events: AsyncGenerator[EngineEvent], *, include_usage: bool
) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        body = chat_chunk(
            response_id=call.response_id, created=call.created, model=model, delta=delta, finish_reason=finish_reason
        )
        return _event(body | {"usage": None} if include_usage else body)

    try:
        yield chunk({"role": "assistant", "content": first.text})
        async for event in events:
            if event.text:
                yield chunk({"content": event.text})
        yield chunk({}, call.finish_reason)
        if include_usage:
            whole = chat_chunk(response_id=call.response_id, created=call.created, model=model, delta={})
            yield _event(whole | {"choices": [], "usage": _usage(call)})
        yield b"data: [DONE]\n\n"
    except HotswapError as error:
        # The status line is long gone. A well-formed event makes OpenAI's clients raise instead of ending quietly.
        yield _event(describe_error(error)[1])
    except Exception:
        yield _event(describe_error(EngineFailureError("the answer broke off"))[1])
        raise
    finally:
        await events.aclose()


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def _usage(call: ChatCall) -> dict[str, int]:
    return usage_body(len(call.generation.prompt), call.completion_tokens)
