"""Reads training data into rows of one kind.

Every problem is named by file, line and field, before any model is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from adapters.chat_rows import EXPECTED_ROW, MAX_PROBLEMS_SHOWN, Row, RowKind, parse_row
from adapters.errors import DataError

__all__ = ["Dataset", "NumberedRow", "read_dataset"]


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """One row, and the line that it came from."""

    line: int
    row: Row


@dataclass(frozen=True, slots=True)
class Dataset:
    """All rows of one source, which are of one kind, and the SHA-256 of its bytes. `name` is what messages call it."""

    name: str
    sha256: str
    kind: RowKind
    rows: tuple[NumberedRow, ...]


def read_dataset(source: Path | str, *, name: str | None = None) -> Dataset:
    """Read and check a JSONL file. Blank lines are skipped, unknown columns of a row are ignored.

    Messages call the file `name`, or by its path if none is given.

    Raises:
        DataError: the file can't be read, holds no rows, or has bad lines; up to 20 of them are listed.
    """
    shown = name or str(source)
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise DataError([f"{shown}: can't be read: {error.strerror}"]) from None
    rows: list[NumberedRow] = []
    problems: list[str] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, found = parse_row(line)
        if row is not None and rows and row.kind != rows[0].row.kind:
            found = [f"a {row.kind} row among {rows[0].row.kind} rows; expected one kind in a file"]
        problems += [f"{shown}:{number}: {problem}" for problem in found]
        if row is not None:
            rows.append(NumberedRow(number, row))
    if problems:
        raise DataError(problems[:MAX_PROBLEMS_SHOWN], num_more=max(0, len(problems) - MAX_PROBLEMS_SHOWN))
    if not rows:
        raise DataError([f"{shown}: holds no rows; {EXPECTED_ROW} on each line"])
    return Dataset(shown, hashlib.sha256(content).hexdigest(), rows[0].row.kind, tuple(rows))
