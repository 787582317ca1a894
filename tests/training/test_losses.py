"""The training loss is transformers' own, computed on fewer positions; validation weighs every token the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from adapters.errors import BaseModelError
from tests.support.conversations import make_dataset, make_messages
from tests.support.tiny import FAMILIES, load_tiny_base
from training.config import TrainSettings
from training.flat_rows import flatten, has_row_attention
from training.logits import LogitRule
from training.lora import add_adapter
from training.losses import check_head, evaluate, head_sums, token_sums
from training.rendering import IGNORED_LABEL, collate, render_dataset

CONVERSATIONS = [
    make_messages("Hi", "Ho."),
    make_messages("a?", "A", "b?", "B and a good deal more than that", system="In capitals."),
    make_messages("A long question with a short answer, which is most of this row", "No"),
    make_messages("q", "An answer that is longer than all the others of this small file together."),
    make_messages("x", "y"),
]


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    """A small adapter."""
    return TrainSettings.load(tmp_path / "home", rank=4, alpha=8)


def _render(tmp_path: Path, base: LoadedBase) -> list[RenderedRow]:
    return render_dataset(base.tokenizer, make_dataset(tmp_path / "data.jsonl", CONVERSATIONS), max_length=512)


def _batch(base: LoadedBase, rows: Sequence[RenderedRow]) -> dict[str, torch.Tensor]:
    return collate(rows, pad_token_id=base.tokenizer.pad_token_id)


def _count(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def _randomise_adapter(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Give lora_B, which begins as zero, an effect, so that lora_A has a gradient too."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(7)
    for _, parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return trained


def _gradients(loss: torch.Tensor, trained: list[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in trained])
    return {name: gradient for (name, _), gradient in zip(trained, gradients, strict=True)}


PADDED_ALWAYS = ("gemma2",)  # whose attention is not torch's


@pytest.mark.parametrize(
    ("family", "is_flat"),
    [(family, is_flat) for family in sorted(FAMILIES) for is_flat in (True, False) if family not in PADDED_ALWAYS]
    + [(family, False) for family in PADDED_ALWAYS],
)
def test_summed_loss_equals_transformers_loss_when_an_adapter_is_trained(
    tmp_path: Path, tiny_folders: dict[str, Path], settings: TrainSettings, family: str, is_flat: bool
) -> None:
    """Value and every LoRA gradient are those of the model's own loss over padded rows, also for a flat batch."""
    base = load_tiny_base(tiny_folders[family])
    model = add_adapter(base, settings).train()
    trained = _randomise_adapter(model)
    batch = _batch(base, _render(tmp_path, base))
    assert has_row_attention(base.model) == (family not in PADDED_ALWAYS)

    expected = model(**batch).loss * _count(batch)
    actual = token_sums(model.get_base_model(), flatten(_render(tmp_path, base)) if is_flat else batch).loss

    torch.testing.assert_close(actual, expected)
    gradients = _gradients(actual, trained)
    fused = {"phi3": 3, "glm4": 1}.get(family, 0)  # of seven linear layers that are parts of one with another
    assert len(gradients) == 2 * 2 * (7 - fused), "two layers, A and B for each linear layer"
    assert min(gradient.abs().max().item() for gradient in gradients.values()) > 1e-4
    torch.testing.assert_close(gradients, _gradients(expected, trained), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.5), LogitRule(scale=2.0, cap=1.5)], ids=str)
def test_summed_loss_equals_transformers_when_there_are_more_targets_than_a_chunk(rule: LogitRule) -> None:
    """The head takes some tokens at a time; together they give the same loss, gradient and right guesses."""
    head = torch.nn.Linear(16, 40).requires_grad_(False)
    hidden, targets = torch.randn(300, 16, requires_grad=True), torch.randint(0, 40, (300,))
    logits = rule.apply(torch.nn.functional.linear(hidden, head.weight, head.bias))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    sums = head_sums(head, hidden, targets, rule)

    torch.testing.assert_close(sums.loss, expected)
    assert int(sums.num_correct) == int((logits.argmax(dim=-1) == targets).sum())
    found, wanted = (torch.autograd.grad(3 * loss, hidden)[0] for loss in (sums.loss, expected))
    torch.testing.assert_close(found, wanted)


