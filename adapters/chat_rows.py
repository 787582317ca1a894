"""The rows of training data, of four kinds, and what one line of a JSONL file must be to hold one.

The trainer reads files with it, and the server refuses files with it before they are stored (`adapters/rows_file.py`).
Other shapes of data become these rows in `training/recognise.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from adapters.chat_messages import (
    Message,
    RowProblem,
    Tool,
    check_text,
    read_answer,
    read_conversation,
    read_prompt,
    read_tools,
)

__all__ = [
    "EXPECTED_ROW",
    "ChatRow",
    "LabelledRow",
    "PreferenceRow",
    "Row",
    "RowKind",
    "TextRow",
    "load_document",
    "parse_document",
    "parse_row",
    "row_document",
]

EXPECTED_ROW = (
    'expected a row with "messages" (chat), "prompt", "chosen" and "rejected" (preference), "prompt", "completion" and '
    '"label" (labelled), or "text"'
)
RowKind = Literal["chat", "preference", "labelled", "text"]


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation; loss falls on its assistant messages, except on those that have `weight` 0.

    A message holds `role`, `content` (text; empty beside tool calls alone) and what it has of `weight` (only where it
    is 0), `name`, `tool_call_id` and `tool_calls`, with `arguments` as objects: what chat templates expect.
    """

    kind: ClassVar[RowKind] = "chat"
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A prompt, which ends where the assistant is to speak, and two assistant messages, of which one is better."""

    kind: ClassVar[RowKind] = "preference"
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A prompt, one assistant message, and whether it is good."""

    kind: ClassVar[RowKind] = "labelled"
    prompt: tuple[Message, ...]
    completion: Message
    label: bool
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text; every token carries loss, and the end of the text is learned, too."""

    kind: ClassVar[RowKind] = "text"
    text: str


Row = ChatRow | PreferenceRow | LabelledRow | TextRow


def parse_row(line: bytes) -> tuple[Row | None, list[str]]:
    """The row on one line; or None and what is wrong with it, a sentence each, naming the field."""
    document, problem = load_document(line)
    if problem:
        return None, [problem]
    row, problems = parse_document(document)
    return row, [str(problem) for problem in problems]


def load_document(text: bytes) -> tuple[Any, str]:
    """The JSON value in a line of UTF-8, and what is wrong with it, or an empty text."""
    try:
        return json.loads(text.decode("utf-8-sig")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} (column {error.colno})"
    except RecursionError:
        return None, "not a row: nested too deeply"
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        return None, f"not JSON that can be read: {error}"


def parse_document(document: Any) -> tuple[Row | None, list[RowProblem]]:
    """The row that a JSON value is; or None and what is wrong with it. Unknown keys of a row are notes of its owner."""
    if not isinstance(document, Mapping):
        return None, [RowProblem("", f"{EXPECTED_ROW}, found {_kind(document)}")]
    if document.get("functions") is not None:
        return None, [
            RowProblem("functions", 'is not supported: expected "tools", a list of {"type": "function", ...}')
        ]
    given = {key: value for key, value in document.items() if value is not None}
    readers = [read for keys, read in _READERS if keys <= set(given)]
    if not readers:
        return None, [RowProblem("", f"{EXPECTED_ROW}, found the keys {_keys(given)}")]
    if _read_chat in readers[1:]:
        return None, [RowProblem("", f"could be a row of several kinds; found the keys {_keys(given)}")]
    problems: list[RowProblem] = []
    row = readers[0](given, problems)
    return (None, problems) if problems else (row, [])


def row_document(row: Row) -> dict[str, Any]:
    """A row as a JSON object that `parse_document` reads as the same row."""
    tools = {} if isinstance(row, TextRow) or not row.tools else {"tools": list(row.tools)}
    if isinstance(row, ChatRow):
        return {"messages": [_wire_message(message) for message in row.messages], **tools}
    if isinstance(row, TextRow):
        return {"text": row.text}
    prompt = {"prompt": [_wire_message(message) for message in row.prompt]}
    if isinstance(row, PreferenceRow):
        answers = {"chosen": [_wire_message(row.chosen)], "rejected": [_wire_message(row.rejected)]}
        return {**prompt, **answers, **tools}
    return {**prompt, "completion": [_wire_message(row.completion)], "label": row.label, **tools}


def _read_preference(given: Mapping[str, Any], problems: list[RowProblem]) -> PreferenceRow:
    return _preference(given, ("prompt", "chosen", "rejected"), given["prompt"], given.get("tools"), problems)


def _read_hosted_preference(given: Mapping[str, Any], problems: list[RowProblem]) -> PreferenceRow | None:
    """The hosted APIs' form: the prompt and its tools stand in `input`."""
    asked = given["input"]
    if not isinstance(asked, Mapping):
        problems.append(RowProblem("input", f'expected {{"messages": [...]}}, found {_kind(asked)}'))
        return None
    fields = ("input.messages", "preferred_output", "non_preferred_output")
    return _preference(given, fields, asked.get("messages"), asked.get("tools"), problems)


def _preference(
    given: Mapping[str, Any], fields: tuple[str, str, str], prompt: Any, tools: Any, problems: list[RowProblem]
) -> PreferenceRow:
    row = PreferenceRow(
        read_prompt(prompt, fields[0], problems),
        read_answer(given[fields[1]], fields[1], problems),
        read_answer(given[fields[2]], fields[2], problems),
        read_tools(tools, "input.tools" if fields[0].startswith("input") else "tools", problems),
    )
    if not problems and row.chosen == row.rejected:
        problems.append(RowProblem(fields[2], f"is the same as {fields[1]}: there is nothing to prefer"))
    return row


def _read_labelled(given: Mapping[str, Any], problems: list[RowProblem]) -> LabelledRow:
    if not isinstance(given["label"], bool):
        problems.append(RowProblem("label", f"expected true or false, found {given['label']!r:.60}"))
    return LabelledRow(
        read_prompt(given["prompt"], "prompt", problems),
        read_answer(given["completion"], "completion", problems),
        given["label"],
        read_tools(given.get("tools"), "tools", problems),
    )


def _read_chat(given: Mapping[str, Any], problems: list[RowProblem]) -> ChatRow:
    tools = read_tools(given.get("tools"), "tools", problems)
    if not isinstance(given.get("parallel_tool_calls"), bool | None):
        found = _kind(given["parallel_tool_calls"])
        problems.append(RowProblem("parallel_tool_calls", f"expected true or false, found {found}"))
    return ChatRow(read_conversation(given["messages"], "messages", problems), tools)


def _read_text(given: Mapping[str, Any], problems: list[RowProblem]) -> TextRow:
    text = given["text"]
    if isinstance(text, str):
        problems += check_text(text, "text")
    else:
        problems.append(RowProblem("text", f"expected text, found {_kind(text)}"))
    return TextRow(text)


# The first whose keys are there reads the row; those with more keys stand first.
_READERS: tuple[tuple[frozenset[str], Any], ...] = (
    (frozenset({"prompt", "chosen", "rejected"}), _read_preference),
    (frozenset({"input", "preferred_output", "non_preferred_output"}), _read_hosted_preference),
    (frozenset({"prompt", "completion", "label"}), _read_labelled),
    (frozenset({"messages"}), _read_chat),
    (frozenset({"text"}), _read_text),
)


def _wire_message(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def _keys(given: Mapping[Any, Any]) -> str:
    return f"{', '.join(sorted(map(str, given))) or 'none':.120}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
