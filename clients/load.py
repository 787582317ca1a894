"""A load generator: a fixed list of chat requests, so many at a time, with what answered each and how long it took.

It speaks to any OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.http import ApiError, ChatAnswer, HotswapClient

__all__ = ["LoadRequest", "LoadResult", "LoadSummary", "percentile", "run_load", "send_one", "summarise_load"]


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


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What a load came to; `seconds` from the first request's start to the last one's end, `ttft_s` sorted."""

    num_requests: int
    errors: tuple[str, ...]
    num_tokens: int
    seconds: float
    ttft_s: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the load's time, prompts' computation included."""
        return self.num_tokens / self.seconds


def summarise_load(results: Sequence[LoadResult]) -> LoadSummary:
    """Add up the results of a load; tokens are those that the server reports for the answers that succeeded."""
    good = [result for result in results if result.error is None]
    return LoadSummary(
        num_requests=len(results),
        errors=tuple(result.error for result in results if result.error is not None),
        num_tokens=sum(result.answer.usage.get("completion_tokens", 0) for result in good),
        seconds=max(result.ended for result in results) - min(result.started for result in results),
        ttft_s=tuple(sorted(result.first_token - result.started for result in good if result.first_token is not None)),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


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
