"""A zoo of training data that must be refused: each entry writes one source and says what is to be told of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.support.conversations import make_messages

__all__ = ["ZOO", "BadData"]

_GOOD = {"messages": make_messages("q", "a")}


@dataclass(frozen=True)
class BadData:
    """One way to be bad.

    Args:
        file: The source's name.
        write: Writes it at a path.
        words: What the message says behind the source's name; a part of it.
        options: How it is read.
    """

    file: str
    write: Callable[[Path], object]
    words: str
    options: dict[str, Any] = field(default_factory=dict)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _text(content: str) -> Callable[[Path], object]:
    return _bytes(content.encode())


def _rows(*rows: Any) -> Callable[[Path], object]:
    """JSON lines, with a good row in front where more than one is given."""
    return _text("".join(json.dumps(row) + "\n" for row in rows))


def _chat(*messages: Any, **fields: Any) -> Callable[[Path], object]:
    return _rows(_GOOD, {"messages": list(messages), **fields})


def _folder(**files: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_text(content)

    return write


def _parquet(rows: list[dict[str, Any]]) -> Callable[[Path], object]:
    return lambda path: parquet.write_table(pa.Table.from_pylist(rows), path)


_USER = {"role": "user", "content": "q"}
_ASSISTANT = {"role": "assistant", "content": "a"}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_QA = "question,answer\nq,a\n"

ZOO: dict[str, BadData] = {
    # Files
    "missing": BadData("d.jsonl", lambda path: None, ": can't be read: No such file or directory"),
    "empty": BadData("d.jsonl", _text(""), ": holds no rows; expected a row with"),
    "blank-csv": BadData(
        "d.csv", _text("question,answer\n"), ": holds no rows; expected a header, and a record a row below it"
    ),
    "spreadsheet": BadData(
        "d.XLSX",
        _bytes(b"PK\3\4"),
        ": expected a file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, found '.XLSX'; save",
    ),
    "cut-document": BadData(
        "d.json",
        _text('{\n"tickets": [\n{"user": "hi", "assist'),
        ":3: not JSON: Unterminated string starting at (column 16); the file seems to be cut off at its end",
    ),
    "cut-behind-a-row": BadData(
        "d.json",
        _text('[\n{"user": "hi", "assistant": "ho"},\n'),
        ":3: not JSON: Expecting value (column 1); the file seems to be cut off at its end",
    ),
    "wrong-document": BadData(
        "d.json", _text('{\n"tickets": [\n{"user" "hi"}]}\n'), ":3: not JSON: Expecting ':' delimiter (column 9)"
    ),
    "other-suffix": BadData("d.docx", _bytes(b"PK\3\4"), ": expected a file whose name ends in .jsonl, .ndjson, .json"),
    "empty-folder": BadData("d", _folder(readme_md="no data"), ": is a folder without a file whose name ends in"),
    "several-splits": BadData(
        "d",
        _folder(train_csv=_QA, test_csv=_QA),
        ": has the splits test, train; say which: --split NAME (--validation-split for validation data)",
    ),
    "unknown-split": BadData(
        "d", _folder(train_csv=_QA), ": has no split 'dev2'; expected one of train", {"split": "dev2"}
    ),
    "split-of-a-file": BadData(
        "d.csv", _text(_QA), ": is one file and has no splits; leave split 'train' out", {"split": "train"}
    ),
    "damaged-gzip": BadData(
        "d.jsonl.gz", _bytes(gzip.compress(b"x" * 1000)[:-20]), ": is no gzip file that can be read"
    ),
    "damaged-parquet": BadData("d.parquet", _bytes(b"PAR1 and no more"), ": is no Parquet file that can be read"),
    "csv-called-parquet": BadData(
        "d.parquet", _text(_QA), ": expected a Parquet file, which begins with PAR1, found b'ques'"
    ),
    # Encodings
    "utf-16": BadData("d.jsonl", _bytes(json.dumps(_GOOD).encode("utf-16")), ": is UTF-16; save the file as UTF-8"),
    "utf-16-without-a-mark": BadData(
        "d.csv", _bytes(_QA.encode("utf-16-le")), ": holds a NUL byte in every few: it is binary, or UTF-16"
    ),
    "latin-1-csv": BadData(
        "d.csv",
        _bytes("question,answer\nGr\xfc\xdfe,a\n".encode("latin-1")),
        ":2: not UTF-8 (byte 0xfc); save the file",
    ),
    "latin-1-json-lines": BadData("d.jsonl", _bytes(b'{"messages": "\xe9"}\n'), ":1: not UTF-8 (byte 14)"),
    "wrong-encoding-named": BadData(
        "d.csv", _bytes("question\n\xfc".encode("latin-1")), ":2: not ASCII (byte 0xfc); save", {"encoding": "ascii"}
    ),
    "unknown-encoding": BadData(
        "d.csv", _text(_QA), "encoding 'utf-7b': expected a name such as utf-8", {"encoding": "utf-7b"}
    ),
    "nul-byte": BadData("d.csv", _text("question,answer\nq\0q,a\n"), ":2: field question: holds a NUL character"),
    # JSON
    "cut-line": BadData("d.jsonl", _text(json.dumps(_GOOD) + "\n" + '{"messages": ['), ":2: not JSON: Expecting value"),
    "two-rows-in-a-line": BadData("d.jsonl", _text(2 * json.dumps(_GOOD)), ":1: not JSON: Extra data"),
    "cut-list": BadData("d.json", _text(json.dumps([_GOOD], indent=1)[:-2]), ":13: not JSON: Expecting ',' or ']'"),
    "more-behind-a-list": BadData(
        "d.json", _text(json.dumps([_GOOD]) + "\n{}"), ":2: not JSON: Extra data behind the list"
    ),
    "several-lists": BadData(
        "d.json",
        _text(json.dumps({"train": [_GOOD], "test": [_GOOD]})),
        ": holds several lists of rows, train, test; make a file of each",
    ),
    "deep": BadData("d.jsonl", _text("[" * 100_000), ":1: not JSON that can be read"),
    "row-is-text": BadData("d.jsonl", _rows(_GOOD, "hi"), ":2: expected a row with"),
    # CSV
    "quote-without-end": BadData(
        "d.csv", _text('question,answer\nq,"a\nb,c\n'), ":2: can't be read as CSV: unexpected end of data"
    ),
    "too-many-fields": BadData(
        "d.csv", _text(_QA + "q,a,b\n"), ":3: expected 2 fields as in the header, found 3; put text with delimiters"
    ),
    "column-without-a-name": BadData("d.csv", _text("question,,answer\nq,x,a\n"), ":1: column 2 has no name"),
    "two-columns-of-a-name": BadData(
        "d.csv", _text("question,answer,answer\nq,a,b\n"), ":1: expected different names in the header, found 'answer'"
    ),
    "empty-cell": BadData("d.csv", _text(_QA + "q,\n"), ":3: field answer: is empty"),
    "messages-in-python": BadData(
        "d.csv",
        _text("messages\n\"[{'role': 'user'}]\"\n"),
        ":2: field messages: expected the JSON text of a list, found \"[{'role': 'user'}]\"; it looks like",
    ),
    # Shapes
    "no-shape": BadData(
        "d.csv", _text("frage,antwort\nq,a\n"), ": the columns frage, antwort are no shape that is known; say which"
    ),
    "text-and-topic": BadData(
        "d.csv", _text("text,topic\nq,a\n"), ": the columns text, topic could be texts with their topics, or plain text"
    ),
    "several-shapes": BadData(
        "d.jsonl",
        _rows({"question": "q", "answer": "a", "text": "t"}),
        ": the columns question, answer, text could be read in several ways; say which: question and answer: --map",
    ),
    "mapped-column-missing": BadData(
        "d.csv",
        _text(_QA),
        ": has no column 'frage'; its columns are question, answer",
        {"mapping": {"user": "frage", "assistant": "answer"}},
    ),
    "mapping-incomplete": BadData(
        "d.csv", _text(_QA), ": no row is made of user alone; map one of these sets", {"mapping": {"user": "question"}}
    ),
    "two-kinds": BadData("d.jsonl", _rows(_GOOD, _GOOD, {"text": "t"}), ":3: a text row among chat rows; expected one"),
    # Conversations
    "messages-empty": BadData("d.jsonl", _chat(), ":2: field messages: expected at least one message, found none"),
    "unknown-role": BadData(
        "d.jsonl",
        _chat({"role": "bot", "content": "q"}, _ASSISTANT),
        ":2: roles that are not known: 'bot' (1 row); say",
    ),
    "unknown-sharegpt-role": BadData(
        "d.json",
        _rows({"conversations": [{"from": "narrator", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ":1: roles that are not known: 'narrator' (1 row); say which of system, user, assistant, tool",
    ),
    "ends-with-user": BadData(
        "d.jsonl",
        _chat(_USER, _ASSISTANT, _USER),
        ":2: field messages: expected user and assistant in turn, ending with",
    ),
    "late-system": BadData(
        "d.jsonl",
        _chat(_USER, {"role": "system", "content": "s"}, _ASSISTANT),
        ":2: field messages: a system message may only stand first",
    ),
    "empty-answer": BadData(
        "d.jsonl", _chat(_USER, {"role": "assistant", "content": " "}), ":2: field messages[1].content: is empty"
    ),
    "image": BadData(
        "d.jsonl",
        _chat({"role": "user", "content": [{"type": "image_url"}]}, _ASSISTANT),
        ':2: field messages[0].content[0]: expected {"type": "text"',
    ),
    "half-a-surrogate": BadData(
        "d.jsonl", _chat({"role": "user", "content": "\ud800"}, _ASSISTANT), ":2: field messages[0].content: holds half"
    ),
    "unanswered-call": BadData(
        "d.jsonl",
        _chat(_USER, {"role": "assistant", "tool_calls": [_CALL]}, _ASSISTANT),
        ":2: field messages[2]: expected a tool message for each call",
    ),
    "no-weight": BadData(
        "d.jsonl", _chat(_USER, {**_ASSISTANT, "weight": 0}), ":2: field messages: every assistant message has weight 0"
    ),
    "bad-tool": BadData("d.jsonl", _chat(_USER, _ASSISTANT, tools=[{}]), ":2: field tools[0]: expected"),
    # Preferences and labels
    "nothing-to-prefer": BadData(
        "d.jsonl", _rows({"prompt": "q", "chosen": "a", "rejected": "a"}), ":1: field rejected: is the same as chosen"
    ),
    "conversations-that-part-early": BadData(
        "d.jsonl",
        _rows({"chosen": make_messages("q", "a", "r", "b"), "rejected": make_messages("p", "a", "r", "c")}),
        ":1: field rejected: expected the messages of chosen but for the last one",
    ),
    "texts-without-a-prompt": BadData(
        "d.jsonl",
        _rows({"chosen": "a", "rejected": "b"}),
        ":1: field chosen: expected a list of messages, as there is no prompt beside it, found str",
    ),
    "label-of-three": BadData(
        "d.parquet",
        _parquet([{"prompt": "q", "completion": "a", "label": 3}]),
        ": row 1: field label: expected true or false, found 3",
    ),
}
