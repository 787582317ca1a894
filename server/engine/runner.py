"""Runs one step of the model: mixed decodes and prompt chunks of different adapters in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch

from server.engine.attention import AttentionPlan, Chunk, check_supported, install_attention
from server.engine.cache import KVCache
from server.engine.core import Sequence
from server.engine.lora import AdapterSlots

__all__ = ["ModelRunner", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """The new tokens of one sequence in a step, for cache row `row`."""

    sequence: Sequence
    row: int
    tokens: list[int]


class ModelRunner:
    """The base model, its slots and its cache. Changes the model it is given: linear layers and attention are replaced.

    Raises:
        BaseModelError: the model's family is not supported.
    """

    def __init__(self, model: Any, *, num_slots: int, max_rank: int, max_batch: int, max_context: int) -> None:
        check_supported(model)
        dtype = model.get_input_embeddings().weight.dtype
        self._model = model
        self.device: torch.device = model.device
        self.cache = KVCache(model.config, num_rows=max_batch, max_tokens=max_context, dtype=dtype, device=self.device)
        self.slots = AdapterSlots(model, num_slots=num_slots, max_rank=max_rank, dtype=dtype)
        install_attention(model)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that the model's generation config names as ends of an answer."""
        configured = self._model.generation_config.eos_token_id
        if configured is None:
            return []
        return configured if isinstance(configured, list) else [configured]

    @torch.inference_mode()
    def run(self, work: Rows[Work]) -> torch.Tensor:
        """Compute a step and return logits `[len(work), vocab]` behind the last token of each piece of work.

        Sequences are only read; the cache's rows are extended by the tokens.
        """
        decodes = [item for item in work if item.sequence.is_decoding]
        prefills = [item for item in work if not item.sequence.is_decoding]
        ordered = [*decodes, *prefills]
        plan = AttentionPlan(self.cache, [_chunk(item) for item in decodes], [_chunk(item) for item in prefills])
        self.slots.select([item.sequence.slot for item in ordered for _ in item.tokens])
        ids = torch.tensor([token for item in ordered for token in item.tokens], device=self.device)
        ends = torch.tensor([len(item.tokens) for item in ordered]).cumsum(0) - 1
        output = self._model(
            input_ids=ids[None],
            position_ids=plan.positions[None],
            use_cache=False,
            logits_to_keep=ends.to(self.device),
            plan=plan,
        )
        places = {id(item): index for index, item in enumerate(ordered)}
        logits: torch.Tensor = output.logits[0]
        return logits[[places[id(item)] for item in work]]

    def warm_up(self) -> None:
        """Run one token through the model.

        bitsandbytes packs each layer for its fast CPU kernel in place and unlocked during the first forward pass, which
        must therefore happen on one thread before any request comes.
        """
        plan = AttentionPlan(self.cache, [], [Chunk(row=0, position=0, count=1)])
        self.slots.select([0])
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            self._model(input_ids=ids, position_ids=ids, use_cache=False, plan=plan)


def _chunk(work: Work) -> Chunk:
    return Chunk(row=work.row, position=work.sequence.num_cached, count=len(work.tokens))
