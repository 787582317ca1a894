"""The typed Python client for what OpenAI's SDK lacks: adapters, experiments, feedback, health. Sync and async.

    with Hotswap() as hotswap:
        hotswap.adapters.promote("support", "v2")

Chat, models, files and jobs: use `openai` with the server's `/v1` as its base URL. Errors are in `clients.errors`,
results in `clients.results`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from clients import calls
from clients.calls import ArmSpec, Call, ExperimentSpec, GuardrailSpec, WeightSpec
from clients.errors import error_of, no_answer
from clients.http import API_KEY_VARIABLE, is_local
from clients.results import Feedback, Health, Readiness, Route
from clients.sdk_resources import (
    AdaptersResource,
    AsyncAdaptersResource,
    AsyncExperimentsResource,
    AsyncShadowsResource,
    ExperimentsResource,
    ShadowsResource,
)

__all__ = [
    "AdaptersResource",
    "ArmSpec",
    "AsyncAdaptersResource",
    "AsyncExperimentsResource",
    "AsyncHotswap",
    "AsyncShadowsResource",
    "ExperimentSpec",
    "ExperimentsResource",
    "GuardrailSpec",
    "Hotswap",
    "ShadowsResource",
    "WeightSpec",
]

_DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 10.0
_MAX_TIMEOUT_S = 86_400.0
_MAX_RETRIES = 10
_MAX_DELAY_S = 60.0  # a server that asks for more gets its error raised
_FIRST_DELAY_S = 0.5  # where the server names no time; doubled each time
_RETRIED = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
_Result = TypeVar("_Result", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class _Retries:
    """Answers by which nothing was started are asked for again, after the time that the server names."""

    max_retries: int

    def delay_s(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait before the next attempt; None if the answer stands."""
        if response.status_code not in _RETRIED or attempt >= self.max_retries:
            return None
        if response.headers.get("x-should-retry") == "false":
            return None
        try:
            delay = float(response.headers["retry-after"])
        except (KeyError, ValueError):  # a date: nobody here sends one
            return float(min(_FIRST_DELAY_S * 2**attempt, _MAX_DELAY_S))
        return delay if 0 <= delay <= _MAX_DELAY_S else None


def _settings(base_url: str | None, api_key: str | None, timeout_s: float, max_retries: int) -> dict[str, Any]:
    """What both kinds of httpx client are made from.

    Raises:
        ValueError: a timeout or a number of retries is out of bounds.
    """
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s: expected more than 0 and at most {_MAX_TIMEOUT_S:g} seconds, found {timeout_s}")
    if not 0 <= max_retries <= _MAX_RETRIES:
        raise ValueError(f"max_retries: expected 0 to {_MAX_RETRIES}, found {max_retries}")
    url = base_url or os.environ.get("HOTSWAP_URL") or _DEFAULT_URL
    key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
        "trust_env": not is_local(url),
    }


class Hotswap:
    """Speaks to one server; close it, or use it in a `with` block.

    Args:
        base_url: Where the server listens, with or without `/v1`; else `HOTSWAP_URL`, else this machine's port 8000.
        api_key: Else `HOTSWAP_API_KEY`, else none is sent.
        timeout_s: Seconds that the server may be silent in one attempt.
        max_retries: How often a 429 or 503 is asked for again, after its `Retry-After`.
        transport: Sends the requests instead of httpx's own.

    Raises:
        ValueError: a timeout or a number of retries is out of bounds.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_settings(base_url, api_key, timeout_s, max_retries), transport=transport)
        self._retries = _Retries(max_retries)
        self.adapters = AdaptersResource(self)
        self.experiments = ExperimentsResource(self)
        self.shadows = ShadowsResource(self)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def health(self) -> Health:
        """The API process is alive; it says nothing about the engine."""
        return self.send(calls.health())

    def ready(self) -> Readiness:
        """The engine takes requests, and how busy it is.

        Raises:
            UnavailableError: it does not.
        """
        return self.send(calls.readiness())

    def feedback(self, response_id: str, metric: str, value: float | bool, *, comment: str | None = None) -> Feedback:
        """Report an outcome for a response; the same metric again replaces the value.

        Raises:
            NotFoundError: no such response.
        """
        return self.send(calls.feedback(response_id, metric, value, comment))

    def route(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Route:
        """Where a request for `auto` would go, and why: a text, or the messages of a conversation."""
        return self.send(calls.route(text, messages, metadata))

    def send(self, call: Call[_Result]) -> _Result:
        """Send a call, again where the server asks for it, and read its answer.

        Raises:
            ApiError: the server refused, failed or can't be reached.
        """
        attempt = 0
        while True:
            with call.options() as options:
                response = self._request(call.method, call.path, options)
            if (delay_s := self._retries.delay_s(response, attempt)) is None:
                break
            time.sleep(delay_s)
            attempt += 1
        if response.is_error:
            raise error_of(response)
        return call.read(response)

    def download(self, path: str, target: Path) -> Path:
        """Write an answer's body to a file that must not exist yet; nothing is left if it breaks off.

        Raises:
            FileExistsError: the target is there.
            ApiError: the server refused, failed, broke off or can't be reached.
        """
        with target.open("xb") as file:
            try:
                with self._http.stream("GET", path) as response:
                    if response.is_error:
                        response.read()
                        raise error_of(response)
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            except httpx.TransportError as error:
                target.unlink()
                raise no_answer(error) from None
            except BaseException:
                target.unlink()
                raise
        return target

    def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise no_answer(error) from None


class AsyncHotswap:
    """`Hotswap` for an event loop: the same arguments and methods, to be awaited; use it in an `async with` block."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(base_url, api_key, timeout_s, max_retries), transport=transport)
        self._retries = _Retries(max_retries)
        self.adapters = AsyncAdaptersResource(self)
        self.experiments = AsyncExperimentsResource(self)
        self.shadows = AsyncShadowsResource(self)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def health(self) -> Health:
        """See `Hotswap.health`."""
        return await self.send(calls.health())

    async def ready(self) -> Readiness:
        """See `Hotswap.ready`."""
        return await self.send(calls.readiness())

    async def feedback(
        self, response_id: str, metric: str, value: float | bool, *, comment: str | None = None
    ) -> Feedback:
        """See `Hotswap.feedback`."""
        return await self.send(calls.feedback(response_id, metric, value, comment))

    async def route(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Route:
        """See `Hotswap.route`."""
        return await self.send(calls.route(text, messages, metadata))

    async def send(self, call: Call[_Result]) -> _Result:
        """See `Hotswap.send`."""
        attempt = 0
        while True:
            with call.options() as options:
                response = await self._request(call.method, call.path, options)
            if (delay_s := self._retries.delay_s(response, attempt)) is None:
                break
            await asyncio.sleep(delay_s)
            attempt += 1
        if response.is_error:
            raise error_of(response)
        return call.read(response)

    async def download(self, path: str, target: Path) -> Path:
        """See `Hotswap.download`."""
        with target.open("xb") as file:
            try:
                async with self._http.stream("GET", path) as response:
                    if response.is_error:
                        await response.aread()
                        raise error_of(response)
                    async for chunk in response.aiter_bytes():
                        file.write(chunk)
            except httpx.TransportError as error:
                target.unlink()
                raise no_answer(error) from None
            except BaseException:
                target.unlink()
                raise
        return target

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise no_answer(error) from None
