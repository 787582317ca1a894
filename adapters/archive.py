"""A version as one tar archive, the same bytes every time: what is exported, written piece by piece, and read again.

Only names, sizes and contents are in it: no clock time, no owner, no folder of the server.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from adapters.errors import AdapterRejectedError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, REWARD_HEAD_FILE
from adapters.store import ArtifactStore

__all__ = ["VersionArchive", "unpack_archive"]

_NAMES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, REWARD_HEAD_FILE, MANIFEST_FILE)
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
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


def unpack_archive(archive: Path, folder: Path) -> None:
    """Write an adapter's files from a tar archive to a folder that has none of them yet.

    Plain files of the three known names alone are taken, each once; what else an archive can hold, links, devices and
    headers that change others, has nothing to do in one.

    Raises:
        AdapterRejectedError: it is no such archive; says what was found.
    """
    with archive.open("rb") as source:
        while entry := _read_header(source):
            if entry.isdir():
                continue
            name = entry.name.removeprefix("./")
            if entry.type not in _PLAIN_TYPES or name not in _NAMES:
                raise AdapterRejectedError(
                    f"the archive holds {entry.name[:80]!r} of type {entry.type!r}; expected plain files, named "
                    + ", ".join(_NAMES)
                )
            if entry.size < 0:  # one of the forms of numbers has a sign
                raise AdapterRejectedError(f"the archive says that {name} is {entry.size} bytes long")
            if (folder / name).exists():
                raise AdapterRejectedError(f"the archive holds {name} twice")
            _copy_out(source, folder / name, entry.size)


def _read_header(source: BinaryIO) -> tarfile.TarInfo | None:
    block = source.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise AdapterRejectedError(f"this is no tar archive, or a compressed one: {error}") from None


def _copy_out(source: BinaryIO, target: Path, size: int) -> None:
    left = size
    with target.open("xb") as file:
        while left and (chunk := source.read(min(left, _CHUNK_BYTES))):
            file.write(chunk)
            left -= len(chunk)
    if left:
        raise AdapterRejectedError(f"the archive ends {left} bytes before the end of {target.name}")
    source.read(_padding(size))


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
    entry.size = size
    # GNU's form also holds sizes beyond 8 GiB in one block.
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
