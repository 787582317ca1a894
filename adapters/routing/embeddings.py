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

from adapters.routing.spelling import Speller

__all__ = ["TokenEmbeddings", "open_embeddings"]

_TENSOR = "model.embed_tokens.weight"  # of every family that is supported
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20
_MAX_TOKENS = 16  # of one word
_SPACES = ("\u0120", "\u2581")  # how tokenizers write the space before a word
_SAMPLE_ROWS = 4096
_KINDS: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class TokenEmbeddings:
    """Words and their embeddings, each of length 1 after every dimension was given mean 0 and deviation 1.

    Args:
        tokenizer: The base model's.
        table: `[vocab_size, hidden_size]`; uint16 holds the upper half of a float32 (bfloat16).

    `identity` is a hash by which the embeddings of different models are told apart. `speller` knows the words that are
    one token, the frequent ones first.
    """

    def __init__(self, tokenizer: Tokenizer, table: npt.NDArray[Any]) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._table = np.asarray(table)  # still mapped; numpy's own class for that takes its time for each row
        places = np.linspace(0, len(table) - 1, min(_SAMPLE_ROWS, len(table)), dtype=np.int64)
        sample = self._rows(places)
        self._mean = sample.mean(axis=0)
        self._scale = 1 / (sample.std(axis=0) + 1e-6)
        # Of what lies in the file: sums may differ in their last bits between two machines.
        self.identity = hashlib.sha256(f"{table.shape}".encode() + self._table[places].tobytes()).hexdigest()
        self._tokens = _whole_words(tokenizer, len(table))
        self.speller = Speller(self._tokens)

    @property
    def size(self) -> int:
        """The length of an embedding."""
        return int(self._table.shape[1])

    def rows(self, words: Sequence[str]) -> npt.NDArray[np.float32]:
        """The embeddings of some words in lower case, `[num_words, size]`: the mean over a word's tokens."""
        tokens = [self._tokens_of(word) for word in words]
        if not tokens:
            return np.empty((0, self.size), dtype=np.float32)
        flat = np.array([token for own in tokens for token in own], dtype=np.int64)
        scaled = (self._rows(flat) - self._mean) * self._scale
        ends = np.cumsum([*map(len, tokens)])
        sums = scaled[ends - 1]
        for number in np.flatnonzero(np.diff(ends, prepend=0) > 1):  # few: most words are one token
            sums[number] = scaled[ends[number] - len(tokens[number]) : ends[number]].sum(axis=0)
        return np.asarray(sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-9), dtype=np.float32)

    def _tokens_of(self, word: str) -> list[int]:
        if (token := self._tokens.get(word)) is not None:
            return [token]
        # The space in front is what words within a text have.
        found: list[int] = self._tokenizer.encode(" " + word, add_special_tokens=False).ids[:_MAX_TOKENS]
        return [token for token in found if token < len(self._table)] or [0]

    def _rows(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        rows = self._table[tokens]
        if rows.dtype == np.uint16:
            return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.asarray(rows, dtype=np.float32)


def _whole_words(tokenizer: Tokenizer, num_rows: int) -> dict[str, int]:
    """The words that are one token, in lower case, frequent ones first; a name is found though it is written small."""
    marked = sorted(token for name, token in tokenizer.get_vocab().items() if name[:1] in _SPACES and token < num_rows)
    words = [text.strip() for text in tokenizer.decode_batch([[token] for token in marked])]
    pairs = [(word, token) for word, token in zip(words, marked, strict=True) if word.isalpha()]
    found = {word: token for word, token in reversed(pairs) if word.islower()}
    for word, token in pairs:
        found.setdefault(word.casefold(), token)
    return dict(sorted(found.items(), key=lambda item: item[1]))


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
