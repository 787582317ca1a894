"""Log-probabilities as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.engine.core import TokenLogprob
from server.engine.token_text import TokenBytes

__all__ = ["LogprobsWriter"]

_LEAST = -9999.0  # what the hosted API says of a token without any probability; JSON has no infinity


class LogprobsWriter:
    """Writes tokens as text and bytes. `bytes` is null where a token has none: special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)

    def body(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        """The `logprobs` of a choice. The bytes of the chosen tokens join to its text."""
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob, self._bytes.of(token)) for token, logprob in entry.top]
        return self._token(entry.token, entry.logprob, entry.text_bytes) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float, text_bytes: bytes) -> dict[str, Any]:
        logprob = max(logprob, _LEAST)
        if token in self._bytes.special:
            return {"token": str(self._tokenizer.convert_ids_to_tokens(token)), "logprob": logprob, "bytes": None}
        return {"token": text_bytes.decode("utf-8", "replace"), "logprob": logprob, "bytes": [*text_bytes]}
