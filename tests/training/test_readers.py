"""Files, folders and compressions: whatever holds the rows, the same rows come out, each with its line."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from adapters.errors import DataError
from adapters.row_places import RowPlace
from tests.support.conversations import make_messages, write_rows
from training.formats import read_dataset
from training.readers import RawRow, read_table

ROWS: list[dict[str, Any]] = [
    {"question": "Wie geht's?", "answer": "Schön 🙂, danke."},
    {"question": "b", "answer": "B"},
]
_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
_CSV = 'question,answer\r\nWie geht\'s?,"Schön 🙂, danke."\r\nb,B\r\n'


def _write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


def _compress_zst(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(_LINES.encode())


_ROWS_1_2 = [RowPlace(1, "row"), RowPlace(2, "row")]


def _lines(first: int, second: int) -> list[RowPlace]:
    return [RowPlace(first), RowPlace(second)]


SOURCES: dict[str, tuple[str, Callable[[Path], object], list[RowPlace], str]] = {
    "json-lines": ("d.jsonl", lambda path: path.write_text(_LINES), _lines(1, 2), "JSON lines"),
    "json-lines-without-a-suffix": ("file-12ab", lambda path: path.write_text(_LINES), _lines(1, 2), "JSON lines"),
    "json-lines-called-json": ("d.json", lambda path: path.write_text(_LINES), _lines(1, 2), "JSON lines"),
    "json-list": (
        "d.json",
        lambda path: path.write_text(json.dumps(ROWS, indent=1)),
        _lines(2, 6),
        "JSON, a list of rows",
    ),
    "json-list-called-jsonl": (
        "d.jsonl",
        lambda path: path.write_text(json.dumps(ROWS)),
        _ROWS_1_2,
        "JSON, a list of rows",
    ),
    "json-under-data": (
        "d.json",
        lambda path: path.write_text(json.dumps({"data": ROWS})),
        _ROWS_1_2,
        "JSON, rows in 'data'",
    ),
    "csv": ("d.csv", lambda path: path.write_text(_CSV), _lines(2, 3), "CSV with commas"),
    "csv-of-excel": (
        "d.csv",
        lambda path: path.write_bytes(b"\xef\xbb\xbf" + _CSV.encode()),
        _lines(2, 3),
        "CSV with commas",
    ),
    "csv-with-semicolons": (
        "d.csv",
        lambda path: path.write_text("question;answer\nWie geht's?;Schön 🙂, danke.\n\nb;B\n"),
        _lines(2, 4),
        "CSV with semicolons",
    ),
    "csv-that-declares": (
        "d.csv",
        lambda path: path.write_text("sep=|\nquestion|answer\nWie geht's?|Schön 🙂, danke.\nb|B\n"),
        _lines(3, 4),
        "CSV with bars",
    ),
    "tsv": (
        "d.tsv",
        lambda path: path.write_text("question\tanswer\nWie geht's?\tSchön 🙂, danke.\nb\tB\n"),
        _lines(2, 3),
        "TSV with tabs",
    ),
    "parquet": ("d.parquet", _write_parquet, _ROWS_1_2, "Parquet"),
    "gzip": ("d.jsonl.gz", lambda path: path.write_bytes(gzip.compress(_LINES.encode())), _lines(1, 2), "JSON lines"),
    "bzip2": ("d.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(_LINES.encode())), _lines(1, 2), "JSON lines"),
    "zstandard": ("d.jsonl.zst", _compress_zst, _lines(1, 2), "JSON lines"),
    "saved-by-datasets": (
        "saved",
        lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
        _ROWS_1_2,
        "saved by datasets",
    ),
}


@pytest.mark.parametrize(("name", "write", "places", "layout"), SOURCES.values(), ids=SOURCES)
def test_read_table_gives_the_same_rows_when_they_lie_in_another_format(
    tmp_path: Path, name: str, write: Callable[[Path], object], places: list[RowPlace], layout: str
) -> None:
    """Each row with the line of the file on which it begins, or its number; the layout says how it was read."""
    write(tmp_path / name)

    table = read_table(tmp_path / name)

    assert [RawRow(place, row) for place, row in zip(places, ROWS, strict=True)] == table.rows
    assert layout == table.layout


def test_read_table_counts_the_lines_of_a_field_when_it_is_quoted(tmp_path: Path) -> None:
    """A row of a CSV begins where an editor shows it, however many lines the rows before it take."""
    path = tmp_path / "d.csv"
    path.write_text('question,answer\n"two\nlines","a ""quoted"" word"\nb,B\n')

    rows = read_table(path).rows

    assert RawRow(RowPlace(2), {"question": "two\nlines", "answer": 'a "quoted" word'}) == rows[0]
    assert RawRow(RowPlace(4), {"question": "b", "answer": "B"}) == rows[1]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "latin-1"])
def test_read_table_reads_another_encoding_when_it_is_named(tmp_path: Path, encoding: str) -> None:
    """A file from Windows needs no other tool."""
    path = tmp_path / "d.csv"
    path.write_bytes("question;answer\nGrüße?;Schön\n".encode(encoding))

    assert [RawRow(RowPlace(2), {"question": "Grüße?", "answer": "Schön"})] == read_table(path, encoding=encoding).rows


def test_read_table_takes_the_split_when_a_folder_has_several(tmp_path: Path) -> None:
    """The names of files tell the splits; several files of one split are read in order."""
    write_rows(tmp_path / "data/train-0.jsonl", ROWS[:1])
    write_rows(tmp_path / "data/train-1.jsonl", ROWS[1:])
    write_rows(tmp_path / "data/test.jsonl", ROWS)

    table = read_table(tmp_path, split="train")

    assert ROWS == [row.document for row in table.rows]
    assert [f"{tmp_path}/data/train-{n}.jsonl" for n in (0, 1)] == [row.place.file for row in table.rows]
    assert 2 == len(read_table(tmp_path, split="test").rows)


def test_read_table_gives_the_names_of_classes_when_datasets_has_numbers(tmp_path: Path) -> None:
    """A topic is learned as its word, not as its number."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["card", "loan"])}
    )
    datasets.Dataset.from_list([{"text": "a", "topic": 1}], features=features).save_to_disk(tmp_path / "saved")

    assert [RawRow(RowPlace(1, "row"), {"text": "a", "topic": "loan"})] == read_table(tmp_path / "saved").rows


