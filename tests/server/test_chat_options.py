"""The options of a chat request from the wire to the engine and back: forms, log-probabilities, several answers."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from adapters.registry import Registry
from server.engine.core import Constraint, SamplingParams
from server.messages import CancelCommand, SubmitCommand
from tests.support.engine import RECIPES, Bench, Exchange, Reference, Site, encode, on_site
from tests.support.sdk import with_sdk

FIRST, SECOND, *_ = RECIPES
CHAT = "/v1/chat/completions"
TEXT = "hello there"
NUM_TOKENS = 10
NO_BLANKS = {str(token): -100 for token in encode(" \n")}
SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["word", "count"],
    "additionalProperties": False,
}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}


def _body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": TEXT}]
    return {"model": "base", "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS, **fields}


def _post(site: Site, *bodies: dict[str, Any]) -> list[httpx.Response]:
    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post(CHAT, json=body) for body in bodies]

    return on_site(site, scenario)


def _choices(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _sampling(site: Site) -> list[SamplingParams]:
    return [command.request.sampling for command in site.transport.commands if isinstance(command, SubmitCommand)]


def _joined(logprobs: dict[str, Any]) -> str:
    return bytes(byte for entry in logprobs["content"] for byte in entry["bytes"] or ()).decode("utf-8", "replace")


# Parameters ----------------------------------------------------------------------------------------------------------


def test_every_option_reaches_the_engine_when_it_is_given(site: Site) -> None:
    """Field by field; what is left open is what leaves the model alone."""
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.2,
        "seed": 9,
        "stop": ["END"],
        "max_tokens": 6,
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": True,
    }
    _post(site, _body(**options, top_logprobs=4, logit_bias={"5": 1.5, "0": -2}), _body(), _body(logprobs=True))
    full, plain, alone = _sampling(site)
    expected = {**options, "stop": ("END",), "top_logprobs": 4, "logit_bias": ((5, 1.5), (0, -2.0))}
    del expected["logprobs"]
    assert SamplingParams(**expected) == full
    assert SamplingParams(NUM_TOKENS, temperature=0) == plain
    assert SamplingParams(NUM_TOKENS, temperature=0, top_logprobs=0) == alone


NEUTRAL = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": None,
    "functions": None,
    "logit_bias": {},
    "logprobs": False,
    "max_completion_tokens": None,
    "metadata": {"run": "1"},
    "modalities": ["text"],
    "moderation": None,
    "n": 1,
    "parallel_tool_calls": False,
    "prediction": None,
    "presence_penalty": 0,
    "prompt_cache_key": "k",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "safety_identifier": "u",
    "seed": None,
    "service_tier": "auto",
    "stop": None,
    "store": False,
    "stream": False,
    "stream_options": None,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": None,
    "top_p": 1,
    "verbosity": "medium",
    "web_search_options": None,
}


def test_neutral_values_change_nothing_when_clients_send_them(site: Site) -> None:
    """Nulls, the wire's own defaults, and fields that are taken without effect: the engine is asked for the same."""
    bodies = [_body(), _body(**NEUTRAL), *(_body(**{name: None}) for name in NEUTRAL)]
    assert {200} == {response.status_code for response in _post(site, *bodies)}
    assert {SamplingParams(NUM_TOKENS, temperature=0)} == set(_sampling(site))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"min_tokens": NUM_TOKENS + 1}, "min_tokens"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format"),
        ({"response_format": FORMAT, "guided_choice": ["a", "b"]}, "guided_choice"),
        ({"response_format": FORMAT, "min_tokens": 1}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": ["a", "b"], "stop": "a"}, "stop"),
        ({"response_format": BAD_SCHEMA}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"n": 9}, "n"),
        ({"top_k": -1}, "top_k"),
        ({"guided_choice": ["a", 1]}, "guided_choice.1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_400_naming_the_field_when_options_make_no_sense(
    fields: dict[str, Any], param: str, stream: bool, site: Site
) -> None:
    """Alone or together; nothing reaches the engine and no exposure is written."""
    (response,) = _post(site, _body(**fields, stream=stream))
    assert (400, param) == (response.status_code, response.json()["error"]["param"])
    assert param.split(".")[0] in response.json()["error"]["message"]
    assert site.transport.commands == []
    assert site.exposures() == []


def test_chat_is_400_when_the_schema_is_too_much_to_follow(site: Site) -> None:
    """It compiles, and its first step breaks the limits: the field is named, and the next request is answered."""
    many = {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {} for j in range(10)}} for i in range(200)]}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": many}}
    failed, streamed, fine = _post(
        site, _body(response_format=asked), _body(response_format=asked, stream=True), _body()
    )
    assert [400, 400, 200] == [failed.status_code, streamed.status_code, fine.status_code]
    assert failed.json()["error"] == streamed.json()["error"]
    assert failed.json()["error"]["param"] == "response_format"
    assert ["constraint_failed"] * 2 == [row.finish_reason for row in site.exposures()][:2]


# Forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_answer_follows_its_schema_when_one_is_given(stream: bool, site: Site) -> None:
    """Whatever the random model wants; also by an adapter."""
    site.publish("legal", FIRST)
    fields = {"response_format": FORMAT, "max_tokens": 60, "logit_bias": NO_BLANKS, "stream": stream}
    for response in _post(site, _body(**fields), _body(**fields, model="legal", temperature=1.5)):
        if stream:
            deltas = [chunk["choices"][0] for chunk in _chunks(response)]
            text = "".join(choice["delta"].get("content", "") for choice in deltas)
            reason = deltas[-1]["finish_reason"]
        else:
            (choice,) = _choices(response)
            text, reason = choice["message"]["content"], choice["finish_reason"]
        reply = json.loads(text)
        assert reason == "stop"
        assert reply["word"] in ("yes", "no")
        assert 0 <= reply["count"] <= 9


def test_answer_is_one_of_the_choices_when_some_are_given(site: Site) -> None:
    """Each of several answers too."""
    allowed = ["billing", "delivery", "returns"]
    (response,) = _post(site, _body(guided_choice=allowed, n=4, temperature=2, seed=1))
    texts = [choice["message"]["content"] for choice in _choices(response)]
    assert set(texts) <= set(allowed)
    assert len(set(texts)) > 1
    assert [Constraint("choices", choices=tuple(allowed))] * 4 == [params.constraint for params in _sampling(site)]


def test_answer_is_free_when_the_format_is_text(site: Site, reference_answers: Reference) -> None:
    """The format that every request has."""
    (response,) = _post(site, _body(response_format={"type": "text"}))
    expected = reference_answers.text(site.prompt(TEXT), None, NUM_TOKENS)
    assert expected == _choices(response)[0]["message"]["content"]


