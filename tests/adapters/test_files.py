"""Stored files: what is kept, what is refused without a trace, and what can't be deleted."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from adapters.database import Database
from adapters.errors import ConflictError, DataError, InvalidInputError, NotFoundError
from adapters.files import FileService
from adapters.jobs import JobOrder, JobService
from adapters.records import JobStatus, StoredFile
from adapters.tables import FileRow, JobRow
from tests.support.conversations import easy_rows, write_rows

MAX_BYTES = 5000


@pytest.fixture
def files(database: Database, tmp_path: Path) -> FileService:
    """An empty folder of files."""
    return FileService(database, tmp_path / "files", max_bytes=MAX_BYTES)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Three good rows."""
    return write_rows(tmp_path / "rows.jsonl", easy_rows(3)).read_bytes()


def _on_disk(files: FileService) -> list[str]:
    return sorted(path.name for path in files.root.rglob("*") if path.is_file() and path.name != ".lock")


def test_upload_keeps_the_very_bytes_when_they_are_good(files: FileService, content: bytes) -> None:
    """Size, hash and content are those of what was sent, under an id of our own."""
    stored = files.upload(io.BytesIO(content), "rows.jsonl")
    assert files.path(stored.id).read_bytes() == content
    assert (stored.size_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (stored.filename, stored.purpose) == ("rows.jsonl", "fine-tune")
    assert files.get(stored.id) == stored
    assert _on_disk(files) == [stored.id]


def test_open_content_is_read_to_its_end_when_the_file_is_deleted_meanwhile(files: FileService, content: bytes) -> None:
    """Who reads keeps reading; who comes later is told that there is no such file."""
    stored = files.upload(io.BytesIO(content), "rows.jsonl")
    with files.open(stored.id) as opened:
        files.delete(stored.id)
        assert content == opened.read()
    with pytest.raises(NotFoundError, match=f"no file '{stored.id}'"):
        files.open(stored.id)


def test_open_says_that_there_is_no_file_when_its_deletion_is_half_done(files: FileService, content: bytes) -> None:
    """A reader that found the row just before it went finds no content: the same words, no failure of the server."""
    stored = files.upload(io.BytesIO(content), "rows.jsonl")
    files.path(stored.id).unlink()
    with pytest.raises(NotFoundError, match=f"no file '{stored.id}'"):
        files.open(stored.id)


def test_upload_leaves_nothing_when_a_line_is_bad(files: FileService) -> None:
    """Neither a row of the table nor a byte on the disk."""
    with pytest.raises(DataError, match="line 1"):
        files.upload(io.BytesIO(b"{"), "rows.jsonl")
    assert _on_disk(files) == []
    assert files.list(limit=10) == ([], False)


def test_upload_leaves_nothing_when_it_is_too_large(files: FileService) -> None:
    """The cap is counted while the content is read."""
    with pytest.raises(InvalidInputError, match="larger than 5000 bytes") as caught:
        files.upload(io.BytesIO(b"x" * (MAX_BYTES + 1)), "rows.jsonl")
    assert caught.value.param == "file"
    assert _on_disk(files) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "ünïcode.jsonl"])
def test_upload_uses_no_name_as_a_path_when_it_looks_like_one(files: FileService, content: bytes, name: str) -> None:
    """The name is data: the content lies in the folder all the same."""
    stored = files.upload(io.BytesIO(content), name)
    assert stored.filename == name
    assert _on_disk(files) == [stored.id]


@pytest.mark.parametrize("name", ["", "a" * 256, "a\r\nb", "a\x00b"])
def test_upload_refuses_a_name_when_it_can_not_be_one(files: FileService, content: bytes, name: str) -> None:
    """Empty, too long, or with control characters, which would break logs and headers."""
    with pytest.raises(InvalidInputError, match="expected a name"):
        files.upload(io.BytesIO(content), name)


