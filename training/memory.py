"""Tells a lack of memory from other failures, and says what to do about it."""

from __future__ import annotations

import re

__all__ = ["MEMORY_ADVICE", "is_about_memory"]

MEMORY_ADVICE = "lower batch_size or max_length, or set gradient_checkpointing"

_WORDS = re.compile(r"can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


def is_about_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its device had no memory left."""
    # torch.OutOfMemoryError is a RuntimeError that begins "CUDA out of memory"; on a CPU there is no class for it.
    is_named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_named or bool(_WORDS.search(str(error)))
