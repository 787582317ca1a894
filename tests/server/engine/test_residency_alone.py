"""The book-keeping of slots and host without a model: host hits, pins, unloading, counters; a state machine over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.errors import AdapterWeightsError, ConflictError
from server.engine.residency import Residence, Residency, Wait
from tests.support.residency import VERSION_BYTES, Shelf, ToySlots, settle

Make = Callable[..., Residency]


@pytest.fixture
def shelf() -> Shelf:
    """Versions a to h; the rank of h is too high for the slots."""
    return Shelf(*"abcdefgh", too_high="h")


@pytest.fixture
def make(shelf: Shelf) -> Iterator[Make]:
    """Make residencies over toy slots."""
    made: list[Residency] = []

    def build(num_slots: int = 2, num_on_host: int = 100) -> Residency:
        residency = Residency(ToySlots(num_slots), shelf.read, max_host_bytes=num_on_host * VERSION_BYTES)
        made.append(residency)
        return residency

    yield build
    shelf.gate.set()
    for residency in made:
        residency.close()


def _use(residency: Residency, digest: str) -> int:
    """Run one request on a version from its first demand to its end."""
    slot = residency.acquire(digest)
    while isinstance(slot, Wait):
        assert not settle(residency)
        slot = residency.acquire(digest)
    residency.release(slot)
    settle(residency)
    return slot


def test_version_is_copied_and_not_read_when_it_lost_its_slot(make: Make, shelf: Shelf) -> None:
    """Three versions take turns in two slots: each is read for its first turn and once behind its first eviction."""
    residency = make()
    for digest in "abcabcabcabc":
        _use(residency, digest)
    assert Counter("aabbcc") == Counter(shelf.reads)
    assert (residency.stats.num_loads, residency.stats.num_host_hits) == (12, 9)
    assert residency.stats.num_evictions == 10


def test_host_holds_nothing_when_all_versions_stay_in_their_slots(make: Make) -> None:
    """Eight adapters in eight slots take the memory of eight adapters."""
    residency = make(num_slots=8)
    for digest in "abcdefg" * 2:
        _use(residency, digest)
    stats = residency.stats
    assert (7 * VERSION_BYTES, 0) == (stats.slot_bytes, stats.host_bytes)
    assert 7 * VERSION_BYTES == stats.resident_bytes


@pytest.mark.parametrize("num_on_host", [0, 1])
def test_versions_get_their_turn_when_the_host_cache_is_too_small(make: Make, num_on_host: int) -> None:
    """A cache that holds fewer versions than wait costs reading, never an answer."""
    residency = make(num_slots=2, num_on_host=num_on_host)
    waiting = list("abcdefg") * 2
    for digest in waiting:
        residency.prefetch(digest)
    for _ in range(40):
        settle(residency)
        assert residency.stats.host_bytes <= (num_on_host + 1) * VERSION_BYTES
        for digest in list(waiting):
            slot = residency.acquire(digest)
            if slot is Wait.NO_SLOT:
                break
            if isinstance(slot, int):
                residency.release(slot)
                waiting.remove(digest)
    assert [] == waiting


def test_step_copies_once_when_several_versions_are_ready(make: Make) -> None:
    """Running requests never wait for two copies in a row."""
    residency = make(num_slots=4)
    for digest in "abcd":
        residency.prefetch(digest)
    residency._loader.submit(bool).result()
    for expected in range(1, 5):
        residency.finish_loads()
        assert expected == residency.stats.num_loads
        for digest in "abcd":
            residency.acquire(digest)
        assert expected == residency.stats.num_loads


def test_prefetch_evicts_nobody_when_all_slots_are_idle(make: Make, shelf: Shelf) -> None:
    """It reads to the host; the slot is taken by the demand, without another read."""
    residency = make()
    _use(residency, "a")
    _use(residency, "b")
    residency.prefetch("c")
    settle(residency)
    assert {"a": 0, "b": 0} == residency.resident
    assert VERSION_BYTES == residency.stats.host_bytes

    assert isinstance(residency.acquire("c"), int)

    assert {"b": 0, "c": 1} == residency.resident
    assert ["a", "b", "c"] == shelf.reads


@pytest.mark.parametrize("is_read", [False, True])
def test_room_for_reading_ahead_is_free_again_when_who_asked_has_left(is_read: bool, make: Make, shelf: Shelf) -> None:
    """Whether the version was on the host by then or still being read; what was read can be pushed out by others."""
    residency = make(num_slots=1, num_on_host=2)
    held = [_use(residency, "a"), residency.acquire("a")]
    if not is_read:
        shelf.gate.clear()
    for digest in "bc":
        residency.prefetch(digest)
    if is_read:
        settle(residency)
    for digest in "bc":
        residency.give_up(digest)
    shelf.gate.set()
    settle(residency)
    for digest in "de":
        residency.prefetch(digest)
    settle(residency)
    assert ["a", "b", "c", "d", "e"] == shelf.reads
    assert 2 * VERSION_BYTES == residency.stats.host_bytes
    assert [1, 1] == held


def test_version_keeps_its_room_when_somebody_asks_again_while_it_is_read(make: Make, shelf: Shelf) -> None:
    """Who left is forgotten by then: nobody else's version is read in its place."""
    residency = make(num_slots=1, num_on_host=1)
    _use(residency, "a")
    residency.acquire("a")
    shelf.gate.clear()
    residency.prefetch("b")
    residency.give_up("b")
    residency.prefetch("b")
    shelf.gate.set()
    settle(residency)
    residency.prefetch("c")
    settle(residency)
    assert ["a", "b"] == shelf.reads


