"""Two or more versions that answered the same prompts: who did better, how sure that is, and ratings of all.

Pure functions of scores, one a prompt. Prompts are independent of each other, unless it is said whose they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special

from adapters.statistics import (
    Interval,
    MeanEstimate,
    Rating,
    bradley_terry,
    mean_interval,
    ratio_values,
)
from adapters.statistics.mixtures import ArmMoments, mean_bounds

__all__ = [
    "PairedComparison",
    "compare_all",
    "compare_pair",
    "mean_of_units",
    "paired_difference",
    "rate",
    "sign_test",
]

_MAX_EXACT = 12  # differences whose signs are all tried: 4096 ways
_NUM_DRAWS = 9999
# Users at which the intervals of `mean_of_units` are made tightest: copies are a sample. A plan for more would have no
# interval at all for some hundred users.
_PLANNED_UNITS = 500


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """`first` against `second` over the prompts that both answered; a higher score wins a prompt.

    `win_rate` counts a tie as half a win, and is 0.5 where there is no difference. `sign_p` looks at wins and losses
    alone, `permutation_p` at how large the differences are; both are two-sided. `difference` is that of the mean
    scores. The intervals are None where there are too few prompts, or nothing varies. Prompts of one unit count as one
    observation in intervals and tests.
    """

    first: str
    second: str
    num_prompts: int
    num_units: int
    wins: int
    losses: int
    ties: int
    win_rate: float
    win_interval: Interval | None
    sign_p: float
    mean_difference: float
    difference: Interval | None
    permutation_p: float


def compare_pair(
    first: str, second: str, scores: Sequence[tuple[float, float]], units: Sequence[Hashable] | None = None
) -> PairedComparison:
    """Compare two versions by their scores for the same prompts.

    Args:
        first: Its name.
        second: Its name.
        scores: `(first's, second's)` for each prompt, at least one.
        units: Whose each prompt is, if some may be the same user's, which are not independent of each other.
    """
    units = range(len(scores)) if units is None else units
    differences = [one - other for one, other in scores]
    signs = [float(np.sign(value)) for value in differences]
    wins, losses = signs.count(1.0), signs.count(-1.0)
    rate = mean_interval(_unit_values([0.5 + 0.5 * sign for sign in signs], units))
    mean = paired_difference(_unit_values(differences, units))
    balance = _unit_totals(signs, units)
    return PairedComparison(
        first=first,
        second=second,
        num_prompts=len(scores),
        num_units=len(balance),
        wins=wins,
        losses=losses,
        ties=len(scores) - wins - losses,
        win_rate=rate.mean,
        win_interval=None if rate.interval is None else _within_unit(rate.interval),
        sign_p=sign_test(sum(value > 0 for value in balance), sum(value < 0 for value in balance)),
        mean_difference=mean.mean,
        difference=mean.interval,
        permutation_p=_permutation_test(_unit_totals(differences, units)),
    )


def compare_all(scores: Mapping[str, Sequence[float | None]]) -> list[PairedComparison]:
    """Compare every two versions, in the order given; None is a prompt that a version has no answer to."""
    found = []
    for first, second in combinations(scores, 2):
        both = zip(scores[first], scores[second], strict=True)
        pairs = [(one, other) for one, other in both if one is not None and other is not None]
        if pairs:
            found.append(compare_pair(first, second, pairs))
    return found


def rate(comparisons: Sequence[PairedComparison]) -> list[Rating]:
    """Bradley-Terry ratings by these comparisons, a tie as half a win for each; none where no rating is finite.

    That is so where somebody won, or lost, every prompt against the others.
    """
    wins: dict[tuple[str, str], float] = {}
    for found in comparisons:
        wins[found.first, found.second] = found.wins + found.ties / 2
        wins[found.second, found.first] = found.losses + found.ties / 2
    try:
        return bradley_terry(wins)
    except ValueError:
        return []


def paired_difference(differences: Sequence[float], *, confidence: float = 0.95) -> MeanEstimate:
    """The mean of differences and its interval by Student's t; differences of 0 and 1 are no shares of anything.

    Source: Student (1908), Biometrika 6:1.
    """
    mean, num = float(np.mean(differences)), len(differences)
    if len(set(differences)) < 2:
        return MeanEstimate(num, mean, None, "no variation: no interval")
    half = float(special.stdtrit(num - 1, (1 + confidence) / 2) * np.std(differences, ddof=1) / np.sqrt(num))
    return MeanEstimate(num, mean, Interval(mean, mean - half, mean + half, confidence), "Student's t")


def mean_of_units(totals: Sequence[float], counts: Sequence[int], *, is_share: bool = False) -> MeanEstimate:
    """The mean per request over units that come back, with an interval for all looks at once, to 95 %.

    That it holds at all of them is simulated, not proved: a unit's value changes when it comes back. One method for all
    data: a share has none of its own while every unit came once, since two at 95 % each would err more often.

    Args:
        totals: The sum of each unit's values so far.
        counts: How many they are, at least 1 each.
        is_share: Whether values lie between 0 and 1 by their nature; so does the interval, then.
    """
    values = list(totals) if max(counts) == 1 else ratio_values(totals, counts)
    interval = _asymptotic_mean(values)
    if is_share and interval is not None:
        interval = _within_unit(interval)
    method = "confidence sequence" if interval else "too few users, or no variation between them"
    return MeanEstimate(len(values), sum(totals) / sum(counts), interval, method)


def _asymptotic_mean(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    moments = ArmMoments.of(values)
    ends = mean_bounds(moments, confidence=confidence, planned_units=_PLANNED_UNITS)
    low, high = (float(end) for end in ends)
    return Interval(float(moments.mean), low, high, confidence) if math.isfinite(low) else None


def _unit_totals(values: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    totals: Counter[Hashable] = Counter()
    for value, unit in zip(values, units, strict=True):
        totals[unit] += value  # type: ignore[assignment]  # Counter's values may be any numbers
    return list(totals.values())


def _unit_values(values: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    """A value for each unit, whose mean is that of all values and whose variance tells that mean's."""
    counts = Counter(units)
    if len(counts) == len(values):
        return list(values)
    return ratio_values(_unit_totals(values, units), list(counts.values()))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so many wins and losses, where both are equally likely; ties say nothing."""
    if wins + losses == 0:
        return 1.0
    return float(min(1.0, 2 * special.bdtr(min(wins, losses), wins + losses, 0.5)))


def _permutation_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of the mean difference, if each difference could as well have the other sign.

    All signs are tried for up to 12 differences that are not 0, otherwise 9,999 draws with a fixed seed.

    Source: Phipson and Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9:39, for counting what was seen as one draw.
    """
    values = np.array([value for value in differences if value], dtype=np.float64)
    if not len(values):
        return 1.0
    seen = abs(float(values.sum())) * (1 - 1e-12)  # rounding must not tell equal sums apart
    if len(values) <= _MAX_EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= seen))
    generator = np.random.default_rng(0)
    draws = (np.abs(generator.choice((-1.0, 1.0), size=len(values)) @ values) >= seen for _ in range(_NUM_DRAWS))
    return float((1 + sum(draws)) / (1 + _NUM_DRAWS))


def _within_unit(interval: Interval) -> Interval:
    """A share's interval; neither Student's t nor an asymptotic sequence knows bounds."""
    return Interval(interval.estimate, max(0.0, interval.low), min(1.0, interval.high), interval.confidence)
