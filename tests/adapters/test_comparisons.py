"""Paired comparisons against scipy's own tests, and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adapters.comparisons import compare_all, compare_pair, mean_of_units, paired_difference, rate, sign_test

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9)


@given(wins=st.integers(0, 60), losses=st.integers(0, 60))
def test_sign_test_is_the_binomial_test_when_compared(wins: int, losses: int) -> None:
    """Two-sided and exact."""
    if wins + losses:
        assert stats.binomtest(wins, wins + losses).pvalue == pytest.approx(sign_test(wins, losses))
    else:
        assert 1.0 == sign_test(wins, losses)


@given(differences=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=2, max_size=20))
def test_interval_of_a_difference_is_students_when_values_look_like_shares(differences: list[float]) -> None:
    """Differences of 0 and 1 could as well have been below 0; where nothing varies there is no interval."""
    found = paired_difference(differences)
    if len(set(differences)) < 2:
        assert (differences[0], None) == (found.mean, found.interval)
        return
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.interval is not None
    assert tuple(expected) == pytest.approx((found.interval.low, found.interval.high))


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


def _interval_of_share(totals: list[float], counts: list[int]) -> tuple[float, float] | None:
    found = mean_of_units(totals, counts, is_share=True).interval
    return None if found is None else (found.low, found.high)


def test_share_has_one_method_when_no_unit_has_come_back_yet() -> None:
    """Two methods of 95 %, one until the first unit comes back and one after it, would err more often than either."""
    totals = [1.0, 0.0] * 20
    alone = mean_of_units(totals, [1] * 40).interval
    assert alone is not None
    assert (alone.low, alone.high) == _interval_of_share(totals, [1] * 40)
    assert _interval_of_share([*totals[:-1], 0.0], [1] * 39 + [2]) == pytest.approx((alone.low, alone.high), abs=0.05)
    assert _interval_of_share([1.0, 0.0] * 9 + [1.0], [1] * 19) is None


@pytest.mark.parametrize("count", [1, 3])
def test_share_stays_between_0_and_1_when_nearly_all_are_the_same(count: int) -> None:
    """An asymptotic sequence knows no bounds of its own."""
    for units in ([1.0] * 24 + [0.0], [0.0] * 24 + [1.0]):
        interval = _interval_of_share([unit * count for unit in units], [count] * 25)
        assert interval is not None
        assert 0 <= interval[0] < interval[1] <= 1
        assert units[0] in interval


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_share_is_held_at_every_look_when_each_user_comes_once(share: float) -> None:
    """At most 5 % of runs that are looked at after every user, and three errors of that."""
    draw = np.random.default_rng(5)
    num_wrong = 0
    for _ in range(100):
        values = (draw.random(300) < share).astype(float).tolist()
        ends = (_interval_of_share(values[:n], [1] * n) for n in range(20, 301, 4))
        num_wrong += any(found is not None and not found[0] <= share <= found[1] for found in ends)
    assert num_wrong <= 100 * 0.05 + 3 * (100 * 0.05 * 0.95) ** 0.5


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
