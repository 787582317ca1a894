"""Reads experiments, writes a verdict down when it changes, and acts on it where the experiment asks for that.

Any number of processes may evaluate: each write looks at the experiment again in its own transaction, so that nothing
is done twice, or on a stage that is over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.errors import ConflictError, HotswapError, InvalidInputError
from adapters.evidence import Verdict
from adapters.experiment_acts import conclude
from adapters.experiment_report import ExperimentReport, better_shares, make_report
from adapters.experiment_rows import (
    find_open_row,
    load_decisions,
    load_plan,
    record_decision,
    settle_row,
    state_of,
    to_experiment,
)
from adapters.experiments import ExperimentService
from adapters.exposures import FEEDBACK_WINDOW
from adapters.outcomes import LONGEST_MS, read_history, read_outcomes
from adapters.records import Actor, Experiment
from adapters.registry import Registry
from adapters.settled_values import Outcomes, plan_sample
from adapters.tables import DecisionRow, ExperimentRow, ExposureRow, FeedbackRow, utc_now

__all__ = ["EVALUATOR", "REALLOCATION_EVERY", "ExperimentEvaluation"]

_log = structlog.get_logger(__name__)
EVALUATOR = Actor("evaluator")
REALLOCATION_EVERY = timedelta(days=1)
_Act = Literal["promote", "roll_back"]
_LEAST_SHIFT = 5.0  # percent: less is not worth a stage


_Reports = tuple[int, float | None, datetime | None]  # number, sum of the values, the latest


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an experiment had at a look; where two are equal, reading it again would say the same."""

    state: str
    stage: int
    hour: int
    num_decisions: int
    num_exposures: int
    num_closed: int
    reports: _Reports


