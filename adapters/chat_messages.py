"""Checks the messages of training rows, and gives them as chat templates expect them.

Knows one conversation at a time; which fields of a row hold conversations is for `adapters/chat_rows.py` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = [
    "Message",
    "RowProblem",
    "Tool",
    "answer_text",
    "check_text",
    "read_answer",
    "read_conversation",
    "read_prompt",
    "read_tools",
]

Message = dict[str, Any]
Tool = dict[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id")
_MAX_ROLES_SHOWN = 10
_MAX_PROBLEMS = 1000  # of one row: a line of megabytes may hold a million messages, each with several of its own
_MAX_TOOLS = 128
_MAX_ID_CHARS = 128
_NAME = re.compile(r"[^\s<|\\/>]{1,64}")
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with one field of a row; `field` is its path, or empty where the row as a whole is wrong.

    Args:
        field: As said.
        text: In words.
        role: The name that stands where a role should, if that is what is wrong.
    """

    field: str
    text: str
    role: str | None = None

    def __str__(self) -> str:
        return f"field {self.field}: {self.text}" if self.field else self.text


def read_conversation(value: Any, where: str, problems: list[RowProblem]) -> tuple[Message, ...]:
    """The messages of a whole conversation: a system message at most, user and assistant in turn, an assistant last.

    A message is given back with `role`, `content` (text, empty beside calls alone) and what it has of `weight` (only if
    it is 0), `name`, `tool_call_id` and `tool_calls`, whose `arguments` are objects, as templates want them. Where
    something is wrong, `problems` grows and what is given back means nothing.
    """
    messages = _read_messages(value, where, problems)
    if messages and not problems:
        problems += _check_order(messages, where, ("assistant",))
    if not problems and all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        problems.append(RowProblem(where, "every assistant message has weight 0: the row would train nothing"))
    return messages


def read_prompt(value: Any, where: str, problems: list[RowProblem]) -> tuple[Message, ...]:
    """The messages up to where the assistant is to speak; a text is the user's one message."""
    if isinstance(value, str):
        problems += check_text(value, where)
        return ({"role": "user", "content": value},)
    messages = _read_messages(value, where, problems)
    if messages and not problems:
        problems += _check_order(messages, where, ("user", "tool"))
    return messages


def read_answer(value: Any, where: str, problems: list[RowProblem]) -> Message:
    """One assistant message, given as a text, as itself, or as a list of one."""
    if isinstance(value, str):
        problems += check_text(value, where)
        return {"role": "assistant", "content": value}
    messages = _read_messages([value] if isinstance(value, dict) else value, where, problems)
    if not problems and [message["role"] for message in messages] != ["assistant"]:
        problems.append(RowProblem(where, f"expected one assistant message, found {_roles(messages)}"))
    return messages[0] if messages else {}


def read_tools(value: Any, where: str, problems: list[RowProblem]) -> tuple[Tool, ...]:
    """What the model may call, in the wire's form; null is none."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_TOOLS:
        problems.append(RowProblem(where, f"expected a list of at most {_MAX_TOOLS} tools, found {_kind(value)}"))
        return ()
    for index, tool in enumerate(value):
        problems += _check_tool(tool, f"{where}[{index}]")
    if not problems and len({tool["function"]["name"] for tool in value}) < len(value):
        problems.append(RowProblem(where, "several functions have the same name"))
    return tuple(_without_nulls(tool) for tool in value if isinstance(tool, dict))


def answer_text(message: Mapping[str, Any]) -> str:
    """What an assistant's message says, to be compared with another: its text, and its calls without their ids."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    text = str(message.get("content") or "")
    return f"{text}\n{json.dumps(calls, sort_keys=True)}" if calls else text


