"""Chat with the headers that say what answered: for the load generator, the demo and the command line.

For chat alone any OpenAI client does; for adapters, experiments and feedback there is `clients.sdk`.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from clients.errors import ApiError, error_of, no_answer

__all__ = ["API_KEY_VARIABLE", "ApiError", "ChatAnswer", "HotswapClient", "is_local"]

API_KEY_VARIABLE = "HOTSWAP_API_KEY"
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(slots=True)
class ChatAnswer:
    """An answer and what gave it. A stream fills `text` piece by piece and the rest at its end, and reads no calls."""

    id: str = ""
    text: str = ""
    finish_reason: str | None = None
    version: str = ""
    digest: str | None = None
    arm: str | None = None
    route: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class HotswapClient:
    """Speaks to one server; use it in an `async with` block.

    Args:
        base_url: Where the server listens, without `/v1`.
        api_key: What the server asks for; if not given, the environment's `HOTSWAP_API_KEY`, if that is set.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        api_key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=_TIMEOUT,
            limits=limits,
            trust_env=not is_local(base_url),
        )

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def is_ready(self) -> bool:
        """Whether the server is up and its engine takes requests."""
        try:
            return (await self._http.get("/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def chat(self, model: str, messages: Sequence[dict[str, Any]], **options: Any) -> ChatAnswer:
        """Ask and wait for the whole answer; `options` are fields of the request body.

        Raises:
            ApiError: the server refused, failed or can't be reached.
        """
        response = await self._send("POST", "/v1/chat/completions", {"model": model, "messages": messages, **options})
        body = response.json()
        choice = body["choices"][0]
        answer = _answer_from_headers(response.headers)
        answer.id, answer.usage = body["id"], body["usage"]
        answer.text, answer.finish_reason = choice["message"]["content"] or "", choice["finish_reason"]
        answer.tool_calls = choice["message"].get("tool_calls") or []
        return answer

    async def stream_chat(
        self, model: str, messages: Sequence[dict[str, str]], answer: ChatAnswer, **options: Any
    ) -> AsyncIterator[str]:
        """Ask and yield the text as it comes; `answer` is filled in as far as it is known.

        Raises:
            ApiError: the server refused, failed, broke off or can't be reached.
        """
        body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body | options) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response)
                given = _answer_from_headers(response.headers)
                answer.version, answer.arm, answer.route = given.version, given.arm, given.route
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        text = _take_chunk(json.loads(line.removeprefix("data: ")), answer)
                        if text:
                            yield text
        except httpx.TransportError as error:
            raise no_answer(error) from None
        if answer.finish_reason is None:
            raise ApiError("the stream ended without a finish reason", status=0, code=None)

    async def _send(self, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise no_answer(error) from None
        if response.is_error:
            raise error_of(response)
        return response


def _answer_from_headers(headers: httpx.Headers) -> ChatAnswer:
    return ChatAnswer(
        version=headers.get("x-hotswap-version", ""),
        digest=headers.get("x-hotswap-digest"),
        arm=headers.get("x-hotswap-arm"),
        route=headers.get("x-hotswap-route", ""),
    )


def _take_chunk(chunk: dict[str, Any], answer: ChatAnswer) -> str:
    if "error" in chunk:
        raise ApiError(chunk["error"]["message"], status=0, code=chunk["error"].get("code"))
    answer.id = chunk["id"]
    answer.usage = chunk.get("usage") or answer.usage
    text = ""
    for choice in chunk["choices"]:
        text += choice["delta"].get("content") or ""
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    answer.text += text
    return text


def is_local(url: str) -> bool:
    """Whether a URL is on this machine, which a proxy of the environment can't reach."""
    return httpx.URL(url).host in _LOCAL_HOSTS
