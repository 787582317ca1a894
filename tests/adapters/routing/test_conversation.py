"""Conversations: a choice stays for weak turns, moves for clear ones, and ends when the talk goes elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.routing.conversation import follow_turns

LEGAL, COOKING, WEAK, NOTHING = ([0.9, 0.05], [0.05, 0.9], [0.2, 0.25], [0.02, 0.03])


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
    choice = follow_turns([np.array(turn, dtype=np.float32) for turn in turns], 0.5)
    assert expected == choice.index


def test_confidence_fades_when_turns_say_little() -> None:
    """It is the belief in the choice, which weak turns wear down."""
    first, second = (
        follow_turns([np.array(turn, dtype=np.float32) for turn in turns], 0.5) for turns in ([LEGAL], [LEGAL, NOTHING])
    )
    assert pytest.approx(0.9) == first.confidence
    assert pytest.approx(0.6 * 0.9 + 0.4 * 0.02) == second.confidence
