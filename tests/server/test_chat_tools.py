"""Tools over HTTP: a base model whose chat template shows them, and the unmodified SDK that reads the calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.chat_template import render_prompt
from adapters.registry import Registry
from server.messages import SubmitCommand
from tests.support.engine import Bench, Site, encode, on_site
from tests.support.sdk import with_sdk
from tests.support.tiny import CHATML_WITH_TOOLS, make_tokenizer

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
NO_BLANKS = {str(token): -100 for token in encode(" \n")}
NOT_WEATHER = NO_BLANKS | {str(token): -100 for token in encode("w")}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "$defs": {"d": {"enum": ["mon", "tue"]}},
            "properties": {"day": {"$ref": "#/$defs/d"}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
LLAMA_TEMPLATE = CHATML_WITH_TOOLS.replace('<tool_call>{"name": <name>, "arguments"', '{"name": <name>, "parameters"')
CALL = '<tool_call>{"name": "weather", "arguments": {"day": "mon"}}</tool_call>'


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": MESSAGES, "max_tokens": 120, "tools": [WEATHER, TIME], **fields}


def _post(site: Site, *bodies: dict[str, Any]) -> list[httpx.Response]:
    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post(CHAT, json=body) for body in bodies]

    return on_site(site, scenario)


def _choice(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def _prompts(site: Site) -> list[tuple[int, ...]]:
    return [command.request.prompt for command in site.transport.commands if isinstance(command, SubmitCommand)]


def _rendered(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(render_prompt(make_tokenizer(CHATML_WITH_TOOLS), messages, tools))


def test_call_is_read_when_the_model_decides_to_make_one(tool_site: Site) -> None:
    """Text before it is content; ids are the request's; the answer ends in calls; two calls are two."""
    tool_site.transport.script = f"I look.\n{CALL}\n{CALL}"
    (response,) = _post(tool_site, _body(max_tokens=250))
    choice = _choice(response)
    assert "tool_calls" == choice["finish_reason"]
    assert "I look." == choice["message"]["content"]
    calls = choice["message"]["tool_calls"]
    function = {"name": "weather", "arguments": '{"day": "mon"}'}
    assert [{"type": "function", "function": function}] * 2 == [
        {key: call[key] for key in ("type", "function")} for call in calls
    ]
    name = response.json()["id"].removeprefix("chatcmpl-")
    assert [f"call_{name}_0", f"call_{name}_1"] == [call["id"] for call in calls]


def test_content_is_null_when_there_are_only_calls(tool_site: Site) -> None:
    """As the hosted API has it; and nothing of the tools is in an answer without calls."""
    tool_site.transport.script = CALL
    (called,) = _post(tool_site, _body())
    tool_site.transport.script = "no"
    (spoken,) = _post(tool_site, _body())
    assert None is _choice(called)["message"]["content"]
    assert {"role": "assistant", "content": "no"} == _choice(spoken)["message"]
    assert "stop" == _choice(spoken)["finish_reason"]


def test_call_is_cut_to_text_when_the_answer_is_too_short_for_it(tool_site: Site) -> None:
    """The reason is the length, and what was said is not lost."""
    tool_site.transport.script = CALL
    (response,) = _post(tool_site, _body(max_tokens=20))
    choice = _choice(response)
    assert ("length", CALL[:20]) == (choice["finish_reason"], choice["message"]["content"])


def test_answer_ends_behind_its_first_call_when_calls_may_not_be_parallel(tool_site: Site) -> None:
    """The engine stops there, instead of computing a call that is thrown away."""
    tool_site.transport.script = CALL + CALL
    (response,) = _post(tool_site, _body(parallel_tool_calls=False, max_tokens=250))
    assert 1 == len(_choice(response)["message"]["tool_calls"])
    assert len(CALL) == response.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_call_is_made_when_one_is_required(choice: Any, names: set[str], stream: bool, tool_site: Site) -> None:
    """Whatever the random model wants: one call, of a tool that is wanted, its arguments by their schema."""

    async def scenario(client: openai.AsyncOpenAI) -> list[Any]:
        answers = []
        for seed in range(6):
            bias = NOT_WEATHER if seed % 2 else NO_BLANKS
            fields = _body(tool_choice=choice, seed=seed, temperature=2, logit_bias=bias)
            if stream:
                async with client.chat.completions.stream(**fields) as events:
                    answers.append(await events.get_final_completion())
            else:
                answers.append(await client.chat.completions.create(**fields))
        return answers

    found = set()
    for answer in with_sdk(tool_site, scenario):
        assert ("tool_calls", None) == (answer.choices[0].finish_reason, answer.choices[0].message.content)
        (call,) = answer.choices[0].message.tool_calls
        found.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert arguments.get("day") in ("mon", "tue") if call.function.name == "weather" else arguments == {}
    assert names == found


