"""What the API process does when it is told to end: it answers what is running before it stops listening.

A listening socket that nobody serves would make clients wait: the parent holds it too, so connections are taken by the
kernel until the last process is gone. So uvicorn, which stops serving at once, hears of the signal last.
"""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Callable, Sequence
from types import FrameType

from server.engine_client import EngineClient

__all__ = ["END_SIGNAL", "drain_before_exit"]

END_SIGNAL = signal.SIGUSR1  # the parent's word; SIGTERM and SIGINT often reach the API process beside it


def drain_before_exit(engine: EngineClient, *, limit_s: float) -> None:
    """Put off what SIGTERM and SIGINT do until the requests in flight have ended. Call it from the main thread's loop.

    `END_SIGNAL` does what SIGTERM does. The same signal again doesn't wait for the requests, which end in an error;
    another one changes nothing, since SIGTERM and Ctrl+C often reach the whole group and are followed by the parent's
    word.
    """
    loop = asyncio.get_running_loop()
    drains: set[asyncio.Task[None]] = set()  # the event loop keeps no reference of its own

    def begin(end: Callable[[], object]) -> None:
        if not drains:
            drains.add(loop.create_task(_drain_then(engine, limit_s, end)))

    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        assert callable(previous), "uvicorn handles both while it serves"
        end = functools.partial(previous, number, None)
        steps = (functools.partial(begin, end), engine.cut_drain, end)
        signal.signal(number, _in_steps(steps, loop))
        if number == signal.SIGTERM:
            signal.signal(END_SIGNAL, _in_steps(steps, loop))


def _in_steps(
    steps: Sequence[Callable[[], object]], loop: asyncio.AbstractEventLoop
) -> Callable[[int, FrameType | None], None]:
    """A handler that does the first thing the first time, and so on; from then on the last one."""
    times = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal times
        # A handler may interrupt the loop anywhere, so what it starts is left to the loop.
        loop.call_soon_threadsafe(steps[min(times, len(steps) - 1)])
        times += 1

    return handle


async def _drain_then(engine: EngineClient, limit_s: float, end: Callable[[], object]) -> None:
    await engine.drain(limit_s=limit_s)
    end()
