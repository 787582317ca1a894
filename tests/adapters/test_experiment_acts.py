"""Acts that move an alias because of an experiment, and the undoing of acts."""

from __future__ import annotations

import threading

import pytest

from adapters.errors import ConflictError, IntegrityError, NotFoundError
from adapters.experiment_acts import conclude, undo
from adapters.experiments import ExperimentService
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.records import Experiment
from adapters.registry import Registry
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


def test_alias_stays_with_the_control_when_an_experiment_is_rolled_back(
    registry: Registry, experiments: ExperimentService
) -> None:
    """If it pointed elsewhere it comes to the control; undoing that puts it there again."""
    experiments.create("legal", HALVES)
    conclude(registry, "legal", "A", action="roll_back", reason="errors")
    assert ("decided", 1, None) == _state(registry, experiments)
    registry.promote("legal@v3")
    experiments.create("legal", HALVES)
    conclude(registry, "legal", "A", action="roll_back", reason="errors")
    assert ("decided", 1, None) == _state(registry, experiments)
    undo(registry, "legal")
    assert ("stopped", 3, None) == _state(registry, experiments)


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
        conclude(registry, created.id, "A", action="promote", reason="r")
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
    experiments.stop("legal")
    with pytest.raises(ConflictError, match="is stopped; weights change while it runs"):
        undo(registry, "legal")
