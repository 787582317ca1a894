"""Attention over a flat row of mixed work, natively and with torch, against the formula written out for one token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig

from server.engine import attention
from server.engine.attention import Chunk, plan_step
from server.engine.cache import KVCache
from server.engine.kernels import BLOCK_TOKENS, Kernels, load_kernels
from tests.support.engine import KERNELS_FOLDER, Bench

CPU = torch.device("cpu")
# Blocks of four requests, out of order on purpose.
BLOCKS = [[5, 2, 9], [0, 7, 1], [3, 10, 8], [6, 4, 11]]


def _chunk(row: int, position: int, count: int) -> Chunk:
    return Chunk(row, position, count, BLOCKS[row])


def _kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    kernels = load_kernels(KERNELS_FOLDER, dtype=dtype, device=CPU)
    assert kernels is not None, "the tests need a C++ compiler"
    return kernels


def _random_cache(heads: int, kv_heads: int, head_dim: int) -> KVCache:
    config = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1
    )
    cache = KVCache(config, num_blocks=12, num_rows=4, max_tokens=48, dtype=torch.float32, device=CPU)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))  # what lies beyond a request's end must not matter
    for row, blocks in enumerate(BLOCKS):
        cache.assign(row, blocks)
    return cache


def _stored(cache: KVCache, row: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[kv_heads, end, head_dim]` of a request's first tokens, read block by block."""
    keys = torch.cat([cache.keys[0][block].transpose(1, 2) for block in BLOCKS[row]], dim=1)
    values = torch.cat([cache.values[0][block] for block in BLOCKS[row]], dim=1)
    return keys[:, :end], values[:, :end]


def _expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, cap: float | None
) -> torch.Tensor:
    """`query [heads, head_dim]` at the last of `keys [kv_heads, tokens, head_dim]`; softmax(cap(qk / sqrt(d))) v."""
    start = 0 if window is None else max(0, keys.shape[1] - window)
    group = query.shape[0] // keys.shape[0]
    spread_keys = keys[:, start:].double().repeat_interleave(group, dim=0)
    spread_values = values[:, start:].double().repeat_interleave(group, dim=0)
    scores = torch.einsum("hd,htd->ht", query.double(), spread_keys) * query.shape[1] ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("ht,htd->hd", scores.softmax(dim=-1), spread_values)


@pytest.mark.parametrize("way", ["native", "native, chunks whole", "torch"])
@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (5, None), (1, None), (17, 2.0), (None, 0.5)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(([_chunk(0, 3, 1)], []), id="one decode"),
        pytest.param(([_chunk(0, 9, 1), _chunk(1, 15, 1), _chunk(2, 40, 1)], []), id="decodes"),
        pytest.param(([_chunk(0, 9, 1), _chunk(3, 20, 1)], [_chunk(1, 0, 4)]), id="decodes beside a prompt"),
        pytest.param(([_chunk(2, 16, 1)], [_chunk(0, 0, 18), _chunk(3, 7, 35)]), id="later chunk"),
        pytest.param(([], [_chunk(1, 0, 8), _chunk(0, 31, 1)]), id="prompts alone"),
    ],
)
def test_attention_equals_the_formula_when_decodes_and_chunks_are_mixed(
    chunks: tuple[list[Chunk], list[Chunk]],
    window: int | None,
    cap: float | None,
    way: str,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token sees its own request up to itself, within the window, and nothing of the others."""
    if way == "native, chunks whole":
        monkeypatch.setattr(attention, "_MAX_SINGLE_PAIRS", 0)
    _check(chunks, window=window, cap=cap, kernels=None if way == "torch" else _kernels())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (9, 3), (8, 2), (7, 1), (6, 6)])
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 96])
def test_native_attention_equals_the_formula_when_heads_and_widths_differ(
    heads: int, kv_heads: int, head_dim: int, bench: Bench
) -> None:
    """Groups of one to eight query heads, and head dimensions that are no multiple of a vector's width."""
    chunks: tuple[list[Chunk], list[Chunk]] = ([_chunk(0, 0, 1), _chunk(1, 33, 1)], [])
    _check(chunks, window=None, cap=None, kernels=_kernels(), shape=(heads, kv_heads, head_dim))


def _check(
    chunks: tuple[list[Chunk], list[Chunk]],
    *,
    window: int | None,
    cap: float | None,
    kernels: Kernels | None,
    shape: tuple[int, int, int] = (4, 2, 8),
) -> None:
    decodes, prefills = chunks
    heads, kv_heads, head_dim = shape
    torch.manual_seed(7)
    cache = _random_cache(heads, kv_heads, head_dim)
    count = sum(chunk.count for chunk in decodes + prefills)
    query = torch.randn(1, count, heads, head_dim).transpose(1, 2)  # not contiguous, as models pass it
    key, value = (torch.randn(1, count, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
    attend = AttentionInterface()["hotswap"]  # registered by the bench's runner

    output, _ = attend(
        SimpleNamespace(layer_idx=0),
        query,
        key,
        value,
        None,
        scaling=head_dim**-0.5,
        plan=plan_step(cache, decodes + prefills, kernels),
        sliding_window=window,
        softcap=cap,
    )

    assert (1, count, heads, head_dim) == tuple(output.shape)
    places = [(chunk.row, chunk.position + offset) for chunk in decodes + prefills for offset in range(chunk.count)]
    for index, (row, position) in enumerate(places):
        keys, values = _stored(cache, row, position + 1)
        assert torch.equal(key[0, :, index], keys[:, position])
        assert torch.equal(value[0, :, index], values[:, position])
        expected = _expected(query[0, :, index], keys, values, window, cap)
        torch.testing.assert_close(output[0, index], expected.float(), rtol=1e-4, atol=1e-5)


def test_native_attention_is_near_the_formula_when_numbers_are_bfloat16(bench: Bench) -> None:
    """The kernel adds in float32; only what it reads and the result are rounded."""
    torch.manual_seed(3)
    cache = _random_cache(4, 2, 64)
    cache.keys[0], cache.values[0] = cache.keys[0].bfloat16(), cache.values[0].bfloat16()
    query, key, value = (torch.randn(1, heads, 1, 64).bfloat16() for heads in (4, 2, 2))
    plan = plan_step(cache, [_chunk(2, 35, 1)], _kernels(torch.bfloat16))

    output, _ = AttentionInterface()["hotswap"](
        SimpleNamespace(layer_idx=0), query, key, value, None, scaling=0.125, plan=plan
    )

    keys, values = _stored(cache, 2, 36)
    expected = _expected(query[0, :, 0], keys, values, None, None)
    torch.testing.assert_close(output[0, 0].double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_attention_gives_nan_to_its_own_request_alone_when_a_key_is_nan(native: bool, bench: Bench) -> None:
    """A poisoned request must show itself in its logits, and reach no neighbour, also through a stale block table."""
    cache = _random_cache(4, 2, 8)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor[BLOCKS[0]] = float("nan")
    cache.assign(1, [*BLOCKS[1][:1], *BLOCKS[0][1:]])  # what a former user of the row held is another's by now
    query, key, value = (torch.randn(1, heads, 2, 8) for heads in (4, 2, 2))
    chunks = [_chunk(0, 40, 1), _chunk(1, 7, 1)]
    plan = plan_step(cache, chunks, _kernels() if native else None)
    output, _ = AttentionInterface()["hotswap"](
        SimpleNamespace(layer_idx=0), query, key, value, None, scaling=1.0, plan=plan
    )
    assert bool(output[0, 0].isnan().all())
    assert bool(output[0, 1].isfinite().all())
    assert BLOCK_TOKENS == cache.keys[0].shape[3]
