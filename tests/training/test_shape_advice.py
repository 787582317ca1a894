"""Which mappings are suggested for a table that nobody knows: by values and names, never by position alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from training.shape_advice import suggest_mapping

_QUEUES = ("LOGIN", "BILL")
_TRIAGE = [
    {"ref": str(1000 + n), "body_txt": f"Account {n} is locked", "chan": "web", "triage_queue": _QUEUES[n % 2]}
    for n in range(20)
]
_PREFERENCES = [
    {"question_text": f"Why is {n}?", "good_answer": f"As {n} is", "bad_answer": f"No {n}"} for n in range(9)
]
ANSWERS: dict[str, tuple[Sequence[Mapping[str, Any]], str]] = {
    "labels": (_TRIAGE, "user=body_txt,assistant=triage_queue"),
    "numbers-and-ids": (
        [{"id": n, "key": f"T-{n}", "asked": f"Where is {n}?", "reply": f"It is at {n}"} for n in range(9)],
        "user=asked,assistant=reply",
    ),
    "answer-first": (
        [{"Antwort": f"Am Ort {n}", "Frage": f"Wo ist {n}?"} for n in range(9)],
        "user=Frage,assistant=Antwort",
    ),
    "ratings": (
        [{"stars": str(n % 5), "body": f"I say {n}", "answer_given": f"We hear {n}"} for n in range(20)],
        "user=body,assistant=answer_given",
    ),
    "spaces-in-names": (
        [{"the question": f"Where is {n}?", "the answer": f"It is at {n}"} for n in range(9)],
        "'user=the question,assistant=the answer'",
    ),
    "short-texts": ([{"id": n, "q": f"q{n}", "a": f"a{n}"} for n in range(9)], "user=q,assistant=a"),
    "one-text": ([{"ref": n, "body": f"I say {n}"} for n in range(9)], "user=body,assistant=COLUMN"),
    "nothing-alike": ([{"a": n, "b": n, "c": n} for n in range(9)], "user=COLUMN,assistant=COLUMN"),
}


def _suggest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns, ways = suggest_mapping("t", list(rows[0]), rows).split("; say which column is what: ")
    assert f"t: the columns {', '.join(rows[0])} are no shape that is known" == columns
    *options, documents = ways.split("; ")
    assert "docs/data.md has all targets" == documents
    return options


@pytest.mark.parametrize(("rows", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_suggest_mapping_looks_at_values_when_columns_are_unknown(
    rows: Sequence[Mapping[str, Any]], expected: str
) -> None:
    """A column of numbers or ids is nobody's question; words of a short list are a label, which is the answer."""
    to_answer, to_prefer = _suggest(rows)

    assert f"to learn an answer or a label (which is the answer then), --map {expected}" == to_answer
    assert "to prefer one answer to another, --map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN" == to_prefer


def test_suggest_mapping_begins_with_preferences_when_columns_are_named_so() -> None:
    """Good beside bad is no table of answers to learn; that it could be read so is said behind it."""
    to_prefer, to_answer = _suggest(_PREFERENCES)

    mapping = "prompt=question_text,chosen=good_answer,rejected=bad_answer"
    assert f"to prefer one answer to another, --map {mapping}" == to_prefer
    assert to_answer.endswith("--map user=question_text,assistant=good_answer")


def test_suggest_mapping_names_the_messages_when_a_column_holds_them() -> None:
    """Whatever the column is called."""
    rows = [{"ticket": 7, "log": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]}]
    assert suggest_mapping("t", ["ticket", "log"], rows).endswith(
        "'log' holds messages: --map messages=log; docs/data.md has all targets"
    )


def test_suggest_mapping_takes_prose_for_the_answer_when_a_clerk_is_named_beside_it() -> None:
    """Neither the day on which a message came nor who has filed it is what is to be learned."""
    rows = [
        {
            "message": f"What about plant {place}?",
            "came in": f"0{place % 3 + 1}.03.2026",
            "filed by": ("Ann", "Bo")[place % 2],
            "office wrote": f"Cut it in month {place}.",
        }
        for place in range(12)
    ]
    to_answer, _ = _suggest(rows)
    assert to_answer.endswith("--map 'user=message,assistant=office wrote'")
