"""Clients that others built on the OpenAI wire, unmodified, against the API on a real socket: LangChain and LiteLLM."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.registry import Registry
from tests.support import foreign_clients as foreign
from tests.support.engine import RECIPES, Bench, Reference, Site, encode
from tests.support.http import Attempts, ServedSite, serve_site, wait_until

FIRST, *_ = RECIPES
TEXT = "hello there"
NUM_TOKENS = 10
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS}
NO_BLANKS = {str(token): -100 for token in encode(" \n")}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's.",
        "parameters": {
            "properties": {"day": {"enum": ["mon", "tue"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def served(site: Site) -> Iterator[ServedSite]:
    """The API with one published version, listening."""
    site.publish("legal", FIRST)
    with serve_site(site) as listening:
        yield listening


@pytest.fixture
def served_tools(tool_site: Site) -> Iterator[ServedSite]:
    """The API over a base model whose template shows tools, listening."""
    with serve_site(tool_site) as listening:
        yield listening


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Call a function in a process that the clients have for themselves."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


@pytest.fixture
def expected(served: ServedSite, reference_answers: Reference) -> str:
    """The published version's answer."""
    return reference_answers.text(served.site.prompt(TEXT), FIRST, NUM_TOKENS)


# LangChain -----------------------------------------------------------------------------------------------------------


def test_langchain_answers_when_it_asks_in_any_way(
    served: ServedSite, expected: str, elsewhere: Callable[..., Any]
) -> None:
    """Whole, in a stream, and awaited; the counts of tokens arrive, in the stream too."""
    found = elsewhere(foreign.langchain_answers, served.url, TEXT, model="legal", **GREEDY)
    assert [expected] * 3 == found["texts"]
    assert 2 == len(found["totals"])
    assert 1 == len(set(found["totals"]))


def test_langchain_completes_when_it_uses_the_older_endpoint(
    served: ServedSite, reference_answers: Reference, elsewhere: Callable[..., Any]
) -> None:
    """Its class for completions, several prompts at once."""
    prompts = ["a", "b"]
    found = elsewhere(foreign.langchain_completions, served.url, prompts, model="legal", **GREEDY)
    assert [reference_answers.text(encode(prompt), FIRST, NUM_TOKENS) for prompt in prompts] == found


def test_langchain_gets_its_class_when_output_is_structured(served: ServedSite, elsewhere: Callable[..., Any]) -> None:
    """By the schema, which the answer has to follow."""
    options = {"model": "legal", "max_tokens": 60, "logit_bias": NO_BLANKS}
    assert elsewhere(foreign.langchain_structured, served.url, TEXT, **options)


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_langchain_reads_a_call_when_one_is_required(
    choice: str, served_tools: ServedSite, elsewhere: Callable[..., Any]
) -> None:
    """Its own words for `required` and for a named tool; streamed pieces join to the same kind of call."""
    options = {"model": "base", "max_tokens": 120, "logit_bias": NO_BLANKS}
    for calls in elsewhere(foreign.langchain_calls, served_tools.url, TEXT, WEATHER, choice, **options):
        ((name, arguments),) = calls
        assert ("weather", True) == (name, arguments["day"] in ("mon", "tue"))


def test_langchain_raises_its_own_errors_when_requests_are_refused(
    served: ServedSite, elsewhere: Callable[..., Any]
) -> None:
    """Kinds of the SDK's: by the code, and by words of the message where a prompt is too long."""
    cases = [{"model": "nobody"}, {"model": "legal", "temperature": 3}]
    expected = ["OpenAIModelNotFoundError", "OpenAIInvalidRequestError"]
    assert expected == elsewhere(foreign.langchain_errors, served.url, TEXT, cases)
    long = elsewhere(foreign.langchain_errors, served.url, "a" * 300, [{"model": "legal"}])
    assert ["OpenAIContextOverflowError"] == long


# LiteLLM -------------------------------------------------------------------------------------------------------------


def test_litellm_answers_when_it_asks_in_any_way(
    served: ServedSite, expected: str, elsewhere: Callable[..., Any]
) -> None:
    """Whole, in a stream with usage, and awaited."""
    found = elsewhere(foreign.litellm_answers, served.url, TEXT, model="openai/legal", **GREEDY)
    assert [expected] * 3 == found["texts"]
    assert 1 == len(set(found["totals"]))


def test_litellm_completes_when_it_uses_the_older_endpoint(
    served: ServedSite, reference_answers: Reference, elsewhere: Callable[..., Any]
) -> None:
    """Its name for it."""
    found = elsewhere(foreign.litellm_completion, served.url, TEXT, model="text-completion-openai/legal", **GREEDY)
    assert reference_answers.text(encode(TEXT), FIRST, NUM_TOKENS) == found


