"""A real server over a tiny base model, driven by the unmodified OpenAI client and by our own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from adapters.manifest import ADAPTER_WEIGHTS_FILE
from clients.errors import ConflictError
from clients.http import HotswapClient
from clients.load import LoadRequest, LoadResult, run_load
from clients.local_server import running_server
from clients.sdk import Hotswap
from tests.e2e.conftest import Home, make_home
from tests.support.tiny import save_random_adapter

_MESSAGE = {"role": "user", "content": "x"}
_GREEDY = {"temperature": 0, "max_tokens": 40}


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def _ask(url: str, model: str, prompt: str = "How are you?") -> str:
    completion = _client(url).chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=40
    )
    return completion.choices[0].message.content or ""


def test_openai_client_reads_whole_answer_when_not_streaming(tiny_server: str) -> None:
    """The unmodified SDK gets text, usage, finish reason and our headers."""
    raw = _client(tiny_server).chat.completions.with_raw_response.create(
        model="legal", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=7
    )
    completion = raw.parse()
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 7
    assert raw.headers["x-hotswap-alias"] == "legal"
    assert raw.headers["x-hotswap-version"] == "legal@v1"
    assert raw.headers["x-hotswap-route"] == "alias"
    assert raw.headers["x-request-id"] == f"req_{completion.id.removeprefix('chatcmpl-')}"


def test_openai_client_reads_the_same_answer_when_streaming(tiny_server: str) -> None:
    """The pieces of a stream make up the whole answer, and usage comes with the last chunk."""
    stream = _client(tiny_server).chat.completions.create(
        model="support",
        messages=[{"role": "user", "content": "How are you?"}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=40,
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    usage = chunks[-1].usage
    assert text == _ask(tiny_server, "support")
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_each_model_gives_its_own_answer_when_asked_the_same(tiny_server: str) -> None:
    """Base and both adapters differ, so none is answered by another."""
    answers = {_ask(tiny_server, model) for model in ("base", "legal", "support")}
    assert len(answers) == 3


def test_adapter_is_uploaded_pinned_and_deleted_when_driven_by_our_client(
    tiny_server: str, tiny_home: Home, tmp_path: Path
) -> None:
    """Through all processes: the body passes the limit of its route, the worker pins, and reports that."""
    folder = save_random_adapter(tmp_path / "adapter", tiny_home.base, seed=7)
    assert (folder / ADAPTER_WEIGHTS_FILE).stat().st_size > 20_000
    with Hotswap(tiny_server) as hotswap:
        adapters = hotswap.adapters
        digest = adapters.upload(folder, "uploaded").digest
        answer = _ask(tiny_server, "uploaded")
        assert answer not in (_ask(tiny_server, "base"), _ask(tiny_server, "legal"))
        adapters.pin("uploaded")
        for _ in range(300):
            where = adapters.get("uploaded").current.residency
            if where is not None and where.pinned and where.place == "slot":
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"the version was not pinned: {where}")
        assert digest in hotswap.ready().resident_versions
        with pytest.raises(ConflictError):
            adapters.unload("uploaded")
        adapters.unpin("uploaded")
        adapters.unload("uploaded")
        assert answer == _ask(tiny_server, "uploaded")
        assert ["uploaded@v1"] == adapters.delete("uploaded").versions
        with pytest.raises(openai.NotFoundError):
            _ask(tiny_server, "uploaded")


def test_unknown_model_is_not_found_when_called(tiny_server: str) -> None:
    """A name that nobody published is a 404 in OpenAI's shape, never the base model's answer."""
    with pytest.raises(openai.NotFoundError) as caught:
        _ask(tiny_server, "legla")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_models_lists_base_aliases_and_versions_when_asked(tiny_server: str) -> None:
    """Everything that can be called is listed."""
    names = {model.id for model in _client(tiny_server).models.list()}
    assert {"base", "legal", "legal@v1", "support", "support@v1"} <= names


def test_promotion_answers_the_next_request_when_streams_are_running(
    tiny_home: Home, tiny_server: str, tmp_path: Path
) -> None:
    """Under load: no request fails, each is answered whole by one version, and the swap needs no restart."""
    tiny_home.import_random("swap", tmp_path / "one", seed=11)
    tiny_home.import_random("swap", tmp_path / "two", seed=12, promote=False)
    prompts = [f"Question number {index}" for index in range(60)]
    results = asyncio.run(_promote_in_the_middle(tiny_home, tiny_server, prompts))
    assert [result.error for result in results if result.error] == []
    assert {result.answer.version for result in results} == {"swap@v1", "swap@v2"}
    for result in results:
        solo = _ask(tiny_server, result.answer.version, result.request.prompt)
        assert solo == result.answer.text
    assert _version(tiny_server, "swap") == "swap@v2"


async def _promote_in_the_middle(home: Home, url: str, prompts: list[str]) -> list[LoadResult]:
    promoted = asyncio.Event()
    num_done = 0

    async def promote_once(_: LoadResult) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == len(prompts) // 4:
            await asyncio.to_thread(home.run, "adapters", "promote", "swap@v2")
            promoted.set()

    async with HotswapClient(url) as client:
        first = [LoadRequest("swap", prompt, dict(_GREEDY)) for prompt in prompts[:40]]
        before = await run_load(client, first, concurrency=8, on_result=promote_once)
        await promoted.wait()
        second = [LoadRequest("swap", prompt, dict(_GREEDY)) for prompt in prompts[40:]]
        after = await run_load(client, second, concurrency=8)
    assert {result.answer.version for result in after} == {"swap@v2"}
    return before + after


def _version(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return str(response.headers["x-hotswap-version"])


def test_experiment_is_sticky_and_reported_when_users_come_back(
    tiny_home: Home, tiny_server: str, tmp_path: Path
) -> None:
    """A user always meets the same arm; feedback reaches the report; stopping ends the split."""
    tiny_home.import_random("split", tmp_path / "one", seed=21)
    tiny_home.import_random("split", tmp_path / "two", seed=22)
    tiny_home.run("experiments", "create", "split", "--arms", "A@v1=50", "B@v2=50", "--salt", "fixed")
    arms: dict[str, set[str]] = {}
    with httpx.Client(base_url=tiny_server, timeout=60) as client:
        for user in [f"user-{number}" for number in range(12)] * 2:
            body = {"model": "split", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "user": user}
            response = client.post("/v1/chat/completions", json=body)
            arms.setdefault(user, set()).add(response.headers["x-hotswap-arm"])
            is_good = response.headers["x-hotswap-arm"] == "B"
            feedback = {"id": response.json()["id"], "metric": "good", "value": is_good}
            assert client.post("/v1/feedback", json=feedback).status_code == 200
    assert all(len(seen) == 1 for seen in arms.values())
    report = tiny_home.run("experiments", "show", "split")
    by_arm = {arm["arm"]["name"]: arm for arm in report["arms"]}
    good = {name: [m["mean"] for m in arm["metrics"] if m["metric"] == "good"] for name, arm in by_arm.items()}
    assert {"A": [0.0], "B": [1.0]} == good
    assert sum(arm["num_exposures"] for arm in by_arm.values()) == 24
    assert sum(arm["num_units"] for arm in by_arm.values()) == 12
    tiny_home.run("experiments", "stop", "split")
    assert _version(tiny_server, "split") == "split@v2"


def test_more_adapters_than_slots_are_all_served_when_called_in_turn(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Two slots, five adapters, all at once: the least recently used give way, without a restart."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none", HOTSWAP_SERVE_SLOTS="2")
    labels = [home.import_random(f"domain{seed}", tmp_path / str(seed), seed=seed) for seed in range(5)]

    async def ask_all(url: str) -> list[LoadResult]:
        async with HotswapClient(url) as client:
            requests = [LoadRequest(label, "Hello", dict(_GREEDY)) for label in labels * 3]
            return await run_load(client, requests, concurrency=15)

    with running_server(home.environment, home.path / "server.log") as url:
        results = asyncio.run(ask_all(url))
        solo = {label: _ask(url, label, "Hello") for label in labels}
    assert [result.error for result in results] == [None] * 15
    assert [result.answer.text for result in results] == [solo[label] for label in labels * 3]


def test_killed_engine_ends_requests_and_comes_back_when_restarted(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """SIGKILL of the worker: a running stream ends in an error, not silently; later requests succeed."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none")
    home.import_random("legal", tmp_path / "legal", seed=1)
    with running_server(home.environment, home.path / "server.log") as url:
        error, recovered = asyncio.run(_kill_worker_in_the_middle(url, home.path / "server.log"))
    assert error is not None
    assert "engine" in error
    assert recovered


