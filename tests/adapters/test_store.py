"""The store: whole versions or nothing, named by content, never changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import AdapterRejectedError, IntegrityError, NotFoundError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, read_manifest
from adapters.store import ArtifactStore
from tests.support.kill_points import open_home
from tests.support.versions import PLAIN_MANIFEST, publish_text, write_files

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An adapter's folder, with a file in it that is none of the store's business."""
    folder = write_files(tmp_path / "source", "weights")
    (folder / "training_args.bin").write_text("pickled")
    return folder


def test_add_copies_the_two_files_when_the_folder_holds_more(store: ArtifactStore, source: Path) -> None:
    """Config, weights and manifest are stored, and the size is that of the adapter's files."""
    digest, size_bytes = store.add(source, PLAIN_MANIFEST)
    folder = store.folder(digest)
    assert {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE} == set(_names(folder))
    assert (folder / ADAPTER_WEIGHTS_FILE).read_text() == "weights"
    assert len("{}weights") == size_bytes
    assert {digest} == store.digests()


def test_add_names_the_version_by_its_manifest_when_stored(store: ArtifactStore, source: Path) -> None:
    """The digest is the stored manifest's, which holds the hash of every file."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    manifest = store.verify(digest)
    assert digest == manifest.digest == read_manifest(store.folder(digest)).digest
    assert {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE} == set(manifest.files)
    assert manifest.model_copy(update={"files": {}}) == PLAIN_MANIFEST


def test_add_gives_the_same_digest_when_the_content_is_equal(store: ArtifactStore, source: Path) -> None:
    """Adding again changes nothing and leaves nothing behind."""
    first, _ = store.add(source, PLAIN_MANIFEST)
    inode = store.folder(first).stat().st_ino
    second, _ = store.add(source, PLAIN_MANIFEST)
    assert first == second
    assert inode == store.folder(first).stat().st_ino
    assert store.sweep() == 0


@pytest.mark.parametrize("part", ["weights", "manifest"])
def test_add_gives_another_digest_when_anything_differs(store: ArtifactStore, source: Path, part: str) -> None:
    """One byte of the weights or one value of the manifest makes another version."""
    first, _ = store.add(source, PLAIN_MANIFEST)
    manifest = PLAIN_MANIFEST.model_copy(update={"rank": 5}) if part == "manifest" else PLAIN_MANIFEST
    if part == "weights":
        write_files(source, "weightz")
    second, _ = store.add(source, manifest)
    assert first != second
    assert {first, second} == store.digests()


def test_add_leaves_no_version_when_a_file_is_missing(store: ArtifactStore, source: Path) -> None:
    """A source without weights publishes nothing and leaves nothing: on a full disk it would be in the way."""
    (source / ADAPTER_WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_WEIGHTS_FILE):
        store.add(source, PLAIN_MANIFEST)
    assert set() == store.digests()
    assert store.sweep() == 0


def test_version_stays_when_its_source_changes_later(store: ArtifactStore, source: Path) -> None:
    """The store holds a copy, not a link."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    write_files(source, "other")
    assert digest == store.verify(digest).digest


def test_verify_names_the_file_when_a_byte_has_changed(store: ArtifactStore, source: Path) -> None:
    """Both hashes stand in the message."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    expected = read_manifest(store.folder(digest)).files[ADAPTER_WEIGHTS_FILE].sha256
    (store.folder(digest) / ADAPTER_WEIGHTS_FILE).write_text("weightz")
    with pytest.raises(
        IntegrityError, match=rf"{ADAPTER_WEIGHTS_FILE} of version {digest}: expected sha256 {expected}"
    ):
        store.verify(digest)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE])
def test_verify_names_the_file_when_it_is_missing(store: ArtifactStore, source: Path, name: str) -> None:
    """A lost file is as bad as a changed one."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    (store.folder(digest) / name).unlink()
    with pytest.raises(IntegrityError, match=rf"{name}.*missing"):
        store.verify(digest)


def test_verify_refuses_when_the_manifest_was_changed(store: ArtifactStore, source: Path) -> None:
    """A manifest that is valid, but not the one that gave the name, is found out."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    path = store.folder(digest) / MANIFEST_FILE
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "rank": 64}))
    with pytest.raises(IntegrityError, match=f"the manifest of version {digest} hashes to "):
        store.verify(digest)


def test_verify_refuses_when_files_and_manifest_were_changed_together(store: ArtifactStore, source: Path) -> None:
    """Another version's files under this name don't pass, though they agree among themselves."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    other, _ = store.add(write_files(source, "other"), PLAIN_MANIFEST)
    for file in store.folder(other).iterdir():
        (store.folder(digest) / file.name).write_bytes(file.read_bytes())
    with pytest.raises(IntegrityError, match=f"the manifest of version {digest} hashes to {other}"):
        store.verify(digest)


def test_read_gives_the_checked_bytes_when_all_is_well(store: ArtifactStore, source: Path) -> None:
    """The files of the manifest and no other, with what they hold."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    manifest, files = store.read(digest)
    assert store.verify(digest) == manifest
    assert {ADAPTER_CONFIG_FILE: b"{}", ADAPTER_WEIGHTS_FILE: b"weights"} == files


@pytest.mark.parametrize("content", ["weightz", "weight", "weights and more", None])
def test_read_refuses_a_file_when_it_is_not_the_manifests(
    store: ArtifactStore, source: Path, content: str | None
) -> None:
    """Changed, cut, longer or gone: as for `verify`."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    path = store.folder(digest) / ADAPTER_WEIGHTS_FILE
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(IntegrityError, match=ADAPTER_WEIGHTS_FILE):
        store.read(digest)


