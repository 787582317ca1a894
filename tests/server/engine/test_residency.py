"""More versions than slots: loading beside running requests, eviction, failing loads; a state machine over it.

The book-keeping without an engine is in `test_residency_alone.py`.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.scheduler import Engine
from tests.support.engine import (
    RECIPES,
    Answer,
    Bench,
    GatedReader,
    Reference,
    ask,
    collect,
    drain,
    expected_tokens,
    make_bench,
    run_to_end,
    save_recipes,
    wait_for_loads,
)
from tests.support.tiny import save_tiny_base

A, B, C, D = RECIPES
PROMPT = "hello there"


@pytest.fixture
def small(own_bench: Callable[..., Bench]) -> Bench:
    """Two slots and three rows."""
    return own_bench(num_slots=2, max_batch=3)


@pytest.fixture
def reader(small: Bench) -> GatedReader:
    """A reader whose loads last as long as a test wants."""
    return GatedReader(small.read)


@pytest.fixture
def engine(small: Bench, reader: GatedReader) -> Iterator[Engine]:
    """An engine with the gated reader, which is let go at the end."""
    made = small.engine(read=reader)
    yield made
    reader.open()
    made.close()


def test_every_version_is_answered_when_there_are_more_than_slots(
    engine: Engine, reader: GatedReader, small: Bench, reference_answers: Reference
) -> None:
    """Four versions and the base over two slots, twice round: each request gets its own version's tokens."""
    reader.open()
    digests = [A, B, None, C, D, A, C, None, B, D]
    requests = [ask(f"r{index}", PROMPT, digest) for index, digest in enumerate(digests)]
    answers = run_to_end(engine, *requests)
    for request in requests:
        expected, reason = expected_tokens(reference_answers, request, small.base.tokenizer.eos_token_id)
        assert (expected, reason) == (answers[request.id].tokens, answers[request.id].finish_reason)
    assert len(engine.residency.resident) == 2


def test_least_recently_used_version_is_evicted_when_a_slot_is_needed(engine: Engine, reader: GatedReader) -> None:
    """Use of a resident version counts, not the time of its load."""
    reader.open()
    for digest in (A, B, A):
        run_to_end(engine, ask(digest, PROMPT, digest))
    run_to_end(engine, ask("r", PROMPT, C))
    assert engine.residency.resident == {A: 0, C: 0}


def test_version_is_not_evicted_when_a_request_runs_on_it(engine: Engine, reader: GatedReader) -> None:
    """Of two residents the idle one goes, even if it was used later."""
    reader.open()
    engine.prefetch([A, B])
    drain(engine, {})
    engine.submit(ask("long", PROMPT, A, max_tokens=40))
    engine.step()
    slot = engine.residency.acquire(B)
    assert isinstance(slot, int)
    engine.residency.release(slot)

    engine.submit(ask("c", PROMPT, C))
    wait_for_loads(engine)
    engine.step()

    assert engine.residency.resident == {A: 1, C: 1}


def test_version_gets_a_slot_when_requests_for_resident_ones_keep_coming(engine: Engine, reader: GatedReader) -> None:
    """Two versions in two slots always have a request in the queue; a third one still runs after a bounded number."""
    reader.open()
    engine.prefetch([A, B])
    drain(engine, {})
    answers: dict[str, Answer] = {}
    for index, digest in enumerate([A, B] * 4):
        collect(engine.submit(ask(f"early{index}", PROMPT, digest, max_tokens=3)), answers)
    collect(engine.step(), answers)
    collect(engine.submit(ask("c", PROMPT, C, max_tokens=1)), answers)
    num_late = 0
    while "c" not in answers:
        if engine.residency.is_loading:
            wait_for_loads(engine)
        collect(engine.submit(ask(f"late{num_late}", PROMPT, [A, B][num_late % 2], max_tokens=3)), answers)
        num_late += 1
        collect(engine.step(), answers)
        assert num_late < 60

    drain(engine, answers)

    num_before = list(answers).index("c")
    assert num_before <= 3 + 8 + 3
    assert {1} == {answer.num_terminal for answer in answers.values()}


