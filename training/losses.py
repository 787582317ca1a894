"""The training loss, computed only where it counts.

A chat row's answer is often a small part of it, and the output head over a large vocabulary is a large part of a small
model: hidden states are picked by their labels before the head, not after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters.chat_template import RenderedRow
from adapters.errors import BaseModelError
from training.rendering import IGNORED_LABEL, collate

__all__ = ["Evaluation", "TokenSums", "check_head_is_plain", "evaluate", "mean_loss", "summed_loss", "token_sums"]

_PROBE_TOKENS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the tokens that carry loss: cross-entropy in nats (a float32 scalar), and how many were guessed."""

    loss: torch.Tensor
    num_correct: torch.Tensor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean cross-entropy in nats a token, and the share of tokens whose likeliest guess was right.

    Of methods that guess no tokens, `loss` is the method's own, the lower the better, and `accuracy` is None. `extra`
    is what they measure besides, by name.
    """

    loss: float
    accuracy: float | None
    extra: Mapping[str, float] = field(default_factory=dict)


def check_head_is_plain(model: Any) -> None:
    """Refuse models whose logits are more than the output head's product, since the loss here would be another one.

    Gemma 2 caps its logits, Granite and Falcon-H1 scale them: a few tokens are run both ways and compared.

    Raises:
        BaseModelError: the logits differ.
    """
    ids = torch.tensor([_PROBE_TOKENS], device=model.device)
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3):
        kind = model.config.model_type
        raise BaseModelError(f"training on models of type {kind!r} is not supported: they change logits after the head")


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `token_sums` alone."""
    return token_sums(model, batch).loss


def token_sums(model: Any, batch: dict[str, torch.Tensor]) -> TokenSums:
    """Cross-entropy and right guesses, summed over the tokens that carry loss.

    Args:
        model: A causal LM of transformers, with or without LoRA layers in it.
        batch: `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`.
    """
    with _autocast(model):
        decoder = model.get_decoder()
        hidden = decoder(  # [batch, seq, hidden]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        carries_loss = targets != IGNORED_LABEL
        logits = model.get_output_embeddings()(hidden[:, :-1][carries_loss])  # [num_targets, vocab]
    wanted = targets[carries_loss]
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    return TokenSums(loss, (logits.detach().argmax(dim=-1) == wanted).sum())


def mean_loss(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> float:
    """The loss of `evaluate` alone."""
    return evaluate(model, rows, batch_size=batch_size, pad_token_id=pad_token_id).loss


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> Evaluation:
    """Loss and token accuracy over whole rows, in eval mode; every token weighs the same."""
    was_training = model.training
    model.eval()
    loss, num_correct = 0.0, 0
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
            sums = token_sums(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            loss += float(sums.loss)
            num_correct += int(sums.num_correct)
    finally:
        model.train(was_training)
    num_targets = sum(sum(row.loss_mask[1:]) for row in rows)
    return Evaluation(loss / num_targets, num_correct / num_targets)


def _autocast(model: Any) -> Any:
    # LoRA weights are kept in float32 for the optimiser; their products run in the precision of the base model.
    dtype = model.get_output_embeddings().weight.dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
