"""The wire: request bodies and answers as OpenAI's clients send and read them. Unknown fields are errors.

What the wire leaves optional is resolved here and nowhere deeper.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, field_validator

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "FeedbackRequest",
    "ResponseFormat",
    "chat_choice",
    "chat_chunk",
    "chat_completion",
    "error_body",
    "usage_body",
]

_MAX_CONTENT_CHARS = 200_000
_MAX_MESSAGES = 1000
_MAX_PARTS = 100

_MAX_STOP_STRINGS = 4
_MAX_BIASES = 300
_MAX_NEW_TOKENS = 131_072

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]
AllowedAnswer = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TokenId = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,6})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Wire(BaseModel):
    # Strict: "3" and true are no numbers, whatever pydantic could make of them.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


class JsonSchemaFormat(_Wire):
    """A named JSON schema. `strict` changes nothing: the schema is always followed."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=2000)
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Wire):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatRequest(_Wire):
    """Body of POST /v1/chat/completions. What the fields do, and which are extensions: docs/generation.md."""

    model: str = Field(min_length=1, max_length=200)
    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=100_000)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=_MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | list[StopString] | None = None
    max_tokens: int | None = Field(None, ge=1, le=_MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_NEW_TOKENS)
    min_tokens: int = Field(0, ge=0, le=_MAX_NEW_TOKENS)
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    guided_choice: list[AllowedAnswer] | None = Field(None, min_length=2, max_length=256)
    user: str | None = Field(None, min_length=1, max_length=512)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        # The hosted API takes an explicit null for an option as "not given", and clients send it.
        field = cls.model_fields[info.field_name]
        return field.default if value is None and not field.is_required() else value

    @field_validator("stop")
    @classmethod
    def _at_most_four(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > _MAX_STOP_STRINGS:
            raise ValueError(f"expected at most {_MAX_STOP_STRINGS} stop strings, found {len(value)}")
        return value

    @field_validator("guided_choice")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("each allowed answer may be given once")
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
    *, response_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, int]
) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def chat_choice(
    *, index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One of the answers in a whole answer."""
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_chunk(
    *,
    response_id: str,
    created: int,
    model: str,
    index: int = 0,
    delta: dict[str, str],
    finish_reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One event of a streamed answer."""
    return {
        "id": response_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}],
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
