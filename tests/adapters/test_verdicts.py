"""The rules from numbers to a verdict, one by one, and which of them comes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.evidence import (
    Comparison,
    Direction,
    Evidence,
    Guard,
    Outcome,
    Scale,
    Side,
    Split,
    Treatment,
    Verdict,
    guard_state,
    outcome_of,
)
from adapters.statistics import Interval
from adapters.verdict_words import format_effect
from adapters.verdicts import judge

SMALLEST = 0.02
MARGIN = 0.01
BETTER, WORSE, SMALL, OPEN = (0.01, 0.09), (-0.09, -0.01), (-0.015, 0.015), (-0.04, 0.06)


def _comparison(
    ends: tuple[float, float] | None,
    metric: str = "solved",
    direction: Direction = "increase",
    scale: Scale = "number",
) -> Comparison:
    interval = None if ends is None else Interval(sum(ends) / 2, *ends, 0.95)
    return Comparison(metric, direction, scale, Side(500, 0, 0.5), Side(500, 0, 0.5), interval)


def _guard(ends: tuple[float, float] | None, metric: str = "error_rate") -> Guard:
    comparison = _comparison(ends, metric, "decrease", "share")
    return Guard(comparison, MARGIN, guard_state(comparison, MARGIN))


def _treatment(
    ends: tuple[float, float] | None,
    *guards: Guard,
    name: str = "B",
    gap: tuple[float, float] | None = None,
    direction: Direction = "increase",
) -> Treatment:
    primary = _comparison(ends, direction=direction)
    outcome = outcome_of(primary, SMALLEST)
    gaps = (_comparison(gap, scale="share"),) if gap else ()
    return Treatment(name, f"legal@{name}", primary, outcome, guards, gaps)


def _evidence(*treatments: Treatment, **changes: Any) -> Evidence:
    weights = (100 / (len(treatments) + 1),) * (len(treatments) + 1)
    plain = Evidence(
        control="A (legal@v1)",
        treatments=treatments,
        split=Split((500,) * len(weights), weights, 0.8, fired=False),
        metric="solved",
        smallest_effect=SMALLEST,
        num_units=1000,
        planned_units=2000,
        is_early=False,
        over=None,
        accepts_feedback_gap=False,
    )
    return replace(plain, **changes)


HELD, BREACHED, UNSETTLED, EMPTY = _guard((-0.01, 0.005)), _guard((0.02, 0.05)), _guard((-0.02, 0.03)), _guard(None)
SKEWED = Split((600, 400), (50, 50), 1e-6, fired=True)
OVER: dict[str, Any] = {"over": "its end date has passed"}


@pytest.mark.parametrize(
    ("evidence", "kind", "words"),
    [
        # 2. The split comes before everything but harm.
        (_evidence(_treatment(BETTER, HELD), split=SKEWED), "inconclusive", "split 600 to 400, where 50 to 50"),
        (_evidence(_treatment(WORSE), split=SKEWED), "inconclusive", "No verdict"),
        # 1. A guardrail comes before a wrong split, a gain, and before a plan that is not there yet.
        (_evidence(_treatment(BETTER, BREACHED), split=SKEWED), "roll_back", "breaks the guardrail error_rate"),
        (_evidence(_treatment(BETTER, HELD, BREACHED)), "roll_back", "breaks the guardrail error_rate"),
        (_evidence(_treatment(None, BREACHED), is_early=True), "roll_back", "between +2 and +5 points"),
        (_evidence(_treatment(OPEN, BREACHED), **OVER), "roll_back", "+1 points is allowed"),
        (_evidence(_treatment(OPEN, HELD), _treatment(BETTER, BREACHED, name="C")), "roll_back", "C (legal@C)"),
        # 3. A fixed sample is waited for.
        (_evidence(_treatment(None, HELD), is_early=True), "continue", "1,000 of 2,000 planned users"),
        (_evidence(_treatment(None), is_early=True, **OVER), "inconclusive", "1,000 of 2,000 planned users"),
        # 4. Promotion takes a gain, every guardrail shown to hold, and outcomes that are not missing on one side.
        (_evidence(_treatment(BETTER)), "promote", "there are no guardrails"),
        (_evidence(_treatment(BETTER, HELD)), "promote", "+0.05 (between +0.01 and +0.09), with 95 % confidence"),
        (_evidence(_treatment(BETTER, HELD, HELD), **OVER), "promote", "both guardrails hold"),
        (_evidence(_treatment(BETTER, UNSETTLED)), "continue", "error_rate is not shown to hold"),
        (_evidence(_treatment(BETTER, HELD, EMPTY)), "continue", "error_rate has too little data to be passed"),
        (_evidence(_treatment(BETTER, EMPTY), **OVER), "inconclusive", "too little data to be passed"),
        (_evidence(_treatment(BETTER, HELD, gap=(-0.2, -0.1))), "continue", "solved is known of fewer of B's answers"),
        (_evidence(_treatment(BETTER, HELD, gap=(0.1, 0.2)), **OVER), "inconclusive", "known of more of B's answers"),
        (_evidence(_treatment(BETTER, HELD, gap=(-0.1, 0.2))), "promote", "is better than A (legal@v1)"),
        (_evidence(_treatment(BETTER, gap=(0.1, 0.2)), accepts_feedback_gap=True), "promote", "is better than"),
        (_evidence(_treatment((0.004, 0.01), HELD)), "promote", "is better"),
        # 5. Worse.
        (_evidence(_treatment(WORSE, HELD)), "roll_back", "is worse than A (legal@v1)"),
        (_evidence(_treatment(WORSE), _treatment(WORSE, name="C")), "roll_back", "is worse"),
        (_evidence(_treatment(WORSE), _treatment(OPEN, name="C")), "continue", "is shown yet"),
        # 6. Nothing to be found, or nothing more to come.
        (_evidence(_treatment(SMALL, HELD)), "inconclusive", "smaller than 0.02"),
        (_evidence(_treatment(SMALL), _treatment(WORSE, name="C")), "inconclusive", "by as much as matters"),
        (_evidence(_treatment(SMALL), _treatment(OPEN, name="C")), "continue", "is shown yet"),
        (_evidence(_treatment(OPEN, HELD), **OVER), "inconclusive", "ended (its end date has passed) without"),
        (_evidence(_treatment(None, HELD), **OVER), "inconclusive", "without a difference in solved"),
        # 7. Otherwise wait.
        (_evidence(_treatment(OPEN, HELD)), "continue", "fit a gain as well as a loss"),
        (_evidence(_treatment(None)), "continue", "Too few users for a first estimate: 1,000 users came, of 1,000"),
        (_evidence(_treatment(None), num_units=0), "continue", "nobody has come yet"),
        (_evidence(_treatment(None), has_started=False), "continue", "It has not started yet"),
        (_evidence(_treatment(None, HELD), metric=None), "continue", "1 of 1 guardrails are shown to hold"),
        (_evidence(_treatment(None), metric=None, **OVER), "inconclusive", "no primary metric"),
    ],
)
def test_verdict_follows_the_first_rule_that_applies_when_judged(evidence: Evidence, kind: str, words: str) -> None:
    """The kind, and what the sentence says."""
    verdict = judge(evidence)
    assert kind == verdict.kind
    assert words in verdict.sentence
    assert verdict.next_step.endswith(".")


def test_direction_decides_when_a_lower_metric_is_better() -> None:
    """The same numbers promote what is to grow and roll back what is to shrink."""
    ends = (0.01, 0.09)
    assert "promote" == judge(_evidence(_treatment(ends, direction="increase"))).kind
    assert "roll_back" == judge(_evidence(_treatment(ends, direction="decrease"))).kind
    assert "promote" == judge(_evidence(_treatment((-0.09, -0.01), direction="decrease"))).kind


def test_best_arm_is_promoted_when_several_are_better() -> None:
    """The highest gain, in the metric's direction, among those that nothing holds back; the others are told of."""
    arms = (
        _treatment((0.01, 0.05), HELD),
        _treatment((0.03, 0.09), HELD, name="C"),
        _treatment((0.2, 0.3), EMPTY, name="D"),
    )
    verdict = judge(_evidence(*arms))
    assert ("promote", "C") == (verdict.kind, verdict.arm)
    assert ("B (legal@B): better, solved +0.03 (between +0.01 and +0.05).", 2) == (verdict.notes[0], len(verdict.notes))
    lower = [
        _treatment((-0.05, -0.01), name="B", direction="decrease"),
        _treatment((-0.09, -0.03), name="C", direction="decrease"),
    ]
    assert "C" == judge(_evidence(*lower)).arm


