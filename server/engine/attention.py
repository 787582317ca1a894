"""Attention over a step of mixed work, plugged into transformers' models by their attention interface.

All tokens of a step lie in one flat row: first one token for each decoding request, then the prompt chunks. The model's
own code does everything but this function, which sees the fresh queries, keys and values, and owns the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from server.engine.cache import KVCache
from server.engine.kernels import BLOCK_TOKENS, Kernels

__all__ = ["AttentionPlan", "Chunk", "install_attention", "plan_step"]

_IMPLEMENTATION = "hotswap"
# Pairs of query and key up to which a prompt chunk is attended token by token: torch's fused attention needs about ten
# operations a chunk and layer, which only larger chunks pay for.
_MAX_SINGLE_PAIRS = 64 * 512


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive new tokens of one request: `count` of them, the first at `position`, for row `row` of the table."""

    row: int
    position: int
    count: int
    blocks: Sequence[int]  # of the whole request, in order

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.position + self.count


@dataclass(frozen=True, slots=True)
class _Masking:
    """What a layer's configuration says about its scores."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class AttentionPlan:
    """Where the tokens of one step belong; made once a step and shared by all layers.

    Tokens in front, those of `rows`, are attended one by one: those of decoding requests, and with native code those of
    small prompt chunks too. The chunks behind, `large`, are attended as wholes.

    Args:
        cache: Keys and values, modified in place by every layer.
        kernels: Native code for single tokens and for writing; None computes with torch.
        positions: `[tokens]`, in their requests.
        blocks: `[tokens]`, where each is written.
        rows: `[singles]`, in the cache's table.
        max_length: The most tokens that a single one sees, itself included, or more.
        large: In the order of their tokens.
    """

    cache: KVCache
    kernels: Kernels | None
    positions: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    max_length: int
    large: Sequence[Chunk] = ()
    offsets: torch.Tensor = field(init=False)  # [tokens], within their blocks
    lengths: torch.Tensor = field(init=False)  # [singles]; each token sees itself and what is before it

    def __post_init__(self) -> None:
        self.offsets = (self.positions % BLOCK_TOKENS).int()
        self.lengths = (self.positions[: self.num_single] + 1).int()

    @property
    def num_single(self) -> int:
        """Tokens that are attended one by one."""
        return len(self.rows)


def plan_step(cache: KVCache, chunks: Sequence[Chunk], kernels: Kernels | None) -> AttentionPlan:
    """Lay out a step of mixed work; chunks of one token stand in front."""
    device = cache.table.device
    singles = list(takewhile(_is_small if kernels else _is_one_token, chunks))
    places = [(chunk, chunk.position + offset) for chunk in chunks for offset in range(chunk.count)]
    blocks = [chunk.blocks[position // BLOCK_TOKENS] for chunk, position in places]
    rows = [chunk.row for chunk in singles for _ in range(chunk.count)]
    return AttentionPlan(
        cache,
        kernels,
        positions=torch.tensor([position for _, position in places], device=device),
        blocks=torch.tensor(blocks, dtype=torch.int32, device=device),
        rows=torch.tensor(rows, dtype=torch.int32, device=device),
        max_length=max((chunk.end for chunk in singles), default=0),
        large=chunks[len(singles) :],
    )


def _is_one_token(chunk: Chunk) -> bool:
    return chunk.count == 1


def _is_small(chunk: Chunk) -> bool:
    return chunk.count == 1 or chunk.count * chunk.end <= _MAX_SINGLE_PAIRS


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
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query [1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`."""
    masking = _Masking(scaling, sliding_window, softcap)
    layer: int = module.layer_idx
    _write(plan, layer, key[0], value[0])
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # [tokens, heads, head_dim]
    if plan.num_single:
        attend = _attend_singles if plan.kernels is None else _attend_singles_natively
        attend(output, query[0], plan, layer, masking)
    start = plan.num_single
    for chunk in plan.large:
        stop = start + chunk.count
        output[start:stop] = _attend_chunk(query[0, :, start:stop], plan.cache, layer, chunk, masking)
        start = stop
    return output[None], None


