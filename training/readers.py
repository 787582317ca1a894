"""Reads tables of training data from files, folders and the hub; `training/recognise.py` says what a row means.

JSON lines, JSON, CSV, TSV and Parquet, also compressed; folders that `datasets` saved or that hold such files; hub ids.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.chat_rows import load_document
from adapters.errors import DataError
from adapters.row_places import RowPlace

__all__ = ["RawRow", "RawTable", "is_told_by_line", "read_table"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_FORMATS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}
_LINED = ("JSON lines", "CSV", "TSV")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SHEETS = frozenset({".xlsx", ".xls", ".xlsm", ".ods", ".numbers"})
_SNIFFED_RECORDS = 50
_WRAPPERS = frozenset({"data", "rows", "examples", "train", "validation", "test"})
# An object with one of these keys is a row itself, and lists of objects in it are its parts.
_ROW_KEYS = frozenset(
    {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "input", "output"}
    | {"preferred_output", "non_preferred_output", "tools", "tool_calls", "instruction", "question", "answer", "query"}
    | {"response", "user", "assistant", "text", "content", "label"}
)
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_MAX_WRAPPER_DEPTH = 3
# What the library lists where a data set has several configurations and none of them was named, or another.
_CONFIGURATIONS = re.compile(r"[Aa]vailable(?: configs)?: (\[.*\])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# How the splits of a folder are told by the names of its files.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
_UTF_16_OR_32 = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_MAX_FIELD_CHARS = 16 << 20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was found: any JSON value, or why it can't be read.

    Args:
        place: Where it begins: the line of a text file, elsewhere the row's number.
        document: An object with one key a column, if all is well.
        problem: What is wrong with it, or an empty text.
    """

    place: RowPlace
    document: Any
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RawTable:
    """All rows of one source. `layout` says in words how they were read, `sha256` is that of the bytes."""

    name: str
    sha256: str
    layout: str
    rows: list[RawRow]


def read_table(
    source: Path | str,
    *,
    name: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    encoding: str | None = None,
) -> RawTable:
    """Read every row of a file, a folder or a data set of the hub.

    Args:
        source: A path, or a hub id such as `openai/gsm8k` if there is no such path.
        name: What messages call it; the source itself if not given.
        split: Which part is meant, where the source has several.
        subset: The part of a data set on the hub that it calls its configuration.
        encoding: That of a text file that is not UTF-8.

    Raises:
        DataError: nothing can be read, or the split has to be named; rows that are bad by themselves are no error here.
    """
    path = Path(source)
    shown = name or str(source)
    if encoding is not None:
        _check_encoding(encoding)
    if path.is_dir():
        return _read_folder(path, shown, split, encoding)
    if subset is not None or (not path.exists() and _is_hub_id(str(source))):
        if subset is None and (folder := Path(path.parts[0])).is_dir():  # the hub would be asked for half a minute
            raise DataError(
                [f"{shown}: there is no such file in the folder {folder}; of the hub, --subset names a part"]
            )
        return _read_hub(str(source), shown, split, subset)
    if split is not None:
        raise DataError([f"{shown}: is one file and has no splits; leave split {split!r} out"])
    return _read_file(path, shown, encoding)


def is_told_by_line(name: str) -> bool:
    """Whether rows of a file of this name are found by their lines; those of others are counted."""
    return _format_of(Path(name)) in _LINED


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and _format_of(Path(source)) is None


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise DataError([f"encoding {encoding!r}: expected a name such as utf-8, cp1252 or utf-16"]) from None


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _read_file(path: Path, shown: str, encoding: str | None) -> RawTable:
    content = _read_bytes(path, shown)
    sha256 = hashlib.sha256(content).hexdigest()
    content = _decompress(content, path, shown)
    if content[:4] == b"PAR1":
        return RawTable(shown, sha256, "Parquet", _read_parquet(content, shown))
    kind = _format_of(path)
    if kind == "Parquet":
        raise DataError([f"{shown}: expected a Parquet file, which begins with PAR1, found {content[:4]!r}"])
    if encoding is not None or kind in ("CSV", "TSV"):
        content = _decode(content, shown, encoding).encode()
    _check_is_utf8_text(content, shown)
    if kind in ("CSV", "TSV"):
        layout, rows = _read_csv(content.decode(), shown, "\t" if kind == "TSV" else None)
    elif kind is None and path.suffix and content.lstrip()[:1] not in (b"{", b"["):
        hint = "; save the sheet as CSV UTF-8" if path.suffix.lower() in _SHEETS else ""
        expected = f"expected a file whose name ends in {', '.join(_FORMATS)}, found {path.suffix!r}"
        raise DataError([f"{shown}: {expected}{hint}"])
    else:
        layout, rows = _read_json(content, shown, is_document=kind == "JSON")
    return RawTable(shown, sha256, layout, rows)


