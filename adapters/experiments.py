"""Experiments: the split of an alias between pinned versions, from draft to its end.

Creates, starts, changes and stops them. Who gets which arm is computed in `assignment`, what came of it is written and
read in `exposures`. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from adapters.assignment import shift_weights
from adapters.audit import record_act
from adapters.database import Database, actor_of
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.experiment_config import check_arms, check_plan, check_salt, check_times, check_traffic
from adapters.experiment_rows import (
    add_arms,
    begin_stage,
    check_room,
    find_experiment_row,
    find_open_row,
    load_arms,
    load_decisions,
    lock_alias,
    record_decision,
    settle_row,
    shares_of,
    state_of,
    to_experiment,
)
from adapters.experiment_stages import check_outsiders, find_pinned, find_room, next_arms, started_rows
from adapters.exposures import FEEDBACK_WINDOW, add_exposure, add_feedback
from adapters.outcomes import UnitOutcomes, read_outcomes
from adapters.paging import unknown_place
from adapters.records import (
    Actor,
    AnalysisPlan,
    Arm,
    Decision,
    Experiment,
    ExperimentState,
    Exposure,
    Feedback,
)
from adapters.tables import AliasRow, ExperimentRow, ExposureRow, utc_now

__all__ = ["ExperimentService"]

_MAX_HOLDOUT = 50.0


class ExperimentService:
    """Experiments, exposures and feedback over one database."""

    def __init__(self, database: Database, *, feedback_window: timedelta = FEEDBACK_WINDOW) -> None:
        self.database = database
        self._feedback_window = feedback_window

    def acting_for(self, actor: Actor) -> ExperimentService:
        """The same service on somebody's behalf: what the actor may not see does not exist in it."""
        return ExperimentService(self.database.acting_for(actor), feedback_window=self._feedback_window)

    def create(
        self,
        alias: str,
        arms: Sequence[tuple[str, str, float]],
        *,
        salt: str | None = None,
        traffic: float = 100.0,
        starts_at: datetime | None = None,
        ends_at: datetime | None = None,
        plan: AnalysisPlan | None = None,
        draft: bool = False,
    ) -> Experiment:
        """Split an alias between pinned versions, from this moment on unless it is a draft or starts later.

        Args:
            alias: An existing alias.
            arms: Name, version (`v1`, `legal@v1`, or the beginning of a digest) and weight in percent, two or more, the
                control first; weights add up to 100.
            salt: Decides who gets which arm; random if not given, so that experiments are independent.
            traffic: Percent of the alias's units that are in the experiment; the others get the alias's version.
            starts_at: When it starts by itself; None is at once, or at `start` for a draft.
            ends_at: When it ends by itself.
            plan: How it will be read.
            draft: Only write it down; `start` starts it.

        Raises:
            InvalidInputError: arms, weights, salt, times or the plan are wrong, or an arm is a reward model.
            NotFoundError: no such alias or version.
            ConflictError: the alias's other experiments leave too few units, or are too many.
        """
        plan = plan or AnalysisPlan()
        check_arms(arms)
        check_traffic(traffic)
        check_plan(plan)
        if salt is not None:
            check_salt(salt)
        check_times(starts_at, ends_at, utc_now())
        row = ExperimentRow(
            id=f"exp-{secrets.token_hex(6)}",
            alias=alias,
            salt=salt if salt is not None else secrets.token_hex(8),
            state="draft",
            created_at=utc_now(),
            traffic=traffic,
            stage=1,
            starts_at=starts_at,
            ends_at=ends_at,
            plan=asdict(plan),
        )
        with self.database.write() as session:
            alias_row = lock_alias(session, alias)
            check_room(session, alias)
            session.add(row)
            session.flush()
            found = _pin_arms(session, alias, arms)
            add_arms(session, row, found)
            if draft:
                record_decision(session, row, "create", "a draft was made", numbers={"arms": shares_of(found)})
                record_act(session, "create_experiment", row.id, alias=alias, arms=shares_of(found))
            else:
                _start(session, row, alias_row)
            return to_experiment(session, row, utc_now())

    def start(self, name: str) -> Experiment:
        """Start a draft, named by its id or its alias: at once, or at its time if that lies ahead.

        Raises:
            NotFoundError: there is none.
            ConflictError: it is no draft, has been ordered to start already, its end has passed, or the alias's other
                experiments leave too few units.
        """
        with self.database.write() as session:
            now = utc_now()
            row = find_open_row(session, name, now)
            if row.state != "draft":
                found = "to start at its time already" if state_of(row, now) == "draft" else state_of(row, now)
                raise ConflictError(f"experiment {row.id} is {found}; only a draft can be started")
            _start(session, row, lock_alias(session, row.alias))
            return to_experiment(session, row, utc_now())

    def stop(self, name: str) -> Experiment:
        """Stop an experiment, named by its id or its alias; the alias answers with the version it points to again.

        A draft is stopped without ever having run.

        Raises:
            NotFoundError: there is none.
            ConflictError: it is at its end already, or the alias has several.
        """
        with self.database.write() as session:
            now = utc_now()
            row = find_open_row(session, name, now)
            if state_of(row, now) not in ("draft", "running"):
                raise ConflictError(f"experiment {row.id} is {state_of(row, now)} already")
            row.state, row.stopped_at = "stopped", now
            record_decision(session, row, "stop", "it was stopped")
            record_act(session, "stop_experiment", row.id, alias=row.alias)
            return to_experiment(session, row, now)

    def change_weights(
        self,
        name: str,
        arms: Sequence[tuple[str, str | None, float]],
        *,
        traffic: float | None = None,
        reason: str = "weights were changed",
        numbers: Mapping[str, Any] | None = None,
        stage: int | None = None,
    ) -> Experiment:
        """Give the arms of a running experiment other weights; a new stage begins, which is analysed as such.

        No unit moves that need not: each stays with its arm unless that shrinks. Exposures keep the stage that they
        were made in.

        Args:
            name: The experiment's id, or its alias.
            arms: Name, version and weight in percent of all arms of the new stage. The version may be None for an arm
                that there is; with one, it is a new arm. Arms that are not named leave; the control stays the first.
            traffic: Percent of the alias's units that are in the experiment from here on; None leaves it.
            reason: One plain sentence for the log.
            numbers: What led to it, for the log.
            stage: The stage that was looked at; None is whichever it is in.

        Raises:
            InvalidInputError: weights don't add up to 100, a new arm has no version, or an old one another.
            NotFoundError: no such experiment or version.
            ConflictError: it isn't running, or is in another stage, nothing would change, or other experiments leave
                too few units.
        """
        check_arms(arms)
        if traffic is not None:
            check_traffic(traffic)
        with self.database.write() as session:
            now = utc_now()
            row = find_open_row(session, name, now)
            lock_alias(session, row.alias)
            if state_of(row, now) != "running":
                raise ConflictError(f"experiment {row.id} is {state_of(row, now)}; weights change while it runs")
            if stage not in (None, row.stage):
                raise ConflictError(f"experiment {row.id} is in stage {row.stage}, not {stage}")
            before = load_arms(session, row.id, row.stage)
            after = next_arms(session, row.alias, before, arms)
            traffic = row.traffic if traffic is None else traffic
            if after == before and traffic == row.traffic:
                raise ConflictError(f"experiment {row.id} has these weights already")
            stretches = find_room(session, row, traffic, now)
            begin_stage(session, row, after, stretches, "change_weights", reason, traffic=traffic, numbers=numbers)
            return to_experiment(session, row, now)

    def set_holdout(self, alias: str, percent: float) -> None:
        """Keep so many percent of an alias's units out of all its experiments, the same ones for as long as it stands.

        Raises:
            InvalidInputError: not from 0 to 50 percent.
            NotFoundError: no such alias.
            ConflictError: an experiment runs on the alias, or is to: units would come to it or leave it in its midst.
        """
        if not 0 <= percent <= _MAX_HOLDOUT:
            raise InvalidInputError(
                f"a holdout is 0 to {_MAX_HOLDOUT:g} percent of the units, found {percent:g}", param="percent"
            )
        with self.database.write() as session:
            alias_row = lock_alias(session, alias)
            if started := started_rows(session, alias, utc_now()):
                raise ConflictError(f"experiment {started[0].id} runs on {alias!r}, or is to; stop it first")
            record_act(session, "set_holdout", alias, before=alias_row.holdout, after=percent)
            alias_row.holdout = percent

    def holdout(self, alias: str) -> float:
        """The percent of an alias's units that no experiment touches.

        Raises:
            NotFoundError: no such alias.
        """
        with self.database.read() as session:
            row = session.get(AliasRow, alias)
            if row is None or not actor_of(session).can_see(alias):
                raise NotFoundError(f"there is no adapter {alias!r}")
            return row.holdout

    def settle(self) -> None:
        """Write down which experiments have ended at their time. That they have ended holds without it."""
        with self.database.write() as session:
            now = utc_now()
            statement = select(ExperimentRow).where(ExperimentRow.state == "running", ExperimentRow.ends_at <= now)
            for row in session.scalars(statement).all():
                settle_row(session, row, now)

    def get(self, name: str) -> Experiment:
        """An experiment by its id, or the newest one of an alias.

        Raises:
            NotFoundError: there is none.
        """
        with self.database.read() as session:
            return to_experiment(session, find_experiment_row(session, name), utc_now())

    def arms_of(self, experiment_id: str, stage: int) -> tuple[Arm, ...]:
        """The arms of one stage; none if there was no such stage.

        Raises:
            NotFoundError: no such experiment.
        """
        with self.database.read() as session:
            return load_arms(session, find_experiment_row(session, experiment_id).id, stage)

    def note_on_stage(self, experiment: Experiment) -> str:
        """What a stage that is not the first means for the verdict, with the number of users of those before it."""
        earlier = (ExposureRow.experiment_id == experiment.id, ExposureRow.stage < experiment.stage)
        with self.database.read() as session:
            num_users = session.scalar(
                select(func.count(ExposureRow.unit.distinct())).where(*earlier, ExposureRow.forced.is_(False))
            )
        return (
            f"The verdict reads stage {experiment.stage} alone: what users did in earlier stages ({num_users:,} users) "
            "takes no part in it; who asks again counts anew. undo gives the weights back, not that."
        )

    def list(
        self, *, state: ExperimentState | None = None, after: str | None = None, limit: int | None = None
    ) -> list[Experiment]:
        """The experiments behind one with a given id, at most `limit`, newest first; all if nothing is given.

        Raises:
            InvalidInputError: `after` is no experiment.
        """
        newest_first = select(ExperimentRow).order_by(ExperimentRow.created_at.desc(), ExperimentRow.id)
        now = utc_now()
        with self.database.read() as session:
            if after is not None:
                newest_first = newest_first.where(_is_behind(_find_place(session, after)))
            seen = (row for row in session.scalars(newest_first) if actor_of(session).can_see(row.alias))
            rows = (row for row in seen if state is None or state_of(row, now) == state)
            return [to_experiment(session, row, now) for row in islice(rows, limit)]

    def decisions(self, name: str, *, after: int = 0, limit: int | None = None) -> Sequence[Decision]:
        """What was done to an experiment and why, the oldest first, behind the decision with an id.

        Raises:
            NotFoundError: no such experiment.
        """
        with self.database.read() as session:
            row = find_experiment_row(session, name)
            return load_decisions(session, row.id, after=after, limit=limit)

    def record_exposure(self, exposure: Exposure, feedback: Sequence[Feedback] = ()) -> None:
        """Write one exposure, and what was reported on it before it ended.

        Once this returns, a kill of this process doesn't lose it.
        """
        with self.database.write() as session:
            add_exposure(session, exposure, feedback)

    def record_feedback(self, feedback: Feedback) -> None:
        """Write an outcome; the same metric for the same response again replaces the value.

        Raises:
            InvalidInputError: the metric is one that is measured anyway, or a share and the value is none.
            ConflictError: the response has feedback by as many metrics as there may be.
            NotFoundError: no response has this id.
            FeedbackTooLateError: the response is older than the window.
        """
        with self.database.write() as session:
            add_feedback(session, feedback, window=self._feedback_window)

    def outcomes(self, experiment_id: str, stage: int) -> dict[str, Sequence[UnitOutcomes]]:
        """By arm, in the order of the arms, what came of each unit in one stage, the earliest exposed first.

        Forced exposures are left out. Every arm of the stage is there, also without units.

        Raises:
            NotFoundError: no such experiment.
        """
        with self.database.read() as session:
            row = find_experiment_row(session, experiment_id)
            found = read_outcomes(session, row.id, stage)
            return {arm.name: found.get(arm.name, []) for arm in load_arms(session, row.id, stage)}