def test_prefetch_reads_when_no_slot_is_free(make: Make, shelf: Shelf) -> None:
    """While others use all slots, the waiting versions come to the host, as many as the cache holds."""
    residency = make(num_slots=1, num_on_host=2)
    _use(residency, "a")
    slot = residency.acquire("a")
    for digest in "bcde":
        residency.prefetch(digest)
    settle(residency)
    assert Wait.NO_SLOT is residency.acquire("b")
    assert ["a", "b", "c"] == shelf.reads

    assert isinstance(slot, int)
    residency.release(slot)

    assert 1 == residency.acquire("b")
    settle(residency)
    assert "d" in shelf.reads  # there is room again


def test_failed_version_is_read_again_only_when_asked(make: Make, shelf: Shelf) -> None:
    """Steps alone retry nothing; the next demand does, and finds the mended files."""
    residency = make()
    shelf.failing.add("a")
    assert Wait.LOADING is residency.acquire("a")
    assert {"a": "a is broken"} == settle(residency)
    for _ in range(5):
        assert {} == settle(residency)
    assert (["a"], 1) == (shelf.reads, residency.stats.num_failures)

    shelf.failing.clear()

    assert 1 == _use(residency, "a")


def test_failed_copy_leaves_the_slots_version_when_the_rank_is_too_high(make: Make, shelf: Shelf) -> None:
    """The version that would have lost its slot keeps it; the reason is told, and the copy is not tried again."""
    residency = make()
    _use(residency, "a")
    _use(residency, "b")
    assert Wait.LOADING is residency.acquire("h")
    assert {} == settle(residency)
    for _ in range(2):
        assert Wait.LOADING is residency.acquire("h")
    assert "rank 99" in residency.finish_loads()["h"]
    assert {} == settle(residency)
    assert {"a": 0, "b": 0} == residency.resident
    assert 1 == residency.stats.num_failures
    assert 0 == residency.stats.host_bytes
    assert ["a", "b", "h"] == shelf.reads


def test_pinned_version_stays_when_others_need_slots(make: Make, shelf: Shelf) -> None:
    """It is loaded without being asked for, and though it is the least recently used it is not evicted."""
    residency = make()
    residency.pin("a")
    settle(residency)
    for digest in "bcdbcd":
        _use(residency, digest)
        assert "a" in residency.resident
    assert 1 == shelf.reads.count("a")

    residency.unpin("a")
    for digest in "bcd":
        _use(residency, digest)

    assert "a" not in residency.resident


