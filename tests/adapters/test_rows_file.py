"""Checking a file of rows a line at a time: bad lines by their numbers, other kinds of files by what they look like."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import pytest

from adapters.chat_messages import RowProblem
from adapters.chat_rows import EXPECTED_ROW, parse_document
from adapters.errors import DataError
from adapters.rows_file import CheckedFile, check_rows_file
from tests.support.conversations import easy_rows, make_messages, write_rows
from training.formats import read_dataset


def test_check_rows_file_counts_rows_when_all_are_good(tmp_path: Path) -> None:
    """Blank lines are no rows."""
    path = write_rows(tmp_path / "good.jsonl", easy_rows(3))
    path.write_bytes(path.read_bytes() + b"\n  \n")
    assert CheckedFile("chat", 3) == check_rows_file(path)


def test_check_rows_file_names_lines_and_counts_the_rest_when_many_are_bad(tmp_path: Path) -> None:
    """Equal problems are one, with the first of their lines; the good line between them is not named."""
    path = tmp_path / "bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    path.write_text("{\n" + good + "[]\n" * 24)
    with pytest.raises(DataError) as caught:
        check_rows_file(path)
    assert caught.value.param == "file"
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith("line 1: not JSON")
    assert caught.value.problems[1].startswith("lines 3, 4, 5, 6, 7 and 19 more: expected a row with")


def test_check_rows_file_refuses_a_file_without_rows_when_it_is_blank(tmp_path: Path) -> None:
    """An empty file trains nothing."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        check_rows_file(path)


def test_check_rows_file_goes_on_behind_a_line_when_it_is_too_long(tmp_path: Path) -> None:
    """A line of nine million bytes is one problem of one line, and the number of the next is right."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"x" * 9_000_000 + b"\n{\n")
    with pytest.raises(DataError) as caught:
        check_rows_file(path)
    assert caught.value.problems[0] == "line 1: longer than 4194304 bytes"
    assert caught.value.problems[1].startswith("line 2: not JSON")
    assert len(caught.value.problems) == 2


def test_check_rows_file_finds_what_the_trainer_finds_when_lines_are_bad(tmp_path: Path) -> None:
    """What is uploaded without complaint can be trained, and what the trainer refuses can't be uploaded."""
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": " "}]}, {"text": 7}]
    path = write_rows(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError) as uploaded:
        check_rows_file(path)
    with pytest.raises(DataError) as trained:
        read_dataset(path, name="f")
    expected = [problem.replace("f:", "line ", 1) for problem in trained.value.problems]
    assert len(expected) == 3
    assert expected == uploaded.value.problems


def test_check_gives_up_when_nothing_fits(tmp_path: Path) -> None:
    """A file of nonsense is refused after 1,000 wrong lines, and what is said of it stays short."""
    path = tmp_path / "rows.jsonl"
    path.write_text("0\n" * 5000)
    with pytest.raises(DataError) as caught:
        check_rows_file(path)
    assert caught.value.problems[0] == "1000 problems; no line behind line 1000 was looked at"
    assert caught.value.problems[1].startswith("lines 1, 2, 3, 4, 5 and 995 more: expected a row with")
    users = {"messages": [{"role": "user", "content": "x"}] * 5000}
    path.write_text(json.dumps(users))
    with pytest.raises(DataError) as caught:
        check_rows_file(path)
    assert len(str(caught.value)) < 500


def test_check_rows_file_refuses_a_row_when_it_is_of_another_kind_than_the_first(tmp_path: Path) -> None:
    """A method trains on one kind; a stray row of another is named by its line."""
    path = write_rows(tmp_path / "mixed.jsonl", [{"text": "a"}, make_messages("a", "b"), {"text": "c"}])
    with pytest.raises(DataError, match=r"^line 2: a chat row among text rows; expected one kind in a file$"):
        check_rows_file(path)


