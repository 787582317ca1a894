"""Training files: every problem is named by file, line and field; good files are read whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from adapters.chat_rows import ChatRow
from adapters.errors import DataError
from adapters.row_places import RowPlace
from tests.support.conversations import make_messages, write_rows
from training.formats import NumberedRow, read_dataset

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'


def _with(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


def _with_first(**message: object) -> bytes:
    return _with(message, {"role": "assistant", "content": "ho"})


BAD_LINES = {
    "not-json": (b"hello", r"not JSON: .*\(column 1\)"),
    "cut-json": (GOOD[:-5], r"not JSON: .*\(column \d+\)"),
    "two-objects": (GOOD + b" " + GOOD, r"not JSON: Extra data .*"),
    "not-utf-8": (b'{"messages": "\xe9"}', r"not UTF-8 \(byte 14\)"),
    "nested-too-deeply": (b"[" * 100_000, "not a row: nested too deeply"),
    "row-is-a-list": (b"[" + GOOD + b"]", 'expected a row with "messages" .*, found list'),
    "row-is-null": (b"null", 'expected a row with "messages" .*, found nothing'),
    "row-is-text": (b'"messages"', 'expected a row with "messages" .*, found str'),
    "messages-missing": (b'{"topic": "hi", "b": "ho"}', 'expected a row with "messages" .*, found the keys b, topic'),
    "messages-is-text": (b'{"messages": "hi"}', "field messages: expected a list of messages, found str"),
    "messages-is-an-object": (b'{"messages": {"role": "user"}}', "field messages: expected a list .*, found dict"),
    "messages-is-null": (b'{"messages": null}', 'expected a row with "messages" .*, found the keys none'),
    "messages-is-empty": (_with(), "field messages: expected at least one message, found none"),
    "message-is-text": (_with("hi"), r"field messages\[0\]: expected an object with role and content, found str"),
    "message-is-null": (_with(None), r"field messages\[0\]: expected an object with role and content, found nothing"),
    "message-has-another-key": (
        _with_first(role="user", content="hi", function_call={}),
        r"field messages\[0\]: key 'function_call' is not supported; expected role, content, weight, name, .*",
    ),
    "role-missing": (
        _with_first(content="hi"),
        r"field messages\[0\]\.role: expected one of system, user, assistant, tool, found None",
    ),
    "role-unknown": (_with_first(role="bot", content="hi"), r"roles that are not known: 'bot' \(1 row\); say .*=ROLE"),
    "role-in-capitals": (_with_first(role="User", content="hi"), r"roles that are not known: 'User' \(1 row\); .*"),
    "role-is-a-list": (_with_first(role=["user"], content="hi"), r"field messages\[0\]\.role: .*, found \['user'\]"),
    "role-is-endless": (
        _with_first(role="x" * 5000, content="hi"),
        r"roles that are not known: 'x{59} \(1 row\); .* x{60}=ROLE",
    ),
    "content-missing": (_with_first(role="user"), r"field messages\[0\]\.content: expected text, found nothing"),
    "content-is-a-number": (
        _with_first(role="user", content=1),
        r"field messages\[0\]\.content: expected text, found int",
    ),
    "content-has-an-image": (
        _with_first(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        r'field messages\[0\]\.content\[0\]: expected {"type": "text", "text": "..."}, found {"type": "image_url", .*',
    ),
    "content-is-empty": (_with_first(role="user", content=""), r"field messages\[0\]\.content: is empty"),
    "content-is-whitespace": (
        _with({"role": "user", "content": "hi"}, {"role": "assistant", "content": " \n\t\u00a0"}),
        r"field messages\[1\]\.content: is empty",
    ),
    "system-in-the-middle": (
        _with(
            {"role": "user", "content": "hi"},
            {"role": "system", "content": "be brief"},
            {"role": "assistant", "content": "ho"},
        ),
        r"field messages: a system message may only stand first; leave out .*--roles NAME=none: all that it says\)",
    ),
    "two-systems": (
        _with({"role": "system", "content": "be"}, {"role": "system", "content": "brief"}, *make_messages("hi", "ho")),
        r"field messages: a system message may only stand first; leave out .*--roles NAME=none: all that it says\)",
    ),
    "system-alone": (
        _with({"role": "system", "content": "be brief"}, {"role": "assistant", "content": "ho"}),
        "field messages: expected user and assistant in turn, ending with assistant, found system, assistant",
    ),
    "two-users-in-a-row": (
        _with({"role": "user", "content": "hi"}, *make_messages("hi", "ho")),
        "field messages: expected user and assistant in turn, .*, found user, user, assistant; join what one .*",
    ),
    "ends-with-user": (
        _with(*make_messages("hi", "ho", "and then")),
        "field messages: expected user and assistant in turn, .*, found user, assistant, user; take out what .*",
    ),
    "starts-with-assistant": (
        _with({"role": "assistant", "content": "ho"}, *make_messages("hi", "ho")),
        "field messages: expected user and assistant in turn, .*, found assistant, user, assistant; take out what .*",
    ),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_read_dataset_names_file_line_and_field_when_a_line_is_bad(tmp_path: Path, line: bytes, expected: str) -> None:
    """One bad line between good ones is one problem, and says where it is and what was expected."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]) + b"\n")

    with pytest.raises(DataError, match=rf"^{path}:2: {expected}$") as caught:
        read_dataset(path)

    assert [str(caught.value)] == caught.value.problems


