"""One accepted request and its answers: what is asked of the engine, and what is known of how it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from adapters.records import Binding, Feedback, Unit
from adapters.shadows import Shadow
from server.callers import Meter
from server.engine.core import GenerationRequest
from server.schemas import ChatRequest, chat_choice
from server.tools import ToolReader, ToolUse, read_whole

__all__ = [
    "ID_PREFIXES",
    "Call",
    "Choice",
    "Operation",
    "answer_messages",
    "headers_of",
    "make_answers",
    "message_of",
    "time_per_token",
]


Operation = Literal["chat", "text_completion"]  # OpenTelemetry's names for them
ID_PREFIXES: dict[Operation, str] = {"chat": "chatcmpl", "text_completion": "cmpl"}


@dataclass(slots=True)
class Choice:
    """One of the answers to a request. `ChatService` writes the lower fields while it is made."""

    index: int
    generation: GenerationRequest
    completion_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: str | None = None
    pieces: list[str] = field(default_factory=list)  # of its text, if the call has a `body`


@dataclass(slots=True)
class Call:
    """One accepted request. `ChatService` writes the lower fields while the answers are made."""

    operation: Operation
    response_id: str
    client: str  # whose turn it takes in the engine's queue
    meter: Meter
    binding: Binding
    unit: Unit
    answers: dict[str, Choice]  # by the engine's request id
    num_answers: int  # to each prompt
    created: int
    started: float
    tools: ToolUse | None = None
    body: ChatRequest | None = None  # of a chat whose answers are wanted when it has ended, by whom the next two say
    is_kept: bool = False
    shadow: Shadow | None = None
    first_token: float | None = None
    queued_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    is_recorded: bool = False
    is_written: asyncio.Event = field(default_factory=asyncio.Event)
    feedback: dict[str, Feedback] = field(default_factory=dict)  # by metric, what came before the exposure
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def generation(self) -> GenerationRequest:
        """What the engine is asked for the first answer; those to the same prompt differ in id and seed alone."""
        return next(iter(self.answers.values())).generation

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the answers to one share it."""
        answers = list(self.answers.values())
        return sum(len(answer.generation.prompt) for answer in answers[:: self.num_answers])

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.completion_tokens for answer in self.answers.values())


def make_answers(request_id: str, requests: Sequence[GenerationRequest], count: int) -> dict[str, Choice]:
    """The engine's requests for so many answers to each prompt, by their ids.

    The answers to one prompt have seeds of their own, counted from the one that was given.
    """
    answers: dict[str, Choice] = {}
    for request in requests:
        seed = request.sampling.seed
        for number in range(count):
            index = len(answers)
            own_id = request_id if len(requests) * count == 1 else f"{request_id}-{index}"
            sampling = replace(request.sampling, seed=None if seed is None else seed + number)
            answers[own_id] = Choice(index, replace(request, id=own_id, sampling=sampling))
    return answers


def answer_messages(call: Call) -> list[dict[str, Any]]:
    """The assistant's message of each answer of a call that has ended, tool calls read from the text."""
    return [
        message_of("".join(answer.pieces), call.tools, f"call_{name}", index=answer.index)
        for name, answer in call.answers.items()
    ]


def message_of(text: str, tools: ToolUse | None, call_id: str, *, index: int = 0) -> dict[str, Any]:
    """The assistant's message with this text; `call_id` begins the ids of the calls that are in it."""
    reader = None if tools is None else ToolReader(tools, call_id)
    shown, calls = read_whole(reader, text)
    message: dict[str, Any] = chat_choice(index=index, text=shown, finish_reason=None, tool_calls=calls)["message"]
    return message


def headers_of(binding: Binding) -> dict[str, str]:
    """The headers that say what answered."""
    headers = {
        "x-hotswap-alias": binding.alias,
        "x-hotswap-version": binding.version_label,
        "x-hotswap-route": "forced" if binding.forced else binding.route,
    }
    if binding.confidence is not None:
        headers["x-hotswap-confidence"] = f"{binding.confidence:.3f}"
    if binding.digest:
        headers["x-hotswap-digest"] = binding.digest
    if binding.arm:
        headers["x-hotswap-arm"] = binding.arm
        headers["x-hotswap-experiment"] = binding.experiment_id or ""
    return headers


def time_per_token(call: Call) -> float | None:
    """Mean seconds per token behind the first of its answer, over all answers.

    None if there are no such tokens or an answer did not end well.
    """
    if call.finish_reason not in ("stop", "length"):
        return None
    longer = [answer for answer in call.answers.values() if answer.completion_tokens > 1]
    num_gaps = sum(answer.completion_tokens - 1 for answer in longer)
    return sum(map(_seconds_after_first, longer)) / num_gaps if num_gaps else None


def _seconds_after_first(answer: Choice) -> float:
    assert answer.first_token is not None, "there are tokens"
    assert answer.last_token is not None, "there are tokens"
    return answer.last_token - answer.first_token
