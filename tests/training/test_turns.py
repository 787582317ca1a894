"""Turns out of order: joined, cut at both ends, counted; what a guess would be needed for is left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.chat_rows import ChatRow, PreferenceRow
from adapters.errors import DataError
from tests.support.conversations import make_messages, write_rows
from training.formats import ReadOptions, ReadRows, read_rows

_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}


def _turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def _read(tmp_path: Path, *rows: Any, **options: Any) -> ReadRows:
    path = write_rows(tmp_path / "d.jsonl", list(rows))
    return read_rows(path, ReadOptions(join_turns=True, **options), name="d")


def _messages(found: ReadRows) -> list[tuple[str, str]]:
    (numbered,) = found.rows
    assert isinstance(numbered.row, ChatRow)
    return [(message["role"], message["content"]) for message in numbered.row.messages]


MENDED: dict[str, tuple[list[Any], list[tuple[str, str]], str]] = {
    "in-order": (make_messages("q", "a"), [("user", "q"), ("assistant", "a")], ""),
    "said-in-two": (
        [_turn("user", "q"), _turn("user", "r"), _turn("assistant", "a"), _turn("assistant", "b")],
        [("user", "q\n\nr"), ("assistant", "a\n\nb")],
        "; turns joined in 1 row",
    ),
    "said-in-parts": (
        [_turn("user", [{"type": "text", "text": "q"}]), _turn("user", "r"), _turn("assistant", "a")],
        [("user", "q\n\nr"), ("assistant", "a")],
        "; turns joined in 1 row",
    ),
    "empty-beside-a-text": (
        [_turn("user", " "), _turn("user", "r"), _turn("assistant", "a")],
        [("user", "r"), ("assistant", "a")],
        "; turns joined in 1 row",
    ),
    "assistant-opens": (
        [_turn("system", "s"), _turn("assistant", "Welcome!"), *make_messages("q", "a")],
        [("system", "s"), ("user", "q"), ("assistant", "a")],
        "; opening assistant turn dropped in 1 row",
    ),
    "user-closes": (
        make_messages("q", "a", "Thanks"),
        [("user", "q"), ("assistant", "a")],
        "; closing user turn dropped in 1 row",
    ),
}


@pytest.mark.parametrize(("messages", "expected", "told"), MENDED.values(), ids=MENDED)
def test_read_rows_mends_turns_when_it_is_asked_to(
    tmp_path: Path, messages: list[Any], expected: list[tuple[str, str]], told: str
) -> None:
    """With a blank line between joined texts; what was done is told with what was recognised."""
    found = _read(tmp_path, {"messages": messages})

    assert expected == _messages(found)
    assert f"JSON lines: chat (messages = messages){told}" == found.recognised


LEFT: dict[str, tuple[list[Any], str]] = {
    "two-weights": (
        [_turn("user", "q"), _turn("assistant", "a", weight=0), _turn("assistant", "b")],
        "found user, assistant, assistant",
    ),
    "two-names": (
        [_turn("user", "q", name="ann"), _turn("user", "r", name="bob"), _turn("assistant", "a")],
        "found user, user, assistant",
    ),
    "call-that-opens": (
        [_turn("assistant", None, tool_calls=[_CALL]), _turn("tool", "1", tool_call_id="c1"), *make_messages("q", "a")],
        "found assistant, tool, user, assistant",
    ),
    "assistant-alone": ([_turn("assistant", "a")], "found assistant"),
    "user-alone": ([_turn("user", "q")], "found user"),
    "no-text": ([_turn("user", 7), _turn("user", "r"), _turn("assistant", "a")], "field messages[0].content: expected"),
}


@pytest.mark.parametrize(("messages", "expected"), LEFT.values(), ids=LEFT)
def test_read_rows_leaves_turns_when_joining_would_lose_something(
    tmp_path: Path, messages: list[Any], expected: str
) -> None:
    """Weights, names and calls are never lost; a row without question or answer stays an error."""
    with pytest.raises(DataError) as caught:
        _read(tmp_path, {"messages": messages}).as_dataset()

    assert expected in str(caught.value)


def test_read_rows_names_the_turn_of_the_source_when_turns_before_it_were_joined(tmp_path: Path) -> None:
    """The field is that of the user's file, not of what was made of it."""
    turns = [("bot", "Welcome!"), ("human", "q"), ("human", "r"), ("bot", "a"), ("human", "s"), ("bot", " ")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}

    assert ["d:1: field conversations[5].value: is empty"] == _read(tmp_path, row).problems


def test_read_rows_joins_turns_of_prompts_when_rows_are_preferences(tmp_path: Path) -> None:
    """A prompt ends with the user, and keeps its end; the hosted APIs' form is mended likewise."""
    prompt = [_turn("assistant", "Welcome!"), _turn("user", "q"), _turn("user", "r")]
    answers = [[_turn("assistant", text)] for text in ("yes", "no")]
    plain = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    hosted = {"input": {"messages": prompt}, "preferred_output": answers[0], "non_preferred_output": answers[1]}

    for row in (plain, hosted):
        (numbered,) = _read(tmp_path, row).rows
        assert isinstance(numbered.row, PreferenceRow)
        assert (_turn("user", "q\n\nr"),) == numbered.row.prompt


def test_order_error_names_the_option_when_it_would_mend_the_row(tmp_path: Path) -> None:
    """Joining, opening and closing turns; where nothing simple mends the order, nothing is promised."""
    conversations = [make_messages("q", "a", "s"), [_turn("assistant", "w"), *make_messages("q", "a")]]
    conversations.append([_turn("user", "q"), *make_messages("q", "a")])
    for messages in conversations:
        path = write_rows(tmp_path / "d.jsonl", [{"messages": messages}])
        with pytest.raises(DataError, match=r" \(--join-turns does\)$"):
            read_rows(path).as_dataset()
        assert [] == read_rows(path, ReadOptions(join_turns=True)).problems
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [_turn("user", "q")]}])
    with pytest.raises(DataError, match=r"found user$"):
        read_rows(path).as_dataset()
