"""Streams and deadlines over a real engine, registry and database in one process, as clients see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import pytest

from adapters.registry import Registry
from server.messages import CancelCommand
from tests.support.chat import (
    CHAT,
    NUM_TOKENS,
    break_step,
    chat_body,
    error_of,
    expected_text,
    post,
    read_events,
    text_of,
)
from tests.support.engine import RECIPES, Bench, Exchange, Reference, SetClock, Site, on_site
from tests.support.sdk import with_sdk

FIRST, SECOND, THIRD, *_ = RECIPES


# Deadlines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_504_when_the_answer_takes_longer_than_its_header_allows(stream: bool, site: Site) -> None:
    """Clients are told not to retry; the exposure says why the answer is missing, and nothing is left behind."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(CHAT, json=chat_body("base", stream=stream), headers={"x-hotswap-timeout-s": "1e-9"})

    response = on_site(site, scenario)
    error = error_of(response)
    assert (504, "deadline_exceeded", "server_error") == (response.status_code, error["code"], error["type"])
    assert "false" == response.headers["x-should-retry"]
    (row,) = site.exposures()
    assert ("deadline", error["message"]) == (row.finish_reason, row.error)
    assert site.engine.is_idle
    assert 0 == site.client.num_in_flight == site.client.num_tokens_in_flight


def test_stream_ends_in_an_error_event_when_the_deadline_comes_in_the_middle(
    bench: Bench, registry: Registry, tmp_path: Path
) -> None:
    """The server's own limit applies where no header is sent; what was said so far stays, and there is no [DONE]."""
    clock = SetClock()
    site = Site.build(bench, registry, tmp_path, clock=clock)
    site.transport.permits = 6

    async def scenario(http: httpx.AsyncClient) -> bytes:
        exchange = Exchange(site.app, CHAT, chat_body("base", stream=True))
        await exchange.start()
        content = await exchange.chunk()
        clock.now += site.settings.timeout_s
        site.transport.permits = None
        return content + await exchange.rest()

    events = read_events(on_site(site, scenario))
    site.engine.close()
    assert "deadline_exceeded" == events[-1]["error"]["code"]
    assert "within its 600 seconds" in events[-1]["error"]["message"]
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
    (row,) = site.exposures()
    assert row.finish_reason == "deadline"
    assert 0 < row.completion_tokens < NUM_TOKENS
    assert site.engine.num_running == 0


def test_chat_is_400_when_the_timeout_header_is_wrong(site: Site) -> None:
    """The header is named, and nothing reaches the engine."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(CHAT, json=chat_body("base"), headers={"x-hotswap-timeout-s": "soon"})

    response = on_site(site, scenario)
    error = error_of(response)
    assert (400, "x-hotswap-timeout-s", "invalid_value") == (response.status_code, error["param"], error["code"])
    assert site.transport.commands == []


def test_openai_client_retries_only_where_it_helps_when_requests_fail(site: Site) -> None:
    """One attempt where the deadline passed, although the status alone would be retried."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        patient = client.with_options(max_retries=2)
        with pytest.raises(openai.InternalServerError) as late:
            await patient.chat.completions.create(**chat_body("base"), extra_headers={"x-hotswap-timeout-s": "1e-9"})
        assert late.value.code == "deadline_exceeded"

    with_sdk(site, scenario)
    assert 1 == len(site.exposures())


# Streams -------------------------------------------------------------------------------------------------------------


def test_stream_joins_to_the_whole_answer_when_it_is_read_to_the_end(site: Site, reference_answers: Reference) -> None:
    """Role first, then text, then the finish reason, then [DONE]; ids and names are the same throughout."""
    site.publish("legal", FIRST)
    (response,) = post(site, chat_body("legal", stream=True))
    events = read_events(response.content)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-hotswap-version"] == "legal@v1"
    assert events[-1] == "[DONE]"
    assert expected_text(site, reference_answers, FIRST) == text_of(events)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert [None] * (len(reasons) - 1) == reasons[:-1]
    assert reasons[-1] in ("length", "stop")
    assert len({(event["id"], event["model"], event["object"]) for event in events[:-1]}) == 1
    assert not any("usage" in event for event in events[:-1])


def test_stream_ends_with_usage_when_it_is_asked_for(site: Site) -> None:
    """The event before [DONE] has no choice and the counts; all others say null."""
    options = {"include_usage": True}
    whole, streamed = post(site, chat_body("base"), chat_body("base", stream=True, stream_options=options))
    events = read_events(streamed.content)
    assert ([], whole.json()["usage"]) == (events[-2]["choices"], events[-2]["usage"])
    assert {None} == {event["usage"] for event in events[:-2]}


def test_stream_ends_in_a_wellformed_error_when_the_model_fails_in_the_middle(site: Site) -> None:
    """One error event in the envelope, a blank line and the end: no finish reason and no [DONE]."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        break_step(site, at=5)
        return await http.post(CHAT, json=chat_body("base", stream=True))

    response = on_site(site, scenario)
    events = read_events(response.content)
    assert response.status_code == 200
    assert {"error"} == set(events[-1])
    assert (events[-1]["error"]["code"], events[-1]["error"]["type"]) == ("engine_failure", "server_error")
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
    (row,) = site.exposures()
    assert (row.finish_reason, row.error is not None) == ("engine_failed", True)
    assert 0 < row.completion_tokens < NUM_TOKENS


def test_stream_keeps_its_version_when_the_alias_moves_in_the_middle(site: Site, reference_answers: Reference) -> None:
    """The running answer is the old version's to its last token; the next request gets the new one."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND, promote=False)
    site.transport.permits = 6

    async def scenario(http: httpx.AsyncClient) -> tuple[dict[str, str], bytes, httpx.Response]:
        exchange = Exchange(site.app, CHAT, chat_body("legal", stream=True))
        _, headers = await exchange.start()
        content = await exchange.chunk()
        site.registry.promote("legal@v2")
        assert b"[DONE]" not in content
        assert site.engine.num_running == 1
        following = asyncio.create_task(http.post(CHAT, json=chat_body("legal")))
        site.transport.permits = None
        content += await exchange.rest()
        return headers, content, await following

    headers, content, following = on_site(site, scenario)
    assert headers["x-hotswap-version"] == "legal@v1"
    assert expected_text(site, reference_answers, FIRST) == text_of(read_events(content))
    assert following.headers["x-hotswap-version"] == "legal@v2"
    assert expected_text(site, reference_answers, SECOND) == following.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_exposure_says_cancelled_when_the_client_leaves_in_the_middle(stream: bool, site: Site) -> None:
    """The engine is told to stop, its row is free, and what was generated so far is recorded."""
    site.transport.permits = 3

    async def scenario(http: httpx.AsyncClient) -> None:
        exchange = Exchange(site.app, CHAT, chat_body("base", stream=stream, max_tokens=60))
        if stream:
            await exchange.start()
            await exchange.chunk()
        while site.transport.permits:
            await asyncio.sleep(0)
        assert site.engine.num_running == 1
        await exchange.hang_up()
        while not site.exposures() or site.client.num_in_flight or site.engine.num_running:
            await asyncio.sleep(0)

    on_site(site, scenario)
    (row,) = site.exposures()
    assert (row.finish_reason, row.error) == ("cancelled", None)
    assert row.completion_tokens > 0
    assert [CancelCommand(row.response_id.removeprefix("chatcmpl-"))] == site.transport.commands[1:]
