"""Acts that end an experiment by moving its alias, and the undoing of acts: each is one transaction and one decision.

Apart from `experiments`, since moving an alias takes the registry and its store.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.errors import ConflictError
from adapters.experiment_rows import (
    begin_stage,
    check_room,
    find_open_row,
    find_running,
    load_arms,
    load_decisions,
    lock_alias,
    record_decision,
    state_of,
    stretches_of,
    to_experiment,
)
from adapters.experiment_stages import check_outsiders, find_room
from adapters.records import Arm, Decision, Experiment, ModelName
from adapters.registry import Registry, find_version, has_been_at, move_alias
from adapters.tables import AliasChangeRow, AliasRow, ExperimentRow, utc_now

__all__ = ["conclude", "undo"]

_MOVES = ("promote", "roll_back")
_ACCEPTED = ("accept_feedback", "accept_guardrail", "accept_split")
_UNDOABLE = ("change_weights", "stop", *_ACCEPTED, *_MOVES)


def conclude(
    registry: Registry,
    name: str,
    arm: str,
    *,
    action: Literal["promote", "roll_back"],
    reason: str,
    stage: int | None = None,
    numbers: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> Experiment:
    """End an experiment for good, and let its alias answer with an arm's version.

    A promotion points the alias there. A rollback points it to the control only if it points to one of the treatments,
    or to nothing: where it points elsewhere, users outside of the experiment are answered by another version already,
    which is no matter of this experiment. Whoever comes second, in this process or another, finds the experiment
    decided and is refused.

    Args:
        registry: On behalf of whom, or what, it is done.
        name: The experiment's id, or its alias.
        arm: Whose version the alias answers with from here on; to roll back, the control.
        action: What the log calls it.
        reason: One plain sentence for the log.
        stage: The stage that was looked at; None is a person's act, for which an experiment may be at its end, too.
            With a stage one that has just ended at its time is acted on, until that end is written down.
        numbers: What led to it, for the log.
        by: Who decided, if not whom the registry acts for.

    Raises:
        NotFoundError: no such experiment, or the arm's version was removed after it had stopped.
        ConflictError: it was decided, or has never run, or is in another stage, or has no such arm; or, for a
            promotion, others run on the alias, or somebody has moved it since the experiment ended.
        IntegrityError: the version's stored files are damaged; nothing was changed.
    """
    with registry.store.held():  # nobody removes the files between their check and the move
        with registry.database.read() as session:
            chosen = _find_arm(session, find_open_row(session, name, utc_now()), arm)
        registry.store.verify(chosen.digest)
        with registry.database.write() as session:
            now = utc_now()
            row = find_open_row(session, name, now)
            alias_row = lock_alias(session, row.alias)
            _check_can_end(session, row, stage, now)
            if _find_arm(session, row, arm) != chosen:
                raise ConflictError(f"experiment {row.id} was changed by somebody else at the same time")
            find_version(session, ModelName(row.alias, number=chosen.number))  # a stopped experiment keeps none
            moved: dict[str, Any] = {"arm": arm, "from_number": alias_row.number}
            if action == "promote":
                _check_can_promote(session, row, stage, now)
                move_alias(session, alias_row, chosen.number, "promote")
            elif alias_row.number is None or alias_row.number in _treated(session, row):
                _point_back(session, alias_row, chosen.number)
            moved["to_number"] = alias_row.number
            row.stopped_at = to_experiment(session, row, now).stopped_at or now
            row.state = "decided"
            record_decision(session, row, action, reason, numbers=dict(numbers or {}) | moved, by=by)
            record_act(session, "decide_experiment", row.id, alias=row.alias, decision=action, **moved)
            return to_experiment(session, row, now)


def _check_can_end(session: Session, row: ExperimentRow, stage: int | None, now: datetime) -> None:
    """Refuse to decide what is decided, what never ran, and, for who looked at a stage, what others have ended."""
    state = state_of(row, now)
    if state == "stopped" and stage is not None and row.state == "stopped":
        raise ConflictError(f"experiment {row.id} is stopped, not running")
    if state not in ("running", "stopped"):
        raise ConflictError(f"experiment {row.id} is {state}, not running")
    if state == "stopped" and not _has_run(row):
        raise ConflictError(f"experiment {row.id} was stopped before it ran; there is nothing to decide")
    if stage not in (None, row.stage):
        raise ConflictError(f"experiment {row.id} is in stage {row.stage}, not {stage}")


def _has_run(row: ExperimentRow) -> bool:
    if row.stretches is None or row.starts_at is None:
        return False
    return row.stopped_at is None or row.starts_at < row.stopped_at


def _check_can_promote(session: Session, row: ExperimentRow, stage: int | None, now: datetime) -> None:
    """Refuse to move an alias under other experiments, and by itself over what somebody chose after the end."""
    _check_is_alone(session, row)
    if stage is None or state_of(row, now) == "running":
        return
    assert row.ends_at is not None, "it has ended at its time"
    since = select(AliasChangeRow).where(AliasChangeRow.alias == row.alias, AliasChangeRow.changed_at >= row.ends_at)
    if session.scalars(since.limit(1)).first() is not None:
        raise ConflictError(f"{row.alias!r} was moved after experiment {row.id} had ended; promote by hand if you like")


def _check_is_alone(session: Session, row: ExperimentRow) -> None:
    if others := [other.id for other in find_running(session, row.alias) if other.id != row.id]:
        raise ConflictError(f"running on {row.alias!r}, too: {', '.join(others)}; end them before its alias is moved")


def _treated(session: Session, row: ExperimentRow) -> set[int]:
    """The numbers of the treatments' versions."""
    return {arm.number for arm in load_arms(session, row.id, row.stage)[1:]}


