"""The unmodified OpenAI SDK, with and without asyncio, against the API on a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from adapters.registry import Registry
from tests.support.engine import RECIPES, Bench, Reference, Site, encode
from tests.support.http import Attempts, ServedSite, serve_site, wait_until

FIRST, *_ = RECIPES
TEXT = "hello there"
NUM_TOKENS = 10
NO_BLANKS = {str(token): -100 for token in encode(" \n")}
LONG = [{"role": "user", "content": "a" * 300}]
Scenario = Callable[[Any], Any]


def _body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": TEXT}]
    return {"model": "base", "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS, **fields}


@pytest.fixture
def served(site: Site) -> Iterator[ServedSite]:
    """The API with one published version, listening."""
    site.publish("legal", FIRST)
    with serve_site(site) as listening:
        yield listening


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a scenario with either client; it returns what the client's method returned, awaited or not."""

    def with_client(url: str, scenario: Scenario, **options: Any) -> Any:
        settings = {"api_key": "none", "base_url": url, "max_retries": 0, **options}
        if request.param == "sync":
            with openai.OpenAI(**settings) as client:
                return scenario(client)

        async def run_async() -> Any:
            async with openai.AsyncOpenAI(**settings) as client:
                found = scenario(client)
                return await found

        return asyncio.run(run_async())

    return with_client


def _expected(served: ServedSite, reference: Reference, adapter: str | None = None) -> str:
    return reference.text(served.site.prompt(TEXT), adapter, NUM_TOKENS)


def _stopped(served: ServedSite, reference: Reference, adapter: str | None) -> tuple[str, str]:
    """A stop string of the version's answer and the text before it: the SDK's helper refuses answers that were cut."""
    whole = _expected(served, reference, adapter)
    stop = next(letter for letter in whole[2:] if letter != "\ufffd")
    return stop, whole.split(stop)[0]


# Answers -------------------------------------------------------------------------------------------------------------


def test_chat_answers_when_the_sdk_asks(
    served: ServedSite, run: Callable[..., Any], reference_answers: Reference
) -> None:
    """Typed through and through: nothing in the answer that the SDK's classes do not know."""
    answer = run(served.url, lambda client: client.chat.completions.create(**_body(model="legal")))
    assert _expected(served, reference_answers, FIRST) == answer.choices[0].message.content
    assert {} == (answer.model_extra or {}) == (answer.choices[0].model_extra or {})
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert str(answer._request_id).removeprefix("req_") == answer.id.removeprefix("chatcmpl-")


def test_raw_response_has_the_headers_when_the_sdk_asks_for_it(served: ServedSite, run: Callable[..., Any]) -> None:
    """What answered is in the headers, so that the body stays what the SDK knows."""
    raw = run(served.url, lambda client: client.chat.completions.with_raw_response.create(**_body(model="legal")))
    names = ("x-hotswap-alias", "x-hotswap-version", "x-hotswap-route")
    assert ["legal", "legal@v1", "alias"] == [raw.headers[name] for name in names]
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.request_id.startswith("req_")
    assert isinstance(raw.parse(), openai.types.chat.ChatCompletion)


def test_completion_answers_when_the_sdk_asks(
    served: ServedSite, run: Callable[..., Any], reference_answers: Reference
) -> None:
    """The older endpoint, typed as well."""
    answer = run(
        served.url,
        lambda client: client.completions.create(
            model="legal", prompt=[TEXT], temperature=0, max_tokens=NUM_TOKENS, logprobs=1
        ),
    )
    assert reference_answers.text(encode(TEXT), FIRST, NUM_TOKENS) == answer.choices[0].text
    assert {} == (answer.model_extra or {}) == (answer.choices[0].model_extra or {})
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.text_offset)


def test_models_are_typed_when_the_sdk_lists_them(served: ServedSite, run: Callable[..., Any]) -> None:
    """Every field that the SDK's class requires; `parent` is the one that we add."""
    models = run(served.url, lambda client: client.models.list()).data
    assert ["base", "tiny", "legal", "legal@v1"] == [model.id for model in models]
    for model in models:
        assert ("model", "hotswap") == (model.object, model.owned_by)
        assert isinstance(model.created, int)
        assert {"parent"} == set(model.model_extra)
    assert [None, "base", "legal@v1", "base"] == [model.parent for model in models]
    assert models[2] == run(served.url, lambda client: client.models.retrieve("legal"))


class Reply(BaseModel):
    """What `parse` is asked for."""

    is_known: bool
    level: int | None


