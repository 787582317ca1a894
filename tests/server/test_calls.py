"""What is known of one accepted request."""

from __future__ import annotations

import pytest

from adapters.records import Binding, Unit
from server.callers import Meter
from server.calls import Call, make_answers, time_per_token
from tests.support.engine import ask


def _call(finish_reason: str | None, *answers: tuple[int, float, float]) -> Call:
    """A call that has ended; of each answer its tokens, and when the first and the last of them came."""
    made = make_answers("r", [ask("r", "hello")], len(answers))
    for answer, (num_tokens, first, last) in zip(made.values(), answers, strict=True):
        answer.completion_tokens, answer.first_token, answer.last_token = num_tokens, first, last
    call = Call(
        "chat", "chatcmpl-r", "", Meter(), Binding("base", "base"), Unit("u", "user"), made, len(answers), 0, 0.0
    )
    call.finish_reason = finish_reason
    return call


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(5, 1.0, 3.0)], 0.5),
        # Six seconds over six tokens, whichever answer they belong to, and whenever it began.
        ([(5, 1.0, 3.0), (3, 6.0, 10.0)], 1.0),
        ([(1, 1.0, 1.0), (3, 6.0, 10.0)], 2.0),
        ([(1, 1.0, 1.0)], None),
    ],
)
def test_time_per_token_is_the_mean_over_all_answers_when_they_end_well(
    answers: list[tuple[int, float, float]], expected: float | None
) -> None:
    """Each answer from its own first token; one of a single token says nothing."""
    assert expected == time_per_token(_call("stop", *answers))


def test_time_per_token_is_unknown_when_the_request_fails() -> None:
    """A request that was cut short would look fast."""
    assert time_per_token(_call("deadline", (5, 1.0, 3.0))) is None
