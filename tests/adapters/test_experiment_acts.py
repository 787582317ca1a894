"""Acts that move an alias because of an experiment, and the undoing of acts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from adapters.errors import ConflictError, IntegrityError, NotFoundError
from adapters.experiment_acts import conclude, undo
from adapters.experiments import ExperimentService
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.records import Experiment
from adapters.registry import Registry
from adapters.tables import ExperimentRow, utc_now
from tests.support.versions import publish_text

HALVES = [("A", "v1", 50.0), ("B", "v2", 50.0)]


@pytest.fixture
def experiments(registry: Registry) -> ExperimentService:
    """Experiments on an alias with three versions, pointing to the first."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    registry.promote("legal@v1")
    return ExperimentService(registry.database)


def _state(registry: Registry, experiments: ExperimentService) -> tuple[str, int, str | None]:
    """The newest experiment's state, where the alias points, and what runs on it."""
    alias = registry.alias("legal")
    return experiments.get("legal").state, alias.current.number, alias.experiment_id


def test_alias_moves_to_the_winner_and_back_when_that_is_undone(
    registry: Registry, experiments: ExperimentService
) -> None:
    """One decision each, with the numbers; the experiment stays ended, and there is nothing else to undo."""
    created = experiments.create("legal", HALVES)
    ended = conclude(
        registry, created.id, "B", action="promote", reason="B is better", stage=1, numbers={"p": 0.01}, by="evaluator"
    )
    assert ("decided", True) == (ended.state, ended.stopped_at is not None)
    assert ("decided", 2, None) == _state(registry, experiments)
    assert "stopped" == undo(registry, "legal").state
    assert ("stopped", 1, None) == _state(registry, experiments)
    _, promoted, undone = experiments.decisions("legal")
    assert ("promote", "evaluator", "B is better") == (promoted.action, promoted.by, promoted.reason)
    assert {"p": 0.01, "arm": "B", "from_number": 1, "to_number": 2} == promoted.numbers
    assert ("undo", "command line", "undid: B is better", promoted.id) == (
        undone.action, undone.by, undone.reason, undone.numbers["undoes"],
    )  # fmt: skip
    assert [("promote", 1), ("promote", 2), ("rollback", 1)] == [
        (change.action, change.to_number) for change in registry.history("legal")[-3:]
    ]
    with pytest.raises(ConflictError, match="has nothing to undo"):
        undo(registry, "legal")


def test_alias_comes_to_the_control_when_it_points_to_a_treatment_that_is_rolled_back(
    registry: Registry, experiments: ExperimentService
) -> None:
    """From the treatment to the control, and there again when that is undone; at the control it stays."""
    experiments.create("legal", HALVES)
    conclude(registry, "legal", "A", action="roll_back", reason="errors")
    assert ("decided", 1, None) == _state(registry, experiments)
    registry.promote("legal@v2")
    experiments.create("legal", HALVES)
    conclude(registry, "legal", "A", action="roll_back", reason="errors")
    assert ("decided", 1, None) == _state(registry, experiments)
    undo(registry, "legal")
    assert ("stopped", 2, None) == _state(registry, experiments)