def test_summed_loss_is_added_up_when_rows_are_split_into_batches(tmp_path: Path, tiny_base: LoadedBase) -> None:
    """A row's loss does not depend on what it is padded or batched with."""
    rows = _render(tmp_path, tiny_base)

    together = token_sums(tiny_base.model, _batch(tiny_base, rows)).loss
    apart = [token_sums(tiny_base.model, _batch(tiny_base, [row])).loss for row in rows]

    torch.testing.assert_close(torch.stack(apart).sum(), together)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_summed_loss_is_float32_when_the_base_computes_in_any_precision(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """A sum over thousands of tokens is no bfloat16, whatever the model's own precision."""
    base = load_tiny_base(tiny_folders["llama"], quantisation=quantisation)

    assert torch.float32 == token_sums(base.model, _batch(base, _render(tmp_path, base))).loss.dtype


def test_summed_loss_is_zero_when_no_token_carries_loss(tiny_base: LoadedBase) -> None:
    """A batch without answers adds nothing, not a NaN."""
    batch = _batch(tiny_base, [RenderedRow([1, 2, 3], [False] * 3)])

    assert token_sums(tiny_base.model, batch).loss.item() == 0.0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_mean_loss_weighs_every_token_the_same_when_batches_differ_in_size(
    tmp_path: Path, tiny_base: LoadedBase, batch_size: int
) -> None:
    """The mean over all tokens of the file is the same for every batch size: it is no mean of batches' means."""
    rows = _render(tmp_path, tiny_base)
    batches = [_batch(tiny_base, [row]) for row in rows]
    counts = torch.tensor([float(_count(batch)) for batch in batches])
    with torch.no_grad():
        losses = torch.stack([tiny_base.model(**batch).loss for batch in batches])
    by_token, by_row = (losses * counts).sum() / counts.sum(), losses.mean()

    pad_token_id = tiny_base.tokenizer.pad_token_id
    actual = evaluate(tiny_base.model, rows, batch_size=batch_size, pad_token_id=pad_token_id).loss

    assert pytest.approx(by_token.item(), rel=1e-5) == actual
    assert pytest.approx(by_row.item(), rel=1e-2) != by_token.item(), "the rows must be ones that tell the two apart"


@pytest.mark.parametrize("is_training", [True, False])
def test_mean_loss_leaves_the_mode_as_it_was_when_it_is_done(
    tmp_path: Path, tiny_base: LoadedBase, settings: TrainSettings, is_training: bool
) -> None:
    """Validation runs without dropout and gives back a model in the mode that it was in."""
    model = add_adapter(tiny_base, settings.model_copy(update={"dropout": 0.9}))
    _randomise_adapter(model)
    rows = _render(tmp_path, tiny_base)
    pad_token_id = tiny_base.tokenizer.pad_token_id
    model.eval()
    expected = evaluate(tiny_base.model, rows, batch_size=2, pad_token_id=pad_token_id).loss
    model.train(is_training)

    actual = evaluate(tiny_base.model, rows, batch_size=2, pad_token_id=pad_token_id).loss

    assert expected == actual
    assert {is_training} == {module.training for module in tiny_base.model.modules()}


def _tiny_model(config_class: Any, model_class: Any, **extra: Any) -> Any:
    torch.manual_seed(0)
    if config_class is not CohereConfig:
        extra = {"head_dim": 16, **extra}
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        **extra,
    )
    return model_class(config).eval()


def test_check_head_refuses_a_model_when_what_it_does_to_logits_is_not_known() -> None:
    """Its loss would be another one than ours; which families are meant is said."""
    model = _tiny_model(LlamaConfig, LlamaForCausalLM)
    model.forward = _doubling(model.forward)
    with pytest.raises(BaseModelError, match="'llama' is not supported: they change logits after the head in a way"):
        check_head(model)


def _doubling(forward: Any) -> Any:
    def double(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 2
        return output

    return double


@pytest.mark.parametrize(
    ("config_class", "model_class", "extra"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}),
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": None}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    ],
    ids=["llama", "gemma2", "gemma2-uncapped", "granite", "cohere"],
)
def test_check_head_accepts_a_model_when_its_logits_are_computed_alike(
    config_class: Any, model_class: Any, extra: dict[str, Any]
) -> None:
    """The plain product, capped, or scaled."""
    check_head(_tiny_model(config_class, model_class, **extra))
