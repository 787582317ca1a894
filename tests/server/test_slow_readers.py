"""A client that reads slowly, or not at all, costs the others nothing, and not for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from adapters.registry import Registry
from tests.support.engine import Bench, Site, on_site
from tests.support.http import ServedSite, serve_site, wait_until

_MESSAGES = [{"role": "user", "content": "Hi"}]
_BODY = {"model": "base", "messages": _MESSAGES, "max_tokens": 60, "ignore_eos": True, "stream": True}
# Log-probabilities make the answers larger than what a socket's buffers hold.
_LARGE_BODY = _BODY | {"logprobs": True, "top_logprobs": 20, "n": 4}
_SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/chat/completions",
    "raw_path": b"/v1/chat/completions",
    "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "server": ("localhost", 80),
}


class _SlowReader:
    """One ASGI connection whose client reads nothing behind the first piece until it is told to."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.has_first = asyncio.Event()
        self.received = b""
        self._sent: list[dict[str, Any]] = [{"type": "http.request", "body": json.dumps(_BODY).encode()}]

    async def receive(self) -> dict[str, Any]:
        if self._sent:
            return self._sent.pop()
        await asyncio.Event().wait()  # it stays connected
        raise AssertionError("nobody sets it")

    async def send(self, message: Any) -> None:
        if self.received:
            await self.may_read.wait()
        self.received += message.get("body", b"")
        if self.received:
            self.has_first.set()


def test_others_are_answered_when_a_client_does_not_read(site: Site) -> None:
    """Its own answer is computed to the end, leaves the engine, and is all there when it reads again."""

    async def scenario(http: httpx.AsyncClient) -> tuple[list[int], bytes]:
        reader = _SlowReader()
        reading = asyncio.create_task(site.app(_SCOPE, reader.receive, reader.send))
        await reader.has_first.wait()
        others = [await http.post("/v1/chat/completions", json=_BODY | {"stream": False}) for _ in range(3)]
        while site.engine.num_running:  # for ever, if whoever does not read kept its place
            await asyncio.sleep(0)
        held = reader.received
        reader.may_read.set()
        await reading
        assert len(held) < len(reader.received)
        return [other.status_code for other in others], reader.received

    statuses, received = on_site(site, scenario)
    assert [200] * 3 == statuses
    assert received.endswith(b"data: [DONE]\n\n")
    assert [60] * 4 == sorted(row.completion_tokens for row in site.exposures())


@contextlib.contextmanager
def _served(bench: Bench, registry: Registry, home: Path, *, send_timeout_s: float) -> Iterator[ServedSite]:
    """A site on a real socket. Nothing is left to the garbage collector, which may come by late."""
    site = Site.build(bench, registry, home, send_timeout_s=send_timeout_s)
    gc.disable()
    try:
        with serve_site(site) as listening:
            yield listening
    finally:
        gc.enable()
        site.engine.close()


@contextlib.contextmanager
def _asking_without_reading(served: ServedSite) -> Iterator[socket.socket]:
    body = json.dumps(_LARGE_BODY).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", served.port))
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        client.recv(1)  # the stream has begun
        yield client


def _assert_nothing_is_held(site: Site) -> None:
    wait_until(lambda: site.client.num_in_flight == 0)
    assert 0 == site.client.num_tokens_in_flight
    wait_until(lambda: len(site.exposures()) == 1)


def test_place_is_free_at_once_when_a_client_leaves_with_bytes_unread(
    bench: Bench, registry: Registry, tmp_path: Path
) -> None:
    """The response stands in the middle of sending when the connection breaks."""
    with _served(bench, registry, tmp_path, send_timeout_s=3600) as served:
        with _asking_without_reading(served):
            wait_until(lambda: served.site.engine.num_running == 0)
            assert served.site.client.num_in_flight > 0, "the answer fits into the buffers: this shows nothing"
        _assert_nothing_is_held(served.site)


def test_place_is_free_when_a_client_takes_nothing_for_the_time_it_has(
    bench: Bench, registry: Registry, tmp_path: Path
) -> None:
    """Its connection is cut, and what it reads afterwards is no whole answer."""
    with (
        _served(bench, registry, tmp_path, send_timeout_s=0.2) as served,
        _asking_without_reading(served) as client,
    ):
        _assert_nothing_is_held(served.site)
        assert "cancelled" == served.site.exposures()[0].finish_reason
        with contextlib.suppress(ConnectionResetError):
            received = b"".join(iter(lambda: client.recv(65536), b""))
            assert received.startswith(b"TTP/1.1 200")
            assert b"data: [DONE]" not in received
