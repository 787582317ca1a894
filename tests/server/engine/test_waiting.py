"""The queue: order within a lane, fairness between clients and versions, the line for slots, deadlines; by property."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.engine.core import GenerationRequest, SamplingParams, Wait
from server.engine.waiting import FairShare, Waiting, WaitingQueue

MAX_OVERTAKES = 3
CLIENTS = ("ann", "bob", "cat")
DIGESTS = ("A", "B", "C", "D", "E")


def _request(
    name: str,
    digest: str | None = None,
    *,
    client: str = "",
    prompt: int = 1,
    max_tokens: int = 9,
    timeout_s: float | None = None,
) -> GenerationRequest:
    return GenerationRequest(name, (1,) * prompt, digest, SamplingParams(max_tokens), client, timeout_s)


def _queue(*requests: GenerationRequest) -> WaitingQueue:
    queue = WaitingQueue(max_overtakes=MAX_OVERTAKES)
    for request in requests:
        queue.add(Waiting(request, 0))
    return queue


def _always(request: GenerationRequest) -> int | Wait:
    return 0 if request.digest is None else 1


def _admit_all(queue: WaitingQueue, can_admit: Callable[[GenerationRequest], int | Wait] = _always) -> list[str]:
    names = []
    while admitted := queue.admit_next(can_admit):
        names.append(admitted[0].request.id)
    return names


# Order and book-keeping ----------------------------------------------------------------------------------------------


def test_requests_keep_their_order_when_client_and_version_are_one() -> None:
    """First come, first served within a lane."""
    names = [f"r{index}" for index in range(5)]
    assert names == _admit_all(_queue(*(_request(name, "A") for name in names)))


def test_request_comes_with_its_slot_and_time_when_it_is_admitted() -> None:
    """What the callback gave and when the request was submitted are handed back."""
    queue = WaitingQueue()
    queue.add(Waiting(_request("r", "A"), 7))
    admitted = queue.admit_next(lambda request: 4)
    assert admitted is not None
    assert ("r", 7, 4) == (admitted[0].request.id, admitted[0].submitted_at, admitted[1])
    assert (0, 0) == (len(queue), queue.num_tokens)


def test_nobody_is_admitted_when_there_is_no_room() -> None:
    """A request without room lets nobody pass, or small ones would keep a large one waiting."""
    queue = _queue(_request("large", prompt=100), _request("small", client="bob"))
    refused: list[str] = []

    def refuse_large(request: GenerationRequest) -> int | Wait:
        refused.append(request.id)
        return Wait.NO_ROOM if request.id == "large" else 0

    assert None is queue.admit_next(refuse_large)
    assert (["large"], 2) == (refused, len(queue))


def test_queue_counts_requests_and_tokens_when_they_come_and_go() -> None:
    """Prompt and max_tokens of those who are there."""
    queue = _queue(_request("a", prompt=3, max_tokens=4), _request("b", "A", prompt=1, max_tokens=2))
    assert (2, 10) == (len(queue), queue.num_tokens)
    removed = queue.remove_if(lambda waiting: waiting.request.id == "a")
    assert ["a"] == [waiting.request.id for waiting in removed]
    assert (1, 3) == (len(queue), queue.num_tokens)
    assert ["b"] == _admit_all(queue)


def test_deadlines_are_kept_when_time_passes() -> None:
    """Who is late is taken out once, at the moment of the deadline and not before; no timeout is no deadline."""
    queue = _queue(_request("slow", timeout_s=5), _request("none"), _request("fast", "A", timeout_s=2))
    assert [[], ["fast"], [], ["slow"], []] == [
        [waiting.request.id for waiting in queue.expire(now)] for now in (1.9, 2, 4.9, 5, 100)
    ]
    assert ["none"] == _admit_all(queue)


# Fairness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "digest"), [("bob", "A"), ("", "B")])
def test_first_request_is_next_but_one_when_another_has_a_thousand(client: str, digest: str) -> None:
    """Neither a key nor a version with a long queue holds up another's first request."""
    queue = _queue(*(_request(f"r{index}", "A") for index in range(1000)))
    queue.admit_next(_always)
    queue.add(Waiting(_request("first", digest, client=client), 0))
    order = [queue.admit_next(_always) for _ in range(2)]
    assert "first" in [entry[0].request.id for entry in order if entry]


