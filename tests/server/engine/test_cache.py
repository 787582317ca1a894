"""The KV cache: its shape, the block table, and clearing."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from server.engine.cache import KVCache
from server.engine.kernels import BLOCK_TOKENS

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)


def _cache(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(config, num_blocks=5, num_rows=3, max_tokens=40, dtype=dtype, device=torch.device("cpu"))


def test_cache_is_zero_when_it_is_made() -> None:
    """Keys have their tokens last, values their head dimension; a spare block is there; nothing holds garbage."""
    cache = _cache()
    assert [(6, 2, 8, BLOCK_TOKENS)] * 3 == [tuple(tensor.shape) for tensor in cache.keys]
    assert [(6, 2, BLOCK_TOKENS, 8)] * 3 == [tuple(tensor.shape) for tensor in cache.values]
    assert sum(int(tensor.count_nonzero()) for tensor in cache.keys + cache.values) == 0


def test_cache_takes_head_dim_from_the_config_when_it_names_one() -> None:
    """Qwen3's heads are wider than hidden size by heads."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, head_dim=16)
    cache = _cache(config, torch.bfloat16)
    assert (6, 4, 16, BLOCK_TOKENS) == tuple(cache.keys[0].shape)
    assert torch.bfloat16 == cache.values[0].dtype


def test_assign_writes_one_row_of_the_table_when_a_request_starts() -> None:
    """A row has room for the longest request; the others are left alone, and the spare one names the spare block."""
    cache = _cache()
    cache.assign(1, [4, 2])
    assert [[0, 0, 0], [4, 2, 0], [0, 0, 0], [5, 5, 5]] == cache.table.tolist()


def test_clear_zeroes_the_named_blocks_when_a_request_failed() -> None:
    """In every layer, keys and values; other blocks keep what they hold."""
    cache = _cache()
    for tensor in cache.keys + cache.values:
        tensor.fill_(float("nan"))
    cache.clear([3, 0])
    for tensor in cache.keys + cache.values:
        assert [True, False, False, True, False, False] == [bool((block == 0).all()) for block in tensor]
