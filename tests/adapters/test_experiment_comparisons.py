"""What experiments are read from over a real database: which numbers, compared how, and as what they are shown."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import pytest
from scipy import stats
from sqlalchemy import delete, event

from adapters.experiment_comparisons import guard_confidence, stage_confidence
from adapters.experiment_evaluation import ExperimentEvaluation
from adapters.experiment_report import ArmReport, MetricReport, make_report
from adapters.experiments import ExperimentService
from adapters.exposures import FEEDBACK_WINDOW
from adapters.outcomes import AnsweredRequest, UnitOutcomes, read_history, read_outcomes
from adapters.records import (
    BUILT_IN_METRICS,
    AnalysisPlan,
    Arm,
    Experiment,
    Feedback,
    Guardrail,
    Metric,
)
from adapters.registry import Registry
from adapters.settled_values import first_outcomes
from adapters.tables import ExperimentRow, ExposureRow, FeedbackRow, utc_now
from tests.support.experiments import HALVES, NO, SOLVED, YES, Start, add_users, age, age_reports, points_to, win


def _arm(evaluation: ExperimentEvaluation, experiment: Experiment, name: str) -> ArmReport:
    return next(arm for arm in evaluation.report(experiment.id).arms if arm.arm.name == name)


def _metric(arm: ArmReport, name: str) -> MetricReport:
    return next(metric for metric in arm.metrics if metric.metric == name)


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


def test_only_the_present_stage_is_read_when_weights_were_changed(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What users of the stage before did is left out, and the interval asks for more."""
    experiment = start()
    win(registry, experiment)
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
    win(registry, experiment, 160)
    early = evaluation.report(experiment.id)
    assert ("continue", None, {"B": ()}) == (
        early.verdict.kind, early.treatments[0].primary and early.treatments[0].primary.interval, early.history,
    )  # fmt: skip
    assert None is _metric(early.arms[0], "solved").interval
    win(registry, experiment, 40)
    evaluation.evaluate_all()
    waiting = evaluation.report(experiment.id)
    assert ("continue", 1) == (waiting.verdict.kind, points_to(registry))
    assert "All 400 planned users are there; the plan is to judge once" in waiting.verdict.sentence
    age(registry, timedelta(days=8))
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
    assert 2 == points_to(registry)


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


