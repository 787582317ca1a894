"""The base model's own token embeddings as a source of meaning: words that were never in a prompt still lie somewhere.

Rows are read from the model's file where they lie, mapped into memory: no model is loaded, and processes share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

__all__ = ["TokenEmbeddings", "open_embeddings"]

_TENSOR = "model.embed_tokens.weight"  # of every family that is supported
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20
_MAX_TOKENS = 512
_SAMPLE_ROWS = 4096
_KINDS: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class TokenEmbeddings:
    """Tokens and their embeddings, scaled so that every dimension has mean 0 and deviation 1.

    Args:
        tokenizer: The base model's.
        table: `[vocab_size, hidden_size]`; uint16 holds the upper half of a float32 (bfloat16).

    `identity` is a hash by which the embeddings of different models are told apart.
    """

    def __init__(self, tokenizer: Tokenizer, table: npt.NDArray[Any]) -> None:
        self._tokenizer = tokenizer
        self._table = np.asarray(table)  # still mapped; numpy's own class for that takes its time for each row
        sample = self._rows(np.linspace(0, len(table) - 1, min(_SAMPLE_ROWS, len(table)), dtype=np.int64))
        self._mean = sample.mean(axis=0)
        self._scale = 1 / (sample.std(axis=0) + 1e-6)
        self.identity = hashlib.sha256(self._mean.tobytes() + self._scale.tobytes()).hexdigest()

    @property
    def size(self) -> int:
        """The length of an embedding."""
        return int(self._table.shape[1])

    def tokens(self, text: str) -> npt.NDArray[np.int64]:
        """The tokens of a text; the space in front is what words within a text have."""
        found: Sequence[int] = self._tokenizer.encode(" " + text, add_special_tokens=False).ids[:_MAX_TOKENS]
        return np.array(found, dtype=np.int64)

    def rows(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The scaled embeddings of some tokens, `[num_tokens, size]`."""
        return np.asarray((self._rows(tokens) - self._mean) * self._scale, dtype=np.float32)

    def _rows(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        rows = self._table[tokens]
        if rows.dtype == np.uint16:
            return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.asarray(rows, dtype=np.float32)


def open_embeddings(base_folder: Path) -> TokenEmbeddings | None:
    """The embeddings of a base model; None if its folder has no file of a known form: a router then does without."""
    tokenizer_path = base_folder / "tokenizer.json"
    file = _find_file(base_folder)
    if file is None or not tokenizer_path.is_file():
        return None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
    entry = header.get(_TENSOR)
    if entry is None or entry["dtype"] not in _KINDS:
        return None
    offset = 8 + length + int(entry["data_offsets"][0])
    table = np.memmap(file, dtype=_KINDS[entry["dtype"]], mode="r", offset=offset, shape=tuple(entry["shape"]))
    return TokenEmbeddings(Tokenizer.from_file(str(tokenizer_path)), table)


def _find_file(base_folder: Path) -> Path | None:
    """The file that holds the embeddings: the only one, or the one that the index of several names."""
    index = base_folder / _INDEX
    name = "model.safetensors"
    if index.is_file():
        name = Path(json.loads(index.read_bytes())["weight_map"].get(_TENSOR, name)).name
    path = base_folder / name
    return path if path.is_file() else None
