"""Our own HTTP client against a real socket: what it sends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clients.http import HotswapClient


class _Listener(HTTPServer):
    """Answers every GET and keeps its Authorization header."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Called for each request."""
        assert isinstance(self.server, _Listener)
        self.server.seen.append(self.headers.get("authorization"))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def listener() -> Iterator[_Listener]:
    """A server on a free port."""
    server = _Listener()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("variable", "given", "expected"),
    [
        (None, None, None),
        ("", None, None),
        ("hs-variable", None, "Bearer hs-variable"),
        (None, "hs-given", "Bearer hs-given"),
        ("hs-variable", "hs-given", "Bearer hs-given"),
    ],
)
def test_client_sends_the_key_when_it_has_one(
    variable: str | None,
    given: str | None,
    expected: str | None,
    listener: _Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is given comes before the environment; without either there is no header."""
    monkeypatch.delenv("HOTSWAP_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("HOTSWAP_API_KEY", variable)

    async def call() -> bool:
        async with HotswapClient(listener.url, api_key=given) as client:
            return await client.is_ready()

    assert asyncio.run(call())
    assert [expected] == listener.seen