@pytest.mark.parametrize("content", [b"", b"\n", b"\n \n\t\r\n\n"], ids=["empty", "one-newline", "blank-lines"])
def test_read_dataset_says_what_it_expected_when_the_file_holds_no_rows(tmp_path: Path, content: bytes) -> None:
    """A file without rows is an error that shows the shape of one."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)

    with pytest.raises(DataError, match=rf'^{path}: holds no rows; expected a row with "messages" .* on each line$'):
        read_dataset(path)


def test_read_dataset_names_the_file_when_it_is_missing(tmp_path: Path) -> None:
    """A wrong path is an error of the data, in the words of the operating system."""
    path = tmp_path / "nowhere.jsonl"

    with pytest.raises(DataError, match=rf"^{path}: can't be read: No such file or directory$"):
        read_dataset(path)


def test_read_dataset_names_the_path_when_it_is_a_folder(tmp_path: Path) -> None:
    """A folder without data is an error that says which files it looked for."""
    with pytest.raises(DataError, match=rf"^{tmp_path}: is a folder without a file whose name ends in .jsonl, .*$"):
        read_dataset(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_read_dataset_names_the_file_when_it_may_not_be_read(tmp_path: Path) -> None:
    """A file that this user may not read is an error of the data."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)

    with pytest.raises(DataError, match=rf"^{path}: can't be read: Permission denied$"):
        read_dataset(path)


def test_read_dataset_names_every_problem_of_a_line_when_it_has_several(tmp_path: Path) -> None:
    """One look at the error is enough to mend the whole row."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(_with({"role": "bot", "content": "", "audio": "x"}, "ho"))

    with pytest.raises(DataError) as caught:
        read_dataset(path)

    keys = "role, content, weight, name, tool_calls, tool_call_id"
    which = "say which of system, user, assistant, tool each of them is, or none to leave out what it says"
    assert [
        f"{path}:1: field messages[0]: key 'audio' is not supported; expected {keys}",
        f"{path}:1: roles that are not known: 'bot' (1 row); {which}: --roles bot=ROLE",
        f"{path}:1: field messages[0].content: is empty",
        f"{path}:1: field messages[1]: expected an object with role and content, found str",
    ] == caught.value.problems


def test_read_dataset_counts_blank_lines_when_it_names_a_line(tmp_path: Path) -> None:
    """The number is the one that an editor shows."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + GOOD + b"\n\n \nbad\n")

    with pytest.raises(DataError, match=rf"^{path}:5: not JSON"):
        read_dataset(path)


