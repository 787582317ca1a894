"""Compiling the native code: once, atomically, and doing without it where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine import kernels
from server.engine.kernels import BLOCK_TOKENS, load_kernels

CPU = torch.device("cpu")


def test_load_compiles_once_when_it_is_asked_twice(tmp_path: Path) -> None:
    """The second call finds the first one's library, and nothing else lies in the folder."""
    assert load_kernels(tmp_path / "k", dtype=torch.float32, device=CPU) is not None
    (library,) = (tmp_path / "k").iterdir()
    made = library.stat().st_mtime_ns
    assert load_kernels(tmp_path / "k", dtype=torch.bfloat16, device=CPU) is not None
    assert [library] == list((tmp_path / "k").iterdir())
    assert made == library.stat().st_mtime_ns


def test_load_gives_none_when_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine then computes with torch."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_kernels(tmp_path / "k", dtype=torch.float32, device=CPU) is None


def test_load_gives_none_when_the_compiler_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that can't compile is no reason not to serve."""
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such flag >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert load_kernels(tmp_path / "k", dtype=torch.float32, device=CPU) is None
    assert [] == list((tmp_path / "k").iterdir())


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float16, CPU), (torch.float32, torch.device("meta"))], ids=["float16", "other device"]
)
def test_load_gives_none_when_the_kernels_do_not_know_it(
    dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    """Only float32 and bfloat16 on a CPU are computed natively."""
    assert load_kernels(tmp_path, dtype=dtype, device=device) is None


def test_block_size_is_one_number_when_two_languages_name_it() -> None:
    """The C++ source and the block table agree."""
    assert f"constexpr int64_t BLOCK = {BLOCK_TOKENS};" in Path(kernels.__file__).with_suffix(".cpp").read_text()