def test_accepted_gap_is_told_when_it_no_longer_holds_back() -> None:
    """Whoever reads the verdict later sees what a person took on."""
    verdict = judge(_evidence(_treatment(BETTER, HELD, gap=(0.1, 0.2)), accepts_feedback_gap=True))
    (note,) = verdict.notes
    assert note == (
        "Accepted by hand: solved is known of more of B's answers than of the control's: "
        "+15.0 points (between +10.0 and +20.0 points)."
    )


def test_wrong_split_is_told_when_a_guardrail_is_breached() -> None:
    """Harm is acted on; nobody should have to find out by himself that its size is not to be trusted."""
    (note,) = judge(_evidence(_treatment(OPEN, BREACHED), split=SKEWED)).notes
    assert note.startswith("Users are split 600 to 400, where 50 to 50 was meant")


def test_split_of_a_former_stage_is_told_when_the_present_one_is_right() -> None:
    """The sentence names the stage; accepted by a person, it is a note of the promotion."""
    found = Split((500, 500), (50, 50), 0.8, fired=True, stage=3, stages=(1, 2))
    assert (
        "before (stage 1 and 2), which other weights don't mend"
        in judge(_evidence(_treatment(BETTER), split=found)).sentence
    )
    accepted = replace(found, fired=False, stages=(), accepted=(1,))
    verdict = judge(_evidence(_treatment(BETTER), split=accepted))
    assert ("promote", ("Accepted by hand: the split of stage 1.",)) == (verdict.kind, verdict.notes)


