"""Starts `hotswap serve` as a child, waits until it is ready and stops it: for the demo, benchmarks and tests."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.http import HotswapClient

__all__ = ["LocalServer", "ServerDidNotStartError", "running_server", "started_server"]

_SERVE = (sys.executable, "-m", "clients.cli", "serve")
_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL_CHARS = 2000
# Loaded here, since between fork and exec nothing may be loaded or locked.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerDidNotStartError(Exception):
    """The server ended, or was not ready in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running server: where it listens, and the process that is the parent of its others."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Of the parent process."""
        return self.process.pid


@contextlib.contextmanager
def running_server(environment: Mapping[str, str], log: Path, *options: str) -> Iterator[str]:
    """Serve on a free port for the length of the block, and yield the server's URL; see `started_server`."""
    with started_server(environment, log, *options) as server:
        yield server.url


@contextlib.contextmanager
def started_server(
    environment: Mapping[str, str], log: Path, *options: str, command: Sequence[str] = _SERVE
) -> Iterator[LocalServer]:
    """Serve on a free port for the length of the block; on Linux the server ends also when this process is killed.

    Args:
        environment: The child's environment; `HOTSWAP_*` variables choose home, base model and limits.
        log: File for the server's output.
        options: Further flags of `hotswap serve`.
        command: What to start instead of `hotswap serve`; it must take `--port`.

    Raises:
        ServerDidNotStartError: it ended or took too long.
    """
    port = _free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            env=dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_wait_until_ready(url, process, log))
        yield LocalServer(url, process)
    finally:
        _stop(process)


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    async with HotswapClient(url) as client:
        while not await client.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]
                raise ServerDidNotStartError(f"the server did not start; the end of {log}:\n{tail}")
            await asyncio.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server in good order; after a minute, end its whole process group."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """Runs in the child: a server that nobody stops would hold its home, and its memory, for ever."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
