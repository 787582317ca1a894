"""Which prompts are kept: what users ask, a bounded sample, the same whatever the order of the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row, TextRow
from adapters.errors import DataError
from adapters.routing.features import normalise
from adapters.routing.prompts import (
    group_alike,
    group_labelled,
    prompts_of,
    read_background,
    read_labelled,
    sample_prompts,
)

SYSTEM = {"role": "system", "content": "You are the legal desk."}
ASKED = {"role": "user", "content": "May he leave?"}
ANSWER = {"role": "assistant", "content": "Yes."}


def test_prompts_are_what_users_say_when_rows_are_read() -> None:
    """Of every kind of row; system prompts and answers are no part of it."""
    rows: list[Row] = [
        ChatRow((SYSTEM, ASKED, ANSWER, {"role": "user", "content": "Why?"}, ANSWER)),
        PreferenceRow((SYSTEM, {"role": "user", "content": "Who pays?"}), ANSWER, {**ANSWER, "content": "No."}),
        LabelledRow(({"role": "user", "content": "When?"},), ANSWER, label=True),
        TextRow("A text of its own."),
    ]
    assert {"May he leave?\nWhy?", "Who pays?", "When?", "A text of its own."} == set(prompts_of(rows))


def test_sample_is_bounded_and_settled_when_there_are_many() -> None:
    """At most 300 different ones of 1,200 characters, in whatever order they come; what is cut stays as it is."""
    many = [f"question {number} " + "x" * 2000 for number in range(1000)]
    kept = sample_prompts(many)
    assert 300 == len(kept)
    assert {1200} == {len(prompt) for prompt in kept}
    assert {kept[0]} == {*sample_prompts([kept[0]])}
    assert kept == sample_prompts(reversed(many + many))


def test_prompt_keeps_both_ends_when_it_is_long() -> None:
    """As it is read where it is routed: a document with a question behind it is known by both."""
    (kept,) = sample_prompts(["contract " + "x" * 5000 + " may I leave?"])
    assert kept.startswith("contract x")
    assert kept.endswith("x may I leave?")
    assert normalise(kept) == normalise("contract " + "x" * 5000 + " may I leave?")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"a": "pqrs", "b": "tuv"}, [("a",), ("b",)]),
        ({"a": "pqrs", "b": "tuv", "c": "srqp"}, [("a", "c"), ("b",)]),
        ({"a": "pqrs", "b": "pqrstuvwxyz"}, [("a", "b")]),  # the same data, and more
        ({"a": "pqrst", "b": "pquvw"}, [("a", "b")]),
        ({"a": "pqrstu", "b": "pqvwxyz"}, [("a",), ("b",)]),
    ],
)
def test_aliases_are_grouped_when_they_share_their_prompts(
    prompts: dict[str, str], expected: list[tuple[str, ...]]
) -> None:
    """In the order in which they came; some questions may be everybody's."""
    assert expected == group_alike(prompts)


def test_labelled_lines_are_read_when_they_are_right(tmp_path: Path) -> None:
    """And grouped by their alias, those of none left out."""
    path = tmp_path / "eval.jsonl"
    path.write_text(
        '{"text": "a", "alias": "b", "paraphrase": "c"}\n\n{"text": "d", "alias": null}\n{"text": "e", "alias": "a"}\n'
    )
    rows = read_labelled(path)
    assert {"a": ["e"], "b": ["a"]} == group_labelled(rows)
    with pytest.raises(DataError, match="2 aliases or more"):
        group_labelled(rows[:2])


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"text": "a"}', '{"text": 1, "alias": null}', '{"text": "a", "alias": 1}']
)
def test_labelled_line_is_named_when_it_is_wrong(line: str, tmp_path: Path) -> None:
    """By file and line."""
    path = tmp_path / "eval.jsonl"
    path.write_text('{"text": "a", "alias": null}\n' + line + "\n")
    with pytest.raises(DataError, match=r"eval\.jsonl:2: "):
        read_labelled(path)


def test_general_texts_ship_with_the_package_when_read() -> None:
    """Enough of them, each once."""
    texts = read_background()
    assert len(texts) > 100
    assert len(texts) == len(set(texts))
