"""Who may call what, over the real routes in one process: keys, scopes, hidden aliases, limits, and no keys at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
import structlog
from fastapi import APIRouter, FastAPI

from adapters.audit import AuditLog
from adapters.records import SCOPES, KeyLimits, Scope
from adapters.tables import ApiKeyRow
from server.api import build_server
from server.auth import AuthMiddleware, RouteAccess, needs, read_access
from server.config import ServeSettings
from server.errors import install_error_handlers
from server.messages import SubmitCommand
from server.observe import RequestIdMiddleware
from server.routes import router
from server.services import CurrentServices
from tests.support.engine import RECIPES, Site, on_site
from tests.support.tiny import tiny_settings

FIRST, SECOND, THIRD, *_ = RECIPES
CHAT = "/v1/chat/completions"
Call = tuple[str, str, dict[str, Any]]
OPEN_PATHS = {"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def _body(model: str = "base", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6, **fields}


def _headers(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def _send(site: Site, *calls: Call, secret: str | None = None, is_up: bool = True) -> list[httpx.Response]:
    """Send method, path and options, one after the other."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        responses = []
        for method, path, options in calls:
            given = {"headers": _headers(secret)} if secret is not None else {}
            responses.append(await http.request(method, path, **{**given, **options}))
        return responses

    return on_site(site, scenario, is_up=is_up)


def _chat(site: Site, secret: str | None = None, *, is_up: bool = True, **fields: Any) -> httpx.Response:
    (response,) = _send(site, ("POST", CHAT, {"json": _body(**fields)}), secret=secret, is_up=is_up)
    return response


def _error(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert response.headers["x-request-id"].startswith("req_")
    return error


def _answer(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code; no code where it is no error."""
    return response.status_code, _error(response)["code"] if response.is_error else None


# What routes declare -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tiny_folders: dict[str, Path], tmp_path: Path) -> FastAPI:
    """The app as it is served, LitServe's own routes included."""
    core = tiny_settings(tiny_folders["llama"], home=tmp_path)
    app: FastAPI = build_server(core, ServeSettings.load(tmp_path), router, lambda app, spec: None).app
    return app


def test_every_route_declares_its_scope_when_the_app_is_read(served: FastAPI) -> None:
    """Those of the OpenAPI document too, and none is open but those that are meant to be."""
    access = read_access(served)
    assert [] == [route.path for route in access if not route.is_open and not route.scopes]
    assert {route.path for route in access if route.is_open} == OPEN_PATHS
    declared = {(route.path, method.lower()) for route in access for method in route.methods}
    documented = {(path, method) for path, item in served.openapi()["paths"].items() for method in item}
    assert len(documented) >= 7
    assert set() == documented - declared


def test_openapi_says_which_routes_take_a_key_when_it_is_read(served: FastAPI) -> None:
    """Generated clients send one where it is asked for."""
    document = served.openapi()
    scheme = document["components"]["securitySchemes"]["api_key"]
    assert ("http", "bearer") == (scheme["type"], scheme["scheme"])
    secured = {
        (path, method)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if operation.get("security")
    }
    expected = {
        (route.path, method.lower()) for route in read_access(served) for method in route.methods if not route.is_open
    }
    assert expected == secured


def test_route_is_refused_to_all_when_it_declares_no_scope(site: Site) -> None:
    """Forgetting the declaration opens nothing."""

    @site.app.get("/forgotten")
    async def forgotten() -> None:
        """Never called."""

    (response,) = _send(site, ("GET", "/forgotten", {}))
    assert (403, "insufficient_scope") == _answer(response)


# Without keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost"},
        {"host": "localhost:8000"},
        {"host": "127.0.0.1:8000"},
        {"host": "[::1]:8000"},
        {"host": "LOCALHOST:1"},
        {"origin": "http://localhost:3000"},
        {"origin": "https://127.0.0.1"},
        {"sec-fetch-site": "same-origin"},
        {"authorization": "Bearer unused"},
        {"authorization": "Basic eDp5"},
    ],
)
def test_local_request_is_answered_when_there_are_no_keys(headers: dict[str, str], site: Site) -> None:
    """With every scope, whatever key a client was told to send."""
    chat, metrics = _send(
        site,
        ("POST", CHAT, {"json": _body(), "headers": headers}),
        ("GET", "/metrics", {"headers": headers}),
    )
    assert (200, 200) == (chat.status_code, metrics.status_code)
    assert not any(name.startswith("x-ratelimit") for name in chat.headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "localhost:8000.evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "192.168.1.5:8000"},
        {"host": "0.0.0.0:8000"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "http://localhost.evil.example"},
        {"origin": "http://localhost@evil.example"},
        {"origin": "null"},
        {"origin": "file://"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"x-forwarded-for": "10.0.0.9"},
        {"x-forwarded-host": "localhost"},
        {"x-real-ip": "127.0.0.1"},
        {"forwarded": "for=10.0.0.9"},
    ],
)
def test_foreign_request_is_403_when_there_are_no_keys(headers: dict[str, str], site: Site) -> None:
    """A web page in the user's browser, and a proxy in front, can't drive an open server; not even read it."""
    responses = _send(
        site,
        ("POST", CHAT, {"json": _body(), "headers": headers}),
        ("POST", CHAT, {"content": b"{", "headers": headers}),
        ("GET", "/v1/models", {"headers": headers}),
        ("GET", "/nowhere", {"headers": headers}),
    )
    assert [(403, "forbidden_origin")] * 4 == [_answer(response) for response in responses]
    assert [] == site.transport.commands
    (health,) = _send(site, ("GET", "/health", {"headers": headers}))
    assert 200 == health.status_code


