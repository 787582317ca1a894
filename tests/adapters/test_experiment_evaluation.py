"""Verdicts over a real database: what is read, when a row is written, and that acts happen once and can be undone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from scipy import stats
from sqlalchemy import event

from adapters.audit import AuditLog
from adapters.database import open_database
from adapters.errors import ConflictError, IntegrityError, NotFoundError
from adapters.experiment_acts import undo
from adapters.experiment_comparisons import stage_confidence
from adapters.experiment_evaluation import EVALUATOR, REALLOCATION_EVERY, ExperimentEvaluation
from adapters.experiment_report import ArmReport, MetricReport, make_report
from adapters.experiments import ExperimentService
from adapters.exposures import FEEDBACK_WINDOW
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.outcomes import AnsweredRequest, UnitOutcomes, read_outcomes
from adapters.records import (
    BUILT_IN_METRICS,
    AnalysisPlan,
    Arm,
    Decision,
    Experiment,
    Feedback,
    Guardrail,
    Metric,
)
from adapters.registry import Registry
from adapters.settled_values import first_outcomes
from adapters.store import ArtifactStore
from adapters.tables import DecisionRow, ExperimentRow, ExposureRow, utc_now
from tests.support.experiments import HALVES, add_users
from tests.support.versions import publish_text

SOLVED = Metric("solved", "increase", "share")
ERRORS = Guardrail("error_rate", "decrease", 0.02)
YES, NO = {"solved": 1.0}, {"solved": 0.0}
Start = Callable[..., Experiment]


@pytest.fixture
def start(registry: Registry) -> Start:
    """Start an experiment on `legal`, which points to v1 of three versions."""
    for content in ("one", "two", "three"):
        publish_text(registry, content, promote=content == "one")

    def create(arms: list[tuple[str, str, float]] = HALVES, **plan: Any) -> Experiment:
        usual: dict[str, Any] = {"metric": SOLVED, "guardrails": (ERRORS,), "planned_units": 1000}
        wanted = AnalysisPlan(**usual | plan)
        return ExperimentService(registry.database).create("legal", arms, salt="s", plan=wanted)

    return create


@pytest.fixture
def evaluation(registry: Registry) -> ExperimentEvaluation:
    """Acts in the evaluator's name."""
    return ExperimentEvaluation(registry).acting_for(EVALUATOR)


