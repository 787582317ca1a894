"""Experiments: the split of an alias between pinned versions, and what came of it.

Creates and stops them, records exposures and feedback, and sums outcomes up per arm. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database, actor_of
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.paging import unknown_place
from adapters.records import Actor, Arm, Experiment, Exposure, Feedback, parse_model_name, version_name
from adapters.statistics import Interval, MeanEstimate, difference_interval, mean_interval
from adapters.tables import (
    AliasRow,
    AliasVersionRow,
    ArmRow,
    ExperimentRow,
    ExposureRow,
    FeedbackRow,
    VersionRow,
    utc_now,
)

__all__ = [
    "ArmReport",
    "ExperimentReport",
    "ExperimentService",
    "MetricReport",
    "find_running",
    "load_arms",
    "parse_arm",
]

_WEIGHT_TOLERANCE = 1e-6
_MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class MetricReport:
    """One metric in one arm; the mean is over units, and the interval is for one look planned in advance."""

    metric: str
    num_outcomes: int
    estimate: MeanEstimate
    difference: Interval | None


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm: its share, what it was exposed to and its outcomes."""

    arm: Arm
    num_exposures: int
    num_units: int
    num_errors: int
    metrics: tuple[MetricReport, ...]


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """An experiment and its arms in the order in which they were given; differences are against the first."""

    experiment: Experiment
    arms: tuple[ArmReport, ...]


class ExperimentService:
    """Experiments, exposures and feedback over one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def acting_for(self, actor: Actor) -> ExperimentService:
        """The same service on somebody's behalf: what the actor may not see does not exist in it."""
        return ExperimentService(self.database.acting_for(actor))

    def create(self, alias: str, arms: list[tuple[str, str, float]], *, salt: str | None = None) -> Experiment:
        """Start splitting an alias between pinned versions.

        Args:
            alias: An existing alias.
            arms: Name, version (`v1`, `legal@v1`, or the beginning of a digest) and weight in percent, two or more;
                weights add up to 100.
            salt: Decides the assignment; random if not given, so that experiments are independent.

        Raises:
            InvalidInputError: fewer than two arms, a name twice, weights that don't add up, or a reward model.
            NotFoundError: no such alias or version.
            ConflictError: an experiment is running on the alias already.
        """
        _check_arms(arms)
        row = ExperimentRow(
            id=f"exp-{secrets.token_hex(6)}",
            alias=alias,
            salt=salt if salt is not None else secrets.token_hex(8),
            state="running",
            created_at=utc_now(),
        )
        try:
            with self.database.write() as session:
                if session.get(AliasRow, alias) is None or not actor_of(session).can_see(alias):
                    raise NotFoundError(f"there is no adapter {alias!r}")
                session.add(row)
                session.flush()
                for position, (name, version, weight) in enumerate(arms):
                    number, digest = _find_pinned(session, alias, version)
                    session.add(
                        ArmRow(
                            experiment_id=row.id,
                            position=position,
                            name=name,
                            number=number,
                            digest=digest,
                            weight=weight,
                        )
                    )
                shares = {name: f"{version}={weight:g}" for name, version, weight in arms}
                record_act(session, "start_experiment", row.id, alias=alias, arms=shares)
        except SqlIntegrityError:
            raise ConflictError(f"an experiment is running on {alias!r} already; stop it first") from None
        return self.get(row.id)

    def stop(self, name: str) -> Experiment:
        """Stop an experiment, named by its id or its alias; the alias answers with the version it points to again."""
        with self.database.write() as session:
            row = _find_row(session, name)
            if row.state == "stopped":
                raise ConflictError(f"experiment {row.id} is stopped already")
            row.state, row.stopped_at = "stopped", utc_now()
            record_act(session, "stop_experiment", row.id, alias=row.alias)
            return _to_experiment(session, row)

    def get(self, name: str) -> Experiment:
        """An experiment by its id, or the newest one of an alias.

        Raises:
            NotFoundError: there is none.
        """
        with self.database.read() as session:
            return _to_experiment(session, _find_row(session, name))

    def list(self, *, after: str | None = None, limit: int | None = None) -> list[Experiment]:
        """The experiments behind one with a given id, at most `limit`, newest first; all if neither is given.

        Raises:
            InvalidInputError: `after` is no experiment.
        """
        newest_first = select(ExperimentRow).order_by(ExperimentRow.created_at.desc(), ExperimentRow.id)
        with self.database.read() as session:
            if after is not None:
                newest_first = newest_first.where(_is_behind(_find_place(session, after)))
            rows = (row for row in session.scalars(newest_first) if actor_of(session).can_see(row.alias))
            return [_to_experiment(session, row) for row in islice(rows, limit)]

    def record_exposure(self, exposure: Exposure) -> None:
        """Write one exposure; once this returns, a kill of this process doesn't lose it."""
        binding = exposure.binding
        with self.database.write() as session:
            session.add(
                ExposureRow(
                    response_id=exposure.response_id,
                    served_at=utc_now(),
                    alias=binding.alias,
                    route=binding.route,
                    number=binding.number,
                    digest=binding.digest,
                    experiment_id=binding.experiment_id,
                    arm=binding.arm,
                    unit=exposure.unit,
                    unit_source=exposure.unit_source,
                    prompt_tokens=exposure.prompt_tokens,
                    completion_tokens=exposure.completion_tokens,
                    ttft_ms=exposure.ttft_ms,
                    total_ms=exposure.total_ms,
                    finish_reason=exposure.finish_reason,
                    error=exposure.error[:_MAX_ERROR_CHARS] if exposure.error else None,
                )
            )

    def record_feedback(self, feedback: Feedback) -> None:
        """Write an outcome; the same metric for the same response again replaces the value.

        Raises:
            NotFoundError: no response has this id.
        """
        with self.database.write() as session:
            exposure = session.get(ExposureRow, feedback.response_id)
            if exposure is None or not actor_of(session).can_see(exposure.alias):
                raise NotFoundError(f"there is no response {feedback.response_id!r}")
            session.merge(
                FeedbackRow(
                    response_id=feedback.response_id,
                    metric=feedback.metric,
                    value=feedback.value,
                    comment=feedback.comment,
                    reported_at=utc_now(),
                )
            )

    def report(self, name: str) -> ExperimentReport:
        """Sum an experiment up per arm; outcomes of one unit are averaged first, since they are not independent."""
        with self.database.read() as session:
            experiment = _to_experiment(session, _find_row(session, name))
            counts = _count_exposures(session, experiment.id)
            outcomes = _unit_outcomes(session, experiment.id)
        control = experiment.arms[0].name
        metrics = sorted({metric for _, metric in outcomes})
        reports = []
        for arm in experiment.arms:
            present = [metric for metric in metrics if outcomes.get((arm.name, metric))]
            rows = tuple(_report_metric(outcomes, metric, arm.name, control) for metric in present)
            reports.append(ArmReport(arm, *counts.get(arm.name, (0, 0, 0)), metrics=rows))
        return ExperimentReport(experiment, tuple(reports))


