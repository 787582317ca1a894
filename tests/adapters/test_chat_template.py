"""Rendering: what training learns is what serving asks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.chat_template import (
    RenderedRow,
    hash_chat_template,
    render_prompt,
    render_training_row,
    render_training_rows,
)
from adapters.errors import InvalidInputError
from tests.support.tiny import CHATML, make_tokenizer

TOKENIZER = make_tokenizer()
# As reasoning models do: earlier answers lose a part once a later turn follows.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'][1:] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def _learned(row: RenderedRow) -> list[str]:
    """The stretches of text that carry loss."""
    stretches: list[list[int]] = []
    previous = False
    for token, carries_loss in zip(row.input_ids, row.loss_mask, strict=True):
        if carries_loss and not previous:
            stretches.append([])
        if carries_loss:
            stretches[-1].append(token)
        previous = carries_loss
    return [str(TOKENIZER.decode(stretch)) for stretch in stretches]


def _merging_tokenizer() -> Any:
    """Pairs of letters are one token each, so that cutting a text elsewhere gives other tokens."""
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [(a, b) for a in "abc" for b in "abc"]
    vocab.update({a + b: len(vocab) + index for index, (a, b) in enumerate(merges)})
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def test_training_row_carries_loss_on_the_answer_and_its_end_when_there_is_one_turn() -> None:
    """Exactly the assistant's words and the end-of-turn token; not the newline behind it."""
    row = render_training_row(TOKENIZER, _turns("Hi?", "Yes, ünï!"))
    assert _learned(row) == ["Yes, ünï!<|im_end|>"]
    expected = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes, ünï!<|im_end|>"
    assert expected == TOKENIZER.decode(row.input_ids)
    assert len(row.input_ids) == len(row.loss_mask)
    assert (True, TOKENIZER.eos_token_id) == (row.loss_mask[-1], row.input_ids[-1])


def test_training_row_carries_loss_on_every_answer_when_there_are_several_turns() -> None:
    """System and user words carry none, wherever they stand."""
    messages = _turns("one?", "1", "two?", "2\n2", "three?", "3", system="Be brief.")
    row = render_training_row(TOKENIZER, messages)
    assert _learned(row) == ["1<|im_end|>", "2\n2<|im_end|>", "3<|im_end|>"]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert whole == f"{TOKENIZER.decode(row.input_ids)}\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), st.none() | TEXTS)
def test_training_row_asks_as_the_server_does_when_turns_vary(contents: list[str], system: str | None) -> None:
    """Up to each answer the row's tokens are those of `render_prompt`, and the answers are what is learned."""
    messages = _turns(*contents, system=system)
    row = render_training_row(TOKENIZER, messages)
    assert [f"{answer}<|im_end|>" for answer in contents[1::2]] == _learned(row)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render_prompt(TOKENIZER, messages[:index])
            assert prompt == row.input_ids[: len(prompt)]
            assert row.loss_mask[len(prompt)]
            assert not row.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("contents", [("abc", "cba"), ("abcab", "bca", "ccc", "ab"), ("a b c", "\n\nabc"), ("abc", "")])
def test_training_row_asks_as_the_server_does_when_the_tokenizer_merges(contents: Sequence[str]) -> None:
    """With tokens of several letters, cutting a row at another place would show."""
    tokenizer = _merging_tokenizer()
    messages = _turns(*contents, system="abcabc")
    row = render_training_row(tokenizer, messages)
    for index in range(2, len(messages), 2):
        prompt = render_prompt(tokenizer, messages[:index])
        assert prompt == row.input_ids[: len(prompt)]
    assert any(token > 255 for token in row.input_ids)


def test_prompt_ends_where_the_assistant_speaks_when_rendered() -> None:
    """The generation prompt is the last thing, and special tokens are single tokens, not doubled."""
    ids = render_prompt(TOKENIZER, _turns("Hi"))
    assert TOKENIZER.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (ids.count(TOKENIZER.bos_token_id), ids.count(TOKENIZER.eos_token_id)) == (2, 1)


def test_training_row_is_refused_when_the_template_rewrites_earlier_turns() -> None:
    """One turn can be trained on, several can't: the assistant's words would be guessed."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REWRITING
    with pytest.raises(InvalidInputError, match="turn otherwise than it asks for one") as caught:
        render_training_row(tokenizer, _turns("one?", "1x", "two?", "2x"))
    assert caught.value.param == "messages"


def test_rendering_is_refused_with_its_reason_when_the_template_raises() -> None:
    """The template's own words reach the user, in training and in serving."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    for render in (render_prompt, render_training_row):
        with pytest.raises(InvalidInputError, match="refuses this conversation: roles must alternate") as caught:
            render(tokenizer, _turns("a", "b"))
        assert caught.value.param == "messages"


def test_training_rows_end_in_eos_when_the_template_ends_without_a_token() -> None:
    """Nothing else could tell the server that the turn has ended, and each turn asks for itself."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = render_training_rows(tokenizer, _turns("a", "b", "c", "d"))
    assert [_learned(row) for row in rows] == [["b<|im_end|>"], ["d<|im_end|>"]]
    assert tokenizer.decode(rows[1].input_ids) == "user: a\nassistant: b\nuser: c\nassistant: d<|im_end|>"


def test_hash_of_the_template_is_that_of_its_text_when_computed() -> None:
    """Another template has another hash."""
    assert hashlib.sha256(CHATML.encode()).hexdigest() == hash_chat_template(TOKENIZER)
    other = make_tokenizer()
    other.chat_template = REWRITING
    assert hash_chat_template(TOKENIZER) != hash_chat_template(other)
