"""The KV cache: blocks of a few tokens each, and a table of which blocks each running request holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.engine.kernels import BLOCK_TOKENS

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of all layers, in blocks.

    `keys[layer]` is `[blocks, kv_heads, head_dim, BLOCK_TOKENS]`: tokens last, so that one load of a vector serves all
    tokens of a block; `values[layer]` is `[blocks, kv_heads, BLOCK_TOKENS, head_dim]`. A CPU's memory is taken page by
    page as blocks are first written, a GPU's at once. One block and one row of the table more than are asked for are
    there for tokens that stand for no request: `spare_block` and `spare_row`.

    Args:
        config: The model's text config.
        num_blocks: Blocks in all.
        num_rows: Requests that may run at once; each has a row of the block table.
        max_tokens: The longest request, prompt and answer together.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(
        self, config: Any, *, num_blocks: int, num_rows: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        self.num_blocks = num_blocks
        self.num_rows = num_rows
        self.max_tokens = max_tokens
        layers = range(config.num_hidden_layers)
        # Zeros, not empty: torch's own attention multiplies what lies beyond a request's end by zero, and garbage may
        # be NaN.
        key_shape = (num_blocks + 1, self.num_kv_heads, head_dim, BLOCK_TOKENS)
        value_shape = (num_blocks + 1, self.num_kv_heads, BLOCK_TOKENS, head_dim)
        self.keys = [torch.zeros(key_shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(value_shape, dtype=dtype, device=device) for _ in layers]
        self.spare_block = num_blocks
        self.spare_row = num_rows
        # [rows, blocks a row]; the engine's thread writes a row when a request starts
        self.table = torch.zeros(num_rows + 1, -(-max_tokens // BLOCK_TOKENS), dtype=torch.int32, device=device)
        self.table[self.spare_row] = self.spare_block

    def assign(self, row: int, blocks: Sequence[int]) -> None:
        """Give a row its blocks, in the order of the tokens that they hold."""
        self.table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that a failed request left: a NaN would reach their next user through a weight of zero."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self.table.device)
        for tensor in (*self.keys, *self.values):
            tensor[index] = 0
