"""Names of speakers: mapped onto roles wherever messages stand, and all told at once where they are unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.chat_rows import ChatRow, PreferenceRow
from adapters.errors import DataError
from tests.support.conversations import make_messages, write_rows
from training.formats import read_dataset
from training.speakers import name_unknown_roles, parse_roles, rename_speakers

_ROLES = {"customer": "user", "agent": "assistant", "bot": "system"}
_TURNS = [{"from": "Customer ", "value": "q"}, {"from": "agent", "value": "a"}]
_CHAT = ChatRow(tuple(make_messages("q", "a")))


def test_roles_are_parsed_when_they_are_pairs() -> None:
    """Several in a text or several texts; a name may hold an equals sign, and counts without case."""
    roles = parse_roles(["Customer=user,agent=assistant", "a=b=tool"])

    assert {"customer": "user", "agent": "assistant", "a=b": "tool"} == roles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("customer", "roles 'customer': expected NAME=ROLE with a role of system, user, assistant, tool, none"),
        (
            "customer=human",
            "roles 'customer=human': expected NAME=ROLE with a role of system, user, assistant, tool, none",
        ),
        (" =user", "roles ' =user': expected NAME=ROLE with a role of system, user, assistant, tool, none"),
        ("bot=user,Bot=assistant", "roles 'Bot=assistant': Bot is given twice"),
    ],
)
def test_roles_are_refused_when_they_are_no_pairs(text: str, message: str) -> None:
    """The pair that is wrong is named."""
    with pytest.raises(DataError) as caught:
        parse_roles([text])

    assert message == str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": _TURNS},
        {"messages": [{"role": "customer", "content": "q"}, {"role": "Agent", "content": "a"}]},
        {"messages": json.dumps(_TURNS)},
    ],
    ids=["sharegpt", "messages", "json-in-a-cell"],
)
def test_speakers_become_roles_when_they_are_mapped(tmp_path: Path, row: dict[str, Any]) -> None:
    """In every form that a list of messages has."""
    path = write_rows(tmp_path / "d.jsonl", [row])

    (numbered,) = read_dataset(path, roles=_ROLES).rows

    assert _CHAT == numbered.row


def test_speakers_become_roles_when_a_column_lies_in_an_object(tmp_path: Path) -> None:
    """As the exports of ticket systems nest them; a mapping names the column with dots."""
    path = write_rows(tmp_path / "d.jsonl", [{"ticket": {"log": {"turns": _TURNS}}}])

    (numbered,) = read_dataset(path, roles=_ROLES, mapping={"messages": "ticket.log.turns"}).rows

    assert _CHAT == numbered.row


def test_speakers_become_roles_when_rows_are_preferences(tmp_path: Path) -> None:
    """The messages of a prompt have speakers, too."""
    row = {"prompt": [{"role": "customer", "content": "q"}], "chosen": "yes", "rejected": "no"}
    path = write_rows(tmp_path / "d.jsonl", [row])

    (numbered,) = read_dataset(path, roles=_ROLES).rows

    assert isinstance(numbered.row, PreferenceRow)
    assert tuple(make_messages("q")) == numbered.row.prompt


def test_a_name_is_mapped_anew_when_it_has_a_usual_meaning() -> None:
    """`bot` is an assistant where nobody says otherwise; a canned greeting may not be."""
    row = rename_speakers({"conversations": [{"from": "bot", "value": "hi"}]}, _ROLES)

    assert {"conversations": [{"from": "system", "value": "hi"}]} == row


def test_values_are_left_alone_when_they_are_no_messages() -> None:
    """A column called role, an argument called role, text that begins with a bracket."""
    call = {"name": "f", "arguments": {"role": "agent"}}
    row = {"role": "agent", "text": "[agent] hi", "list": "[1, 2]", "n": 3, "messages": [{"tool_calls": [call]}]}

    assert row == rename_speakers(row, _ROLES)


def test_unknown_roles_are_one_problem_when_many_rows_have_them(tmp_path: Path) -> None:
    """All names, each with its rows, and the option to give: nobody has to mend one after another."""
    others = [{"conversation": [_TURNS[0], {"from": "operator", "value": "a"}]}] * 2
    path = write_rows(tmp_path / "d.jsonl", [{"conversation": _TURNS}] * 6 + others)

    with pytest.raises(DataError) as caught:
        read_dataset(path)

    found = "'Customer ' (8 rows), 'agent' (6 rows), 'operator' (2 rows)"
    which = "say which of system, user, assistant, tool each of them is, or none to leave out what it says"
    option = "--roles 'Customer =ROLE,agent=ROLE,operator=ROLE'"
    text = f"{path}: lines 1, 2, 3, 4, 5 and 3 more: roles that are not known: {found}; {which}: {option}"
    assert [text] == caught.value.problems


def test_unknown_roles_are_counted_when_there_are_too_many_to_name() -> None:
    """Names of people, say."""
    told = name_unknown_roles([[f"n{number}"] for number in range(12)])

    assert "'n9' (1 row) and 2 more; say which" in told
    assert "n10" not in told


def test_roles_that_are_advised_can_be_given_when_names_differ_by_case_alone() -> None:
    """One pair for both; a name that --roles can't hold is left out of it, and that is said."""
    told = name_unknown_roles([["Agent"], ["Agent", "agent "], ["Smith, John"]])

    assert "--roles Agent=ROLE; a name with a comma can't be given, rename that speaker" in told
    assert {"agent": "user"} == parse_roles(["Agent=user"])


