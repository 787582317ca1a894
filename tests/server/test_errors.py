"""Every error leaves in one envelope, and every class of ours has a row of its own in the table."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters import errors as core
from adapters.records import Binding
from server.errors import ANSWERS, describe_error, install_error_handlers
from server.observe import RequestIdMiddleware


def _subclasses(root: type[core.HotswapError]) -> set[type[core.HotswapError]]:
    return {root}.union(*(_subclasses(child) for child in root.__subclasses__()))


KINDS = sorted(_subclasses(core.HotswapError), key=lambda kind: kind.__name__)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int = Field(ge=1, le=3)


def _make(kind: type[core.HotswapError]) -> core.HotswapError:
    if kind is core.DataError:
        return core.DataError(["a.jsonl:1 secret"])
    if kind is core.FingerprintMismatchError:
        return core.FingerprintMismatchError(adapter="secret", base="b")
    if kind is core.RankTooHighError:
        return core.RankTooHighError(rank=64, max_rank=16)
    return kind("secret")


def _app(error: Exception | None = None) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestIdMiddleware)
    install_error_handlers(app)

    @app.get("/raise")
    async def raise_it() -> None:
        assert error is not None
        raise error

    @app.post("/body")
    async def read_body(body: _Body) -> dict[str, int]:
        return {"count": body.count}

    return app


def _call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **options)

    return asyncio.run(call())


def _error_of(response: httpx.Response) -> dict[str, Any]:
    """The envelope's content; every error must have exactly this shape."""
    body = response.json()
    assert {"error"} == set(body)
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def test_table_has_a_row_of_its_own_when_an_error_class_exists() -> None:
    """A new class must be given an answer; and the walk must have found the tree."""
    assert len(KINDS) > 10
    assert [kind.__name__ for kind in KINDS if kind not in ANSWERS] == []
    assert len(ANSWERS) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_route_answers_in_the_envelope_when_a_known_error_is_raised(kind: type[core.HotswapError]) -> None:
    """Status, type and code are the table's; the message is the error's own only where it is public."""
    error = _make(kind)
    response = _call(_app(error), "GET", "/raise")
    answer = ANSWERS[kind]
    body = _error_of(response)
    assert (answer.status, answer.kind, answer.code) == (response.status_code, body["type"], body["code"])
    assert answer.is_public == (str(error) == body["message"])
    assert answer.is_public or "secret" not in response.text
    assert response.headers["x-request-id"].startswith("req_")
    assert (answer.status in (429, 503)) == ("retry-after" in response.headers)


def test_table_blames_the_client_when_and_only_when_input_is_wrong() -> None:
    """4xx is an invalid request or a rate limit, 5xx the server's error: clients retry by this."""
    for answer in ANSWERS.values():
        expected = {"server_error"} if answer.status >= 500 else {"invalid_request_error", "rate_limit_error"}
        assert answer.kind in expected


def test_answer_is_the_parents_when_a_subclass_is_not_in_the_table() -> None:
    """The most specific known ancestor decides, so that an answer never fails for want of a row."""
    kind = type("Strange", (core.RankTooHighError,), {})
    error = kind(rank=2, max_rank=1)
    del kind
    assert ANSWERS[core.RankTooHighError] == describe_error(error)[0]


def test_answer_names_the_field_when_the_error_does() -> None:
    """`param` travels from where the error is raised."""
    assert describe_error(core.InvalidInputError("no", param="arms"))[1]["error"]["param"] == "arms"
    assert None is describe_error(core.NotFoundError("no"))[1]["error"]["param"]


def test_answer_says_when_to_retry_when_the_queue_is_full() -> None:
    """The header carries what the error says."""
    response = _call(_app(core.OverloadedError("full", retry_after_s=7)), "GET", "/raise")
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (core.OverloadedError, "true"),
        (core.EngineUnavailableError, "true"),
        (core.DeadlineExceededError, "false"),
        (core.EngineFailureError, None),
    ],
)
def test_answer_tells_clients_whether_to_retry_when_the_status_would_mislead(
    kind: type[core.HotswapError], expected: str | None
) -> None:
    """Where nothing was started a retry is welcome; what took all its time would take it again."""
    assert expected == _call(_app(_make(kind)), "GET", "/raise").headers.get("x-should-retry")


@pytest.mark.parametrize("value", [0, 4, "many", None])
def test_body_error_names_the_field_when_a_value_is_out_of_bounds(value: object) -> None:
    """A validation error is 400, not FastAPI's 422, and says which field."""
    response = _call(_app(), "POST", "/body", json={"count": value})
    error = _error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "count")
    assert error["message"].startswith("count: ")


def test_body_error_names_the_field_when_it_is_unknown() -> None:
    """An unknown field is never ignored."""
    response = _call(_app(), "POST", "/body", json={"count": 1, "tools": []})
    error = _error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, "tools", "unknown_field")
    assert "'tools'" in error["message"]


def test_body_error_names_the_field_when_it_is_missing() -> None:
    """What is required is named."""
    assert _error_of(_call(_app(), "POST", "/body", json={}))["param"] == "count"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"count": NaN}'])
def test_body_error_is_400_when_the_body_is_no_json_object(content: bytes) -> None:
    """Malformed bodies are the client's fault, in the envelope too."""
    response = _call(_app(), "POST", "/body", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, _error_of(response)["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/body", 405)])
def test_router_error_is_in_the_envelope_when_no_route_matches(method: str, path: str, status: int) -> None:
    """Starlette's own answers are no exception; the message names method and path."""
    response = _call(_app(), method, path)
    assert status == response.status_code
    assert f"{method} {path}" in _error_of(response)["message"]


def test_405_names_every_method_of_the_path_when_routes_share_it() -> None:
    """Also those of later routes, and none of other paths."""
    app = _app()
    app.get("/body")(lambda: None)
    app.put("/{name}")(lambda name: None)
    app.patch("/body/more")(lambda: None)
    assert "GET, POST, PUT" == _call(app, "DELETE", "/body").headers["allow"]


def test_unknown_exception_hides_its_message_when_a_route_crashes() -> None:
    """A crash is 500 in the envelope and says nothing of its reason."""
    response = _call(_app(RuntimeError("password=secret")), "GET", "/raise")
    assert (response.status_code, _error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_unknown_exception_has_a_request_id_when_a_route_crashes() -> None:
    """The message tells to look for the id in the log, so the answer has to carry it."""
    response = _call(_app(RuntimeError("crash")), "GET", "/raise")
    assert response.headers["x-request-id"].startswith("req_")


def test_unknown_exception_says_what_was_to_answer_when_the_request_was_bound() -> None:
    """A crash of an arm's version has the headers that its answers have."""
    app = _app()

    @app.get("/bound")
    async def crash(request: Request) -> None:
        request.state.binding = Binding("legal", "experiment", "d" * 64, 2, "exp-1", "B")
        raise RuntimeError("crash")

    headers = _call(app, "GET", "/bound").headers
    assert ("legal@v2", "B") == (headers["x-hotswap-version"], headers["x-hotswap-arm"])
    assert "x-hotswap-version" not in _call(_app(RuntimeError("crash")), "GET", "/raise").headers
