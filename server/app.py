"""The one place where the server's parts are joined, and its entry point."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from fastapi import FastAPI

from adapters.base_files import public_name, pull_base
from adapters.base_model import load_tokenizer
from adapters.conversations import ConversationLog
from adapters.database import open_database
from adapters.errors import BaseModelError
from adapters.experiment_evaluation import EVALUATOR, ExperimentEvaluation
from adapters.experiments import ExperimentService
from adapters.files import FileService
from adapters.jobs import JobService
from adapters.keys import KeyService
from adapters.pins import PinService
from adapters.process_log import configure_log
from adapters.registry import Registry
from adapters.routing.embeddings import TokenEmbeddings, open_embeddings
from adapters.routing.service import RoutingService
from adapters.settings import CoreSettings
from adapters.shadows import ShadowService
from adapters.store import ArtifactStore
from server.api import (
    EngineBuilder,
    EngineServer,
    LitServeTransport,
    RoutesSpec,
    build_server,
    guard_processes,
    wrap_lifespan,
)
from server.auth import AuthMiddleware
from server.chat import ChatService
from server.config import ServeSettings, check_bind, check_port
from server.conversations import ConversationKeeper
from server.draining import drain_before_exit
from server.engine.families import SUPPORTED_FAMILIES
from server.engine_client import EngineClient, Transport
from server.engine_factory import build_engine, find_pinned
from server.errors import install_error_handlers
from server.evaluator import Evaluator
from server.fine_tuning import FineTuningService
from server.home_lock import held_home
from server.job_supervisor import SupervisorProcess
from server.limits import BodyLimitMiddleware, SendLimitMiddleware, larger_bodies
from server.metrics import Metrics
from server.observe import RequestIdMiddleware
from server.openapi import describe_api
from server.pins import PinKeeper
from server.routes import router
from server.routing import keep_router
from server.services import Services
from server.shadows import ShadowKeeper
from server.tracing import check_tracing, exported_traces
from server.uploads import Uploads, sweep_uploads

__all__ = ["equip_app", "join_services", "serve"]

_log = structlog.get_logger(__name__)


def serve(core: CoreSettings, settings: ServeSettings, build: EngineBuilder = build_engine) -> None:
    """Serve until SIGTERM or Ctrl+C; running answers get `settings.drain_s` seconds to finish.

    `build` makes the engine in the worker; the benchmark of the shell around it gives a toy.

    Raises:
        BaseModelError: the base model can't be fetched or is not supported.
        ConfigurationError: a pinned alias does not exist, others could reach the server and there are no API keys,
            another server runs on the home, or another program has the port.
    """
    configure_log(settings.log_level)
    _check_bind(core, settings)
    with held_home(core.home, address=settings.address):
        check_port(settings)
        _serve_alone(core, settings, build)


def _serve_alone(core: CoreSettings, settings: ServeSettings, build: EngineBuilder) -> None:
    settings = _fit_base(settings, pull_base(core.base, core.home))
    ArtifactStore(core.home / "store").sweep()
    sweep_uploads(core.home)
    _check_pinned(core, settings)
    if settings.traces:
        check_tracing()
    stopping = guard_processes()

    def configure_app(app: FastAPI, spec: RoutesSpec) -> None:
        equip_app(app, settings)
        wrap_lifespan(app, lambda started: _running_services(started, spec, core, settings))

    server = build_server(core, settings, router, configure_app, build)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt_parent(os.getpid(), stopping, server))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _training_jobs(core, settings, stopping):
        server.run(
            host=settings.host,
            port=settings.port,
            num_api_servers=1,
            generate_client_file=False,
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            access_log=False,
        )


@contextlib.contextmanager
def _training_jobs(core: CoreSettings, settings: ServeSettings, stopping: threading.Event) -> Iterator[None]:
    """Train jobs beside the block, if that is wanted; a running one is stopped as soon as `stopping` is set."""
    if not settings.jobs:
        yield
        return
    supervisor = SupervisorProcess(core, settings, stopping)
    supervisor.start()
    try:
        yield
    finally:
        supervisor.stop()


@asynccontextmanager
async def _running_services(
    app: FastAPI, spec: RoutesSpec, core: CoreSettings, settings: ServeSettings
) -> AsyncIterator[None]:
    """Build one API process's parts after LitServe has forked it, and run the engine's client beside the routes."""
    registry = _open_registry(core)
    base_folder = pull_base(core.base, core.home)
    tokenizer, embeddings = load_tokenizer(base_folder), open_embeddings(base_folder)
    services = join_services(registry, LitServeTransport(spec), tokenizer, core, settings, embeddings)
    app.state.services, engine = services, services.engine
    services.files.sweep()
    await asyncio.to_thread(services.routing.read)  # the first request is routed already
    evaluator = Evaluator(services.evaluation.acting_for(EVALUATOR), interval_s=settings.experiment_interval_s)
    parts = (engine, services.pins, services.conversations, services.shadow_keeper, evaluator)
    work = [*(part.run() for part in parts), keep_router(services.routing)]
    tasks = [asyncio.create_task(part) for part in work]
    for task in tasks:
        task.add_done_callback(_end_if_crashed)
    drain_before_exit(engine, limit_s=settings.drain_s)
    try:
        with exported_traces() if settings.traces else contextlib.nullcontext():
            yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        services.uploads.close()
        registry.database.close()


def equip_app(app: FastAPI, settings: ServeSettings) -> None:
    """Put around an app's routes what every request goes through, and complete its description."""
    describe_api(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes, larger=larger_bodies(settings))
    app.add_middleware(AuthMiddleware, is_loopback=settings.is_loopback)
    app.add_middleware(SendLimitMiddleware, limit_s=settings.send_timeout_s)
    app.add_middleware(RequestIdMiddleware)
    install_error_handlers(app)


