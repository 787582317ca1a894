"""Whom a request counts for in experiments, and what its headers say about that. Units are hashes, never names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import InvalidInputError
from adapters.records import Unit
from adapters.registry import ARM_HEADER
from server.callers import Caller
from server.completion_schemas import CompletionRequest
from server.schemas import ChatRequest, GenerationOptions

__all__ = ["UNIT_HEADER", "ExperimentHeaders", "read_experiment_headers", "unit_of"]

UNIT_HEADER = "x-hotswap-unit"
_MAX_CHARS = 256
_HASH_CHARS = 32


@dataclass(frozen=True, slots=True)
class ExperimentHeaders:
    """What a client says beside the body: whom the request counts for, and which arm a tester wants."""

    unit: str | None = None
    arm: str | None = None


def read_experiment_headers(headers: Mapping[str, str], caller: Caller) -> ExperimentHeaders:
    """Read the headers that experiments know.

    Raises:
        InvalidInputError: one is empty or too long.
        PermissionDeniedError: an arm is asked for without the scope `experiments`.
    """
    found = {name: headers.get(name) for name in (UNIT_HEADER, ARM_HEADER)}
    for name, value in found.items():
        if value is not None and not 1 <= len(value) <= _MAX_CHARS:
            raise InvalidInputError(f"{name}: expected 1 to {_MAX_CHARS} characters, found {len(value)}", param=name)
    if found[ARM_HEADER] is not None:
        caller.check_scopes(frozenset({"experiments"}))
    return ExperimentHeaders(found[UNIT_HEADER], found[ARM_HEADER])


def unit_of(body: GenerationOptions, header: str | None) -> Unit:
    """Whom a request counts for: its `user`, else the header, else the conversation that it belongs to.

    A conversation is known by its first message of a user, which stays while it grows; of completions, by the prompt.
    A name is hashed, the same way wherever it stands: the database needs to tell users apart, no more.
    """
    if body.user is not None:
        return Unit(_hash(body.user.encode()), "user")
    if header is not None:
        return Unit(_hash(header.encode("latin-1")), "header")  # the bytes that were sent
    return Unit(_hash(f"conversation\0{_beginning_of(body)}".encode()), "conversation")


def _beginning_of(body: GenerationOptions) -> str:
    if isinstance(body, ChatRequest):
        return next((message.text for message in body.messages if message.role == "user"), body.messages[0].text)
    assert isinstance(body, CompletionRequest), "the only other request for an answer"
    return json.dumps(body.prompts[0])


def _hash(name: bytes) -> str:
    return hashlib.sha256(name).hexdigest()[:_HASH_CHARS]
