"""The life of one chat request: resolve, render, admit, generate, record. Knows the wire's schema, not HTTP itself."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog

from adapters.chat_template import render_prompt
from adapters.errors import (
    AdapterRejectedError,
    EngineFailureError,
    HotswapError,
    InvalidNameError,
    NotFoundError,
    PromptTooLongError,
)
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
from adapters.registry import Registry
from server.config import ServeSettings
from server.engine.core import EngineEvent, GenerationRequest, SamplingParams
from server.engine_client import EngineClient
from server.schemas import ChatRequest

__all__ = ["ChatCall", "ChatService"]

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ChatCall:
    """One accepted request. `ChatService` writes the lower fields while the answer is made."""

    response_id: str
    binding: Binding
    unit: str
    unit_source: Literal["user", "request"]
    generation: GenerationRequest
    created: int
    started: float
    first_token: float | None = None
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    is_recorded: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class ChatService:
    """Joins registry, tokenizer, engine and exposures for one API process."""

    def __init__(
        self,
        registry: Registry,
        experiments: ExperimentService,
        engine: EngineClient,
        tokenizer: Any,
        settings: ServeSettings,
    ) -> None:
        self._registry = registry
        self._experiments = experiments
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings

    async def accept(self, body: ChatRequest, *, request_id: str) -> ChatCall:
        """Bind the request to a version and render its prompt. The binding holds to the last token.

        Raises:
            InvalidNameError: no such model.
            InvalidInputError: the chat template refuses the conversation.
            PromptTooLongError: it leaves no room for an answer.
        """
        unit, unit_source = _unit_of(body, request_id)
        try:
            binding = await asyncio.to_thread(self._registry.resolve, body.model, unit=unit)
        except (NotFoundError, InvalidNameError) as error:
            raise InvalidNameError(str(error), param="model") from None
        prompt = await asyncio.to_thread(self._render, body)
        return ChatCall(
            response_id=f"chatcmpl-{request_id}",
            binding=binding,
            unit=unit,
            unit_source=unit_source,
            generation=GenerationRequest(request_id, prompt, binding.digest, self._sampling(body, len(prompt))),
            created=int(time.time()),
            started=time.monotonic(),
            headers=_headers(binding),
        )

    async def generate(self, call: ChatCall) -> AsyncGenerator[EngineEvent]:
        """Yield the answer's events. One exposure is written for every accepted request, before its last event.

        Raises:
            OverloadedError, EngineUnavailableError: not accepted; nothing was started and no exposure is written.
            EngineUnavailableError: the worker died under this request.
            AdapterRejectedError: the version can't be loaded; says why.
            EngineFailureError: the model failed under this request.
        """
        events = self._engine.generate(call.generation)
        try:
            async for event in events:
                self._note(call, event)
                if event.finish_reason is not None:
                    await self._record(call)
                    _raise_failure(event)
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            call.finish_reason = call.finish_reason or "cancelled"
            raise
        except Exception as error:
            call.error = call.error or (str(error) if isinstance(error, HotswapError) else type(error).__name__)
            raise
        finally:
            await self._record(call)
            await events.aclose()

    def _render(self, body: ChatRequest) -> tuple[int, ...]:
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = tuple(render_prompt(self._tokenizer, messages))
        if len(prompt) >= self._settings.max_context:
            raise PromptTooLongError(
                f"the prompt takes {len(prompt)} tokens, but prompt and answer together may take "
                f"{self._settings.max_context}",
                param="messages",
            )
        return prompt

    def _sampling(self, body: ChatRequest, prompt_tokens: int) -> SamplingParams:
        wanted = body.token_limit if body.token_limit is not None else self._settings.max_tokens
        return SamplingParams(
            max_tokens=min(wanted, self._settings.max_context - prompt_tokens),
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=body.stop_strings,
        )

    def _note(self, call: ChatCall, event: EngineEvent) -> None:
        if call.first_token is None and event.completion_tokens:
            call.first_token = time.monotonic()
        call.completion_tokens = event.completion_tokens
        call.finish_reason = event.finish_reason
        call.error = event.error

    async def _record(self, call: ChatCall) -> None:
        """Write the call's exposure unless that was done; not to be stopped by whoever waits for it."""
        if not call.is_recorded:
            call.is_recorded = True
            await asyncio.shield(self._write_exposure(call))

    async def _write_exposure(self, call: ChatCall) -> None:
        ended = time.monotonic()
        exposure = Exposure(
            response_id=call.response_id,
            binding=call.binding,
            unit=call.unit,
            unit_source=call.unit_source,
            prompt_tokens=len(call.generation.prompt),
            completion_tokens=call.completion_tokens,
            ttft_ms=None if call.first_token is None else (call.first_token - call.started) * 1000,
            total_ms=(ended - call.started) * 1000,
            finish_reason=call.finish_reason,
            error=call.error,
        )
        await asyncio.to_thread(self._experiments.record_exposure, exposure)
        _log.info(
            "chat_answered",
            version=call.binding.version_label,
            route=call.binding.route,
            arm=call.binding.arm,
            finish_reason=call.finish_reason,
            prompt_tokens=exposure.prompt_tokens,
            completion_tokens=exposure.completion_tokens,
            ttft_ms=exposure.ttft_ms and round(exposure.ttft_ms, 1),
            total_ms=round(exposure.total_ms, 1),
            error=call.error,
        )


def _unit_of(body: ChatRequest, request_id: str) -> tuple[str, Literal["user", "request"]]:
    """The key that experiments split by. A user's name is hashed: the database needs to tell users apart, no more."""
    if body.user is None:
        return request_id, "request"
    return hashlib.sha256(body.user.encode()).hexdigest()[:32], "user"


def _headers(binding: Binding) -> dict[str, str]:
    headers = {
        "x-hotswap-alias": binding.alias,
        "x-hotswap-version": binding.version_label,
        "x-hotswap-route": binding.route,
    }
    if binding.digest:
        headers["x-hotswap-digest"] = binding.digest
    if binding.arm:
        headers["x-hotswap-arm"] = binding.arm
        headers["x-hotswap-experiment"] = binding.experiment_id or ""
    return headers


def _raise_failure(event: EngineEvent) -> None:
    if event.finish_reason == "adapter_failed":
        raise AdapterRejectedError(f"the adapter version can't be served: {event.error}", param="model")
    if event.finish_reason in ("engine_failed", "cancelled"):
        raise EngineFailureError(event.error or "the request was cancelled")
