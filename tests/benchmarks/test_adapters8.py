"""Random adapters are what the strict reader takes, in a home of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_model import read_module_shapes
from adapters.store import ArtifactStore
from benchmarks.adapters8 import RANK, prepared_home, save_adapters
from tests.support.tiny import tiny_settings


def test_adapters_are_accepted_when_read_strictly(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Rank 8 on every linear layer, float32, each with values of its own."""
    shapes = read_module_shapes(tiny_folders["llama"])
    folders = save_adapters(tmp_path, tiny_folders["llama"], 2)
    read = [read_adapter_weights(folder, read_adapter_config(folder), shapes) for folder in folders]
    assert ["bench-01", "bench-02"] == [folder.name for folder in folders]
    assert [RANK, RANK] == [weights.rank for weights in read]
    assert set(shapes) == set(read[0].modules)
    name = next(iter(shapes))
    assert not read[0].modules[name][0].equal(read[1].modules[name][0])


def test_home_holds_published_adapters_and_nothing_of_the_user_when_prepared(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's variables don't reach the measured server, and the user's home gets a folder at most."""
    monkeypatch.setenv("HOTSWAP_SERVE_SLOTS", "1")
    core = tiny_settings(tiny_folders["llama"], home=tmp_path / "users")
    with prepared_home(core, 2) as home:
        store = ArtifactStore(home.core.home / "store")
        assert {adapter.digest for adapter in home.adapters} == store.digests()
        assert "HOTSWAP_SERVE_SLOTS" not in home.environment
        assert (str(home.core.home), str(RANK)) == (
            home.environment["HOTSWAP_HOME"],
            home.environment["HOTSWAP_MAX_RANK"],
        )
        assert home.core.base == core.base
        temporary = home.core.home
    assert not temporary.exists()
    assert ["bases"] == [path.name for path in core.home.iterdir()]
