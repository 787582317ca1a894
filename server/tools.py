"""Tools: whether a base model's chat template shows them, what a request wants of them, and calls in the model's words.

A template that shows tools also tells the model how to call one. Two ways are understood:
- `hermes` (Qwen, Hermes): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or several, between text;
- `llama` (Llama 3): the whole answer is `{"name": ..., "parameters": {...}}`, one call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.chat_template import render_text
from adapters.errors import InvalidInputError
from server.engine.grammar import embedding_grammar
from server.schema_check import schema_text
from server.schemas import ChatRequest
from server.tool_schemas import NamedTool, Tool

__all__ = ["ToolFormat", "ToolReader", "ToolUse", "find_tool_format", "plan_tools", "read_whole"]

ToolFormat = Literal["hermes", "llama"]

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_ARGUMENTS_KEY: dict[ToolFormat, str] = {"hermes": "arguments", "llama": "parameters"}
# Without parameters, so that the word can only come from the template's own instructions.
_PROBE = {"type": "function", "function": {"name": "probe"}}
_NO_PLACE = "the chat template of this server's base model has no place for tools"
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request wants of its tools.

    Args:
        format: How the model writes a call.
        offered: The tools as the chat template gets them.
        grammar: What the answer has to follow where a call is required; empty where the model may choose.
        stop: What ends the answer behind a first call where only one is wanted.
    """

    format: ToolFormat
    offered: tuple[dict[str, Any], ...]
    grammar: str = ""
    stop: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """What may be called."""
        return frozenset(tool["function"]["name"] for tool in self.offered)


def find_tool_format(tokenizer: Any) -> ToolFormat | None:
    """How the tokenizer's chat template has tools called; None if it shows none, or wants calls in another form."""
    conversation = [{"role": "user", "content": "?"}]
    try:
        without = render_text(tokenizer, conversation)
        text = render_text(tokenizer, conversation, [_PROBE])
    except InvalidInputError:
        return None
    if text == without:
        return None
    if _BEGIN in text and '"arguments"' in text:
        return "hermes"
    return "llama" if '"parameters"' in text else None


def plan_tools(body: ChatRequest, tool_format: ToolFormat | None) -> ToolUse | None:
    """What the engine has to know of a request's tools; None if the answer is to be text and nothing else.

    Raises:
        InvalidInputError: the template has no tools, or the options contradict each other; names the field.
    """
    _check_history(body, tool_format)
    choice = body.tool_choice or "auto"
    if not body.tools:
        if choice not in ("none", "auto"):
            raise _refused("tool_choice", "there are no tools to choose from")
        return None
    _check_tools(body.tools)
    if choice == "none":
        return None
    if tool_format is None:
        raise _refused("tools", _NO_PLACE)
    _check_alone(body, is_forced=choice != "auto")
    offered = tuple(tool.model_dump(exclude_none=True) for tool in body.tools)
    if choice != "auto":
        return ToolUse(tool_format, offered, grammar=_call_grammar(_wanted(body.tools, choice), tool_format))
    is_single = tool_format == "hermes" and not body.parallel_tool_calls
    return ToolUse(tool_format, offered, stop=(_END,) if is_single else ())


def _check_history(body: ChatRequest, tool_format: ToolFormat | None) -> None:
    for index, message in enumerate(body.messages):
        if tool_format is None and (message.role == "tool" or message.tool_calls):
            found = "a tool's answer" if message.role == "tool" else "tool calls"
            raise InvalidInputError(f"messages.{index}: holds {found}, but {_NO_PLACE}", param="messages")


def _check_tools(tools: Sequence[Tool]) -> None:
    names = [tool.function.name for tool in tools]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise _refused("tools", f"there are several functions with the name {repeated!r}")
    parameters = [tool.function.parameters or {} for tool in tools]
    schema_text(parameters, param="tools")
    for name, schema in zip(names, parameters, strict=True):
        if schema.get("type", "object") != "object":
            raise _refused(
                "tools", f"parameters of {name!r}: expected a schema of type 'object', found {schema['type']!r}"
            )


def _check_alone(body: ChatRequest, *, is_forced: bool) -> None:
    """A form, and an answer that may not end where a call does, leave no room for calls."""
    if body.response_format is not None and body.response_format.type != "text":
        raise _refused("response_format", "the answer may be a call of one of the tools; leave one of them out")
    if body.guided_choice is not None:
        raise _refused("guided_choice", "the answer may be a call of one of the tools; leave one of them out")
    for name in ("min_tokens", "ignore_eos", "stop") if is_forced else ():
        if getattr(body, name):
            raise _refused(
                name, "the call that tool_choice requires decides where the answer ends; leave one of them out"
            )


def _wanted(tools: Sequence[Tool], choice: str | NamedTool) -> list[Tool]:
    if not isinstance(choice, NamedTool):
        return list(tools)
    wanted = [tool for tool in tools if tool.function.name == choice.function.name]
    if not wanted:
        raise _refused("tool_choice", f"there is no tool {choice.function.name!r}")
    return wanted


