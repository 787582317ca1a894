"""Keeps a run's memory small, tells a lack of it from other failures, and says what to do about that."""

from __future__ import annotations

import os
import re

__all__ = ["MEMORY_ADVICE", "is_about_memory", "limit_kernel_cache"]

MEMORY_ADVICE = "lower batch_size or max_length, or set gradient_checkpointing"

_KEPT_KERNELS = 32
_WORDS = re.compile(r"can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


def limit_kernel_cache() -> None:
    """Have oneDNN, which computes products on a CPU, keep few compiled kernels. Only before its first product.

    It compiles some for every number of tokens, and no two steps have the same: of the 1,024 that it would keep, few
    are ever used again. Keeping 16, 79 steps on legal clauses (SmolLM2-135M, 2 cores, 3 rows a step) ended at 2.06
    instead of 2.56 GB, in the same CPU time; the 32 kept here were not measured.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KEPT_KERNELS))


def is_about_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its device had no memory left."""
    # torch.OutOfMemoryError is a RuntimeError that begins "CUDA out of memory"; on a CPU there is no class for it.
    is_named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_named or bool(_WORDS.search(str(error)))
