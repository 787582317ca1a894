"""The zoo of bad adapters in the store: the engine refuses each for its own requests and touches no slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.manifest import Manifest
from adapters.store import ArtifactStore
from server.engine.scheduler import Engine
from server.engine_factory import make_weights_reader
from tests.support.bad_adapters import ZOO
from tests.support.engine import Bench, ask, make_bench, run_to_end, slotted_layers
from tests.support.tiny import make_manifest, save_random_adapter

STORED = [case for case in ZOO if ZOO[case].is_stored]
PROMPT = "hello there"


@dataclass
class Place:
    """An engine with two slots, both taken by good versions, over a store."""

    engine: Engine
    bench: Bench
    store: ArtifactStore
    good: list[str]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the model and of all slots."""
        found = {name: value.clone() for name, value in self.bench.base.model.state_dict().items()}
        for name, layer in slotted_layers(self.bench.base.model).items():
            for slot in (1, 2):
                a, b = layer.slot_weights(slot)
                found |= {f"{name}.{slot}.a": a.clone(), f"{name}.{slot}.b": b.clone()}
        return found

    def changed_since(self, before: dict[str, torch.Tensor]) -> list[str]:
        """The names of the tensors that are not bit for bit as they were."""
        after = self.tensors()
        assert before.keys() == after.keys()
        return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.fixture(scope="module")
def place(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One place for the whole zoo: nothing that is refused may change it."""
    bench, root = make_bench(tiny_folders["llama"], {}, num_slots=2, max_batch=4), tmp_path_factory.mktemp("zoo")
    store = ArtifactStore(root / "store")
    manifest = make_manifest(bench.base.reference)
    good = [
        store.add(save_random_adapter(root / f"good{seed}", tiny_folders["llama"], seed=seed), manifest)[0]
        for seed in (1, 2)
    ]
    engine = bench.engine(read=make_weights_reader(store, bench.base, bench.runner.slots.module_shapes))
    made = Place(engine, bench, store, good)
    before = made.tensors()
    run_to_end(engine, *(ask(digest, PROMPT, digest) for digest in good))
    assert len(made.changed_since(before)) == 4 * len(slotted_layers(bench.base.model)), "a snapshot must see the slots"
    yield made
    engine.close()


def _add(place: Place, folder: Path, manifest: Manifest | None = None) -> str:
    return place.store.add(folder, manifest or make_manifest(place.bench.base.reference))[0]


def _check_nothing_changed(place: Place, digest: str, words: str) -> None:
    before, expected = place.tensors(), run_to_end(place.engine, ask("good", PROMPT, place.good[0]))["good"]
    answers = run_to_end(
        place.engine, ask("bad", PROMPT, digest), ask("good", PROMPT, place.good[0]), ask("base", PROMPT)
    )
    assert ("adapter_failed", "", 1) == (
        answers["bad"].finish_reason, answers["bad"].text, answers["bad"].num_terminal,
    )  # fmt: skip
    assert words in str(answers["bad"].error)
    assert expected == answers["good"]
    assert [] == place.changed_since(before)
    assert set(place.good) == set(place.engine.residency.resident)


@pytest.mark.parametrize("case", STORED)
def test_engine_refuses_a_bad_version_and_touches_no_slot_when_it_is_asked_for(
    case: str, place: Place, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its request ends with the reason, the others are answered, every tensor is bit for bit as it was."""
    folder = save_random_adapter(tmp_path / "adapter", tiny_folders["llama"], seed=3)
    ZOO[case].spoil(folder)
    _check_nothing_changed(place, _add(place, folder), ZOO[case].words)


def test_engine_refuses_a_version_of_another_base_when_it_is_asked_for(
    place: Place, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Both fingerprints are told."""
    folder = save_random_adapter(tmp_path / "adapter", tiny_folders["llama"], seed=3)
    reference = place.bench.base.reference.model_copy(update={"fingerprint": "a" * 64})
    digest = _add(place, folder, make_manifest(reference))
    _check_nothing_changed(
        place, digest, f"fingerprint {'a' * 64}, but this base model has {place.bench.base.reference.fingerprint}"
    )
