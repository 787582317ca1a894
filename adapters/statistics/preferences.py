"""Ratings from pairwise preferences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from adapters.statistics.intervals import Interval

__all__ = ["Rating", "bradley_terry"]

_MAX_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Rating:
    """One entrant's log-strength relative to the mean of all, with its interval for one look."""

    name: str
    strength: Interval

    @property
    def elo(self) -> float:
        """On the scale of chess, with mean 0: 400 points more are ten times the odds."""
        return self.strength.estimate * 400 / math.log(10)


def bradley_terry(wins: Mapping[tuple[str, str], float], *, confidence: float = 0.95) -> list[Rating]:
    """Rate entrants by how often each was preferred to each other; the best comes first.

    Args:
        wins: By (winner, loser), how often. Count a tie as half a win for each.
        confidence: Two-sided, for one look planned in advance.

    Raises:
        ValueError: a number below 0, somebody compared with himself, or entrants without a finite rating: some group
            won, or lost, all comparisons with the others, or was never compared with them.

    Source: Bradley and Terry (1952), Biometrika 39:324; intervals by the inverse information with strengths that add
    up to 0.
    """
    names = sorted({name for pair in wins for name in pair})
    table = _table(wins, names)
    if len(names) < 2 or not _is_connected(table):
        raise ValueError("expected every entrant to have both won and lost, directly or through others")
    strengths, covariance = _fit(table)
    z = float(special.ndtri((1 + confidence) / 2))
    ratings = [
        Rating(name, Interval(value, value - z * error, value + z * error, confidence))
        for name, value, error in zip(names, strengths.tolist(), np.sqrt(np.diag(covariance)).tolist(), strict=True)
    ]
    return sorted(ratings, key=lambda rating: (-rating.strength.estimate, rating.name))


def _table(wins: Mapping[tuple[str, str], float], names: list[str]) -> NDArray[np.float64]:
    table = np.zeros((len(names), len(names)))  # [winner, loser]
    for (winner, loser), count in wins.items():
        if winner == loser or not count >= 0:
            raise ValueError(f"expected wins of one over another, found {count} of {winner!r} over {loser!r}")
        table[names.index(winner), names.index(loser)] += count
    return table


def _is_connected(table: NDArray[np.float64]) -> bool:
    """Whether each has beaten each, directly or through others: then, and only then, ratings are finite (Ford 1957)."""
    reach = (table > 0) | np.eye(len(table), dtype=bool)
    for _ in range(len(table)):
        reach = (reach.astype(float) @ reach.astype(float)) > 0
    return bool(reach.all())


def _fit(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Newton's method on log-strengths that add up to 0; the likelihood is concave. Steps are kept below 1."""
    pairs = table + table.T
    strengths = np.zeros(len(table))
    for _ in range(_MAX_STEPS):
        chances = special.expit(strengths[:, None] - strengths[None, :])
        gradient = (table - pairs * chances).sum(axis=1)
        covariance = _covariance(pairs * chances * (1 - chances))
        step = covariance @ gradient
        strengths = strengths + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < _TOLERANCE:
            break
    return strengths, covariance


def _covariance(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    information = np.diag(weights.sum(axis=1)) - weights
    return np.asarray(np.linalg.pinv(information, hermitian=True))
