"""Reads training data of any known shape into rows of one kind.

Every problem is named by file, line and field, before any model is loaded.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.chat_messages import RowProblem
from adapters.chat_rows import EXPECTED_ROW, Row, RowKind, parse_document, row_document
from adapters.errors import ConflictError, DataError
from adapters.row_places import PlacedProblem, RowPlace, data_error, group_problems
from training.readers import RawRow, read_table
from training.recognise import Shape, choose_shape, spread
from training.speakers import name_unknown_roles, rename_speakers, tidy_messages
from training.turns import TurnJoiner

__all__ = [
    "Dataset",
    "NumberedRow",
    "ReadOptions",
    "ReadRows",
    "as_lines",
    "check_writable",
    "read_dataset",
    "read_rows",
    "write_dataset",
    "write_documents",
]


_MESSAGE_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """One row, and the place in the source that it came from."""

    place: RowPlace
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
class ReadOptions:
    """How a source is to be read, where it does not say so itself.

    Args:
        mapping: Which column each target is (`training/recognise.py: TARGETS`); found out if not given.
        split: Which part is meant, where the source has several.
        subset: The part of a data set on the hub that it calls its configuration.
        encoding: That of a text file that is not UTF-8.
        roles: Which role each name of a speaker stands for (`training/speakers.py: parse_roles`).
        join_turns: Whether turns that are out of order are mended (`training/turns.py`).
        has_lines: False speaks of rows instead of lines: of JSON lines that were made of something else.
    """

    mapping: Mapping[str, str] | None = None
    split: str | None = None
    subset: str | None = None
    encoding: str | None = None
    roles: Mapping[str, str] | None = None
    join_turns: bool = False
    has_lines: bool = True


@dataclass(frozen=True, slots=True)
class ReadRows:
    """What was found in a source: good rows, how many are bad, and why.

    Every problem begins with where it is; what several rows have is one problem.
    """

    name: str
    sha256: str
    recognised: str
    rows: tuple[NumberedRow, ...]
    problems: list[str]
    num_bad: int = 0

    @property
    def kind(self) -> RowKind | None:
        """That of every good row; None if there is none."""
        return self.rows[0].row.kind if self.rows else None

    def as_dataset(self) -> Dataset:
        """The rows, if all are good.

        Raises:
            DataError: some are bad; up to 20 are listed.
        """
        if self.problems:
            raise data_error(self.problems)
        return self.good_rows()

    def good_rows(self) -> Dataset:
        """The good rows, of which there must be one."""
        return Dataset(self.name, self.sha256, self.rows[0].row.kind, self.rows, self.recognised)


def read_dataset(
    source: Path | str,
    *,
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    encoding: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> Dataset:
    """Read and check training data. Blank lines are skipped, columns that the shape has no use for are ignored.

    Args:
        source: A file, a folder, or the id of a data set on the hub.
        name: What messages call it; the source itself if not given.
        mapping: As in `ReadOptions`, like those that follow.
        split: As there.
        subset: As there.
        encoding: As there.
        roles: As there.

    Raises:
        DataError: the source can't be read, holds no rows, has no known shape, or has bad rows; up to 20 are listed.
    """
    return read_rows(source, ReadOptions(mapping, split, subset, encoding, roles), name=name).as_dataset()


def read_rows(source: Path | str, options: ReadOptions | None = None, *, name: str | None = None) -> ReadRows:
    """The same, with the bad rows' problems beside the good rows instead of an error. At least one of both is there.

    Raises:
        DataError: the source can't be read, holds no rows, or has no known shape.
    """
    options = options or ReadOptions()
    table = read_table(source, name=name, split=options.split, subset=options.subset, encoding=options.encoding)
    if not table.rows:
        is_sheet = table.layout.startswith(("CSV", "TSV"))
        expected = "expected a header, and a record a row below it" if is_sheet else f"{EXPECTED_ROW} on each line"
        raise DataError([f"{table.name}: holds no rows; {expected}"])
    given = table.rows if options.has_lines else _as_rows(table.rows)
    raws, done = _tidy(given, {*_MESSAGE_COLUMNS, (options.mapping or {}).get("messages", "")})
    if options.roles:
        raws = [replace(raw, document=rename_speakers(raw.document, options.roles)) for raw in raws]
    if any("." in column for column in (options.mapping or {}).values()):  # a value in an object of the row
        raws = [replace(raw, document=spread(raw.document)) for raw in raws]
    documents = [row.document for row in raws if isinstance(row.document, Mapping)]
    shape, columns = choose_shape(documents, options.mapping, table.name) if documents else (None, [])
    turns = TurnJoiner() if options.join_turns else None
    rows: list[NumberedRow] = []
    bad: list[tuple[RawRow, list[RowProblem]]] = []
    for raw in raws:
        row, found = _read_row(raw, shape, turns)
        if row is not None and rows and row.kind != rows[0].row.kind:
            found = [RowProblem("", f"a {row.kind} row among {rows[0].row.kind} rows; expected one kind in a file")]
        if row is not None and not found:
            rows.append(NumberedRow(raw.place, row))
        if found:
            bad.append((raw, found))
    recognised = f"{table.layout}: {shape.describe(columns)}" if shape else table.layout
    if turns is not None and (mended := turns.describe()):
        recognised = f"{recognised}; {mended}"
    if done:
        recognised = f"{recognised}; {', '.join(done)}"
    return ReadRows(table.name, table.sha256, recognised, tuple(rows), _as_sentences(bad, table.name), len(bad))


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Say before the work what writing would say after it; a file may still come in between.

    Raises:
        ConflictError: there is such a file, and it is not to be overwritten.
        DataError: its folder is none.
    """
    if not path.parent.is_dir():
        raise DataError([f"{path}: can't be written: there is no folder {path.parent}"])
    if path.is_dir():
        raise DataError([f"{path}: can't be written: is a folder"])
    if path.exists() and not overwrite:
        raise ConflictError(f"{path} exists already; --force writes over it")


