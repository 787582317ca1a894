"""Tools below HTTP: which templates show them, what a request may want of them, and calls in the model's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidInputError
from server.schemas import ChatRequest
from server.tools import ToolFormat, ToolReader, ToolUse, find_tool_format, plan_tools
from tests.support.tiny import CHATML, CHATML_WITH_TOOLS, make_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"town": "Ulm"}}'
ULM = {"town": "Ulm"}


def _body(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "hi"}]
    return ChatRequest.model_validate({"model": "base", "messages": messages, **fields})


def _use(tool_format: ToolFormat = "hermes") -> ToolUse:
    return ToolUse(tool_format, (WEATHER, TIME))


def _read(*pieces: str, tool_format: ToolFormat = "hermes") -> list[Any]:
    """What a reader makes of an answer in pieces: neighbouring texts joined, each call as its name and arguments."""
    reader = ToolReader(_use(tool_format), "call_r")
    found: list[Any] = []
    for item in [*(item for piece in pieces for item in reader.push(piece)), *reader.finish()]:
        if not isinstance(item, str):
            assert ("function", f"call_r_{sum(not isinstance(i, str) for i in found)}") == (item["type"], item["id"])
            found.append((item["function"]["name"], json.loads(item["function"]["arguments"])))
        elif found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


# Templates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("llama3_1", "llama"),
        ("llama3_2", "llama"),
        ("llama3", None),
        ("phi3", None),
        ("gemma3", None),
        ("qwen3_6", None),  # calls in tags within tags, which nothing here reads
        ("muse_glimmer", None),  # fails without a schema
    ],
)
def test_format_is_found_when_a_published_template_shows_tools(name: str, expected: str | None) -> None:
    """By rendering alone, whatever the model is called."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert expected == find_tool_format(make_tokenizer(template))


def test_format_is_none_when_the_template_ignores_tools() -> None:
    """The same text with and without."""
    assert None is find_tool_format(make_tokenizer(CHATML))
    assert "hermes" == find_tool_format(make_tokenizer(CHATML_WITH_TOOLS))


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", [None, "hermes"])
@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": None}, {"tools": [], "tool_choice": "auto"}])
def test_plan_is_none_when_there_are_no_tools(fields: dict[str, Any], tool_format: ToolFormat | None) -> None:
    """Neutral values ask for nothing, so any base model can do it."""
    assert None is plan_tools(_body(**fields, parallel_tool_calls=False), tool_format)


def test_plan_is_none_when_no_tool_may_be_called() -> None:
    """Even where the template has none: text is all that is wanted."""
    assert None is plan_tools(_body(tools=[WEATHER], tool_choice="none"), None)


def test_plan_leaves_the_choice_to_the_model_when_it_is_auto() -> None:
    """No grammar; the tools are offered as they came."""
    use = plan_tools(_body(tools=[WEATHER, TIME]), "hermes")
    assert ToolUse("hermes", (WEATHER, TIME)) == use
    assert {"weather", "time"} == _use().names


@pytest.mark.parametrize(("tool_format", "stop"), [("hermes", ("</tool_call>",)), ("llama", ())])
def test_plan_stops_behind_the_first_call_when_calls_may_not_be_parallel(
    tool_format: ToolFormat, stop: tuple[str, ...]
) -> None:
    """Where one answer may hold several."""
    use = plan_tools(_body(tools=[WEATHER], parallel_tool_calls=False), tool_format)
    assert use is not None
    assert stop == use.stop


