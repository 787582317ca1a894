"""Schemas from outside: good ones pass, and no bad one does more than be refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from adapters.errors import InvalidInputError, OverloadedError
from server.schema_check import SchemaChecker, schema_text


def _check(*schemas: Any) -> None:
    async def run() -> None:
        checker = SchemaChecker()
        for schema in schemas:
            await checker.check(schema_text(schema))

    asyncio.run(run())


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def test_schema_passes_when_it_can_be_compiled() -> None:
    """References within it, formats, patterns and combinations are fine."""
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
    leaf = {
        "anyOf": [{"type": "string", "format": "date"}, {"type": "string", "pattern": "^[a-z]{2,5}$"}, {"const": 1}]
    }
    _check({"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}, leaf, {})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "integer", "minimum": float("nan")}, "line 1"),
        ({"x-guidance": {"lenient": True}, "type": "objekt"}, "objekt"),
    ],
)
def test_schema_is_refused_with_its_reason_when_it_can_not_be_followed(schema: Any, reason: str) -> None:
    """Under the field's name."""
    with pytest.raises(InvalidInputError, match=reason) as caught:
        _check(schema)
    assert caught.value.param == "response_format"


def test_schema_is_refused_when_it_would_compile_for_ever() -> None:
    """Twenty patterns at once keep a processor busy for hours; the child that tries is ended."""
    patterns = [f".*[a-m]{{{i}}}.*{chr(97 + i)}.{{20}}" for i in range(20)]
    with pytest.raises(InvalidInputError, match=r"too complex|too long"):
        _check({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})


@pytest.mark.parametrize(("levels", "is_good"), [(64, True), (65, False), (900, False)])
def test_schema_is_refused_when_it_is_too_deep(levels: int, is_good: bool) -> None:
    """Before anything that recurses looks at it."""
    if is_good:
        schema_text(_nested(levels))
    else:
        with pytest.raises(InvalidInputError, match="deeper than 64"):
            schema_text(_nested(levels))


def test_schema_is_refused_when_it_is_too_large() -> None:
    """The bound is one of its text."""
    schema = {"enum": ["a" * (65_536 - len('{"enum":[""]}'))]}
    assert len(schema_text(schema)) == 65_536
    with pytest.raises(InvalidInputError, match="takes 65537 bytes"):
        schema_text({"enum": [schema["enum"][0] + "a"]})


def test_schema_is_looked_at_once_when_it_comes_again() -> None:
    """A known one is let through even while no other gets its turn; a bad one is not remembered as good."""

    async def run() -> None:
        checker = SchemaChecker()
        good, bad = json.dumps({"type": "object"}), json.dumps({"type": "objekt"})
        await checker.check(good)
        checker._num_waiting = 1000
        await checker.check(good)
        with pytest.raises(OverloadedError):
            await checker.check(bad)
        checker._num_waiting = 0
        for _ in range(2):
            with pytest.raises(InvalidInputError):
                await checker.check(bad)

    asyncio.run(run())
