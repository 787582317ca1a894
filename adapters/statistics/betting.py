"""Exact sequences for shares, that is for values between 0 and 1: nothing in them is approximate, however few units.

A gambler bets against a supposed difference after every block of units; if it is the true one, no gambler can expect to
win. What makes many gamblers with different bets rich on average is excluded. docs/statistics.md has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from adapters.statistics.mixtures import tuned_time

__all__ = ["Bets", "mean_share_bounds", "share_bounds", "share_evidence"]

_Array = NDArray[np.float64]
_Side = int  # 1: the difference is larger than supposed; -1: smaller

# Overall levels around which the gamblers suppose the truth to lie, from rare events to rare failures; how much of the
# normal prior each of a level's gamblers stands for; and the largest bet, below 2, at which a balanced bet can ruin.
_LEVELS = (0.002, 0.02, 0.1, 0.5, 0.9, 0.98, 0.998)
_QUANTILES = (1 / 6, 3 / 6, 5 / 6)
_MAX_BET = 1.9
_MAX_BLOCK = 10
_NUM_HALVINGS = 30
_TINY = 1e-9
_LEAST = -700.0  # the log of a fortune that counts as nothing


@dataclass(frozen=True, slots=True)
class Bets:
    """Who bets how much, fixed before the first unit: a wrong plan costs width, never validity.

    `block` has so many units of treatment and control; `levels` and `sizes` [gamblers] are what they suppose and stake.
    """

    block: tuple[int, int]
    levels: _Array
    sizes: _Array

    @classmethod
    def planned(cls, *, confidence: float, planned_units: float, treatment_share: float = 0.5) -> Bets:
        """Bets that are best when so many units are there, of which the treatment has a share."""
        ratio = Fraction(treatment_share / (1 - treatment_share)).limit_denominator(_MAX_BLOCK)
        block = (max(ratio.numerator, 1), ratio.denominator)
        share = block[0] / sum(block)
        levels = np.repeat(_LEVELS, len(_QUANTILES))
        quantiles = np.tile(special.ndtri((1 + np.asarray(_QUANTILES)) / 2), len(_LEVELS))
        information = planned_units * share * (1 - share) * levels * (1 - levels)
        sizes = np.minimum(quantiles * np.sqrt(tuned_time(confidence) / information), _MAX_BET)
        return cls(block, levels, sizes)

    def num_blocks(self, num_treatment: int, num_control: int) -> int:
        """Whole blocks in so many units; what is left over waits for its block."""
        return min(num_treatment // self.block[0], num_control // self.block[1])


def share_bounds(
    treatment: Sequence[float] | _Array,
    control: Sequence[float] | _Array,
    bets: Bets,
    *,
    confidence: float,
    within: tuple[float, float] = (-1.0, 1.0),
) -> tuple[float, float]:
    """Both ends of the exact sequence for mean(treatment) - mean(control), within -1 and 1.

    Args:
        treatment: One number between 0 and 1 per unit, in the order in which they came.
        control: Likewise.
        bets: Planned beforehand.
        confidence: Two-sided, over all looks together.
        within: Ends that are known otherwise; where the exact sequence's lie outside, these are given back, which takes
            one look instead of many.
    """
    counted = _count(treatment, control, bets)
    threshold = math.log(2 / (1 - confidence))
    outside = max(within[0], -1.0), min(within[1], 1.0)
    low = _edge(lambda point: float(share_evidence(*counted, point, bets, side=1)) >= threshold, outside[0], 1.0)
    high = _edge(lambda point: float(share_evidence(*counted, point, bets, side=-1)) >= threshold, outside[1], -1.0)
    return low, high


def share_evidence(
    values: _Array, treatment: NDArray[Any], control: NDArray[Any], difference: float, bets: Bets, *, side: _Side
) -> _Array:
    """Log of the gamblers' mean fortune, who began with 1 and bet that the difference is larger (or smaller).

    Args:
        values: [values] the distinct values that occur, 0 to 1.
        treatment: [..., values] how often each occurs in the treatment's whole blocks.
        control: [..., values] likewise.
        difference: What is supposed; evidence that it is larger falls with it, evidence that it is smaller rises.
        bets: Planned beforehand.
        side: 1 or -1.

    Returns:
        [...]; a sequence that exceeds log(1 / alpha) with probability at most alpha, ever, if the difference is true.
    """
    share = bets.block[0] / sum(bets.block)
    first, second = side * (1 - share) * bets.sizes, -side * share * bets.sizes
    # [values, gamblers] the factor by which a unit of this value changes the fortune.
    in_treatment = 1 + first * (values[:, None] - bets.levels - (1 - share) * difference)
    in_control = 1 + second * (values[:, None] - bets.levels + share * difference)
    # Who could lose more than he has may not bet; he keeps nothing, which errs to the safe side.
    solvent = _worst(first, bets.levels + (1 - share) * difference) & _worst(second, bets.levels - share * difference)
    logs = np.log(np.where(solvent, np.concatenate([in_treatment, in_control]), 1.0))
    fortunes = np.concatenate([treatment, control], axis=-1) @ logs  # [..., gamblers]
    fortunes[..., ~solvent] = -np.inf
    richest = np.maximum(fortunes.max(axis=-1), _LEAST)
    fortunes -= richest[..., None]
    return np.asarray(richest + np.log(np.maximum(np.exp(fortunes, out=fortunes).mean(axis=-1), math.exp(_LEAST))))


def mean_share_bounds(num_ones: int, count: int, *, confidence: float, planned_units: float) -> tuple[float, float]:
    """Both ends of the exact sequence for one share of ones among zeros: a beta-binomial mixture.

    For each supposed share the mixture is a Beta distribution around it, as wide as is best at `planned_units`.

    Source: Robbins (1970), Annals of Mathematical Statistics 41:1397; Howard et al. (2021), Annals of Statistics
    49:1055.
    """
    weight = planned_units / tuned_time(confidence)
    threshold = -math.log(1 - confidence)

    def is_excluded(share: float) -> bool:
        prior = special.betaln(weight * share, weight * (1 - share))
        mixed = special.betaln(weight * share + num_ones, weight * (1 - share) + count - num_ones) - prior
        supposed = special.xlogy(num_ones, share) + special.xlog1py(count - num_ones, -share)
        return bool(mixed - supposed >= threshold)

    found = num_ones / count
    low = _edge(is_excluded, _TINY, found) if num_ones else 0.0
    high = _edge(is_excluded, 1 - _TINY, found) if num_ones < count else 1.0
    return (0.0 if low == _TINY else low), (1.0 if high == 1 - _TINY else high)


def _worst(stake: _Array, centre: _Array) -> NDArray[np.bool_]:
    """Whether no value between 0 and 1 can take everything."""
    return (1 + stake * (0 - centre) > 0) & (1 + stake * (1 - centre) > 0)


def _edge(is_excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """The last excluded point on the way from outside in; `outside` itself where that is not excluded."""
    if not is_excluded(outside):
        return outside
    for _ in range(_NUM_HALVINGS):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if is_excluded(middle) else (outside, middle)
    return outside


def _count(
    treatment: Sequence[float] | _Array, control: Sequence[float] | _Array, bets: Bets
) -> tuple[_Array, _Array, _Array]:
    num_blocks = bets.num_blocks(len(treatment), len(control))
    used = [
        np.asarray(side[: num_blocks * size], float)
        for side, size in zip((treatment, control), bets.block, strict=True)
    ]
    values, places = np.unique(np.concatenate(used), return_inverse=True)
    first, second = places[: len(used[0])], places[len(used[0]) :]
    counts = [np.bincount(side, minlength=len(values)).astype(float) for side in (first, second)]
    return values, counts[0], counts[1]
