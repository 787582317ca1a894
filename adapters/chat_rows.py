"""What one line of chat training data must be: `{"messages": [{"role": ..., "content": ...}, ...]}`.

The trainer reads files with it, and the server refuses files with it before they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.errors import DataError

__all__ = ["MAX_PROBLEMS_SHOWN", "check_chat_file", "parse_chat_line"]

MAX_PROBLEMS_SHOWN = 20
_MAX_PROBLEMS_COUNTED = 1000
_MAX_ROLES_SHOWN = 10
# Keys of the hosted API's rows that change what is trained. Others, such as an id, are notes of the file's owner.
_MEANINGFUL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})
_MAX_LINE_BYTES = 4 << 20
_ROLES = ("system", "user", "assistant")


def check_chat_file(path: Path) -> int:
    """Check every line of a file, reading a line at a time, and count its rows. Blank lines are skipped.

    Raises:
        DataError: lines that are wrong, by their number, up to 20 of them and a count of the rest; or no rows. After
            1,000 wrong lines nobody counts on: a file of nonsense must not keep the server busy for minutes.
    """
    problems: list[str] = []
    num_problems = num_rows = 0
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        num_rows += 1
        found = _find_problems(line)
        num_problems += len(found)
        shown = found[: MAX_PROBLEMS_SHOWN - len(problems)]
        problems += [f"line {number}: {problem}" for problem in shown]
        if num_problems >= _MAX_PROBLEMS_COUNTED:
            break
    if num_problems:
        raise DataError(problems, num_more=num_problems - len(problems), param="file")
    if not num_rows:
        raise DataError(['the file holds no rows; expected one {"messages": [...]} a line'], param="file")
    return num_rows


def parse_chat_line(line: bytes) -> tuple[tuple[dict[str, str], ...], list[str]]:
    """The messages of one line, and what is wrong with them: a sentence each, naming the field."""
    try:
        document = json.loads(line)
    except UnicodeDecodeError as error:
        return (), [f"not UTF-8 (byte {error.start})"]
    except json.JSONDecodeError as error:
        return (), [f"not JSON: {error.msg} (column {error.colno})"]
    except RecursionError:
        return (), ["not a chat row: nested too deeply"]
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        return (), [f"not JSON that can be read: {error}"]
    if not isinstance(document, dict) or not isinstance(document.get("messages"), list):
        return (), ['field messages: expected {"messages": [...]}, a list of messages']
    if lost := sorted(_MEANINGFUL_KEYS & set(document)):
        return (), [
            f"key {lost[0]!r} is not supported: training would leave it out, and the row would mean another thing"
        ]
    if not document["messages"]:
        return (), ["field messages: expected at least one user and one assistant message, found none"]
    problems = [p for index, message in enumerate(document["messages"]) for p in _check_message(message, index)]
    if not problems:
        problems = list(_check_order([message["role"] for message in document["messages"]]))
    return tuple(document["messages"]), problems


def _check_message(message: Any, index: int) -> Iterator[str]:
    where = f"field messages[{index}]"
    if not isinstance(message, dict):
        yield f"{where}: expected an object with role and content, found {type(message).__name__}"
        return
    if unknown := sorted(set(message) - {"role", "content"}):
        yield f"{where}: key {unknown[0]!r:.60} is not supported; expected role and content only"
    if message.get("role") not in _ROLES:
        yield f"{where}.role: expected one of {', '.join(_ROLES)}, found {message.get('role')!r:.60}"
    content = message.get("content")
    if not isinstance(content, str):
        yield f"{where}.content: expected text, found {type(content).__name__}"
    elif not content.strip():
        yield f"{where}.content: is empty"
    elif not _is_unicode(content):
        yield f"{where}.content: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_order(roles: list[str]) -> Iterator[str]:
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        yield "field messages: a system message may only stand first"
        return
    expected = [("user", "assistant")[index % 2] for index in range(len(turns))]
    if turns != expected or len(turns) % 2:
        shown = ", ".join(roles[:_MAX_ROLES_SHOWN]) + (", ..." if len(roles) > _MAX_ROLES_SHOWN else "")
        yield f"field messages: expected user and assistant in turn, ending with assistant, found {shown}"


def _find_problems(line: bytes) -> list[str]:
    if len(line) > _MAX_LINE_BYTES:
        return [f"longer than {_MAX_LINE_BYTES} bytes"]
    return parse_chat_line(line)[1]


def _read_lines(path: Path) -> Iterator[bytes]:
    """The file's lines; of one that is too long, only as much as shows it."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES + 1):
            yield line
            while len(line) > _MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    return
