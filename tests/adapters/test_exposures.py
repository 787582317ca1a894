"""Exposures, feedback and what they come to by unit: what is stored, what is refused, what survives."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from adapters.database import open_database
from adapters.errors import ConflictError, FeedbackTooLateError, InvalidInputError, NotFoundError
from adapters.experiments import ExperimentService
from adapters.exposures import MAX_FEEDBACK_NAMES
from adapters.outcomes import AnsweredRequest, UnitOutcomes
from adapters.records import (
    BUILT_IN_METRICS,
    Actor,
    AnalysisPlan,
    Binding,
    Experiment,
    Exposure,
    Feedback,
    Guardrail,
)
from adapters.tables import ExposureRow, utc_now
from tests.support.experiments import HALVES, SOLVED, expose

REPOSITORY = Path(__file__).parents[2]

RECORD_AND_DIE = """
import os, sys
from adapters.database import open_database
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
service = ExperimentService(open_database(sys.argv[1]))
for index in range(20):
    service.record_exposure(Exposure(f"r{index}", Binding("base", "base"), "u", "user", 1, 1, None, 1.0, "stop", None))
    print(f"r{index}", flush=True)
os.kill(os.getpid(), 9)
"""


def _outcome(
    service: ExperimentService, experiment: Experiment, arm: str, unit: str, value: float, metric: str = "score"
) -> str:
    response = f"{arm}-{unit}-{metric}-{len(_exposures(service))}"
    expose(service, experiment, arm, unit, response)
    service.record_feedback(Feedback(response, metric, value))
    return response


def _exposures(service: ExperimentService) -> list[ExposureRow]:
    with service.database.read() as session:
        return list(session.query(ExposureRow).all())


def test_exposure_is_stored_whole_when_recorded(experiments: ExperimentService) -> None:
    """Every field comes back, also of an answer of the base model."""
    binding = Binding("base", "base")
    experiments.record_exposure(Exposure("r1", binding, "u1", "request", 3, 4, None, 12.5, None, "x" * 600))
    (row,) = _exposures(experiments)
    assert (
        row.response_id,
        row.alias,
        row.route,
        row.number,
        row.digest,
        row.experiment_id,
        row.arm,
    ) == ("r1", "base", "base", None, None, None, None)
    assert (
        row.unit,
        row.unit_source,
        row.prompt_tokens,
        row.completion_tokens,
        row.ttft_ms,
        row.total_ms,
        row.finish_reason,
    ) == ("u1", "request", 3, 4, None, 12.5, None)
    assert row.error == "x" * 500


def test_feedback_replaces_when_the_metric_is_reported_again(experiments: ExperimentService) -> None:
    """The last value for a metric of a response counts; another metric stands beside it."""
    experiment = experiments.create("legal", HALVES)
    response = _outcome(experiments, experiment, "A", "u", 0.25)
    experiments.record_feedback(Feedback(response, "score", 0.75, "better"))
    experiments.record_feedback(Feedback(response, "length", 3.0))
    (unit,) = experiments.outcomes(experiment.id, 1)["A"]
    assert {"length": [3.0], "score": [0.75]} == _reported(unit)


def test_feedback_raises_when_the_response_is_unknown(experiments: ExperimentService) -> None:
    """The id stands in the message, and nothing is stored."""
    with pytest.raises(NotFoundError, match="no response 'nope'"):
        experiments.record_feedback(Feedback("nope", "score", 1.0))


def test_feedback_is_refused_when_it_breaks_the_kind_that_the_plan_says(experiments: ExperimentService) -> None:
    """A share lies between 0 and 1; of a metric that is in no plan anything goes."""
    plan = AnalysisPlan(metric=SOLVED, guardrails=(Guardrail("rude", "decrease", 0.1, kind="share"),))
    experiment = experiments.create("legal", HALVES, plan=plan)
    response = _outcome(experiments, experiment, "A", "u", 0.5, "solved")
    for metric in ("solved", "rude"):
        with pytest.raises(InvalidInputError, match=f"{metric!r} is a share .* found 1.5"):
            experiments.record_feedback(Feedback(response, metric, 1.5))
    experiments.record_feedback(Feedback(response, "stars", 5.0))
    (unit,) = experiments.outcomes(experiment.id, 1)["A"]
    assert {"solved": [0.5], "stars": [5.0]} == _reported(unit)


def test_feedback_is_refused_when_a_response_has_too_many_metrics(experiments: ExperimentService) -> None:
    """Values of those that are there can still be replaced."""
    experiment = experiments.create("legal", HALVES)
    response = _outcome(experiments, experiment, "A", "u", 0.5, "m0")
    for number in range(1, MAX_FEEDBACK_NAMES):
        experiments.record_feedback(Feedback(response, f"m{number}", 1.0))
    with pytest.raises(ConflictError, match="has feedback by 32 metrics"):
        experiments.record_feedback(Feedback(response, "another", 1.0))
    experiments.record_feedback(Feedback(response, "m0", 0.75))
    (unit,) = experiments.outcomes(experiment.id, 1)["A"]
    assert (MAX_FEEDBACK_NAMES, [0.75]) == (len(unit.reports), _reported(unit)["m0"])


def _reported(unit: UnitOutcomes) -> dict[str, list[float]]:
    """The values alone, by metric."""
    return {metric: [report.value for report in reports] for metric, reports in unit.reports.items()}


def test_users_are_ordered_by_when_they_were_bound_when_answers_end_otherwise(experiments: ExperimentService) -> None:
    """A slow arm's users are counted where they came, not where their answers ended."""
    experiment = experiments.create("legal", HALVES)
    bound = utc_now() - timedelta(minutes=5)
    for unit, moment in (("fast", bound + timedelta(minutes=1)), ("slow", bound)):
        binding = Binding("legal", "experiment", None, 1, experiment.id, "A", stage=1)
        exposure = Exposure(f"r-{unit}", binding, unit, "user", 5, 7, 1.5, 9.5, "stop", None, moment)
        experiments.record_exposure(exposure)
    found = experiments.outcomes(experiment.id, 1)["A"]
    assert [("slow", bound), ("fast", bound + timedelta(minutes=1))] == [(item.unit, item.first_at) for item in found]


