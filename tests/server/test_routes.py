"""The API over a real engine, registry and database in one process, as clients see it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.manifest import ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, BaseReference
from adapters.registry import Registry
from tests.support.chat import (
    CHAT,
    NUM_TOKENS,
    TEXT,
    break_step,
    chat_body,
    error_of,
    expected_text,
    get,
    post,
)
from tests.support.engine import RECIPES, Bench, Reference, Site, on_site
from tests.support.sdk import with_sdk

FIRST, SECOND, THIRD, *_ = RECIPES


# Whole answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "adapter", "label", "route"),
    [
        ("base", None, "base", "base"),
        ("legal", SECOND, "legal@v2", "alias"),
        ("legal@v1", FIRST, "legal@v1", "version"),
    ],
)
def test_chat_answers_with_the_named_version_when_it_exists(
    model: str, adapter: str | None, label: str, route: str, site: Site, reference_answers: Reference
) -> None:
    """Text, usage and headers are those of the version that `model` names."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    (response,) = post(site, chat_body(model))
    body = response.json()
    assert response.status_code == 200
    assert expected_text(site, reference_answers, adapter) == body["choices"][0]["message"]["content"]
    tokens = reference_answers.tokens(site.prompt(TEXT), adapter, NUM_TOKENS)
    num_prompt = len(site.prompt(TEXT))
    usage = {"prompt_tokens": num_prompt, "completion_tokens": len(tokens), "total_tokens": num_prompt + len(tokens)}
    assert usage == body["usage"]
    is_stopped = tokens[-1] == site.base.tokenizer.eos_token_id
    assert ("stop" if is_stopped else "length") == body["choices"][0]["finish_reason"]
    assert ("chat.completion", model) == (body["object"], body["model"])
    headers = {name: response.headers.get(f"x-hotswap-{name}") for name in ("alias", "version", "route", "arm")}
    assert {"alias": model.partition("@")[0], "version": label, "route": route, "arm": None} == headers
    assert f"chatcmpl-{response.headers['x-request-id'].removeprefix('req_')}" == body["id"]


def test_chat_answers_by_digest_when_a_prefix_is_named(site: Site, reference_answers: Reference) -> None:
    """A version may be named by what it is made of."""
    version = site.publish("legal", FIRST).version
    site.publish("legal", SECOND)
    (response,) = post(site, chat_body(f"legal@{version.digest[:12]}"))
    assert expected_text(site, reference_answers, FIRST) == response.json()["choices"][0]["message"]["content"]
    assert version.digest == response.headers["x-hotswap-digest"]


def test_chat_answers_each_with_its_own_version_when_requests_run_together(
    site: Site, reference_answers: Reference
) -> None:
    """Concurrent requests for several aliases and the base are not mixed up."""
    adapters = {"a": FIRST, "b": SECOND, "c": THIRD}
    for alias, adapter in adapters.items():
        site.publish(alias, adapter)
    models = ["a", "base", "b", "c", "b", "base", "a", "c"]

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return list(await asyncio.gather(*(http.post(CHAT, json=chat_body(model)) for model in models)))

    for model, response in zip(models, on_site(site, scenario), strict=True):
        expected = expected_text(site, reference_answers, adapters.get(model))
        assert expected == response.json()["choices"][0]["message"]["content"]


def test_chat_stops_before_the_stop_string_when_the_answer_holds_it(site: Site, reference_answers: Reference) -> None:
    """The finish reason is `stop` and the string is not in the text."""
    whole = expected_text(site, reference_answers, None)
    stop = next(letter for letter in whole[2:] if letter != "\ufffd")
    (response,) = post(site, chat_body("base", stop=stop))
    choice = response.json()["choices"][0]
    assert (whole.split(stop)[0], "stop") == (choice["message"]["content"], choice["finish_reason"])


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["nobody", "legal@v7", "LEGAL", "a/b"])
def test_chat_is_404_when_the_model_is_unknown(model: str, stream: bool, site: Site) -> None:
    """Never the base model's answer; nothing reaches the engine and no exposure is written."""
    site.publish("legal", FIRST)
    (response,) = post(site, chat_body(model, stream=stream))
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert site.transport.commands == []
    assert site.exposures() == []


