"""Weights that follow the outcomes: when they move, whose they are, and what they are computed from."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from adapters.errors import ConflictError
from adapters.experiment_acts import undo
from adapters.experiment_evaluation import REALLOCATION_EVERY, ExperimentEvaluation
from adapters.experiment_report import better_shares
from adapters.experiments import ExperimentService
from adapters.exposures import FEEDBACK_WINDOW
from adapters.outcomes import read_outcomes
from adapters.records import Decision, Experiment
from adapters.registry import Registry
from adapters.tables import DecisionRow, ExposureRow, utc_now
from tests.support.experiments import NO, YES, Start, add_users, win


def _decisions(registry: Registry, experiment: Experiment) -> list[Decision]:
    return list(ExperimentService(registry.database).decisions(experiment.id))


def _start_a_day_ago(registry: Registry, start: Start) -> Experiment:
    """Weights that may follow the outcomes, which have a winner."""
    experiment = start(allocation="thompson", planned_units=2000)
    win(registry, experiment, 80)
    _let_a_day_pass(registry)
    return experiment


def _let_a_day_pass(registry: Registry) -> None:
    """Make every decision so old that weights may follow the outcomes again."""
    with registry.database.write() as session:
        for row in session.query(DecisionRow):
            row.made_at -= REALLOCATION_EVERY


def test_weights_follow_the_better_arm_once_a_day_when_that_was_asked_for(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A new stage with most users for the winner and some for the other; not on the same day again."""
    experiment = start(allocation="thompson", planned_units=2000)
    win(registry, experiment, 80)
    evaluation.evaluate_all()
    assert 1 == ExperimentService(registry.database).get(experiment.id).stage
    _let_a_day_pass(registry)
    for _ in range(2):
        evaluation.evaluate_all()
    found = ExperimentService(registry.database).get(experiment.id)
    weights = {arm.name: arm.weight for arm in found.arms}
    assert (2, 100.0) == (found.stage, sum(weights.values()))
    assert 80 < weights["B"] <= 95
    decision = _decisions(registry, experiment)[-1]
    assert ("change_weights", "evaluator", weights) == (decision.action, decision.by, decision.numbers["shares"])
    assert "Weights follow the outcomes (thompson)" in evaluation.report("legal").verdict.notes[-1]


def test_weights_follow_on_the_same_day_when_an_acceptance_was_taken_back(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It begins no stage, and so no day."""
    experiment = _start_a_day_ago(registry, start)
    evaluation.accept_feedback(experiment.id, "known")
    undo(registry, experiment.id)
    evaluation.evaluate_all()
    assert 2 == ExperimentService(registry.database).get(experiment.id).stage


def test_person_s_weights_stay_when_they_come_while_others_are_computed(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Weights by the numbers of a stage that is over are not set."""
    experiment = _start_a_day_ago(registry, start)
    service = ExperimentService(registry.database)
    readings: list[int] = []

    def change(*arguments: Any) -> None:
        if "exposures.total_ms" in arguments[2]:
            readings.append(len(readings))
            if len(readings) == 2:  # the first is for the verdict, the second for the weights
                service.change_weights(experiment.id, [("A", None, 90), ("B", None, 10)])

    event.listen(registry.database.engine, "before_cursor_execute", change)
    with pytest.raises(ConflictError, match="is in stage 2, not 1"):
        evaluation.evaluate(experiment.id)
    assert [90, 10] == [arm.weight for arm in service.get(experiment.id).arms]


def test_weights_follow_first_outcomes_when_users_come_back(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What a heavy user says a hundred times weighs as much as what is said once."""
    experiment = start(allocation="thompson", guardrails=())
    first = {arm: add_users(registry, experiment, arm, [YES, NO] * 20) for arm in ("A", "B")}
    again = add_users(registry, experiment, "B", [YES] * 40)
    with registry.database.write() as session:
        for old, new in zip(first["B"], again, strict=True):
            session.get_one(ExposureRow, new).unit = session.get_one(ExposureRow, old).unit
    with registry.database.read() as session:
        outcomes = read_outcomes(session, experiment.id, 1)
    shares = better_shares(experiment, outcomes, now=utc_now(), window=FEEDBACK_WINDOW)
    assert {"A": 50, "B": 50} == pytest.approx(shares, abs=1)