def test_host_is_refused_when_it_is_sent_twice_or_not_at_all(site: Site) -> None:
    """Which of two a proxy or a framework believes is anybody's guess."""

    async def call(hosts: list[bytes]) -> int:
        statuses: list[int] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/v1/models",
            "raw_path": b"/v1/models",
            "query_string": b"",
            "headers": [(b"host", host) for host in hosts],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "root_path": "",
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        await site.app(scope, receive, send)
        return statuses[0]

    counts: tuple[list[bytes], ...] = (
        [],
        [b"localhost", b"evil.example"],
        [b"localhost", b"localhost"],
        [b"localhost"],
    )
    assert [403, 403, 403, 200] == [asyncio.run(call(hosts)) for hosts in counts]


def test_nobody_passes_when_others_can_reach_a_server_without_keys(site: Site) -> None:
    """It refuses to start like that; should its keys vanish later, it is not open either."""
    app = FastAPI()
    app.add_middleware(AuthMiddleware, is_loopback=False)
    app.add_middleware(RequestIdMiddleware)
    install_error_handlers(app)
    app.include_router(router)
    app.state.services = site.app.state.services

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get("/v1/models")

    assert (401, "invalid_api_key") == _answer(asyncio.run(call()))


# With keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer unused",
        "Basic {secret}",
        "{secret}",
        "Bearer {secret}x",
        "Bearer {revoked}",
    ],
)
def test_request_is_401_when_its_key_is_missing_or_wrong(authorization: str | None, site: Site) -> None:
    """Before its body is read; unknown paths too; whoever is only alive or ready to be asked still answers."""
    _, secret = site.keys.create("web", scopes=SCOPES)
    revoked, revoked_secret = site.keys.create("old", scopes=SCOPES)
    site.keys.revoke(revoked.id)
    headers = {}
    if authorization is not None:
        headers["authorization"] = authorization.format(secret=secret, revoked=revoked_secret)
    *refused, health, ready = _send(
        site,
        ("POST", CHAT, {"json": _body(), "headers": headers}),
        ("POST", CHAT, {"content": b"{", "headers": headers}),
        ("GET", "/v1/models", {"headers": headers}),
        ("GET", "/metrics", {"headers": headers}),
        ("GET", "/nowhere", {"headers": headers}),
        ("DELETE", "/v1/models", {"headers": headers}),
        ("GET", "/health", {"headers": headers}),
        ("GET", "/ready", {"headers": headers}),
    )
    for response in refused:
        assert (401, "invalid_api_key") == _answer(response)
        assert "Bearer" == response.headers["www-authenticate"]
        assert "invalid_request_error" == _error(response)["type"]
    assert [] == site.transport.commands
    assert (200, 200) == (health.status_code, ready.status_code)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_request_is_answered_when_its_key_is_valid(scheme: str, site: Site) -> None:
    """From wherever it comes: who has the key is no foreign page."""
    _, secret = site.keys.create("web", scopes=["chat"])
    headers = {"authorization": f"{scheme} {secret}", "host": "llm.example", "x-forwarded-for": "10.0.0.9"}
    chat, nowhere, wrong = _send(
        site,
        ("POST", CHAT, {"json": _body(), "headers": headers}),
        ("GET", "/nowhere", {"headers": headers}),
        ("PUT", "/v1/models", {"headers": headers}),
    )
    assert (200, 404, 405) == (chat.status_code, nowhere.status_code, wrong.status_code)


