"""Attention over a step of mixed work, plugged into transformers' models by their attention interface.

All tokens of a step lie in one flat row: first one token for each decoding request, then the prompt chunks. The model's
own code does everything but this function, which sees the fresh queries, keys and values, and owns the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from adapters.errors import BaseModelError
from server.engine.cache import KVCache
from server.engine.families import SUPPORTED_FAMILIES

__all__ = ["AttentionPlan", "Chunk", "check_supported", "install_attention"]

_IMPLEMENTATION = "hotswap"
# Rotary embeddings whose frequencies follow the longest sequence at hand: in a batch, somebody else's.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive new tokens of one request: `count` of them, the first at `position`, for cache row `row`."""

    row: int
    position: int
    count: int


class AttentionPlan:
    """Where the tokens of one step belong; made once a step and shared by all layers.

    Args:
        cache: Keys and values, modified in place by every layer.
        decodes: One chunk of one token per decoding request.
        prefills: Prompt chunks, in the order of their tokens behind the decodes.
    """

    def __init__(self, cache: KVCache, decodes: Sequence[Chunk], prefills: Sequence[Chunk]) -> None:
        device = cache.keys[0].device
        chunks = [*decodes, *prefills]
        self.cache = cache
        self.prefills = prefills
        self.num_decodes = len(decodes)
        rows = [chunk.row for chunk in chunks for _ in range(chunk.count)]
        positions = [chunk.position + offset for chunk in chunks for offset in range(chunk.count)]
        self.rows = torch.tensor(rows, device=device)  # [tokens]
        self.positions = torch.tensor(positions, device=device)  # [tokens]
        # Decoding rows stand in front but prompts that are being read may stand between them: compute on the stretch
        # up to the last one, which is a view, and drop the rest.
        self.num_rows = max((chunk.row for chunk in decodes), default=-1) + 1
        self.num_keys = max((chunk.position for chunk in decodes), default=-1) + 1
        self._masks: dict[int | None, torch.Tensor] = {}

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """What each cache row may not see: `[num_rows, 1, 1, num_keys]`, 0 or -inf; `window` is the sliding window."""
        if window not in self._masks:
            keys = torch.arange(self.num_keys, device=self.rows.device)
            ends = torch.zeros(self.num_rows, dtype=torch.long, device=self.rows.device)
            ends[self.rows[: self.num_decodes]] = self.positions[: self.num_decodes]
            hidden = keys[None, :] > ends[:, None]
            if window is not None:
                hidden |= keys[None, :] <= ends[:, None] - window
            mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a base model whose attention is not known to be computed right here.

    Raises:
        BaseModelError: names the family and what is supported.
    """
    family = model.config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise BaseModelError(
            f"models of type {family!r} are not supported; {', '.join(sorted(SUPPORTED_FAMILIES))} are"
        )
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _BATCH_DEPENDENT_ROPE:
        raise BaseModelError(f"rotary embeddings of type {rope!r} are not supported: they depend on the batch")


def install_attention(model: PreTrainedModel) -> None:
    """Make a model attend through the plan that each forward call passes as `plan=`."""
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    model.set_attn_implementation(_IMPLEMENTATION)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query [1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`."""
    keys, values = plan.cache.keys[module.layer_idx], plan.cache.values[module.layer_idx]
    keys[plan.rows, :, plan.positions] = key[0].transpose(0, 1)
    values[plan.rows, :, plan.positions] = value[0].transpose(0, 1)
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # [tokens, heads, head_dim]
    count = plan.num_decodes
    if count:
        output[:count] = _decode(query[0, :, :count].transpose(0, 1), keys, values, plan, scaling, sliding_window)
    start = count
    for chunk in plan.prefills:
        stop = start + chunk.count
        output[start:stop] = _prefill(query[:, :, start:stop], keys, values, chunk, scaling, sliding_window)
        start = stop
    return output[None], None


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """One query per row by batched products, heads of a group together: `[decodes, heads, head_dim]` in and out.

    The CPU's flash kernel takes several times longer for a single query row.
    """
    _, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    spread = query
    rows = plan.rows[: plan.num_decodes]
    if plan.num_rows != plan.num_decodes:
        spread = query.new_zeros(plan.num_rows, num_heads, head_dim)
        spread[rows] = query
    grouped = spread.view(plan.num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    seen_keys = keys[: plan.num_rows, :, : plan.num_keys]  # [rows, kv_heads, keys, head_dim]
    seen_values = values[: plan.num_rows, :, : plan.num_keys]
    scores = (grouped @ seen_keys.transpose(-1, -2)).float() * scaling + plan.decode_mask(window)
    attended = scores.softmax(dim=-1).to(values.dtype) @ seen_values  # [rows, kv_heads, group, head_dim]
    attended = attended.reshape(plan.num_rows, num_heads, head_dim)
    return attended if plan.num_rows == plan.num_decodes else attended[rows]


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk, scaling: float, window: int | None
) -> torch.Tensor:
    """A prompt chunk against its row so far: `query [1, heads, count, head_dim]` -> `[count, heads, head_dim]`."""
    end = chunk.position + chunk.count
    mask = None
    if chunk.position > 0 or window is not None:
        own = torch.arange(chunk.position, end, device=query.device)[:, None]
        others = torch.arange(end, device=query.device)[None, :]
        mask = others <= own
        if window is not None:
            mask &= others > own - window
    attended = scaled_dot_product_attention(
        query,
        keys[chunk.row : chunk.row + 1, :, :end],
        values[chunk.row : chunk.row + 1, :, :end],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)
