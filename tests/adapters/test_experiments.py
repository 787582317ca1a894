"""Experiments: pinned arms, and exposures that survive."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from adapters.database import open_database
from adapters.errors import ConflictError, FeedbackTooLateError, InvalidInputError, NotFoundError
from adapters.experiment_config import parse_arm, parse_weight
from adapters.experiment_rows import find_running
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
    Metric,
)
from adapters.registry import Registry
from adapters.tables import ExperimentRow, ExposureRow, utc_now
from tests.support.versions import publish_text

REPOSITORY = Path(__file__).parents[2]
HALVES = [("A", "v1", 50.0), ("B", "v2", 50.0)]
GUARD = Guardrail("error_rate", "decrease", 0.01)
SOLVED = Metric("solved", "increase")


@pytest.fixture
def experiments(registry: Registry) -> ExperimentService:
    """Experiments on an alias with three versions, pointing to the last."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    return ExperimentService(registry.database)


def _expose(
    service: ExperimentService,
    experiment: Experiment,
    arm: str,
    unit: str,
    response: str,
    error: str | None = None,
    *,
    forced: bool = False,
) -> None:
    found = next(candidate for candidate in experiment.arms if candidate.name == arm)
    stage = experiment.stage
    binding = Binding(
        experiment.alias, "experiment", found.digest, found.number, experiment.id, arm, stage=stage, forced=forced
    )
    service.record_exposure(Exposure(response, binding, unit, "user", 5, 7, 1.5, 9.5, None if error else "stop", error))


def _outcome(
    service: ExperimentService, experiment: Experiment, arm: str, unit: str, value: float, metric: str = "score"
) -> str:
    response = f"{arm}-{unit}-{metric}-{len(_exposures(service))}"
    _expose(service, experiment, arm, unit, response)
    service.record_feedback(Feedback(response, metric, value))
    return response


def _exposures(service: ExperimentService) -> list[ExposureRow]:
    with service.database.read() as session:
        return list(session.query(ExposureRow).all())


