"""The manifest of an adapter version: what it was made from, and every file's hash. Its own hash names the version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import IntegrityError

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_WEIGHTS_FILE",
    "MANIFEST_FILE",
    "BaseReference",
    "DataReference",
    "FileReference",
    "Manifest",
    "hash_file",
    "read_manifest",
]

MANIFEST_FILE = "manifest.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_CHUNK_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseReference(_Strict):
    """The base model that a version belongs to."""

    name: str
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    quantisation: str


class DataReference(_Strict):
    """The data that a version was trained on: hashes and counts, never the rows."""

    train_sha256: str
    num_train_rows: int
    validation_sha256: str | None = None
    num_validation_rows: int = 0


class FileReference(_Strict):
    """One file of a version."""

    sha256: str
    size_bytes: int


class Manifest(_Strict):
    """Everything that is recorded about a version. It holds no clock time, so equal content has an equal name."""

    format: Literal[1] = 1
    source: Literal["trained", "imported"]
    base: BaseReference
    rank: int
    alpha: float
    target_modules: list[str]
    data: DataReference | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    chat_template_sha256: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileReference] = Field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The canonical JSON that is stored and hashed."""
        return json.dumps(self.model_dump(), sort_keys=True, indent=1, ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; it covers every file through `files`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        IntegrityError: there is none, or it is not a manifest of this format.
    """
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing") from None
    except ValidationError as error:
        raise IntegrityError(f"{path} is not a manifest: {error.errors()[0]['msg']}") from None
