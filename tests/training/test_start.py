"""Runs that go on from published versions: what they begin with, what they keep, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.adapter_files import read_adapter_config
from adapters.base_model import LoadedBase, load_base, read_module_shapes
from adapters.database import open_database
from adapters.errors import (
    AdapterConfigError,
    ConfigurationError,
    FingerprintMismatchError,
    InvalidInputError,
    NotFoundError,
    RankTooHighError,
)
from adapters.experiments import ExperimentService
from adapters.imports import export_version, import_folder
from adapters.manifest import REWARD_HEAD_FILE
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from server.engine_factory import make_weights_reader
from tests.support.methods import TinyWatcher, method_settings, toy_dataset, trained_tensors
from tests.support.tiny import make_manifest, save_random_adapter, tiny_settings
from training.config import TrainSettings
from training.methods import METHODS
from training.preparation import PreparedRun, prepare_run
from training.worker import TrainingResult, run_training


@dataclass
class Place:
    """A home with a tiny base model, and runs in it."""

    core: CoreSettings
    registry: Registry
    folder: Path

    @contextmanager
    def versions(self) -> Iterator[Registry]:
        """The registry, as a run opens it."""
        yield self.registry

    def train(self, alias: str, method: str, watcher: TinyWatcher | None = None, **changes: Any) -> TrainingResult:
        """Train a tiny adapter on the toy rows and publish it."""
        rows = self.folder / f"{method}.jsonl"
        toy_dataset(self.folder, method)
        settings = self.settings(method, **({"max_steps": 2} | changes))
        return run_training(alias, rows, rows, core=self.core, settings=settings, listener=watcher)

    def settings(self, method: str, **changes: Any) -> TrainSettings:
        """Those under which a tiny model learns."""
        return method_settings(self.core.home, method, **changes)

    def prepare(self, settings: TrainSettings, watcher: TinyWatcher | None = None) -> PreparedRun:
        """A run before its first step, without rows."""
        return prepare_run(load_base(self.core), [], settings, self.versions, None, watcher or TinyWatcher())

    def publish(self, alias: str, base: LoadedBase, **changes: Any) -> None:
        """A version with random weights."""
        source = save_random_adapter(self.folder / f"adapter-{alias}", Path(self.core.base), seed=1, **changes)
        self.registry.publish(source, make_manifest(base.reference), alias=alias)


@pytest.fixture(params=["none", "nf4"])
def place(request: pytest.FixtureRequest, tmp_path: Path, tiny_folders: dict[str, Path]) -> Iterator[Place]:
    """An empty home over a base model in each precision."""
    yield from _make_place(tmp_path, tiny_folders["llama"], request.param)


@pytest.fixture
def plain(tmp_path: Path, tiny_folders: dict[str, Path]) -> Iterator[Place]:
    """An empty home over a base model in float32."""
    yield from _make_place(tmp_path, tiny_folders["llama"], "none")


def _make_place(folder: Path, base: Path, quantisation: str) -> Iterator[Place]:
    core = tiny_settings(base, home=folder / "home", quantisation=quantisation)
    database = open_database(core.resolved_database_url)
    yield Place(core, Registry(database, ArtifactStore(core.home / "store")), folder)
    database.close()


def test_adapter_is_the_version_that_it_goes_on_from_when_it_begins(place: Place) -> None:
    """Every tensor, bit for bit; the shape is the version's, and the run says so."""
    first = place.train("legal", "sft", rank=4, alpha=6, rslora=True, targets=("q_proj", "up_proj"))
    watcher = TinyWatcher()

    prepared = place.prepare(place.settings("dpo", start_from="legal", rank=8), watcher)

    found = place.registry.store.folder(first.published.version.digest)
    assert prepared.parent == first.published.version.digest
    settings = prepared.run.settings
    assert (settings.rank, settings.alpha, settings.rslora) == (4, 6, True)
    assert settings.targets == ("q_proj", "up_proj")
    assert watcher.stages == [
        "Going on from legal@v1: its rank 4, alpha 6 and targets (q_proj, up_proj) are kept",
        "The reference is legal@v1",
    ]
    prepared.save(place.folder / "again")
    saved = (place.folder / "again" / "adapter_model.safetensors").read_bytes()
    assert saved == (found / "adapter_model.safetensors").read_bytes()
    again, first_config = read_adapter_config(place.folder / "again"), read_adapter_config(found)
    # PEFT writes a set, in no order.
    assert sorted(again.target_modules) == sorted(first_config.target_modules)
    assert again.model_copy(update={"target_modules": first_config.target_modules}) == first_config


