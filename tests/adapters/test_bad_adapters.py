"""The zoo of bad adapters at the door: each is refused with a message of its own, and nothing is changed."""

from __future__ import annotations

import hashlib
import re
from itertools import combinations
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters.errors import HotswapError
from adapters.imports import import_folder
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.tables import Table
from tests.support.bad_adapters import ZOO
from tests.support.tiny import save_random_adapter, tiny_settings


@pytest.fixture
def core(tmp_path: Path, tiny_folders: dict[str, Path]) -> CoreSettings:
    """Settings over a tiny Llama."""
    return tiny_settings(tiny_folders["llama"], home=tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path, core: CoreSettings) -> Path:
    """A good adapter, to be spoilt."""
    return save_random_adapter(tmp_path / "adapter", Path(core.base), seed=2)


def _refusal(case: str, folder: Path, core: CoreSettings, registry: Registry) -> HotswapError:
    ZOO[case].spoil(folder)
    with pytest.raises(HotswapError) as caught:
        import_folder(folder, "legal", core=core, registry=registry)
    return caught.value


def _files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _rows(registry: Registry) -> dict[str, list[tuple[object, ...]]]:
    with registry.database.read() as session:
        return {
            table: [tuple(row) for row in session.execute(text(f'SELECT * FROM "{table}"'))]
            for table in Table.metadata.tables
        }


def test_zoo_import_accepts_the_folder_when_nobody_spoilt_it(
    folder: Path, core: CoreSettings, registry: Registry
) -> None:
    """What the zoo's entries start from is good, so that each is refused for its own defect."""
    assert import_folder(folder, "legal", core=core, registry=registry)[0].number == 1


@pytest.mark.parametrize("case", ZOO)
def test_import_refuses_a_bad_adapter_and_changes_nothing_when_it_is_read(
    case: str, folder: Path, core: CoreSettings, registry: Registry, tmp_path: Path
) -> None:
    """The error says what is wrong; no byte of the store and no row of the database is another than before."""
    good = save_random_adapter(tmp_path / "good", Path(core.base), seed=1)
    import_folder(good, "legal", core=core, registry=registry)
    files, rows = _files(registry.store.root), _rows(registry)
    assert len(rows) >= 4

    error = _refusal(case, folder, core, registry)

    assert isinstance(error, ZOO[case].error)
    assert ZOO[case].words in str(error)
    assert files == _files(registry.store.root)
    assert rows == _rows(registry)
    assert [path.name for path in (registry.store.root / ".incoming").iterdir()] == [".lock"]


def test_messages_differ_pairwise_when_names_and_numbers_are_left_out(
    core: CoreSettings, registry: Registry, tmp_path: Path
) -> None:
    """Each defect has its own sentence: none is told as another."""
    assert len(ZOO) >= 35
    sentences = {}
    for number, case in enumerate(ZOO):
        folder = save_random_adapter(tmp_path / str(number) / "adapter", Path(core.base), seed=2)
        sentences[case] = _without_names(str(_refusal(case, folder, core, registry)), folder)
    assert [pair for pair in combinations(ZOO, 2) if sentences[pair[0]] == sentences[pair[1]]] == []


def _without_names(message: str, folder: Path) -> str:
    message = message.replace(str(folder), "FOLDER")
    message = re.sub(r"'[^']*'|\b[0-9a-f]{64}\b", "NAME", message)
    message = re.sub(r"model\.layers[\w.]*", "MODULE", message)
    return re.sub(r"\d+", "N", message)
