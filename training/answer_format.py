"""The form that a domain declares for its answers: a regular expression, or a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from referencing.exceptions import Unresolvable

from adapters.expressions import matches_whole, search

__all__ = ["check_json_schema", "keeps_format"]


def check_json_schema(text: str) -> None:
    """Refuse what is no JSON schema that stands by itself.

    Raises:
        ValueError: not JSON, not a schema, one that refers to another document, to nothing or in a circle, or one with
            patterns for names; says where.
    """
    import jsonschema

    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    for reference in _references(document):
        # The library would fetch it from wherever it says.
        if not reference.startswith("#"):
            raise ValueError(f"expected a schema that stands by itself, found a reference to {reference[:80]!r}")
    try:
        jsonschema.Draft202012Validator.check_schema(document)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON schema: {error.json_path}: {error.message:.200}") from None
    for key, pattern in _find(document, ("pattern", "patternProperties")):
        if key == "patternProperties" and isinstance(pattern, dict):
            raise ValueError("expected properties by their names, found patternProperties, which is not supported")
        if isinstance(pattern, str):
            search(pattern, "")
    samples: tuple[Any, ...] = ({}, [], "", 0, None)
    for sample in samples:
        try:
            _is_valid(sample, document)
        except (RecursionError, Unresolvable) as error:
            raise ValueError(f"has a reference that leads nowhere, or to itself: {error!s:.200}") from None


def keeps_format(answer: str, *, expression: str | None, schema: str | None) -> bool:
    """Whether a whole answer, without space around it, matches the expression and is JSON that follows the schema."""
    text = answer.strip()
    if expression is not None and not matches_whole(expression, text):
        return False
    return schema is None or _follows(text, json.loads(schema))


def _follows(text: str, schema: Any) -> bool:
    try:
        return _is_valid(json.loads(text), schema)
    except (ValueError, RecursionError, Unresolvable):  # the answer is no JSON, or a reference leads nowhere
        return False


def _is_valid(instance: Any, schema: Any) -> bool:
    """By the library, but for patterns, which a client's schema could hang it with."""
    import jsonschema

    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _check_pattern})
    return bool(validator(schema).is_valid(instance))


def _check_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Exception]:
    import jsonschema

    if isinstance(instance, str) and not search(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r:.60} does not match {pattern!r:.60}")


def _references(value: Any) -> Iterator[str]:
    found = _find(value, ("$ref", "$dynamicRef"))
    return (item for _, item in found if isinstance(item, str))


def _find(value: Any, keys: Collection[str]) -> Iterator[tuple[str, Any]]:
    """All values of these keys, wherever they stand."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys:
                yield key, item
            yield from _find(item, keys)
    elif isinstance(value, list):
        for item in value:
            yield from _find(item, keys)
