"""`model: "auto"`: the router asked for a request, and kept as the registry wants it while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog

from adapters.errors import InvalidNameError
from adapters.records import BASE_MODEL_NAME, Binding
from adapters.routing.service import Decision, RoutingService
from server.completion_schemas import CompletionRequest
from server.schemas import ChatMessage, ChatRequest, GenerationOptions

__all__ = [
    "AUTO_MODEL",
    "apply_decision",
    "check_may_answer",
    "keep_router",
    "metadata_of",
    "said_by_user",
    "turns_of",
]

AUTO_MODEL = "auto"
_log = structlog.get_logger(__name__)
_CHECK_EVERY_S = 1.0
_AFTER_FAILURE_S = 30.0  # what can't be trained must not keep a core busy


async def keep_router(routing: RoutingService) -> None:
    """Have the router follow the registry, about once a second and in a thread, until cancelled."""
    while True:
        delay_s = _CHECK_EVERY_S
        try:
            await asyncio.to_thread(routing.reconcile)
        except Exception:
            # A boundary: requests go on by the router that was read last, and nobody else hears of it.
            _log.exception("router_not_kept")
            delay_s = _AFTER_FAILURE_S
        await asyncio.sleep(delay_s)


def said_by_user(messages: Sequence[ChatMessage]) -> list[str]:
    """The user's messages in order: system prompts and answers tell of a template, not of what is asked."""
    return [message.text for message in messages if message.role == "user"]


def turns_of(body: GenerationOptions, tokenizer: Any) -> list[str]:
    """What the router reads of a request; the prompts of one for completions are one text."""
    if isinstance(body, ChatRequest):
        return said_by_user(body.messages)
    assert isinstance(body, CompletionRequest), "there are two kinds of requests"
    texts = [prompt if isinstance(prompt, str) else _decode(tokenizer, prompt) for prompt in body.prompts]
    return ["\n".join(texts)]


def metadata_of(body: GenerationOptions) -> dict[str, str]:
    """The metadata that rules look at; completions have none."""
    return (body.metadata or {}) if isinstance(body, ChatRequest) else {}


def apply_decision(binding: Binding, decision: Decision) -> Binding:
    """A binding of the alias that was chosen, which says how it was; its experiment and arm stay."""
    return replace(binding, route=decision.route, confidence=decision.confidence)


def check_may_answer(routing: RoutingService, decision: Decision) -> None:
    """Refuse where only the base model is left, and whoever asks may not use it.

    Raises:
        InvalidNameError: that is so; says why nothing else was chosen.
    """
    if decision.alias == BASE_MODEL_NAME and not routing.can_see(BASE_MODEL_NAME):
        raise InvalidNameError(
            f"model 'auto': {decision.reason}, and this API key may not use the base model; name an alias",
            param="model",
        )


def _decode(tokenizer: Any, prompt: Sequence[int]) -> str:
    known = [token for token in prompt if token < len(tokenizer)]  # the others are refused where they are read
    return str(tokenizer.decode(known))
