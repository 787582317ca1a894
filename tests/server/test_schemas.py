"""The wire: what bodies are taken, what is refused, and what the answers look like."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from server.schemas import (
    ChatMessage,
    ChatRequest,
    FeedbackRequest,
    chat_choice,
    chat_chunk,
    chat_completion,
    error_body,
    usage_body,
)

MESSAGES = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MODELS: list[type[BaseModel]] = [ChatRequest, ChatMessage, FeedbackRequest]


def _chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "legal", "messages": MESSAGES, **fields})


def _numeric_bounds(model: type[BaseModel]) -> dict[str, dict[str, float]]:
    """The bounds of every field that takes a number, from the model's metadata."""
    found: dict[str, dict[str, float]] = {}
    for name, field in model.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if not kinds & {int, float}:
            continue
        found[name] = {
            bound: getattr(item, bound)
            for item in field.metadata
            for bound in ("ge", "gt", "le", "lt")
            if getattr(item, bound, None) is not None
        }
    return found


def test_every_numeric_field_has_both_bounds_when_it_is_in_a_chat_request() -> None:
    """No number that a client sends is unbounded; and the walk must have found them."""
    fields = _numeric_bounds(ChatRequest)
    assert {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "n",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "top_logprobs",
    } == set(fields)
    for name, bounds in fields.items():
        assert bounds.keys() & {"ge", "gt"}, name
        assert bounds.keys() & {"le", "lt"}, name


@pytest.mark.parametrize("field", _numeric_bounds(ChatRequest))
def test_number_is_refused_when_it_is_beyond_its_bounds(field: str) -> None:
    """The bound itself is taken if it is inclusive, what lies beyond is not; nor are NaN and infinity."""
    bounds = _numeric_bounds(ChatRequest)[field]
    lower, upper = bounds.get("ge", bounds.get("gt")), bounds["le"]
    assert lower is not None
    assert upper == getattr(_chat(**{field: upper}), field)
    for value in (lower - 1, upper + 1 if upper < 2**53 else upper * 2, math.nan, math.inf, -math.inf, "x"):
        with pytest.raises(ValidationError) as caught:
            _chat(**{field: value})
        assert (field,) == caught.value.errors()[0]["loc"][:1]
    if "ge" in bounds:
        assert lower == getattr(_chat(**{field: lower}), field)
    else:
        with pytest.raises(ValidationError):
            _chat(**{field: lower})


@pytest.mark.parametrize("value", [0.0, -3, 2.5, 1e12, -1e12, True, False])
def test_feedback_takes_a_value_when_it_is_a_bounded_number_or_a_boolean(value: float | bool) -> None:
    """Booleans are outcomes too."""
    body = FeedbackRequest.model_validate({"id": "chatcmpl-1", "metric": "thumbs_up", "value": value})
    assert float(value) == float(body.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"value": 1.1e12},
        {"value": -1.1e12},
        {"value": math.nan},
        {"value": math.inf},
        {"value": None},
        {"value": [1]},
        {"metric": ""},
        {"metric": "9lives"},
        {"metric": "a" * 65},
        {"metric": "a b"},
        {"metric": "a\n"},
        {"id": ""},
        {"id": "a" * 65},
        {"comment": "a" * 2001},
        {"stars": 5},
    ],
)
def test_feedback_is_refused_when_a_field_is_out_of_bounds(fields: dict[str, Any]) -> None:
    """Each wrong field is named."""
    with pytest.raises(ValidationError) as caught:
        FeedbackRequest.model_validate({"id": "chatcmpl-1", "metric": "ok", "value": 1, **fields})
    assert {next(iter(fields))} == {error["loc"][0] for error in caught.value.errors()}


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""},
        {"model": "a" * 201},
        {"messages": []},
        {"messages": MESSAGES * 1001},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a" * 200_001}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "m e"}]},
        {"messages": [{"role": "user", "content": "x", "mood": "me"}]},
        {"messages": [{"role": "function", "content": "x", "name": "f"}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
        {"messages": [{"role": "assistant", "tool_calls": []}]},
        {"messages": [{"role": "user", "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"n": 0},
        {"n": 9},
        {"n": 1.5},
        {"stop": ""},
        {"stop": "a" * 65},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": ["a", ""]},
        {"stream": "maybe"},
        {"stream_options": {"verbose": True}},
        {"user": ""},
        {"user": "u" * 513},
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 129},
        {"tool_choice": "some"},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"functions": []},
        {"prediction": {"type": "content", "content": "x"}},
        {"store": "yes"},
        {"service_tier": "priority"},
        {"modalities": ["text", "audio"]},
        {"modalities": ["audio"]},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"metadata": {"a": 1}},
        {"metadata": {str(number): "x" for number in range(17)}},
        {"metadata": {"a": "x" * 513}},
        {"safety_identifier": "x" * 513},
        {"stream_options": {"include_obfuscation": True}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"01": 1}},
        {"logit_bias": {"1\n": 1}},
        {"logit_bias": {"12345678": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": math.nan}},
        {"logit_bias": {str(token): 1 for token in range(301)}},
        {"logit_bias": [1]},
        {"logprobs": 3},
        {"ignore_eos": "perhaps"},
        {"response_format": "json"},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object", "schema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "definition": {}}}},
        {"guided_choice": ["a"]},
        {"guided_choice": ["a", "a"]},
        {"guided_choice": ["a", ""]},
        {"guided_choice": ["a", "b" * 513]},
        {"guided_choice": [str(index) for index in range(257)]},
        {"guided_regex": "a*"},
    ],
)
def test_chat_request_is_refused_when_a_field_is_wrong(fields: dict[str, Any]) -> None:
    """The error is at the field that is wrong, and at no other."""
    with pytest.raises(ValidationError) as caught:
        _chat(**fields)
    assert {next(iter(fields))} == {error["loc"][0] for error in caught.value.errors()}


