"""Two or more versions that answered the same prompts: who did better, how sure that is, and ratings of all.

Pure functions of scores, one a prompt; prompts are taken to be independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special

from adapters.statistics import Interval, Rating, bradley_terry, mean_interval

__all__ = ["PairedComparison", "compare_all", "compare_pair", "rate", "sign_test"]

_MAX_EXACT = 12  # differences whose signs are all tried: 4096 ways
_NUM_DRAWS = 9999


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """`first` against `second` over the prompts that both answered; a higher score wins a prompt.

    `win_rate` counts a tie as half a win, and is 0.5 where there is no difference. `sign_p` looks at wins and losses
    alone, `permutation_p` at how large the differences are; both are two-sided. `difference` is that of the mean
    scores. The intervals are None where there are too few prompts, or nothing varies.
    """

    first: str
    second: str
    num_prompts: int
    wins: int
    losses: int
    ties: int
    win_rate: float
    win_interval: Interval | None
    sign_p: float
    mean_difference: float
    difference: Interval | None
    permutation_p: float


def compare_pair(first: str, second: str, scores: Sequence[tuple[float, float]]) -> PairedComparison:
    """Compare two versions by their scores for the same prompts, `(first's, second's)` each; there must be one."""
    differences = [one - other for one, other in scores]
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    points = [0.5 + 0.5 * float(np.sign(value)) for value in differences]
    rate, mean = mean_interval(points), mean_interval(differences)
    return PairedComparison(
        first=first,
        second=second,
        num_prompts=len(scores),
        wins=wins,
        losses=losses,
        ties=len(scores) - wins - losses,
        win_rate=rate.mean,
        win_interval=None if rate.interval is None else _within_unit(rate.interval),
        sign_p=sign_test(wins, losses),
        mean_difference=mean.mean,
        difference=mean.interval if len(scores) > 1 else None,
        permutation_p=_permutation_test(differences),
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
    """A share's interval; Student's t knows no bounds."""
    return Interval(interval.estimate, max(0.0, interval.low), min(1.0, interval.high), interval.confidence)
