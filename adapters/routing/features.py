"""From a text to hashed n-grams of words and characters, and from those to weighted vectors. Knows no aliases.

Hashes are computed here, over whole arrays: Python's own differ from process to process, and a vocabulary of strings
would be several times as slow and large as one of numbers.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from adapters.routing.prompts import MAX_CHARS, clip

__all__ = ["Grams", "Vectors", "Vocabulary", "count_grams", "hash_words", "learn_vocabulary", "normalise"]

_CHAR_SIZES = (3, 4, 5)
_MIN_DOCUMENTS = 2  # an n-gram of one text alone tells nothing of its domain
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_URL = re.compile(r"\b(?:https?://|www\.)\S{1,500}")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
# Vowel signs and joiners are no letters for `re`, but without them a word of Hindi or Thai falls into pieces.
_SIGNS = "\u200c\u200d" + "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in {"Mn", "Mc"})
_WORD = re.compile(rf"[\w{_SIGNS}]+(?:'[\w{_SIGNS}]+)?|[^\w\s]")

IdArray = npt.NDArray[np.uint64]
OwnerArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def normalise(text: str) -> str:
    """The text without what says nothing of its topic: case, kinds of space and quotes, which number, which address."""
    text = clip(text).encode("utf-8", "ignore").decode()  # half a surrogate pair has no bytes to hash
    text = unicodedata.normalize("NFKC", text)[: 2 * MAX_CHARS].casefold().replace("\u2019", "'")
    text = _NUMBER.sub("0", _URL.sub(" url ", text))
    return " ".join(_WORD.findall(text.replace("_", " ")))


@dataclass(frozen=True, slots=True)
class Grams:
    """The n-grams of some texts, by kind: hashes, and to which of the texts each belongs; as often as they occur."""

    words: tuple[IdArray, OwnerArray]
    chars: tuple[IdArray, OwnerArray]
    num_texts: int


def count_grams(texts: Sequence[str]) -> Grams:
    """Words, pairs of words and characters within words of texts that `normalise` made; all texts at once."""
    split = [text.split() for text in texts]
    owners = np.repeat(np.arange(len(split)), [*map(len, split)])
    hashes = hash_words([word for words in split for word in words]).astype(np.uint64)
    pairs = _mix(hashes[:-1] * _MULTIPLIER + hashes[1:], 2)
    is_pair = owners[:-1] == owners[1:]
    words = np.concatenate([_mix(hashes, 1), pairs[is_pair]]), np.concatenate([owners, owners[1:][is_pair]])
    return Grams(words, _char_hashes(texts), len(texts))


def hash_words(words: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each word, the same in every process."""
    return np.array([zlib.crc32(word.encode()) for word in words], dtype=np.int64)


def _char_hashes(texts: Sequence[str]) -> tuple[IdArray, OwnerArray]:
    """Hashes of the characters in windows of several sizes; a space may stand at a window's end, not within.

    So no window reaches over the two spaces between one text and the next.
    """
    whole = "".join(f" {text} " for text in texts)
    codes = np.frombuffer(whole.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    owners = np.repeat(np.arange(len(texts)), [len(text) + 2 for text in texts])
    spaces = np.cumsum(codes == ord(" "))
    found, found_owners = [], []
    rolled = codes
    for size in range(2, max(_CHAR_SIZES) + 1):
        num_windows = max(0, len(codes) - size + 1)
        rolled = rolled[:num_windows] * _MULTIPLIER + codes[size - 1 :]
        if size in _CHAR_SIZES:
            is_within = spaces[size - 2 : size - 2 + num_windows] == spaces[:num_windows]
            found.append(_mix(rolled[is_within], size + 10))
            found_owners.append(owners[:num_windows][is_within])
    return np.concatenate(found), np.concatenate(found_owners)


def _mix(values: IdArray, kind: int) -> IdArray:
    """Spread the bits, so that values which are near each other collide no more often than others."""
    mixed = (values + np.uint64(kind)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Sparse vectors of length 1, or 0 where nothing of a text is known: row i holds `starts[i]` to `starts[i + 1]`."""

    columns: OwnerArray
    values: FloatArray
    starts: OwnerArray

    def times(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The product with a dense matrix, `[num_texts, its columns]`; for a few texts faster than scipy's."""
        parts = [slice(begin, end) for begin, end in itertools.pairwise(self.starts)]
        return np.stack([self.values[part] @ matrix[self.columns[part]] for part in parts])

    def to_matrix(self, num_columns: int) -> Any:
        """The vectors as a sparse matrix of scipy's, `[num_texts, num_columns]`."""
        parts = (self.values, self.columns.astype(np.int32), self.starts)
        return sparse.csr_matrix(parts, shape=(len(self.starts) - 1, num_columns))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """N-grams that count, `ids` ascending, with their weights; words and characters make up half of a vector each."""

    ids: IdArray
    weights: FloatArray

    def vectorise(self, grams: Grams) -> Vectors:
        """Weighted vectors: (1 + log count) times the inverse document frequency."""
        parts = [self._part(*kind, grams.num_texts) for kind in (grams.words, grams.chars)]
        squares = [np.bincount(owners, values * values, grams.num_texts) for owners, _, values in parts]
        num_kinds = np.maximum(1, sum((own > 0).astype(int) for own in squares))
        owners, columns = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
        scaled = [part / np.sqrt(own * num_kinds)[at] for (at, _, part), own in zip(parts, squares, strict=True)]
        values = np.concatenate(scaled)
        order = np.argsort(owners, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=grams.num_texts))])
        return Vectors(columns[order], values[order].astype(np.float32), starts)

    def _part(self, ids: IdArray, owners: OwnerArray, num_texts: int) -> tuple[OwnerArray, OwnerArray, FloatArray]:
        """Of the n-grams that are known: text, column and weight."""
        if not len(self.ids):
            nothing = np.empty(0, dtype=np.int64)
            return nothing, nothing, np.empty(0, dtype=np.float32)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        is_known = self.ids[places] == ids
        keys, counts = np.unique(owners[is_known] * len(self.ids) + places[is_known], return_counts=True)
        texts, columns = np.divmod(keys, len(self.ids))
        return texts, columns, ((1 + np.log(counts)) * self.weights[columns]).astype(np.float32)


def learn_vocabulary(grams: Grams) -> Vocabulary:
    """The n-grams that at least two texts have, weighted by how few have them: log((1 + n) / (1 + df)) + 1."""
    ids, owners = (np.concatenate(both) for both in zip(grams.words, grams.chars, strict=True))
    order = np.lexsort((owners, ids))
    ids, owners = ids[order], owners[order]
    is_first = np.ones(len(ids), dtype=bool)
    is_first[1:] = (ids[1:] != ids[:-1]) | (owners[1:] != owners[:-1])
    ids, frequencies = np.unique(ids[is_first], return_counts=True)
    is_kept = frequencies >= _MIN_DOCUMENTS
    weights = np.log((1 + grams.num_texts) / (1 + frequencies[is_kept])) + 1
    return Vocabulary(ids[is_kept], weights.astype(np.float32))