def _write(plan: AttentionPlan, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Put fresh `key` and `value`, `[kv_heads, tokens, head_dim]` both, into their blocks."""
    keys, values = plan.cache.keys[layer], plan.cache.values[layer]
    if plan.kernels is None or key.stride(2) != 1 or value.stride(2) != 1:
        keys[plan.blocks, :, :, plan.offsets] = key.transpose(0, 1)
        values[plan.blocks, :, plan.offsets] = value.transpose(0, 1)
        return
    assert key.dtype == value.dtype == keys.dtype
    num_heads, num_tokens, head_dim = key.shape
    plan.kernels.write(
        keys.data_ptr(),
        values.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        plan.blocks.data_ptr(),
        plan.offsets.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
        key.stride(1),
        key.stride(0),
        value.stride(1),
        value.stride(0),
    )


def _attend_singles_natively(
    output: torch.Tensor, query: torch.Tensor, plan: AttentionPlan, layer: int, masking: _Masking
) -> None:
    """One query a token by the native kernel; arguments as those of `_attend_singles`."""
    assert plan.kernels is not None
    assert query.dtype == output.dtype == plan.cache.keys[layer].dtype
    if query.stride(2) != 1:
        query = query.contiguous()
    num_heads, _, head_dim = query.shape
    plan.kernels.attend(
        output.data_ptr(),
        query.data_ptr(),
        plan.cache.keys[layer].data_ptr(),
        plan.cache.values[layer].data_ptr(),
        plan.cache.table.data_ptr(),
        plan.rows.data_ptr(),
        plan.lengths.data_ptr(),
        plan.num_single,
        num_heads,
        plan.cache.num_kv_heads,
        head_dim,
        plan.cache.table.stride(0),
        query.stride(1),
        query.stride(0),
        masking.window or 0,
        masking.scaling,
        masking.softcap or 0.0,
    )


def _attend_singles(
    output: torch.Tensor, query: torch.Tensor, plan: AttentionPlan, layer: int, masking: _Masking
) -> None:
    """One query a token by batched products, heads of a group together.

    `query [heads, tokens, head_dim]`, of which the first `num_single` tokens are read; written to the same number of
    `output [tokens, heads, head_dim]`.
    """
    num_heads, _, head_dim = query.shape
    num_blocks = -(-plan.max_length // BLOCK_TOKENS)
    table = plan.cache.table[plan.rows.long(), :num_blocks].long()  # [tokens, blocks]
    # Behind its own blocks a row has old numbers, of blocks that are others' by now: their NaN must not reach it.
    is_own = torch.arange(num_blocks, device=table.device) * BLOCK_TOKENS < plan.lengths[:, None]
    table = torch.where(is_own, table, table[:, :1])
    keys, values = _gather(plan.cache, layer, table)
    count, num_kv_heads, _, num_keys = keys.shape
    grouped = query[:, :count].transpose(0, 1).reshape(count, num_kv_heads, num_heads // num_kv_heads, head_dim)
    places = torch.arange(num_keys, device=query.device)
    hidden = places >= plan.lengths[:, None]
    if masking.window:
        hidden |= places < plan.lengths[:, None] - masking.window
    scores = _scores(grouped @ keys, masking).masked_fill(hidden[:, None, None], float("-inf"))
    attended = scores.softmax(dim=-1).to(values.dtype) @ values  # [decodes, kv_heads, group, head_dim]
    output[:count] = attended.reshape(count, num_heads, head_dim)


def _attend_chunk(query: torch.Tensor, cache: KVCache, layer: int, chunk: Chunk, masking: _Masking) -> torch.Tensor:
    """A prompt chunk against its request so far: `query [heads, count, head_dim]` -> `[count, heads, head_dim]`."""
    end = chunk.end
    table = torch.tensor(chunk.blocks[: -(-end // BLOCK_TOKENS)], device=query.device)[None]
    keys, values = (tensor[0] for tensor in _gather(cache, layer, table))  # [kv_heads, head_dim, keys] and transposed
    keys, values = keys[:, :, :end], values[:, :end]
    own = torch.arange(chunk.position, end, device=query.device)[:, None]
    others = torch.arange(end, device=query.device)[None, :]
    seen = others <= own
    if masking.window:
        seen &= others > own - masking.window
    if masking.softcap:
        return _attend_chunk_capped(query, keys, values, seen, masking)
    attended = scaled_dot_product_attention(
        query[None],
        keys.transpose(1, 2)[None],
        values[None],
        attn_mask=seen,
        scale=masking.scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _attend_chunk_capped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, masking: _Masking
) -> torch.Tensor:
    """The same with scores that are capped, which torch's fused attention can't."""
    num_heads, count, head_dim = query.shape
    grouped = query.reshape(keys.shape[0], -1, head_dim)  # [kv_heads, group * count, head_dim]
    scores = _scores(grouped @ keys, masking).view(num_heads, count, -1).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(dim=-1).to(values.dtype)
    attended = weights.view(keys.shape[0], -1, weights.shape[-1]) @ values
    return attended.view(num_heads, count, head_dim).transpose(0, 1)


def _scores(products: torch.Tensor, masking: _Masking) -> torch.Tensor:
    scores = products.float() * masking.scaling
    if masking.softcap:
        # Source: Gemma 2 (arXiv 2408.00118), section 2, logit soft-capping.
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    return scores


def _gather(cache: KVCache, layer: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of `table [rows, blocks]`, joined: keys `[rows, kv_heads, head_dim, n]`, values with n before it."""
    keys, values = cache.keys[layer][table], cache.values[layer][table]  # [rows, blocks, kv_heads, ...]
    rows, _, num_heads, head_dim, _ = keys.shape
    joined = keys.permute(0, 2, 3, 1, 4).reshape(rows, num_heads, head_dim, -1)
    return joined, values.permute(0, 2, 1, 3, 4).reshape(rows, num_heads, -1, head_dim)
