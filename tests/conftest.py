"""Fixtures that all tests share. Only the embedded base model is fetched, once, for the e2e tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

# Before anything imports a hub client: a test that would download fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pytest-xdist sets a width, which a console made at import would keep.
os.environ.pop("COLUMNS", None)

from adapters.base_model import LoadedBase
from adapters.database import Database, open_database
from adapters.manifest import BaseReference
from adapters.registry import Registry
from adapters.store import ArtifactStore
from tests.support.postgres import POSTGRES_URL, postgres_schema
from tests.support.tiny import FAMILIES, load_tiny_base, save_tiny_base

# No test may fail for a slow machine. Where CI is set, Hypothesis draws the same examples in every run, and this
# keeps it so.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A command that runs in the tests' process says how things are logged; the next test begins without that."""
    yield
    structlog.reset_defaults()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes never name a test: they may differ between two processes (a time in a gzip header), names may not."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny random base model for each supported family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_tiny_base(root / family, family) for family in FAMILIES}


@pytest.fixture
def tiny_base(tiny_folders: dict[str, Path]) -> LoadedBase:
    """A tiny Llama in float32; fresh for every test, since engine and trainer change the model they are given."""
    return load_tiny_base(tiny_folders["llama"])


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty migrated database: SQLite, or a schema of its own where POSTGRES_URL names a PostgreSQL."""
    with postgres_schema(POSTGRES_URL) if POSTGRES_URL else nullcontext(f"sqlite:///{tmp_path / 'hotswap.db'}") as url:
        opened = open_database(url)
        yield opened
        opened.close()


@pytest.fixture
def registry(tmp_path: Path, database: Database) -> Registry:
    """An empty registry with a store of its own."""
    return Registry(database, ArtifactStore(tmp_path / "store"))


@pytest.fixture
def reference() -> BaseReference:
    """An invented base model, for tests that load none."""
    return BaseReference(name="tiny", fingerprint="f" * 64, quantisation="none")