def test_exposures_survive_when_the_process_is_killed(tmp_path: Path) -> None:
    """Every exposure whose recording returned is there after kill -9."""
    url = f"sqlite:///{tmp_path / 'hotswap.db'}"
    child = subprocess.run(
        [sys.executable, "-c", RECORD_AND_DIE, url], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (-9, "")
    database = open_database(url)
    found = {row.response_id for row in _exposures(ExperimentService(database))}
    assert set(child.stdout.split()) == found
    assert len(found) == 20
    database.close()


def test_outcomes_are_those_of_each_unit_when_requests_differ(experiments: ExperimentService) -> None:
    """Requests and reports of one stage in their order; what a tester forced is left out, also what was said of it."""
    experiment = experiments.create("legal", HALVES)
    expose(experiments, experiment, "A", "ann", "r1")
    expose(experiments, experiment, "A", "ann", "r2", error="the engine died")
    expose(experiments, experiment, "A", "bob", "r3")
    expose(experiments, experiment, "A", "eve", "r4", forced=True)
    for response, metric, value in (("r2", "solved", 1.0), ("r1", "stars", 4.0), ("r1", "solved", 0.0), ("r4", "x", 1)):
        experiments.record_feedback(Feedback(response, metric, value))
    outcomes = experiments.outcomes(experiment.id, 1)
    assert ["A", "B"] == list(outcomes)
    ann, bob = outcomes["A"]
    assert [] == outcomes["B"]
    times = {row.response_id: row.served_at for row in _exposures(experiments)}
    assert ("ann", times["r1"]) == (ann.unit, ann.first_at)
    assert [
        AnsweredRequest(times["r1"], False, False, 1.5, 9.5, 7, True),
        AnsweredRequest(times["r2"], True, False, 1.5, 9.5, 7, True),
    ] == ann.requests
    assert {"solved": [1.0, 0.0], "stars": [4.0]} == _reported(ann)
    assert [times["r2"], times["r1"]] == [report.asked_at for report in ann.reports["solved"]]
    assert ("bob", [False], {}) == (bob.unit, [request.has_feedback for request in bob.requests], bob.reports)


def test_feedback_is_refused_when_it_comes_too_late(experiments: ExperimentService) -> None:
    """Within the window it counts, to the end; behind it nothing is stored."""
    patient = ExperimentService(experiments.database, feedback_window=timedelta(days=2))
    experiment = experiments.create("legal", HALVES)
    expose(experiments, experiment, "A", "u", "r1")
    with experiments.database.write() as session:
        session.get_one(ExposureRow, "r1").served_at = utc_now() - timedelta(days=1)
    patient.record_feedback(Feedback("r1", "solved", 1.0))
    hasty = ExperimentService(experiments.database, feedback_window=timedelta(hours=23))
    with pytest.raises(FeedbackTooLateError, match=r"'r1' is 24\.0 hours old; feedback is taken for 23 hours"):
        hasty.acting_for(Actor("key-1")).record_feedback(Feedback("r1", "stars", 1.0))
    (unit,) = experiments.outcomes(experiment.id, 1)["A"]
    assert {"solved": [1.0]} == _reported(unit)


@pytest.mark.parametrize("metric", sorted(BUILT_IN_METRICS))
def test_feedback_is_refused_when_its_name_is_that_of_a_built_in_metric(
    experiments: ExperimentService, metric: str
) -> None:
    """Or a client could write what the server measures."""
    experiment = experiments.create("legal", HALVES)
    expose(experiments, experiment, "A", "u", "r1")
    with pytest.raises(InvalidInputError, match=f"'{metric}' is measured by the server itself"):
        experiments.record_feedback(Feedback("r1", metric, 1.0))
