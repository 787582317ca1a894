"""Keeps what a process routes by equal to what the database says, and trains where the sources have changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog
from sqlalchemy.orm import Session

from adapters.database import Database
from adapters.errors import IntegrityError, InvalidInputError
from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.model import RouterModel
from adapters.routing.prompts import MIN_ALIASES, group_alike
from adapters.routing.rules import RoutingRule
from adapters.routing.store import (
    KeptPrompts,
    Sources,
    add_router,
    load_prompts,
    load_router,
    load_rules,
    load_sources,
    present_move,
    read_sources,
    rules_number,
)
from adapters.tables import RouterMoveRow

__all__ = ["RouterFollower", "Snapshot"]

_MAX_ALIASES = 200  # in one router: its size and its time are bounded
_MAX_TRAINED = 3000  # prompts in one router: the time to train grows with their cube
_NOT_AGAIN_S = 60.0  # from the same sources: two servers with different base models on one database would train forever
_NOT_READY = "no router was trained yet"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What requests are routed by: rules, and a model, or the reason why there is none.

    `is_broken` where there should be a model but what is stored is of no use; `prompts` are what the model knows.
    """

    rules: tuple[RoutingRule, ...] = ()
    rules_number: int = 0
    number: int | None = None
    model: RouterModel | None = None
    reason: str = _NOT_READY
    is_broken: bool = False
    move_id: int | None = None
    prompts: Mapping[str, KeptPrompts] = field(default_factory=dict)


class RouterFollower:
    """One a process; its views on behalf of different actors share it. Safe to use from several threads.

    Args:
        database: Prompts, routers and rules.
        embeddings: The base model's; None to do without.
        background: Texts of no domain.
    """

    def __init__(self, database: Database, embeddings: TokenEmbeddings | None, background: Sequence[str]) -> None:
        self._database = database
        self._embeddings = embeddings
        self._background = background
        self._training = threading.Lock()
        self._reading = threading.Lock()  # what was read later must not be replaced by what was read before
        self._trained: tuple[str, float] | None = None  # the sources of this process's last training, and when it was
        self.snapshot = Snapshot()

    def sources(self, session: Session) -> Sources:
        """What a router of this process would be trained from."""
        return read_sources(session, None if self._embeddings is None else self._embeddings.identity)

    def reconcile(self) -> None:
        """Read which router and rules count; train if there is something else to train from, and read that.

        Takes seconds where there is something to train; two processes that do so at once make one router.
        """
        with self._training:
            self.read()
            if self._train():
                self.read()

    def read(self) -> None:
        """Take over which router counts, and the rules. Trains nothing."""
        with self._reading, self._database.read() as session:
            known = self._with_rules(session, self.snapshot)
            move = present_move(session)
            if move is not None and move.id != known.move_id:
                known = self._with_router(session, known, move)
            self.snapshot = known

    def _with_rules(self, session: Session, known: Snapshot) -> Snapshot:
        number = rules_number(session)
        if number == known.rules_number:
            return known
        try:
            rules = load_rules(session)
        except InvalidInputError as error:
            # Written by a program that knows more than this one: the rules that it knows go on.
            _log.error("routing_rules_not_read", reason=str(error))
            rules = known.rules
        return replace(known, rules=rules, rules_number=number)

    def _with_router(self, session: Session, known: Snapshot, move: RouterMoveRow) -> Snapshot:
        known = replace(known, number=None, model=None, is_broken=False, move_id=move.id, prompts={})
        if move.number is None:
            return replace(known, reason=move.reason or _NOT_READY)
        try:
            model = RouterModel.from_bytes(load_router(session, move.number))
        except IntegrityError as error:
            _log.error("router_not_read", reason=str(error))
            return replace(known, reason=str(error), is_broken=True)
        own = None if self._embeddings is None else self._embeddings.identity
        if model.meaning is not None and model.meaning.source != own:
            return replace(known, reason="the router was trained with another base model", is_broken=True)
        return replace(known, number=move.number, model=model, reason="", prompts=load_sources(session, move.number))

    def _train(self) -> bool:
        """Train what there is to be trained from, unless another process has done so; returns whether it was tried."""
        with self._database.read() as session:
            sources = self.sources(session)
            if not self._is_stale(session, sources) or self._was_trained(sources):
                return False
            prompts = _load_all(session, sources)
        reason = _why_not(sources, prompts)
        content = None if reason else self._train_router(prompts)
        with self._database.write() as session:
            if self.sources(session) == sources and self._is_stale(session, sources):
                add_router(session, sources, content, reason)
        self._trained = (sources.sha256, time.monotonic())
        return True

    def _train_router(self, prompts: Mapping[str, Sequence[str]]) -> bytes:
        # scikit-learn takes a second to import, and most processes train nothing.
        from adapters.routing.training import train_router

        return train_router(prompts, self._background, self._embeddings).to_bytes()

    def _is_stale(self, session: Session, sources: Sources) -> bool:
        present = present_move(session)
        if present is None or present.sources_sha256 != sources.sha256:
            return True
        return self.snapshot.is_broken and present.id == self.snapshot.move_id

    def _was_trained(self, sources: Sources) -> bool:
        if self._trained is None:
            return False
        sha256, moment = self._trained
        return sha256 == sources.sha256 and time.monotonic() - moment < _NOT_AGAIN_S


def _load_all(session: Session, sources: Sources) -> dict[str, list[str]]:
    """The prompts of each alias; none of them if there are too many aliases for a router."""
    if len(sources.versions) > _MAX_ALIASES:
        return {}
    share = _MAX_TRAINED // max(1, len(sources.versions))
    return {alias: load_prompts(session, kept)[:share] for alias, kept in sources.versions.items()}


def _why_not(sources: Sources, prompts: Mapping[str, Sequence[str]]) -> str | None:
    """The reason why nothing can be trained from these sources; None if something can."""
    found = sorted(sources.versions)
    if len(found) > _MAX_ALIASES:
        return (
            f"a router takes {_MAX_ALIASES} aliases with training prompts at most, found {len(found)}: "
            "hotswap route forget takes one out"
        )
    if len(found) < MIN_ALIASES:
        return f"a router takes two aliases with training prompts or more, found {', '.join(found) or 'none'}"
    if len(group_alike(prompts)) < MIN_ALIASES:
        return f"a router takes two aliases with different training prompts or more: {', '.join(found)} share theirs"
    return None
