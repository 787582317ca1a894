"""The router as a service: says where a request belongs and why, and takes orders about prompts, routers and rules.

What it routes by is a snapshot that `following` reads from the database; a request costs it one query, for the aliases
that exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from adapters.audit import record_act
from adapters.errors import ConflictError
from adapters.records import BASE_MODEL_NAME, Actor, parse_model_name
from adapters.registry import Registry, find_version
from adapters.routing.conversation import follow_turns, take_latest
from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.evaluation import Predictor, predictor_of
from adapters.routing.following import RouterFollower, Snapshot
from adapters.routing.model import RouterModel
from adapters.routing.prompts import read_background
from adapters.routing.rules import Asked, RoutingRule, find_rule
from adapters.routing.store import (
    RouterVersion,
    count_prompts,
    drop_prompts,
    keep_prompts,
    list_routers,
    load_prompts,
    load_rules,
    move_back,
    save_rules,
)

__all__ = ["DEFAULT_THRESHOLD", "Decision", "NearPrompt", "RoutingService"]

DEFAULT_THRESHOLD = 0.5
_MAX_REMEMBERED = 4096  # turns; by their hashes, their texts are not kept
_NUM_SHOWN = 5  # training prompts that an explanation names


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
        texts = read_background() if background is None else background
        self._follower = RouterFollower(registry.database, embeddings, texts)
        self._remembered: dict[tuple[int | None, bytes], npt.NDArray[np.float32]] = {}

    def acting_for(self, actor: Actor) -> RoutingService:
        """The same service on somebody's behalf: nobody is routed to an alias that they may not see."""
        view = copy(self)
        view._registry = self._registry.acting_for(actor)
        return view

    @property
    def snapshot(self) -> Snapshot:
        """What requests are routed by at present."""
        return self._follower.snapshot

    def read(self) -> None:
        """Take over which router and rules count. Trains nothing."""
        self._follower.read()

    def reconcile(self) -> None:
        """Train if aliases, versions or prompts are others than when the present router was made; then read it.

        Takes seconds where there is something to train; two processes that do so at once make one router.
        """
        self._follower.reconcile()

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

    def can_route(self) -> bool:
        """Whether there is a rule or a router that could choose an alias for whoever the service acts for."""
        snapshot = self.snapshot
        known = () if snapshot.model is None else chain.from_iterable(snapshot.model.groups)
        return bool(self._may_fire(snapshot.rules)) or not self._registry.names().isdisjoint(known)

    def nearest(self, text: str) -> list[NearPrompt]:
        """The training prompts that are most like a text, of the aliases that whoever asks may see."""
        snapshot = self.snapshot
        if snapshot.model is None:
            return []
        visible = frozenset(filter(self._registry.can_see, snapshot.model.aliases))
        near = snapshot.model.nearest(text, _NUM_SHOWN, among=visible)
        with self._registry.database.read() as session:
            kept = {alias: load_prompts(session, snapshot.prompts[alias]) for alias in {found.alias for found in near}}
        return [
            NearPrompt(found.alias, kept[found.alias][found.position], found.similarity)
            for found in near
            if kept[found.alias]  # not forgotten, nor replaced, since the router was made
        ]

    def keep_prompts(self, name: str, prompts: Sequence[str]) -> int:
        """Keep prompts of a version that was published without: an imported one, say. Returns how many are kept.

        Raises:
            NotFoundError: no such version.
        """
        with self._registry.database.write() as session:
            found = find_version(session, parse_model_name(name))
            keep_prompts(session, found.version.digest, prompts)
            num_kept = count_prompts(session, found.version.digest)
            record_act(session, "set_prompts", found.label, num_prompts=num_kept)
            return num_kept

    def forget_prompts(self, name: str) -> None:
        """Delete the prompts that are kept of a version, and the routers that were made from them.

        Who has read such a router goes by it until the next training, which `reconcile` finds due.

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
            number = move_back(session, self._follower.sources(session))
        self.read()
        return number

    def rules(self) -> tuple[RoutingRule, ...]:
        """The rules in the database, in order."""
        with self._registry.database.read() as session:
            return load_rules(session)

    def unknown_in_rules(self) -> tuple[str, ...]:
        """The aliases that rules name and that do not exist, or not for whoever the service acts for, by name."""
        named = {rule.alias for rule in self.rules()} - {BASE_MODEL_NAME}
        return tuple(sorted(named - self._registry.names()))

    def passes_over(self, alias: str) -> bool:
        """Whether others can be learned from, but not this alias: no prompts of its version are kept."""
        with self._registry.database.read() as session:
            versions = self._follower.sources(session).versions
        return bool(versions) and alias not in versions

    def set_rules(self, rules: Sequence[RoutingRule]) -> None:
        """Replace all rules."""
        with self._registry.database.write() as session:
            save_rules(session, rules)
        self.read()

    def predictor(self) -> tuple[Predictor, tuple[str, ...]]:
        """What the present router says of texts, to be measured, and its aliases.

        Raises:
            ConflictError: there is none; says why.
        """
        snapshot = self.snapshot
        if snapshot.model is None:
            raise ConflictError(f"there is no router to measure: {snapshot.reason}")
        return predictor_of(snapshot.model, self._embeddings), snapshot.model.aliases

    def _choose(self, snapshot: Snapshot, turns: Sequence[str]) -> Decision:
        said = take_latest(turns)
        if snapshot.model is None or not said:
            reason = snapshot.reason if snapshot.model is None else "the user has said nothing"
            return self._abstain(snapshot, None, {}, reason)
        names = self._registry.names()
        answering = [_first_of(group, names) for group in snapshot.model.groups]
        # Another alias's share is not given to those that may be used: what belongs there belongs nowhere here.
        may_answer = np.array([alias is not None for alias in answering], dtype=np.float32)
        scores = [probabilities * may_answer for probabilities in self._score(snapshot, snapshot.model, said)]
        choice = follow_turns(said, scores, self._threshold)
        shown = {alias: float(p) for alias, p in zip(answering, choice.probabilities, strict=True) if alias}
        alias = None if choice.index is None else answering[choice.index]
        if alias is None:
            reason = f"no alias has a probability of {self._threshold:g} or more"
            return self._abstain(snapshot, choice.confidence, shown, reason)
        reason = f"{alias!r} has the probability {choice.confidence:.2f}"
        return Decision(alias, "router", choice.confidence, self._threshold, None, snapshot.number, shown, reason)

    def _score(self, snapshot: Snapshot, model: RouterModel, texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """The probabilities of each turn. A conversation comes again with every request, so they are remembered."""
        keys = [(snapshot.move_id, hashlib.sha256(text.encode("utf-8", "replace")).digest()) for text in texts]
        found = {key: self._remembered.get(key) for key in keys}
        unknown = {key: text for key, text in zip(keys, texts, strict=True) if found[key] is None}
        if unknown:
            scores = model.score([*unknown.values()], self._embeddings)
            scored = dict(zip(unknown, (score.probabilities for score in scores), strict=True))
            if len(self._remembered) + len(scored) > _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered.update(scored)
            found |= scored
        return [probabilities for key in keys if (probabilities := found[key]) is not None]

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


def _first_of(group: Sequence[str], names: frozenset[str]) -> str | None:
    return next((alias for alias in group if alias in names), None)
