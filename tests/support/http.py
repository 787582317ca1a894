"""A site behind a real server on a real socket, for clients that speak HTTP themselves and for hanging up on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.engine import Site

__all__ = ["Attempts", "ServedSite", "serve_site", "wait_until"]

_SEND_BUFFER_BYTES = 16_384


@dataclass
class Attempts:
    """Stands before an app and notes every request: the SDK's count of retries, and the status of the answer.

    `before` is awaited with the attempt's number, from 1, before the app sees the request.
    """

    before: Callable[[int], Awaitable[None]] | None = None
    retry_counts: list[str | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """The app with this before it."""

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            headers = dict(scope["headers"])
            count = headers.get(b"x-stainless-retry-count")
            self.retry_counts.append(None if count is None else count.decode())
            if self.before is not None:
                await self.before(len(self.retry_counts))

            async def noting_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.statuses.append(message["status"])
                await send(message)

            await app(scope, receive, noting_send)

        return noting


@dataclass
class ServedSite:
    """A site that listens."""

    site: Site
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        """What OpenAI's clients take as `base_url`."""
        return f"{self.root}/v1"

    @property
    def root(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def start_engine(self) -> None:
        """Let the engine speak; call it in the server's loop."""
        self._listening = asyncio.create_task(self.site.client.run())
        while self.site.client.status is None:
            await asyncio.sleep(0)

    @property
    def num_tasks(self) -> int:
        """Tasks of the server's loop that are not done."""
        return len(asyncio.all_tasks(self.loop))


@contextlib.contextmanager
def serve_site(
    site: Site, *, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app, is_up: bool = True
) -> Iterator[ServedSite]:
    """Serve a site from a thread until the end of the block; `is_up` False leaves its engine for later."""
    with socket.socket() as listener:
        # Connections inherit it: what a client does not read must not disappear in the kernel's megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(wrap(site.app), lifespan="off", log_config=None, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        started: list[Any] = []

        async def run() -> None:
            served = ServedSite(site, listener.getsockname()[1], asyncio.get_running_loop())
            if is_up:
                await served.start_engine()
            started.append(served)
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(run(),), name="served-site")
        thread.start()
        try:
            wait_until(lambda: (bool(started) and server.started) or not thread.is_alive())
            yield started[0]
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds; the test's own time limit ends one that never does."""
    while not condition():
        time.sleep(0.005)