@pytest.mark.parametrize(("num_bad", "num_more"), [(20, 0), (21, 1), (57, 37)])
def test_read_dataset_shows_twenty_problems_when_there_are_more(tmp_path: Path, num_bad: int, num_more: int) -> None:
    """A wholly bad file fills one screen, and the rest is counted."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(b" " * number + b"bad\n" for number in range(num_bad)))  # each a column further right

    with pytest.raises(DataError) as caught:
        read_dataset(path)

    lines = str(caught.value).splitlines()
    assert [f"{path}:{number}: " for number in range(1, 21)] == [line[: line.index("not")] for line in lines[:20]]
    assert ([f"... and {num_more} more"] if num_more else []) == lines[20:]


def test_read_dataset_keeps_rows_in_order_when_the_file_is_good(tmp_path: Path) -> None:
    """Each row holds its messages and the line that it came from; blank lines are skipped."""
    first = make_messages("Wie geht's?", "Schön 🙂.", system="Sei kurz.")
    second = make_messages("a", "b", "c", "d")
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([b"", json.dumps({"messages": first}).encode(), b"  ", _with(*second)]))

    dataset = read_dataset(path)

    assert (
        NumberedRow(RowPlace(2), ChatRow(tuple(first))),
        NumberedRow(RowPlace(4), ChatRow(tuple(second))),
    ) == dataset.rows
    assert str(path) == dataset.name


def test_read_dataset_ignores_a_column_when_it_is_not_messages(tmp_path: Path) -> None:
    """Rows often carry an id or a source beside their messages."""
    messages = make_messages("hi", "ho")
    path = write_rows(tmp_path / "data.jsonl", [{"id": 7, "messages": messages, "source": {"page": [1]}}])

    assert (NumberedRow(RowPlace(1), ChatRow(tuple(messages))),) == read_dataset(path).rows


def test_read_dataset_reads_the_same_rows_when_lines_end_in_crlf(tmp_path: Path) -> None:
    """A file from Windows is no different, its blank lines included."""
    unix, windows = tmp_path / "unix.jsonl", tmp_path / "windows.jsonl"
    unix.write_bytes(GOOD + b"\n\n" + GOOD + b"\n")
    windows.write_bytes(unix.read_bytes().replace(b"\n", b"\r\n"))

    assert read_dataset(unix).rows == read_dataset(windows).rows


def test_read_dataset_reads_the_same_rows_when_the_file_begins_with_a_bom(tmp_path: Path) -> None:
    """The byte order mark that Windows editors write is no part of the first row."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n")

    assert [row.place.number for row in read_dataset(path).rows] == [1, 2]


def test_read_dataset_keeps_one_row_when_its_text_holds_a_line_separator(tmp_path: Path) -> None:
    """U+2028 and U+0085 are text inside a JSON string, not the end of a line."""
    messages = make_messages("one\u2028two\u0085three", "ho\x0b")
    path = write_rows(tmp_path / "data.jsonl", [messages])

    assert (NumberedRow(RowPlace(1), ChatRow(tuple(messages))),) == read_dataset(path).rows


def test_read_dataset_hashes_the_bytes_when_the_rows_are_equal(tmp_path: Path) -> None:
    """The recorded hash is the one that sha256sum prints, so that a file can be recognised."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(GOOD)
    second.write_bytes(GOOD + b"\n")

    assert hashlib.sha256(GOOD).hexdigest() == read_dataset(first).sha256
    assert hashlib.sha256(GOOD + b"\n").hexdigest() == read_dataset(second).sha256


def test_rows_are_read_when_another_program_has_exported_them(tmp_path: Path) -> None:
    """One list of objects somewhere in an object; what lies in objects of a row is named with dots."""
    items = [{"id": n, "ticket": {"question": f"Q{n}"}, "reply": {"agent": {"name": "x"}, "text": "A"}} for n in (1, 2)]
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"meta": {"by": "helpdesk"}, "result": {"total": 2, "items": items}}))

    with pytest.raises(DataError, match=r"the columns ticket.question, reply.agent.name, reply.text, id are no shape"):
        read_dataset(path)
    dataset = read_dataset(path, mapping={"user": "ticket.question", "assistant": "reply.text"})

    assert "JSON, rows in 'result.items': mapped to chat (user = ticket.question, assistant = reply.text" in (
        dataset.recognised
    )
    rows = [numbered.row for numbered in dataset.rows if isinstance(numbered.row, ChatRow)]
    assert ["Q1", "Q2"] == [row.messages[0]["content"] for row in rows]


def test_object_is_one_row_when_it_has_columns_of_a_row(tmp_path: Path) -> None:
    """A list of objects beside a question and its answer is no list of rows."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"question": "Q", "answer": "A", "sources": [{"url": "x"}]}, indent=1))
    assert 1 == len(read_dataset(path).rows)


def test_table_is_refused_with_advice_when_it_has_one_message_a_row(tmp_path: Path) -> None:
    """Its texts would be learned one by one, without what they answer; told otherwise, they are."""
    path = tmp_path / "turns.tsv"
    path.write_text("chat_id\tspeaker\ttext\n1\tcustomer\thi\n1\tagent\thello\n")

    with pytest.raises(DataError, match=r"has a column 'speaker' beside the text, .* expected one conversation a row"):
        read_dataset(path)
    assert "text" == read_dataset(path, mapping={"text": "text"}).kind


def test_read_dataset_tells_a_problem_once_when_many_rows_have_it(tmp_path: Path) -> None:
    """With the first lines that have it and a count of the rest; another problem stands beside it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"bad\n" * 7 + GOOD + b"\nnull\n")

    with pytest.raises(DataError) as caught:
        read_dataset(path)

    first, second = caught.value.problems
    assert f"{path}: lines 1, 2, 3, 4, 5 and 2 more: not JSON: Expecting value (column 1)" == first
    assert second.startswith(f"{path}:9: expected a row with ")
