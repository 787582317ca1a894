"""Whether units were split as they should have been: a test that may be looked at after every unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["SampleRatio", "log_mismatch_evidence", "sample_ratio"]

# Pseudo-units of the mixture: tightest for imbalances that show after some thousands of units, such as 48/52.
_CONCENTRATION = 1000.0


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """The sample-ratio check at one look. Once `fired` at any look it stays valid: the caller must remember it."""

    p_value: float
    fired: bool
    alpha: float
    counts: tuple[int, ...]
    expected: tuple[float, ...]


def sample_ratio(counts: Sequence[int], weights: Sequence[float], *, alpha: float = 0.01) -> SampleRatio:
    """Test whether units were assigned with the planned weights; the false alarms of all looks together are `alpha`.

    Args:
        counts: Units of each arm so far. Count units, not requests; and all assigned units, not those with outcomes.
        weights: Planned shares in the same order, in any unit, all above 0.
        alpha: Probability of a false alarm, ever.

    Raises:
        ValueError: numbers of arms differ, a weight is not above 0, or a count is negative.

    Source: Lindon and Malek (2022), NeurIPS, "Anytime-valid inference for multinomial count data", section 3.
    """
    shares = np.asarray(weights, dtype=float)
    if not len(counts) == len(weights) > 0 or not (shares > 0).all() or min(counts, default=0) < 0:
        raise ValueError(f"expected a count and a weight above 0 for each arm, found {counts} and {weights}")
    shares = shares / shares.sum()
    p_value = float(np.exp(-np.maximum(log_mismatch_evidence(np.asarray(counts), shares), 0)))
    expected = tuple(float(share * sum(counts)) for share in shares)
    return SampleRatio(p_value, p_value <= alpha, alpha, tuple(counts), expected)


def log_mismatch_evidence(counts: NDArray[Any], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the Bayes factor of a Dirichlet mixture around the planned shares against these shares.

    Args:
        counts: [..., arms].
        shares: [arms], adding up to 1.

    Returns:
        [...]; its exponential is a martingale with mean 1 where the shares are true.
    """
    prior = _CONCENTRATION * shares
    total = counts.sum(axis=-1)
    normaliser = special.gammaln(_CONCENTRATION) - special.gammaln(_CONCENTRATION + total)
    terms = special.gammaln(prior + counts) - special.gammaln(prior) - counts * np.log(shares)
    return np.asarray(normaliser + terms.sum(axis=-1))
