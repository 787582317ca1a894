"""Reads training data of any known shape into rows of one kind.

Every problem is named by file, line and field, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.chat_rows import EXPECTED_ROW, MAX_PROBLEMS_SHOWN, Row, RowKind, parse_document
from adapters.errors import DataError
from training.readers import RawRow, read_table
from training.recognise import Shape, choose_shape

__all__ = ["Dataset", "NumberedRow", "ReadRows", "read_dataset", "read_rows"]


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """One row, and the line that it came from; of a source without lines, its number from 1."""

    line: int
    row: Row


@dataclass(frozen=True, slots=True)
class Dataset:
    """All rows of one source, which are of one kind, and the SHA-256 of its bytes.

    Args:
        name: What messages call it.
        sha256: In hex; of several files, that of their hashes in order.
        kind: That of every row.
        rows: In the order of the source.
        recognised: In words, how the source was read.
    """

    name: str
    sha256: str
    kind: RowKind
    rows: tuple[NumberedRow, ...]
    recognised: str = ""


@dataclass(frozen=True, slots=True)
class ReadRows:
    """What was found in a source, good rows and bad; every problem begins with where it is."""

    name: str
    sha256: str
    recognised: str
    rows: tuple[NumberedRow, ...]
    problems: list[str]


def read_dataset(
    source: Path | str,
    *,
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    encoding: str | None = None,
) -> Dataset:
    """Read and check training data. Blank lines are skipped, columns that the shape has no use for are ignored.

    Args:
        source: A file, a folder, or the id of a data set on the hub.
        name: What messages call it; the source itself if not given.
        mapping: Which column each target is (`training/recognise.py: TARGETS`); found out if not given.
        split: Which part is meant, where the source has several.
        config: The configuration of a data set on the hub.
        encoding: That of a text file that is not UTF-8.

    Raises:
        DataError: the source can't be read, holds no rows, has no known shape, or has bad rows; up to 20 are listed.
    """
    found = read_rows(source, name=name, mapping=mapping, split=split, config=config, encoding=encoding)
    if found.problems:
        shown = found.problems[:MAX_PROBLEMS_SHOWN]
        raise DataError(shown, num_more=len(found.problems) - len(shown))
    return Dataset(found.name, found.sha256, found.rows[0].row.kind, found.rows, found.recognised)


def read_rows(
    source: Path | str,
    *,
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    encoding: str | None = None,
) -> ReadRows:
    """The same, with the bad rows' problems beside the good rows instead of an error. At least one of both is there.

    Raises:
        DataError: the source can't be read, holds no rows, or has no known shape.
    """
    table = read_table(source, name=name, split=split, config=config, encoding=encoding)
    if not table.rows:
        raise DataError([f"{table.name}: holds no rows; {EXPECTED_ROW} on each line"])
    documents = [row.document for row in table.rows if isinstance(row.document, Mapping)]
    shape, columns = choose_shape(documents, mapping, table.name) if documents else (None, [])
    rows: list[NumberedRow] = []
    problems: list[str] = []
    for raw in table.rows:
        row, found = _read_row(raw, shape)
        if row is not None and rows and row.kind != rows[0].row.kind:
            found = [f"a {row.kind} row among {rows[0].row.kind} rows; expected one kind in a file"]
        if row is not None and not found:
            rows.append(NumberedRow(raw.line, row))
        problems += [f"{raw.file or table.name}:{raw.line}: {problem}" for problem in found]
    recognised = f"{table.layout}: {shape.describe(columns)}" if shape else table.layout
    return ReadRows(table.name, table.sha256, recognised, tuple(rows), problems)


def _read_row(raw: RawRow, shape: Shape | None) -> tuple[Row | None, list[str]]:
    if raw.problem:
        return None, [raw.problem]
    row, problems = shape.read(raw.document) if shape else parse_document(raw.document)
    return row, [str(problem) for problem in problems]
