"""What a version must pass before the engine loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.base_model import LoadedBase, linear_shapes
from adapters.errors import FingerprintMismatchError, IntegrityError
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.store import ArtifactStore
from server.engine_factory import make_weights_reader
from tests.support.tiny import make_manifest, save_random_adapter


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


def _add(store: ArtifactStore, tmp_path: Path, base: LoadedBase, *, fingerprint: str | None = None) -> str:
    folder = save_random_adapter(tmp_path / "adapter", base.folder, seed=1)
    reference = base.reference.model_copy(update={"fingerprint": fingerprint or base.reference.fingerprint})
    digest, _ = store.add(folder, make_manifest(reference))
    return digest


def test_reader_gives_the_weights_in_the_bases_precision_when_all_is_well(
    store: ArtifactStore, tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """Every module of the adapter, in float32 on a float32 base."""
    digest = _add(store, tmp_path, tiny_base)
    weights = make_weights_reader(store, tiny_base, linear_shapes(tiny_base.model))(digest)
    assert set(linear_shapes(tiny_base.model)) == set(weights.modules)
    assert {torch.float32} == {tensor.dtype for pair in weights.modules.values() for tensor in pair}


def test_reader_refuses_a_version_when_it_was_made_for_another_base(
    store: ArtifactStore, tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """Both fingerprints are in the message: never served on a base model that it was not made for."""
    digest = _add(store, tmp_path, tiny_base, fingerprint="a" * 64)
    with pytest.raises(FingerprintMismatchError, match=rf"{'a' * 64}.*{tiny_base.reference.fingerprint}"):
        make_weights_reader(store, tiny_base, linear_shapes(tiny_base.model))(digest)


def test_reader_refuses_a_version_when_a_stored_byte_changed(
    store: ArtifactStore, tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """The hash of every file is checked before its content is used."""
    digest = _add(store, tmp_path, tiny_base)
    path = store.folder(digest) / ADAPTER_WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=ADAPTER_WEIGHTS_FILE):
        make_weights_reader(store, tiny_base, linear_shapes(tiny_base.model))(digest)
