"""Checks a file of rows before it is kept; of a file of another kind it says what that looks like and what converts it.

Reads a line at a time: the server checks files of any size with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.chat_rows import EXPECTED_ROW, Row, RowKind, load_document, parse_row
from adapters.errors import DataError
from adapters.row_places import PlacedProblem, RowPlace, data_error, group_problems

__all__ = ["CheckedFile", "check_rows_file"]

_MAX_PROBLEMS_COUNTED = 1000
_MAX_LINE_BYTES = 4 << 20
_MAX_SNIFFED_BYTES = 1 << 16
# How files of other kinds begin, what they are called, and what to do before or while they are converted.
_SIGNATURES = (
    (b"PAR1", "Parquet", ""),
    (b"\x1f\x8b", "a file compressed with gzip", ""),
    (b"BZh", "a file compressed with bzip2", ""),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd", ""),
    (b"PK\x03\x04", "a sheet or another zip archive", "sheet"),
    (b"\xd0\xcf\x11\xe0", "an old sheet of Excel", "sheet"),
    (b"\xff\xfe", "text in UTF-16", "--encoding utf-16"),
    (b"\xfe\xff", "text in UTF-16", "--encoding utf-16"),
)
# What most files need besides; the command says it of each, with the very options.
_ASKED_FOR = "; it asks for --map, --roles or --encoding where they are needed"


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """What a good file holds."""

    kind: RowKind
    num_rows: int


def check_rows_file(path: Path, filename: str = "FILE") -> CheckedFile:
    """Check every line of a file, reading a line at a time. Blank lines are skipped; all rows must be of one kind.

    Args:
        path: Where it lies.
        filename: What its owner calls it, for the command that makes rows of it.

    Raises:
        DataError: the file is of another kind; or lines are wrong: a sentence for equal problems, with the first of
            their lines, up to 20 sentences; or no rows. After 1,000 wrong lines nobody looks on: a file of nonsense
            must not keep the server busy for minutes.
    """
    if other := _recognise_other(path):
        raise DataError([_refusal(*other, filename)], param="file")
    problems: list[PlacedProblem] = []
    num_rows = 0
    is_cut = False
    kind: RowKind | None = None
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        if is_cut := len(problems) >= _MAX_PROBLEMS_COUNTED:
            break
        num_rows += 1
        row, found = _check_line(line, kind)
        kind = kind or (row.kind if row else None)
        problems += [PlacedProblem(RowPlace(number), problem) for problem in found]
    if problems:
        raise data_error(_tell(problems, num_rows, filename, is_cut=is_cut), param="file")
    if kind is None:
        raise DataError([f"the file holds no rows; {EXPECTED_ROW} on each line"], param="file")
    return CheckedFile(kind, num_rows)


def _tell(problems: Sequence[PlacedProblem], num_rows: int, filename: str, *, is_cut: bool) -> list[str]:
    sentences = group_problems(problems, "")
    if len(problems) == num_rows and all(problem.text.startswith(EXPECTED_ROW) for problem in problems):
        sentences[-1] += f"; other columns become rows with: {_command(filename)}{_ASKED_FOR}"
    if is_cut:
        sentences.insert(0, f"{len(problems)} problems; no line behind line {problems[-1].place.number} was looked at")
    return sentences


def _recognise_other(path: Path) -> tuple[str, str] | None:
    """What a file looks like that is none of JSON lines, and how it is to be converted; None where nothing is known."""
    with path.open("rb") as file:
        head = file.read(_MAX_SNIFFED_BYTES)
    for signature, title, how in _SIGNATURES:
        if head.startswith(signature):
            return title, how
    first, second = _first_lines(head.removeprefix(b"\xef\xbb\xbf"))
    if first.startswith(b"["):
        return "one JSON list", ""
    if first.startswith(b"{"):
        is_spread = first[-1:] in (b"{", b"[", b",", b":") and bool(load_document(second)[1])
        return ("one JSON document over several lines", "") if second and is_spread else None
    delimiter = next((mark for mark in (b"\t", b";", b",", b"|") if mark in first and mark in (second or first)), None)
    if delimiter and load_document(first)[1]:
        return ("a table with tabs (TSV)" if delimiter == b"\t" else "a table (CSV)"), ""
    return None


def _first_lines(head: bytes) -> tuple[bytes, bytes]:
    """The first two lines that hold something other than a comment, as scripts and YAML have them."""
    lines = [line.strip() for line in head.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    first, second, *_ = [*lines, b"", b""]
    return first, second


def _refusal(title: str, how: str, filename: str) -> str:
    expected = "expected JSON lines, a row a line"
    if how == "sheet":
        return (
            f"the file looks like {title}; {expected}. Save it as CSV UTF-8, then: {_command('FILE.csv')}{_ASKED_FOR}"
        )
    command = f"{_command(filename)}{how and f' {how}'}"
    return f"the file looks like {title}; {expected}, as written by: {command}{_ASKED_FOR}"


def _command(filename: str) -> str:
    return f"hotswap data convert {shlex.quote(filename)} OUT.jsonl"


def _check_line(line: bytes, kind: RowKind | None) -> tuple[Row | None, list[str]]:
    if len(line) > _MAX_LINE_BYTES:
        return None, [f"longer than {_MAX_LINE_BYTES} bytes"]
    row, problems = parse_row(line)
    if row is not None and kind is not None and row.kind != kind:
        problems = [f"a {row.kind} row among {kind} rows; expected one kind in a file"]
    return row, problems


def _read_lines(path: Path) -> Iterator[bytes]:
    """The file's lines; of one that is too long, only as much as shows it."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES + 1):
            yield line
            while len(line) > _MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES + 1)
                if not line:
                    return
