"""Paired comparisons against scipy's own tests, and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adapters.comparisons import compare_all, compare_pair, rate, sign_test

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9)


@given(wins=st.integers(0, 60), losses=st.integers(0, 60))
def test_sign_test_is_the_binomial_test_when_compared(wins: int, losses: int) -> None:
    """Two-sided and exact."""
    if wins + losses:
        assert stats.binomtest(wins, wins + losses).pvalue == pytest.approx(sign_test(wins, losses))
    else:
        assert 1.0 == sign_test(wins, losses)


@settings(max_examples=30)
@given(scores=SCORES.filter(lambda scores: len(scores) > 1))
def test_permutation_test_tries_every_sign_when_there_are_few_prompts(scores: list[tuple[int, int]]) -> None:
    """As scipy's, which goes through all of them, too."""
    found = compare_pair("a", "b", [(float(one), float(other)) for one, other in scores])
    first, second = (np.array(side, dtype=float) for side in zip(*scores, strict=True))
    expected = stats.permutation_test(
        (first - second,), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", vectorized=True
    )
    assert expected.pvalue == pytest.approx(found.permutation_p)


def test_permutation_test_is_close_to_the_t_test_when_there_are_many_prompts() -> None:
    """Drawn signs, with a fixed seed: the same scores give the same number."""
    draw = np.random.default_rng(1)
    differences = draw.normal(0.15, 1, size=200)
    found = compare_pair("a", "b", [(float(value), 0.0) for value in differences])
    assert stats.ttest_1samp(differences, 0).pvalue == pytest.approx(found.permutation_p, abs=0.01)
    assert found == compare_pair("a", "b", [(float(value), 0.0) for value in differences])


@given(scores=SCORES)
def test_comparison_turns_with_its_sides_when_they_change_places(scores: list[tuple[int, int]]) -> None:
    """Wins become losses, rates their complement, and the p-values stay."""
    one = compare_pair("a", "b", [(float(x), float(y)) for x, y in scores])
    other = compare_pair("b", "a", [(float(y), float(x)) for x, y in scores])
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert (1.0, one.sign_p, one.permutation_p) == pytest.approx(
        (one.win_rate + other.win_rate, other.sign_p, other.permutation_p)
    )
    assert len(scores) == one.wins + one.losses + one.ties
    if one.win_interval is not None:
        assert 0 <= one.win_interval.low <= one.win_rate <= one.win_interval.high <= 1


def test_false_alarms_are_rare_when_versions_are_equal() -> None:
    """With a level of 0.05, both tests in at most 5 % of 400 comparisons, and three standard errors."""
    draw = np.random.default_rng(2)
    found = [compare_pair("a", "b", [(float(x), float(y)) for x, y in draw.normal(size=(11, 2))]) for _ in range(400)]
    limit = 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5
    assert sum(item.sign_p < 0.05 for item in found) <= limit
    assert 0 < sum(item.permutation_p < 0.05 for item in found) <= limit


def test_versions_are_rated_when_each_has_won_and_lost() -> None:
    """The better one first; prompts that one of them failed are left out of its pairs."""
    comparisons = compare_all(
        {"a": [1, 1, 1, 0, None], "b": [0, 0, 1, 1, 1], "c": [0, 1, 0, 1, 0]},
    )
    assert [("a", "b", 4), ("a", "c", 4), ("b", "c", 5)] == [
        (item.first, item.second, item.num_prompts) for item in comparisons
    ]
    assert {"a", "b", "c"} == {rating.name for rating in rate(comparisons)}


def test_nobody_is_rated_when_one_won_everything() -> None:
    """A finite rating would be an invention."""
    assert [] == rate(compare_all({"a": [1, 1], "b": [0, 0]}))
