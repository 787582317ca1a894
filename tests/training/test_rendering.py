"""From rows to tensors: loss on exactly what the assistant says, and on every end of a turn."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.chat_template import RenderedRow, render_prompt
from adapters.errors import DataError
from tests.support.conversations import make_dataset, make_messages
from tests.support.tiny import make_tokenizer
from training.rendering import IGNORED_LABEL, collate, render_dataset

EOS = "<|im_end|>"
CONVERSATIONS = {
    "one-turn": make_messages("How are you?", "Well."),
    "with-system": make_messages("How are you?", "Well.", system="Be brief."),
    "three-turns": make_messages("a?", "A.", "b?", "B!\nAnd more.", "c?", "C", system="Answer in capitals."),
    "not-ascii": make_messages("Wie geht's, Jörg?", "Schön 🙂 — 很好"),
    "spaces-at-the-ends": make_messages(" a ", "  b \n"),
    "answer-repeats-the-question": make_messages("same", "same", "same", "same"),
}
# Cuts the assistant's words at their ends, as the templates of some models do.
TRIMMING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows only the last user turn's number once others follow, as templates that drop earlier reasoning do.
FORGETFUL = (
    "{% for message in messages %}{{ loop.revindex }}:{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
REFUSING = "{{ raise_exception('only cats may speak') }}"
# Ends a turn without the end-of-sequence token.
WITHOUT_EOS = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _render(tmp_path: Path, messages: list[dict[str, str]], tokenizer: Any) -> RenderedRow:
    rows: list[RenderedRow] = render_dataset(
        tokenizer, make_dataset(tmp_path / "data.jsonl", [messages]), max_length=10_000
    )
    (row,) = rows
    return row


def _spans(tokenizer: Any, row: RenderedRow) -> list[tuple[bool, str]]:
    """What the row says, cut where the loss begins and ends."""
    pairs = zip(row.loss_mask, row.input_ids, strict=True)
    return [
        (carries_loss, tokenizer.decode([token for _, token in span]))
        for carries_loss, span in groupby(pairs, key=lambda pair: pair[0])
    ]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_render_dataset_puts_loss_on_the_answers_when_rows_are_decoded(
    tmp_path: Path, messages: list[dict[str, str]]
) -> None:
    """The tokens that carry loss are the assistant's words and the end-of-turn token, for every turn, and no others."""
    tokenizer = make_tokenizer()

    row = _render(tmp_path, messages, tokenizer)

    answers = [message["content"] + EOS for message in messages if message["role"] == "assistant"]
    assert answers == [text for carries_loss, text in _spans(tokenizer, row) if carries_loss]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_render_dataset_gives_the_templates_text_when_rows_are_decoded(
    tmp_path: Path, messages: list[dict[str, str]]
) -> None:
    """Nothing is lost or doubled between the segments; only what follows the last end of turn is left away."""
    tokenizer = make_tokenizer()

    row = _render(tmp_path, messages, tokenizer)

    expected = str(tokenizer.apply_chat_template(messages, tokenize=False)).removesuffix("\n")
    assert tokenizer.encode(expected, add_special_tokens=False) == row.input_ids


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_render_dataset_asks_with_the_servers_tokens_when_a_turn_begins(
    tmp_path: Path, messages: list[dict[str, str]]
) -> None:
    """What stands before each answer is the very prompt that the server would make of the earlier turns."""
    tokenizer = make_tokenizer()

    row = _render(tmp_path, messages, tokenizer)

    ends = [i for i in range(1, len(row.loss_mask)) if row.loss_mask[i] and not row.loss_mask[i - 1]]
    asked = [messages[:index] for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert [render_prompt(tokenizer, earlier) for earlier in asked] == [row.input_ids[:end] for end in ends]


def test_render_dataset_teaches_the_templates_words_when_the_template_trims_them(tmp_path: Path) -> None:
    """What carries loss is what the template makes of the answer, since that is what the model will see again."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TRIMMING

    row = _render(tmp_path, make_messages("a", "  b \n", "c", "d "), tokenizer)

    assert [text for carries_loss, text in _spans(tokenizer, row) if carries_loss] == ["b" + EOS, "d" + EOS]


def test_render_dataset_teaches_the_end_of_sequence_when_the_template_writes_no_control_token(tmp_path: Path) -> None:
    """The server could not tell a template's own words from the end of a turn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITHOUT_EOS

    row = _render(tmp_path, make_messages("a", "b"), tokenizer)

    assert _spans(tokenizer, row) == [(False, "[user]a[end][assistant]"), (True, "b" + EOS)]


def test_render_dataset_begins_once_when_the_tokenizer_adds_a_bos_itself(tmp_path: Path) -> None:
    """The template writes the first token; a tokenizer that would add it too does not double it."""
    tokenizer: Any = make_tokenizer()
    tokenizer.add_bos_token = True
    assert [tokenizer.bos_token_id] * 2 == tokenizer.encode("<|im_start|>user")[:2], (
        "the tokenizer must be one that adds"
    )

    row = _render(tmp_path, make_messages("a", "b", "c", "d"), tokenizer)

    assert row.input_ids.count(tokenizer.bos_token_id) == 4


def test_render_dataset_keeps_the_order_when_there_are_many_rows(tmp_path: Path) -> None:
    """Row n of the result is row n of the file."""
    tokenizer = make_tokenizer()
    dataset = make_dataset(tmp_path / "data.jsonl", [make_messages("q", f"answer {n}") for n in range(5)])

    rows = render_dataset(tokenizer, dataset, max_length=100)

    assert [f"answer {n}{EOS}" for n in range(5)] == [_spans(tokenizer, row)[-1][1] for row in rows]


def test_render_dataset_names_the_line_when_a_row_is_too_long(tmp_path: Path) -> None:
    """A row that is one token too long is an error with both lengths; a row of just that length is none."""
    tokenizer = make_tokenizer()
    fits, too_long = make_messages("q", "a" * 50), make_messages("q", "a" * 51)
    max_length = len(_render(tmp_path, fits, tokenizer).input_ids)
    path = tmp_path / "data.jsonl"

    with pytest.raises(DataError, match=rf"^{path}:2: {max_length + 1} tokens, more than max_length {max_length}$"):
        render_dataset(tokenizer, make_dataset(path, [fits, too_long, fits]), max_length=max_length)

    assert len(render_dataset(tokenizer, make_dataset(path, [fits]), max_length=max_length)) == 1


def test_render_dataset_tells_a_problem_once_when_many_rows_have_it(tmp_path: Path) -> None:
    """A wholly unfit file is one sentence."""
    path = tmp_path / "data.jsonl"
    dataset = make_dataset(path, [make_messages("q", "a")] * 23)

    with pytest.raises(
        DataError, match=rf"^{path}: lines 1, 2, 3, 4, 5 and 18 more: 22 tokens, more than max_length 8$"
    ):
        render_dataset(make_tokenizer(), dataset, max_length=8)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(REFUSING, ".*only cats may speak"), (FORGETFUL, ".*turn otherwise than it asks for one.*")],
    ids=["refuses", "rewrites-earlier-turns"],
)
def test_render_dataset_names_the_line_when_the_template_can_not_be_trained_on(
    tmp_path: Path, template: str, reason: str
) -> None:
    """A template that refuses a row, or in which the answers can't be located, is an error of that line."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "data.jsonl"
    dataset = make_dataset(path, [make_messages("a", "b", "c", "d")])

    with pytest.raises(DataError, match=rf"^{path}:1: {reason}"):
        render_dataset(tokenizer, dataset, max_length=1000)


def test_collate_pads_on_the_right_when_rows_differ_in_length() -> None:
    """Ids, mask and labels have one shape; the mask says which tokens are real, the labels which carry loss."""
    rows = [RenderedRow([5, 6, 7], [False, True, True]), RenderedRow([8], [False]), RenderedRow([9, 3], [False, True])]

    batch = collate(rows, pad_token_id=1)

    expected = {
        "input_ids": [[5, 6, 7], [8, 1, 1], [9, 3, 1]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100], [-100, 3, -100]],
    }
    assert expected == {name: tensor.tolist() for name, tensor in batch.items()}
    assert {torch.int64} == {tensor.dtype for tensor in batch.values()}


def test_collate_keeps_every_end_of_turn_when_padding_equals_eos(tmp_path: Path) -> None:
    """A pad token that is the end-of-turn token hides none that the model must learn, and attends to no padding."""
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the tokenizer must be one that this matters for"
    short, long = make_messages("a", "b"), make_messages("a", "b", "c", "a much longer answer")
    rows = render_dataset(tokenizer, make_dataset(tmp_path / "data.jsonl", [short, long]), max_length=1000)

    batch = collate(rows, pad_token_id=tokenizer.pad_token_id)

    assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 2]
    assert [len(row.input_ids) for row in rows] == batch["attention_mask"].sum(dim=1).tolist()
    assert [sum(row.loss_mask) for row in rows] == (batch["labels"] != IGNORED_LABEL).sum(dim=1).tolist()
