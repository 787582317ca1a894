"""Shapes of training data: each is recognised by its columns, becomes the right rows, and is described in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.chat_messages import RowProblem
from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row, TextRow
from adapters.errors import DataError
from tests.support.conversations import make_messages, write_rows
from training.formats import read_dataset
from training.recognise import SHAPES, choose_shape, parse_mapping

_CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": {"order": 7}}}


def _preference(*prompt: str) -> PreferenceRow:
    return PreferenceRow(
        tuple(make_messages(*prompt)), {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    )


def _chat(*turns: str, system: str | None = None) -> ChatRow:
    return ChatRow(tuple(make_messages(*turns, system=system)))


SHAPED: dict[str, tuple[dict[str, Any], Row, str]] = {
    "messages": (
        {"messages": make_messages("q", "a"), "id": 7},
        _chat("q", "a"),
        "chat (messages = messages; ignored: id)",
    ),
    "messages-beside-their-text": (
        {"messages": make_messages("q", "a"), "text": "q a"},
        _chat("q", "a"),
        "chat (messages = messages; ignored: text)",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        _chat("q", "a", system="s"),
        "ShareGPT (messages = conversations, system = system)",
    ),
    "sharegpt-with-tools": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "look_up", "arguments": {"order": 7}}'},
                {"from": "observation", "value": "Berlin"},
                {"from": "gpt", "value": "In Berlin."},
            ]
        },
        ChatRow(
            (
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "content": "Berlin", "tool_call_id": "call_1"},
                {"role": "assistant", "content": "In Berlin."},
            )
        ),
        "ShareGPT (messages = conversations)",
    ),
    "sharegpt-under-another-name": (
        {"messages": [{"from": "user", "value": "q"}, {"from": "Assistant", "value": "a"}]},
        _chat("q", "a"),
        "chat (messages = messages)",
    ),
    "conversations-with-roles": (
        {"conversations": make_messages("q", "a")},
        _chat("q", "a"),
        "ShareGPT (messages = conversations)",
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        _chat("Add.\n\n1 and 2", "3"),
        "Alpaca (user = instruction, assistant = output, input = input)",
    ),
    "alpaca-beside-its-text": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is an instruction. Add. 1 and 2 3"},
        _chat("Add.\n\n1 and 2", "3"),
        "Alpaca (user = instruction, assistant = output, input = input; ignored: text)",
    ),
    "alpaca-without-input": (
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        _chat("Say hi.", "Hi"),
        "Alpaca (user = instruction, assistant = output, input = input)",
    ),
    "prompt-and-completion": (
        {"prompt": "q", "completion": "a"},
        _chat("q", "a"),
        "prompt and completion (user = prompt, assistant = completion)",
    ),
    "prompt-and-completion-in-messages": (
        {"prompt": make_messages("q", system="s"), "completion": [{"role": "assistant", "content": "a"}]},
        _chat("q", "a", system="s"),
        "prompt and completion (user = prompt, assistant = completion)",
    ),
    "gsm8k": (
        {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        _chat("1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2"),
        "question and answer (user = question, assistant = answer)",
    ),
    "text": ({"text": "Once."}, TextRow("Once."), "text (text = text)"),
    "code": (
        {"content": "x = 1\n", "lang": "Python", "licenses": ["mit"]},
        TextRow("x = 1\n"),
        "code (text = content; ignored: lang, licenses)",
    ),
    "preference": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        _preference("q"),
        "preference (prompt = prompt, chosen = chosen, rejected = rejected)",
    ),
    "preference-of-question": (
        {"question": "q", "chosen": "yes", "rejected": "no", "system": "s", "id": 1},
        replace(_preference("q"), prompt=tuple(make_messages("q", system="s"))),
        "preference (prompt = question, chosen = chosen, rejected = rejected, system = system; ignored: id)",
    ),
    "preference-of-conversations": (
        {"chosen": make_messages("q", "yes"), "rejected": make_messages("q", "no")},
        _preference("q"),
        "preference, whole conversations (chosen = chosen, rejected = rejected)",
    ),
    "preference-with-prompt-and-conversations": (
        {"prompt": "q", "chosen": make_messages("q", "yes"), "rejected": make_messages("q", "no")},
        _preference("q"),
        "preference (prompt = prompt, chosen = chosen, rejected = rejected)",
    ),
    "preference-of-transcripts": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: yes",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: no",
        },
        _preference("q", "a", "r"),
        "preference, whole conversations (chosen = chosen, rejected = rejected)",
    ),
    "preference-of-the-hosted-apis": (
        {
            "input": {"messages": make_messages("q")},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        },
        _preference("q"),
        (
            "preference of the hosted APIs (input = input, preferred_output = preferred_output, "
            "non_preferred_output = non_preferred_output)"
        ),
    ),
    "labelled": (
        {"prompt": "q", "completion": "a", "label": True},
        LabelledRow(({"role": "user", "content": "q"},), {"role": "assistant", "content": "a"}, True),
        "labelled (prompt = prompt, completion = completion, label = label)",
    ),
    "labelled-in-words": (
        {"prompt": "q", "completion": "a", "label": "False"},
        LabelledRow(({"role": "user", "content": "q"},), {"role": "assistant", "content": "a"}, False),
        "labelled (prompt = prompt, completion = completion, label = label)",
    ),
}


@pytest.mark.parametrize(("document", "row", "described"), SHAPED.values(), ids=SHAPED)
def test_read_dataset_recognises_the_shape_when_its_columns_are_known(
    tmp_path: Path, document: dict[str, Any], row: Row, described: str
) -> None:
    """The row is what the shape's authors meant, and the words say which column was taken for what."""
    dataset = read_dataset(write_rows(tmp_path / "data.jsonl", [document]))

    assert (row,) == tuple(numbered.row for numbered in dataset.rows)
    assert f"JSON lines: {described}" == dataset.recognised
    assert row.kind == dataset.kind


