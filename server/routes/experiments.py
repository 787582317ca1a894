"""POST /v1/feedback: an outcome for a response, by its id."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from adapters.records import Feedback
from server.auth import needs
from server.schemas import FeedbackRequest
from server.services import CurrentServices

__all__ = ["router"]

router = APIRouter(dependencies=[needs("feedback")])


@router.post("/v1/feedback")
async def record_feedback(body: FeedbackRequest, services: CurrentServices) -> dict[str, str]:
    """Record an outcome; sending the same metric for the same response again replaces the value."""
    feedback = Feedback(body.id, body.metric, float(body.value), body.comment)
    await asyncio.to_thread(services.experiments.record_feedback, feedback)
    return {"object": "feedback", "id": body.id, "metric": body.metric}
