"""A base model of random weights: the product loads and serves it as any other."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.chat_template import render_prompt
from benchmarks.random_base import SHAPES, save_random_base
from server.engine.families import check_supported
from tests.support.tiny import load_tiny_base


def test_random_base_answers_when_it_was_written(tmp_path: Path) -> None:
    """In 4 bits, with a chat template, and with finite scores."""
    base = load_tiny_base(save_random_base(tmp_path / "base", "small"), quantisation="nf4")
    check_supported(base.model)
    prompt = render_prompt(base.tokenizer, [{"role": "user", "content": "Who are you?"}])
    with torch.inference_mode():
        logits = base.model(torch.tensor([prompt])).logits
    assert (1, len(prompt), SHAPES["small"]["vocab_size"]) == tuple(logits.shape)
    assert bool(logits.isfinite().all())


def test_llama_3_has_eight_thousand_million_weights_when_counted() -> None:
    """The shape is the one that it says: 8.03 billion, as published."""
    shape = SHAPES["llama-3-8b"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    key_value = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner + 2 * hidden
    assert 8_030_261_248 == shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * hidden + hidden
