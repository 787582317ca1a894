"""From token ids to text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from typing import Any

__all__ = ["TextStream"]

_REPLACEMENT = "\ufffd"  # what a tokenizer decodes incomplete UTF-8 to


class TextStream:
    """Decodes one request's tokens incrementally and looks out for its stop strings."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0  # ids from here on are decoded, so that a token sees its left neighbour
        self._read_end = 0  # ids before here are already in the text
        self._held = ""  # text that may be the beginning of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is safe to show; a stop string and what follows it never are."""
        self._ids.append(token)
        return self._release(self._decode_new())

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""
        if self.is_stopped:
            return ""
        text = self._held + self._decode_new(complete=True)
        self._held = ""
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        self.is_stopped = bool(found)
        return text[: min(found, default=len(text))]

    def _decode_new(self, *, complete: bool = False) -> str:
        before = self._decode(self._ids[self._context_start : self._read_end])
        after = self._decode(self._ids[self._context_start :])
        if after.endswith(_REPLACEMENT) and not complete:
            return ""
        self._context_start, self._read_end = self._read_end, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        self._held += text
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        safe = len(self._held) - self._longest_stop_prefix()
        released, self._held = self._held[:safe], self._held[safe:]
        return released

    def _longest_stop_prefix(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