async def _kill_worker_in_the_middle(url: str, log: Path) -> tuple[str | None, bool]:
    async with HotswapClient(url) as client:

        async def kill_at_first_token() -> LoadResult:
            # Ever so many short words: the tiny model does not end by itself before the kill.
            request = LoadRequest("legal", "Hello", {"temperature": 1.5, "max_tokens": 400, "seed": 1})
            running = asyncio.create_task(run_load(client, [request], concurrency=1))
            await asyncio.sleep(0)
            os.kill(_worker_pid(log), signal.SIGKILL)
            return (await running)[0]

        result = await kill_at_first_token()
        for _ in range(600):
            if await client.is_ready():
                break
            await asyncio.sleep(0.1)
        answer = await client.chat("legal", [{"role": "user", "content": "Hello"}], max_tokens=3)
        return result.error, answer.version == "legal@v1"


def _worker_pid(log: Path) -> int:
    (line,) = [line for line in log.read_text().splitlines() if "engine_ready" in line and "pid=" in line]
    return int(next(word for word in line.split() if word.startswith("pid=")).removeprefix("pid="))


def test_bad_bodies_are_answered_in_the_envelope_when_sent(tiny_server: str) -> None:
    """Not JSON, a wrong type and an unknown field: 400 with the field's name, from the real server too."""
    bodies = [
        (b"{", None),
        (json.dumps({"model": "base", "messages": "hi"}).encode(), "messages"),
        (
            json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}], "functions": []}).encode(),
            "functions",
        ),
    ]
    for content, field in bodies:
        response = httpx.post(
            f"{tiny_server}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if field:
            assert error["param"] == field


def test_key_opens_a_server_that_others_can_reach_until_it_is_revoked(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Refused to start without one; then the SDK and the command line get in with it, and nobody without."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none")
    refused = home.try_run("serve", "--host", "0.0.0.0")
    assert (1, True) == (refused.returncode, "hotswap keys create NAME" in refused.stderr)
    made = home.run("keys", "create", "web")
    secret, key_id = made["secret"], made["key"]["id"]
    log = home.path / "server.log"
    with running_server(home.environment, log, "--host", "0.0.0.0") as url:
        with pytest.raises(openai.AuthenticationError):
            _ask(url, "base")
        with_key = _client(url).with_options(api_key=secret)
        assert "base" in [model.id for model in with_key.models.list()]
        chat = ("chat", "base", "Hello", "--url", url, "--max-tokens", "3")
        assert "invalid_api_key" in httpx.get(f"{url}/v1/models").text
        assert 1 == home.try_run(*chat).returncode
        assert "base" == replace(home, environment=home.environment | {"HOTSWAP_API_KEY": secret}).run(*chat)["version"]
        home.run("keys", "revoke", key_id)
        with pytest.raises(openai.AuthenticationError, match="was revoked"):
            with_key.models.list()
    written = log.read_text()
    assert f"key={key_id}" in written
    assert "API keys    web (chat)" in written
    assert secret[16:] not in written
