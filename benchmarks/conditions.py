"""Under what conditions a figure was measured: a number without them says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.base_files import public_name
from adapters.base_model import pick_device
from adapters.settings import CoreSettings
from server.engine.kernels import find_compiler

__all__ = ["describe_host", "describe_machine", "format_conditions"]

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "litserve")
_ROOT = Path(__file__).resolve().parents[1]


def describe_machine(core: CoreSettings) -> dict[str, Any]:
    """The machine, its load, the libraries, the commit and the base model."""
    return {
        **describe_host(),
        "device": _device_name(core.device),
        "C++ compiler for native kernels": find_compiler() or "none: torch alone",
        **{name: version(name) for name in _LIBRARIES},
        "base model": public_name(core.base),
        "quantisation": core.quantisation,
    }


def describe_host() -> dict[str, Any]:
    """The machine, its load, Python and the commit: for what needs no base model."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load average at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "Python": platform.python_version(),
        "commit": _commit(),
    }


def format_conditions(conditions: Mapping[str, Any]) -> str:
    """One list item a condition, in Markdown."""
    return "\n".join(f"- {name}: {value}" for name, value in conditions.items())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _device_name(setting: str) -> str:
    import torch

    device = pick_device(setting)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of the files that run; "unknown" where they are not a checkout."""
    git = ["git", "-C", str(_ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with local changes" if changes.stdout.strip() else "")
