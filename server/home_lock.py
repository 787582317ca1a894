"""One server a home folder: a lock that lasts as long as any of its processes, and says who holds it.

Everything else of the command line works beside a server; a second server would sweep away what the first one receives.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from adapters.errors import ConfigurationError

__all__ = ["check_home_free", "held_home", "is_home_served"]

_MAX_NOTE_CHARS = 200
_WAITS_S = (0.05, 0.1)  # somebody may be looking whether a server runs


def check_home_free(home: Path) -> None:
    """Look whether `held_home` would succeed now.

    Raises:
        ConfigurationError: another server runs on this home; says which.
    """
    with _locked(home):
        pass


def is_home_served(home: Path) -> bool:
    """Whether a server runs on this home, or is just starting."""
    try:
        check_home_free(home)
    except ConfigurationError:
        return True
    return False


@contextmanager
def held_home(home: Path, *, address: str) -> Iterator[None]:
    """Keep other servers away for the length of the block, and until the last child that was forked in it has ended.

    Raises:
        ConfigurationError: another server runs on this home; says which.
    """
    with _locked(home) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {address}")
        file.flush()
        yield


@contextmanager
def _locked(home: Path) -> Iterator[IO[str]]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.lock").open("a+") as file:
        if not _take(file):
            file.seek(0)
            holder = file.read(_MAX_NOTE_CHARS).strip() or "one that is just starting"
            raise ConfigurationError(
                f"a server runs on the home {home} already: {holder}; use or stop that one, or give this one another "
                "home (--home FOLDER)",
                param="home",
            )
        yield file


def _take(file: IO[str]) -> bool:
    """Lock the file, if nobody holds it for longer than it takes to look whether it is held."""
    for wait_s in (*_WAITS_S, None):
        try:
            # The kernel frees it when the processes that have it open are gone, however they end.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if wait_s is not None:
                time.sleep(wait_s)
    return False
