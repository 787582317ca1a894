"""The engine under submit, cancel, load, failure and promotion in any order: the design's invariants at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.engine.core import GenerationRequest
from server.engine.kernels import BLOCK_TOKENS
from tests.support.engine import (
    RECIPES,
    Answer,
    Bench,
    GatedReader,
    Reference,
    ask,
    collect,
    expected_tokens,
    wait_for_loads,
)

PROMPTS = ["abc", "you are a helpful assistant; what now?", "you are a helpful assistant; who are you?"]
NUM_SLOTS, NUM_ROWS, NUM_BLOCKS = 2, 3, 12
UNREADABLE = "f" * 64
ALIASES = ("legal", "medical")


class _Fuse:
    """Makes the model raise in its next forward pass, once it is lit."""

    def __init__(self, model: Any) -> None:
        self.is_lit = False
        self._handle = model.register_forward_pre_hook(self._check)

    def _check(self, *_: Any) -> None:
        if self.is_lit:
            self.is_lit = False
            raise RuntimeError("out of memory")

    def remove(self) -> None:
        """Take the fuse out of the model."""
        self._handle.remove()


class EngineMachine(RuleBasedStateMachine):
    """Two aliases over five versions, two slots, three rows and twelve blocks: everything is scarce."""

    bench: ClassVar[Bench]
    reference: ClassVar[Reference]

    def __init__(self) -> None:
        super().__init__()
        self.reader = GatedReader(self.bench.read)
        self.engine = self.bench.engine(max_prefill_tokens=20, read=self.reader)
        self.fuse = _Fuse(self.bench.base.model)
        self.answers: dict[str, Answer] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.cancelled: set[str] = set()
        self.num_fuses = 0

    @initialize()
    def publish(self) -> None:
        """Each alias points to a version."""
        versions = list(RECIPES)
        self.current = dict(zip(ALIASES, versions, strict=False))

    @rule(alias=st.sampled_from(ALIASES), digest=st.sampled_from([*RECIPES, UNREADABLE]))
    def promote(self, alias: str, digest: str) -> None:
        """A name moves; requests that were admitted keep what they were bound to."""
        self.current[alias] = digest

    @rule(
        name=st.sampled_from([*ALIASES, None]),
        prompt=st.sampled_from(PROMPTS),
        max_tokens=st.integers(1, 12),
    )
    def submit(self, name: str | None, prompt: str, max_tokens: int) -> None:
        """A request is bound to the version that its name points to."""
        digest = None if name is None else self.current[name]
        request = ask(f"r{len(self.requests)}", prompt, digest, max_tokens=max_tokens)
        self.requests[request.id] = request
        self.answers[request.id] = Answer()
        collect(self.engine.submit(request), self.answers)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Whatever state it is in, also when it has ended."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        was_open = not self.answers[name].num_terminal
        collect(self.engine.cancel(name), self.answers)
        assert self.answers[name].num_terminal == 1
        if was_open:
            self.cancelled.add(name)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        """Time passes."""
        for _ in range(count):
            collect(self.engine.step(), self.answers)

    @rule()
    def let_loads_finish(self) -> None:
        """Everything that was asked for is read."""
        self.reader.finish_loads(self.engine)
        collect(self.engine.step(), self.answers)

    @rule(digests=st.lists(st.sampled_from(list(RECIPES)), max_size=3))
    def prefetch(self, digests: list[str]) -> None:
        """Versions are loaded ahead, as far as free slots last."""
        self.engine.prefetch(digests)

    @rule()
    def fail_next_pass(self) -> None:
        """The model raises in its next forward pass."""
        self.fuse.is_lit = True
        self.num_fuses += 1

    @invariant()
    def every_request_ends_at_most_once(self) -> None:
        """And one that hasn't ended is in the queue or in the batch."""
        ended = [answer.num_terminal for answer in self.answers.values()]
        assert set(ended) <= {0, 1}
        assert ended.count(0) == self.engine.num_running + self.engine.num_waiting

    @invariant()
    def no_text_is_wrong(self) -> None:
        """What was said so far is how the bound version's answer begins."""
        for name, answer in self.answers.items():
            expected, reason = self._expected(self.requests[name])
            assert expected[: len(answer.tokens)] == answer.tokens
            if answer.finish_reason in ("stop", "length"):
                assert (expected, reason) == (answer.tokens, answer.finish_reason)

    @invariant()
    def failures_have_a_cause(self) -> None:
        """Cancelled by us, an unreadable version, or a pass that was made to fail; nothing else."""
        for name, answer in self.answers.items():
            if answer.finish_reason == "cancelled":
                assert name in self.cancelled
            elif answer.finish_reason == "adapter_failed":
                assert UNREADABLE == self.requests[name].digest
            elif answer.finish_reason == "engine_failed":
                assert self.num_fuses

    @invariant()
    def slots_are_counted_right(self) -> None:
        """A resident version has as many users as requests run on it, and no more versions are there than slots."""
        resident = self.engine.residency.resident
        assert len(resident) <= NUM_SLOTS
        assert sum(resident.values()) <= self.engine.num_running
        assert UNREADABLE not in resident

    @invariant()
    def blocks_are_conserved(self) -> None:
        """An idle engine holds none."""
        if not self.engine.num_running:
            assert self.engine.blocks.num_blocks == self.engine.blocks.num_available

    def teardown(self) -> None:
        """In the end everybody gets an answer."""
        self.reader.open()
        for _ in range(2000):
            if self.engine.is_idle:
                break
            wait_for_loads(self.engine)
            collect(self.engine.step(), self.answers)
        self.fuse.remove()
        self.engine.close()
        assert [name for name, answer in self.answers.items() if answer.num_terminal != 1] == []
        self.no_text_is_wrong()
        self.failures_have_a_cause()
        self.blocks_are_conserved()

    def _expected(self, request: GenerationRequest) -> tuple[list[int], str]:
        if request.digest == UNREADABLE:
            return [], "adapter_failed"
        return expected_tokens(self.reference, request, self.bench.base.tokenizer.eos_token_id)


@pytest.fixture
def scarce_bench(own_bench: Callable[..., Bench], reference_answers: Reference) -> Iterator[None]:
    """A model with too few slots, rows and blocks for what comes."""
    EngineMachine.bench = own_bench(
        num_slots=NUM_SLOTS, max_batch=NUM_ROWS, max_context=64, cache_tokens=NUM_BLOCKS * BLOCK_TOKENS
    )
    EngineMachine.reference = reference_answers
    yield
    del EngineMachine.bench, EngineMachine.reference


@pytest.mark.usefixtures("scarce_bench")
def test_engine_keeps_its_invariants_when_anything_happens_in_any_order() -> None:
    """Submit, cancel, promote, load, fail and step at random, with a model behind them."""
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
