"""GET /v1/models: the base model, `auto`, every alias and every version that a client can call."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from fastapi import APIRouter

from adapters.errors import InvalidNameError
from adapters.records import BASE_MODEL_NAME
from adapters.registry import Registry
from server.auth import needs
from server.model_names import names_base
from server.routing import AUTO_MODEL
from server.services import CurrentServices, Services

__all__ = ["router"]

router = APIRouter(dependencies=[needs("chat")])


@router.get("/v1/models")
async def list_models(services: CurrentServices) -> dict[str, Any]:
    """Everything that `model` may name; `auto` where a rule or the router could choose something for the key."""
    return {"object": "list", "data": await asyncio.to_thread(_models, services)}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, services: CurrentServices) -> dict[str, Any]:
    """One model by its name, which may have slashes: that of a base model on a hub."""
    for model in await asyncio.to_thread(_models, services):
        if model["id"] == name:
            return model
    raise InvalidNameError(f"there is no model {name[:80]!r}", param="model")


def _models(services: Services) -> list[dict[str, Any]]:
    registry, base_name = services.registry, services.base_name
    models = [_model(BASE_MODEL_NAME, None, parent=None)] if registry.can_see(BASE_MODEL_NAME) else []
    if names_base(registry, base_name, base_name):
        models.append(_model(base_name, None, parent=BASE_MODEL_NAME))
    # Programs offer their users what stands here: while all of `auto` would be the base model, it is no choice.
    if services.routing.can_route():
        models.append(_model(AUTO_MODEL, None, parent=None))
    for alias in registry.aliases():
        models.append(_model(alias.name, alias.updated_at, parent=alias.current.label))
        models += _version_models(registry, alias.name)
    for name in registry.unpromoted():
        models += _version_models(registry, name)
    return models


def _version_models(registry: Registry, alias: str) -> list[dict[str, Any]]:
    return [
        _model(version.label, version.version.published_at, parent=BASE_MODEL_NAME)
        for version in registry.versions(alias)
    ]


def _model(name: str, created: datetime | None, *, parent: str | None) -> dict[str, Any]:
    seconds = int(created.timestamp()) if created else 0
    return {"id": name, "object": "model", "created": seconds, "owned_by": "hotswap", "parent": parent}
