"""The API's view of the engine: events by request, cancelling, bounds, and a worker that dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from adapters.errors import EngineUnavailableError, OverloadedError
from server.engine.core import EngineEvent, GenerationRequest
from server.engine_client import EngineClient
from server.messages import CancelCommand, Command, EngineMessage, EngineStatus, SubmitCommand
from tests.support.engine import ask


class Line:
    """A line to a worker whose messages the test writes."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self._messages: asyncio.Queue[EngineMessage] = asyncio.Queue()

    async def send(self, command: Command) -> None:
        """Keep the command."""
        self.sent.append(command)

    async def receive(self) -> list[EngineMessage]:
        """The next message."""
        return [await self._messages.get()]

    def say(self, *events: EngineEvent, epoch: str = "one", pid: int | None = None) -> None:
        """Let the worker speak."""
        status = EngineStatus(epoch, os.getpid() if pid is None else pid, 0, 0, ())
        self._messages.put_nowait(EngineMessage(status, events))


@asynccontextmanager
async def _connected(
    max_in_flight: int = 4, pid: int | None = None, max_tokens: int = 10_000
) -> AsyncIterator[tuple[EngineClient, Line]]:
    """A client that has heard its worker."""
    line = Line()
    client = EngineClient(line, max_in_flight=max_in_flight, max_tokens=max_tokens)
    running = asyncio.create_task(client.run())
    line.say(pid=pid)
    await _until(lambda: client.status is not None)
    try:
        yield client, line
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds; the test's own timeout is the bound."""
    while not condition():
        await asyncio.sleep(0)


async def _read(client: EngineClient, request: GenerationRequest) -> list[EngineEvent]:
    return [event async for event in client.generate(request)]


def _run(scenario: Awaitable[None]) -> None:
    async def run() -> None:
        await scenario

    asyncio.run(run())


def test_events_reach_their_own_request_when_several_are_in_flight() -> None:
    """Each request gets its events in order, ends with its finish reason, and is forgotten then."""

    async def scenario() -> None:
        async with _connected() as (client, line):
            tasks = [asyncio.create_task(_read(client, ask(name, "x"))) for name in ("a", "b")]
            await _until(lambda: len(line.sent) == 2)
            assert client.num_in_flight == 2
            line.say(EngineEvent("b", "1"), EngineEvent("a", "2"))
            line.say(EngineEvent("a", "3", 2, "stop"), EngineEvent("nobody", "?"), EngineEvent("b", "4", 2, "length"))
            answers = [await task for task in tasks]
            assert [[event.text for event in answer] for answer in answers] == [["2", "3"], ["1", "4"]]
            assert [command.epoch for command in line.sent if isinstance(command, SubmitCommand)] == ["one", "one"]
            assert len(line.sent) == 2, "a finished request is not cancelled"
            assert client.num_in_flight == 0

    _run(scenario())


def test_request_is_refused_when_no_worker_has_spoken() -> None:
    """Nothing is sent and nothing is kept."""

    async def scenario() -> None:
        line = Line()
        client = EngineClient(line, max_in_flight=1, max_tokens=1000)
        with pytest.raises(EngineUnavailableError, match="starting"):
            await _read(client, ask("a", "x"))
        assert (line.sent, client.num_in_flight, client.status) == ([], 0, None)

    _run(scenario())


def test_request_is_refused_when_as_many_as_allowed_are_in_flight() -> None:
    """The bound counts requests that are not answered to the end; one more is taken once one has ended."""

    async def scenario() -> None:
        async with _connected(max_in_flight=1) as (client, line):
            first = asyncio.create_task(_read(client, ask("a", "x")))
            await _until(lambda: client.num_in_flight == 1)
            with pytest.raises(OverloadedError, match="1 requests are in flight"):
                await _read(client, ask("b", "x"))
            assert client.num_in_flight == 1
            line.say(EngineEvent("a", "", 1, "stop"))
            await first
            line.say(EngineEvent("c", "", 1, "stop"))
            last = asyncio.create_task(_read(client, ask("c", "x")))
            await _until(lambda: client.num_in_flight == 1)
            line.say(EngineEvent("c", "", 1, "stop"))
            assert len(await last) == 1

    _run(scenario())


def test_request_is_refused_when_the_tokens_in_flight_would_be_too_many() -> None:
    """Prompt and max_tokens count from acceptance to the end; what just fits is taken, and room comes back."""

    async def scenario() -> None:
        async with _connected(max_tokens=22) as (client, line):
            first = asyncio.create_task(_read(client, ask("a", "xx", max_tokens=10)))
            await _until(lambda: client.num_in_flight == 1)
            with pytest.raises(OverloadedError, match="take 12 tokens, this request 11; together this server takes 22"):
                await _read(client, ask("b", "x", max_tokens=10))
            assert (1, 12) == (client.num_in_flight, client.num_tokens_in_flight)
            second = asyncio.create_task(_read(client, ask("c", "x", max_tokens=9)))
            await _until(lambda: client.num_in_flight == 2)
            assert client.num_tokens_in_flight == 22
            line.say(EngineEvent("a", "", 1, "stop"), EngineEvent("c", "", 1, "stop"))
            await asyncio.gather(first, second)
            assert client.num_tokens_in_flight == 0

    _run(scenario())