def _win(registry: Registry, experiment: Experiment, num: int = 500) -> None:
    add_users(registry, experiment, "A", [YES, NO] * (num // 2))
    add_users(registry, experiment, "B", [YES, YES, YES, NO] * (num // 4))


def _break(registry: Registry, experiment: Experiment) -> None:
    add_users(registry, experiment, "A", [YES] * 60)
    add_users(registry, experiment, "B", [None] * 60, error="the model failed")


def _decisions(registry: Registry, experiment: Experiment) -> list[Decision]:
    return list(ExperimentService(registry.database).decisions(experiment.id))


def _actions(registry: Registry, experiment: Experiment) -> list[str]:
    return [decision.action for decision in _decisions(registry, experiment)]


def _points_to(registry: Registry) -> int:
    return registry.alias("legal").current.number


def _arm(evaluation: ExperimentEvaluation, experiment: Experiment, name: str) -> ArmReport:
    return next(arm for arm in evaluation.report(experiment.id).arms if arm.arm.name == name)


def _metric(arm: ArmReport, name: str) -> MetricReport:
    return next(metric for metric in arm.metrics if metric.metric == name)


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
    assert 1 == _points_to(registry)
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


def test_interval_is_not_there_yet_when_times_are_too_far_apart(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Users whose times differ by hundreds of powers of ten: an exponential of the bound would be no float."""
    experiment = start(guardrails=(Guardrail("total_ms", "decrease", 0.2, is_relative=True),))
    for arm in ("A", "B"):
        for ttft_ms in (1e-2, 1e300):
            add_users(registry, experiment, arm, [YES] * 10, ttft_ms=ttft_ms)
    report = evaluation.report(experiment.id)
    (guard,) = report.treatments[0].guards
    assert (None, "no_data") == (guard.comparison.interval, guard.state)
    assert None is _metric(report.arms[0], "total_ms").interval


def test_winner_is_promoted_once_when_that_was_asked_for(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """One move of the alias, one decision, one audit line, however often it is evaluated afterwards."""
    experiment = start(auto_promote=True)
    _win(registry, experiment)
    for _ in range(3):
        evaluation.evaluate_all()
    with pytest.raises(ConflictError, match="decided, not running"):
        _evaluate_as_of_before(evaluation, experiment)
    assert 2 == _points_to(registry)
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
    _win(registry, experiment)
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
    assert 2 == _points_to(registry)


def test_nothing_is_done_when_nobody_asked_for_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The verdict is written down; the experiment goes on."""
    winning = start()
    _win(registry, winning)
    evaluation.evaluate_all()
    assert ["start", "verdict"] == _actions(registry, winning)
    assert "running" == ExperimentService(registry.database).get(winning.id).state
    ExperimentService(registry.database).stop(winning.id)
    breaking = start(auto_promote=True)
    _break(registry, breaking)
    evaluation.evaluate_all()
    assert ["start", "verdict"] == _actions(registry, breaking)
    assert 1 == _points_to(registry)


def test_acts_are_undone_when_somebody_wants_them_back(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The alias points where it did, and no later evaluation does it again."""
    experiment = start(auto_promote=True)
    _win(registry, experiment)
    evaluation.evaluate_all()
    undo(registry, experiment.id)
    evaluation.evaluate_all()
    assert (1, "undo") == (_points_to(registry), _actions(registry, experiment)[-1])


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


def test_alias_stays_when_the_winner_s_files_are_damaged(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It is tried again at the next evaluation, and other experiments are evaluated all the same."""
    experiment = start(auto_promote=True)
    _win(registry, experiment)
    (registry.store.folder(experiment.arms[1].digest) / ADAPTER_WEIGHTS_FILE).write_text("damaged")
    with pytest.raises(IntegrityError):
        evaluation.evaluate(experiment.id)
    evaluation.evaluate_all()
    assert (1, ["start", "verdict"]) == (_points_to(registry), _actions(registry, experiment))


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
    _win(registry, experiment, 400)
    for _ in range(3):
        evaluation.evaluate_all()
    add_users(registry, experiment, "B", [None] * 300, error="the model failed")
    evaluation.evaluate_all()
    kinds = [decision.numbers["kind"] for decision in _decisions(registry, experiment)[1:]]
    assert ["promote", "inconclusive"] == kinds  # the split fired before the guardrail did


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
    _win(registry, experiment)
    weights = registry.store.folder(experiment.arms[1].digest) / ADAPTER_WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_text("damaged")
    evaluation.evaluate_all()
    assert 1 == _points_to(registry)
    weights.write_bytes(whole)
    evaluation.evaluate_all()
    assert 2 == _points_to(registry)
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
    assert (True, "inconclusive", 1) == (report.split.fired, report.verdict.kind, _points_to(registry))


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
    _win(registry, changed, 800)
    evaluation.evaluate_all()
    split = evaluation.report("legal").split
    assert (True, (1,), ()) == (split.fired, split.stages, split.accepted)
    assert (1, "inconclusive") == (_points_to(registry), evaluation.report("legal").verdict.kind)
    evaluation.accept_split("legal", "a crawler, which is blocked since")
    accepted = evaluation.report("legal")
    assert (False, (1,), "promote") == (accepted.split.fired, accepted.split.accepted, accepted.verdict.kind)
    add_users(registry, changed, "A", [YES] * 500)
    evaluation.evaluate_all()
    assert (2,) == evaluation.report("legal").split.stages
    service.stop("legal")
    with pytest.raises(ConflictError, match="stopped, not running"):
        evaluation.accept_split("legal", "again")


def test_false_alarms_of_the_split_are_shared_by_the_stages_when_weights_change() -> None:
    """A p-value that fires alone does not fire as the second of many chances."""
    moment = utc_now()
    arms = (Arm("A", 1, "a" * 64, 50.0), Arm("B", 2, "b" * 64, 50.0))
    first = Experiment(
        id="exp-1", alias="legal", salt="s", arms=arms, state="running", created_at=moment, stage=1, metric=SOLVED
    )
    found = {
        count: [
            make_report(
                replace(first, stage=stage), _units(count, 500), now=moment, window=FEEDBACK_WINDOW, in_full=False
            ).split
            for stage in (1, 2)
        ]
        for count in range(600, 700, 2)
    }
    both = [(one.fired, two.fired) for one, two in found.values()]
    assert {(False, False), (True, False), (True, True)} == set(both)
    assert all(one.p_value <= 0.01 * 6 / math.pi**2 for one, _ in found.values() if one.fired and one.p_value)


def _units(*counts: int) -> dict[str, list[UnitOutcomes]]:
    """So many users in A and B, without any outcome."""
    return {
        arm: [
            UnitOutcomes(f"{arm}{n}", [AnsweredRequest(utc_now(), False, False, None, 1.0, 1, False)])
            for n in range(count)
        ]
        for arm, count in zip("AB", counts, strict=True)
    }


def test_difference_in_feedback_holds_back_until_somebody_accepts_it(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Half of the treatment's users say nothing: who knows what they think."""
    experiment = start(auto_promote=True)
    add_users(registry, experiment, "A", [YES, NO] * 250)
    add_users(registry, experiment, "B", [YES, None] * 250)
    evaluation.evaluate_all()
    assert (1, "continue") == (_points_to(registry), evaluation.report("legal").verdict.kind)
    assert "known of fewer of B's requests" in evaluation.report("legal").verdict.sentence
    evaluation.accept_feedback("legal", "B's button is below the fold")
    evaluation.evaluate_all()
    assert 2 == _points_to(registry)
    assert ["start", "verdict", "accept_feedback", "verdict", "promote"] == _actions(registry, experiment)
    with pytest.raises(ConflictError, match="decided, not running"):
        evaluation.accept_feedback(experiment.id, "again")


def test_last_verdict_is_written_when_an_experiment_has_ended_at_its_time(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Once; the end is settled by the same evaluation, and nothing is done after it."""
    experiment = start(auto_promote=True)
    _win(registry, experiment, 40)
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
    (_break if outcome == "breach" else _win)(registry, experiment)
    ends_at = utc_now()
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = ends_at
    for _ in range(2):
        evaluation.evaluate_all()
    found = ExperimentService(registry.database).get(experiment.id)
    act, points_to = ("roll_back", 1) if outcome == "breach" else ("promote", 2)
    assert ("decided", ends_at, points_to) == (found.state, found.stopped_at, _points_to(registry))
    assert ["start", "verdict", act] == _actions(registry, experiment)


def test_end_is_written_when_the_winner_of_an_ended_experiment_can_t_be_promoted(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Somebody has moved the alias since: the verdict stands in the log, and it is not tried for ever."""
    experiment = start(auto_promote=True)
    _win(registry, experiment)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, experiment.id).ends_at = utc_now()
    registry.promote("legal@v3")
    for _ in range(2):
        evaluation.evaluate_all()
    assert (3, ["start", "verdict", "stop"]) == (_points_to(registry), _actions(registry, experiment))
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


def test_only_the_present_stage_is_read_when_weights_were_changed(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What users of the stage before did is left out, and the interval asks for more."""
    experiment = start()
    _win(registry, experiment)
    first = evaluation.report(experiment.id)
    changed = ExperimentService(registry.database).change_weights("legal", [("A", None, 80), ("B", None, 20)])
    report = evaluation.report(experiment.id)
    assert ("promote", "continue", [0, 0]) == (
        first.verdict.kind, report.verdict.kind, [arm.num_units for arm in report.arms],
    )  # fmt: skip
    assert [1 - 0.0304, 1 - 0.0076] == pytest.approx([first.confidence, report.confidence], abs=1e-4)
    add_users(registry, changed, "B", [YES])
    assert 1 == _arm(evaluation, experiment, "B").num_units


def test_several_treatments_share_the_error_when_compared(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Two comparisons, half of it each; a first stage has 0.61 of it."""
    experiment = start([("A", "v1", 40.0), ("B", "v2", 40.0), ("C", "v3", 20.0)])
    report = evaluation.report(experiment.id)
    assert 1 - 0.0152 == pytest.approx(report.confidence, abs=1e-4)
    assert ["B", "C"] == [treatment.name for treatment in report.treatments]


def test_weights_follow_the_better_arm_once_a_day_when_that_was_asked_for(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A new stage with most users for the winner and some for the other; not on the same day again."""
    experiment = start(allocation="thompson", planned_units=2000)
    _win(registry, experiment, 80)
    evaluation.evaluate_all()
    assert 1 == ExperimentService(registry.database).get(experiment.id).stage
    with registry.database.write() as session:
        for row in session.query(DecisionRow):
            row.made_at -= REALLOCATION_EVERY
    for _ in range(2):
        evaluation.evaluate_all()
    found = ExperimentService(registry.database).get(experiment.id)
    weights = {arm.name: arm.weight for arm in found.arms}
    assert (2, 100.0) == (found.stage, sum(weights.values()))
    assert 80 < weights["B"] <= 95
    decision = _decisions(registry, experiment)[-1]
    assert ("change_weights", "evaluator", weights) == (decision.action, decision.by, decision.numbers["shares"])


def _in_stage(stage: int) -> Experiment:
    arms = (Arm("A", 1, "a" * 64, 50.0), Arm("B", 2, "b" * 64, 50.0))
    return Experiment(
        id="exp-1",
        alias="legal",
        salt="s",
        arms=arms,
        state="running",
        created_at=utc_now(),
        stage=stage,
        metric=SOLVED,
    )


def test_alpha_is_kept_when_all_stages_are_added_up() -> None:
    """Whoever changes weights again and again spends no more than the experiment's alpha; confidence stays below 1."""
    spent = [1 - stage_confidence(_in_stage(stage)) for stage in range(1, 1001)]
    assert 0.0499 < sum(spent) <= 0.05
    assert 0.999 < stage_confidence(_in_stage(10**6)) < 1


def test_fixed_sample_is_judged_once_when_no_feedback_on_it_can_come_any_more(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """No interval before, whoever is there; then Newcombe's over the planned users, whatever comes later."""
    experiment = start(analysis="fixed", planned_units=400, guardrails=(), auto_promote=True)
    _win(registry, experiment, 160)
    early = evaluation.report(experiment.id)
    assert ("continue", None, {"B": ()}) == (
        early.verdict.kind, early.treatments[0].primary and early.treatments[0].primary.interval, early.history,
    )  # fmt: skip
    assert None is _metric(early.arms[0], "solved").interval
    _win(registry, experiment, 40)
    evaluation.evaluate_all()
    waiting = evaluation.report(experiment.id)
    assert ("continue", 1) == (waiting.verdict.kind, _points_to(registry))
    assert "All 400 planned users are there; the plan is to judge once" in waiting.verdict.sentence
    _age(registry, timedelta(days=8))
    judged = evaluation.report(experiment.id)
    winner = add_users(registry, experiment, "B", [NO] * 50)
    with registry.database.write() as session:
        known = session.query(ExposureRow.unit).filter_by(arm="B").order_by(ExposureRow.served_at).limit(50).all()
        for response, (unit,) in zip(winner, known, strict=True):
            session.get_one(ExposureRow, response).unit = unit
    add_users(registry, experiment, "A", [YES] * 100)
    later = evaluation.report(experiment.id)
    assert ("promote", "promote") == (judged.verdict.kind, later.verdict.kind)
    assert judged.treatments[0].primary == later.treatments[0].primary
    evaluation.evaluate_all()
    assert 2 == _points_to(registry)


def test_user_s_number_stays_when_it_was_counted_and_the_user_comes_back(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A sequence promises nothing for numbers that change: the first outcome counts, of guardrails too."""
    experiment = start()
    first = add_users(registry, experiment, "B", [YES] * 30)
    add_users(registry, experiment, "A", [NO] * 30)
    before = evaluation.report(experiment.id).treatments[0]
    again = add_users(registry, experiment, "B", [NO] * 30, error="the model failed")
    with registry.database.write() as session:
        for old, new in zip(first, again, strict=True):
            session.get_one(ExposureRow, new).unit = session.get_one(ExposureRow, old).unit
    after = evaluation.report(experiment.id).treatments[0]
    assert (before.primary, before.guards) == (after.primary, after.guards)


def test_late_feedback_is_counted_last_when_others_were_counted_before(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """The order of what was counted stays, though the user came first; a value that is replaced keeps its place."""
    experiment = start(guardrails=())
    (early,) = add_users(registry, experiment, "B", [None])
    add_users(registry, experiment, "B", [NO] * 5)
    service = ExperimentService(registry.database)
    service.record_feedback(Feedback(early, "solved", 0.0))
    add_users(registry, experiment, "B", [NO] * 5)
    service.record_feedback(Feedback(early, "solved", 1.0))
    with registry.database.read() as session:
        units = read_outcomes(session, experiment.id, 1)["B"]
    found = first_outcomes(units, SOLVED, now=utc_now(), window=FEEDBACK_WINDOW)
    assert [0.0] * 5 + [1.0] + [0.0] * 5 == found.values.tolist()


def test_method_is_the_plan_s_when_one_user_has_another_kind_of_value(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Values of 0 and 1 don't make a number a share, and one of 0.5 doesn't make a share a number."""
    number = start(guardrails=(), metric=replace(SOLVED, kind="number"))
    add_users(registry, number, "A", [YES] * 200)
    add_users(registry, number, "B", [YES] * 200)
    found = evaluation.report(number.id).treatments[0].primary
    assert found is not None
    assert None is found.interval  # an arm that doesn't vary has no interval but the exact one of shares
    ExperimentService(registry.database).stop(number.id)
    share = start(guardrails=(), metric=SOLVED)
    add_users(registry, share, "A", [YES] * 200)
    add_users(registry, share, "B", [YES] * 199)
    before = evaluation.report(share.id).treatments[0].primary
    add_users(registry, share, "B", [{"solved": 0.5}])
    after = evaluation.report(share.id).treatments[0].primary
    assert before is not None
    assert after is not None
    assert before.interval is not None
    assert after.interval is not None
    assert after.interval.low == pytest.approx(before.interval.low, abs=0.01)


def test_value_outside_of_a_share_counts_as_the_nearest_when_it_came_with_the_answer(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It is stored before anything is known of its experiment; the report must not fail for it."""
    experiment = start(guardrails=(), metric=SOLVED)
    add_users(registry, experiment, "A", [YES] * 100)
    add_users(registry, experiment, "B", [{"solved": 1e9}] * 100)
    found = evaluation.report(experiment.id).treatments[0].primary
    assert found is not None
    assert found.interval is not None
    assert 0 == found.interval.estimate


def test_report_names_the_plan_s_metrics_when_clients_report_hundreds(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Fifty at most, the plan's and the built-in ones among them."""
    experiment = start()
    for first in range(0, 120, 30):
        add_users(registry, experiment, "A", [{f"a{number}": 1.0 for number in range(first, first + 30)}])
    add_users(registry, experiment, "A", [YES])
    names = [metric.metric for metric in _arm(evaluation, experiment, "A").metrics]
    assert (50, ["solved", "error_rate"]) == (len(names), names[:2])
    assert set(names) >= BUILT_IN_METRICS


@pytest.mark.parametrize(("metric", "expected"), [("error_rate", [1.0]), ("feedback_rate", []), ("ttft_ms", [])])
def test_first_answer_is_the_number_when_the_primary_metric_is_built_in(
    metric: str, expected: list[float], registry: Registry, start: Start
) -> None:
    """A feedback rate counts once no feedback can come any more; a first token that never came is missing."""
    experiment = start(metric=Metric(metric, "decrease"), guardrails=())
    (first,) = add_users(registry, experiment, "A", [None], error="the model failed", ttft_ms=None)
    (second,) = add_users(registry, experiment, "A", [YES])
    with registry.database.write() as session:
        session.get_one(ExposureRow, second).unit = session.get_one(ExposureRow, first).unit
    with registry.database.read() as session:
        units = read_outcomes(session, experiment.id, 1)["A"]
    assert experiment.metric is not None
    found, later = (
        first_outcomes(units, experiment.metric, now=utc_now() + wait, window=FEEDBACK_WINDOW)
        for wait in (timedelta(), timedelta(days=8))
    )
    assert expected == found.values.tolist()
    assert ([0.0] if metric == "feedback_rate" else expected) == later.values.tolist()


def _age(registry: Registry, by: timedelta) -> None:
    """Make all that was answered older."""
    with registry.database.write() as session:
        for row in session.query(ExposureRow):
            row.served_at -= by


def test_report_takes_users_once_when_they_ask_often(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Nine good outcomes of one user and one bad one of another are 0.5, not 0.9."""
    experiment = start(guardrails=())
    heavy = add_users(registry, experiment, "A", [YES] * 9)
    add_users(registry, experiment, "A", [NO])
    with registry.database.write() as session:
        for response in heavy:
            session.get_one(ExposureRow, response).unit = "heavy"
    arm = _arm(evaluation, experiment, "A")
    solved = _metric(arm, "solved")
    assert (10, 2, 10, 2, 0.5) == (
        arm.num_exposures, arm.num_units, solved.num_outcomes, solved.num_units, solved.mean,
    )  # fmt: skip


def test_times_are_compared_by_their_logarithms_when_one_user_is_slow(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A tenth slower is found though one user waited ten times as long; a margin in ms is understood."""
    guardrails = (Guardrail("ttft_ms", "decrease", 0.03, is_relative=True), Guardrail("total_ms", "decrease", 900.0))
    experiment = start(guardrails=guardrails)
    for step in range(100):
        add_users(registry, experiment, "A", [YES] * 4, ttft_ms=100.0 + step % 5)
        add_users(registry, experiment, "B", [YES] * 4, ttft_ms=110.0 + step % 5)
    add_users(registry, experiment, "A", [YES], ttft_ms=1000.0)
    report = evaluation.report(experiment.id)
    first, second = report.treatments[0].guards
    assert first.comparison.interval is not None
    assert first.comparison.interval.estimate == pytest.approx(0.09, abs=0.01)
    mean = stats.gmean([100.0 + step % 5 for step in range(100) for _ in range(4)] + [1000.0])
    assert first.comparison.control.mean == pytest.approx(mean)
    assert ("breached", "held") == (first.state, second.state)
    assert 900 / (3 * mean) == pytest.approx(second.margin)


def test_first_token_is_missed_when_answers_of_one_arm_never_come(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A guardrail on a time has no value for them, and says so: nobody is faster for not answering."""
    experiment = start(guardrails=(Guardrail("ttft_ms", "decrease", 0.05, is_relative=True),))
    _win(registry, experiment, 200)
    add_users(registry, experiment, "B", [YES] * 40, ttft_ms=None)
    add_users(registry, experiment, "A", [NO] * 40)
    report = evaluation.report(experiment.id)
    found = {gap.metric: gap for gap in report.treatments[0].gaps}
    assert found["ttft_ms"].interval is not None
    assert found["ttft_ms"].interval.high < 0
    assert "ttft_ms is known of fewer of B's requests" in " ".join([report.verdict.sentence, *report.verdict.notes])


def test_history_ends_with_the_present_interval_when_drawn(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """It narrows as users come."""
    experiment = start()
    for _ in range(40):
        add_users(registry, experiment, "A", [YES, NO])
        add_users(registry, experiment, "B", [YES, YES])
    report = evaluation.report(experiment.id)
    points = report.history["B"]
    assert report.treatments[0].primary is not None
    assert report.treatments[0].primary.interval == points[-1].interval
    assert (160, sorted(points, key=lambda point: point.num_units)) == (points[-1].num_units, list(points))
    widths = [point.interval.high - point.interval.low for point in points]
    assert widths[0] > 2 * widths[-1]


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
    _win(registry, experiment)
    old = evaluation.report(experiment.id)
    ExperimentService(registry.database).change_weights("legal", [("A", None, 80), ("B", None, 20)])
    monkeypatch.setattr(evaluation, "_report", lambda *_, **__: replace(old))
    evaluation.evaluate(experiment.id)
    assert (1, ["start", "change_weights"]) == (_points_to(registry), _actions(registry, experiment))
