"""Whatever JSON is posted: an answer, or an error of the client's in the one envelope, and no failure of the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.completion_schemas import CompletionRequest
from server.schemas import ChatRequest
from tests.support.engine import Site, on_site

NUM_EXAMPLES = 150
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "base", "messages": MESSAGES, "max_tokens": 3},
    "/v1/completions": {"model": "base", "prompt": "hi", "max_tokens": 3},
}
FIELDS = {
    "/v1/chat/completions": [*ChatRequest.model_fields, *ChatRequest.unsupported],
    "/v1/completions": [*CompletionRequest.model_fields, *CompletionRequest.unsupported],
}
# Half a surrogate pair is legal in JSON and in no text.
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", "base", "auto", "<|im_end|>", "\ud800", "\x00", "none", "required", "function", "text", "developer", "tool"]
)
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**63, -(2**63) - 1, 1e308, 0.5, 10**30]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = TEXTS | st.sampled_from(["type", "role", "content", "name", "json_schema", "schema", "function", "text", "258"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
# Values that some field takes, so that options meet each other behind the schema's gate.
KNOWN = st.sampled_from(
    [
        [TOOL],
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "tool", "content": "x", "tool_call_id": "c"}],
        [{"role": "developer", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "assistant", "content": "\ud800"}],
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        {"type": "function", "function": {"name": "f"}},
        {"include_usage": True},
        {"5": 100, "6": -100},
        ["yes", "no"],
        [1, 2, 3],
        [[1], [2, 258]],
    ]
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 5),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 10),
    "logit_bias": st.dictionaries(st.integers(0, 257).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "stop": st.text(min_size=1, max_size=2),
    "max_tokens": st.integers(1, 6),
    "min_tokens": st.integers(0, 2),
    "user": st.text(min_size=1, max_size=5),
}


def _mutated(path: str) -> st.SearchStrategy[Any]:
    """Bodies that are nearly right, and some that are anything."""
    changes = st.dictionaries(st.sampled_from(FIELDS[path]) | KEYS, KNOWN | JSON, max_size=2)
    nearly_right = st.builds(
        lambda options, fields: {**BODIES[path], **options, **fields},
        st.fixed_dictionaries({}, optional=OPTIONS),
        changes,
    )
    return nearly_right | JSON


def _post(site: Site, path: str, body: Any) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        content = json.dumps(body).encode()
        return await http.post(path, content=content, headers={"content-type": "application/json"})

    return on_site(site, scenario)


def _check(response: httpx.Response) -> None:
    """An answer in full, or an error of the client's in the envelope."""
    assert response.headers["x-request-id"].startswith("req_")
    assert response.status_code < 500, response.text
    if response.status_code == 200:
        assert "choices" in response.text
        assert response.text.endswith("data: [DONE]\n\n") == response.headers["content-type"].startswith("text/event")
        return
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert "invalid_request_error" == error["type"]
    assert not any(trace in response.text for trace in ("Traceback", "site-packages", ".py"))


@pytest.mark.parametrize("path", list(BODIES))
def test_any_body_is_answered_or_refused_when_it_is_posted(path: str, site: Site) -> None:
    """Fields of every kind with values of every kind, alone and together; both outcomes are met, nothing is left."""
    statuses: set[int] = set()

    @settings(max_examples=NUM_EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(_mutated(path))
    def check(body: Any) -> None:
        response = _post(site, path, body)
        _check(response)
        statuses.add(response.status_code)

    check()
    assert {200, 400} <= statuses
    assert site.engine.is_idle
    assert 0 == site.client.num_in_flight == site.client.num_tokens_in_flight


@pytest.mark.parametrize("path", list(BODIES))
def test_any_bytes_are_refused_when_they_are_no_json(path: str, site: Site) -> None:
    """What no parser takes, and nesting that a recursive one would break on."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [b"", b"\xff", b"{", b"[" * 100_000, b'{"model": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"nul"]
        headers = {"content-type": "application/json"}
        return await asyncio.gather(*(http.post(path, content=content, headers=headers) for content in bodies))

    for response in on_site(site, scenario):
        _check(response)
        assert 400 == response.status_code
