"""OpenAI's own client, unmodified, against the API in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
import httpx2
import openai

from tests.support.engine import Site, on_site

__all__ = ["with_sdk"]

Result = TypeVar("Result")


def with_sdk(site: Site, scenario: Callable[[openai.AsyncOpenAI], Awaitable[Result]]) -> Result:
    """Run a scenario with a client that reaches the API without a socket and repeats nothing by itself."""

    async def run(_: httpx.AsyncClient) -> Result:
        transport = httpx2.ASGITransport(app=site.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="unused", http_client=http, max_retries=0
            )
            return await scenario(client)

    return on_site(site, run)
