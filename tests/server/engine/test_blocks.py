"""Blocks: nobody shares what is not equal, nothing is lost, and a prefix is found again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.blocks import Allocation, BlockPool

SIZE = 4
PROMPT = tuple(range(100, 111))  # two full blocks and three tokens


def _pool(num_blocks: int = 8) -> BlockPool:
    return BlockPool(num_blocks=num_blocks, block_tokens=SIZE)


def _allocate(pool: BlockPool, prompt: tuple[int, ...], *, digest: str | None = "a", answer: int = 1) -> Allocation:
    return pool.allocate(digest, prompt, len(prompt) + answer)


def _run(pool: BlockPool, prompt: tuple[int, ...], *, digest: str | None = "a") -> list[int]:
    """A request that computes its whole prompt and ends well; returns its blocks."""
    allocation = _allocate(pool, prompt, digest=digest)
    pool.register(allocation, digest, prompt, len(prompt))
    assert pool.free(allocation) == []
    return allocation.blocks


def test_allocate_shares_the_full_blocks_when_the_prompt_begins_alike() -> None:
    """The first two blocks are the same, the third is the request's own."""
    pool = _pool()
    blocks = _run(pool, PROMPT)
    again = _allocate(pool, (*PROMPT[:8], 7, 8, 9, 10, 11))
    assert (blocks[:2], 2) == (again.blocks[:2], again.num_shared)
    assert again.blocks[2] not in blocks[:2]


@pytest.mark.parametrize(
    ("prompt", "shared"), [(PROMPT[:8], 1), (PROMPT[:9], 2), (PROMPT[:4], 0), (PROMPT[:5], 1), ((1, *PROMPT), 0)]
)
def test_allocate_leaves_a_token_to_compute_when_the_whole_prompt_is_known(
    prompt: tuple[int, ...], shared: int
) -> None:
    """Logits are wanted behind the last token, so the block that holds it is not taken."""
    pool = _pool()
    _run(pool, PROMPT)
    assert shared == _allocate(pool, prompt).num_shared


@pytest.mark.parametrize("digest", ["b", None, ""])
def test_allocate_shares_nothing_when_the_version_differs(digest: str | None) -> None:
    """Equal tokens have other keys and values under another adapter; the base model's own are shared with itself."""
    pool = _pool()
    _run(pool, PROMPT, digest="a")
    assert 0 == _allocate(pool, PROMPT, digest=digest).num_shared


def test_allocate_shares_with_itself_when_it_is_the_base_model() -> None:
    """No digest is a version like any other."""
    pool = _pool()
    _run(pool, PROMPT, digest=None)
    assert 2 == _allocate(pool, PROMPT, digest=None).num_shared


def test_allocate_shares_nothing_behind_the_first_difference() -> None:
    """The second block's tokens are known, but behind another first block."""
    pool = _pool()
    _run(pool, PROMPT)
    assert 0 == _allocate(pool, (1, 2, 3, 4, *PROMPT[4:])).num_shared


def test_register_offers_a_block_only_when_all_its_tokens_are_computed() -> None:
    """A prompt that is being read in chunks is shared as far as it was read."""
    pool = _pool()
    first = _allocate(pool, PROMPT)
    pool.register(first, "a", PROMPT, 7)
    assert 1 == _allocate(pool, PROMPT).num_shared
    pool.register(first, "a", PROMPT, 8)
    assert 2 == _allocate(pool, PROMPT).num_shared


def test_register_never_offers_a_block_that_holds_tokens_of_the_answer() -> None:
    """The answer's tokens are not part of any prompt."""
    pool = _pool()
    first = _allocate(pool, PROMPT, answer=9)
    pool.register(first, "a", PROMPT, 20)
    assert 2 == pool.num_cached


def test_pool_has_no_room_when_blocks_are_too_few() -> None:
    """Nothing is taken; what is shared counts as there."""
    pool = _pool(num_blocks=4)
    first = _allocate(pool, PROMPT, answer=5)
    assert (4, 0) == (len(first.blocks), pool.num_available)
    assert not pool.has_room("a", PROMPT, 12)
    pool.register(first, "a", PROMPT, 11)
    pool.free(first)
    assert 4 == pool.num_available
    assert 2 == _allocate(pool, PROMPT, answer=5).num_shared
    assert not pool.has_room("a", PROMPT, 12)
    assert 0 == pool.num_available


