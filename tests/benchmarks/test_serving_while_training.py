"""What is made of the times between tokens."""

from __future__ import annotations

from benchmarks.serving_while_training import Gaps


def test_gaps_are_told_in_milliseconds_when_they_are_printed() -> None:
    """Mean, median and 95th percentile of the times between tokens, median of those to the first."""
    gaps = Gaps([number / 1000 for number in range(1, 102)], [0.1, 0.2, 0.4])
    assert str(gaps) == "between tokens mean 51 ms, p50 51 ms, p95 96 ms; to the first 200 ms"
