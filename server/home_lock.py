"""One server a home folder: a lock that lasts as long as any of its processes, and says who holds it.

Everything else of the command line works beside a server; a second server would sweep away what the first one receives.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from adapters.errors import ConfigurationError

__all__ = ["check_home_free", "held_home"]

_MAX_NOTE_CHARS = 200


def check_home_free(home: Path) -> None:
    """Look whether `held_home` would succeed now.

    Raises:
        ConfigurationError: another server runs on this home; says which.
    """
    with _locked(home):
        pass


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
        try:
            # The kernel frees it when the processes that have it open are gone, however they end.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(_MAX_NOTE_CHARS).strip() or "one that is just starting"
            raise ConfigurationError(
                f"a server runs on the home {home} already: {holder}; use or stop that one, or give this one another "
                "home (--home FOLDER)",
                param="home",
            ) from None
        yield file
