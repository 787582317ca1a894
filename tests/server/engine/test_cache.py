"""The KV cache: its shape, and moving a row."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from server.engine.cache import KVCache

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)


def _cache() -> KVCache:
    return KVCache(CONFIG, num_rows=3, max_tokens=5, dtype=torch.float32, device=torch.device("cpu"))


def test_cache_has_a_zeroed_row_per_request_when_it_is_made() -> None:
    """Keys and values of every layer are `[rows, kv_heads, tokens, head_dim]`, without garbage."""
    cache = _cache()
    assert [tuple(tensor.shape) for tensor in cache.keys + cache.values] == [(3, 2, 5, 8)] * 6
    assert sum(int(tensor.count_nonzero()) for tensor in cache.keys + cache.values) == 0


def test_cache_takes_head_dim_from_the_config_when_it_names_one() -> None:
    """Qwen3's heads are wider than hidden size by heads."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, head_dim=16)
    cache = KVCache(config, num_rows=1, max_tokens=2, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert tuple(cache.keys[0].shape) == (1, 4, 2, 16)
    assert torch.bfloat16 == cache.values[0].dtype


def test_move_row_copies_the_named_tokens_when_a_gap_is_closed() -> None:
    """Every layer's keys and values move; the source and what lies behind the tokens stay."""
    cache = _cache()
    for index, tensor in enumerate(cache.keys + cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))
    before = [tensor.clone() for tensor in cache.keys + cache.values]

    cache.move_row(2, 0, 3)

    for old, new in zip(before, cache.keys + cache.values, strict=True):
        assert torch.equal(old[2, :, :3], new[0, :, :3])
        assert torch.equal(old[0, :, 3:], new[0, :, 3:])
        assert torch.equal(old[1:], new[1:])
