"""From exceptions to HTTP answers: one table, complete by test, and one envelope for every route."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapters import errors as core
from server.calls import headers_of
from server.observe import request_id_of
from server.schemas import error_body

if TYPE_CHECKING:
    from adapters.records import Binding
    from server.services import Services

__all__ = ["ANSWERS", "Answer", "answer_error", "count_error", "describe_error", "install_error_handlers"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of error looks on the wire.

    `is_public` False hides the message: it may name files. `should_retry` is sent as `x-should-retry`, which OpenAI's
    clients obey before they look at the status; None leaves it to the status.
    """

    status: int
    kind: str
    code: str
    is_public: bool = True
    should_retry: bool | None = None


# The most specific class of an exception's ancestry decides.
ANSWERS: dict[type[core.HotswapError], Answer] = {
    core.HotswapError: Answer(500, "server_error", "internal_error", is_public=False),
    core.InvalidInputError: Answer(400, "invalid_request_error", "invalid_value"),
    core.InvalidNameError: Answer(404, "invalid_request_error", "model_not_found"),
    core.ConfigurationError: Answer(500, "server_error", "configuration_error", is_public=False),
    core.DataError: Answer(400, "invalid_request_error", "invalid_data"),
    core.PromptTooLongError: Answer(400, "invalid_request_error", "context_length_exceeded"),
    core.AdapterRejectedError: Answer(400, "invalid_request_error", "adapter_invalid"),
    core.FingerprintMismatchError: Answer(400, "invalid_request_error", "fingerprint_mismatch"),
    core.RankTooHighError: Answer(400, "invalid_request_error", "rank_too_high"),
    core.AdapterConfigError: Answer(400, "invalid_request_error", "adapter_config_unsupported"),
    core.AdapterWeightsError: Answer(400, "invalid_request_error", "adapter_weights_invalid"),
    core.AdapterManifestError: Answer(400, "invalid_request_error", "adapter_manifest_invalid"),
    core.AdapterLoadError: Answer(500, "server_error", "adapter_rejected"),
    core.NotFoundError: Answer(404, "invalid_request_error", "not_found"),
    core.AuthenticationError: Answer(401, "invalid_request_error", "invalid_api_key"),
    core.PermissionDeniedError: Answer(403, "invalid_request_error", "insufficient_scope"),
    core.AliasForbiddenError: Answer(403, "invalid_request_error", "alias_not_allowed"),
    core.ForeignPageError: Answer(403, "invalid_request_error", "forbidden_origin"),
    # OpenAI's clients repeat a 409 by themselves; the state that forbids the request is not one that passes.
    core.ConflictError: Answer(409, "invalid_request_error", "conflict", should_retry=False),
    core.FeedbackTooLateError: Answer(409, "invalid_request_error", "feedback_too_late", should_retry=False),
    core.IntegrityError: Answer(500, "server_error", "integrity_error", is_public=False),
    core.DatabaseBusyError: Answer(503, "server_error", "database_busy", should_retry=True),
    # Clients would repeat it at once; until somebody makes room it fails again.
    core.StorageFullError: Answer(507, "server_error", "storage_full", should_retry=False),
    core.BaseModelError: Answer(500, "server_error", "base_model_error", is_public=False),
    core.OverloadedError: Answer(429, "rate_limit_error", "overloaded", should_retry=True),
    core.RateLimitError: Answer(429, "rate_limit_error", "rate_limit_exceeded", should_retry=True),
    core.EngineUnavailableError: Answer(503, "server_error", "engine_unavailable", should_retry=True),
    core.EngineFailureError: Answer(500, "server_error", "engine_failure"),
    # The time was the server's to keep, so not 408. Clients would retry a 504 at once, and the same request that took
    # all its time would most likely do so again, on a server that is busy: so they are told not to.
    core.DeadlineExceededError: Answer(504, "server_error", "deadline_exceeded", should_retry=False),
    core.OutOfMemoryError: Answer(500, "server_error", "out_of_memory"),
    core.TrainingDivergedError: Answer(500, "server_error", "training_diverged"),
}
_HIDDEN_MESSAGE = "the server failed to answer; its log has the reason under this request's id"
_RETRY_SOON_S = 2


