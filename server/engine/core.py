"""The engine's nouns: what goes in, what comes out, and what is kept per running request.

Requests and events cross a process border by pickle, so they hold plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from server.engine.text_stream import TextStream

__all__ = ["EngineEvent", "FinishReason", "GenerationRequest", "SamplingParams", "Sequence"]

FinishReason = Literal["stop", "length", "cancelled", "adapter_failed", "engine_failed"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. `temperature` 0 is greedy; `seed` None takes a random one."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one adapter version; `digest` None is the base model."""

    id: str
    prompt: tuple[int, ...]
    digest: str | None
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """News of one request: text that is ready, and at the end, once, a finish reason.

    `completion_tokens` counts all tokens generated so far, the end-of-turn token included. `error` says what happened
    where the reason is a failure.
    """

    request_id: str
    text: str = ""
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request while it runs. The scheduler writes every field; the runner reads them."""

    request: GenerationRequest
    stream: TextStream
    generator: torch.Generator
    slot: int = 0
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
