"""Rules that route before anything learned does: by metadata, by API key, by a regular expression.

Expressions are RE2's (Arrow carries it): matching takes time linear in the text, whatever the expression, so that none
of them can hold up the server. What RE2 lacks for it (backreferences, looking around) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from adapters.errors import InvalidInputError, InvalidNameError
from adapters.expressions import search
from adapters.records import BASE_MODEL_NAME, check_alias_name

__all__ = ["MAX_RULES", "Asked", "RoutingRule", "find_rule", "parse_rules", "read_rules"]

MAX_RULES = 200
_MAX_FILE_BYTES = 1 << 20
_MAX_CHARS = 20_000  # of the last message that an expression sees

_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
_Expression = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class RoutingRule(BaseModel):
    """One rule: if all of its conditions hold, the alias answers. `base` is the base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")
    alias: str
    metadata: dict[_Key, _Value] | None = Field(None, min_length=1, max_length=16)
    key: str | None = Field(None, pattern=r"^key-[0-9a-f]{12}$")
    matches: _Expression | None = None

    @field_validator("alias")
    @classmethod
    def _is_alias(cls, value: str) -> str:
        if value != BASE_MODEL_NAME:
            try:
                check_alias_name(value)
            except InvalidNameError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("matches")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        if value is not None:
            search(value, "")
        return value

    @model_validator(mode="after")
    def _has_condition(self) -> Self:
        if self.metadata is None and self.key is None and self.matches is None:
            raise ValueError("expected a condition: metadata, key or matches")
        return self


@dataclass(frozen=True, slots=True)
class Asked:
    """What rules look at: the request's metadata, the API key's id and the user's last message."""

    metadata: Mapping[str, str]
    key: str | None
    text: str


def find_rule(rules: Sequence[RoutingRule], asked: Asked) -> RoutingRule | None:
    """The first rule all of whose conditions hold."""
    return next((rule for rule in rules if _holds(rule, asked)), None)


def parse_rules(document: Any) -> tuple[RoutingRule, ...]:
    """The rules in a document: `{"rules": [...]}`.

    Raises:
        InvalidInputError: one is wrong; says which, and what was expected.
    """
    if not isinstance(document, Mapping) or set(document) != {"rules"} or not isinstance(document["rules"], list):
        raise InvalidInputError('expected {"rules": [...]} and nothing else', param="rules")
    if len(document["rules"]) > MAX_RULES:
        raise InvalidInputError(f"expected at most {MAX_RULES} rules, found {len(document['rules'])}", param="rules")
    rules = tuple(_parse_rule(number, rule) for number, rule in enumerate(document["rules"], start=1))
    names = [rule.name for rule in rules]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"two rules are called {repeated[0]!r}", param="rules")
    return rules


def read_rules(path: Path) -> tuple[RoutingRule, ...]:
    """The rules in a file of YAML or JSON.

    Raises:
        InvalidInputError: it can't be read, or a rule is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidInputError(f"{path}: expected at most {_MAX_FILE_BYTES} bytes", param="rules")
        return parse_rules(yaml.safe_load(content))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} holds no rules: {error}", param="rules") from None


def _parse_rule(number: int, rule: Any) -> RoutingRule:
    given = {"name": f"rule {number}", **rule} if isinstance(rule, Mapping) else rule
    try:
        return RoutingRule.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
            known = ", ".join(RoutingRule.model_fields)
            raise InvalidInputError(f"rule {number}: {field}: no such field, expected {known}", param="rules") from None
        reason = detail["msg"].removeprefix("Value error, ")
        raise InvalidInputError(f"rule {number}: {field + ': ' if field else ''}{reason}", param="rules") from None


def _holds(rule: RoutingRule, asked: Asked) -> bool:
    if rule.metadata is not None and any(asked.metadata.get(key) != value for key, value in rule.metadata.items()):
        return False
    if rule.key is not None and rule.key != asked.key:
        return False
    return rule.matches is None or search(rule.matches, asked.text[:_MAX_CHARS])
