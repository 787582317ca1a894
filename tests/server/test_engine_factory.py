"""What a version must pass before the engine loads it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters.base_model import LoadedBase, linear_shapes
from adapters.errors import ConfigurationError, FingerprintMismatchError, IntegrityError
from adapters.manifest import ADAPTER_WEIGHTS_FILE, MANIFEST_FILE
from adapters.registry import Registry
from adapters.store import ArtifactStore
from server.engine.scheduler import Engine
from server.engine_factory import load_first_versions, make_weights_reader
from tests.support.engine import ask, drain, make_bench, run_to_end
from tests.support.tiny import make_manifest, save_random_adapter
from tests.support.versions import publish_text


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


def test_reader_gives_half_the_bytes_when_the_base_computes_in_half_precision(
    store: ArtifactStore, tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """The cast is made once, by the reader: what waits on the host is what is copied to the device."""
    digest = _add(store, tmp_path, tiny_base)
    shapes = linear_shapes(tiny_base.model)
    tiny_base.model.bfloat16()
    weights = make_weights_reader(store, tiny_base, shapes)(digest)
    assert {torch.bfloat16} == {tensor.dtype for pair in weights.modules.values() for tensor in pair}
    assert weights.num_bytes == 2 * 4 * sum(map(sum, shapes.values()))


def test_reader_refuses_a_version_when_its_manifest_names_no_weights(
    store: ArtifactStore, tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """A folder whose hashes agree is not enough."""
    content = make_manifest(tiny_base.reference).to_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (store.root / digest).mkdir()
    (store.root / digest / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"the manifest of version {digest} does not name adapter_config"):
        make_weights_reader(store, tiny_base, linear_shapes(tiny_base.model))(digest)


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


@pytest.fixture
def site(tiny_folders: dict[str, Path], tmp_path: Path, registry: Registry) -> Iterator[tuple[Engine, Registry]]:
    """An engine with two slots, and a registry with the aliases a, b and c."""
    base = tiny_folders["llama"]
    adapters = {name: save_random_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate("abc")}
    bench = make_bench(base, {}, num_slots=2)
    for name, folder in adapters.items():
        registry.publish(folder, make_manifest(bench.base.reference), alias=name)
    engine = bench.engine(read=make_weights_reader(registry.store, bench.base, bench.runner.slots.module_shapes))
    yield engine, registry
    engine.close()


def test_pinned_aliases_are_in_slots_when_the_engine_has_started(site: tuple[Engine, Registry]) -> None:
    """The last alias in the order of names is loaded first if it is pinned, and stays."""
    engine, registry = site
    load_first_versions(engine, registry, ["c"])
    drain(engine, {})
    pinned = registry.find("c").version.digest
    assert {pinned, registry.find("a").version.digest} == set(engine.residency.resident)
    assert {pinned} == engine.residency.pinned
    run_to_end(engine, *(ask(name, "hello", registry.find(name).version.digest) for name in "bab"))
    assert pinned in engine.residency.resident


def test_reward_models_take_no_slot_when_the_engine_has_started(site: tuple[Engine, Registry]) -> None:
    """Neither as one of the first versions nor as a pinned one."""
    engine, registry = site
    publish_text(registry, "judge", alias="a-judge", kind="reward")
    load_first_versions(engine, registry, [])
    drain(engine, {})
    expected = {registry.find(name).version.digest for name in "ab"}
    assert expected == set(engine.residency.resident)
    with pytest.raises(ConfigurationError, match=r"there is no alias 'a-judge'"):
        load_first_versions(engine, registry, ["a-judge"])


def test_start_is_refused_when_a_pinned_alias_does_not_exist(site: tuple[Engine, Registry]) -> None:
    """The name that is wrong and those that would be right stand in the message."""
    engine, registry = site
    with pytest.raises(ConfigurationError, match=r"serve\.pinned: there is no alias 'd'; there are: a, b, c"):
        load_first_versions(engine, registry, ["c", "d"])
    assert ["a", "b", "c"] == [alias.name for alias in registry.aliases()]
    assert frozenset() == engine.residency.pinned


def test_api_process_imports_no_engine_when_the_server_starts() -> None:
    """Kernels and models are the worker's; importing them here as well made every start twice as long."""
    code = (
        "import sys, server.app\n"
        "heavy = {'bitsandbytes', 'scipy.stats', 'torch._inductor', 'server.engine.runner'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (0, "") == (result.returncode, result.stderr)