def test_cached_blocks_are_evicted_least_recently_used_first_when_room_is_needed() -> None:
    """Of one prompt the last block goes first, since the earlier ones lead to it."""
    pool = _pool(num_blocks=6)
    older, newer = PROMPT, tuple(range(50, 61))
    _run(pool, older)
    _run(pool, newer)
    assert 4 == pool.num_cached
    held = _allocate(pool, (1, 2), answer=6 + 4)  # three blocks: two were free
    assert 3 == pool.num_cached
    pool.free(held)
    assert 2 == _allocate(pool, newer, answer=1).num_shared
    assert 1 == _allocate(pool, older[:9], answer=1).num_shared


def test_free_forgets_and_clears_what_a_failed_request_held() -> None:
    """Neither its blocks nor what it put into the prefix cache reach anybody."""
    pool = _pool()
    failed = _allocate(pool, PROMPT)
    pool.register(failed, "a", PROMPT, len(PROMPT))
    assert sorted(failed.blocks) == sorted(pool.free(failed, is_tainted=True))
    assert (0, 8) == (pool.num_cached, pool.num_available)
    assert 0 == _allocate(pool, PROMPT).num_shared


def test_free_clears_a_shared_block_later_when_another_request_still_reads_it() -> None:
    """The block of a failed request is zeroed by whoever leaves last."""
    pool = _pool()
    failed = _allocate(pool, PROMPT)
    pool.register(failed, "a", PROMPT, len(PROMPT))
    other = _allocate(pool, PROMPT)
    assert [failed.blocks[2]] == pool.free(failed, is_tainted=True)
    assert sorted(other.blocks[:2]) == sorted(pool.free(other))
    assert 8 == pool.num_available


def test_free_keeps_the_shared_prefix_when_one_of_its_readers_is_given_up() -> None:
    """Somebody else computed it: a client that leaves before its first token takes nothing from the others."""
    pool = _pool()
    _run(pool, PROMPT)
    leaver = _allocate(pool, PROMPT)
    assert leaver.blocks[2:] == pool.free(leaver, is_tainted=True)
    assert 2 == _allocate(pool, PROMPT).num_shared


def test_counters_tell_how_much_of_the_prompts_was_known() -> None:
    """Eight of the second prompt's eleven tokens were not computed again."""
    pool = _pool()
    _run(pool, PROMPT)
    _run(pool, PROMPT)
    assert (8, 22) == (pool.num_hit_tokens, pool.num_prompt_tokens)


class BlockMachine(RuleBasedStateMachine):
    """Requests come, compute, end well or badly, in any order, over a pool that is too small for them."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.pool = _pool(num_blocks=6)
        self.held: dict[int, tuple[Allocation, str, tuple[int, ...]]] = {}
        self.contents: dict[int, tuple[Any, ...]] = {}  # block -> version and tokens up to its end, as computed
        self.next_id = 0

    @rule(target=running, digest=st.sampled_from("ab"), prompt=st.lists(st.integers(0, 1), min_size=1, max_size=13))
    def start(self, digest: str, prompt: list[int]) -> int:
        """A shared block must hold just this version's tokens up to there."""
        self.next_id += 1
        if not self.pool.has_room(digest, prompt, len(prompt) + 1):
            return -1
        allocation = self.pool.allocate(digest, prompt, len(prompt) + 1)
        assert self.pool.blocks_for(len(prompt) + 1) == len(allocation.blocks)
        for index, block in enumerate(allocation.blocks):
            if index < allocation.num_shared:
                assert (digest, *prompt[: (index + 1) * SIZE]) == self.contents[block]
            else:
                assert not any(block in other.blocks for other, *_ in self.held.values())
                self.contents.pop(block, None)
        self.held[self.next_id] = allocation, digest, tuple(prompt)
        return self.next_id

    @rule(request=running, share=st.floats(0, 1))
    def compute(self, request: int, share: float) -> None:
        """Write what is computed, then offer it."""
        if request not in self.held:
            return
        allocation, digest, prompt = self.held[request]
        done = int(share * len(prompt))
        for index in range(allocation.num_shared, done // SIZE):
            self.contents[allocation.blocks[index]] = (digest, *prompt[: (index + 1) * SIZE])
        self.pool.register(allocation, digest, prompt, done)

    @rule(request=consumes(running), is_tainted=st.booleans())
    def end(self, request: int, is_tainted: bool) -> None:
        """Whatever must be cleared belongs to nobody."""
        if request not in self.held:
            return
        allocation, *_ = self.held.pop(request)
        for block in self.pool.free(allocation, is_tainted=is_tainted):
            assert not any(block in other.blocks for other, *_ in self.held.values())
            self.contents.pop(block, None)

    @invariant()
    def no_block_is_lost(self) -> None:
        """Blocks in use and blocks to be had are all blocks."""
        used = {block for allocation, *_ in self.held.values() for block in allocation.blocks}
        assert self.pool.num_blocks == len(used) + self.pool.num_available


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
