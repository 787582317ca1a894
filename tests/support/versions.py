"""Publishing without a model: folders in PEFT's layout whose weights file is any text, and a manifest for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapters.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    REWARD_HEAD_FILE,
    BaseReference,
    Manifest,
)
from adapters.records import NumberedVersion, VersionKind
from adapters.registry import Registry

PLAIN_MANIFEST = Manifest(
    source="imported",
    base=BaseReference(name="tiny", fingerprint="f" * 64, quantisation="none"),
    rank=4,
    alpha=8,
    target_modules=["q_proj"],
)


def write_files(folder: Path, content: str) -> Path:
    """Write the two files that the store takes; it doesn't look into them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG_FILE).write_text("{}")
    (folder / ADAPTER_WEIGHTS_FILE).write_text(content)
    return folder


def publish_text(
    registry: Registry,
    content: str,
    *,
    alias: str = "legal",
    promote: bool = True,
    kind: VersionKind = "chat",
    prompts: Sequence[str] = (),
) -> NumberedVersion:
    """Publish a version that is made of `content`."""
    source = write_files(registry.store.root.parent / "sources" / alias, content)
    (source / REWARD_HEAD_FILE).write_text(content)  # which is taken with a reward version alone
    manifest = PLAIN_MANIFEST.model_copy(update={"kind": kind})
    version, _ = registry.publish(source, manifest, alias=alias, promote=promote, prompts=prompts)
    return version
