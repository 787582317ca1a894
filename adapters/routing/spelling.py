"""Finds the word that was meant where one letter is wrong: missing, doubled, swapped with its neighbour or another."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["Speller", "correct_spelling"]

_MAX_CORRECTED = 12  # words in a text: what nonsense may cost is bounded
_MIN_LETTERS = 4  # shorter words have too many neighbours
_MAX_LETTERS = 24


class Speller:
    """Knows words, of which the earlier ones are the likelier. Any script; takes some 100 bytes a word.

    Words are found by what is left of them without one letter: two that differ in one slip have such a rest in common.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = [word for word in dict.fromkeys(words) if _is_fit(word)]
        self._known = frozenset(self._words)
        rests = [_hash_rests(word) for word in self._words]
        hashes = np.fromiter((rest for own in rests for rest in own), dtype=np.uint32)
        owners = np.repeat(np.arange(len(rests), dtype=np.int32), [*map(len, rests)])
        order = np.argsort(hashes, kind="stable")
        self._rests, self._owners = hashes[order], owners[order]

    @property
    def words(self) -> tuple[str, ...]:
        """What it knows, the likelier words first."""
        return tuple(self._words)

    def __contains__(self, word: str) -> bool:
        return word in self._known

    def correct(self, word: str) -> str | None:
        """The likeliest of the known words that are one slip away; None if there is none, or the word is too short."""
        if not _is_fit(word):
            return None
        hashes = np.array(_hash_rests(word), dtype=np.uint32)
        begins, ends = (np.searchsorted(self._rests, hashes, side=side) for side in ("left", "right"))
        owners = {int(owner) for begin, end in zip(begins, ends, strict=True) for owner in self._owners[begin:end]}
        return next((self._words[owner] for owner in sorted(owners) if _is_one_slip(word, self._words[owner])), None)


def correct_spelling(text: str, spellers: Sequence[Speller]) -> str:
    """The normalised text with those words replaced that no speller knows, by the first that knows what was meant."""
    words = text.split(" ")
    unknown = [place for place, word in enumerate(words) if _is_fit(word) and not any(word in own for own in spellers)]
    for place in unknown[:_MAX_CORRECTED]:
        meant = (speller.correct(words[place]) for speller in spellers)
        words[place] = next(filter(None, meant), words[place])
    return " ".join(words)


def _is_fit(word: str) -> bool:
    return _MIN_LETTERS <= len(word) <= _MAX_LETTERS and word.isalpha()


def _hash_rests(word: str) -> list[int]:
    """Hashes of the word and of what is left of it without one letter."""
    rests = {word, *(word[:place] + word[place + 1 :] for place in range(len(word)))}
    return [zlib.crc32(rest.encode()) for rest in rests]


def _is_one_slip(one: str, other: str) -> bool:
    """Whether one letter was left out, put in, replaced, or swapped with the next."""
    shorter, longer = sorted((one, other), key=len)
    same = next((place for place, letter in enumerate(shorter) if letter != longer[place]), len(shorter))
    rest, long_rest = shorter[same:], longer[same:]
    if len(shorter) != len(longer):
        return rest == long_rest[1:]
    return rest[1:] == long_rest[1:] or (rest[:2] == long_rest[:2][::-1] and rest[2:] == long_rest[2:])
