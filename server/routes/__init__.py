"""The HTTP routes, a file a topic; `router` holds all of them."""

from fastapi import APIRouter

from server.routes import (
    adapters,
    chat,
    completions,
    experiments,
    files,
    fine_tuning,
    models,
    operations,
    routing,
    shadows,
)

__all__ = ["router"]

router = APIRouter()
for topic in (chat, completions, models, files, fine_tuning, adapters, experiments, routing, shadows, operations):
    router.include_router(topic.router, tags=[topic.__name__.rpartition(".")[2]])