ASKED_FOR = "; it asks for --map, --roles or --encoding where they are needed"
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "csv": (b"question,answer\n1,2\n", "a table (CSV)", ""),
    "csv-of-excel": ("\ufefffrage;antwort\nGr\u00fc\u00dfe?;ja\n".encode(), "a table (CSV)", ""),
    "csv-in-quotes": (b'"question","answer"\n"1","2"\n', "a table (CSV)", ""),
    "csv-with-comments": (b"# from the shop\n\n# in May\nfrage;antwort\n1;2\n", "a table (CSV)", ""),
    "csv-in-cp1252": ("frage;antwort\nGr\u00fc\u00dfe?;ja\n".encode("cp1252"), "a table (CSV)", ""),
    "tsv": (b"question\tanswer\n1\t2\n", "a table with tabs (TSV)", ""),
    "json-list": (json.dumps([{"text": "a"}]).encode(), "one JSON list", ""),
    "json-document": (json.dumps({"data": [{"text": "a"}]}, indent=1).encode(), "one JSON document over", ""),
    "parquet": (b"PAR1\x15\x04", "Parquet", ""),
    "gzip": (gzip.compress(b'{"text": "a"}\n'), "a file compressed with gzip", ""),
    "utf-16": ('{"text": "a"}\n'.encode("utf-16"), "text in UTF-16", " --encoding utf-16"),
}


@pytest.mark.parametrize(("content", "title", "options"), OTHERS.values(), ids=OTHERS)
def test_check_rows_file_says_what_a_file_looks_like_when_it_is_of_another_kind(
    tmp_path: Path, content: bytes, title: str, options: str
) -> None:
    """One sentence: what it looks like, what is expected, and the command that makes rows of this file."""
    path = tmp_path / "rows"
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        check_rows_file(path, "my data.bin")

    (problem,) = caught.value.problems
    assert problem.startswith(f"the file looks like {title}")
    assert "expected JSON lines, a row a line" in problem
    assert problem.endswith(f"hotswap data convert {shlex.quote('my data.bin')} OUT.jsonl{options}{ASKED_FOR}")
    assert "file" == caught.value.param


def test_check_rows_file_names_no_table_when_only_comments_have_commas(tmp_path: Path) -> None:
    """A script or YAML begins with them: the first line is told that is no JSON."""
    path = tmp_path / "rows"
    path.write_text("# made by hand, in May\n# for the shop, not for us\nalias: legal\ndata: rows.jsonl\n")

    with pytest.raises(DataError) as caught:
        check_rows_file(path, "run.yaml")

    assert caught.value.problems[0].startswith("lines 1, 2, 3, 4: not JSON: ")


def test_check_rows_file_looks_no_further_when_one_row_has_a_thousand_problems(tmp_path: Path) -> None:
    """A line of megabytes may hold a million messages, and must not keep the server busy for seconds."""
    path = tmp_path / "rows"
    path.write_text('{"messages": [' + ",".join(["{}"] * 3000) + "]}\n")

    with pytest.raises(DataError) as caught:
        check_rows_file(path)

    assert str(caught.value).endswith("and 981 more")
    row, problems = parse_document({"messages": [{}] * 3000})
    assert (None, 1001) == (row, len(problems))
    assert RowProblem("messages", "2500 of 3000 messages were not looked at") == problems[-1]


def test_check_rows_file_says_to_save_a_sheet_when_it_is_one(tmp_path: Path) -> None:
    """A command over the sheet itself would only say so once more."""
    path = tmp_path / "rows"
    path.write_bytes(b"PK\x03\x04")

    with pytest.raises(
        DataError, match=r"Save it as CSV UTF-8, then: hotswap data convert FILE\.csv OUT\.jsonl; it asks for --map"
    ):
        check_rows_file(path, "tickets.xlsx")


def test_check_rows_file_names_the_command_when_no_line_has_the_columns_of_a_row(tmp_path: Path) -> None:
    """200 lines with columns of their own are one sentence; where other lines are rows, these are mistakes."""
    rows = [{"question_text": "q", "good_answer": "a"}] * 200
    path = write_rows(tmp_path / "rows.jsonl", rows)

    with pytest.raises(DataError) as caught:
        check_rows_file(path, "prefs.jsonl")

    found = f"{EXPECTED_ROW}, found the keys good_answer, question_text"
    command = "hotswap data convert prefs.jsonl OUT.jsonl" + ASKED_FOR
    assert [f"lines 1, 2, 3, 4, 5 and 195 more: {found}; other columns become rows with: {command}"] == (
        caught.value.problems
    )
    write_rows(path, [*easy_rows(1), rows[0]])
    with pytest.raises(DataError, match=r"found the keys good_answer, question_text$"):
        check_rows_file(path)