@pytest.mark.parametrize(
    "field", [name for name, field in ChatRequest.model_fields.items() if name not in ("model", "messages")]
)
def test_null_means_not_given_when_a_client_sends_it(field: str) -> None:
    """Clients send an explicit null for what they leave open; what must be given must not be null."""
    with pytest.raises(ValidationError):
        _chat(messages=None)
    assert _chat() == _chat(**{field: None})


def test_zero_temperature_is_kept_when_it_is_given() -> None:
    """Not given is None, never a falsy value."""
    assert _chat(temperature=0).temperature == 0
    assert _chat().temperature == 1.0


def test_token_limit_is_the_newer_names_when_both_are_given() -> None:
    """`max_completion_tokens` replaced `max_tokens`."""
    assert None is _chat().token_limit
    assert _chat(max_tokens=5).token_limit == 5
    assert _chat(max_tokens=5, max_completion_tokens=7).token_limit == 7


def test_stop_strings_are_a_tuple_when_they_come_in_any_form() -> None:
    """A string alone is one stop string, not its letters."""
    assert tuple(_chat(stop=stop).stop_strings for stop in (None, "END", ["a", "b"])) == ((), ("END",), ("a", "b"))


def test_logit_bias_is_taken_when_it_has_as_many_tokens_as_allowed() -> None:
    """Token ids are the keys, as JSON has no others."""
    assert 300 == len(_chat(logit_bias={str(token): -100 for token in range(300)}).logit_bias or {})


def test_schema_is_kept_as_it_is_when_it_comes_in_a_response_format() -> None:
    """Whatever keys it has; they are the schema's, not ours."""
    schema = {"type": "object", "whatever": [1]}
    body = _chat(response_format={"type": "json_schema", "json_schema": {"name": "a-B_1", "schema": schema}})
    assert body.response_format is not None
    assert body.response_format.json_schema is not None
    assert schema == body.response_format.json_schema.definition


def test_message_text_is_joined_when_it_comes_in_parts() -> None:
    """The list form of content is the same as one string."""
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    assert _chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "hello"


def test_request_is_immutable_when_it_was_parsed() -> None:
    """Nothing changes a body behind the route's back."""
    with pytest.raises(ValidationError):
        _chat().model = "other"  # type: ignore[misc]


def test_answers_have_openais_shape_when_they_are_made() -> None:
    """Whole answer, chunk, usage and error, key by key."""
    usage = usage_body(3, 4)
    assert usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    choice = chat_choice(index=0, text="t", finish_reason="stop")
    whole = chat_completion(response_id="i", created=1, model="m", choices=[choice], usage=usage)
    message = {"role": "assistant", "content": "t"}
    assert [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}] == whole["choices"]
    assert ("i", "chat.completion", 1, "m", usage) == tuple(
        whole[key] for key in ("id", "object", "created", "model", "usage")
    )
    chunk = chat_chunk(response_id="i", created=1, model="m", delta={"content": "t"})
    assert chunk["object"] == "chat.completion.chunk"
    assert chunk["choices"] == [{"index": 0, "delta": {"content": "t"}, "logprobs": None, "finish_reason": None}]
    assert error_body("no", kind="k") == {"error": {"message": "no", "type": "k", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("service_tier", 0, "there is one tier"),
        ("reasoning_effort", "high", "to make the model think: expected none, found 'high'"),
        ("service_tier", "flex", "there is one tier: expected auto or default, found 'flex'"),
        ("verbosity", "low", "answers longer or shorter: expected medium, found 'low'"),
    ],
)
def test_request_is_refused_with_the_reason_when_an_option_can_not_be_followed(
    field: str, value: object, reason: str
) -> None:
    """What asks for something that is not done is no more ignored than an unknown field."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "legal", "messages": MESSAGES, field: value})
    (error,) = caught.value.errors()
    assert (field,) == error["loc"]
    assert reason in error["msg"]
