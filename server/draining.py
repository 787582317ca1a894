"""What the API process does when it is told to end: it answers what is running before it stops listening.

A listening socket that nobody serves would make clients wait: the parent holds it too, so connections are taken by the
kernel until the last process is gone. So uvicorn, which stops serving at once, hears of the signal last.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from server.engine_client import EngineClient

__all__ = ["drain_before_exit"]


def drain_before_exit(engine: EngineClient, *, limit_s: float) -> None:
    """Put off what SIGTERM and SIGINT do until the requests in flight have ended. Call it from the main thread's loop.

    The same signal again doesn't wait; the other one changes nothing, since Ctrl+C is followed by the parent's SIGTERM.
    """
    loop = asyncio.get_running_loop()
    drains: set[asyncio.Task[None]] = set()  # the event loop keeps no reference of its own

    def begin(end: Callable[[], object]) -> None:
        if not drains:
            drains.add(loop.create_task(_drain_then(engine, limit_s, end)))

    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        assert callable(previous), "uvicorn handles both while it serves"
        signal.signal(number, _put_off(previous, begin, loop))


def _put_off(
    previous: Callable[[int, FrameType | None], Any],
    begin: Callable[[Callable[[], object]], None],
    loop: asyncio.AbstractEventLoop,
) -> Callable[[int, FrameType | None], None]:
    times = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal times
        times += 1
        if times > 1:
            previous(number, frame)
        else:
            # A handler may interrupt the loop anywhere, so what it starts is left to the loop.
            loop.call_soon_threadsafe(begin, lambda: previous(number, None))

    return handle


async def _drain_then(engine: EngineClient, limit_s: float, end: Callable[[], object]) -> None:
    await engine.drain(limit_s=limit_s)
    end()