def _call_grammar(tools: Sequence[Tool], tool_format: ToolFormat) -> str:
    """The grammar of exactly one call of one of the tools, its arguments by their schema."""
    begin, end = (f"{_BEGIN}\n", f"}}\n{_END}") if tool_format == "hermes" else ("", "}")
    key = _ARGUMENTS_KEY[tool_format]
    return embedding_grammar(
        (
            f'{begin}{{"name": {json.dumps(tool.function.name)}, "{key}": ',
            _NO_PARAMETERS if tool.function.parameters is None else {"type": "object", **tool.function.parameters},
            end,
        )
        for tool in tools
    )


class ToolReader:
    """Reads one answer as it comes: text that may be shown, and whole calls.

    What looks like a call and is none, or calls a tool that was not offered, stays text. White space around calls is
    dropped.

    Args:
        use: What the request wants.
        call_id: Begins the ids of the calls.
    """

    def __init__(self, use: ToolUse, call_id: str) -> None:
        self._use = use
        self._call_id = call_id
        self._held = ""  # text that may be, or begin, a call
        self._is_open = False  # whether it is behind a begin tag
        self._gap = ""  # white space before that tag, which belongs to the text if no call comes
        self._is_blank = True  # whether nothing but calls and white space came so far, or since the last call
        self.num_calls = 0

    def push(self, text: str) -> Iterator[str | dict[str, Any]]:
        """Add text; yields what is clear from it, text as `str` and a call as the wire has it."""
        self._held += text
        if self._use.format == "hermes":
            yield from self._read_tagged()
        elif self._held.strip() and not (self._is_blank and self._held.lstrip().startswith("{")):
            yield self._take_held()

    def finish(self) -> Iterator[str | dict[str, Any]]:
        """What is left when the answer has ended."""
        held, self._held = self._held, ""
        begin = f"{self._gap}{_BEGIN}" if self._is_open else ""
        is_call = self._is_open or self._use.format == "llama"
        yield from self._read_call(held, f"{begin}{held}") if is_call else self._shown(held, is_last=True)
        self._is_open = False

    def _take_held(self) -> str:
        text, self._held = self._held, ""
        self._is_blank = False
        return text

    def _read_tagged(self) -> Iterator[str | dict[str, Any]]:
        while True:
            before, tag, behind = self._held.partition(_END if self._is_open else _BEGIN)
            if not tag:
                break
            self._held = behind
            self._is_open = not self._is_open
            if self._is_open:
                shown = before.rstrip()
                self._gap = before[len(shown) :]
                yield from self._shown(shown)
            else:
                yield from self._read_call(before, f"{self._gap}{_BEGIN}{before}{_END}")
        if not self._is_open:
            safe = _length_before_tag(self._held)
            shown, self._held = self._held[:safe], self._held[safe:]
            yield from self._shown(shown)

    def _shown(self, text: str, *, is_last: bool = False) -> Iterator[str]:
        """Text that is no call, without the white space around calls."""
        if self._is_blank and self.num_calls:
            text = text.lstrip()
        if is_last and self.num_calls:
            text = text.rstrip()
        if text:
            self._is_blank = False
            yield text

    def _read_call(self, text: str, raw: str) -> Iterator[str | dict[str, Any]]:
        call = _parse_call(text, self._use)
        if call is None:
            yield from self._shown(raw)
            return
        name, arguments = call
        identity = f"{self._call_id}_{self.num_calls}"
        self.num_calls += 1
        self._is_blank = True
        yield {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_whole(reader: ToolReader | None, text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text and the calls of a whole answer, by a reader that has read nothing; without one it is all text."""
    if reader is None:
        return text, []
    pieces = [*reader.push(text), *reader.finish()]
    shown = "".join(piece for piece in pieces if isinstance(piece, str))
    return shown, [piece for piece in pieces if not isinstance(piece, str)]


def _length_before_tag(text: str) -> int:
    """How much of a text is no white space before a tag, and not the beginning of one."""
    for length in range(min(len(text), len(_BEGIN) - 1), 0, -1):
        if _BEGIN.startswith(text[-length:]):
            return len(text[:-length].rstrip())
    return len(text.rstrip())


def _parse_call(text: str, use: ToolUse) -> tuple[str, str] | None:
    """Name and arguments of a call, the arguments as the text of a JSON object; None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or name not in use.names:
        return None
    arguments = call.get(_ARGUMENTS_KEY[use.format], {})
    # As ASCII: what a model escapes may be half a surrogate pair, which no answer could carry otherwise.
    return (name, json.dumps(arguments)) if isinstance(arguments, dict) else None


def _refused(field: str, why: str) -> InvalidInputError:
    return InvalidInputError(f"{field}: {why}", param=field)
