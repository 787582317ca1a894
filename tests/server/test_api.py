"""The LitServe seam: our routes and none of its own, and a loop that obeys, steps and reports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from litserve import LitServer

from adapters.pulse import EnginePulse, pulse_path
from server.api import (
    EngineAPI,
    EngineLoop,
    EngineServer,
    LitServeTransport,
    RoutesSpec,
    build_server,
    wrap_lifespan,
)
from server.config import ServeSettings
from server.engine.scheduler import Engine
from server.messages import ENGINE_CHANNEL, CancelCommand, EngineMessage, PinCommand, SubmitCommand, UnloadCommand
from server.routes import router
from tests.support.engine import RECIPES, Answer, Bench, ask, collect, run_to_end
from tests.support.tiny import tiny_settings

FIRST, SECOND, *_ = RECIPES


class _EndOfTestError(Exception):
    """Ends a loop that has no end."""


class Worker:
    """Runs the real loop over a real engine on a script of commands: what LitServe's process does, without it.

    A callable in the script is called with the messages so far and returns the command to obey next.
    """

    def __init__(self, engine: Engine) -> None:
        self.messages: list[EngineMessage] = []
        self.beats: list[bool] = []  # whether the pulse beat, at each message
        self._engine = engine
        self._script: deque[Any] = deque()

    def run(self, *script: Any) -> Answer | None:
        """Obey the script, then end; returns the answer to request `r`, if there is one."""
        self._script.extend(script)
        with TemporaryDirectory() as home:
            self._pulse = EnginePulse(pulse_path(Path(home)))
            api = SimpleNamespace(engine=self._engine, pulse=self._pulse)
            with pytest.raises(_EndOfTestError):
                EngineLoop().run(api, "cpu", 0, self, self, {}, None)  # type: ignore[arg-type]
        answers: dict[str, Answer] = {}
        collect((event for message in self.messages for event in message.events), answers)
        return answers.get("r")

    def get(self, timeout: float) -> SubmitCommand | CancelCommand:
        """The queue's end that waits; only asked while the engine is idle."""
        if not self._script:
            raise _EndOfTestError
        if not self.messages:
            raise queue.Empty  # the first sign of life tells the epoch, which commands have to name
        command = self._script.popleft()
        obeyed: SubmitCommand | CancelCommand = command(self.messages[-1]) if callable(command) else command
        return obeyed

    def get_nowait(self) -> SubmitCommand | CancelCommand:
        """The queue's end that doesn't wait."""
        raise queue.Empty

    def send(self, item: tuple[str, Any], consumer_id: int) -> None:
        """The transport's end."""
        channel, (message, *_) = item
        assert (channel, consumer_id) == (ENGINE_CHANNEL, 0)
        self.beats.append(self._pulse.is_beating)
        # A process border lies here in production.
        self.messages.append(pickle.loads(pickle.dumps(message)))


def test_loop_answers_a_request_when_it_names_this_worker(bench: Bench) -> None:
    """Events leave as messages of one channel, with a status that names process and epoch."""
    engine = bench.engine()
    worker = Worker(engine)
    request = ask("r", "hello", max_tokens=4)

    answer = worker.run(lambda message: SubmitCommand(message.status.epoch, request))

    assert run_to_end(engine, request)["r"] == answer
    engine.close()
    assert {os.getpid()} == {message.status.pid for message in worker.messages}
    assert len({message.status.epoch for message in worker.messages}) == 1
    assert {0, 1} == {message.status.num_running for message in worker.messages}


def test_pulse_beats_when_somebody_is_answered(bench: Bench) -> None:
    """Trainers see when to give way: at every step but those that leave nothing to do."""
    engine = bench.engine()
    worker = Worker(engine)

    worker.run(lambda message: SubmitCommand(message.status.epoch, ask("r", "hello", max_tokens=4)))

    engine.close()
    assert {False, True} == set(worker.beats)
    assert [message.status.num_running > 0 for message in worker.messages] == worker.beats


def test_loop_ignores_a_request_when_it_was_sent_to_a_former_worker(bench: Bench) -> None:
    """It has been answered with an error when that worker died."""
    engine = bench.engine()
    worker = Worker(engine)
    assert None is worker.run(SubmitCommand("former", ask("r", "hello")))
    engine.close()
    assert engine.is_idle


def test_loop_cancels_a_request_when_it_is_told_to(bench: Bench) -> None:
    """A cancel for nobody is harmless."""
    engine = bench.engine()
    assert None is Worker(engine).run(CancelCommand("r"))
    engine.close()


