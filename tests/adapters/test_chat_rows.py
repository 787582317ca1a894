"""What a row of each kind may be, and what is said of a row that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.chat_rows import (
    ChatRow,
    LabelledRow,
    PreferenceRow,
    Row,
    TextRow,
    parse_row,
    row_document,
)
from adapters.errors import DataError
from adapters.rows_file import CheckedFile, check_rows_file
from tests.support.conversations import easy_rows, make_messages, write_rows


def test_row_is_refused_when_a_key_would_change_its_meaning(tmp_path: Path) -> None:
    """An id is a note of the owner's; functions that nobody renders would train another conversation."""
    row = {"messages": easy_rows(1)[0]}
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "id": 7}])
    assert CheckedFile("chat", 1) == check_rows_file(path)
    write_rows(path, [{**row, "functions": []}])
    with pytest.raises(DataError, match="line 1: field functions: is not supported"):
        check_rows_file(path)


CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"order": 7}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
ASKED: dict[str, Any] = {"role": "user", "content": "Where is it?"}
TOOL_TURNS: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "Berlin"},
    {"role": "assistant", "content": "In Berlin."},
]
GOOD_ROWS: dict[str, tuple[dict[str, Any], Row]] = {
    "chat": ({"messages": make_messages("a", "b"), "id": 1}, ChatRow(tuple(make_messages("a", "b")))),
    "chat-with-weights": (
        {
            "messages": [
                *make_messages("a"),
                {"role": "assistant", "content": "b", "weight": 0},
                *make_messages("c", "d"),
            ]
        },
        ChatRow((*make_messages("a"), {"role": "assistant", "content": "b", "weight": 0}, *make_messages("c", "d"))),
    ),
    "chat-with-tools": (
        {"messages": TOOL_TURNS, "tools": [TOOL], "parallel_tool_calls": False},
        ChatRow(
            (
                ASKED,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": {"order": 7}}}],
                },
                {"role": "tool", "content": "Berlin", "tool_call_id": "c1"},
                {"role": "assistant", "content": "In Berlin."},
            ),
            (TOOL,),
        ),
    ),
    "chat-that-ends-with-a-call": (
        {"messages": TOOL_TURNS[:2], "tools": [TOOL]},
        ChatRow(
            (
                ASKED,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": {"order": 7}}}],
                },
            ),
            (TOOL,),
        ),
    ),
    "content-in-parts": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
            ]
        },
        ChatRow(tuple(make_messages("ab", "c", system="Be brief."))),
    ),
    "columns-of-a-table": (
        {"messages": [{**m, "tool_calls": None, "name": None} for m in make_messages("a", "b")], "tools": None},
        ChatRow(tuple(make_messages("a", "b"))),
    ),
    "preference": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        PreferenceRow(
            ({"role": "user", "content": "q"},),
            {"role": "assistant", "content": "yes"},
            {"role": "assistant", "content": "no"},
        ),
    ),
    "preference-of-the-hosted-api": (
        {
            "input": {"messages": make_messages("q", system="s"), "tools": [TOOL]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        },
        PreferenceRow(
            tuple(make_messages("q", system="s")),
            {"role": "assistant", "content": "yes"},
            {"role": "assistant", "content": "no"},
            (TOOL,),
        ),
    ),
    "labelled": (
        {"prompt": make_messages("q"), "completion": {"role": "assistant", "content": "a"}, "label": False},
        LabelledRow(tuple(make_messages("q")), {"role": "assistant", "content": "a"}, False),
    ),
    "text": ({"text": "Once upon a time."}, TextRow("Once upon a time.")),
    "messages-beside-text": (
        {"messages": make_messages("a", "b"), "text": "the same again"},
        ChatRow(tuple(make_messages("a", "b"))),
    ),
}


@pytest.mark.parametrize(("document", "expected"), GOOD_ROWS.values(), ids=GOOD_ROWS)
def test_parse_row_gives_the_row_when_it_is_good(document: dict[str, Any], expected: Row) -> None:
    """Each kind in each of its forms; what is given back is what chat templates expect."""
    assert (expected, []) == parse_row(json.dumps(document).encode())


