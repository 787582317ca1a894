"""Experiments as they lie in the database: what their rows mean at a moment, and the log of decisions.

Times take effect here and nowhere else: a row holds when an experiment starts and ends, and whoever reads it computes
whether that is past. So no task has to be alive for an experiment to start or end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import actor_of
from adapters.errors import ConflictError, NotFoundError
from adapters.records import (
    AnalysisPlan,
    Arm,
    Decision,
    DecisionAction,
    Experiment,
    ExperimentState,
    Guardrail,
    Metric,
    Stretch,
)
from adapters.tables import AliasRow, ArmRow, DecisionRow, ExperimentRow, utc_now

__all__ = [
    "add_arms",
    "begin_stage",
    "check_room",
    "find_experiment_row",
    "find_open_row",
    "find_running",
    "find_unfinished",
    "load_arms",
    "load_decisions",
    "load_plan",
    "lock_alias",
    "record_decision",
    "settle_row",
    "shares_of",
    "state_of",
    "stretches_of",
    "to_experiment",
]

_PLAN_FIELDS = tuple(AnalysisPlan.__dataclass_fields__)
_MAX_REASON_CHARS = 1000
_MAX_UNFINISHED = 20  # of an alias


def state_of(row: ExperimentRow, now: datetime) -> ExperimentState:
    """What an experiment is at a moment: one that was ordered to start is a draft until then, and ends by itself."""
    if row.state == "running":
        if row.starts_at is not None and now < row.starts_at:
            return "draft"
        if row.ends_at is not None and row.ends_at <= now:
            return "stopped"
    return row.state  # type: ignore[return-value]  # only the services of this package write rows


def find_running(session: Session, alias: str) -> list[Experiment]:
    """The experiments that split an alias at this moment, the oldest first.

    Every request to the alias asks for them: drafts are not read, and no hash is made (`config_hash` is empty).
    """
    now = utc_now()
    statement = select(ExperimentRow).where(ExperimentRow.alias == alias, ExperimentRow.state == "running")
    rows = session.scalars(statement.order_by(ExperimentRow.created_at, ExperimentRow.id))
    return [to_experiment(session, row, now, hashed=False) for row in rows if state_of(row, now) == "running"]


def find_unfinished(session: Session, alias: str) -> list[Experiment]:
    """The drafts of an alias and what runs on it, the oldest first: all that names versions which must stay."""
    now = utc_now()
    return [to_experiment(session, row, now) for row in _unfinished_rows(session, alias, now)]


def _unfinished_rows(session: Session, alias: str, now: datetime) -> list[ExperimentRow]:
    statement = select(ExperimentRow).where(ExperimentRow.alias == alias, ExperimentRow.state.in_(("draft", "running")))
    rows = session.scalars(statement.order_by(ExperimentRow.created_at, ExperimentRow.id))
    return [row for row in rows if state_of(row, now) in ("draft", "running")]


def check_room(session: Session, alias: str) -> None:
    """Refuse another experiment on an alias that has too many.

    Raises:
        ConflictError: as many as there may be are drafts or run.
    """
    if len(_unfinished_rows(session, alias, utc_now())) >= _MAX_UNFINISHED:
        raise ConflictError(
            f"{alias!r} has {_MAX_UNFINISHED} experiments that are drafts or run, the most there may be; stop one first"
        )


def find_experiment_row(session: Session, name: str) -> ExperimentRow:
    """An experiment by its id, or the newest one of an alias.

    Raises:
        NotFoundError: there is none that the actor may see.
    """
    row = session.get(ExperimentRow, name) or _newest_row(session, name)
    if row is None or not actor_of(session).can_see(row.alias):
        raise NotFoundError(f"there is no experiment {name!r}: expected an id or an alias that has one")
    return row


def find_open_row(session: Session, name: str, now: datetime) -> ExperimentRow:
    """The experiment that an act is meant for: by its id, or the only draft or running one of an alias.

    Raises:
        NotFoundError: there is none that the actor may see.
        ConflictError: the alias has several.
    """
    newest = find_experiment_row(session, name)
    if newest.id == name:
        return newest
    unfinished = _unfinished_rows(session, name, now)
    if len(unfinished) > 1:
        listed = ", ".join(row.id for row in unfinished)
        raise ConflictError(f"{name!r} has several experiments; say which one: {listed}")
    return unfinished[0] if unfinished else newest


def _newest_row(session: Session, alias: str) -> ExperimentRow | None:
    statement = select(ExperimentRow).where(ExperimentRow.alias == alias)
    return session.scalars(statement.order_by(ExperimentRow.created_at.desc(), ExperimentRow.id).limit(1)).first()


def lock_alias(session: Session, alias: str) -> AliasRow:
    """An alias's row, held to the end of the transaction: nobody else starts or moves anything on it meanwhile.

    Raises:
        NotFoundError: there is none that the actor may see.
    """
    row = session.get(AliasRow, alias, with_for_update=True)
    if row is None or not actor_of(session).can_see(alias):
        raise NotFoundError(f"there is no adapter {alias!r}")
    return row


def load_arms(session: Session, experiment_id: str, stage: int) -> tuple[Arm, ...]:
    """An experiment's arms in one stage, in the order in which they were given."""
    statement = select(ArmRow).where(ArmRow.experiment_id == experiment_id, ArmRow.stage == stage)
    rows = session.scalars(statement.order_by(ArmRow.position))
    return tuple(Arm(row.name, row.number, row.digest, row.weight, stretches_of(row.stretches)) for row in rows)


