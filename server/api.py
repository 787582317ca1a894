"""The LitServe seam: the only file that knows its loops, specs and queues.

LitServe gives the processes (an API process, an engine worker, a monitor that restarts it) and the transport between
them. The routes are ours, since its OpenAI layer reports wrong finish reasons and loses errors in streams; the loop is
ours, since its continuous-batching loop ends for good on one exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import multiprocessing as mp
import os
import queue as queues
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from litserve import LitAPI, LitServer
from litserve.loops.base import LitLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem

from adapters.errors import ConflictError
from adapters.process_log import configure_log
from adapters.pulse import EnginePulse, pulse_path
from adapters.settings import CoreSettings
from server.config import ServeSettings
from server.draining import END_SIGNAL
from server.engine.core import EngineEvent
from server.engine.driven import DrivenEngine
from server.engine_factory import build_engine
from server.messages import (
    ENGINE_CHANNEL,
    CancelCommand,
    Command,
    EngineMessage,
    EngineStatus,
    PinCommand,
    UnloadCommand,
)

__all__ = [
    "EngineAPI",
    "EngineBuilder",
    "EngineLoop",
    "EngineServer",
    "LitServeTransport",
    "RoutesSpec",
    "build_server",
    "guard_processes",
    "obey",
    "wrap_lifespan",
]

EngineBuilder = Callable[[CoreSettings, ServeSettings], DrivenEngine]

_log = structlog.get_logger(__name__)

_CONSUMER_ID = 0  # one API process; see docs/decisions/0002
_IDLE_WAIT_S = 0.2
_GUARD_INTERVAL_S = 0.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_HEARTBEAT_S = 1.0
_END_S = 5  # what the end of an API process may take after it has drained
_HIDDEN_PATHS = frozenset({"/", "/info", "/litserve-health"})


class EngineAPI(LitAPI):  # type: ignore[misc]  # LitServe ships no types
    """What LitServe hands to the worker process: plain settings there, the engine after `setup`.

    `build` makes the engine in the worker; it is pickled, so it must be a function of an importable module.
    """

    def __init__(
        self, core: CoreSettings, serve: ServeSettings, spec: LitSpec, build: EngineBuilder = build_engine
    ) -> None:
        super().__init__(spec=spec, loop=EngineLoop(), stream=True)
        self.core = core
        self.serve = serve
        self.build = build
        self.engine: DrivenEngine | None = None
        self.pulse: EnginePulse | None = None

    def setup(self, device: str) -> None:
        """Load the base model and build the engine; runs in the worker. Our own setting chooses the device."""
        # Both may reach the whole group: what runs is answered first, then the parent ends the worker.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _die_with_parent(signal.SIGKILL)
        configure_log(self.serve.log_level)
        import torch

        torch.set_num_threads(self.serve.resolved_threads)
        self.engine = self.build(self.core, self.serve)
        self.pulse = EnginePulse(pulse_path(self.core.home))


class EngineLoop(LitLoop):  # type: ignore[misc]  # LitServe ships no types
    """Steps the engine for ever: takes commands, computes, sends one message a step."""

    def run(
        self,
        lit_api: EngineAPI,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Called by LitServe in the worker, after `setup`."""
        engine, pulse = lit_api.engine, lit_api.pulse
        assert engine is not None, "LitServe calls setup first"
        assert pulse is not None, "made by setup, too"
        epoch = secrets.token_hex(4)
        parent = os.getppid()
        last_sent = last_reported = 0.0
        while os.getppid() == parent:  # a worker without a parent would hold its memory for nobody
            events = [
                event
                for command in _take_commands(request_queue, wait=engine.is_idle)
                for event in obey(engine, command, epoch)
            ]
            if engine.num_running or engine.num_waiting:
                pulse.beat()
            events += engine.step()
            if engine.is_idle:
                pulse.rest()
            if events or time.monotonic() - last_sent > _HEARTBEAT_S:
                # Not with every step: a full host cache is a long list, and nobody needs it to the millisecond.
                is_due = time.monotonic() - last_reported > _HEARTBEAT_S
                last_reported = time.monotonic() if is_due else last_reported
                residency = engine.residency.report() if is_due else None
                message = EngineMessage(EngineStatus.of(engine, epoch), tuple(events), engine.take_timings(), residency)
                self.put_response(
                    transport, _CONSUMER_ID, ENGINE_CHANNEL, message, LitAPIStatus.OK, LoopResponseType.STREAMING
                )
                last_sent = time.monotonic()
            elif not engine.num_running and not engine.is_idle:
                time.sleep(0.001)  # only a load is under way: leave the processor to the loader thread
        sys.exit(1)


