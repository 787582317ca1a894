"""What the abuse benchmark calls a failure."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from benchmarks.abuse import Abuse, Level, Report, Tally, format_report, is_level

LEVEL = Level(in_flight=0, running=0, waiting=0, answered=5, num_files=20, megabytes=10)


def _report(after: Level = LEVEL, tally: Tally | None = None) -> Report:
    return Report(Abuse(), tally or Tally(), LEVEL, after)


@pytest.mark.parametrize("change", [{"in_flight": 1}, {"running": 1}, {"waiting": 1}, {"num_files": 36}])
def test_server_is_not_level_when_something_is_left(change: dict[str, int]) -> None:
    """A request is enough, and files beyond those of a pool that was not full before: 15."""
    assert is_level(_report(dataclasses.replace(LEVEL, num_files=35)))
    assert not is_level(_report(dataclasses.replace(LEVEL, **change)))


def test_server_errors_are_counted_when_they_are_no_503() -> None:
    """In answers to garbage too; a server that is starting or stopping may say so."""
    tally = Tally(statuses=Counter({200: 9, 503: 4, 500: 1}), garbage=Counter({400: 3, 502: 2}))
    assert 3 == tally.num_server_errors
    assert "| 5xx but 503 | 3 |" in format_report(_report(tally=tally)).splitlines()
