"""The metrics of experiments: one number for each unit, from its exposures or from feedback.

A unit is a user with any number of requests, which are not independent of each other: its value is made over all of
them first. None stands for a unit that has no value, which is never taken for a good one or a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapters.records import BUILT_IN_METRICS, Direction, UnitOutcomes
from adapters.verdicts import Scale

__all__ = ["BuiltInMetric", "built_in", "can_be_missing", "num_outcomes_of", "plain_value", "scale_of", "value_of"]


@dataclass(frozen=True, slots=True)
class BuiltInMetric:
    """A metric that every exposure has: in which direction it gets better, and what it says."""

    direction: Direction
    scale: Scale
    meaning: str
    read: Callable[[UnitOutcomes], float | None]


_BUILT_IN: Mapping[str, BuiltInMetric] = {
    "error_rate": BuiltInMetric(
        "decrease",
        "share",
        "share of requests that ended in an error",
        lambda unit: unit.num_errors / unit.num_exposures,
    ),
    "ttft_ms": BuiltInMetric(
        "decrease",
        "ratio",
        "time to the first token, ms",
        lambda unit: unit.sum_ttft_ms / unit.num_ttft if unit.num_ttft else None,
    ),
    "total_ms": BuiltInMetric(
        "decrease", "ratio", "time to the last token, ms", lambda unit: unit.sum_total_ms / unit.num_exposures
    ),
    "completion_tokens": BuiltInMetric(
        "decrease", "ratio", "tokens of the answer", lambda unit: unit.sum_completion_tokens / unit.num_exposures
    ),
    "length_finish_rate": BuiltInMetric(
        "decrease",
        "share",
        "share of answers that were cut at their longest length",
        lambda unit: unit.num_length / unit.num_exposures,
    ),
    "feedback_rate": BuiltInMetric(
        "increase",
        "share",
        "share of responses with any feedback",
        lambda unit: unit.num_with_feedback / unit.num_exposures,
    ),
}
assert set(_BUILT_IN) == BUILT_IN_METRICS
# Below these a logarithm says nothing: an answer without a token, a time that no clock here tells from none.
_LEAST = {"ttft_ms": 0.01, "total_ms": 0.01, "completion_tokens": 1.0}


def built_in(metric: str) -> BuiltInMetric | None:
    """What is known of a metric that exposures give; None for one that clients report."""
    return _BUILT_IN.get(metric)


def scale_of(metric: str) -> Scale:
    """How its differences are read: a share, a ratio (for what is heavy-tailed), or a plain number."""
    known = _BUILT_IN.get(metric)
    return "number" if known is None else known.scale


def plain_value(unit: UnitOutcomes, metric: str) -> float | None:
    """A unit's value in the metric's own unit, over all its requests; None if it has none."""
    if known := _BUILT_IN.get(metric):
        return known.read(unit)
    reported = unit.feedback.get(metric)
    return None if reported is None else reported[0]


def value_of(unit: UnitOutcomes, metric: str) -> float | None:
    """A unit's value as it is analysed: of a metric with the scale `ratio` its logarithm.

    Times are heavy-tailed: one slow user carries a mean of them off, but not a mean of logarithms, whose difference is
    a ratio of geometric means.
    """
    value = plain_value(unit, metric)
    return math.log(max(value, _LEAST[metric])) if value is not None and metric in _LEAST else value


def can_be_missing(metric: str) -> bool:
    """Whether a request may have no value: what clients report, and the first token of an answer that never came."""
    return metric not in _BUILT_IN or metric == "ttft_ms"


def num_outcomes_of(unit: UnitOutcomes, metric: str) -> int:
    """How many of a unit's requests have a value of the metric."""
    if metric == "ttft_ms":
        return unit.num_ttft
    return unit.num_exposures if metric in _BUILT_IN else unit.feedback.get(metric, (0.0, 0))[1]
