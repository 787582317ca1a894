"""The queue of requests that wait for a place in the batch: who is next, and who may pass whom.

A pure data structure: it knows neither the model nor the slots, and asks its owner whether a request can be admitted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

from server.engine.core import GenerationRequest, Wait

if TYPE_CHECKING:
    from concurrent.futures import Future

    from server.engine.constraints import Grammar

__all__ = ["FairShare", "Waiting", "WaitingQueue"]

# More of them make better use of a version that is loaded, and those who wait for a slot wait longer.
_MAX_OVERTAKES = 8

_Flow = TypeVar("_Flow")
# Client and digest: requests of one lane wait for the same things, first come first served.
_Lane = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request and when it was submitted, in seconds of the engine's clock."""

    request: GenerationRequest
    submitted_at: float
    grammar: Future[Grammar] | None = None  # of a request with a constraint

    @property
    def deadline(self) -> float:
        """When the request is to be given up; infinite if it has no timeout."""
        timeout_s = self.request.timeout_s
        return math.inf if timeout_s is None else self.submitted_at + timeout_s


class FairShare(Generic[_Flow]):
    """Whose turn it is, so that flows that wait at the same time get the same amount of service.

    Start-time fair queueing: a flow's next turn starts where its last one ended, but not before the present turn, so
    that nobody saves up turns by not using them. The least `rank` is next; of equal starts, whoever waits longest.

    Bounds, for flows that can be served whenever it is their turn: a flow that joins is served before any other flow is
    served twice; and of two flows that wait all the time, neither gets ahead of the other by more than the largest cost
    of each.

    Source: Goyal, Vin and Cheng, Start-time Fair Queueing (SIGCOMM 1996), section 2.
    """

    def __init__(self) -> None:
        self._now = 0
        self._turns: dict[_Flow, tuple[int, int]] = {}  # flow -> (start of its next turn, when that was decided)
        self._decisions = count()

    def join(self, flow: _Flow) -> None:
        """Let a flow that has had nothing to serve take part; what it has used lately still counts."""
        start, _ = self._turns.get(flow, (0, 0))
        self._turns[flow] = (start, next(self._decisions))

    def rank(self, flow: _Flow) -> tuple[int, int]:
        """The flow's place among all; the least is next."""
        start, decided = self._turns[flow]
        return max(self._now, start), decided

    def charge(self, flow: _Flow, cost: int) -> None:
        """Note that the flow has been served at this cost, which must be positive."""
        self._now, _ = self.rank(flow)
        self._turns[flow] = (self._now + cost, next(self._decisions))

    def refund(self, flow: _Flow, amount: int) -> None:
        """Take back a part of what was charged; without effect on a flow that is forgotten."""
        if flow in self._turns:
            start, _ = self._turns[flow]
            self._turns[flow] = (start - amount, next(self._decisions))

    def forget_idle(self, active: Set[_Flow]) -> None:
        """Drop flows that are not active and have no use on record that would still count."""
        self._turns = {flow: turn for flow, turn in self._turns.items() if flow in active or turn[0] > self._now}

    def __contains__(self, flow: _Flow) -> bool:
        return flow in self._turns


