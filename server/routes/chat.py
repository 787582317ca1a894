"""POST /v1/chat/completions: whole answers and server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from adapters.errors import EngineFailureError, HotswapError
from server.auth import needs
from server.chat import Answer, ChatCall
from server.engine.core import EngineEvent
from server.errors import count_error, describe_error
from server.limits import TIMEOUT_HEADER, read_timeout
from server.logprobs import LogprobsWriter
from server.observe import request_id_of
from server.schemas import ChatRequest, chat_choice, chat_chunk, chat_completion, usage_body
from server.services import CurrentCaller, CurrentServices

__all__ = ["router"]

router = APIRouter(dependencies=[needs("chat")])
_T = TypeVar("_T")
_CLIENT_CLOSED_REQUEST = 499  # nginx's number for it; nobody is left to read it


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: CurrentServices, caller: CurrentCaller
) -> Response:
    """Answer a conversation with the version that `model` names."""
    timeout_s = read_timeout(request.headers.get(TIMEOUT_HEADER), limit_s=services.chat.timeout_s)
    request_id = request_id_of(request.scope)
    call = await services.chat.accept(body, request_id=request_id, caller=caller, timeout_s=timeout_s)
    request.state.binding = call.binding  # for the count of errors
    events = services.chat.generate(call)
    logprobs = services.chat.logprobs if body.logprobs else None
    if not body.stream:
        return await _answer_whole(call, body, events, logprobs, request)
    # An answer that fails before its first token gets a proper status code: wait for that token before the headers.
    first = await _unless_client_leaves(anext(events), request)
    if first is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(
        _stream(_ChunkWriter(call, body.model, logprobs, include_usage=include_usage), first, events, request),
        media_type="text/event-stream",
        headers={**call.headers, "cache-control": "no-store"},
    )


async def _answer_whole(
    call: ChatCall,
    body: ChatRequest,
    events: AsyncGenerator[EngineEvent],
    logprobs: LogprobsWriter | None,
    request: Request,
) -> Response:
    collected = await _unless_client_leaves(_collect(events), request)
    if collected is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    content = chat_completion(
        response_id=call.response_id,
        created=call.created,
        model=body.model,
        choices=[_choice(answer, collected[name], logprobs) for name, answer in call.answers.items()],
        usage=_usage(call),
    )
    return JSONResponse(content, headers=call.headers)


async def _collect(events: AsyncGenerator[EngineEvent]) -> dict[str, list[EngineEvent]]:
    """All events, by the request that they belong to."""
    collected: dict[str, list[EngineEvent]] = {}
    async for event in events:
        collected.setdefault(event.request_id, []).append(event)
    return collected


def _choice(answer: Answer, events: list[EngineEvent], logprobs: LogprobsWriter | None) -> dict[str, Any]:
    return chat_choice(
        index=answer.index,
        text="".join(event.text for event in events),
        finish_reason=answer.finish_reason,
        logprobs=None if logprobs is None else logprobs.body(entry for event in events for entry in event.logprobs),
    )


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


class _ChunkWriter:
    """Writes the chunks of one streamed response; the first of each answer names the role."""

    def __init__(self, call: ChatCall, model: str, logprobs: LogprobsWriter | None, *, include_usage: bool) -> None:
        self._call = call
        self._model = model
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._begun: set[str] = set()

    def chunks(self, event: EngineEvent) -> Iterator[bytes]:
        """What one event of the engine brings: text, the end of an answer, both or nothing."""
        index = self._call.answers[event.request_id].index
        delta = {"content": event.text}
        if event.request_id not in self._begun:
            self._begun.add(event.request_id)
            delta = {"role": "assistant", **delta}
        if event.text or event.logprobs or "role" in delta:
            logprobs = None if self._logprobs is None else self._logprobs.body(event.logprobs)
            yield self._chunk(index=index, delta=delta, logprobs=logprobs)
        if event.finish_reason is not None:
            yield self._chunk(index=index, delta={}, finish_reason=event.finish_reason)

    def end(self) -> Iterator[bytes]:
        """What comes behind the last answer."""
        if self._include_usage:
            whole = chat_chunk(
                response_id=self._call.response_id, created=self._call.created, model=self._model, delta={}
            )
            yield _event(whole | {"choices": [], "usage": _usage(self._call)})
        yield b"data: [DONE]\n\n"

    def _chunk(self, **fields: Any) -> bytes:
        body = chat_chunk(response_id=self._call.response_id, created=self._call.created, model=self._model, **fields)
        return _event(body | {"usage": None} if self._include_usage else body)


async def _stream(
    writer: _ChunkWriter, first: EngineEvent, events: AsyncGenerator[EngineEvent], request: Request
) -> AsyncIterator[bytes]:
    try:
        for chunk in writer.chunks(first):
            yield chunk
        async for event in events:
            for chunk in writer.chunks(event):
                yield chunk
        for chunk in writer.end():
            yield chunk
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


def _usage(call: ChatCall) -> dict[str, int]:
    return usage_body(call.prompt_tokens, call.completion_tokens)