def test_create_pins_versions_when_numbers_or_digests_are_given(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Arms keep their order and the digest of their version."""
    digests = [version.version.digest for version in registry.versions("legal")]
    created = experiments.create("legal", [("A", f"{digests[1][:16]}", 90), ("B", "v1", 10)], salt="s")
    assert [("A", 2, digests[1], 90.0), ("B", 1, digests[0], 10.0)] == [
        (arm.name, arm.number, arm.digest, arm.weight) for arm in created.arms
    ]
    assert (created.alias, created.salt, created.state, created.stopped_at) == ("legal", "s", "running", None)
    assert created == experiments.get(created.id) == experiments.get("legal")


def test_create_keeps_its_versions_when_the_alias_gets_new_ones(
    registry: Registry, experiments: ExperimentService
) -> None:
    """A job that ends in the midst of an experiment changes no arm."""
    created = experiments.create("legal", HALVES)
    publish_text(registry, "four")
    assert created.arms == experiments.get(created.id).arms
    assert registry.resolve("legal", unit="u").number in (1, 2)


def test_create_draws_a_salt_when_none_is_given(experiments: ExperimentService) -> None:
    """Two experiments on the same alias assign independently."""
    first = experiments.create("legal", HALVES)
    experiments.stop("legal")
    second = experiments.create("legal", HALVES)
    assert first.salt != second.salt
    assert first.id != second.id


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "two or more arms"),
        ([("A", "v1", 100.0)], r"two or more arms .*\['A'\]"),
        ([("A", "v1", 50.0), ("A", "v2", 50.0)], "different names"),
        ([("A", "v1", 50.0), ("B", "v2", 49.0)], "add up to 100, found 99"),
        ([("A", "v1", 50.0), ("B", "v2", 50.1)], r"add up to 100, found 100\.1"),
        ([("A", "v1", 50.0), ("", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B" * 33, "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B b", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("é", "v2", 50.0)], "1 to 32 letters and digits"),
        ([("A", "v1", 50.0), ("B", "latest", 50.0)], "'latest' is not a version"),
    ],
)
def test_create_refuses_when_the_arms_are_wrong(
    experiments: ExperimentService, arms: list[tuple[str, str, float]], message: str
) -> None:
    """Nothing is started, and the message says what was found."""
    with pytest.raises(InvalidInputError, match=message):
        experiments.create("legal", arms)
    assert experiments.list() == []


def test_create_names_the_versions_when_an_arm_has_none(experiments: ExperimentService) -> None:
    """A slip of the pen is mended without a second command."""
    with pytest.raises(NotFoundError, match=r"'legal' has no version 'v9'; it has v1, v2"):
        experiments.create("legal", [("A", "v1", 50.0), ("B", "v9", 50.0)])


def test_create_accepts_thirds_when_they_add_up_but_for_rounding(experiments: ExperimentService) -> None:
    """Weights are floats; a rounding error is no mistake."""
    arms = [(name, f"v{number}", 100 / 3) for number, name in enumerate("ABC", start=1)]
    assert len(experiments.create("legal", arms).arms) == 3


@pytest.mark.parametrize(("alias", "version"), [("medical", "v1"), ("legal", "v9"), ("legal", "0" * 64)])
def test_create_refuses_when_alias_or_version_is_unknown(
    experiments: ExperimentService, alias: str, version: str
) -> None:
    """The transaction leaves no half experiment."""
    with pytest.raises(NotFoundError, match=alias):
        experiments.create(alias, [("A", "v1", 50), ("B", version, 50)])
    assert experiments.list() == []


def test_create_refuses_when_one_is_running_on_the_alias(experiments: ExperimentService, registry: Registry) -> None:
    """One running experiment an alias; others may have their own."""
    first = experiments.create("legal", HALVES)
    with pytest.raises(ConflictError, match="running on 'legal' already"):
        experiments.create("legal", HALVES)
    publish_text(registry, "one", alias="medical")
    publish_text(registry, "two", alias="medical")
    other = experiments.create("medical", HALVES)
    assert {first.id, other.id} == {experiment.id for experiment in experiments.list()}


def test_stop_ends_the_experiment_when_named_by_id_or_alias(experiments: ExperimentService) -> None:
    """Once; the arms remain to be reported on."""
    first = experiments.create("legal", HALVES)
    stopped = experiments.stop(first.id)
    assert ("stopped", first.arms) == (stopped.state, stopped.arms)
    assert stopped.stopped_at is not None
    with pytest.raises(ConflictError, match=f"{first.id} is stopped already"):
        experiments.stop(first.id)
    second = experiments.create("legal", HALVES)
    assert second.id == experiments.stop("legal").id
    assert [second.id, first.id] == [experiment.id for experiment in experiments.list()]


def test_unknown_experiments_raise_when_asked_for(experiments: ExperimentService) -> None:
    """The message holds the name."""
    for act in (experiments.get, experiments.stop):
        with pytest.raises(NotFoundError, match="no experiment 'legal'"):
            act("legal")


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
    plan = AnalysisPlan(
        metric=replace(SOLVED, kind="share"), guardrails=(Guardrail("rude", "decrease", 0.1, kind="share"),)
    )
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


def test_create_refuses_when_an_alias_has_too_many_drafts(experiments: ExperimentService) -> None:
    """Another one can be made once one of them is stopped."""
    drafts = [experiments.create("legal", HALVES, draft=True) for _ in range(20)]
    with pytest.raises(ConflictError, match="'legal' has 20 experiments"):
        experiments.create("legal", HALVES, draft=True)
    experiments.stop(drafts[0].id)
    assert "draft" == experiments.create("legal", HALVES, draft=True).state


def test_request_costs_no_more_when_an_alias_has_drafts(registry: Registry, experiments: ExperimentService) -> None:
    """Every request asks who answers it: drafts are neither loaded nor hashed for that."""
    experiments.create("legal", HALVES)
    before = _count_statements_and_rows(registry)
    for _ in range(10):
        experiments.create("legal", HALVES, draft=True)
    assert (before, 1) == (_count_statements_and_rows(registry), before[1])
    with registry.database.read() as session:
        assert [""] == [running.config_hash for running in find_running(session, "legal")]


def _count_statements_and_rows(registry: Registry) -> tuple[int, int]:
    """Statements that it takes to bind one request, and experiments that are loaded by them."""
    statements: list[str] = []
    loaded: list[object] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    def note_row(row: object, _context: Any) -> None:
        loaded.append(row)

    with registry.database.read() as session:
        engine = session.get_bind()
    event.listen(engine, "before_cursor_execute", note)
    event.listen(ExperimentRow, "load", note_row)
    try:
        registry.resolve("legal", unit="u")
    finally:
        event.remove(engine, "before_cursor_execute", note)
        event.remove(ExperimentRow, "load", note_row)
    return len(statements), len(loaded)


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A@v1=50", ("A", "v1", 50.0)), ("B@0123abcd=0.5", ("B", "0123abcd", 0.5)), ("C@v1=100", ("C", "v1", 100.0))],
)
def test_parse_arm_splits_when_the_text_is_an_arm(text: str, expected: tuple[str, str, float]) -> None:
    """Name, version and percent."""
    assert expected == parse_arm(text)


@pytest.mark.parametrize(
    "text",
    ["", "A", "A@v1", "A=50", "@v1=50", "A@=50", "A@v1=", "A@v1=x", "A@v1=0", "A@v1=-1", "A@v1=101", "A@v1=nan"],
)
def test_parse_arm_refuses_when_the_text_is_none(text: str) -> None:
    """The message shows the right form."""
    with pytest.raises(InvalidInputError, match="expected NAME@VERSION=PERCENT"):
        parse_arm(text)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.from_regex(r"[A-C]?@?v?[0-9]?=?[0-9.e-]{0,5}", fullmatch=True))
def test_parse_arm_gives_a_valid_weight_or_refuses_when_given_any_text(text: str) -> None:
    """No text crashes the parser."""
    try:
        name, version, weight = parse_arm(text)
    except InvalidInputError:
        return
    assert name
    assert version
    assert 0 < weight <= 100


def _units(registry: Registry, count: int = 300) -> dict[str, Binding]:
    """What answers each of many units."""
    return {unit: registry.resolve("legal", unit=unit) for unit in (f"user-{index}" for index in range(count))}


def _set_times(service: ExperimentService, experiment: Experiment, **times: datetime) -> None:
    """Let time pass: moves a start or an end instead of waiting for it."""
    with service.database.write() as session:
        row = session.get_one(ExperimentRow, experiment.id)
        for name, moment in times.items():
            setattr(row, name, moment)


def test_draft_splits_nothing_until_it_is_started(registry: Registry, experiments: ExperimentService) -> None:
    """Then it does, and is no draft any more; its log has both."""
    draft = experiments.create("legal", HALVES, draft=True)
    assert ("draft", None, ()) == (draft.state, draft.starts_at, draft.stretches)
    assert {"alias"} == {binding.route for binding in _units(registry, 20).values()}
    started = experiments.start(draft.id)
    assert ("running", ((0.0, 100.0),), draft.config_hash) == (started.state, started.stretches, started.config_hash)
    assert {"experiment"} == {binding.route for binding in _units(registry, 20).values()}
    assert ["create", "start"] == [decision.action for decision in experiments.decisions(draft.id)]
    with pytest.raises(ConflictError, match=r"is running; only a draft can be started"):
        experiments.start(draft.id)


def test_draft_is_stopped_without_having_run_when_nobody_wants_it(experiments: ExperimentService) -> None:
    """It then is in nobody's way."""
    draft = experiments.create("legal", HALVES, draft=True)
    assert "stopped" == experiments.stop("legal").state
    with pytest.raises(ConflictError, match="is stopped; only a draft"):
        experiments.start(draft.id)


def test_experiment_starts_and_ends_at_its_times_when_nobody_does_anything(
    registry: Registry, experiments: ExperimentService
) -> None:
    """What answers is read from the times, not from what a task has written."""
    now = utc_now()
    hour = timedelta(hours=1)
    experiment = experiments.create("legal", HALVES, starts_at=now + hour, ends_at=now + 2 * hour)
    assert ("draft", "alias") == (experiment.state, registry.resolve("legal", unit="u").route)
    registry.promote("legal@v1")  # it doesn't run yet
    _set_times(experiments, experiment, starts_at=now - hour)
    assert ("running", "experiment") == (experiments.get("legal").state, registry.resolve("legal", unit="u").route)
    with pytest.raises(ConflictError, match="is running on 'legal'"):
        registry.promote("legal@v2")
    _set_times(experiments, experiment, ends_at=now - hour / 2)
    ended = experiments.get("legal")
    assert ("stopped", now - hour / 2, "alias") == (
        ended.state,
        ended.stopped_at,
        registry.resolve("legal", unit="u").route,
    )
    registry.promote("legal@v2")
    experiments.settle()
    experiments.settle()
    assert [("start", "command line"), ("stop", "schedule")] == [
        (decision.action, decision.by) for decision in experiments.decisions("legal")
    ]


def test_experiment_has_its_units_beforehand_when_it_starts_later(experiments: ExperimentService) -> None:
    """Whoever wants them at the same time is refused; before and after it there is room."""
    now = utc_now()
    day = timedelta(days=1)
    experiments.create("legal", HALVES, starts_at=now + day, ends_at=now + 2 * day)
    with pytest.raises(ConflictError, match="running on 'legal' already"):
        experiments.create("legal", HALVES)
    assert "running" == experiments.create("legal", HALVES, ends_at=now + day).state
    assert "draft" == experiments.create("legal", HALVES, starts_at=now + 2 * day).state


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"traffic": 0.0}, "traffic is from"),
        ({"traffic": 100.5}, "traffic is from"),
        ({"ends_at": utc_now() - timedelta(seconds=1)}, "ends_at must be after the start"),
        (
            {"starts_at": utc_now() + timedelta(days=2), "ends_at": utc_now() + timedelta(days=1)},
            "ends_at must be after the start",
        ),
        ({"plan": AnalysisPlan(alpha=0.0)}, "alpha is from"),
        ({"plan": AnalysisPlan(analysis="fixed")}, "planned_units must say when"),
        ({"plan": AnalysisPlan(auto_promote=True)}, "auto_promote follows the metric"),
        ({"plan": AnalysisPlan(allocation="thompson")}, "allocation follows the metric"),
        (
            {"plan": AnalysisPlan(metric=SOLVED, allocation="thompson", analysis="fixed", planned_units=100)},
            "begins the sample of a fixed analysis anew",
        ),
        ({"plan": AnalysisPlan(auto_rollback=True)}, "auto_rollback follows the guardrails"),
        ({"plan": AnalysisPlan(guardrails=(GUARD, GUARD))}, "one guardrail a metric"),
        ({"plan": AnalysisPlan(guardrails=(replace(GUARD, margin=0.0),))}, "margin of a guardrail is above 0"),
        ({"plan": AnalysisPlan(guardrails=(replace(GUARD, is_relative=True),))}, "give it in points"),
        (
            {"plan": AnalysisPlan(guardrails=(Guardrail("solved", "increase", 0.1, True, "share"),))},
            "relative to the share 'solved'",
        ),
        (
            {"plan": AnalysisPlan(metric=SOLVED, guardrails=(Guardrail("solved", "increase", 0.1, False, "share"),))},
            "a number as the metric and a share as a guardrail",
        ),
        ({"salt": ""}, "a salt has 1 to 64 characters"),
        ({"salt": "s" * 65}, "a salt has 1 to 64 characters"),
        ({"salt": "traffic of legal"}, "does not begin with 'traffic of '"),
        ({"salt": "holdout of legal"}, "does not begin with 'traffic of ' or 'holdout of '"),
    ],
)
def test_create_refuses_when_the_plan_can_not_be_followed(
    experiments: ExperimentService, fields: dict[str, Any], message: str
) -> None:
    """The message says which field asks for what."""
    with pytest.raises(InvalidInputError, match=message):
        experiments.create("legal", HALVES, **fields)
    assert [] == experiments.list()


