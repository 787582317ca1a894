"""Checking a file of chat rows a line at a time: every bad line by its number, no more memory than a line takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.chat_rows import check_chat_file
from adapters.errors import DataError
from tests.support.conversations import easy_rows, write_rows
from training.formats import read_chat_dataset


def test_check_chat_file_counts_rows_when_all_are_good(tmp_path: Path) -> None:
    """Blank lines are no rows."""
    path = write_rows(tmp_path / "good.jsonl", easy_rows(3))
    path.write_bytes(path.read_bytes() + b"\n  \n")
    assert check_chat_file(path) == 3


def test_check_chat_file_names_lines_and_counts_the_rest_when_many_are_bad(tmp_path: Path) -> None:
    """Twenty problems are shown, the others counted; the good line between them is not named."""
    path = tmp_path / "bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    path.write_text("{\n" + good + "[]\n" * 24)
    with pytest.raises(DataError) as caught:
        check_chat_file(path)
    assert caught.value.param == "file"
    assert len(caught.value.problems) == 20
    assert caught.value.problems[0].startswith("line 1: not JSON")
    assert caught.value.problems[1].startswith("line 3: field messages")
    assert str(caught.value).endswith("... and 5 more")


def test_check_chat_file_refuses_a_file_without_rows_when_it_is_blank(tmp_path: Path) -> None:
    """An empty file trains nothing."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        check_chat_file(path)


def test_check_chat_file_goes_on_behind_a_line_when_it_is_too_long(tmp_path: Path) -> None:
    """A line of nine million bytes is one problem of one line, and the number of the next is right."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"x" * 9_000_000 + b"\n{\n")
    with pytest.raises(DataError) as caught:
        check_chat_file(path)
    assert caught.value.problems[0] == "line 1: longer than 4194304 bytes"
    assert caught.value.problems[1].startswith("line 2: not JSON")
    assert len(caught.value.problems) == 2


def test_check_chat_file_finds_what_the_trainer_finds_when_lines_are_bad(tmp_path: Path) -> None:
    """What is uploaded without complaint can be trained, and what the trainer refuses can't be uploaded."""
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": " "}]}, {"text": "x"}]
    path = write_rows(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError) as uploaded:
        check_chat_file(path)
    with pytest.raises(DataError) as trained:
        read_chat_dataset(path, name="f")
    expected = [problem.replace("f:", "line ", 1) for problem in trained.value.problems]
    assert len(expected) == 3
    assert expected == uploaded.value.problems


@pytest.mark.parametrize("key", ["tools", "functions", "parallel_tool_calls"])
def test_row_is_refused_when_a_key_would_change_its_meaning(key: str, tmp_path: Path) -> None:
    """An id is a note of the owner's; tools that nobody renders would train another conversation than the one given."""
    row = {"messages": easy_rows(1)[0]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "id": 7}))
    assert 1 == check_chat_file(path)
    path.write_text(json.dumps({**row, key: []}))
    with pytest.raises(DataError, match=f"line 1: key '{key}' is not supported"):
        check_chat_file(path)


def test_check_gives_up_when_nothing_fits(tmp_path: Path) -> None:
    """A file of nonsense is refused after 1,000 wrong lines, and what is said of it stays short."""
    path = tmp_path / "rows.jsonl"
    path.write_text("0\n" * 5000)
    with pytest.raises(DataError) as caught:
        check_chat_file(path)
    assert "980 more" in str(caught.value)
    users = {"messages": [{"role": "user", "content": "x"}] * 5000}
    path.write_text(json.dumps(users))
    with pytest.raises(DataError) as caught:
        check_chat_file(path)
    assert len(str(caught.value)) < 500