def _read_bytes(path: Path, shown: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError([f"{shown}: can't be read: {error.strerror}"]) from None


def _decompress(content: bytes, path: Path, shown: str) -> bytes:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return content
    import pyarrow as pa

    try:
        with pa.input_stream(pa.BufferReader(content), compression=compression) as stream:
            return bytes(stream.read())
    except OSError as error:  # pyarrow's ArrowException for damaged streams is one
        raise DataError([f"{shown}: is no {compression} file that can be read: {error}"]) from None


def _decode(content: bytes, shown: str, encoding: str | None) -> str:
    """Text without a byte order mark.

    Raises:
        DataError: it is in another encoding; names the line, and what to do.
    """
    if encoding is None:
        _check_is_utf8_text(content, shown)
    try:
        return content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"{shown}:{line}: not {(encoding or 'UTF-8').upper()} (byte {content[error.start]:#04x})"
        advice = "name its encoding, cp1252 for most files from Windows: --encoding cp1252"
        raise DataError([f"{found}; save the file as UTF-8, or {advice}"]) from None
    except UnicodeError as error:
        raise DataError([f"{shown}: is not {encoding}: {error}"]) from None


def _check_is_utf8_text(content: bytes, shown: str) -> None:
    """Refuse what is plainly UTF-16 or 32: each line would get an error of its own, and none would say this."""
    if found := next((name for mark, name in _UTF_16_OR_32 if content.startswith(mark)), None):
        raise DataError([f"{shown}: is {found}; save the file as UTF-8, or give --encoding {found.lower()}"])
    head = content[:1000]
    if head.count(0) > len(head) // 4:
        raise DataError([f"{shown}: holds a NUL byte in every few: it is binary, or UTF-16; save it as UTF-8"])


def _read_json(content: bytes, shown: str, *, is_document: bool) -> tuple[str, list[RawRow]]:
    """JSON lines, one list of rows, or an object that holds such a list, whatever the file's name promises."""
    text = content.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"["):
        return "JSON, a list of rows", _read_json_list(content, shown)
    lines = [line for line in content.split(b"\n") if line.strip()]
    problem = load_document(lines[0])[1] if lines else ""
    if text.startswith(b"{") and (len(lines) == 1 or problem):
        whole, whole_problem = load_document(content)
        if is_document and whole_problem:
            raise DataError([_find_json_error(content, shown) or f"{shown}: {whole_problem}"])
        if isinstance(whole, dict) and (
            problem or not _WRAPPERS.isdisjoint(whole) or (is_document and _find_lists(whole))
        ):
            return _read_wrapped(whole, shown)
    return "JSON lines", _read_json_lines(content)


def _read_json_lines(content: bytes) -> list[RawRow]:
    rows: list[RawRow] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            rows.append(RawRow(RowPlace(number), *load_document(line)))
    return rows


def _read_json_list(content: bytes, shown: str) -> list[RawRow]:
    """The items of one list, each with the line on which it begins, or with its number where a line has several."""
    text = _decode(content, shown, None)
    decoder = json.JSONDecoder()
    rows: list[RawRow] = []
    position, line, counted = text.index("[") + 1, 1, 0
    try:
        while True:
            position = _skip(text, position, " \t\r\n")
            if text[position : position + 1] == "]":
                break
            line, counted = line + text.count("\n", counted, position), position
            document, position = decoder.raw_decode(text, position)
            rows.append(RawRow(RowPlace(line), document))
            position = _skip(text, position, " \t\r\n")
            if text[position : position + 1] == ",":
                position += 1
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if (end := _skip(text, position + 1, " \t\r\n")) < len(text):
            raise json.JSONDecodeError("Extra data behind the list", text, end)
    except json.JSONDecodeError as error:
        raise DataError([_describe_json_error(error, shown)]) from None
    except (RecursionError, ValueError) as error:
        raise DataError([f"{shown}:{line}: not JSON that can be read: {error}"]) from None
    has_line_each = len({row.place for row in rows}) == len(rows)
    return rows if has_line_each else _numbered(row.document for row in rows)


