"""Experiments with users in them, written to the database as the server writes them, many in one transaction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from adapters.exposures import add_exposure
from adapters.records import Binding, Experiment, Exposure, Feedback, Guardrail, Metric
from adapters.registry import Registry
from adapters.tables import ExposureRow, FeedbackRow, utc_now

__all__ = ["ERRORS", "HALVES", "NO", "SOLVED", "YES", "Start", "add_users", "age", "points_to", "win"]

SOLVED = Metric("solved", "increase", "share")
ERRORS = Guardrail("error_rate", "decrease", 0.02)
YES, NO = {"solved": 1.0}, {"solved": 0.0}
Start = Callable[..., Experiment]  # starts one with changes to the usual plan
HALVES = [("A", "v1", 50.0), ("B", "v2", 50.0)]
_numbers = itertools.count()


def add_users(
    registry: Registry,
    experiment: Experiment,
    arm: str,
    outcomes: Iterable[Mapping[str, float] | None],
    *,
    error: str | None = None,
    ttft_ms: float | None = 100.0,
) -> list[str]:
    """One new user with one request for each outcome, which is what that user reports by metric; None is nothing.

    They come a second after each other from the experiment's start, so that the arms' users come side by side.
    Returns the responses' ids.
    """
    found = next(candidate for candidate in experiment.arms if candidate.name == arm)
    binding = Binding(
        experiment.alias, "experiment", found.digest, found.number, experiment.id, arm, stage=experiment.stage
    )
    responses = []
    began = experiment.starts_at or utc_now()
    with registry.database.write() as session:
        for place, outcome in enumerate(outcomes):
            number = next(_numbers)
            responses.append(f"response-{number}")
            reason = None if error else "stop"
            exposure = Exposure(
                responses[-1], binding, f"user-{number}", "user", 5, 7, ttft_ms, 3 * (ttft_ms or 1), reason, error,
                bound_at=began + timedelta(seconds=place),
            )  # fmt: skip
            feedback = [Feedback(responses[-1], metric, value) for metric, value in (outcome or {}).items()]
            add_exposure(session, exposure, feedback)
    return responses


def win(registry: Registry, experiment: Experiment, num: int = 500) -> None:
    """So many users an arm, of whom B helps three in four and A one in two."""
    add_users(registry, experiment, "A", [YES, NO] * (num // 2))
    add_users(registry, experiment, "B", [YES, YES, YES, NO] * (num // 4))


def points_to(registry: Registry) -> int:
    """The version that `legal` points to."""
    return registry.alias("legal").current.number


def age(registry: Registry, by: timedelta) -> None:
    """Make all that was answered older; reports stay as they are, and what reads them sees nothing new."""
    with registry.database.write() as session:
        for row in session.query(ExposureRow):
            row.served_at -= by


def age_reports(registry: Registry, by: timedelta) -> None:
    """Make all that was reported older."""
    with registry.database.write() as session:
        for row in session.query(FeedbackRow):
            row.reported_at -= by
