"""Runs one step of the model: mixed decodes and prompt chunks of different adapters in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.engine.attention import AttentionPlan, Chunk, install_attention, plan_step
from server.engine.cache import KVCache
from server.engine.core import Sequence
from server.engine.decode_graphs import DecodeGraphs, DecodeToken
from server.engine.families import check_supported
from server.engine.kernels import BLOCK_TOKENS, load_kernels
from server.engine.lora import AdapterSlots, Segment

__all__ = ["ModelRunner", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """The new tokens of one sequence in a step."""

    sequence: Sequence
    tokens: list[int]


class ModelRunner:
    """The base model, its slots and its cache. Changes the model it is given: linear layers and attention are replaced.

    Args:
        model: A causal LM of transformers.
        num_slots: Adapters on the device at once.
        max_rank: The highest rank of an adapter.
        max_batch: Requests that run at once.
        max_context: The longest request, prompt and answer together, in tokens.
        cache_tokens: Tokens that the KV cache holds in all; None has room for the longest request in every row.
        kernels_folder: Where compiled kernels are kept; None computes with torch alone.
        capture_decode: Capture decode steps as CUDA graphs in `warm_up`. On a CPU their padded steps of fixed shapes
            are computed without a capture, which is of use to tests alone.

    Raises:
        BaseModelError: the model's architecture is not supported.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        max_rank: int,
        max_batch: int,
        max_context: int,
        cache_tokens: int | None = None,
        kernels_folder: Path | None = None,
        capture_decode: bool = False,
    ) -> None:
        check_supported(model)
        dtype = model.get_input_embeddings().weight.dtype
        self._model = model
        self.device: torch.device = model.device
        blocks_a_row = -(-max_context // BLOCK_TOKENS)
        self.cache = KVCache(
            model.config.get_text_config(),
            num_blocks=max_batch * blocks_a_row if cache_tokens is None else -(-cache_tokens // BLOCK_TOKENS),
            num_rows=max_batch,
            max_tokens=max_context,
            dtype=dtype,
            device=self.device,
        )
        self._kernels = None
        if kernels_folder is not None:
            self._kernels = load_kernels(kernels_folder, dtype=dtype, device=self.device)
        self.slots = AdapterSlots(model, num_slots=num_slots, max_rank=max_rank, dtype=dtype, kernels=self._kernels)
        install_attention(model)
        self._graphs = DecodeGraphs(self._forward, self.cache, self.slots) if capture_decode else None

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that the model's generation config names as ends of an answer."""
        configured = self._model.generation_config.eos_token_id
        if configured is None:
            return []
        return configured if isinstance(configured, list) else [configured]

    @torch.inference_mode()
    def run(self, work: Rows[Work]) -> torch.Tensor:
        """Compute a step and return logits `[sequences, vocab]` for those in `work` whose last token is reached.

        The shorter pieces of work must stand in front. Sequences are only read; their blocks are filled.
        """
        if self._graphs is not None and self._graphs.has_captured and all(len(item.tokens) == 1 for item in work):
            return self._graphs.run([_decode_token(item) for item in work])
        num_single = sum(len(item.tokens) == 1 for item in work)
        plan = plan_step(self.cache, [_chunk(item) for item in work], self._kernels)
        self.slots.select([item.sequence.slot for item in work[:num_single]], _segments(work, num_single))
        ids = torch.tensor([token for item in work for token in item.tokens], device=self.device)
        return self._forward(ids, plan, torch.tensor(_ends(work), dtype=torch.long, device=self.device))

    def _forward(self, ids: torch.Tensor, plan: AttentionPlan, ends: torch.Tensor) -> torch.Tensor:
        """Logits `[ends, vocab]` for flat tokens `[tokens]`."""
        output = self._model(
            input_ids=ids[None], position_ids=plan.positions[None], use_cache=False, logits_to_keep=ends, plan=plan
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one token through the model, on one thread, before any request; it leaves nothing behind."""
        self.slots.warm_up()
        plan = plan_step(self.cache, [Chunk(row=0, position=0, count=1, blocks=[0])], self._kernels)
        self.slots.select([0])
        zeros = torch.zeros(1, dtype=torch.long, device=self.device)
        self._forward(zeros, plan, zeros)
        self.cache.clear([0])
        if self._graphs is not None:
            self._graphs.capture()


def _chunk(work: Work) -> Chunk:
    sequence = work.sequence
    assert sequence.allocation is not None, "the scheduler gives blocks before work"
    return Chunk(sequence.row, sequence.num_cached, len(work.tokens), sequence.allocation.blocks)


def _decode_token(work: Work) -> DecodeToken:
    sequence = work.sequence
    assert sequence.allocation is not None, "the scheduler gives blocks before work"
    return DecodeToken(work.tokens[0], sequence.num_cached, sequence.allocation.blocks, sequence.row, sequence.slot)


def _segments(work: Rows[Work], num_single: int) -> list[Segment]:
    segments, start = [], num_single
    for item in work[num_single:]:
        stop = start + len(item.tokens)
        segments.append(Segment(start, stop, item.sequence.slot))
        start = stop
    return segments


def _ends(work: Rows[Work]) -> list[int]:
    """Where the logits are wanted: behind the newest token of each sequence that this step completes."""
    ends, stop = [], 0
    for item in work:
        stop += len(item.tokens)
        if item.sequence.num_cached + len(item.tokens) == item.sequence.num_tokens:
            ends.append(stop - 1)
    return ends
