"""An orderly end: the parent process asks, the API process answers what runs, and says when it has.

The two share flags that the API process inherits when it is forked.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from server.engine_client import EngineClient

__all__ = ["Drain", "stop_on_signals"]

_CHECK_EVERY_S = 0.1
_MARGIN_S = 2.0  # for ending what the limit cut short


class Drain:
    """The flags: whether an API process serves, whether it shall stop, whether it has nothing left to answer."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        context = mp.get_context("fork")
        self._serving = context.Event()
        self._asked = context.Event()
        self._done = context.Event()

    async def serve(self, engine: EngineClient) -> None:
        """In the API process: wait until the parent asks, then drain the engine's client."""
        self._serving.set()
        try:
            while not self._asked.is_set():
                await asyncio.sleep(_CHECK_EVERY_S)
            await engine.drain("the server is stopping", limit_s=self.limit_s)
        finally:
            self._done.set()

    @property
    def is_serving(self) -> bool:
        """Whether there is an API process that can be asked."""
        return self._serving.is_set()

    def ask_and_wait(self) -> None:
        """In the parent: ask, and wait until it is done, or should be."""
        self._asked.set()
        self._done.wait(self.limit_s + _MARGIN_S)


def stop_on_signals(drain: Drain, stopping: threading.Event) -> None:
    """Drain on SIGTERM, which process managers send, and on Ctrl+C; the next signal ends the server without delay.

    LitServe shuts down in good order on KeyboardInterrupt. The API process is forked with these handlers, has others
    while it serves, and must not raise when uvicorn repeats the signal at the end.
    """
    handle = _handler(os.getpid(), drain, stopping)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _handler(parent: int, drain: Drain, stopping: threading.Event) -> Callable[[int, FrameType | None], None]:
    def drain_and_end() -> None:
        drain.ask_and_wait()
        os.kill(parent, signal.SIGINT)  # comes back to the handler, in the main thread

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:
            return
        if stopping.is_set() or not drain.is_serving:
            stopping.set()
            raise KeyboardInterrupt
        stopping.set()
        threading.Thread(target=drain_and_end, name="drain", daemon=True).start()

    return handle
