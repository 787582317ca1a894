"""The wire: request bodies and answers as OpenAI's clients send and read them. Unknown fields are errors.

What the wire leaves optional is resolved here and nowhere deeper.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, field_validator

__all__ = ["ChatMessage", "ChatRequest", "FeedbackRequest", "chat_chunk", "chat_completion", "error_body", "usage_body"]

_MAX_CONTENT_CHARS = 200_000
_MAX_MESSAGES = 1000
_MAX_PARTS = 100

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Wire):
    """One piece of a message's content in the list form; only text is supported."""

    type: Literal["text"]
    text: str = Field(max_length=_MAX_CONTENT_CHARS)


class ChatMessage(_Wire):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: (
        Annotated[str, StringConstraints(max_length=_MAX_CONTENT_CHARS)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=_MAX_PARTS)]
    )

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Wire):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Wire):
    """Body of POST /v1/chat/completions."""

    model: str = Field(min_length=1, max_length=200)
    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | list[StopString] | None = None
    max_tokens: int | None = Field(None, ge=1, le=131_072)
    max_completion_tokens: int | None = Field(None, ge=1, le=131_072)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    user: str | None = Field(None, min_length=1, max_length=512)

    @field_validator("temperature", "top_p", "stream", "n", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        # The hosted API takes an explicit null for these as "not given", and clients send it.
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _at_most_four(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError(f"expected at most 4 stop strings, found {len(value)}")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """The answer's limit under either of its two names; the newer one wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class FeedbackRequest(_Wire):
    """Body of POST /v1/feedback: an outcome for the response with this id."""

    id: str = Field(min_length=1, max_length=64)
    metric: str = Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_.-]{0,63}$")
    value: StrictBool | Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False, strict=True)]
    comment: str | None = Field(None, max_length=2000)


def chat_completion(
    *, response_id: str, created: int, model: str, text: str, finish_reason: str, usage: dict[str, int]
) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chat_chunk(
    *, response_id: str, created: int, model: str, delta: dict[str, str], finish_reason: str | None = None
) -> dict[str, Any]:
    """One event of a streamed answer."""
    return {
        "id": response_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of one answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The one envelope that every error comes in."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
