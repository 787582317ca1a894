"""The training loss, computed only where it counts.

A chat row's answer is often a small part of it, and the output head over a large vocabulary is a large part of a small
model: hidden states are picked by their labels before the head, not after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapters.chat_template import RenderedRow
from adapters.errors import BaseModelError
from training.precision import base_precision
from training.rendering import IGNORED_LABEL, collate

__all__ = [
    "Evaluation",
    "TokenSums",
    "check_head_is_plain",
    "evaluate",
    "mean_loss",
    "row_sums",
    "summed_loss",
    "token_sums",
]

_PROBE_TOKENS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the tokens that carry loss: cross-entropy in nats (float32), and how many were guessed."""

    loss: torch.Tensor
    num_correct: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What was measured on rows: of each row the loss, what it is counted by, and how much of that was right.

    Of supervised fine-tuning these are cross-entropy in nats, tokens that carry loss, and tokens whose likeliest guess
    was right; of other methods their own loss, the lower the better, and 1: no tokens are guessed.

    Args:
        losses: Sums, float64 `[rows]`.
        weights: float64 `[rows]`; 0 for a row without tokens that carry loss.
        num_right: float64 `[rows]`, at most the weights, or None.
        extra: What a method measures besides, by name.
    """

    losses: np.ndarray
    weights: np.ndarray
    num_right: np.ndarray | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, losses: torch.Tensor, extra: Mapping[str, float]) -> Evaluation:
        """What a method measured by its own loss, `[rows]`."""
        return cls(losses.double().cpu().numpy(), np.ones(len(losses)), extra=extra)

    @property
    def loss(self) -> float:
        """Mean loss a token (or a pair); every one weighs the same."""
        return float(self.losses.sum() / self.weights.sum())

    @property
    def accuracy(self) -> float | None:
        """The share of tokens that was guessed right."""
        return None if self.num_right is None else float(self.num_right.sum() / self.weights.sum())


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
    logits, wanted, _ = _target_logits(model, batch)
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    return TokenSums(loss, (logits.detach().argmax(dim=-1) == wanted).sum())


def row_sums(model: Any, batch: dict[str, torch.Tensor]) -> TokenSums:
    """The same, but one sum a row: both are `[batch]`."""
    logits, wanted, row_of = _target_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    is_right = (logits.argmax(dim=-1) == wanted).float()
    zeros = torch.zeros(len(batch["labels"]), device=losses.device)
    return TokenSums(zeros.index_add(0, row_of, losses), zeros.index_add(0, row_of, is_right))


def _target_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token that carries loss: logits `[num_targets, vocab]`, the token, and the row that it is in."""
    with base_precision(model):
        decoder = model.get_decoder()
        hidden = decoder(  # [batch, seq, hidden]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        carries_loss = targets != IGNORED_LABEL
        logits = model.get_output_embeddings()(hidden[:, :-1][carries_loss])
    return logits, targets[carries_loss], carries_loss.nonzero()[:, 0]


def mean_loss(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> float:
    """The loss of `evaluate` alone."""
    return evaluate(model, rows, batch_size=batch_size, pad_token_id=pad_token_id).loss


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> Evaluation:
    """Loss and token accuracy on whole rows, in eval mode."""
    was_training = model.training
    model.eval()
    found: list[TokenSums] = []
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
            found.append(row_sums(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    finally:
        model.train(was_training)
    return Evaluation(
        losses=torch.cat([sums.loss for sums in found]).double().cpu().numpy(),
        weights=np.array([sum(row.loss_mask[1:]) for row in rows], dtype=np.float64),
        num_right=torch.cat([sums.num_correct for sums in found]).double().cpu().numpy(),
    )
