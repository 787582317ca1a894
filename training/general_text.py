"""A small text that has nothing to do with any domain, by which forgetting is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.chat_template import RenderedRow

__all__ = ["read_general_text", "render_general_text"]

_PATH = Path(__file__).with_name("general_text.jsonl")
_MAX_TOKENS = 32  # of each passage: many beginnings say more than a few whole texts, in the same time


def read_general_text() -> list[str]:
    """Passages of prose, dialogue, instructions, code and sums that were written for this project."""
    return [json.loads(line)["text"] for line in _PATH.read_text(encoding="utf-8").splitlines()]


def render_general_text(tokenizer: Any) -> list[RenderedRow]:
    """The beginning of each passage as plain text, without a chat template; every token but the first carries loss."""
    tokenised = (tokenizer(text).input_ids[:_MAX_TOKENS] for text in read_general_text())
    return [RenderedRow(list(ids), [True] * len(ids)) for ids in tokenised]
