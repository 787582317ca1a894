"""Import checks as strictly as the engine; export and import again give the same version."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import AdapterManifestError, RankTooHighError
from adapters.imports import export_version, import_folder
from adapters.registry import Registry
from adapters.settings import CoreSettings
from tests.support.tiny import save_random_adapter, tiny_settings


@pytest.fixture
def core(tmp_path: Path, tiny_folders: dict[str, Path]) -> CoreSettings:
    """Settings over a tiny Llama."""
    return tiny_settings(tiny_folders["llama"], home=tmp_path)


def test_import_refuses_an_export_when_its_weights_were_changed(
    core: CoreSettings, registry: Registry, tmp_path: Path
) -> None:
    """The manifest's lineage belongs to the files that it names, and to no others."""
    folder = save_random_adapter(tmp_path / "one", Path(core.base), seed=1)
    published, _ = import_folder(folder, "legal", core=core, registry=registry)
    export_version(registry, published, tmp_path / "exported")
    other = save_random_adapter(tmp_path / "two", Path(core.base), seed=2)
    (tmp_path / "exported/adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterManifestError, match=r"^adapter_model\.safetensors is not the file of its manifest"):
        import_folder(tmp_path / "exported", "legal", core=core, registry=registry)


def test_import_refuses_a_rank_when_no_slot_could_hold_it(
    core: CoreSettings, registry: Registry, tmp_path: Path
) -> None:
    """An alias never points to what the server must refuse; both ranks are named."""
    folder = save_random_adapter(tmp_path / "one", Path(core.base), seed=1, rank=17)
    with pytest.raises(RankTooHighError, match="rank 17, but slots hold at most rank 16"):
        import_folder(folder, "legal", core=core, registry=registry)
    assert registry.aliases() == []
