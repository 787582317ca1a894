"""Renders conversations to tokens: the one function family that training and serving share.

Whatever a training row asks the model, it asks with the very tokens that the server would make of the same turns.
docs/chat-templates.md says what that means for each family of templates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adapters.errors import InvalidInputError

__all__ = [
    "RenderedRow",
    "end_of_turn_id",
    "hash_chat_template",
    "render_plain_text",
    "render_prompt",
    "render_text",
    "render_training_row",
    "render_training_rows",
    "stop_token_ids",
]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

# What templates get of a message and of a tool's function, in this order: some write them down as JSON.
_MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
_PROBE = "probe"


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A tokenised conversation; `loss_mask[i]` says whether token i carries loss. Both have the same length."""

    input_ids: list[int]
    loss_mask: list[bool]


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak.

    Raises:
        InvalidInputError: the model's chat template refuses the conversation, or its text holds a control token.
    """
    return _tokenize(tokenizer, render_text(tokenizer, messages, tools))


def render_text(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """The same as text.

    Raises:
        InvalidInputError: the model's chat template refuses the conversation, or its text holds a control token.
    """
    _check_no_control_tokens(tokenizer, messages, tools)
    return _render(tokenizer, messages, tools, add_generation_prompt=True)


def render_training_rows(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), *, only_last: bool = False
) -> list[RenderedRow]:
    """Token ids of a conversation, with loss on the assistant's words and the end-of-turn token behind them.

    It is one row where each turn's prompt begins with the tokens of the turns before. Where it does not, since the
    template drops earlier reasoning or letters merge over the border, the turn begins a further row, which asks as the
    server would.

    Args:
        tokenizer: The base model's.
        messages: Ends with an assistant's message. `weight` 0 takes the loss from an assistant's message.
        tools: What the model may call.
        only_last: Loss on the last message alone, whatever its weight.

    Raises:
        InvalidInputError: the template refuses the conversation, leaves a part of it out, or writes it in a way in
            which the assistant's words can't be located; or no message carries loss.
    """
    messages, tools = list(messages), list(tools)
    _check_no_control_tokens(tokenizer, messages, tools)
    _check_tools_are_shown(tokenizer, messages, tools)
    rows: list[RenderedRow] = []
    ids: list[int] = []
    mask: list[bool] = []
    for index in [len(messages) - 1] if only_last else _trained_turns(messages):
        prompt, answer = _tokenize_turn(tokenizer, messages[: index + 1], tools)
        if prompt[: len(ids)] != ids:
            rows.append(RenderedRow(ids, mask))
            ids, mask = [], []
        mask = mask + [False] * (len(prompt) - len(ids)) + [True] * len(answer)
        ids = prompt + answer
    return [*rows, RenderedRow(ids, mask)]


def render_training_row(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), *, only_last: bool = False
) -> RenderedRow:
    """`render_training_rows` of a conversation that must give one row.

    Raises:
        InvalidInputError: as there, or it gives several.
    """
    rows = render_training_rows(tokenizer, messages, tools, only_last=only_last)
    if len(rows) > 1:
        raise InvalidInputError(
            f"the chat template renders earlier turns differently once later turns follow: expected one row of tokens, "
            f"found {len(rows)}",
            param="messages",
        )
    return rows[0]


def render_plain_text(tokenizer: Any, text: str) -> RenderedRow:
    """Token ids of a text that is no conversation, with loss on all of it and on the end-of-sequence token behind it.

    The first token has none: nothing stands before it.

    Raises:
        InvalidInputError: the text holds a control token.
    """
    _check_no_control_tokens(tokenizer, [{"text": text}], ())
    ids = list(tokenizer.encode(text))  # as the server reads a completion's prompt
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return RenderedRow(ids, [False] + [True] * (len(ids) - 1))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The control token that the chat template writes behind an assistant's words; None if it writes none.

    It is not always the tokenizer's end-of-sequence token: Gemma and Phi end a turn with another one.
    """
    if not tokenizer.chat_template:
        return None
    ending = _ending(tokenizer, tokenizer.chat_template)
    control = _control_tokens(tokenizer)
    return next((token for token in _tokenize(tokenizer, ending or "") if token in control), None)


