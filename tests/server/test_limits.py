"""The cap on request bodies, with and without a truthful content length."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request

from server.errors import install_error_handlers
from server.limits import BodyLimitMiddleware


def _app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, max_bytes=10)
    install_error_handlers(app)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    return app


def _post(content: bytes | AsyncIterator[bytes]) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/echo", content=content)

    return asyncio.run(send())


async def _in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_body_passes_when_it_is_as_large_as_allowed() -> None:
    """Ten bytes of ten."""
    assert _post(b"x" * 10).json() == 10


@pytest.mark.parametrize("in_pieces", [False, True])
def test_body_is_refused_in_the_envelope_when_it_is_larger(in_pieces: bool) -> None:
    """413, also where the pieces are counted because no length was announced."""
    response = _post(_in_pieces(b"x" * 6, b"x" * 6) if in_pieces else b"x" * 11)
    assert response.status_code == 413
    assert "10 bytes" in response.json()["error"]["message"]