def test_every_shape_has_a_test_when_titles_are_compared() -> None:
    """The table above names each title but those of pairs that differ in their columns' names alone."""
    titles = {shape.title for shape in SHAPES}
    tested = {described.split(" (")[0] for _, _, described in SHAPED.values()}
    pairs = {shape.title for shape in SHAPES if set(shape.columns) == {"user", "assistant"}}
    assert len(pairs) >= 8
    assert titles - pairs <= tested


@pytest.mark.parametrize(
    ("document", "mapping", "row"),
    [
        ({"frage": "q", "antwort": "a"}, "user=frage,assistant=antwort", _chat("q", "a")),
        ({"text": "Where is it?", "topic": "delivery"}, "user=text,assistant=topic", _chat("Where is it?", "delivery")),
        ({"text": "Where is it?", "topic": 3}, "user=text,assistant=topic", _chat("Where is it?", "3")),
        ({"text": "Where is it?", "topic": "x"}, "text=text", TextRow("Where is it?")),
        ({"dialog": make_messages("q", "a"), "sys": "s"}, "messages=dialog,system=sys", _chat("q", "a", system="s")),
        ({"q": "q", "good": "yes", "bad": "no"}, "prompt=q,chosen=good,rejected=bad", _preference("q")),
        (
            {"q": "q", "a": "a", "thumbs": "1"},
            "prompt=q,completion=a,label=thumbs",
            LabelledRow(({"role": "user", "content": "q"},), {"role": "assistant", "content": "a"}, True),
        ),
        (
            {"messages": make_messages("q", "yes"), "prompt": "q", "chosen": "yes", "rejected": "no"},
            "messages=messages",
            _chat("q", "yes"),
        ),
    ],
)
def test_read_dataset_takes_the_mapped_columns_when_a_mapping_is_given(
    tmp_path: Path, document: dict[str, Any], mapping: str, row: Row
) -> None:
    """Columns of any name; where several shapes would fit, the mapping decides."""
    dataset = read_dataset(write_rows(tmp_path / "data.jsonl", [document]), mapping=parse_mapping([mapping]))

    assert (row,) == tuple(numbered.row for numbered in dataset.rows)


