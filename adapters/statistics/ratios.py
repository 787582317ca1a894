"""Means per request where units are users who come back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["ratio_values"]


def ratio_values(totals: Sequence[float], counts: Sequence[float]) -> list[float]:
    """One value per unit of an arm, such that their mean is the arm's mean per request and their variance that mean's.

    With them `difference_sequence` and `difference_interval` compare means per request, of which a unit that makes many
    has more; and its outcomes may go on arriving after it was first counted (docs/statistics.md says why).

    Args:
        totals: The sum of each unit's outcomes so far, in any order of units.
        counts: The number of each unit's outcomes so far, at least 1.

    Raises:
        ValueError: as many totals as counts are expected, and no count below 1.

    Source: Deng, Knoblich, Lu (2018), KDD, section 2: the delta method for ratio metrics.
    """
    if len(totals) != len(counts) or min(counts, default=1) < 1:
        raise ValueError(f"expected a count of at least 1 for each of {len(totals)} totals, found {len(counts)} counts")
    if not totals:
        return []
    sums, sizes = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    ratio = sums.sum() / sizes.sum()
    return (ratio + (sums - ratio * sizes) / sizes.mean()).tolist()  # type: ignore[no-any-return]