def stop_token_ids(tokenizer: Any, configured: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens at which an answer ends, wherever one is written.

    `configured` is what the base model's generation config names. What training teaches the model to end its turns with
    is among them, whatever that configuration says.
    """
    listed = [configured] if configured is None or isinstance(configured, int) else configured
    return frozenset({*listed, tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None})


def hash_chat_template(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text, in hex."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _trained_turns(messages: Sequence[Message]) -> list[int]:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]
    if not turns:
        raise InvalidInputError("no message of the assistant carries loss", param="messages")
    return turns


def _tokenize_turn(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt in front of the last message, and those that the assistant then has to say."""
    asked = _render(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    spoken = _render(tokenizer, messages, tools, add_generation_prompt=False)
    if not spoken.startswith(asked):
        raise InvalidInputError(
            "the chat template shows an assistant's turn otherwise than it asks for one: the assistant's words can't "
            "be located, so that this base model can't be trained on conversations",
            param="messages",
        )
    answer = _cut_answer(tokenizer, spoken[len(asked) :])
    prompt, whole = _tokenize(tokenizer, asked), _tokenize(tokenizer, asked + answer)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    # Letters merge over the border, as newlines do. The model speaks behind the prompt as the server tokenises it; a
    # control token in front keeps tokenizers that mark the beginning of a text from doing so here.
    return prompt, _tokenize(tokenizer, tokenizer.eos_token + answer)[1:]


def _cut_answer(tokenizer: Any, answer: str) -> str:
    """What the assistant has to say, up to the token that ends its turn: it never says what templates write behind."""
    ending = _ending(tokenizer, tokenizer.chat_template)
    if ending is None:
        raise InvalidInputError("the chat template leaves out what the assistant says", param="messages")
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id} - {None}
    ends = [token for token in tokenizer.convert_ids_to_tokens(sorted(ids)) if token in answer]
    if ends:
        return answer[: min(answer.index(token) + len(token) for token in ends)]
    control = tuple(_control_tokens(tokenizer).values())
    if answer.rstrip().endswith(control):  # a turn that ends in another way, as Llama's calls of built-in tools do
        return answer.rstrip()
    # A template of words alone: nothing in it could tell the server that the turn has ended.
    return answer.removesuffix(ending) + str(tokenizer.eos_token)


@lru_cache(maxsize=4)
def _ending(tokenizer: Any, chat_template: str) -> str | None:
    """What the template writes behind an assistant's last words; None if it doesn't write the words.

    Empty if it refuses the simplest of conversations, so that nobody knows.
    """
    words = "probe of words"
    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": words}]
    try:
        text = _render(tokenizer, messages, (), add_generation_prompt=False)
    except InvalidInputError:
        return ""
    return text.rpartition(words)[2] if words in text else None


def _render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [_pick(message, _MESSAGE_KEYS) for message in messages],
            tools=[_template_tool(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the chat template refuses this conversation: {error}", param="messages") from None
    return str(text)


def _template_tool(tool: Tool) -> dict[str, Any]:
    return {"type": tool["type"], "function": _pick(tool["function"], _FUNCTION_KEYS)}


def _pick(found: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: found[key] for key in keys if key in found}


def _check_tools_are_shown(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """Refuse what the template would leave out in silence: the model would learn to call what it never saw."""
    variants = {name: variant for name, variant in _without_tools(messages, tools) if variant != (messages, tools)}
    if not variants:
        return
    text = _render(tokenizer, messages, tools, add_generation_prompt=False)
    for name, (others, offered) in variants.items():
        try:
            is_shown = _render(tokenizer, others, offered, add_generation_prompt=False) != text
        except InvalidInputError:  # what the template checks, it does not leave out
            is_shown = True
        if not is_shown:
            raise InvalidInputError(f"the chat template has no place for {name}: they would be lost", param="messages")


def _without_tools(
    messages: Sequence[Message], tools: Sequence[Tool]
) -> Iterator[tuple[str, tuple[Sequence[Message], Sequence[Tool]]]]:
    """The conversation as it would be without one of the three things that it takes a template with tools to show."""
    yield "tools", (messages, [])
    unnamed = {"function": {"name": _PROBE, "arguments": {}}}
    calls = [{**message, "tool_calls": [unnamed]} if message.get("tool_calls") else message for message in messages]
    yield "tool calls", (calls, tools)
    answers = [{**message, "content": _PROBE} if message["role"] == "tool" else message for message in messages]
    yield "the answers of tools", (answers, tools)


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _check_no_control_tokens(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """Refuse text that would become a control token: with one, a user could end their turn and speak as the system."""
    control = _control_tokens(tokenizer).values()
    for name, items in (("messages", messages), ("tools", tools)):
        for index, item in enumerate(items):
            for path, value in _texts_in(item, ""):
                if found := next((text for text in control if text in value), None):
                    raise InvalidInputError(
                        f"{name}[{index}]{path} holds the model's control token {found}", param=name
                    )


def _texts_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text in a message or a tool with the path to it; of an object its keys, too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield path, key
            yield from _texts_in(item, f"{path}.{key}"[:80])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts_in(item, f"{path}[{index}]"[:80])


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    # The template writes the special tokens itself; letting the tokeniser add them would double the BOS.
    return list(tokenizer.encode(text, add_special_tokens=False))
