"""POST /v1/route: where a request for `auto` would go, and why."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from adapters.routing.service import Decision, NearPrompt
from server.auth import needs
from server.callers import Caller
from server.resources import NearPromptObject, ProbabilityObject, RouteObject
from server.routing import said_by_user
from server.schemas import RouteRequest
from server.services import CurrentCaller, CurrentServices

__all__ = ["router"]

router = APIRouter(dependencies=[needs("chat")])


@router.post("/v1/route")
async def explain_route(body: RouteRequest, services: CurrentServices, caller: CurrentCaller) -> RouteObject:
    """Say where a request for `auto` would go; nothing is generated or recorded.

    The nearest training prompts are for keys with the scope `adapters` or `admin` alone: they are training data.
    """

    def explain() -> RouteObject:
        turns = [body.input] if body.input is not None else said_by_user(body.messages or [])
        decision = services.routing.route(turns, metadata=body.metadata, key=caller.client or None)
        near = services.routing.nearest(turns[-1]) if turns and _may_see_prompts(caller) else None
        return _object(decision, near)

    return await asyncio.to_thread(explain)


def _may_see_prompts(caller: Caller) -> bool:
    return caller.key is None or not {"adapters", "admin"}.isdisjoint(caller.key.scopes)


def _object(decision: Decision, near: list[NearPrompt] | None) -> RouteObject:
    ranked = sorted(decision.probabilities.items(), key=lambda item: -item[1])
    found = [] if near is None else near
    shown = [NearPromptObject(alias=item.alias, text=item.text, similarity=item.similarity) for item in found]
    return RouteObject(
        alias=decision.alias,
        route=decision.route,
        confidence=decision.confidence,
        threshold=decision.threshold,
        rule=decision.rule,
        router=decision.router,
        reason=decision.reason,
        probabilities=[ProbabilityObject(alias=alias, probability=value) for alias, value in ranked],
        nearest=None if near is None else shown,
    )
