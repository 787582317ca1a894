"""Request ids."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import structlog
from fastapi import FastAPI, Request

from server.observe import RequestIdMiddleware, request_id_of


def _app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestIdMiddleware)

    @app.get("/id")
    async def show(request: Request) -> dict[str, Any]:
        return {"id": request_id_of(request.scope), "bound": structlog.contextvars.get_contextvars()}

    return app


def _get(path: str, times: int = 1, headers: dict[str, str] | None = None) -> list[httpx.Response]:
    async def call() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=_app()), base_url="http://test") as http:
            return [await http.get(path, headers=headers) for _ in range(times)]

    return asyncio.run(call())


def test_response_names_the_requests_id_when_a_route_answers() -> None:
    """The header, the route and the log context have the same id."""
    (response,) = _get("/id")
    body = response.json()
    assert f"req_{body['id']}" == response.headers["x-request-id"]
    assert {"request_id": f"req_{body['id']}"} == body["bound"]


def test_response_names_an_id_when_no_route_matches() -> None:
    """Errors have one too."""
    (response,) = _get("/nowhere")
    assert response.status_code == 404
    assert response.headers["x-request-id"].startswith("req_")


def test_ids_differ_when_requests_do() -> None:
    """Each request has its own."""
    assert len({response.headers["x-request-id"] for response in _get("/id", times=20)}) == 20


def test_id_is_our_own_when_the_client_sends_one() -> None:
    """A client can't choose the id, which names its answer in the database."""
    (response,) = _get("/id", headers={"x-request-id": "mine"})
    assert "mine" not in response.headers["x-request-id"]


def test_other_connections_pass_when_they_are_not_http() -> None:
    """Start-up messages reach the app as they are."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        assert "state" not in scope

    async def nothing(*_: Any) -> Any:
        raise AssertionError("not called")

    asyncio.run(RequestIdMiddleware(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]
