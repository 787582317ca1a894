"""Keeps the engine's pins as the registry wants them: aliases move, workers restart, other processes pin.

The worker holds no database; the API process tells it what changed (docs/decisions/0009).
"""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapters.errors import ConflictError, DatabaseBusyError
from adapters.pins import PinService
from adapters.records import Actor
from server.engine_client import EngineClient

__all__ = ["PinKeeper"]

_log = structlog.get_logger(__name__)
_CHECK_EVERY_S = 1.0


class PinKeeper:
    """Reads which versions are wanted in slots, and tells the engine when that is another list than it knows.

    Args:
        service: The pins in the database.
        engine: Where to tell it.
        always: Aliases that the settings pin.
        max_versions: How many versions may be pinned.
    """

    def __init__(
        self, service: PinService, engine: EngineClient, *, always: tuple[str, ...], max_versions: int
    ) -> None:
        self._service = service
        self._engine = engine
        self._always = always
        self._max_versions = max_versions
        self._told: tuple[str, tuple[str, ...]] | None = None
        self._lock = asyncio.Lock()  # an older list must not be sent after a newer one

    async def pin(self, name: str, actor: Actor) -> None:
        """Pin an alias or a version on somebody's behalf, in the database and then in the engine.

        Raises:
            NotFoundError: no such alias or version.
            ConflictError: too many are pinned.
        """
        await asyncio.to_thread(
            self._service.acting_for(actor).pin, name, max_versions=self._max_versions, always=self._always
        )
        await self.reconcile()

    async def unpin(self, name: str, actor: Actor) -> None:
        """Undo that.

        Raises:
            NotFoundError: no such alias or version.
            ConflictError: the server's settings pin the alias.
        """
        if name in self._always and actor.can_see(name):
            raise ConflictError(f"{name!r} is pinned by the server's setting serve.pinned; take it out there")
        await asyncio.to_thread(self._service.acting_for(actor).unpin, name)
        await self.reconcile()

    def names(self) -> frozenset[str]:
        """What is pinned: `legal` follows the alias, `legal@v2` is one version. Reads the database."""
        return self._service.names() | {*self._always}

    def digests(self) -> tuple[str, ...]:
        """The versions that are wanted in slots as of now. Reads the database."""
        return self._service.digests(self._always)

    async def run(self) -> None:
        """Reconcile about once a second until cancelled."""
        while True:
            try:
                await self.reconcile()
            except (SQLAlchemyError, DatabaseBusyError):
                # A locked or lost database answers requests with an error; this has nobody to tell and tries again.
                _log.exception("pins_not_read")
            await asyncio.sleep(_CHECK_EVERY_S)

    async def reconcile(self) -> None:
        """Tell the engine if what is wanted differs from what this worker was told last."""
        async with self._lock:
            if (status := self._engine.status) is None:
                return
            wanted = await asyncio.to_thread(self.digests)
            if (status.epoch, wanted) == self._told:
                return
            await self._engine.set_pinned(wanted)
            self._told = (status.epoch, wanted)
