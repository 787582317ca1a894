"""A full disk, told in words: real file systems of a few hundred kilobytes."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from adapters.base_files import EMBEDDED_BASE, pull_base
from adapters.database import Database
from adapters.disk import check_room, free_bytes, full_disk_told, is_about_the_disk
from adapters.errors import StorageFullError
from adapters.files import FileService
from tests.support.disk import small_disk

_ROW = b'{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}\n'


def test_room_is_asked_for_when_much_is_about_to_be_written(tmp_path: Path) -> None:
    """Also below a folder that is not there yet; it says how much there is and takes, a note where."""
    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        place = disk / "home" / "bases"
        assert free_bytes(disk) == free_bytes(place)
        check_room(place, 1_000_000, "the model")
        with pytest.raises(
            StorageFullError, match=r"^the disk is full: 1\.0 MB free, the model takes about 2\.0 MB\n"
        ) as caught:
            check_room(place, 2_000_000, "the model")
        assert [f"it is the disk of {place}"] == caught.value.__notes__


def test_base_model_is_not_fetched_when_the_disk_has_no_room_for_it(tmp_path: Path) -> None:
    """Asked before anything is downloaded; no model is left, nor a part of one."""
    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        expected = rf"^the disk is full: 1\.0 MB free, the base model {EMBEDDED_BASE} takes about 380 MB\n"
        with pytest.raises(StorageFullError, match=expected):
            pull_base(EMBEDDED_BASE, disk / "home")
        assert [f"{EMBEDDED_BASE}.lock"] == [path.name for path in (disk / "home" / "bases").iterdir()]


def test_upload_names_the_place_when_the_disk_is_full(tmp_path: Path, database: Database) -> None:
    """Not the file that was given; nothing of it stays, and a smaller one is taken."""
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        files = FileService(database, disk / "files", max_bytes=10_000_000)
        with pytest.raises(StorageFullError, match=r"^no space left for the file; nothing of it was kept") as caught:
            files.upload(io.BytesIO(_ROW * 5000), "rows.jsonl")
        (note,) = caught.value.__notes__
        assert note.startswith(f"the disk of {disk}/files has 0.")
        assert [".lock"] == [path.name for path in disk.rglob("*") if path.is_file()]
        assert ([], False) == files.list(limit=9)
        assert "rows.jsonl" == files.upload(io.BytesIO(_ROW), "rows.jsonl").filename


def test_other_errors_pass_when_the_disk_is_not_full(tmp_path: Path) -> None:
    """A missing file is no full disk."""
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path, "the file"):
        (tmp_path / "absent").read_bytes()
    assert [True, False, True, False] == [
        is_about_the_disk(OSError(errno.EDQUOT, "x")),
        is_about_the_disk(OSError(errno.EACCES, "x")),
        is_about_the_disk("OSError: [Errno 28] No space left on device: '/tmp/x'"),
        is_about_the_disk("no such package"),
    ]