def test_add_refuses_a_file_when_it_is_a_link(store: ArtifactStore, source: Path) -> None:
    """What a link points to may change, and may be none of the publisher's business."""
    (source / ADAPTER_WEIGHTS_FILE).rename(source / "elsewhere")
    (source / ADAPTER_WEIGHTS_FILE).symlink_to(source / "elsewhere")
    with pytest.raises(AdapterRejectedError, match=r"adapter_model\.safetensors is a symbolic link"):
        store.add(source, PLAIN_MANIFEST)
    assert set() == store.digests()


def test_scratch_folder_is_gone_when_left(store: ArtifactStore) -> None:
    """Also after an error; a sweep meanwhile leaves it alone."""

    def fail() -> None:
        with store.scratch() as folder:
            (folder / "file").write_text("x")
            assert 0 == store.sweep()
            assert folder.is_dir()
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert [".lock"] == _names(store.root / ".incoming")


@pytest.mark.parametrize(
    "digest",
    ["", "..", ".incoming", "../store", "/etc", "a" * 63, "a" * 65, "A" * 64, "a" * 64 + "\n", "." * 64, "a" * 64],
)
def test_folder_refuses_when_the_name_is_no_stored_digest(store: ArtifactStore, digest: str) -> None:
    """No text becomes a path unless it is 64 hex digits, and then the version must be there."""
    for act in (store.folder, store.verify, store.remove):
        with pytest.raises(NotFoundError, match="the store has no version"):
            act(digest)


def test_remove_deletes_the_version_when_it_is_there(store: ArtifactStore, source: Path) -> None:
    """Nothing is left, neither in place nor in the folder for incoming versions."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    store.remove(digest)
    assert set() == store.digests()
    assert store.sweep() == 0


def test_remove_leaves_open_files_readable_when_a_reader_has_them(store: ArtifactStore, source: Path) -> None:
    """A loader that has opened the weights reads them to the end."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    with (store.folder(digest) / ADAPTER_WEIGHTS_FILE).open() as file:
        store.remove(digest)
        assert file.read() == "weights"


def test_sweep_deletes_half_written_folders_when_nobody_publishes(store: ArtifactStore, source: Path) -> None:
    """Whole versions stay, whoever lists them: a replaced database costs nobody their adapters."""
    kept, _ = store.add(source, PLAIN_MANIFEST)
    write_files(store.root / ".incoming" / "half", "half-written")
    assert store.sweep() == 1
    assert {kept} == store.digests()
    assert _names(store.root / ".incoming") == [".lock"]
    store.verify(kept)


def test_sweep_does_nothing_when_a_publisher_holds_the_store(store: ArtifactStore, source: Path) -> None:
    """What is being written survives, seen from another store object as well."""
    with store.held():
        write_files(store.root / ".incoming" / "half", "half-written")
        with store.held():
            pass
        assert ArtifactStore(store.root).sweep() == 0
    assert store.sweep() == 1


def test_add_replaces_damaged_files_when_the_content_is_published_again(store: ArtifactStore, source: Path) -> None:
    """A version whose stored files were damaged is whole again once somebody publishes it anew."""
    digest, _ = store.add(source, PLAIN_MANIFEST)
    (store.folder(digest) / ADAPTER_WEIGHTS_FILE).write_text("damaged")
    assert digest == store.add(source, PLAIN_MANIFEST)[0]
    assert digest == store.verify(digest).digest


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _kill_at_every_step(action: str, root: Path) -> list[str]:
    command = [sys.executable, "-m", "tests.support.kill_points", action, str(root)]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout.split()


def test_publish_leaves_nothing_or_a_whole_version_when_killed_at_any_step(tmp_path: Path) -> None:
    """After kill -9 at each step every registered version verifies, sweeping cleans up, and publishing works again."""
    steps = _kill_at_every_step("publish", tmp_path)
    assert {"mkdir", "readv", "fsync", "rename", "begin", "before_cursor_execute", "commit"} <= set(steps)
    for number, step in enumerate(steps, start=1):
        registry = open_home(tmp_path / f"{number:02}")
        before = registry.find("legal")
        assert before.number == 1, f"the kill before {step} moved the alias"
        digests = {version.version.digest for name in ("legal", "medical") for version in registry.versions(name)}
        assert digests == {registry.store.verify(digest).digest for digest in digests}
        registry.store.sweep()
        assert digests <= registry.store.digests()
        assert all(registry.store.verify(digest) for digest in registry.store.digests())
        assert _names(registry.store.root / ".incoming") == [".lock"]
        assert publish_text(registry, "fresh").number == 2
        assert registry.store.verify(registry.find("legal").version.digest)
        registry.database.close()


def test_remove_leaves_no_broken_version_when_killed_at_any_step(tmp_path: Path) -> None:
    """After kill -9 at each step the version is either registered and whole, or gone and swept."""
    steps = _kill_at_every_step("remove", tmp_path)
    assert {"rename", "unlink", "rmdir", "commit"} <= set(steps)
    remaining = set()
    for number, _ in enumerate(steps, start=1):
        registry = open_home(tmp_path / f"{number:02}")
        versions = registry.versions("legal") + registry.versions("medical")
        remaining.add(len(versions))
        assert all(registry.store.verify(version.version.digest) for version in versions)
        registry.store.sweep()
        assert {version.version.digest for version in versions} <= registry.store.digests()
        assert all(registry.store.verify(digest) for digest in registry.store.digests())
        publish_text(registry, "removed", alias="medical")
        assert registry.store.verify(registry.find("medical").version.digest)
        registry.database.close()
    assert {1, 2} == remaining
