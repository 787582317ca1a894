"""What is told of one unit from its requests alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from adapters.outcomes import AnsweredRequest, UnitOutcomes

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_TIMES = st.tuples(st.integers(0, 5), st.integers(0, 5))  # seconds until a request, and until its answer


def _request(began_s: int, took_s: int) -> AnsweredRequest:
    return AnsweredRequest(BEGAN + timedelta(seconds=began_s), False, False, None, took_s * 1000.0, 1, False)


@given(st.lists(_TIMES, min_size=1, max_size=6))
def test_first_answer_is_the_one_that_ended_first_when_requests_overlap(times: list[tuple[int, int]]) -> None:
    """Of several that ended together the one that was asked first, however the others lie."""
    requests = [_request(*pair) for pair in sorted(times, key=lambda pair: pair[0])]
    expected = min(range(len(requests)), key=lambda place: requests[place].ended_at)
    assert requests[expected] is UnitOutcomes("u", requests).first_answered
