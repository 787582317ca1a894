"""Confidence sequences: against independent figures, by exact enumeration, and their invariants."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adapters.statistics import (
    MIN_UNITS,
    Interval,
    difference_interval,
    difference_sequence,
    mean_sequence,
)
from adapters.statistics.betting import Bets, mean_share_bounds, share_bounds, share_evidence
from adapters.statistics.mixtures import ArmMoments, mixture_multiplier, tuned_time

# confseq 0.0.11 (Howard et al.) tunes by an approximation; these factors translate its plan into ours.
_THEIR_TIME = 2 * math.log(20) + math.log(1 + 2 * math.log(20))


def _sample(seed: int, count: int, mean: float = 0.0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(mean, 1.0, count)]


def _coins(seed: int, count: int, rate: float) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).random(count) < rate]


def _width(interval: Interval | None) -> float:
    assert interval is not None
    return interval.high - interval.low


@pytest.mark.parametrize(
    ("time", "planned", "expected"),
    [(100, 100, 30.35208990376253), (1000, 100, 102.51228683166386), (1000, 10000, 121.90753146341501)],
)
def test_boundary_equals_confseqs_when_the_variance_is_known(time: int, planned: int, expected: float) -> None:
    """`confseq.boundaries.normal_mixture_bound(time, 0.05, planned, alpha_opt=0.05, is_one_sided=False)`."""
    found = math.sqrt(time) * mixture_multiplier(_THEIR_TIME * time / planned, 1e13, 0.95)
    assert pytest.approx(expected, rel=1e-9) == float(found)


@pytest.mark.parametrize(
    ("num_ones", "count", "planned", "expected"),
    [
        (30, 100, 100, (0.1736349084123049, 0.4476766977893476)),
        (500, 1000, 1000, (0.4520916083095017, 0.547908391690271)),
        (500, 1000, 10000, (0.4393419214222831, 0.5606580785774895)),
        (5, 1000, 1000, (0.0006280297513268351, 0.01467691174184356)),
    ],
)
def test_share_sequence_equals_confseqs_when_the_prior_is_theirs(
    num_ones: int, count: int, planned: int, expected: tuple[float, float]
) -> None:
    """`confseq.boundaries.bernoulli_confidence_interval(num_ones, count, 0.05, planned)`."""
    weight = planned / _THEIR_TIME - 1
    found = mean_share_bounds(num_ones, count, confidence=0.95, planned_units=weight * tuned_time(0.95))
    assert pytest.approx(expected, abs=1e-9) == found


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_boundary_is_tightest_at_the_planned_number_when_compared(confidence: float) -> None:
    """The tuned time solves log((1 + x) / alpha^2) = x; with another plan the boundary is wider there."""
    best = tuned_time(confidence)
    assert pytest.approx(best) == math.log((1 + best) / (1 - confidence) ** 2)
    widths = [float(mixture_multiplier(best * factor, 1e13, confidence)) for factor in (0.8, 1.0, 1.25)]
    assert min(widths) == widths[1]
    assert pytest.approx(math.sqrt(1 + best)) == widths[1]


def test_boundary_is_wider_when_the_variance_is_known_less_well() -> None:
    """Few degrees of freedom cost width; with the fewest nothing is excluded at all."""
    widths = [float(mixture_multiplier(1.0, freedom, 0.95)) for freedom in (1, 20, 100, 1e9)]
    assert sorted(widths, reverse=True) == widths
    assert math.inf == widths[0]
    assert math.inf > widths[1]


@pytest.mark.parametrize("block", [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("supposed", [0.0, 0.2, -0.35])
def test_gamblers_win_only_against_a_wrong_difference_when_every_outcome_is_weighed(
    block: tuple[int, int], supposed: float
) -> None:
    """Exactly, over all outcomes of six blocks: against the truth nobody can expect more than he began with."""
    bets = Bets.planned(confidence=0.95, planned_units=500, treatment_share=block[0] / sum(block))
    assert block == bets.block
    for rate in np.linspace(max(0, -supposed), min(1, 1 - supposed), 7):
        for side in (1, -1):
            assert _expected_fortune(bets, rate + supposed, rate, supposed, side) <= 1 + 1e-9
    assert _expected_fortune(bets, 0.9, 0.1, supposed, 1) > 1.05
    assert _expected_fortune(bets, 0.1, 0.9, supposed, -1) > 1.05


def _expected_fortune(bets: Bets, treatment_rate: float, control_rate: float, supposed: float, side: int) -> float:
    sizes = [6 * size for size in bets.block]
    ones = np.meshgrid(*(np.arange(size + 1) for size in sizes), indexing="ij")
    treatment, control = (np.stack([size - one, one], axis=-1) for size, one in zip(sizes, ones, strict=True))
    chances = [
        stats.binom.pmf(one, n, p) for one, n, p in zip(ones, sizes, (treatment_rate, control_rate), strict=True)
    ]
    fortunes = np.exp(share_evidence(np.array([0.0, 1.0]), treatment, control, supposed, bets, side=side))
    return float((chances[0] * chances[1] * fortunes).sum())


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_share_sequence_holds_the_rate_when_every_path_is_weighed(rate: float) -> None:
    """The exact probability of ever excluding the true rate within 40 coins is at most 5 %."""
    alive = np.array([1.0])  # by number of ones, of the paths that never excluded it
    for count in range(1, 41):
        alive = np.append(alive * (1 - rate), 0.0) + np.insert(alive * rate, 0, 0.0)
        bounds = [mean_share_bounds(ones, count, confidence=0.95, planned_units=20) for ones in range(count + 1)]
        alive = np.where([low <= rate <= high for low, high in bounds], alive, 0.0)
    assert 0.95 <= alive.sum() < 1


def test_share_sequence_narrows_when_nothing_ever_happens() -> None:
    """No errors in either arm is evidence too: the interval shrinks with the units, and needs no variation."""
    widths = [_width(difference_sequence([0.0] * count, [0.0] * count)) for count in (50, 500, 5000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.004


def test_share_sequence_takes_shares_of_a_unit_when_told_so() -> None:
    """Values between 0 and 1 have an exact interval; the same values of unknown kind, that don't vary, have none."""
    assert difference_sequence([0.1] * 40, [0.6] * 40) is None
    found = difference_sequence([0.1] * 40, [0.6] * 40, is_share=True)
    assert found is not None
    assert -1 <= found.low < -0.5 < found.high < 0