class RoutesSpec(LitSpec):  # type: ignore[misc]  # LitServe ships no types
    """Tells LitServe that the routes are ours; they are included in the app by `build_server`."""

    def __init__(self) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"

    @property
    def stream(self) -> bool:
        """Whether outputs come in several messages a request."""
        return True

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Unused: our loop reads the queue itself."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Unused: our loop sends messages itself."""
        return output


class EngineServer(LitServer):  # type: ignore[misc]  # LitServe ships no types
    """LitServe's parent process. It ends its children in our order: the API process when it has drained, then the rest.

    SIGTERM and SIGINT often reach all processes at once. So the API process hears from the parent by a signal of its
    own, and whatever it needs to drain, the worker and the manager of the queues, goes on until the parent kills it.
    """

    _api_processes: tuple[Any, ...] = ()
    _is_forking = False
    _is_interrupted = False

    def run(self, **options: Any) -> None:
        """Serve until told to end; no child is left."""
        try:
            super().run(**options)
        except KeyboardInterrupt:
            # LitServe waits for it only once it serves; while the base model is loading there is nothing to put away.
            _log.info("ended_while_starting")
        finally:
            for child in (children := mp.active_children()):
                child.kill()
            for child in children:
                child.join()

    def launch_inference_worker(self, lit_api: LitAPI) -> list[Any]:
        """Start the workers."""
        return [_ended_by_kill(worker) for worker in super().launch_inference_worker(lit_api)]

    def launch_single_inference_worker(self, lit_api: LitAPI, worker_id: int) -> Any:
        """Start one in the place of one that died."""
        return _ended_by_kill(super().launch_single_inference_worker(lit_api, worker_id))

    def interrupt(self) -> None:
        """Begin the end, from a signal's handler. During a fork that waits: Python drops what its hooks raise."""
        self._is_interrupted = True
        if not self._is_forking:
            raise KeyboardInterrupt

    def hasten(self) -> None:
        """Tell the API process to end; a second time it doesn't wait for what runs."""
        for process in self._api_processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, END_SIGNAL)

    def _start_server(self, *args: Any, **options: Any) -> dict[int, Any]:
        self._is_forking = True
        started: dict[int, Any] = super()._start_server(*args, **options)
        self._is_forking = False
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._api_processes = tuple(started.values())
        for process in self._api_processes:
            process.terminate = self.hasten
        return started

    def _init_manager(self, num_api_servers: int) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))  # the manager inherits this
        try:
            return super()._init_manager(num_api_servers)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended_by_kill(worker: Any) -> Any:
    """A worker holds nothing that must be put away, and hears no other signal."""
    worker.terminate = worker.kill
    return worker


class LitServeTransport:
    """An API process's end of the line: sends commands, receives messages. Use it from the event loop only."""

    def __init__(self, spec: RoutesSpec) -> None:
        self._queue = spec.request_queue
        # One thread of its own: commands stay in order, and slow work elsewhere doesn't hold them up.
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-sender")
        self._item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        spec.response_buffer[ENGINE_CHANNEL] = self._item

    async def send(self, command: Command) -> None:
        """Put a command on the worker's queue; it lives in another process, so this leaves the event loop."""
        await asyncio.get_running_loop().run_in_executor(self._sender, self._queue.put, command)

    async def receive(self) -> list[EngineMessage]:
        """Wait for messages and return all that have come."""
        await self._item.event.wait()
        self._item.event.clear()
        messages = []
        while self._item.response_queue:
            message, _status_code = self._item.response_queue.popleft()
            messages.append(message)
        return messages


