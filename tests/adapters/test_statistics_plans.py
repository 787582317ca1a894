"""Plans, covariates, several arms, sample ratio and ratings: against statsmodels, closed forms and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.discrete.discrete_model import Logit
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import power_proportions_2indep

from adapters.statistics import (
    adjust_for_covariate,
    adjusted_confidence,
    bradley_terry,
    difference_interval,
    duration_days,
    ratio_values,
    required_units,
    sample_ratio,
    thompson_weights,
)
from adapters.statistics.mixtures import ArmMoments


@pytest.mark.parametrize("power", [0.8, 0.9])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_required_units_equal_statsmodels_when_one_look_is_planned(power: float, share: float) -> None:
    """A normal quantile and a known deviation, for equal and unequal arms."""
    ratio = share / (1 - share)
    control = NormalIndPower().solve_power(0.1, power=power, alpha=0.05, ratio=ratio)
    found = required_units(0.2, std_dev=2.0, power=power, treatment_share=share, analysis="fixed")
    assert math.ceil(control * (1 + ratio)) == pytest.approx(found, abs=1)


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_required_units_reach_their_power_when_rates_are_compared(power: float) -> None:
    """The unpooled variance of two rates, as statsmodels has it, which rounds otherwise."""
    units = required_units(0.05, base_rate=0.4, power=power, analysis="fixed")
    found = power_proportions_2indep(0.05, 0.4, units / 2, alternative="two-sided", return_results=False)
    assert float(found) == pytest.approx(power, abs=2e-3)


def test_a_sequence_needs_more_units_than_one_look_when_both_are_planned() -> None:
    """About twice as many, of which stopping early gives much back."""
    ratio = required_units(0.05, base_rate=0.4) / required_units(0.05, base_rate=0.4, analysis="fixed")
    assert 1.7 < ratio < 2.1


def test_duration_is_rounded_up_when_days_are_counted() -> None:
    """A tenth of 300 new users a day are 30: 91 units take four days."""
    assert [3, 4] == [duration_days(count, units_per_day=300, traffic_percent=10) for count in (90, 91)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effect": 0.0, "base_rate": 0.5}, "not 0"),
        ({"effect": 0.1}, "either"),
        ({"effect": 0.1, "base_rate": 0.5, "std_dev": 1.0}, "either"),
        ({"effect": 0.1, "std_dev": 0.0}, "above 0"),
        ({"effect": 0.6, "base_rate": 0.5}, "between 0 and 1"),
        ({"effect": 0.1, "base_rate": 0.5, "power": 1.0}, "power"),
        ({"effect": 0.1, "base_rate": 0.5, "treatment_share": 0.0}, "treatment_share"),
        ({"effect": 0.1, "base_rate": 0.5, "confidence": 95.0}, "confidence"),
    ],
)
def test_required_units_refuse_what_cannot_be_planned_when_asked(arguments: dict[str, float], message: str) -> None:
    """Each says what was expected."""
    with pytest.raises(ValueError, match=message):
        required_units(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("units_per_day", [0.0, math.nan])
def test_duration_refuses_days_without_units_when_asked(units_per_day: float) -> None:
    """It would take for ever."""
    with pytest.raises(ValueError, match="units every day"):
        duration_days(10, units_per_day=units_per_day)


def _before_and_after(seed: int, effect: float) -> tuple[list[list[float]], list[list[float]]]:
    generator = np.random.default_rng(seed)
    before = [generator.normal(5, 2, size) for size in (300, 200)]
    after = [past * 0.8 + generator.normal(0, 1, len(past)) for past in before]
    return [(after[0] + effect).tolist(), after[1].tolist()], [past.tolist() for past in before]


def test_cuped_equals_a_regression_when_a_covariate_is_given() -> None:
    """Slope and effect of least squares by statsmodels, with an intercept, the arm and the covariate."""
    values, before = _before_and_after(1, 0.5)
    design = np.column_stack([np.ones(500), np.repeat([1.0, 0.0], [300, 200]), np.concatenate(before)])
    fitted = OLS(np.concatenate(values), design).fit()
    adjusted = adjust_for_covariate(*values, *before)
    assert adjusted.slope == pytest.approx(float(fitted.params[2]))
    found = difference_interval(adjusted.treatment, adjusted.control)
    assert found is not None
    assert found.estimate == pytest.approx(float(fitted.params[1]))
    low, high = fitted.conf_int()[1]
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)  # Welch's variance, not the pooled one


def test_cuped_narrows_the_interval_as_much_as_it_says_when_the_covariate_foretells() -> None:
    """The width falls by the root of the variance that is left; a covariate without variation changes nothing."""
    values, before = _before_and_after(2, 0.5)
    found = adjust_for_covariate(*values, *before)
    adjusted, plain = difference_interval(found.treatment, found.control), difference_interval(*values)
    assert adjusted is not None
    assert plain is not None
    removed = found.variance_removed
    assert 0.6 < removed < 0.8
    ratio = (adjusted.high - adjusted.low) / (plain.high - plain.low)
    assert ratio == pytest.approx(math.sqrt(1 - removed), rel=0.02)
    unchanged = adjust_for_covariate(values[0], values[1], [1.0] * 300, [1.0] * 200)
    assert plain == difference_interval(unchanged.treatment, unchanged.control)


def test_cuped_refuses_a_covariate_of_other_units_when_numbers_differ() -> None:
    """A value without its past can't be adjusted."""
    with pytest.raises(ValueError, match="covariate for each"):
        adjust_for_covariate([1.0, 2.0], [1.0], [1.0], [1.0])


