"""Verdicts over a real database: what is read, when a row is written, and that acts happen once and can be undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event

from adapters.audit import AuditLog
from adapters.database import open_database
from adapters.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError
from adapters.experiment_acts import undo
from adapters.experiment_evaluation import EVALUATOR, REALLOCATION_EVERY, ExperimentEvaluation
from adapters.experiment_report import better_shares
from adapters.experiments import ExperimentService
from adapters.exposures import FEEDBACK_WINDOW
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.outcomes import read_outcomes
from adapters.records import Decision, Experiment, Feedback, Guardrail, Metric
from adapters.registry import Registry
from adapters.store import ArtifactStore
from adapters.tables import DecisionRow, ExperimentRow, ExposureRow, utc_now
from tests.support.experiments import ERRORS, HALVES, NO, YES, Start, add_users, age, points_to, win
from tests.support.versions import publish_text


def _break(registry: Registry, experiment: Experiment) -> None:
    add_users(registry, experiment, "A", [YES] * 60)
    add_users(registry, experiment, "B", [None] * 60, error="the model failed")


def _decisions(registry: Registry, experiment: Experiment) -> list[Decision]:
    return list(ExperimentService(registry.database).decisions(experiment.id))


def _let_a_day_pass(registry: Registry) -> None:
    """Make every decision so old that weights may follow the outcomes again."""
    with registry.database.write() as session:
        for row in session.query(DecisionRow):
            row.made_at -= REALLOCATION_EVERY


def _actions(registry: Registry, experiment: Experiment) -> list[str]:
    return [decision.action for decision in _decisions(registry, experiment)]


def test_alias_is_back_after_one_evaluation_when_a_guardrail_is_breached(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Everybody gets the control; decision and audit log say who did it and why, with the numbers."""
    experiment = start(auto_rollback=True)
    _break(registry, experiment)
    evaluation.evaluate_all()
    found = ExperimentService(registry.database).get(experiment.id)
    bound = {registry.resolve("legal", unit=f"u{number}").number for number in range(20)}
    assert ("decided", {1}) == (found.state, bound)
    assert ["start", "verdict", "roll_back"] == _actions(registry, experiment)
    act = _decisions(registry, experiment)[-1]
    assert ("evaluator", "roll_back", 1) == (act.by, act.numbers["kind"], act.numbers["to_number"])
    assert "breaks the guardrail error_rate" in act.reason
    (guardrail,) = act.numbers["treatments"][0]["guardrails"]
    assert ("breached", 0.02, 60) == (guardrail["state"], guardrail["margin"], guardrail["treatment"]["num_units"])
    entry = AuditLog(registry.database).list(limit=1)[0]
    assert ("decide_experiment", "evaluator", experiment.id) == (entry.action, entry.actor, entry.subject)


def test_alias_goes_back_when_it_points_to_the_candidate_that_breaks(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The experiment was begun after the candidate had been promoted: ending it alone would leave everybody to it."""
    registry.promote("legal@v2")
    experiment = start(auto_rollback=True)
    _break(registry, experiment)
    evaluation.evaluate_all()
    assert 1 == points_to(registry)
    assert "rollback" == registry.history("legal")[-1].action


def test_others_are_evaluated_when_one_experiment_can_t_be(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A plan that nobody can read raises what no caller expects; the guardrail of the next one is acted on."""
    publish_text(registry, "four", alias="other")
    publish_text(registry, "five", alias="other", promote=False)
    poisoned = ExperimentService(registry.database).create("other", HALVES)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, poisoned.id).plan = {"unknown": 1}
    experiment = start(auto_rollback=True)
    _break(registry, experiment)
    with pytest.raises(TypeError):
        evaluation.evaluate(poisoned.id)
    evaluation.evaluate_all()
    assert "decided" == ExperimentService(registry.database).get(experiment.id).state


