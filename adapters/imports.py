"""Adapters that come from elsewhere or go there: a folder in PEFT's layout, or an archive, in; a folder out."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from adapters.adapter_files import (
    parse_adapter_config,
    parse_adapter_weights,
    read_config_bytes,
    read_weights_bytes,
)
from adapters.archive import unpack_archive
from adapters.base_files import compute_fingerprint, public_name, pull_base
from adapters.errors import (
    AdapterConfigError,
    AdapterManifestError,
    ConflictError,
    FingerprintMismatchError,
    IntegrityError,
)
from adapters.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MANIFEST_FILE,
    REWARD_HEAD_FILE,
    BaseReference,
    Manifest,
    read_manifest,
)
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.reward_head import parse_reward_head, read_reward_head_bytes
from adapters.settings import CoreSettings

__all__ = ["export_version", "import_archive", "import_folder"]

_PROGRAM_SUFFIXES = frozenset({".bat", ".dll", ".dylib", ".exe", ".py", ".pyc", ".sh", ".so"})
_PROGRAM_BEGINNINGS = (b"#!", b"\x7fELF", b"MZ")


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
    check_alias_name(alias)
    if not folder.is_dir():
        raise AdapterConfigError(f"{folder} is not a folder; expected a LoRA adapter in PEFT's layout")
    _refuse_programs(folder)
    base_folder = pull_base(core.base, core.home)
    base = BaseReference(
        name=public_name(core.base),
        fingerprint=compute_fingerprint(base_folder, quantisation=core.quantisation),
        quantisation=core.quantisation,
    )
    contents, manifest = _check(folder, base, base_folder, core.max_rank)
    # What is published are the bytes that were checked, whatever happens to the folder meanwhile.
    with registry.store.scratch() as copy:
        for name, content in contents.items():
            (copy / name).write_bytes(content)
        return registry.publish(copy, manifest, alias=alias, promote=promote, action="import")


def import_archive(
    archive: Path, alias: str, *, core: CoreSettings, registry: Registry, promote: bool = True
) -> tuple[NumberedVersion, bool]:
    """Check an adapter in a tar archive, as the export gives it, and publish it; otherwise as `import_folder`."""
    with registry.store.scratch() as folder:
        unpack_archive(archive, folder)
        return import_folder(folder, alias, core=core, registry=registry, promote=promote)


def _check(
    folder: Path, base: BaseReference, base_folder: Path, max_rank: int
) -> tuple[dict[str, bytearray], Manifest]:
    """Read each file once and check it; the manifest is the folder's own, or one made from what was found."""
    from adapters.base_model import read_hidden_size, read_module_shapes

    shapes = read_module_shapes(base_folder)
    contents = {ADAPTER_CONFIG_FILE: read_config_bytes(folder)}
    config = parse_adapter_config(contents[ADAPTER_CONFIG_FILE])
    config.check_rank(max_rank)
    contents[ADAPTER_WEIGHTS_FILE] = read_weights_bytes(folder, config, shapes)
    weights = parse_adapter_weights(contents[ADAPTER_WEIGHTS_FILE], config, shapes)
    is_reward_model = os.path.lexists(folder / REWARD_HEAD_FILE)
    if is_reward_model:
        contents[REWARD_HEAD_FILE] = read_reward_head_bytes(folder)
        parse_reward_head(contents[REWARD_HEAD_FILE], read_hidden_size(base_folder))
    made = Manifest(
        source="imported",
        kind="reward" if is_reward_model else "chat",
        base=base,
        rank=weights.rank,
        alpha=config.lora_alpha,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in weights.modules}),
    )
    if not os.path.lexists(folder / MANIFEST_FILE):
        return contents, made
    manifest = _read_manifest(folder)
    if manifest.base.fingerprint != base.fingerprint:
        raise FingerprintMismatchError(adapter=manifest.base.fingerprint, base=base.fingerprint)
    _check_manifest(manifest, made, contents)
    return contents, manifest


def _read_manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except IntegrityError as error:
        # In the store that would be damage; here it is what somebody gave us, and they are told.
        raise AdapterManifestError(str(error)) from None


def _check_manifest(manifest: Manifest, made: Manifest, contents: dict[str, bytearray]) -> None:
    for name, content in contents.items():
        expected = manifest.files[name].sha256 if name in manifest.files else "no such file"
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise AdapterManifestError(
                f"{name} is not the file of its manifest (expected sha256 {expected}, found {found}); "
                f"to import it as a new adapter, delete {MANIFEST_FILE} first"
            )
    if manifest.kind != made.kind:
        has = "is" if made.kind == "reward" else "is not"
        raise AdapterManifestError(f"{MANIFEST_FILE} says kind {manifest.kind}, but {REWARD_HEAD_FILE} {has} there")
    if (manifest.rank, manifest.alpha) != (made.rank, made.alpha):
        raise AdapterManifestError(
            f"{MANIFEST_FILE} says rank {manifest.rank} and alpha {manifest.alpha:g}, "
            f"the adapter has rank {made.rank} and alpha {made.alpha:g}"
        )


def _refuse_programs(folder: Path) -> None:
    """An adapter is data alone; whoever ships a program with it expects somebody to run it."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PROGRAM_SUFFIXES or _begins_like_a_program(path):
            raise AdapterConfigError(f"the folder holds a program, {path.name!r:.120}; an adapter is data alone")


def _begins_like_a_program(path: Path) -> bool:
    # By content, not by mode: on some mounted disks every file is executable.
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PROGRAM_BEGINNINGS)


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