def test_run_records_its_parent_when_it_goes_on(plain: Place) -> None:
    """Method, parent and the shape that was kept stand in the manifest; both measures are of the method."""
    first = plain.train("legal", "sft", rank=4)

    second = plain.train("legal", "dpo", start_from="legal", beta=0.2)

    manifest = plain.registry.store.verify(second.published.version.digest)
    assert second.published.label == "legal@v2"
    assert (manifest.method, manifest.kind, manifest.parent) == ("dpo", "chat", first.published.version.digest)
    assert (manifest.rank, manifest.settings["rank"], manifest.settings["reference"]) == (4, 4, "start")
    assert manifest.metrics["validation_loss_before"] == pytest.approx(0.6931, abs=1e-3)
    assert manifest.metrics["validation_loss_after"] < 0.69
    assert manifest.metrics["validation_pair_accuracy_after"] == 1.0


def test_reference_is_the_bare_base_when_it_is_asked_for(plain: Place) -> None:
    """Said before the run begins, also where it is the default."""
    plain.train("legal", "sft")
    for changes in ({"start_from": "legal", "reference": "base"}, {}):
        watcher = TinyWatcher()
        plain.prepare(plain.settings("kto", **changes), watcher)
        assert watcher.stages[-1] == "The reference is the bare base model"


def test_version_from_elsewhere_can_be_gone_on_from_when_its_layers_have_several_ranks(plain: Place) -> None:
    """Patterns of ranks and alphas stay as they were."""
    base = load_base(plain.core)
    source = save_random_adapter(plain.folder / "odd", Path(plain.core.base), seed=1, rank=4, modules=("q_proj",))
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    plain.registry.publish(source, make_manifest(base.reference), alias="odd")

    prepared = plain.prepare(plain.settings("sft", start_from="odd"))

    prepared.save(plain.folder / "again")
    expected, found = read_adapter_config(source), read_adapter_config(plain.folder / "again")
    for module in read_module_shapes(Path(plain.core.base)):
        if module.endswith("q_proj"):
            assert expected.scaling_of(module) == found.scaling_of(module)
    assert prepared.run.settings.rank == 4


def test_start_is_refused_when_it_does_not_fit(plain: Place, tiny_folders: dict[str, Path]) -> None:
    """Unknown, made for another base, of another kind, or of a rank that is not published here."""
    base = load_base(plain.core)
    plain.publish("good", base, rank=4)
    other = replace(base, reference=base.reference.model_copy(update={"fingerprint": "0" * 64}))
    plain.registry.publish(plain.folder / "adapter-good", make_manifest(other.reference), alias="foreign")
    plain.train("judge", "reward")
    for settings, error, message in (
        (plain.settings("sft", start_from="none"), NotFoundError, "there is no adapter 'none'"),
        (plain.settings("sft", start_from="foreign"), FingerprintMismatchError, "0000"),
        (
            plain.settings("sft", start_from="judge"),
            ConfigurationError,
            "judge@v1 is a reward model; only method reward",
        ),
        (plain.settings("grpo", reward="good"), ConfigurationError, "good@v1 is not a reward model"),
    ):
        with pytest.raises(error, match=message):
            plain.prepare(settings)

    small = Place(plain.core.model_copy(update={"max_rank": 2}), plain.registry, plain.folder)
    with pytest.raises(RankTooHighError, match="rank 4"):
        small.train("legal", "sft", rank=2, start_from="good")


# Reward models.