def test_keys_count_at_once_when_they_are_made_or_revoked_while_the_server_runs(site: Site) -> None:
    """The first key closes the open server; a revoked one opens nothing; the last one opens it to nobody."""
    assert 200 == _chat(site).status_code
    key, secret = site.keys.create("web", scopes=["chat"])
    assert (401, 200) == (_chat(site).status_code, _chat(site, secret).status_code)
    site.keys.revoke(key.id)
    assert (401, 401) == (_chat(site).status_code, _chat(site, secret).status_code)


def _scoped_calls(app: FastAPI) -> list[RouteAccess]:
    return [route for route in read_access(app) if not route.is_open]


@pytest.mark.parametrize("scope", SCOPES)
def test_route_is_403_when_the_key_lacks_its_scope(scope: Scope, site: Site) -> None:
    """Each scope opens the routes that declare it, and no other."""
    _, secret = site.keys.create("web", scopes=[scope])
    routes = _scoped_calls(site.app)
    calls: list[Call] = [(sorted(route.methods)[0], route.path.replace("{name}", "base"), {}) for route in routes]
    assert len(calls) >= 5
    for route, response in zip(routes, _send(site, *calls, secret=secret), strict=True):
        is_refused = response.status_code == 403
        assert (route.scopes != {scope}) == is_refused, route
        if is_refused:
            assert "insufficient_scope" == _error(response)["code"]
            assert next(iter(route.scopes)) in _error(response)["message"]


# Keys that are limited to aliases ------------------------------------------------------------------------------------


def test_hidden_alias_is_404_exactly_like_an_absent_one_when_a_key_is_limited(site: Site) -> None:
    """By every way to name it; status, code and words are the same."""
    hidden = site.publish("medical", FIRST).version.digest
    site.publish("medical", SECOND)
    site.experiments.create("medical", [("A", "v1", 50), ("B", "v2", 50)])
    site.publish("legal", THIRD)
    _, secret = site.keys.create("web", scopes=["chat"], aliases=["legal"])
    for suffix in ("", "@v1", "@v9", f"@{hidden[:12]}"):
        answers = []
        for alias in ("medical", "nobody"):
            response = _chat(site, secret, model=alias + suffix)
            (model,) = _send(site, ("GET", f"/v1/models/{alias}{suffix}", {}), secret=secret)
            assert [(404, "model_not_found")] * 2 == [_answer(response), _answer(model)]
            answers.append([_error(item)["message"].replace(alias, "X") for item in (response, model)])
        assert answers[0] == answers[1]
        assert "medical" not in str(answers[1])
    assert (404, "model_not_found") == _answer(_chat(site, secret, model="base"))
    assert 200 == _chat(site, secret, model="legal").status_code


def test_models_leave_out_hidden_aliases_when_a_key_is_limited(site: Site) -> None:
    """Aliases and their versions; the base model is named like an alias."""
    for alias in ("legal", "medical"):
        site.publish(alias, FIRST)
    _, secret = site.keys.create("web", scopes=["chat"], aliases=["legal"])
    _, with_base = site.keys.create("all", scopes=["chat"], aliases=["base", "medical"])
    listed = [
        [model["id"] for model in _send(site, ("GET", "/v1/models", {}), secret=given)[0].json()["data"]]
        for given in (secret, with_base)
    ]
    assert [["legal", "legal@v1"], ["base", "tiny", "medical", "medical@v1"]] == listed