def test_winner_is_promoted_once_when_that_was_asked_for(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """One move of the alias, one decision, one audit line, however often it is evaluated afterwards."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    for _ in range(3):
        evaluation.evaluate_all()
    with pytest.raises(ConflictError, match="decided, not running"):
        _evaluate_as_of_before(evaluation, experiment)
    assert 2 == points_to(registry)
    assert ["start", "verdict", "promote"] == _actions(registry, experiment)
    assert 1 == sum(entry.action == "decide_experiment" for entry in AuditLog(registry.database).list(limit=100))
    assert ["publish", "promote"] == [change.action for change in registry.history("legal")]


def _evaluate_as_of_before(evaluation: ExperimentEvaluation, experiment: Experiment) -> None:
    """What a process does that read the experiment before another one ended it."""
    from adapters.experiment_acts import conclude

    conclude(evaluation.registry, experiment.id, "B", action="promote", reason="late", stage=experiment.stage)


def test_act_happens_once_when_processes_evaluate_at_the_same_time(registry: Registry, start: Start) -> None:
    """Four of them, each with a database of its own, as API processes have."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    barrier = threading.Barrier(4)

    def evaluate() -> None:
        database = open_database(str(registry.database.engine.url))
        own = ExperimentEvaluation(Registry(database, ArtifactStore(registry.store.root))).acting_for(EVALUATOR)
        barrier.wait()
        own.evaluate_all()
        database.close()

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["start", "verdict", "promote"] == _actions(registry, experiment)
    assert 2 == points_to(registry)


def test_nothing_is_done_when_nobody_asked_for_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The verdict is written down; the experiment goes on."""
    winning = start()
    win(registry, winning)
    evaluation.evaluate_all()
    assert ["start", "verdict"] == _actions(registry, winning)
    assert "running" == ExperimentService(registry.database).get(winning.id).state
    ExperimentService(registry.database).stop(winning.id)
    breaking = start(auto_promote=True)
    _break(registry, breaking)
    evaluation.evaluate_all()
    assert ["start", "verdict"] == _actions(registry, breaking)
    assert 1 == points_to(registry)


def test_acts_are_undone_when_somebody_wants_them_back(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The alias points where it did, and no later evaluation does it again."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    evaluation.evaluate_all()
    undo(registry, experiment.id)
    evaluation.evaluate_all()
    assert (1, "undo") == (points_to(registry), _actions(registry, experiment)[-1])


def test_promotion_asks_for_an_arm_when_the_verdict_has_none(start: Start, evaluation: ExperimentEvaluation) -> None:
    """Nobody's guess moves an alias."""
    experiment = start([("A", "v1", 40.0), ("B", "v2", 40.0), ("C", "v3", 20.0)])
    with pytest.raises(InvalidInputError, match="the verdict promotes no arm; say which of B, C to promote"):
        evaluation.promote(experiment.id)


def test_verdict_stays_when_users_report_after_the_decision(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What it was decided on is history; what came later is told as such, and undoing rewrites nothing either."""
    experiment = start(auto_promote=True)
    add_users(registry, experiment, "A", [YES, NO] * 200)
    add_users(registry, experiment, "B", [YES, YES, YES, NO] * 100)
    add_users(registry, experiment, "A", [None] * 400)
    late = add_users(registry, experiment, "B", [None] * 400)
    evaluation.accept_feedback(experiment.id, "nobody was asked")
    evaluation.evaluate_all()
    before = evaluation.report(experiment.id).verdict
    assert ("promote", "B", "Nothing more; undo takes the decision back.") == (
        before.kind,
        before.arm,
        before.next_step,
    )
    service = ExperimentService(registry.database)
    for response in late:
        service.record_feedback(Feedback(response, "solved", 0.0))
    after = evaluation.report(experiment.id).verdict
    assert (before.kind, before.arm, before.sentence) == (after.kind, after.arm, after.sentence)
    assert "With what has come since then it would be inconclusive: " in after.notes[-1]
    undo(registry, experiment.id)
    undone = evaluation.report(experiment.id).verdict
    assert (before.sentence, "Nothing more; the decision was taken back.") == (undone.sentence, undone.next_step)


def test_today_s_verdict_is_not_told_beside_the_decision_when_nothing_has_come(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Nobody came before it nor behind it: that it is over by now makes another verdict of the same numbers."""
    experiment = start()
    evaluation.promote(experiment.id, "B")
    undo(registry, experiment.id)
    notes = evaluation.report(experiment.id).verdict.notes
    assert "the numbers below are today's." in notes[-1]


def test_alias_stays_when_the_winner_s_files_are_damaged(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It is tried again at the next evaluation, and other experiments are evaluated all the same."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    (registry.store.folder(experiment.arms[1].digest) / ADAPTER_WEIGHTS_FILE).write_text("damaged")
    with pytest.raises(IntegrityError):
        evaluation.evaluate(experiment.id)
    evaluation.evaluate_all()
    assert (1, ["start", "verdict"]) == (points_to(registry), _actions(registry, experiment))


def test_row_is_written_when_the_verdict_changes_and_not_at_every_look(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The first verdict is to go on, which is no news; each change is one row."""
    experiment = start(planned_units=1200)
    add_users(registry, experiment, "A", [YES, NO] * 20)
    add_users(registry, experiment, "B", [YES, NO] * 20)
    for _ in range(3):
        evaluation.evaluate_all()
    assert ["start"] == _actions(registry, experiment)
    win(registry, experiment, 400)
    for _ in range(3):
        evaluation.evaluate_all()
    add_users(registry, experiment, "B", [None] * 300, error="the model failed")
    evaluation.evaluate_all()
    kinds = [decision.numbers["kind"] for decision in _decisions(registry, experiment)[1:]]
    assert ["promote", "roll_back"] == kinds


def test_outcomes_are_read_again_when_something_has_come(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A user, a report, another word on an answer, another stage; but not when nothing has happened."""
    experiment = start()
    readings: list[str] = []

    def note(*arguments: Any) -> None:
        readings.extend(["read"] if "exposures.total_ms" in arguments[2] else [])

    def read_by_evaluation() -> bool:
        readings.clear()
        evaluation.evaluate_all()
        return bool(readings)

    event.listen(registry.database.engine, "before_cursor_execute", note)
    service = ExperimentService(registry.database)
    responses = add_users(registry, experiment, "A", [YES, None])
    assert [True, False] == [read_by_evaluation() for _ in range(2)]
    changes: list[Callable[[], object]] = [
        lambda: add_users(registry, experiment, "B", [None]),
        lambda: service.record_feedback(Feedback(responses[1], "solved", 1.0)),
        lambda: service.record_feedback(Feedback(responses[1], "solved", 0.0)),
        lambda: evaluation.accept_feedback(experiment.id, "known"),
        lambda: service.change_weights(experiment.id, [("A", None, 80), ("B", None, 20)]),
    ]
    for change in changes:
        change()
        assert [True, False] == [read_by_evaluation() for _ in range(2)]


def test_outcomes_are_read_again_when_time_alone_may_change_the_verdict(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The last moments of an experiment, and files that are whole again, are no news in the database."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    weights = registry.store.folder(experiment.arms[1].digest) / ADAPTER_WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_text("damaged")
    evaluation.evaluate_all()
    assert 1 == points_to(registry)
    weights.write_bytes(whole)
    evaluation.evaluate_all()
    assert 2 == points_to(registry)
    other = start()
    evaluation.evaluate_all()
    with registry.database.write() as session:
        session.get_one(ExperimentRow, other.id).ends_at = utc_now()
    evaluation.evaluate_all()
    assert "stop" == _actions(registry, other)[-1]


def test_wrong_split_is_remembered_when_later_users_even_it_out(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A check that is valid at every look has spoken once it has fired."""
    experiment = start(auto_promote=True)
    add_users(registry, experiment, "B", [YES] * 300)
    add_users(registry, experiment, "A", [NO] * 100)
    evaluation.evaluate_all()
    add_users(registry, experiment, "A", [NO] * 200)
    evaluation.evaluate_all()
    report = evaluation.report(experiment.id)
    assert report.split.p_value is not None
    assert report.split.p_value > 0.5
    assert (True, "inconclusive", 1) == (report.split.fired, report.verdict.kind, points_to(registry))


def test_wrong_split_is_carried_into_later_stages_until_somebody_accepts_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A change of weights by a hair is no remedy; what was accepted is told again only where it is found again."""
    experiment = start(auto_promote=True)
    service = ExperimentService(registry.database)
    with pytest.raises(ConflictError, match="are split as was meant; nothing to accept"):
        evaluation.accept_split("legal", "why not")
    add_users(registry, experiment, "A", [YES] * 300)
    add_users(registry, experiment, "B", [YES] * 150)
    evaluation.evaluate_all()
    changed = service.change_weights("legal", [("A", None, 50.02), ("B", None, 49.98)])
    win(registry, changed, 800)
    evaluation.evaluate_all()
    split = evaluation.report("legal").split
    assert (True, (1,), ()) == (split.fired, split.stages, split.accepted)
    assert (1, "inconclusive") == (points_to(registry), evaluation.report("legal").verdict.kind)
    evaluation.accept_split("legal", "a crawler, which is blocked since")
    accepted = evaluation.report("legal")
    assert (False, (1,), "promote") == (accepted.split.fired, accepted.split.accepted, accepted.verdict.kind)
    add_users(registry, changed, "A", [YES] * 500)
    evaluation.evaluate_all()
    assert (2,) == evaluation.report("legal").split.stages
    service.stop("legal")
    with pytest.raises(ConflictError, match="stopped, not running"):
        evaluation.accept_split("legal", "again")


def test_difference_in_feedback_holds_back_until_somebody_accepts_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Half of the treatment's users say nothing: who knows what they think."""
    experiment = start(auto_promote=True)
    add_users(registry, experiment, "A", [YES, NO] * 250)
    add_users(registry, experiment, "B", [YES, None] * 250)
    evaluation.evaluate_all()
    assert (1, "continue") == (points_to(registry), evaluation.report("legal").verdict.kind)
    assert "known of fewer of B's answers" in evaluation.report("legal").verdict.sentence
    evaluation.accept_feedback("legal", "B's button is below the fold")
    evaluation.evaluate_all()
    assert 2 == points_to(registry)
    assert ["start", "verdict", "accept_feedback", "verdict", "promote"] == _actions(registry, experiment)
    with pytest.raises(ConflictError, match="decided, not running"):
        evaluation.accept_feedback(experiment.id, "again")


def test_last_verdict_is_written_when_an_experiment_has_ended_at_its_time(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Once; the end is settled by the same evaluation, and nothing is done after it."""
    experiment = start(auto_promote=True)
    win(registry, experiment, 40)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = utc_now() - timedelta(seconds=1)
    for _ in range(2):
        evaluation.evaluate_all()
    assert ["start", "verdict", "stop"] == _actions(registry, experiment)
    assert "its end date has passed" in _decisions(registry, experiment)[1].reason


@pytest.mark.parametrize("outcome", ["breach", "win"])
def test_act_is_done_when_the_end_came_before_the_last_look(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation, outcome: str
) -> None:
    """What came in the last moments counts as much as what came before; once, however often it is evaluated."""
    registry.promote("legal@v2")
    experiment = start(auto_promote=True, auto_rollback=True)
    (_break if outcome == "breach" else win)(registry, experiment)
    ends_at = utc_now()
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = ends_at
    for _ in range(2):
        evaluation.evaluate_all()
    found = ExperimentService(registry.database).get(experiment.id)
    act, number = ("roll_back", 1) if outcome == "breach" else ("promote", 2)
    assert ("decided", ends_at, number) == (found.state, found.stopped_at, points_to(registry))
    assert ["start", "verdict", act] == _actions(registry, experiment)


def test_end_is_written_when_the_winner_of_an_ended_experiment_can_t_be_promoted(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Somebody has moved the alias since: the verdict stands in the log, and it is not tried for ever."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = utc_now()
    registry.promote("legal@v3")
    for _ in range(2):
        evaluation.evaluate_all()
    assert (3, ["start", "verdict", "stop"]) == (points_to(registry), _actions(registry, experiment))
    assert "decided" == evaluation.roll_back(experiment.id).state


def test_breach_ends_the_experiment_when_the_split_is_wrong(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Only a promotion takes a split that can be trusted: an arm that fails may lose users by that alone."""
    experiment = start(auto_rollback=True)
    add_users(registry, experiment, "A", [YES] * 300)
    add_users(registry, experiment, "B", [None] * 120, error="the model failed")
    evaluation.evaluate_all()
    assert ["start", "verdict", "roll_back"] == _actions(registry, experiment)
    assert _decisions(registry, experiment)[-1].numbers["split"]["fired"]


def test_nothing_is_done_by_itself_when_a_treatment_only_loses(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What `auto_rollback` acts on is a breached guardrail; the verdict is written down."""
    experiment = start(auto_rollback=True)
    add_users(registry, experiment, "B", [YES, NO] * 200)
    add_users(registry, experiment, "A", [YES, YES, YES, NO] * 100)
    evaluation.evaluate_all()
    assert ["start", "verdict"] == _actions(registry, experiment)
    assert "roll_back" == _decisions(registry, experiment)[-1].numbers["kind"]


def test_experiment_goes_on_when_more_users_come_than_were_planned(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A number tunes the intervals of a sequence and ends nothing; one for a single look ends there."""
    experiment = start(planned_units=100)
    add_users(registry, experiment, "A", [YES, NO] * 40)
    add_users(registry, experiment, "B", [YES, NO] * 40)
    assert "continue" == evaluation.report(experiment.id).verdict.kind
    ExperimentService(registry.database).stop(experiment.id)
    stopped = evaluation.report(experiment.id).verdict
    assert ("inconclusive", True) == (stopped.kind, "(it was stopped)" in stopped.sentence)


def test_alias_is_refused_when_it_has_several_experiments(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A newer draft must not hide what runs from those who look, decide or accept."""
    running = start()
    ExperimentService(registry.database).create("legal", HALVES, draft=True)
    acts: list[Callable[[], object]] = [
        lambda: evaluation.report("legal"),
        lambda: evaluation.promote("legal", "B"),
        lambda: evaluation.roll_back("legal"),
        lambda: evaluation.accept_feedback("legal", "known"),
    ]
    for act in acts:
        with pytest.raises(ConflictError, match="'legal' has several experiments"):
            act()
    assert ["start"] == _actions(registry, running)


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
    experiment = start(allocation="thompson", planned_units=2000)
    win(registry, experiment, 80)
    _let_a_day_pass(registry)
    evaluation.accept_feedback(experiment.id, "known")
    undo(registry, experiment.id)
    evaluation.evaluate_all()
    assert 2 == ExperimentService(registry.database).get(experiment.id).stage


def test_experiment_is_watched_when_a_row_holds_any_float(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A time that no clock gives ends nobody's watch."""
    experiment = start(auto_rollback=True, guardrails=(ERRORS, Guardrail("feedback_rate", "increase", 0.5)))
    add_users(registry, experiment, "A", [NO] * 300, ttft_ms=1e14)
    add_users(registry, experiment, "B", [NO] * 300, error="the model failed")
    evaluation.evaluate_all()
    assert "roll_back" == _actions(registry, experiment)[-1]


def test_person_s_weights_stay_when_they_come_while_others_are_computed(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Weights by the numbers of a stage that is over are not set."""
    experiment = start(allocation="thompson", planned_units=2000)
    win(registry, experiment, 80)
    _let_a_day_pass(registry)
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


@pytest.mark.parametrize(
    "plan",
    [
        {"guardrails": (Guardrail("feedback_rate", "increase", 0.05),)},
        {"metric": Metric("feedback_rate", "increase")},
        {"analysis": "fixed"},
    ],
    ids=["guardrail", "metric", "fixed sample"],
)
def test_outcomes_are_read_again_when_feedback_can_t_come_any_more(
    plan: dict[str, Any], registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A feedback rate is known, and a fixed sample is closed, by time alone: at the next look, not within the hour."""
    experiment = start(**{"guardrails": (), **plan})
    add_users(registry, experiment, "A", [YES, NO])
    readings: list[str] = []

    def note(*arguments: Any) -> None:
        readings.extend(["read"] if "exposures.ttft_ms" in arguments[2] else [])

    event.listen(registry.database.engine, "before_cursor_execute", note)
    numbers = []
    for by in (timedelta(0), timedelta(days=1), FEEDBACK_WINDOW, timedelta(days=1)):
        age(registry, by)
        readings.clear()
        evaluation.evaluate_all()
        numbers.append(len(readings))
    assert [1, 0, 1, 0] == numbers


def test_acceptance_counts_no_more_when_it_is_undone(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Of feedback and of the split; the latest act first, and each is in the log."""
    experiment = start(guardrails=())
    add_users(registry, experiment, "A", [YES, NO] * 250)
    add_users(registry, experiment, "B", [YES, None] * 150)
    evaluation.evaluate_all()
    evaluation.accept_split("legal", "a crawler")
    evaluation.accept_feedback("legal", "the button is below the fold")
    assert "promote" == evaluation.report("legal").verdict.kind
    undo(registry, "legal")
    assert "known of fewer of B's answers" in evaluation.report("legal").verdict.sentence
    undo(registry, "legal")
    report = evaluation.report("legal")
    assert (True, "inconclusive") == (report.split.fired, report.verdict.kind)
    assert ["accept_split", "accept_feedback", "undo", "undo"] == _actions(registry, experiment)[-4:]
    with pytest.raises(ConflictError, match="nothing to undo"):
        undo(registry, "legal")


def test_guardrail_is_told_and_accepted_when_its_metric_does_not_vary(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It is not passed, and the verdict doesn't say to wait; a person's word lets the winner pass, and is undone."""
    experiment = start(guardrails=(ERRORS, Guardrail("completion_tokens", "decrease", 0.5, is_relative=True)))
    win(registry, experiment)
    before = evaluation.report("legal")
    assert "no_variation" == before.treatments[0].guards[1].state
    assert "continue" == before.verdict.kind
    assert "both arms have the same value, 7, in all 1,000 users, and without variation" in before.verdict.sentence
    assert "Wait" not in before.verdict.next_step
    assert "If completion_tokens can't get worse" in before.verdict.next_step
    with pytest.raises(InvalidInputError, match="no guardrail 'ttft_ms'; it has error_rate, completion_tokens"):
        evaluation.accept_guardrail("legal", "ttft_ms", "known")
    evaluation.accept_guardrail("legal", "completion_tokens", "every answer has seven tokens")
    after = evaluation.report("legal").verdict
    assert "promote" == after.kind
    assert "1 of 2 guardrails hold, the rest is accepted by hand" in after.sentence
    assert "Accepted by hand: the guardrail completion_tokens can't be shown to hold" in after.notes[0]
    undo(registry, "legal")
    assert before.verdict == evaluation.report("legal").verdict
    assert ["start", "accept_guardrail", "undo"] == _actions(registry, experiment)


def test_breach_counts_when_the_guardrail_was_accepted(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What is accepted is that nothing is known, and not harm."""
    experiment = start(auto_rollback=True)
    evaluation.accept_guardrail("legal", "error_rate", "too few users")
    _break(registry, experiment)
    evaluation.evaluate_all()
    assert "decided" == ExperimentService(registry.database).get(experiment.id).state


def test_metric_is_told_when_it_does_not_vary(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Of a primary metric: neither is there too little data, nor does waiting help."""
    experiment = start(metric=Metric("completion_tokens", "decrease"), guardrails=())
    win(registry, experiment)
    verdict = evaluation.report("legal").verdict
    assert "continue" == verdict.kind
    assert "No difference in completion_tokens can be told: both arms have the same value, 7," in verdict.sentence


def test_feedback_is_compared_when_the_plan_names_none_of_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A note on every verdict, and nothing is held back: the plan's numbers don't depend on it."""
    experiment = start(metric=Metric("length_finish_rate", "decrease"), guardrails=())
    assert evaluation.report("legal").treatments[0].feedback is None
    add_users(registry, experiment, "A", [{"liked": 1.0}, None] * 150)
    add_users(registry, experiment, "B", [{"liked": 1.0}, None, None, None] * 75)
    report = evaluation.report("legal")
    gap = report.treatments[0].feedback
    assert gap is not None
    assert gap.interval is not None
    assert ("feedback_rate", 0.25, 0.5) == (gap.metric, gap.treatment.mean, gap.control.mean)
    assert gap.interval.high < 0
    assert "Users give feedback on fewer of B's answers than on the control's: -25.0 points" in report.verdict.notes[-1]
    assert () == report.treatments[0].gaps


def test_feedback_is_told_once_when_the_plan_names_all_of_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """How often the plan's metric is known says it."""
    experiment = start()
    add_users(registry, experiment, "A", [YES, None] * 20)
    add_users(registry, experiment, "B", [YES] * 40)
    (treatment,) = evaluation.report("legal").treatments
    assert (["solved"], None) == ([gap.metric for gap in treatment.gaps], treatment.feedback)


def test_unknown_experiment_raises_when_asked_for(evaluation: ExperimentEvaluation) -> None:
    """The message holds the name."""
    for act in (evaluation.report, evaluation.evaluate):
        with pytest.raises(NotFoundError, match="no experiment 'legal'"):
            act("legal")


def test_stage_that_is_over_is_left_alone_when_read_too_early(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict on weights that somebody has changed meanwhile is neither written down nor acted on."""
    experiment = start(auto_promote=True)
    win(registry, experiment)
    old = evaluation.report(experiment.id)
    ExperimentService(registry.database).change_weights("legal", [("A", None, 80), ("B", None, 20)])
    monkeypatch.setattr(evaluation, "_report", lambda *_, **__: replace(old))
    evaluation.evaluate(experiment.id)
    assert (1, ["start", "change_weights"]) == (points_to(registry), _actions(registry, experiment))


def test_fixed_sample_is_promoted_when_the_end_came_before_its_feedback_was_closed(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Users were there in time; the end is written once the one look is over."""
    experiment = start(analysis="fixed", planned_units=400, guardrails=(), auto_promote=True)
    win(registry, experiment, 200)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = utc_now()
    for _ in range(2):
        evaluation.evaluate_all()
    assert ("stopped", 1, ["start"]) == (
        ExperimentService(registry.database).get(experiment.id).state,
        points_to(registry),
        _actions(registry, experiment),
    )
    age(registry, timedelta(days=8))
    patient = ExperimentEvaluation(registry).acting_for(EVALUATOR)
    patient.evaluate_all()
    assert (2, ["start", "verdict", "promote"]) == (points_to(registry), _actions(registry, experiment))


def test_end_is_written_when_a_fixed_sample_never_comes(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Nothing is waited for that can't come."""
    experiment = start(analysis="fixed", planned_units=400, guardrails=())
    win(registry, experiment, 40)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = utc_now()
    evaluation.evaluate_all()
    assert ["start", "verdict", "stop"] == _actions(registry, experiment)


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