class ExperimentEvaluation:
    """The verdicts of a registry's experiments, and the acts that follow from them."""

    def __init__(self, registry: Registry, *, feedback_window: timedelta = FEEDBACK_WINDOW) -> None:
        self.registry = registry
        self._feedback_window = feedback_window
        self._seen: dict[str, _Seen] = {}  # by experiment, what there was at its last evaluation by `evaluate_all`

    def acting_for(self, actor: Actor) -> ExperimentEvaluation:
        """The same on somebody's behalf: experiments on aliases that the actor may not see don't exist."""
        return ExperimentEvaluation(self.registry.acting_for(actor), feedback_window=self._feedback_window)

    def report(self, name: str) -> ExperimentReport:
        """What came of an experiment so far, named by its id or its alias; writes nothing.

        Once it was decided its verdict is the one that it had then.

        Raises:
            NotFoundError: there is none.
            ConflictError: the alias has several that run or are drafts.
        """
        return _as_decided(self._report(name, in_full=True))

    def evaluate_all(self) -> None:
        """Evaluate what runs, and what has ended at its time since the last evaluation.

        An experiment that can't be evaluated, or acted on, is logged and tried again the next time. Whatever is wrong
        with it, the others are evaluated: one of them may have a guardrail that is broken. One that has nothing new
        since this object's last evaluation is not read again: that takes more than a second for 100,000 requests.
        """
        with self.registry.database.read() as session:
            statement = select(ExperimentRow.id).where(ExperimentRow.state == "running")
            running = list(session.scalars(statement.order_by(ExperimentRow.created_at, ExperimentRow.id)))
            reports = _count_reports(session) if running else (0, None, None)
        self._seen = {name: seen for name, seen in self._seen.items() if name in running}
        for experiment_id in running:
            try:
                self._evaluate_if_new(experiment_id, reports)
            except HotswapError as error:
                _log.warning("experiment_not_evaluated", experiment=experiment_id, reason=str(error))
            except Exception:  # the boundary between experiments: numbers of one must not stop the watch over all
                _log.exception("experiment_not_evaluated", experiment=experiment_id)

    def evaluate(self, experiment_id: str) -> None:
        """Judge an experiment, write the verdict down if it is another than before, and act if that was asked for.

        One that has ended at its time is judged and acted on like one that runs, and then its end is written down: what
        came in the last moments, or while no process was there to look, counts. Should this process die before, the
        next evaluation does it. A fixed sample whose units were there before the end is waited for: its end is written
        once it is judged.

        Raises:
            NotFoundError: there is none.
            ConflictError: somebody ended it, or changed its weights, at the same time; nothing was done.
            IntegrityError: the files of the version to be promoted are damaged; the alias stays where it is.
        """
        report = self._report(experiment_id, in_full=False)
        experiment, verdict = report.experiment, report.verdict
        with self.registry.database.write() as session:
            row = session.get_one(ExperimentRow, experiment.id)
            if row.state != "running" or row.stage != experiment.stage:
                return  # others were faster
            _note_verdict(session, row, report)
        try:
            if (act := _wanted_act(report)) is not None:
                self._act(report, act, verdict.arm, verdict.sentence)
            elif experiment.state == "running" and experiment.allocation == "thompson":
                self._reallocate(report)
        except ConflictError as error:
            if experiment.state == "running":
                raise
            _log.warning("experiment_not_decided", experiment=experiment.id, reason=str(error))
        if experiment.state == "stopped" and not report.is_closing:
            with self.registry.database.write() as session:
                settle_row(session, session.get_one(ExperimentRow, experiment.id), utc_now())

    def _evaluate_if_new(self, experiment_id: str, reports: _Reports) -> None:
        """The mark is made before the reading: what comes between them is read twice rather than never."""
        with self.registry.database.read() as session:
            seen = _look(session, experiment_id, utc_now(), reports, self._feedback_window)
        if seen is not None and seen == self._seen.get(experiment_id):
            return
        self.evaluate(experiment_id)
        if seen is not None:
            self._seen[experiment_id] = seen

    def promote(self, name: str, arm: str | None = None, *, reason: str | None = None) -> Experiment:
        """End an experiment by hand for the good of a treatment, whatever the verdict: everybody gets its version.

        It may have been stopped, or have ended at its time, before.

        Args:
            name: The experiment's id, or its alias.
            arm: The treatment; None is the one that the verdict promotes.
            reason: Why, for the log; None is the verdict's sentence.

        Raises:
            NotFoundError: no such experiment.
            InvalidInputError: no arm is given and the verdict promotes none, or the control is given.
            ConflictError: it was decided or never ran, has no such arm, or others run on the alias; or
                the alias has several experiments.
            IntegrityError: the version's files are damaged; the alias stays where it is.
        """
        report = self._report(name, in_full=False)
        verdict, control = report.verdict, report.experiment.arms[0].name
        arm = arm or (verdict.arm if verdict.kind == "promote" else None)
        if arm is None:
            others = ", ".join(candidate.name for candidate in report.experiment.arms[1:])
            raise InvalidInputError(f"the verdict promotes no arm; say which of {others} to promote", param="arm")
        if arm == control:
            raise InvalidInputError(f"{arm} is the control; roll back to it instead", param="arm")
        return self._act(report, "promote", arm, reason or verdict.sentence, by_hand=True)

    def roll_back(self, name: str, *, reason: str | None = None) -> Experiment:
        """End an experiment by hand, whatever the verdict: nobody gets a treatment's version from here on.

        It may have been stopped, or have ended at its time, before. An alias that points to none of the treatments
        stays where it is.

        Raises:
            NotFoundError: no such experiment.
            ConflictError: it was decided or never ran, or the alias has several.
            IntegrityError: the version's files are damaged; the alias stays where it is.
        """
        report = self._report(name, in_full=False)
        return self._act(report, "roll_back", None, reason or report.verdict.sentence, by_hand=True)

    def accept_feedback(self, name: str, reason: str) -> Experiment:
        """Let an experiment's arms differ in how often outcomes are known, for the present stage: a person's word.

        Raises:
            NotFoundError: no such experiment.
            ConflictError: it does not run any more, or the alias has several.
        """
        with self.registry.database.write() as session:
            now = utc_now()
            row = _find_running(session, name, now)
            record_decision(session, row, "accept_feedback", reason)
            record_act(session, "accept_feedback", row.id, alias=row.alias, reason=reason)
            return to_experiment(session, row, now)

    def accept_guardrail(self, name: str, metric: str, reason: str) -> Experiment:
        """No longer wait for a guardrail to be shown to hold, for the present stage: a person's word.

        It holds no promotion back any more. Should it be shown to be breached, that counts as before.

        Raises:
            NotFoundError: no such experiment.
            InvalidInputError: it has no guardrail of this metric.
            ConflictError: it does not run any more, or the alias has several.
        """
        with self.registry.database.write() as session:
            now = utc_now()
            row = _find_running(session, name, now)
            guarded = [guardrail.metric for guardrail in load_plan(session, row.id).guardrails]
            if metric not in guarded:
                listed = ", ".join(guarded) or "none"
                raise InvalidInputError(
                    f"experiment {row.id} has no guardrail {metric!r}; it has {listed}", param="guardrail"
                )
            record_decision(session, row, "accept_guardrail", reason, numbers={"metric": metric})
            record_act(session, "accept_guardrail", row.id, alias=row.alias, metric=metric, reason=reason)
            return to_experiment(session, row, now)

    def accept_split(self, name: str, reason: str) -> Experiment:
        """Take the arms for comparable though users were not split as was meant: a person's word on what is known.

        It holds for the stages in which that was found. Should the check fire in a later one, it is told again.

        Raises:
            NotFoundError: no such experiment.
            ConflictError: it does not run any more, was changed at the same time, or its users are split as was meant;
                or the alias has several experiments.
        """
        report = self._report(name, in_full=False)
        with self.registry.database.write() as session:
            now = utc_now()
            row = find_open_row(session, report.experiment.id, now)
            if state_of(row, now) != "running":
                raise ConflictError(f"experiment {row.id} is {state_of(row, now)}, not running")
            if row.stage != report.experiment.stage:
                raise ConflictError(f"experiment {row.id} was changed by somebody else at the same time")
            if not report.split.fired:
                raise ConflictError(f"the users of experiment {row.id} are split as was meant; nothing to accept")
            record_decision(session, row, "accept_split", reason, numbers={"stages": list(report.split.stages)})
            record_act(session, "accept_split", row.id, alias=row.alias, reason=reason)
            return to_experiment(session, row, now)

    def _act(
        self, report: ExperimentReport, act: _Act, arm: str | None, reason: str, *, by_hand: bool = False
    ) -> Experiment:
        """In one transaction that looks again at the experiment, by itself also at its stage: nothing is done twice."""
        experiment = report.experiment
        chosen = experiment.arms[0].name if act == "roll_back" else arm
        assert chosen is not None  # a promotion names its arm
        return conclude(
            self.registry,
            experiment.id,
            chosen,
            action=act,
            reason=reason,
            stage=None if by_hand else experiment.stage,
            numbers=_numbers(report),
        )

    def _reallocate(self, report: ExperimentReport) -> None:
        """Let the weights follow the better arms, once a day: days differ, and a stage takes whole ones."""
        experiment = report.experiment
        # What was undone is a stage of its own only where it took one: an acceptance that is taken back does not.
        began = max(item.made_at for item in report.decisions if item.action == "start" or "from_stage" in item.numbers)
        if utc_now() - began < REALLOCATION_EVERY:
            return
        with self.registry.database.read() as session:
            outcomes = read_outcomes(session, experiment.id, experiment.stage)
        shares = better_shares(experiment, outcomes, now=utc_now(), window=self._feedback_window)
        if max(abs(shares[arm.name] - arm.weight) for arm in experiment.arms) < _LEAST_SHIFT:
            return
        ExperimentService(self.registry.database).change_weights(
            experiment.id,
            [(arm.name, None, shares[arm.name]) for arm in experiment.arms],
            reason="weights follow the probability that an arm is the best",
            numbers={"shares": shares},
            stage=experiment.stage,
        )

    def _report(self, name: str, *, in_full: bool) -> ExperimentReport:
        with self.registry.database.read() as session:
            now = utc_now()
            row = find_open_row(session, name, now)
            experiment = to_experiment(session, row, now)
            outcomes = read_outcomes(session, row.id, row.stage)
            history = read_history(session, experiment) if self._is_judged(experiment, outcomes, now) else []
            decisions = load_decisions(session, row.id)
        return make_report(
            experiment,
            outcomes,
            now=now,
            window=self._feedback_window,
            decisions=decisions,
            history=history,
            in_full=in_full,
        )

    def _is_judged(self, experiment: Experiment, outcomes: Outcomes, now: datetime) -> bool:
        """Whether it has a fixed sample that is closed: then, and only then, what its users did before is needed."""
        if experiment.analysis != "fixed" or experiment.metric is None or experiment.planned_units is None:
            return False
        sample = plan_sample(outcomes, experiment.planned_units, self._feedback_window)
        return sample is not None and sample.closes_at <= now


