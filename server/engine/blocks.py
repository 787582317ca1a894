"""Who holds which blocks of the KV cache, and which blocks hold a prefix that another request can share.

Pure book-keeping: no tensor is touched here. A block with a full stretch of a prompt is found again by the adapter
version's digest and every token from the start to its end, so that no version ever sees another's keys and values.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Allocation", "BlockPool"]

# A block's name: the serial number of the block before it (or the digest, "" for the base model), and its tokens.
# The tokens themselves, not a hash of them: two different prompts can't collide.
_Key = tuple[int | str, tuple[int, ...]]


@dataclass(slots=True)
class Allocation:
    """The blocks of one request. The first `num_shared` came out of the prefix cache with their tokens in them."""

    blocks: list[int]
    num_shared: int
    num_registered: int = field(default=0)  # blocks from the front that are in the prefix cache; the pool writes it


class BlockPool:
    """Hands out blocks, shares the full ones of equal prompts, and evicts the least recently used of those unused."""

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._uses = [0] * num_blocks
        self._block_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._serial_of: dict[int, int] = {}
        self._serials = itertools.count(1)
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, nobody's; the next to go is in front
        self._tainted: set[int] = set()
        self.num_hit_tokens = 0
        self.num_prompt_tokens = 0

    @property
    def num_available(self) -> int:
        """Blocks that a request could have: free ones, and those that only the prefix cache holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_free(self) -> int:
        """Blocks that can be had without taking one from the prefix cache."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix cache can find."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_tokens)

    def has_room(self, digest: str | None, prompt: Sequence[int], num_tokens: int) -> bool:
        """Whether `allocate` would succeed."""
        return self._can_take(self._find(digest, prompt), num_tokens)

    def allocate(self, digest: str | None, prompt: Sequence[int], num_tokens: int) -> Allocation:
        """Blocks for a request of `num_tokens` in all, those of its prompt that are known first.

        At least one token of the prompt is left to compute, since its logits are wanted. Ask `has_room` first.
        """
        shared = self._find(digest, prompt)
        assert self._can_take(shared, num_tokens), "the cache has room"
        for block in shared:
            self._uses[block] += 1
            self._idle.pop(block, None)
        num_new = self.blocks_for(num_tokens) - len(shared)
        blocks = [*shared, *(self._take() for _ in range(num_new))]
        self.num_hit_tokens += len(shared) * self.block_tokens
        self.num_prompt_tokens += len(prompt)
        return Allocation(blocks, len(shared), len(shared))

    def register(self, allocation: Allocation, digest: str | None, prompt: Sequence[int], num_computed: int) -> None:
        """Let later requests find the blocks whose prompt tokens are all computed."""
        size = self.block_tokens
        for index in range(allocation.num_registered, min(num_computed, len(prompt)) // size):
            parent = self._serial_of.get(allocation.blocks[index - 1]) if index else digest or ""
            if parent is None:
                return  # the block before is known under another request's copy; a chain has one owner
            key = (parent, tuple(prompt[index * size : (index + 1) * size]))
            if key in self._block_of:
                return
            block = allocation.blocks[index]
            self._block_of[key], self._key_of[block] = block, key
            self._serial_of[block] = next(self._serials)
            allocation.num_registered = index + 1

    def free(self, allocation: Allocation, *, is_tainted: bool = False) -> list[int]:
        """Give a request's blocks back.

        Args:
            allocation: What `allocate` gave; not to be used afterwards.
            is_tainted: The request failed: what it computed must reach nobody else. What it shared from the prefix
                cache was computed by another, which gave it up itself if it failed.

        Returns:
            Blocks whose contents must be zeroed, since they may hold NaN and have no user any more.
        """
        to_clear = []
        # From the end, so that a prefix's later blocks are evicted before the earlier ones that lead to them.
        for index, block in reversed(list(enumerate(allocation.blocks))):
            if is_tainted and index >= allocation.num_shared:
                self._forget(block)
                self._tainted.add(block)
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
                continue
            if block in self._tainted:
                self._tainted.remove(block)
                to_clear.append(block)
            self._free.append(block)
        return to_clear

    def _can_take(self, shared: Sequence[int], num_tokens: int) -> bool:
        """Whether the blocks that are not shared can be had; shared ones that nobody uses must not count as such."""
        num_new = self.blocks_for(num_tokens) - len(shared)
        return num_new <= self.num_available - sum(self._uses[block] == 0 for block in shared)

    def _find(self, digest: str | None, prompt: Sequence[int]) -> list[int]:
        found: list[int] = []
        parent: int | str = digest or ""
        size = self.block_tokens
        for start in range(0, (len(prompt) - 1) // size * size, size):
            block = self._block_of.get((parent, tuple(prompt[start : start + size])))
            if block is None:
                break
            found.append(block)
            parent = self._serial_of[block]
        return found

    def _take(self) -> int:
        if not self._free:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        block = self._free.pop()
        self._uses[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            del self._serial_of[block]
