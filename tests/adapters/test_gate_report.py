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
    ("name", "figures", "words"),
    [
        ("base", {"low": -0.1}, "train on more rows, or for more epochs"),
        ("present", {"low": -0.1}, "--start-from"),
        ("present", {"improvement": 0.05, "low": -0.1}, "more of them (--validation-share 0.2)"),
        ("base", {"improvement": 0.05, "low": -0.1}, "so few validation rows can't show"),
        ("present", {"improvement": -0.05, "low": -0.1}, "a lower learning_rate"),
        ("base", {"improvement": -0.05, "low": -0.1}, "for more epochs"),
        ("forgetting", {"rise": 2.0}, "lower learning_rate"),
        ("format", {"share": 0.5}, "more rows"),
        ("format", {}, "gate_samples above 0"),
        ("sampling", {"share": 0.5}, "samples.jsonl"),
        ("sampling", {"share": 0.5, "too_long": 3.0, "loop": 1.0}, "the end of a turn is not learned yet"),
        ("sampling", {"share": 0.5, "too_long": 1.0, "loop": 3.0}, "repeat themselves"),
        ("sampling", {"share": 0.5, "empty": 3.0}, "empty or very short answers"),
    ],
)
def test_check_says_what_mends_it_when_it_failed(name: CheckName, figures: dict[str, float], words: str) -> None:
    """By the check, and of answers by what most of them are; a check that passed needs no cure."""
    failed = GateCheck(name=name, outcome="failed", sentence="It failed", figures=figures)
    assert words in str(failed.cure)
    assert failed.model_copy(update={"outcome": "passed"}).cure is None


def test_check_says_how_to_make_it_when_there_are_no_validation_rows() -> None:
    """Only once, though neither the base nor the present version was compared; and it is no part of the record."""
    base, present = _report(base="unchecked", present="unchecked").checks
    assert ("give 8 validation rows or more: a validation file, or validation_share", None) == (base.cure, present.cure)
    assert set(base.model_dump()) == {"name", "outcome", "sentence", "figures"}


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
