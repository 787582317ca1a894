"""A client that reads slowly, or not at all, costs the others nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.support.engine import Site, on_site

_MESSAGES = [{"role": "user", "content": "Hi"}]
_BODY = {"model": "base", "messages": _MESSAGES, "max_tokens": 60, "ignore_eos": True, "stream": True}
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
