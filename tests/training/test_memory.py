"""Memory of a run: which errors are about it, and what is kept beside the model."""

from __future__ import annotations

import os

import pytest

from training.memory import is_about_memory, limit_kernel_cache

_SETTING = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(("given", "expected"), [(None, "32"), ("7", "7")])
def test_kernel_cache_is_limited_when_the_user_has_not_set_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    """A choice of the user's own counts."""
    monkeypatch.setenv(_SETTING, given or "")
    if given is None:
        monkeypatch.delenv(_SETTING)
    limit_kernel_cache()
    assert expected == os.environ[_SETTING]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not match"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_error_is_about_memory_when_it_says_so(error: BaseException, expected: bool) -> None:
    """On a CPU torch has no class for it: its words tell."""
    assert expected == is_about_memory(error)