def test_chat_is_400_when_the_prompt_is_too_long(site: Site) -> None:
    """The code is the one that clients of the hosted API look for."""
    (response,) = post(site, chat_body("base", messages=[{"role": "user", "content": "a" * 500}]))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"functions": []}, "functions", "unknown_field"),
        ({"service_tier": "priority"}, "service_tier", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "mood": "n"}]}, "messages.0.mood", "unknown_field"),
    ],
)
def test_chat_is_400_naming_the_field_when_the_body_is_wrong(
    fields: dict[str, Any], param: str, code: str, site: Site
) -> None:
    """The envelope says where."""
    (response,) = post(site, chat_body("base", **fields))
    error = error_of(response)
    assert (400, param, code) == (response.status_code, error["param"], error["code"])


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_503_when_there_is_no_engine(stream: bool, site: Site) -> None:
    """With a hint to retry, before any answer begins."""
    (response,) = post(site, chat_body("base", stream=stream), is_up=False)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_429_when_too_many_are_in_flight(
    stream: bool, bench: Bench, registry: Registry, tmp_path: Path
) -> None:
    """The request beyond the bound is turned away at once, with a hint to retry; those before it are answered."""
    site = Site.build(bench, registry, tmp_path, max_waiting=2)
    site.transport.permits = 0

    async def scenario(http: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        running = [asyncio.create_task(http.post(CHAT, json=chat_body("base"))) for _ in range(2)]
        while site.client.num_in_flight < 2:
            await asyncio.sleep(0)
        refused = await http.post(CHAT, json=chat_body("base", stream=stream))
        site.transport.permits = None
        return refused, await asyncio.gather(*running)

    refused, answered = on_site(site, scenario)
    site.engine.close()
    assert (
        refused.status_code,
        error_of(refused)["code"],
        error_of(refused)["type"],
    ) == (429, "overloaded", "rate_limit_error")
    assert int(refused.headers["retry-after"]) > 0
    assert [response.status_code for response in answered] == [200, 200]
    assert len(site.exposures()) == 2
    assert site.client.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_500_with_the_reason_when_the_version_is_for_another_base(stream: bool, site: Site) -> None:
    """Both fingerprints are named, streamed or not; the failure is an exposure; others are still answered."""
    other = BaseReference(name="other", fingerprint="e" * 64, quantisation="none")
    site.publish("broken", FIRST, reference=other)
    site.publish("legal", SECOND)
    failed, fine = post(site, chat_body("broken", stream=stream), chat_body("legal", stream=stream))
    error = error_of(failed)
    assert (failed.status_code, error["code"]) == (500, "adapter_rejected")
    assert "e" * 64 in error["message"]
    assert site.base.reference.fingerprint in error["message"]
    assert fine.status_code == 200
    row, _ = site.exposures()
    assert (row.finish_reason, row.completion_tokens, row.alias) == ("adapter_failed", 0, "broken")
    assert "fingerprint" in str(row.error)


def test_chat_is_500_when_the_versions_file_was_changed(site: Site) -> None:
    """A file that is not what its manifest says is never served, and never the base instead."""
    version = site.publish("legal", FIRST).version
    path = site.registry.store.folder(version.digest) / ADAPTER_WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (response,) = post(site, chat_body("legal"))
    assert (response.status_code, error_of(response)["code"]) == (500, "adapter_rejected")


def test_chat_names_no_path_when_the_versions_manifest_is_missing(site: Site) -> None:
    """The table of answers hides an IntegrityError, since it may name files; so must a failed load."""
    version = site.publish("legal", FIRST).version
    (site.registry.store.folder(version.digest) / MANIFEST_FILE).unlink()
    (response,) = post(site, chat_body("legal"))
    assert str(site.registry.store.root) not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_500_when_the_model_fails_before_the_first_token(stream: bool, site: Site) -> None:
    """A proper status, no reason that names internals, an exposure; and the next request is answered."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        break_step(site, at=1)
        return [await http.post(CHAT, json=chat_body("base", stream=stream)) for _ in range(2)]

    failed, fine = on_site(site, scenario)
    assert (failed.status_code, error_of(failed)["code"]) == (500, "engine_failure")
    assert "secret" not in failed.text
    assert fine.status_code == 200
    assert [row.finish_reason if row.error else None for row in site.exposures()] == ["engine_failed", None]


# Experiments and feedback --------------------------------------------------------------------------------------------


def test_arm_is_sticky_when_a_user_comes_again(site: Site, reference_answers: Reference) -> None:
    """A user keeps the arm and its version; both arms are met; the exposure names experiment and arm."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    experiment = site.experiments.create("legal", [("A", "v1", 50), ("B", "v2", 50)], salt="s")
    users = [f"user-{index}" for index in range(8)]
    responses = post(site, *(chat_body("legal", user=user) for user in users + users))
    arms = [response.headers["x-hotswap-arm"] for response in responses]
    assert arms[:8] == arms[8:]
    assert {"A", "B"} == set(arms)
    adapters = {"A": ("legal@v1", FIRST), "B": ("legal@v2", SECOND)}
    for arm, response in zip(arms, responses, strict=True):
        label, adapter = adapters[arm]
        assert (label, "experiment") == (response.headers["x-hotswap-version"], response.headers["x-hotswap-route"])
        expected = expected_text(site, reference_answers, adapter)
        assert expected == response.json()["choices"][0]["message"]["content"]
    rows = {row.response_id: row for row in site.exposures()}
    for arm, response in zip(arms, responses, strict=True):
        row = rows[response.json()["id"]]
        assert (experiment.id, arm, "user") == (row.experiment_id, row.arm, row.unit_source)


def test_exposure_is_written_when_an_answer_succeeds(site: Site) -> None:
    """What served it, how long it was and how it ended."""
    version = site.publish("legal", FIRST).version
    (response,) = post(site, chat_body("legal"))
    body = response.json()
    (row,) = site.exposures()
    assert (body["id"], version.digest, 1) == (row.response_id, row.digest, row.number)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (row.prompt_tokens, row.completion_tokens)
    assert (body["choices"][0]["finish_reason"], None) == (row.finish_reason, row.error)


def test_feedback_is_recorded_when_it_names_a_response(site: Site) -> None:
    """It reaches the report of the experiment; the same metric again replaces the value."""
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    site.experiments.create("legal", [("A", "v1", 50), ("B", "v2", 50)])

    async def scenario(http: httpx.AsyncClient) -> str:
        answer = await http.post(CHAT, json=chat_body("legal", user="u"))
        for value in (False, True):
            feedback = {"id": answer.json()["id"], "metric": "thumbs_up", "value": value, "comment": "good"}
            response = await http.post("/v1/feedback", json=feedback)
            expected = {"object": "feedback", "id": answer.json()["id"], "metric": "thumbs_up"}
            assert (200, expected) == (response.status_code, response.json())
        return str(answer.headers["x-hotswap-arm"])

    arm = on_site(site, scenario)
    report = next(entry for entry in site.services.evaluation.report("legal").arms if entry.arm.name == arm)
    (metric,) = (metric for metric in report.metrics if metric.metric == "thumbs_up")
    assert (1, 1.0) == (metric.num_outcomes, metric.mean)


def test_feedback_is_404_when_the_response_is_unknown(site: Site) -> None:
    """An outcome of nothing is not kept."""
    (response,) = post(site, {"id": "chatcmpl-x", "metric": "ok", "value": 1}, path="/v1/feedback")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"metric": "a b"}, "metric"), ({"comment": 5}, "comment"), ({"stars": 5}, "stars"), ({"id": ""}, "id")],
)
def test_feedback_is_400_when_its_body_is_wrong(fields: dict[str, Any], param: str, site: Site) -> None:
    """The field is named."""
    (response,) = post(site, {"id": "chatcmpl-x", "metric": "ok", "value": 1, **fields}, path="/v1/feedback")
    assert (400, param) == (response.status_code, error_of(response)["param"])