def test_feedback_is_404_when_its_response_is_a_hidden_aliass(site: Site) -> None:
    """As if there were no such response."""
    for alias in ("legal", "medical"):
        site.publish(alias, FIRST)
    _, everything = site.keys.create("all", scopes=["chat"])
    _, secret = site.keys.create("web", scopes=["feedback"], aliases=["legal"])
    ids = {alias: _chat(site, everything, model=alias).json()["id"] for alias in ("legal", "medical")}
    bodies = [{"id": response, "metric": "ok", "value": 1} for response in (*ids.values(), "chatcmpl-x")]
    answers = _send(site, *(("POST", "/v1/feedback", {"json": body}) for body in bodies), secret=secret)
    assert [(200, None), (404, "not_found"), (404, "not_found")] == [_answer(answer) for answer in answers]


# What a request's key is used for ------------------------------------------------------------------------------------


def test_engine_is_fair_by_key_when_requests_have_one(site: Site) -> None:
    """The key's id is the client; all who are local are one client."""
    _chat(site)
    key, secret = site.keys.create("web", scopes=["chat"])
    _chat(site, secret)
    submitted = [command for command in site.transport.commands if isinstance(command, SubmitCommand)]
    assert ["", key.id] == [command.request.client for command in submitted]


def test_log_names_the_key_when_a_request_is_answered(site: Site) -> None:
    """And never its secret."""
    capture = structlog.testing.LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    _chat(site)
    key, secret = site.keys.create("web", scopes=["chat"])
    _chat(site, secret)
    answered = [entry for entry in capture.entries if entry["event"] == "chat_answered"]
    assert ["local", key.id] == [entry["key"] for entry in answered]
    assert secret[16:] not in str(capture.entries)


def test_last_use_is_written_once_when_a_key_is_used_several_times_in_a_minute(site: Site) -> None:
    """One write a minute, however many requests there are."""
    key, secret = site.keys.create("web", scopes=["chat"])

    async def used_after(http: httpx.AsyncClient) -> Any:
        await http.get("/v1/models", headers=_headers(secret))
        while (found := site.keys.list()[0].last_used_at) is None:
            await asyncio.sleep(0)
        with site.keys.database.write() as session:
            session.get_one(ApiKeyRow, key.id).last_used_at = None
        for _ in range(3):
            await http.get("/v1/models", headers=_headers(secret))
        return found

    assert on_site(site, used_after) >= key.created_at
    assert None is site.keys.list()[0].last_used_at


def test_audit_names_key_and_request_when_a_route_acts(site: Site) -> None:
    """Whatever a route does with the services that it is given is done on behalf of the caller."""
    site.publish("legal", FIRST)
    acting = APIRouter(dependencies=[needs("adapters")])

    @acting.post("/act")
    async def act(services: CurrentServices) -> None:
        await asyncio.to_thread(services.registry.promote, "legal@v1")

    site.app.include_router(acting)
    key, secret = site.keys.create("ops", scopes=["adapters"])
    (response,) = _send(site, ("POST", "/act", {}), secret=secret)
    assert 200 == response.status_code
    entry = AuditLog(site.registry.database).list(limit=1)[0]
    assert ("promote", key.id, response.headers["x-request-id"]) == (entry.action, entry.actor, entry.request_id)


# Limits --------------------------------------------------------------------------------------------------------------


