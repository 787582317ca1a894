"""Conversations: a choice stays for weak turns, moves for clear ones, and ends when the talk goes elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.routing.conversation import Choice, follow_turns, take_latest

LONG = "and could you please tell me more about that one"
LEGAL, COOKING, WEAK, NOTHING = ([0.9, 0.05], [0.05, 0.9], [0.2, 0.25], [0.02, 0.03])


def _follow(turns: list[list[float]], texts: list[str] | None = None) -> Choice:
    said = [LONG] * len(turns) if texts is None else texts
    return follow_turns(said, [np.array(turn, dtype=np.float32) for turn in turns], 0.5)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([LEGAL], 0),
        ([NOTHING], None),
        ([LEGAL, WEAK], 0),
        ([LEGAL, WEAK, WEAK], 0),
        ([LEGAL, NOTHING], 0),
        ([LEGAL, NOTHING, NOTHING, NOTHING], None),
        ([LEGAL, COOKING], 1),
        ([LEGAL, [0.1, 0.6]], 0),  # not clear enough to move
        ([NOTHING, LEGAL], 0),
        ([LEGAL, COOKING, WEAK], 1),
    ],
)
def test_choice_follows_the_topic_when_turns_come(turns: list[list[float]], expected: int | None) -> None:
    """Sticky, but not deaf."""
    assert expected == _follow(turns).index


def test_confidence_fades_when_turns_say_little() -> None:
    """It is the belief in the choice, which weak turns wear down."""
    first, second = _follow([LEGAL]), _follow([LEGAL, NOTHING])
    assert pytest.approx(0.9) == first.confidence
    assert pytest.approx(0.6 * 0.9 + 0.4 * 0.02) == second.confidence


def test_choice_stays_when_many_short_turns_say_nothing() -> None:
    """Yes, go on, thanks: a conversation is not given up for them, but for as many whole sentences about nothing."""
    turns = [LEGAL, *[NOTHING] * 8]
    assert 0 == _follow(turns, ["my landlord kept it", *["ok"] * 8]).index
    assert _follow(turns).index is None
    assert 1 == _follow([LEGAL, COOKING], ["my landlord kept it", "bread"]).index


def test_latest_turns_are_taken_when_a_conversation_is_long() -> None:
    """As many as may be read anew with each request; the last one whatever its length, blank ones never."""
    assert ["a", "b"] == take_latest(["a", " ", "b", ""])
    assert [str(number) for number in range(68, 100)] == take_latest([str(number) for number in range(100)])
    assert ["x" * 9000] * 5 == take_latest(["x" * 9000] * 9)  # of each some 1,200 characters are read
    assert [] == take_latest(["", " "])
