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

_PROBE_TOKENS = (1, 2, 3, 4)


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
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad_token_id=pad_token_id)
            total += float(summed_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}))
    finally:
        model.train(was_training)
    return total / sum(sum(row.loss_mask[1:]) for row in rows)


def _autocast(model: Any) -> Any:
    # LoRA weights are kept in float32 for the optimiser; their products run in the precision of the base model.
    dtype = model.get_output_embeddings().weight.dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
