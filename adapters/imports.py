"""Adapters that come from elsewhere or go there: a folder in PEFT's layout in, a folder in PEFT's layout out."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_files import compute_fingerprint, public_name, pull_base
from adapters.errors import AdapterConfigError, ConflictError, FingerprintMismatchError, RankTooHighError
from adapters.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MANIFEST_FILE,
    BaseReference,
    Manifest,
    hash_file,
    read_manifest,
)
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings

__all__ = ["export_version", "import_folder"]


def import_folder(
    folder: Path, alias: str, *, core: CoreSettings, registry: Registry, promote: bool = True
) -> tuple[NumberedVersion, bool]:
    """Check an adapter as strictly as the engine will, and publish it.

    Args:
        folder: PEFT's layout; with a manifest of ours its base model must be the configured one, without one it is
            taken to be.
        alias: The name to publish under.
        core: Names the base model.
        registry: Where to publish.
        promote: Whether the alias moves to it.

    Raises:
        AdapterRejectedError: it can't be served on the base model; says why.
    """
    from adapters.base_model import read_module_shapes

    check_alias_name(alias)
    if not folder.is_dir():
        raise AdapterConfigError(f"{folder} is not a folder; expected a LoRA adapter in PEFT's layout")
    base_folder = pull_base(core.base, core.home)
    fingerprint = compute_fingerprint(base_folder, quantisation=core.quantisation)
    config = read_adapter_config(folder)
    if config.r > core.max_rank:
        raise RankTooHighError(rank=config.r, max_rank=core.max_rank)
    weights = read_adapter_weights(folder, config, read_module_shapes(base_folder))
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        if manifest.base.fingerprint != fingerprint:
            raise FingerprintMismatchError(adapter=manifest.base.fingerprint, base=fingerprint)
        _check_files(folder, manifest)
    else:
        manifest = Manifest(
            source="imported",
            base=BaseReference(name=public_name(core.base), fingerprint=fingerprint, quantisation=core.quantisation),
            rank=config.r,
            alpha=config.lora_alpha,
            target_modules=sorted({module.rsplit(".", 1)[-1] for module in weights.modules}),
        )
    return registry.publish(folder, manifest, alias=alias, promote=promote)


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        expected = manifest.files[name].sha256 if name in manifest.files else "no such file"
        if (found := hash_file(folder / name)) != expected:
            raise AdapterConfigError(
                f"{folder / name} is not the file of its manifest (expected sha256 {expected}, found {found}); "
                f"to import it as a new adapter, delete {MANIFEST_FILE} first"
            )


def export_version(registry: Registry, version: NumberedVersion, target: Path) -> None:
    """Copy a version's files, checked against its manifest, to a folder that must not exist yet.

    Raises:
        ConflictError: the target exists.
        IntegrityError: a stored file is not what its manifest says.
    """
    if target.exists():
        raise ConflictError(f"{target} exists already; give a folder to create")
    registry.store.verify(version.version.digest)
    shutil.copytree(registry.store.folder(version.version.digest), target)
