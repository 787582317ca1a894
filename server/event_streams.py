"""Events of jobs as server-sent events while they happen: so many streams at a time, each asking the job table."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import Request

from adapters.errors import HotswapError, OverloadedError
from server.errors import count_error, describe_error
from server.fine_tuning_schemas import event_body

if TYPE_CHECKING:
    from server.services import Services

__all__ = ["EventStreams"]

_MAX_OPEN = 64
_RETRY_AFTER_S = 5
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 2.0
_KEEP_ALIVE_S = 15.0
_EVENTS_AT_ONCE = 100
_GOING_ON = ("validating_files", "queued", "running")


class EventStreams:
    """Counts the streams of one API process. Use it from one event loop only."""

    def __init__(self, *, max_open: int = _MAX_OPEN) -> None:
        self._max_open = max_open
        self._open: weakref.WeakSet[AsyncIterator[bytes]] = weakref.WeakSet()

    def open(self, services: Services, job_id: str, after: str | None, request: Request) -> AsyncIterator[bytes]:
        """Events behind the one called `after`, until the job is at its end or paused.

        A server that is about to end does not wait for the job: the stream ends in an error, and clients ask again.

        Raises:
            OverloadedError: as many streams are open as may be.
        """
        if len(self._open) >= self._max_open:
            raise OverloadedError(
                f"{self._max_open} event streams are open, which is all at a time; ask for pages of events instead",
                retry_after_s=_RETRY_AFTER_S,
            )
        events = _follow(services, job_id, after, request)
        # A stream whose client left before its first event never runs: it is forgotten when nobody holds it any more.
        self._open.add(events)
        return events


async def _follow(services: Services, job_id: str, after: str | None, request: Request) -> AsyncIterator[bytes]:
    """Events as they come; a comment now and then, so that no proxy thinks the stream dead."""
    jobs = services.fine_tuning.jobs
    sent_at = time.monotonic()
    wait_s = _FIRST_WAIT_S
    try:
        while True:
            services.engine.check_not_draining()
            events, status = await asyncio.to_thread(jobs.follow, job_id, after=after, limit=_EVENTS_AT_ONCE)
            for event in events:
                after, sent_at, wait_s = event.id, time.monotonic(), _FIRST_WAIT_S
                yield _sse(event_body(event))
            if not events and status not in _GOING_ON:
                yield b"data: [DONE]\n\n"
                return
            if time.monotonic() - sent_at > _KEEP_ALIVE_S:
                sent_at = time.monotonic()
                yield b": still here\n\n"
            if not events:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    except Exception as error:
        # The status line is long gone: whatever broke off, the client reads an error and not an early end.
        known = error if isinstance(error, HotswapError) else HotswapError("the stream broke off")
        answer, body = describe_error(known)
        count_error(request, answer.code)
        yield _sse(body)
        if known is not error:
            raise


def _sse(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()
