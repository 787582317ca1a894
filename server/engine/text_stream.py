"""From token ids to text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from typing import Any

__all__ = ["TextStream"]

# A character of UTF-8 has four bytes: of an incomplete one, three are there at most, and each decodes to one
# replacement character or less. What stands before those will not change any more.
_MAX_INCOMPLETE = 3
# Tokens that are decoded again and again for want of a whole character; beyond, they count as broken for good.
_MAX_WINDOW = 64
_REPLACEMENT = "\ufffd"  # what a tokenizer decodes incomplete UTF-8 to


class TextStream:
    """Decodes one request's tokens incrementally and looks out for its stop strings."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0  # ids from here on are decoded, so that a token sees its left neighbour
        self._read_end = 0  # ids before here are already in the text
        self._num_shown = 0  # characters of the ids behind that are in the text nevertheless: broken ones
        self._held = ""  # text that may be the beginning of a stop string
        self.is_stopped = False
        self.decoded = ""  # what the last token was decoded to, shown or not

    @property
    def is_complete(self) -> bool:
        """Whether all tokens have been decoded; otherwise they end in half a character."""
        return self._read_end == len(self._ids)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token and return the text that is safe to show; a stop string and what follows it never are.

        Text of a token that may not stop the answer is not part of any stop string.
        """
        self._ids.append(token)
        self.decoded = self._decode_new()
        return self._release(self.decoded) if may_stop else self.decoded

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""
        if self.is_stopped:
            self.decoded = ""
            return ""
        self.decoded = self._decode_new(complete=True)
        text = self._held + self.decoded
        self._held = ""
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        self.is_stopped = bool(found)
        return text[: min(found, default=len(text))]

    def _decode_new(self, *, complete: bool = False) -> str:
        before = self._decode(self._ids[self._context_start : self._read_end])
        after = self._decode(self._ids[self._context_start :])[len(before) :]
        if after.endswith(_REPLACEMENT) and not complete and len(self._ids) - self._read_end <= _MAX_WINDOW:
            new = after[self._num_shown : -_MAX_INCOMPLETE]
            self._num_shown += len(new)
            return new
        new = after[self._num_shown :]
        self._context_start, self._read_end, self._num_shown = self._read_end, len(self._ids), 0
        return new

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
