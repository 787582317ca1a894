"""The life of one chat request: resolve, render, admit, generate, record. Knows the wire's schema, not HTTP itself."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import structlog

from adapters.chat_template import render_prompt
from adapters.errors import (
    AdapterLoadError,
    DeadlineExceededError,
    EngineFailureError,
    HotswapError,
    InvalidInputError,
    InvalidNameError,
    NotFoundError,
    PromptTooLongError,
)
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
from adapters.registry import Registry
from server.callers import Caller, Meter
from server.config import ServeSettings
from server.engine.core import EngineEvent, GenerationRequest
from server.engine_client import EngineClient
from server.generation import sampling_params
from server.logprobs import LogprobsWriter
from server.metrics import Metrics
from server.schema_check import SchemaChecker
from server.schemas import ChatRequest
from server.tracing import trace_answer

__all__ = ["Answer", "ChatCall", "ChatService"]

_log = structlog.get_logger(__name__)

_FAILURES = frozenset({"adapter_failed", "constraint_failed", "deadline", "engine_failed", "cancelled"})


@dataclass(slots=True)
class Answer:
    """One of the answers to a request. `ChatService` writes the lower fields while it is made."""

    index: int
    generation: GenerationRequest
    completion_tokens: int = 0
    last_token: float | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class ChatCall:
    """One accepted request. `ChatService` writes the lower fields while the answers are made."""

    response_id: str
    binding: Binding
    unit: str
    unit_source: Literal["user", "request"]
    answers: dict[str, Answer]  # by the engine's request id
    created: int
    started: float
    meter: Meter
    first_token: float | None = None
    queued_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    is_recorded: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def generation(self) -> GenerationRequest:
        """What the engine is asked for the first answer; the others differ in id and seed alone."""
        return next(iter(self.answers.values())).generation

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, which all answers share."""
        return len(self.generation.prompt)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.completion_tokens for answer in self.answers.values())


