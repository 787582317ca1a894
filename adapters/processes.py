"""Which process a child was started by. Asking the kernel comes too late if that one died while the child began."""

from __future__ import annotations

import os

__all__ = ["child_environment", "parent_pid"]

_VARIABLE = "_HOTSWAP_PARENT_PID"


def child_environment() -> dict[str, str]:
    """What to add to the environment of a child that is to end with this process."""
    return {_VARIABLE: str(os.getpid())}


def parent_pid() -> int:
    """The process that started this one, alive or not; the present parent, if it did not say."""
    return int(os.environ.get(_VARIABLE, os.getppid()))