def test_pin_takes_an_idle_slot_when_none_is_free(make: Make) -> None:
    """It waits while all are in use, and comes as soon as one is not."""
    residency = make()
    slots = [residency.acquire(digest) for digest in "ab" if _use(residency, digest)]
    residency.pin("c")
    settle(residency)
    assert {"a": 1, "b": 1} == residency.resident
    assert isinstance(slots[1], int)
    residency.release(slots[1])
    settle(residency)
    assert {"a": 1, "c": 0} == residency.resident


def test_pin_is_refused_when_no_slot_would_be_left(make: Make) -> None:
    """One slot stays for all others; pinning again what is pinned is fine."""
    residency = make(num_slots=3)
    for digest in ("a", "b", "a"):
        residency.pin(digest)
    with pytest.raises(ConflictError, match="at most 2 versions can be pinned: one of 3 slots"):
        residency.pin("c")
    assert {"a", "b"} == residency.pinned


def test_pin_gives_up_when_the_version_can_not_be_read(make: Make, shelf: Shelf) -> None:
    """No read in every step; the next request tries again, and then it stays."""
    residency = make()
    shelf.failing.add("a")
    residency.pin("a")
    assert {"a": "a is broken"} == settle(residency)
    settle(residency)
    assert ["a"] == shelf.reads
    shelf.failing.clear()
    _use(residency, "a")
    for digest in "bcd":
        _use(residency, digest)
    assert "a" in residency.resident


def test_unload_frees_the_slot_when_the_last_request_ended(make: Make) -> None:
    """Until then the slot holds what it held; afterwards it is empty and free."""
    residency = make(num_slots=1)
    _use(residency, "a")
    slots = [residency.acquire("a"), residency.acquire("a")]
    residency.unload("a")
    toy = residency._slots
    assert isinstance(toy, ToySlots)
    for slot in slots:
        assert toy.contents[1] is not None
        assert Wait.NO_SLOT is residency.acquire("b")
        assert isinstance(slot, int)
        residency.release(slot)
    assert toy.contents[1] is None
    settle(residency)
    assert 1 == residency.acquire("b")


def test_unload_makes_the_next_demand_read_when_a_host_copy_was_there(make: Make, shelf: Shelf) -> None:
    """Neither the slot nor the host keeps anything of it."""
    residency = make()
    for digest in "abcabc":
        _use(residency, digest)
    num_reads = shelf.reads.count("b")
    residency.unload("b")
    _use(residency, "b")
    assert num_reads + 1 == shelf.reads.count("b")


def test_unload_is_refused_when_the_version_is_pinned(make: Make) -> None:
    """What must not be evicted must not be unloaded either."""
    residency = make()
    residency.pin("a")
    with pytest.raises(ConflictError, match="version a is pinned"):
        residency.unload("a")


def test_stats_tell_the_last_load_when_versions_were_loaded(make: Make) -> None:
    """One time for each version, of its last load."""
    residency = make()
    for digest in "abc":
        _use(residency, digest)
    assert {"a", "b", "c"} == set(residency.stats.last_load_ms)
    assert all(milliseconds > 0 for milliseconds in residency.stats.last_load_ms.values())


# ---------------------------------------------------------------------------------------------------------------------

NUM_SLOTS = 3
NAMES = "abcdefh"