def test_request_is_429_when_the_keys_minute_is_used_up(site: Site) -> None:
    """With the headers that clients wait by; another key is not concerned."""
    _, secret = site.keys.create("web", scopes=["chat"], limits=KeyLimits(requests_per_minute=2))
    _, other = site.keys.create("other", scopes=["chat"])
    call: Call = ("GET", "/v1/models", {})
    first, second, refused = _send(site, call, call, call, secret=secret)
    assert [(200, "1"), (200, "0")] == [
        (response.status_code, response.headers["x-ratelimit-remaining-requests"]) for response in (first, second)
    ]
    assert ((429, "rate_limit_exceeded"), "rate_limit_error") == (_answer(refused), _error(refused)["type"])
    assert ("true", "2", "0") == tuple(
        refused.headers[name]
        for name in ("x-should-retry", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
    )
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert 200 == _send(site, call, secret=other)[0].status_code


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_429_when_the_keys_tokens_are_used_up(stream: bool, site: Site) -> None:
    """The prompt counts when it is admitted, the answer when it ends; a refused request leaves no exposure."""
    num_prompt = len(site.prompt("hello there"))
    _, secret = site.keys.create("web", scopes=["chat"], limits=KeyLimits(tokens_per_minute=num_prompt))
    fine = _chat(site, secret, stream=stream, ignore_eos=True)
    refused = _chat(site, secret, stream=stream)
    assert ((200, None), (429, "rate_limit_exceeded")) == (_answer(fine), _answer(refused))
    assert (str(num_prompt), "0") == tuple(
        fine.headers[f"x-ratelimit-{what}-tokens"] for what in ("limit", "remaining")
    )
    # 6 tokens of the answer are owed, and the whole prompt has to flow in.
    assert 60 < int(refused.headers["retry-after"]) <= 60 + 60 * 6 // num_prompt + 1
    assert 1 == len(site.exposures())


def test_prompts_tokens_are_not_counted_when_the_engine_does_not_take_it(site: Site) -> None:
    """What was not computed is not used up."""
    _, secret = site.keys.create("web", scopes=["chat"], limits=KeyLimits(tokens_per_minute=1000))
    response = _chat(site, secret, is_up=False)
    assert (503, "1000") == (response.status_code, response.headers["x-ratelimit-remaining-tokens"])


def test_request_is_429_when_the_keys_other_requests_are_running(site: Site) -> None:
    """Until one of them ends; streams count to their end."""
    _, secret = site.keys.create("web", scopes=["chat"], limits=KeyLimits(max_concurrent=1))
    site.transport.permits = 3

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        headers = _headers(secret)
        running = asyncio.create_task(http.post(CHAT, json=_body(stream=True), headers=headers))
        while site.client.num_in_flight < 1:
            await asyncio.sleep(0)
        refused = await http.get("/v1/models", headers=headers)
        site.transport.permits = None
        return [refused, await running, await http.get("/v1/models", headers=headers)]

    refused, streamed, fine = on_site(site, scenario)
    assert (429, "rate_limit_exceeded") == _answer(refused)
    assert ("1", "true") == (refused.headers["retry-after"], refused.headers["x-should-retry"])
    assert (200, 200) == (streamed.status_code, fine.status_code)


# The unmodified OpenAI client ----------------------------------------------------------------------------------------


def _with_openai(site: Site, secret: str, scenario: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run(http: httpx.AsyncClient) -> Any:
        transport = httpx2.ASGITransport(app=site.app)
        async with (
            httpx2.AsyncClient(transport=transport) as own,
            openai.AsyncOpenAI(
                api_key=secret, base_url="http://localhost/v1", http_client=own, max_retries=0
            ) as client,
        ):
            return await scenario(client)

    return on_site(site, run)


def test_openai_client_raises_its_own_errors_when_a_key_does_not_suffice(site: Site) -> None:
    """Wrong key, missing scope, hidden alias, used-up limit: each has a class of its own in the SDK."""
    site.publish("legal", FIRST)
    _, admin = site.keys.create("ops", scopes=["admin"])
    _, limited = site.keys.create("web", scopes=["chat"], aliases=["legal"], limits=KeyLimits(requests_per_minute=2))

    def ask(model: str) -> Callable[[openai.AsyncOpenAI], Awaitable[Any]]:
        return lambda client: client.chat.completions.create(**_body(model))

    with pytest.raises(openai.AuthenticationError) as wrong:
        _with_openai(site, "hs-wrong", ask("legal"))
    with pytest.raises(openai.PermissionDeniedError) as unfit:
        _with_openai(site, admin, ask("legal"))
    with pytest.raises(openai.NotFoundError) as hidden:
        _with_openai(site, limited, ask("base"))
    assert _with_openai(site, limited, ask("legal")).choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.RateLimitError) as used_up:
        _with_openai(site, limited, ask("legal"))
    assert ["invalid_api_key", "insufficient_scope", "model_not_found", "rate_limit_exceeded"] == [
        info.value.code for info in (wrong, unfit, hidden, used_up)
    ]
    assert "0" == used_up.value.response.headers["x-ratelimit-remaining-requests"]
