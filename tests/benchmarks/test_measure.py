"""How variants are compared."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.measure import alternate, paired_ratio
from benchmarks.over_http import Choice, shuffled
from clients.http import ChatAnswer
from clients.load import LoadRequest, LoadResult, percentile, summarise_load


def test_alternate_turns_the_order_when_a_repeat_ends() -> None:
    """Every variant runs once a repeat; every other repeat goes backwards."""
    calls: list[str] = []

    def run(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = alternate({"a": partial(run, "a"), "b": partial(run, "b")}, 3)
    assert ["a", "b", "b", "a", "a", "b"] == calls
    assert {"a": [1, 4, 5], "b": [2, 3, 6]} == results


def test_ratio_is_the_median_of_pairs_when_one_repeat_was_disturbed() -> None:
    """The ratio of medians would be 1.5 here: a slow moment that hits one side must not count."""
    assert 2.0 == paired_ratio([10.0, 6.0, 20.0], [5.0, 3.0, 4.0])


def test_ratio_refuses_when_a_repeat_is_missing() -> None:
    """Pairs that don't match can't be compared."""
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_summary_counts_good_answers_when_some_failed() -> None:
    """Tokens and first tokens come from the answers, the time from the whole load."""
    request = LoadRequest("base", "hello")
    good = LoadResult(request, ChatAnswer(usage={"completion_tokens": 6}), started=1.0, first_token=1.5, ended=3.0)
    bad = LoadResult(request, ChatAnswer(), started=2.0, ended=5.0, error="refused")
    summary = summarise_load([good, bad])
    assert (2, ("refused",), 6, 4.0, (0.5,)) == (
        summary.num_requests,
        summary.errors,
        summary.num_tokens,
        summary.seconds,
        summary.ttft_s,
    )
    assert 1.5 == summary.tokens_per_second


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.51, 3.0), (0.95, 4.0), (1.0, 4.0), (0.0, 1.0)])
def test_percentile_takes_a_value_that_was_seen_when_asked(share: float, expected: float) -> None:
    """Nearest rank: no value is made up between two."""
    assert expected == percentile([4.0, 1.0, 3.0, 2.0], share)


def test_shuffled_uses_every_choice_equally_when_the_number_divides() -> None:
    """Random order, the same with the same seed, nobody left out."""
    choices = [Choice(name) for name in "abcd"]
    order = shuffled(choices, 8, seed=0)
    assert order == shuffled(choices, 8, seed=0)
    assert sorted("abcdabcd") == sorted(choice.model for choice in order)
    assert [*choices, *choices] != order
