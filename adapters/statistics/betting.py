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
Places = tuple[Sequence[int] | NDArray[np.int64], Sequence[int] | NDArray[np.int64]]
_Side = int  # 1: the difference is larger than supposed; -1: smaller

# Overall levels around which the gamblers suppose the truth to lie, from rare events to rare failures; how much of the
# normal prior each of a level's gamblers stands for; and the largest bet, below 2, at which a balanced bet can ruin.
_LEVELS = (0.002, 0.02, 0.1, 0.5, 0.9, 0.98, 0.998)
_QUANTILES = (1 / 6, 3 / 6, 5 / 6)
_MAX_BET = 1.9
_MAX_BLOCK = 10
_FIRST_STRETCH = 25  # blocks
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
        larger = max(treatment_share, 1 - treatment_share)
        ratio = Fraction(larger / (1 - larger)).limit_denominator(_MAX_BLOCK)  # of the larger: 1 : 19, never 0 : 1
        block = (ratio.numerator, ratio.denominator)
        if treatment_share < 1 / 2:
            block = (block[1], block[0])
        share = block[0] / sum(block)
        levels = np.repeat(_LEVELS, len(_QUANTILES))
        quantiles = np.tile(special.ndtri((1 + np.asarray(_QUANTILES)) / 2), len(_LEVELS))
        information = planned_units * share * (1 - share) * levels * (1 - levels)
        sizes = np.minimum(quantiles * np.sqrt(tuned_time(confidence) / information), _MAX_BET)
        return cls(block, levels, sizes)

    def strata(self, places: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """[units] of which stretch of time each unit is, by its place among all that came.

        The first stretch is of 25 whole blocks, the next of 75, 125, ...: blocks are made within a stretch, of which a
        longer one leaves fewer units over, and what may change within it weighs less the more there are.
        """
        return np.sqrt(np.asarray(places) / (_FIRST_STRETCH * sum(self.block))).astype(np.int64)


def share_bounds(
    treatment: Sequence[float] | _Array,
    control: Sequence[float] | _Array,
    bets: Bets,
    *,
    confidence: float,
    places: Places | None = None,
    within: tuple[float, float] = (-1.0, 1.0),
) -> tuple[float, float]:
    """Both ends of the exact sequence for mean(treatment) - mean(control), within -1 and 1.

    Args:
        treatment: One number between 0 and 1 per unit, in the order in which they came.
        control: Likewise.
        bets: Planned beforehand.
        confidence: Two-sided, over all looks together.
        places: Each unit's place among all that came, of treatment and control: those that came at about the same time
            are set against each other. None: nothing changes with time.
        within: Ends that are known otherwise; where the exact sequence's lie outside, these are given back, which takes
            one look instead of many.
    """
    counted = _count(treatment, control, bets, places)
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
    treatment: Sequence[float] | _Array, control: Sequence[float] | _Array, bets: Bets, places: Places | None
) -> tuple[_Array, _Array, _Array]:
    """The distinct values, and how often each occurs in whole blocks of treatment and control."""
    arms = [np.asarray(side, float) for side in (treatment, control)]
    strata = [np.zeros(len(arm), np.int64) for arm in arms] if places is None else [bets.strata(p) for p in places]
    length = max((int(side.max()) for side in strata if len(side)), default=0) + 1
    sizes = [np.bincount(side, minlength=length) for side in strata]
    num_blocks = np.minimum(sizes[0] // bets.block[0], sizes[1] // bets.block[1])
    used = [
        arm[_ranks(side) < num_blocks[side] * size] for arm, side, size in zip(arms, strata, bets.block, strict=True)
    ]
    values, found = np.unique(np.concatenate(used), return_inverse=True)
    counts = [
        np.bincount(side, minlength=len(values)).astype(float)
        for side in (found[: len(used[0])], found[len(used[0]) :])
    ]
    return values, counts[0], counts[1]


def _ranks(strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """[units] the place of each among those of its own stratum."""
    order = np.argsort(strata, kind="stable")
    ranks = np.empty(len(strata), np.int64)
    ranks[order] = np.arange(len(strata)) - np.searchsorted(strata[order], strata[order])
    return ranks
