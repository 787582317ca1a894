"""Rows from rated answers: what is good, what is paired, and where each row comes from."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.chat_rows import ChatRow, PreferenceRow, parse_document
from adapters.conversations import Conversation, RatedConversation, prompt_sha256
from adapters.errors import InvalidInputError
from training.feedback_rows import GoodValue, choose_threshold, edited_rows, good_rows, preference_rows

NAMES = count()
TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "earlier"},
    {"role": "user", "content": "and?"},
]
CALL = {"id": "c", "type": "function", "function": {"name": "time", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "time"}}]


def _rated(
    value: float, answer: str | dict[str, Any] = "a", *, prompt: str = "q", comment: str | None = None, num: int = 1
) -> RatedConversation:
    messages = [{"role": "user", "content": prompt}]
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    tools = TOOLS if "tool_calls" in message else []
    return RatedConversation(
        Conversation(f"chatcmpl-{next(NAMES)}", messages, tools, [message] * num),
        prompt_sha256(messages, tools),
        "legal@v2",
        "d" * 64,
        "stop",
        "helpful",
        value,
        comment,
        datetime(2026, 1, 2, tzinfo=UTC),
    )


def _texts(documents: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in documents]


def test_good_rows_take_what_is_good_when_rated() -> None:
    """A row is what training reads, and says which answer it was and who answered."""
    item = _rated(1.0, "yes")
    rows = good_rows([item, _rated(0.0, "no")], GoodValue(1.0))
    (document,) = rows.documents
    row, problems = parse_document(document)
    assert isinstance(row, ChatRow)
    assert ([], ["q", "yes"]) == (problems, [message["content"] for message in row.messages])
    assert {
        "metric": "helpful",
        "value": 1.0,
        "ratings": [
            {
                "response_id": item.conversation.response_id, "version": "legal@v2", "digest": "d" * 64, "value": 1.0,
                "reported_at": "2026-01-02T00:00:00+00:00",
            }
        ],
    } == document["metadata"]  # fmt: skip
    assert {"rated, but not as good": 1} == rows.left_out


def test_loss_falls_on_the_rated_answer_alone_when_there_were_earlier_ones() -> None:
    """Nobody said that those were good."""
    item = _rated(1.0)
    item = replace(item, conversation=replace(item.conversation, messages=TURNS))
    (document,) = good_rows([item], GoodValue(1.0)).documents
    row, _ = parse_document(document)
    assert isinstance(row, ChatRow)
    assert [None, 0, None, None] == [message.get("weight") for message in row.messages]


def test_answer_is_left_out_when_it_can_not_be_learned_from() -> None:
    """Cut, one of several, or nothing at all: counted, with the reason."""
    items = [replace(_rated(1.0), finish_reason="length"), _rated(1.0, num=2), _rated(1.0, "")]
    rows = good_rows(items, GoodValue(1.0))
    assert ([], 3) == (rows.documents, sum(rows.left_out.values()))
    assert {"cut off at the token limit", "one of several answers to a request, and nobody said which"} < set(
        rows.left_out
    )


def test_row_holds_calls_when_the_answer_made_one() -> None:
    """With the tools that it calls."""
    item = _rated(1.0, {"role": "assistant", "content": None, "tool_calls": [CALL]})
    (document,) = good_rows([item], GoodValue(1.0)).documents
    assert (TOOLS, "time") == (document["tools"], document["messages"][-1]["tool_calls"][0]["function"]["name"])


def test_threshold_is_wanted_when_values_are_no_trues_and_falses() -> None:
    """Nobody guesses from which rating on an answer is good."""
    with pytest.raises(InvalidInputError, match="values from 2 to 5"):
        choose_threshold([_rated(2.0), _rated(5.0)], None, higher_is_better=True)
    assert GoodValue(1.0) == choose_threshold([_rated(0.0), _rated(1.0)], None, higher_is_better=True)
    assert GoodValue(0.0, False) == choose_threshold([_rated(0.0)], None, higher_is_better=False)
    assert GoodValue(4.0) == choose_threshold([_rated(2.0)], 4.0, higher_is_better=True)


def test_preferences_pair_the_best_with_the_worst_when_prompts_are_the_same() -> None:
    """Within a prompt; the middle pairs with nobody that is left."""
    items = [_rated(3.0, "middle"), _rated(1.0, "worst"), _rated(5.0, "best"), _rated(2.0, "alone", prompt="other")]
    rows = preference_rows(items, GoodValue())
    assert [("best", "worst")] == _texts(rows.documents)
    row, problems = parse_document(rows.documents[0])
    assert isinstance(row, PreferenceRow)
    assert [] == problems
    origin = rows.documents[0]["metadata"]
    assert (5.0, 1.0) == (origin["chosen"]["value"], origin["rejected"]["value"])
    assert [2] == list(rows.left_out.values())


def test_preferences_go_downwards_when_lower_is_better() -> None:
    """Such as seconds until solved."""
    assert [("low", "high")] == _texts(
        preference_rows([_rated(9.0, "high"), _rated(1.0, "low")], GoodValue(higher_is_better=False)).documents
    )


def test_preferences_skip_equal_answers_when_their_values_differ() -> None:
    """An answer is not better than itself, whatever two users said of it."""
    assert [] == preference_rows([_rated(1.0, "same"), _rated(0.0, "same")], GoodValue()).documents


@given(values=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=10), limit=st.none() | st.just(2.0))
def test_preferences_use_each_answer_once_and_never_turn_a_pair_when_made(
    values: list[tuple[int, int]], limit: float | None
) -> None:
    """Chosen is better than rejected by what was reported, and differs from it."""
    items = [_rated(float(value), f"text {text}", prompt=f"p{value % 2}") for value, text in values]
    rows = preference_rows(items, GoodValue(limit))
    sides = [row["metadata"][side] for row in rows.documents for side in ("chosen", "rejected")]
    used = [rating["response_id"] for side in sides for rating in side["ratings"]]
    assert len(used) == len(set(used))
    assert len(items) == len(sides) + sum(rows.left_out.values())
    for row in rows.documents:
        chosen, rejected = row["metadata"]["chosen"]["value"], row["metadata"]["rejected"]["value"]
        assert chosen > rejected
        assert row["chosen"] != row["rejected"]
        assert limit is None or rejected < limit <= chosen


def test_users_who_disagree_make_no_pair_and_no_row_when_they_got_the_same_answers() -> None:
    """What one said of an answer and another said against it is their mean: half is not good."""
    one, other = [_rated(value, "one") for value in (1.0, 0.0)], [_rated(value, "other") for value in (0.0, 1.0)]
    assert [] == preference_rows([*one, *other], GoodValue()).documents
    assert ([], {"rated, but not as good": 4}) == (
        (rows := good_rows([*one, *other], GoodValue(1.0))).documents, rows.left_out,
    )  # fmt: skip
    (pair,) = preference_rows([*one, *other, _rated(1.0, "third")], GoodValue()).documents
    assert "third" == pair["chosen"][0]["content"]


def test_answer_makes_one_row_when_several_users_got_it() -> None:
    """With all of them in its origin; calls are the same whatever their ids are."""
    calls = [_rated(1.0, {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": name}]}) for name in "ab"]
    rows = good_rows(
        [_rated(1.0, "yes"), _rated(1.0, "yes"), _rated(1.0, "yes", prompt="other"), *calls], GoodValue(1.0)
    )
    assert [2, 1, 2] == [len(document["metadata"]["ratings"]) for document in rows.documents]
    assert {"the same answer to the same prompt as another, whose row counts for both": 2} == rows.left_out


def test_edit_is_the_better_answer_when_it_came_as_a_comment() -> None:
    """For both kinds of rows; feedback without a text is no edit."""
    edits = [_rated(0.0, "bad", comment="as it should be"), _rated(0.0, "bad"), _rated(0.0, "bad", comment=" bad\n")]
    (pair,) = edited_rows(edits, as_preferences=True).documents
    assert [("as it should be", "bad")] == _texts([pair])
    rows = edited_rows(edits, as_preferences=False)
    assert "as it should be" == rows.documents[0]["messages"][-1]["content"]
    left_out = {"an edit without its text": 1, "an edit that leaves the answer as it was": 1}
    assert (True, left_out) == (rows.documents[0]["metadata"]["is_edit"], rows.left_out)
