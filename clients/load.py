"""A load generator: a fixed list of chat requests, so many at a time, with what answered each and how long it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.http import ApiError, ChatAnswer, HotswapClient

__all__ = ["LoadRequest", "LoadResult", "run_load", "send_one"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One chat request. `options` are further fields of its body."""

    model: str
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class LoadResult:
    """How one request went; times are seconds on `time.monotonic`'s clock. `error` None means it succeeded."""

    request: LoadRequest
    answer: ChatAnswer
    started: float
    first_token: float | None = None
    ended: float = 0.0
    error: str | None = None


async def run_load(
    client: HotswapClient,
    requests: Sequence[LoadRequest],
    *,
    concurrency: int,
    on_result: Callable[[LoadResult], Awaitable[None] | None] | None = None,
) -> list[LoadResult]:
    """Send all requests as streams, at most `concurrency` at a time, and return their results in the order given."""
    gate = asyncio.Semaphore(concurrency)

    async def run(request: LoadRequest) -> LoadResult:
        async with gate:
            result = await send_one(client, request)
        if on_result is not None and (pending := on_result(result)) is not None:
            await pending
        return result

    return list(await asyncio.gather(*[run(request) for request in requests]))


async def send_one(client: HotswapClient, request: LoadRequest) -> LoadResult:
    """Send one request as a stream and read it to its end; errors are part of the result."""
    result = LoadResult(request, ChatAnswer(), started=time.monotonic())
    messages = [{"role": "user", "content": request.prompt}]
    try:
        async for _ in client.stream_chat(request.model, messages, result.answer, **request.options):
            if result.first_token is None:
                result.first_token = time.monotonic()
    except ApiError as error:
        result.error = str(error)
    result.ended = time.monotonic()
    return result
