"""The router as a service: keeps itself trained from what aliases point to, and says where a request belongs.

What it routes by is a snapshot that `reconcile` reads from the database; a request costs no query for it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.errors import ConflictError
from adapters.records import BASE_MODEL_NAME, Actor, parse_model_name
from adapters.registry import Registry, find_version
from adapters.routing.conversation import MAX_TURNS, follow_turns
from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.model import RouterModel
from adapters.routing.prompts import MIN_ALIASES, read_background
from adapters.routing.rules import Asked, RoutingRule, find_rule
from adapters.routing.store import (
    RouterVersion,
    Sources,
    add_router,
    drop_prompts,
    keep_prompts,
    list_routers,
    load_prompts,
    load_router,
    load_rules,
    load_sources,
    move_back,
    present_move,
    read_sources,
    rules_number,
    save_rules,
)

__all__ = ["DEFAULT_THRESHOLD", "Decision", "NearPrompt", "RoutingService", "Snapshot"]

DEFAULT_THRESHOLD = 0.5
_MAX_TRAINED = 3000  # prompts in one router: the time to train grows with their cube
_MAX_REMEMBERED = 4096  # turns; by their hashes, their texts are not kept
_NUM_SHOWN = 5  # training prompts that an explanation names
_NOT_READY = "no router was trained yet"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What requests are routed by: rules, and a model, or the reason why there is none."""

    rules: tuple[RoutingRule, ...] = ()
    rules_number: int = 0
    number: int | None = None
    model: RouterModel | None = None
    reason: str | None = _NOT_READY
    move_id: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why. `alias` is `base` where the router abstains.

    `confidence` is the learned probability of the alias, or where it abstains of the likeliest; None where nothing
    learned was asked. `probabilities` are those of the aliases that whoever asks may use.
    """

    alias: str
    route: Literal["rule", "router", "abstained"]
    confidence: float | None
    threshold: float
    rule: str | None
    router: int | None
    probabilities: Mapping[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class NearPrompt:
    """A training prompt, and how similar it is to a text, from 0 to 1, by the words that they share."""

    alias: str
    text: str
    similarity: float


class RoutingService:
    """Routes by rules and by a router trained from the database. Safe to use from several threads.

    Args:
        registry: Versions, aliases and their database.
        embeddings: The base model's; None to do without.
        threshold: The least probability by which an alias is chosen.
        background: Texts of no domain.
    """

    def __init__(
        self,
        registry: Registry,
        embeddings: TokenEmbeddings | None,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        background: Sequence[str] | None = None,
    ) -> None:
        self._registry = registry
        self._embeddings = embeddings
        self._threshold = threshold
        self._background = read_background() if background is None else background
        self._state = _State()

    def acting_for(self, actor: Actor) -> RoutingService:
        """The same service on somebody's behalf: nobody is routed to an alias that they may not see."""
        view = RoutingService(
            self._registry.acting_for(actor), self._embeddings, threshold=self._threshold, background=self._background
        )
        view._state = self._state
        return view

    @property
    def snapshot(self) -> Snapshot:
        """What requests are routed by at present."""
        return self._state.snapshot

    def reconcile(self) -> None:
        """Train if aliases, versions or prompts are others than when the present router was made; then read it.

        Takes seconds where there is something to train; two processes that do so at once make one router.
        """
        with self._state.lock:
            self._train()
            self._read()

    def route(
        self, turns: Sequence[str], *, metadata: Mapping[str, str] | None = None, key: str | None = None
    ) -> Decision:
        """Say where a request belongs: by the first rule that holds, else by what was learned.

        Args:
            turns: The user's messages in order; none is as good as an empty one.
            metadata: The request's.
            key: The id of the API key, if there is one.
        """
        snapshot = self.snapshot
        asked = Asked(metadata or {}, key, turns[-1] if turns else "")
        if snapshot.rules and (rule := find_rule(self._may_fire(snapshot.rules), asked)):
            reason = f"the rule {rule.name!r} holds"
            return Decision(rule.alias, "rule", None, self._threshold, rule.name, snapshot.number, {}, reason)
        return self._choose(snapshot, turns)

    def can_see(self, name: str) -> bool:
        """Whether an alias of this name, or the base model, may exist for whoever the service acts for."""
        return self._registry.can_see(name)

    def nearest(self, text: str) -> list[NearPrompt]:
        """The training prompts that are most like a text, of the aliases that whoever asks may see."""
        snapshot = self.snapshot
        if snapshot.model is None:
            return []
        near = snapshot.model.nearest(text, 10 * _NUM_SHOWN)
        visible = [found for found in near if self._registry.can_see(found.alias)][:_NUM_SHOWN]
        with self._registry.database.read() as session:
            kept = {alias: load_prompts(session, snapshot.versions[alias]) for alias in {f.alias for f in visible}}
        return [
            NearPrompt(found.alias, kept[found.alias][found.position], found.similarity)
            for found in visible
            if found.position < len(kept[found.alias])
        ]

    def keep_prompts(self, name: str, prompts: Sequence[str]) -> int:
        """Keep prompts of a version that was published without: an imported one, say. Returns how many are kept.

        Raises:
            NotFoundError: no such version.
        """
        with self._registry.database.write() as session:
            found = find_version(session, parse_model_name(name))
            keep_prompts(session, found.version.digest, prompts)
            num_kept = len(load_prompts(session, found.version.digest))
            record_act(session, "set_prompts", found.label, num_prompts=num_kept)
            return num_kept

    def forget_prompts(self, name: str) -> None:
        """Delete the prompts that are kept of a version; the next training makes a router that does not know it.

        Raises:
            NotFoundError: no such version.
        """
        with self._registry.database.write() as session:
            found = find_version(session, parse_model_name(name))
            drop_prompts(session, found.version.digest)
            record_act(session, "set_prompts", found.label, num_prompts=0)

    def history(self, *, limit: int) -> list[RouterVersion]:
        """The latest routers, newest first."""
        with self._registry.database.read() as session:
            return list_routers(session, limit=limit)

    def rollback(self) -> int:
        """Route by the router before the present one, until something new is there to train from. Returns its number.

        Raises:
            ConflictError: there is none.
        """
        with self._registry.database.write() as session:
            number = move_back(session, self._sources(session))
        self._read()
        return number

    def rules(self) -> tuple[RoutingRule, ...]:
        """The rules in the database, in order."""
        with self._registry.database.read() as session:
            return load_rules(session)

    def set_rules(self, rules: Sequence[RoutingRule]) -> None:
        """Replace all rules."""
        with self._registry.database.write() as session:
            save_rules(session, rules)
        self._read()

    def predict(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The probabilities `[num_texts, num_aliases]` of the present router.

        Raises:
            ConflictError: there is none; says why.
        """
        model = self.snapshot.model
        if model is None:
            raise ConflictError(f"there is no router to ask: {self.snapshot.reason}")
        return np.stack([scores.probabilities for scores in model.score(texts, self._embeddings)])

    def _choose(self, snapshot: Snapshot, turns: Sequence[str]) -> Decision:
        said = [turn for turn in turns if turn.strip()][-MAX_TURNS:]
        if snapshot.model is None or not said:
            reason = snapshot.reason if snapshot.model is None else "the user has said nothing"
            return self._abstain(snapshot, None, {}, reason or _NOT_READY)
        aliases = snapshot.model.aliases
        names = self._registry.names()
        # Another alias's share is not given to those that may be used: what belongs there belongs nowhere here.
        may_answer = np.array([alias in names for alias in aliases], dtype=np.float32)
        scores = [self._score(snapshot, turn) * may_answer for turn in said]
        choice = follow_turns(scores, self._threshold)
        shown = {alias: float(p) for alias, p in zip(aliases, choice.probabilities, strict=True) if alias in names}
        if choice.index is None:
            reason = f"no alias has a probability of {self._threshold:g} or more"
            return self._abstain(snapshot, choice.confidence, shown, reason)
        alias = aliases[choice.index]
        reason = f"{alias!r} has the probability {choice.confidence:.2f}"
        return Decision(alias, "router", choice.confidence, self._threshold, None, snapshot.number, shown, reason)

    def _score(self, snapshot: Snapshot, text: str) -> npt.NDArray[np.float32]:
        """The probabilities of one turn. A conversation comes again with every request, so they are remembered."""
        assert snapshot.model is not None, "whoever asks has looked"
        remembered = self._state.remembered
        key = (snapshot.move_id, hashlib.sha256(text.encode("utf-8", "replace")).digest())
        if (found := remembered.get(key)) is None:
            (scores,) = snapshot.model.score([text], self._embeddings)
            found = scores.probabilities
            if len(remembered) >= _MAX_REMEMBERED:
                remembered.clear()
            remembered[key] = found
        return found

    def _abstain(
        self, snapshot: Snapshot, confidence: float | None, shown: Mapping[str, float], reason: str
    ) -> Decision:
        return Decision(BASE_MODEL_NAME, "abstained", confidence, self._threshold, None, snapshot.number, shown, reason)

    def _may_fire(self, rules: Sequence[RoutingRule]) -> list[RoutingRule]:
        """The rules for what exists and may be used; the others are passed over."""
        names = self._registry.names()
        return [
            rule
            for rule in rules
            if rule.alias in names or (rule.alias == BASE_MODEL_NAME and self._registry.can_see(BASE_MODEL_NAME))
        ]

    def _sources(self, session: Session) -> Sources:
        return read_sources(session, None if self._embeddings is None else self._embeddings.identity)

    def _train(self) -> None:
        """Train what there is to be trained from, unless another process has done so meanwhile."""
        with self._registry.database.read() as session:
            sources = self._sources(session)
            if not _is_stale(session, sources):
                return
            prompts = {
                alias: load_prompts(session, digest)[: _MAX_TRAINED // len(sources.versions)]
                for alias, (digest, _) in sources.versions.items()
            }
        content, reason = None, None
        if len(prompts) < MIN_ALIASES:
            found = ", ".join(prompts) or "none"
            reason = f"a router takes two aliases with training prompts or more, found {found}"
        else:
            # scikit-learn takes a second to import, and most processes train nothing.
            from adapters.routing.training import train_router

            content = train_router(prompts, self._background, self._embeddings).to_bytes()
        with self._registry.database.write() as session:
            if self._sources(session) == sources and _is_stale(session, sources):
                add_router(session, sources, content, reason)

    def _read(self) -> None:
        """Take over which router counts, and the rules."""
        known = self._state.snapshot
        with self._registry.database.read() as session:
            number = rules_number(session)
            rules = known.rules if number == known.rules_number else load_rules(session)
            known = replace(known, rules=rules, rules_number=number)
            move = present_move(session)
            if move is None or move.id == known.move_id:
                self._state.snapshot = known
                return
            known = replace(known, number=None, model=None, reason=move.reason, move_id=move.id, versions={})
            if move.number is None:
                self._state.snapshot = known
                return
            content, sources = load_router(session, move.number), load_sources(session, move.number)
        model = RouterModel.from_bytes(content)
        own = None if self._embeddings is None else self._embeddings.identity
        if model.meaning is not None and model.meaning.source != own:
            self._state.snapshot = replace(known, reason="the router was trained with another base model")
            return
        self._state.snapshot = replace(known, number=move.number, model=model, versions=sources)


@dataclass
class _State:
    """What views on behalf of different actors share. Whoever holds the lock trains."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    lock: threading.Lock = field(default_factory=threading.Lock)
    remembered: dict[tuple[int | None, bytes], npt.NDArray[np.float32]] = field(default_factory=dict)


def _is_stale(session: Session, sources: Sources) -> bool:
    present = present_move(session)
    return present is None or present.sources_sha256 != sources.sha256