def _find_running(session: Session, name: str, now: datetime) -> ExperimentRow:
    """The experiment that goes by a name.

    Raises:
        ConflictError: it does not run any more.
    """
    row = find_open_row(session, name, now)
    if state_of(row, now) != "running":
        raise ConflictError(f"experiment {row.id} is {state_of(row, now)}, not running")
    return row


def _look(session: Session, experiment_id: str, now: datetime, reports: _Reports, window: timedelta) -> _Seen | None:
    """By what it shows whether an experiment has anything new; None if weights may follow its arms by time alone.

    Counts over an index, and what is known of all reports together, which take a small part of the time that reading
    takes. What they don't show is read within the hour: two replaced reports that leave the sum as it was.
    """
    row = session.get(ExperimentRow, experiment_id)
    if row is None or row.plan.get("allocation") == "thompson":
        return None
    of_stage = ExposureRow.experiment_id == row.id, ExposureRow.stage == row.stage
    return _Seen(
        state=state_of(row, now),
        stage=row.stage,
        hour=int(now.timestamp()) // 3600,
        num_decisions=session.scalar(select(func.count()).where(DecisionRow.experiment_id == row.id)) or 0,
        num_exposures=session.scalar(select(func.count()).where(*of_stage)) or 0,
        num_closed=_count_closed(session, row, now - window),
        reports=reports,
    )