def test_base_model_is_answered_when_every_slot_is_in_use(engine: Engine, reader: GatedReader) -> None:
    """A request that needs no slot passes one that waits for a slot, however long that one has waited."""
    reader.open()
    engine.prefetch([A, B])
    drain(engine, {})
    answers: dict[str, Answer] = {}
    for request in (ask("a", PROMPT, A, max_tokens=40), ask("b", PROMPT, B, max_tokens=40)):
        collect(engine.submit(request), answers)
    collect(engine.step(), answers)
    collect(engine.submit(ask("c", PROMPT, C)), answers)
    for index in range(10):
        collect(engine.submit(ask(f"base{index}", PROMPT, max_tokens=1)), answers)
        collect(engine.step(), answers)

    assert "c" not in answers
    assert {"length"} == {answers[f"base{index}"].finish_reason for index in range(9)}
    drain(engine, answers)
    assert answers["c"].num_terminal == 1


def test_others_go_on_when_a_version_is_being_loaded(engine: Engine, reader: GatedReader) -> None:
    """Requests behind one that waits for its load are answered meanwhile."""
    answers: dict[str, Answer] = {}
    for request in (ask("slow", PROMPT, A), ask("base", PROMPT, max_tokens=2)):
        collect(engine.submit(request), answers)
    for _ in range(4):
        collect(engine.step(), answers)
    assert list(answers) == ["base"]
    assert answers["base"].finish_reason == "length"
    assert not engine.is_idle

    reader.open()
    drain(engine, answers)

    assert answers["slow"].finish_reason in ("length", "stop")


def test_load_failure_fails_only_its_requests_when_others_wait_too(engine: Engine, reader: GatedReader) -> None:
    """Each gets the reason in its one event; the rest is answered; a later try of the same version works."""
    reader.failing.add(A)
    answers: dict[str, Answer] = {}
    for request in (ask("a1", PROMPT, A), ask("b", PROMPT, B), ask("base", PROMPT), ask("a2", PROMPT, A)):
        collect(engine.submit(request), answers)
    reader.open()
    drain(engine, answers)
    for name in ("a1", "a2"):
        assert Answer("", 0, "adapter_failed", "no file for 1", 1) == answers[name]
    assert {"length"} == {answers[name].finish_reason for name in ("b", "base")}
    assert engine.residency.resident == {B: 0}

    reader.failing.clear()

    assert run_to_end(engine, ask("again", PROMPT, A))["again"].finish_reason == "length"


def test_load_failure_gives_its_slot_back_when_it_repeats(engine: Engine, reader: GatedReader) -> None:
    """Three failures in a row use up none of the two slots."""
    reader.open()
    reader.failing.add(C)
    for index in range(3):
        assert run_to_end(engine, ask(f"r{index}", PROMPT, C))[f"r{index}"].finish_reason == "adapter_failed"
    run_to_end(engine, ask("a", PROMPT, A), ask("b", PROMPT, B))
    assert engine.residency.resident == {A: 0, B: 0}


def test_load_failure_hides_its_text_when_the_error_is_unexpected(engine: Engine, reader: GatedReader) -> None:
    """Only our own errors' sentences are meant for users."""
    reader.open()
    reader.crashing.add(A)
    answer = run_to_end(engine, ask("r", PROMPT, A))["r"]
    assert (answer.finish_reason, answer.error) == (
        "adapter_failed",
        "its stored files are missing or damaged; the server's log has the reason",
    )


def test_load_failure_keeps_the_former_adapter_out_when_a_slot_is_reused(
    engine: Engine, reader: GatedReader, small: Bench, reference_answers: Reference
) -> None:
    """After a failed load into an evicted slot, the evicted version is loaded afresh and answers right."""
    reader.open()
    run_to_end(engine, ask("a", PROMPT, A), ask("b", PROMPT, B))
    reader.failing.add(C)
    run_to_end(engine, ask("c", PROMPT, C))
    request = ask("again", PROMPT, A)
    answer = run_to_end(engine, request)["again"]
    assert expected_tokens(reference_answers, request, small.base.tokenizer.eos_token_id)[0] == answer.tokens


def test_prefetch_loads_as_many_as_fit_when_it_is_given_more(engine: Engine, reader: GatedReader) -> None:
    """Versions beyond the slots are left for later; nobody counts as their user."""
    reader.open()
    engine.prefetch([A, B, C])
    drain(engine, {})
    assert engine.residency.resident == {A: 0, B: 0}
    engine.prefetch([A])
    assert engine.residency.resident == {A: 0, B: 0}


