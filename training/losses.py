"""The training loss, computed only where it counts.

A chat row's answer is often a small part of it, and the output head over a large vocabulary is a large part of a small
model: hidden states are picked by their labels before the head, not after.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from adapters.chat_template import RenderedRow
from adapters.errors import BaseModelError
from training.rendering import IGNORED_LABEL, collate

__all__ = ["check_head_is_plain", "mean_loss", "summed_loss"]

# Config keys of models that change logits behind the output head (Gemma 2, Granite, Cohere).
_LOGIT_CHANGING_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_head_is_plain(config: Any) -> None:
    """Refuse models whose logits are more than the output head's product, since the loss here would be another one.

    Raises:
        BaseModelError: names the setting of the model.
    """
    for key in _LOGIT_CHANGING_KEYS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise BaseModelError(f"training on a base model with {key} is not supported")


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy in nats, summed over the tokens that carry loss.

    Args:
        model: A causal LM of transformers, with or without LoRA layers in it.
        batch: `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`.

    Returns:
        A scalar in float32.
    """
    with _autocast(model):
        decoder = model.get_decoder()
        hidden = decoder(  # [batch, seq, hidden]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        carries_loss = targets != IGNORED_LABEL
        logits = model.get_output_embeddings()(hidden[:, :-1][carries_loss])  # [num_targets, vocab]
    return torch.nn.functional.cross_entropy(logits.float(), targets[carries_loss], reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> float:
    """Mean cross-entropy in nats a token over whole rows, in eval mode; every token weighs the same."""
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
        total += float(summed_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    model.train(was_training)
    return total / sum(sum(row.loss_mask[1:]) for row in rows)


def _autocast(model: Any) -> Any:
    # LoRA weights are kept in float32 for the optimiser; on a bfloat16 base their products run in bfloat16.
    if model.get_output_embeddings().weight.dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)
