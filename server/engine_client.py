"""An API process's view of the engine: submit a request, read its events, cancel it; notice when the worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator
from typing import Protocol

import structlog

from adapters.errors import EngineUnavailableError, OverloadedError
from server.engine.core import EngineEvent, GenerationRequest
from server.messages import CancelCommand, EngineMessage, EngineStatus, SubmitCommand

__all__ = ["EngineClient", "Transport"]

_log = structlog.get_logger(__name__)

_CHECK_EVERY_S = 0.5
# A step with long prompts may take seconds on a busy machine; a worker that is silent for longer is taken for stuck.
_SILENCE_LIMIT_S = 60.0


class Transport(Protocol):
    """The line to the engine worker."""

    async def send(self, command: SubmitCommand | CancelCommand) -> None:
        """Send one command."""

    async def receive(self) -> list[EngineMessage]:
        """Wait for messages."""


class EngineClient:
    """Keeps one queue of events per request in flight. Use it from one event loop only."""

    def __init__(self, transport: Transport, *, max_in_flight: int) -> None:
        self._transport = transport
        self._max_in_flight = max_in_flight
        self._in_flight: dict[str, asyncio.Queue[EngineEvent | EngineUnavailableError]] = {}
        self._status: EngineStatus | None = None
        self._last_heard = 0.0

    @property
    def status(self) -> EngineStatus | None:
        """What the worker said last; None while there is no worker."""
        return self._status

    @property
    def num_in_flight(self) -> int:
        """Requests that have been accepted and not yet answered to the end."""
        return len(self._in_flight)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent]:
        """Accept a request and return its events, to be iterated at once; the last one has a finish reason.

        Closing the iterator early cancels the request in the engine. If the worker dies, iterating raises
        EngineUnavailableError.

        Raises:
            OverloadedError: too many requests are in flight; nothing was accepted.
            EngineUnavailableError: there is no worker; nothing was accepted.
        """
        if self._status is None:
            raise EngineUnavailableError("the engine is starting; try again shortly")
        if len(self._in_flight) >= self._max_in_flight:
            raise OverloadedError(f"{len(self._in_flight)} requests are in flight, the most that this server takes")
        queue: asyncio.Queue[EngineEvent | EngineUnavailableError] = asyncio.Queue()
        self._in_flight[request.id] = queue
        return self._follow(SubmitCommand(self._status.epoch, request), queue)

    async def _follow(
        self, command: SubmitCommand, queue: asyncio.Queue[EngineEvent | EngineUnavailableError]
    ) -> AsyncGenerator[EngineEvent]:
        request = command.request
        finished = False
        try:
            await self._transport.send(command)
            while not finished:
                event = await queue.get()
                if isinstance(event, EngineUnavailableError):
                    raise event
                finished = event.finish_reason is not None
                yield event
        finally:
            self._in_flight.pop(request.id, None)
            if not finished:
                await asyncio.shield(self._transport.send(CancelCommand(request.id)))

    async def run(self) -> None:
        """Distribute the worker's messages until cancelled, and watch over the worker."""
        watcher = asyncio.create_task(self._watch())
        try:
            while True:
                for message in await self._transport.receive():
                    self._distribute(message)
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    def _distribute(self, message: EngineMessage) -> None:
        if self._status is not None and self._status.epoch != message.status.epoch:
            self._give_up("the engine was restarted")
        if self._status is None:
            _log.info("engine_ready", pid=message.status.pid, epoch=message.status.epoch)
        self._status = message.status
        self._last_heard = time.monotonic()
        for event in message.events:
            # A request that was cancelled meanwhile has no queue any more.
            if queue := self._in_flight.get(event.request_id):
                queue.put_nowait(event)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            if self._status is None:
                continue
            if not _is_alive(self._status.pid):
                self._give_up("the engine died; it is being restarted")
            elif time.monotonic() - self._last_heard > _SILENCE_LIMIT_S:
                # A stuck worker is ended, so that LitServe starts another.
                os.kill(self._status.pid, signal.SIGKILL)
                self._give_up(f"the engine has been silent for {_SILENCE_LIMIT_S:.0f} seconds")

    def _give_up(self, reason: str) -> None:
        """End every request in flight with an error, and take no more until a worker speaks."""
        _log.error("engine_lost", reason=reason, num_requests=len(self._in_flight))
        self._status = None
        for queue in self._in_flight.values():
            queue.put_nowait(EngineUnavailableError(reason))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is there, under another user
    return True
