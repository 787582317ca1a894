"""How likely a model finds the answers in rows: what preference methods compare between a model and its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

from adapters.chat_template import RenderedRow
from training.config import Reference
from training.flat_rows import make_batch
from training.losses import row_sums

__all__ = ["answer_log_probs", "as_reference", "eval_mode"]


@torch.no_grad()
def answer_log_probs(
    model: PeftModel, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int
) -> torch.Tensor:
    """Log-probability of the tokens of each row that carry loss, summed a row, in nats: float32 `[num_rows]`.

    The model computes in eval mode, with the adapters that are active.
    """
    base = model.get_base_model()
    sums = []
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = make_batch(base, rows[start : start + batch_size], pad_token_id=pad_token_id)
            losses = row_sums(base, {name: tensor.to(base.device) for name, tensor in batch.items()}).loss
            sums.append(-losses.cpu())
    return torch.cat(sums)


@contextmanager
def as_reference(model: PeftModel, reference: Reference) -> Iterator[None]:
    """Let the model be the reference that a run is held to; before the run's first step alone.

    Until then the adapter is the version that the run starts from, so that nothing has to be loaded for it; the bare
    base is the model without its adapter.
    """
    if reference == "start":
        yield
        return
    with model.disable_adapter():
        yield


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
