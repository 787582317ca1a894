"""A sequence for the difference of two shares that also tells something where an arm has no variation at all.

Errors are rare: a control without a single one has no variance, and an interval made of variances has nothing to say of
it. What is bounded can be tested exactly instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from adapters.statistics.intervals import Interval
from adapters.statistics.sequences import DEFAULT_PLANNED_UNITS, difference_sequence

__all__ = ["share_difference_sequence"]

# Of the probability of error, what the exact sequence gets. With more, the other one loses where it is the tighter.
_EXACT_PART = 0.05
# Of the scarcer kind, ones or zeros, in each arm: with fewer than so many the other sequence is not trusted, ...
_ENOUGH = 10
# ... and with so many the exact one is the wider by far, and is not computed.
_PLENTY = 50
_PRIOR = 0.5  # Jeffreys' Beta(1/2, 1/2)
_NUM_HALVINGS = 30
_TINY = 1e-300


def share_difference_sequence(
    treatment: Sequence[float],
    control: Sequence[float],
    *,
    confidence: float = 0.95,
    planned_units: float = DEFAULT_PLANNED_UNITS,
) -> Interval | None:
    """Interval for mean(treatment) - mean(control) of values from 0 to 1, valid at every look at once.

    The intersection of two sequences that share the probability of error: `difference_sequence`, and one by betting
    that is exact for any distribution on [0, 1], so that it needs no variation and no burn-in. The latter is all there
    is as long as an arm has hardly any ones, or hardly any zeros; where there are plenty it is left out.

    Args:
        treatment: One number from 0 to 1 per unit; units must be independent.
        control: Likewise.
        confidence: Two-sided, over all looks together.
        planned_units: As in `difference_sequence`.

    Returns:
        None without a unit in each arm.

    Source: the product of both arms' Beta mixtures of likelihood ratios is a test martingale for their pair of means
    (Bernoulli's ratio bounds that of any value on [0, 1]: Waudby-Smith and Ramdas (2024), JRSS B 86:1); the interval
    is the set of differences of pairs that it does not reject.
    """
    if not treatment or not control:
        return None
    if not all(0 <= value <= 1 for side in (treatment, control) for value in side):
        raise ValueError("expected values from 0 to 1")
    alpha = 1 - confidence
    first, second = _Share(sum(treatment), len(treatment)), _Share(sum(control), len(control))
    estimate, scarcer = first.mean - second.mean, min(first.scarcer, second.scarcer)
    low, high = -1.0, 1.0
    if scarcer < _PLENTY:
        level = -math.log(alpha * _EXACT_PART)
        low, high = (_reach(first, second, estimate, end, level) for end in (low, high))
    if scarcer >= _ENOUGH:
        plain = difference_sequence(
            treatment, control, confidence=1 - alpha * (1 - _EXACT_PART), planned_units=planned_units
        )
        if plain is not None:
            low, high = max(low, plain.low), min(high, plain.high)
    return Interval(estimate, low, high, confidence)


@dataclass(frozen=True, slots=True)
class _Share:
    """A sum of values from 0 to 1, and their number."""

    total: float
    count: int

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def scarcer(self) -> float:
        return min(self.total, self.count - self.total)

    def log_mixture(self) -> float:
        """Log of the Beta mixture's likelihood, the numerator of the evidence against any mean."""
        ones, zeros = _PRIOR + self.total, _PRIOR + self.count - self.total
        return float(special.betaln(ones, zeros) - special.betaln(_PRIOR, _PRIOR))

    def log_likelihood(self, mean: float) -> float:
        return float(special.xlogy(self.total, mean) + special.xlogy(self.count - self.total, 1 - mean))

    def slope(self, mean: float) -> float:
        return self.total / max(mean, _TINY) - (self.count - self.total) / max(1 - mean, _TINY)


def _reach(first: _Share, second: _Share, estimate: float, end: float, level: float) -> float:
    """How far towards `end` differences are not rejected; rejected ones lie beyond, since the evidence is convex."""
    numerator = first.log_mixture() + second.log_mixture()
    kept, rejected = estimate, end
    for _ in range(_NUM_HALVINGS):
        middle = (kept + rejected) / 2
        if numerator - _best_likelihood(first, second, middle) < level:
            kept = middle
        else:
            rejected = middle
    return rejected


def _best_likelihood(first: _Share, second: _Share, difference: float) -> float:
    """The highest log-likelihood of two means that differ by so much; it is concave in the second mean."""
    low, high = max(0.0, -difference), min(1.0, 1 - difference)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if first.slope(middle + difference) + second.slope(middle) > 0:
            low = middle
        else:
            high = middle
    middle = (low + high) / 2
    return first.log_likelihood(min(1.0, max(0.0, middle + difference))) + second.log_likelihood(middle)
