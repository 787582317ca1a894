"""The registry as a state machine: any order of acts leaves it as a model in plain dicts says."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.errors import ConflictError, NotFoundError
from adapters.experiments import ExperimentService
from tests.support.kill_points import open_home
from tests.support.versions import publish_text


@dataclass
class _Model:
    """What an alias should be, in plain dicts."""

    last_number: int = 0
    versions: dict[int, str] = field(default_factory=dict)
    trail: list[int] = field(default_factory=list)
    arms: tuple[int, int] | None = None

    def move(self, number: int) -> None:
        if self.trail[-1:] != [number]:
            self.trail.append(number)

    def drop(self, number: int) -> None:
        del self.versions[number]
        self.trail = [entry for entry, _ in groupby(entry for entry in self.trail if entry != number)]


ALIASES = st.sampled_from(["legal", "medical"])
CONTENTS = st.sampled_from(["one", "two", "three"])


class RegistryMachine(RuleBasedStateMachine):
    """Any order of publish, promote, rollback, remove and experiments leaves the registry as the model says."""

    @initialize()
    def open(self) -> None:
        """Start with an empty registry."""
        self.home = Path(tempfile.mkdtemp(prefix="hotswap-registry-"))
        self.registry = open_home(self.home)
        self.experiments = ExperimentService(self.registry.database)
        self.models = {"legal": _Model(), "medical": _Model()}

    def teardown(self) -> None:
        """Delete the home."""
        if hasattr(self, "registry"):
            self.registry.database.close()
            shutil.rmtree(self.home)

    @rule(alias=ALIASES, content=CONTENTS, promote=st.booleans())
    def publish(self, alias: str, content: str, promote: bool) -> None:
        """Equal content keeps its number; the alias moves unless told otherwise or split."""
        model = self.models[alias]
        known = {text: number for number, text in model.versions.items()}
        version = publish_text(self.registry, content, alias=alias, promote=promote)
        if content not in known:
            model.last_number += 1
            model.versions[model.last_number] = content
        assert known.get(content, model.last_number) == version.number
        if promote and model.arms is None:
            model.move(version.number)

    @rule(alias=ALIASES, number=st.integers(1, 6))
    def promote(self, alias: str, number: int) -> None:
        """Existing versions can be promoted unless an experiment runs."""
        model = self.models[alias]
        if number not in model.versions:
            with pytest.raises(NotFoundError):
                self.registry.promote(f"{alias}@v{number}")
        elif model.arms:
            with pytest.raises(ConflictError):
                self.registry.promote(f"{alias}@v{number}")
        else:
            self.registry.promote(f"{alias}@v{number}")
            model.move(number)

    @rule(alias=ALIASES)
    def rollback(self, alias: str) -> None:
        """One step back on the trail, if there is one."""
        model = self.models[alias]
        if not model.versions:
            with pytest.raises(NotFoundError):
                self.registry.rollback(alias)
        elif model.arms or len(model.trail) < 2:
            with pytest.raises(ConflictError):
                self.registry.rollback(alias)
        else:
            model.trail.pop()
            assert model.trail[-1] == self.registry.rollback(alias).current.number

    @rule(alias=ALIASES, number=st.integers(1, 6))
    def remove_version(self, alias: str, number: int) -> None:
        """Only what nothing points to is removed."""
        model = self.models[alias]
        name = f"{alias}@v{number}"
        if not model.versions or (model.arms is None and number not in model.versions):
            with pytest.raises(NotFoundError):
                self.registry.remove(name)
        elif model.arms or number in model.trail[-1:]:
            with pytest.raises(ConflictError):
                self.registry.remove(name)
        else:
            assert [name] == self.registry.remove(name)
            model.drop(number)

    @rule(alias=ALIASES)
    def remove_alias(self, alias: str) -> None:
        """All versions go, and the numbers are never used again."""
        model = self.models[alias]
        if not model.versions:
            with pytest.raises(NotFoundError):
                self.registry.remove(alias)
        elif model.arms:
            with pytest.raises(ConflictError):
                self.registry.remove(alias)
        else:
            assert [f"{alias}@v{number}" for number in sorted(model.versions)] == self.registry.remove(alias)
            model.versions.clear()
            model.trail.clear()

    @rule(alias=ALIASES, data=st.data())
    def create_experiment(self, alias: str, data: st.DataObject) -> None:
        """One experiment an alias."""
        model = self.models[alias]
        if not model.versions:
            with pytest.raises(NotFoundError):
                self.experiments.create(alias, [("A", "v1", 50), ("B", "v2", 50)])
            return
        numbers = st.sampled_from(sorted(model.versions))
        first, second = data.draw(numbers), data.draw(numbers)
        arms = [("A", f"v{first}", 50.0), ("B", f"v{second}", 50.0)]
        if model.arms:
            with pytest.raises(ConflictError):
                self.experiments.create(alias, arms)
        else:
            self.experiments.create(alias, arms)
            model.arms = (first, second)

    @precondition(lambda self: any(model.arms for model in self.models.values()))
    @rule(alias=ALIASES)
    def stop_experiment(self, alias: str) -> None:
        """The alias answers with what it points to again."""
        model = self.models[alias]
        if model.arms:
            assert self.experiments.stop(alias).state == "stopped"
            model.arms = None

    @invariant()
    def aliases_equal_the_model(self) -> None:
        """Pointer, versions, bindings and files are what the model says."""
        if not hasattr(self, "registry"):
            return
        found = {alias.name: alias for alias in self.registry.aliases()}
        assert {name for name, model in self.models.items() if model.trail} == set(found)
        unpromoted = [name for name, model in self.models.items() if model.versions and not model.trail]
        assert sorted(unpromoted) == self.registry.unpromoted()
        digests = set()
        for name, model in self.models.items():
            versions = {version.number: version.version.digest for version in self.registry.versions(name)}
            assert set(model.versions) == set(versions)
            assert len(set(model.versions.values())) == len(set(versions.values()))
            digests |= set(versions.values())
            if model.trail:
                assert model.trail[-1] == found[name].current.number
                binding = self.registry.resolve(name, unit="user")
                allowed = {versions[number] for number in model.arms or model.trail[-1:]}
                assert binding.digest in allowed
                assert ("experiment" if model.arms else "alias") == binding.route
        assert digests == self.registry.store.digests()


RegistryMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase
