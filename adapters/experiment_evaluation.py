"""Reads experiments, writes a verdict down when it changes, and acts on it where the experiment asks for that.

Any number of processes may evaluate: what is written, and what is done, is decided in one transaction that looks at the
experiment again, so that nothing is done twice or on a stage that is over.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.errors import ConflictError, HotswapError, InvalidInputError
from adapters.experiment_report import ExperimentReport, make_report
from adapters.experiment_rows import (
    find_experiment_row,
    load_decisions,
    record_decision,
    settle_row,
    state_of,
    to_experiment,
)
from adapters.exposures import read_outcomes
from adapters.records import Actor, Arm, Experiment
from adapters.registry import Registry, point_alias
from adapters.tables import ExperimentRow, utc_now
from adapters.verdicts import Comparison

__all__ = ["EVALUATOR", "ExperimentEvaluation"]

_log = structlog.get_logger(__name__)
EVALUATOR = Actor("evaluator")
_Act = Literal["promote", "roll_back"]


class ExperimentEvaluation:
    """The verdicts of a registry's experiments, and the acts that follow from them."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def acting_for(self, actor: Actor) -> ExperimentEvaluation:
        """The same on somebody's behalf: experiments on aliases that the actor may not see don't exist."""
        return ExperimentEvaluation(self.registry.acting_for(actor))

    def report(self, name: str) -> ExperimentReport:
        """What came of an experiment so far, named by its id or its alias; writes nothing.

        Raises:
            NotFoundError: there is none.
        """
        with self.registry.database.read() as session:
            return _read(session, find_experiment_row(session, name), utc_now())

    def evaluate_all(self) -> None:
        """Evaluate what runs, and what has ended at its time since the last evaluation.

        An experiment that can't be evaluated, or acted on, is logged and tried again the next time.
        """
        with self.registry.database.read() as session:
            running = list(session.scalars(select(ExperimentRow.id).where(ExperimentRow.state == "running")))
        for experiment_id in running:
            try:
                self.evaluate(experiment_id)
            except HotswapError as error:
                _log.warning("experiment_not_evaluated", experiment=experiment_id, reason=str(error))

    def evaluate(self, experiment_id: str) -> ExperimentReport:
        """Judge an experiment, write the verdict down if it is another than before, and act if that was asked for.

        Raises:
            NotFoundError: there is none.
            IntegrityError: the files of the version to be promoted are damaged; the alias stays where it is.
        """
        report = self.report(experiment_id)
        if (act := _wanted_act(report)) is None:
            with self.registry.database.write() as session:
                if (row := _same_stage(session, report.experiment)) is not None:
                    _note_verdict(session, row, report)
                    settle_row(session, row, utc_now())
            return report
        arm = report.experiment.arms[0] if act == "roll_back" else _arm(report.experiment, report.verdict.arm or "")
        self._conclude(report, act, arm, reason=report.verdict.sentence)
        return report

    def conclude(self, name: str, act: _Act, *, arm: str | None = None, reason: str | None = None) -> Experiment:
        """End an experiment by hand, whatever the verdict is: everybody gets one arm's version.

        Args:
            name: Its id or its alias.
            act: `promote` a treatment, or `roll_back` to the control.
            arm: The treatment to promote; None is the one that the verdict names.
            reason: Why; the verdict's sentence if not given.

        Raises:
            NotFoundError: no such experiment.
            InvalidInputError: no such arm, or the control is to be promoted, or nobody says which arm.
            ConflictError: it does not run any more.
            IntegrityError: the version's files are damaged; the alias stays where it is.
        """
        report = self.report(name)
        experiment = report.experiment
        if act == "roll_back":
            chosen = experiment.arms[0]
        else:
            chosen = _arm(experiment, arm or (report.verdict.arm if report.verdict.kind == "promote" else None) or "")
            if chosen == experiment.arms[0]:
                raise InvalidInputError(
                    f"{chosen.name} is the control: roll back to it instead of promoting it", param="arm"
                )
        if not self._conclude(report, act, chosen, reason=reason or report.verdict.sentence):
            raise ConflictError(f"experiment {experiment.id} does not run any more, or its weights were just changed")
        return self.report(experiment.id).experiment

    def accept_feedback(self, name: str, reason: str) -> None:
        """Let an experiment's arms differ in how often outcomes are known, for the present stage: a person's word.

        Raises:
            NotFoundError: no such experiment.
            ConflictError: it does not run any more.
        """
        with self.registry.database.write() as session:
            row = find_experiment_row(session, name)
            if state_of(row, utc_now()) != "running":
                raise ConflictError(f"experiment {row.id} does not run")
            record_decision(session, row, "accept_feedback", reason)
            record_act(session, "accept_feedback", row.id, alias=row.alias, reason=reason)

    def _conclude(self, report: ExperimentReport, act: _Act, arm: Arm, *, reason: str) -> bool:
        """Point the alias to an arm's version and end the experiment; False if somebody else has ended it."""
        registry, experiment = self.registry, report.experiment
        with registry.store.held():  # nobody removes the files meanwhile
            registry.store.verify(arm.digest)
            with registry.database.write() as session:
                if (row := _same_stage(session, experiment)) is None:
                    return False
                _note_verdict(session, row, report)
                came_from = point_alias(session, experiment.alias, arm.number, "promote" if act == "promote" else "rollback")
                row.state, row.stopped_at = "decided", utc_now()
                moved = {"arm": arm.name, "from_number": came_from, "to_number": arm.number}
                record_decision(session, row, act, reason, numbers=_numbers(report) | moved)
                record_act(session, "decide_experiment", row.id, alias=row.alias, act=act, **moved)
                return True


def _read(session: Session, row: ExperimentRow, now: datetime) -> ExperimentReport:
    experiment = to_experiment(session, row, now)
    outcomes = read_outcomes(session, row.id, row.stage)
    return make_report(experiment, outcomes, now=now, decisions=load_decisions(session, row.id))


def _wanted_act(report: ExperimentReport) -> _Act | None:
    experiment, kind = report.experiment, report.verdict.kind
    if kind == "promote" and experiment.auto_promote:
        return "promote"
    return "roll_back" if kind == "roll_back" and experiment.auto_rollback else None


def _same_stage(session: Session, experiment: Experiment) -> ExperimentRow | None:
    """The experiment's row, if nobody has ended it or changed its weights since it was read."""
    row = session.get_one(ExperimentRow, experiment.id)
    return row if row.state == "running" and row.stage == experiment.stage else None


def _arm(experiment: Experiment, name: str) -> Arm:
    for arm in experiment.arms:
        if arm.name == name:
            return arm
    known = ", ".join(arm.name for arm in experiment.arms[1:])
    raise InvalidInputError(f"say which arm to promote: expected one of {known}, found {name!r}", param="arm")


def _note_verdict(session: Session, row: ExperimentRow, report: ExperimentReport) -> None:
    """Add a decision row if the verdict is another than the last one of this stage; the first is to go on."""
    verdicts = [item for item in load_decisions(session, row.id) if item.action == "verdict" and item.stage == row.stage]
    last = (verdicts[-1].numbers["kind"], verdicts[-1].numbers["arm"]) if verdicts else ("continue", None)
    found = report.verdict
    if last != (found.kind, found.arm):
        record_decision(session, row, "verdict", found.sentence, numbers=_numbers(report))


def _numbers(report: ExperimentReport) -> dict[str, Any]:
    """What a verdict was made of, as plain values."""
    verdict = report.verdict
    return {
        "kind": verdict.kind,
        "arm": verdict.arm,
        "notes": list(verdict.notes),
        "split": asdict(report.split),
        "treatments": [
            {
                "arm": treatment.name,
                "primary": treatment.primary and _plain(treatment.primary),
                "guardrails": [
                    {**_plain(guard.comparison), "margin": guard.margin, "state": guard.state}
                    for guard in treatment.guards
                ],
                "gaps": [_plain(gap) for gap in treatment.gaps],
            }
            for treatment in report.treatments
        ],
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    return asdict(comparison)
