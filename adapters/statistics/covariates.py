"""Less noise by what was known before the experiment (CUPED)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["AdjustedValues", "adjust_for_covariate"]


@dataclass(frozen=True, slots=True)
class AdjustedValues:
    """Both arms' values less what the covariate foretold; `variance_removed` is the share of variance that it took."""

    treatment: list[float]
    control: list[float]
    slope: float
    variance_removed: float


def adjust_for_covariate(
    treatment: Sequence[float],
    control: Sequence[float],
    treatment_before: Sequence[float],
    control_before: Sequence[float],
) -> AdjustedValues:
    """Take from each unit's value what a number from before its first exposure foretells; means still differ as before.

    The slope is that within arms, so that the arms' difference has no part in it. Feed the result to
    `difference_interval`, or to `difference_sequence`.

    Args:
        treatment: One number per unit.
        control: Likewise.
        treatment_before: The covariate of the same units in the same order; it must date from before the experiment.
        control_before: Likewise.

    Raises:
        ValueError: numbers of values and covariates differ, or an arm is empty.

    Source: Deng, Xu, Kohavi, Walker (2013), WSDM, section 3.
    """
    values = [np.asarray(side, dtype=float) for side in (treatment, control)]
    before = [np.asarray(side, dtype=float) for side in (treatment_before, control_before)]
    for side, covariate in zip(values, before, strict=True):
        if len(side) != len(covariate) or not len(side):
            raise ValueError(
                f"expected a covariate for each of at least one value, found {len(covariate)} for {len(side)}"
            )
    centred = [(side - side.mean(), past - past.mean()) for side, past in zip(values, before, strict=True)]
    around = sum(float(past @ past) for _, past in centred)
    slope = sum(float(side @ past) for side, past in centred) / around if around > 0 else 0.0
    middle = float(np.concatenate(before).mean())
    first, second = (side - slope * (past - middle) for side, past in zip(values, before, strict=True))
    left = sum(float(((side - slope * past) ** 2).sum()) for side, past in centred)
    total = sum(float(side @ side) for side, _ in centred)
    return AdjustedValues(first.tolist(), second.tolist(), slope, 1 - left / total if total > 0 else 0.0)
