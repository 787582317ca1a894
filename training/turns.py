"""Mends the order of turns in conversations as ticket systems keep them, where that takes no guess at their meaning.

Knows lists of messages with `role` and `content`; where a row holds them is for `training/recognise.py` to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SEPARATOR", "TurnJoiner"]

# What stands between two joined texts: a blank line.
SEPARATOR = "\n\n"
_JOINED_ROLES = ("system", "developer", "user", "assistant")
_FIRST_ROLES = ("system", "developer")


class TurnJoiner:
    """Joins what one speaker says in a row, and drops turns that are no part of question and answer.

    Those are an assistant's turns before the user's first, and, of whole conversations, a user's behind the assistant's
    last. It counts the rows that it has changed so.
    """

    def __init__(self) -> None:
        self.num_joined = 0
        self.num_opened = 0
        self.num_closed = 0

    def mend(self, messages: Sequence[Any], *, is_prompt: bool) -> list[tuple[int, Any]]:
        """The messages in order, each with the index of the first that it was made of; a prompt keeps its end."""
        joined = _join(messages)
        self.num_joined += len(joined) < len(messages)
        opened = _cut_opening(joined)
        self.num_opened += len(opened) < len(joined)
        closed = opened if is_prompt else _cut_closing(opened)
        self.num_closed += len(closed) < len(opened)
        return closed

    def describe(self) -> str:
        """What was done to how many rows, in words; empty if nothing."""
        counts = {
            "turns joined": self.num_joined,
            "opening assistant turn dropped": self.num_opened,
            "closing user turn dropped": self.num_closed,
        }
        done = [f"{what} in {count} {'row' if count == 1 else 'rows'}" for what, count in counts.items() if count]
        return ", ".join(done)


def _join(messages: Sequence[Any]) -> list[tuple[int, Any]]:
    joined: list[tuple[int, Any]] = []
    for index, message in enumerate(messages):
        if joined and _is_same_turn(joined[-1][1], message):
            first, earlier = joined[-1]
            joined[-1] = first, {**earlier, "content": _join_contents(earlier["content"], message["content"])}
        else:
            joined.append((index, message))
    return joined


def _is_same_turn(earlier: Any, message: Any) -> bool:
    """Whether both are texts of one speaker, alike in all else: of two weights or names neither may be lost."""
    if not isinstance(earlier, Mapping) or not isinstance(message, Mapping):
        return False
    if message.get("role") not in _JOINED_ROLES or earlier.get("tool_calls") or message.get("tool_calls"):
        return False
    has_texts = all(isinstance(turn.get("content"), str | list) for turn in (earlier, message))
    return has_texts and _all_but_content(earlier) == _all_but_content(message)


def _all_but_content(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None and key != "content"}
    return {"weight": 1, **given} if given.get("role") == "assistant" else given


def _join_contents(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return SEPARATOR.join(text for text in (first, second) if text.strip())
    return [*_as_parts(first), *_as_parts(SEPARATOR), *_as_parts(second)]


def _as_parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _cut_opening(turns: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    head = [turn for turn in turns[:1] if _role(turn) in _FIRST_ROLES]
    rest = turns[len(head) :]
    if "user" not in map(_role, rest):
        return turns
    while _role(rest[0]) == "assistant" and not rest[0][1].get("tool_calls"):
        rest = rest[1:]
    return [*head, *rest]


def _cut_closing(turns: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    if "assistant" not in map(_role, turns):
        return turns
    end = len(turns)
    while _role(turns[end - 1]) == "user":
        end -= 1
    return turns[:end]


def _role(turn: tuple[int, Any]) -> Any:
    return turn[1].get("role") if isinstance(turn[1], Mapping) else None
