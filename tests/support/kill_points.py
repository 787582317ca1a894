"""Kills a publisher or remover with SIGKILL at its first, second, third ... step, each time in a home of its own.

Run it as `python -m tests.support.kill_points publish|remove ROOT`, in a process without threads: it forks. Below
ROOT it leaves one home for every kill, named by the number of the step, and prints for each the step's name.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from adapters.database import open_database
from adapters.registry import Registry
from adapters.store import ArtifactStore
from tests.support.versions import publish_text

_STEPS = ((os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "readv"))


def open_home(home: Path) -> Registry:
    """The registry of a home."""
    return Registry(open_database(f"sqlite:///{home / 'hotswap.db'}"), ArtifactStore(home / "store"))


def main() -> None:
    """Fork and kill until a child comes to its end."""
    action, root = {"publish": _publish, "remove": _remove}[sys.argv[1]], Path(sys.argv[2])
    for step in count(1):
        home = root / f"{step:02}"
        home.mkdir(parents=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _act(action, home, step)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            shutil.rmtree(home)
            sys.exit(os.WEXITSTATUS(status))


def _act(action: Callable[[Registry], None], home: Path, step: int) -> None:
    registry = open_home(home)
    publish_text(registry, "kept")
    publish_text(registry, "removed", alias="medical")
    _arm(registry.database.engine, step)
    action(registry)
    os._exit(0)


def _publish(registry: Registry) -> None:
    publish_text(registry, "fresh")


def _remove(registry: Registry) -> None:
    registry.remove("medical")


def _arm(engine: Engine, fatal_step: int) -> None:
    steps = count(1)

    def reach(name: str) -> None:
        if next(steps) == fatal_step:
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    for module, name in _STEPS:
        setattr(module, name, _stop_before(getattr(module, name), name, reach))
    for name in ("begin", "commit", "before_cursor_execute"):
        event.listen(engine, name, _listener(name, reach), named=True)


def _stop_before(function: Callable[..., Any], name: str, reach: Callable[[str], None]) -> Callable[..., Any]:
    def stopped(*args: Any, **options: Any) -> Any:
        reach(name)
        return function(*args, **options)

    return stopped


def _listener(name: str, reach: Callable[[str], None]) -> Callable[..., None]:
    def listen(**options: Any) -> None:
        reach(name)

    return listen


if __name__ == "__main__":
    main()
