"""Several arms: how sure each of several comparisons must be, and how to send traffic to the arm that looks best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["adjusted_confidence", "comparison_confidence", "thompson_weights"]

_NUM_QUANTILES = 2000
_FIRST_STAGE = 6 / math.pi**2  # of alpha: one over the sum of 1, 1/4, 1/9, ...
_LEAST_ALPHA = 1e-9  # below it, one less it is one: floats end there


def adjusted_confidence(confidence: float, num_comparisons: int) -> float:
    """The confidence that each of several intervals needs so that all hold at once with `confidence`: Bonferroni's.

    Holds for confidence sequences and for intervals of one look alike, whatever the comparisons share.
    """
    if num_comparisons < 1:
        raise ValueError(f"expected at least one comparison, found {num_comparisons}")
    return 1 - (1 - confidence) / num_comparisons


def comparison_confidence(alpha: float, *, num_treatments: int, stage: int = 1) -> float:
    """The confidence of one comparison with the control, so that all comparisons and stages together keep alpha.

    Several treatments share it (each has its own chance to be taken for better by chance). Stages, counted from 1, have
    1, 1/4, 1/9, ... of 6 / pi^2 of it, which add up to alpha however many there are: somebody who changes weights again
    and again gets no new chance for it.
    """
    return adjusted_confidence(1 - max(alpha * _FIRST_STAGE / stage**2, _LEAST_ALPHA), num_treatments)


def thompson_weights(
    arms: Sequence[Sequence[float]], *, direction: Literal["increase", "decrease"] = "increase", floor: float = 0.05
) -> list[float]:
    """The share of traffic that each arm gets: the probability that it is the best, but never less than `floor`.

    Shares moved by outcomes bias the arms' means (an arm that starts with bad luck gets fewer units to recover): means
    and intervals of such an experiment are too low for the losers, and no verdict of a fixed split holds for it.

    Args:
        arms: One number per unit, for each arm. All 0 or 1: posterior Beta(1 + ones, 1 + zeros); otherwise Student's t
            around the mean. While an arm has fewer than two units of such other values, or does not vary, nothing is
            known: all shares are equal. Shares of 0 and 1 are known from the first unit on, also of one arm alone.
        direction: What is better.
        floor: Least share of an arm, at most 1 / number of arms.

    Returns:
        Shares that add up to 1, in the order of the arms.

    Source: Thompson (1933), Biometrika 25:285.
    """
    count = len(arms)
    if not 0 <= floor * count <= 1:
        raise ValueError(f"a floor of {floor} for {count} arms: expected at least 0 and at most {1 / count:.4g}")
    sign = 1 if direction == "increase" else -1
    chances = _chances_of_best([np.asarray(arm, dtype=float) for arm in arms], sign)
    return [float(floor + (1 - floor * count) * chance) for chance in chances]


def _chances_of_best(arms: list[NDArray[np.float64]], sign: int) -> NDArray[np.float64]:
    """P(arm i is the best) = mean over quantiles of arm i of the others' distribution functions there."""
    levels = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    posteriors = [_Posterior(arm, all(np.isin(other, (0, 1)).all() for other in arms)) for arm in arms]
    if not all(posterior.is_known for posterior in posteriors):
        return np.full(len(arms), 1 / len(arms))
    chances = np.empty(len(arms))
    for index, posterior in enumerate(posteriors):
        points = posterior.quantile(levels)
        others = [other.share_below(points) for place, other in enumerate(posteriors) if place != index]
        chances[index] = np.mean(np.prod(others if sign > 0 else [1 - other for other in others], axis=0))
    return np.asarray(chances / chances.sum())


class _Posterior:
    """What is known of one arm's mean."""

    def __init__(self, values: NDArray[np.float64], is_binary: bool) -> None:
        self.is_binary = is_binary
        self.ones, self.count = float(values.sum()), len(values)
        self.mean = float(values.mean()) if self.count else 0.0
        self.error = float(np.sqrt(values.var(ddof=1) / self.count)) if self.count > 1 else 0.0
        self.is_known = is_binary or self.error > 0

    def quantile(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.is_binary:
            return np.asarray(special.betaincinv(1 + self.ones, 1 + self.count - self.ones, levels))
        return np.asarray(self.mean + self.error * special.stdtrit(self.count - 1, levels))

    def share_below(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.is_binary:
            return np.asarray(special.betainc(1 + self.ones, 1 + self.count - self.ones, points))
        return np.asarray(special.stdtr(self.count - 1, (points - self.mean) / self.error))
