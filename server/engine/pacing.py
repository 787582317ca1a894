"""How many prompt tokens a step may compute, so that running streams don't stall while a long prompt is read."""

from __future__ import annotations

__all__ = ["PrefillPacer"]

_LEAST_TOKENS = 16  # so that a prompt is read to its end however slow the machine
_WEIGHT = 0.3  # of the newest step in the running averages


class PrefillPacer:
    """Bounds a step by tokens always, and by time while anybody decodes.

    The time is kept by what steps took before: an average of what a prompt token adds to a step. The first steps run at
    the full number of tokens, as nothing is known yet.

    Args:
        max_tokens: Prompt tokens in a step at most.
        max_stall_s: How long a step may take while others wait for their next token.
    """

    def __init__(self, *, max_tokens: int, max_stall_s: float) -> None:
        self.max_tokens = max_tokens
        self._max_stall_s = max_stall_s
        self._decode_s = 0.0  # of a step without prompt tokens
        self._token_s = 0.0  # what each prompt token adds

    def budget(self, *, is_anybody_decoding: bool) -> int:
        """Prompt tokens for the coming step."""
        if not is_anybody_decoding or not self._token_s:
            return self.max_tokens
        wanted = int((self._max_stall_s - self._decode_s) / self._token_s)
        return min(self.max_tokens, max(_LEAST_TOKENS, wanted))

    def note(self, *, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that ended well."""
        if not num_prompt_tokens:
            self._decode_s = _average(self._decode_s, seconds)
        elif num_prompt_tokens >= _LEAST_TOKENS:
            # Short pieces are left out: a step's fixed cost would count as theirs.
            self._token_s = _average(self._token_s, max(seconds - self._decode_s, 1e-6) / num_prompt_tokens)


def _average(old: float, newest: float) -> float:
    return newest if not old else old + _WEIGHT * (newest - old)