def test_litellm_reads_a_call_when_one_is_required(served_tools: ServedSite, elsewhere: Callable[..., Any]) -> None:
    """Whole, and joined from a stream by its own builder."""
    options = {"model": "openai/base", "max_tokens": 120, "logit_bias": NO_BLANKS}
    for calls in elsewhere(foreign.litellm_calls, served_tools.url, "hi", WEATHER, "required", **options):
        ((name, arguments),) = calls
        assert ("weather", True) == (name, json.loads(arguments)["day"] in ("mon", "tue"))


def test_litellm_raises_its_own_errors_when_requests_are_refused(
    served: ServedSite, elsewhere: Callable[..., Any]
) -> None:
    """By status, and by words of the message: it routes prompts that are too long to other models."""
    long = [{"role": "user", "content": "a" * 300}]
    cases = [
        {"model": "openai/nobody"},
        {"model": "openai/legal", "messages": long},
        {"model": "openai/legal", "top_p": 2},
    ]
    expected = ["NotFoundError", "ContextWindowExceededError", "BadRequestError"]
    assert expected == elsewhere(foreign.litellm_errors, served.url, cases)


# Retries -------------------------------------------------------------------------------------------------------------

RETRYING = [
    pytest.param(foreign.langchain_answer, {"model": "base", "max_retries": 1}, id="langchain"),
    pytest.param(foreign.litellm_answer, {"model": "openai/base", "max_retries": 1}, id="litellm"),
    pytest.param(foreign.litellm_answer, {"model": "openai/base", "num_retries": 1}, id="litellm-of-its-own"),
]


@pytest.mark.parametrize(("ask", "options"), RETRYING)
def test_client_asks_again_when_the_server_is_full(
    ask: Callable[..., str],
    options: dict[str, Any],
    bench: Bench,
    registry: Registry,
    tmp_path: Path,
    reference_answers: Reference,
    elsewhere: Callable[..., Any],
) -> None:
    """One 429 and then the answer."""
    site = Site.build(bench, registry, tmp_path, max_waiting=1)
    site.transport.permits = 0

    async def make_room(attempt: int) -> None:
        if attempt == 3:  # the first is the one that fills the server
            site.transport.permits = None
            while site.client.num_in_flight:
                await asyncio.sleep(0.001)

    attempts = Attempts(make_room)
    body = {"model": "base", "messages": [{"role": "user", "content": TEXT}], **GREEDY}
    with serve_site(site, wrap=attempts.wrap) as served, ThreadPoolExecutor(1) as pool:
        pool.submit(httpx.post, f"{served.url}/chat/completions", json=body, timeout=60)
        wait_until(lambda: site.client.num_in_flight == 1)
        text = elsewhere(ask, served.url, TEXT, **GREEDY, **options)
    site.engine.close()
    assert [200, 200, 429] == sorted(attempts.statuses)
    assert reference_answers.text(site.prompt(TEXT), None, NUM_TOKENS) == text


@pytest.mark.parametrize(("ask", "options"), RETRYING)
def test_client_asks_again_when_the_engine_is_starting(
    ask: Callable[..., str],
    options: dict[str, Any],
    site: Site,
    reference_answers: Reference,
    elsewhere: Callable[..., Any],
) -> None:
    """One 503 and then the answer."""
    listening: list[ServedSite] = []

    async def start_late(attempt: int) -> None:
        if attempt == 2:
            await listening[0].start_engine()

    attempts = Attempts(start_late)
    with serve_site(site, wrap=attempts.wrap, is_up=False) as served:
        listening.append(served)
        text = elsewhere(ask, served.url, TEXT, **GREEDY, **options)
    assert [503, 200] == attempts.statuses
    assert reference_answers.text(site.prompt(TEXT), None, NUM_TOKENS) == text


def test_clients_give_up_at_once_when_a_retry_can_not_help(site: Site, elsewhere: Callable[..., Any]) -> None:
    """One attempt each where the request can never fit."""
    attempts = Attempts()
    with serve_site(site, wrap=attempts.wrap) as served:
        langchain = elsewhere(foreign.langchain_errors, served.url, TEXT, [{"model": "base", "max_retries": 2, "n": 9}])
        litellm = elsewhere(foreign.litellm_errors, served.url, [{"model": "openai/base", "max_retries": 2, "n": 9}])
    assert (["OpenAIInvalidRequestError"], ["BadRequestError"]) == (langchain, litellm)
    assert [400, 400] == attempts.statuses