def test_read_table_takes_the_split_when_datasets_saved_several(tmp_path: Path) -> None:
    """A data set of several splits is read with one of them."""
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    parts.save_to_disk(tmp_path / "saved")

    assert ROWS[:1] == [row.document for row in read_table(tmp_path / "saved", split="test").rows]


def test_read_table_says_that_the_hub_gives_nothing_when_it_can_not_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An id of the hub is told from a path by its look; without the hub the error names both."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    with pytest.raises(
        DataError, match=r"^some/set: there is no such file, and the hub gives no data set of this name: "
    ):
        read_table("some/set", split="train")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of the hub with two configurations; the library reads it from a folder."""
    folder = tmp_path / "gsm"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"question": f"{name} {split}?", "answer": "4"}]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configurations = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset: load(str(folder), subset, cache_dir=cache))
    return "openai/gsm"


def test_read_table_reads_one_split_of_one_configuration_when_the_hub_has_several(hub: str) -> None:
    """Both are named; what is read has the columns of the set."""
    table = read_table(hub, subset="socratic", split="test")

    assert [{"question": "socratic test?", "answer": "4"}] == [row.document for row in table.rows]


@pytest.mark.parametrize(
    ("subset", "found"), [(None, "has several configurations"), ("mian", "has no configuration 'mian'")]
)
def test_read_table_names_the_configurations_when_none_or_another_is_named(
    hub: str, subset: str | None, found: str
) -> None:
    """The library's first line alone says neither which there are nor how to choose."""
    with pytest.raises(DataError) as caught:
        read_table(hub, subset=subset)

    assert f"openai/gsm: {found}; say which with --subset NAME: main, socratic" == str(caught.value)


def test_read_table_asks_no_hub_when_the_first_folder_of_the_path_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path looks like an id; its error comes at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))

    with pytest.raises(DataError, match=r"^data/tickets: there is no such file in the folder data; "):
        read_table("data/tickets")


def test_read_dataset_hashes_the_bytes_of_the_file_when_it_is_compressed(tmp_path: Path) -> None:
    """The hash names the very file that was given."""
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"messages": make_messages("a", "b")}) + "\n").encode(), mtime=0))
    other = tmp_path / "e.jsonl.gz"
    other.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=1))

    assert read_dataset(path).rows == read_dataset(other).rows
    assert read_dataset(path).sha256 != read_dataset(other).sha256


def test_read_table_tells_rows_apart_when_files_of_a_folder_have_the_same_lines(tmp_path: Path) -> None:
    """The same line of two files is two places; rows of a Parquet file are rows."""
    write_rows(tmp_path / "a.jsonl", ROWS)
    write_rows(tmp_path / "b.jsonl", ROWS)
    _write_parquet(tmp_path / "c.parquet")

    places = [row.place for row in read_table(tmp_path, name="f").rows]

    assert ["f/a.jsonl:1", "f/a.jsonl:2", "f/b.jsonl:1", "f/b.jsonl:2", "f/c.parquet: row 1", "f/c.parquet: row 2"] == [
        place.within("f") for place in places
    ]


def test_empty_last_columns_are_left_out_when_a_spreadsheet_wrote_them(tmp_path: Path) -> None:
    """A column that was emptied leaves its delimiter in every record; one with a value in it needs a name."""
    path = tmp_path / "t.csv"
    path.write_text("question;answer;;\nq;a;;\nr;b; ;\n")
    assert [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}] == [
        row.document for row in read_table(path).rows
    ]
    path.write_text("question;answer;;\nq;a\nr;b;\ns\nt;c;;;\n")  # Excel leaves some of the last delimiters out
    problems = ["", "", *(f"expected 4 fields as in the header, found {count}" for count in (1, 5))]
    assert problems == [row.problem.partition(";")[0] for row in read_table(path).rows]
    path.write_text("question;answer;;\nq;a;;\nr;b;x;\n")
    with pytest.raises(DataError, match=r"column 3 has no name.*name it, or delete the column"):
        read_table(path)
