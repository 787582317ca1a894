"""Decode steps of fixed shapes, captured as CUDA graphs: a step is one launch instead of some thousand.

Slots, cache and block table stay where they are in memory, so a captured step finds new values in old places. What a
step itself brings, its tokens and where they belong, is copied into a place of its own. Rows without a request decode
a token of nobody into a spare block. Prompts are not captured: their steps have any shape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from server.engine.attention import AttentionPlan
from server.engine.cache import KVCache
from server.engine.kernels import BLOCK_TOKENS
from server.engine.lora import AdapterSlots

__all__ = ["DecodeGraphs", "DecodeToken"]

_MIN_BLOCKS = 8  # a step over fewer is hardly faster
_WARM_UP_RUNS = 2  # libraries choose their algorithms and take their memory before a capture, not in it

Forward = Callable[[torch.Tensor, AttentionPlan, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DecodeToken:
    """The newest token of a running request."""

    token: int
    position: int
    blocks: Sequence[int]  # of the whole request, in order
    row: int  # of the cache's table
    slot: int


@dataclass(frozen=True, slots=True, order=True)
class _Shape:
    num_rows: int
    num_blocks: int  # of the longest request
    has_adapters: bool


class DecodeGraphs:
    """One captured step for each number of rows, longest request and presence of adapters, in powers of two.

    Args:
        forward: Logits `[tokens, vocab]` of `(ids [tokens], plan, ends)`; must not read a tensor's value.
        cache: Its buffers must stay where they are.
        slots: The same.
    """

    def __init__(self, forward: Forward, cache: KVCache, slots: AdapterSlots) -> None:
        self._forward = forward
        self._cache = cache
        self._slots = slots
        self._device = cache.table.device
        self._row_sizes = _sizes(1, cache.num_rows)
        self._block_sizes = _sizes(_MIN_BLOCKS, cache.table.shape[1])
        # Ids, positions, blocks, rows and slots of the step's tokens, [5, rows]; shared by all shapes.
        self._numbers = torch.zeros(5, cache.num_rows, dtype=torch.long, device=self._device)
        self._replays: dict[_Shape, Callable[[], torch.Tensor]] = {}

    @property
    def has_captured(self) -> bool:
        """Whether `run` may be called."""
        return bool(self._replays)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every shape, the largest first: the smaller ones then fit into its memory."""
        self._numbers.copy_(torch.tensor([self._padding] * self._cache.num_rows).T)
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        shapes = [
            _Shape(num_rows, num_blocks, has_adapters)
            for num_rows in self._row_sizes
            for num_blocks in self._block_sizes
            for has_adapters in (False, True)
        ]
        for shape in sorted(shapes, reverse=True):
            self._replays[shape] = self._capture(partial(self._step, shape), pool)

    def run(self, tokens: Sequence[DecodeToken]) -> torch.Tensor:
        """Compute one step; returns logits `[tokens, vocab]`, which hold until the next step.

        Args:
            tokens: At least one, at most as many as the cache has rows.
        """
        num_blocks = max(token.position for token in tokens) // BLOCK_TOKENS + 1
        shape = _Shape(
            self._row_sizes[bisect_left(self._row_sizes, len(tokens))],
            self._block_sizes[bisect_left(self._block_sizes, num_blocks)],
            any(token.slot for token in tokens),
        )
        numbers = [
            (token.token, token.position, token.blocks[token.position // BLOCK_TOKENS], token.row, token.slot)
            for token in tokens
        ]
        numbers += [self._padding] * (shape.num_rows - len(tokens))
        self._numbers[:, : shape.num_rows].copy_(torch.tensor(numbers).T)
        return self._replays[shape]()[: len(tokens)]

    @property
    def _padding(self) -> tuple[int, int, int, int, int]:
        return 0, 0, self._cache.spare_block, self._cache.spare_row, 0

    def _step(self, shape: _Shape) -> torch.Tensor:
        """What is captured: everything that depends on the step's numbers is computed from them on the device."""
        ids, positions, blocks, rows, slots = self._numbers[:, : shape.num_rows]
        plan = AttentionPlan(
            self._cache,
            kernels=None,
            positions=positions,
            blocks=blocks.int(),
            rows=rows.int(),
            max_length=shape.num_blocks * BLOCK_TOKENS,
        )
        self._slots.select_on_device(slots if shape.has_adapters else None)
        return self._forward(ids, plan, torch.arange(shape.num_rows, device=self._device))

    def _capture(self, step: Callable[[], torch.Tensor], pool: Any) -> Callable[[], torch.Tensor]:
        """A function that repeats a step; without CUDA that is the step itself.

        Source: torch's notes on CUDA graphs: a few runs on another stream first, then the capture.
        """
        if pool is None:
            return step
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def _sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two from one number to another, both of them included."""
    sizes = [size for power in range(largest.bit_length()) if smallest <= (size := 1 << power) < largest]
    return [*sizes, largest]
