"""Archives of versions: plain tar, the same bytes every time, whole also when the version goes meanwhile."""

from __future__ import annotations

import io
import tarfile

import pytest

from adapters.archive import VersionArchive
from adapters.errors import IntegrityError, NotFoundError
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
