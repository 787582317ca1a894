"""Reads training data: one JSON object a line, `{"messages": [{"role": ..., "content": ...}, ...]}`.

Every problem is named by file, line and field, before any model is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from adapters.chat_rows import MAX_PROBLEMS_SHOWN, parse_chat_line
from adapters.errors import DataError

__all__ = ["ChatDataset", "ChatRow", "read_chat_dataset"]


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation and the line that it came from."""

    line: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """All rows of one file, and the SHA-256 of the file's bytes. `name` is what messages call the file."""

    name: str
    sha256: str
    rows: tuple[ChatRow, ...]


def read_chat_dataset(path: Path, *, name: str | None = None) -> ChatDataset:
    """Read and check a JSONL file of conversations. Blank lines are skipped, unknown columns of a row are ignored.

    Messages call the file `name`, or by its path if none is given.

    Raises:
        DataError: the file can't be read, holds no rows, or has bad lines; up to 20 of them are listed.
    """
    shown = name or str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError([f"{shown}: can't be read: {error.strerror}"]) from None
    rows: list[ChatRow] = []
    problems: list[str] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, found = parse_chat_line(line)
        problems += [f"{shown}:{number}: {problem}" for problem in found]
        rows.append(ChatRow(number, row))
    if problems:
        raise DataError(problems[:MAX_PROBLEMS_SHOWN], num_more=max(0, len(problems) - MAX_PROBLEMS_SHOWN))
    if not rows:
        raise DataError([f'{shown}: holds no rows; expected one {{"messages": [...]}} a line'])
    return ChatDataset(shown, hashlib.sha256(content).hexdigest(), tuple(rows))
