"""An API process's view of the engine: submit a request, read its events, cancel it; notice when the worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from adapters.errors import EngineUnavailableError, InvalidInputError, OverloadedError
from server.engine.core import EngineEvent, GenerationRequest
from server.engine.residency import Residence
from server.messages import (
    CancelCommand,
    Command,
    EngineMessage,
    EngineStatus,
    PinCommand,
    SubmitCommand,
    UnloadCommand,
)

__all__ = ["EngineClient", "Transport"]

_log = structlog.get_logger(__name__)

_CHECK_EVERY_S = 0.5
# A step with long prompts may take seconds on a busy machine; a worker that is silent for longer is taken for stuck.
_SILENCE_LIMIT_S = 60.0
_DRAIN_CHECK_S = 0.05


class Transport(Protocol):
    """The line to the engine worker."""

    async def send(self, command: Command) -> None:
        """Send one command."""

    async def receive(self) -> list[EngineMessage]:
        """Wait for messages."""


_Events = asyncio.Queue[EngineEvent | EngineUnavailableError]


@dataclass(frozen=True, slots=True)
class _InFlight:
    num_tokens: int
    events: _Events  # shared by the requests of one call


class EngineClient:
    """Keeps one queue of events per request in flight. Use it from one event loop only.

    Args:
        transport: The line to the worker.
        max_in_flight: Requests that are taken at once.
        max_tokens: Prompt and max_tokens of all requests that are taken at once.
        on_message: Called with each message of the worker, before its events reach their requests.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        max_in_flight: int,
        max_tokens: int,
        on_message: Callable[[EngineMessage], None] | None = None,
    ) -> None:
        self._transport = transport
        self._max_in_flight = max_in_flight
        self._max_tokens = max_tokens
        self._on_message = on_message
        self._in_flight: dict[str, _InFlight] = {}
        self._shadows: dict[str, _Events] = {}  # beside those in flight: nobody waits for them, also not when draining
        self._num_tokens = 0
        self._status: EngineStatus | None = None
        self._last_heard = 0.0
        self._is_draining = False
        self._drain_until = math.inf
        self._residency: dict[str, Residence] = {}

    @property
    def status(self) -> EngineStatus | None:
        """What the worker said last; None while there is no worker."""
        return self._status

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are taken because the server is about to end."""
        return self._is_draining

    @property
    def num_in_flight(self) -> int:
        """Requests that have been accepted and not yet answered to the end."""
        return len(self._in_flight)

    @property
    def num_tokens_in_flight(self) -> int:
        """Prompt and max_tokens of those requests."""
        return self._num_tokens

    @property
    def residency(self) -> dict[str, Residence]:
        """Where versions were about a second ago, by digest; what is nowhere but in the store is not listed."""
        return self._residency

    async def set_pinned(self, digests: tuple[str, ...]) -> None:
        """Tell the worker which versions keep their slots; it forgets them when it dies."""
        await self._transport.send(PinCommand(digests))

    async def unload(self, digest: str) -> None:
        """Tell the worker to free a version's slot once its last request has ended.

        Raises:
            EngineUnavailableError: there is no worker.
        """
        if self._status is None:
            raise EngineUnavailableError("the engine is starting; try again shortly")
        await self._transport.send(UnloadCommand(digest))

    def generate(self, *requests: GenerationRequest) -> AsyncGenerator[EngineEvent]:
        """Accept requests together and return their events, to be iterated at once.

        The last event of each request has a finish reason. Closing the iterator early cancels those that are not
        finished. If the worker dies, iterating raises EngineUnavailableError.

        Raises:
            InvalidInputError: there will never be room for all of them; nothing was accepted.
            OverloadedError: there is no room for all of them, or for their tokens; nothing was accepted.
            EngineUnavailableError: there is no worker, or the server is about to end; nothing was accepted.
        """
        self.check_available()
        assert self._status is not None, "just checked"
        self._check_load(requests)
        events: _Events = asyncio.Queue()
        for request in requests:
            self._in_flight[request.id] = _InFlight(request.num_tokens, events)
            self._num_tokens += request.num_tokens
        return self._follow([SubmitCommand(self._status.epoch, request) for request in requests], events)

    def shadow(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent]:
        """Offer a shadow to the worker and return its events; it takes none of the room that requests have.

        Raises:
            EngineUnavailableError: there is no worker, or the server is about to end.
        """
        assert request.is_shadow, "requests are accepted by `generate`"
        self.check_available()
        assert self._status is not None, "just checked"
        events: _Events = asyncio.Queue()
        self._shadows[request.id] = events
        return self._follow([SubmitCommand(self._status.epoch, request)], events)

    def check_available(self) -> None:
        """Raise EngineUnavailableError, with the reason, if requests are not taken at present."""
        self.check_not_draining()
        if self._status is None:
            raise EngineUnavailableError("the engine is starting; try again shortly")

    def check_not_draining(self) -> None:
        """Raise EngineUnavailableError if the server is about to end: for streams that need no engine."""
        if self._is_draining:
            raise EngineUnavailableError("the server is shutting down; try again shortly")

    async def drain(self, *, limit_s: float) -> None:
        """Take no more requests, and return when those in flight have ended; after `limit_s` they end in an error."""
        self._is_draining = True
        self._drain_until = min(self._drain_until, time.monotonic() + limit_s)
        _log.info("draining", num_requests=len(self._in_flight))
        while self._in_flight and time.monotonic() < self._drain_until:
            await asyncio.sleep(_DRAIN_CHECK_S)
        if self._in_flight:
            _log.warning("drain_cut_short", num_requests=len(self._in_flight))
            self._end_all("the server is shutting down")

    def cut_drain(self) -> None:
        """Let a drain that is under way, or about to begin, wait no longer."""
        self._drain_until = 0.0

    def _check_load(self, requests: Sequence[GenerationRequest]) -> None:
        num_tokens = sum(request.num_tokens for request in requests)
        self._check_possible(len(requests), num_tokens)
        num_in_flight = len(self._in_flight)
        if num_in_flight + len(requests) > self._max_in_flight:
            raise OverloadedError(f"{num_in_flight} requests are in flight; this server takes {self._max_in_flight}")
        if self._num_tokens + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"what is in flight may take {self._num_tokens} tokens, this request {num_tokens}; "
                f"together this server takes {self._max_tokens}"
            )

    def _check_possible(self, num_requests: int, num_tokens: int) -> None:
        """A retry can't help where the server would be too small with nobody else there."""
        if num_requests > self._max_in_flight:
            raise InvalidInputError(
                f"n: {num_requests} answers were asked for; this server takes {self._max_in_flight} at once", param="n"
            )
        if num_tokens > self._max_tokens:
            raise InvalidInputError(
                f"n: {num_requests} answers may take {num_tokens} tokens with their prompts; "
                f"this server takes {self._max_tokens} at once",
                param="n",
            )

    async def _follow(self, commands: list[SubmitCommand], events: _Events) -> AsyncGenerator[EngineEvent]:
        unfinished = dict.fromkeys(command.request.id for command in commands)
        try:
            for command in commands:
                await self._transport.send(command)
            while unfinished:
                event = await events.get()
                if isinstance(event, EngineUnavailableError):
                    raise event
                if event.finish_reason is not None:
                    del unfinished[event.request_id]
                    self._forget(event.request_id)
                yield event
        finally:
            for request_id in unfinished:
                self._forget(request_id)
            if unfinished:
                await asyncio.shield(self._cancel(unfinished))

    def _forget(self, request_id: str) -> None:
        self._shadows.pop(request_id, None)
        if entry := self._in_flight.pop(request_id, None):
            self._num_tokens -= entry.num_tokens

    async def _cancel(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            await self._transport.send(CancelCommand(request_id))

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
        if message.residency is not None:
            self._residency = {residence.digest: residence for residence in message.residency}
        if self._on_message is not None:
            self._on_message(message)
        for event in message.events:
            # A request that was cancelled meanwhile has no queue any more.
            if entry := self._in_flight.get(event.request_id):
                entry.events.put_nowait(event)
            elif shadow := self._shadows.get(event.request_id):
                shadow.put_nowait(event)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            if self._status is None:
                continue
            if not _is_alive(self._status.pid):
                self._give_up("the engine died; it is being restarted")
            elif time.monotonic() - self._last_heard > _SILENCE_LIMIT_S:
                # A stuck worker is ended, so that LitServe starts another.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._status.pid, signal.SIGKILL)
                self._give_up(f"the engine has been silent for {_SILENCE_LIMIT_S:.0f} seconds")

    def _give_up(self, reason: str) -> None:
        """End every request in flight with an error, and take no more until a worker speaks."""
        _log.error("engine_lost", reason=reason, num_requests=len(self._in_flight))
        self._status = None
        self._residency = {}
        self._end_all(reason)

    def _end_all(self, reason: str) -> None:
        queues = [*(entry.events for entry in self._in_flight.values()), *self._shadows.values()]
        for events in {id(events): events for events in queues}.values():
            events.put_nowait(EngineUnavailableError(reason))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is there, under another user
    return True
