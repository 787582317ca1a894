"""POST /v1/completions on the wire: text or tokens in, text out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from server.schemas import GenerationOptions
from server.wire import Text

__all__ = ["CompletionRequest", "completion_body", "completion_choice"]

_MAX_PROMPTS = 64
_MAX_TOKENS = 131_072
_MAX_TOKEN_ID = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID, strict=True)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=_MAX_TOKENS)]


class CompletionRequest(GenerationOptions):
    """Body of POST /v1/completions: one prompt or several, each as text or as tokens."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"suffix"})

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=_MAX_PROMPTS)]
    )
    # The wire's own default: who leaves the limit open here expects a short answer.
    max_tokens: int | None = Field(16, ge=1, le=_MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=8)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as it was given."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        items: list[Any] = list(self.prompt)
        return [items] if isinstance(items[0], int) else items

    @property
    def num_top_logprobs(self) -> int | None:
        """How many likeliest tokens to name at each place; None is no log-probabilities at all."""
        return self.logprobs


def completion_body(
    *, response_id: str, created: int, model: str, choices: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """A whole answer or a chunk of one: on this wire they look the same."""
    return {
        "id": response_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        **more,
    }


def completion_choice(
    *,
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One of the answers, or a piece of it."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
