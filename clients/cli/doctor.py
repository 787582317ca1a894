"""`hotswap doctor`: what machine this is, what it will use, and what is missing, in words."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, JsonOption, load_core
from clients.cli.output import console, format_bytes, print_json

__all__ = ["doctor"]

_MIN_FREE_BYTES = 2_000_000_000
_LEAST_FREE_BYTES = 200_000_000  # two checkpoints of an adapter with its optimizer, the version, logs
_MIN_MEMORY_BYTES = 4_000_000_000
_DEFAULT_PORT = 8000
_MARKS = {"ok": "[green]ok[/green]     ", "note": "[yellow]note[/yellow]   ", "missing": "[red]missing[/red]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `missing` means that something won't work."""

    topic: str
    state: Literal["ok", "note", "missing"]
    text: str


def doctor(
    home: HomeOption = None, base: BaseOption = None, device: DeviceOption = None, json: JsonOption = False
) -> None:
    """Check this machine; exits with 1 if something that is needed is missing."""
    core = load_core(home, base=base, device=device)
    findings = [
        _check_python(),
        _check_memory(),
        _check_disk(core.base, core.home),
        *_check_torch(core.device),
        _check_bitsandbytes(),
        _check_compiler(),
        _check_base(core.base, core.home),
        _check_config(core.home),
        _check_port(_DEFAULT_PORT),
    ]
    if json:
        print_json(findings)
    else:
        for finding in findings:
            console.print(f"{_MARKS[finding.state]} {finding.topic:<12} {finding.text}", soft_wrap=True)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _check_python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding("python", "ok", text)


def _check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = total >= _MIN_MEMORY_BYTES
    return Finding(
        "memory", "ok" if enough else "note", f"{format_bytes(total)}; training the embedded base takes 3 GB"
    )


def _check_disk(base: str, home: Path) -> Finding:
    from adapters.base_files import EMBEDDED_BASES, find_base
    from adapters.disk import free_bytes
    from adapters.errors import BaseModelError

    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return Finding("home", "missing", f"{home} can't be written to")
    needed, what = _LEAST_FREE_BYTES, "a training run"
    try:
        find_base(base, home)
    except BaseModelError:
        if base in EMBEDDED_BASES:
            needed, what = needed + EMBEDDED_BASES[base].needed_bytes, f"{what} and the base model"
    free = free_bytes(home)
    text = f"{home}, {format_bytes(free)} free"
    if free < needed:
        return Finding("home", "missing", f"{text}: too little, {what} may take {format_bytes(needed)}")
    return Finding("home", "ok" if free > _MIN_FREE_BYTES else "note", text)


def _check_torch(device: str) -> list[Finding]:
    import torch

    from adapters.base_model import pick_device
    from adapters.errors import ConfigurationError

    found = Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        chosen = pick_device(device)
    except ConfigurationError as error:
        return [found, Finding("device", "missing", str(error))]
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        return [found, Finding("device", "ok", f"{properties.name}, {format_bytes(properties.total_memory)}")]
    return [found, Finding("device", "ok", "the CPU (no CUDA device, or not asked for)")]


def _check_bitsandbytes() -> Finding:
    try:
        from bitsandbytes.backends.cpu.ops import has_avx512bf16

        fast = bool(has_avx512bf16())
    except Exception as error:
        # Whatever breaks at this import would break loading a base model as well: say so instead of crashing.
        return Finding("bitsandbytes", "missing", f"can't be used: {error}")
    if fast:
        return Finding(
            "bitsandbytes", "ok", "fast 4-bit CPU kernels (AVX512-BF16); training switches them off for itself"
        )
    return Finding("bitsandbytes", "ok", "works; this CPU lacks AVX512-BF16, so 4-bit serving on it is slower")


def _check_compiler() -> Finding:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        return Finding("compiler", "note", "no C++ compiler (c++, g++, clang++): serving on a CPU works, slower")
    return Finding("compiler", "ok", f"{compiler}; compiles the engine's inner loops for this CPU at the first start")


def _check_base(name: str, home: Path) -> Finding:
    from adapters.base_files import find_base
    from adapters.errors import BaseModelError

    try:
        return Finding("base model", "ok", f"{name} in {find_base(name, home)}")
    except BaseModelError as error:
        return Finding("base model", "note", f"{error} (training and serving fetch it by themselves)")


def _check_config(home: Path) -> Finding:
    from adapters.settings import CONFIG_FILE_NAME

    path = home / CONFIG_FILE_NAME
    # Reading it has worked already, or this command would have ended with the reason.
    return Finding("config", "ok", f"{path}" if path.exists() else f"no {path}: defaults and environment apply")


def _check_port(port: int) -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    return Finding(
        "port", "note" if taken else "ok", f"{port} is {'in use: a server may be running' if taken else 'free'}"
    )