@pytest.mark.parametrize(("document", "row"), GOOD_ROWS.values(), ids=GOOD_ROWS)
def test_row_document_is_read_as_the_same_row_when_it_is_parsed(document: dict[str, Any], row: Row) -> None:
    """Writing rows and reading them changes nothing, whatever form they came in."""
    assert (row, []) == parse_row(json.dumps(row_document(row)).encode())


BAD_ROWS = {
    "call-without-answer": (
        {"messages": [*TOOL_TURNS[:2], TOOL_TURNS[3]]},
        "field messages[2]: expected a tool message for each call, found none for ['c1']",
    ),
    "one-of-two-calls-without-answer": (
        {
            "messages": [
                ASKED,
                {**TOOL_TURNS[1], "tool_calls": [CALL, {**CALL, "id": "c2"}]},
                TOOL_TURNS[2],
                TOOL_TURNS[3],
            ]
        },
        "field messages[3]: expected a tool message for each call, found none for ['c2']",
    ),
    "answer-to-no-call": (
        {"messages": [*TOOL_TURNS[:2], {**TOOL_TURNS[2], "tool_call_id": "c9"}, TOOL_TURNS[3]]},
        "field messages[2].tool_call_id: expected one of ['c1'], found 'c9'",
    ),
    "tool-speaks-first": (
        {"messages": [TOOL_TURNS[2], TOOL_TURNS[3]]},
        "field messages: expected user and assistant in turn, ending with assistant, found tool, assistant",
    ),
    "arguments-are-no-json": (
        {"messages": [ASKED, {**TOOL_TURNS[1], "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
        "field messages[1].tool_calls[0].function.arguments: expected an object, or the JSON text of one, found '{'",
    ),
    "user-calls": (
        {"messages": [{**ASKED, "tool_calls": [CALL]}, TOOL_TURNS[3]]},
        "field messages[0].tool_calls: only an assistant calls tools, this is one of role 'user'",
    ),
    "tool-without-function": (
        {"messages": make_messages("a", "b"), "tools": [{}]},
        'field tools[0]: expected {"type": "function", "function": {"name": ..., "parameters": {...}}}, found {}',
    ),
    "tools-with-one-name": (
        {"messages": make_messages("a", "b"), "tools": [TOOL, TOOL]},
        "field tools: several functions have the same name",
    ),
    "weight-of-a-user": (
        {"messages": [{**ASKED, "weight": 1}, TOOL_TURNS[3]]},
        "field messages[0].weight: only an assistant's message has a weight, this is one of role 'user'",
    ),
    "weight-of-a-half": (
        {"messages": [ASKED, {**TOOL_TURNS[3], "weight": 0.5}]},
        "field messages[1].weight: expected 0 or 1, found 0.5",
    ),
    "nothing-has-weight": (
        {"messages": [ASKED, {**TOOL_TURNS[3], "weight": 0}]},
        "field messages: every assistant message has weight 0: the row would train nothing",
    ),
    "nul-byte": (
        {"messages": make_messages("a\0b", "c")},
        "field messages[0].content: holds a NUL character (\\u0000): the file was damaged, or is in another encoding",
    ),
    "chosen-is-rejected": (
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        "field rejected: is the same as chosen: there is nothing to prefer",
    ),
    "prompt-ends-with-an-answer": (
        {"prompt": make_messages("q", "a"), "chosen": "a", "rejected": "b"},
        "field prompt: expected user and assistant in turn, ending with user or tool, found user, assistant",
    ),
    "chosen-is-a-conversation": (
        {"prompt": "q", "chosen": make_messages("q", "a"), "rejected": "b"},
        "field chosen: expected one assistant message, found user, assistant",
    ),
    "label-is-text": (
        {"prompt": "q", "completion": "a", "label": "good"},
        "field label: expected true or false, found 'good'",
    ),
    "several-kinds": (
        {"messages": make_messages("q", "a"), "prompt": "q", "chosen": "a", "rejected": "b"},
        "could be a row of several kinds; found the keys chosen, messages, prompt, rejected",
    ),
    "text-is-empty": ({"text": " "}, "field text: is empty"),
}


@pytest.mark.parametrize(("document", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_parse_row_names_the_field_when_a_row_is_bad(document: dict[str, Any], expected: str) -> None:
    """One sentence says which field, what was expected and what was found."""
    assert (None, [expected]) == parse_row(json.dumps(document).encode())