def test_list_goes_through_all_files_when_paged(files: FileService, content: bytes) -> None:
    """Pages of two, newest first, and the other way round."""
    ids = [files.upload(io.BytesIO(content), f"{n}.jsonl").id for n in range(5)]
    first, has_more = files.list(limit=2)
    assert ([file.id for file in first], has_more) == ([ids[4], ids[3]], True)
    last, has_more = files.list(limit=2, after=ids[1])
    assert ([file.id for file in last], has_more) == ([ids[0]], False)
    rising, _ = files.list(limit=3, after=ids[0], order="asc")
    assert [file.id for file in rising] == ids[1:4]
    assert files.list(limit=9, purpose="fine-tune-results") == ([], False)
    with pytest.raises(InvalidInputError, match="there is nothing called 'file-x'"):
        files.list(limit=2, after="file-x")


def test_files_are_not_found_when_ids_are_paths(files: FileService) -> None:
    """An id that the database doesn't know never reaches the disk."""
    for given in ("../hotswap.db", ".incoming", ".incoming/.lock", ""):
        with pytest.raises(NotFoundError):
            files.path(given)


def test_delete_removes_row_and_content_when_nobody_needs_them(files: FileService, content: bytes) -> None:
    """A deleted file is gone from the table and from the disk."""
    stored = files.upload(io.BytesIO(content), "rows.jsonl")
    files.delete(stored.id)
    assert _on_disk(files) == []
    with pytest.raises(NotFoundError):
        files.delete(stored.id)


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_delete_is_refused_when_an_unfinished_job_needs_the_file(
    files: FileService, content: bytes, status: JobStatus
) -> None:
    """As training or as validation file; once the job is at its end the file may go."""
    train = files.upload(io.BytesIO(content), "train.jsonl")
    valid = files.upload(io.BytesIO(content), "valid.jsonl")
    jobs = JobService(files.database)
    job = jobs.create(JobOrder("tiny", train.id, {}, 0, validation_file=valid.id))
    _set_status(files.database, status)
    for file in (train, valid):
        with pytest.raises(ConflictError, match=f"{job.id}, which is {status}"):
            files.delete(file.id)
    jobs.cancel(job.id)
    files.delete(train.id)
    files.delete(valid.id)
    assert _on_disk(files) == []


def _set_status(database: Database, status: JobStatus) -> None:
    with database.write() as session:
        session.query(JobRow).one().status = status


def test_placed_result_leaves_nothing_when_it_is_not_registered(files: FileService) -> None:
    """A transaction that fails takes the file with it."""

    def publish_and_fail() -> None:
        with files.placed_result(io.BytesIO(b"step\n"), "metrics.csv") as result, files.database.write() as session:
            files.register(session, result)
            raise ConflictError("lost")

    with pytest.raises(ConflictError):
        publish_and_fail()
    assert _on_disk(files) == []
    assert files.list(limit=1) == ([], False)


def test_sweep_deletes_what_kills_left_when_nobody_uploads(files: FileService, content: bytes) -> None:
    """Half an upload, and content whose row was never written; what has a row stays."""
    kept = files.upload(io.BytesIO(content), "rows.jsonl")
    (files.root / ".incoming" / "file-half").write_bytes(b"x")
    (files.root / "file-orphan").write_bytes(b"x")
    assert files.sweep() == 2
    assert _on_disk(files) == [kept.id]


def test_sweep_does_nothing_when_somebody_uploads(files: FileService) -> None:
    """Content that has no row yet belongs to an upload under way."""
    seen: list[int] = []
    with files.placed_result(io.BytesIO(b"x"), "metrics.csv") as result:
        seen.append(files.sweep())
        with files.database.write() as session:
            files.register(session, result)
    assert seen == [0]
    assert files.path(result.id).read_bytes() == b"x"


def test_upload_leaves_nothing_when_its_row_can_not_be_written(
    files: FileService, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full database is no reason to keep content that nobody knows."""

    def fail(session: Session, file: StoredFile) -> None:
        session.add(FileRow(id=file.id))
        session.flush()

    monkeypatch.setattr(FileService, "register", staticmethod(fail))
    with pytest.raises(IntegrityError):
        files.upload(io.BytesIO(content), "rows.jsonl")
    assert _on_disk(files) == []