def test_user_s_number_stays_when_an_earlier_request_ends_later(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What was answered first counts: the row of a request that hangs for a minute comes when others were counted."""
    experiment = start()
    add_users(registry, experiment, "A", [NO] * 30)
    first = add_users(registry, experiment, "B", [YES] * 30)
    before = evaluation.report(experiment.id).treatments[0]
    slow = add_users(registry, experiment, "B", [None] * 30, error="the model failed", ttft_ms=60_000.0)
    with registry.database.write() as session:
        for old, new in zip(first, slow, strict=True):
            row = session.get_one(ExposureRow, new)
            row.unit = session.get_one(ExposureRow, old).unit
            row.served_at -= timedelta(seconds=1)
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


def test_unplanned_metric_is_shown_as_a_share_when_all_report_yes_or_no(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """In both arms alike, whichever has the value that is none."""
    experiment = start()
    add_users(registry, experiment, "A", [{"liked": 1.0, "stars": 1.0}] * 2)
    add_users(registry, experiment, "B", [{"liked": 0.0, "stars": 0.5}])
    found = [_arm(evaluation, experiment, name) for name in ("A", "B")]
    assert ["share"] * 2 == [_metric(arm, "liked").scale for arm in found]
    assert ["number"] * 2 == [_metric(arm, "stars").scale for arm in found]


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


def test_feedback_is_left_out_when_its_request_is_deleted_while_both_are_read(registry: Registry, start: Start) -> None:
    """PostgreSQL shows each query its own moment: what the second one no longer finds is no outcome, and no error."""
    experiment = start(guardrails=())
    gone, _ = add_users(registry, experiment, "A", [YES, NO])

    with registry.database.write() as session:
        connection = session.connection()

        seen: list[object] = []

        @event.listens_for(connection, "before_execute")
        def delete_before_the_second(*_: object) -> None:
            seen.append(_)
            if len(seen) == 2:
                connection.execute(delete(FeedbackRow).where(FeedbackRow.response_id == gone))
                connection.execute(delete(ExposureRow).where(ExposureRow.response_id == gone))

        (unit,) = read_outcomes(session, experiment.id, 1)["A"]
    assert [0.0] == [report.value for report in unit.reports["solved"]]


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
    win(registry, experiment, 200)
    add_users(registry, experiment, "B", [YES] * 40, ttft_ms=None)
    add_users(registry, experiment, "A", [NO] * 40)
    report = evaluation.report(experiment.id)
    found = {gap.metric: gap for gap in report.treatments[0].gaps}
    assert found["ttft_ms"].interval is not None
    assert found["ttft_ms"].interval.high < 0
    assert "ttft_ms is known of fewer of B's answers" in " ".join([report.verdict.sentence, *report.verdict.notes])


def test_what_was_before_ends_at_the_start_when_users_report_on_it_later(registry: Registry, start: Start) -> None:
    """A user in an arm may still judge an answer of before: the arm has had a part in that, so it adjusts nothing."""
    earlier = start(guardrails=())
    (old, _) = add_users(registry, earlier, "A", [{}, YES])
    service = ExperimentService(registry.database)
    service.stop(earlier.id)
    experiment = start(analysis="fixed", planned_units=2, guardrails=())
    new = add_users(registry, experiment, "B", [YES, YES])
    with registry.database.write() as session:
        for place, row in enumerate(session.query(ExposureRow).filter_by(experiment_id=earlier.id)):
            row.served_at -= timedelta(hours=1)
            session.get_one(ExposureRow, new[place]).unit = row.unit
    service.record_feedback(Feedback(old, "solved", 0.0))
    with registry.database.read() as session:
        history = read_history(session, service.get(experiment.id))
    assert [False, True] == sorted("solved" in unit.reports for unit in history)


def test_users_of_the_same_time_are_compared_when_fewer_of_one_arm_report(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Both arms alike, rarely solved at first and mostly later; of A's users 7 in 10 report, all along."""
    experiment = start(planned_units=4000, guardrails=())
    outcomes = [YES if place % 10 == 0 else NO for place in range(1000)]
    outcomes += [NO if place % 10 == 0 else YES for place in range(1000)]
    add_users(registry, experiment, "B", outcomes)
    add_users(
        registry, experiment, "A", [None if place % 10 in (3, 5, 7) else outcomes[place] for place in range(2000)]
    )
    primary = evaluation.report(experiment.id).treatments[0].primary
    assert primary is not None
    assert primary.interval is not None
    assert -0.1 < primary.interval.low < 0 < primary.interval.high < 0.1


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


@pytest.mark.parametrize("number", [1, 3])
def test_guardrails_share_the_error_of_a_comparison_when_there_are_several(
    number: int, registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Or each would have its own chance to roll a harmless version back."""
    guards = [Guardrail(name, "decrease", 0.1) for name in ("error_rate", "length_finish_rate", "total_ms")]
    experiment = start(guardrails=tuple(guards[:number]))
    add_users(registry, experiment, "A", [YES] * 100)
    add_users(registry, experiment, "B", [YES] * 100)
    guard = evaluation.report(experiment.id).treatments[0].guards[0]
    assert guard.comparison.interval is not None
    assert 1 - 0.05 * 6 / math.pi**2 / number == pytest.approx(guard.comparison.interval.confidence)
    assert guard_confidence(experiment) == guard.comparison.interval.confidence


def test_fixed_sample_is_adjusted_when_its_users_were_there_before(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """By what they reported on the same alias, whatever answered them then: the interval is narrower by as much."""
    earlier = start(guardrails=())
    marks = [float(number % 10) for number in range(200)]
    asked = add_users(registry, earlier, "A", [{"stars": mark} for mark in marks])
    ExperimentService(registry.database).stop(earlier.id)
    age(registry, timedelta(days=30))
    age_reports(registry, timedelta(days=30))
    experiment = ExperimentService(registry.database).create(
        "legal",
        HALVES,
        plan=AnalysisPlan(metric=Metric("stars", "increase"), analysis="fixed", planned_units=200),
    )
    later = [
        *add_users(registry, experiment, "A", [{"stars": mark + place % 2} for place, mark in enumerate(marks[:100])]),
        *add_users(registry, experiment, "B", [{"stars": mark + place % 2} for place, mark in enumerate(marks[100:])]),
    ]
    with registry.database.write() as session:
        for old, new in zip(asked, later, strict=True):
            session.get_one(ExposureRow, new).unit = session.get_one(ExposureRow, old).unit
        session.get_one(ExperimentRow, experiment.id).starts_at = utc_now() - timedelta(days=9)
    age(registry, timedelta(days=8))
    found = evaluation.report(experiment.id).treatments[0].primary
    assert found is not None
    assert found.interval is not None
    assert found.variance_removed is not None
    assert 0.9 < found.variance_removed < 1
    plain = stats.ttest_ind(
        [m + p % 2 for p, m in enumerate(marks[:100])], [m + p % 2 for p, m in enumerate(marks[100:])]
    )
    width = plain.confidence_interval(0.97).high - plain.confidence_interval(0.97).low
    assert found.interval.high - found.interval.low < 0.3 * width


def test_fixed_sample_is_not_adjusted_when_most_of_its_users_are_new(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """What is known of few would say little, and be told as if it said much."""
    experiment = start(analysis="fixed", planned_units=200, guardrails=())
    win(registry, experiment, 100)
    age(registry, timedelta(days=8))
    found = evaluation.report(experiment.id).treatments[0].primary
    assert found is not None
    assert (None, True) == (found.variance_removed, found.interval is not None)


def test_margin_is_not_known_when_the_control_has_nothing_to_be_a_share_of(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """A tenth of nothing is a margin that nobody means: neither held nor breached."""
    experiment = start(guardrails=(Guardrail("clicks", "decrease", 0.1, is_relative=True),))
    add_users(registry, experiment, "A", [{"clicks": float(place % 2) - 0.5} for place in range(100)])
    add_users(registry, experiment, "B", [{"clicks": 5.0 + place % 2} for place in range(100)])
    (guard,) = evaluation.report(experiment.id).treatments[0].guards
    assert (None, "no_data") == (guard.margin, guard.state)


def test_other_metrics_have_no_interval_when_they_are_shown(
    registry: Registry, start: Start, evaluation: ExperimentEvaluation
) -> None:
    """Their users' means go on changing: no sequence would keep its word on them."""
    experiment = start()
    add_users(registry, experiment, "A", [YES, NO] * 50)
    add_users(registry, experiment, "B", [YES, NO] * 50)
    arm = _arm(evaluation, experiment, "B")
    shown = {metric.metric: (metric.interval is None, metric.difference is None) for metric in arm.metrics}
    assert {"solved": (False, False), "error_rate": (False, False)} == {
        name: shown[name] for name in ("solved", "error_rate")
    }
    assert {(True, True)} == {shown[name] for name in BUILT_IN_METRICS - {"error_rate"}}