def test_speaker_is_left_out_when_its_role_is_none(tmp_path: Path) -> None:
    """A bot that greets between the turns, whose words nobody is to learn."""
    turns = [_TURNS[0], {"from": "bot", "value": "Please wait."}, _TURNS[1]]
    path = write_rows(tmp_path / "t.jsonl", [{"conversations": turns}])
    dataset = read_dataset(path, roles=parse_roles(["customer=user,agent=assistant,bot=none"]))
    assert [_CHAT] == [numbered.row for numbered in dataset.rows]


def test_notes_beside_messages_are_left_out_and_told_when_an_export_has_them(tmp_path: Path) -> None:
    """Times and ids; in a list in a cell of a table, too."""
    messages = [message | {"ts": "2026-02-03 10:00", "Agent ID": 7} for message in make_messages("q", "a")]
    rows = write_rows(tmp_path / "t.jsonl", [{"messages": messages}])
    table = tmp_path / "t.csv"
    table.write_text("messages\n" + '"' + json.dumps(messages).replace('"', '""') + '"\n')
    for dataset in (read_dataset(rows), read_dataset(table)):
        assert [_CHAT] == [numbered.row for numbered in dataset.rows]
        assert dataset.recognised.endswith("; 'Agent ID' of messages left out, 'ts' of messages left out")


def test_messages_are_read_when_an_export_calls_their_parts_otherwise(tmp_path: Path) -> None:
    """Who speaks and what is said go by other names; said, since it is a guess."""
    messages = [{"author": message["role"], "body": message["content"]} for message in make_messages("q", "a")]
    dataset = read_dataset(write_rows(tmp_path / "t.jsonl", [{"messages": messages}]))
    assert [_CHAT] == [numbered.row for numbered in dataset.rows]
    assert dataset.recognised.endswith("; author and body of messages read as role and content")


def test_answer_stays_what_it_is_when_it_is_a_list_of_messages_itself(tmp_path: Path) -> None:
    """Text that is learned is nobody's conversation."""
    answer = json.dumps([{"role": "assistant", "content": "hi", "id": 3}])
    dataset = read_dataset(write_rows(tmp_path / "t.jsonl", [{"prompt": "q", "completion": answer}]))
    assert [ChatRow(tuple(make_messages("q", answer)))] == [numbered.row for numbered in dataset.rows]


@pytest.mark.parametrize("other", [{"text": "p"}, {}])
def test_messages_are_left_as_they_are_when_two_keys_may_hold_the_words(other: dict[str, str], tmp_path: Path) -> None:
    """Nobody guesses between them, be it in all messages or in one."""
    messages = [{"author": "user", "body": "q", "text": "p"}, {"author": "assistant", "body": "a", **other}]
    with pytest.raises(DataError, match="key 'author' is not supported"):
        read_dataset(write_rows(tmp_path / "t.jsonl", [{"messages": messages}]))


@pytest.mark.parametrize(
    "key",
    [
        "weigth",
        "function_call",
        "train",
        "loss_weight",
        "loss_mask",
        "reasoning_content",
        "images",
        "thinking",
        "image_id",
    ],
)
def test_key_is_refused_when_it_may_say_what_is_learned(key: str, tmp_path: Path) -> None:
    """A slip of the pen, or another format's word: to leave it out would train on something else than what is there."""
    messages = make_messages("q", "a")
    path = write_rows(tmp_path / "t.jsonl", [{"messages": [messages[0], messages[1] | {key: 0}]}])
    with pytest.raises(DataError, match=f"key '{key}' is not supported"):
        read_dataset(path)
