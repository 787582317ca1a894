"""The form that a domain declares for its answers: a regular expression, or a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["check_json_schema", "keeps_format"]


def check_json_schema(text: str) -> None:
    """Refuse what is no JSON schema that stands by itself.

    Raises:
        ValueError: not JSON, not a schema, or one that refers to another document; says where.
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


def keeps_format(answer: str, *, expression: str | None, schema: str | None) -> bool:
    """Whether a whole answer, without space around it, matches the expression and is JSON that follows the schema."""
    text = answer.strip()
    if expression is not None and re.fullmatch(expression, text, re.DOTALL) is None:
        return False
    return schema is None or _follows(text, json.loads(schema))


def _follows(text: str, schema: Any) -> bool:
    import jsonschema

    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("$ref", "$dynamicRef") and isinstance(item, str):
                yield item
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
