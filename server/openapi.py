"""The OpenAPI document: what FastAPI can't know of our routes, beside what it reads from their types.

Every error leaves in one envelope with its own status, never as FastAPI's 422; some answers are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

__all__ = ["describe_api"]

_DESCRIPTION = """One 4-bit base model, one LoRA adapter per domain, swapped live.

The routes of OpenAI's API take and give what its clients send and read; `openai` works unchanged. Errors come in one
envelope; `code` says what kind, `param` where. `x-request-id` names the request in the server's log. A 429 or 503
carries `retry-after`, and nothing was started."""
_ERROR = {
    "type": "object",
    "description": "The one envelope that every error comes in.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"], "description": "What kind of error, for programs."},
            },
        }
    },
    "examples": [
        {
            "error": {
                "message": "version: Field required",
                "type": "invalid_request_error",
                "param": "version",
                "code": "invalid_value",
            }
        }
    ],
}
_ERRORS = {
    "400": "The request is wrong; `param` says where.",
    "401": "An API key is required, or the one that was sent is not valid.",
    "403": "The key may not do this, or a server without keys was not asked from its own machine.",
    "404": "There is no such alias, version, experiment, shadow, response, model, file or job.",
    "409": "The request is fine, the present state forbids it.",
    "413": "The body is larger than the server takes.",
    "429": "Too much at once; nothing was started.",
    "503": "The engine is starting or draining, or the database is held by others; nothing was started.",
    "default": "Any other error.",
}
_OF_BODIES = frozenset({"400", "409", "413", "429", "503"})


def _completion(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string", "enum": [kind]},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object"}},
            "usage": {"type": "object"},
        },
    }


# Answers that the routes write themselves.
_ANSWERS: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "post"): {
        "application/json": {"schema": _completion("chat.completion")},
        "text/event-stream": {"schema": {"type": "string", "description": "With `stream`: chunks, then [DONE]."}},
    },
    ("/v1/completions", "post"): {
        "application/json": {"schema": _completion("text_completion")},
        "text/event-stream": {"schema": {"type": "string", "description": "With `stream`: chunks, then [DONE]."}},
    },
    ("/v1/files/{file_id}/content", "get"): {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
    ("/v1/fine_tuning/jobs/{job_id}/events", "get"): {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string", "description": "With `stream`: events, then [DONE]."}},
    },
    ("/metrics", "get"): {"text/plain": {"schema": {"type": "string"}}},
}


def describe_api(app: FastAPI) -> None:
    """Give the app its title, and a document that tells of every answer; call it before the first request."""
    app.title = "Hotswap"
    app.description = _DESCRIPTION
    app.version = version("hotswap")
    app.openapi = _completed(app.openapi)  # type: ignore[method-assign]  # FastAPI's documented way


def _completed(generate: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def openapi() -> dict[str, Any]:
        document = generate()  # FastAPI makes it once
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Error" not in schemas:
            schemas["Error"] = _ERROR
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _complete(operation, path, method)
        return document

    return openapi


def _complete(operation: dict[str, Any], path: str, method: str) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if "security" in operation:
        operation["security"].append({})  # a server without keys answers its own machine without one
    if content := _ANSWERS.get((path, method)):
        responses["200"]["content"] = content
    for status, description in _ERRORS.items():
        if status in _possible_errors(operation, method):
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            responses.setdefault(status, {"description": description, "content": content})


def _possible_errors(operation: dict[str, Any], method: str) -> set[str]:
    parameters = operation.get("parameters", [])
    errors = {"default"}
    if "security" in operation:
        errors |= {"401", "403"}
    if parameters:
        errors.add("400")
    if any(parameter["in"] == "path" for parameter in parameters):
        errors.add("404")
    if "requestBody" in operation or method != "get":
        errors |= _OF_BODIES
    return errors
