"""The precision that a run computes in: that of the base model, around an adapter that is kept in float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

__all__ = ["base_precision"]


def base_precision(model: Any) -> Any:
    """A context in which products run in the base model's precision.

    LoRA weights are kept in float32 for the optimiser; their products need no more than the base has.
    """
    dtype = model.get_output_embeddings().weight.dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
