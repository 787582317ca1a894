"""Who may call what: API keys, scopes, and the rule that a server without keys answers this machine alone.

Every route declares its scope (`needs`) or that it is open to everybody (`open_to_all`). `AuthMiddleware` enforces it
before anything of the body is read; a route that declares nothing is refused to all.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from fastapi import Depends, FastAPI, Request, Security
from fastapi.params import Depends as DependsParam
from fastapi.params import Security as SecurityParam
from fastapi.routing import RouteContext, iter_route_contexts
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AuthenticationError, ForeignPageError, HotswapError, PermissionDeniedError
from adapters.keys import KeyService, parse_scope
from adapters.records import ApiKey
from adapters.records import Scope as KeyScope
from server.callers import Caller, Meter, Meters
from server.errors import answer_error

__all__ = ["AuthMiddleware", "RouteAccess", "caller_of", "needs", "open_to_all", "read_access"]

_log = structlog.get_logger(__name__)

_BEARER = HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key: `hs-...`")
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
# FastAPI's own routes: what this program can do is no secret. They have no dependencies to declare a scope by.
_DOCUMENTATION_PATHS = frozenset({"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
_NOTE_USE_EVERY_S = 60.0
_STATE_KEY = "hotswap_caller"


async def _anybody() -> None:
    """Marks a route as open to everybody."""


def needs(scope: KeyScope) -> SecurityParam:
    """Declare what a key needs for a route, or for all routes of a router: `dependencies=[needs("chat")]`."""
    return Security(_BEARER, scopes=[scope])  # type: ignore[no-any-return]  # FastAPI types it as what it injects


def open_to_all() -> DependsParam:
    """Declare that a route asks for no key, no Host and no Origin: `dependencies=[open_to_all()]`.

    Nobody is known to be calling there, so that such a route can't have `CurrentServices`.
    """
    return Depends(_anybody)  # type: ignore[no-any-return]  # FastAPI types it as what it injects


@dataclass(frozen=True, slots=True)
class RouteAccess:
    """What one route declares. Not open and without scopes means that it declares nothing.

    `path` is as the OpenAPI document has it: the kinds of its parameters are left to `pattern`.
    """

    path: str
    methods: frozenset[str]
    pattern: re.Pattern[str]
    is_open: bool
    scopes: frozenset[KeyScope]


def read_access(app: FastAPI) -> list[RouteAccess]:
    """What every route of the app declares, in the order in which they are matched."""
    return [_access_of(context) for context in iter_route_contexts(app.routes) if context.path is not None]


def _access_of(context: RouteContext) -> RouteAccess:
    path = context.path or ""
    dependencies: Sequence[DependsParam] = getattr(context, "dependencies", ())
    scopes = [s for item in dependencies if isinstance(item, SecurityParam) for s in item.scopes or ()]
    return RouteAccess(
        path=re.sub(r":[a-z]+}", "}", path),
        methods=frozenset(context.methods or ()),
        pattern=compile_path(path)[0],
        is_open=path in _DOCUMENTATION_PATHS or any(item.dependency is _anybody for item in dependencies),
        scopes=frozenset(parse_scope(scope) for scope in scopes),
    )


def caller_of(request: Request) -> Caller:
    """Who the middleware found to be calling."""
    caller: Caller = request.scope["state"][_STATE_KEY]
    return caller


class AuthMiddleware:
    """Finds out who calls, refuses who may not, and counts what each key takes.

    The keys are read from the database for every request, so that a key which is made or revoked counts at once.

    Args:
        app: What is called for those who may.
        is_loopback: Whether the server can be reached from this machine alone; otherwise nobody passes without a key.
    """

    def __init__(self, app: ASGIApp, *, is_loopback: bool) -> None:
        self._app = app
        self._is_loopback = is_loopback
        self._access: list[RouteAccess] | None = None
        self._meters = Meters()
        self._noted: dict[str, float] = {}
        self._notes: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access = self._find(scope)
        if access is not None and access.is_open:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        keys: KeyService = scope["app"].state.services.keys
        try:
            caller = await self._admit(request, keys, access)
        except HotswapError as error:
            await (await answer_error(request, error))(scope, receive, send)
            return
        await self._serve(caller, scope, receive, send)

    def _find(self, scope: Scope) -> RouteAccess | None:
        """What the route declares that will answer; None if none will."""
        if self._access is None:
            self._access = read_access(scope["app"])
        return next(
            (
                access
                for access in self._access
                if scope["method"] in access.methods and access.pattern.match(scope["path"])
            ),
            None,
        )

    async def _admit(self, request: Request, keys: KeyService, access: RouteAccess | None) -> Caller:
        """Who calls, if they may.

        Raises:
            AuthenticationError, ForeignPageError: nobody that is known here.
            PermissionDeniedError: a key without the scope, or a route that declares none.
        """
        key = await asyncio.to_thread(keys.authenticate, _bearer_of(request.headers))
        if key is None:
            self._check_local(request.headers)
            caller = Caller.local()
        else:
            caller = Caller(key, self._meters.of(key))
            self._note_use(keys, key)
        structlog.contextvars.bind_contextvars(key=caller.id)
        if access is not None:
            if not access.scopes:
                raise PermissionDeniedError(f"{access.path} declares no scope, so nobody may use it")
            caller.check_scopes(access.scopes)
        return caller

    def _check_local(self, headers: Headers) -> None:
        if not self._is_loopback:
            raise AuthenticationError("an API key is required; make one with: hotswap keys create NAME")
        _check_not_foreign(headers)

    async def _serve(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        send = _with_limits(send, caller.meter)
        try:
            caller.meter.begin_request()
        except HotswapError as error:
            await (await answer_error(Request(scope), error))(scope, receive, send)
            return
        scope["state"][_STATE_KEY] = caller
        try:
            await self._app(scope, receive, send)
        finally:
            caller.meter.end_request()

    def _note_use(self, keys: KeyService, key: ApiKey) -> None:
        """Have the key's last use written, at most once a minute, while the request goes on."""
        now = time.monotonic()
        if now - self._noted.get(key.id, -_NOTE_USE_EVERY_S) < _NOTE_USE_EVERY_S:
            return
        self._noted[key.id] = now
        task = asyncio.create_task(_note_use(keys, key.id))
        self._notes.add(task)  # the event loop keeps no reference of its own
        task.add_done_callback(self._notes.discard)


