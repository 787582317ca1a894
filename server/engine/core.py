"""The engine's nouns: what goes in, what comes out, and what is kept per running request.

Requests and events cross a process border by pickle, so they hold plain values only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from server.engine.blocks import Allocation
    from server.engine.sampling import Sampler
    from server.engine.text_stream import TextStream
    from server.engine.token_text import TokenTrail

__all__ = [
    "MAX_TIMINGS",
    "Constraint",
    "EngineEvent",
    "EngineTimings",
    "FinishReason",
    "GenerationRequest",
    "LoadTiming",
    "SamplingParams",
    "Sequence",
    "StepTiming",
    "TokenLogprob",
    "Wait",
]

# What is kept of measurements that nobody takes; a worker takes them with every message.
MAX_TIMINGS = 1000

FinishReason = Literal[
    "stop", "length", "cancelled", "deadline", "adapter_failed", "constraint_failed", "engine_failed", "dropped"
]


class Wait(Enum):
    """Why a request can't join the batch in this step."""

    LOADING = auto()  # its version will be there soon; others may go on
    NO_SLOT = auto()  # its version finds every slot in use and waits for one to drain
    NO_ROOM = auto()  # the batch or its cache is full


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that an answer must have.

    Any JSON object, JSON by a schema (its text), exactly one of `choices`, or what a grammar of llguidance (its text)
    allows.
    """

    kind: Literal["json_object", "json_schema", "choices", "grammar"]
    schema: str = ""
    choices: tuple[str, ...] = ()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. Every default but `temperature` leaves the model's distribution alone.

    The order in which they act, and their sources, stand in `server.engine.sampling`.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = None  # None takes a random one
    stop: tuple[str, ...] = ()
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    top_logprobs: int | None = None  # None is no log-probabilities, 0 those of the chosen tokens alone
    ignore_eos: bool = False
    min_tokens: int = 0  # neither an end-of-turn token nor a stop string ends the answer before
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one adapter version; `digest` None is the base model.

    `client` is whom the engine is fair to: the API key's id, or empty. `timeout_s` counts from submission. A shadow is
    computed while nobody else is, and dropped where it would take what others need.
    """

    id: str
    prompt: tuple[int, ...]
    digest: str | None
    sampling: SamplingParams
    client: str = ""
    timeout_s: float | None = None
    is_shadow: bool = False

    @property
    def num_tokens(self) -> int:
        """What the request may take at most: prompt and answer."""
        return len(self.prompt) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token with its natural log-probability, and the likeliest tokens at its place, `(token, logprob)`.

    `text_bytes` is what the token added to the answer: UTF-8, perhaps a part of a character. Those of an answer join to
    its text; a special token adds nothing.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text_bytes: bytes = b""


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """News of one request: text that is ready, and at the end, once, a finish reason.

    `completion_tokens` counts all tokens generated so far, the end-of-turn token included. `error` says what happened
    where the reason is a failure. `logprobs`, if asked for, are those of the tokens whose text is out with this event.
    `queued_s`, from submission to the batch, comes with the first event.
    """

    request_id: str
    text: str = ""
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    queued_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepTiming:
    """How long one step took; with prefill, if any of its tokens were of a prompt."""

    seconds: float
    has_prefill: bool


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """How long one load of a version took: reading and copying, without waiting for a slot; or until it had failed."""

    digest: str
    seconds: float
    is_loaded: bool


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """What an engine has measured since it was asked last; adding them up counts nothing twice."""

    steps: tuple[StepTiming, ...] = ()
    loads: tuple[LoadTiming, ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request while it runs. The scheduler writes every field; the runner reads them."""

    request: GenerationRequest
    stream: TextStream
    sampler: Sampler | None = None  # None takes the likeliest token
    trail: TokenTrail | None = None  # None where no log-probabilities were asked for
    slot: int = 0
    row: int = 0  # of the cache's block table
    allocation: Allocation | None = None
    deadline: float = math.inf  # in seconds of the engine's clock
    queued_s: float = 0.0
    num_cached: int = 0  # tokens whose keys and values are in the cache
    generated: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens together."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is missing from the cache."""
        return bool(self.generated) and self.num_cached == self.num_tokens - 1

    def tokens_to_compute(self, limit: int) -> list[int]:
        """The next tokens to run through the model, at most `limit`."""
        if self.is_decoding:
            return self.generated[-1:]
        return list(self.request.prompt[self.num_cached : self.num_cached + limit])