MESSAGES_WITH_CALL = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "several functions"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "leave one"),
        ({"tools": [WEATHER], "guided_choice": ["a", "b"]}, "guided_choice", "leave one"),
        ({"tools": [WEATHER], "tool_choice": "required", "stop": "a"}, "stop", "leave one"),
        ({"tools": [WEATHER], "tool_choice": "required", "min_tokens": 1}, "min_tokens", "leave one"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
            "'array'",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 70_000}}}]},
            "tools",
            "bytes",
        ),
    ],
)
def test_plan_is_refused_when_options_contradict_each_other(fields: dict[str, Any], param: str, reason: str) -> None:
    """The field is named."""
    with pytest.raises(InvalidInputError, match=reason) as caught:
        plan_tools(_body(**fields), "hermes")
    assert param == caught.value.param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"messages": MESSAGES_WITH_CALL}, "messages"),
        ({"messages": [{"role": "tool", "content": "sun", "tool_call_id": "c"}]}, "messages"),
    ],
)
def test_plan_is_refused_when_the_template_has_no_place_for_tools(fields: dict[str, Any], param: str) -> None:
    """Neither tools nor their traces in the conversation are dropped silently."""
    with pytest.raises(InvalidInputError, match="no place for tools") as caught:
        plan_tools(_body(**fields), None)
    assert param == caught.value.param


# Calls in tags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CALL, [("weather", ULM)]),
        (f"I look. \n{CALL}", ["I look.", ("weather", ULM)]),
        (f"{CALL}\n{CALL}\n", [("weather", ULM), ("weather", ULM)]),
        (f"{CALL} Then:\n{CALL}", [("weather", ULM), "Then:", ("weather", ULM)]),
        ('<tool_call>{"name": "time"}</tool_call>', [("time", {})]),
        ('<tool_call>{"name": "time", "arguments": {}}', [("time", {})]),  # cut by a stop string, or never closed
        ("no call at all \n", ["no call at all \n"]),
        ("a < b <tool", ["a < b <tool"]),
        ("", []),
    ],
)
def test_calls_are_read_when_they_come_in_tags(answer: str, expected: list[Any]) -> None:
    """Text stays text, without the white space around calls."""
    assert expected == _read(answer)


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": []}</tool_call>',
        '<tool_call>{"name": ["time"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arg</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>{"name": "ti',
        "Write \n<tool_call>x</tool_call> \n<tool_call>",
    ],
)
def test_text_stays_text_when_it_only_looks_like_a_call(answer: str) -> None:
    """To its last letter: nothing that the model said is lost."""
    assert [answer] == _read(answer)


@given(st.data())
def test_calls_are_the_same_when_the_answer_comes_in_any_pieces(data: st.DataObject) -> None:
    """The stream's pieces are the tokens', and those end anywhere."""
    parts = st.sampled_from([CALL, "text ", "\n", "<tool_", "<tool_call>", "</tool_call>", "{", LLAMA_CALL])
    answer = "".join(data.draw(st.lists(parts, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    for tool_format in ("hermes", "llama"):
        assert _read(answer, tool_format=tool_format) == _read(*pieces, tool_format=tool_format)


def test_text_is_shown_at_once_when_no_call_can_begin_with_it() -> None:
    """Only what may belong to a call is held back."""
    reader = ToolReader(_use(), "c")
    assert ["Let"] == list(reader.push("Let"))
    assert [" me"] == list(reader.push(" me "))
    assert [" <b"] == list(reader.push("<b"))
    assert [] == list(reader.push("\n<tool_"))
    assert ["\n<tool_x"] == list(reader.push("x"))


# Calls that are the whole answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LLAMA_CALL, [("weather", ULM)]),
        (f" {LLAMA_CALL}\n", [("weather", ULM)]),
        (f"{LLAMA_CALL}; {LLAMA_CALL}", [f"{LLAMA_CALL}; {LLAMA_CALL}"]),
        (f"I say {LLAMA_CALL}", [f"I say {LLAMA_CALL}"]),
        ('{"name": "rm", "parameters": {}}', ['{"name": "rm", "parameters": {}}']),
        ('{"name": "ti', ['{"name": "ti']),
        ("text", ["text"]),
        ("", []),
    ],
)
def test_call_is_read_when_it_is_the_whole_answer(answer: str, expected: list[Any]) -> None:
    """One call, or text."""
    assert expected == _read(answer, tool_format="llama")


def test_text_stays_text_when_a_call_comes_behind_it_in_a_piece_of_its_own() -> None:
    """Where a piece begins means nothing."""
    assert [f"I say {LLAMA_CALL}"] == _read("I say ", LLAMA_CALL, tool_format="llama")
