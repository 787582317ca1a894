"""The one place where the server's parts are joined, and its entry point."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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


def serve(core: CoreSettings, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl+C; running answers are finished first.

    Raises:
        BaseModelError: the base model can't be fetched.
    """
    configure_logging(settings.log_level)
    pull_base(core.base, core.home)
    _open_registry(core).sweep()

    def configure_app(app: FastAPI, spec: RoutesSpec) -> None:
        app.title = "Hotswap"
        app.add_middleware(RequestIdMiddleware)
        install_error_handlers(app)
        wrap_lifespan(app, lambda started: _running_services(started, spec, core, settings))

    server = build_server(core, settings, router, configure_app)
    # LitServe shuts down in good order on KeyboardInterrupt only; SIGTERM is what process managers send.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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


def _open_registry(core: CoreSettings) -> Registry:
    return Registry(open_database(core.resolved_database_url), ArtifactStore(core.home / "store"))