def _pin_arms(session: Session, alias: str, arms: Sequence[tuple[str, str, float]]) -> list[Arm]:
    owned = shift_weights({}, {name: weight for name, _, weight in arms})
    return [Arm(name, *find_pinned(session, alias, version), weight, owned[name]) for name, version, weight in arms]


def _start(session: Session, row: ExperimentRow, alias_row: AliasRow) -> None:
    """Give an experiment its units, from its time on."""
    now = utc_now()
    if row.ends_at is not None and row.ends_at <= now:
        raise ConflictError(f"experiment {row.id} was to end at {row.ends_at:%Y-%m-%d %H:%M} UTC, which has passed")
    check_outsiders(row, alias_row)
    row.starts_at = max(now, row.starts_at or now)
    stretches = find_room(session, row, row.traffic, now)
    row.state, row.stretches = "running", [list(stretch) for stretch in stretches]
    session.flush()
    shares = shares_of(load_arms(session, row.id, row.stage))
    when = "it was started" if row.starts_at == now else f"it is to start at {row.starts_at:%Y-%m-%d %H:%M} UTC"
    numbers = {"arms": shares, "traffic": row.traffic, "config_hash": to_experiment(session, row, now).config_hash}
    record_decision(session, row, "start", when, numbers=numbers)
    record_act(session, "start_experiment", row.id, alias=row.alias, arms=shares)


def _find_place(session: Session, experiment_id: str) -> ExperimentRow:
    row = session.get(ExperimentRow, experiment_id)
    if row is None or not actor_of(session).can_see(row.alias):
        raise unknown_place(experiment_id)
    return row


def _is_behind(row: ExperimentRow) -> ColumnElement[bool]:
    """Whether another row stands behind this one where the newest is the first."""
    is_older = ExperimentRow.created_at < row.created_at
    return is_older | ((ExperimentRow.created_at == row.created_at) & (ExperimentRow.id > row.id))
