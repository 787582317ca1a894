"""Joined linear layers compute what the layers computed one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from server.engine.frozen import FrozenLinear, can_join
from tests.support.tiny import load_tiny_base

NAMES = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_joined_layers_give_each_layers_output_when_they_are_plain(biases: tuple[bool, bool]) -> None:
    """Side by side, in their order, with the biases of those that have one."""
    layers = [nn.Linear(6, width, bias=bias) for width, bias in zip((4, 3), biases, strict=True)]
    x = torch.randn(5, 6)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    joined = FrozenLinear(layers)
    joined.warm_up()
    with torch.inference_mode():
        torch.testing.assert_close(joined(x), expected, rtol=1e-6, atol=1e-6)
    assert [4, 3] == joined.widths


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_joined_layers_give_each_layers_output_when_they_are_4_bit(
    family: str, count: int, num_tokens: int, tiny_folders: dict[str, Path]
) -> None:
    """The product on packed weights is bit for bit that of bitsandbytes' own modules; Qwen2 has biases."""
    attention: Any = load_tiny_base(tiny_folders[family], quantisation="nf4").model.model.layers[0].self_attn
    layers = [getattr(attention, name) for name in NAMES[:count]]
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode():
        expected = torch.cat([copy.deepcopy(layer)(x) for layer in layers], dim=-1)
        joined = FrozenLinear(layers)
        before = joined(x)
        joined.warm_up()
        after = joined(x)
    torch.testing.assert_close(before.float(), expected.float(), rtol=2**-6, atol=2**-6)
    assert torch.equal(expected, after)
    assert expected.abs().max() > 0.1


def test_result_is_fresh_memory_when_it_is_asked_twice() -> None:
    """Callers add adapters in place."""
    joined = FrozenLinear([nn.Linear(3, 2)])
    x = torch.randn(1, 3)
    with torch.inference_mode():
        first = joined(x)
        kept = first.clone()
        joined(x).zero_()
    assert torch.equal(kept, first)


@pytest.mark.parametrize(("shape", "expected"), [((2, 32), True), ((3, 32), False), ((5, 96), False)])
def test_4_bit_layers_are_joined_only_when_their_scales_end_with_them(shape: tuple[int, int], expected: bool) -> None:
    """A block of 64 weights that spans two layers would get the scale of one."""
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4").to("cpu")
    assert expected == can_join(layer)
    assert can_join(nn.Linear(shape[1], shape[0]))