def test_loop_pins_unloads_and_reports_when_it_is_told_to(bench: Bench) -> None:
    """What is pinned is not unloaded, and the loop goes on; messages say where versions are, about once a second."""
    engine = bench.engine()
    worker = Worker(engine)
    worker.run(PinCommand((FIRST,)), UnloadCommand(FIRST), UnloadCommand(SECOND))
    engine.close()
    assert frozenset({FIRST}) == engine.residency.pinned
    reports = [message.residency for message in worker.messages if message.residency is not None]
    assert [()] == reports[:1]


def test_epochs_differ_when_workers_do(bench: Bench) -> None:
    """The name of a worker is its own."""
    engine = bench.engine()
    workers = [Worker(engine) for _ in range(2)]
    for worker in workers:
        worker.run(CancelCommand("r"))
    engine.close()
    assert len({worker.messages[0].status.epoch for worker in workers}) == 2


def test_transport_carries_commands_and_messages_when_litserve_connects_it() -> None:
    """Commands go to the worker's queue; all messages that have come are returned together and once."""
    spec = RoutesSpec()
    spec.request_queue = queue.Queue()
    spec.response_buffer = {}

    async def scenario() -> list[Any]:
        transport = LitServeTransport(spec)
        await transport.send(CancelCommand("r"))
        item = spec.response_buffer[ENGINE_CHANNEL]
        item.response_queue.extend([("one", "ok"), ("two", "ok")])
        item.event.set()
        first: list[Any] = await transport.receive()
        item.response_queue.append(("three", "ok"))
        item.event.set()
        return [first, await transport.receive()]

    assert asyncio.run(scenario()) == [["one", "two"], ["three"]]
    assert CancelCommand("r") == spec.request_queue.get_nowait()


def test_server_has_our_routes_and_none_of_litserves_when_it_is_built(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """What is not ours is not served; our hook gets the app and the spec."""
    core = tiny_settings(tiny_folders["llama"], home=tmp_path)
    configured: list[tuple[Any, RoutesSpec]] = []

    server = build_server(core, ServeSettings.load(tmp_path), router, lambda app, spec: configured.append((app, spec)))

    ((app, spec),) = configured
    assert server.app is app
    assert isinstance(spec, RoutesSpec)
    schema = app.openapi()["paths"]
    assert {
        "/health",
        "/ready",
        "/v1/chat/completions",
        "/v1/feedback",
        "/v1/models",
        "/v1/models/{name}",
    } <= set(schema)
    assert {"/", "/info", "/predict"}.isdisjoint(schema)


def test_worker_gets_settings_and_no_model_when_it_is_sent_to_its_process(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The engine is built behind the process border, from plain settings."""
    core = tiny_settings(tiny_folders["llama"], home=tmp_path)
    api = EngineAPI(core, ServeSettings.load(tmp_path), RoutesSpec())
    assert None is api.engine
    assert (core, True) == (api.core, api.stream)


def test_lifespan_starts_ours_inside_litserves_when_the_app_starts() -> None:
    """LitServe's own start-up comes first and its end last, since messages travel through it."""
    from contextlib import asynccontextmanager

    from fastapi import FastAPI

    steps: list[str] = []

    @asynccontextmanager
    async def inner(app: FastAPI) -> Any:
        steps.append("litserve starts")
        yield
        steps.append("litserve ends")

    @asynccontextmanager
    async def ours(app: FastAPI) -> Any:
        steps.append("we start")
        yield
        steps.append("we end")

    app = FastAPI(lifespan=inner)
    wrap_lifespan(app, ours)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            steps.append("serving")

    asyncio.run(run())
    assert steps == ["litserve starts", "we start", "serving", "we end", "litserve ends"]


def test_end_is_begun_behind_the_fork_when_the_signal_comes_in_its_midst(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a hook of `os.fork` is dropped, and the server would have served on."""
    server = EngineServer.__new__(EngineServer)
    done: list[str] = []

    def start(self: LitServer) -> dict[int, Any]:
        with contextlib.suppress(KeyboardInterrupt):  # as the hook of a fork does
            server.interrupt()
        done.append("forked")
        return {}

    monkeypatch.setattr(LitServer, "_start_server", start)
    with pytest.raises(KeyboardInterrupt):
        server._start_server()
    assert ["forked"] == done
    with pytest.raises(KeyboardInterrupt):
        server.interrupt()