def test_shares_are_equal_in_tokens_when_requests_are_of_different_size() -> None:
    """A client with requests of ten times the size is admitted a tenth as often."""
    requests = [_request(f"a{index}", client="ann", max_tokens=99) for index in range(50)]
    requests += [_request(f"b{index}", client="bob", max_tokens=9) for index in range(500)]
    counts = Counter(name[0] for name in _admit_all(_queue(*requests))[:220])
    assert {"a": 20, "b": 200} == counts


def test_share_is_charged_by_use_when_requests_are_settled() -> None:
    """A client that asks for long answers and gets short ones is charged for the short ones."""
    names = []
    queue = _queue(*(_request(f"a{index}", client="ann", max_tokens=99) for index in range(40)))
    for index in range(40):
        queue.add(Waiting(_request(f"b{index}", client="bob", max_tokens=9), 0))
    for _ in range(40):
        admitted = queue.admit_next(_always)
        assert admitted is not None
        names.append(admitted[0].request.id[0])
        if names[-1] == "a":
            queue.settle(admitted[0].request, num_unused=90)
    assert {"a": 20, "b": 20} == Counter(names)


def test_idle_time_saves_up_nothing_when_a_client_comes_back() -> None:
    """A client that was away while another was served a hundred times is not served a hundred times in a row."""
    queue = _queue(*(_request(f"a{index}", client="ann") for index in range(200)), _request("b", client="bob"))
    for _ in range(100):
        queue.admit_next(_always)
    for index in range(100):
        queue.add(Waiting(_request(f"b{index}", client="bob"), 0))
    assert {"a": 10, "b": 10} == Counter(name[0] for name in _admit_all(queue)[:20])


def test_nothing_is_remembered_when_the_queue_is_empty() -> None:
    """However many clients came, no record of them stays."""
    queue = WaitingQueue()
    for index in range(100):
        queue.add(Waiting(_request(f"r{index}", "A", client=f"client{index}"), 0))
    assert 100 == len(_admit_all(queue))
    assert ({}, {}) == (queue._lanes, queue._versions)
    assert "client5" not in queue._clients


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 50)), min_size=1, max_size=120), st.data())
def test_share_is_within_the_bound_when_flows_wait_all_the_time(
    costs: list[tuple[str, int]], data: st.DataObject
) -> None:
    """In any stretch, two flows' service differs by at most the largest cost of each."""
    share: FairShare[str] = FairShare()
    flows = sorted({flow for flow, _ in costs})
    largest = {flow: max(cost for name, cost in costs if name == flow) for flow in flows}
    for flow in flows:
        share.join(flow)
    served = []
    for _ in range(60):
        flow = min(flows, key=share.rank)
        cost = data.draw(st.integers(1, largest[flow]))
        share.charge(flow, cost)
        served.append((flow, cost))
    for start in range(0, 60, 7):
        for end in range(start, 60, 5):
            work = {flow: sum(cost for name, cost in served[start:end] if name == flow) for flow in flows}
            for one in flows:
                for other in flows:
                    assert abs(work[one] - work[other]) <= largest[one] + largest[other]


_ARRIVALS = st.lists(
    st.tuples(st.sampled_from(CLIENTS), st.sampled_from([None, *DIGESTS]), st.integers(1, 40), st.integers(0, 3)),
    max_size=60,
)


@given(arrivals=_ARRIVALS, settle=st.booleans())
def test_first_request_waits_for_one_of_each_other_client_when_there_is_room(
    arrivals: list[tuple[str, str | None, int, int]], settle: bool
) -> None:
    """Whatever came before and comes after: from a newcomer's arrival to its admission, nobody else has two turns."""
    queue = WaitingQueue()
    for index, (client, digest, size, num_admitted) in enumerate(arrivals):
        queue.add(Waiting(_request(f"r{index}", digest, client=client, max_tokens=size), 0))
        _admit(queue, num_admitted, settle=settle)
    queue.add(Waiting(_request("first", client="newcomer"), 0))
    counts: Counter[str] = Counter()
    later = iter(arrivals)
    while (admitted := queue.admit_next(_always)) and admitted[0].request.id != "first":
        counts[admitted[0].request.client] += 1
        if settle:
            queue.settle(admitted[0].request, num_unused=admitted[0].request.sampling.max_tokens)
        if arrival := next(later, None):
            queue.add(Waiting(_request(f"late{sum(counts.values())}", arrival[1], client=arrival[0]), 0))
    assert admitted is not None
    assert all(num <= 1 for num in counts.values())


