"""From the wire's prompts to tokens: conversations by the chat template, completions as they are."""

from __future__ import annotations

import json
from typing import Any

from adapters.chat_template import render_prompt
from adapters.errors import InvalidInputError, PromptTooLongError
from server.schemas import ChatMessage, ChatRequest
from server.tools import ToolUse

__all__ = ["chat_prompt", "check_length", "text_prompt", "token_prompt"]


def chat_prompt(tokenizer: Any, body: ChatRequest, tools: ToolUse | None) -> tuple[int, ...]:
    """The tokens of a conversation, up to where the assistant is to speak.

    Raises:
        InvalidInputError: the chat template refuses it, or it holds a control token; names the field.
    """
    messages = [_template_message(message, index) for index, message in enumerate(body.messages)]
    try:
        return tuple(render_prompt(tokenizer, messages, tools.offered if tools else ()))
    except (UnicodeEncodeError, TypeError) as error:
        # Only what is not read as text comes here: a schema's keys and values may hold half a surrogate pair.
        raise InvalidInputError(f"tools: hold text that is not valid Unicode: {error}", param="tools") from None


def text_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of a text as the tokenizer reads it: control tokens in it are control tokens.

    Raises:
        InvalidInputError: there are none.
    """
    if tokens := tuple(tokenizer.encode(text)):
        return tokens
    raise InvalidInputError("prompt: expected at least one token, found an empty text", param="prompt")


def token_prompt(tokens: list[int], *, vocab_size: int) -> tuple[int, ...]:
    """Tokens as they were given.

    Raises:
        InvalidInputError: one of them doesn't exist.
    """
    if unknown := [token for token in tokens if token >= vocab_size]:
        raise InvalidInputError(
            f"prompt: there is no token {unknown[0]}; the vocabulary has {vocab_size}", param="prompt"
        )
    return tuple(tokens)


def check_length(prompt: tuple[int, ...], *, max_context: int, param: str) -> None:
    """Check that a prompt leaves room for an answer.

    Raises:
        PromptTooLongError: it does not.
    """
    if len(prompt) >= max_context:
        raise PromptTooLongError(
            # In words by which clients that have several models know when to take another one.
            f"the prompt is too long: it takes {len(prompt)} tokens, but this model's maximum context length is "
            f"{max_context} tokens, prompt and answer together",
            param=param,
        )


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates expect it. No base model was trained on a developer's role: it is the system's."""
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _parse_arguments(call.function.arguments, f"messages.{index}.tool_calls.{number}"),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return found


def _parse_arguments(text: str, where: str) -> dict[str, Any]:
    """The arguments of a call in the history: templates write them as JSON themselves."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    raise InvalidInputError(
        f"{where}.function.arguments: expected the text of a JSON object, found {text[:40]!r}", param="messages"
    )