def test_reward_version_is_kept_apart_when_it_is_published(plain: Place) -> None:
    """Its head lies beside its adapter, every hash checked; it answers nobody and is no arm."""
    result = plain.train("judge", "reward")
    digest = result.published.version.digest
    plain.train("judge", "reward", seed=1)

    manifest = plain.registry.store.verify(digest)
    assert (manifest.kind, result.published.version.kind) == ("reward", "reward")
    assert REWARD_HEAD_FILE in manifest.files
    assert "kind" not in result.published.version.metrics
    for name in ("judge", "judge@v1"):
        with pytest.raises(InvalidInputError, match=r"judge@v[12] is a reward model") as caught:
            plain.registry.resolve(name, unit="anybody")
        assert caught.value.param == "model"
    with pytest.raises(InvalidInputError, match="judge@v1 is a reward model"):
        ExperimentService(plain.registry.database).create("judge", [("a", "v1", 50), ("b", "v2", 50)])
    base = load_base(plain.core)
    with pytest.raises(AdapterConfigError, match="is a reward model"):
        make_weights_reader(plain.registry.store, base, read_module_shapes(Path(plain.core.base)))(digest)


def test_reward_version_keeps_its_head_when_it_is_gone_on_from(place: Place) -> None:
    """Adapter and head begin as the version's; from a chat version the head begins anew."""
    place.train("judge", "reward")
    place.train("legal", "sft")
    stored = place.registry.store.folder(place.registry.find("judge").version.digest)

    again = place.prepare(place.settings("reward", start_from="judge"))
    fresh = place.prepare(place.settings("reward", start_from="legal"))

    again.save(place.folder / "again")
    for name in (REWARD_HEAD_FILE, "adapter_model.safetensors"):
        assert (place.folder / "again" / name).read_bytes() == (stored / name).read_bytes()
    assert again.run.head is not None
    assert fresh.run.head is not None
    assert not torch.equal(again.run.head.weight, fresh.run.head.weight)


def test_answers_are_judged_by_a_reward_version_when_rl_names_one(place: Place) -> None:
    """The judge's adapter lies beside the one that is trained, stays as it is, and is not published with it."""
    place.train("judge", "reward", max_steps=4)
    place.train("legal", "sft")
    watcher = TinyWatcher()

    result = place.train("legal", "rloo", watcher, start_from="legal", reward="judge@v1", max_answer_tokens=3)

    manifest = place.registry.store.verify(result.published.version.digest)
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest.settings["reward"] == "judge@v1"
    assert isinstance(manifest.metrics["validation_mean_reward_after"], float)
    assert "The reference is legal@v1" in watcher.stages


def test_judge_is_frozen_when_answers_are_trained(plain: Place) -> None:
    """Only the adapter that is trained moves."""
    plain.train("judge", "reward")
    settings = plain.settings("grpo", reward="judge", max_steps=2, max_answer_tokens=3)
    prepared = plain.prepare(settings)
    from training.methods import render_rows

    rows = render_rows(prepared.run.base.tokenizer, toy_dataset(plain.folder, "grpo"), settings)
    names = set(trained_tensors(prepared.run))
    judge = {n: p.detach().clone() for n, p in prepared.run.model.named_parameters() if ".reward." in n}

    METHODS["grpo"](replace(prepared.run, rows=rows))

    assert len(judge) > 10
    assert names == set(trained_tensors(prepared.run))
    assert all(".default." in name for name in names)
    for name, expected in judge.items():
        assert torch.equal(expected, prepared.run.model.get_parameter(name))


def test_reward_version_is_the_same_when_it_was_exported_and_imported(plain: Place) -> None:
    """With its manifest it is the same version; without it, the head alone says what it is."""
    plain.train("judge", "reward")
    found = plain.registry.find("judge")
    export_version(plain.registry, found, plain.folder / "out")

    imported, _ = import_folder(plain.folder / "out", "copy", core=plain.core, registry=plain.registry)
    (plain.folder / "out" / "manifest.json").unlink()
    other, _ = import_folder(plain.folder / "out", "bare", core=plain.core, registry=plain.registry)

    assert imported.version.digest == found.version.digest
    assert other.version.kind == "reward"


def test_import_is_refused_when_the_head_is_missing(plain: Place) -> None:
    """A manifest of a reward model beside files of none."""
    plain.train("judge", "reward")
    export_version(plain.registry, plain.registry.find("judge"), plain.folder / "out")
    shutil.move(plain.folder / "out" / REWARD_HEAD_FILE, plain.folder / "head")

    with pytest.raises(InvalidInputError, match=r"says kind reward, but reward_head\.safetensors is not there"):
        import_folder(plain.folder / "out", "copy", core=plain.core, registry=plain.registry)
