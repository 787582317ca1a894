"""The one place where the server's parts are joined, and its entry point."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import structlog
from fastapi import FastAPI

from adapters.base_files import pull_base
from adapters.base_model import load_tokenizer
from adapters.database import open_database
from adapters.experiments import ExperimentService
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from server.api import LitServeTransport, RoutesSpec, build_server, wrap_lifespan
from server.chat import ChatService
from server.config import ServeSettings
from server.engine_client import EngineClient
from server.errors import install_error_handlers
from server.observe import RequestIdMiddleware, configure_logging
from server.routes import router
from server.services import Services

__all__ = ["serve"]

_log = structlog.get_logger(__name__)


def serve(core: CoreSettings, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl+C; running answers are finished first.

    Raises:
        BaseModelError: the base model can't be fetched.
    """
    configure_logging(settings.log_level)
    settings = _fit_context(settings, pull_base(core.base, core.home))
    _open_registry(core).sweep()

    def configure_app(app: FastAPI, spec: RoutesSpec) -> None:
        app.title = "Hotswap"
        app.add_middleware(RequestIdMiddleware)
        install_error_handlers(app)
        wrap_lifespan(app, lambda started: _running_services(started, spec, core, settings))

    server = build_server(core, settings, router, configure_app)
    signal.signal(signal.SIGTERM, _interrupt_parent(os.getpid()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    server.run(
        host=settings.host,
        port=settings.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        access_log=False,
    )


@asynccontextmanager
async def _running_services(
    app: FastAPI, spec: RoutesSpec, core: CoreSettings, settings: ServeSettings
) -> AsyncIterator[None]:
    """Build one API process's parts after LitServe has forked it, and run the engine's client beside the routes."""
    registry = _open_registry(core)
    experiments = ExperimentService(registry.database)
    engine = EngineClient(LitServeTransport(spec), max_in_flight=settings.max_waiting)
    tokenizer = load_tokenizer(pull_base(core.base, core.home))
    chat = ChatService(registry, experiments, engine, tokenizer, settings)
    app.state.services = Services(registry, experiments, engine, chat)
    listening = asyncio.create_task(engine.run())
    try:
        yield
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        registry.database.close()


def _fit_context(settings: ServeSettings, base_folder: Path) -> ServeSettings:
    """Lower the limits to the positions that the base model was trained for."""
    positions = json.loads((base_folder / "config.json").read_bytes()).get("max_position_embeddings")
    if positions is None or settings.max_context <= positions:
        return settings
    _log.warning("context_lowered", configured=settings.max_context, base_model_allows=positions)
    limits = {"max_context": positions, "max_tokens": min(settings.max_tokens, positions // 2)}
    return settings.model_copy(update=limits)


def _interrupt_parent(parent: int) -> Callable[[int, FrameType | None], None]:
    """A handler that turns SIGTERM, which process managers send, into what LitServe shuts down in good order on.

    The API process is forked with it, has a handler of its own while it serves, and must not raise when uvicorn repeats
    the signal at the end.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == parent:
            raise KeyboardInterrupt

    return handle


def _open_registry(core: CoreSettings) -> Registry:
    return Registry(open_database(core.resolved_database_url), ArtifactStore(core.home / "store"))
