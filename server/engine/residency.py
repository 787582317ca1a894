"""Which version is in which slot: reads off the hot path, copies one a step, evicts the least recently used.

A version's weights go from the store through the loader thread to the host's memory and from there into a slot. Whoever
waits for a version asks for it in every step; only such a demand evicts another version, and only once the weights are
there: a version that can't be read costs nobody a slot.

What is in a slot is not kept on the host too, as long as versions stay in their slots. A version that loses its slot is
read into the host cache again while the loader has nothing else to do. When it comes back, its copy stays in the cache,
since it will lose its slot again. So memory is held twice only for versions that take turns in the slots, and only
within the cache's budget.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import structlog

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterRejectedError, ConflictError
from server.engine.core import MAX_TIMINGS, LoadTiming, Wait
from server.engine.host_cache import HostCache

__all__ = ["Residence", "Residency", "ResidencyStats", "Slots", "Wait", "WeightsReader"]

_Value = TypeVar("_Value")
_log = structlog.get_logger(__name__)

# What clients are told of any other error, whose message may name files.
_UNREADABLE = "its stored files are missing or damaged; the server's log has the reason"
_MAX_REMEMBERED = 4096  # versions in the statistics and in the list of those that lost a slot

# Reads and validates a version's weights; called in a loader thread, so it must not touch the model.
WeightsReader = Callable[[str], AdapterWeights]


class Slots(Protocol):
    """The device's slots, as far as residency needs them; `AdapterSlots` is the real thing."""

    num_slots: int

    def load(self, weights: AdapterWeights, *, slot: int) -> None:
        """Copy weights into a slot; if they are refused, the slot is left as it was."""

    def clear(self, slot: int) -> None:
        """Make a slot compute nothing."""


@dataclass(frozen=True, slots=True)
class Residence:
    """Where one version is: in a slot, also while it drains (unloaded, but requests still run on it), or on the host.

    It crosses a process border by pickle.
    """

    digest: str
    slot: int | None = None
    num_requests: int = 0
    is_draining: bool = False
    is_loading: bool = False
    is_on_host: bool = False
    is_pinned: bool = False


