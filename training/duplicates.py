"""Finds equal and nearly equal texts among many, in a time that grows with their length alone.

Two texts are near duplicates if they share most of their runs of eight bytes (Jaccard index), after case, spaces,
digits and punctuation are evened out. Candidates come from MinHash signatures in bands (Broder 1997; Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, section 3.4); each is then compared exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.chat_rows import Row, row_document

__all__ = ["NEAR_SIMILARITY", "Duplicate", "find_duplicates", "find_repeated"]

NEAR_SIMILARITY = 0.8
_NUM_BANDS, _ROWS_A_BAND = 10, 5  # finds 98 % of the pairs at a similarity of 0.8, and nearly all above
_SHINGLE_BYTES = 8
_MAX_SKETCHED_BYTES = 8192
_UNEVEN = re.compile(r"[\W\d_]+")
_PRIME = np.uint64(0x100000001B3)  # the multiplier of the FNV hash
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A text that repeats an earlier one; both by their index."""

    index: int
    first: int
    is_exact: bool


def find_duplicates(texts: Sequence[str], *, max_near: int = 200_000) -> list[Duplicate]:
    """Texts that repeat an earlier one, in order, each with the first that it repeats.

    Near duplicates are looked for among the first `max_near` texts, by the first 8 kB of each: 100,000 texts of 500
    letters take some 10 s on one core.
    """
    found: list[Duplicate] = []
    by_text: dict[str, int] = {}
    sketches = _Sketches(texts)
    for index, text in enumerate(texts):
        first = by_text.setdefault(text, index)
        if first != index:
            found.append(Duplicate(index, first, is_exact=True))
        elif index < max_near and (near := sketches.add(index)) is not None:
            found.append(Duplicate(index, near, is_exact=False))
    return found


def find_repeated(rows: Sequence[Row]) -> list[int]:
    """Indices of rows that equal an earlier one in all that is trained on: texts, weights, labels and tools."""
    seen: set[str] = set()
    found: list[int] = []
    for index, row in enumerate(rows):
        content = json.dumps(row_document(row), sort_keys=True)
        if content in seen:
            found.append(index)
        seen.add(content)
    return found


class _Sketches:
    """The texts seen, by the bands of their signatures."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        generator = np.random.default_rng(0)
        num_hashes = _NUM_BANDS * _ROWS_A_BAND
        # Odd, so that multiplying is a permutation of the 64-bit numbers.
        self._factors = generator.integers(1, 2**63, num_hashes, dtype=np.uint64)[:, None] * np.uint64(2) + np.uint64(1)
        self._buckets: dict[tuple[int, bytes], int] = {}

    def add(self, index: int) -> int | None:
        """Remember a text; gives the first of those seen that it nearly equals."""
        shingles = _shingle(self._texts[index])
        if not len(shingles):
            return None
        signature = (self._factors * shingles[None, :]).min(axis=1).reshape(_NUM_BANDS, _ROWS_A_BAND)
        keys = [(band, signature[band].tobytes()) for band in range(_NUM_BANDS)]
        for other in sorted({self._buckets[key] for key in keys if key in self._buckets}):
            if _similarity(shingles, _shingle(self._texts[other])) >= NEAR_SIMILARITY:
                return other
        for key in keys:
            self._buckets.setdefault(key, index)
        return None


def _shingle(text: str) -> _Hashes:
    """The hashes of all runs of eight bytes; of a shorter text that of the whole."""
    even = _UNEVEN.sub(" ", text.lower()).strip().encode(errors="replace")[:_MAX_SKETCHED_BYTES]
    values = np.frombuffer(even, dtype=np.uint8).astype(np.uint64)
    width = min(_SHINGLE_BYTES, len(values))
    hashes = np.zeros(max(0, len(values) - width + 1), dtype=np.uint64)
    for offset in range(width):
        hashes = hashes * _PRIME + values[offset : offset + len(hashes)]
    return _mix(hashes) if width else hashes[:0]


def _mix(hashes: _Hashes) -> _Hashes:
    # Neighbouring values must not stay neighbours: MinHash takes the least.
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return hashes ^ (hashes >> np.uint64(33))


def _similarity(one: _Hashes, other: _Hashes) -> float:
    one, other = np.unique(one), np.unique(other)
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
