"""Which token wrote which part of an answer, for clients that ask for log-probabilities."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from server.engine.core import TokenLogprob

__all__ = ["TokenBytes", "TokenTrail"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies write single bytes
_WORD_START = "\u2581"  # what they write for a space
_BYTE_LEVEL_SPACE = "\u0120"  # what byte-level vocabularies write for a space; each of them has it


class TokenBytes:
    """The bytes that each token of a vocabulary stands for by itself; a special token stands for none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """One token's bytes."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    @cached_property
    def special(self) -> frozenset[int]:
        """The special tokens, which add nothing to a text."""
        return frozenset(self._tokenizer.all_special_ids)

    @cached_property
    def _letters(self) -> dict[str, int]:
        """The letters of a byte-level vocabulary; empty for any other."""
        return _bytes_of_letters() if _BYTE_LEVEL_SPACE in self._tokenizer.get_vocab() else {}

    def _read(self, token: int) -> bytes:
        if token in self.special:
            return b""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._letters and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(_WORD_START, " ").encode()


class TokenTrail:
    """Follows one answer's text and hands out each token's log-probability once all of its text has been shown.

    Text that a stop string cuts off takes its tokens along; a token that is cut in the middle keeps what was shown.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._open: list[TokenLogprob] = []  # tokens of a character that is not complete
        self._open_text = ""  # what of them was decoded nevertheless: broken characters
        self._written: deque[_Piece] = deque()  # text that is decoded and not yet shown
        self._num_shown = 0  # characters shown of the pieces in `_written`

    def add(self, entry: TokenLogprob) -> None:
        """Take note of the token that was generated last."""
        self._open.append(entry)

    def write(self, text: str, *, is_complete: bool = True) -> None:
        """What was decoded since the last call; `is_complete` unless the last token ends in half a character."""
        self._open_text += text
        if is_complete and self._open:
            self._written.append(_Piece(self._open_text, self._divide(self._open_text)))
            self._open, self._open_text = [], ""

    def show(self, num_characters: int) -> tuple[TokenLogprob, ...]:
        """The tokens that are done after so many more characters were shown."""
        self._num_shown += num_characters
        done: list[TokenLogprob] = []
        while self._written and len(self._written[0].text) <= self._num_shown:
            piece = self._written.popleft()
            self._num_shown -= len(piece.text)
            done += piece.entries
        return tuple(done)

    def end(self) -> tuple[TokenLogprob, ...]:
        """The token in whose text the answer was cut off, if there is one."""
        if not self._num_shown:
            return ()
        piece = self._written[0]
        return (replace(piece.entries[-1], text_bytes=piece.text[: self._num_shown].encode()),)

    def _divide(self, text: str) -> tuple[TokenLogprob, ...]:
        """Give each open token its own bytes of their text; where these don't make the text, the last one has all."""
        own = [self._token_bytes.of(entry.token) for entry in self._open]
        if b"".join(own).decode("utf-8", "replace") != text:
            own = [b""] * (len(own) - 1) + [text.encode()]
        return tuple(replace(entry, text_bytes=part) for entry, part in zip(self._open, own, strict=True))


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    entries: tuple[TokenLogprob, ...]


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable letter: its own, or the next free one from 256 on.

    Source: GPT-2's `encoder.py`, which all byte-level tokenizers follow.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
