"""Every family of chat templates: what carries loss is what the assistant says, asked as the server asks."""

from __future__ import annotations

import importlib.metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.chat_template import (
    RenderedRow,
    end_of_turn_id,
    render_plain_text,
    render_prompt,
    render_training_row,
    render_training_rows,
)
from adapters.errors import InvalidInputError
from tests.support.chat_templates import (
    TEMPLATE_FAMILIES,
    TemplateFamily,
    make_family_tokenizer,
    make_merging_tokenizer,
)
from tests.support.conversations import make_messages

FAMILIES = [pytest.param(family, id=name) for name, family in TEMPLATE_FAMILIES.items()]
WITH_TOOLS = [pytest.param(family, id=name) for name, family in TEMPLATE_FAMILIES.items() if family.has_tools]
WITHOUT_TOOLS = ["chatml", "mistral", "gemma", "phi3"]
TOKENIZERS = {name: make_family_tokenizer(family) for name, family in TEMPLATE_FAMILIES.items()}
# Few letters, spaces and newlines meet the tokenizer's merges often; `<` and `[` begin control tokens.
TEXTS = st.text(st.sampled_from("abc \n") | st.characters(codec="utf-8", exclude_characters="<["), max_size=10)
# What the published templates that TRL ships have for control tokens: begin and end of sequence, then the others.
_IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PUBLISHED = {
    "llama3": (_LLAMA, "<|eot_id|>"),
    "llama3_1": (_LLAMA, "<|eot_id|>"),
    "llama3_2": (_LLAMA, "<|eot_id|>"),
    "qwen2_5": (_IM, "<|im_end|>"),
    "qwen3": (_IM, "<|im_end|>"),
    "gemma": (_GEMMA, "<end_of_turn>"),
    "gemma3": (_GEMMA, "<end_of_turn>"),
    "phi3": (_PHI, "<|end|>"),
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"word": "abc"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "What is abc?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "three letters", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Three letters."},
]


def _learned(tokenizer: Any, rows: list[RenderedRow]) -> list[str]:
    """The stretches of text that carry loss, of all rows."""
    spans = (
        (carries_loss, [token for _, token in span])
        for row in rows
        for carries_loss, span in groupby(zip(row.loss_mask, row.input_ids, strict=True), key=lambda pair: pair[0])
    )
    return [str(tokenizer.decode(span)) for carries_loss, span in spans if carries_loss]


def _prompts(rows: list[RenderedRow]) -> list[list[int]]:
    """What stands in front of each answer."""
    return [
        row.input_ids[:index]
        for row in rows
        for index in range(1, len(row.input_ids))
        if row.loss_mask[index] and not row.loss_mask[index - 1]
    ]


