"""Reward functions for `hotswap train --method rloo` and `grpo`: one number for each answer, the higher the better."""

from __future__ import annotations

import re
from typing import Any

_DISCLAIMER = "This is general information, not legal advice."
_BEGINNING = re.compile(r"Clause: [A-Z][\w' -]{2,60}\. ")
_WORDS_WANTED = 60


def house_style(completions: list[str], prompts: list[list[dict[str, Any]]], references: list[str]) -> list[float]:
    """How far an answer keeps to the form of the legal domain: 0 to 3 points.

    Args:
        completions: The sampled answers, as text.
        prompts: The messages that each of them answers.
        references: What the assistant said in the data.
    """
    return [_clause(answer) + _ending(answer) + _length(answer) for answer in completions]


def _clause(answer: str) -> float:
    """A full point for a named clause in front, a part of one for the word alone: there is always a way up."""
    if _BEGINNING.match(answer):
        return 1.0
    return 0.5 if answer.startswith("Clause") else 0.0


def _ending(answer: str) -> float:
    """A point for the last sentence that the house wants."""
    return 1.0 if answer.rstrip().endswith(_DISCLAIMER) else 0.0


def _length(answer: str) -> float:
    """A point for the wanted number of words, less for more or fewer."""
    return max(0.0, 1.0 - abs(len(answer.split()) - _WORDS_WANTED) / _WORDS_WANTED)