def test_adjusted_confidence_shares_the_error_when_there_are_several_comparisons() -> None:
    """A third of 5 % for each of three; none is an error."""
    assert adjusted_confidence(0.95, 3) == pytest.approx(1 - 0.05 / 3)
    with pytest.raises(ValueError, match="at least one"):
        adjusted_confidence(0.95, 0)


def test_thompson_weights_equal_the_closed_form_when_there_is_one_unit_an_arm() -> None:
    """Beta(2, 1) beats Beta(1, 2) with probability 5/6; where less is better it is the other way round."""
    assert thompson_weights([[1.0], [0.0]], floor=0) == pytest.approx([5 / 6, 1 / 6], abs=1e-4)
    assert thompson_weights([[1.0], [0.0]], floor=0, direction="decrease") == pytest.approx([1 / 6, 5 / 6], abs=1e-4)


def test_thompson_weights_equal_draws_when_there_are_three_arms() -> None:
    """200,000 draws of each posterior, for shares and for means."""
    generator = np.random.default_rng(1)
    coins = [[1.0] * ones + [0.0] * (40 - ones) for ones in (20, 24, 12)]
    draws = [generator.beta(1 + sum(arm), 41 - sum(arm), 200_000) for arm in coins]
    expected = np.bincount(np.argmax(draws, axis=0), minlength=3) / 200_000
    assert thompson_weights(coins, floor=0) == pytest.approx(list(expected), abs=0.005)
    times = [generator.normal(mean, 1.0, 30).tolist() for mean in (0.0, 0.3, 0.2)]
    draws = [np.mean(arm) + np.std(arm, ddof=1) / math.sqrt(30) * generator.standard_t(29, 200_000) for arm in times]
    expected = np.bincount(np.argmin(draws, axis=0), minlength=3) / 200_000
    assert thompson_weights(times, floor=0, direction="decrease") == pytest.approx(list(expected), abs=0.005)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1).map(float), max_size=30), min_size=2, max_size=5), st.floats(0, 0.2))
def test_thompson_weights_keep_their_floor_when_arms_vary(arms: list[list[float]], floor: float) -> None:
    """They add up to 1, and none falls below the floor."""
    weights = thompson_weights(arms, floor=floor)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= floor - 1e-12


def test_thompson_weights_are_equal_when_an_arm_knows_nothing() -> None:
    """One unit of any values has no spread, shares need none; a floor that does not fit is an error."""
    assert [0.5, 0.5] == thompson_weights([[0.3], [0.2, 0.9]])
    assert [0.05 + 0.9 * 6 / 7, 0.05 + 0.9 / 7] == pytest.approx(thompson_weights([[1.0] * 5, []]), abs=1e-3)
    with pytest.raises(ValueError, match="floor"):
        thompson_weights([[1.0], [0.0], [1.0]], floor=0.4)


