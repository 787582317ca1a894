"""The cap on request bodies, with and without a truthful content length."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request

from adapters.errors import InvalidInputError
from server.errors import install_error_handlers
from server.limits import BodyLimitMiddleware, read_timeout


def _app(larger: dict[tuple[str, str], int] | None = None) -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, max_bytes=10, larger=larger)
    install_error_handlers(app)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    return app


def _post(content: bytes | AsyncIterator[bytes], app: FastAPI | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app or _app())
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


def test_body_has_the_routes_own_limit_when_it_takes_files() -> None:
    """By method and path; every other route keeps the common limit."""
    app = _app(larger={("POST", "/echo"): 12, ("PUT", "/echo"): 99, ("POST", "/other"): 99})
    assert (12, 413) == (_post(b"x" * 12, app).json(), _post(b"x" * 13, app).status_code)


@pytest.mark.parametrize(("value", "expected"), [(None, 10), ("2.5", 2.5), (" 3 ", 3), ("10", 10), ("1e9", 10)])
def test_timeout_is_the_headers_when_it_is_shorter_than_the_servers(value: str | None, expected: float) -> None:
    """A client may want less time, and can't get more."""
    assert expected == read_timeout(value, limit_s=10)


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1s", "9" * 500])
def test_timeout_is_refused_when_it_is_no_positive_number(value: str) -> None:
    """The error names the header."""
    with pytest.raises(InvalidInputError, match="x-hotswap-timeout-s: expected a positive number") as error:
        read_timeout(value, limit_s=10)
    assert error.value.param == "x-hotswap-timeout-s"
    assert len(str(error.value)) < 150


def test_uploads_may_be_larger_when_they_are_posted_to_files() -> None:
    """The route of uploads alone has the larger cap; the same path by another method has not."""
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, max_bytes=10, larger={("POST", "/v1/files"): 10_100})
    install_error_handlers(app)

    @app.api_route("/v1/files", methods=["POST", "PUT"])
    async def count(request: Request) -> int:
        return len(await request.body())

    async def send(method: str, size: int) -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.request(method, "/v1/files", content=b"x" * size)).status_code

    found = [asyncio.run(send("POST", 10_100)), asyncio.run(send("POST", 10_101)), asyncio.run(send("PUT", 11))]
    assert found == [200, 413, 413]