def test_sequence_refuses_a_value_outside_when_shares_are_promised() -> None:
    """A share of 1.5 is a caller's error."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        difference_sequence([0.5, 1.5], [0.0, 1.0], is_share=True)


def test_sequence_is_none_when_there_is_too_little() -> None:
    """Below the least number of units, without units, and where an arm of any values does not vary."""
    enough, few = _sample(1, MIN_UNITS), _sample(2, MIN_UNITS - 1)
    assert difference_sequence(enough, few) is None
    assert difference_sequence(few, enough) is None
    assert difference_sequence([], [1.0]) is None
    assert mean_sequence([]) is None
    assert mean_sequence(few) is None
    assert difference_sequence([2.0] * 50, _sample(3, 50)) is None
    assert difference_sequence(_sample(1, 100), _sample(2, 100)) is not None


def test_sequence_is_wider_than_one_look_when_both_are_made() -> None:
    """The price of looking at any time, at the planned number: between 1.3 and 2 times the width."""
    for treatment, control in ((_sample(1, 500), _sample(2, 500, 0.3)), (_coins(1, 500, 0.4), _coins(2, 500, 0.5))):
        ratio = _width(difference_sequence(treatment, control, planned_units=1000)) / _width(
            difference_interval(treatment, control)
        )
        assert 1.3 < ratio < 2


def test_sequence_reaches_further_to_the_long_tail_when_a_small_arm_is_skewed() -> None:
    """A small arm of lognormal values probably lacks its rare great ones: the interval goes further up than down."""
    values = [float(value) for value in np.random.default_rng(4).lognormal(size=1000)]
    found = difference_sequence(values[:100], values[100:], planned_units=1000)
    assert found is not None
    assert found.high - found.estimate > 1.2 * (found.estimate - found.low)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 120), st.integers(2, 120), st.booleans())
def test_sequence_changes_sign_when_arms_are_swapped(seed: int, first: int, second: int, are_coins: bool) -> None:
    """Treatment minus control, for shares as for means."""
    generator = np.random.default_rng(seed)
    draws = [generator.random(size) if are_coins else generator.lognormal(size=size) for size in (first, second)]
    sides = [[float(value < 0.4) if are_coins else float(value) for value in side] for side in draws]
    there, back = difference_sequence(sides[0], sides[1]), difference_sequence(sides[1], sides[0])
    assert (there is None) == (back is None)
    if there is not None and back is not None:
        assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 120), st.booleans(), st.floats(0.8, 0.99), st.floats(0.001, 0.009))
def test_sequence_widens_when_more_confidence_is_asked(
    seed: int, count: int, are_coins: bool, confidence: float, more: float
) -> None:
    """More confidence is never narrower, but for a hundredth: each boundary is tuned to its own level."""
    first, second = (
        _coins(seed + place, count, 0.4) if are_coins else _sample(seed + place, count) for place in (0, 1)
    )
    loose = difference_sequence(first, second, confidence=confidence, planned_units=200)
    sure = difference_sequence(first, second, confidence=confidence + more, planned_units=200)
    if sure is not None and loose is not None:
        assert _width(sure) >= 0.99 * _width(loose)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_sequence_does_not_care_when_units_come_in_another_order(random: Random, are_coins: bool) -> None:
    """Of equal arms every unit counts: the order within an arm changes nothing."""
    treatment, control = (_coins(1, 60, 0.3), _coins(2, 60, 0.6)) if are_coins else (_sample(1, 60), _sample(2, 60))
    shuffled = treatment.copy()
    random.shuffle(shuffled)
    expected, found = difference_sequence(treatment, control), difference_sequence(shuffled, control)
    assert expected is not None
    assert found is not None
    assert (expected.low, expected.high) == pytest.approx((found.low, found.high))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_sequence_narrows_when_the_same_units_come_four_times(seed: int, are_coins: bool) -> None:
    """More of the same is more certainty, before and after the planned number of units."""
    first, second = (
        (_coins(seed, 50, 0.4), _coins(seed + 1, 50, 0.6)) if are_coins else (_sample(seed, 50), _sample(seed + 1, 50))
    )
    for planned in (100, 400):
        before = difference_sequence(first, second, planned_units=planned)
        assert _width(difference_sequence(first * 4, second * 4, planned_units=planned)) < _width(before)


def test_sequence_uses_all_units_when_the_planned_share_is_the_true_one() -> None:
    """Exact bounds of a 10/90 split are wider where one in ten was not planned, since whole blocks alone count."""
    treatment, control = _coins(1, 200, 0.02), _coins(2, 1800, 0.02)
    widths = []
    for share in (0.1, 0.5):
        bets = Bets.planned(confidence=0.95, planned_units=2000, treatment_share=share)
        low, high = share_bounds(treatment, control, bets, confidence=0.95)
        widths.append(high - low)
    assert widths[0] < widths[1]


@pytest.mark.parametrize("percent", [1, 3, 5, 7, 10, 25, 40])
def test_blocks_have_the_arms_ratio_when_one_arm_is_small(percent: int) -> None:
    """Within a twentieth, whichever arm is the small one: a canary's share is not rounded to none or to half."""
    small, large = Bets.planned(confidence=0.95, planned_units=500, treatment_share=percent / 100).block
    assert pytest.approx(percent / (100 - percent), rel=0.05) == small / large
    assert (large, small) == Bets.planned(confidence=0.95, planned_units=500, treatment_share=1 - percent / 100).block


