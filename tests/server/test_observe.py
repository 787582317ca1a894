"""Request ids and log lines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI, Request

from server.observe import RequestIdMiddleware, configure_logging, request_id_of


@pytest.fixture
def _default_logging() -> Iterator[None]:
    """Undo what a test configures for the process."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


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


@pytest.mark.usefixtures("_default_logging")
def test_log_line_has_event_level_and_request_when_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """One line in logfmt on standard error, with what is bound to the request."""
    configure_logging("info")
    structlog.contextvars.bind_contextvars(request_id="req_1")
    structlog.get_logger().info("chat_answered", version="legal@v2", note="two words")
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    for part in ("level=info", "event=chat_answered", "request_id=req_1", "version=legal@v2", 'note="two words"'):
        assert part in line


@pytest.mark.usefixtures("_default_logging")
def test_log_line_is_left_out_when_its_level_is_too_low(capsys: pytest.CaptureFixture[str]) -> None:
    """The setting is the least level that is written."""
    configure_logging("warning")
    log = structlog.get_logger()
    log.info("quiet")
    log.warning("loud")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["event=loud"]


@pytest.mark.usefixtures("_default_logging")
def test_log_line_stays_one_line_when_a_value_holds_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    """A user's text can't forge a second line."""
    configure_logging("info")
    structlog.get_logger().info("event", text="a\nlevel=error event=forged")
    assert len(capsys.readouterr().err.splitlines()) == 1
