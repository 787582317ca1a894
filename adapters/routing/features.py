"""From a text to hashed n-grams of words and characters, and from those to weighted vectors. Knows no aliases.

Hashes are computed here, over whole arrays: Python's own differ from process to process, and a vocabulary of strings
would be several times as slow and large as one of numbers.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_CHARS", "Grams", "Vectors", "Vocabulary", "count_grams", "learn_vocabulary", "normalise"]

MAX_CHARS = 1200  # of a text, from its beginning and its end: what one choice may cost is bounded
_CHAR_SIZES = (3, 4, 5)
_MIN_DOCUMENTS = 2  # an n-gram of one text alone tells nothing of its domain
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_URL = re.compile(r"\b(?:https?://|www\.)\S{1,500}")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")

IdArray = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float32]


def normalise(text: str) -> str:
    """The text without what says nothing of its topic: case, kinds of space and quotes, which number, which address."""
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS // 2]} {text[-MAX_CHARS // 2 :]}"
    text = text.encode("utf-8", "ignore").decode()  # half a surrogate pair has no bytes to hash
    text = unicodedata.normalize("NFKC", text)[: 2 * MAX_CHARS].casefold().replace("\u2019", "'")
    text = _NUMBER.sub("0", _URL.sub(" url ", text))
    return " ".join(_WORD.findall(text))


@dataclass(frozen=True, slots=True)
class Grams:
    """The distinct n-grams of one text, by kind: hashes in ascending order, and how often each occurs."""

    words: tuple[IdArray, FloatArray]
    chars: tuple[IdArray, FloatArray]


def count_grams(text: str) -> Grams:
    """Words, pairs of words and characters within words of a text that `normalise` made."""
    words = text.split(" ") if text else []
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    pairs = _mix(hashes[:-1] * _MULTIPLIER + hashes[1:], 2)
    return Grams(_count(np.concatenate([_mix(hashes, 1), pairs])), _count(_char_hashes(text)))


def _char_hashes(text: str) -> IdArray:
    """Hashes of the characters in windows of several sizes; a space may stand at a window's end, not within."""
    codes = np.array([*map(ord, f" {text} ")], dtype=np.uint64)
    spaces = np.cumsum(codes == ord(" "))
    found = []
    for size in _CHAR_SIZES:
        num_windows = len(codes) - size + 1
        if num_windows <= 0:
            continue
        rolled = codes[:num_windows]
        for offset in range(1, size):
            rolled = rolled * _MULTIPLIER + codes[offset : offset + num_windows]
        within = spaces[size - 2 : size - 2 + num_windows] - spaces[:num_windows]
        found.append(_mix(rolled[within == 0], size + 10))
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


def _mix(values: IdArray, kind: int) -> IdArray:
    """Spread the bits, so that values which are near each other collide no more often than others."""
    mixed = (values + np.uint64(kind)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def _count(hashes: IdArray) -> tuple[IdArray, FloatArray]:
    ids, counts = np.unique(hashes, return_counts=True)
    return ids, counts.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Vectors:
    """Sparse vectors of length 1, or 0 where nothing of a text is known: row i holds `starts[i]` to `starts[i + 1]`."""

    columns: npt.NDArray[np.int32]
    values: FloatArray
    starts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """N-grams that count, `ids` ascending, with their weights; words and characters make up half of a vector each."""

    ids: IdArray
    weights: FloatArray

    def vectorise(self, texts: Sequence[Grams]) -> Vectors:
        """Weighted vectors: (1 + log count) times the inverse document frequency."""
        columns, values = [], []
        starts = np.zeros(len(texts) + 1, dtype=np.int64)
        for number, grams in enumerate(texts):
            parts = [self._part(*grams.words), self._part(*grams.chars)]
            norm = np.sqrt(sum(float(part @ part) > 0 for _, part in parts) or 1)
            for places, part in parts:
                columns.append(places)
                length = np.sqrt(float(part @ part))
                values.append(part / (length * norm) if length else part)
            starts[number + 1] = starts[number] + sum(len(places) for places, _ in parts)
        return Vectors(
            np.concatenate(columns).astype(np.int32) if columns else np.empty(0, np.int32),
            np.concatenate(values).astype(np.float32) if values else np.empty(0, np.float32),
            starts,
        )

    def _part(self, ids: IdArray, counts: FloatArray) -> tuple[npt.NDArray[np.int64], FloatArray]:
        places = np.searchsorted(self.ids, ids)
        places[places == len(self.ids)] = 0
        is_known = self.ids[places] == ids if len(self.ids) else np.zeros(len(ids), dtype=bool)
        places = places[is_known]
        return places, (1 + np.log(counts[is_known])) * self.weights[places]


def learn_vocabulary(texts: Sequence[Grams]) -> Vocabulary:
    """The n-grams that at least two texts have, weighted by how few have them: log((1 + n) / (1 + df)) + 1."""
    found = [part for grams in texts for part in (grams.words[0], grams.chars[0])]
    ids, frequencies = np.unique(np.concatenate(found), return_counts=True)
    is_kept = frequencies >= _MIN_DOCUMENTS
    weights = np.log((1 + len(texts)) / (1 + frequencies[is_kept])) + 1
    return Vocabulary(ids[is_kept], weights.astype(np.float32))