class ResidencyMachine(RuleBasedStateMachine):
    """Requests wait, run and end; reads finish late or fail; versions are pinned and unloaded."""

    @initialize(num_on_host=st.sampled_from([0, 1, 2, 5]))
    def start(self, num_on_host: int) -> None:
        """A cache that is off, small or ample."""
        self.shelf = Shelf(*NAMES, too_high="h")
        self.shelf.gate.clear()
        self.slots = ToySlots(NUM_SLOTS)
        self.budget = num_on_host * VERSION_BYTES
        self.residency = Residency(self.slots, self.shelf.read, max_host_bytes=self.budget)
        self.waiting: list[str] = []
        self.running: list[tuple[str, int]] = []
        self.pinned_slots: dict[str, int] = {}

    @rule(digest=st.sampled_from(NAMES))
    def submit(self, digest: str) -> None:
        """A request is queued."""
        self._drop(self.residency.take_failures())
        self.waiting.append(digest)
        self.residency.prefetch(digest)

    @rule()
    def step(self) -> None:
        """The engine's step: take over what was read, admit in order."""
        num_copies = self.slots.num_copies
        self._drop(self.residency.finish_loads())
        for digest in list(self.waiting):
            slot = self.residency.acquire(digest)
            if slot is Wait.NO_SLOT:
                break
            if isinstance(slot, int):
                self.waiting.remove(digest)
                self.running.append((digest, slot))
        assert self.slots.num_copies - num_copies <= 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A request ends."""
        digest, slot = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert self.slots.contents[slot] is self.shelf.versions[digest]
        self.residency.release(slot)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A waiting client leaves."""
        self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))

    @rule()
    def finish_reads(self) -> None:
        """The loader has read what was asked for."""
        self.shelf.gate.set()
        self.residency._loader.submit(bool).result()
        self.shelf.gate.clear()

    @rule(digest=st.sampled_from(NAMES))
    def break_version(self, digest: str) -> None:
        """A version can't be read from here on."""
        self.shelf.failing.add(digest)

    @rule()
    def mend(self) -> None:
        """All versions can be read."""
        self.shelf.failing.clear()

    @rule(digest=st.sampled_from(NAMES))
    def pin(self, digest: str) -> None:
        """A version shall stay, unless too many shall."""
        if len(self.residency.pinned | {digest}) < NUM_SLOTS:
            self.residency.pin(digest)
        else:
            with pytest.raises(ConflictError):
                self.residency.pin(digest)

    @rule(digest=st.sampled_from(NAMES))
    def unpin(self, digest: str) -> None:
        """A version may go."""
        self.residency.unpin(digest)
        self.pinned_slots.pop(digest, None)

    @rule(digest=st.sampled_from(NAMES))
    def unload(self, digest: str) -> None:
        """A version shall go at once."""
        if digest not in self.residency.pinned:
            self.residency.unload(digest)
            assert digest not in self.residency.resident

    @invariant()
    def users_are_those_that_run(self) -> None:
        """Counted per slot; none is negative, and none runs in a slot that is free."""
        holdings = [*self.residency._resident.values(), *self.residency._draining.values()]
        assert Counter(slot for _, slot in self.running) == Counter({h.slot: h.users for h in holdings if h.users})
        assert all(holding.users >= 0 for holding in holdings)

    @invariant()
    def no_slot_is_lost(self) -> None:
        """Every slot is free, holds one version or drains, exactly one of the three."""
        in_use = [h.slot for h in (*self.residency._resident.values(), *self.residency._draining.values())]
        assert sorted([*self.residency._free, *in_use]) == list(range(1, NUM_SLOTS + 1))

    @invariant()
    def slots_hold_what_the_book_says(self) -> None:
        """The very weights of the version; who runs has his own."""
        for digest, holding in self.residency._resident.items():
            assert self.slots.contents[holding.slot] is self.shelf.versions[digest]
        for digest, slot in self.running:
            assert self.slots.contents[slot] is self.shelf.versions[digest]

    @invariant()
    def pinned_versions_stay(self) -> None:
        """Once in a slot, a pinned version is there until it is unpinned."""
        resident = self.residency._resident
        for digest, slot in self.pinned_slots.items():
            assert resident[digest].slot == slot
        self.pinned_slots = {d: resident[d].slot for d in self.residency.pinned if d in resident}

    @invariant()
    def bytes_are_within_the_budget(self) -> None:
        """The cache keeps to it; beside it is at most the version in line."""
        assert self.residency._host.num_bytes <= self.budget
        assert self.residency.stats.host_bytes <= self.budget + VERSION_BYTES
        assert self.residency.stats.slot_bytes <= NUM_SLOTS * VERSION_BYTES

    def teardown(self) -> None:
        """Everybody who waits gets his turn in a bounded number of steps, and then nobody is left anywhere."""
        if not hasattr(self, "residency"):
            return
        self.shelf.gate.set()
        self.shelf.failing.clear()
        for _ in range(4 * len(self.waiting) + 20):
            self.residency._loader.submit(bool).result()
            self.step()
            if self.running:
                self.residency.release(self.running.pop(0)[1])
            self.no_slot_is_lost()
        assert ([], []) == (self.waiting, self.running)
        settle(self.residency)
        assert not any(self.residency.resident.values())
        assert {} == self.residency._draining
        self.residency.close()

    def _drop(self, failures: dict[str, str]) -> None:
        assert all(reason.endswith("is broken") or "rank 99" in reason for reason in failures.values())
        self.waiting = [digest for digest in self.waiting if digest not in failures]


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class _FailsLate:
    """A read that is not done when it is looked at, and has failed right after."""

    def __init__(self) -> None:
        self.num_looks = 0

    def done(self) -> bool:
        """False once, then True."""
        self.num_looks += 1
        return self.num_looks > 1

    def exception(self) -> Exception:
        """What went wrong."""
        return AdapterWeightsError("damaged")

    def result(self) -> None:
        """Raises, as a failed future does."""
        raise self.exception()


