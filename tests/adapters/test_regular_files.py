"""Only plain files of a bounded size are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import IntegrityError
from adapters.regular_files import read_regular


def _link_to_nowhere(path: Path) -> None:
    path.symlink_to("/nowhere")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (lambda path: path.symlink_to("/etc/hostname"), "file is a symbolic link"),
    "dangling link": (_link_to_nowhere, "file is a symbolic link"),
    "pipe": (os.mkfifo, "file is not a plain file"),
    "folder": (Path.mkdir, "file is not a plain file"),
    "large": (lambda path: path.write_bytes(b"x" * 11), "file is larger than 10 bytes: 11"),
    "folder that is a file": (lambda path: path.write_bytes(b""), "file can't be read: Not a directory"),
}


def test_content_is_read_when_the_file_is_plain(tmp_path: Path) -> None:
    """As many bytes as allowed are read whole."""
    (tmp_path / "file").write_bytes(b"0123456789")
    assert b"0123456789" == read_regular(tmp_path / "file", max_bytes=10, error=IntegrityError)


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_refused_when_it_is_not_plain(kind: str, tmp_path: Path) -> None:
    """The error is the caller's, the message names the file without its folder; a pipe makes nobody wait."""
    make, message = KINDS[kind]
    make(tmp_path / "file")
    path = tmp_path / "file/file" if kind == "folder that is a file" else tmp_path / "file"
    with pytest.raises(IntegrityError, match=f"^{message}"):
        read_regular(path, max_bytes=10, error=IntegrityError)


def test_missing_file_is_told_as_such_when_there_is_none(tmp_path: Path) -> None:
    """Callers have sentences of their own for it."""
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "file", max_bytes=10, error=IntegrityError)


def test_descriptor_is_closed_when_a_file_was_read_or_refused(tmp_path: Path) -> None:
    """A thousand bad files use up nothing."""
    (tmp_path / "file").write_bytes(b"x" * 11)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for limit in (10, 11) * 5:
        try:
            read_regular(tmp_path / "file", max_bytes=limit, error=IntegrityError)
        except IntegrityError:
            continue
    assert before == len(list(Path("/proc/self/fd").iterdir()))
