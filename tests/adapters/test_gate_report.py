"""The record of the gate: what its checks amount to, and what an alias may do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from adapters.gate_report import CheckName, GateCheck, GateReport, Outcome, Verdict, may_promote


def _report(compared_with: str | None = None, **outcomes: Outcome) -> GateReport:
    names: dict[str, CheckName] = {"base": "base", "present": "present", "forgetting": "forgetting"}
    checks = [
        GateCheck(name=names[name], outcome=outcome, sentence=f"{name} says {outcome}")
        for name, outcome in outcomes.items()
    ]
    return GateReport(checks=checks, compared_with=compared_with)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({"base": "passed", "forgetting": "passed"}, "passed"),
        ({"base": "passed", "forgetting": "unchecked"}, "passed"),
        ({"base": "unchecked", "forgetting": "passed"}, "inconclusive"),
        ({"base": "passed", "present": "unchecked"}, "inconclusive"),
        ({"base": "passed", "forgetting": "failed"}, "failed"),
        ({"base": "unchecked", "forgetting": "failed"}, "failed"),
    ],
)
def test_verdict_is_the_worst_that_matters_when_checks_differ(outcomes: dict[str, Outcome], expected: Verdict) -> None:
    """One failure decides; what is switched off is no obstacle, what could not be compared is."""
    assert expected == _report(**outcomes).verdict


def test_reason_names_what_failed_when_the_gate_was_not_passed() -> None:
    """In one sentence, and only that which explains the verdict."""
    assert _report(base="unchecked", forgetting="failed").reason == "the gate was not passed: forgetting says failed"
    assert _report(base="unchecked", forgetting="passed").reason == "the gate is inconclusive: base says unchecked"
    assert _report(base="passed").reason == "the gate was passed"


@pytest.mark.parametrize(
    ("outcome", "is_new", "expected"),
    [
        ("passed", True, True),
        ("passed", False, True),
        ("unchecked", True, True),
        ("unchecked", False, False),
        ("failed", True, False),
        ("failed", False, False),
    ],
)
def test_alias_may_move_when_the_verdict_allows_it(outcome: Outcome, is_new: bool, expected: bool) -> None:
    """What could not be compared takes a name that is free, and never one that somebody answers to."""
    report = _report(None if is_new else "a" * 64, base=outcome)
    assert expected == may_promote("gate", report)
    assert (True, False) == (may_promote("always", report), may_promote("never", report))


def test_alias_stays_when_there_is_no_report() -> None:
    """Missing data is never success."""
    assert not may_promote("gate", None)
    assert may_promote("always", None)


def test_report_is_refused_when_it_holds_something_unknown() -> None:
    """Manifests come from elsewhere, too."""
    with pytest.raises(ValidationError, match="extra"):
        GateReport.model_validate({"checks": [], "verdict": "passed"})