def test_openai_client_parses_an_answer_into_a_model_when_it_asks_for_one(site: Site) -> None:
    """The SDK's own way to structured output: a pydantic class there and back."""

    class Reply(BaseModel):
        is_known: bool
        level: int | None

    async def scenario(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(
            **{**_body(max_tokens=60), "response_format": Reply, "logit_bias": NO_BLANKS, "seed": 3}
        )

    parsed = with_sdk(site, scenario).choices[0].message.parsed
    assert isinstance(parsed, Reply)


# Log-probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 2, "stop": ["e", "a"], "max_tokens": 60}])
def test_logprobs_join_to_the_answer_when_streamed_or_not(options: dict[str, Any], site: Site) -> None:
    """The same entries whole and in chunks; each chunk's join to its text, but for text that may become a stop."""
    fields = {"logprobs": True, "top_logprobs": 3, **options}
    whole, streamed = _post(site, _body(**fields), _body(**fields, stream=True))
    (choice,) = _choices(whole)
    assert choice["message"]["content"] == _joined(choice["logprobs"])
    chunks = [chunk["choices"][0] for chunk in _chunks(streamed)]
    entries = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert choice["logprobs"]["content"] == entries
    for entry in entries:
        assert {"token", "logprob", "bytes", "top_logprobs"} == set(entry)
        assert 3 == len(entry["top_logprobs"])
        if entry["bytes"] is not None:  # the model may choose a special token in the middle
            assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


def test_logprobs_are_null_when_they_are_not_asked_for(site: Site) -> None:
    """In whole answers and in every chunk."""
    whole, streamed = _post(site, _body(), _body(stream=True))
    assert None is _choices(whole)[0]["logprobs"]
    assert {None} == {chunk["choices"][0]["logprobs"] for chunk in _chunks(streamed)}


def test_special_token_is_named_without_bytes_when_it_is_a_candidate(site: Site) -> None:
    """The end of turn is a candidate like others, and adds nothing to a text; ignored, it is in the answer too."""
    end = str(site.base.tokenizer.eos_token_id)
    fields = {"logprobs": True, "top_logprobs": 20, "ignore_eos": True, "logit_bias": {end: 100}}
    response, streamed = _post(site, _body(**fields), _body(**fields, stream=True))
    (choice,) = _choices(response)
    chunks = [chunk["choices"][0]["logprobs"] for chunk in _chunks(streamed)]
    assert choice["logprobs"]["content"] == [entry for part in chunks if part for entry in part["content"]]
    assert "" == choice["message"]["content"] == _joined(choice["logprobs"])
    assert [("<|im_end|>", None)] * NUM_TOKENS == [
        (entry["token"], entry["bytes"]) for entry in choice["logprobs"]["content"]
    ]


def test_openai_client_reads_logprobs_when_streamed_or_not(site: Site) -> None:
    """The SDK's classes hold what was sent."""

    async def scenario(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        fields = _body(logprobs=True, top_logprobs=2)
        whole = await client.chat.completions.create(**fields)
        stream = await client.chat.completions.create(**fields, stream=True)
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_sdk(site, scenario)
    content = whole.choices[0].logprobs.content
    assert content == [entry for chunk in chunks if (p := chunk.choices[0].logprobs) for entry in p.content]
    assert content[0].top_logprobs[0].logprob == content[0].logprob < 0
    assert whole.choices[0].message.content == bytes(b for entry in content for b in entry.bytes).decode(
        "utf-8", "replace"
    )


# Several answers -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_their_own_seeds_when_there_are_several(site: Site) -> None:
    """Answer i of seed s is the one answer of seed s + i; the prompt is counted once; there is one exposure."""
    alone = _post(site, *(_body(temperature=1, seed=40 + index) for index in range(3)))
    (together,) = _post(site, _body(temperature=1, seed=40, n=3))
    choices = _choices(together)
    assert [0, 1, 2] == [choice["index"] for choice in choices]
    assert [_choices(response)[0]["message"]["content"] for response in alone] == [
        choice["message"]["content"] for choice in choices
    ]
    counts = [response.json()["usage"]["completion_tokens"] for response in alone]
    num_prompt = len(site.prompt(TEXT))
    assert {
        "prompt_tokens": num_prompt,
        "completion_tokens": sum(counts),
        "total_tokens": num_prompt + sum(counts),
    } == together.json()["usage"]
    row = site.exposures()[-1]
    assert (len(site.exposures()), row.response_id) == (4, together.json()["id"])
    assert (row.prompt_tokens, row.completion_tokens) == (num_prompt, sum(counts))
    assert row.finish_reason in ("stop", "length")


def test_answers_differ_when_no_seed_is_given(site: Site) -> None:
    """Each has its own luck."""
    (response,) = _post(site, _body(temperature=2, n=4))
    assert len({choice["message"]["content"] for choice in _choices(response)}) > 1
    assert [None] * 4 == [params.seed for params in _sampling(site)]


def test_chunks_name_their_answer_when_several_are_streamed(site: Site) -> None:
    """They come between each other; each answer has its role first, then its text, then its end; usage is one."""
    fields = _body(temperature=1, seed=40, n=3, logprobs=True)
    whole, streamed = _post(site, fields, {**fields, "stream": True, "stream_options": {"include_usage": True}})
    chunks = _chunks(streamed)
    assert ([], whole.json()["usage"]) == (chunks[-1]["choices"], chunks[-1]["usage"])
    by_index: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append(choice)
    order = [chunk["choices"][0]["index"] for chunk in chunks[:-1]]
    assert sorted(order) != order, "the answers run beside each other"
    for expected in _choices(whole):
        mine = by_index[expected["index"]]
        assert ["assistant"] == [choice["delta"]["role"] for choice in mine if "role" in choice["delta"]]
        assert "role" in mine[0]["delta"]
        assert expected["message"]["content"] == "".join(choice["delta"].get("content", "") for choice in mine)
        assert [expected["finish_reason"]] == [choice["finish_reason"] for choice in mine if choice["finish_reason"]]
        assert expected["finish_reason"] == mine[-1]["finish_reason"]
        entries = [entry for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        # The second request finds its prompt's beginning in the prefix cache: the last bits may differ.
        for one, other in zip(expected["logprobs"]["content"], entries, strict=True):
            assert one["bytes"] == other["bytes"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-5)


def test_chat_is_429_when_there_is_no_room_for_all_answers(bench: Bench, registry: Registry, tmp_path: Path) -> None:
    """All or none: two of three places are taken, so two answers are refused whole and one is not."""
    site = Site.build(bench, registry, tmp_path, max_waiting=3)
    site.transport.permits = 0

    async def scenario(http: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        running = [asyncio.create_task(http.post(CHAT, json=_body(n=2)))]
        while site.client.num_in_flight < 2:
            await asyncio.sleep(0)
        refused = await http.post(CHAT, json=_body(n=2))
        assert site.client.num_in_flight == 2
        running.append(asyncio.create_task(http.post(CHAT, json=_body(n=1))))
        while site.client.num_in_flight < 3:
            await asyncio.sleep(0)
        site.transport.permits = None
        return refused, await asyncio.gather(*running)

    refused, answered = on_site(site, scenario)
    site.engine.close()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert [200, 200] == [response.status_code for response in answered]
    assert (len(site.exposures()), site.client.num_in_flight) == (2, 0)


@pytest.mark.parametrize(
    ("limits", "n", "reason"),
    [
        ({"max_waiting": 2}, 3, "3 answers were asked for; this server takes 2"),
        ({"max_queued_tokens": 128}, 4, "4 answers may take 160 tokens with their prompts; this server takes 128"),
    ],
)
def test_chat_is_400_when_so_many_answers_never_fit(
    limits: dict[str, int], n: int, reason: str, bench: Bench, registry: Registry, tmp_path: Path
) -> None:
    """A retry could not help, so clients must not be told to; what fits is answered."""
    site = Site.build(bench, registry, tmp_path, **limits)  # type: ignore[arg-type]
    refused, fine = _post(site, _body(n=n), _body(n=2))
    site.engine.close()
    assert (400, "n") == (refused.status_code, refused.json()["error"]["param"])
    assert reason in refused.json()["error"]["message"]
    assert "x-should-retry" not in refused.headers
    assert 200 == fine.status_code
    assert (1, 0) == (len(site.exposures()), site.client.num_in_flight)


@pytest.mark.parametrize("stream", [False, True])
def test_all_answers_are_cancelled_when_the_client_leaves(stream: bool, site: Site) -> None:
    """Every row is free, and one exposure has what was generated for all of them."""
    site.transport.permits = 4

    async def scenario(http: httpx.AsyncClient) -> None:
        exchange = Exchange(site.app, CHAT, _body(stream=stream, n=3, max_tokens=60))
        if stream:
            await exchange.start()
            await exchange.chunk()
        while site.transport.permits:
            await asyncio.sleep(0)
        assert site.engine.num_running == 3
        await exchange.hang_up()
        while not site.exposures() or site.client.num_in_flight or site.engine.num_running:
            await asyncio.sleep(0)

    on_site(site, scenario)
    (row,) = site.exposures()
    assert (row.finish_reason, row.error) == ("cancelled", None)
    assert row.completion_tokens > 3
    name = row.response_id.removeprefix("chatcmpl-")
    assert [CancelCommand(f"{name}-{index}") for index in range(3)] == site.transport.commands[3:]


@pytest.mark.parametrize("stream", [False, True])
def test_request_fails_when_one_of_its_answers_fails(stream: bool, site: Site) -> None:
    """The others are cancelled, the exposure has the reason, and there is one error."""
    site.transport.permits = 0

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        asked = asyncio.create_task(http.post(CHAT, json=_body(n=3, stream=stream, temperature=1, max_tokens=60)))
        while site.engine.num_waiting < 3:
            await asyncio.sleep(0)
        site.transport.permits = 4
        while site.transport.permits:
            await asyncio.sleep(0)
        broken = site.engine._running[1]
        assert broken.sampler is not None
        broken.sampler.uniform = "no number"  # type: ignore[assignment]
        site.transport.permits = None
        return await asked

    response = on_site(site, scenario)
    if stream:
        error = json.loads(response.text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))["error"]
    else:
        assert response.status_code == 500
        error = response.json()["error"]
    assert error["code"] == "engine_failure"
    (row,) = site.exposures()
    assert (row.finish_reason, row.error is None) == ("engine_failed", False)
    assert (site.engine.num_running, site.client.num_in_flight) == (0, 0)
    assert 2 == sum(isinstance(command, CancelCommand) for command in site.transport.commands)


def test_answers_are_the_versions_when_there_are_several(site: Site, reference_answers: Reference) -> None:
    """Greedy ones are all the same, and by the adapter that was named."""
    site.publish("legal", SECOND)
    (response,) = _post(site, _body(model="legal", n=2))
    expected = reference_answers.text(site.prompt(TEXT), SECOND, NUM_TOKENS)
    assert [expected] * 2 == [choice["message"]["content"] for choice in _choices(response)]


def test_openai_client_takes_extensions_when_they_are_in_the_extra_body(site: Site) -> None:
    """That is how clients of the SDK send what OpenAI doesn't have."""

    async def scenario(client: openai.AsyncOpenAI) -> Any:
        extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "guided_choice": ["yes", "no"]}
        return await client.chat.completions.create(**_body(n=2), extra_body=extra)

    answer = with_sdk(site, scenario)
    assert {"yes", "no"} >= {choice.message.content for choice in answer.choices}
    assert [(3, 0.1, 1.1)] * 2 == [(p.top_k, p.min_p, p.repetition_penalty) for p in _sampling(site)]