def parse_arm(text: str) -> tuple[str, str, float]:
    """Parse `A@v1=50`, or `A@legal@v1=50`, into name, version and weight in percent.

    Raises:
        InvalidInputError: the text has another shape.
    """
    head, equals, weight = text.partition("=")
    name, at, version = head.partition("@")
    try:
        number = float(weight)
    except ValueError:
        number = float("nan")
    if not (equals and at and name and version) or not 0 < number <= 100:
        raise InvalidInputError(
            f"{text[:80]!r} is not an arm: expected NAME@VERSION=PERCENT, such as A@v1=50", param="arms"
        )
    return name, version, number


def find_running(session: Session, alias: str) -> ExperimentRow | None:
    """The experiment that splits an alias at present, if any."""
    statement = select(ExperimentRow).where(ExperimentRow.alias == alias, ExperimentRow.state == "running")
    return session.scalar(statement)


def load_arms(session: Session, experiment_id: str) -> tuple[Arm, ...]:
    """An experiment's arms in the order in which they were given."""
    statement = select(ArmRow).where(ArmRow.experiment_id == experiment_id).order_by(ArmRow.position)
    return tuple(Arm(row.name, row.number, row.digest, row.weight) for row in session.scalars(statement))


def _check_arms(arms: list[tuple[str, str, float]]) -> None:
    names = [name for name, _, _ in arms]
    if len(arms) < 2 or len(set(names)) != len(names):
        raise InvalidInputError(f"expected two or more arms with different names, found {names}", param="arms")
    if any(len(name) > 32 or not name.isascii() or not name.isalnum() for name in names):
        raise InvalidInputError(f"arm names are 1 to 32 letters and digits, found {names}", param="arms")
    if not all(0 < weight <= 100 for _, _, weight in arms):  # false for NaN too
        found = [weight for *_, weight in arms]
        raise InvalidInputError(f"weights are above 0 and at most 100, found {found}", param="arms")
    total = sum(weight for _, _, weight in arms)
    if abs(total - 100) > _WEIGHT_TOLERANCE:
        raise InvalidInputError(f"the arms' weights must add up to 100, found {total:g}", param="arms")


