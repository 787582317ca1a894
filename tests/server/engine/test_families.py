"""Which base models are taken, and that the others are refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.errors import BaseModelError
from server.engine.families import SUPPORTED_FAMILIES, check_supported
from tests.support.tiny import FAMILIES, load_tiny_base


def test_supported_families_are_those_that_the_tests_prove() -> None:
    """Each has a tiny model whose answers are compared with `generate`."""
    assert set(FAMILIES) == SUPPORTED_FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_taken_when_its_family_is_proved(family: str, tiny_folders: dict[str, Path]) -> None:
    """As transformers names it after loading."""
    check_supported(load_tiny_base(tiny_folders[family]).model)


def test_model_is_refused_when_its_family_is_not_proved() -> None:
    """The error names the family and what is supported."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(BaseModelError, match="'gpt2' are not supported; gemma, gemma2, gemma3_text, glm4, granite, "):
        check_supported(model)


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "dynamic", "factor": 2.0}, {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}],
    ids=["one set", "a set for each kind of layer"],
)
def test_model_is_refused_when_its_rotary_embedding_depends_on_the_batch(parameters: dict[str, Any]) -> None:
    """The longest request of a batch would change the others' answers."""
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama", rope_parameters=parameters))
    with pytest.raises(BaseModelError, match="depend on the batch"):
        check_supported(model)