def describe_error(error: core.HotswapError) -> tuple[Answer, dict[str, Any]]:
    """The answer's row in the table and the body in the envelope."""
    answer = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    message = str(error) if answer.is_public else _HIDDEN_MESSAGE
    return answer, error_body(message, kind=answer.kind, param=getattr(error, "param", None), code=answer.code)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of every route leave in the envelope."""
    app.add_exception_handler(core.HotswapError, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unknown)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to one of our own errors; for a route's errors FastAPI calls it, middleware has to."""
    assert isinstance(error, core.HotswapError)
    answer, body = describe_error(error)
    count_error(request, answer.code)
    headers = _binding_headers(request)
    if answer.should_retry is not None:
        headers["x-should-retry"] = str(answer.should_retry).lower()
    if isinstance(error, core.OverloadedError):
        headers["retry-after"] = str(error.retry_after_s)
    elif answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    elif answer.status == 503:
        headers["retry-after"] = str(_RETRY_SOON_S)
    if answer.status in (500, 507):
        told = "; ".join([str(error), *getattr(error, "__notes__", ())])
        _log.error("request_failed", path=request.url.path, error=told, kind=type(error).__name__)
    return JSONResponse(body, status_code=answer.status, headers=headers)


def _binding_headers(request: Request) -> dict[str, str]:
    """Those that say what was to answer, as on good answers, if the route has bound the request to anything."""
    binding: Binding | None = getattr(request.state, "binding", None)
    return {} if binding is None else headers_of(binding)


def count_error(request: Request, code: str) -> None:
    """Count an error answer, under the version that the route has bound the request to, if it got so far."""
    services: Services | None = getattr(request.app.state, "services", None)
    if services is not None:
        services.metrics.count_error(code, getattr(request.state, "binding", None))


async def _answer_invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = None if first["type"] == "json_invalid" else _field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        message, code = f"unknown or unsupported field {param!r}", "unknown_field"
    elif first["loc"] == ("body",) and not _is_json(request):
        message, code = "expected a JSON object, sent with the header content-type: application/json", "invalid_value"
    else:
        reason = first["msg"].removeprefix("Value error, ")  # pydantic's prefix for our own words
        message, code = (f"{param}: {reason}" if param else reason), "invalid_value"
    count_error(request, code)
    return JSONResponse(error_body(message, kind="invalid_request_error", param=param, code=code), status_code=400)


def _is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "")


def _field_path(location: Sequence[int | str]) -> str | None:
    """The field's path as a client wrote it, without where it stands and pydantic's names for members of a union."""
    start = 1 if location[:1] in (("body",), ("query",), ("path",)) else 0
    parts = [str(part) for part in location[start:] if not re.search(r"[\[-]", str(part))]
    return ".".join(part for part in parts if part not in ("str", "bool", "int", "float")) or None


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    count_error(request, f"http_{error.status_code}")
    body = error_body(f"{error.detail}: {request.method} {request.url.path}", kind="invalid_request_error")
    answer = JSONResponse(body, status_code=error.status_code, headers=error.headers)
    if error.status_code == 405:
        answer.headers["allow"] = ", ".join(sorted(_methods_of(request)))
    return answer


def _methods_of(request: Request) -> set[str]:
    """Every method that the path takes: Starlette names those of the first route alone."""
    scope = {"type": "http", "path": request.url.path, "root_path": "", "headers": []}
    found: set[str] = set()
    for route in request.app.routes:
        for method in getattr(route, "methods", None) or ():
            if route.matches({**scope, "method": method})[0] is Match.FULL:
                found.add(method)
    return found


async def _answer_unknown(request: Request, error: Exception) -> JSONResponse:
    _log.error("request_crashed", path=request.url.path, exc_info=error)
    count_error(request, "internal_error")
    # This handler runs outside of all middleware, so the id is put on here.
    headers = {"x-request-id": f"req_{request_id_of(request.scope)}"} | _binding_headers(request)
    body = error_body(_HIDDEN_MESSAGE, kind="server_error", code="internal_error")
    return JSONResponse(body, status_code=500, headers=headers)
