"""The metrics of experiments: one number for each unit, from its requests or from what was reported on them.

A unit is a user with any number of requests, which are not independent of each other: what is compared is one number of
each. None stands for a unit that has no value, which is never taken for a good one or a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from adapters.evidence import Scale
from adapters.outcomes import AnsweredRequest, UnitOutcomes
from adapters.records import BUILT_IN_METRICS, Direction, MetricKind

__all__ = [
    "BuiltInMetric",
    "analysed_value",
    "built_in",
    "can_be_missing",
    "first_value",
    "is_share_metric",
    "mean_value",
    "num_outcomes_of",
    "scale_of",
]


@dataclass(frozen=True, slots=True)
class BuiltInMetric:
    """A metric that every request has: in which direction it gets better, and how it is read; None has no value."""

    direction: Direction
    scale: Scale
    read: Callable[[AnsweredRequest], float | None]


_BUILT_IN: Mapping[str, BuiltInMetric] = {
    "error_rate": BuiltInMetric("decrease", "share", lambda request: float(request.is_error)),
    "ttft_ms": BuiltInMetric("decrease", "ratio", lambda request: request.ttft_ms),
    "total_ms": BuiltInMetric("decrease", "ratio", lambda request: request.total_ms),
    "completion_tokens": BuiltInMetric("decrease", "ratio", lambda request: float(request.completion_tokens)),
    "length_finish_rate": BuiltInMetric("decrease", "share", lambda request: float(request.is_length)),
    "feedback_rate": BuiltInMetric("increase", "share", lambda request: float(request.has_feedback)),
}
assert set(_BUILT_IN) == BUILT_IN_METRICS
# Below these a logarithm says nothing: an answer without a token, a time that no clock here tells from none.
_LEAST = {"ttft_ms": 0.01, "total_ms": 0.01, "completion_tokens": 1.0}


def built_in(metric: str) -> BuiltInMetric | None:
    """What is known of a metric that requests have; None for one that clients report."""
    return _BUILT_IN.get(metric)


def scale_of(metric: str, kind: MetricKind) -> Scale:
    """How its differences are read: a share, a ratio (for what is heavy-tailed), or a plain number.

    By the plan's kind; of a built-in one by what it is.
    """
    known = _BUILT_IN.get(metric)
    return kind if known is None else known.scale


def is_share_metric(metric: str, kind: MetricKind) -> bool:
    """Whether a metric's values lie between 0 and 1."""
    return scale_of(metric, kind) == "share"


def first_value(unit: UnitOutcomes, metric: str) -> tuple[float, datetime] | None:
    """A unit's first outcome and when it was known: it stays what it is, whatever the unit does later.

    Of what requests have it is that of the one that was answered first, of what clients report the value that was
    reported first.
    """
    if known := _BUILT_IN.get(metric):
        first = unit.first_answered
        value = known.read(first)
        return None if value is None else (value, first.ended_at)
    reports = unit.reports.get(metric)
    return None if reports is None else (reports[0].value, reports[0].at)


def mean_value(unit: UnitOutcomes, metric: str, *, until: datetime | None = None) -> float | None:
    """The mean over a unit's requests, or over those up to a moment and what was reported on these."""
    if known := _BUILT_IN.get(metric):
        asked = [request for request in unit.requests if until is None or request.at <= until]
        return _mean([value for request in asked if (value := known.read(request)) is not None])
    reports = unit.reports.get(metric, ())
    return _mean([report.value for report in reports if until is None or report.asked_at <= until])


def analysed_value(value: float, metric: str) -> float:
    """A value as it is compared: of a metric with the scale `ratio` its logarithm.

    Times are heavy-tailed: one slow user carries a mean of them off, but not a mean of logarithms, whose difference is
    a ratio of geometric means.
    """
    return math.log(max(value, _LEAST[metric])) if metric in _LEAST else value


def can_be_missing(metric: str) -> bool:
    """Whether a request may have no value: what clients report, and the first token of an answer that never came."""
    return metric not in _BUILT_IN or metric == "ttft_ms"


def num_outcomes_of(unit: UnitOutcomes, metric: str) -> int:
    """How many of a unit's requests have a value of the metric."""
    if metric == "ttft_ms":
        return sum(request.ttft_ms is not None for request in unit.requests)
    return len(unit.requests) if metric in _BUILT_IN else len(unit.reports.get(metric, ()))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
