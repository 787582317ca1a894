"""NEFTune: noise on the embeddings while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["noisy_embeddings"]


@contextmanager
def noisy_embeddings(embeddings: torch.nn.Module, batch: Mapping[str, torch.Tensor], alpha: float) -> Iterator[None]:
    """Add noise to what the embeddings give for a batch, each row's by its own length.

    Uniform between plus and minus alpha / sqrt(length * width). A row's noise depends neither on the rows beside it nor
    on padding, in flat batches as in padded ones.

    Args:
        embeddings: Whose output for the batch is `[batch, seq, width]`.
        batch: As `make_batch` gives it: `row_lengths` of rows behind one another, otherwise `attention_mask`.
        alpha: How much; 5 is usual.

    Source: NEFTune (arXiv 2310.05914), algorithm 1.
    """
    lengths = _lengths(batch)

    def blur(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        scale = alpha / (lengths.to(output.device) * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output.dtype)

    hook = embeddings.register_forward_hook(blur)
    try:
        yield
    finally:
        hook.remove()


def _lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of each token's row, as `[1, tokens]` of a flat batch and `[batch, 1]` of a padded one."""
    if (lengths := batch.get("row_lengths")) is not None:
        return lengths.repeat_interleave(lengths)[None]
    return batch["attention_mask"].sum(dim=1, keepdim=True)
