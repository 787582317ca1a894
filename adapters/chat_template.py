"""Renders conversations to tokens: the one function family that training and serving share.

A training row is tokenised in segments, each prompt exactly as the server tokenises it for the same turns, so that the
model is asked at serving time with the very tokens that it was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidInputError

__all__ = ["RenderedRow", "hash_chat_template", "render_prompt", "render_text", "render_training_row"]

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A tokenised conversation; `loss_mask[i]` says whether token i carries loss. Both have the same length."""

    input_ids: list[int]
    loss_mask: list[bool]


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak.

    Raises:
        InvalidInputError: the model's chat template refuses the conversation, or its text holds a control token.
    """
    return _tokenize(tokenizer, render_text(tokenizer, messages, tools))


def render_text(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """The same as text.

    Raises:
        InvalidInputError: the model's chat template refuses the conversation, or its text holds a control token.
    """
    return _render(tokenizer, messages, tools, add_generation_prompt=True)


def render_training_row(tokenizer: Any, messages: Sequence[Message]) -> RenderedRow:
    """Token ids of a whole conversation, with loss on the assistant's words and the end-of-turn token behind them.

    Raises:
        InvalidInputError: the template refuses the conversation, or renders earlier turns differently once later ones
            follow, so that the assistant's words can't be located.
    """
    input_ids: list[int] = []
    loss_mask: list[bool] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        spoken = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        answer, trailer = _split_after_eos(tokenizer, _strip_prefix(spoken, prompt))
        for text, carries_loss in ((_strip_prefix(prompt, rendered), False), (answer, True)):
            ids = _tokenize(tokenizer, text)
            input_ids += ids
            loss_mask += [carries_loss] * len(ids)
        rendered = spoken.removesuffix(trailer)
    return RenderedRow(input_ids, loss_mask)


def hash_chat_template(tokenizer: Any) -> str:
    """SHA-256 of the chat template's text, in hex."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool,
) -> str:
    from jinja2.exceptions import TemplateError

    _check_no_control_tokens(tokenizer, messages, tools)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the chat template refuses this conversation: {error}", param="messages") from None
    return str(text)


def _check_no_control_tokens(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Refuse text that would become a control token: with one, a user could end their turn and speak as the system."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
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


def _strip_prefix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise InvalidInputError(
            "the chat template renders earlier turns differently once later turns follow; "
            "the assistant's words can't be located, so this template can't be trained on multi-turn rows",
            param="messages",
        )
    return text[len(prefix) :]


def _split_after_eos(tokenizer: Any, spoken: str) -> tuple[str, str]:
    """Cut what the template writes behind the end-of-turn token (often a newline): the model never has to say it."""
    eos = tokenizer.eos_token or ""
    end = spoken.rfind(eos) + len(eos) if eos and eos in spoken else len(spoken)
    return spoken[:end], spoken[end:]
