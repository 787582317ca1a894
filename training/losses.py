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
from training.flat_rows import RowLayout, make_batch
from training.logits import LogitRule, read_logit_rule
from training.precision import base_precision
from training.rendering import IGNORED_LABEL

__all__ = [
    "Evaluation",
    "TokenSums",
    "check_head",
    "evaluate",
    "head_sums",
    "row_sums",
    "token_sums",
]

_PLAIN = LogitRule()
_PROBE_TOKENS = (1, 2, 3, 4)
_HEAD_CHUNK = 128


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
        scores: What the gate compares instead of the losses, the higher the better: float64 `[rows]`, or None. Of a
            reward model 1 for a pair in the right order, a half for a tie; of rloo and grpo the rewards.
        extra: What a method measures besides, by name.
    """

    losses: np.ndarray
    weights: np.ndarray
    num_right: np.ndarray | None = None
    scores: np.ndarray | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls, losses: torch.Tensor, extra: Mapping[str, float], *, scores: torch.Tensor | None = None
    ) -> Evaluation:
        """What a method measured by its own loss, `[rows]`, and by scores, `[rows]`, where it has some."""
        kept = None if scores is None else scores.double().cpu().numpy()
        return cls(losses.double().cpu().numpy(), np.ones(len(losses)), scores=kept, extra=extra)

    @property
    def loss(self) -> float:
        """Mean loss a token (or a pair); every one weighs the same."""
        return float(self.losses.sum() / self.weights.sum())

    @property
    def accuracy(self) -> float | None:
        """The share of tokens that was guessed right."""
        return None if self.num_right is None else float(self.num_right.sum() / self.weights.sum())


def check_head(model: Any) -> None:
    """Refuse models whose logits are not what is computed here, since the loss would be another one.

    Whatever a family does behind its head that `training/logits.py` does not know: a few tokens are run both ways and
    compared.

    Raises:
        BaseModelError: the logits differ.
    """
    ids = torch.tensor([_PROBE_TOKENS], device=model.device)
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ours = read_logit_rule(model).apply(model.get_output_embeddings()(hidden))
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3):
        kind = model.config.model_type
        raise BaseModelError(
            f"training on models of type {kind!r} is not supported: they change logits after the head in a way that is "
            "not known here; serving them is not affected"
        )


def token_sums(model: Any, batch: dict[str, torch.Tensor]) -> TokenSums:
    """Cross-entropy and right guesses, summed over the tokens that carry loss.

    Args:
        model: A causal LM of transformers, with or without LoRA layers in it.
        batch: `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`; or a flat one of `training/flat_rows.py`.
    """
    with base_precision(model):
        hidden, wanted, _ = _target_states(model, batch)
        return head_sums(model.get_output_embeddings(), hidden, wanted, read_logit_rule(model))


@torch.no_grad()
def row_sums(model: Any, batch: dict[str, torch.Tensor]) -> TokenSums:
    """The same without a gradient, but one sum a row: both are `[rows]`."""
    with base_precision(model):
        hidden, wanted, row_of = _target_states(model, batch)
        starts = range(0, len(wanted), _HEAD_CHUNK)
        parts = [slice(start, start + _HEAD_CHUNK) for start in starts]
        found = [_token_losses(model, hidden[part], wanted[part]) for part in parts]
    num_rows = len(batch.get("row_lengths", batch["labels"]))
    sums = [torch.zeros(num_rows, device=hidden.device) for _ in range(2)]
    for total, column in zip(sums, zip(*found, strict=True), strict=False):
        total.index_add_(0, row_of, torch.cat(column))
    return TokenSums(*sums)


def _token_losses(model: Any, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = read_logit_rule(model).apply(model.get_output_embeddings()(hidden).float())  # [chunk, vocab]
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return losses, (logits.argmax(dim=-1) == wanted).float()


def _target_states(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token that carries loss: the hidden state before it `[num_targets, hidden]`, the token, and its row."""
    hidden = model.get_decoder()(**_decoder_inputs(batch), use_cache=False).last_hidden_state  # [batch, seq, hidden]
    targets = batch["labels"][:, 1:]
    carries_loss = targets != IGNORED_LABEL
    row_of = carries_loss.nonzero()[:, 0]
    if (lengths := batch.get("row_lengths")) is not None:
        row_of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[1:][carries_loss[0]]
    return hidden[:, :-1][carries_loss], targets[carries_loss], row_of


def _decoder_inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "position_ids")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    if "row_lengths" in batch:
        inputs["row_layout"] = RowLayout(tuple(batch["row_lengths"].tolist()))
    return inputs


def head_sums(head: Any, hidden: torch.Tensor, targets: torch.Tensor, rule: LogitRule = _PLAIN) -> TokenSums:
    """The sums over tokens whose last hidden states, `[num_targets, hidden]`, are given."""
    if type(head) is torch.nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        inputs = (hidden.to(head.weight.dtype), head.weight, head.bias, targets, rule, torch.is_grad_enabled())
        return TokenSums(*_FrozenHeadLoss.apply(*inputs))  # type: ignore[no-untyped-call]
    logits = rule.apply(head(hidden).float())  # [num_targets, vocab]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return TokenSums(loss, (logits.detach().argmax(dim=-1) == targets).sum())


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen linear head: a few tokens at a time, with the gradient computed on the way.

    The logits of all tokens, their softmax and its gradient would be three tensors `[num_targets, vocab]`, which for a
    large vocabulary take more time to write and read than the product itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rule: LogitRule,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(hidden) if needs_gradient else None
        loss = torch.zeros((), device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        for start in range(0, len(targets), _HEAD_CHUNK):
            part = slice(start, start + _HEAD_CHUNK)
            wanted = targets[part, None]
            logits = rule.apply(torch.nn.functional.linear(hidden[part], weight, bias).float())  # [chunk, vocab]
            slope = rule.slope(logits) if needs_gradient and rule != _PLAIN else None
            peaks, guesses = logits.max(dim=-1, keepdim=True)
            num_correct += (guesses == wanted).sum()
            picked = logits.gather(1, wanted) - peaks
            weights = logits.sub_(peaks).exp_()
            totals = weights.sum(dim=-1, keepdim=True)
            loss += (totals.log() - picked).sum()
            if gradient is not None:
                # The derivative by the logits: the softmax, less one at the target.
                weights.div_(totals).scatter_add_(1, wanted, -torch.ones_like(totals))
                if slope is not None:
                    weights.mul_(slope)
                gradient[part] = weights.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # One over the number of tokens, rounded to bfloat16, would be off by up to half a percent.
        return (gradient.float() * grads[0]).to(gradient.dtype), None, None, None, None, None


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> Evaluation:
    """Loss and token accuracy on whole rows, in eval mode."""
    was_training = model.training
    model.eval()
    found: list[TokenSums] = []
    try:
        for start in range(0, len(rows), batch_size):
            batch = make_batch(model, rows[start : start + batch_size], pad_token_id=pad_token_id)
            found.append(row_sums(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    finally:
        model.train(was_training)
    return Evaluation(
        losses=torch.cat([sums.loss for sums in found]).double().cpu().numpy(),
        weights=np.array([sum(row.loss_mask[1:]) for row in rows], dtype=np.float64),
        num_right=torch.cat([sums.num_correct for sums in found]).double().cpu().numpy(),
    )