async def _note_use(keys: KeyService, key_id: str) -> None:
    try:
        await asyncio.to_thread(keys.note_use, key_id)
    except Exception:
        # A boundary: nobody awaits this task, and the request must not fail for it.
        _log.exception("key_use_not_noted", key=key_id)


def _bearer_of(headers: Headers) -> str | None:
    """The secret after `Bearer`; credentials of another scheme count as given, and as wrong."""
    value = headers.get("authorization")
    if value is None:
        return None
    scheme, _, secret = value.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _check_not_foreign(headers: Headers) -> None:
    """Refuse what a web page in a browser of this machine, or a proxy in front of it, may have sent.

    A page can make its own name resolve to 127.0.0.1 (DNS rebinding), but the browser then sends that name as Host, and
    it sends the page's Origin with whatever could change something.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _LOCAL_HOST.fullmatch(hosts[0]):
        raise _foreign("Host", hosts)
    origins = headers.getlist("origin")
    if not all(_LOCAL_ORIGIN.fullmatch(origin) for origin in origins):
        raise _foreign("Origin", origins)
    if headers.get("sec-fetch-site") == "cross-site":
        raise _foreign("Sec-Fetch-Site", ["cross-site"])
    for name in _FORWARDING_HEADERS:
        if name in headers:
            raise _foreign(name.title(), headers.getlist(name))


def _foreign(header: str, found: list[str]) -> ForeignPageError:
    return ForeignPageError(
        f"this server has no API keys and answers this machine alone: it expects requests to localhost, 127.0.0.1 or "
        f"[::1] from no other site and through no proxy, found {header} {', '.join(found)[:120]!r}; "
        "to serve others, make a key with: hotswap keys create NAME"
    )


def _with_limits(send: Send, meter: Meter) -> Send:
    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(meter.headers())
        await send(message)

    return send_with_limits
