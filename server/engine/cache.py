"""The KV cache: one row per running request, rows kept together in front so that a decode step needs no gathering."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of all layers, `[rows, kv_heads, max_tokens, head_dim]` each.

    All of it is reserved at the start; a CPU's memory is taken page by page as rows fill up, a GPU's at once.
    """

    def __init__(
        self, config: Any, *, num_rows: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        shape = (num_rows, getattr(config, "num_key_value_heads", None) or num_heads, max_tokens, head_dim)
        # Zeros, not empty: attention multiplies what lies beyond a row's end by zero, and garbage may be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.num_rows = num_rows
        self.max_tokens = max_tokens

    def clear_row(self, row: int, num_tokens: int) -> None:
        """Zero what a failed request left: a NaN would reach the row's next request through a weight of zero."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[row, :, :num_tokens] = 0

    def move_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` of one row over another, to close the gap that a finished request leaves."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]
