"""The HTTP routes, a file a topic; `router` holds all of them."""

from fastapi import APIRouter

from server.routes import chat, experiments, files, fine_tuning, models, operations

__all__ = ["router"]

router = APIRouter()
for topic in (chat, models, experiments, files, fine_tuning, operations):
    router.include_router(topic.router)
