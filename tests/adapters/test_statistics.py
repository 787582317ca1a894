"""Intervals: against scipy, against published figures, and by simulation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adapters.statistics import difference_interval, mean_interval


def _binary(num_ones: int, count: int) -> list[float]:
    return [1.0] * num_ones + [0.0] * (count - num_ones)


@pytest.mark.parametrize(("num_ones", "count"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (81, 263), (1, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_mean_interval_equals_scipys_wilson_when_values_are_binary(
    num_ones: int, count: int, confidence: float
) -> None:
    """Two implementations of Wilson's score interval agree."""
    expected = stats.binomtest(num_ones, count).proportion_ci(confidence_level=confidence, method="wilson")
    found = mean_interval(_binary(num_ones, count), confidence=confidence)
    assert found.interval is not None
    assert (count, "Wilson") == (found.num_units, found.method)
    assert (expected.low, expected.high) == pytest.approx((found.interval.low, found.interval.high), abs=1e-12)


def test_mean_interval_equals_the_published_figures_when_values_are_binary() -> None:
    """Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263 gives 0.2553 to 0.3662."""
    interval = mean_interval(_binary(81, 263)).interval
    assert interval is not None
    assert pytest.approx((interval.low, interval.high), abs=5e-5) == (0.2553, 0.3662)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_interval_holds_its_estimate_when_counts_vary(counts: tuple[int, int]) -> None:
    """The interval stays within 0 and 1 and around the share."""
    interval = mean_interval(_binary(*counts)).interval
    assert interval is not None
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_mean_interval_equals_scipys_t_when_values_are_continuous(confidence: float) -> None:
    """Student's interval agrees with scipy's one-sample test."""
    values = [0.1, 0.9, 0.5, 2.5, -1.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    found = mean_interval(values, confidence=confidence)
    assert found.interval is not None
    assert (found.num_units, found.method) == (5, "Student's t")
    assert found.mean == pytest.approx(0.6)
    assert (expected.low, expected.high) == pytest.approx((found.interval.low, found.interval.high))


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_difference_interval_equals_scipys_welch_when_values_are_continuous(confidence: float) -> None:
    """Unequal sizes and variances, so that a pooled variance would differ."""
    treatment, control = [1.0, 2.0, 4.0, 8.0, 16.0, 3.5], [0.2, 0.4, 0.3]
    expected = stats.ttest_ind(treatment, control, equal_var=False).confidence_interval(confidence)
    found = difference_interval(treatment, control, confidence=confidence)
    assert found is not None
    assert (expected.low, expected.high) == pytest.approx((found.low, found.high))
    assert confidence == found.confidence
    assert found.estimate == pytest.approx(5.45)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((56, 70), (48, 80), (0.2000, 0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.6000, 0.1705, 0.8090)),
        ((5, 56), (0, 29), (0.0893, -0.0381, 0.1926)),
        ((0, 10), (0, 20), (0.0000, -0.1611, 0.2775)),
        ((10, 10), (0, 20), (1.0000, 0.6791, 1.0000)),
    ],
)
def test_difference_interval_equals_newcombes_table_when_values_are_binary(
    first: tuple[int, int], second: tuple[int, int], expected: tuple[float, float, float]
) -> None:
    """Newcombe (1998), Statistics in Medicine 17:873, table II, method 10."""
    found = difference_interval(_binary(*first), _binary(*second))
    assert found is not None
    assert expected == pytest.approx((found.estimate, found.low, found.high), abs=1e-4)


def test_difference_interval_changes_sign_when_sides_are_swapped() -> None:
    """Treatment minus control, for shares as for means."""
    for treatment, control in ((_binary(56, 70), _binary(48, 80)), ([0.5, 1.5, 4.0], [3.0, 2.5])):
        there, back = difference_interval(treatment, control), difference_interval(control, treatment)
        assert there is not None
        assert back is not None
        assert (-back.estimate, -back.high, -back.low) == pytest.approx((there.estimate, there.low, there.high))


@pytest.mark.parametrize(
    ("treatment", "control"),
    [([], []), ([1.0], [0.0]), ([1.0, 0.0], [1.0]), ([0.5], [0.2, 0.3]), ([0.5, 0.5], [0.25, 0.25])],
    ids=["nothing", "one each", "one control", "one treatment", "no variation"],
)
def test_difference_interval_is_none_when_there_is_too_little(treatment: list[float], control: list[float]) -> None:
    """No interval is invented for data that carries none."""
    assert difference_interval(treatment, control) is None


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [3.0, 3.0]])
def test_mean_interval_is_none_when_nothing_varies(values: list[float]) -> None:
    """The mean is given, and why there is no interval."""
    found = mean_interval(values)
    assert (None, values[0], len(values)) == (found.interval, found.mean, found.num_units)
    assert "no variation" in found.method


def test_mean_interval_covers_the_truth_when_simulated() -> None:
    """Of 2,000 seeded samples of 8, 95 % +- 1.5 % cover the mean: a normal quantile would give 91 %."""
    samples = np.random.default_rng(1).normal(3.0, 2.0, size=(2000, 8))
    intervals = [mean_interval(list(sample)).interval for sample in samples]
    share = np.mean([interval is not None and interval.low <= 3.0 <= interval.high for interval in intervals])
    assert 0.935 < share < 0.965


def test_difference_interval_covers_the_truth_when_simulated() -> None:
    """The small side has the great variance: a pooled variance would cover about 81 %, equal weights 99 %."""
    generator = np.random.default_rng(2)
    small, large = generator.normal(1.0, 3.0, size=(2000, 8)), generator.normal(0.0, 1.0, size=(2000, 24))
    intervals = [difference_interval(list(a), list(b)) for a, b in zip(small, large, strict=True)]
    share = np.mean([interval is not None and interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.935 < share < 0.965


def test_difference_interval_covers_the_truth_when_shares_are_simulated() -> None:
    """Shares near 1 with few units, where Wald's interval covers less than 90 %."""
    generator = np.random.default_rng(3)
    first, second = generator.random((2000, 20)) < 0.95, generator.random((2000, 20)) < 0.85
    intervals = [
        difference_interval(list(a.astype(float)), list(b.astype(float))) for a, b in zip(first, second, strict=True)
    ]
    share = np.mean([interval is not None and interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 < share < 0.98


def test_statistics_are_imported_without_scipys_when_a_process_starts() -> None:
    """`scipy.stats` takes longer to import than everything here together."""
    program = "import sys, adapters.statistics; print('scipy.stats' in sys.modules, 'scipy.special' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "False True" == found.stdout.strip()