def _numbered(documents: Iterable[Any]) -> list[RawRow]:
    """Rows of what has no lines, or not one a row."""
    return [RawRow(RowPlace(number, "row"), document) for number, document in enumerate(documents, start=1)]


def _find_json_error(content: bytes, shown: str) -> str:
    """Where a document ceases to be JSON, or an empty text if that is not what is wrong with it."""
    try:
        json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return _describe_json_error(error, shown)
    except (ValueError, RecursionError):
        pass
    return ""


def _describe_json_error(error: json.JSONDecodeError, shown: str) -> str:
    # A text that no quote ends goes on to the end of the file: a line break in it would be told as such.
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    hint = "; the file seems to be cut off at its end" if is_cut else ""
    return f"{shown}:{error.lineno}: not JSON: {error.msg} (column {error.colno}){hint}"


def _skip(text: str, position: int, letters: str) -> int:
    while position < len(text) and text[position] in letters:
        position += 1
    return position


def _read_wrapped(document: dict[str, Any], shown: str) -> tuple[str, list[RawRow]]:
    keys = [key for key, value in document.items() if key in _WRAPPERS and isinstance(value, list)]
    if not keys and len(found := _find_lists(document)) == 1:
        ((path, items),) = found.items()
        return f"JSON, rows in {path!r}", _numbered(items)
    if not keys:
        return "JSON, one row", _numbered([document])
    if len(keys) > 1:
        raise DataError([f"{shown}: holds several lists of rows, {', '.join(keys)}; make a file of each"])
    return f"JSON, rows in {keys[0]!r}", _numbered(document[keys[0]])


def _find_lists(document: Mapping[str, Any], depth: int = 1) -> dict[str, list[Any]]:
    """Lists of objects in an object that is no row itself, such as the export of another program, by their paths."""
    if not _ROW_KEYS.isdisjoint(document):
        return {}
    found: dict[str, list[Any]] = {}
    for key, value in document.items():
        if isinstance(value, list) and value and all(_may_be_row(item) for item in value):
            found[str(key)] = value
        elif isinstance(value, Mapping) and depth < _MAX_WRAPPER_DEPTH:
            found |= {f"{key}.{path}": items for path, items in _find_lists(value, depth + 1).items()}
    return found


def _may_be_row(item: Any) -> bool:
    """An object, and no message."""
    return isinstance(item, Mapping) and not any(keys <= set(item) for keys in _MESSAGE_KEYS)