def test_request_is_cancelled_in_the_engine_when_its_iterator_is_closed() -> None:
    """Closing before the end sends one cancel command and forgets the request; late events are dropped."""

    async def scenario() -> None:
        async with _connected() as (client, line):
            events = client.generate(ask("a", "x"))
            line.say()
            first = asyncio.ensure_future(anext(events))
            await _until(lambda: len(line.sent) == 1)
            line.say(EngineEvent("a", "text"))
            assert (await first).text == "text"
            await events.aclose()
            assert CancelCommand("a") == line.sent[-1]
            assert (len(line.sent), client.num_in_flight) == (2, 0)
            line.say(EngineEvent("a", "late", 2, "cancelled"))
            line.say(EngineEvent("a", "later"))
            assert client.num_in_flight == 0

    _run(scenario())


def test_request_is_cancelled_in_the_engine_when_its_task_is_cancelled() -> None:
    """A client that hangs up cancels the task in the middle of waiting."""

    async def scenario() -> None:
        async with _connected() as (client, line):
            task = asyncio.create_task(_read(client, ask("a", "x")))
            await _until(lambda: len(line.sent) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [CancelCommand("a")] == line.sent[1:]
            assert client.num_in_flight == 0

    _run(scenario())


def _finished_process() -> int:
    """The id of a process that has ended and been reaped."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_requests_end_with_one_error_each_when_the_worker_dies() -> None:
    """The client notices by the process id; new requests are refused until a worker speaks, then taken again."""
    pid = _finished_process()

    async def scenario() -> None:
        async with _connected() as (client, line):
            tasks = [asyncio.create_task(_read(client, ask(name, "x"))) for name in ("a", "b")]
            await _until(lambda: len(line.sent) == 2)
            line.say(pid=pid)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(error) for error in errors] == ["the engine died; it is being restarted"] * 2
            assert {EngineUnavailableError} == {type(error) for error in errors}
            assert (client.status, client.num_in_flight) == (None, 0)
            with pytest.raises(EngineUnavailableError):
                await _read(client, ask("c", "x"))
            line.say(epoch="two")
            await _until(lambda: client.status is not None)
            again = asyncio.create_task(_read(client, ask("d", "x")))
            await _until(lambda: client.num_in_flight == 1)
            line.say(EngineEvent("d", "ok", 1, "stop"), epoch="two")
            assert [event.text for event in await again] == ["ok"]

    _run(scenario())


def test_requests_end_with_one_error_each_when_another_worker_speaks() -> None:
    """A new epoch means that the former worker is gone, even if nobody saw it die; new requests go to the new one."""

    async def scenario() -> None:
        async with _connected() as (client, line):
            events = client.generate(ask("a", "x"))
            first = asyncio.ensure_future(anext(events))
            await _until(lambda: len(line.sent) == 1)
            line.say(epoch="two")
            line.say(epoch="three")
            with pytest.raises(EngineUnavailableError, match="restarted"):
                await first
            with pytest.raises(StopAsyncIteration):
                await anext(events)
            assert client.num_in_flight == 0
            await _until(lambda: client.status is not None and client.status.epoch == "three")
            task = asyncio.create_task(_read(client, ask("b", "x")))
            await _until(lambda: client.num_in_flight == 1)
            line.say(EngineEvent("b", "", 1, "stop"), epoch="three")
            await task
            assert next(c.epoch for c in line.sent if isinstance(c, SubmitCommand) and c.request.id == "b") == "three"

    _run(scenario())


def test_nothing_is_kept_when_many_requests_have_ended() -> None:
    """A hundred answers later no queue is left."""

    async def scenario() -> None:
        async with _connected(max_in_flight=100) as (client, line):
            names = [f"r{index}" for index in range(100)]
            tasks = [asyncio.create_task(_read(client, ask(name, "x"))) for name in names]
            await _until(lambda: client.num_in_flight == 100)
            line.say(*(EngineEvent(name, "", 1, "stop") for name in names))
            await asyncio.gather(*tasks)
            assert client.num_in_flight == 0

    _run(scenario())


def test_requests_are_taken_all_or_none_when_they_come_together() -> None:
    """Three places for two and then two: the second pair is refused whole, and nothing of it is sent."""

    async def scenario() -> None:
        async with _connected(max_in_flight=3) as (client, line):
            events = client.generate(ask("a", "x"), ask("b", "x"))
            with pytest.raises(OverloadedError, match="2 requests are in flight; this server takes 3"):
                client.generate(ask("c", "x"), ask("d", "x"))
            assert client.num_in_flight == 2
            line.say(EngineEvent("b", "", 1, "stop"), EngineEvent("a", "", 1, "stop"))
            assert ["b", "a"] == [event.request_id async for event in events]
            assert (client.num_in_flight, len(line.sent)) == (0, 2)

    _run(scenario())


def test_unfinished_requests_are_cancelled_when_their_common_iterator_is_closed() -> None:
    """The one that has ended is not; its place is free as soon as it ends."""

    async def scenario() -> None:
        async with _connected(max_in_flight=3) as (client, line):
            events = client.generate(*(ask(name, "x") for name in "abc"))
            line.say(EngineEvent("b", "", 1, "stop"))
            assert (await anext(events)).request_id == "b"
            assert client.num_in_flight == 2
            await events.aclose()
            assert [CancelCommand("a"), CancelCommand("c")] == line.sent[3:]
            assert client.num_in_flight == 0

    _run(scenario())


def test_requests_of_one_call_end_in_one_error_when_the_worker_is_restarted() -> None:
    """The error is raised once, not once more for each of them."""

    async def scenario() -> None:
        async with _connected() as (client, line):
            events = client.generate(ask("a", "x"), ask("b", "x"))
            line.say(epoch="two")
            with pytest.raises(EngineUnavailableError, match="restarted"):
                await anext(events)
            assert client.num_in_flight == 0

    _run(scenario())
