"""The end of an API process: what runs is answered, what comes is told to go elsewhere, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import httpx
import pytest

from server.draining import END_SIGNAL, drain_before_exit
from tests.support.engine import Exchange, Site, on_site

CHAT = "/v1/chat/completions"


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """The signals that have reached whoever handled them before; the process keeps its own handlers afterwards."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, END_SIGNAL)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def _body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    return {"model": "base", "messages": messages, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def _begin_stream(site: Site) -> Exchange:
    site.transport.permits = 3
    exchange = Exchange(site.app, CHAT, _body(stream=True))
    await exchange.start()
    return exchange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, END_SIGNAL])
def test_running_stream_ends_well_when_the_server_is_told_to_end(
    number: signal.Signals, site: Site, ended: list[int]
) -> None:
    """Meanwhile it is not ready and takes nothing, with a hint to retry; the signal arrives when all has ended."""

    async def scenario(http: httpx.AsyncClient) -> tuple[list[httpx.Response], bytes]:
        drain_before_exit(site.client, limit_s=60)
        exchange = await _begin_stream(site)
        os.kill(os.getpid(), number)
        await _until(lambda: site.client.is_draining)
        refused = [await http.post(CHAT, json=_body()), await http.get("/ready"), await http.get("/health")]
        # Ctrl+C, and often SIGTERM, reach the API process and its parent, whose word follows: that must not cut
        # the answers off.
        for other in {signal.SIGTERM, signal.SIGINT, END_SIGNAL} - {number}:
            os.kill(os.getpid(), other)
        assert [] == ended
        site.transport.permits = None
        content = await exchange.rest()
        await _until(lambda: bool(ended))
        return refused, content

    (chat, ready, health), content = on_site(site, scenario)
    assert (503, 503, 200) == (chat.status_code, ready.status_code, health.status_code)
    for response in (chat, ready):
        assert ("engine_unavailable", "true") == (
            response.json()["error"]["code"],
            response.headers["x-should-retry"],
        )
        assert "shutting down" in response.json()["error"]["message"]
        assert 0 < int(response.headers["retry-after"])
    assert content.endswith(b"data: [DONE]\n\n")
    assert [signal.SIGTERM if number == END_SIGNAL else number] == ended
    (row,) = site.exposures()
    assert ("length", None, 8) == (row.finish_reason, row.error, row.completion_tokens)


def test_running_stream_ends_in_an_error_when_it_takes_too_long(site: Site, ended: list[int]) -> None:
    """A well-formed event, an exposure, and the place in the engine free."""

    async def scenario(http: httpx.AsyncClient) -> bytes:
        drain_before_exit(site.client, limit_s=0)
        exchange = await _begin_stream(site)
        os.kill(os.getpid(), signal.SIGTERM)
        content = await exchange.rest()
        await _until(lambda: bool(ended))
        site.transport.permits = None
        await _until(lambda: site.engine.is_idle)
        return content

    content = on_site(site, scenario)
    assert b"shutting down" in content.split(b"data: ")[-1]
    assert b"[DONE]" not in content
    assert [signal.SIGTERM] == ended
    (row,) = site.exposures()
    assert "the server is shutting down" == row.error
    assert 0 == site.client.num_in_flight


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, END_SIGNAL])
def test_signal_arrives_at_once_when_it_comes_again(number: signal.Signals, site: Site, ended: list[int]) -> None:
    """Whoever presses Ctrl+C twice doesn't want to wait: what runs ends in an error, and the signal arrives once."""

    async def scenario(http: httpx.AsyncClient) -> bytes:
        drain_before_exit(site.client, limit_s=3600)
        exchange = await _begin_stream(site)
        os.kill(os.getpid(), number)
        await _until(lambda: site.client.is_draining)
        assert [] == ended
        os.kill(os.getpid(), number)
        content = await exchange.rest()
        await _until(lambda: bool(ended))
        return content

    assert b"shutting down" in on_site(site, scenario).split(b"data: ")[-1]
    assert [signal.SIGTERM if number == END_SIGNAL else number] == ended


def test_signal_arrives_when_nothing_is_in_flight(site: Site, ended: list[int]) -> None:
    """An idle server ends without a wait."""

    async def scenario(http: httpx.AsyncClient) -> None:
        drain_before_exit(site.client, limit_s=1e9)
        os.kill(os.getpid(), signal.SIGTERM)
        await _until(lambda: bool(ended))

    on_site(site, scenario)
    assert [signal.SIGTERM] == ended
