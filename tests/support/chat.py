"""Chat over a site: the usual body, what the model says to it, and how streams and errors are read."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.support.engine import Reference, Site, on_site

__all__ = [
    "CHAT",
    "NUM_TOKENS",
    "TEXT",
    "break_step",
    "chat_body",
    "error_of",
    "expected_text",
    "get",
    "post",
    "read_events",
    "text_of",
]

CHAT = "/v1/chat/completions"
TEXT = "hello there"
NUM_TOKENS = 10


def chat_body(model: str, **fields: Any) -> dict[str, Any]:
    """A greedy request with one user message."""
    messages = [{"role": "user", "content": TEXT}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS, **fields}


def post(site: Site, *bodies: dict[str, Any], path: str = CHAT, is_up: bool = True) -> list[httpx.Response]:
    """Post bodies one after another."""

    async def scenario(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post(path, json=body) for body in bodies]

    return on_site(site, scenario, is_up=is_up)


def get(site: Site, path: str, *, is_up: bool = True) -> httpx.Response:
    """Get one path."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.get(path)

    return on_site(site, scenario, is_up=is_up)


def expected_text(site: Site, reference: Reference, adapter: str | None) -> str:
    """What an adapter's version answers to the usual body; None is the base model."""
    return reference.text(site.prompt(TEXT), adapter, NUM_TOKENS)


def read_events(content: bytes) -> list[Any]:
    """The data of each server-sent event; every event has to be one data line and end with a blank line."""
    assert content.endswith(b"\n\n")
    lines = content.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def text_of(events: list[Any]) -> str:
    """The text of a stream that ended well."""
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"])


def break_step(site: Site, *, at: int) -> None:
    """Make the real model raise in its n-th forward pass from now."""
    left = at

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            handle.remove()
            raise RuntimeError("secret reason")

    handle = site.base.model.register_forward_pre_hook(count)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """An error's envelope, which has to be whole."""
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert response.headers["x-request-id"].startswith("req_")
    return error
