"""The life of one request: resolve, render, admit, generate, record. Knows the wire's schema, not HTTP itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from adapters.errors import (
    AdapterLoadError,
    ConflictError,
    DeadlineExceededError,
    EngineFailureError,
    HotswapError,
    InvalidInputError,
    InvalidNameError,
    NotFoundError,
)
from adapters.experiment_config import check_feedback_name
from adapters.experiments import ExperimentService
from adapters.exposures import MAX_FEEDBACK_NAMES
from adapters.records import Actor, Exposure, Feedback
from adapters.registry import Registry
from adapters.routing.service import Decision, RoutingService
from server.callers import Caller
from server.calls import ID_PREFIXES, Call, Choice, Operation, headers_of, make_answers, time_per_token
from server.completion_schemas import CompletionRequest
from server.config import ServeSettings
from server.conversations import ConversationKeeper
from server.engine.core import Constraint, EngineEvent, GenerationRequest
from server.engine_client import EngineClient
from server.generation import sampling_params
from server.logprobs import LogprobsWriter
from server.metrics import Metrics
from server.model_names import resolve_model
from server.prompts import chat_prompt, check_length, text_prompt, token_prompt
from server.routing import AUTO_MODEL, apply_decision, check_may_answer, metadata_of, turns_of
from server.schema_check import SchemaChecker
from server.schemas import ChatRequest, GenerationOptions
from server.shadows import ShadowKeeper
from server.tools import ToolUse, find_tool_format, plan_tools
from server.tracing import trace_answer
from server.units import ExperimentHeaders, unit_of

__all__ = ["ChatService"]

_log = structlog.get_logger(__name__)

_NO_HEADERS = ExperimentHeaders()
_FAILURES = frozenset({"adapter_failed", "constraint_failed", "deadline", "engine_failed", "cancelled"})


class ChatService:
    """Joins registry, tokenizer, engine and exposures for one API process. `base_name` is the base model's own name."""

    def __init__(
        self,
        registry: Registry,
        experiments: ExperimentService,
        engine: EngineClient,
        tokenizer: Any,
        settings: ServeSettings,
        metrics: Metrics,
        routing: RoutingService,
        *,
        base_name: str,
        conversations: ConversationKeeper,
        shadows: ShadowKeeper,
    ) -> None:
        self._base_name = base_name
        self._routing = routing
        self._shadows = shadows
        self._conversations = conversations
        self._metrics = metrics
        self._registry = registry
        self._experiments = experiments
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocab_size = len(tokenizer)
        self._schemas = SchemaChecker()
        self._tool_format = find_tool_format(tokenizer)
        self._running: dict[str, Call] = {}  # by the response's id, until their exposures are written
        self.logprobs = LogprobsWriter(tokenizer)

    @property
    def timeout_s(self) -> float:
        """Seconds that an answer may take in the engine at most."""
        return self._settings.timeout_s

    async def accept(
        self,
        body: ChatRequest,
        *,
        request_id: str,
        caller: Caller,
        timeout_s: float | None = None,
        headers: ExperimentHeaders = _NO_HEADERS,
    ) -> Call:
        """Bind a chat request to a version and render its prompt. The binding holds to the last token.

        Args:
            body: What the client sent.
            request_id: Names the request in the engine and in the answer.
            caller: Who asks; aliases that its key may not use don't exist.
            timeout_s: Seconds that the answer may take in the engine; None is the server's own limit.
            headers: Whom the request counts for, and which arm a tester wants.

        Raises:
            InvalidNameError: no such model.
            InvalidInputError: the chat template refuses the conversation, an option can't be followed, no such arm, or
                the conversation is to be kept by a server that keeps none.
            PromptTooLongError: it leaves no room for an answer.
            OverloadedError: too many JSON schemas are being checked.
        """
        is_kept = self._conversations.wants(body)
        call = await self._bind(body, "chat", request_id, caller, headers)
        call.is_kept, call.shadow = is_kept, self._shadows.choose(body, call.binding, call.response_id)
        call.body = body if is_kept or call.shadow else None
        async with self._counting_refusals(call):
            call.tools = plan_tools(body, self._tool_format)
            prompt = await asyncio.to_thread(chat_prompt, self._tokenizer, body, call.tools)
            check_length(prompt, max_context=self._settings.max_context, param="messages")
            await self._prepare(call, body, [prompt], request_id, timeout_s)
        return call

    async def accept_completion(
        self,
        body: CompletionRequest,
        *,
        request_id: str,
        caller: Caller,
        timeout_s: float | None = None,
        headers: ExperimentHeaders = _NO_HEADERS,
    ) -> Call:
        """Bind a request for completions to a version and tokenise its prompts; otherwise as `accept`."""
        call = await self._bind(body, "text_completion", request_id, caller, headers)
        async with self._counting_refusals(call):
            prompts = await asyncio.to_thread(self._tokenise, body)
            await self._prepare(call, body, prompts, request_id, timeout_s)
        return call

    async def take_feedback(self, feedback: Feedback, actor: Actor) -> bool:
        """Keep feedback on an answer that is still being written, to be stored with its exposure.

        Returns:
            False if no such answer is being written; its exposure, if there is one, can then be found.

        Raises:
            InvalidInputError: the metric is one that is measured anyway.
            ConflictError: there is feedback by too many metrics already.
        """
        check_feedback_name(feedback.metric)
        call = self._running.get(feedback.response_id)
        if call is None or not actor.can_see(call.binding.alias):
            return False
        if call.is_recorded:
            await call.is_written.wait()
            return False
        if len(call.feedback) >= MAX_FEEDBACK_NAMES and feedback.metric not in call.feedback:
            raise ConflictError(
                f"{feedback.response_id!r} has feedback by {MAX_FEEDBACK_NAMES} metrics, the most there may be"
            )
        call.feedback[feedback.metric] = feedback
        return True

    def prompt_text(self, prompt: Sequence[int]) -> str:
        """A prompt as text, control tokens included."""
        return str(self._tokenizer.decode(prompt, clean_up_tokenization_spaces=False))

    async def _bind(
        self,
        body: GenerationOptions,
        operation: Operation,
        request_id: str,
        caller: Caller,
        headers: ExperimentHeaders,
    ) -> Call:
        registry = self._registry.acting_for(caller.actor(request_id))
        unit = unit_of(body, headers.unit)
        try:
            decision = await asyncio.to_thread(self._route, body, request_id, caller)
            model = body.model if decision is None else decision.alias
            binding = await asyncio.to_thread(
                resolve_model, registry, model, unit=unit.key, base_name=self._base_name, arm=headers.arm
            )
        except (NotFoundError, InvalidNameError) as error:
            raise InvalidNameError(str(error), param="model") from None
        if decision is not None:
            binding = apply_decision(binding, decision)
        self._metrics.name_binding(binding)
        return Call(
            operation=operation,
            response_id=f"{ID_PREFIXES[operation]}-{request_id}",
            client=caller.client,
            meter=caller.meter,
            binding=binding,
            unit=unit,
            answers={},
            num_answers=body.n,
            created=int(time.time()),
            started=time.monotonic(),
            headers=headers_of(binding),
        )

    def _route(self, body: GenerationOptions, request_id: str, caller: Caller) -> Decision | None:
        """Where a request for `auto` goes; None for one that names its model."""
        if body.model != AUTO_MODEL:
            return None
        routing = self._routing.acting_for(caller.actor(request_id))
        decision = routing.route(turns_of(body, self._tokenizer), metadata=metadata_of(body), key=caller.client or None)
        check_may_answer(routing, decision)
        return decision

    @asynccontextmanager
    async def _counting_refusals(self, call: Call) -> AsyncIterator[None]:
        """Write an exposure for an experiment's request that fails, or whose client leaves, before the engine has it.

        Whoever was assigned counts, or an arm would look the better the more it turns away. Outside of experiments a
        refusal leaves nothing behind.
        """
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            if call.binding.experiment_id is not None:
                if isinstance(error, asyncio.CancelledError):
                    call.finish_reason = "cancelled"
                else:
                    call.error = str(error) if isinstance(error, HotswapError) else type(error).__name__
                call.is_recorded = True
                await asyncio.shield(self._store_exposure(call, _exposure_of(call)))
            raise

    async def _prepare(
        self,
        call: Call,
        body: GenerationOptions,
        prompts: Sequence[tuple[int, ...]],
        request_id: str,
        timeout_s: float | None,
    ) -> None:
        """Write what the engine is asked for, each prompt with its own limit of tokens."""
        requests = []
        for prompt in prompts:
            sampling = sampling_params(
                body,
                num_prompt_tokens=len(prompt),
                vocab_size=self._vocab_size,
                settings=self._settings,
                tools=call.tools,
            )
            limit_s = self._settings.timeout_s if timeout_s is None else timeout_s
            requests.append(
                GenerationRequest(
                    request_id, prompt, call.binding.digest, sampling, client=call.client, timeout_s=limit_s
                )
            )
        if (constraint := requests[0].sampling.constraint) is not None:
            await self._check_constraint(constraint)
        call.answers = make_answers(request_id, requests, body.n)

    async def _check_constraint(self, constraint: Constraint) -> None:
        if constraint.schema:
            await self._schemas.check(constraint.schema)
        if constraint.grammar:
            await self._schemas.check_grammar(constraint.grammar, param="tools")

    def _tokenise(self, body: CompletionRequest) -> list[tuple[int, ...]]:
        prompts = [
            text_prompt(self._tokenizer, prompt)
            if isinstance(prompt, str)
            else token_prompt(prompt, vocab_size=self._vocab_size)
            for prompt in body.prompts
        ]
        for prompt in prompts:
            check_length(prompt, max_context=self._settings.max_context, param="prompt")
        return prompts

    async def generate(self, call: Call) -> AsyncGenerator[EngineEvent]:
        """Yield the answers' events. One exposure is written for every accepted request, before its last event.

        If one answer fails, the request fails and the others are cancelled.

        Raises:
            RateLimitError: the key's tokens are used up; nothing was started, and outside of an experiment no exposure
                is written.
            OverloadedError, EngineUnavailableError: not accepted; the same.
            EngineUnavailableError: the worker died under this request.
            AdapterLoadError: the version can't be loaded; says why.
            InvalidInputError: the model can't follow the form that was asked for.
            EngineFailureError: the model failed under this request.
            DeadlineExceededError: the answer was not finished in its time.
        """
        async with self._counting_refusals(call):
            events = self._admit(call)
        self._running[call.response_id] = call
        try:
            async for event in events:
                self._note(call, event)
                if call.finish_reason is not None:
                    await self._record(call)
                    _raise_failure(event, call.tools)
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

    def _admit(self, call: Call) -> AsyncGenerator[EngineEvent]:
        call.meter.take_prompt(call.prompt_tokens)
        try:
            return self._engine.generate(*(answer.generation for answer in call.answers.values()))
        except HotswapError:
            call.meter.return_prompt(call.prompt_tokens)
            raise

    def _note(self, call: Call, event: EngineEvent) -> None:
        answer = call.answers[event.request_id]
        if call.queued_s is None and event.queued_s is not None:
            call.queued_s = event.queued_s
            self._metrics.observe_queue(call.binding, event.queued_s)
        if event.completion_tokens > answer.completion_tokens:
            self._note_token(call, answer, time.monotonic())
        if call.body is not None:
            answer.pieces.append(event.text)
        answer.completion_tokens = event.completion_tokens
        answer.finish_reason = event.finish_reason
        reasons = [answer.finish_reason for answer in call.answers.values()]
        call.error = event.error
        if event.finish_reason in _FAILURES:
            call.finish_reason = event.finish_reason
        elif None not in reasons:
            call.finish_reason = "length" if "length" in reasons else "stop"

    def _note_token(self, call: Call, answer: Choice, now: float) -> None:
        if call.first_token is None:
            call.first_token = now
            self._metrics.observe_first_token(call.binding, now - call.started)
        if answer.first_token is None:
            answer.first_token = now
        if answer.last_token is not None:
            self._metrics.observe_gap(call.binding, now - answer.last_token)
        answer.last_token = now

    async def _record(self, call: Call) -> None:
        """Write the call's exposure unless that was done; not to be stopped by whoever waits for it."""
        if not call.is_recorded:
            call.is_recorded = True
            call.meter.take_answer(call.completion_tokens)
            await asyncio.shield(self._write_exposure(call))

    async def _store_exposure(self, call: Call, exposure: Exposure) -> None:
        try:
            await asyncio.to_thread(self._experiments.record_exposure, exposure, [*call.feedback.values()])
        finally:
            self._running.pop(call.response_id, None)
            call.is_written.set()

    async def _write_exposure(self, call: Call) -> None:
        exposure = _exposure_of(call)
        self._metrics.count_answer(exposure, per_token_s=time_per_token(call))
        trace_answer(exposure, operation=call.operation)
        await self._store_exposure(call, exposure)
        if call.is_kept and call.body is not None and call.finish_reason in ("stop", "length"):
            await asyncio.to_thread(self._conversations.keep, call, call.body)
        self._shadows.offer(call)
        _log.info(
            "chat_answered",
            version=call.binding.version_label,
            route=call.binding.route,
            confidence=call.binding.confidence,
            arm=call.binding.arm,
            finish_reason=call.finish_reason,
            prompt_tokens=exposure.prompt_tokens,
            completion_tokens=exposure.completion_tokens,
            ttft_ms=exposure.ttft_ms and round(exposure.ttft_ms, 1),
            total_ms=round(exposure.total_ms, 1),
            error=call.error,
        )


def _exposure_of(call: Call) -> Exposure:
    return Exposure(
        response_id=call.response_id,
        binding=call.binding,
        unit=call.unit.key,
        unit_source=call.unit.source,
        prompt_tokens=call.prompt_tokens,
        completion_tokens=call.completion_tokens,
        ttft_ms=None if call.first_token is None else (call.first_token - call.started) * 1000,
        total_ms=(time.monotonic() - call.started) * 1000,
        finish_reason=call.finish_reason,
        error=call.error,
        bound_at=datetime.now(UTC) - timedelta(seconds=time.monotonic() - call.started),
    )


def _raise_failure(event: EngineEvent, tools: ToolUse | None) -> None:
    if event.finish_reason == "adapter_failed":
        raise AdapterLoadError(f"the adapter version can't be served: {event.error}")
    if event.finish_reason == "constraint_failed":
        field = "response_format" if tools is None else "tools"
        raise InvalidInputError(event.error or "the answer's form can't be followed", param=field)
    if event.finish_reason == "deadline":
        raise DeadlineExceededError(event.error or "the answer was not finished in its time")
    if event.finish_reason in ("engine_failed", "cancelled"):
        raise EngineFailureError(event.error or "the request was cancelled")
