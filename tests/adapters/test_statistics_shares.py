"""The sequence for shares: exact where nothing varies, never wider for having two halves than it must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from adapters.statistics import difference_sequence, share_difference_sequence

SEED = 20261121


def test_share_sequence_is_there_when_no_arm_varies() -> None:
    """Without a single error in either arm the interval still shrinks as users come."""
    few = share_difference_sequence([0.0] * 100, [0.0] * 100)
    many = share_difference_sequence([0.0] * 2000, [0.0] * 2000)
    assert few is not None
    assert many is not None
    assert 0 == few.estimate == many.estimate
    assert -few.low == pytest.approx(few.high, abs=1e-6)
    assert 0.01 > many.high > 0
    assert few.high > 5 * many.high


def test_share_sequence_sees_harm_when_the_control_has_no_error_at_all() -> None:
    """Three errors in ten against none in as many: plain variances have nothing to say."""
    treatment, control = [1.0] * 30 + [0.0] * 70, [0.0] * 100
    assert difference_sequence(treatment, control) is None
    found = share_difference_sequence(treatment, control)
    assert found is not None
    assert 0.05 < found.low < 0.3 < found.high


def test_share_sequence_is_about_the_plain_one_when_there_is_plenty_of_both_kinds() -> None:
    """What the exact part takes of the error costs next to nothing."""
    treatment, control = [1.0, 0.0] * 1000, [1.0, 0.0, 0.0] * 600
    plain, found = difference_sequence(treatment, control), share_difference_sequence(treatment, control)
    assert plain is not None
    assert found is not None
    assert 1 <= (found.high - found.low) / (plain.high - plain.low) < 1.02


def test_share_sequence_ends_where_the_evidence_reaches_the_level_when_recomputed() -> None:
    """Against a direct search over all pairs of means: the ends are where the best pair is just rejected."""
    treatment, control = [1.0] * 3 + [0.0] * 200, [1.0] + [0.0] * 150
    found = share_difference_sequence(treatment, control)
    assert found is not None

    def evidence(difference: float) -> float:
        def log_ratio(second: float) -> float:
            total = 0.0
            for values, mean in ((treatment, second + difference), (control, second)):
                ones, zeros = sum(values), len(values) - sum(values)
                total += special.betaln(0.5 + ones, 0.5 + zeros) - special.betaln(0.5, 0.5)
                total -= float(special.xlogy(ones, mean) + special.xlogy(zeros, 1 - mean))
            return total

        ends = max(0.0, -difference), min(1.0, 1 - difference)
        return float(optimize.minimize_scalar(log_ratio, bounds=ends, method="bounded", options={"xatol": 1e-12}).fun)

    level = np.log(1 / (0.05 * 0.05))
    assert level == pytest.approx(evidence(found.low), abs=1e-3)
    assert level == pytest.approx(evidence(found.high), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
)
def test_share_sequence_holds_the_estimate_and_turns_round_when_the_arms_do(
    treatment: list[float], control: list[float]
) -> None:
    """Symmetry, bounds, and the estimate within."""
    one, other = share_difference_sequence(treatment, control), share_difference_sequence(control, treatment)
    assert one is not None
    assert other is not None
    assert -1 <= one.low <= one.estimate + 1e-9
    assert one.estimate - 1e-9 <= one.high <= 1
    assert one.low == pytest.approx(-other.high, abs=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_share_sequence_rarely_excludes_the_truth_when_looked_at_again_and_again(rate: float) -> None:
    """No difference, eight looks each, an error of 0.2 allowed: at most that and four standard errors."""
    random = np.random.default_rng(SEED)
    looks, runs, alpha = [5, 10, 20, 40, 70, 110, 160, 250], 60, 0.2
    wrong = 0
    for _ in range(runs):
        treatment, control = ((random.random(looks[-1]) < rate).astype(float).tolist() for _ in range(2))
        wrong += any(_excludes_zero(treatment[:count], control[:count], alpha) for count in looks)
    assert wrong / runs <= alpha + 4 * (alpha * (1 - alpha) / runs) ** 0.5


def _excludes_zero(treatment: list[float], control: list[float], alpha: float) -> bool:
    found = share_difference_sequence(treatment, control, confidence=1 - alpha, planned_units=500)
    return found is not None and not found.low <= 0 <= found.high


def test_share_sequence_refuses_when_a_value_is_no_share() -> None:
    """Its guarantee is for what is bounded."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_difference_sequence([0.5], [1.5])
    assert share_difference_sequence([], [0.5]) is None
