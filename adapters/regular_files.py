"""Reads files of folders that came from elsewhere: plain files of a bounded size, never through a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from adapters.errors import HotswapError

__all__ = ["read_regular"]


def read_regular(path: Path, *, max_bytes: int, error: type[HotswapError]) -> bytearray:
    """The whole content of a plain file; links, devices, pipes and folders are refused, and so is a larger file.

    The checks are made on the opened file, so that nobody can put another in its place in between.

    Raises:
        FileNotFoundError: there is no such file.
        HotswapError: of the given class; it is no plain file, too large or can't be read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise error(f"{path.name} is a symbolic link; put a copy of the file in its place") from None
        raise error(f"{path.name} can't be read: {problem.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path.name} is not a plain file")
        if status.st_size > max_bytes:
            raise error(f"{path.name} is larger than {max_bytes} bytes: {status.st_size}")
        return _read_all(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, size_bytes: int) -> bytearray:
    content = bytearray(size_bytes)
    view = memoryview(content)
    position = 0
    # One call reads at most 2 GiB.
    while position < size_bytes and (count := os.readv(descriptor, [view[position:]])):
        position += count
    view.release()
    del content[position:]  # a file that was cut meanwhile fails the checks of its content
    return content