@pytest.mark.parametrize("value", ["yes", None, [1], 1e13])
def test_feedback_says_what_a_value_may_be_when_it_is_none(value: object, site: Site) -> None:
    """Both kinds are named, with the bounds and what was found."""
    (response,) = post(site, {"id": "chatcmpl-x", "metric": "ok", "value": value}, path="/v1/feedback")
    assert (
        f"value: expected true, false or a number from -1e+12 to 1e+12, found {value!r}"
        == (error_of(response)["message"])
    )
    assert (400, "value") == (response.status_code, error_of(response)["param"])


# Models and operations -----------------------------------------------------------------------------------------------


def test_models_list_names_everything_callable_when_versions_are_published(site: Site) -> None:
    """The base, each alias and each of its versions; each of them can be retrieved and called."""
    assert [model["id"] for model in get(site, "/v1/models").json()["data"]] == ["base", "tiny"]
    site.publish("legal", FIRST)
    site.publish("legal", SECOND)
    site.publish("medical", THIRD)
    body = get(site, "/v1/models").json()
    names = [model["id"] for model in body["data"]]
    assert body["object"] == "list"
    assert names == ["base", "tiny", "legal", "legal@v1", "legal@v2", "medical", "medical@v1"]
    assert {"legal@v2"} == {model["parent"] for model in body["data"] if model["id"] == "legal"}
    assert body["data"] == [get(site, f"/v1/models/{name}").json() for name in names]
    assert {200} == {response.status_code for response in post(site, *(chat_body(name) for name in names))}


