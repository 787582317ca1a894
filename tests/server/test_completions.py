"""POST /v1/completions: what follows a text, as clients of the older endpoint read it; and the missing embeddings."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx
import openai
import pytest

from server.messages import SubmitCommand
from tests.support.engine import RECIPES, Reference, Site, encode, on_site
from tests.support.sdk import with_sdk

FIRST, SECOND, *_ = RECIPES
PATH = "/v1/completions"
TEXT = "hello there"
NUM_TOKENS = 10


def _body(prompt: Any = TEXT, **fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, **fields}


def _post(site: Site, *bodies: dict[str, Any], path: str = PATH) -> list[httpx.Response]:
    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post(path, json=body) for body in bodies]

    return on_site(site, scenario)


def _choices(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _requests(site: Site) -> list[Any]:
    return [command.request for command in site.transport.commands if isinstance(command, SubmitCommand)]


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], list(encode(TEXT)), [list(encode(TEXT))]])
def test_completion_continues_the_prompt_when_it_comes_in_any_form(
    prompt: Any, site: Site, reference_answers: Reference
) -> None:
    """Text or tokens, without a template around them; by the version that was named; one exposure under the id."""
    site.publish("legal", FIRST)
    (response,) = _post(site, _body(prompt, model="legal"))
    body = response.json()
    (choice,) = _choices(response)
    assert reference_answers.text(encode(TEXT), FIRST, NUM_TOKENS) == choice["text"]
    assert (0, None) == (choice["index"], choice["logprobs"])
    assert ("text_completion", "legal") == (body["object"], body["model"])
    assert len(encode(TEXT)) == body["usage"]["prompt_tokens"]
    assert "legal@v1" == response.headers["x-hotswap-version"]
    (row,) = site.exposures()
    assert (f"cmpl-{response.headers['x-request-id'].removeprefix('req_')}", body["id"]) == (row.response_id,) * 2


def test_completion_reads_control_tokens_when_they_are_in_the_text(site: Site) -> None:
    """Who sends raw text brings the template along; the tokens are those of the rendered conversation."""
    text = site.base.tokenizer.decode(site.prompt(TEXT))
    _post(site, _body(text))
    assert [site.prompt(TEXT)] == [request.prompt for request in _requests(site)]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_in_the_prompts_order_when_there_are_several(
    stream: bool, site: Site, reference_answers: Reference
) -> None:
    """Prompt by prompt, n of each; every prompt is counted once, and there is one exposure."""
    prompts = ["a", "some longer text"]
    fields = {"n": 2, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    (response,) = _post(site, _body(prompts, **fields))
    texts: dict[int, str] = defaultdict(str)
    if stream:
        *chunks, last = _chunks(response)
        for chunk in chunks:
            assert None is chunk["usage"]
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert [] == last["choices"]
        usage = last["usage"]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
        assert 4 == len(reasons)
    else:
        texts = {choice["index"]: choice["text"] for choice in _choices(response)}
        usage = response.json()["usage"]
    expected = [reference_answers.text(encode(prompt), None, NUM_TOKENS) for prompt in prompts for _ in range(2)]
    assert expected == [texts[index] for index in range(4)]
    assert sum(len(encode(prompt)) for prompt in prompts) == usage["prompt_tokens"]
    assert 1 == len(site.exposures())


def test_seeds_are_counted_for_each_prompt_when_there_are_several(site: Site) -> None:
    """A prompt gets the answers that it would get alone."""
    _post(site, _body(["a", "b"], n=2, seed=5, temperature=1))
    assert [5, 6, 5, 6] == [request.sampling.seed for request in _requests(site)]


def test_answer_is_sixteen_tokens_when_no_limit_is_given(site: Site) -> None:
    """The wire's own default, and null means it too."""
    body = _body()
    del body["max_tokens"]
    _post(site, body, _body(max_tokens=None))
    assert [16, 16] == [request.sampling.max_tokens for request in _requests(site)]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_stands_before_the_answer_when_it_is_echoed(stream: bool, site: Site) -> None:
    """Once for each answer, tokens as their text."""
    plain, echoed, of_tokens = _post(
        site,
        _body(),
        _body([TEXT], echo=True, n=2, stream=stream),
        _body(list(encode(TEXT)), echo=True, n=2, stream=stream),
    )
    expected = {index: TEXT + _choices(plain)[0]["text"] for index in range(2)}
    for response in (echoed, of_tokens):
        found: dict[int, str] = defaultdict(str)
        for choice in [c for chunk in _chunks(response) for c in chunk["choices"]] if stream else _choices(response):
            found[choice["index"]] += choice["text"]
        assert expected == found


def test_logprobs_are_columns_when_they_are_asked_for(site: Site) -> None:
    """Those of chat in the older form, the same whole and in chunks; offsets count characters of the answer."""
    fields = {"logprobs": 3, "temperature": 1.2, "seed": 4, "max_tokens": 40}
    whole, streamed = _post(site, _body(**fields), _body(**fields, stream=True))
    (choice,) = _choices(whole)
    columns = choice["logprobs"]
    assert {"tokens", "token_logprobs", "top_logprobs", "text_offset"} == set(columns)
    assert {len(columns["tokens"])} == {len(column) for column in columns.values()}
    for name, logprob, top in zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True):
        assert logprob == top[name]
        assert len(top) in (3, 4)
    chunks = [chunk["choices"][0]["logprobs"] for chunk in _chunks(streamed)]
    for key, column in columns.items():
        assert column == [item for part in chunks for item in part[key]], key
    ends = [*columns["text_offset"][1:], len(choice["text"])]
    assert any(name.startswith("bytes:") for name in columns["tokens"])
    for name, start, end in zip(columns["tokens"], columns["text_offset"], ends, strict=True):
        assert name.startswith("bytes:") or name == choice["text"][start:end]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a" * 200}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_completion_is_refused_naming_the_field_when_the_body_is_wrong(
    fields: dict[str, Any], param: str, site: Site
) -> None:
    """Nothing reaches the engine."""
    (response,) = _post(site, _body(**fields))
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert param == error["param"].split(".")[0]
    assert [] == site.transport.commands


def test_completion_takes_neutral_values_when_clients_send_them(site: Site) -> None:
    """Null where nothing is wanted, and as many of the best as there are."""
    (response,) = _post(site, _body(suffix=None, best_of=2, n=2, logprobs=None, echo=None, stop=None, user=None))
    assert 2 == len(_choices(response))


def test_openai_client_reads_completions_when_streamed_or_not(site: Site, reference_answers: Reference) -> None:
    """The SDK finds text, log-probabilities and usage where it looks for them."""
    site.publish("legal", SECOND)

    async def scenario(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.completions.create(**_body(model="legal", logprobs=2))
        options = {"include_usage": True}
        stream = await client.completions.create(**_body(model="legal", stream=True, stream_options=options))
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_sdk(site, scenario)
    expected = reference_answers.text(encode(TEXT), SECOND, NUM_TOKENS)
    assert expected == whole.choices[0].text
    assert expected == "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert whole.usage == chunks[-1].usage
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.token_logprobs)


def test_embeddings_are_404_with_the_reason_when_they_are_asked_for(site: Site) -> None:
    """In the envelope, so that the SDK raises its own error."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="makes no embeddings") as caught:
            await client.embeddings.create(model="base", input="a")
        assert "not_found" == caught.value.code

    with_sdk(site, scenario)