class ChatService:
    """Joins registry, tokenizer, engine and exposures for one API process."""

    def __init__(
        self,
        registry: Registry,
        experiments: ExperimentService,
        engine: EngineClient,
        tokenizer: Any,
        settings: ServeSettings,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._registry = registry
        self._experiments = experiments
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocab_size = len(tokenizer)
        self._schemas = SchemaChecker()
        self.logprobs = LogprobsWriter(tokenizer)

    @property
    def timeout_s(self) -> float:
        """Seconds that an answer may take in the engine at most."""
        return self._settings.timeout_s

    async def accept(
        self, body: ChatRequest, *, request_id: str, caller: Caller, timeout_s: float | None = None
    ) -> ChatCall:
        """Bind the request to a version and render its prompt. The binding holds to the last token.

        Args:
            body: What the client sent.
            request_id: Names the request in the engine and in the answer.
            caller: Who asks; aliases that its key may not use don't exist.
            timeout_s: Seconds that the answer may take in the engine; None is the server's own limit.

        Raises:
            InvalidNameError: no such model.
            InvalidInputError: the chat template refuses the conversation, or an option can't be followed.
            PromptTooLongError: it leaves no room for an answer.
            OverloadedError: too many JSON schemas are being checked.
        """
        unit, unit_source = _unit_of(body, request_id)
        registry = self._registry.acting_for(caller.actor(request_id))
        try:
            binding = await asyncio.to_thread(registry.resolve, body.model, unit=unit)
        except (NotFoundError, InvalidNameError) as error:
            raise InvalidNameError(str(error), param="model") from None
        self._metrics.name_binding(binding)
        prompt = await asyncio.to_thread(self._render, body)
        sampling = sampling_params(
            body, num_prompt_tokens=len(prompt), vocab_size=self._vocab_size, settings=self._settings
        )
        if sampling.constraint is not None and sampling.constraint.schema:
            await self._schemas.check(sampling.constraint.schema)
        return ChatCall(
            response_id=f"chatcmpl-{request_id}",
            binding=binding,
            unit=unit,
            unit_source=unit_source,
            answers=_answers(
                GenerationRequest(
                    request_id,
                    prompt,
                    binding.digest,
                    sampling,
                    client=caller.client,
                    timeout_s=self._settings.timeout_s if timeout_s is None else timeout_s,
                ),
                body.n,
            ),
            created=int(time.time()),
            started=time.monotonic(),
            meter=caller.meter,
            headers=_headers(binding),
        )

    async def generate(self, call: ChatCall) -> AsyncGenerator[EngineEvent]:
        """Yield the answers' events. One exposure is written for every accepted request, before its last event.

        If one answer fails, the request fails and the others are cancelled.

        Raises:
            RateLimitError: the key's tokens are used up; nothing was started and no exposure is written.
            OverloadedError, EngineUnavailableError: not accepted; nothing was started and no exposure is written.
            EngineUnavailableError: the worker died under this request.
            AdapterLoadError: the version can't be loaded; says why.
            InvalidInputError: the model can't follow the form that was asked for.
            EngineFailureError: the model failed under this request.
            DeadlineExceededError: the answer was not finished in its time.
        """
        events = self._admit(call)
        try:
            async for event in events:
                self._note(call, event)
                if call.finish_reason is not None:
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
            try:
                await events.aclose()  # first of all: the engine computes until it is told
            finally:
                await self._record(call)

    def _admit(self, call: ChatCall) -> AsyncGenerator[EngineEvent]:
        call.meter.take_prompt(call.prompt_tokens)
        try:
            return self._engine.generate(*(answer.generation for answer in call.answers.values()))
        except HotswapError:
            call.meter.return_prompt(call.prompt_tokens)
            raise

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

    def _note(self, call: ChatCall, event: EngineEvent) -> None:
        answer = call.answers[event.request_id]
        if call.queued_s is None and event.queued_s is not None:
            call.queued_s = event.queued_s
            self._metrics.observe_queue(call.binding, event.queued_s)
        if event.completion_tokens > answer.completion_tokens:
            self._note_token(call, answer, time.monotonic())
        answer.completion_tokens = event.completion_tokens
        answer.finish_reason = event.finish_reason
        reasons = [answer.finish_reason for answer in call.answers.values()]
        call.error = event.error
        if event.finish_reason in _FAILURES:
            call.finish_reason = event.finish_reason
        elif None not in reasons:
            call.finish_reason = "length" if "length" in reasons else "stop"

    def _note_token(self, call: ChatCall, answer: Answer, now: float) -> None:
        if call.first_token is None:
            call.first_token = now
            self._metrics.observe_first_token(call.binding, now - call.started)
        if answer.last_token is not None:
            self._metrics.observe_gap(call.binding, now - answer.last_token)
        answer.last_token = now

    async def _record(self, call: ChatCall) -> None:
        """Write the call's exposure unless that was done; not to be stopped by whoever waits for it."""
        if not call.is_recorded:
            call.is_recorded = True
            call.meter.take_answer(call.completion_tokens)
            await asyncio.shield(self._write_exposure(call))

    async def _write_exposure(self, call: ChatCall) -> None:
        ended = time.monotonic()
        exposure = Exposure(
            response_id=call.response_id,
            binding=call.binding,
            unit=call.unit,
            unit_source=call.unit_source,
            prompt_tokens=call.prompt_tokens,
            completion_tokens=call.completion_tokens,
            ttft_ms=None if call.first_token is None else (call.first_token - call.started) * 1000,
            total_ms=(ended - call.started) * 1000,
            finish_reason=call.finish_reason,
            error=call.error,
        )
        self._metrics.count_answer(exposure, per_token_s=_time_per_token(call))
        trace_answer(exposure, operation="chat")
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


def _answers(request: GenerationRequest, count: int) -> dict[str, Answer]:
    """The engine's requests for so many answers; each has a seed of its own, counted from the one that was given."""
    if count == 1:
        return {request.id: Answer(0, request)}
    seed = request.sampling.seed
    answers = {}
    for index in range(count):
        sampling = replace(request.sampling, seed=None if seed is None else seed + index)
        own = replace(request, id=f"{request.id}-{index}", sampling=sampling)
        answers[own.id] = Answer(index, own)
    return answers


def _unit_of(body: ChatRequest, request_id: str) -> tuple[str, Literal["user", "request"]]:
    """The key that experiments split by. A user's name is hashed: the database needs to tell users apart, no more."""
    if body.user is None:
        return request_id, "request"
    return hashlib.sha256(body.user.encode()).hexdigest()[:32], "user"


def _time_per_token(call: ChatCall) -> float | None:
    """Mean seconds per token of an answer after its first; None if there are none or the answer did not end well."""
    answer = next(iter(call.answers.values()))
    if call.finish_reason not in ("stop", "length") or answer.completion_tokens < 2:
        return None
    assert call.first_token is not None, "there are tokens"
    assert answer.last_token is not None, "there are tokens"
    return (answer.last_token - call.first_token) / (answer.completion_tokens - 1)


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
        raise AdapterLoadError(f"the adapter version can't be served: {event.error}")
    if event.finish_reason == "constraint_failed":
        raise InvalidInputError(event.error or "the answer's form can't be followed", param="response_format")
    if event.finish_reason == "deadline":
        raise DeadlineExceededError(event.error or "the answer was not finished in its time")
    if event.finish_reason in ("engine_failed", "cancelled"):
        raise EngineFailureError(event.error or "the request was cancelled")