def test_read_dataset_names_the_columns_of_the_source_when_a_row_is_bad(tmp_path: Path) -> None:
    """A problem is told in the words of the file, not in those of the rows that were made of it."""
    path = tmp_path / "data.csv"
    path.write_text("frage;antwort;rolle\nq;;s\n;a;s\nq;a;\n")
    mapping = {"user": "frage", "assistant": "antwort", "system": "rolle"}

    with pytest.raises(DataError) as caught:
        read_dataset(path, mapping=mapping)

    assert [f"{path}:2: field antwort: is empty", f"{path}:3: field frage: is empty"] == caught.value.problems


def test_advice_reads_every_column_when_several_shapes_fit(tmp_path: Path) -> None:
    """Following it, a table with inputs keeps them."""
    document = {"instruction": "Add.", "input": "1 and 2", "output": "3", "question": "1 + 2?", "answer": "3"}
    path = write_rows(tmp_path / "data.jsonl", [document])

    with pytest.raises(DataError, match="could be read in several ways") as caught:
        read_dataset(path)

    advice = "user=instruction,assistant=output,input=input"
    assert f"Alpaca: --map {advice};" in str(caught.value)
    (numbered,) = read_dataset(path, mapping=parse_mapping([advice])).rows
    assert numbered.row == _chat("Add.\n\n1 and 2", "3")


@pytest.mark.parametrize(
    ("number", "text"), [(3, "3"), (3.0, "3"), (-2.5, "-2.5"), (1e300, str(int(1e300))), (10**30, "1" + "0" * 30)]
)
def test_number_is_its_text_when_it_is_an_answer(tmp_path: Path, number: float, text: str) -> None:
    """Whole ones without a point: tables keep integers as floats where some are missing."""
    path = write_rows(tmp_path / "data.jsonl", [{"question": "How many?", "answer": number}])

    assert (_chat("How many?", text),) == tuple(numbered.row for numbered in read_dataset(path).rows)


@pytest.mark.parametrize(
    ("number", "found"),
    [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")],
    ids=["nan", "inf", "-inf"],
)
@pytest.mark.parametrize("asked", ["Q", make_messages("Q")], ids=["text", "messages"])
def test_row_is_refused_when_its_answer_is_no_number(number: float, found: str, asked: Any) -> None:
    """A gap in a column of numbers is no answer."""
    shape, _ = choose_shape([{"question": asked, "answer": number}], None, "data")

    row, problems = shape.read({"question": asked, "answer": number})

    assert row is None
    assert problems == [RowProblem("answer", f"expected a value, found {found}")]


def test_read_dataset_names_the_turn_when_a_sharegpt_row_is_bad(tmp_path: Path) -> None:
    """Also behind a system message from a column of its own, which moves every message by one."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]
    path = write_rows(tmp_path / "data.jsonl", [{"conversations": turns, "system": "s"}])

    with pytest.raises(DataError, match=rf"^{path}:1: field conversations\[1\]\.value: is empty$"):
        read_dataset(path)


def test_read_dataset_reads_messages_when_a_cell_of_a_csv_holds_them_as_json(tmp_path: Path) -> None:
    """A table can hold conversations, too."""
    path = tmp_path / "data.csv"
    cell = json.dumps(make_messages("q", "a")).replace('"', '""')
    path.write_text(f'id,messages\n1,"{cell}"\n')

    assert (_chat("q", "a"),) == tuple(numbered.row for numbered in read_dataset(path).rows)


def test_read_dataset_sees_the_shape_when_a_few_rows_are_of_another(tmp_path: Path) -> None:
    """One stray row is named by its line; it does not make the whole file ambiguous."""
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}] * 4
    path = write_rows(tmp_path / "data.jsonl", [*rows, {"messages": make_messages("q", "a")}])

    with pytest.raises(DataError, match=rf"^{path}:5: field chosen: expected a value, found nothing$"):
        read_dataset(path)


def test_mapping_is_refused_with_the_one_that_answers_with_a_label_when_label_is_given(tmp_path: Path) -> None:
    """For classification the label is the answer; nobody finds that in a list of targets."""
    path = write_rows(tmp_path / "d.jsonl", [{"body": "b", "queue": "q"}])

    with pytest.raises(DataError, match="to answer a text with its label, --map user=body,assistant=queue; or map one"):
        read_dataset(path, mapping={"text": "body", "label": "queue"})