def test_answer_is_parsed_when_the_sdk_is_given_a_class(served: ServedSite, run: Callable[..., Any]) -> None:
    """Structured output there and back."""
    fields = _body(max_tokens=60, response_format=Reply, logit_bias=NO_BLANKS, seed=3)
    answer = run(served.url, lambda client: client.chat.completions.parse(**fields))
    assert isinstance(answer.choices[0].message.parsed, Reply)


# Streams -------------------------------------------------------------------------------------------------------------


def test_stream_joins_to_the_answer_when_the_sdk_reads_it(served: ServedSite, reference_answers: Reference) -> None:
    """By hand, and by the SDK's helper, which gathers text, end and usage."""
    stop, expected = _stopped(served, reference_answers, FIRST)
    fields = _body(model="legal", stop=stop, stream_options={"include_usage": True})
    with openai.OpenAI(api_key="none", base_url=served.url) as client:
        with client.chat.completions.create(**fields, stream=True) as stream:
            chunks = list(stream)
        with client.chat.completions.stream(**fields) as events:
            seen = [event.type for event in events]
            final = events.get_final_completion()
    assert expected == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert expected == final.choices[0].message.content
    assert "stop" == chunks[-2].choices[0].finish_reason == final.choices[0].finish_reason
    assert chunks[-1].usage == final.usage
    assert {"chunk", "content.delta", "content.done"} == set(seen)


def test_stream_joins_to_the_answer_when_it_is_read_with_asyncio(
    served: ServedSite, reference_answers: Reference
) -> None:
    """Two at once, each its own."""

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(api_key="none", base_url=served.url) as client:

            async def read(model: str, stop: str) -> str:
                async with client.chat.completions.stream(**_body(model=model, stop=stop)) as events:
                    return str((await events.get_final_completion()).choices[0].message.content)

            return list(await asyncio.gather(read("legal", of_legal[0]), read("base", of_base[0])))

    of_legal, of_base = (_stopped(served, reference_answers, adapter) for adapter in (FIRST, None))
    assert [of_legal[1], of_base[1]] == asyncio.run(scenario())


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
        ({"top_p": 2}, openai.BadRequestError, "top_p", "invalid_value"),
        ({"extra_body": {"guess": 1}}, openai.BadRequestError, "guess", "unknown_field"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions", "unknown_field"),
        ({"messages": LONG}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"extra_headers": {"x-hotswap-timeout-s": "1e-9"}}, openai.InternalServerError, None, "deadline_exceeded"),
    ],
)
def test_sdk_raises_its_own_error_when_a_request_is_refused(
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str,
    stream: bool,
    served: ServedSite,
    run: Callable[..., Any],
) -> None:
    """Class by status; code, param and request id from envelope and header."""
    with pytest.raises(kind) as caught:
        run(served.url, lambda client: client.chat.completions.create(**_body(stream=stream, **fields)))
    assert (param, code) == (caught.value.param, caught.value.code)
    assert str(caught.value.request_id).startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/chat/completions", b"", 405),
        ("POST", "/models", b"", 405),
        ("POST", "/chat/completions", b"{", 400),
        ("POST", "/chat/completions", b" " * 1_000_001, 413),
        ("POST", "/embeddings", b"{}", 404),
        ("GET", "/models/nobody", b"", 404),
        ("GET", "/models/..%2f..%2fetc", b"", 404),
    ],
)
def test_every_error_has_envelope_and_id_when_it_comes_from_a_socket(
    method: str, path: str, content: bytes, status: int, served: ServedSite
) -> None:
    """Whatever part of the server it comes from; nothing in it tells of files or code."""
    headers = {"content-type": "application/json"}
    response = httpx.request(method, served.url + path, content=content, headers=headers)
    assert status == response.status_code
    assert {"error"} == set(response.json())
    assert {"message", "type", "param", "code"} == set(response.json()["error"])
    assert response.headers["x-request-id"].startswith("req_")
    assert not any(trace in response.text for trace in ("Traceback", ".py", "site-packages", str(Path.cwd())))