def stretches_of(stored: list[list[float]] | None) -> tuple[Stretch, ...]:
    """Stretches as they are stored; none where there are none."""
    return tuple((low, high) for low, high in stored or ())


def _plan_of(stored: dict[str, Any]) -> AnalysisPlan:
    """A plan as it is stored; what it doesn't say is as usual."""
    metric, guardrails = stored.get("metric"), stored.get("guardrails", ())
    return AnalysisPlan(
        **stored
        | {
            "metric": metric and Metric(**metric),
            "guardrails": tuple(Guardrail(**guardrail) for guardrail in guardrails),
        }
    )


def load_plan(session: Session, experiment_id: str) -> AnalysisPlan:
    """How an experiment is read."""
    return _plan_of(session.get_one(ExperimentRow, experiment_id).plan)


def to_experiment(session: Session, row: ExperimentRow, now: datetime, *, hashed: bool = True) -> Experiment:
    """The record of a row, as of a moment; without its hash where nobody asks for it."""
    arms, state = load_arms(session, row.id, row.stage), state_of(row, now)
    plan = _plan_of(row.plan)
    return Experiment(
        **{name: getattr(plan, name) for name in _PLAN_FIELDS},
        id=row.id,
        alias=row.alias,
        salt=row.salt,
        arms=arms,
        state=state,
        created_at=row.created_at,
        traffic=row.traffic,
        stretches=stretches_of(row.stretches),
        stage=row.stage,
        starts_at=row.starts_at,
        ends_at=row.ends_at,
        stopped_at=row.ends_at if row.stopped_at is None and state == "stopped" else row.stopped_at,
        config_hash=_config_hash(row, arms, plan) if hashed else "",
    )


def _config_hash(row: ExperimentRow, arms: tuple[Arm, ...], plan: AnalysisPlan) -> str:
    """SHA-256 over all that decides who gets what and how it is read; equal hashes, equal experiments."""
    config = {
        "alias": row.alias,
        "salt": row.salt,
        "traffic": row.traffic,
        "arms": [[arm.name, arm.digest, arm.weight] for arm in arms],
        "ends_at": row.ends_at and row.ends_at.timestamp(),
        **asdict(plan),
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def record_decision(
    session: Session,
    row: ExperimentRow,
    action: DecisionAction,
    reason: str,
    *,
    numbers: dict[str, Any] | None = None,
    by: str | None = None,
) -> None:
    """Add an act to an experiment's log, in the transaction of the act itself.

    Args:
        session: The transaction.
        row: The experiment; the row's stage is that of the decision.
        action: What is done.
        reason: One plain sentence.
        numbers: What led to it, as plain values.
        by: Who decided, if that is not the session's actor.
    """
    session.add(
        DecisionRow(
            experiment_id=row.id,
            stage=row.stage,
            made_at=utc_now(),
            action=action,
            by=by or actor_of(session).id,
            reason=reason[:_MAX_REASON_CHARS],
            numbers=numbers or {},
        )
    )


def load_decisions(session: Session, experiment_id: str, *, after: int = 0, limit: int | None = None) -> list[Decision]:
    """An experiment's decisions behind the one with an id, at most `limit`, the oldest first."""
    statement = select(DecisionRow).where(DecisionRow.experiment_id == experiment_id, DecisionRow.id > after)
    rows = session.scalars(statement.order_by(DecisionRow.id).limit(limit))
    return [
        Decision(
            row.id,
            row.experiment_id,
            row.stage,
            row.made_at,
            row.action,  # type: ignore[arg-type]  # only `record_decision` writes rows
            row.by,
            row.reason,
            row.numbers,
        )
        for row in rows
    ]


def add_arms(session: Session, row: ExperimentRow, arms: Sequence[Arm]) -> None:
    """Add the arms of the stage that the row says."""
    for position, arm in enumerate(arms):
        session.add(
            ArmRow(
                experiment_id=row.id,
                stage=row.stage,
                position=position,
                name=arm.name,
                number=arm.number,
                digest=arm.digest,
                weight=arm.weight,
                stretches=[list(stretch) for stretch in arm.stretches],
            )
        )


def begin_stage(
    session: Session,
    row: ExperimentRow,
    arms: Sequence[Arm],
    stretches: Sequence[Stretch],
    action: Literal["change_weights", "undo"],
    reason: str,
    *,
    traffic: float,
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Go over to other shares, in the transaction that holds the alias: write them, a decision and an act."""
    before = load_arms(session, row.id, row.stage)
    change = {
        "from_stage": row.stage,
        "from_traffic": row.traffic,
        "from_stretches": row.stretches,
        "traffic": traffic,
        "before": shares_of(before),
        "after": shares_of(arms),
    }
    row.stage += 1
    row.traffic, row.stretches = traffic, [list(stretch) for stretch in stretches]
    add_arms(session, row, arms)
    record_decision(session, row, action, reason, numbers=change | dict(numbers or {}))
    record_act(session, "change_weights", row.id, alias=row.alias, before=shares_of(before), after=shares_of(arms))


def shares_of(arms: Sequence[Arm]) -> dict[str, str]:
    """Arms as the logs show them: `{"A": "v1=50"}`."""
    return {arm.name: f"v{arm.number}={arm.weight:g}" for arm in arms}


def settle_row(session: Session, row: ExperimentRow, now: datetime) -> None:
    """Write down that an experiment has ended at its time, if it has and nobody has written it yet."""
    if row.state == "running" and state_of(row, now) == "stopped":
        row.state, row.stopped_at = "stopped", row.ends_at
        record_decision(session, row, "stop", "its end was reached", by="schedule")