def _find_pinned(session: Session, alias: str, version: str) -> tuple[int, str]:
    name = parse_model_name(version_name(alias, version))
    statement = select(AliasVersionRow).where(AliasVersionRow.alias == alias)
    for row in session.scalars(statement):
        if row.number == name.number or (name.digest_prefix and row.digest.startswith(name.digest_prefix)):
            _check_is_chat(session, f"{alias}@v{row.number}", row.digest)
            return row.number, row.digest
    raise NotFoundError(f"{alias!r} has no version {version!r}")


def _check_is_chat(session: Session, label: str, digest: str) -> None:
    if session.get_one(VersionRow, digest).kind == "reward":
        raise InvalidInputError(f"{label} is a reward model, which answers nobody: it can't be an arm", param="arms")


def _find_place(session: Session, experiment_id: str) -> ExperimentRow:
    row = session.get(ExperimentRow, experiment_id)
    if row is None or not actor_of(session).can_see(row.alias):
        raise unknown_place(experiment_id)
    return row


def _is_behind(row: ExperimentRow) -> ColumnElement[bool]:
    """Whether another row stands behind this one where the newest is the first."""
    is_older = ExperimentRow.created_at < row.created_at
    return is_older | ((ExperimentRow.created_at == row.created_at) & (ExperimentRow.id > row.id))


def _find_row(session: Session, name: str) -> ExperimentRow:
    row = session.get(ExperimentRow, name)
    if row is None:
        statement = select(ExperimentRow).where(ExperimentRow.alias == name).order_by(ExperimentRow.created_at.desc())
        row = session.scalars(statement.limit(1)).first()
    if row is None or not actor_of(session).can_see(row.alias):
        raise NotFoundError(f"there is no experiment {name!r}: expected an id or an alias that has one")
    return row


def _to_experiment(session: Session, row: ExperimentRow) -> Experiment:
    assert row.state in ("running", "stopped")
    return Experiment(
        id=row.id,
        alias=row.alias,
        salt=row.salt,
        arms=load_arms(session, row.id),
        state="running" if row.state == "running" else "stopped",
        created_at=row.created_at,
        stopped_at=row.stopped_at,
    )


def _count_exposures(session: Session, experiment_id: str) -> dict[str, tuple[int, int, int]]:
    statement = (
        select(
            ExposureRow.arm,
            func.count(),
            func.count(ExposureRow.unit.distinct()),
            func.count(ExposureRow.error),
        )
        .where(ExposureRow.experiment_id == experiment_id)
        .group_by(ExposureRow.arm)
    )
    return {arm or "": (total, units, errors) for arm, total, units, errors in session.execute(statement)}


def _unit_outcomes(session: Session, experiment_id: str) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """By (arm, metric): each unit's mean outcome and how many outcomes it is the mean of."""
    statement = (
        select(ExposureRow.arm, FeedbackRow.metric, func.avg(FeedbackRow.value), func.count())
        .join(FeedbackRow, FeedbackRow.response_id == ExposureRow.response_id)
        .where(ExposureRow.experiment_id == experiment_id)
        .group_by(ExposureRow.arm, FeedbackRow.metric, ExposureRow.unit)
        .order_by(ExposureRow.unit)
    )
    outcomes: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for arm, metric, mean, count in session.execute(statement):
        outcomes[(arm or "", metric)].append((float(mean), count))
    return dict(outcomes)


def _report_metric(
    outcomes: dict[tuple[str, str], list[tuple[float, int]]], metric: str, arm: str, control: str
) -> MetricReport:
    rows = outcomes[(arm, metric)]
    values = [mean for mean, _ in rows]
    reference = [mean for mean, _ in outcomes.get((control, metric), [])]
    difference = None if arm == control else difference_interval(values, reference)
    return MetricReport(metric, sum(count for _, count in rows), mean_interval(values), difference)