def test_sdk_raises_when_a_stream_breaks_off(served: ServedSite) -> None:
    """The error event is an exception behind the chunks that came; the connection and the next request are fine."""
    left = 5

    def fail_later(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            handle.remove()
            raise RuntimeError("secret reason")

    handle = served.site.base.model.register_forward_pre_hook(fail_later)
    with openai.OpenAI(api_key="none", base_url=served.url) as client:
        stream = client.chat.completions.create(**_body(stream=True))
        assert "assistant" == next(stream).choices[0].delta.role
        with pytest.raises(openai.APIError, match="the model failed") as caught:
            list(stream)
        assert "secret" not in str(caught.value)
        assert client.chat.completions.create(**_body()).choices[0].message.content


# Retries -------------------------------------------------------------------------------------------------------------


def test_sdk_retries_as_it_is_told_when_the_server_is_full(
    bench: Bench, registry: Registry, tmp_path: Path, reference_answers: Reference
) -> None:
    """Two refusals with a short Retry-After and then the answer: three attempts, counted by the SDK itself."""
    site = Site.build(bench, registry, tmp_path, max_waiting=1)
    site.transport.permits = 0

    async def make_room(attempt: int) -> None:
        if attempt == 4:  # the first is the one that fills the server
            site.transport.permits = None
            while site.client.num_in_flight:
                await asyncio.sleep(0.001)

    attempts = Attempts(make_room)
    with serve_site(site, wrap=attempts.wrap) as served:
        filling = threading.Thread(target=_ask_alone, args=(served.url,))
        filling.start()
        wait_until(lambda: site.client.num_in_flight == 1)
        with openai.OpenAI(api_key="none", base_url=served.url, max_retries=2) as client:
            answer = client.chat.completions.create(**_body())
        filling.join()
        assert _expected(served, reference_answers) == answer.choices[0].message.content
    site.engine.close()
    assert [429, 429] == [status for status in attempts.statuses if status != 200]
    assert ["0", "1", "2"] == attempts.retry_counts[1:]


def _ask_alone(url: str) -> None:
    with openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client:
        client.chat.completions.create(**_body())


def test_sdk_retries_as_it_is_told_when_the_engine_is_starting(site: Site, reference_answers: Reference) -> None:
    """Two 503 and then the answer, without a line of the client's own."""
    listening: list[ServedSite] = []

    async def start_late(attempt: int) -> None:
        if attempt == 3:
            await listening[0].start_engine()

    attempts = Attempts(start_late)

    async def scenario(url: str) -> Any:
        async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=2) as client:
            return await client.chat.completions.create(**_body())

    with serve_site(site, wrap=attempts.wrap, is_up=False) as served:
        listening.append(served)
        answer = asyncio.run(scenario(served.url))
        assert _expected(served, reference_answers) == answer.choices[0].message.content
    assert [503, 503, 200] == attempts.statuses
    assert ["0", "1", "2"] == attempts.retry_counts


def test_sdk_gives_up_at_once_when_a_retry_can_not_help(site: Site) -> None:
    """One attempt where the request can never fit, and one where its time is over."""
    attempts = Attempts()
    with (
        serve_site(site, wrap=attempts.wrap) as served,
        openai.OpenAI(api_key="none", base_url=served.url, max_retries=2) as client,
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**_body(n=8, messages=[{"role": "user", "content": "a" * 120}]))
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**_body(), extra_headers={"x-hotswap-timeout-s": "1e-9"})
    assert [400, 504] == attempts.statuses


# Clients that leave --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_engine_is_free_within_two_steps_when_a_client_hangs_up(stream: bool, served: ServedSite) -> None:
    """Row, blocks and slot; and nothing is left of the request in the API process: no entry, no tokens, no task."""
    site = served.site
    num_tasks = served.num_tasks
    blocks = site.engine.cache_room
    site.transport.permits = 6
    body = _body(model="legal", stream=stream, max_tokens=60)
    client = http.client.HTTPConnection("127.0.0.1", served.port)
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    if stream:
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
    wait_until(lambda: site.transport.permits == 0)
    _assert_busy(site, blocks)
    if stream:
        answer.close()
    client.close()
    site.transport.permits = 2  # the answer would take fifty more
    wait_until(lambda: not site.engine.num_running and not site.client.num_in_flight)
    assert blocks == site.engine.cache_room
    assert [0] == [holding.users for holding in site.engine.residency._resident.values()]
    assert 0 == site.client.num_tokens_in_flight == len(site.client._in_flight)
    wait_until(lambda: len(site.exposures()) == 1 and served.num_tasks <= num_tasks)
    assert "cancelled" == site.exposures()[0].finish_reason
    site.transport.permits = None
    response = httpx.post(f"{served.url}/chat/completions", json=_body(model="legal"))
    assert 200 == response.status_code


def _assert_busy(site: Site, blocks: tuple[int, int]) -> None:
    assert 1 == site.engine.num_running == site.client.num_in_flight
    assert site.engine.cache_room[0] < blocks[0]
    assert [1] == [holding.users for holding in site.engine.residency._resident.values()]
