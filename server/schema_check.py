"""Checks JSON schemas that clients send before an engine sees them.

A schema may take for ever to compile, or all memory. So each is tried once in a child process with limits of both; what
the child can't do is refused.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from adapters.errors import InvalidInputError, OverloadedError
from server.engine import grammar

__all__ = ["SchemaChecker", "schema_text"]

_log = structlog.get_logger(__name__)

_PARAM = "response_format"
_MAX_SCHEMA_BYTES = 65_536
_MAX_DEPTH = 64  # of the schema's JSON: objects and arrays in each other, two for each level of a nested object
_MAX_CHECKS = 2  # at once
_MAX_WAITING = 16
_MAX_KNOWN = 256
_TIMEOUT_S = 5 * grammar.MAX_CHECK_S  # the limit itself is one of processor time; on a busy machine that takes longer


class SchemaChecker:
    """Finds out whether schemas can be compiled, and remembers those that can. Use it from one event loop only."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_MAX_CHECKS, thread_name_prefix="schema-check")
        self._good: OrderedDict[tuple[str, bool], None] = OrderedDict()
        self._num_waiting = 0

    async def check(self, schema: str) -> None:
        """Return if a schema, given as text, can be compiled. A first look takes about 0.1 s.

        Raises:
            InvalidInputError: it can't; says why.
            OverloadedError: too many schemas are being looked at.
        """
        await self._check(schema, is_grammar=False, what="the JSON schema", param=_PARAM)

    async def check_grammar(self, grammar: str, *, param: str) -> None:
        """Return if a grammar that has clients' schemas in it can be compiled; `param` names the field with them.

        Raises:
            InvalidInputError: it can't; says why.
            OverloadedError: too many schemas are being looked at.
        """
        await self._check(grammar, is_grammar=True, what="a JSON schema in it", param=param)

    async def _check(self, text: str, *, is_grammar: bool, what: str, param: str) -> None:
        if (text, is_grammar) not in self._good and (problem := await self._look_at(text, is_grammar)):
            raise InvalidInputError(f"{param}: {what} can't be followed: {problem}", param=param)
        self._good[text, is_grammar] = None
        self._good.move_to_end((text, is_grammar))
        if len(self._good) > _MAX_KNOWN:
            self._good.popitem(last=False)

    async def _look_at(self, text: str, is_grammar: bool) -> str:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} JSON schemas are being checked, as many as this server takes")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, _find_problem, text, is_grammar)
        finally:
            self._num_waiting -= 1


def schema_text(schema: dict[str, Any] | list[dict[str, Any]], *, param: str = _PARAM) -> str:
    """A schema, or several, as text, so that equal schemas are equal; `param` names the field that they came in.

    Raises:
        InvalidInputError: it is too large or too deep.
    """
    if _depth_exceeds(schema, _MAX_DEPTH):
        raise InvalidInputError(f"{param}: the JSON schema is nested deeper than {_MAX_DEPTH} levels", param=param)
    text = json.dumps(schema, separators=(",", ":"))
    if len(text) > _MAX_SCHEMA_BYTES:
        found = f"the JSON schema takes {len(text)} bytes, but may take {_MAX_SCHEMA_BYTES}"
        raise InvalidInputError(f"{param}: {found}", param=param)
    return text


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether objects and arrays are nested deeper; level by level, since recursion has limits of its own."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _find_problem(text: str, is_grammar: bool) -> str:
    """Why a schema or a grammar can't be used; empty if it can."""
    command = [sys.executable, "-P", str(Path(grammar.__file__))]  # -P: the file's neighbours are no modules of its own
    command += ["--grammar"] if is_grammar else []
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if result.returncode != 0:
        _log.warning("schema_check_failed", returncode=result.returncode, stderr=result.stderr[-500:])
        return "it is too complex to compile"
    return " ".join(result.stdout.removesuffix("<non-verbose/>").split())[:300]