def _admit(queue: WaitingQueue, num: int, *, settle: bool) -> None:
    for _ in range(num):
        admitted = queue.admit_next(_always)
        if admitted and settle:
            queue.settle(admitted[0].request, num_unused=admitted[0].request.sampling.max_tokens)


# The line for slots --------------------------------------------------------------------------------------------------


@dataclass
class Slots:
    """What `Residency` decides, without weights: who is there, who uses it, who is evicted."""

    num_slots: int
    users: dict[str, int] = field(default_factory=dict)  # in the order of use
    loading: set[str] = field(default_factory=set)

    def acquire(self, request: GenerationRequest) -> int | Wait:
        """A slot, or why there is none; starts a load where one is possible."""
        digest = request.digest
        if digest is None:
            return 0
        if digest in self.users:
            self.users[digest] = self.users.pop(digest) + 1
            return 1
        if digest in self.loading:
            return Wait.LOADING
        if len(self.users) + len(self.loading) >= self.num_slots:
            idle = next((name for name, num in self.users.items() if not num), None)
            if idle is None:
                return Wait.NO_SLOT
            del self.users[idle]
        self.loading.add(digest)
        return Wait.LOADING

    def finish(self, digest: str) -> None:
        """The load is done."""
        self.loading.remove(digest)
        self.users[digest] = 0


def test_stream_for_a_resident_version_is_held_when_another_was_passed_often_enough() -> None:
    """Exactly `max_overtakes` pass; then only the base does, until the slot is free and the version has been used."""
    slots = Slots(1, {"A": 1})
    queue = _queue(_request("c", "C"))
    assert [] == _admit_all(queue, slots.acquire)
    for index in range(6):
        queue.add(Waiting(_request(f"a{index}", "A"), 0))
    queue.add(Waiting(_request("base"), 0))

    admitted = _admit_all(queue, slots.acquire)

    assert ["a0", "a1", "a2"] == [name for name in admitted if name != "base"]
    assert "base" in admitted
    slots.users["A"] = 0
    assert [] == _admit_all(queue, slots.acquire)
    assert {"C"} == slots.loading
    slots.finish("C")
    assert "c" == _admit_all(queue, slots.acquire)[0]


def test_loaded_version_is_used_before_it_is_evicted_when_others_want_the_slot() -> None:
    """A load that was waited for is not thrown away for a version that was asked for later."""
    slots = Slots(1)
    queue = _queue(_request("c", "C", client="ann"))
    assert None is queue.admit_next(slots.acquire)
    queue.add(Waiting(_request("d", "D", client="bob"), 0))
    assert None is queue.admit_next(slots.acquire)
    slots.finish("C")
    admitted = queue.admit_next(slots.acquire)
    assert admitted is not None
    assert "c" == admitted[0].request.id


def test_line_goes_round_the_clients_when_one_wants_many_versions() -> None:
    """A client's first version comes after one of each other client, not after all that they stand in line for."""
    slots = Slots(1, {"X": 1})
    queue = _queue(*(_request(digest, digest, client="ann") for digest in DIGESTS[:4]))
    assert None is queue.admit_next(slots.acquire)
    queue.add(Waiting(_request("E", "E", client="bob"), 0))
    assert None is queue.admit_next(slots.acquire)
    order = []
    while queue:
        slots.users = dict.fromkeys(slots.users, 0)
        queue.admit_next(slots.acquire)
        (digest,) = slots.loading
        slots.finish(digest)
        admitted = queue.admit_next(slots.acquire)
        assert admitted is not None
        order.append(admitted[0].request.id)
    assert ["A", "E", "B", "C", "D"] == order


def test_place_in_line_is_given_up_when_nobody_waits_for_the_version() -> None:
    """After a cancel the others are not held back for it."""
    slots = Slots(1, {"A": 1})
    queue = _queue(_request("c", "C"))
    assert None is queue.admit_next(slots.acquire)
    for index in range(6):
        queue.add(Waiting(_request(f"a{index}", "A"), 0))
    assert 3 == len(_admit_all(queue, slots.acquire))
    queue.remove_if(lambda waiting: waiting.request.id == "c")
    assert 3 == len(_admit_all(queue, slots.acquire))