def write_dataset(rows: Iterable[NumberedRow], path: Path, *, overwrite: bool = False) -> int:
    """Write rows as JSON lines; otherwise as `write_documents`."""
    return write_documents([row_document(numbered.row) for numbered in rows], path, overwrite=overwrite)


def as_lines(rows: Iterable[NumberedRow]) -> bytes:
    """Rows as JSON lines, each on the line that it has in its source, with blank ones between.

    What is said of them later holds of that source. Rows of one that has no lines follow each other, and are called
    rows later (`ReadOptions.has_lines`).
    """
    lines: list[bytes] = []
    for numbered in rows:
        if numbered.place.unit == "line":
            lines += [b"\n"] * (numbered.place.number - len(lines) - 1)
        lines.append(_as_line(row_document(numbered.row)))
    return b"".join(lines)


def write_documents(
    documents: Iterable[Mapping[str, Any]], path: Path, *, overwrite: bool = False, is_private: bool = False
) -> int:
    """Write JSON objects one a line, whole or not at all; a private file is its owner's alone to read.

    Returns:
        How many were written.

    Raises:
        ConflictError: there is such a file, and it is not to be overwritten.
        DataError: the file can't be written.
    """
    lines = [_as_line(document) for document in documents]
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        temporary.touch(mode=0o600 if is_private else 0o666, exist_ok=False)
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        (os.replace if overwrite else _place)(temporary, path)
    except FileExistsError:
        raise ConflictError(f"{path} exists already; --force writes over it") from None
    except OSError as error:
        raise DataError([f"{path}: can't be written: {error.strerror}"]) from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(lines)


def _as_line(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()


def _place(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is a file of that name meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # the file system knows no hard links: take the name first, which fails where it is taken
        path.open("xb").close()
        temporary.replace(path)


def _as_rows(raws: Sequence[RawRow]) -> list[RawRow]:
    return [replace(raw, place=replace(raw.place, unit="row")) for raw in raws]


def _tidy(raws: Sequence[RawRow], columns: Collection[str]) -> tuple[list[RawRow], list[str]]:
    """The rows with messages as they usually are, and what was done for it."""
    pairs = [tidy_messages(raw.document, columns) for raw in raws]
    tidied = [
        replace(raw, document=document) if done else raw for raw, (document, done) in zip(raws, pairs, strict=True)
    ]
    return tidied, sorted(set().union(*(done for _, done in pairs)))


def _read_row(raw: RawRow, shape: Shape | None, turns: TurnJoiner | None) -> tuple[Row | None, list[RowProblem]]:
    if raw.problem:
        return None, [RowProblem("", raw.problem)]
    return shape.read(raw.document, turns) if shape else parse_document(raw.document)


def _as_sentences(bad: Sequence[tuple[RawRow, list[RowProblem]]], name: str) -> list[str]:
    """Problems by file and line; all names that are no roles are told in one, as one option mends them."""
    speakers = [[problem.role for problem in found if problem.role is not None] for _, found in bad]
    unknown = name_unknown_roles(speakers) if any(speakers) else ""
    return group_problems(
        (
            PlacedProblem(raw.place, str(problem) if problem.role is None else unknown)
            for raw, found in bad
            for problem in found
        ),
        name,
    )
