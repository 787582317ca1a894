"""Rules: the first whose conditions all hold, expressions in linear time, and errors that say which rule is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidInputError
from adapters.routing.rules import Asked, find_rule, parse_rules, read_rules

BY_TEAM = {"name": "team", "alias": "legal", "metadata": {"team": "law"}}
BY_KEY = {"name": "shop", "alias": "support", "key": "key-0123456789ab"}
BY_WORD = {"name": "refunds", "alias": "billing", "matches": "(?i)\\brefund"}
BOTH = {"name": "both", "alias": "both", "metadata": {"team": "law"}, "matches": "refund"}


@pytest.mark.parametrize(
    ("order", "asked", "expected"),
    [
        ([BY_TEAM, BY_WORD], Asked({"team": "law"}, None, "a refund"), "team"),
        ([BY_WORD, BY_TEAM], Asked({"team": "law"}, None, "a refund"), "refunds"),
        ([BY_TEAM, BY_WORD], Asked({"team": "sales"}, None, "A REFUND!"), "refunds"),
        ([BY_TEAM, BY_KEY], Asked({}, "key-0123456789ab", ""), "shop"),
        ([BY_TEAM, BY_KEY], Asked({}, "key-ffffffffffff", ""), None),
        ([BOTH, BY_TEAM], Asked({"team": "law"}, None, "hello"), "team"),
        ([BOTH, BY_TEAM], Asked({"team": "law"}, None, "a refund"), "both"),
        ([], Asked({}, None, "a refund"), None),
    ],
)
def test_first_rule_that_holds_is_found_when_asked(
    order: list[dict[str, Any]], asked: Asked, expected: str | None
) -> None:
    """In the order of the file, all conditions of a rule together."""
    rule = find_rule(parse_rules({"rules": order}), asked)
    assert expected == (None if rule is None else rule.name)


def test_expression_takes_linear_time_when_it_would_explode_elsewhere() -> None:
    """Python's own engine would take longer than the universe has been there; the text is bounded, too."""
    (rule,) = parse_rules({"rules": [{"alias": "legal", "matches": "^(a+)+$|(x*x*)*y"}]})
    started = time.monotonic()
    assert find_rule([rule], Asked({}, None, "a" * 1_000_000 + "!")) is rule  # its beginning is all that is seen
    assert find_rule([rule], Asked({}, None, "a" * 10_000 + "!")) is None
    assert time.monotonic() - started < 60, "it must come to an end"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], 'expected {"rules"'),
        ({"rules": [], "more": 1}, 'expected {"rules"'),
        ({"rules": [{"alias": "legal"}]}, "rule 1: expected a condition"),
        ({"rules": [BY_TEAM, {"alias": "legal", "matches": "("}]}, "rule 2: matches: is no regular expression"),
        ({"rules": [{"alias": "legal", "matches": "(a)\\1"}]}, "rule 1: matches: is no regular expression"),
        ({"rules": [{"alias": "auto", "key": "key-0123456789ab"}]}, "rule 1: alias: the name 'auto' is reserved"),
        ({"rules": [{"alias": "legal", "key": "web"}]}, "rule 1: key"),
        ({"rules": [{"alias": "legal", "metadata": {}}]}, "rule 1: metadata"),
        ({"rules": [{"alias": "legal", "when": "now", "matches": "a"}]}, "rule 1: when"),
        ({"rules": [BY_TEAM, BY_TEAM]}, "two rules are called 'team'"),
        ({"rules": [BY_TEAM] * 201}, "at most 200"),
    ],
)
def test_wrong_rules_are_refused_when_parsed(document: Any, message: str) -> None:
    """The message names the rule and the field."""
    with pytest.raises(InvalidInputError) as caught:
        parse_rules(document)
    assert message in str(caught.value)


def test_rules_are_read_from_yaml_and_json_when_in_a_file(tmp_path: Path) -> None:
    """Rules without a name are called by their place; a file that is neither says so."""
    path = tmp_path / "rules.yaml"
    path.write_text("rules:\n- alias: legal\n  metadata: {team: law}\n")
    assert ("rule 1", "legal") == (read_rules(path)[0].name, read_rules(path)[0].alias)
    path.write_text('{"rules": [{"alias": "base", "matches": "x"}]}')
    assert "base" == read_rules(path)[0].alias
    path.write_text("rules: [")
    with pytest.raises(InvalidInputError, match="holds no rules"):
        read_rules(path)