@dataclass(slots=True)
class ResidencyStats:
    """Counters for a metrics writer; the engine's thread writes them, anybody may read.

    A host hit is a copy into a slot from weights that were on the host from before: neither read nor validated for it.
    `last_load_ms` is reading, validating and copying, or the copy alone for a host hit, without time in the queue.
    """

    num_loads: int = 0
    num_failures: int = 0
    num_evictions: int = 0
    num_host_hits: int = 0
    slot_bytes: int = 0
    host_bytes: int = 0
    last_load_ms: OrderedDict[str, float] = field(default_factory=OrderedDict)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that are held, in slots and on the host; a version in both counts twice."""
        return self.slot_bytes + self.host_bytes


@dataclass(slots=True, eq=False)
class _Holding:
    """A version in a slot."""

    digest: str
    slot: int
    num_bytes: int
    users: int = 0
    last_used: int = 0
    is_aside: bool = False  # nobody but work that must cost nobody anything has used it


class Residency:
    """The slots' book-keeping. Only the engine's thread calls it; reading files happens in one loader thread.

    Args:
        slots: The device's slots, all of them empty.
        read_weights: Reads and validates a version, in the loader thread.
        max_host_bytes: Budget of the host cache. Beside it stand at most one version in line for a slot, and what has
            been read for slots that are still free.
    """

    def __init__(self, slots: Slots, read_weights: WeightsReader, *, max_host_bytes: int = 1 << 30) -> None:
        self._slots = slots
        self._read_weights = read_weights
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._host = HostCache(max_host_bytes)
        self._free = list(range(slots.num_slots, 0, -1))
        self._resident: dict[str, _Holding] = {}
        self._draining: dict[int, _Holding] = {}  # unloaded while in use, by slot
        self._reads: dict[str, Future[tuple[AdapterWeights, float]]] = {}
        # What is read for work that must cost nobody anything, in a thread that nobody else waits for.
        self._aside: tuple[str, Future[tuple[AdapterWeights, float]]] | None = None
        self._aside_loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside-loader")
        self._ahead: set[str] = set()  # read into the host cache for a request that has not had its turn
        self._wanted: OrderedDict[str, None] = OrderedDict()  # to be read ahead when there is room
        self._given_up: set[str] = set()  # being read, but whoever asked has left
        self._first_in_line: str | None = None  # the oldest demand that was not on the host
        self._staged: tuple[str, AdapterWeights] | None = None  # its weights: no budget can keep it waiting for ever
        self._lost_slot: OrderedDict[str, None] = OrderedDict()  # versions that were evicted, the last of them last
        self._to_reread: OrderedDict[str, None] = OrderedDict()  # of those, the ones without a host copy
        self._rereading: str | None = None
        self._pinned: set[str] = set()
        self._unplaced_pins: set[str] = set()
        self._failures: dict[str, str] = {}
        self._has_copied = False  # in this step
        self._has_missed = False  # in this step
        self._largest_bytes = 0
        self._asked_at: dict[str, float] = {}  # when the read began that is under way
        self._timings: deque[LoadTiming] = deque(maxlen=MAX_TIMINGS)
        self._clock = 0
        self._stats = ResidencyStats()

    @property
    def stats(self) -> ResidencyStats:
        """The counters, with the bytes as of now."""
        holdings = [*self._resident.values(), *self._draining.values()]
        self._stats.slot_bytes = sum(holding.num_bytes for holding in holdings)
        staged = self._staged[1].num_bytes if self._staged else 0
        self._stats.host_bytes = self._host.num_bytes + staged
        return self._stats

    @property
    def num_slots(self) -> int:
        """How many versions can be in slots."""
        return self._slots.num_slots

    def take_timings(self) -> tuple[LoadTiming, ...]:
        """The loads that have ended since the last call."""
        timings = tuple(self._timings)
        self._timings.clear()
        return timings

    @property
    def is_loading(self) -> bool:
        """Whether any version is on its way."""
        return bool(self._reads or self._to_reread or self._aside)

    @property
    def has_unplaced_pins(self) -> bool:
        """Whether a pinned version has no slot yet."""
        return bool(self._unplaced_pins)

    @property
    def resident(self) -> dict[str, int]:
        """Versions in slots: digest -> number of requests that run on it. Draining ones are not among them."""
        return {digest: holding.users for digest, holding in self._resident.items()}

    @property
    def pinned(self) -> frozenset[str]:
        """Versions that keep their slots."""
        return frozenset(self._pinned)

    def report(self) -> tuple[Residence, ...]:
        """Every version that is in a slot, on the host, on its way or pinned."""
        holdings = {held.digest: held for held in (*self._draining.values(), *self._resident.values())}
        digests = dict.fromkeys([*holdings, *self._host.digests, *self._reads, *sorted(self._pinned)])
        return tuple(self._residence(digest, holdings.get(digest)) for digest in digests)

    def _residence(self, digest: str, held: _Holding | None) -> Residence:
        return Residence(
            digest,
            slot=held.slot if held else None,
            num_requests=held.users if held else 0,
            is_draining=held is not None and held.slot in self._draining,
            is_loading=digest in self._reads,
            is_on_host=self._on_host(digest) is not None,
            is_pinned=digest in self._pinned,
        )

    def acquire(self, digest: str) -> int | Wait:
        """The version's slot, held for one request until `release`; or why it must wait. Starts loading if absent.

        Call it in the order in which requests wait. The first version in a step that is on the host but not in a slot
        is copied; the next one waits for the next step, so that running requests never wait for more than one copy.
        """
        holding = self._resident.get(digest) or self._bring(digest)
        if isinstance(holding, Wait):
            return holding
        holding.users += 1
        self._claim(holding)
        return holding.slot

    def acquire_aside(self, digest: str, *, may_read: bool) -> int | None:
        """The version's slot for work that must cost nobody anything, held until `release`; None if it is in none.

        Then it is read, if it may be, a slot is free and nothing else is on its way; `finish_aside` copies it. When
        anybody else needs a version that is in no slot, the slots that such work alone has used are free again.
        """
        holding = self._resident.get(digest)
        if holding is None:
            if may_read and self._free and not self.is_loading:
                self._aside = digest, self._aside_loader.submit(_read_timed, self._read_weights, digest)
            return None
        holding.users += 1
        return holding.slot

    def finish_aside(self) -> None:
        """Copy what was read for work that must cost nobody anything; call it in steps that are nobody else's."""
        if self._aside is None or not self._aside[1].done():
            return
        (digest, read), self._aside = self._aside, None
        if self._reads or not self._free:
            return
        slot = self._free[-1]
        try:
            weights, _ = read.result()
            self._slots.load(weights, slot=slot)
        except Exception as error:
            # A loading boundary, as in `_copy`: who needs the version has it read again and is told.
            _log.warning("adapter_load_failed", digest=digest, reason=str(error), is_for_shadow=True)
            self._slots.clear(slot)
            return
        self._free.remove(slot)
        self._resident[digest] = _Holding(digest, slot, weights.num_bytes, is_aside=True)

    def release(self, slot: int) -> None:
        """One request less runs in the slot; the version stays there until the slot is needed, or goes if unloaded."""
        holding = self._draining.get(slot) or next(held for held in self._resident.values() if held.slot == slot)
        holding.users -= 1
        assert holding.users >= 0, f"slot {slot} was released more often than acquired"
        if slot in self._draining and holding.users == 0:
            del self._draining[slot]
            self._vacate(slot)

    def prefetch(self, digest: str) -> None:
        """Start reading a version that will be needed, if slots and host cache have room; evicts nobody from a slot."""
        self._given_up.discard(digest)
        if holding := self._resident.get(digest):
            if holding.is_aside:  # from here on it has its slot as if it had been read for this
                self._claim(holding)
            return
        self._yield_aside()
        if self._on_host(digest) is not None:
            return
        if digest in self._reads or self._has_room:
            self._start_read(digest)
        else:
            _remember(self._wanted, digest, None)

    def give_up(self, digest: str) -> None:
        """Nobody waits for a version any more: it takes none of the room in which versions are read ahead.

        What was read of it stays on the host as long as nothing else needs the place.
        """
        self._wanted.pop(digest, None)
        self._ahead.discard(digest)
        if digest in self._reads:
            self._given_up.add(digest)

    def pin(self, digest: str) -> None:
        """Load a version as soon as a slot can be had, and never evict it.

        Raises:
            ConflictError: no slot would be left for all others.
        """
        if digest not in self._pinned and len(self._pinned) >= self._slots.num_slots - 1:
            limit = self._slots.num_slots - 1
            raise ConflictError(f"at most {limit} versions can be pinned: one of {limit + 1} slots is for all others")
        self._pinned.add(digest)
        if holding := self._resident.get(digest):
            holding.is_aside = False
        else:
            self._unplaced_pins.add(digest)
            self._place_pins()

    def unpin(self, digest: str) -> None:
        """Let a version be evicted again, if it was pinned."""
        self._pinned.discard(digest)
        self._unplaced_pins.discard(digest)

    def set_pinned(self, digests: Sequence[str]) -> None:
        """Pin exactly these versions, or as many of the first ones as leave one slot for all others."""
        limit = self._slots.num_slots - 1
        if len(digests) > limit:
            _log.warning("too_many_pinned", num_wanted=len(digests), num_pinned=limit)
        wanted = digests[:limit]
        for digest in self._pinned - {*wanted}:
            self.unpin(digest)
        for digest in wanted:
            self.pin(digest)

    def unload(self, digest: str) -> None:
        """Forget a version: its slot is freed when its last request has ended; who asks from here on has it read again.

        Raises:
            ConflictError: it is pinned.
        """
        if digest in self._pinned:
            raise ConflictError(f"version {digest} is pinned; unpin it first")
        self._forget_host(digest)
        self._lost_slot.pop(digest, None)
        self._to_reread.pop(digest, None)
        self._wanted.pop(digest, None)
        self._asked_at.pop(digest, None)
        self._given_up.discard(digest)
        if self._aside and self._aside[0] == digest:
            self._aside = None
        if read := self._reads.pop(digest, None):
            read.cancel()
        if self._rereading == digest:
            self._rereading = None
        if holding := self._resident.pop(digest, None):
            if holding.users:
                self._draining[holding.slot] = holding
            else:
                self._vacate(holding.slot)

    def finish_loads(self) -> dict[str, str]:
        """Begin a step: take over what the loader has read; returns a reason for each version that failed.

        A failed version is read again only when somebody asks for it again.
        """
        self._has_copied = self._has_missed = False
        # Looked at once: a read that fails from here on is the next step's.
        done = [digest for digest, read in self._reads.items() if read.done()]
        failures = self.take_failures()
        num_kept = 0
        for digest in done:
            if digest not in self._reads:
                continue  # it is among the failures
            # A step copies once. What is left for free slots waits in its future, the rest in the cache.
            if self._has_copied and num_kept < len(self._free) and digest != self._rereading:
                num_kept += 1
            else:
                self._take_over(digest)
        self._place_pins()
        self._read_ahead()
        self._reread()
        return failures

    def take_failures(self) -> dict[str, str]:
        """The versions that failed since the last call, each with a reason that may be shown to a user."""
        for digest, read in list(self._reads.items()):
            if read.done() and (error := read.exception()):
                del self._reads[digest]
                self._given_up.discard(digest)
                self._note_failure(digest, error)
        failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """Stop the loader thread."""
        for loader in (self._loader, self._aside_loader):
            loader.shutdown(wait=True, cancel_futures=True)

    @property
    def _has_room(self) -> bool:
        """Whether one more version can be read ahead without pushing another such out of the host cache."""
        budget = self._host.max_bytes
        # Before the first version is read, nobody knows how large they are: assume that the cache holds one.
        num_on_host = budget // (self._largest_bytes or max(1, budget))
        return len(self._reads) + len(self._ahead) < len(self._free) + num_on_host

    def _read_ahead(self) -> None:
        while self._wanted and self._has_room:
            self._yield_aside()
            digest, _ = self._wanted.popitem(last=False)
            if digest not in self._resident and digest not in self._host:
                self._start_read(digest)

    def _yield_aside(self) -> None:
        """Free the slots that nobody but work that must cost nobody anything has used, and forget what it has read."""
        self._aside = None
        for holding in [held for held in self._resident.values() if held.is_aside and not held.users]:
            del self._resident[holding.digest]
            self._vacate(holding.slot)

    def _bring(self, digest: str) -> _Holding | Wait:
        self._yield_aside()
        place = self._find_place()
        weights = self._on_host(digest)
        if digest in self._failures:
            return Wait.LOADING  # the next step tells who waits for it
        if weights is None:
            self._demand(digest)
        if place is None:
            return Wait.NO_SLOT
        if weights is None or self._has_copied:
            return Wait.LOADING
        return self._copy(digest, weights, *place) or Wait.LOADING

    def _on_host(self, digest: str) -> AdapterWeights | None:
        if self._staged and self._staged[0] == digest:
            return self._staged[1]
        return self._host.get(digest)

    def _demand(self, digest: str) -> None:
        """Read a version that a request has its turn for. The first in line is read whatever else is under way."""
        if self._has_missed:
            self.prefetch(digest)
            return
        self._given_up.discard(digest)
        self._has_missed = True
        self._first_in_line = digest
        self._start_read(digest)

    def _start_read(self, digest: str) -> None:
        self._to_reread.pop(digest, None)
        self._wanted.pop(digest, None)
        if self._rereading == digest:
            self._rereading = None  # somebody waits for it by now
        if digest not in self._reads:
            self._asked_at[digest] = time.perf_counter()
            self._reads[digest] = self._loader.submit(_read_timed, self._read_weights, digest)

    def _take_over(self, digest: str) -> None:
        weights, read_ms = self._reads.pop(digest).result()
        is_given_up = digest in self._given_up
        self._given_up.discard(digest)
        self._asked_at.pop(digest, None)
        self._largest_bytes = max(self._largest_bytes, weights.num_bytes)
        self._note_time(digest, read_ms)
        if self._rereading == digest:
            self._rereading = None
            self._host.put(digest, weights)
            return
        place = self._find_place() if digest in self._pinned else self._find_free()
        if place is not None and not self._has_copied:
            self._ahead.add(digest)
            self._copy(digest, weights, *place)
        elif digest == self._first_in_line:
            self._stage(digest, weights)
        elif self._host.put(digest, weights) and not is_given_up:
            self._ahead.add(digest)
        self._ahead &= {*self._host.digests}

    def _stage(self, digest: str, weights: AdapterWeights) -> None:
        former, self._staged = self._staged, (digest, weights)
        if former is not None and former[0] not in self._resident:
            self._host.put(*former)

    def _find_free(self) -> tuple[int, _Holding | None] | None:
        return (self._free[-1], None) if self._free else None

    def _find_place(self) -> tuple[int, _Holding | None] | None:
        """A slot that can be had, and the version that would lose it; changes nothing."""
        if self._free:
            return self._find_free()
        idle = [held for held in self._resident.values() if held.users == 0 and held.digest not in self._pinned]
        if not idle:
            return None
        oldest = min(idle, key=lambda held: held.last_used)
        return oldest.slot, oldest

    def _copy(self, digest: str, weights: AdapterWeights, slot: int, victim: _Holding | None) -> _Holding | None:
        """Put weights into a slot; on an error the slot's former version stays, and the failure is noted."""
        self._has_copied = True
        started = time.perf_counter()
        try:
            self._slots.load(weights, slot=slot)
        except Exception as error:
            # A loading boundary: whatever is wrong with one version must not reach the others.
            self._forget_host(digest)
            self._note_failure(digest, error)
            if not isinstance(error, AdapterRejectedError):
                # Something broke in the middle of copying: the slot holds neither version whole.
                if victim is not None:
                    self._evict(victim)
                    self._free.append(slot)
                self._slots.clear(slot)
            return None
        if victim is None:
            self._free.remove(slot)
        else:
            self._evict(victim)
        copy_ms = (time.perf_counter() - started) * 1000
        is_hit = digest not in self._ahead and digest in self._host
        self._stats.num_loads += 1
        self._stats.num_host_hits += is_hit
        load_ms = copy_ms if is_hit else self._stats.last_load_ms.get(digest, 0.0) + copy_ms
        self._note_time(digest, load_ms)
        self._timings.append(LoadTiming(digest, load_ms / 1000, is_loaded=True))
        self._settle_host(digest, weights)
        holding = self._resident[digest] = _Holding(digest, slot, weights.num_bytes)
        self._touch(holding)
        self._unplaced_pins.discard(digest)
        return holding

    def _settle_host(self, digest: str, weights: AdapterWeights) -> None:
        """Keep the host copy of a version that has lost a slot before, and no other's."""
        self._forget_host(digest)
        if digest in self._lost_slot:
            self._host.put(digest, weights)

    def _forget_host(self, digest: str) -> None:
        self._host.discard(digest)
        self._ahead.discard(digest)
        if self._staged and self._staged[0] == digest:
            self._staged = None
        if self._first_in_line == digest:
            self._first_in_line = None

    def _evict(self, victim: _Holding) -> None:
        del self._resident[victim.digest]
        self._stats.num_evictions += 1
        # Once only: a cache that dropped the copy since is too small, and would only be churned.
        if victim.digest not in self._lost_slot and self._host.max_bytes >= victim.num_bytes:
            self._to_reread[victim.digest] = None
        _remember(self._lost_slot, victim.digest, None)
        _trim(self._to_reread)

    def _reread(self) -> None:
        if self._to_reread and not self._reads:
            digest, _ = self._to_reread.popitem(last=False)
            if digest not in self._resident and digest not in self._host:
                self._start_read(digest)
                self._rereading = digest

    def _place_pins(self) -> None:
        if self._unplaced_pins:
            self._yield_aside()
        for digest in sorted(self._unplaced_pins - self._reads.keys()):
            place = self._find_place()
            weights = self._on_host(digest)
            if place is None or (weights is not None and self._has_copied):
                return
            if weights is None:
                self._start_read(digest)
            else:
                self._copy(digest, weights, *place)

    def _vacate(self, slot: int) -> None:
        self._slots.clear(slot)
        self._free.append(slot)

    def _claim(self, holding: _Holding) -> None:
        holding.is_aside = False
        self._touch(holding)

    def _touch(self, holding: _Holding) -> None:
        self._clock += 1
        holding.last_used = self._clock

    def _note_time(self, digest: str, milliseconds: float) -> None:
        _remember(self._stats.last_load_ms, digest, milliseconds)

    def _note_failure(self, digest: str, error: BaseException) -> None:
        is_rejected = isinstance(error, AdapterRejectedError)
        _log.warning("adapter_load_failed", digest=digest, reason=str(error), exc_info=None if is_rejected else error)
        self._stats.num_failures += 1
        seconds = time.perf_counter() - self._asked_at.pop(digest, time.perf_counter())
        self._timings.append(LoadTiming(digest, seconds, is_loaded=False))
        self._failures[digest] = str(error) if is_rejected else _UNREADABLE
        self._unplaced_pins.discard(digest)
        if self._rereading == digest:
            self._rereading = None
        if self._first_in_line == digest:
            self._first_in_line = None


def _read_timed(read: WeightsReader, digest: str) -> tuple[AdapterWeights, float]:
    started = time.perf_counter()
    weights = read(digest)
    return weights, (time.perf_counter() - started) * 1000


def _remember(table: OrderedDict[str, _Value], digest: str, value: _Value) -> None:
    table[digest] = value
    table.move_to_end(digest)
    _trim(table)


def _trim(table: OrderedDict[str, _Value]) -> None:
    while len(table) > _MAX_REMEMBERED:
        table.popitem(last=False)