def _expected(family: TemplateFamily, messages: list[dict[str, Any]]) -> list[str]:
    return [
        family.spoken(message["content"]) + family.end_of_turn
        for message in messages
        if message["role"] == "assistant" and message.get("weight") != 0
    ]


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATE_FAMILIES)),
    turns=st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([0, 1, 1])), min_size=1, max_size=3),
    system=st.none() | TEXTS,
)
def test_training_rows_teach_the_assistants_words_when_conversations_vary(
    name: str, turns: list[tuple[str, str, int]], system: str | None
) -> None:
    """In each family: the words and their end carry loss, behind the tokens that the server asks with; no others do."""
    family, tokenizer = TEMPLATE_FAMILIES[name], TOKENIZERS[name]
    turns = [*turns[:-1], (*turns[-1][:2], 1)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system and family.has_system else []
    for question, answer, weight in turns:
        messages += make_messages(question, answer)
        messages[-1]["weight"] = weight

    rows = render_training_rows(tokenizer, messages)

    assert _expected(family, messages) == _learned(tokenizer, rows)
    asked = [
        messages[:index]
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message["weight"]
    ]
    assert [render_prompt(tokenizer, earlier) for earlier in asked] == _prompts(rows)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_training_rows_teach_the_assistants_words_when_the_template_is_the_published_one(name: str) -> None:
    """The very text that the models' makers wrote, over several turns and with an answer of no weight."""
    path = Path(str(importlib.metadata.distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja")))
    if not path.is_file():
        pytest.skip(f"this release of TRL ships no {path.name}")
    (bos, eos, *others), end = PUBLISHED[name]
    tokenizer = make_merging_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos, "additional_special_tokens": others})
    tokenizer.chat_template = path.read_text()
    # No answer begins with a letter that this tokenizer merges with the newline in front of it.
    messages = make_messages("q1", "X1", "q2", "X2")

    rows = render_training_rows(tokenizer, messages)

    opening = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # which the server leaves to the model
    assert [f"{opening}X1{end}", f"{opening}X2{end}"] == [text.strip("\n") for text in _learned(tokenizer, rows)]
    assert tokenizer.convert_tokens_to_ids(end) == end_of_turn_id(tokenizer)
    weighed: list[dict[str, Any]] = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    learned = _learned(tokenizer, render_training_rows(tokenizer, weighed))
    assert [f"{opening}X2{end}"] == [text.strip("\n") for text in learned]
    assert all(row.input_ids[:2].count(tokenizer.bos_token_id) <= 1 for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_are_one_when_earlier_turns_stand(family: TemplateFamily) -> None:
    """A conversation of several turns costs one row, but for templates that write earlier turns anew."""
    messages = make_messages("a?", "b", "c?", "d", system="Be brief." if family.has_system else None)

    rows = render_training_rows(make_family_tokenizer(family), messages)

    assert len(rows) == (1 if family.is_stable else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_begin_with_one_bos_when_the_template_writes_it(family: TemplateFamily) -> None:
    """As often as the template writes it: the row has no other."""
    tokenizer = make_family_tokenizer(family)
    messages = make_messages("a?", "b", "c?", "d")
    text = tokenizer.apply_chat_template(messages, tokenize=False)

    row = render_training_rows(tokenizer, messages)[-1]

    assert text.count(tokenizer.bos_token) == row.input_ids.count(tokenizer.bos_token_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_is_the_templates_own_when_eos_is_another(family: TemplateFamily) -> None:
    """Four of the families end a turn with another token than a sequence."""
    tokenizer = make_family_tokenizer(family)

    assert tokenizer.convert_tokens_to_ids(family.end_of_turn) == end_of_turn_id(tokenizer)


def test_end_of_turn_is_none_when_the_template_has_none() -> None:
    """Words alone, a template that refuses everything, and none at all."""
    tokenizer = make_merging_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    found = []
    for template in ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        found.append(end_of_turn_id(tokenizer))

    assert [None, None, None] == found


@pytest.mark.parametrize("answer", ["\nabc", "\n", "a", " a", "\n\n\na"])
def test_later_prompts_are_the_servers_when_an_answer_begins_with_a_newline(answer: str) -> None:
    """A newline behind a newline merges with it in the server's later prompts: the later turn is a row of its own."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["chatml"])
    messages = make_messages("q", answer, "c", "d")

    rows = render_training_rows(tokenizer, messages)

    assert [render_prompt(tokenizer, messages[:1]), render_prompt(tokenizer, messages[:3])] == _prompts(rows)
    assert [f"{answer}<|im_end|>", "d<|im_end|>"] == _learned(tokenizer, rows)
    assert len(rows) == (2 if answer[0] in "\na" else 1)


def test_training_rows_keep_their_thoughts_when_each_turn_thinks() -> None:
    """Each answer is learned with its own reasoning, behind turns that have lost theirs, as the server asks."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["qwen3"])
    messages = make_messages("1?", "<think>\nhm\n</think>\n\none", "2?", "<think>so</think>two")

    rows = render_training_rows(tokenizer, messages)

    assert _learned(tokenizer, rows) == [
        "<think>\nhm\n</think>\n\none<|im_end|>",
        "<think>\nso\n</think>\n\ntwo<|im_end|>",
    ]
    assert "assistant\none<|im_end|>" in tokenizer.decode(rows[1].input_ids)


def test_training_row_is_refused_when_the_template_makes_several() -> None:
    """Who needs one row gets one or an error."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["qwen3"])
    with pytest.raises(InvalidInputError, match="expected one row of tokens, found 2"):
        render_training_row(tokenizer, make_messages("1?", "one", "2?", "two"))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_row_learns_the_last_message_alone_when_it_is_asked_to(family: TemplateFamily) -> None:
    """The answer of a preference row: earlier turns are its prompt, and its own weight doesn't matter."""
    tokenizer = make_family_tokenizer(family)
    messages: list[dict[str, Any]] = make_messages("a?", "b", "c?", "d")
    messages[-1]["weight"] = 0

    row = render_training_row(tokenizer, messages, only_last=True)

    assert [family.spoken("d") + family.end_of_turn] == _learned(tokenizer, [row])
    assert [render_prompt(tokenizer, messages[:-1])] == _prompts([row])


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_training_rows_teach_calls_and_what_follows_them_when_the_template_has_tools(family: TemplateFamily) -> None:
    """The call and the answer carry loss; the tools and what they gave are part of the prompts."""
    tokenizer = make_family_tokenizer(family)

    rows = render_training_rows(tokenizer, CALLING, [TOOL])

    call, answer = _learned(tokenizer, rows)
    assert "look_up" in call
    assert '{"word": "abc"}' in call
    assert call.endswith(family.end_of_turn)
    assert answer == f"Three letters.{family.end_of_turn}"
    prompts = [tokenizer.decode(prompt) for prompt in _prompts(rows)]
    assert ["properties" in prompt for prompt in prompts] == [True, True]
    assert ["three letters" in prompt for prompt in prompts] == [False, True]
    assert [render_prompt(tokenizer, CALLING[:index], [TOOL]) for index in (1, 3)] == _prompts(rows)


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
@pytest.mark.parametrize(
    ("messages", "tools"), [(make_messages("a?", "b"), [TOOL]), (CALLING, [])], ids=["tools", "calls"]
)
def test_training_rows_are_refused_when_the_template_would_leave_tools_out(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    """Not a word of what is lost reaches the model, so nothing is trained."""
    with pytest.raises(InvalidInputError, match=r"has no place for (tools|tool calls)|refuses this conversation"):
        render_training_rows(TOKENIZERS[name], messages, tools)


def test_training_rows_are_refused_when_the_template_leaves_out_what_tools_answer() -> None:
    """Calls are shown and what came of them is not."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["qwen2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}\n</tool_response>", "</tool_response>"
    )
    with pytest.raises(InvalidInputError, match="no place for the answers of tools"):
        render_training_rows(tokenizer, CALLING, [TOOL])


def test_training_rows_are_the_same_when_keys_stand_in_another_order() -> None:
    """A file's tools and the wire's become one text: templates write them down as JSON."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["qwen2.5"])
    turned = {"function": dict(reversed(TOOL["function"].items())), "type": "function"}  # type: ignore[attr-defined]

    assert render_training_rows(tokenizer, CALLING, [TOOL]) == render_training_rows(tokenizer, CALLING, [turned])


def test_training_rows_are_refused_when_no_message_carries_loss() -> None:
    """All weights are 0."""
    messages: list[dict[str, Any]] = make_messages("a?", "b")
    messages[1]["weight"] = 0
    with pytest.raises(InvalidInputError, match="no message of the assistant carries loss"):
        render_training_rows(TOKENIZERS["chatml"], messages)


def test_training_rows_are_refused_when_gemma_gets_a_system_message() -> None:
    """In the template's own words, as the server refuses it."""
    with pytest.raises(InvalidInputError, match="System role not supported"):
        render_training_rows(TOKENIZERS["gemma"], make_messages("a?", "b", system="Be brief."))


def test_training_rows_are_refused_when_the_prompt_holds_words_that_the_answer_lacks() -> None:
    """Some reasoning models are asked with `<think>` and shown without it: nobody could say where the answer begins."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["chatml"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(InvalidInputError, match="the assistant's words can't be located"):
        render_training_rows(tokenizer, make_messages("a?", "b"))


def test_training_rows_are_refused_when_the_template_leaves_out_the_answer() -> None:
    """Templates of models that see pictures may take content in parts alone and show no plain text."""
    tokenizer = make_family_tokenizer(TEMPLATE_FAMILIES["chatml"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "")
    with pytest.raises(InvalidInputError, match="leaves out what the assistant says"):
        render_training_rows(tokenizer, make_messages("a?", "b"))


@pytest.mark.parametrize("name", ["llama3", "chatml"])
def test_plain_text_carries_loss_to_its_end_when_it_is_rendered(name: str) -> None:
    """Each token but the first, and the end-of-sequence token once."""
    tokenizer = TOKENIZERS[name]

    row = render_plain_text(tokenizer, "abc\nünï")

    assert tokenizer.decode(row.input_ids) == f"abc\nünï{tokenizer.eos_token}"
    assert [False] + [True] * (len(row.input_ids) - 1) == row.loss_mask


def test_plain_text_is_refused_when_it_holds_a_control_token() -> None:
    """An end of sequence in the middle would teach the model to stop there."""
    with pytest.raises(InvalidInputError, match=r"text holds the model's control token <\|im_end\|>"):
        render_plain_text(TOKENIZERS["chatml"], "abc<|im_end|>abc")