@pytest.mark.parametrize(("counts", "weights"), [((480, 520), (1, 1)), ((900, 130, 20), (90, 8, 2)), ((0, 0), (1, 3))])
def test_sample_ratio_equals_scipys_bayes_factor_when_counts_are_given(
    counts: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    """A Dirichlet-multinomial with 1,000 pseudo-units around the planned shares, against the multinomial."""
    shares = np.array(weights) / sum(weights)
    mixed = stats.dirichlet_multinomial.logpmf(counts, 1000 * shares, sum(counts))
    expected = min(1.0, math.exp(stats.multinomial.logpmf(counts, sum(counts), shares) - mixed))
    found = sample_ratio(counts, weights)
    assert found.p_value == pytest.approx(expected)
    assert (expected <= 0.01) == found.fired
    assert found.expected == pytest.approx(tuple(sum(counts) * shares))


def test_sample_ratio_never_alarms_too_often_when_every_path_is_weighed() -> None:
    """The exact probability of any alarm within 300 units at 50 %: at most that, and not nothing."""
    alive = np.array([1.0])  # by units in the first arm, of the paths without an alarm
    for count in range(1, 301):
        alive = (np.append(alive, 0.0) + np.insert(alive, 0, 0.0)) / 2
        fired = [mass > 0 and sample_ratio((n, count - n), (1, 1), alpha=0.5).fired for n, mass in enumerate(alive)]
        alive = np.where(fired, 0.0, alive)
        alive[alive < 1e-9] = 0.0
    assert 0.005 < 1 - alive.sum() <= 0.5


def test_sample_ratio_fires_when_the_split_is_not_the_planned_one() -> None:
    """48/52 of 20,000 units is an alarm for 50/50, none for what it is."""
    assert sample_ratio((9600, 10400), (50, 50)).fired
    assert not sample_ratio((9600, 10400), (48, 52)).fired


@pytest.mark.parametrize(("counts", "weights"), [((1, 2), (1,)), ((1, 2), (0, 1)), ((-1, 2), (1, 1)), ((), ())])
def test_sample_ratio_refuses_arms_without_counts_or_weights_when_asked(
    counts: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    """What was found is in the message."""
    with pytest.raises(ValueError, match="count and a weight"):
        sample_ratio(counts, weights)


def test_bradley_terry_equals_a_logistic_regression_when_three_are_compared() -> None:
    """Statsmodels' fit with the last as reference, moved to a mean of 0; intervals from its covariance."""
    wins = {("a", "b"): 7, ("b", "a"): 3, ("b", "c"): 6, ("c", "b"): 4, ("a", "c"): 8, ("c", "a"): 3}
    rows, results = [], []
    for (winner, loser), count in wins.items():
        row = [float(name == winner) - float(name == loser) for name in ("a", "b")]
        rows += [row] * count + [[-value for value in row]] * count
        results += [1.0] * count + [0.0] * count
    fitted = Logit(np.array(results), np.array(rows)).fit(disp=0)
    centre = np.array([[2, -1], [-1, 2], [-1, -1]]) / 3
    strengths = centre @ fitted.params
    errors = np.sqrt(2 * np.diag(centre @ fitted.cov_params() @ centre.T))  # every comparison stands there twice
    found = {rating.name: rating.strength for rating in bradley_terry(wins)}
    for name, strength, error in zip("abc", strengths, errors, strict=True):
        expected = (strength, strength - 1.959964 * error, strength + 1.959964 * error)
        assert (found[name].estimate, found[name].low, found[name].high) == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_gives_the_log_odds_when_two_are_compared() -> None:
    """Three to one is 191 points of Elo; a tie is half a win for each."""
    best, other = bradley_terry({("new", "old"): 29 + 2 / 2, ("old", "new"): 9 + 2 / 2})
    assert ("new", "old") == (best.name, other.name)
    assert best.strength.estimate - other.strength.estimate == pytest.approx(math.log(3))
    assert best.elo - other.elo == pytest.approx(190.85, abs=0.01)
    assert best.strength.estimate + other.strength.estimate == pytest.approx(0)


@pytest.mark.parametrize(
    "wins",
    [
        {},
        {("a", "b"): 3},
        {("a", "a"): 1},
        {("a", "b"): -1.0, ("b", "a"): 1},
        {("a", "b"): 1, ("b", "a"): 1, ("c", "d"): 1},
    ],
    ids=["nothing", "never lost", "itself", "negative", "apart"],
)
def test_bradley_terry_refuses_when_ratings_are_not_finite(wins: dict[tuple[str, str], float]) -> None:
    """Somebody who never lost has no rating."""
    with pytest.raises(ValueError, match="expected"):
        bradley_terry(wins)


def test_ratio_values_have_the_mean_and_variance_of_the_ratio_when_units_differ() -> None:
    """The mean is outcomes over requests; the error of it is that of the delta method, written out here."""
    totals, counts = [2.0, 0.0, 5.0, 1.0], [4, 1, 6, 1]
    moments = ArmMoments.of(ratio_values(totals, counts))
    ratio, size = 8 / 12, 3
    expected = sum((total - ratio * count) ** 2 for total, count in zip(totals, counts, strict=True)) / 3 / size**2
    assert (4, pytest.approx(ratio), pytest.approx(expected)) == (moments.count, moments.mean, moments.variance)
    assert [0.5, 1.0, 0.0] == ratio_values([0.5, 1.0, 0.0], [1, 1, 1])
    assert [] == ratio_values([], [])


@pytest.mark.parametrize(("totals", "counts"), [([1.0], []), ([1.0], [0])])
def test_ratio_values_refuse_units_without_requests_when_asked(totals: list[float], counts: list[int]) -> None:
    """A unit without a request is no unit."""
    with pytest.raises(ValueError, match="at least 1"):
        ratio_values(totals, counts)