def join_services(
    registry: Registry,
    transport: Transport,
    tokenizer: Any,
    core: CoreSettings,
    settings: ServeSettings,
    embeddings: TokenEmbeddings | None = None,
) -> Services:
    """Make one API process's parts; starts none of them.

    Args:
        registry: Versions and aliases; its database is everybody's.
        transport: The line to the engine worker.
        tokenizer: The base model's, with the chat template.
        core: Base model and home folder.
        settings: Limits.
        embeddings: The base model's, for the router; it does without if there are none.
    """
    database = registry.database
    experiments = ExperimentService(database, feedback_window=timedelta(days=settings.feedback_days))
    metrics = Metrics()
    engine = EngineClient(
        transport,
        max_in_flight=settings.max_waiting,
        max_tokens=settings.max_queued_tokens,
        on_message=metrics.note_message,
    )
    metrics.watch(engine)
    base_name = public_name(core.base)
    routing = RoutingService(registry, embeddings, threshold=settings.route_threshold)
    shadows = ShadowService(database)
    shadow_keeper = ShadowKeeper(shadows, engine, metrics)
    conversations = ConversationKeeper(ConversationLog(database), settings)
    jobs = JobService(database, max_queued=settings.max_queued_jobs)
    return Services(
        registry=registry,
        experiments=experiments,
        evaluation=ExperimentEvaluation(registry, feedback_window=timedelta(days=settings.feedback_days)),
        engine=engine,
        chat=ChatService(
            registry,
            experiments,
            engine,
            tokenizer,
            settings,
            metrics,
            routing,
            base_name=base_name,
            conversations=conversations,
            shadows=shadow_keeper,
        ),
        conversations=conversations,
        shadows=shadows,
        shadow_keeper=shadow_keeper,
        metrics=metrics,
        keys=KeyService(database),
        pins=PinKeeper(PinService(database), engine, always=settings.pinned, max_versions=max(0, settings.slots - 1)),
        uploads=Uploads(core, timeout_s=settings.timeout_s),
        files=FileService(database, core.home / "files", max_bytes=settings.max_file_bytes),
        fine_tuning=FineTuningService(jobs, base_name=base_name, max_rank=core.max_rank),
        routing=routing,
        base_name=base_name,
    )


def _end_if_crashed(task: asyncio.Task[None]) -> None:
    """Without its listener an API process answers nothing: let the guard end the server instead of hanging."""
    if not task.cancelled():
        _log.critical("background_task_crashed", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGKILL)


def _check_bind(core: CoreSettings, settings: ServeSettings) -> None:
    registry = _open_registry(core)
    check_bind(settings, KeyService(registry.database).list())
    registry.database.close()


def _check_pinned(core: CoreSettings, settings: ServeSettings) -> None:
    """Say that a pinned alias does not exist before a process is started that could only die of it."""
    registry = _open_registry(core)
    find_pinned(registry, settings.pinned)
    registry.database.close()


def _fit_base(settings: ServeSettings, base_folder: Path) -> ServeSettings:
    """Refuse a base model that the engine does not compute, and lower the limits to the positions that it has.

    Raises:
        BaseModelError: no readable config, or a family that is not supported.
    """
    try:
        config = json.loads((base_folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{base_folder} holds no model: config.json can't be read: {error}") from None
    if config.get("model_type") not in SUPPORTED_FAMILIES:
        known = ", ".join(sorted(SUPPORTED_FAMILIES))
        raise BaseModelError(f"models of type {config.get('model_type')!r} are not supported; {known} are")
    positions = config.get("max_position_embeddings")
    if positions is None or settings.max_context <= positions:
        return settings
    _log.warning("context_lowered", configured=settings.max_context, base_model_allows=positions)
    limits = {"max_context": positions, "max_tokens": min(settings.max_tokens, positions // 2)}
    return settings.model_copy(update=limits)


def _interrupt_parent(
    parent: int, stopping: threading.Event, server: EngineServer
) -> Callable[[int, FrameType | None], None]:
    """A handler that turns SIGTERM, which process managers send, into what LitServe shuts down in good order on.

    From the second signal on it only calls `hasten`: the shutdown must not be interrupted. The API process is forked
    with it, has a handler of its own while it serves, and must not raise when uvicorn repeats the signal at the end.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:
            return
        if stopping.is_set():
            server.hasten()
            return
        stopping.set()
        # Its monitor does not know that the end is wanted, and would report the processes that are gone by then.
        logging.getLogger("litserve.server").setLevel(logging.CRITICAL)
        server.interrupt()

    return handle


def _open_registry(core: CoreSettings) -> Registry:
    return Registry(open_database(core.resolved_database_url), ArtifactStore(core.home / "store"))