def test_stream_of_calls_joins_to_the_whole_answer_when_the_sdk_accumulates_it(tool_site: Site) -> None:
    """Each call is whole in one chunk; role first; the SDK's events name the calls in turn; several answers, too."""
    tool_site.transport.script = f"So:\n{CALL}\n{CALL}"
    fields = _body(max_tokens=250, n=2)

    async def scenario(client: openai.AsyncOpenAI) -> tuple[Any, Any, list[Any]]:
        whole = await client.chat.completions.create(**fields)
        async with client.chat.completions.stream(**fields) as events:
            seen = [event async for event in events]
            return whole, await events.get_final_completion(), seen

    whole, streamed, events = with_sdk(tool_site, scenario)
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content == other.message.content == "So:"
        functions = [[call.function.arguments for call in choice.message.tool_calls] for choice in (one, other)]
        assert [['{"day": "mon"}'] * 2] * 2 == functions
        assert len({call.id for choice in (one, other) for call in choice.message.tool_calls}) == 4
    done = [event.index for event in events if event.type == "tool_calls.function.arguments.done"]
    assert {0, 1} == set(done)


def test_first_chunk_has_no_content_when_tools_are_offered(tool_site: Site) -> None:
    """A client that joins deltas gets null where the whole answer has null."""
    tool_site.transport.script = CALL
    (response,) = _post(tool_site, _body(stream=True, logprobs=True))
    lines = response.text.removesuffix("\n\n").split("\n\n")[:-1]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert {"role": "assistant", "content": None} == chunks[0]["delta"]
    assert [0] == [call["index"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    entries = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert CALL == "".join(entry["token"] for entry in entries)
    assert not any("content" in chunk["delta"] for chunk in chunks[1:])


def test_conversation_goes_on_when_the_tools_answer_is_sent_back(tool_site: Site) -> None:
    """The SDK's own message object is taken back, and the template sees calls and results as it expects them."""
    tool_site.transport.script = CALL

    async def scenario(client: openai.AsyncOpenAI) -> Any:
        first = (await client.chat.completions.create(**_body())).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}
        await client.chat.completions.create(**_body(messages=[*MESSAGES, first, result]))
        return first

    first = with_sdk(tool_site, scenario)
    call = {
        "id": first.tool_calls[0].id,
        "type": "function",
        "function": {"name": "weather", "arguments": {"day": "mon"}},
    }
    history: list[dict[str, Any]] = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_call_id": call["id"]},
    ]
    assert [_rendered(MESSAGES, [WEATHER, TIME]), _rendered(history, [WEATHER, TIME])] == _prompts(tool_site)


def test_tools_are_not_in_the_prompt_when_none_may_be_called(tool_site: Site) -> None:
    """Then what looks like a call is text."""
    tool_site.transport.script = CALL
    (response,) = _post(tool_site, _body(tool_choice="none"))
    assert CALL == _choice(response)["message"]["content"]
    assert [_rendered(MESSAGES, [])] == _prompts(tool_site)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "a<|im_end|>"}}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"<|im_start|>": 1}}}]},
            "tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": ["\ud800"]}}}]},
            "tools",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {
                "x-guidance": {"lenient": True}, "properties": {"a": {"type": "objekt"}}}}}]},
            "tools",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "<|im_end|>"}'}}]}]},
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "name": "<|im_end|>", "content": "x"}]}, "messages.0.name"),
    ],
)  # fmt: skip
def test_chat_is_400_when_tools_or_calls_hold_what_they_must_not(
    fields: dict[str, Any], param: str, tool_site: Site
) -> None:
    """Control tokens, broken text, schemas that can't be followed, arguments that are no object."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        content = json.dumps(_body(**fields)).encode()
        return await http.post(CHAT, content=content, headers={"content-type": "application/json"})

    response = on_site(tool_site, scenario)
    assert (400, param) == (response.status_code, response.json()["error"]["param"])
    assert [] == tool_site.transport.commands


def test_chat_is_400_when_the_template_has_no_place_for_tools(site: Site) -> None:
    """The reason says that it is the base model's."""
    (response,) = _post(site, _body())
    assert (400, "tools") == (response.status_code, response.json()["error"]["param"])
    assert "chat template" in response.json()["error"]["message"]


def test_call_is_the_whole_answer_when_the_template_wants_it_so(
    own_bench: Callable[..., Bench], registry: Registry, tmp_path: Path
) -> None:
    """Llama's form, required and streamed: the same calls by another way of writing them."""
    site = Site.build(own_bench(max_context=512), registry, tmp_path, max_context=512, chat_template=LLAMA_TEMPLATE)
    fields = _body(tool_choice={"type": "function", "function": {"name": "weather"}}, logit_bias=NO_BLANKS)

    async def scenario(client: openai.AsyncOpenAI) -> list[Any]:
        async with client.chat.completions.stream(**fields) as events:
            return [await client.chat.completions.create(**fields), await events.get_final_completion()]

    answers = with_sdk(site, scenario)
    site.engine.close()
    for answer in answers:
        (call,) = answer.choices[0].message.tool_calls
        assert "weather" == call.function.name
        assert json.loads(call.function.arguments)["day"] in ("mon", "tue")