def check_text(text: str, where: str) -> Iterator[RowProblem]:
    """What is wrong with a text that a model is to read or to learn."""
    if not text.strip():
        yield RowProblem(where, "is empty")
    elif _SURROGATE.search(text):
        yield RowProblem(where, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    elif "\0" in text:
        yield RowProblem(where, "holds a NUL character (\\u0000): the file was damaged, or is in another encoding")


def _read_messages(value: Any, where: str, problems: list[RowProblem]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        problems.append(RowProblem(where, f"expected a list of messages, found {_kind(value)}"))
        return ()
    if not value:
        problems.append(RowProblem(where, "expected at least one message, found none"))
    messages: list[Message] = []
    for index, message in enumerate(value):
        if len(problems) >= _MAX_PROBLEMS:
            problems.append(RowProblem(where, f"{len(value) - index} of {len(value)} messages were not looked at"))
            break
        messages.append(_read_message(message, f"{where}[{index}]", problems))
    return tuple(messages)


def _read_message(message: Any, where: str, problems: list[RowProblem]) -> Message:
    if not isinstance(message, dict):
        problems.append(RowProblem(where, f"expected an object with role and content, found {_kind(message)}"))
        return {}
    # Tables give every message all columns of any, with null where it has none.
    given = {key: value for key, value in message.items() if value is not None}
    if unknown := sorted(set(given) - set(_MESSAGE_KEYS)):
        expected = ", ".join(_MESSAGE_KEYS)
        problems.append(RowProblem(where, f"key {unknown[0]!r:.60} is not supported; expected {expected}"))
    role = "system" if given.get("role") == "developer" else given.get("role")
    if role not in _ROLES:
        text = f"expected one of {', '.join(_ROLES)}, found {role!r:.60}"
        problems.append(RowProblem(f"{where}.role", text, role if isinstance(role, str) else None))
    calls = _read_calls(given.get("tool_calls"), f"{where}.tool_calls", problems)
    found = {"role": role, "content": _read_content(given.get("content"), f"{where}.content", problems, bool(calls))}
    if calls:
        found["tool_calls"] = calls
    found |= {key: given[key] for key in ("name", "tool_call_id") if key in given}
    if given.get("weight") == 0:
        found["weight"] = 0
    problems += _check_extras(given, role, where)
    return found


def _read_content(content: Any, where: str, problems: list[RowProblem], may_be_empty: bool) -> str:
    text = _join_parts(content, where, problems) if isinstance(content, list) and content else content
    if text is None and may_be_empty:
        return ""
    if not isinstance(text, str):
        problems.append(RowProblem(where, f"expected text, found {_kind(text)}"))
        return ""
    if text or not may_be_empty:
        problems += check_text(text, where)
    return text


def _join_parts(parts: list[Any], where: str, problems: list[RowProblem]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            expected = f'expected {{"type": "text", "text": "..."}}, found {json.dumps(part, default=str)[:60]}'
            problems.append(RowProblem(f"{where}[{index}]", expected))
            return "?"
        texts.append(text)
    return "".join(texts)


def _check_extras(given: Message, role: Any, where: str) -> Iterator[RowProblem]:
    """The fields that only some roles have."""
    if "weight" in given:
        if role != "assistant":
            yield RowProblem(f"{where}.weight", f"only an assistant's message has a weight, this is {_article(role)}")
        elif given["weight"] not in (0, 1) or isinstance(given["weight"], bool):
            yield RowProblem(f"{where}.weight", f"expected 0 or 1, found {given['weight']!r:.60}")
    if "name" in given and not (isinstance(given["name"], str) and _NAME.fullmatch(given["name"])):
        yield RowProblem(f"{where}.name", f"expected 1 to 64 characters without spaces, found {given['name']!r:.60}")
    if given.get("tool_calls") and role != "assistant":
        yield RowProblem(f"{where}.tool_calls", f"only an assistant calls tools, this is {_article(role)}")
    if ("tool_call_id" in given) != (role == "tool"):
        yield RowProblem(f"{where}.tool_call_id", "goes with the role tool, and with no other")


def _read_calls(value: Any, where: str, problems: list[RowProblem]) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_TOOLS:
        problems.append(RowProblem(where, f"expected a list of at most {_MAX_TOOLS} calls, found {_kind(value)}"))
        return []
    return [_read_call(call, f"{where}[{index}]", problems) for index, call in enumerate(value)]


def _read_call(call: Any, where: str, problems: list[RowProblem]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_id(call.get("id")) or call.get("type", "function") != "function":
        expected = 'expected {"id": "...", "type": "function", "function": {"name": ..., "arguments": ...}}'
        problems.append(RowProblem(where, f"{expected}, found {json.dumps(call, default=str)[:60]}"))
        return {}
    name = function.get("name")
    problems += _check_function_name(name, f"{where}.function.name")
    arguments = _read_arguments(function.get("arguments"))
    if arguments is None:
        found = f"found {function.get('arguments')!r:.60}"
        text = f"expected an object, or the JSON text of one, {found}"
        problems.append(RowProblem(f"{where}.function.arguments", text))
    return {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _read_arguments(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) and _is_unicode(value) else None


def _check_tool(tool: Any, where: str) -> Iterator[RowProblem]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        expected = 'expected {"type": "function", "function": {"name": ..., "parameters": {...}}}'
        yield RowProblem(where, f"{expected}, found {json.dumps(tool, default=str)[:60]}")
        return
    yield from _check_function_name(function.get("name"), f"{where}.function.name")
    if unknown := sorted(set(function) - {"name", "description", "parameters", "strict"}):
        yield RowProblem(f"{where}.function", f"key {unknown[0]!r:.60} is not supported")
    if not isinstance(function.get("description"), str | None):
        yield RowProblem(f"{where}.function.description", f"expected text, found {_kind(function['description'])}")
    if not isinstance(function.get("parameters"), dict | None):
        found = _kind(function["parameters"])
        yield RowProblem(f"{where}.function.parameters", f"expected a JSON schema (an object), found {found}")
    if not _is_unicode(tool):
        yield RowProblem(where, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")


def _check_function_name(name: Any, where: str) -> Iterator[RowProblem]:
    if not (isinstance(name, str) and _FUNCTION_NAME.fullmatch(name)):
        yield RowProblem(where, f"expected 1 to 64 letters, digits, underscores and dashes, found {name!r:.60}")


def _check_order(messages: Sequence[Message], where: str, endings: Sequence[str]) -> Iterator[RowProblem]:
    """A system message at most, first; then user and assistant in turn; behind calls each tool's answer, once."""
    turns = list(messages[1:] if messages[0]["role"] == "system" else messages)
    if any(message["role"] == "system" for message in turns):
        leave_out = "leave out what such a speaker says later (--roles NAME=none: all that it says)"
        yield RowProblem(where, f"a system message may only stand first; {leave_out}")
        return
    expected, waiting = "user", set[str]()  # whose turn it is, and the calls that no tool message has answered
    for index, message in enumerate(turns, start=len(messages) - len(turns)):
        if waiting and message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                text = f"expected one of {sorted(waiting)!r:.120}, found {message['tool_call_id']!r:.60}"
                yield RowProblem(f"{where}[{index}].tool_call_id", text)
                return
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            text = f"expected a tool message for each call, found none for {sorted(waiting)!r:.120}"
            yield RowProblem(f"{where}[{index}]", text)
            return
        if message["role"] != expected:
            break
        waiting = {call["id"] for call in message.get("tool_calls", ())}
        expected = "user" if expected == "assistant" and not waiting else "assistant"
    else:
        if turns and turns[-1]["role"] in endings and not (waiting and turns[-1]["role"] == "tool"):
            return
    ending = " or ".join(endings)
    text = f"expected user and assistant in turn, ending with {ending}, found {_roles(messages)}"
    yield RowProblem(where, f"{text}{_cure([message['role'] for message in turns], endings)}")


def _cure(roles: Sequence[str], endings: Sequence[str]) -> str:
    """What mends turns that are out of order, where something simple does."""
    cure = ""
    if roles[0:1] == ["assistant"] and "user" in roles:
        cure = "take out what the assistant says before the user speaks"
    elif any(first == second != "tool" for first, second in pairwise(roles)):
        cure = "join what one speaker says in a row into one message"
    elif roles[-1:] == ["user"] and "user" not in endings and "assistant" in roles:
        cure = "take out what the user says last"
    return f"; {cure} (--join-turns does)" if cure else ""


def _roles(messages: Sequence[Message]) -> str:
    shown = ", ".join(str(message["role"]) for message in messages[:_MAX_ROLES_SHOWN])
    return shown + (", ..." if len(messages) > _MAX_ROLES_SHOWN else "")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_ID_CHARS


def _is_unicode(value: Any) -> bool:
    return not _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))


def _without_nulls(tool: Tool) -> Tool:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _article(role: Any) -> str:
    return f"one of role {role!r:.60}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
