"""Experiments with users in them, written to the database as the server writes them, many in one transaction."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from adapters.exposures import add_exposure
from adapters.records import Binding, Experiment, Exposure, Feedback
from adapters.registry import Registry

__all__ = ["HALVES", "add_users"]

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

    Returns the responses' ids.
    """
    found = next(candidate for candidate in experiment.arms if candidate.name == arm)
    binding = Binding(
        experiment.alias, "experiment", found.digest, found.number, experiment.id, arm, stage=experiment.stage
    )
    responses = []
    with registry.database.write() as session:
        for outcome in outcomes:
            number = next(_numbers)
            responses.append(f"response-{number}")
            reason = None if error else "stop"
            exposure = Exposure(
                responses[-1], binding, f"user-{number}", "user", 5, 7, ttft_ms, 3 * (ttft_ms or 1), reason, error
            )
            feedback = [Feedback(responses[-1], metric, value) for metric, value in (outcome or {}).items()]
            add_exposure(session, exposure, feedback)
    return responses
