"""Native code for the decode step on a CPU: compiles `kernels.cpp` for this machine, once, and calls it.

Without a C++ compiler the engine computes the same with torch's own operations, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch

__all__ = ["BLOCK_TOKENS", "Kernels", "find_compiler", "load_kernels"]

_log = structlog.get_logger(__name__)

BLOCK_TOKENS = 16  # tokens in a block of the KV cache; kernels.cpp has the same number
_SOURCE = Path(__file__).with_name("kernels.cpp")
# Vectors for the very CPU; no errno and no traps, or loops with exp and floor stay scalar. NaN keeps its meaning.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 120
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "add_low_rank": [_POINTER] * 7 + [_INTEGER] * 5,
    "write": [_POINTER] * 6 + [_INTEGER] * 7,
    "attend": [_POINTER] * 7 + [_INTEGER] * 8 + [_FLOAT] * 2,
}


class Kernels:
    """The compiled functions for one dtype. Arguments are those of kernels.cpp; the callers own shapes and strides."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.add_low_rank = _bind(library, "add_low_rank", dtype)
        self.write = _bind(library, "write", dtype)
        self.attend = _bind(library, "attend", dtype)


def load_kernels(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Compile the kernels unless `folder` has them, and load them.

    Returns:
        None where they can't serve: another device than a CPU, another dtype than float32 and bfloat16, no compiler.
    """
    if device.type != "cpu" or dtype not in _SUFFIXES:
        return None
    compiler = find_compiler()
    if compiler is None:
        _log.warning("kernels_unavailable", reason="no C++ compiler found; install one for a faster decode step")
        return None
    try:
        return Kernels(ctypes.CDLL(str(_build(compiler, folder))), dtype)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _log.warning("kernels_unavailable", reason=str(reason)[-2000:])
        return None


def find_compiler() -> str | None:
    """The C++ compiler that would be used."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _build(compiler: str, folder: Path) -> Path:
    """The library's path, named by all that it depends on, so that another CPU or source never finds it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    parts = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version.stdout, _describe_cpu().encode()]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    target = folder / f"kernels-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "kernels.so"
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(output)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_TIMEOUT_S)
            os.replace(output, target)  # noqa: PTH105 - atomic, so that a process beside this one sees all or nothing
    return target


def _describe_cpu() -> str:
    """What `-march=native` looks at, near enough: the processor's model and its feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _bind(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Callable[..., None]:
    function = library[f"{name}_{_SUFFIXES[dtype]}"]
    function.restype, function.argtypes = None, _SIGNATURES[name]
    return function
