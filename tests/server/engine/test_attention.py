"""Attention over a flat row of mixed work, against the formula written out for one request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, LlamaConfig

from adapters.errors import BaseModelError
from server.engine.attention import AttentionPlan, Chunk, check_supported
from server.engine.cache import KVCache
from tests.support.engine import Bench

HEADS, KV_HEADS, HEAD_DIM, ROWS, TOKENS = 4, 2, 8, 4, 24
CONFIG = LlamaConfig(
    hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1
)


def _expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """`query [heads, head_dim]` at the last of `keys [kv_heads, tokens, head_dim]`; softmax(qk / sqrt(d)) v."""
    start = 0 if window is None else max(0, keys.shape[1] - window)
    spread_keys = keys[:, start:].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
    spread_values = values[:, start:].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
    scores = torch.einsum("hd,htd->ht", query.double(), spread_keys) * HEAD_DIM**-0.5
    return torch.einsum("ht,htd->hd", scores.softmax(dim=-1), spread_values)


@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(([Chunk(0, 3, 1)], []), id="one decode"),
        pytest.param(([Chunk(0, 9, 1), Chunk(1, 2, 1), Chunk(2, 20, 1)], []), id="decodes"),
        pytest.param(([Chunk(0, 9, 1), Chunk(3, 20, 1)], [Chunk(1, 0, 4)]), id="decodes around a prompt"),
        pytest.param(([Chunk(2, 4, 1)], [Chunk(0, 0, 6), Chunk(3, 7, 5)]), id="later chunk"),
        pytest.param(([], [Chunk(1, 0, 8), Chunk(0, 11, 1)]), id="prompts alone"),
    ],
)
def test_attention_equals_the_formula_when_decodes_and_chunks_are_mixed(
    chunks: tuple[list[Chunk], list[Chunk]], window: int | None, bench: Bench
) -> None:
    """Every token sees its own row up to itself, within the window, and nothing of the others."""
    decodes, prefills = chunks
    generator = torch.Generator().manual_seed(7)
    cache = KVCache(CONFIG, num_rows=ROWS, max_tokens=TOKENS, dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))  # what lies beyond a row's end must not matter
    count = sum(chunk.count for chunk in decodes + prefills)
    query = torch.randn(1, HEADS, count, HEAD_DIM, generator=generator)
    key, value = (torch.randn(1, KV_HEADS, count, HEAD_DIM, generator=generator) for _ in range(2))
    attend = AttentionInterface()["hotswap"]  # registered by the bench's runner

    output, _ = attend(
        SimpleNamespace(layer_idx=0),
        query,
        key,
        value,
        None,
        scaling=HEAD_DIM**-0.5,
        plan=AttentionPlan(cache, decodes, prefills),
        sliding_window=window,
    )

    assert (1, count, HEADS, HEAD_DIM) == tuple(output.shape)
    places = [(chunk.row, chunk.position + offset) for chunk in decodes + prefills for offset in range(chunk.count)]
    for index, (row, position) in enumerate(places):
        assert torch.equal(key[0, :, index], cache.keys[0][row, :, position])
        assert torch.equal(value[0, :, index], cache.values[0][row, :, position])
        seen = slice(0, position + 1)
        expected = _expected(query[0, :, index], cache.keys[0][row, :, seen], cache.values[0][row, :, seen], window)
        torch.testing.assert_close(output[0, index], expected.float(), rtol=1e-4, atol=1e-5)


def test_decode_mask_is_made_once_when_layers_share_a_window() -> None:
    """All layers of one window share a mask; another window has its own."""
    cache = KVCache(CONFIG, num_rows=2, max_tokens=8, dtype=torch.float32, device=torch.device("cpu"))
    plan = AttentionPlan(cache, [Chunk(0, 4, 1), Chunk(1, 1, 1)], [])
    assert plan.decode_mask(None) is plan.decode_mask(None)
    visible = {window: (plan.decode_mask(window)[:, 0, 0] == 0).int().tolist() for window in (None, 2)}
    assert visible == {None: [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], 2: [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0]]}


def test_model_is_refused_when_its_family_is_not_proved() -> None:
    """The error names the family and what is supported."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(BaseModelError, match="'gpt2' are not supported; llama, mistral, qwen2, qwen3 are"):
        check_supported(model)