def test_load_failure_costs_nobody_a_slot_when_all_slots_are_taken(engine: Engine, reader: GatedReader) -> None:
    """Another version is evicted only for weights that are there."""
    reader.open()
    run_to_end(engine, ask("a", PROMPT, A), ask("b", PROMPT, B))
    reader.failing.add(C)
    run_to_end(engine, ask("c", PROMPT, C))
    assert engine.residency.resident == {A: 0, B: 0}
    assert engine.residency.stats.num_evictions == 0


def test_load_failure_is_not_inherited_when_a_request_comes_after_it(engine: Engine, reader: GatedReader) -> None:
    """Who comes after the failure has the version read again, even in the same step; who waited gets the reason."""
    reader.failing.add(A)
    answers: dict[str, Answer] = {}
    collect(engine.submit(ask("early", PROMPT, A)), answers)
    reader.finish_loads(engine)
    reader.failing.clear()

    collect(engine.submit(ask("late", PROMPT, A)), answers)

    assert answers["early"].finish_reason == "adapter_failed"
    reader.open()
    drain(engine, answers)
    assert answers["late"].finish_reason == "length"


def test_version_is_read_ahead_when_the_request_before_it_was_cancelled(small: Bench) -> None:
    """What was read for somebody who has left takes no room from those who wait."""
    largest = max(small.read(digest).num_bytes for digest in (A, B, C, D))
    engine = small.engine(max_host_bytes=largest)
    engine.prefetch([A, B])
    drain(engine, {})
    for index in range(small.runner.cache.num_rows):
        engine.submit(ask(f"long{index}", PROMPT, (A, B)[index % 2], max_tokens=60))
    engine.step()
    for name, digest in (("c", C), ("d", D)):
        engine.submit(ask(name, PROMPT, digest))
        wait_for_loads(engine)
        engine.step()
        assert digest in _on_host(engine)
        engine.cancel(name)
    engine.close()


def _on_host(engine: Engine) -> set[str]:
    return {residence.digest for residence in engine.residency.report() if residence.is_on_host}


def test_versions_are_read_when_requests_are_queued(engine: Engine, reader: GatedReader, small: Bench) -> None:
    """With every row in use, the versions of waiting requests are on the host before it is their turn."""
    reader.open()
    engine.prefetch([A, B])
    drain(engine, {})
    for index in range(small.runner.cache.num_rows):
        engine.submit(ask(f"long{index}", PROMPT, A, max_tokens=60))
    engine.step()
    assert engine.num_running == small.runner.cache.num_rows
    engine.submit(ask("c", PROMPT, C))
    engine.submit(ask("d", PROMPT, D))
    wait_for_loads(engine)
    engine.step()

    reader.failing |= {C, D}  # nothing is read any more: what is answered was on the host

    answers: dict[str, Answer] = {}
    drain(engine, answers)
    assert {"length"} == {answers[name].finish_reason for name in ("c", "d")}


@pytest.mark.parametrize("in_use", [False, True])
def test_unloaded_version_is_loaded_again_when_it_is_asked_for(
    in_use: bool, engine: Engine, reader: GatedReader, small: Bench, reference_answers: Reference
) -> None:
    """A running request keeps its slot to its last token; a later one gets a slot of its own; both answer right."""
    reader.open()
    first, second = ask("first", PROMPT, A, max_tokens=8), ask("second", PROMPT, A, max_tokens=8)
    answers: dict[str, Answer] = {}
    collect(engine.submit(first), answers)
    wait_for_loads(engine)
    collect(engine.step(), answers)
    if not in_use:
        drain(engine, answers)

    engine.residency.unload(A)

    assert engine.residency.resident == {}
    collect(engine.submit(second), answers)
    drain(engine, answers)
    eos = small.base.tokenizer.eos_token_id
    for request in (first, second):
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens
    assert engine.residency.stats.num_loads == 2
    assert engine.residency.resident == {A: 0}


# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["x", "hello there", "a prompt that takes more than one chunk"]
MAX_TOKENS = 6


