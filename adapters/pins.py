"""Pins: which versions every server keeps in a slot. The table is what is wanted; servers follow it.

A pin names an alias, and then follows it from version to version, or one version. Knows neither slots nor HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import case, select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database
from adapters.errors import ConflictError, InvalidInputError
from adapters.records import Actor, NumberedVersion, parse_model_name
from adapters.registry import find_version
from adapters.tables import AliasRow, AliasVersionRow, PinRow, utc_now

__all__ = ["PinService"]

_FOLLOWS_ALIAS = 0


class PinService:
    """Pins over one database; safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def acting_for(self, actor: Actor) -> PinService:
        """The same service on somebody's behalf: aliases that the actor may not see can't be pinned or unpinned."""
        return PinService(self.database.acting_for(actor))

    def pin(self, name: str, *, max_versions: int, always: Iterable[str] = ()) -> None:
        """Want a version in a slot, from here on and after every restart; pinning twice is fine.

        Args:
            name: An alias, whose pin follows it, or one version (`legal@v2`, or the beginning of its digest).
            max_versions: How many versions may be pinned, those of `always` among them.
            always: Aliases that are pinned whatever the table says.

        Raises:
            NotFoundError: no such alias or version.
            InvalidInputError: it is a reward model.
            ConflictError: it would be one version too many; nothing was changed.
        """
        with self.database.write() as session:
            meant, number = _parse(session, name)
            if meant.version.kind == "reward":
                raise InvalidInputError(f"{meant.label} is a reward model, which answers nobody: it needs no slot")
            if session.get(PinRow, (meant.alias, number)) is None:
                record_act(session, "pin", name)
                session.add(PinRow(alias=meant.alias, number=number, pinned_at=utc_now()))
                session.flush()
            if (found := len(_digests(session, always))) > max_versions:
                raise ConflictError(
                    f"{found} versions would be pinned; at most {max_versions} can be: one slot is for all others"
                )

    def unpin(self, name: str) -> None:
        """Undo a pin of just this name; unpinning what is not pinned is fine.

        Raises:
            NotFoundError: no such alias or version.
        """
        with self.database.write() as session:
            meant, number = _parse(session, name)
            if row := session.get(PinRow, (meant.alias, number)):
                record_act(session, "unpin", name)
                session.delete(row)

    def names(self) -> frozenset[str]:
        """Every pin as it was given: `legal` follows the alias, `legal@v2` is one version."""
        with self.database.read() as session:
            return frozenset(
                row.alias if row.number == _FOLLOWS_ALIAS else f"{row.alias}@v{row.number}"
                for row in session.scalars(select(PinRow))
            )

    def digests(self, always: Iterable[str] = ()) -> tuple[str, ...]:
        """The versions that are wanted in slots as of now, each once: those of `always` first, then the oldest pins."""
        with self.database.read() as session:
            return _digests(session, always)


def _parse(session: Session, name: str) -> tuple[NumberedVersion, int]:
    """The version that is meant now, and the number of its pin."""
    parsed = parse_model_name(name)
    found = find_version(session, parsed)
    follows = parsed.number is None and parsed.digest_prefix is None
    return found, _FOLLOWS_ALIAS if follows else found.number


def _digests(session: Session, always: Iterable[str]) -> tuple[str, ...]:
    names = tuple(always)
    points_to = (AliasVersionRow.alias == AliasRow.name) & (AliasVersionRow.number == AliasRow.number)
    statement = select(AliasRow.name, AliasVersionRow.digest).join(AliasVersionRow, points_to)
    current = dict(session.execute(statement.where(AliasRow.name.in_(names))).all())
    wanted_number = case((PinRow.number == _FOLLOWS_ALIAS, AliasRow.number), else_=PinRow.number)
    pinned = session.scalars(
        select(AliasVersionRow.digest)
        .select_from(PinRow)
        .join(AliasRow, AliasRow.name == PinRow.alias)
        .join(AliasVersionRow, (AliasVersionRow.alias == PinRow.alias) & (AliasVersionRow.number == wanted_number))
        .order_by(PinRow.pinned_at, PinRow.alias, PinRow.number)
    )
    return tuple(dict.fromkeys([*(current[name] for name in names if name in current), *pinned]))
