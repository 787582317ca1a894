"""How variants are compared: alternating in one run, by the median of the repeats' ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

__all__ = ["alternate", "paired_ratio"]

_T = TypeVar("_T")


def alternate(variants: Mapping[str, Callable[[], _T]], repeats: int) -> dict[str, list[_T]]:
    """Run every variant once a repeat and return the results by variant.

    Every other repeat goes backwards, so that a machine that slows down steadily favours nobody.
    """
    results: dict[str, list[_T]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants) if repeat % 2 == 0 else reversed(list(variants)):
            results[name].append(variants[name]())
    return results


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios repeat by repeat: a busy moment spoils one pair, not the comparison."""
    return statistics.median(top / bottom for top, bottom in zip(numerators, denominators, strict=True))
