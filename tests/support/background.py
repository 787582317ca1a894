"""What a server does in the background, let alone for as long as a test needs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["run_until"]

_AT_MOST_S = 60  # what never comes is told here, long before the test's own time is over


async def run_until(is_done: Callable[[], bool], work: Coroutine[Any, Any, None]) -> None:
    """Let endless work run until something has come of it, then cancel it; what ends the work fails the test."""
    task = asyncio.create_task(work)
    async with asyncio.timeout(_AT_MOST_S):
        while not is_done():
            assert not task.done(), task
            await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
