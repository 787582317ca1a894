"""Calls of /v1/adapters on a site."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.engine import Site, on_site

__all__ = ["API", "HELLO", "call"]

API = "/v1/adapters"
HELLO = {"role": "user", "content": "hello there"}


def call(site: Site, method: str, path: str, **options: Any) -> httpx.Response:
    """One request below `API`, and its answer."""

    async def scenario(http: httpx.AsyncClient) -> httpx.Response:
        return await http.request(method, f"{API}{path}", **options)

    return on_site(site, scenario)