@lru_cache(maxsize=1)
def _shared() -> tuple[Bench, Reference]:
    """One model for all runs of the state machine, made when the first of them starts."""
    temporary = tempfile.TemporaryDirectory(prefix="hotswap-residency-")
    atexit.register(temporary.cleanup)
    root = Path(temporary.name)
    folder = save_tiny_base(root / "base")
    adapters = save_recipes(root / "adapters", folder)
    return make_bench(folder, adapters, num_slots=2, max_batch=3), Reference(folder, adapters)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, are cancelled, versions load slowly or not at all; every answer is right and ends once."""

    def __init__(self) -> None:
        super().__init__()
        self.bench, self.reference = _shared()
        self.reader = GatedReader(self.bench.read)
        self.engine = self.bench.engine(read=self.reader, max_prefill_tokens=8)
        self.requests: dict[str, tuple[str, str | None, int]] = {}
        self.cancelled: set[str] = set()
        self.may_fail: set[str] = set()
        self.answers: dict[str, Answer] = {}

    @rule(
        prompt=st.sampled_from(PROMPTS), digest=st.sampled_from([None, *RECIPES]), max_tokens=st.integers(1, MAX_TOKENS)
    )
    def submit(self, prompt: str, digest: str | None, max_tokens: int) -> None:
        """A request comes."""
        name = f"r{len(self.requests)}"
        self.requests[name] = (prompt, digest, max_tokens)
        # A load that failed before the files were restored is noticed later, by whoever waits for it then.
        if digest in self.reader.failing or digest in self.engine.residency._reads:
            self.may_fail.add(name)
        collect(self.engine.submit(ask(name, prompt, digest, max_tokens=max_tokens)), self.answers)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves, perhaps after its answer ended."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if not self._has_ended(name):
            self.cancelled.add(name)
        collect(self.engine.cancel(name), self.answers)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        """The engine goes on while loads take their time."""
        for _ in range(count):
            collect(self.engine.step(), self.answers)

    @rule()
    def finish_loads(self) -> None:
        """The loader has read what was asked for; the next step sees it."""
        self.reader.finish_loads(self.engine)

    @rule(digest=st.sampled_from(list(RECIPES)))
    def break_version(self, digest: str) -> None:
        """A version's files are damaged; those who wait for it may be told so."""
        self.reader.failing.add(digest)
        self.may_fail |= {name for name, (_, wanted, _) in self.requests.items() if wanted == digest}

    @rule()
    def mend_versions(self) -> None:
        """The files are restored."""
        self.reader.failing.clear()

    @invariant()
    def nobody_ends_twice(self) -> None:
        """At most one terminal event so far, and nothing about requests that nobody made."""
        assert all(answer.num_terminal <= 1 for answer in self.answers.values())
        assert self.answers.keys() <= self.requests.keys()

    @invariant()
    def nobody_is_lost(self) -> None:
        """Who has not ended runs or waits."""
        unfinished = sum(not self._has_ended(name) for name in self.requests)
        assert unfinished == self.engine.num_running + self.engine.num_waiting

    @invariant()
    def the_batch_is_bounded(self) -> None:
        """Never more requests than rows, nor versions than slots."""
        assert self.engine.num_running <= self.bench.runner.cache.num_rows
        assert len(self.engine.residency.resident) <= self.bench.runner.slots.num_slots

    @invariant()
    def users_are_counted(self) -> None:
        """The users of the versions are the running requests that are not the base's; none is negative."""
        counts = self.engine.residency.resident
        running: dict[str, int] = {}
        for sequence in self.engine._running:
            if digest := sequence.request.digest:
                running[digest] = running.get(digest, 0) + 1
        assert running == {digest: users for digest, users in counts.items() if users}

    @invariant()
    def answers_are_those_of_the_version_alone(self) -> None:
        """What has been said so far is how the version's own answer begins; what ended well is the whole of it."""
        eos = self.bench.base.tokenizer.eos_token_id
        for name, answer in self.answers.items():
            prompt, digest, max_tokens = self.requests[name]
            request = ask(name, prompt, digest, max_tokens=max_tokens)
            expected, reason = expected_tokens(self.reference, request, eos)
            assert expected[: len(answer.tokens)] == answer.tokens
            if answer.finish_reason == "cancelled":
                assert name in self.cancelled
            elif answer.finish_reason == "adapter_failed":
                assert name in self.may_fail
                assert digest is not None
                assert f"no file for {digest[-1]}" == answer.error
            elif answer.finish_reason is not None:
                assert (expected, reason) == (answer.tokens, answer.finish_reason)

    def teardown(self) -> None:
        """In the end everybody has been answered, exactly once."""
        self.reader.open()
        drain(self.engine, self.answers)
        self.engine.close()
        assert self.requests.keys() == self.answers.keys()
        assert all(answer.num_terminal == 1 for answer in self.answers.values())
        self.answers_are_those_of_the_version_alone()
        assert not any(self.engine.residency.resident.values())

    def _has_ended(self, name: str) -> bool:
        return name in self.answers and self.answers[name].num_terminal > 0


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
