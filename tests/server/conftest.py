"""Engines and sites for the server's tests. Loading a model is the slow part, so engines share one where they may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from adapters.registry import Registry
from tests.support.engine import Bench, Reference, Site, make_bench, save_recipes
from tests.support.tiny import CHATML_WITH_TOOLS, FAMILIES


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """Log on one line: structlog's own default draws every traceback with its variables, which takes seconds."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def adapter_folders(
    tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """The adapters of all recipes for each family."""
    root = tmp_path_factory.mktemp("adapters")
    return {family: save_recipes(root / family, tiny_folders[family]) for family in FAMILIES}


@pytest.fixture(scope="session")
def bench(tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]) -> Bench:
    """A tiny Llama that engines share one after another. A test that harms its tensors takes `own_bench` instead."""
    return make_bench(tiny_folders["llama"], adapter_folders["llama"])


@pytest.fixture
def own_bench(tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]) -> Callable[..., Bench]:
    """Make a bench that nobody else uses."""

    def build(**options: int) -> Bench:
        return make_bench(tiny_folders["llama"], adapter_folders["llama"], **options)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def references(
    tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]
) -> Callable[[str], Reference]:
    """Independent answers for a family."""
    made: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in made:
            made[family] = Reference(tiny_folders[family], adapter_folders[family])
        return made[family]

    return get


@pytest.fixture(scope="session")
def reference_answers(references: Callable[[str], Reference]) -> Reference:
    """Independent answers of the tiny Llama."""
    return references("llama")


@pytest.fixture
def site(bench: Bench, registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """The API over an engine with empty slots and an empty registry."""
    made = Site.build(bench, registry, tmp_path)
    yield made
    made.engine.close()


@pytest.fixture
def tool_site(own_bench: Callable[..., Bench], registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """The API over a base model whose template shows tools, with room for prompts that hold some."""
    site = Site.build(own_bench(max_context=512), registry, tmp_path, max_context=512, chat_template=CHATML_WITH_TOOLS)
    yield site
    site.engine.close()