def test_model_is_404_when_it_is_unknown(site: Site) -> None:
    """By the same code as in chat."""
    response = get(site, "/v1/models/nobody")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_health_answers_when_there_is_no_engine(site: Site) -> None:
    """Alive is not the same as ready."""
    assert ((r := get(site, "/health", is_up=False)).status_code, r.json()) == (200, {"status": "ok"})
    response = get(site, "/ready", is_up=False)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert "retry-after" in response.headers


def test_ready_tells_the_load_when_the_engine_is_up(site: Site) -> None:
    """The counts are the worker's last word."""
    version = site.publish("legal", FIRST).version

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        await http.post(CHAT, json=chat_body("legal"))
        return await http.get("/ready")

    response = on_site(site, scenario)
    assert {
        "status": "ready",
        "running": 0,
        "waiting": 0,
        "in_flight": 0,
        "resident_versions": [version.digest],
    } == response.json()


def test_request_id_is_sent_back_when_a_route_answers_or_not(site: Site) -> None:
    """Every status has one, and each its own."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await http.get("/health"),
            await http.get("/ready"),
            await http.get("/nowhere"),
            await http.put("/health"),
            await http.post(CHAT, json={}),
            await http.post(CHAT, json=chat_body("nobody")),
            await http.post(CHAT, json=chat_body("base", stream=True)),
        ]

    responses = on_site(site, scenario)
    assert [response.status_code for response in responses] == [200, 200, 404, 405, 400, 404, 200]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(responses) == len(ids)
    assert all(value.startswith("req_") for value in ids)


# The unmodified OpenAI client ----------------------------------------------------------------------------------------


def test_openai_client_reads_answers_when_streamed_or_not(site: Site, reference_answers: Reference) -> None:
    """The SDK finds text, finish reason and usage where it looks for them."""
    site.publish("legal", FIRST)

    async def scenario(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(**chat_body("legal"))
        stream = await client.chat.completions.create(
            **chat_body("legal", stream=True, stream_options={"include_usage": True})
        )
        return whole, [chunk async for chunk in stream]

    whole, chunks = with_sdk(site, scenario)
    expected = expected_text(site, reference_answers, FIRST)
    assert expected == whole.choices[0].message.content
    assert expected == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    assert whole.usage == chunks[-1].usage


def test_openai_client_lists_models_when_some_are_published(site: Site) -> None:
    """`client.models.list()` and `.retrieve()` parse what we send."""
    site.publish("legal", FIRST)

    async def scenario(client: openai.AsyncOpenAI) -> tuple[list[str], str]:
        models = [model.id async for model in client.models.list()]
        return models, (await client.models.retrieve("legal@v1")).id

    assert with_sdk(site, scenario) == (["base", "tiny", "legal", "legal@v1"], "legal@v1")


@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_raises_its_own_errors_when_requests_are_refused(stream: bool, site: Site) -> None:
    """The status codes and the envelope are what its exception classes go by."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**chat_body("nobody", stream=stream))
        assert missing.value.code == "model_not_found"
        assert str(missing.value.request_id).startswith("req_")
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(**chat_body("base", stream=stream, top_p=2))
        assert (wrong.value.param, wrong.value.code) == ("top_p", "invalid_value")
        break_step(site, at=1)
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**chat_body("base", stream=stream))

    with_sdk(site, scenario)


def test_openai_client_raises_when_a_stream_breaks_off(site: Site) -> None:
    """An error in the middle of a stream is an exception in the client, not a short answer."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        break_step(site, at=5)
        stream = await client.chat.completions.create(**chat_body("base", stream=True))
        assert (await anext(stream)).choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError, match="the model failed"):
            [chunk async for chunk in stream]

    with_sdk(site, scenario)


def test_body_is_400_saying_what_to_send_when_its_type_is_not_json(site: Site) -> None:
    """What curl sends by itself."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = on_site(
        site, lambda http: http.post("/v1/chat/completions", content=b'{"model": "base"}', headers=headers)
    )
    assert 400 == response.status_code
    assert "content-type: application/json" in response.json()["error"]["message"]
