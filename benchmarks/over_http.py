"""Closed-loop load on a running server, ours or a peer's: so many clients, each asking again when it is answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from benchmarks.in_process import story_prompt
from clients.http import ApiError, ChatAnswer, HotswapClient
from clients.load import LoadRequest, LoadSummary, run_load, summarise_load

__all__ = ["Choice", "Endpoint", "Load", "find_options", "run_closed_loop", "shuffled"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What answers a request: a model's name and, where a server wants more to choose an adapter, further fields."""

    model: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server. `options` go into every request's body."""

    name: str
    url: str
    base: Choice
    adapters: tuple[Choice, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """Who is asked, in turn, by how many clients, how often in all, for how many tokens each."""

    choices: Sequence[Choice]
    concurrency: int
    num_requests: int
    num_tokens: int


def run_closed_loop(endpoint: Endpoint, load: Load) -> LoadSummary:
    """Send a load and wait for all of it.

    Raises:
        ApiError: a request failed, or the server reported no tokens: the figure would be worth nothing.
    """
    return asyncio.run(_run(endpoint, load))


def find_options(endpoint: Endpoint) -> dict[str, Any]:
    """The fields that make every answer equally long and greedy; without `ignore_eos` where a server refuses it."""
    options = {"temperature": 0, "ignore_eos": True}
    return options if asyncio.run(_accepts(endpoint, options)) else {"temperature": 0}


def shuffled(choices: Sequence[Choice], num_requests: int, *, seed: int) -> list[Choice]:
    """`num_requests` choices, each as often as the others, in random order.

    In turn would be the worst order for slots that drop the least recently used, and no order that users keep to.
    """
    order = list(islice(cycle(choices), num_requests))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order of requests, no secret
    return order


async def _run(endpoint: Endpoint, load: Load) -> LoadSummary:
    requests = [
        _request(endpoint, choice, load.num_tokens) for choice in islice(cycle(load.choices), load.num_requests)
    ]
    async with HotswapClient(endpoint.url) as client:
        summary = summarise_load(await run_load(client, requests, concurrency=load.concurrency))
    if summary.errors:
        failed = f"{endpoint.name}: {len(summary.errors)} of {summary.num_requests} requests failed"
        raise ApiError(f"{failed}, the first with: {summary.errors[0]}", status=0, code=None)
    if not summary.num_tokens:
        raise ApiError(f"{endpoint.name} reports no usage, so that its tokens can't be counted", status=0, code=None)
    return summary


async def _accepts(endpoint: Endpoint, options: dict[str, Any]) -> bool:
    fields = {**endpoint.base.fields, **options, "max_tokens": 1}
    messages = [{"role": "user", "content": story_prompt()}]
    async with HotswapClient(endpoint.url) as client:
        try:
            async for _ in client.stream_chat(endpoint.base.model, messages, ChatAnswer(), **fields):
                pass
        except ApiError as error:
            if error.status not in (400, 422):
                raise
            return False
    return True


def _request(endpoint: Endpoint, choice: Choice, num_tokens: int) -> LoadRequest:
    fields = {**endpoint.options, **choice.fields, "max_tokens": num_tokens}
    return LoadRequest(choice.model, story_prompt(), fields)
