"""Files of the platform: training data that clients upload, and results that jobs write.

Content lies in a folder under ids of our own; what a client calls a file is kept as data alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from adapters.audit import record_act
from adapters.database import Database, actor_of
from adapters.disk import full_disk_told
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.paging import cut_page, unknown_place
from adapters.records import Actor, StoredFile
from adapters.rows_file import check_rows_file
from adapters.tables import FileRow, JobRow, utc_now

__all__ = ["ACTIVE_STATUSES", "RESULTS_PURPOSE", "TRAINING_PURPOSE", "FileService", "can_see_file"]

TRAINING_PURPOSE = "fine-tune"
RESULTS_PURPOSE = "fine-tune-results"
ACTIVE_STATUSES = ("validating_files", "queued", "running", "paused")
_MAX_NAME_CHARS = 255
_CHUNK_BYTES = 1 << 20
_Order = Literal["asc", "desc"]


class FileService:
    """Files below `root` with their rows in the database; safe to use from several threads and processes."""

    def __init__(self, database: Database, root: Path, *, max_bytes: int) -> None:
        self.database = database
        self.root = root
        self.max_bytes = max_bytes
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def acting_for(self, actor: Actor) -> FileService:
        """The same service on somebody's behalf: what `can_see_file` hides does not exist in it."""
        return FileService(self.database.acting_for(actor), self.root, max_bytes=self.max_bytes)

    def upload(self, content: IO[bytes], filename: str) -> StoredFile:
        """Check training data and keep it; of what is refused nothing stays.

        Raises:
            DataError: a line is no row of training data, or of another kind than the others; all bad lines are counted,
                the first 20 named.
            InvalidInputError: the name can't be one, or the content is larger than `max_bytes`.
            StorageFullError: the disk is full.
        """

        def find_kind(path: Path) -> str:
            return check_rows_file(path, filename).kind

        with self._placed(content, _check_name(filename), TRAINING_PURPOSE, find_kind) as file:
            with self.database.write() as session:
                self.register(session, file)
            return file

    @contextmanager
    def placed_result(self, content: IO[bytes], filename: str) -> Iterator[StoredFile]:
        """Put on the disk what a job made; `register` it within the block, or nothing stays."""
        with self._placed(content, filename, RESULTS_PURPOSE) as file:
            yield file

    @staticmethod
    def register(session: Session, file: StoredFile, *, alias: str | None = None) -> None:
        """Make a file that was put on the disk known, in the caller's transaction; `alias` is whose result it is."""
        session.add(
            FileRow(
                id=file.id,
                filename=file.filename,
                purpose=file.purpose,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                created_at=file.created_at,
                kind=file.kind,
                owner=actor_of(session).id,
                alias=alias,
            )
        )

    def get(self, file_id: str) -> StoredFile:
        """One file.

        Raises:
            NotFoundError: no file has this id.
        """
        with self.database.read() as session:
            return _to_file(_find(session, file_id))

    def path(self, file_id: str) -> Path:
        """Where a file's content lies. The path is made of the id that the database knows, not of the one given.

        Raises:
            NotFoundError: no file has this id.
        """
        return self.root / self.get(file_id).id

    def open(self, file_id: str) -> IO[bytes]:
        """A file's content, open for reading: a deletion from here on doesn't end the reading.

        Raises:
            NotFoundError: no file has this id, or it has been deleted just now.
        """
        try:
            return self.path(file_id).open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {file_id[:80]!r}") from None

    def list(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, order: _Order = "desc"
    ) -> tuple[list[StoredFile], bool]:
        """Files by arrival, behind the one called `after`, and whether there are more.

        Raises:
            InvalidInputError: `after` names no file.
        """
        statement = select(FileRow)
        if purpose is not None:
            statement = statement.where(FileRow.purpose == purpose)
        with self.database.read() as session:
            if after is not None:
                position = _find_after(session, after)
                behind = FileRow.sequence < position if order == "desc" else FileRow.sequence > position
                statement = statement.where(behind)
            ordered = statement.order_by(FileRow.sequence.desc() if order == "desc" else FileRow.sequence)
            with session.scalars(ordered.execution_options(yield_per=100)) as rows:
                found = list(islice((_to_file(row) for row in rows if can_see_file(session, row)), limit + 1))
        return cut_page(found, limit)

    def delete(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            NotFoundError: no file has this id.
            ConflictError: a job that is not at its end needs it.
        """
        with self.database.write() as session:
            row = _find(session, file_id)
            if job := _job_that_needs(session, row.id):
                if not actor_of(session).can_see(job.alias):
                    raise ConflictError(f"{row.id} is needed by a job for another alias than this key's")
                raise ConflictError(f"{row.id} is needed by job {job.id}, which is {job.status}; cancel the job first")
            path = self.root / row.id
            record_act(session, "delete_file", row.id)
            session.delete(row)
        path.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete what killed uploads and deletions left; does nothing while anybody uploads.

        Returns:
            How many files were deleted.
        """
        with self._open_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            with self.database.read() as session:
                known = set(session.scalars(select(FileRow.id)))
            leftovers = [path for path in self._incoming.iterdir() if path.name != ".lock"]
            leftovers += [path for path in self.root.iterdir() if path.is_file() and path.name not in known]
            for path in leftovers:
                path.unlink()
            return len(leftovers)

    @contextmanager
    def _placed(
        self, content: IO[bytes], filename: str, purpose: str, check: Callable[[Path], str] | None = None
    ) -> Iterator[StoredFile]:
        """Content under a new id, whole and synced; deleted again if the block fails, which has to register it."""
        file_id = f"file-{secrets.token_hex(12)}"
        temporary, final = self._incoming / file_id, self.root / file_id
        with full_disk_told(self.root, "the file"), self._held():
            try:
                size_bytes, sha256 = _write_synced(temporary, content, self.max_bytes)
                kind = check(temporary) if check is not None else None
                os.rename(temporary, final)
                _sync_folder(self.root)
                yield StoredFile(file_id, filename, purpose, size_bytes, sha256, utc_now(), kind)
            except BaseException:
                temporary.unlink(missing_ok=True)
                final.unlink(missing_ok=True)
                raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        # Keeps `sweep` away until the content has its row; the kernel frees the lock when a process dies.
        with self._open_lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _open_lock(self) -> IO[str]:
        return (self._incoming / ".lock").open("w")


def can_see_file(session: Session, row: FileRow) -> bool:
    """Whether a file exists as far as the session's actor is concerned.

    One that is limited to aliases knows what it has uploaded itself, and the results of jobs for those aliases.
    """
    actor = actor_of(session)
    is_own = row.owner == actor.id or (row.alias is not None and actor.can_see(row.alias))
    return actor.aliases is None or is_own


def _check_name(filename: str) -> str:
    if not 0 < len(filename) <= _MAX_NAME_CHARS or any(
        unicodedata.category(letter) in ("Cc", "Cs") for letter in filename
    ):
        raise InvalidInputError(
            f"file: expected a name of 1 to {_MAX_NAME_CHARS} characters, none of them a control character, "
            f"found {filename[:40]!r}",
            param="file",
        )
    return filename


def _write_synced(path: Path, content: IO[bytes], max_bytes: int) -> tuple[int, str]:
    """Copy to a new file and on to the disk; returns the size in bytes and the SHA-256."""
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("xb") as target:
        while chunk := content.read(_CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise InvalidInputError(f"file: is larger than {max_bytes} bytes", param="file")
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return size_bytes, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find(session: Session, file_id: str) -> FileRow:
    row = session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None or not can_see_file(session, row):
        raise NotFoundError(f"there is no file {file_id[:80]!r}")
    return row


def _find_after(session: Session, file_id: str) -> int:
    row = session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None or not can_see_file(session, row):
        raise unknown_place(file_id)
    return row.sequence


def _job_that_needs(session: Session, file_id: str) -> JobRow | None:
    needs = or_(JobRow.training_file == file_id, JobRow.validation_file == file_id)
    return session.scalars(select(JobRow).where(needs, JobRow.status.in_(ACTIVE_STATUSES)).limit(1)).first()


def _to_file(row: FileRow) -> StoredFile:
    return StoredFile(row.id, row.filename, row.purpose, row.size_bytes, row.sha256, row.created_at, row.kind)