def build_server(
    core: CoreSettings,
    serve: ServeSettings,
    router: APIRouter,
    configure_app: Callable[[FastAPI, RoutesSpec], None],
    build: EngineBuilder = build_engine,
) -> EngineServer:
    """Make a LitServe server with our routes and without its own.

    Args:
        core: Base model and device, for the worker.
        serve: Limits and address.
        router: Our routes.
        configure_app: Adds middleware, error handlers and start-up to the app; given the spec for the transport.
        build: Makes the engine in the worker.
    """
    spec = RoutesSpec()
    # The worker picks the device itself, so that both settings and its absence mean one thing everywhere.
    server = EngineServer(
        EngineAPI(core, serve, spec, build),
        accelerator="cpu",
        devices=1,
        workers_per_device=1,
        timeout=False,
        healthcheck_path="/litserve-health",
        restart_workers=True,
    )
    server.uvicorn_graceful_timeout = math.ceil(serve.drain_s) + _END_S
    app: FastAPI = server.app
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in _HIDDEN_PATHS]
    app.include_router(router)
    configure_app(app, spec)
    return server


def guard_processes() -> threading.Event:
    """Watch the children from a thread; if one is lost that LitServe can't replace, end all and exit with 1.

    LitServe restarts the engine worker once it serves. It does not notice a worker that dies while it loads (the start
    would wait for ever), nor the loss of the API process or of the manager that holds the queues (clients would connect
    and hang). And children outlive a killed parent unless the kernel tells them.

    Returns:
        Set it when an orderly shutdown begins.
    """
    stopping = threading.Event()
    os.register_at_fork(after_in_child=_end_with_parent)
    threading.Thread(target=_watch_children, args=(stopping,), name="process-guard", daemon=True).start()
    return stopping


def _watch_children(stopping: threading.Event) -> None:
    seen: set[str] = set()
    while not stopping.wait(_GUARD_INTERVAL_S):
        alive = {child.name for child in mp.active_children()}
        lost = seen - alive
        seen |= alive
        # Both from this look: a worker may die in the moment after the first request was possible.
        is_serving = any(name.startswith("LitServer-") for name in seen)
        if is_serving:
            lost.discard("inference-worker")
        if lost and not stopping.is_set():
            _log.critical("process_lost", names=sorted(lost))
            for child in mp.active_children():
                child.kill()
            os._exit(1)


def _end_with_parent() -> None:
    """Runs in each child that is forked. Who does not hear SIGTERM is killed."""
    is_deaf = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    _die_with_parent(signal.SIGKILL if is_deaf else signal.SIGTERM)


def _die_with_parent(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def wrap_lifespan(app: FastAPI, start: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> None:
    """Run `start` inside LitServe's own lifespan, which moves messages from the transport to the buffers."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(started: Any) -> Any:
        async with inner(started), start(app):
            yield

    app.router.lifespan_context = lifespan


def _take_commands(queue: Any, *, wait: bool) -> list[Command]:
    """All commands on the queue; waits a moment for the first if there is nothing else to do."""
    commands: list[Command] = []
    try:
        while True:
            if wait and not commands:
                commands.append(queue.get(timeout=_IDLE_WAIT_S))
            else:
                commands.append(queue.get_nowait())
    except queues.Empty:
        return commands


def obey(engine: DrivenEngine, command: Command, epoch: str) -> list[EngineEvent]:
    """Do what one command says; what is returned ends requests. `epoch` is this worker's."""
    if isinstance(command, CancelCommand):
        return engine.cancel(command.request_id)
    if isinstance(command, PinCommand):
        return engine.set_pinned(command.digests)
    if isinstance(command, UnloadCommand):
        return _unload(engine, command.digest)
    # A request that was sent to a worker before this one has been answered with an error when that worker died.
    return engine.submit(command.request) if command.epoch == epoch else []


def _unload(engine: DrivenEngine, digest: str) -> list[EngineEvent]:
    try:
        return engine.unload(digest)
    except ConflictError as error:
        # The API refuses to unload what is pinned; somebody was faster with a pin.
        _log.warning("unload_refused", digest=digest, reason=str(error))
        return []