def test_alias_stays_when_it_points_to_no_arm_of_what_is_rolled_back(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Another version is none of the experiment's business: it ends, and that is undone without a move."""
    registry.promote("legal@v3")
    moves = len(registry.history("legal"))
    created = experiments.create("legal", HALVES)
    conclude(registry, "legal", "A", action="roll_back", reason="errors")
    assert ("decided", 3, None) == _state(registry, experiments)
    assert (3, 3) == tuple(experiments.decisions(created.id)[-1].numbers[end] for end in ("from_number", "to_number"))
    undo(registry, "legal")
    assert ("stopped", 3, None) == _state(registry, experiments)
    assert moves == len(registry.history("legal"))


def test_promotion_stands_when_another_experiment_is_rolled_back(
    registry: Registry, experiments: ExperimentService
) -> None:
    """One experiment's end moves no alias that another one moved; and while two run, nothing but harm moves it."""
    first = experiments.create("legal", HALVES, traffic=50)
    second = experiments.create("legal", [("A", "v1", 50.0), ("B", "v3", 50.0)], traffic=50)
    with pytest.raises(ConflictError, match=f"running on 'legal', too: {second.id}"):
        conclude(registry, first.id, "B", action="promote", reason="better")
    experiments.stop(first.id)
    experiments.stop(second.id)
    conclude(registry, first.id, "B", action="promote", reason="better")
    conclude(registry, second.id, "A", action="roll_back", reason="errors")
    assert 2 == registry.alias("legal").current.number
    experiments.create("legal", HALVES, traffic=50)
    with pytest.raises(ConflictError, match="running on 'legal', too"):
        undo(registry, first.id)
    assert ("stopped", 2) == (undo(registry, second.id).state, registry.alias("legal").current.number)


def test_stopped_experiment_is_decided_when_a_person_asks(registry: Registry, experiments: ExperimentService) -> None:
    """It has its numbers, and its end stays what it was; one that never ran has none, nor one whose version is gone."""
    created = experiments.create("legal", HALVES)
    stopped = experiments.stop(created.id)
    ended = conclude(registry, created.id, "B", action="promote", reason="B is better")
    assert ("decided", stopped.stopped_at, 2) == (ended.state, ended.stopped_at, registry.alias("legal").current.number)
    draft = experiments.create("legal", HALVES, draft=True)
    for state in ("is draft, not running", "was stopped before it ran"):
        with pytest.raises(ConflictError, match=state):
            conclude(registry, draft.id, "B", action="promote", reason="r")
        if state.startswith("is"):
            experiments.stop(draft.id)
    late = experiments.create("legal", HALVES, starts_at=utc_now() + timedelta(days=1))
    experiments.stop(late.id)
    with pytest.raises(ConflictError, match="was stopped before it ran"):
        conclude(registry, late.id, "B", action="promote", reason="r")
    other = experiments.create("legal", [("A", "v1", 50.0), ("B", "v3", 50.0)])
    experiments.stop(other.id)
    registry.remove("legal@v3")
    with pytest.raises(NotFoundError):
        conclude(registry, other.id, "B", action="promote", reason="r")


def test_alias_is_not_taken_from_a_person_when_an_ended_experiment_has_a_winner(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Between the end and the evaluation somebody has promoted another version; by hand it may still be done."""
    created = experiments.create("legal", HALVES)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, created.id).ends_at = utc_now()
    registry.promote("legal@v3")
    with pytest.raises(ConflictError, match="was moved after experiment"):
        conclude(registry, created.id, "B", action="promote", reason="better", stage=1)
    assert "decided" == conclude(registry, created.id, "B", action="promote", reason="better").state


def test_one_act_is_done_when_two_processes_decide_at_once(registry: Registry, experiments: ExperimentService) -> None:
    """The second finds the experiment decided."""
    created = experiments.create("legal", HALVES)
    results: list[Experiment | Exception] = []

    def act(arm: str) -> None:
        try:
            results.append(conclude(registry, created.id, arm, action="promote", reason=arm))
        except ConflictError as error:
            results.append(error)

    threads = [threading.Thread(target=act, args=(arm,)) for arm in ("A", "B")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 == sum(isinstance(result, ConflictError) for result in results)
    assert ["start", "promote"] == [decision.action for decision in experiments.decisions(created.id)]


def test_conclude_is_refused_when_something_is_not_as_it_was_seen(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Another stage, no such arm, damaged files, an end: nothing is changed and nothing is written."""
    created = experiments.create("legal", HALVES)
    for stage, arm, message in ((2, "B", "is in stage 1, not 2"), (1, "C", "has no arm 'C'; it has A, B")):
        with pytest.raises(ConflictError, match=message):
            conclude(registry, created.id, arm, action="promote", reason="r", stage=stage)
    weights = registry.store.folder(created.arms[1].digest) / ADAPTER_WEIGHTS_FILE
    weights.write_text("other")
    with pytest.raises(IntegrityError):
        conclude(registry, created.id, "B", action="promote", reason="r")
    assert ("running", 1, created.id) == _state(registry, experiments)
    experiments.stop("legal")
    with pytest.raises(ConflictError, match="is stopped, not running"):
        conclude(registry, created.id, "A", action="promote", reason="r", stage=1)
    assert ["start", "stop"] == [decision.action for decision in experiments.decisions(created.id)]


def test_weights_are_undone_one_by_one_when_asked_again(registry: Registry, experiments: ExperimentService) -> None:
    """Each unit has the arm from before, in new stages; a stage's arms are never written over."""
    created = experiments.create("legal", HALVES, traffic=50)
    units = [f"user-{index}" for index in range(100)]
    before = [registry.resolve("legal", unit=unit).arm for unit in units]
    experiments.change_weights("legal", [("A", None, 80), ("B", None, 20)], traffic=90)
    experiments.change_weights("legal", [("A", None, 60), ("B", None, 20), ("C", "v3", 20)])
    assert [80, 20] == [arm.weight for arm in undo(registry, "legal").arms]
    back = undo(registry, "legal")
    assert (5, 50, created.arms, created.stretches) == (back.stage, back.traffic, back.arms, back.stretches)
    assert before == [registry.resolve("legal", unit=unit).arm for unit in units]
    with pytest.raises(ConflictError, match="has nothing to undo"):
        undo(registry, "legal")
    assert [2, 2, 3, 2, 2] == [len(experiments.arms_of(created.id, stage)) for stage in range(1, 6)]


def test_undo_is_refused_when_it_would_overrule_somebody(registry: Registry, experiments: ExperimentService) -> None:
    """The alias was moved since, the weights no longer count, a version to go back to is gone."""
    experiments.create("legal", HALVES)
    conclude(registry, "legal", "B", action="promote", reason="r")
    registry.promote("legal@v3")
    with pytest.raises(ConflictError, match="points to v3 by now, not to v2"):
        undo(registry, "legal")
    registry.promote("legal@v2")
    registry.remove("legal@v1")
    with pytest.raises(NotFoundError, match="no version v1"):
        undo(registry, "legal")
    experiments.create("legal", [("A", "v2", 50), ("B", "v3", 50)])
    experiments.change_weights("legal", [("A", None, 90), ("B", None, 10)])
    conclude(registry, "legal", "B", action="promote", reason="r")
    undo(registry, "legal")
    with pytest.raises(ConflictError, match="is stopped; weights change while it runs"):
        undo(registry, "legal")


def test_experiment_goes_on_in_a_new_stage_when_its_stop_is_undone(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Everybody has the arm from before; what comes is read apart, since users were outside of it meanwhile."""
    created = experiments.create("legal", HALVES, traffic=50)
    units = [f"user-{index}" for index in range(100)]
    before = [registry.resolve("legal", unit=unit).arm for unit in units]
    experiments.stop("legal")
    assert {None} == {registry.resolve("legal", unit=unit).arm for unit in units}
    again = undo(registry, "legal")
    assert ("running", None, 2, created.stretches) == (again.state, again.stopped_at, again.stage, again.stretches)
    assert before == [registry.resolve("legal", unit=unit).arm for unit in units]
    _, stop, undone = experiments.decisions("legal")
    assert (stop.id, "undid: it was stopped") == (undone.numbers["undoes"], undone.reason)
    assert (created.arms, created.arms) == tuple(experiments.arms_of(created.id, stage) for stage in (1, 2))
    experiments.stop("legal")
    conclude(registry, "legal", "B", action="promote", reason="r")
    assert ["stopped", "running"] == [undo(registry, "legal").state for _ in range(2)]


def test_stop_stands_when_there_is_nothing_to_go_back_to(registry: Registry, experiments: ExperimentService) -> None:
    """Others have its users, an arm's version is gone, its end has passed, or it never ran."""
    first = experiments.create("legal", HALVES)
    experiments.stop(first.id)
    second = experiments.create("legal", HALVES, traffic=60)
    with pytest.raises(ConflictError, match=r"running on 'legal' already.*no 100 % of its users are left"):
        undo(registry, first.id)
    experiments.stop(second.id)
    registry.remove("legal@v2")
    with pytest.raises(NotFoundError, match="no version v2"):
        undo(registry, first.id)
    third = experiments.create("legal", [("A", "v1", 50), ("B", "v3", 50)])
    experiments.stop(third.id)
    with registry.database.write() as session:
        session.get_one(ExperimentRow, third.id).ends_at = utc_now()
    with pytest.raises(ConflictError, match=r"was to end at .* UTC, which has passed"):
        undo(registry, third.id)
    draft = experiments.create("legal", [("A", "v1", 50), ("B", "v3", 50)], draft=True)
    experiments.stop(draft.id)
    with pytest.raises(ConflictError, match="was stopped before it ran; create it anew"):
        undo(registry, draft.id)
    assert {"stopped"} == {experiments.get(made.id).state for made in (first, second, third, draft)}


def test_weights_stay_when_somebody_has_changed_the_stage_that_was_looked_at(
    registry: Registry, experiments: ExperimentService
) -> None:
    """Who computes weights from a stage's numbers does not overwrite a person's."""
    created = experiments.create("legal", HALVES)
    experiments.change_weights("legal", [("A", None, 80), ("B", None, 20)], stage=1)
    with pytest.raises(ConflictError, match=f"{created.id} is in stage 2, not 1"):
        experiments.change_weights("legal", [("A", None, 5), ("B", None, 95)], stage=1)
    assert [80, 20] == [arm.weight for arm in experiments.get("legal").arms]
