"""A full disk: tells it from other failures, says which one it is, and asks for room before much is written."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from sqlalchemy.exc import DBAPIError

from adapters.errors import StorageFullError

__all__ = ["check_room", "free_bytes", "full_disk_told", "is_about_the_disk"]

_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What libraries say that write files without Python's help: safetensors, torch's zip writer, SQLite.
_WORDS = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|database or disk is full|PytorchStreamWriter failed"
    r"|inline_container\.cc.*unexpected pos"
)


def is_about_the_disk(error: BaseException | str) -> bool:
    """Whether an error, or what another program wrote of one, says that a disk is full."""
    is_plain = isinstance(error, StorageFullError) or (isinstance(error, OSError) and error.errno in _NUMBERS)
    said = error.orig if isinstance(error, DBAPIError) else error  # not its parameters, which are a user's words
    return is_plain or bool(_WORDS.search(str(said)))


@contextmanager
def full_disk_told(place: Path, what: str) -> Iterator[None]:
    """Turn what a full disk causes in the block into one sentence about `what`, and a note that names the place.

    Clients of a server get the sentence alone; the command line and the log show the note, too.

    Raises:
        StorageFullError: in the place of what the full disk caused.
    """
    try:
        yield
    except (OSError, SafetensorError, DBAPIError) as error:
        if not is_about_the_disk(error):
            raise
        problem = StorageFullError(f"no space left for {what}; nothing of it was kept")
        problem.add_note(
            f"the disk of {place} has {_megabytes(free_bytes(place))} free; a quota or a limit on files may be less"
        )
        raise problem from error


def check_room(place: Path, needed_bytes: int, what: str) -> None:
    """Look whether a place has room for what is about to be written there.

    Raises:
        StorageFullError: it has not; says how much there is and how much it takes, and in a note where.
    """
    if (free := free_bytes(place)) < needed_bytes:
        found = f"{_megabytes(free)} free, {what} takes about {_megabytes(needed_bytes)}"
        problem = StorageFullError(f"the disk is full: {found}")
        problem.add_note(f"it is the disk of {place}")
        raise problem


def free_bytes(place: Path) -> int:
    """Bytes that are free on the disk of a folder, or where it would be made."""
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 10_000_000 else f"{count / 1e6:.0f} MB"
