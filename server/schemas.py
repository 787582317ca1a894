"""The wire: request bodies and answers as OpenAI's clients send and read them. Unknown fields are errors.

What the wire leaves optional is resolved here and nowhere deeper.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StringConstraints, field_validator, model_validator

from server.tool_schemas import MAX_TOOLS, Tool, ToolCall, ToolChoice
from server.wire import MAX_CONTENT_CHARS, FunctionName, LenientNulls, Text, Wire

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "FeedbackRequest",
    "GenerationOptions",
    "ResponseFormat",
    "RouteRequest",
    "chat_choice",
    "chat_chunk",
    "chat_completion",
    "error_body",
    "usage_body",
]

_MAX_MESSAGES = 1000
_MAX_PARTS = 100

_MAX_STOP_STRINGS = 4
_MAX_BIASES = 300
_MAX_NEW_TOKENS = 131_072
_MAX_METADATA = 16
_MAX_OUTCOME = 1e12

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]
AllowedAnswer = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TokenId = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,6})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


def _check_outcome(value: object) -> object:
    """Refuse what is neither kind of value: of a union's members the first would speak for all."""
    # Booleans are numbers here, and NaN is in no range.
    if not isinstance(value, int | float) or not -_MAX_OUTCOME <= value <= _MAX_OUTCOME:
        bounds = f"{-_MAX_OUTCOME:g} to {_MAX_OUTCOME:g}"
        raise ValueError(f"expected true, false or a number from {bounds}, found {value!r:.80}")
    return value


def _ineffective(*taken: object, because: str) -> BeforeValidator:
    """Refuse what would change something if it were followed, with the reason why nothing follows it."""

    def check(value: Any) -> Any:
        # Not `in`: 0 is no False here.
        if value is not None and not any(value is item or (isinstance(value, str) and value == item) for item in taken):
            allowed = " or ".join(str(item).lower() for item in taken)
            raise ValueError(f"{because}: expected {allowed}, found {value!r:.80}")
        return value

    return BeforeValidator(check)


class TextPart(Wire):
    """One piece of a message's content in the list form; only text is supported."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_CONTENT_CHARS)


class ChatMessage(LenientNulls):
    """One message of a conversation."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"audio", "function_call", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=_MAX_PARTS)] | None = None
    name: str | None = Field(None, pattern=r"^[^\s<|\\/>]{1,64}$")
    tool_calls: list[ToolCall] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, min_length=1, max_length=128)

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("expected content, or tool_calls of an assistant, found neither")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls are an assistant's, found them in a message of role {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with the role 'tool', and with no other")
        return self

    @property
    def text(self) -> str:
        """The content as one string; empty where there are only calls."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(LenientNulls):
    """Options of a streamed answer. Chunks are never padded, so obfuscation can only be declined."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchemaFormat(Wire):
    """A named JSON schema. `strict` changes nothing: the schema is always followed."""

    name: FunctionName
    description: str | None = Field(None, max_length=2000)
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationOptions(LenientNulls):
    """What chat and completions have in common. What the fields do, and which are extensions: docs/generation.md."""

    model: str = Field(min_length=1, max_length=200)
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
    min_tokens: int = Field(0, ge=0, le=_MAX_NEW_TOKENS)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    guided_choice: list[AllowedAnswer] | None = Field(None, min_length=2, max_length=256)
    user: str | None = Field(None, min_length=1, max_length=512)

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
        """The most tokens that an answer may take; None leaves it to the server."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """How many likeliest tokens to name at each place; None is no log-probabilities at all."""

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationOptions):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "function_call",
            "functions",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "web_search_options",
        }
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_NEW_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    store: bool | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=_MAX_METADATA)
    # Without effect from here on; each value that is taken asks for what happens anyway.
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1)
    prompt_cache_key: str | None = Field(None, max_length=512)
    reasoning_effort: Annotated[
        Literal["none"] | None, _ineffective("none", because="nothing is added to make the model think")
    ] = None
    safety_identifier: str | None = Field(None, max_length=512)
    service_tier: Annotated[
        Literal["auto", "default"] | None, _ineffective("auto", "default", because="there is one tier")
    ] = None
    verbosity: Annotated[
        Literal["medium"] | None,
        _ineffective("medium", because="nothing is added to make answers longer or shorter"),
    ] = None

    @property
    def token_limit(self) -> int | None:
        """The answer's limit under either of its two names; the newer one wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """How many likeliest tokens to name at each place; None is no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class RouteRequest(Wire):
    """Body of POST /v1/route: a text, or the messages of a conversation."""

    input: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=_MAX_MESSAGES)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=_MAX_METADATA)

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input, a text, or messages")
        return self


class FeedbackRequest(Wire):
    """Body of POST /v1/feedback: an outcome for the response with this id."""

    id: str = Field(min_length=1, max_length=64)
    metric: str = Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_.-]{0,63}$")
    value: Annotated[
        StrictBool | Annotated[float, Field(ge=-_MAX_OUTCOME, le=_MAX_OUTCOME, allow_inf_nan=False, strict=True)],
        BeforeValidator(_check_outcome),
    ]
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
    *,
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: dict[str, Any] | None = None,
    tool_calls: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One of the answers in a whole answer; without text, `content` is null where there are calls."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool_calls:
        message |= {"content": text or None, "tool_calls": tool_calls}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_chunk(
    *,
    response_id: str,
    created: int,
    model: str,
    index: int = 0,
    delta: dict[str, Any],
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