def test_other_treatments_are_named_when_one_breaks_a_guardrail() -> None:
    """Rolling back would end the experiment for a winner, too: it says how to go on without the one that harms."""
    verdict = judge(_evidence(_treatment(OPEN, BREACHED), _treatment(BETTER, HELD, name="C")))
    (note,) = verdict.notes
    assert note.startswith("Rolling back ends it for C (legal@C), too: better, solved +0.05")
    assert verdict.next_step.endswith("go on with C alone, by giving weights to C and the control but not to B.")


@pytest.mark.parametrize(
    ("ends", "direction", "expected"),
    [
        ((0.001, 0.5), "increase", "better"),
        ((0.0, 0.5), "increase", "open"),
        ((-0.5, -0.001), "increase", "worse"),
        ((-0.5, 0.0), "increase", "open"),
        ((-0.5, -0.001), "decrease", "better"),
        ((0.001, 0.5), "decrease", "worse"),
        ((-0.0199, 0.0199), "increase", "equivalent"),
        ((-0.02, 0.0199), "increase", "open"),
        ((-0.0199, 0.02), "decrease", "open"),
        (None, "increase", "no_data"),
    ],
)
def test_outcome_is_read_off_the_interval_when_it_excludes_something(
    ends: tuple[float, float] | None, direction: Direction, expected: Outcome
) -> None:
    """Zero on the edge is not excluded, nor is the smallest effect."""
    assert expected == outcome_of(_comparison(ends, direction=direction), SMALLEST)


@pytest.mark.parametrize(
    ("ends", "direction", "expected"),
    [
        ((-0.5, 0.0099), "decrease", "held"),
        ((-0.5, 0.01), "decrease", "open"),
        ((0.01, 0.5), "decrease", "open"),
        ((0.0101, 0.5), "decrease", "breached"),
        ((-0.0099, 0.5), "increase", "held"),
        ((-0.5, -0.0101), "increase", "breached"),
        (None, "decrease", "no_data"),
    ],
)
def test_guardrail_holds_when_worse_than_the_margin_is_excluded(
    ends: tuple[float, float] | None, direction: Direction, expected: str
) -> None:
    """Not to be shown worse is not enough."""
    assert expected == guard_state(_comparison(ends, direction=direction), MARGIN)


@pytest.mark.parametrize(
    ("value", "scale", "expected"),
    [
        (0.041, "share", "+4.1 points"),
        (-0.153, "share", "-15.3 points"),
        (0.12, "ratio", "+12 %"),
        (-0.034, "ratio", "-3.4 %"),
        (0.0521, "number", "+0.0521"),
        (-12.0, "number", "-12"),
    ],
)
def test_effect_is_written_by_its_scale_when_formatted(value: float, scale: Scale, expected: str) -> None:
    """Shares are told in points, ratios in percent."""
    assert expected == format_effect(value, scale)


_ENDS = st.none() | st.tuples(st.floats(-1, 1), st.floats(0, 1)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@st.composite
def _any_treatment(draw: st.DrawFn) -> Treatment:
    guards = [_guard(ends) for ends in draw(st.lists(_ENDS, max_size=3))]
    name = draw(st.sampled_from(["B", "C", "D"]))
    return _treatment(draw(_ENDS), *guards, name=name, gap=draw(_ENDS))


@given(
    st.lists(_any_treatment(), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "it was stopped"]),
)
def test_promotion_takes_everything_when_given_any_evidence(
    treatments: list[Treatment], fired: bool, is_early: bool, accepts: bool, over: str | None
) -> None:
    """Whatever the numbers: a shown gain, guardrails shown to hold, a right split, the plan reached, and feedback.

    And once nothing more is to come, nobody is told to wait.
    """
    split = replace(SKEWED, fired=fired)
    evidence = _evidence(*treatments, split=split, is_early=is_early, accepts_feedback_gap=accepts, over=over)
    verdict: Verdict = judge(evidence)
    if verdict.kind == "promote":
        assert not fired
        assert not is_early
        chosen = [arm for arm in treatments if arm.name == verdict.arm and arm.outcome == "better"]
        assert any(
            all(guard.state == "held" for guard in arm.guards)
            and (accepts or all(gap.interval is None or gap.interval.low <= 0 <= gap.interval.high for gap in arm.gaps))
            for arm in chosen
        )
    if verdict.kind == "continue":
        assert over is None
    if any(guard.state == "breached" for arm in treatments for guard in arm.guards):
        assert verdict.kind == "roll_back"
