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
        self._good: OrderedDict[str, None] = OrderedDict()
        self._num_waiting = 0

    async def check(self, schema: str) -> None:
        """Return if a schema, given as text, can be compiled. A first look takes about 0.1 s.

        Raises:
            InvalidInputError: it can't; says why.
            OverloadedError: too many schemas are being looked at.
        """
        if schema not in self._good:
            await self._look_at(schema)
        self._good[schema] = None
        self._good.move_to_end(schema)
        if len(self._good) > _MAX_KNOWN:
            self._good.popitem(last=False)

    async def _look_at(self, schema: str) -> None:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} JSON schemas are being checked, as many as this server takes")
        self._num_waiting += 1
        try:
            problem = await asyncio.get_running_loop().run_in_executor(self._threads, _find_problem, schema)
        finally:
            self._num_waiting -= 1
        if problem:
            raise InvalidInputError(f"{_PARAM}: the JSON schema can't be followed: {problem}", param=_PARAM)


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as text, so that equal schemas are equal.

    Raises:
        InvalidInputError: it is too large or too deep.
    """
    if _depth_exceeds(schema, _MAX_DEPTH):
        raise InvalidInputError(f"{_PARAM}: the JSON schema is nested deeper than {_MAX_DEPTH} levels", param=_PARAM)
    text = json.dumps(schema, separators=(",", ":"))
    if len(text) > _MAX_SCHEMA_BYTES:
        found = f"the JSON schema takes {len(text)} bytes, but may take {_MAX_SCHEMA_BYTES}"
        raise InvalidInputError(f"{_PARAM}: {found}", param=_PARAM)
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


def _find_problem(schema: str) -> str:
    """Why a schema can't be used; empty if it can."""
    command = [sys.executable, "-P", str(Path(grammar.__file__))]  # -P: the file's neighbours are no modules of its own
    try:
        result = subprocess.run(command, input=schema, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if result.returncode != 0:
        _log.warning("schema_check_failed", returncode=result.returncode, stderr=result.stderr[-500:])
        return "it is too complex to compile"
    return " ".join(result.stdout.removesuffix("<non-verbose/>").split())[:300]
