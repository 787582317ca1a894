"""Builds an engine from settings: base model, slots, and the reader that checks a version before it is loaded."""

from __future__ import annotations

import torch

from adapters.adapter_files import AdapterWeights, read_adapter_config, read_adapter_weights
from adapters.base_model import LoadedBase, load_base
from adapters.database import open_database
from adapters.errors import AdapterWeightsError, FingerprintMismatchError
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from server.config import ServeSettings
from server.engine.residency import WeightsReader
from server.engine.runner import ModelRunner
from server.engine.scheduler import Engine

__all__ = ["build_engine", "make_weights_reader"]


def build_engine(core: CoreSettings, serve: ServeSettings) -> Engine:
    """Load the base model, warm it up and start loading what the aliases point to.

    Raises:
        BaseModelError: the base model can't be loaded or is not supported.
    """
    base = load_base(core)
    runner = ModelRunner(
        base.model,
        num_slots=serve.slots,
        max_rank=core.max_rank,
        max_batch=serve.max_batch,
        max_context=serve.max_context,
    )
    runner.warm_up()
    store = ArtifactStore(core.home / "store")
    reader = make_weights_reader(store, base, runner.slots.module_shapes)
    engine = Engine(runner, base.tokenizer, reader, max_prefill_tokens=serve.max_prefill_tokens)
    database = open_database(core.resolved_database_url)
    engine.prefetch(alias.current.version.digest for alias in Registry(database, store).aliases())
    database.close()
    return engine


def make_weights_reader(
    store: ArtifactStore, base: LoadedBase, module_shapes: dict[str, tuple[int, int]]
) -> WeightsReader:
    """A function that reads one version after checking its hashes, its base model's fingerprint and every tensor."""
    dtype: torch.dtype = base.model.get_input_embeddings().weight.dtype

    def read(digest: str) -> AdapterWeights:
        manifest = store.verify(digest)
        if manifest.base.fingerprint != base.reference.fingerprint:
            raise FingerprintMismatchError(adapter=manifest.base.fingerprint, base=base.reference.fingerprint)
        folder = store.folder(digest)
        weights = read_adapter_weights(folder, read_adapter_config(folder), module_shapes)
        # The cast happens here, in the loader thread, so that the engine's thread only copies.
        modules = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in weights.modules.items()}
        for name, pair in modules.items():
            if not all(bool(tensor.isfinite().all()) for tensor in pair):
                raise AdapterWeightsError(f"{name}: the weights overflow in the base model's precision")
        return AdapterWeights(weights.rank, modules)

    return read
