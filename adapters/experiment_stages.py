"""What a stage of an experiment has: users that are free on its alias, versions, and shares that change hands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.assignment import allot_traffic, overlaps, shift_weights, unit_position
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.experiment_rows import state_of, stretches_of
from adapters.records import Arm, Stretch, parse_model_name, version_name
from adapters.tables import AliasRow, AliasVersionRow, ExperimentRow, VersionRow

__all__ = ["check_outsiders", "find_pinned", "find_room", "next_arms", "started_rows"]


def check_outsiders(row: ExperimentRow, alias_row: AliasRow) -> None:
    """Refuse to start what leaves users outside on an alias that has no version for them.

    Raises:
        ConflictError: it points to none.
    """
    if alias_row.number is None and (row.traffic < 100 or alias_row.holdout > 0):
        raise ConflictError(
            f"{row.alias!r} points to no version, which users outside of the experiment need; promote one first"
        )


def find_room(
    session: Session, row: ExperimentRow, percent: float, now: datetime, *, former: Sequence[Stretch] = ()
) -> tuple[Stretch, ...]:
    """The experiment's positions on its alias for a share of its traffic: those that it has, and more or fewer.

    No other experiment has them at the same time. The first one begins where the salt says. Those that it had
    before, `former`, are taken if nobody has them by now.

    Raises:
        ConflictError: the others leave too few.
    """
    others = [
        other for other in started_rows(session, row.alias, now) if other.id != row.id and _overlap_in_time(other, row)
    ]
    taken = [stretch for other in others for stretch in stretches_of(other.stretches)]
    if former and not overlaps(former, taken):
        return tuple(former)
    own = stretches_of(row.stretches)
    if overlaps(own, taken):  # it was stopped, and others have them by now
        own = ()
    start = own[-1][1] % 100 if own else unit_position(row.salt, "start")
    found = allot_traffic(own, taken, percent, start=start)
    if found is None:
        listed = ", ".join(f"{other.id} with {other.traffic:g} %" for other in others)
        raise ConflictError(
            f"running on {row.alias!r} already: {listed}; no {percent:g} % of its users are left for another "
            "experiment; stop one first, or take less traffic"
        )
    return found


def started_rows(session: Session, alias: str, now: datetime) -> list[ExperimentRow]:
    """The alias's experiments that run, or were ordered to start at a time ahead."""
    statement = select(ExperimentRow).where(ExperimentRow.alias == alias, ExperimentRow.state == "running")
    return [row for row in session.scalars(statement.order_by(ExperimentRow.id)) if state_of(row, now) != "stopped"]


def _overlap_in_time(first: ExperimentRow, second: ExperimentRow) -> bool:
    assert first.starts_at is not None, "a started experiment has a start"
    assert second.starts_at is not None, "a started experiment has a start"
    return not (
        (first.ends_at is not None and first.ends_at <= second.starts_at)
        or (second.ends_at is not None and second.ends_at <= first.starts_at)
    )


def next_arms(
    session: Session, alias: str, before: Sequence[Arm], wanted: Sequence[tuple[str, str | None, float]]
) -> tuple[Arm, ...]:
    """The arms of a new stage, with stretches that move as few units as possible."""
    known = {arm.name: arm for arm in before}
    arms = [_next_arm(session, alias, known.get(name), name, version, weight) for name, version, weight in wanted]
    if arms[0].name != before[0].name:
        raise InvalidInputError(
            f"the first arm is the control, and stays: expected {before[0].name!r}, found {arms[0].name!r}",
            param="arms",
        )
    owned = shift_weights({arm.name: arm.stretches for arm in before}, {arm.name: arm.weight for arm in arms})
    return tuple(replace(arm, stretches=owned[arm.name]) for arm in arms)


def _next_arm(session: Session, alias: str, known: Arm | None, name: str, version: str | None, weight: float) -> Arm:
    if version is None and known is None:
        raise InvalidInputError(
            f"there is no arm {name!r}; a new one needs a version, such as {name}@v3={weight:g}", param="arms"
        )
    if version is None:
        assert known is not None, "checked above"
        return replace(known, weight=weight)
    number, digest = find_pinned(session, alias, version)
    if known is not None and known.digest != digest:
        raise InvalidInputError(
            f"arm {name!r} is {alias}@v{known.number} and stays so; give {alias}@v{number} an arm of its own",
            param="arms",
        )
    return Arm(name, number, digest, weight)


def find_pinned(session: Session, alias: str, version: str) -> tuple[int, str]:
    """The number and the digest of a version that can be an arm.

    Raises:
        NotFoundError: there is none.
        InvalidInputError: it is a reward model.
    """
    name = parse_model_name(version_name(alias, version))
    statement = select(AliasVersionRow).where(AliasVersionRow.alias == alias).order_by(AliasVersionRow.number)
    rows = list(session.scalars(statement))
    for row in rows:
        if row.number == name.number or (name.digest_prefix and row.digest.startswith(name.digest_prefix)):
            _check_is_chat(session, f"{alias}@v{row.number}", row.digest)
            return row.number, row.digest
    known = ", ".join(f"v{row.number}" for row in rows) or "none"
    raise NotFoundError(f"{alias!r} has no version {version!r}; it has {known}")


def _check_is_chat(session: Session, label: str, digest: str) -> None:
    if session.get_one(VersionRow, digest).kind == "reward":
        raise InvalidInputError(f"{label} is a reward model, which answers nobody: it can't be an arm", param="arms")
