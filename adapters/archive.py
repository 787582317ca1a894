"""A version as one tar archive, the same bytes every time: what the API exports, written piece by piece.

Only names, sizes and contents are in it: no clock time, no owner, no folder of the server.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from adapters.manifest import MANIFEST_FILE
from adapters.store import ArtifactStore

__all__ = ["VersionArchive"]

_END = bytes(2 * tarfile.BLOCKSIZE)
_CHUNK_BYTES = 1 << 18


class VersionArchive:
    """Opens a version's files and writes them as a tar archive. Iterate it once, or close it.

    Raises:
        NotFoundError: no such version.
        IntegrityError: a stored file is not what the manifest says.
    """

    def __init__(self, store: ArtifactStore, digest: str) -> None:
        manifest = store.verify(digest)
        folder = store.folder(digest)
        with ExitStack() as stack:
            # Opened together: a version that is removed meanwhile can be read to its end.
            names = (*manifest.file_names, MANIFEST_FILE)
            self._files = {name: stack.enter_context((folder / name).open("rb")) for name in names}
            self._opened = stack.pop_all()

    @property
    def num_bytes(self) -> int:
        """Length of the whole archive."""
        return sum(tarfile.BLOCKSIZE + size + _padding(size) for size in map(_size, self._files.values())) + len(_END)

    def __iter__(self) -> Iterator[bytes]:
        with self._opened:
            for name, file in self._files.items():
                size = _size(file)
                yield _header(name, size)
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
                yield bytes(_padding(size))
            yield _END

    def close(self) -> None:
        """Close the files, if nobody iterated to the end."""
        self._opened.close()


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
    entry.size = size
    # GNU's form also holds sizes beyond 8 GiB in one block.
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
