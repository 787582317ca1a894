"""Batches without padding: all rows of a batch lie one behind the other, and each attends to itself alone.

Everything but attention works on single tokens, so that a flat row of them costs no padding. Attention is ours: a
function in transformers' attention interface that takes the rows one by one, so that no row can see another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adapters.chat_template import RenderedRow
from training.rendering import IGNORED_LABEL, collate

__all__ = [
    "RowLayout",
    "flatten",
    "has_row_attention",
    "install_row_attention",
    "make_batch",
    "use_true_attention",
]

_IMPLEMENTATION = "hotswap_rows"
# Tokens of a row up to which its scores are written out on a CPU: torch's fused attention takes four times as long for
# rows of 120 tokens in bfloat16 (forward and backward, 9 heads of 64, Zen 5), as long for 256, and less for 1024.
_MAX_WRITTEN_OUT = 256
_PROBE_LENGTHS = (9, 4)
_PROBE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The lengths of the rows in a flat batch, in order, and the masks made for them, shared by all layers."""

    lengths: tuple[int, ...]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """What is added to a row's scores, `[length, length]`: minus infinity where a token may not look."""
        key = (length, window if window is not None and window < length else None)  # the others have no effect
        if key not in self.masks:
            places = torch.arange(length, device=like.device)
            distance = places[:, None] - places
            is_hidden = distance < 0 if key[1] is None else (distance < 0) | (distance >= key[1])
            zeros = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            self.masks[key] = zeros.masked_fill(is_hidden, float("-inf"))
        return self.masks[key]


def make_batch(model: Any, rows: Sequence[RenderedRow], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows as tensors for `token_sums`: flat where the model has row attention, padded otherwise."""
    return flatten(rows) if has_row_attention(model) else collate(rows, pad_token_id=pad_token_id)


def flatten(rows: Sequence[RenderedRow]) -> dict[str, torch.Tensor]:
    """Rows behind one another.

    Returns:
        `input_ids`, `attention_mask` (ones), `position_ids` (each row's from 0) and `labels`, all int64 `[1, tokens]`,
        and `row_lengths [rows]`. A row's first token is no target: what stands before it is another row.
    """
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    ids = torch.tensor([token for row in rows for token in row.input_ids])
    mask = torch.tensor([carries for row in rows for carries in (False, *row.loss_mask[1:])])
    positions = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    batch["labels"] = ids.where(mask, IGNORED_LABEL)
    return {name: tensor[None] for name, tensor in batch.items()} | {"row_lengths": lengths}


def has_row_attention(model: Any) -> bool:
    """Whether flat batches may be given to this model."""
    return bool(model.config.get_text_config()._attn_implementation == _IMPLEMENTATION)


def use_true_attention(model: Any) -> None:
    """Have a model compute attention as it is meant where torch's fused attention leaves a part of it out.

    Gemma 2 caps the scores of its attention, which torch's function can't; the engine does.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def install_row_attention(model: Any) -> bool:
    """Let a model take flat batches, if it computes the same with them; returns whether it does.

    Models that mix tokens anywhere but in attention, or attend in another way, are left as they are. Calls without a
    layout of rows, such as those that generate text, attend as before.
    """
    original = model.config.get_text_config()._attn_implementation
    if original != "sdpa":
        return has_row_attention(model)
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    expected = [_hidden(model, flatten([row]), None) for row in _probe_rows()]
    model.set_attn_implementation(_IMPLEMENTATION)
    found = _hidden(model, flatten(_probe_rows()), RowLayout(_PROBE_LENGTHS))
    whole = torch.cat(expected)
    if (found - whole).abs().max() <= _PROBE_TOLERANCE * whole.abs().max():
        return True
    model.set_attn_implementation(original)
    return False


def _probe_rows() -> list[RenderedRow]:
    return [RenderedRow(list(range(1, length + 1)), [True] * length) for length in _PROBE_LENGTHS]


@torch.no_grad()
def _hidden(model: Any, batch: dict[str, torch.Tensor], layout: RowLayout | None) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "position_ids")
    given = {name: batch[name].to(model.device) for name in names}
    extra = {} if layout is None else {"row_layout": layout}
    hidden: torch.Tensor = model.get_decoder()(**given, **extra, use_cache=False).last_hidden_state
    return hidden[0].float()


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_layout: RowLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query [1, heads, tokens, head_dim]` -> `[1, tokens, heads, head_dim]`."""
    if row_layout is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    dropout, window = options.get("dropout") or 0.0, options.get("sliding_window")
    rows = (torch.split(tensor[0], list(row_layout.lengths), dim=1) for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            _attend_row(q, k, v, row_layout, window=window, scaling=scaling, dropout=dropout)
            for q, k, v in zip(*rows, strict=True)
        ]
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


def _attend_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RowLayout,
    *,
    window: int | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """One row: `query [heads, length, head_dim]`, keys and values with as many heads or a part of them."""
    num_heads, length, width = query.shape
    if query.device.type == "cpu" and length <= _MAX_WRITTEN_OUT:
        groups = num_heads // key.shape[0]
        # The heads that share keys stand below one another; the mask repeats with them.
        # In float32: scores of 20, rounded to bfloat16, would change what a token weighs by some percent.
        queries, keys = query.float().reshape(key.shape[0], groups * length, width), key.float()
        mask = layout.mask(length, window, queries).repeat(groups, 1).expand(key.shape[0], -1, -1)
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
        weights = drop(torch.softmax(scores, dim=-1), dropout).to(value.dtype)
        return torch.bmm(weights, value).view(num_heads, length, -1)
    is_plain = window is None or window >= length
    fused: torch.Tensor = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=None if is_plain else layout.mask(length, window, query),
        dropout_p=dropout,
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=key.shape[0] != num_heads,
    )
    return fused[0]