def test_read_that_fails_while_a_step_looks_at_it_is_a_failure_like_any_other(make: Make) -> None:
    """The loader's thread may fail between two looks: the step must not raise."""
    residency = make()
    residency._reads["a"] = _FailsLate()  # type: ignore[assignment]
    assert {"a": "damaged"} == residency.finish_loads()
    assert {} == residency.finish_loads()


def test_evicted_version_is_gone_when_the_copy_over_it_breaks_in_the_middle(make: Make) -> None:
    """Its slot holds neither version whole: it must be cleared and loaded again, never answer as it is."""
    residency = make(num_slots=1)
    _use(residency, "a")
    slots = cast("ToySlots", residency._slots)
    slots.is_broken = True
    assert isinstance(residency.acquire("b"), Wait)
    settle(residency)
    assert isinstance(residency.acquire("b"), Wait)
    slots.is_broken = False
    assert ({}, {1: None}) == (residency.resident, slots.contents)
    assert {"b"} == set(residency.take_failures())
    assert 1 == _use(residency, "a")


def test_report_tells_where_every_version_is_when_they_are_everywhere(make: Make, shelf: Shelf) -> None:
    """In a slot and in use, draining, on the host, on its way, pinned; what is only in the store is not told."""
    residency = make(num_slots=3)
    for digest in "abcd":  # d takes the slot of a, which goes to the host
        _use(residency, digest)
    residency.set_pinned(["c"])
    slots = {digest: residency.acquire(digest) for digest in "bd"}
    residency.unload("b")
    shelf.gate.clear()
    residency.prefetch("e")
    told = {entry.digest: entry for entry in residency.report()}
    shelf.gate.set()
    assert Residence("a", is_on_host=True) == told["a"]
    assert (slots["b"], True, 1) == (told["b"].slot, told["b"].is_draining, told["b"].num_requests)
    assert (True, 0) == (told["c"].is_pinned, told["c"].num_requests)
    assert (slots["d"], False, 1) == (told["d"].slot, told["d"].is_draining, told["d"].num_requests)
    assert Residence("e", is_loading=True) == told["e"]
    assert "f" not in told


def test_pinned_versions_are_exactly_those_that_are_wanted_when_the_list_changes(make: Make) -> None:
    """Those that left the list may be evicted; of too many the first ones are kept, one slot stays for all others."""
    residency = make(num_slots=3)
    pinned = []
    for wanted in ("ab", "bc", "dabc", ""):
        residency.set_pinned(wanted)
        settle(residency)
        pinned.append("".join(sorted(residency.pinned)))
    assert ["ab", "bc", "ad", ""] == pinned
    assert {"a", "d"} <= set(residency.resident)
