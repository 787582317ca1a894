"""GET /health and GET /ready: is the process alive, can it answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from adapters.errors import EngineUnavailableError
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The API process is alive; it says nothing about the engine."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: CurrentServices, response: Response) -> dict[str, Any]:
    """The engine is up and takes requests; 503 otherwise."""
    status = services.engine.status
    if status is None:
        raise EngineUnavailableError("the engine is starting")
    response.headers["cache-control"] = "no-store"
    return {
        "status": "ready",
        "running": status.num_running,
        "waiting": status.num_waiting,
        "in_flight": services.engine.num_in_flight,
        "resident_versions": list(status.resident),
    }