class LineMachine(RuleBasedStateMachine):
    """Requests of several clients and versions come, run, end and are cancelled, over two slots that load slowly.

    For each lane it counts the admissions that needed a slot, out of order of loads, while the lane stood in line.
    """

    clients: tuple[str, ...] = CLIENTS

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue(max_overtakes=MAX_OVERTAKES)
        self.slots = Slots(2)
        self.running: list[GenerationRequest] = []
        self.num_made = 0
        self.overtakes: dict[tuple[str, str | None], int] = {}
        self.allowed: dict[tuple[str, str | None], int] = {}

    @rule(data=st.data(), digest=st.sampled_from([None, *DIGESTS]), size=st.integers(1, 20))
    def submit(self, data: st.DataObject, digest: str | None, size: int) -> None:
        """A request comes."""
        client = data.draw(st.sampled_from(self.clients))
        self.queue.add(Waiting(_request(f"r{self.num_made}", digest, client=client, max_tokens=size), 0))
        self.num_made += 1

    @rule(num=st.integers(1, 6))
    def admit(self, num: int) -> None:
        """The batch takes some."""
        for _ in range(num):
            self._admit_one()

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A running request ends."""
        if self.running:
            self._end(data.draw(st.integers(0, len(self.running) - 1)))

    @rule()
    def finish_loads(self) -> None:
        """The loader is done with all it was asked for."""
        for digest in list(self.slots.loading):
            self.slots.finish(digest)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves."""
        name = f"r{data.draw(st.integers(0, max(0, self.num_made - 1)))}"
        self.queue.remove_if(lambda waiting: waiting.request.id == name)
        self._forget_left()

    @invariant()
    def nobody_in_line_is_passed_more_often_than_stated(self) -> None:
        """A lane's count stays within what stood before it in line when it joined."""
        for lane, num in self.overtakes.items():
            assert num <= self.allowed[lane], f"{lane} was passed {num} times"

    def teardown(self) -> None:
        """Whoever waits is admitted in the end, if running requests end and loads finish."""
        for _ in range(20 * self.num_made + 20):
            self.finish_loads()
            self.admit(1)
            if self.running:
                self._end(0)
        assert 0 == len(self.queue) == self.queue.num_tokens

    def _admit_one(self) -> None:
        coming = set(self.queue._coming)
        verdicts: dict[tuple[str, str | None], int | Wait] = {}

        def ask(request: GenerationRequest) -> int | Wait:
            verdict = verdicts[request.client, request.digest] = self.slots.acquire(request)
            return verdict

        admitted = self.queue.admit_next(ask)
        for lane, verdict in verdicts.items():
            if verdict is Wait.NO_SLOT and lane not in self.overtakes:
                self._join(lane)
            elif verdict is not Wait.NO_SLOT:
                self.overtakes.pop(lane, None)
        if admitted is None:
            return
        request = admitted[0].request
        self.running.append(request)
        taken = request.client, request.digest
        if request.digest is not None and taken not in coming:
            for lane in self.overtakes:
                self.overtakes[lane] += 1
        self._forget_left()

    def _join(self, lane: tuple[str, str | None]) -> None:
        # Lanes of the same client that joined earlier come before it, and for each of its client's turns one of each
        # other client; each of these may be passed by as many as it may itself.
        num_own = sum(other[0] == lane[0] for other in self.overtakes)
        self.overtakes[lane] = 0
        self.allowed[lane] = MAX_OVERTAKES * (num_own + 1) * len(self.clients)

    def _forget_left(self) -> None:
        self.overtakes = {lane: num for lane, num in self.overtakes.items() if lane in self.queue._lanes}

    def _end(self, index: int) -> None:
        request = self.running.pop(index)
        if request.digest is not None:
            self.slots.users[request.digest] -= 1
        self.queue.settle(request, num_unused=request.sampling.max_tokens // 2)


class OneClientMachine(LineMachine):
    """The same with one client, where the bound is the tightest."""

    clients = CLIENTS[:1]


TestLineMachine = LineMachine.TestCase
TestOneClientMachine = OneClientMachine.TestCase
