"""Builds an engine from settings: base model, slots, and the reader that checks a version before it is loaded.

Importing this loads no model library: the API process names the builder, and the worker calls it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from adapters.adapter_files import AdapterWeights, parse_adapter_config, parse_adapter_weights
from adapters.base_model import LoadedBase, load_base
from adapters.database import open_database
from adapters.errors import AdapterConfigError, ConfigurationError, FingerprintMismatchError, IntegrityError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from server.config import ServeSettings

if TYPE_CHECKING:
    import torch

    from server.engine.residency import WeightsReader
    from server.engine.scheduler import Engine

__all__ = ["build_engine", "find_pinned", "load_first_versions", "make_weights_reader"]

_MAX_NAMES_SHOWN = 20


def build_engine(core: CoreSettings, serve: ServeSettings, base: LoadedBase | None = None) -> Engine:
    """Load the base model, warm it up and start loading what the aliases point to.

    A `base` that is loaded already is used, and changed: its linear layers and its attention are replaced.

    Raises:
        BaseModelError: the base model can't be loaded or is not supported.
        ConfigurationError: a pinned alias does not exist, or points to a reward model.
    """
    from server.engine.runner import ModelRunner
    from server.engine.scheduler import Engine

    base = base or load_base(core)
    runner = ModelRunner(
        base.model,
        num_slots=serve.slots,
        max_rank=core.max_rank,
        max_batch=serve.max_batch,
        max_context=serve.max_context,
        cache_tokens=serve.resolved_cache_tokens,
        kernels_folder=core.home / "cache" / "kernels" if serve.native_kernels else None,
        capture_decode=serve.capture_decode and base.device.type == "cuda",
    )
    runner.warm_up()
    store = ArtifactStore(core.home / "store")
    reader = make_weights_reader(store, base, runner.slots.module_shapes)
    engine = Engine(
        runner,
        base.tokenizer,
        reader,
        max_prefill_tokens=serve.max_prefill_tokens,
        max_stall_s=serve.max_stall_ms / 1000,
        max_host_bytes=serve.host_cache_mb * 1_000_000,
    )
    database = open_database(core.resolved_database_url)
    load_first_versions(engine, Registry(database, store), serve.pinned)
    database.close()
    # What has been made so far lives as long as the process. A collector that walks it, which parsing an adapter's
    # header can set off, would hold up all running streams for a quarter of a second (measured on a two-core CPU).
    gc.collect()
    gc.freeze()
    return engine


def load_first_versions(engine: Engine, registry: Registry, pinned: Iterable[str]) -> None:
    """Start loading what the aliases point to, as many as there are slots; the pinned ones first, which keep theirs.

    Reward models take none: they answer nobody.

    Raises:
        ConfigurationError: a pinned alias does not exist, or points to a reward model.
    """
    for digest in find_pinned(registry, pinned):
        engine.residency.pin(digest)
    versions = (alias.current.version for alias in registry.aliases())
    digests = (version.digest for version in versions if version.kind == "chat")
    engine.prefetch(islice(digests, engine.residency.num_slots))


def find_pinned(registry: Registry, names: Iterable[str]) -> list[str]:
    """The digests of the versions that aliases point to.

    Raises:
        ConfigurationError: an alias does not exist, or is for a reward model; names those that can be pinned.
    """
    current = {
        alias.name: alias.current.version.digest for alias in registry.aliases() if alias.current.version.kind == "chat"
    }
    if unknown := [name for name in names if name not in current]:
        known = ", ".join(list(current)[:_MAX_NAMES_SHOWN]) or "none"
        raise ConfigurationError(f"setting serve.pinned: there is no alias {unknown[0]!r:.120}; there are: {known}")
    return [current[name] for name in names]


def make_weights_reader(
    store: ArtifactStore, base: LoadedBase, module_shapes: dict[str, tuple[int, int]]
) -> WeightsReader:
    """A function that reads one version after checking its hashes, its base model's fingerprint and every tensor."""
    dtype: torch.dtype = base.model.get_input_embeddings().weight.dtype

    def read(digest: str) -> AdapterWeights:
        # Every byte is read once, and what is parsed is what was hashed.
        manifest, files = store.read(digest)
        if manifest.base.fingerprint != base.reference.fingerprint:
            raise FingerprintMismatchError(adapter=manifest.base.fingerprint, base=base.reference.fingerprint)
        if manifest.kind != "chat":
            raise AdapterConfigError(f"version {digest} is a {manifest.kind} model, which writes no answers")
        if missing := {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE} - files.keys():
            raise IntegrityError(f"the manifest of version {digest} does not name {min(missing)}")
        config = parse_adapter_config(files[ADAPTER_CONFIG_FILE])
        # The cast happens here, in the loader thread, so that the engine's thread only copies.
        return parse_adapter_weights(files[ADAPTER_WEIGHTS_FILE], config, module_shapes, dtype=dtype)

    return read
