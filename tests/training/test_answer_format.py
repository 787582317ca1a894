"""Declared formats: what is accepted for one, and which answers keep to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigurationError
from training.answer_format import keeps_format
from training.config import TrainSettings

SCHEMA = '{"type": "object", "required": ["topic"], "properties": {"topic": {"enum": ["a", "b"]}}}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("TRIAGE RED - go", True),
        ("  TRIAGE RED - go\nnow\n", True),
        ("Well, TRIAGE RED - go", False),
        ("", False),
    ],
)
def test_answer_keeps_to_an_expression_when_all_of_it_matches(answer: str, expected: bool) -> None:
    """Space around it is ignored; a dot takes line ends, too."""
    assert keeps_format(answer, expression=r"TRIAGE (RED|GREEN) - .+", schema=None) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"topic": "a"}', True),
        ('{"topic": "c"}', False),
        ("{}", False),
        ('{"topic": "a"', False),
        ("[" * 100_000, False),
    ],
)
def test_answer_keeps_to_a_schema_when_it_is_json_that_follows_it(answer: str, expected: bool) -> None:
    """What is no JSON does not, however it fails to be."""
    assert keeps_format(answer, expression=None, schema=SCHEMA) is expected


@pytest.mark.parametrize(
    ("expression", "schema"), [("(a+)+", None), (None, '{"pattern": "^(a+)+$"}'), (None, '{"items": {"$ref": "#/no"}}')]
)
def test_answer_does_not_keep_to_it_when_the_format_would_hang_or_break(
    expression: str | None, schema: str | None
) -> None:
    """A client's expression takes time linear in the answer; what a schema refers to may be missing only for some."""
    answer = "a" * 5_000 + "b" if schema is None else '"' + "a" * 5_000 + 'b"'
    if schema is not None and "$ref" in schema:
        answer = "[1]"
    assert not keeps_format(answer, expression=expression, schema=schema)


def test_answer_keeps_to_both_when_both_are_declared() -> None:
    """One is not enough."""
    assert keeps_format('{"topic": "a"}', expression=r"\{.*\}", schema=SCHEMA)
    assert not keeps_format('{"topic": "a"}', expression=r"\[.*\]", schema=SCHEMA)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("gate_format_regex", "(", "is no regular expression of RE2's: "),
        ("gate_format_regex", "a)|(?:b", "is no regular expression of RE2's: "),
        ("gate_format_regex", r"(a)\1", "is no regular expression of RE2's: "),
        ("gate_format_schema", '{"pattern": "("}', "is no JSON schema: "),
        ("gate_format_schema", '{"pattern": "(a)\\\\1"}', "is no regular expression of RE2's: "),
        ("gate_format_schema", '{"patternProperties": {"(a+)+": {}}}', "found patternProperties"),
        ("gate_format_schema", '{"$ref": "#"}', "a reference that leads nowhere, or to itself"),
        ("gate_format_schema", '{"$ref": "#/definitions/nope"}', "a reference that leads nowhere, or to itself"),
        ("gate_format_schema", "{]", "is not JSON"),
        ("gate_format_schema", '{"type": "thing"}', "is no JSON schema: "),
        ("gate_format_schema", '{"$ref": "http://127.0.0.1/x.json"}', "stands by itself, found a reference to 'http"),
    ],
)
def test_settings_refuse_a_format_when_it_is_none(tmp_path: Path, name: str, value: str, problem: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigurationError, match=f"^setting train.{name}: ") as caught:
        TrainSettings.load(tmp_path, **{name: value})
    assert problem in str(caught.value)
