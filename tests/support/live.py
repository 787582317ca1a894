"""A site over real HTTP: for clients that open sockets, and block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from tests.support.engine import Site

__all__ = ["serving"]


@contextlib.contextmanager
def serving(site: Site) -> Iterator[str]:
    """Serve a site from a thread on a free port, its engine up, for the length of the block; yields the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(site.app, lifespan="off", log_config=None))
        is_up = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(_serve(site, server, listener, is_up)))
        thread.start()
        try:
            assert is_up.wait(60), "the site did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def _serve(site: Site, server: uvicorn.Server, listener: socket.socket, is_up: threading.Event) -> None:
    tasks = [asyncio.create_task(site.client.run()), asyncio.create_task(server.serve(sockets=[listener]))]
    while site.client.status is None or not server.started:
        await asyncio.sleep(0.001)
    is_up.set()
    await tasks[1]
    tasks[0].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[0]