class WaitingQueue:
    """Fair between clients, and within a client between versions; requests of one client and version stay in order.

    Requests are charged prompt and max_tokens when they are admitted, and refunded what they did not generate. By the
    bounds of `FairShare`, the first request of a client is admitted before any other client is admitted twice, however
    many requests that one has queued, and likewise for the versions of one client. Two things come before that order:

    - A version whose load was started for a request here is used once as soon as it is there, so that it is not evicted
      unused. So each finished load may bring one admission out of turn.
    - A version that finds every slot in use stands in line for one. While it is the first, at most `max_overtakes`
      requests that need a slot are admitted, and those whose versions are on their way. After that only the base
      model's requests are, until a slot is free, which takes at most as many steps as the longest running answer has
      left: no steady stream for resident versions can keep it waiting for ever. Before a version is first come those of
      its client that joined earlier, and of each other client one for each of its own client's turns. With one client
      and p versions ahead that is at most `(p + 1) * max_overtakes` admissions, with c clients `c * max_overtakes` for
      each client's longest waiting version.

    A request that finds no room in the batch lets nobody pass, so that small ones can't keep a large one waiting.

    Args:
        max_overtakes: Admissions that need a slot and may pass the version that is first in line for one.
    """

    def __init__(self, *, max_overtakes: int = _MAX_OVERTAKES) -> None:
        self._max_overtakes = max_overtakes
        self._lanes: dict[_Lane, deque[Waiting]] = {}  # no lane is empty
        self._clients: FairShare[str] = FairShare()
        self._versions: dict[str, FairShare[str | None]] = {}
        self._coming: dict[_Lane, None] = {}  # their versions are being loaded, in the order of asking
        self._line: dict[_Lane, int] = {}  # their versions found no slot -> how often each was overtaken as the first
        self._line_turns: FairShare[str] = FairShare()
        self._num_waiting = 0
        self._num_tokens = 0
        self._next_deadline = math.inf  # not later than the earliest one

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_tokens(self) -> int:
        """Prompt and max_tokens of all requests here."""
        return self._num_tokens

    @property
    def requests(self) -> Iterator[GenerationRequest]:
        """All requests here, in no particular order."""
        return (waiting.request for lane in self._lanes.values() for waiting in lane)

    def wants(self, digest: str) -> bool:
        """Whether any request here is for this version."""
        return any(wanted == digest for _, wanted in self._lanes)

    def add(self, waiting: Waiting) -> None:
        """Queue a request behind those of the same client and version."""
        request = waiting.request
        lane = (request.client, request.digest)
        if lane not in self._lanes:
            self._open(lane)
        self._lanes[lane].append(waiting)
        self._count(waiting, 1)
        self._next_deadline = min(self._next_deadline, waiting.deadline)

    def admit_next(self, can_admit: Callable[[GenerationRequest], int | Wait]) -> tuple[Waiting, int] | None:
        """Take out the next request that can run, with the slot that `can_admit` gave for it; None if there is none.

        Args:
            can_admit: Returns a slot that the request holds from then on, or why it must wait: NO_ROOM ends the search,
                LOADING and NO_SLOT let others be asked. It may start loads. It must give a slot to every request of
                the base model, unless there is no room.
        """
        for lane in self._asking_order():
            verdict = can_admit(self._lanes[lane][0].request)
            if verdict is Wait.NO_ROOM:
                return None
            if isinstance(verdict, Wait):
                self._note_wait(lane, verdict)
            else:
                return self._take(lane), verdict
        return None

    def settle(self, request: GenerationRequest, *, num_unused: int) -> None:
        """Refund a request that was admitted the tokens that it was charged for and did not use."""
        self._clients.refund(request.client, num_unused)
        if request.client in self._versions:
            self._versions[request.client].refund(request.digest, num_unused)

    def remove_if(self, condition: Callable[[Waiting], bool]) -> list[Waiting]:
        """Take out all requests that the condition is true of, and return them."""
        removed = []
        for lane, queue in list(self._lanes.items()):
            leaving = [waiting for waiting in queue if condition(waiting)]
            for waiting in leaving:
                queue.remove(waiting)
                self._count(waiting, -1)
            self._close_if_empty(lane)
            removed += leaving
        return removed

    def expire(self, now: float) -> list[Waiting]:
        """Take out the requests whose deadline has come, and return them."""
        if now < self._next_deadline:
            return []
        expired = self.remove_if(lambda waiting: waiting.deadline <= now)
        left = (waiting.deadline for lane in self._lanes.values() for waiting in lane)
        self._next_deadline = min(left, default=math.inf)
        return expired

    def _asking_order(self) -> Iterator[_Lane]:
        """The lanes in the order of asking; what the answers change is respected as it goes on."""
        asked = set(self._coming)
        yield from list(self._coming)
        while (first := self._first_in_line()) is not None and first not in asked:
            asked.add(first)
            yield first
        is_held = first is not None and self._line[first] >= self._max_overtakes
        for lane in sorted(self._lanes.keys() - asked, key=self._turn):
            if not is_held or lane[1] is None:
                yield lane

    def _turn(self, lane: _Lane) -> tuple[tuple[int, int], tuple[int, int]]:
        client, digest = lane
        return self._clients.rank(client), self._versions[client].rank(digest)

    def _first_in_line(self) -> _Lane | None:
        # Of the lanes of one client `min` returns the first, which is the one that joined first.
        return min(self._line, key=lambda lane: self._line_turns.rank(lane[0]), default=None)

    def _note_wait(self, lane: _Lane, reason: Wait) -> None:
        if reason is Wait.LOADING:
            self._leave_line(lane)
            self._coming[lane] = None
        elif lane not in self._line:
            self._coming.pop(lane, None)
            if lane[0] not in {client for client, _ in self._line}:
                self._line_turns.join(lane[0])
            self._line[lane] = 0

    def _take(self, lane: _Lane) -> Waiting:
        client, digest = lane
        waiting = self._lanes[lane].popleft()
        self._count(waiting, -1)
        self._coming.pop(lane, None)
        was_in_line = self._leave_line(lane)
        if digest is not None and not was_in_line and (first := self._first_in_line()) is not None:
            self._line[first] += 1
        self._clients.charge(client, waiting.request.num_tokens)
        self._versions[client].charge(digest, waiting.request.num_tokens)
        self._close_if_empty(lane)
        return waiting

    def _count(self, waiting: Waiting, sign: int) -> None:
        self._num_waiting += sign
        self._num_tokens += sign * waiting.request.num_tokens

    def _leave_line(self, lane: _Lane) -> bool:
        if lane not in self._line:
            return False
        del self._line[lane]
        self._line_turns.charge(lane[0], 1)
        return True

    def _open(self, lane: _Lane) -> None:
        client, digest = lane
        if client not in {other for other, _ in self._lanes}:
            self._clients.join(client)
        self._versions.setdefault(client, FairShare()).join(digest)
        self._lanes[lane] = deque()

    def _close_if_empty(self, lane: _Lane) -> None:
        if self._lanes[lane]:
            return
        del self._lanes[lane]
        self._coming.pop(lane, None)
        self._line.pop(lane, None)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Keep only records of use that can still decide a turn, so that they don't pile up."""
        if not self._lanes:
            # Nobody waits, so nobody is owed anything.
            self._clients, self._versions, self._line_turns = FairShare(), {}, FairShare()
            return
        clients = {client for client, _ in self._lanes}
        self._clients.forget_idle(clients)
        self._line_turns.forget_idle({client for client, _ in self._line})
        self._versions = {client: share for client, share in self._versions.items() if client in self._clients}
        for client, share in self._versions.items():
            share.forget_idle({digest for other, digest in self._lanes if other == client})
