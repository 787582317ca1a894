"""The manifest of an adapter version: what it was made from, and every file's hash. Its own hash names the version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import IntegrityError
from adapters.gate_report import GateReport
from adapters.regular_files import read_regular

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_WEIGHTS_FILE",
    "MANIFEST_FILE",
    "REWARD_HEAD_FILE",
    "BaseReference",
    "DataReference",
    "FileReference",
    "Manifest",
    "hash_file",
    "parse_manifest",
    "read_manifest",
    "read_manifest_bytes",
]

MANIFEST_FILE = "manifest.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
REWARD_HEAD_FILE = "reward_head.safetensors"
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 4 << 20
# Fields that came later: a manifest without them keeps the bytes, and so the name, that it always had.
_LATER_FIELDS = ("kind", "method", "parent", "gate")

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A name that stays in its folder: manifests come from elsewhere too.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseReference(_Strict):
    """The base model that a version belongs to."""

    name: str
    fingerprint: _Sha256
    quantisation: str


class DataReference(_Strict):
    """The data that a version was trained on: hashes and counts, never the rows.

    With a `validation_share`, the validation rows are those that it holds out of the training file, by their content.
    """

    train_sha256: str
    num_train_rows: int
    validation_sha256: str | None = None
    num_validation_rows: int = 0
    validation_share: float | None = Field(None, gt=0, lt=1)


class FileReference(_Strict):
    """One file of a version."""

    sha256: _Sha256
    size_bytes: int = Field(ge=0)


class Manifest(_Strict):
    """Everything that is recorded about a version. It holds no clock time, so equal content has an equal name.

    A version of kind `reward` scores conversations: a `REWARD_HEAD_FILE` stands beside its adapter, and nobody can chat
    with it. `parent` is the digest of the version that training went on from.
    """

    format: Literal[1] = 1
    source: Literal["trained", "imported"]
    base: BaseReference
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: list[str]
    data: DataReference | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    chat_template_sha256: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    files: dict[_FileName, FileReference] = Field(default_factory=dict)
    kind: Literal["chat", "reward"] = "chat"
    method: str | None = Field(None, max_length=32)
    parent: _Sha256 | None = None
    gate: GateReport | None = None

    def to_bytes(self) -> bytes:
        """The canonical JSON that is stored and hashed."""
        document = self.model_dump()
        for name in _LATER_FIELDS:
            if document[name] == type(self).model_fields[name].default:
                del document[name]
        if self.data is not None and self.data.validation_share is None:
            del document["data"]["validation_share"]
        return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False).encode()

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that a version of this kind has beside its manifest."""
        files = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
        return (*files, REWARD_HEAD_FILE) if self.kind == "reward" else files

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
    """Read a folder's manifest. Messages don't name the folder: it may be a temporary one of an upload.

    Raises:
        IntegrityError: there is none, or it is not a manifest of this format.
    """
    return parse_manifest(read_manifest_bytes(folder), Path(MANIFEST_FILE))


def read_manifest_bytes(folder: Path) -> bytearray:
    """The content of a folder's manifest.

    Raises:
        IntegrityError: there is none, or it is no plain file of a manifest's size.
    """
    path = folder / MANIFEST_FILE
    try:
        return read_regular(path, max_bytes=_MAX_MANIFEST_BYTES, error=IntegrityError)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing") from None


def parse_manifest(content: bytes | bytearray, path: Path) -> Manifest:
    """Parse a manifest's content; `path` is for the message.

    Raises:
        IntegrityError: it is not a manifest of this format; names the field.
    """
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise IntegrityError(f"{path} is not a manifest: {field:.120}: {detail['msg']}") from None
