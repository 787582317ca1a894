"""The artifact store: one folder per adapter version, named by the version's digest and never changed.

Publishing writes to a temporary folder, syncs it to the disk and renames it, so that a kill at any moment leaves either
nothing or a whole version. The store knows nothing of aliases.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from adapters.errors import AdapterRejectedError, IntegrityError, NotFoundError
from adapters.manifest import (
    MANIFEST_FILE,
    FileReference,
    Manifest,
    hash_file,
    parse_manifest,
    read_manifest_bytes,
)
from adapters.regular_files import read_regular

__all__ = ["ArtifactStore"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 16 << 30
_MISSING = "nothing: the file is missing"


class ArtifactStore:
    """Content-addressed folders below `root`; any number of processes may read and publish at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def folder(self, digest: str) -> Path:
        """The folder of a published version.

        Raises:
            NotFoundError: the store has no such version.
        """
        if not _DIGEST.fullmatch(digest) or not (self.root / digest).is_dir():
            raise NotFoundError(f"the store has no version {digest[:64]!r}")
        return self.root / digest

    def add(self, source: Path, manifest: Manifest) -> tuple[str, int]:
        """Copy an adapter's files in, with its manifest, in one atomic step. Adding equal content again is fine.

        Args:
            source: A folder in PEFT's layout; only the config and the safetensors files of its kind are taken.
            manifest: What to record; its `files` are filled in here.

        Returns:
            The version's digest and its size in bytes.

        Raises:
            AdapterRejectedError: one of the files is no plain file.
        """
        with self.held():
            temporary = self._incoming / uuid.uuid4().hex
            temporary.mkdir()
            try:
                files = {name: _copy(source / name, temporary) for name in manifest.file_names}
                complete = manifest.model_copy(update={"files": files})
                _write_synced(temporary / MANIFEST_FILE, complete.to_bytes())
                _sync_folder(temporary)
                self._move_into_place(temporary, complete.digest)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, what is half written is in the way
                raise
        return complete.digest, sum(file.size_bytes for file in files.values())

    def verify(self, digest: str) -> Manifest:
        """Check every file of a version against the manifest, and the manifest against the digest.

        Raises:
            NotFoundError: no such version.
            IntegrityError: a file is missing or differs; names it and both hashes.
        """
        manifest = self.read_manifest(digest)
        for name, expected in manifest.files.items():
            path = self.folder(digest) / name
            _check_hash(digest, name, expected, hash_file(path) if path.is_file() else _MISSING)
        return manifest

    def read(self, digest: str) -> tuple[Manifest, dict[str, bytearray]]:
        """Check a version like `verify`, and return the very bytes that were checked: its files by name.

        Every file is read once, so that nobody can change it between the check and the use.

        Raises:
            NotFoundError: no such version.
            IntegrityError: a file is missing or differs; names it and both hashes.
        """
        manifest = self.read_manifest(digest)
        contents = {}
        for name, expected in manifest.files.items():
            path = self.folder(digest) / name
            try:
                content = read_regular(path, max_bytes=expected.size_bytes, error=IntegrityError)
            except FileNotFoundError:
                _check_hash(digest, name, expected, _MISSING)
            _check_hash(digest, name, expected, hashlib.sha256(content).hexdigest())
            contents[name] = content
        return manifest, contents

    def remove(self, digest: str) -> None:
        """Delete a version's folder; readers keep files that they have open. Call it with the store held alone."""
        self._discard(self.folder(digest))

    def digests(self) -> set[str]:
        """All published versions."""
        return {path.name for path in self.root.iterdir() if _DIGEST.fullmatch(path.name)}

    def sweep(self) -> int:
        """Delete what killed publishers and removals left unfinished; does nothing while anybody publishes.

        Whole versions are kept, whether a database lists them or not: the same content published again finds them, and
        a database that was replaced must not cost anybody their adapters.

        Returns:
            How many folders were deleted.
        """
        with self._open_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            leftovers = [path for path in self._incoming.iterdir() if path.is_dir()]
            for path in leftovers:
                shutil.rmtree(path)
            return len(leftovers)

    @contextmanager
    def held(self, *, alone: bool = False) -> Iterator[None]:
        """Keep `sweep` and removals away: hold this from before a version's files appear until it is registered.

        Any number of publishers hold it together and re-entrantly; `alone` waits for all of them and lets nobody in.
        """
        # The kernel frees the lock when a process dies.
        with self._open_lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder of one's own inside the store, which is deleted at the end; what a kill leaves, `sweep` deletes."""
        with self.held():
            folder = self._incoming / uuid.uuid4().hex
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder)

    def read_manifest(self, digest: str) -> Manifest:
        """A version's manifest, checked against the digest; the other files are not looked at.

        Raises:
            NotFoundError: no such version.
            IntegrityError: it hashes to something else.
        """
        folder = self.folder(digest)
        content = read_manifest_bytes(folder)
        # The stored bytes, not the parsed manifest: a later field with a default must not change old versions' names.
        if (found := hashlib.sha256(content).hexdigest()) != digest:
            raise IntegrityError(f"the manifest of version {digest} hashes to {found}")
        return parse_manifest(content, folder / MANIFEST_FILE)

    def _open_lock(self) -> IO[str]:
        return (self._incoming / ".lock").open("w")

    def _discard(self, folder: Path) -> None:
        # Out of sight in one step: a half-deleted folder under its digest would look like a published version.
        trash = self._incoming / uuid.uuid4().hex
        os.rename(folder, trash)
        shutil.rmtree(trash)

    def _move_into_place(self, temporary: Path, digest: str) -> None:
        try:
            os.rename(temporary, self.root / digest)
        except OSError:
            if not (self.root / digest).is_dir():
                raise
            self._keep_or_replace(digest, temporary)
        _sync_folder(self.root)

    def _keep_or_replace(self, digest: str, temporary: Path) -> None:
        """The same content was published before: keep it, unless its files were damaged since."""
        try:
            self.verify(digest)
            shutil.rmtree(temporary)
        except IntegrityError:
            self._discard(self.root / digest)
            os.rename(temporary, self.root / digest)


def _check_hash(digest: str, name: str, expected: FileReference, found: str) -> None:
    if found != expected.sha256:
        raise IntegrityError(f"{name} of version {digest}: expected sha256 {expected.sha256}, found {found}")


def _copy(source: Path, folder: Path) -> FileReference:
    content = read_regular(source, max_bytes=_MAX_FILE_BYTES, error=AdapterRejectedError)
    _write_synced(folder / source.name, content)
    return FileReference(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def _write_synced(path: Path, content: bytes | bytearray) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