def _count_closed(session: Session, row: ExperimentRow, until: datetime) -> int:
    """Of how many answers no feedback is taken any more; 0 where that changes nothing: it reads more than an index.

    By it alone a `feedback_rate` comes to be known, and a fixed sample is closed.
    """
    plan = load_plan(session, row.id)
    names = {guardrail.metric for guardrail in plan.guardrails} | ({plan.metric.name} if plan.metric else set())
    if "feedback_rate" not in names and plan.analysis != "fixed":
        return 0
    of_stage = ExposureRow.experiment_id == row.id, ExposureRow.stage == row.stage
    # What comes of an answer is dated by its end: counted by its beginning before, the value would not be there yet.
    longest_ms = min(session.scalar(select(func.max(ExposureRow.total_ms)).where(*of_stage)) or 0, LONGEST_MS)
    closed = select(func.count()).where(*of_stage, ExposureRow.served_at <= until - timedelta(milliseconds=longest_ms))
    return session.scalar(closed) or 0


def _count_reports(session: Session) -> _Reports:
    """What tells whether anything was reported, on whatever answer: finding out on which takes far longer."""
    counted = select(func.count(), func.sum(FeedbackRow.value), func.max(FeedbackRow.reported_at))
    number, total, latest = session.execute(counted).one()
    return number, total, latest


def _wanted_act(report: ExperimentReport) -> _Act | None:
    experiment, kind = report.experiment, report.verdict.kind
    if kind == "promote" and experiment.auto_promote:
        return "promote"
    return "roll_back" if experiment.auto_rollback and _has_breach(report) else None


def _has_breach(report: ExperimentReport) -> bool:
    """Whether a guardrail is broken. A loss in the primary metric alone is left to a person."""
    return any(guard.state == "breached" for treatment in report.treatments for guard in treatment.guards)


def _as_decided(report: ExperimentReport) -> ExperimentReport:
    """A report whose verdict is that of the decision, if there was one: what users report later doesn't rewrite it."""
    ends = [item for item in report.decisions if item.action in ("promote", "roll_back") and "kind" in item.numbers]
    if report.experiment.state not in ("decided", "stopped") or not ends:
        return report
    numbers, today = ends[-1].numbers, report.verdict
    made_at = f"{ends[-1].made_at:%Y-%m-%d %H:%M} UTC"
    notes = [*numbers["notes"], f"This was the verdict of {made_at}; the numbers below are today's."]
    if (today.kind, today.arm) != (numbers["kind"], numbers["arm"]) and _has_more(report, numbers):
        notes.append(f"With what has come since then it would be {today.kind}: {today.sentence}")
    is_decided = report.experiment.state == "decided"
    step = "Nothing more; undo takes the decision back." if is_decided else "Nothing more; the decision was taken back."
    verdict = Verdict(numbers["kind"], numbers["arm"], numbers["sentence"], tuple(notes), step)
    return replace(report, verdict=verdict)


def _has_more(report: ExperimentReport, numbers: Mapping[str, Any]) -> bool:
    """Whether anything has come since a decision with these numbers: its end alone makes another verdict of them."""
    found = json.loads(json.dumps(_numbers(report)))  # as they are stored
    return any(found[name] != numbers[name] for name in ("split", "treatments"))


def _note_verdict(session: Session, row: ExperimentRow, report: ExperimentReport) -> None:
    """Add a decision row if the verdict is another than the last one of this stage; the first is to go on."""
    verdicts = [
        item for item in load_decisions(session, row.id) if item.action == "verdict" and item.stage == row.stage
    ]
    last = _gist(verdicts[-1].numbers) if verdicts else ("continue", None, ())
    numbers = _numbers(report)
    if last != _gist(numbers):
        record_decision(session, row, "verdict", report.verdict.sentence, numbers=numbers)


def _gist(numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what two verdicts are told apart; the numbers behind them are others at every look."""
    return numbers["kind"], numbers["arm"], tuple(numbers["split"]["stages"])


def _numbers(report: ExperimentReport) -> dict[str, Any]:
    """What a verdict was made of, as plain values."""
    verdict = report.verdict
    return {
        "kind": verdict.kind,
        "arm": verdict.arm,
        "sentence": verdict.sentence,
        "notes": list(verdict.notes),
        "split": asdict(report.split),
        "treatments": [
            {
                "arm": treatment.name,
                "primary": treatment.primary and asdict(treatment.primary),
                "guardrails": [
                    {**asdict(guard.comparison), "margin": guard.margin, "state": guard.state}
                    for guard in treatment.guards
                ],
                "gaps": [asdict(gap) for gap in treatment.gaps],
                "feedback": treatment.feedback and asdict(treatment.feedback),
            }
            for treatment in report.treatments
        ],
    }
