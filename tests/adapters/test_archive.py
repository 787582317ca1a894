"""Archives of versions: plain tar, the same bytes every time, whole also when the version goes meanwhile."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from pathlib import Path

import pytest

from adapters.archive import VersionArchive, unpack_archive
from adapters.errors import AdapterRejectedError, IntegrityError, NotFoundError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE
from adapters.registry import Registry
from tests.support.versions import publish_text


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 600_000])
def test_archive_holds_the_versions_files_when_read_as_tar(size: int, registry: Registry) -> None:
    """Names, contents and the announced length are right, whatever has to be padded."""
    digest = publish_text(registry, "x" * size).version.digest
    archive = VersionArchive(registry.store, digest)
    num_bytes = archive.num_bytes
    content = b"".join(archive)
    assert num_bytes == len(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = {entry.name: (tar.extractfile(entry) or io.BytesIO()).read() for entry in tar}
        plain = {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in tar}
    folder = registry.store.folder(digest)
    names = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE)
    assert {name: (folder / name).read_bytes() for name in names} == found
    assert list(names) == list(found)
    assert {(0, 0, 0, "", 0o644)} == plain


def test_archive_is_the_same_when_it_is_made_again(registry: Registry) -> None:
    """No clock and no folder of the server takes part."""
    digest = publish_text(registry, "one").version.digest
    first = b"".join(VersionArchive(registry.store, digest))
    registry.remove("legal")
    assert digest == publish_text(registry, "one", alias="other").version.digest
    assert first == b"".join(VersionArchive(registry.store, digest))


def test_archive_is_read_to_its_end_when_the_version_is_removed_meanwhile(registry: Registry) -> None:
    """Nobody gets half a file."""
    digest = publish_text(registry, "x" * 600_000).version.digest
    expected = b"".join(VersionArchive(registry.store, digest))
    pieces = iter(VersionArchive(registry.store, digest))
    first = next(pieces)
    registry.remove("legal")
    assert expected == first + b"".join(pieces)


def test_archive_is_refused_when_a_file_was_changed(registry: Registry) -> None:
    """A damaged version does not leave the house; neither does one that is not there."""
    digest = publish_text(registry, "one").version.digest
    (registry.store.folder(digest) / ADAPTER_WEIGHTS_FILE).write_text("two")
    with pytest.raises(IntegrityError, match=ADAPTER_WEIGHTS_FILE):
        VersionArchive(registry.store, digest)
    with pytest.raises(NotFoundError):
        VersionArchive(registry.store, "0" * 64)


def test_archive_can_be_closed_when_nobody_read_it(registry: Registry) -> None:
    """Its files are given back; twice does no harm."""
    archive = VersionArchive(registry.store, publish_text(registry, "one").version.digest)
    archive.close()
    archive.close()
    with pytest.raises(ValueError, match="closed file"):
        archive.num_bytes  # noqa: B018 - reading it is the test


def _tar(*entries: tuple[str, bytes, bytes], end: bytes = bytes(1024)) -> bytes:
    """An archive of entries: name, type and content."""
    content = b""
    for name, kind, data in entries:
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = kind, len(data), "x"
        content += entry.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    return content + end


def _negative_size() -> bytes:
    """A header whose size is a number with a sign, which GNU's form allows."""
    entry = tarfile.TarInfo(ADAPTER_CONFIG_FILE)
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(1024)


_CONFIG = (ADAPTER_CONFIG_FILE, tarfile.REGTYPE, b"{}")


def test_archive_gives_the_versions_files_when_unpacked(registry: Registry, tmp_path: Path) -> None:
    """Byte for byte, also where another program packed them with their folder."""
    digest = publish_text(registry, "x" * 1000).version.digest
    archive, folder = tmp_path / "a.tar", tmp_path / "out"
    archive.write_bytes(b"".join(VersionArchive(registry.store, digest)))
    folder.mkdir()
    unpack_archive(archive, folder)
    expected = {path.name: path.read_bytes() for path in registry.store.folder(digest).iterdir()}
    assert expected == {path.name: path.read_bytes() for path in folder.iterdir()}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(folder, arcname=".")
    (again := tmp_path / "again").mkdir()
    unpack_archive(tmp_path / "b.tar", again)
    assert expected == {path.name: path.read_bytes() for path in again.iterdir()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_tar(("../adapter_config.json", tarfile.REGTYPE, b"{}")), "holds '../adapter_config.json'"),
        (_tar(("/etc/cron.d/x", tarfile.REGTYPE, b"x")), "holds '/etc/cron.d/x'"),
        (_tar((ADAPTER_CONFIG_FILE, tarfile.SYMTYPE, b"")), "of type b'2'"),
        (_tar((ADAPTER_CONFIG_FILE, tarfile.LNKTYPE, b"")), "of type b'1'"),
        (_tar((ADAPTER_CONFIG_FILE, tarfile.FIFOTYPE, b"")), "of type b'6'"),
        (_tar((ADAPTER_CONFIG_FILE, tarfile.GNUTYPE_SPARSE, b"")), "of type b'S'"),
        (_tar(("x", tarfile.XHDTYPE, b"30 path=../../home\n")), "of type b'x'"),
        (_tar(_CONFIG, ("run.py", tarfile.REGTYPE, b"x")), "holds 'run.py'"),
        (_tar(_CONFIG, _CONFIG), "adapter_config.json twice"),
        (_tar((ADAPTER_WEIGHTS_FILE, tarfile.REGTYPE, bytes(2000)), end=b"")[:1500], "ends 1012 bytes before the end"),
        (_negative_size(), "is -1 bytes long"),
        (gzip.compress(_tar(_CONFIG), mtime=0), "no tar archive, or a compressed one"),
        (b"garbage", "no tar archive"),
    ],
)
def test_archive_is_refused_when_it_holds_anything_else(content: bytes, words: str, tmp_path: Path) -> None:
    """Nothing is written outside of the folder, and no header changes what another says."""
    (tmp_path / "a.tar").write_bytes(content)
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(AdapterRejectedError, match=re.escape(words)):
        unpack_archive(tmp_path / "a.tar", folder)
    assert {"a.tar", "out"} == {path.name for path in tmp_path.iterdir()}
