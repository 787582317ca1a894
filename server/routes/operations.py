"""GET /health, GET /ready and GET /metrics: is the process alive, can it answer, how does it do."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from adapters.records import NumberedVersion
from adapters.registry import Registry
from server.auth import needs, open_to_all
from server.engine_client import EngineClient
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()


@router.get("/health", dependencies=[open_to_all()])
async def health() -> dict[str, str]:
    """The API process is alive; it says nothing about the engine."""
    return {"status": "ok"}


@router.get("/ready", dependencies=[open_to_all()])
async def ready(request: Request, response: Response) -> dict[str, Any]:
    """The engine is up and takes requests; 503 otherwise."""
    engine: EngineClient = request.app.state.services.engine  # nobody has to say who they are
    engine.check_available()
    status = engine.status
    assert status is not None, "just checked"
    response.headers["cache-control"] = "no-store"
    return {
        "status": "ready",
        "running": status.num_running,
        "waiting": status.num_waiting,
        "in_flight": engine.num_in_flight,
        "resident_versions": list(status.resident),
    }


@router.get("/metrics", dependencies=[needs("admin")])
async def metrics(services: CurrentServices) -> Response:
    """Everything that is measured, in Prometheus' text format."""
    status = services.engine.status
    if services.metrics.lacks_names(status.resident if status else ()):
        services.metrics.name_versions(await asyncio.to_thread(_all_versions, services.registry))
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _all_versions(registry: Registry) -> list[NumberedVersion]:
    return [version for alias in registry.aliases() for version in registry.versions(alias.name)]
