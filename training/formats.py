"""Reads training data: one JSON object a line, `{"messages": [{"role": ..., "content": ...}, ...]}`.

Every problem is named by file, line and field, before any model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import DataError

__all__ = ["ChatDataset", "ChatRow", "read_chat_dataset"]

_MAX_PROBLEMS_SHOWN = 20
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation and the line that it came from."""

    line: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """All rows of one file, and the SHA-256 of the file's bytes."""

    path: Path
    sha256: str
    rows: tuple[ChatRow, ...]


def read_chat_dataset(path: Path) -> ChatDataset:
    """Read and check a JSONL file of conversations. Blank lines are skipped, unknown columns of a row are ignored.

    Raises:
        DataError: the file can't be read, holds no rows, or has bad lines; up to 20 of them are listed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError([f"{path}: can't be read: {error.strerror}"]) from None
    rows: list[ChatRow] = []
    problems: list[str] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, found = _parse_line(line)
        problems += [f"{path}:{number}: {problem}" for problem in found]
        rows.append(ChatRow(number, row))
    if problems:
        raise DataError(problems[:_MAX_PROBLEMS_SHOWN], num_more=max(0, len(problems) - _MAX_PROBLEMS_SHOWN))
    if not rows:
        raise DataError([f'{path}: holds no rows; expected one {{"messages": [...]}} a line'])
    return ChatDataset(path, hashlib.sha256(content).hexdigest(), tuple(rows))


def _parse_line(line: bytes) -> tuple[tuple[dict[str, str], ...], list[str]]:
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
        yield f"field messages: expected user and assistant in turn, ending with assistant, found {', '.join(roles)}"