def undo(registry: Registry, name: str) -> Experiment:
    """Take the latest act on an experiment back that isn't yet; repeated calls go further back.

    A change of weights is undone by a new stage with the weights from before, in which every unit has the arm that it
    had. A promotion or a rollback is undone by pointing the alias back, if it was moved; the experiment stays ended, as
    stopped. What was accepted counts no more. A stop is undone by a new stage, too: its users were answered outside of
    the experiment meanwhile.

    Raises:
        NotFoundError: no such experiment, or a version to go back to was removed.
        ConflictError: there is nothing to undo, the alias has several experiments, the experiment's weights no longer
            count, or somebody has moved the alias since, or others run on the alias that is to be moved; or the end of
            what was stopped has passed, it had not run, or others leave it too few units by now.
        IntegrityError: the version's stored files are damaged; nothing was changed.
    """
    with registry.store.held():
        with registry.database.read() as session:
            row = find_open_row(session, name, utc_now())
            found = _find_undoable(session, row)
            if found.action in _MOVES:
                registry.store.verify(_find_former(session, row, found))
        with registry.database.write() as session:
            row = find_open_row(session, name, utc_now())
            alias_row = lock_alias(session, row.alias)
            if _find_undoable(session, row) != found:
                raise ConflictError(f"experiment {row.id} was changed by somebody else at the same time")
            if found.action == "change_weights":
                _undo_weights(session, row, found)
            elif found.action == "stop":
                _undo_stop(session, row, alias_row, found)
            elif found.action in _ACCEPTED:
                _undo_acceptance(session, row, found)
            else:
                _undo_move(session, row, alias_row, found)
            return to_experiment(session, row, utc_now())


def _undo_weights(session: Session, row: ExperimentRow, found: Decision) -> None:
    now = utc_now()
    if state_of(row, now) != "running":
        raise ConflictError(f"experiment {row.id} is {state_of(row, now)}; weights change while it runs")
    arms = load_arms(session, row.id, found.numbers["from_stage"])
    for arm in arms:
        find_version(session, ModelName(row.alias, number=arm.number))  # an arm that left may be removed by now
    traffic = found.numbers["from_traffic"]
    begin_stage(
        session,
        row,
        arms,
        find_room(session, row, traffic, now, former=stretches_of(found.numbers["from_stretches"])),
        "undo",
        f"undid: {found.reason}",
        traffic=traffic,
        numbers={"undoes": found.id},
    )


def _undo_stop(session: Session, row: ExperimentRow, alias_row: AliasRow, found: Decision) -> None:
    """Go on in a new stage, with the arms and the users from before, as far as those are free."""
    now = utc_now()
    if not _has_run(row):
        raise ConflictError(f"experiment {row.id} was stopped before it ran; create it anew")
    if row.ends_at is not None and row.ends_at <= now:
        raise ConflictError(f"experiment {row.id} was to end at {row.ends_at:%Y-%m-%d %H:%M} UTC, which has passed")
    check_room(session, row.alias)
    check_outsiders(row, alias_row)
    arms = load_arms(session, row.id, row.stage)
    for arm in arms:
        find_version(session, ModelName(row.alias, number=arm.number))  # what is stopped keeps none
    stretches = find_room(session, row, row.traffic, now)
    row.state, row.stopped_at = "running", None
    reason = f"undid: {found.reason}"
    begin_stage(session, row, arms, stretches, "undo", reason, traffic=row.traffic, numbers={"undoes": found.id})


def _undo_acceptance(session: Session, row: ExperimentRow, found: Decision) -> None:
    record_decision(session, row, "undo", f"undid: {found.reason}", numbers={"undoes": found.id})
    record_act(session, "undo_decision", row.id, alias=row.alias, undoes=found.action)


def _undo_move(session: Session, row: ExperimentRow, alias_row: AliasRow, found: Decision) -> None:
    back, there = found.numbers["from_number"], found.numbers["to_number"]
    if alias_row.number != there:
        raise ConflictError(f"{row.alias!r} points to v{alias_row.number} by now, not to v{there}; nothing to undo")
    if back != there:
        _find_former(session, row, found)
        _check_is_alone(session, row)
        _point_back(session, alias_row, back)
    row.state = "stopped"
    record_decision(
        session,
        row,
        "undo",
        f"undid: {found.reason}",
        numbers={"undoes": found.id, "from_number": there, "to_number": back},
    )
    record_act(session, "undo_decision", row.id, alias=row.alias, from_number=there, to_number=back)


def _point_back(session: Session, alias_row: AliasRow, number: int) -> None:
    """Point an alias to an earlier version; if it never pointed there, that is a promotion as its history sees it."""
    move_alias(session, alias_row, number, "rollback" if has_been_at(session, alias_row.name, number) else "promote")


def _find_arm(session: Session, row: ExperimentRow, name: str) -> Arm:
    arms = {arm.name: arm for arm in load_arms(session, row.id, row.stage)}
    if name not in arms:
        raise ConflictError(f"experiment {row.id} has no arm {name!r}; it has {', '.join(arms)}")
    return arms[name]


def _find_undoable(session: Session, row: ExperimentRow) -> Decision:
    decisions = load_decisions(session, row.id)
    undone = {decision.numbers.get("undoes") for decision in decisions}
    for decision in reversed(decisions):
        if decision.action in _UNDOABLE and decision.id not in undone:
            return decision
    raise ConflictError(f"experiment {row.id} has nothing to undo")


def _find_former(session: Session, row: ExperimentRow, found: Decision) -> str:
    """The digest of the version that the alias pointed to before a decision."""
    number = found.numbers["from_number"]
    if number is None:
        raise ConflictError(f"{row.alias!r} pointed to no version before; promote another one instead")
    return find_version(session, ModelName(row.alias, number=number)).version.digest