def test_plan_comes_back_whole_when_an_experiment_is_read(experiments: ExperimentService) -> None:
    """Metric, guardrails and all; another plan has another hash."""
    plan = AnalysisPlan(
        metric=Metric("solved", "increase"),
        guardrails=(GUARD,),
        alpha=0.1,
        smallest_effect=0.02,
        planned_units=5000,
        auto_promote=True,
        auto_rollback=True,
    )
    created = experiments.create("legal", HALVES, plan=plan, salt="s")
    assert created == experiments.get(created.id)
    assert plan == AnalysisPlan(**{name: getattr(created, name) for name in AnalysisPlan.__dataclass_fields__})
    experiments.stop("legal")
    other = experiments.create("legal", HALVES, plan=replace(plan, alpha=0.05), salt="s")
    assert created.config_hash != other.config_hash
    experiments.stop("legal")
    assert created.config_hash == experiments.create("legal", HALVES, plan=plan, salt="s").config_hash


def test_units_are_in_one_experiment_at_most_when_several_share_an_alias(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Each has its share of the units; what is left over gets the alias's version; more than all is refused."""
    first = experiments.create("legal", HALVES, traffic=50)
    second = experiments.create("legal", HALVES, traffic=30)
    assert 0 == sum(min(a[1], b[1]) > max(a[0], b[0]) for a in first.stretches for b in second.stretches)
    counts = Counter(binding.experiment_id for binding in _units(registry, 1000).values())
    for experiment, share in ((first.id, 0.5), (second.id, 0.3), (None, 0.2)):
        assert abs(counts[experiment] / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5
    with pytest.raises(ConflictError, match=rf"{first.id} with 50 %.*no 21 % of its users are left"):
        experiments.create("legal", HALVES, traffic=21)
    assert 20 == experiments.create("legal", HALVES, traffic=20).traffic
    with pytest.raises(ConflictError, match="'legal' has several experiments; say which one"):
        experiments.stop("legal")


def test_who_is_in_says_nothing_about_the_arm_when_traffic_is_shared(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Two salts: of the half that is in the experiment, half gets each arm."""
    experiments.create("legal", HALVES, traffic=50)
    arms = Counter(binding.arm for binding in _units(registry, 2000).values() if binding.experiment_id)
    inside = sum(arms.values())
    assert abs(arms["A"] - inside / 2) < 4 * (inside / 4) ** 0.5


def test_held_out_units_are_in_no_experiment_when_one_follows_the_other(
    registry: Registry, experiments: ExperimentService
) -> None:
    """The same units, by the alias's version, whatever runs; it can't change in the midst."""
    experiments.set_holdout("legal", 20)
    assert 20 == experiments.holdout("legal")
    held = []
    for _ in range(2):
        experiments.create("legal", HALVES)
        bound = _units(registry)
        held.append({unit for unit, binding in bound.items() if binding.route == "holdout"})
        assert {3} == {bound[unit].number for unit in held[-1]}
        assert {"experiment"} == {binding.route for unit, binding in bound.items() if unit not in held[-1]}
        with pytest.raises(ConflictError, match="runs on 'legal'"):
            experiments.set_holdout("legal", 0)
        experiments.stop("legal")
    assert held[0] == held[1] != set()
    assert abs(len(held[0]) / 300 - 0.2) < 4 * (0.2 * 0.8 / 300) ** 0.5
    for percent in (-1, 50.1, float("nan")):
        with pytest.raises(InvalidInputError, match="a holdout is 0 to 50 percent"):
            experiments.set_holdout("legal", percent)
    with pytest.raises(NotFoundError, match="no adapter 'medical'"):
        experiments.set_holdout("medical", 1)


def test_arm_is_who_is_forced_into_it_when_a_tester_asks(registry: Registry, experiments: ExperimentService) -> None:
    """Whatever the assignment and the holdout say; several arms of one name have to be told apart."""
    experiments.set_holdout("legal", 50)
    first = experiments.create("legal", HALVES, traffic=40)
    for arm, number in (("A", 1), ("B", 2)):
        bound = {registry.resolve("legal", unit=f"user-{index}", arm=arm) for index in range(20)}
        expected = next(item for item in first.arms if item.name == arm)
        assert {Binding("legal", "experiment", expected.digest, number, first.id, arm, stage=1, forced=True)} == bound
    second = experiments.create("legal", HALVES, traffic=40)
    with pytest.raises(InvalidInputError, match=f"2 arms of 'legal' are called 'A'; it has {first.id}/A"):
        registry.resolve("legal", unit="u", arm="A")
    with pytest.raises(InvalidInputError, match=f"no arm of 'legal' is called 'Z'; it has {first.id}/A"):
        registry.resolve("legal", unit="u", arm="Z")
    assert second.id == registry.resolve("legal", unit="u", arm=f"{second.id}/A").experiment_id
    for model in ("legal@v1", "base"):
        with pytest.raises(InvalidInputError, match="is no alias that an experiment could split"):
            registry.resolve(model, unit="u", arm="A")


def test_units_stay_in_their_arm_when_weights_change(registry: Registry, experiments: ExperimentService) -> None:
    """A new stage begins; only arms that shrink lose units, and the exposures of the old stage keep it."""
    created = experiments.create("legal", HALVES)
    before = _units(registry)
    _expose(experiments, created, "A", "user-1", "r1")
    changed = experiments.change_weights("legal", [("A", None, 40), ("B", None, 40), ("C", "v3", 20)])
    assert (2, [40, 40, 20]) == (changed.stage, [arm.weight for arm in changed.arms])
    assert created.arms == experiments.arms_of(created.id, 1)
    after = _units(registry)
    assert {1, 2} == {before[unit].number for unit in after if after[unit].arm == "C"}
    assert all(after[unit].arm in (before[unit].arm, "C") for unit in after)
    assert {2} == {binding.stage for binding in after.values()}
    assert (["u"], []) == (
        [len(item) and "u" for item in experiments.outcomes(created.id, 1).values() if item],
        [item for items in experiments.outcomes(created.id, 2).values() for item in items],
    )
    decision = experiments.decisions("legal")[-1]
    assert ("change_weights", {"A": "v1=50", "B": "v2=50"}) == (decision.action, decision.numbers["before"])


def test_traffic_grows_by_other_units_when_weights_change(registry: Registry, experiments: ExperimentService) -> None:
    """Who was in it stays in it, with the same arm."""
    experiments.create("legal", HALVES, traffic=20)
    before = {unit: bound.arm for unit, bound in _units(registry).items() if bound.experiment_id}
    experiments.change_weights("legal", [("A", None, 50), ("B", None, 50)], traffic=60)
    after = {unit: bound.arm for unit, bound in _units(registry).items() if bound.experiment_id}
    assert before.items() < after.items()


@pytest.mark.parametrize(
    ("arms", "error", "message"),
    [
        ([("A", None, 60), ("B", None, 50)], InvalidInputError, "must add up to 100, found 110"),
        ([("A", None, 50), ("C", None, 50)], InvalidInputError, "there is no arm 'C'; a new one needs a version"),
        ([("B", None, 50), ("A", None, 50)], InvalidInputError, "the control, and stays: expected 'A', found 'B'"),
        ([("A", "v3", 50), ("B", None, 50)], InvalidInputError, "arm 'A' is legal@v1 and stays so"),
        ([("A", None, 50), ("C", "v9", 50)], NotFoundError, "no version 'v9'"),
        ([("A", None, 50), ("B", None, 50)], ConflictError, "has these weights already"),
    ],
)
def test_weights_are_refused_when_they_make_no_sense(
    experiments: ExperimentService, arms: list[tuple[str, str | None, float]], error: type[Exception], message: str
) -> None:
    """The stage stays as it was."""
    created = experiments.create("legal", HALVES)
    with pytest.raises(error, match=message):
        experiments.change_weights("legal", arms)
    assert created == experiments.get("legal")
    experiments.stop("legal")
    with pytest.raises(ConflictError, match="is stopped; weights change while it runs"):
        experiments.change_weights("legal", [("A", None, 90), ("B", None, 10)])


@pytest.mark.parametrize("draft", [True, False], ids=["draft", "running"])
def test_version_is_not_deleted_when_an_arm_is_pinned_to_it(
    registry: Registry, experiments: ExperimentService, draft: bool
) -> None:
    """A draft may be started tomorrow; once it is stopped the version may go."""
    experiments.create("legal", HALVES, draft=draft)
    for name in ("legal@v1", "legal"):
        with pytest.raises(ConflictError, match=r"experiment exp-|experiment is running|is running on"):
            registry.remove(name)
    experiments.stop("legal")
    assert ["legal@v1"] == registry.remove("legal@v1")


def test_outcomes_are_those_of_each_unit_when_requests_differ(experiments: ExperimentService) -> None:
    """Requests and reports of one stage in their order; what a tester forced is left out, also what was said of it."""
    experiment = experiments.create("legal", HALVES)
    _expose(experiments, experiment, "A", "ann", "r1")
    _expose(experiments, experiment, "A", "ann", "r2", error="the engine died")
    _expose(experiments, experiment, "A", "bob", "r3")
    _expose(experiments, experiment, "A", "eve", "r4", forced=True)
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
    _expose(experiments, experiment, "A", "u", "r1")
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
    _expose(experiments, experiment, "A", "u", "r1")
    with pytest.raises(InvalidInputError, match=f"'{metric}' is measured by the server itself"):
        experiments.record_feedback(Feedback("r1", metric, 1.0))


def test_list_gives_those_in_a_state_when_asked(experiments: ExperimentService) -> None:
    """The state is that of the moment: one whose time is over is not among the running ones."""
    over = experiments.create("legal", HALVES, traffic=10)
    _set_times(experiments, over, ends_at=utc_now())
    running = experiments.create("legal", HALVES, traffic=10)
    draft = experiments.create("legal", HALVES, draft=True)
    assert [[draft.id], [running.id], [over.id], []] == [
        [item.id for item in experiments.list(state=state)] for state in ("draft", "running", "stopped", "decided")
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A=50", ("A", None, 50.0)), ("C@v3=0.5", ("C", "v3", 0.5)), ("C@legal@v3=100", ("C", "legal@v3", 100.0))],
)
def test_parse_weight_splits_when_the_text_is_a_weight(text: str, expected: tuple[str, str | None, float]) -> None:
    """A version is only for a new arm."""
    assert expected == parse_weight(text)


@pytest.mark.parametrize("text", ["", "A", "=50", "A@=50", "@v1=50", "A=", "A=x", "A=0", "A=101", "A=nan"])
def test_parse_weight_refuses_when_the_text_is_none(text: str) -> None:
    """The message shows the right form."""
    with pytest.raises(InvalidInputError, match="expected NAME=PERCENT"):
        parse_weight(text)