def test_units_of_their_own_time_are_compared_when_their_places_are_told() -> None:
    """A rate that rises for both, of which the control's second half was never heard of: without places it differs."""
    rising = [0.0] * 1000 + [1.0, 0.0] * 500
    places = (range(0, 4000, 2), [*range(1, 2000, 2)])
    bets = Bets.planned(confidence=0.95, planned_units=4000)
    low, high = share_bounds(rising, rising[:1000], bets, confidence=0.95, places=(list(places[0]), places[1]))
    assert (True, True) == (low < 0 < high, high - low < 0.1)
    late = [place for place in range(1, 4000, 2) if place > 2000]
    low, high = share_bounds(rising, [1.0, 0.0] * 500, bets, confidence=0.95, places=(list(places[0]), late))
    assert low < 0 < high
    assert share_bounds(rising, [1.0, 0.0] * 500, bets, confidence=0.95)[1] < 0


def test_mean_sequence_is_exact_for_coins_and_asymptotic_otherwise() -> None:
    """Either holds its mean, and the exact one stays between 0 and 1."""
    for values in (_coins(1, 30, 0.05), _coins(1, 30, 0.95)):
        interval = mean_sequence(values, planned_units=100)
        assert interval is not None
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    interval = mean_sequence(_sample(1, 100, 3.0), planned_units=100)
    assert interval is not None
    assert interval.low < interval.estimate < interval.high


def test_moments_equal_scipys_when_a_sample_is_given() -> None:
    """Variance with divisor n - 1, third central moment with divisor n."""
    values = [0.5, 1.0, 4.0, 2.5]
    moments = ArmMoments.of(values)
    expected = (4, np.mean(values), np.var(values, ddof=1), stats.moment(values, 3))
    assert pytest.approx(expected) == (moments.count, moments.mean, moments.variance, moments.third)


@given(st.floats(-1e6, 1e6, allow_subnormal=False), st.integers(20, 400), st.integers(20, 400))
def test_nothing_is_excluded_when_all_values_are_equal(value: float, first: int, second: int) -> None:
    """The mean of equal values is rounded, so that they seem to vary around it: by nothing that a user did."""
    assert difference_sequence([value] * first, [value] * second, is_share=False) is None
    assert 0 == ArmMoments.of([value] * first).variance


def test_share_sequence_holds_its_estimate_when_both_methods_contradict_each_other() -> None:
    """Users of an arm whose first half says yes and whose second half no: blocks know the first half alone."""
    found = difference_sequence([1.0] * 100 + [0.0] * 60, [1.0] * 150 + [0.0] * 150, planned_units=1000, is_share=True)
    assert found is not None
    assert found.low <= found.estimate <= found.high
    assert found.low < 0 < found.high


def test_there_is_no_interval_when_it_would_not_hold_its_estimate() -> None:
    """Of 1,660 users 70 have a partner; these nearly all say yes and the rest no, and the other arm never varies."""
    assert difference_sequence([1.0] * 60 + [0.0] * 1600, [0.0] * 70, is_share=True) is None


def test_share_sequence_is_that_of_few_values_when_many_differ() -> None:
    """Twenty thousand marks that all differ are counted in one pass."""
    marks = np.random.default_rng(1).random(20_000)
    found = difference_sequence(marks, marks[::-1].copy(), is_share=True)
    assert found is not None
    assert found.low < 0 < found.high