def _read_csv(text: str, shown: str, delimiter: str | None) -> tuple[str, list[RawRow]]:
    """Records under a header, each with the line on which it begins."""
    first_line = 1
    if declared := re.match(r"sep=(.)\r?\n", text):  # as Excel writes it
        delimiter, first_line, text = declared[1], 2, text[declared.end() :]
    delimiter = delimiter or _find_delimiter(text)
    csv.field_size_limit(_MAX_FIELD_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    begin = first_line
    try:
        for record in reader:
            line, begin = begin, reader.line_num + first_line
            if any(record):
                records.append((line, record))
    except csv.Error as error:
        problem = f"{shown}:{begin}: can't be read as CSV: {error}; a quote inside quotes is written twice"
        raise DataError([problem]) from None
    layout = f"{'TSV' if delimiter == chr(9) else 'CSV'} with {_DELIMITERS.get(delimiter, repr(delimiter))}"
    if not records:
        return layout, []
    (line, first), *others = records
    header = _check_header(first[: _find_width(records)], f"{shown}:{line}")
    return layout, [_make_record(header, record, len(first), RowPlace(place)) for place, record in others]


def _find_width(records: list[tuple[int, list[str]]]) -> int:
    """The columns but for the last ones that have neither a name nor any value, as spreadsheets write emptied ones."""
    header = records[0][1]
    width = max((place + 1 for _, record in records for place, cell in enumerate(record) if cell.strip()), default=0)
    named = max((place + 1 for place, name in enumerate(header) if name.strip()), default=0)
    return max(named, width)


def _make_record(header: list[str], record: list[str], num_fields: int, place: RowPlace) -> RawRow:
    """A record as its row; `num_fields` is what the header has on its line, with emptied columns behind `header`."""
    if len(header) <= len(record) <= num_fields:
        return RawRow(place, dict(zip(header, record, strict=False)))
    cure = "put text with delimiters in quotes" if len(record) > num_fields else "an empty field needs its delimiter"
    problem = f"expected {num_fields} fields as in the header, found {len(record)}; {cure}"
    return RawRow(place, None, problem)


def _find_delimiter(text: str) -> str:
    """The delimiter that gives the same number of fields, above one, in most of the first records."""

    def score(delimiter: str) -> tuple[float, int]:
        counts: list[int] = []
        try:
            for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
                if any(record):
                    counts.append(len(record))
                if len(counts) == _SNIFFED_RECORDS:
                    break
        except csv.Error:
            return 0.0, 0
        if not counts or counts[0] < 2:
            return 0.0, 0
        return counts.count(counts[0]) / len(counts), counts[0]

    return max(_DELIMITERS, key=score)


def _check_header(record: list[str], where: str) -> list[str]:
    header = [field.strip() for field in record]
    if "" in header:
        nameless = f"{where}: column {header.index('') + 1} has no name"
        raise DataError([f"{nameless}; expected a header with the columns' names: name it, or delete the column"])
    if repeated := next((name for name, count in Counter(header).items() if count > 1), None):
        raise DataError([f"{where}: expected different names in the header, found {repeated!r:.60} twice"])
    return header


def _read_parquet(content: bytes, shown: str) -> list[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError([f"{shown}: is no Parquet file that can be read: {error}"]) from None
    return _numbered(table.to_pylist())


def _read_folder(folder: Path, shown: str, split: str | None, encoding: str | None) -> RawTable:
    if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _read_saved(folder, shown, split)
    files = sorted(
        path for path in folder.rglob("*") if _format_of(path) and path.is_file() and not path.name.startswith(".")
    )
    files = [path for path in files if path.name != "dataset_info.json"]
    if not files:
        raise DataError([f"{shown}: is a folder without a file whose name ends in {', '.join(_FORMATS)}"])
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = _choose_split(by_split, split, shown)
    tables = [_read_file(path, f"{shown}/{path.relative_to(folder)}", encoding) for path in by_split[chosen]]
    if len(tables) == 1:
        return tables[0]
    rows = [replace(row, place=replace(row.place, file=table.name)) for table in tables for row in table.rows]
    sha256 = hashlib.sha256("".join(table.sha256 for table in tables).encode()).hexdigest()
    return RawTable(shown, sha256, f"{len(tables)} files, {tables[0].layout}", rows)


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def _choose_split(splits: Mapping[str, object], split: str | None, shown: str) -> str:
    if split is None:
        if len(splits) == 1:
            return next(iter(splits))
        how = "--split NAME (--validation-split for validation data)"
        raise DataError([f"{shown}: has the splits {', '.join(splits)}; say which: {how}"])
    if split not in splits:
        raise DataError([f"{shown}: has no split {split!r:.60}; expected one of {', '.join(splits)}"])
    return split


def _read_saved(folder: Path, shown: str, split: str | None) -> RawTable:
    """What `datasets` wrote with `save_to_disk`: one data set, or one a split."""
    import datasets

    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError([f"{shown}: can't be read as a folder of datasets: {error}"]) from None
    return _from_datasets(found, shown, split, "saved by datasets")


def _read_hub(source: str, shown: str, split: str | None, subset: str | None) -> RawTable:
    import datasets

    try:
        found = datasets.load_dataset(source, subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if (listed := _CONFIGURATIONS.search(str(error))) is not None:
            names = ", ".join(re.findall(r"'([^']+)'", listed[1]))
            found = "has several configurations" if subset is None else f"has no configuration {subset!r:.60}"
            raise DataError([f"{shown}: {found}; say which with --subset NAME: {names:.1000}"]) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            [f"{shown}: there is no such file, and the hub gives no data set of this name: {reason}"]
        ) from None
    return _from_datasets(found, shown, split, "from the hub")


def _from_datasets(found: Any, shown: str, split: str | None, where: str) -> RawTable:
    if isinstance(found, dict):
        found = found[_choose_split(found, split, shown)]
    elif split is not None and str(found.split) != split:
        raise DataError([f"{shown}: is one split; leave split {split!r} out"])
    documents = list(_rows_of(found))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return RawTable(shown, digest.hexdigest(), where, _numbered(documents))


def _rows_of(found: Any) -> Iterator[dict[str, Any]]:
    """Rows with the names of classes instead of their numbers."""
    classes = {name: feature for name, feature in found.features.items() if hasattr(feature, "int2str")}
    for row in found.to_list():
        for name, feature in classes.items():
            if isinstance(row[name], int) and row[name] >= 0:
                row[name] = feature.int2str(row[name])
        yield row
